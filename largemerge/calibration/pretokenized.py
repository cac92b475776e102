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
from largemerge.calibration.image_settings import MAX_ABSOLUTE
from largemerge.config_file import nearest
from largemerge.errors import CalibrationError

LOSS_MASK = "loss_mask"
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


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
    problems = list(_value_problems(rows))
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
            yield f"tensor {name!r} is no argument of the model's forward{nearest(name, takes)}; it takes {takes}"
    if not headers or list(headers) == [LOSS_MASK]:
        yield f"no tensors; expected some that the model's forward takes: {takes}"
    elif takes_target(signature) and not any(name in headers for name in DECODER_INPUTS):
        yield "an encoder-decoder model needs the decoder's tokens too: add a tensor 'decoder_input_ids'"


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
    for name, header in headers.items():
        if name.endswith("input_ids") and header.dtype not in (torch.int64, torch.int32):
            yield f"tensor {name!r} has {header.dtype}; expected integers: int64 or int32"
        elif header.dtype.is_complex or header.dtype in (torch.uint16, torch.uint32, torch.uint64):
            yield f"tensor {name!r} has {header.dtype}; expected int64, or a floating-point dtype"
        if name.endswith("input_ids") and (len(header.shape) == 1 or 0 in header.shape[1:]):
            yield f"tensor {name!r} is {list(header.shape)}; expected [samples, tokens], with one token at least"
    if LOSS_MASK in headers:
        tokens = "decoder_input_ids" if signature.is_encoder_decoder else "input_ids"
        expected = shapes.get(tokens) or shapes.get(tokens.replace("input_ids", "inputs_embeds"), ())[:2]
        if shapes[LOSS_MASK] != expected:
            found = f"is {list(shapes[LOSS_MASK])}"
            wanted = f"like {tokens!r}, {list(expected)}" if expected else f"a tensor {tokens!r} beside it"
            yield f"tensor 'loss_mask' {found}; expected {wanted}"


def _value_problems(rows: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, tensor in rows.items():
        if tensor.dtype.is_floating_point:
            numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 cannot be compared
            wrong = ~(numbers.abs() <= MAX_ABSOLUTE)
            if wrong.any():
                bad = wrong.flatten(1).any(dim=1).nonzero().flatten().tolist() if wrong.dim() > 1 else []
                what = f"numbers beyond {MAX_ABSOLUTE:g}" if numbers.isfinite().all() else "NaN or infinity"
                yield f"tensor {name!r} has {what} in {f'samples {bad[:5]}' if bad else 'it'}; expected numbers"
        if name.endswith("input_ids") and (tensor < 0).any():
            yield f"tensor {name!r} has negative numbers (the least is {tensor.min()}); expected token ids"
        if name.endswith("attention_mask") and not (tensor != 0).any():
            yield f"tensor {name!r} is 0 everywhere, so that no token counts; expected 1 for tokens, 0 for padding"
        if name == LOSS_MASK and not ((tensor == 0) | (tensor == 1)).all():
            yield "tensor 'loss_mask' has other numbers than 0 and 1"
