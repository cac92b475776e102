"""Corrupted images, made from clean ones: how much of a score is left when images are noisy, blurred or badly stored.

    image ──► at least 32 pixels to a side ──► imagecorruptions, seeded by the task's seed and the row ──► processor

The corruptions and their severities are those of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), by the
package imagecorruptions-imaug. An image is corrupted as it lies in the data, before it is resized for a model, so that
all models see the same one, whatever the batches and ranks.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from largemerge.errors import CalibrationError, ConfigError, shorten
from largemerge.evaluation.config import Corruption, Task

PACKAGE = "imagecorruptions-imaug"
_SMALLEST = 32
"""Pixels of the shorter side that the package needs."""
_SEEDED = ("impulse_noise",)
"""Corruptions that draw from a generator of their own, whose seed is an argument; others from NumPy's global one."""


def with_corruption(tasks: Sequence[Task]) -> list[Task]:
    """Lists the tasks whose images are corrupted."""
    return [task for task in tasks if getattr(task, "corruption", None) is not None]


def check_corruptions(tasks: Sequence[Task]) -> None:
    """Checks that the package that corrupts images is installed, and can be imported.

    Raises:
        ConfigError: If it is not.
    """
    names = ", ".join(repr(task.name) for task in with_corruption(tasks))
    install = f"task {names}: 'corruption' needs {PACKAGE}; pip install 'largemerge[corruptions]'"
    try:
        importlib.metadata.version(PACKAGE)
        import imagecorruptions  # noqa: F401
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(install) from None
    except ImportError as error:  # such as a library of OpenCV's that the system lacks
        raise ConfigError(f"{install} (what is there cannot be imported: {shorten(error)})") from None


def corrupted(image: Any, corruption: Corruption, seed: int, row: int) -> Any:
    """Corrupts an image; the same image, seed and row give the same result.

    Args:
        image: A Pillow image, of colours or grey. One with a side of fewer than 32 pixels is enlarged first.
        corruption: Kind and severity.
        seed: Seed of the task.
        row: Row of the image in the data.

    Returns:
        A Pillow image of the same mode.

    Raises:
        CalibrationError: If the package fails at this image.
    """
    from imagecorruptions import corrupt
    from PIL import Image

    scale = max(1.0, _SMALLEST / min(image.size))
    width, height = (max(_SMALLEST, round(side * scale)) for side in image.size)
    enlarged = image if scale == 1 else image.resize((width, height), Image.Resampling.BICUBIC)
    (own_seed,) = (int(number) for number in np.random.SeedSequence([seed, row]).generate_state(1))
    options = {"seed": own_seed} if corruption.kind in _SEEDED else {}
    try:
        with _global_seed(own_seed), np.errstate(divide="raise", invalid="raise"):
            pixels_HW3 = corrupt(
                np.asarray(enlarged), severity=corruption.severity, corruption_name=corruption.kind, **options
            )
    except Exception as error:  # what the package and OpenCV may raise, nobody has listed
        if corruption.kind == "spatter" and isinstance(error, FloatingPointError):
            return enlarged  # no drop has fallen on it, of which the package would make NaN, and a black image
        raise CalibrationError(f"cannot be corrupted by {corruption.kind} ({shorten(error)})") from None
    return Image.fromarray(pixels_HW3).convert(image.mode)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seeds NumPy's global generator, which the package draws from, and puts it back afterwards."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
