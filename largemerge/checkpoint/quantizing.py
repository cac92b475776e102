"""Writing weights quantised, as Transformers' `save_pretrained` lays them out (see `quantized.py`).

A shard's header stands before its first tensor is known, so the sizes of all parts must be known from the shape
alone. bitsandbytes tells them on the meta device. Only the quantisation state varies with the numbers: as JSON
it holds the mean of the scales (`nested_offset`), 3 to 23 characters. It gets room for the longest, filled up
with spaces, which every JSON reader skips.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from largemerge.checkpoint.quantized import FORMAT, SCALES, STATE, bitsandbytes
from largemerge.checkpoint.tensor_info import OutputTensor, Quantization
from largemerge.errors import MergeError

BLOCK_SIZE = 64
"""Numbers that share a scale in 4 bits: Transformers leaves bitsandbytes' default, and so do its readers."""
_LONGEST_OFFSET = -1.1754943508222875e-38


def quantized_tensor(name: str, dtype: torch.dtype, shape: tuple[int, ...], quantization: Quantization) -> OutputTensor:
    """The layout of a quantised weight.

    Args:
        name: On disk, ending with `.weight`.
        dtype: It is handed over in, and dequantised to.
        shape: As the module holds it.
        quantization: How.
    """
    out_in = shape[::-1] if quantization.transposed else shape
    if quantization.method == "int8":
        module = name.removesuffix(".weight")
        parts = {
            name: OutputTensor(torch.int8, out_in),
            module + SCALES: OutputTensor(torch.float32, out_in[:1]),
            module + FORMAT: OutputTensor(torch.uint8, ()),
        }
    else:
        _pack_4bit(torch.zeros(BLOCK_SIZE), name, quantization)  # it keeps tables: none may come to lie on meta
        dry = _pack_4bit(torch.empty(out_in, dtype=dtype, device="meta"), name, quantization)
        parts = {key: OutputTensor(part.dtype, tuple(part.shape)) for key, part in dry.items()}
    return OutputTensor(dtype, shape, quantization, parts)


def quantize(name: str, tensor: torch.Tensor, expected: OutputTensor) -> dict[str, torch.Tensor]:
    """The parts of a weight, on its device.

    Args:
        name: On disk.
        tensor: As the module holds it.
        expected: From `quantized_tensor`.

    Raises:
        MergeError: If the weight, or its scale, is not finite.
    """
    quantization = expected.quantization
    assert quantization is not None and tensor.shape == expected.shape, (name, tensor.shape)
    out_in = (tensor.T if quantization.transposed else tensor).contiguous()
    if quantization.method == "int8":
        parts = _pack_int8(out_in, name)
        scales = parts[name.removesuffix(".weight") + SCALES]
    else:
        parts = _pack_4bit(out_in, name, quantization)
        scales = parts[f"{name}.nested_absmax" if quantization.double_quant else f"{name}.absmax"]
    if not torch.isfinite(scales).all():
        raise MergeError(f"{name}: cannot be quantised to {quantization.method}: it holds numbers that are not finite")
    state = f"{name}{STATE}{quantization.method}"
    if state in parts:
        room = expected.parts[state].shape[0] - parts[state].shape[0]
        parts[state] = F.pad(parts[state], (0, room), value=ord(" "))
    return parts


def _pack_int8(weight_OI: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    # The parameter class quantises when it is moved from the CPU to a device; it rounds to float16 first.
    package = bitsandbytes("output.quantization")
    packed = package.nn.Int8Params(weight_OI.cpu(), requires_grad=False, has_fp16_weights=False).to(weight_OI.device)
    module = name.removesuffix(".weight")
    row_format = torch.zeros((), dtype=torch.uint8)
    return {name: packed.data, module + SCALES: packed.SCB, module + FORMAT: row_format}


def _pack_4bit(weight_OI: torch.Tensor, name: str, quantization: Quantization) -> dict[str, torch.Tensor]:
    functional = bitsandbytes("output.quantization").functional
    packed, state = functional.quantize_4bit(
        weight_OI,
        blocksize=BLOCK_SIZE,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.method,
    )
    if weight_OI.is_meta and quantization.double_quant:
        state.offset = torch.tensor(_LONGEST_OFFSET)
    described: dict[str, Any] = state.as_dict(packed=True)
    return {name: packed, **{f"{name}.{key}": part for key, part in described.items()}}
