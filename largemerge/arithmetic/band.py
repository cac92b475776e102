"""Keeping what lies between two places of an order, exactly, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from largemerge.arithmetic.bits import above, below, count_equal, equal_places
from largemerge.arithmetic.selection import Numbers, OrderStatistic, order_statistics


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
