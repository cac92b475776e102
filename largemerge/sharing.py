"""Who does what: calibration batches and solves, shared out among ranks."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

_MOST_UNEVEN = 0.25  # of a rank's part, to keep a candidate whole
_BATCHES_PER_RANK = 4  # at least, where there are samples enough: whole batches are shared out


def samples_at_once(most: int, num_samples: int, size: int) -> int:
    """How large batches may be so that every rank gets some: at most `most`, and about four for each rank."""
    return most if size == 1 else max(1, min(most, -(-num_samples // (_BATCHES_PER_RANK * size))))


def share_out(
    costs: Sequence[Sequence[int]], size: int, split_costs: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Gives every (candidate, batch) to one rank, so that all have about the same to do.

    A rank gets neighbours, so that few candidates are split, and most of their blocks are read by one rank only.

    Args:
        costs: Of every candidate's batches, in any unit.
        size: Number of ranks.
        split_costs: By candidate: what is done once more where it is split between two ranks. A cut that would come
            so near to a candidate's end is made there.

    Returns:
        By rank and candidate: the numbers of its batches.
    """
    cuts = _cuts([sum(batches) for batches in costs], size, split_costs or [0] * len(costs))
    shares: list[list[list[int]]] = [[[] for _ in costs] for _ in range(size)]
    before = 0
    for candidate, batches in enumerate(costs):
        for number, cost in enumerate(batches):
            middle = before + cost / 2
            shares[sum(cut <= middle for cut in cuts)][candidate].append(number)
            before += cost
    return shares


def _cuts(totals: Sequence[int], size: int, split_costs: Sequence[int]) -> list[float]:
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
