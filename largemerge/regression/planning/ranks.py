"""What every rank of a merge would hold, move and compute, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from largemerge.distributed.partition import choose_owners, partition_batches
from largemerge.model.trace import ModelTrace
from largemerge.regression.gram import GRAM_DTYPE, panels
from largemerge.regression.group_sums import multiplies_by_rows, sketch_bytes
from largemerge.regression.passes import mean_dtype
from largemerge.regression.planning.cost import Rates, batch_costs, estimate_seconds
from largemerge.regression.planning.placement import Footprint
from largemerge.regression.planning.workload import BatchShapes, Placement, Workload, count_rows_of
from largemerge.regression.tensor_plan import BlockPlan, MergeRule

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
    workload: Callable[[Sequence[Sequence[BatchShapes]]], Workload],
    num_ranks: int,
) -> list[RankWork]:
    """Partition the work out as a merge would.

    Args:
        shapes: Of every candidate's batches, as many samples each as run at once.
        blocks: Of the model.
        trace: Says how many rows a batch has.
        workload: Of some of the batches.
        num_ranks: How many there are.
    """
    rows = [[count_rows_of(trace, batch) for batch in batches] for batches in shapes]
    works = []
    costs, right_hand_sides = batch_costs(blocks, rows)
    shares = partition_batches(costs, num_ranks, right_hand_sides)
    whole, rank_groups = workload(shapes), shares.rank_groups
    for rank, numbers in enumerate(shares.batches):
        own = [[batches[number] for number in mine] for batches, mine in zip(shapes, numbers, strict=True)]
        num_rows = sum(rows[candidate][number] for candidate, mine in enumerate(numbers) for number in mine)
        work = replace(
            workload(own),
            loading_bytes=whole.loading_bytes,  # every rank reads all of the calibration data, and keeps its part
            total_rows=whole.rows,
            rank_group_sizes=tuple(len(rank_group) if rank in rank_group else 1 for rank_group in rank_groups),
        )
        works.append(RankWork(sum(map(bool, own)), sum(map(len, own)), num_rows, work))
    return works


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
    moved = bytes_communicated(whole) if len(works) > 1 else 0
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
                bytes_communicated=moved + rank_group_bytes(each.work),
                operations=round(sum(stages.values()) - stages["solve"] + solves[rank]),
            )
        )
    return tuple(plans)


def _solve_operations(work: Workload, num_ranks: int) -> list[float]:
    """By rank, of the solves that it owns."""
    totals = [0.0] * num_ranks
    for kind in work.kinds:
        costs = {group.leader: group.solve_operations for group in kind.block.groups}
        for leader, owner in choose_owners(costs, num_ranks).items():
            totals[owner] += kind.count * costs[leader]
    return totals


def rank_group_bytes(work: Workload) -> int:
    """Of the Gram matrices that a rank adds up with others of its team, there and back."""
    rank_groups = [number for number, size in enumerate(work.rank_group_sizes) if size > 1 and number > 0]
    total = 0
    for kind in work.kinds if rank_groups else ():
        for group in kind.block.groups:
            stack = kind.block.stack_of(group)
            by_teams = sum(
                not multiplies_by_rows(work.total_rows[number][stack], group.num_inputs) for number in rank_groups
            )
            total += 2 * kind.count * by_teams * GRAM_DTYPE.itemsize * _half(group.num_inputs)
    return total


def _half(size: int) -> int:
    """Elements of a Gram matrix that travel."""
    return sum((size - piece.start) * (piece.stop - piece.start) for piece in panels(size))


def bytes_communicated(work: Workload) -> int:
    """Of the sums of every group, of the weights that are solved from them, of averages, and of merged embeddings."""
    total = work.first_bytes
    for kind in work.kinds:
        averaged = [plan.name for plan in kind.block.tensors if plan.rule is MergeRule.AVERAGED]
        total += 2 * kind.count * kind.bytes_of(averaged, GRAM_DTYPE)  # added up at one rank, copied to all
        dtypes: Mapping[str, torch.dtype] = {plan.name: plan.dtype for plan in kind.block.tensors}
        for group in kind.block.groups:
            size, outputs = group.num_inputs, sum(group.outputs.values())
            total += kind.count * GRAM_DTYPE.itemsize * (_half(size) + size * outputs)
            total += kind.count * mean_dtype(kind.block, group).itemsize * size * outputs
            total += kind.count * work.num_candidates * sketch_bytes(len(group.outputs))
            for path, rows in group.outputs.items():
                total += kind.count * dtypes[f"{kind.block.name}.{path}.weight"].itemsize * size * rows
    return total
