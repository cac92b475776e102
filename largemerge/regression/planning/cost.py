"""How long a merge takes: operations and bytes over the rates of a machine.

One process:

    candidate forward, Gram, right-hand side, solve, merged forward     operations / rate
    disk                                                                bytes / rate, where computing does not hide it

Several ranks wait for each other in every block, so the slowest one of every stage counts:

    collect        the rank whose candidates' forward passes, Grams and right-hand sides take longest
    communicate    sums and merged weights: bytes / bandwidth of the slowest link + exchanges · latency
    solve          of every block, the rank whose solves take longest
    read           per node: the blocks of all candidates that one of its ranks wants, once
    write          the first rank

Sums and weights travel along a ring or tree in pieces, so that the bytes pass every link once, however many ranks
there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from largemerge.distributed.partition import choose_owners
from largemerge.regression.planning.workload import (
    BlockNumbers,
    ForwardNumbers,
    GroupNumbers,
    OffloadTo,
    Placement,
    Workload,
)

_COLLECT = ("candidate_forward", "gram", "right_hand_side")


@dataclass(frozen=True)
class Rates:
    """Operations (multiplications or additions) and bytes that a machine does in a second.

    Attributes:
        linear: Operations per second of a linear, in the compute dtype.
        gram: Operations per second of a Gram matrix, counted as N·I².
        product: Operations per second of float32 products.
        cholesky: Operations per second of a Cholesky factorisation, counted as I³/3.
        memory: Bytes per second copied in memory.
        read: Bytes per second from the disk.
        write: Bytes per second to the disk.
        batch_seconds: Seconds of calling a model up to a block, whatever the size.
    """

    linear: float
    gram: float
    product: float
    cholesky: float
    memory: float
    read: float
    write: float
    batch_seconds: float


NOMINAL_RATES = Rates(400e9, 200e9, 150e9, 80e9, 5e9, 1e9, 1e9, 2e-3)
"""Rates of no machine in particular, at which placements are compared."""


@dataclass(frozen=True)
class Links:
    """Connections between the ranks of a merge.

    Attributes:
        bandwidth: Bytes per second at which a sum reaches its owner, or a merged weight all ranks.
        latency: Seconds that each exchange takes, however small.
        ranks_per_node: Number of ranks that share what is read from disk.
    """

    bandwidth: float
    latency: float
    ranks_per_node: int


def estimate_seconds(
    work: Workload, placement: Placement, rates: Rates, *, writes_in_background: bool = False
) -> dict[str, float]:
    """Estimates the seconds of one process, by stage.

    Args:
        work: What there is to do.
        placement: Placement of the work.
        rates: Rates of the machine.
        writes_in_background: Whether blocks are written while the next ones are merged.
    """
    stages = dict.fromkeys(("read", "candidate_forward", "gram", "right_hand_side", "solve", "merged_forward"), 0.0)
    num_calls = work.num_batches * -(-work.batch_samples // placement.samples)

    def forward(numbers: ForwardNumbers) -> float:
        computing = numbers.operations / rates.linear + numbers.moved_bytes / rates.memory
        return computing + num_calls * rates.batch_seconds

    read_bytes = 0
    for kind in work.blocks:
        for numbers in kind.in_passes(placement.passes):
            stages["candidate_forward"] += kind.count * forward(numbers.forward) if numbers.runs else 0.0
            stages["gram"] += kind.count * numbers.gram_operations / rates.gram
            stages["right_hand_side"] += kind.count * numbers.right_hand_side_operations / rates.product
            stages["solve"] += kind.count * sum(solve_seconds(group, rates) for group in numbers.groups)
            read_bytes += kind.count * work.num_candidates * numbers.read_bytes
        read_bytes += kind.count * kind.previous_bytes
        if work.forwards_merged:
            stages["merged_forward"] += kind.num_outputs_read * forward(kind.forward)
    stages["head"] = work.head.gram_operations / rates.gram + work.head.product_operations / rates.product
    if work.head.tied:
        stages["head"] += sum(kind.count * forward(kind.whole) for kind in work.blocks)
        read_bytes += sum(kind.count * work.num_candidates * kind.bytes for kind in work.blocks)
    num_bytes = sum(kind.count * (kind.bytes + kind.kept_bytes) for kind in work.blocks)
    reading, writing, computing = read_bytes / rates.read, num_bytes / rates.write, sum(stages.values())
    stages |= disk_seconds(reading, writing, computing, ahead=placement.prefetch, in_background=writes_in_background)
    stages["outside"] = work.non_block_bytes * (work.num_candidates / rates.read + 1 / rates.write)
    stages["hidden_states"] = _offload_seconds(work, placement, rates)
    return stages


def disk_seconds(
    reading: float, writing: float, computing: float, *, ahead: bool, in_background: bool
) -> dict[str, float]:
    """Seconds of reading and writing that computing does not hide; a tenth of them shows in any case."""
    if not in_background:
        return {"read": max(reading - computing, 0.1 * reading) if ahead else reading, "write": writing}
    both = reading + writing
    shown = max(both - computing, 0.1 * both) / both if both else 0.0
    return {"read": reading * shown, "write": writing * shown}


def solve_seconds(group: GroupNumbers, rates: Rates) -> float:
    """Seconds of one factorisation, the triangular solves, and what is copied and rounded around them."""
    size, outputs = group.num_inputs, group.num_outputs
    products = size**3 / 3 / rates.cholesky + 2 * size**2 * outputs / rates.product
    return products + 12 * size * (outputs + size) * 4 / rates.memory


def _offload_seconds(work: Workload, placement: Placement, rates: Rates) -> float:
    """Seconds of moving hidden states to where they are offloaded and back, as far as computing does not hide it."""
    moved = work.hidden_bytes * sum(kind.num_outputs_read for kind in work.blocks) * (placement.passes + 2)
    if placement.hidden_states is OffloadTo.DEVICE:
        return 0.0
    # Read ahead and written in the background: a tenth of it shows.
    return moved * (
        0.1 / rates.read + 0.1 / rates.write if placement.hidden_states is OffloadTo.DISK else 0.1 / rates.memory
    )


def estimate_rank_seconds(
    whole: Workload,
    own: Sequence[Workload],
    placement: Placement,
    rates: Rates,
    links: Links,
    num_bytes: int,
    *,
    writes_in_background: bool = False,
) -> dict[str, float]:
    """Estimates the seconds of several ranks, by stage.

    Args:
        whole: The work of all ranks.
        own: The work of each rank, in order.
        placement: Placement of the work on every rank.
        rates: Rates of one rank, while all compute.
        links: Connections between the ranks.
        num_bytes: Bytes of sums and merged weights that are exchanged.
        writes_in_background: Whether blocks are written while the next ones are merged.
    """
    alone = estimate_seconds(whole, placement, rates)
    by_rank = [estimate_seconds(work, placement, rates) for work in own]
    slowest = max(by_rank, key=lambda stages: sum(stages[stage] for stage in _COLLECT))
    stages = {stage: slowest[stage] for stage in _COLLECT}
    stages["solve"] = _longest_solves(whole, rates, len(own))
    stages["merged_forward"] = max(of_rank["merged_forward"] for of_rank in by_rank)
    stages["communicate"] = num_bytes / links.bandwidth + _num_exchanges(whole) * links.latency
    reading = _max_bytes_read(whole, own, placement, links) / rates.read
    computing = sum(stages.values())
    stages |= disk_seconds(
        reading, alone["write"], computing, ahead=placement.prefetch, in_background=writes_in_background
    )
    stages["hidden_states"] = max(of_rank["hidden_states"] for of_rank in by_rank)
    stages["head"] = max(of_rank["head"] for of_rank in by_rank)
    return stages | {"outside": alone["outside"]}


def _longest_solves(work: Workload, rates: Rates, num_ranks: int) -> float:
    """Seconds of the solves of all blocks, in each of them those of the rank that takes longest."""
    return sum(kind.count * _longest_solves_of(kind, rates, num_ranks) for kind in work.blocks)


def _longest_solves_of(kind: BlockNumbers, rates: Rates, num_ranks: int) -> float:
    owners = choose_owners({group.leader: group.solve_operations for group in kind.groups}, num_ranks)
    loads = [0.0] * num_ranks
    for group in kind.groups:
        loads[owners[group.leader]] += solve_seconds(group, rates)
    return max(loads)


def _num_exchanges(work: Workload) -> int:
    """Number of exchanges: the sums and the weights of every group, and averages, there and back."""
    return sum(kind.count * (2 * len(kind.groups) + 2) for kind in work.blocks)


def _max_bytes_read(whole: Workload, own: Sequence[Workload], placement: Placement, links: Links) -> int:
    """Bytes of candidates that one node reads, at most; the first candidate is wanted by all."""
    block_bytes = sum(
        kind.count * numbers.read_bytes for kind in whole.blocks for numbers in kind.in_passes(placement.passes)
    )
    most_candidates = 0
    sums_bytes = sum(kind.count * kind.previous_bytes for kind in whole.blocks)
    for first in range(0, len(own), links.ranks_per_node):
        node = own[first : first + links.ranks_per_node]
        wanted = {0} | {number for work in node for number, has_rows in enumerate(work.has_rows) if has_rows}
        most_candidates = max(most_candidates, len(wanted))
    return most_candidates * block_bytes + sums_bytes
