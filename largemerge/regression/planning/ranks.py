"""What every rank of a merge would hold, move and compute, from shapes alone.

batches ──► partition_work: as a merge partitions them ──► RankWork ──► plan_ranks ──► RankPlan
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from largemerge.distributed.partition import choose_owners, partition_batches
from largemerge.model.trace import ModelTrace
from largemerge.regression.group_sums import multiplies_by_rows
from largemerge.regression.planning.cost import NOMINAL_RATES, Rates, estimate_seconds
from largemerge.regression.planning.counting import count_rows_of, stack_rows
from largemerge.regression.planning.placement import Footprint
from largemerge.regression.planning.workload import BatchShapes, GramGroups, Placement, Workload
from largemerge.regression.tensor_plan import BlockPlan

_OPERATIONS = Rates(1.0, 1.0, 1.0, 1.0, math.inf, math.inf, math.inf, 0.0)
"""Rates at which one operation takes a second and bytes take no time, so that seconds count operations."""


@dataclass(frozen=True)
class RankPlan:
    """What one rank will do.

    Attributes:
        rank: Number of the rank.
        num_candidates: Number of candidates of which it has calibration data.
        num_batches: Number of batches of calibration data.
        num_rows: Number of tokens, padding included, over all stacks.
        host: Bytes of host memory that one rank holds at the peak, libraries included.
        device: Bytes that one rank holds on a GPU at the peak.
        bytes_communicated: Bytes of sums and merged weights that go through its collective calls.
        operations: Multiplications and additions, solves included.
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
        """The plan as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class RankWork:
    """One rank's part of a merge.

    Attributes:
        num_candidates: Number of candidates of which it has calibration data.
        num_batches: Number of batches of calibration data.
        num_rows: Number of tokens, padding included, over all stacks.
        work: What the rank has to do.
    """

    num_candidates: int
    num_batches: int
    num_rows: int
    work: Workload


def partition_work(
    shapes: Sequence[Sequence[BatchShapes]],
    blocks: Sequence[BlockPlan],
    trace: ModelTrace,
    workload: Callable[[Sequence[Sequence[BatchShapes]], GramGroups | None], Workload],
    num_ranks: int,
    *,
    in_groups: bool = False,
    summed: Collection[int] = (),
) -> list[RankWork]:
    """Partitions the work over ranks, as a merge would.

    Args:
        shapes: Shapes of the batches by candidate, as many samples each as run at once.
        blocks: Plans of all blocks.
        trace: Trace of the model, from which the rows of a batch follow.
        workload: Counts the work of some of the batches.
        num_ranks: Number of ranks.
        in_groups: Whether the ranks that share a candidate must know its whole Gram matrices.
        summed: Numbers of the candidates whose Gram matrices stand for their data.
    """
    rows = [[count_rows_of(trace, batch) for batch in batches] for batches in shapes]
    works = []
    costs, right_hand_sides = batch_costs(blocks, rows, summed)
    partition = partition_batches(costs, num_ranks, right_hand_sides, in_groups=in_groups)
    whole, total_rows, rank_groups = workload(shapes, None), stack_rows(trace, shapes), partition.rank_groups
    for rank, numbers in enumerate(partition.batches):
        own_summed = frozenset(candidate for candidate in summed if numbers[candidate])
        read = [() if candidate in summed else mine for candidate, mine in enumerate(numbers)]
        own = [[batches[number] for number in mine] for batches, mine in zip(shapes, read, strict=True)]
        num_rows = sum(rows[candidate][number] for candidate, mine in enumerate(read) for number in mine)
        sizes = tuple(len(rank_group) if rank in rank_group else 1 for rank_group in rank_groups)
        # Every rank reads all calibration data, and keeps its part.
        work = replace(workload(own, GramGroups(total_rows, sizes, own_summed)), loading_bytes=whole.loading_bytes)
        works.append(RankWork(sum(map(bool, own)) + len(own_summed), sum(map(len, own)), num_rows, work))
    return works


def batch_costs(
    blocks: Sequence[BlockPlan], rows: Sequence[Sequence[int]], summed: Collection[int] = ()
) -> tuple[list[list[float]], list[float]]:
    """Estimates what the batches cost, so that they can be partitioned evenly, in seconds at nominal rates.

    Args:
        blocks: Plans of all blocks.
        rows: Number of rows by candidate and batch.
        summed: Numbers of the candidates whose Gram matrices stand for their data, as a batch that costs nothing.

    Returns:
        Costs by candidate and batch; and by candidate, the cost that does not depend on the number of rows: its
        right-hand sides, unless they are made row by row. The first candidate has none.
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
            if number not in summed and multiplies_by_rows(total, size):
                by_rows += 4 * total * weights
            else:
                whole += 2 * size * weights
        costs.append([0.0] if number in summed else [count * (of_row + by_rows / total) for count in batches])
        right_hand_sides.append(whole)
    return costs, right_hand_sides


def plan_ranks(
    whole: Workload, works: Sequence[RankWork], held: Callable[[Workload], Footprint], placement: Placement
) -> tuple[RankPlan, ...]:
    """Plans what every rank does.

    Args:
        whole: The work of all ranks.
        works: The work of each rank, from `partition_work`.
        held: Computes the memory that a rank with some work holds.
        placement: Placement of the work on every rank.
    """
    solves = _solve_operations(whole, len(works))
    moved = whole.exchanged_bytes if len(works) > 1 else 0
    plans = []
    for rank, rank_work in enumerate(works):
        footprint = held(rank_work.work)
        stages = estimate_seconds(rank_work.work, placement, _OPERATIONS)
        plans.append(
            RankPlan(
                rank=rank,
                num_candidates=rank_work.num_candidates,
                num_batches=rank_work.num_batches,
                num_rows=rank_work.num_rows,
                host=footprint.host,
                device=footprint.device,
                bytes_communicated=moved + rank_work.work.shared_gram_bytes,
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
