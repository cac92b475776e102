"""What a merge cannot do without: its matrix products and solves, counted from its plan.

Per block, candidate i with Nᵢ tokens, K candidates; linears of a group share an input of I features, O outputs in all:

    collect          the candidate's linears and attention, batch by batch; not the last group of the block, whose
                     input is all that is wanted (unless the method goes on with the candidate's own output);
                     half of XᵀX per group
    right-hand side  for K - 1 candidates (the first is the anchor) D G, or (D Xᵀ) X where 2·Nᵢ < I
    solve            a Cholesky factor of I × I per group, two triangular solves with O right-hand sides
    forward          regmean_plusplus: the merged block on everybody's batches, but for the last block

Not counted, as a merge could in principle do without or in no time: norms, activations, rotary positions, casts,
linears that are averaged, cross-attention, the rehearsal, Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from largemerge import MergePlan
from largemerge.regression.tensor_plan import BlockPlan, LinearGroup


@dataclass(frozen=True)
class Kernel:
    """One product or solve of a certain shape, timed once however often it occurs.

    Attributes:
        kind: One of `kernel_times.KINDS`.
        shape: What its function there takes.
        dtype: Of its operands.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


Work = Counter[tuple[str, Kernel]]
"""How often each kernel occurs in each phase."""


@dataclass(frozen=True)
class Attention:
    """Its geometry, from the model's config."""

    heads: int
    head_features: int
    causal: bool


def attention_of(plan: MergePlan) -> Attention:
    """Of the blocks' self-attention."""
    config = AutoConfig.from_pretrained(plan.config.models[0].model)
    part: PreTrainedConfig = getattr(config, "vision_config", config)
    if "Vision" not in plan.class_name:
        part = config.get_text_config()
    heads = part.num_attention_heads
    features = getattr(part, "head_dim", None) or part.hidden_size // heads
    return Attention(heads, features, plan.class_name.endswith("ForCausalLM"))


def mandatory_work(plan: MergePlan, report: Mapping[str, Any]) -> Work:
    """All kernels of a merge.

    Args:
        plan: Of the merge.
        report: Its `merge_report.json`: how many tokens each candidate really had.
    """
    work: Work = Counter()
    attention = attention_of(plan)
    own_stream = plan.config.merge_method == "regmean"
    for block in plan.blocks:
        goes_on = block is not plan.blocks[-1]
        for index, candidate in enumerate(plan.config.models):
            linears = report["blocks"][block.name]["linears"]
            tokens = {group.leader: _tokens(linears, block, group, candidate.label) for group in block.groups}
            assert candidate.calibration is not None and candidate.calibration.batch_size is not None
            num_samples = report["calibration"][candidate.label]["num_samples"]
            batches = list(_batches(num_samples, candidate.calibration.batch_size))
            full = _forward(block, tokens, num_samples, batches, attention, plan.compute_dtype)
            if own_stream and goes_on:
                _add(work, "collect", full)
            else:
                _add(work, "collect", _forward(block, tokens, num_samples, batches, attention, plan.compute_dtype, 1))
            if goes_on and not own_stream:
                _add(work, "forward", full)
            for group in block.groups:
                rows = tokens[group.leader] / num_samples
                grams = (Kernel("gram", (round(rows * n), group.num_inputs), plan.compute_dtype) for n in batches)
                _add(work, "gram", grams)
                if index > 0:
                    _add(work, "right_hand_side", [_right_hand_side(group, tokens[group.leader])])
        for group in block.groups:
            size = group.num_inputs
            _add(work, "solve", [Kernel("cholesky", (size,), torch.float32)])
            _add(work, "solve", [Kernel("triangular", (size, sum(group.outputs.values())), torch.float32)])
    return work


def _tokens(linears: Mapping[str, Any], block: BlockPlan, group: LinearGroup, candidate: str) -> int:
    return int(linears[f"{block.name}.{group.leader}.weight"]["tokens"][candidate])


def _batches(num_samples: int, batch_size: int) -> Iterator[int]:
    """Samples in each batch."""
    for start in range(0, num_samples, batch_size):
        yield min(batch_size, num_samples - start)


def _forward(
    block: BlockPlan,
    tokens: Mapping[str, int],
    num_samples: int,
    batches: list[int],
    attention: Attention,
    dtype: torch.dtype,
    without_last: int = 0,
) -> Iterator[Kernel]:
    """Linears and attention of one block on all batches of a candidate; the last groups may be left out."""
    for samples in batches:
        for group in block.groups[: len(block.groups) - without_last]:
            rows = round(tokens[group.leader] / num_samples * samples)
            for outputs in group.outputs.values():
                yield Kernel("linear", (rows, group.num_inputs, outputs), dtype)
        length = round(tokens[block.groups[0].leader] / num_samples)
        shape = (samples, attention.heads, length, attention.head_features, int(attention.causal))
        yield Kernel("attention", shape, dtype)


def _right_hand_side(group: LinearGroup, tokens: int) -> Kernel:
    """D G, or (D Xᵀ) X, whichever takes fewer operations; all linears of the group at once, in float32."""
    size, outputs = group.num_inputs, sum(group.outputs.values())
    if 4 * tokens * size * outputs < 2 * size**2 * outputs:
        return Kernel("right_hand_side_by_rows", (tokens, size, outputs), torch.float32)
    return Kernel("right_hand_side", (size, outputs), torch.float32)


def _add(work: Work, phase: str, kernels: Any) -> None:
    work.update((phase, kernel) for kernel in kernels)
