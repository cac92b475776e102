"""Gram matrices of a linear's inputs.

    G = XᵀX        X: one row per token, `[N, I]`

Gram matrices are float32 whatever the activations are: rows are cast before the product. A product of two
bfloat16 numbers is exact in float32, so on CPUs with bfloat16 units those do the work and sum in float32: two to
three times faster, and nothing is rounded but the sums. G is symmetric, so only its lower triangle is
computed, a panel of columns at a time: about half of the work.

Shapes: N tokens, I inputs of a linear, O outputs, P columns of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

GRAM_DTYPE = torch.float32
"""The precision of every sum and of every first try at a solve."""

_PANELS = 8
_NARROWEST_PANEL = 256


def add_gram_(lower_II: torch.Tensor, x_NI: torch.Tensor) -> None:
    """Adds XᵀX to the lower triangle of a matrix; what lies above the diagonal panels is left alone.

    Args:
        lower_II: float32.
        x_NI: Inputs of a linear, one row per token, in any floating dtype.
    """
    num_inputs = lower_II.shape[0]
    width = max(_NARROWEST_PANEL, -(-num_inputs // _PANELS))
    with _bfloat16_units(x_NI):
        x_NI = x_NI.to(GRAM_DTYPE)
        for start in range(0, num_inputs, width):
            stop = min(start + width, num_inputs)
            lower_II[start:, start:stop].addmm_(x_NI[:, start:].T, x_NI[:, start:stop])


@contextmanager
def _bfloat16_units(x_NI: torch.Tensor) -> Iterator[None]:
    """Lets float32 products use bfloat16 units, where the factors are bfloat16 numbers and nothing is lost."""
    if x_NI.dtype is not torch.bfloat16 or x_NI.device.type != "cpu":
        yield
        return
    backend: Any = torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def mirror_(lower_II: torch.Tensor) -> torch.Tensor:
    """Copies the lower triangle over the upper one, in place, without a temporary matrix of full size."""
    num_inputs = lower_II.shape[0]
    width = max(_NARROWEST_PANEL, -(-num_inputs // _PANELS))
    for start in range(0, num_inputs, width):
        stop = min(start + width, num_inputs)
        lower_II[start:stop, stop:] = lower_II[stop:, start:stop].T
        diagonal = lower_II[start:stop, start:stop]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
    return lower_II


def shrink_off_diagonal_(gram_II: torch.Tensor, off_diagonal_scale: float) -> torch.Tensor:
    """s·G + (1-s)·diag(G), in place (RegMean, arXiv 2212.09849, section 3.2).

    Args:
        gram_II: A Gram matrix or its lower triangle.
        off_diagonal_scale: s, from 0 (only the diagonal) to 1 (all of it). FusionBench calls it
            `reduce_non_diagonal_ratio`, MergeBench `reduction`.
    """
    diagonal = gram_II.diagonal().clone()
    gram_II.mul_(off_diagonal_scale)
    gram_II.diagonal().copy_(diagonal)
    return gram_II
