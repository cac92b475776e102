"""The scale of each layer's merged task vector, which needs the whole model: the end of Essential Subspace Merging.

    W = W_0 + (‖M‖ / mean ‖M‖)² · M          the mean over all layers of one kind (Li et al., arXiv 2602.20208)

Layers of one kind are linears at the same place in the blocks of one stack, such as all `self_attn.q_proj` of a
decoder. A kind of one layer has the scale 1.

    first    every block: its M, float32, and its other tensors as they will be, to scratch files; ‖M‖ to the journal
    second   every block: M and W_0 ──► W, and its other tensors, to the output

Nothing is rounded before it is scaled. The scratch files lie in the working folder, and go with it when the merge is
done; a part of the journal stands for each step of each block. The second step needs no calibration data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from largemerge.checkpoint.tensor_info import OutputTensor, Tensors
from largemerge.checkpoint.writer import ShardWriter
from largemerge.regression.essential import moved_weight
from largemerge.regression.gram import GRAM_DTYPE
from largemerge.regression.tensor_plan import BlockPlan, MergeRule
from largemerge.regression.weights import Weights

SCRATCH_FOLDER = "scratch"
"""Folder in the working folder."""
SCRATCH_DIGESTS = "scratch_digests"
"""What an entry of the journal calls the digests of what the first step writes."""


def unscaled_part(block: str) -> str:
    """Name that the first step of a block has in the journal."""
    return f"unscaled {block}"


def unscaled_tensors(blocks: Sequence[BlockPlan], state: Mapping[str, torch.Tensor]) -> dict[str, OutputTensor]:
    """Lays out what the first step writes, by parameter name.

    Args:
        blocks: Plans of all blocks.
        state: The model's parameters and buffers, for their shapes.
    """
    return {
        plan.name: OutputTensor(
            GRAM_DTYPE if plan.rule is MergeRule.SOLVED else plan.dtype, tuple(state[plan.name].shape)
        )
        for block in blocks
        for plan in block.tensors
    }


def layer_scales(blocks: Sequence[BlockPlan], norms: Mapping[str, float]) -> dict[str, float]:
    """Computes the scale of every merged linear, (‖M‖ / mean ‖M‖)², by parameter name; 1 where the mean is 0.

    Args:
        blocks: Plans of all blocks.
        norms: ‖M‖ of every merged linear, by parameter name.
    """
    kinds = {
        linear.name: (block.stack, linear.path)
        for block in blocks
        for group in block.groups
        for linear in group.linears
    }
    counts, totals = Counter(kinds.values()), Counter[tuple[int, str]]()
    for name, kind in kinds.items():
        totals[kind] += norms[name]  # type: ignore[assignment]
    means = {kind: totals[kind] / count for kind, count in counts.items()}
    return {name: (norms[name] / means[kind]) ** 2 if means[kind] > 0 else 1.0 for name, kind in kinds.items()}


def write_scaled(
    block: BlockPlan,
    scales: Mapping[str, float],
    reports: Mapping[str, Mapping[str, Any]],
    scratch: ShardWriter,
    weights: Weights,
) -> dict[str, Any]:
    """Takes the second step of a block, on rank 0 alone.

    Args:
        block: The block.
        scales: Scale of every merged linear, by parameter name.
        reports: What the journal says of the block's linears after the first step, by parameter name.
        scratch: Reads the scratch files.
        weights: Reads the base, writes the output.

    Returns:
        The reports of the block's linears, by parameter name.
    """
    tensors: Tensors = {}
    linears: dict[str, Any] = {}
    for plan in block.tensors:
        found = scratch.read(plan.name)
        if plan.rule is MergeRule.SOLVED:
            base = weights.read_base([plan.name])[plan.name]
            report, scale = reports[plan.name], scales[plan.name]
            found, linears[plan.name] = moved_weight(base, found, scale, plan.dtype, report)
        tensors[plan.name] = found
    weights.store(tensors)
    return linears
