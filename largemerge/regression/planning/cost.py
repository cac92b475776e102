"""How long a merge takes: operations and bytes, over rates.

    candidate forward   Σ 2·N·I·O over the linears that are reached, and attention 4·N·T·I
    Gram                N·I²             half of it, for it is symmetric
    right-hand side     2·I²·O, or 4·N·I·O where that is less, for all candidates but the first
    solve               I³/3 + 2·I²·O
    merged forward      like a candidate's, all linears
    disk                bytes over rate, as far as it is not hidden by computing

Shapes: N rows of one candidate, T rows of one sample, I inputs, O outputs.

How long a merge by several ranks takes.

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

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from largemerge.distributed.partition import choose_owners
from largemerge.regression.group_sums import multiplies_by_rows
from largemerge.regression.passes import BlockPass
from largemerge.regression.planning.workload import BlockKind, OffloadTo, Placement, Workload
from largemerge.regression.tensor_plan import BlockPlan, GroupPlan


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second; per operation (a multiplication or an addition) or byte.

    Attributes:
        linear: Operations of a linear, in the compute dtype.
        gram: Operations of a Gram matrix, counted as N·I².
        product: Operations of float32 products.
        cholesky: Operations of a Cholesky factorisation, counted as I³/3.
        memory: Bytes copied in memory.
        read: Bytes from the disk.
        write: Bytes to the disk.
        batch_seconds: Of calling a model up to a block, whatever the size.
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
"""Of no machine in particular: placements are compared with them."""

_MEMORY_TRIPS = 6  # a value that a linear computes is read or written this often, by activations, norms, additions


def estimate_seconds(
    work: Workload, placement: Placement, rates: Rates, *, writes_in_background: bool = False
) -> dict[str, float]:
    """Seconds by stage; `writes_behind` if blocks are written while the next ones are merged."""
    stages = dict.fromkeys(("read", "candidate_forward", "gram", "right_hand_side", "solve", "merged_forward"), 0.0)
    read_bytes = 0
    for kind in work.kinds:
        for each in kind.passes(placement.passes, advances=work.method.advances_while_collecting):
            for stage, seconds in _pass_seconds(work, kind, each, placement, rates).items():
                stages[stage] += kind.count * seconds
            read_bytes += kind.count * work.num_candidates * kind.bytes_of(each.reads)
        if work.method.forwards_merged:
            stages["merged_forward"] += kind.num_outputs_read * _forward_seconds(work, kind, None, placement, rates)
    num_bytes = sum(kind.count * kind.bytes_of(kind.names) for kind in work.kinds)
    reading, writing, computing = read_bytes / rates.read, num_bytes / rates.write, sum(stages.values())
    stages |= disk_seconds(reading, writing, computing, ahead=placement.prefetch, in_background=writes_in_background)
    stages["outside"] = work.non_block_bytes * (work.num_candidates / rates.read + 1 / rates.write)
    stages["hidden_states"] = _waiting_seconds(work, placement, rates)
    return stages


def disk_seconds(
    reading: float, writing: float, computing: float, *, ahead: bool, in_background: bool
) -> dict[str, float]:
    """What shows of seconds of reading and writing, where computing hides them; a tenth does in any case."""
    if not in_background:
        return {"read": max(reading - computing, 0.1 * reading) if ahead else reading, "write": writing}
    both = reading + writing
    shown = max(both - computing, 0.1 * both) / both if both else 0.0
    return {"read": reading * shown, "write": writing * shown}


def _pass_seconds(
    work: Workload, kind: BlockKind, each: BlockPass, placement: Placement, rates: Rates
) -> dict[str, float]:
    keep = work.method.advances_while_collecting and each.last
    until = None if keep else (each.groups[-1].leader if each.groups else "")
    gram = rhs = solve = 0.0
    for group in each.groups:
        size, outputs = group.num_inputs, sum(group.outputs.values())
        stack = kind.block.stack_of(group)
        for number, rows in enumerate(work.rows):
            gram += rows[stack] * size**2 / rates.gram
            rhs += (number > 0) * _times_rows(work, number, stack, size) * size * outputs / rates.product
        solve += solve_seconds(group, rates)
    return {
        "candidate_forward": _forward_seconds(work, kind, until, placement, rates) if each.groups or keep else 0.0,
        "gram": gram,
        "right_hand_side": rhs,
        "solve": solve,
    }


def _times_rows(work: Workload, number: int, stack: int, size: int) -> float:
    """Operations of a candidate's right-hand side for every input and output."""
    rows = work.rows[number][stack]
    total = work.total_rows[number][stack] if work.total_rows else rows
    if rows and work.rank_group_sizes and work.rank_group_sizes[number] > 1 and not multiplies_by_rows(total, size):
        return 2 * size / work.rank_group_sizes[number]
    return 4 * rows if multiplies_by_rows(rows, size) else 2 * size


def batch_costs(blocks: Sequence[BlockPlan], rows: Sequence[Sequence[int]]) -> tuple[list[list[float]], list[float]]:
    """What every candidate's batches cost, to share them out evenly, in seconds of no machine in particular.

    Args:
        blocks: All of them.
        rows: By candidate and batch.

    Returns:
        By candidate and batch; and by candidate, what does not depend on how many rows there are: its right-hand
        sides, unless they are made row by row. The first candidate has none.
    """
    groups = Counter((group.num_inputs, sum(group.outputs.values())) for block in blocks for group in block.groups)
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


def solve_seconds(group: GroupPlan, rates: Rates) -> float:
    """Of one Gram's factorisation, the triangular solves, and what is copied and rounded around them."""
    size, outputs = group.num_inputs, sum(group.outputs.values())
    products = size**3 / 3 / rates.cholesky + 2 * size**2 * outputs / rates.product
    return products + 12 * size * (outputs + size) * 4 / rates.memory


def _forward_seconds(work: Workload, kind: BlockKind, until: str | None, placement: Placement, rates: Rates) -> float:
    """Of all candidates' data through one block, up to the linear `until`."""
    order = [role.name for role in kind.roles]
    reached = list(kind.linears) if until is None else order[: order.index(until)] if until in order else []
    stack = kind.block.stack
    rows = sum(of_candidate[stack] for of_candidate in work.rows)
    weights = sum(kind.linears[path][0] * kind.linears[path][1] for path in reached)
    width = kind.linears[order[0]][0] if order else 0
    attention = 4 * work.sample_rows[stack] * width if len(reached) > 2 else 0
    features = sum(kind.linears[path][1] for path in reached) + 2 * width
    num_batches = work.num_batches * -(-work.batch_samples // placement.samples)
    trips = _MEMORY_TRIPS * rows * features * work.compute_dtype.itemsize
    return rows * (2 * weights + attention) / rates.linear + trips / rates.memory + num_batches * rates.batch_seconds


def _waiting_seconds(work: Workload, placement: Placement, rates: Rates) -> float:
    """Of moving hidden states where they wait and back, as far as nothing hides it."""
    blocks = sum(kind.num_outputs_read for kind in work.kinds)
    moved = work.hidden_bytes * blocks * (placement.passes + 2)
    if placement.hidden_states is OffloadTo.DEVICE:
        return 0.0
    # Read ahead and written behind: a tenth of it shows.
    return moved * (
        0.1 / rates.read + 0.1 / rates.write if placement.hidden_states is OffloadTo.DISK else 0.1 / rates.memory
    )


_COLLECT = ("candidate_forward", "gram", "right_hand_side")


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
    """Seconds by stage, of all ranks together.

    Args:
        whole: The work of all.
        own: Every rank's, in order.
        placement: Of every rank.
        rates: Of one rank, while all are at work.
        links: Between the ranks.
        num_bytes: Of sums and merged weights that are exchanged.
        writes_in_background: Blocks are written while the next ones are merged.
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
    stages |= disk_seconds(
        reading, alone["write"], computing, ahead=placement.prefetch, in_background=writes_in_background
    )
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
        for each in kind.passes(placement.passes, advances=whole.method.advances_while_collecting)
    )
    most = 0
    for first in range(0, len(own), links.ranks_per_node):
        node = own[first : first + links.ranks_per_node]
        wanted = {0} | {number for work in node for number, rows in enumerate(work.rows) if any(rows.values())}
        most = max(most, len(wanted))
    return most * block_bytes


@dataclass(frozen=True)
class Links:
    """What lies between the ranks of a merge.

    Attributes:
        bandwidth: Bytes a second at which a sum reaches its owner, or a merged weight everybody.
        latency: Seconds that each such exchange takes, however small.
        ranks_per_node: Ranks that share what is read from disk.
    """

    bandwidth: float
    latency: float
    ranks_per_node: int
