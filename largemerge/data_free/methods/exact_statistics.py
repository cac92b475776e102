"""Exact statistics of very many numbers, piece by piece: order statistics, the k largest, sums.

**Order statistics without sorting.** The bits of a float without its sign, read as an integer of the same width, are in
the order of the magnitudes. Those of 16 bits have 2^15 patterns: one histogram says how many numbers lie below any of
them. For 32 bits, a first pass counts the upper halves, a second one the lower halves of those numbers whose upper half
is the one that is looked for. This is exact, takes a fixed amount of memory, and reads the numbers once or twice, piece
by piece, all models' together.

    numbers → order_statistics → MagnitudeRange → masker → a mask for every piece → apply_mask

**Masks in integers.** A mask is an integer with all bits set (-1) where something holds, else 0; `and` with it keeps a
number, or makes it 0. On the CPU torch does this many times faster than with truth values and floats.

**Sums that no rounding blurs.** Of numbers of 16 bits, short runs are summed in float32, which holds a product of two
of them exactly, and the runs' sums in float64. Of float32 numbers, all of it is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_HALF_BITS = 16
_NUM_PATTERNS = 1 << _HALF_BITS  # of 16 bits, the sign included
_RUN_ELEMENTS = 1 << 12  # summed in float32

Numbers = Callable[[], Iterable[Iterable[torch.Tensor]]]
"""Yields pieces, and of every piece a tensor of each set, such as one for every model; may be called again."""


# Bits and masks


def as_integers(numbers: torch.Tensor) -> torch.Tensor:
    """Views floats as integers of the same width, in the same memory."""
    return numbers.view(_INTEGERS[numbers.dtype])


def magnitude_bits(numbers: torch.Tensor) -> torch.Tensor:
    """Clears the sign bits of floats: integers of the shape of `numbers`, in the order of |x|."""
    bits = as_integers(numbers)
    return bits & torch.iinfo(bits.dtype).max


def mask_of(truth: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Converts truth values to a mask for numbers of some dtype."""
    return torch.from_numpy(truth.view(np.int8)).to(_INTEGERS[dtype]).neg_()


def apply_mask(numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Copies the numbers, with 0 where the mask is 0."""
    return (as_integers(numbers) & mask).view(numbers.dtype)


def apply_mask_(numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sets numbers to 0 where the mask is 0, in place."""
    as_integers(numbers).bitwise_and_(mask)
    return numbers


def _above(patterns: torch.Tensor, limit: int) -> torch.Tensor:
    """Mask of the magnitudes (not negative) that are larger than a limit (-1 or larger)."""
    return _signs(limit - patterns)


def _below(patterns: torch.Tensor, limit: int) -> torch.Tensor:
    """Mask of the magnitudes (not negative) that are smaller than a limit."""
    return _signs(patterns - limit)


def _signs(numbers: torch.Tensor) -> torch.Tensor:
    """Turns negative integers into -1 and others into 0, in place."""
    return numbers.bitwise_right_shift_(8 * numbers.element_size() - 1)


# Order statistics


@dataclass(frozen=True)
class OrderStatistic:
    """The magnitude of some rank in a set of numbers.

    Attributes:
        pattern: The bits of the magnitude.
        value: The magnitude itself.
        num_below: Number of smaller magnitudes in the set.
        num_equal: Number of equal magnitudes in the set, itself included.
    """

    pattern: int
    value: float
    num_below: int
    num_equal: int


def order_statistics(numbers: Numbers, ranks: Sequence[Sequence[int]]) -> list[list[OrderStatistic]]:
    """Finds the magnitudes that would stand at some places if all of a set were sorted, smallest first.

    All sets are read together: once where they are of 16 bits, twice where they are of 32.

    Args:
        numbers: All sets, piece by piece.
        ranks: The places, from 0, for every set.
    """
    counts, dtype = _count(numbers, len(ranks))
    located = [[_locate(of_set, rank) for rank in wanted] for of_set, wanted in zip(counts, ranks, strict=True)]
    if dtype is not torch.float32:
        return [
            [_statistic(pattern, below, of_set[pattern], torch.int16, dtype) for pattern, below in found]
            for of_set, found in zip(counts, located, strict=True)
        ]
    lower = _count_lower(numbers, [[upper for upper, _ in found] for found in located])
    result: list[list[OrderStatistic]] = []
    for found, wanted, of_set in zip(located, ranks, lower, strict=True):
        result.append([])
        for (upper, below), rank in zip(found, wanted, strict=True):
            low, below_low = _locate(of_set[upper], rank - below)
            pattern, equal = upper << _HALF_BITS | low, of_set[upper][low]
            result[-1].append(_statistic(pattern, below + below_low, equal, torch.int32, dtype))
    return result


def _statistic(
    pattern: int, below: int, equal: torch.Tensor, integer: torch.dtype, dtype: torch.dtype
) -> OrderStatistic:
    value = float(torch.tensor([pattern], dtype=integer).view(dtype))
    return OrderStatistic(pattern, value, below, int(equal))


def _count(numbers: Numbers, num_sets: int) -> tuple[list[torch.Tensor], torch.dtype]:
    """Counts, for every set, how often each pattern of 16 bits comes; of 32-bit numbers, each upper half."""
    counts = [torch.zeros(_NUM_PATTERNS, dtype=torch.int64) for _ in range(num_sets)]
    dtype = torch.float32
    for piece in numbers():
        for of_set, tensor in zip(counts, piece, strict=True):
            dtype = tensor.dtype
            patterns = magnitude_bits(tensor).reshape(-1)
            if dtype is torch.float32:
                patterns >>= _HALF_BITS
            of_set += torch.bincount(patterns, minlength=_NUM_PATTERNS)
    return counts, dtype


def _count_lower(numbers: Numbers, uppers: Sequence[Sequence[int]]) -> list[dict[int, torch.Tensor]]:
    """Counts, for every set and some upper halves, how often each lower half follows that upper half."""
    counts = [{upper: torch.zeros(_NUM_PATTERNS, dtype=torch.int64) for upper in wanted} for wanted in uppers]
    for piece in numbers():
        for of_set, tensor in zip(counts, piece, strict=True):
            patterns = magnitude_bits(tensor).reshape(-1).numpy()
            halves = patterns >> _HALF_BITS
            for upper, so_far in of_set.items():
                lower = patterns[halves == upper] & np.int32(_NUM_PATTERNS - 1)
                so_far += torch.bincount(torch.from_numpy(lower), minlength=_NUM_PATTERNS)
    return counts


def _locate(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """Finds the pattern of the number of that rank, and how many numbers have smaller patterns."""
    totals = counts.cumsum(0)
    pattern = int(torch.searchsorted(totals, rank, right=True))
    return pattern, int(totals[pattern] - counts[pattern])


# Ranges of magnitudes


@dataclass(frozen=True)
class Bound:
    """One end of a range of magnitudes, which may run through several equal ones.

    Attributes:
        at: The magnitude at this end.
        first: Index, among the numbers equal to it in their order, of the first that is kept.
        stop: Index of the first of them that is no longer kept.
    """

    at: OrderStatistic
    first: int
    stop: int


@dataclass(frozen=True)
class MagnitudeRange:
    """The elements whose places, were they sorted by magnitude, lie in a range; equal ones in their order.

    Attributes:
        low: The smallest magnitude that is kept, of several equal ones maybe some; `None`: from the very smallest on.
        high: The smallest magnitude of which some are dropped for being large; `None`: up to the largest.
        empty: Whether nothing is kept.
    """

    low: Bound | None = None
    high: Bound | None = None
    empty: bool = False

    def masker(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Makes a function from the `magnitude_bits` of one piece after the other, in order, to the mask of each."""
        low, high = self.low, self.high
        if low is not None and high is not None and low.at.pattern == high.at.pattern:
            # One run of equals, cut at both ends.
            low, high = Bound(low.at, max(low.first, high.first), min(low.stop, high.stop)), None
            only_equals = True
        else:
            only_equals = False
        lows, highs = _TieCounter(low), _TieCounter(high)

        def mask_piece(patterns: torch.Tensor) -> torch.Tensor:
            if self.empty:
                return torch.zeros_like(patterns)
            mask = None
            if low is not None:
                whole, some = lows.kept(patterns)
                mask = _above(patterns, low.at.pattern - whole)
                mask.view(-1)[some] = -1
                if only_equals:
                    mask &= _below(patterns, low.at.pattern + 1)
            if high is not None:
                whole, some = highs.kept(patterns)
                not_above = _below(patterns, high.at.pattern + whole)
                mask = not_above if mask is None else mask.bitwise_and_(not_above)
                mask.view(-1)[some] = -1
            return torch.full_like(patterns, -1) if mask is None else mask

        return mask_piece


class _TieCounter:
    """Counts the numbers that are equal to a bound, over all pieces."""

    def __init__(self, bound: Bound | None) -> None:
        self._bound, self._seen = bound, 0

    def kept(self, patterns: torch.Tensor) -> tuple[bool, torch.Tensor]:
        """Says whether all equals of this piece are kept; if not, the places of those that are."""
        assert self._bound is not None
        nothing = torch.empty(0, dtype=torch.int64)
        is_equal = patterns.reshape(-1).numpy() == self._bound.at.pattern
        count = int(np.count_nonzero(is_equal))
        start, self._seen = self._seen, self._seen + count
        first, stop = max(self._bound.first, start), min(self._bound.stop, self._seen)
        if count == 0 or first >= stop:
            return False, nothing
        if (first, stop) == (start, self._seen):
            return True, nothing
        return False, torch.from_numpy(np.flatnonzero(is_equal)[first - start : stop - start])


def largest(numbers: Numbers, num_elements: int, densities: Sequence[float]) -> list[MagnitudeRange]:
    """Finds the k = density · n largest elements of every set, at least one.

    Args:
        numbers: All sets, piece by piece.
        num_elements: n, the number of elements of each set.
        densities: The share that is kept of every set.
    """
    return largest_of(numbers, num_elements, [max(1, int(density * num_elements)) for density in densities])


def largest_of(numbers: Numbers, num_elements: int, counts: Sequence[int]) -> list[MagnitudeRange]:
    """Finds a given number of the largest elements of every set; see `largest`."""
    found = order_statistics(numbers, [[num_elements - count] for count in counts])
    ranges = []
    for (low,), count in zip(found, counts, strict=True):
        num_larger = num_elements - low.num_below - low.num_equal
        ranges.append(MagnitudeRange(Bound(low, 0, count - num_larger)))
    return ranges


def without_outliers(
    numbers: Numbers, num_elements: int, densities: Sequence[float], gammas: Sequence[float]
) -> list[MagnitudeRange]:
    """Finds the k largest elements of every set after its γ·n largest; fewer are left out where k do not remain.

    Args:
        numbers: All sets, piece by piece.
        num_elements: n, the number of elements of each set.
        densities: The share k/n that is kept of every set.
        gammas: The share γ of every set that is left out for being too large.
    """
    splits, ranks = [], []
    for density, gamma in zip(densities, gammas, strict=True):
        count, num_top = int(density * num_elements), int(gamma * num_elements)
        num_bottom = num_elements - count - num_top
        if num_bottom < 0:
            num_top, num_bottom = num_top + num_bottom, 0
        splits.append((num_bottom, num_top))
        ranks.append([num_bottom, num_elements - max(1, num_top)] if count else [])
    ranges = []
    for found, (num_bottom, num_top) in zip(order_statistics(numbers, ranks), splits, strict=True):
        if not found:
            ranges.append(MagnitudeRange(empty=True))
            continue
        low, high = found
        # A stable sort, smallest first, has the first of some equals lowest: those go first.
        lower = Bound(low, num_bottom - low.num_below, low.num_equal)
        upper = Bound(high, 0, num_elements - num_top - high.num_below) if num_top else None
        ranges.append(MagnitudeRange(lower, upper))
    return ranges


# Sums


def sum_of_magnitudes(numbers: torch.Tensor) -> float:
    """Computes Σ |x| over all elements."""
    absolute = numbers.abs().reshape(-1)
    if numbers.dtype is torch.float32:
        return absolute.sum(dtype=torch.float64).item()
    return sum(part.sum(dim=-1).sum(dtype=torch.float64).item() for part in _short_runs(absolute.float()))


def inner_products(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Computes <v_i, v_j> of K tensors of one shape, taken as vectors: `[K, K]`, float64."""
    if vectors[0].dtype is torch.float32:
        flat_KN = torch.stack([vector.reshape(-1).double() for vector in vectors])
        return flat_KN @ flat_KN.T
    parts = [_short_runs(vector.float().reshape(-1)) for vector in vectors]
    gram_KK = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for i, left in enumerate(parts):
        for j, right in enumerate(parts[: i + 1]):
            sums = [(a * b).sum(dim=-1).sum(dtype=torch.float64).item() for a, b in zip(left, right, strict=True)]
            gram_KK[i, j] = gram_KK[j, i] = sum(sums)
    return gram_KK


def weighted_sum(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """Computes Σ f_i x_i in float32."""
    total = tensors[0].to(torch.float32, copy=True).mul_(factors[0])
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total.add_(tensor, alpha=factor)
    return total


def _short_runs(flat: torch.Tensor) -> list[torch.Tensor]:
    """Splits `[N]` into whole runs `[R, 4096]`, and what is left over as one row."""
    whole = flat.numel() // _RUN_ELEMENTS * _RUN_ELEMENTS
    return [flat[:whole].view(-1, _RUN_ELEMENTS), flat[whole:].view(1, -1)]
