"""Order statistics of very many numbers without sorting them: histograms over their bit patterns.

The bits of a number that is not negative, read as an integer, are in the order of the numbers. Those of 16 bits
have 2^15 patterns: one histogram says how many numbers lie below any of them. For 32 bits, a first pass counts the
upper halves, a second one the lower halves of those numbers whose upper half is the one that is looked for. This is
exact, takes a fixed amount of memory, and reads the numbers once or twice, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_HALF = 16
_PATTERNS = 1 << _HALF

Pieces = Callable[[], Iterable[torch.Tensor]]
"""The numbers, not negative, piece by piece; may be called again."""


@dataclass(frozen=True)
class OrderStatistic:
    """The number of some rank.

    Attributes:
        value: The number itself.
        num_below: How many numbers are smaller.
        num_equal: How many are equal.
    """

    value: float
    num_below: int
    num_equal: int


def order_statistics(pieces: Pieces, ranks: Sequence[int]) -> list[OrderStatistic]:
    """The numbers that would stand at some places (from 0) if all were sorted, smallest first."""
    pattern_bits, counts = _histogram(pieces, None)
    found = []
    for rank in ranks:
        pattern, below = _locate(counts, rank)
        equal = int(counts[pattern])
        if pattern_bits == 2 * _HALF:
            _, lower = _histogram(pieces, pattern)
            low, below_low = _locate(lower, rank - below)
            pattern, below, equal = pattern << _HALF | low, below + below_low, int(lower[low])
        found.append(OrderStatistic(_value(pattern, pattern_bits, pieces), below, equal))
    return found


def bits(numbers: torch.Tensor) -> torch.Tensor:
    """Integers in the order of numbers that are not negative (but may be -0)."""
    integers = _INTEGERS[numbers.dtype]
    return numbers.reshape(-1).view(integers) & torch.iinfo(integers).max


def _histogram(pieces: Pieces, upper: int | None) -> tuple[int, torch.Tensor]:
    """Counts of all patterns of 16 bits; of 32 bits: of upper halves, or of lower halves below one upper half."""
    counts = torch.zeros(_PATTERNS, dtype=torch.int64)
    width = _HALF
    for piece in pieces():
        patterns = bits(piece)
        width = 8 * patterns.element_size()
        if width == _HALF:
            counts += torch.bincount(patterns.to(torch.int32), minlength=_PATTERNS)
        elif upper is None:
            counts += torch.bincount(patterns >> _HALF, minlength=_PATTERNS)
        else:
            chosen = patterns[patterns >> _HALF == upper] & (_PATTERNS - 1)
            counts += torch.bincount(chosen, minlength=_PATTERNS)
    return width, counts


def _locate(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The pattern of the number of that rank, and how many numbers have smaller ones."""
    totals = counts.cumsum(0)
    pattern = int(torch.searchsorted(totals, rank, right=True))
    return pattern, int(totals[pattern] - counts[pattern])


def _value(pattern: int, width: int, pieces: Pieces) -> float:
    integers = torch.int16 if width == _HALF else torch.int32
    dtype = next(iter(pieces())).dtype
    return float(torch.tensor([pattern], dtype=integers).view(dtype))
