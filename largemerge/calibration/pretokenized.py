"""Calibration data that is ready: a .safetensors file with the forward's arguments by name.

The tensors are used exactly as they are, in order. The first dimension of each counts the N samples; only the rows
asked for are read. A tensor `loss_mask` `[N, T]` of 0 and 1 keeps tokens out of the statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from largemerge.calibration.batches import Batch, CalibrationOutline, ForwardSignature
from largemerge.calibration.columns import takes_target
from largemerge.calibration.config import CalibrationConfig
from largemerge.calibration.image_settings import largest_of
from largemerge.config_file import nearest
from largemerge.errors import CalibrationError

LOSS_MASK = "loss_mask"
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
_PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Arguments with a number for every token; those of a decoder have `decoder_` before them."""
_BESIDE_SAMPLES = ("_mask", "position_ids", "token_type_ids", "labels")
"""How the names of tensors end that are nothing without others."""
_FLOATING = ("pixel_values", "input_features", "input_values")
"""How the names of images and sounds begin."""
_MASK = "1 for what counts, 0 for padding"


def read_tensors(path: Path, config: CalibrationConfig, signature: ForwardSignature, where: str) -> tuple[Batch, ...]:
    """Reads the first `num_samples` rows of every tensor.

    Args:
        path: The .safetensors file.
        config: Settings: how many samples, and how many in a batch.
        signature: Inputs of the model's forward.
        where: Candidate and file, for messages.

    Raises:
        CalibrationError: If something does not fit; it names all mistakes.
    """
    assert config.num_samples is not None and config.batch_size is not None
    with _open(path, where) as file:
        tensors = _checked_headers(file, config, signature, where)
        # Rows beyond num_samples are never read. Copies: of a file that is cut later, a mapped page would be a crash.
        rows = {name: file.get_slice(name)[: config.num_samples].clone() for name in tensors}
    problems = list(_value_problems(rows, signature))
    if problems:
        raise CalibrationError(*(f"{where}: {problem}" for problem in problems))
    loss_mask = rows.pop(LOSS_MASK, None)
    num_samples = next(iter(rows.values())).shape[0]
    batches = []
    for start in range(0, num_samples, config.batch_size):
        part = slice(start, start + config.batch_size)
        mask = None if loss_mask is None else loss_mask[part].bool()
        batches.append(Batch({name: tensor[part] for name, tensor in rows.items()}, mask))
    return tuple(batches)


def outline_tensors(
    path: Path, config: CalibrationConfig, signature: ForwardSignature, where: str
) -> CalibrationOutline:
    """Outlines what `read_tensors` will return for the same arguments, from the file's header alone.

    Where there are pixels or sounds, integers of the first two samples are read, too.
    """
    assert config.num_samples is not None and config.batch_size is not None
    with _open(path, where) as file:
        tensors = _checked_headers(file, config, signature, where)
        integers = [name for name, t in tensors.items() if not t.dtype.is_floating_point and name != LOSS_MASK]
        mixed = any(t.dtype.is_floating_point for t in tensors.values())
        examples = {name: file.get_slice(name)[:2].contiguous() for name in integers if mixed}
    num_rows = next(iter(tensors.values())).shape[0]
    inputs = {name: (tuple(t.shape[1:]), t.dtype) for name, t in tensors.items() if name != LOSS_MASK}
    return CalibrationOutline(min(num_rows, config.num_samples), config.batch_size, inputs, examples)


def _open(path: Path, where: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{where}: not a readable .safetensors file: {error}") from None


def _checked_headers(
    file: Any, config: CalibrationConfig, signature: ForwardSignature, where: str
) -> dict[str, torch.Tensor]:
    """Reads the shapes and dtypes of all tensors and checks them; returns tensors on the meta device."""
    headers: dict[str, torch.Tensor] = {}
    for name in sorted(file.keys()):
        lazy = file.get_slice(name)
        shape = lazy.get_shape()
        dtype = lazy[:0].dtype if shape else file.get_tensor(name).dtype  # reads nothing, or one number
        headers[name] = torch.empty(shape, dtype=dtype, device="meta")
    problems = [
        *_settings_without_effect(config),
        *_name_problems(headers, signature),
        *_shape_problems(headers, signature),
    ]
    if problems:
        raise CalibrationError(*(f"{where}: {problem}" for problem in problems))
    return headers


def _settings_without_effect(config: CalibrationConfig) -> Iterator[str]:
    columns = ("text_field", "text_template", "messages_field", "target_field", "image_field", "loss_mask_field")
    for setting in (*columns, "assistant_only", "pack"):
        if getattr(config, setting):
            yield f"{setting}: a .safetensors file has no columns, its tensors are used as they are; remove it"


def _name_problems(headers: Mapping[str, torch.Tensor], signature: ForwardSignature) -> Iterator[str]:
    takes = sorted(signature.forward_arguments)
    for name in headers:
        if name != LOSS_MASK and name not in takes:
            yield (
                f"tensor {name!r} is no argument of the model's forward that holds samples{nearest(name, takes)}; "
                f"it takes {takes}"
            )
    if not headers or list(headers) == [LOSS_MASK]:
        yield f"no tensors; expected some that the model's forward takes: {takes}"
    elif all(name == LOSS_MASK or name.endswith(_BESIDE_SAMPLES) for name in headers):
        yield f"nothing but {sorted(headers)}, which belong to other tensors; expected what the model reads: {takes}"
    elif takes_target(signature) and not any(name in headers for name in DECODER_INPUTS):
        yield "an encoder-decoder model needs the decoder's tokens too: add a tensor 'decoder_input_ids'"
    for prefix in ("", "decoder_"):
        both = (f"{prefix}input_ids", f"{prefix}inputs_embeds")
        if all(name in headers for name in both):
            yield f"both {both[0]!r} and {both[1]!r}, which stand for each other; expected one of them: remove one"


def _shape_problems(headers: Mapping[str, torch.Tensor], signature: ForwardSignature) -> Iterator[str]:
    shapes = {name: tuple(header.shape) for name, header in headers.items()}
    counts = {name: shape[0] if shape else None for name, shape in shapes.items()}
    for name, count in counts.items():
        if count is None:
            yield f"tensor {name!r} is a single number; expected samples along the first dimension"
    if len(set(counts.values())) > 1:
        yield f"the tensors differ in their number of samples (the first dimension): {counts}"
    elif set(counts.values()) == {0}:
        yield "empty; expected at least one sample"
    elif any(0 in shape for shape in shapes.values()):
        yield f"tensors with no numbers: {[name for name, shape in shapes.items() if 0 in shape]}; expected some"
    for name, header in headers.items():
        yield from _dtype_problems(name, header.dtype)
    for name in (name for name in headers if name.endswith("input_ids")):
        if len(shapes[name]) != len(signature.token_shape):
            yield f"tensor {name!r} is {list(shapes[name])}; expected [{', '.join(signature.token_shape)}]"
    if len(set(counts.values())) == 1:
        yield from _misfits_of_tokens(shapes, signature)


def _dtype_problems(name: str, dtype: torch.dtype) -> Iterator[str]:
    if name.endswith(("input_ids", "position_ids", "token_type_ids")) and dtype not in (torch.int64, torch.int32):
        yield f"tensor {name!r} has {dtype}; expected integers: int64 or int32"
    elif name.startswith(_FLOATING) or name.endswith("inputs_embeds"):
        if not dtype.is_floating_point:
            yield f"tensor {name!r} has {dtype}; expected a floating-point dtype, as the model's forward takes it"
    elif dtype.is_complex or dtype in (torch.uint16, torch.uint32, torch.uint64):
        yield f"tensor {name!r} has {dtype}; expected int64, or a floating-point dtype"


def _misfits_of_tokens(shapes: Mapping[str, tuple[int, ...]], signature: ForwardSignature) -> Iterator[str]:
    """Yields tensors with a number for every token that are not shaped like the tokens."""
    for name, shape in shapes.items():
        belongs = name.endswith(_BESIDE_SAMPLES) and not name.startswith(_FLOATING)
        if name == LOSS_MASK:
            prefix = "decoder_" if signature.is_encoder_decoder else ""
        elif belongs and name.removeprefix("decoder_") in _PER_TOKEN:
            prefix = "decoder_" if name.startswith("decoder_") else ""
        else:
            continue
        tokens, embedded = f"{prefix}input_ids", f"{prefix}inputs_embeds"
        expected = shapes.get(tokens) or shapes.get(embedded, ())[:2]
        if expected and shape != expected:
            like = tokens if tokens in shapes else embedded
            yield f"tensor {name!r} is {list(shape)}; expected like {like!r}, {list(expected)}"
        elif not expected and name == LOSS_MASK:
            yield f"tensor {name!r} is {list(shape)}; expected a tensor {tokens!r} beside it"


def _value_problems(rows: Mapping[str, torch.Tensor], signature: ForwardSignature) -> Iterator[str]:
    for name, tensor in rows.items():
        if tensor.dtype.is_floating_point:
            numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 cannot be compared
            most = largest_of(name)
            # Compared in its own dtype: a half-precision number is never beyond 1e6.
            wrong = ~(numbers.abs() <= min(most, torch.finfo(numbers.dtype).max))
            if wrong.any():
                what = f"numbers beyond {most:g}" if numbers.isfinite().all() else "NaN or infinity"
                yield f"tensor {name!r} has {what} {_place(wrong)}; expected numbers up to {most:g}"
                continue
        if name == LOSS_MASK or name.endswith("attention_mask"):
            yield from _mask_problems(name, tensor)
        elif name.endswith(("input_ids", "position_ids", "token_type_ids")):
            yield from _id_problems(name, tensor, signature.id_limits.get(name))


def _mask_problems(name: str, mask: torch.Tensor) -> Iterator[str]:
    mask = mask.float() if mask.dtype.is_floating_point and mask.dtype.itemsize == 1 else mask
    other = mask[(mask != 0) & (mask != 1)]
    if other.numel():
        yield f"tensor {name!r} has other numbers than 0 and 1, such as {other[0].item():g}; expected {_MASK}"
    elif name != LOSS_MASK and not (mask != 0).any():
        yield f"tensor {name!r} is 0 everywhere, so that no token counts; expected {_MASK}"
    elif name.removeprefix("decoder_") == "attention_mask":
        empty = ~(mask != 0).flatten(1).any(dim=1)
        if empty.any():
            yield (
                f"tensor {name!r} is 0 everywhere in samples {_numbers(empty)}, which have no token then; expected "
                f"{_MASK}: leave such samples out"
            )


def _id_problems(name: str, ids: torch.Tensor, limit: int | None) -> Iterator[str]:
    least, most = int(ids.min()), int(ids.max())
    kind = "token ids" if name.endswith("input_ids") else "numbers from 0 on"
    if least < 0:
        yield f"tensor {name!r} has negative numbers (the least is {least}); expected {kind}"
    elif limit is not None and most >= limit:
        yield (
            f"tensor {name!r} has numbers from {least} to {most}; expected 0 to {limit - 1}, for the model's embedding "
            f"of them has {limit} rows"
        )


def _place(wrong: torch.Tensor) -> str:
    return f"in samples {_numbers(wrong.flatten(1).any(dim=1))}" if wrong.dim() > 1 else "in it"


def _numbers(wrong: torch.Tensor) -> str:
    numbers = wrong.nonzero().flatten().tolist()
    return f"{numbers[:5]}" if len(numbers) <= 5 else f"{numbers[:5]} and {len(numbers) - 5} more"
