"""How much memory and disk a merge will hold, from shapes alone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from largemerge.calibration import CalibrationOutline, CalibrationSet
from largemerge.inputs import Inputs
from largemerge.memory import memory_in_use
from largemerge.model.rehearsal import Rehearsal
from largemerge.regression.sums import sums_bytes
from largemerge.treatment import BlockPlan

BatchShapes = Mapping[str, tuple[int, ...]]
"""Forward argument → shape of one batch."""


@dataclass(frozen=True)
class PeakEstimate:
    """Bytes held at the moment when most is held, by what they are for.

    Attributes:
        before: What the process holds before it starts (interpreter, libraries).
        outside: Embeddings and what else lies outside the stacks, while it is needed.
        blocks: Candidates' weights of one block: the anchor, the present one, the next one being read.
        sums: Gram matrices, right-hand sides, averages.
        activations: Of one batch inside a block.
        solve: Work space of the largest system.
        calibration: Inputs and hidden states of all candidates.
    """

    before: int
    outside: int
    blocks: int
    sums: int
    activations: int
    solve: int
    calibration: int

    @property
    def total(self) -> int:
        """Bytes at the peak; activations, solves and embeddings take turns."""
        return (
            self.before + self.calibration + self.blocks + self.sums + max(self.activations + self.outside, self.solve)
        )


def batch_shapes(
    outlines: Sequence[CalibrationOutline], calibration: Sequence[CalibrationSet] | None
) -> list[list[BatchShapes]]:
    """Shapes of every batch of every candidate, from the data if it has been read, else from the outlines."""
    if calibration is not None:
        return [
            [{name: tuple(tensor.shape) for name, tensor in batch.inputs.items()} for batch in data.batches]
            for data in calibration
        ]
    batches: list[list[BatchShapes]] = []
    for outline in outlines:
        sizes = [outline.batch_size] * (outline.num_samples // outline.batch_size)
        sizes += [outline.num_samples % outline.batch_size] if outline.num_samples % outline.batch_size else []
        batches.append([{name: (size, *shape) for name, (shape, _) in outline.inputs.items()} for size in sizes])
    return batches


def estimate_peak(
    inputs: Inputs,
    rehearsal: Rehearsal,
    blocks: Sequence[BlockPlan],
    compute_dtype: torch.dtype,
    shapes: Sequence[Sequence[BatchShapes]],
    device: torch.device,
) -> PeakEstimate:
    """What a run will hold at its peak."""
    state = inputs.skeleton.model.state_dict()
    largest_outside = max((sum(state[name].numel() for name in stack.first) for stack in rehearsal.stacks), default=0)
    block_parts = [_block_bytes(inputs, block, compute_dtype) for block in blocks]
    rows = {stack: _largest_rows(rehearsal, stack, shapes) for stack in rehearsal.order}
    activations = [
        rows[block.stack] * _features(block) * compute_dtype.itemsize
        + rows[block.stack] * 4 * max((group.num_inputs for group in block.groups), default=0)
        for block in blocks
    ]
    solves = [
        max((12 * g.num_inputs**2 + 16 * g.num_inputs * sum(g.outputs.values()) for g in block.groups), default=0)
        for block in blocks
    ]
    return PeakEstimate(
        before=memory_in_use(device).host_anonymous if device.type == "cpu" else 0,
        outside=largest_outside * compute_dtype.itemsize * 2,
        blocks=max((part[0] for part in block_parts), default=0),
        sums=max((part[1] for part in block_parts), default=0),
        activations=max(activations, default=0),
        solve=max(solves, default=0),
        calibration=_calibration_bytes(rehearsal, shapes, compute_dtype),
    )


def _block_bytes(inputs: Inputs, block: BlockPlan, compute_dtype: torch.dtype) -> tuple[int, int]:
    state = inputs.skeleton.model.state_dict()
    elements = sum(state[plan.name].numel() for plan in block.tensors)
    stored = sum(state[plan.name].numel() * plan.dtype.itemsize for plan in block.tensors)
    cast = elements * compute_dtype.itemsize if any(plan.dtype != compute_dtype for plan in block.tensors) else 0
    sums = sum(sums_bytes(list(group.outputs.values()), group.num_inputs, torch.float32) for group in block.groups)
    return 3 * stored + cast, sums


def _features(block: BlockPlan) -> int:
    """What a block computes for one token: inputs and outputs of all its linears."""
    return sum(group.num_inputs + sum(group.outputs.values()) for group in block.groups)


def _largest_rows(rehearsal: Rehearsal, stack: int, shapes: Sequence[Sequence[BatchShapes]]) -> int:
    seen = rehearsal.stacks[stack]
    largest = 0
    for batch in (batch for batches in shapes for batch in batches):
        if seen.tokens is not None and seen.tokens in batch:
            largest = max(largest, math.prod(batch[seen.tokens][:2]))
        else:
            largest = max(largest, next(iter(batch.values()))[0] * seen.num_tokens)
    return largest


def _calibration_bytes(
    rehearsal: Rehearsal, shapes: Sequence[Sequence[BatchShapes]], compute_dtype: torch.dtype
) -> int:
    total = 0
    for batch in (batch for batches in shapes for batch in batches):
        for name, shape in batch.items():
            total += math.prod(shape) * (8 if name.endswith(("ids", "mask")) else 4)
        samples = next(iter(batch.values()))[0]
        for stack in rehearsal.stacks:
            tokens = batch[stack.tokens][1] if stack.tokens is not None and stack.tokens in batch else stack.num_tokens
            for shape in stack.output_shapes:
                scaled = [samples if i == 0 and n == 2 else n for i, n in enumerate(shape)]
                scaled = [tokens if n == stack.num_tokens and i > 0 else n for i, n in enumerate(scaled)]
                total += math.prod(scaled) * compute_dtype.itemsize
    return total


def resource_problems(peak: PeakEstimate, device: torch.device, bytes_written: int, out: Path | None) -> list[str]:
    """What this machine has too little of."""
    problems = []
    host = psutil.virtual_memory().available + peak.before
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        needed = peak.total - peak.calibration
        if needed > free:
            problems.append(f"needs about {_gib(needed)} on {device}, which has {_gib(free)} free; lower batch_size")
        needed = peak.calibration
    else:
        needed = peak.total
    if needed > host:
        problems.append(
            f"needs about {_gib(needed)} of memory, this machine has {_gib(host)} available; "
            f"hidden states take {_gib(peak.calibration)} of it: lower num_samples, max_length or batch_size"
        )
    if out is not None:
        folder = next(path for path in (out, *out.absolute().parents) if path.exists())
        free = shutil.disk_usage(folder).free
        if bytes_written > free:
            problems.append(f"{out}: needs {_gib(bytes_written)} of disk, {_gib(free)} are free")
    return problems


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
