"""What every rank of a merge would hold, move and compute, from shapes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from largemerge.distributed.partition import choose_owners, partition_batches
from largemerge.model.trace import ModelTrace
from largemerge.regression.group_sums import multiplies_by_rows
from largemerge.regression.planning.cost import NOMINAL_RATES, Rates, estimate_seconds
from largemerge.regression.planning.placement import Footprint
from largemerge.regression.planning.workload import (
    BatchShapes,
    Placement,
    RankShare,
    Workload,
    count_rows_of,
    stack_rows,
)
from largemerge.regression.tensor_plan import BlockPlan

_OPERATIONS = Rates(1.0, 1.0, 1.0, 1.0, math.inf, math.inf, math.inf, 0.0)
"""With these, what takes a second is one operation, and bytes take no time."""


@dataclass(frozen=True)
class RankPlan:
    """What one rank will do.

    Attributes:
        rank: Its number.
        num_candidates: Of which it has calibration data.
        num_batches: Of calibration data.
        num_rows: Tokens that count, over all stacks.
        host: Bytes that it holds at the peak, its libraries included.
        device: Bytes on a GPU.
        bytes_communicated: In collective calls, given or got: sums, and merged weights.
        operations: Multiplications and additions, its solves included.
    """

    rank: int
    num_candidates: int
    num_batches: int
    num_rows: int
    host: int
    device: int
    bytes_communicated: int
    operations: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class RankWork:
    """One rank's part of a merge.

    Attributes:
        num_candidates: Of which it has calibration data.
        num_batches: Of calibration data.
        num_rows: Tokens, padding included, over all stacks.
        work: What it does.
    """

    num_candidates: int
    num_batches: int
    num_rows: int
    work: Workload


def share_work(
    shapes: Sequence[Sequence[BatchShapes]],
    blocks: Sequence[BlockPlan],
    trace: ModelTrace,
    workload: Callable[[Sequence[Sequence[BatchShapes]], RankShare | None], Workload],
    num_ranks: int,
) -> list[RankWork]:
    """Gives every rank its part of the work, as a merge would.

    Args:
        shapes: By candidate: the shapes of its batches, as many samples each as run at once.
        blocks: All blocks of the model.
        trace: Says how many rows a batch has.
        workload: Counts the work of some of the batches.
        num_ranks: How many ranks there are.
    """
    rows = [[count_rows_of(trace, batch) for batch in batches] for batches in shapes]
    works = []
    costs, right_hand_sides = batch_costs(blocks, rows)
    partition = partition_batches(costs, num_ranks, right_hand_sides)
    whole, total_rows, rank_groups = workload(shapes, None), stack_rows(trace, shapes), partition.rank_groups
    for rank, numbers in enumerate(partition.batches):
        own = [[batches[number] for number in mine] for batches, mine in zip(shapes, numbers, strict=True)]
        num_rows = sum(rows[candidate][number] for candidate, mine in enumerate(numbers) for number in mine)
        sizes = tuple(len(rank_group) if rank in rank_group else 1 for rank_group in rank_groups)
        # Every rank reads all of the calibration data, and keeps its part.
        work = replace(workload(own, RankShare(total_rows, sizes)), loading_bytes=whole.loading_bytes)
        works.append(RankWork(sum(map(bool, own)), sum(map(len, own)), num_rows, work))
    return works


def batch_costs(blocks: Sequence[BlockPlan], rows: Sequence[Sequence[int]]) -> tuple[list[list[float]], list[float]]:
    """What every candidate's batches cost, to share them out evenly, in seconds of no machine in particular.

    Args:
        blocks: All of them.
        rows: By candidate and batch.

    Returns:
        By candidate and batch; and by candidate, what does not depend on how many rows there are: its right-hand
        sides, unless they are made row by row. The first candidate has none.
    """
    groups = Counter((group.num_inputs, group.num_outputs) for block in blocks for group in block.groups)
    rates = NOMINAL_RATES
    of_row = sum(
        n * (size**2 / rates.gram + 4 * size * outputs / rates.linear) for (size, outputs), n in groups.items()
    )
    costs, right_hand_sides = [], []
    for number, batches in enumerate(rows):
        total = max(1, sum(batches))
        by_rows = whole = 0.0
        for (size, outputs), count in groups.items() if number > 0 else ():
            weights = count * size * outputs / rates.product
            if multiplies_by_rows(total, size):
                by_rows += 4 * total * weights
            else:
                whole += 2 * size * weights
        costs.append([count * (of_row + by_rows / total) for count in batches])
        right_hand_sides.append(whole)
    return costs, right_hand_sides


def plan_ranks(
    whole: Workload, works: Sequence[RankWork], held: Callable[[Workload], Footprint], placement: Placement
) -> tuple[RankPlan, ...]:
    """Says what every rank does.

    Args:
        whole: The work of all.
        works: From `share_work`.
        held: What a rank with some work holds.
        placement: Of every rank.
    """
    solves = _solve_operations(whole, len(works))
    moved = whole.exchanged_bytes if len(works) > 1 else 0
    plans = []
    for rank, each in enumerate(works):
        footprint = held(each.work)
        stages = estimate_seconds(each.work, placement, _OPERATIONS)
        plans.append(
            RankPlan(
                rank=rank,
                num_candidates=each.num_candidates,
                num_batches=each.num_batches,
                num_rows=each.num_rows,
                host=footprint.host,
                device=footprint.device,
                bytes_communicated=moved + each.work.shared_gram_bytes,
                operations=round(sum(stages.values()) - stages["solve"] + solves[rank]),
            )
        )
    return tuple(plans)


def _solve_operations(work: Workload, num_ranks: int) -> list[float]:
    """Operations of the solves that each rank owns, by rank."""
    totals = [0.0] * num_ranks
    for kind in work.blocks:
        costs = {group.leader: group.solve_operations for group in kind.groups}
        for leader, owner in choose_owners(costs, num_ranks).items():
            totals[owner] += kind.count * costs[leader]
    return totals
