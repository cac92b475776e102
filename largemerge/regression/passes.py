"""Passes over a block: which of its linears are solved together, and which tensors of a candidate that needs.

    groups   a  b │ c  d  e │ f        cut so that the sums of the largest pass are smallest
    pass 0   run up to b, collect and solve a, b
    pass 1   run up to e, collect and solve c, d, e
    pass 2   run up to f, or through the whole block where it makes the next hidden states

Sums of all linears at once need the most memory and the fewest forward passes. Solved a few groups at a time, a block
is run again for each pass, but only as far as the last linear whose input is wanted, with the weights up to there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from largemerge.model.trace import LinearRole
from largemerge.regression.group_sums import sums_bytes
from largemerge.regression.tensor_plan import BlockPlan, LinearGroup, MergeRule, TensorPlan


@dataclass(frozen=True)
class BlockPass:
    """One run of every candidate's block.

    Attributes:
        groups: Groups that are solved after the pass, in the order in which the forward reaches them.
        tensor_names: Names of the tensors that are read of every candidate.
        averages: Whether tensors that are not solved are averaged in this pass.
        last: Whether this is the block's last pass.
    """

    groups: tuple[LinearGroup, ...]
    tensor_names: tuple[str, ...]
    averages: bool
    last: bool


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
        whole, averages = advances and last, number == 0
        names = [plan.name for plan in block.tensors if whole or _is_read(block, plan, roles, groups, averages)]
        passes.append(BlockPass(groups, tuple(names), averages, last))
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
