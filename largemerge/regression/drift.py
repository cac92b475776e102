"""By how much the hidden states of the merged model have drifted from a candidate's own, after a block.

‖h_m − h_e‖ / ‖h_e‖     over the valid tokens of the candidate's calibration data
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_flatten

from largemerge.model.block_runner import valid_mask, valid_rows
from largemerge.model.forward import KeptOutputs, Output
from largemerge.regression.collect import SampleRunner
from largemerge.regression.gram import GRAM_DTYPE
from largemerge.regression.tensor_plan import BlockPlan

DriftOfBlocks = dict[str, dict[str, float | None]]
"""Candidate → block → drift after it; `None` where a block returns no hidden states that can be compared."""

_BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Drift:
    """Sums the drift of one candidate's data after one block, batch by batch.

    Attributes:
        samples: Knows the candidate's own hidden states, which have gone through the block already.
        block: The block.
        candidate: Number of the candidate.
        squares: ‖h_m − h_e‖² and ‖h_e‖² so far, on this rank.
    """

    samples: SampleRunner
    block: BlockPlan
    candidate: int
    squares: tuple[float, float] = field(init=False, default=(0.0, 0.0))

    def add(self, number: int, output: Output) -> None:
        """Adds the merged output of one batch."""
        samples, stack = self.samples, self.block.stack
        runner, batch = samples.runner, samples.samples.calibration[self.candidate].batches[number]
        own = samples.hidden_states.get("candidate", self.candidate, number, runner.device)[stack]
        mask = valid_mask(batch, runner.trace.stacks[stack], runner.loss_input)
        rows = [_rows(each, mask) for each in (output, own)]
        if rows[0] is None or rows[1] is None:
            return
        merged, expected = rows[0].to(GRAM_DTYPE), rows[1].to(GRAM_DTYPE)
        apart, whole = (merged - expected).square().sum().item(), expected.square().sum().item()
        self.squares = (self.squares[0] + apart, self.squares[1] + whole)


def _rows(output: Output, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Valid rows of the first floating-point tensor that a block returns, its hidden states."""
    output = output.last if isinstance(output, KeptOutputs) else output
    leaves = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if not leaves or (mask is not None and leaves[0].numel() % (mask.numel() * leaves[0].shape[-1])):
        return None
    return valid_rows(leaves[0], None if mask is None else mask.to(leaves[0].device))


def relative(squares: Iterable[tuple[float, float]]) -> float | None:
    """‖h_m − h_e‖ / ‖h_e‖ over the parts of all ranks; `None` where nothing is to be compared, NaN stays NaN."""
    parts = list(squares)
    apart, whole = (sum(part[which] for part in parts) for which in (0, 1))
    return math.sqrt(apart / whole) if whole else None


def drift_curves(drift: DriftOfBlocks) -> Iterator[tuple[str, str, float, float]]:
    """Yields for each candidate its name, a curve over the blocks, the drift after the last block, and the largest.

    The curve has a bar of one character for each block, from zero to the largest.
    """
    for name, by_block in drift.items():
        known = [value for value in by_block.values() if value is not None]
        if known:
            most = max(known)
            heights = (int(value / (most or 1.0) * len(_BARS)) for value in known)
            yield name, "".join(_BARS[min(len(_BARS) - 1, height)] for height in heights), known[-1], most


def drift_section(drift: DriftOfBlocks) -> str:
    """Makes the part of a model card that shows the drift; empty where none is known."""
    rows = [f"| {name} | `{curve}` | {last:.2%} | {most:.2%} |" for name, curve, last, most in drift_curves(drift)]
    if not rows:
        return ""
    return f"""
## Drift

How far the merged model's hidden states are from each model's own, on that model's calibration data: ‖h − hᵢ‖ / ‖hᵢ‖
after each block, from the first to the last. Less is better.

| model | over the blocks | after the last | at most |
|---|---|---:|---:|
{chr(10).join(rows)}
"""
