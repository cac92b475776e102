"""Images to pixels, by the checkpoint's own image processor.

    path, bytes, or a dataset's dictionary of both ──► Pillow: upright, RGB or grey ──► image processor ──► pixel_values

The processor is always the version that uses Pillow: it needs no torchvision, and its numbers are the same on every
machine. (The two versions resize a little differently.)
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from largemerge.calibration.batches import ForwardSignature, Sample
from largemerge.calibration.columns import MAX_PROBLEMS
from largemerge.calibration.image_settings import SETTINGS_FILES, check_processor_files, largest_of
from largemerge.checkpoint.side_files import PROCESSOR_FILES, check_side_files
from largemerge.errors import CalibrationError, CheckpointError, shorten
from largemerge.text_files import os_reason

PIXELS = "pixel_values"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats of images that are read, whatever a file is called; some of Pillow's others run programs."""


def load_image_processor(checkpoint: Path, where: str, *, trust_remote_code: bool) -> Any:
    """Loads the image processor in a checkpoint's folder.

    Raises:
        CalibrationError: If there is none, or it cannot be loaded.
    """
    import transformers

    auto: Any = transformers.AutoImageProcessor
    try:
        check_side_files(checkpoint, ("config.json", *PROCESSOR_FILES))
        check_processor_files(checkpoint)
        processor = auto.from_pretrained(
            str(checkpoint), backend="pil", trust_remote_code=trust_remote_code, local_files_only=True
        )
        check_processor_files(checkpoint, processor)
        return processor
    except CheckpointError as error:
        text = f"{where}: the image processor cannot be used: "
        raise CalibrationError(*(text + problem for problem in error.problems)) from None
    except Exception as error:  # Transformers raises many types for files that are missing or broken
        if not any((checkpoint / file).is_file() for file in SETTINGS_FILES):
            raise CalibrationError(
                f"{where}: no image processor in {checkpoint}; put the model's preprocessor_config.json there"
            ) from None
        reason = str(error).split(" Should have ")[0].split("\n")[0]
        raise CalibrationError(
            f"{where}: the image processor in {checkpoint} cannot be loaded ({type(error).__name__}: {reason})"
        ) from None


def read_images(
    groups: Sequence[Sequence[Sample]],
    processor: Any,
    folder: Path | None,
    signature: ForwardSignature,
    where: str,
    *,
    change: Callable[[int, Any], Any] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Opens and processes the images of all batches.

    Args:
        groups: Samples of each batch.
        processor: The checkpoint's image processor.
        folder: Folder that relative paths start from; `None` where there is no such folder.
        signature: Inputs of the model's forward.
        where: Candidate and data, for messages.
        change: Changes an opened image, given the row of its sample, before it is processed.

    Returns:
        Tensors of each batch: `pixel_values` `[B, ...]`, and what else the processor gives that the forward takes.

    Raises:
        CalibrationError: If images cannot be opened (it names several), or do not fit into one batch.
    """
    batches: list[dict[str, torch.Tensor]] = []
    problems: list[str] = []
    for samples in groups:
        images = []
        for sample in samples:
            try:
                image = _open_image(sample.image, folder, processor)
                images.append(image if change is None else change(sample.row, image))
            except CalibrationError as error:
                problems += [f"{where}: row {sample.row}: {problem}" for problem in error.problems]
        if len(problems) >= MAX_PROBLEMS:
            break
        if not problems:
            batches.append(_process(images, processor, signature, where))
    if problems:
        raise CalibrationError(*problems[:MAX_PROBLEMS])
    return batches


def outline_images(
    first: Path | None, processor: Any, signature: ForwardSignature, where: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Finds shape and dtype of one sample by forward argument, from one image: the first, or a blank one."""
    from PIL import Image

    if first is None:
        image = Image.new(_mode(processor), (224, 224))
    else:
        try:
            image = _open_image(str(first), None, processor)
        except CalibrationError as error:
            raise CalibrationError(*(f"{where}: {problem}" for problem in error.problems)) from None
    pixels = _process([image], processor, signature, where)
    return {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in pixels.items()}


def _mode(processor: Any) -> str:
    means = getattr(processor, "image_mean", None)
    return "L" if isinstance(means, list | tuple) and len(means) == 1 else "RGB"


def _open_image(value: Any, folder: Path | None, processor: Any) -> Any:
    """Opens a path, bytes, or a dictionary of both as `datasets` has it; upright, and in the processor's colours."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    if isinstance(path, bytes):
        path, content = None, path
    if content is None and path is None:
        raise CalibrationError("no image; expected bytes or a path")
    source = _resolve(str(path), folder) if content is None else io.BytesIO(content)
    name = "the image" if path is None else f"the image {path}"
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise CalibrationError(f"{name} is no file (looked for {source})")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=FORMATS) as image:
                return ImageOps.exif_transpose(image).convert(_mode(processor))
    except CalibrationError:
        raise
    except FileNotFoundError:
        raise CalibrationError(f"{name} does not exist (looked for {source})") from None
    except UnidentifiedImageError:
        raise CalibrationError(f"{name} cannot be opened: it is none of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise CalibrationError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels; expected fewer: make it smaller"
        ) from None
    except PermissionError as error:
        raise CalibrationError(f"{name} cannot be opened: {os_reason(error)}") from None
    except Exception as error:  # PIL's readers raise many types for broken files
        raise CalibrationError(
            f"{name} cannot be opened: it is damaged or cut off ({shorten(os_reason(error))})"
        ) from None


def _resolve(path: str, folder: Path | None) -> Path:
    if folder is None and not Path(path).is_absolute():
        raise CalibrationError(
            f"{path!r} is a relative path, and a Hub dataset has no folder here; expected a column of images"
        )
    return Path(path) if folder is None else folder / path


def _process(images: Sequence[Any], processor: Any, signature: ForwardSignature, where: str) -> dict[str, torch.Tensor]:
    kind = type(processor).__name__
    try:
        output = processor(list(images), return_tensors="pt")
    except Exception as error:  # processors are many; this is about their configuration, or these images together
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        sizes = sorted({image.size for image in images})
        if len(sizes) == 1:
            raise CalibrationError(f"{where}: {kind} cannot process an image of size {sizes[0]}: {reason}") from None
        raise CalibrationError(
            f"{where}: {kind} cannot process images of sizes {sizes} together; set its 'size' (and 'do_resize', "
            f"'do_center_crop') so that all come out alike, or batch_size: 1 ({reason})"
        ) from None
    tensors = {
        name: tensor.contiguous()
        for name, tensor in output.items()
        if name in signature.forward_arguments and isinstance(tensor, torch.Tensor)
    }
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if PIXELS not in tensors or any(shape[0] != len(images) for shape in shapes.values()):
        raise CalibrationError(
            f"{where}: {kind} makes {shapes} of {len(images)} images; expected 'pixel_values' with one row per "
            "image. Give such a model ready-made tensors in a .safetensors file"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool((tensor.abs() <= largest_of(name)).all()):
            raise CalibrationError(
                f"{where}: {kind} makes NaN, infinity or numbers beyond {largest_of(name):g} in {name!r}; expected "
                f"numbers near 1: look at rescale_factor, image_mean and image_std in {' or '.join(SETTINGS_FILES)}"
            )
    return tensors
