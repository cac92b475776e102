"""Calibration batches and solves partitioned over ranks, so that all have about the same to do.

    candidates and batches, with their costs ──► Partition: batches, ranks with data, groups of ranks
    solves, with their costs                 ──► owner of each

A rank works on candidates in order. The ranks that a candidate is the last one of reach its end together: they are its
group, and split its right-hand sides (the products of Gram and weights) between them.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MAX_SHIFT = 0.25  # of a rank's part: so much unevenness is accepted to keep a candidate whole
_MIN_BATCHES_PER_RANK = 4  # where there are samples enough, since only whole batches are partitioned


def samples_at_once(max_samples: int, num_samples: int, size: int) -> int:
    """Number of samples in a batch: at most `max_samples`, and few enough for about four batches for each rank."""
    return max_samples if size == 1 else max(1, min(max_samples, -(-num_samples // (_MIN_BATCHES_PER_RANK * size))))


@dataclass(frozen=True)
class Partition:
    """Calibration batches of every rank.

    Attributes:
        batches: Numbers of the batches, by rank and candidate.
    """

    batches: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def ranks_with_data(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that have some of a candidate's batches, in order, by candidate."""
        return tuple(
            tuple(rank for rank, own in enumerate(self.batches) if own[candidate])
            for candidate in range(len(self.batches[0]))
        )

    @property
    def rank_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that end with a candidate, in order, by candidate: they split its right-hand sides."""
        ranks_with_data = self.ranks_with_data
        last = [max((number for number, batches in enumerate(own) if batches), default=-1) for own in self.batches]
        return tuple(
            tuple(rank for rank in ranks if last[rank] == number) for number, ranks in enumerate(ranks_with_data)
        )


def partition_batches(
    costs: Sequence[Sequence[float]],
    size: int,
    right_hand_sides: Sequence[float] | None = None,
    *,
    in_groups: bool = False,
) -> Partition:
    """Gives every batch of every candidate to one rank, so that all have about the same to do.

    A rank gets neighbours, so that few candidates are split, and most of their blocks are read by one rank only. Where
    there are several ranks for every candidate, a partition in which no rank has two candidates is tried, too, and the
    better one is taken. Candidates without batches get no rank.

    Args:
        costs: Cost of each batch of each candidate, in any unit.
        size: Number of ranks.
        right_hand_sides: Cost of each candidate's right-hand sides, in the same unit. Its group splits them; a rank
            that has some of its batches but is not in the group makes its own from scratch.
        in_groups: Whether all ranks that have some of a candidate's batches must be its group, so that they know its
            whole Gram matrices.
    """
    if not all(costs):
        return _with_none(costs, size, right_hand_sides, in_groups=in_groups)
    extra = list(right_hand_sides or [0.0] * len(costs))
    spread = [[cost + more / len(batches) for cost in batches] for batches, more in zip(costs, extra, strict=True)]
    if in_groups:
        return _ranks_by_candidate(spread, size) if size >= len(costs) else _candidates_by_rank(spread, size)
    partitions = [_cut_line(spread, size, extra)]
    if size >= len(costs):
        partitions.append(_ranks_by_candidate(spread, size))
    return min(partitions, key=lambda partition: max(_loads(partition, costs, extra)))


def _with_none(
    costs: Sequence[Sequence[float]], size: int, right_hand_sides: Sequence[float] | None, *, in_groups: bool
) -> Partition:
    """Partitions the batches of those candidates that have some."""
    some = [candidate for candidate, batches in enumerate(costs) if batches]
    extra = [right_hand_sides[candidate] for candidate in some] if right_hand_sides is not None else None
    found = partition_batches([costs[candidate] for candidate in some], size, extra, in_groups=in_groups)
    return _frozen(
        [[list(own[some.index(each)]) if each in some else [] for each in range(len(costs))] for own in found.batches]
    )


def _loads(partition: Partition, costs: Sequence[Sequence[float]], right_hand_sides: Sequence[float]) -> list[float]:
    """Cost of what each rank has to do."""
    rank_groups = partition.rank_groups
    loads = []
    for rank, own in enumerate(partition.batches):
        load = 0.0
        for candidate, numbers in enumerate(own):
            load += sum(costs[candidate][number] for number in numbers)
            if numbers:
                group = rank_groups[candidate]
                load += right_hand_sides[candidate] / (len(group) if rank in group else 1)
        loads.append(load)
    return loads


def _cut_line(costs: Sequence[Sequence[float]], size: int, split_costs: Sequence[float]) -> Partition:
    """Puts all batches into one line and cuts it into even parts; near a candidate's end, it is cut there."""
    cuts = _cuts([sum(batches) for batches in costs], size, split_costs)
    parts: list[list[list[int]]] = [[[] for _ in costs] for _ in range(size)]
    before = 0.0
    for candidate, batches in enumerate(costs):
        for number, cost in enumerate(batches):
            middle = before + cost / 2
            parts[sum(cut <= middle for cut in cuts)][candidate].append(number)
            before += cost
    return _frozen(parts)


def _ranks_by_candidate(costs: Sequence[Sequence[float]], size: int) -> Partition:
    """Gives every candidate some ranks of its own."""
    totals = [sum(batches) for batches in costs]
    counts = [1] * len(totals)
    for _ in range(size - len(totals)):  # each to the candidate whose ranks have most to do so far
        loads = [total / count for total, count in zip(totals, counts, strict=True)]
        counts[loads.index(max(loads))] += 1
    parts: list[list[list[int]]] = []
    for candidate, (batches, count) in enumerate(zip(costs, counts, strict=True)):
        for (own,) in _cut_line([batches], count, [0.0]).batches:
            parts.append([list(own) if number == candidate else [] for number in range(len(costs))])
    return _frozen(parts)


def _candidates_by_rank(costs: Sequence[Sequence[float]], size: int) -> Partition:
    """Cuts the line of all batches where a candidate ends, as near to even parts as that allows."""
    ends = list(itertools.accumulate(map(sum, costs)))
    cuts = [min(ends, key=lambda end: abs(end - ends[-1] * rank / size)) for rank in range(1, size)]
    owners = [bisect.bisect_left(cuts, end) for end in ends]
    return _frozen(
        [[list(range(len(own))) if owners[k] == rank else [] for k, own in enumerate(costs)] for rank in range(size)]
    )


def _frozen(parts: Sequence[Sequence[Sequence[int]]]) -> Partition:
    return Partition(tuple(tuple(tuple(numbers) for numbers in own) for own in parts))


def _cuts(totals: Sequence[float], size: int, split_costs: Sequence[float]) -> list[float]:
    """Finds where each rank but the first begins in the line of all batches, in units of cost."""
    part = sum(totals) / size
    ends = list(itertools.accumulate(totals, initial=0))
    cuts = []
    for rank in range(1, size):
        cut = rank * part
        candidate = min(bisect.bisect_right(ends, cut), len(totals)) - 1
        nearest = min(ends[candidate : candidate + 2], key=lambda end: abs(end - cut))
        cuts.append(nearest if abs(nearest - cut) <= min(split_costs[candidate], part * _MAX_SHIFT) else cut)
    return cuts


def choose_owners(costs: Mapping[str, int], size: int) -> dict[str, int]:
    """Gives every solve to one rank, the most expensive first, each to the rank that has least to do so far."""
    loads = [0] * size
    owners = {}
    for name, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += cost
    return owners
