"""How long a merge by several ranks takes.

    collect        the slowest rank: its candidates' forward passes, Grams, right-hand sides
    communicate    sums and merged weights, at the rate of the slowest link: bytes / bandwidth + exchanges · latency
    solve          of every block, the rank whose solves take longest
    merged forward the slowest rank
    read           per node: the blocks of all candidates that one of its ranks wants, once; hidden behind computing
    write          the first rank; hidden behind computing on GPUs

Ranks wait for each other in every block, so the slowest one of every stage counts. Sums and weights travel along a
ring or tree in pieces, so that the bytes pass every link once, however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Sequence

from largemerge.cluster import Links
from largemerge.estimate import Placement
from largemerge.sharing import choose_owners
from largemerge.timing import Rates, disk_seconds, estimate_seconds, solve_seconds
from largemerge.workload import Workload

_COLLECT = ("candidate_forward", "gram", "right_hand_side")


def estimate_rank_seconds(
    whole: Workload,
    own: Sequence[Workload],
    placement: Placement,
    rates: Rates,
    links: Links,
    num_bytes: int,
    *,
    writes_behind: bool = False,
) -> dict[str, float]:
    """Seconds by stage, of all ranks together.

    Args:
        whole: The work of all.
        own: Every rank's, in order.
        placement: Of every rank.
        rates: Of one rank, while all are at work.
        links: Between the ranks.
        num_bytes: Of sums and merged weights that are exchanged.
        writes_behind: Blocks are written while the next ones are merged.
    """
    alone = estimate_seconds(whole, placement, rates)
    each = [estimate_seconds(work, placement, rates) for work in own]
    slowest = max(each, key=lambda stages: sum(stages[stage] for stage in _COLLECT))
    stages = {stage: slowest[stage] for stage in _COLLECT}
    stages["solve"] = _longest_solves(whole, rates, len(own))
    stages["merged_forward"] = max(stages_of_rank["merged_forward"] for stages_of_rank in each)
    stages["communicate"] = num_bytes / links.bandwidth + _num_exchanges(whole) * links.latency
    reading = _most_read(whole, own, placement, links) / rates.read
    computing = sum(stages.values())
    stages |= disk_seconds(reading, alone["write"], computing, ahead=placement.prefetch, behind=writes_behind)
    stages["hidden_states"] = max(stages_of_rank["hidden_states"] for stages_of_rank in each)
    return stages | {"outside": alone["outside"]}


def _longest_solves(work: Workload, rates: Rates, num_ranks: int) -> float:
    total = 0.0
    for kind in work.kinds:
        owners = choose_owners({group.leader: group.solve_operations for group in kind.block.groups}, num_ranks)
        loads = [0.0] * num_ranks
        for group in kind.block.groups:
            loads[owners[group.leader]] += solve_seconds(group, rates)
        total += kind.count * max(loads)
    return total


def _num_exchanges(work: Workload) -> int:
    """The sums and the weights of every group, and averages, there and back."""
    return sum(kind.count * (2 * len(kind.block.groups) + 2) for kind in work.kinds)


def _most_read(whole: Workload, own: Sequence[Workload], placement: Placement, links: Links) -> int:
    """Bytes of candidates that the node reads that reads most; the first candidate is wanted by all."""
    block_bytes = sum(
        kind.count * kind.bytes_of(each.reads)
        for kind in whole.kinds
        for each in kind.passes(placement.passes, keeps_outputs=whole.own_stream)
    )
    most = 0
    for first in range(0, len(own), links.ranks_per_node):
        node = own[first : first + links.ranks_per_node]
        wanted = {0} | {number for work in node for number, rows in enumerate(work.rows) if any(rows.values())}
        most = max(most, len(wanted))
    return most * block_bytes
