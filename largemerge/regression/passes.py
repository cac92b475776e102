"""Passes over a block: which of its linears are solved together, and which tensors of a candidate that needs.

At once, from the candidates' weights:

    groups   a  b │ c  d  e │ f        cut so that the sums of the largest pass are smallest
    pass 0   run up to b, collect and solve a, b
    pass 1   run up to e, collect and solve c, d, e
    pass 2   run up to f, or through the whole block where it makes the next hidden states

Sums of all linears at once need the most memory and the fewest forward passes. Solved a few groups at a time, a block
is run again for each pass, but only as far as the last linear whose input is wanted, with the weights up to there.

From the average of all weights: a pass that makes it, and one in which everything is solved.

Linear by linear, from the weights merged so far: a pass that averages what is not solved, then one for every group.
Each goes on where the one before it has stopped, at the inputs of the group that is solved by now:

    pass 0   average                    pass 2   from a to b, collect and solve b
    pass 1   up to a, solve a           pass 3   from b to c, …
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from largemerge.model.block_runner import Beside
from largemerge.model.inside_block import ResumePoint
from largemerge.model.trace import LinearRole, ModelTrace
from largemerge.regression.group_sums import sums_bytes
from largemerge.regression.methods import RegressionMethod
from largemerge.regression.tensor_plan import BlockPlan, LinearGroup, LinearPlan, MergeRule, NormPlan, TensorPlan


@dataclass(frozen=True)
class BlockPass:
    """One run of every candidate's block.

    Attributes:
        groups: Groups that are solved after the pass, in the order in which the forward reaches them.
        tensor_names: Names of the tensors that are read of every candidate.
        averages: Whether tensors that are not solved are averaged in this pass.
        last: Whether this is the block's last pass.
        starts: Whether tensors that will be solved are averaged, too, for the next pass to run.
        runs_merged: Whether inputs come from weights merged so far, or averaged, and not from the candidates'.
        start: Where the runs are taken up; `None` for the beginning of the block.
        keep: Where they stop, and keep what the next pass needs; `None` where it starts at the beginning.
        norms: Norms whose inputs are wanted, for which the block is run to its end.
    """

    groups: tuple[LinearGroup, ...]
    tensor_names: tuple[str, ...]
    averages: bool
    last: bool
    starts: bool = False
    runs_merged: bool = False
    start: ResumePoint | None = None
    keep: ResumePoint | None = None
    norms: tuple[NormPlan, ...] = ()

    @property
    def beside(self) -> tuple[Beside, ...]:
        """The tensors beside the inputs of linears that tell by how much the hidden states have drifted."""
        found = {each.name: each for group in self.groups for linear in group.linears for each in beside_of(linear)}
        return tuple(found.values())


def beside_of(linear: LinearPlan) -> tuple[Beside, ...]:
    """The tensors whose sum is what the output of a linear is added to, as far as they are known before it."""
    if linear.residual is None:
        return ()
    outputs = (Beside(path, "output", linear.path) for path in linear.residual.linears)
    return (Beside(linear.residual.module, "input", linear.path), *outputs)


def plan_passes(
    method: RegressionMethod, block: BlockPlan, trace: ModelTrace, num_passes: int, *, advances: bool
) -> tuple[BlockPass, ...]:
    """Plans the passes over a block.

    Args:
        method: The method.
        block: The block.
        trace: Trace of the model.
        num_passes: Number of passes for what is solved at once.
        advances: Whether the candidates' next hidden states are made.
    """
    stack = trace.stacks[block.stack]
    roles = stack.roles[block.index]
    if goes_by_linear(method, block, trace):
        points = stack.resume_points[block.index] if stack.resume_points else {}
        return _linear_passes(method, block, roles, points, advances=advances)
    if method.granularity == "average" and block.groups:
        return _average_passes(method, block, advances=advances)
    return block_passes(block, roles, num_passes, advances=advances)


def _average_passes(method: RegressionMethod, block: BlockPlan, *, advances: bool) -> tuple[BlockPass, ...]:
    """One pass that averages everything, and one that solves everything."""
    merged = [plan.name for plan in block.tensors if plan.rule is not MergeRule.BASE]
    solved = {linear.name for group in block.groups for linear in group.linears}
    whole = method.compares or advances
    names = [plan.name for plan in block.tensors if whole or plan.name in solved]
    return (
        BlockPass((), tuple(merged), averages=True, last=False, starts=True, runs_merged=True),
        BlockPass(block.groups, tuple(names), averages=False, last=True, runs_merged=True),
    )


def goes_by_linear(method: RegressionMethod, block: BlockPlan, trace: ModelTrace) -> bool:
    """Whether a block is solved linear by linear: all of its linears run once in a forward pass."""
    stack = trace.stacks[block.stack]
    once = stack.runs[block.index] == 1 and all(role.calls == 1 for role in stack.roles[block.index])
    return method.granularity == "linear" and once and bool(block.groups)


def _linear_passes(
    method: RegressionMethod,
    block: BlockPlan,
    roles: Sequence[LinearRole],
    points: Mapping[str, ResumePoint],
    *,
    advances: bool,
) -> tuple[BlockPass, ...]:
    """One pass that averages, and one for every group."""
    averaged = [plan.name for plan in block.tensors if plan.rule in (MergeRule.AVERAGED, MergeRule.COPIED)]
    passes = [BlockPass((), tuple(averaged), averages=True, last=False, runs_merged=True)]
    start: ResumePoint | None = None
    for number, group in enumerate(block.groups):
        last, keep = number == len(block.groups) - 1, points.get(group.leader)
        own = {linear.name for linear in group.linears}
        if method.compares:
            own |= _read_by_run(block, roles, start, None if last and advances else group.leader)
        elif last and advances:
            own = {plan.name for plan in block.tensors}
        names = [plan.name for plan in block.tensors if plan.name in own]
        passes.append(BlockPass((group,), tuple(names), False, last, runs_merged=True, start=start, keep=keep))
        start = keep
    return tuple(passes)


def _read_by_run(
    block: BlockPlan, roles: Sequence[LinearRole], start: ResumePoint | None, until: str | None
) -> set[str]:
    """Names of the tensors that a run reads from where it is taken up to a linear, or to the end of the block."""
    order = [role.name for role in roles]
    passed = {*start.known, *start.skipped} if start is not None else set()
    unread = passed if until is None else passed | set(order[order.index(until) :])
    modules = {plan.name: plan.name.removeprefix(block.name + ".").rpartition(".")[0] for plan in block.tensors}
    return {name for name, module in modules.items() if module not in unread}


def block_passes(
    block: BlockPlan, roles: Sequence[LinearRole], num_passes: int, *, advances: bool
) -> tuple[BlockPass, ...]:
    """Cuts the groups of a block into passes.

    Args:
        block: The block.
        roles: The block's linears in the order in which the forward reaches them.
        num_passes: Number of passes; where there are fewer groups, each gets a pass.
        advances: Whether the last pass also makes the next hidden states, with the whole block.
    """
    cuts = _even_cuts(list(map(sums_bytes, block.groups)), num_passes)
    passes = []
    for number, (start, stop) in enumerate(cuts):
        groups, last = block.groups[start:stop], number == len(cuts) - 1
        averages = number == 0
        norms = block.norms if averages else ()
        whole = (advances and last) or bool(norms)
        names = [plan.name for plan in block.tensors if whole or _is_read(block, plan, roles, groups, averages)]
        passes.append(BlockPass(groups, tuple(names), averages, last, norms=norms))
    return tuple(passes)


def _is_read(
    block: BlockPlan, plan: TensorPlan, roles: Sequence[LinearRole], groups: Sequence[LinearGroup], averages: bool
) -> bool:
    """Whether a pass that solves `groups`, and stops at the last of them, needs a tensor of the candidates."""
    module, _, leaf = plan.name.removeprefix(block.name + ".").rpartition(".")
    if averages and plan.rule in (MergeRule.AVERAGED, MergeRule.COPIED):
        return True
    if leaf == "weight" and any(module in group.outputs for group in groups):
        return True
    order = [role.name for role in roles]
    calls = {role.name: role.calls for role in roles}
    if module not in order or any(calls[group.leader] > 1 for group in groups):
        return bool(groups)  # not a linear, or the block is run to its end for one that is called more than once
    return bool(groups) and order.index(module) < order.index(groups[-1].leader)


def _even_cuts(sizes: Sequence[int], num_parts: int) -> list[tuple[int, int]]:
    """Cuts a sequence into contiguous parts, (start, stop), so that the largest sum of sizes is smallest."""
    count = len(sizes)
    num_parts = max(1, min(num_parts, count))

    def largest(cuts: tuple[int, ...]) -> int:
        return max(sum(sizes[start:stop]) for start, stop in _pairs(cuts, count))

    best = min(itertools.combinations(range(1, count), num_parts - 1), key=largest)
    return list(_pairs(best, count))


def _pairs(cuts: tuple[int, ...], count: int) -> Iterator[tuple[int, int]]:
    yield from itertools.pairwise((0, *cuts, count))
