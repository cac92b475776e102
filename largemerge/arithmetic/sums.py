"""Sums over very many elements, which no rounding blurs.

Of numbers of 16 bits, short stretches are summed in float32, which holds a product of two of them exactly, and the
stretches' sums in float64. Of float32 numbers, all of it is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_STRETCH = 1 << 12


def sum_of_magnitudes(numbers: torch.Tensor) -> float:
    """Σ |x|."""
    absolute = numbers.abs().reshape(-1)
    if numbers.dtype is torch.float32:
        return absolute.sum(dtype=torch.float64).item()
    return sum(part.sum(dim=-1).sum(dtype=torch.float64).item() for part in _stretches(absolute.float()))


def inner_products(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """<v_i, v_j> of tensors of one shape, as vectors: `[K, K]`, float64."""
    if vectors[0].dtype is torch.float32:
        flat_KN = torch.stack([vector.reshape(-1).double() for vector in vectors])
        return flat_KN @ flat_KN.T
    parts = [_stretches(vector.float().reshape(-1)) for vector in vectors]
    gram_KK = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for i, left in enumerate(parts):
        for j, right in enumerate(parts[: i + 1]):
            sums = [(a * b).sum(dim=-1).sum(dtype=torch.float64).item() for a, b in zip(left, right, strict=True)]
            gram_KK[i, j] = gram_KK[j, i] = sum(sums)
    return gram_KK


def weighted_sum(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """Σ f_i x_i in float32."""
    total = tensors[0].to(torch.float32, copy=True).mul_(factors[0])
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total.add_(tensor, alpha=factor)
    return total


def _stretches(flat: torch.Tensor) -> list[torch.Tensor]:
    """`[S, N]` of whole stretches, and what is left over as one."""
    whole = flat.numel() // _STRETCH * _STRETCH
    return [flat[:whole].view(-1, _STRETCH), flat[whole:].view(1, -1)]
