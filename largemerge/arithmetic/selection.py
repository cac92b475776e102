"""Order statistics of very many magnitudes without sorting them: histograms over their bit patterns.

The bits of a number without its sign, read as an integer, are in the order of the magnitudes. Those of 16 bits
have 2^15 patterns: one histogram says how many numbers lie below any of them. For 32 bits, a first pass counts the
upper halves, a second one the lower halves of those numbers whose upper half is the one that is looked for. This is
exact, takes a fixed amount of memory, and reads the numbers once or twice, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from largemerge.arithmetic.bits import magnitudes

_HALF = 16
_PATTERNS = 1 << _HALF

Numbers = Callable[[], Iterable[torch.Tensor]]
"""Piece by piece; may be called again."""


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


def order_statistics(numbers: Numbers, ranks: Sequence[int]) -> list[OrderStatistic]:
    """The magnitudes that would stand at some places (from 0) if all were sorted, smallest first."""
    counts, dtype = _histogram(numbers, None)
    found = []
    for rank in ranks:
        pattern, below = _locate(counts, rank)
        equal = int(counts[pattern])
        integers = torch.int16
        if dtype is torch.float32:
            lower, _ = _histogram(numbers, pattern)
            low, below_low = _locate(lower, rank - below)
            pattern, below, equal = pattern << _HALF | low, below + below_low, int(lower[low])
            integers = torch.int32
        value = float(torch.tensor([pattern], dtype=integers).view(dtype))
        found.append(OrderStatistic(pattern, value, below, equal))
    return found


def _histogram(numbers: Numbers, upper: int | None) -> tuple[torch.Tensor, torch.dtype]:
    """Counts of all patterns of 16 bits; of 32 bits: of upper halves, or of the lower halves below one upper half."""
    counts = torch.zeros(_PATTERNS, dtype=torch.int64)
    dtype = torch.float32
    for piece in numbers():
        dtype = piece.dtype
        patterns = magnitudes(piece).reshape(-1)
        if dtype is torch.float32:
            halves = patterns >> _HALF
            patterns = halves if upper is None else patterns[halves == upper] & (_PATTERNS - 1)
        counts += torch.bincount(patterns, minlength=_PATTERNS)
    return counts, dtype


def _locate(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The pattern of the number of that rank, and how many numbers have smaller ones."""
    totals = counts.cumsum(0)
    pattern = int(torch.searchsorted(totals, rank, right=True))
    return pattern, int(totals[pattern] - counts[pattern])
