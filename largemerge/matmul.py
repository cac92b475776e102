"""Products of float32 matrices, by the faster of the two libraries that torch has for them.

On the CPU torch leaves float32 products to MKL, which reaches less than half of an AMD processor's speed. oneDNN,
which torch uses for bfloat16, makes the same products two to two and a half times as fast there. Both round alike.
Which one is used depends on the processor and on the shapes alone, so that a resumed merge gives the same bits.

Shapes: M rows and N columns of the result; K is summed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_MIN_MULTIPLICATIONS = 1 << 18  # below it, the call costs more than the product
_MIN_ROWS = 32  # of both factors; below it, a product is as slow as memory, and copies cost most


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


def faster_linear(linear: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[..., Any] | None:
    """Makes a faster forward for an `nn.Linear`; `None` where torch's own is as fast."""
    if type(linear) is not torch.nn.Linear or dtype is not torch.float32 or device.type != "cpu" or not has_onednn():
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.numel() * linear.out_features < _MIN_MULTIPLICATIONS:
            return torch.nn.functional.linear(x, linear.weight, linear.bias)
        return _linear(x.contiguous(), linear.weight, linear.bias)

    return forward


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
