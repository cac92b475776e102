"""Comparisons and masks in integers: torch makes these many times faster on the CPU than truth values of floats.

The bits of a number, read as an integer of the same width, without its sign: in the order of magnitudes. A mask is an
integer with all bits set (-1) where something holds, else 0; `and` with it keeps a number, or makes it 0.

Order statistics of very many magnitudes without sorting them: histograms over their bit patterns.

The bits of a number without its sign, read as an integer, are in the order of the magnitudes. Those of 16 bits
have 2^15 patterns: one histogram says how many numbers lie below any of them. For 32 bits, a first pass counts the
upper halves, a second one the lower halves of those numbers whose upper half is the one that is looked for. This is
exact, takes a fixed amount of memory, and reads the numbers once or twice, piece by piece, all models' together.

Keeping what lies between two places of an order, exactly, piece by piece.

Sums over very many elements, which no rounding blurs.

Of numbers of 16 bits, short stretches are summed in float32, which holds a product of two of them exactly, and the
stretches' sums in float64. Of float32 numbers, all of it is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def integers(numbers: torch.Tensor) -> torch.Tensor:
    """The bits, in the same memory."""
    return numbers.view(_INTEGERS[numbers.dtype])


def magnitudes(numbers: torch.Tensor) -> torch.Tensor:
    """The bits without the sign, of the shape of `numbers`: integers in the order of |x|."""
    found = integers(numbers)
    return found & torch.iinfo(found.dtype).max


def above(patterns: torch.Tensor, limit: int) -> torch.Tensor:
    """Mask of the magnitudes (not negative) that are larger than a limit (-1 or larger)."""
    return _signs(limit - patterns)


def below(patterns: torch.Tensor, limit: int) -> torch.Tensor:
    """Mask of the magnitudes (not negative) that are smaller than a limit."""
    return _signs(patterns - limit)


def _signs(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.bitwise_right_shift_(8 * numbers.element_size() - 1)


def mask_of(truth: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Truth values as a mask for numbers of some dtype."""
    return torch.from_numpy(truth.view(np.int8)).to(_INTEGERS[dtype]).neg_()


def equal_places(patterns: torch.Tensor, pattern: int) -> np.ndarray:
    """Where a pattern stands, counted in the order of the elements."""
    places: np.ndarray = np.flatnonzero(patterns.numpy() == pattern)
    return places


def count_equal(patterns: torch.Tensor, pattern: int) -> int:
    """How often a pattern stands there."""
    return int(np.count_nonzero(patterns.numpy() == pattern))


def kept(numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The numbers, 0 where the mask leaves them out."""
    return (integers(numbers) & mask).view(numbers.dtype)


def keep_(numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Makes 0 what the mask leaves out."""
    integers(numbers).bitwise_and_(mask)
    return numbers


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


@dataclass(frozen=True)
class Edge:
    """One end of what is kept: of the numbers equal to it, in their order, those from `first` up to `stop` are kept."""

    at: OrderStatistic
    first: int
    stop: int


@dataclass(frozen=True)
class Band:
    """Keeps the elements whose places, were they sorted by magnitude, lie in a range; equals in their order.

    Attributes:
        low: The smallest one that is kept, of several equal ones maybe some; `None`: from the very smallest on.
        high: The smallest one of which some are dropped for being large; `None`: up to the largest.
        empty: Nothing is kept.
    """

    low: Edge | None = None
    high: Edge | None = None
    empty: bool = False

    def new(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from the magnitudes (see `bits.magnitudes`) of one piece after the other to a mask of each."""
        low, high = self.low, self.high
        if low is not None and high is not None and low.at.pattern == high.at.pattern:
            # One run of equals, cut at both ends.
            low, high = Edge(low.at, max(low.first, high.first), min(low.stop, high.stop)), None
            only_equals = True
        else:
            only_equals = False
        lows, highs = _Equals(low), _Equals(high)

        def keep(patterns: torch.Tensor) -> torch.Tensor:
            if self.empty:
                return torch.zeros_like(patterns)
            mask = None
            if low is not None:
                whole, some = lows.kept(patterns)
                mask = above(patterns, low.at.pattern - whole)
                mask.view(-1)[some] = -1
                if only_equals:
                    mask &= below(patterns, low.at.pattern + 1)
            if high is not None:
                whole, some = highs.kept(patterns)
                not_above = below(patterns, high.at.pattern + whole)
                mask = not_above if mask is None else mask.bitwise_and_(not_above)
                mask.view(-1)[some] = -1
            return torch.full_like(patterns, -1) if mask is None else mask

        return keep


class _Equals:
    """Counts the numbers that are equal to an edge, over all pieces."""

    def __init__(self, edge: Edge | None) -> None:
        self._edge, self._seen = edge, 0

    def kept(self, patterns: torch.Tensor) -> tuple[bool, torch.Tensor]:
        """Whether all equals of this piece are kept; else the places of those that are."""
        assert self._edge is not None
        nothing = torch.empty(0, dtype=torch.int64)
        count = count_equal(patterns, self._edge.at.pattern)
        start, self._seen = self._seen, self._seen + count
        first, stop = max(self._edge.first, start), min(self._edge.stop, self._seen)
        if count == 0 or first >= stop:
            return False, nothing
        if (first, stop) == (start, self._seen):
            return True, nothing
        places = equal_places(patterns.reshape(-1), self._edge.at.pattern)
        return False, torch.from_numpy(places[first - start : stop - start])


def largest(numbers: Numbers, num_elements: int, densities: Sequence[float]) -> list[Band]:
    """Of every set the k = density · n largest, at least one."""
    return largest_of(numbers, num_elements, [max(1, int(density * num_elements)) for density in densities])


def largest_of(numbers: Numbers, num_elements: int, counts: Sequence[int]) -> list[Band]:
    """Of every set so many of the largest."""
    found = order_statistics(numbers, [[num_elements - count] for count in counts])
    bands = []
    for (low,), count in zip(found, counts, strict=True):
        num_larger = num_elements - low.num_below - low.num_equal
        bands.append(Band(Edge(low, 0, count - num_larger)))
    return bands


def without_outliers(
    numbers: Numbers, num_elements: int, densities: Sequence[float], gammas: Sequence[float]
) -> list[Band]:
    """Of every set the k largest but for γ·n larger ones; fewer outliers go where there are not k others."""
    parts, ranks = [], []
    for density, gamma in zip(densities, gammas, strict=True):
        count, num_top = int(density * num_elements), int(gamma * num_elements)
        num_bottom = num_elements - count - num_top
        if num_bottom < 0:
            num_top, num_bottom = num_top + num_bottom, 0
        parts.append((num_bottom, num_top))
        ranks.append([num_bottom, num_elements - max(1, num_top)] if count else [])
    bands = []
    for found, (num_bottom, num_top) in zip(order_statistics(numbers, ranks), parts, strict=True):
        if not found:
            bands.append(Band(empty=True))
            continue
        low, high = found
        # A stable sort, smallest first, has the first of some equals lowest: those go first.
        lower = Edge(low, num_bottom - low.num_below, low.num_equal)
        upper = Edge(high, 0, num_elements - num_top - high.num_below) if num_top else None
        bands.append(Band(lower, upper))
    return bands


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
