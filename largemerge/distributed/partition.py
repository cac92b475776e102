"""Who does what: calibration batches and solves, shared out among ranks."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MOST_UNEVEN = 0.25  # of a rank's part, to keep a candidate whole
_BATCHES_PER_RANK = 4  # at least, where there are samples enough: whole batches are shared out


def samples_at_once(most: int, num_samples: int, size: int) -> int:
    """How large batches may be so that every rank gets some: at most `most`, and about four for each rank."""
    return most if size == 1 else max(1, min(most, -(-num_samples // (_BATCHES_PER_RANK * size))))


@dataclass(frozen=True)
class Partition:
    """Who has which calibration batches.

    Attributes:
        batches: By rank and candidate: their numbers. A rank takes candidates in order.
    """

    batches: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def ranks_with_data(self) -> tuple[tuple[int, ...], ...]:
        """By candidate: the ranks that have some of its batches, in order."""
        return tuple(
            tuple(rank for rank, own in enumerate(self.batches) if own[candidate])
            for candidate in range(len(self.batches[0]))
        )

    @property
    def rank_groups(self) -> tuple[tuple[int, ...], ...]:
        """By candidate: the ranks that it is the last one of, all at the same time: they share its right-hand sides."""
        ranks_with_data = self.ranks_with_data
        last = [max((number for number, batches in enumerate(own) if batches), default=-1) for own in self.batches]
        return tuple(
            tuple(rank for rank in ranks if last[rank] == number) for number, ranks in enumerate(ranks_with_data)
        )


def partition_batches(
    costs: Sequence[Sequence[float]], size: int, right_hand_sides: Sequence[float] | None = None
) -> Partition:
    """Gives every (candidate, batch) to one rank, so that all have about the same to do.

    A rank gets neighbours, so that few candidates are split, and most of their blocks are read by one rank only.
    Where there are several ranks for every candidate, none of them may have two: what is better is taken.

    Args:
        costs: Of every candidate's batches, in any unit.
        size: Number of ranks.
        right_hand_sides: By candidate: its team does them together; a rank that has some of its batches but is not of
            the team does them once more, for its own.
    """
    more = list(right_hand_sides or [0.0] * len(costs))
    spread = [[cost + extra / len(batches) for cost in batches] for batches, extra in zip(costs, more, strict=True)]
    ways = [_along_a_line(spread, size, more)]
    if size >= len(costs):
        ways.append(_whole_ranks(spread, size))
    return min(ways, key=lambda shares: max(_loads(shares, costs, more)))


def _loads(shares: Partition, costs: Sequence[Sequence[float]], right_hand_sides: Sequence[float]) -> list[float]:
    """What every rank has to do."""
    rank_groups = shares.rank_groups
    loads = []
    for rank, own in enumerate(shares.batches):
        load = 0.0
        for candidate, numbers in enumerate(own):
            load += sum(costs[candidate][number] for number in numbers)
            if numbers:
                load += right_hand_sides[candidate] / (
                    len(rank_groups[candidate]) if rank in rank_groups[candidate] else 1
                )
        loads.append(load)
    return loads


def _along_a_line(costs: Sequence[Sequence[float]], size: int, split_costs: Sequence[float]) -> Partition:
    """All batches in one line, cut into even parts; near a candidate's end there."""
    cuts = _cuts([sum(batches) for batches in costs], size, split_costs)
    shares: list[list[list[int]]] = [[[] for _ in costs] for _ in range(size)]
    before = 0.0
    for candidate, batches in enumerate(costs):
        for number, cost in enumerate(batches):
            middle = before + cost / 2
            shares[sum(cut <= middle for cut in cuts)][candidate].append(number)
            before += cost
    return _frozen(shares)


def _whole_ranks(costs: Sequence[Sequence[float]], size: int) -> Partition:
    """Every candidate has some ranks of its own."""
    totals = [sum(batches) for batches in costs]
    counts = [1] * len(totals)
    for _ in range(size - len(totals)):  # one after the other to the candidate whose ranks have most to do
        loads = [total / count for total, count in zip(totals, counts, strict=True)]
        counts[loads.index(max(loads))] += 1
    shares: list[list[list[int]]] = []
    for candidate, (batches, count) in enumerate(zip(costs, counts, strict=True)):
        for (own,) in _along_a_line([batches], count, [0.0]).batches:
            shares.append([list(own) if number == candidate else [] for number in range(len(costs))])
    return _frozen(shares)


def _frozen(shares: Sequence[Sequence[Sequence[int]]]) -> Partition:
    return Partition(tuple(tuple(tuple(numbers) for numbers in own) for own in shares))


def _cuts(totals: Sequence[float], size: int, split_costs: Sequence[float]) -> list[float]:
    """Where each rank but the first begins, in the line of all batches."""
    part = sum(totals) / size
    ends = list(itertools.accumulate(totals, initial=0))
    cuts = []
    for rank in range(1, size):
        cut = rank * part
        candidate = min(bisect.bisect_right(ends, cut), len(totals)) - 1
        nearest = min(ends[candidate : candidate + 2], key=lambda end: abs(end - cut))
        cuts.append(nearest if abs(nearest - cut) <= min(split_costs[candidate], part * _MOST_UNEVEN) else cut)
    return cuts


def choose_owners(costs: Mapping[str, int], size: int) -> dict[str, int]:
    """Gives every solve to one rank, the dearest first, each to whoever has least to do so far."""
    loads = [0] * size
    owners = {}
    for name, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += cost
    return owners
