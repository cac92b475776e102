"""Products of matrices on the CPU, by the fastest way that torch has for them.

On the CPU torch leaves float32 products to MKL, which reaches less than half of an AMD processor's speed. oneDNN,
which torch uses for bfloat16, makes the same products two to two and a half times as fast there. Both round alike.
Which one is used depends on the processor and on the shapes alone, so that a resumed merge gives the same bits.

Processors without AVX-512 have no products of 16-bit numbers: torch's own loop takes eight times as long as float32.
So there linears in bfloat16 and float16 are computed in float32, a part of the weight at a time, and rounded once.

Shapes: M rows and N columns of the result; K is summed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

_MIN_MULTIPLICATIONS = 1 << 18  # below it, the call costs more than the product
_MIN_ROWS = 32  # of both factors; below it, a product is as slow as memory, and copies cost most
_PART_ELEMENTS = 1 << 21  # of a float32 copy of 16-bit numbers
_PART_ROWS = 1024  # of 16-bit numbers that are multiplied at once


def product(left_MK: torch.Tensor, right_NK: torch.Tensor) -> torch.Tensor:
    """Computes left · rightᵀ `[M, N]`."""
    if _by_onednn(left_MK, right_NK):
        return _linear(_dense(left_MK), _dense(right_NK))
    return left_MK @ right_NK.T


def add_product_(
    out_MN: torch.Tensor, left_MK: torch.Tensor, right_NK: torch.Tensor, *, alpha: float = 1.0, beta: float = 1.0
) -> None:
    """Computes out = β·out + α·left·rightᵀ, in place; with β = 0, out may hold anything."""
    if not _by_onednn(left_MK, right_NK):
        out_MN.addmm_(left_MK, right_NK.T, alpha=alpha, beta=beta)
    elif beta == 0:
        torch.mul(_linear(_dense(left_MK), _dense(right_NK)), alpha, out=out_MN)
    else:
        out_MN.mul_(beta) if beta != 1 else None
        out_MN.add_(_linear(_dense(left_MK), _dense(right_NK)), alpha=alpha)


def linear_product(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Computes x · weightᵀ `[N, O]` as a linear does whose forward `faster_linear` has replaced where it can."""
    if x_NI.device.type == "cpu" and lacks_products(x_NI.dtype):
        return _rounded_product(x_NI, weight_OI)
    return product(x_NI, weight_OI)


def faster_linear(linear: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[..., Any] | None:
    """Makes a faster forward for an `nn.Linear` or a `Conv1D`; `None` where torch's own is as fast."""
    if device.type != "cpu":
        return None
    if type(linear) in (torch.nn.Linear, Conv1D) and lacks_products(dtype):
        return functools.partial(_linear_by_float32, linear)
    if type(linear) is not torch.nn.Linear or dtype is not torch.float32 or not has_onednn():
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.numel() * linear.out_features < _MIN_MULTIPLICATIONS:
            return torch.nn.functional.linear(x, linear.weight, linear.bias)
        return _linear(x.contiguous(), linear.weight, linear.bias)

    return forward


def _linear_by_float32(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """Computes a linear of 16-bit numbers in float32; of a few rows as torch does."""
    rows_NI = x.reshape(-1, x.shape[-1])
    if len(rows_NI) < _MIN_ROWS or x.dtype != linear.weight.dtype:
        return type(linear).forward(linear, x)  # type: ignore[no-any-return]
    weight_OI = linear.weight.T if type(linear) is Conv1D else linear.weight
    return _rounded_product(rows_NI, weight_OI, linear.bias).view(*x.shape[:-1], len(weight_OI))


def _rounded_product(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Computes x · weightᵀ + bias `[N, O]` in float32, in parts, and rounds it once to the dtype of x."""
    step = max(_MIN_ROWS, _PART_ELEMENTS // x_NI.shape[1])
    num_rows = min(step, _PART_ROWS)
    out_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
    for start in range(0, len(weight_OI), step):
        outputs = slice(start, start + step)
        part_PI = weight_OI[outputs].to(torch.float32)
        for row in range(0, len(x_NI), num_rows):
            rows = slice(row, row + num_rows)
            found_MP = product(x_NI[rows].to(torch.float32), part_PI)
            out_NO[rows, outputs] = found_MP if bias_O is None else found_MP.add_(bias_O[outputs])
    return out_NO


@functools.cache
def lacks_products(dtype: torch.dtype) -> bool:
    """Whether the processor has no products of numbers of a dtype of 16 bits, so that torch's are very slow."""
    try:
        if dtype is torch.bfloat16:
            return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    except (AttributeError, RuntimeError):  # torch without oneDNN
        return dtype in (torch.bfloat16, torch.float16)


@functools.cache
def has_onednn() -> bool:
    """Whether this is an AMD processor and torch has oneDNN's product."""
    backend: Any = torch.backends.mkldnn
    if not backend.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return "AuthenticAMD" in stream.read()
    except OSError:
        return False


def _by_onednn(left_MK: torch.Tensor, right_NK: torch.Tensor) -> bool:
    multiplications = left_MK.shape[0] * left_MK.shape[1] * right_NK.shape[0]
    rows = min(left_MK.shape[0], right_NK.shape[0])
    on_cpu = left_MK.device.type == "cpu" and left_MK.dtype is torch.float32
    return on_cpu and multiplications >= _MIN_MULTIPLICATIONS and rows >= _MIN_ROWS and has_onednn()


def _linear(left_MK: torch.Tensor, right_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, bias_N, "none", [], "")
    return result


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """Copies a matrix whose rows have gaps between them, on which oneDNN is very slow."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()
