"""Order statistics of very many magnitudes without sorting them: histograms over their bit patterns.

The bits of a number without its sign, read as an integer, are in the order of the magnitudes. Those of 16 bits
have 2^15 patterns: one histogram says how many numbers lie below any of them. For 32 bits, a first pass counts the
upper halves, a second one the lower halves of those numbers whose upper half is the one that is looked for. This is
exact, takes a fixed amount of memory, and reads the numbers once or twice, piece by piece, all models' together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from largemerge.arithmetic.bits import magnitudes

_HALF = 16
_PATTERNS = 1 << _HALF

Numbers = Callable[[], Iterable[Iterable[torch.Tensor]]]
"""Piece by piece, and of every piece a tensor of each set, such as one for every model; may be called again."""


@dataclass(frozen=True)
class OrderStatistic:
    """The magnitude of some rank.

    Attributes:
        pattern: Its bits.
        value: The number itself.
        num_below: How many are smaller.
        num_equal: How many are equal.
    """

    pattern: int
    value: float
    num_below: int
    num_equal: int


def order_statistics(numbers: Numbers, ranks: Sequence[Sequence[int]]) -> list[list[OrderStatistic]]:
    """The magnitudes that would stand at some places (from 0) if all of a set were sorted, smallest first.

    All sets are gone through at once.

    Args:
        numbers: Of all sets.
        ranks: The places, for every set.
    """
    counts, dtype = _count(numbers, len(ranks))
    located = [[_locate(of_set, rank) for rank in wanted] for of_set, wanted in zip(counts, ranks, strict=True)]
    if dtype is not torch.float32:
        integers = torch.int16
        return [
            [_statistic(pattern, below, of_set[pattern], integers, dtype) for pattern, below in found]
            for of_set, found in zip(counts, located, strict=True)
        ]
    lower = _count_lower(numbers, [[upper for upper, _ in found] for found in located])
    result: list[list[OrderStatistic]] = []
    for found, wanted, of_set in zip(located, ranks, lower, strict=True):
        result.append([])
        for (upper, below), rank in zip(found, wanted, strict=True):
            low, below_low = _locate(of_set[upper], rank - below)
            pattern, equal = upper << _HALF | low, of_set[upper][low]
            result[-1].append(_statistic(pattern, below + below_low, equal, torch.int32, dtype))
    return result


def _statistic(
    pattern: int, below: int, equal: torch.Tensor, integers: torch.dtype, dtype: torch.dtype
) -> OrderStatistic:
    value = float(torch.tensor([pattern], dtype=integers).view(dtype))
    return OrderStatistic(pattern, value, below, int(equal))


def _count(numbers: Numbers, num_sets: int) -> tuple[list[torch.Tensor], torch.dtype]:
    """Of every set, how often each pattern of 16 bits comes; of 32 bits: each upper half."""
    counts = [torch.zeros(_PATTERNS, dtype=torch.int64) for _ in range(num_sets)]
    dtype = torch.float32
    for piece in numbers():
        for of_set, tensor in zip(counts, piece, strict=True):
            dtype = tensor.dtype
            patterns = magnitudes(tensor).reshape(-1)
            if dtype is torch.float32:
                patterns >>= _HALF
            of_set += torch.bincount(patterns, minlength=_PATTERNS)
    return counts, dtype


def _count_lower(numbers: Numbers, uppers: Sequence[Sequence[int]]) -> list[dict[int, torch.Tensor]]:
    """Of every set, for some upper halves, how often each lower half comes below it."""
    counts = [{upper: torch.zeros(_PATTERNS, dtype=torch.int64) for upper in wanted} for wanted in uppers]
    for piece in numbers():
        for of_set, tensor in zip(counts, piece, strict=True):
            patterns = magnitudes(tensor).reshape(-1).numpy()
            halves = patterns >> _HALF
            for upper, so_far in of_set.items():
                lower = patterns[halves == upper] & np.int32(_PATTERNS - 1)
                so_far += torch.bincount(torch.from_numpy(lower), minlength=_PATTERNS)
    return counts


def _locate(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The pattern of the number of that rank, and how many numbers have smaller ones."""
    totals = counts.cumsum(0)
    pattern = int(torch.searchsorted(totals, rank, right=True))
    return pattern, int(totals[pattern] - counts[pattern])
