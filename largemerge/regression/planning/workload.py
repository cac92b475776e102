"""What a merge has to do, in numbers: rows, features and bytes, from shapes alone.

Blocks that are alike are counted once. Everything here is the same wherever hidden states wait and however the work is
cut up; `estimate.py` says what a given placement of it holds, `timing.py` how long it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from largemerge.calibration import CalibrationOutline, CalibrationSet
from largemerge.model.skeleton import linears_in, weight_is_transposed
from largemerge.model.trace import LinearRole, ModelTrace, StackTrace
from largemerge.regression.inputs import Inputs
from largemerge.regression.methods import RegressionMethod
from largemerge.regression.passes import BlockPass, block_passes
from largemerge.regression.tensor_plan import BlockPlan


class OffloadTo(str, Enum):
    """Where hidden states wait between blocks."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True)
class Placement:
    """How the work is laid out.

    Attributes:
        hidden_states: Where they wait.
        passes: In how many passes a block is solved.
        prefetch: Whether the next candidate's block is read while this one computes.
        samples: That run at once.
    """

    hidden_states: OffloadTo
    passes: int
    prefetch: bool
    samples: int

    def writes_in_background(self, device: torch.device) -> bool:
        """Whether a merged block is written while the next one is merged: where a GPU would wait for the disk."""
        return self.prefetch and device.type != "cpu"

    def __str__(self) -> str:
        where = {OffloadTo.DEVICE: "on the device", OffloadTo.HOST: "in host memory", OffloadTo.DISK: "on disk"}
        linears = "all linears of a block at once" if self.passes == 1 else f"a block's linears in {self.passes} passes"
        ahead = "the next block read ahead" if self.prefetch else "no block read ahead"
        return f"hidden states {where[self.hidden_states]}, {linears}, {ahead}, {self.samples} samples at once"


BatchShapes = Mapping[str, tuple[int, ...]]
"""Forward argument → shape of one batch."""


@dataclass(frozen=True)
class BlockKind:
    """Blocks that are alike.

    Attributes:
        block: One of them.
        roles: Its linears in the order in which the forward reaches them.
        sizes: Elements of every tensor.
        linears: Path → (inputs, outputs) of every linear.
        count: How many there are.
        num_outputs_read: How many of them compute something that somebody reads.
    """

    block: BlockPlan
    roles: tuple[LinearRole, ...]
    sizes: Mapping[str, int]
    linears: Mapping[str, tuple[int, int]]
    count: int
    num_outputs_read: int

    def passes(self, num_passes: int, *, advances: bool) -> tuple[BlockPass, ...]:
        """See `block_passes`."""
        return block_passes(self.block, self.roles, num_passes, advances=advances)

    def bytes_of(self, names: Sequence[str], dtype: torch.dtype | None = None) -> int:
        """Bytes of some of its tensors, as they are written or in one dtype."""
        dtypes = {plan.name: dtype or plan.dtype for plan in self.block.tensors}
        return sum(self.sizes[name] * dtypes[name].itemsize for name in names)

    @property
    def names(self) -> list[str]:
        """Of all its tensors."""
        return [plan.name for plan in self.block.tensors]


@dataclass(frozen=True)
class Workload:
    """What a merge has to do.

    Attributes:
        num_candidates: K.
        method: Its row in the table.
        off_diagonal_scale: s.
        compute_dtype: Of the forward passes.
        kinds: All blocks, by kind.
        rows: By candidate and stack, rows of all batches.
        batch_samples: Samples in the largest batch.
        num_batches: Of all candidates.
        sample_rows: By stack, the most rows that one sample has.
        sample_hidden_bytes: Of the outputs of all stacks for one sample, at most.
        hidden_bytes: Of the outputs of all stacks for all samples.
        input_bytes: Of the calibration inputs that are held all the time.
        loading_bytes: Of those that are held only until they are on disk.
        first_bytes: Of the tensors outside the stacks that the first block needs, in the compute dtype.
        non_block_bytes: Of all tensors outside the stacks, as they are written.
        total_rows: Of one rank's work: like `rows`, of all ranks; empty where one does everything.
        rank_group_sizes: Of one rank's work: how many ranks, itself counted, share each candidate's right-hand sides.
    """

    num_candidates: int
    method: RegressionMethod
    off_diagonal_scale: float
    compute_dtype: torch.dtype
    kinds: tuple[BlockKind, ...]
    rows: tuple[Mapping[int, int], ...]
    batch_samples: int
    num_batches: int
    sample_rows: Mapping[int, int]
    sample_hidden_bytes: int
    hidden_bytes: int
    input_bytes: int
    loading_bytes: int
    first_bytes: int
    non_block_bytes: int
    total_rows: tuple[Mapping[int, int], ...] = ()
    rank_group_sizes: tuple[int, ...] = ()


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


def measure_workload(
    inputs: Inputs,
    trace: ModelTrace,
    blocks: Sequence[BlockPlan],
    shapes: Sequence[Sequence[BatchShapes]],
    *,
    method: RegressionMethod,
    off_diagonal_scale: float,
    mapped_inputs: bool,
    non_block_bytes: int,
) -> Workload:
    """Counts everything."""
    dtype = inputs.skeleton.dtype
    state = inputs.skeleton.model.state_dict()
    batches = [batch for of_candidate in shapes for batch in of_candidate]
    stacks = {number: trace.stacks[number] for number in trace.order}
    hidden = [_hidden_bytes(trace, batch, dtype) for batch in batches]
    floating = [sum(_input_bytes(batch, floating=True) for batch in of_candidate) for of_candidate in shapes]
    return Workload(
        num_candidates=len(inputs.candidates),
        method=method,
        off_diagonal_scale=off_diagonal_scale,
        compute_dtype=dtype,
        kinds=_kinds(inputs, trace, blocks),
        rows=tuple(
            {number: sum(_num_rows(seen, batch) for batch in of_candidate) for number, seen in stacks.items()}
            for of_candidate in shapes
        ),
        batch_samples=max((_num_samples(batch) for batch in batches), default=1),
        num_batches=len(batches),
        sample_rows={
            number: max((_num_rows(seen, batch) // _num_samples(batch) for batch in batches), default=0)
            for number, seen in stacks.items()
        },
        sample_hidden_bytes=max(
            (size // _num_samples(batch) for size, batch in zip(hidden, batches, strict=True)), default=0
        ),
        hidden_bytes=sum(hidden),
        input_bytes=sum(_input_bytes(batch, floating=False) for batch in batches)
        + (0 if mapped_inputs else sum(floating)),
        loading_bytes=max(floating) if mapped_inputs else 0,
        first_bytes=dtype.itemsize * max(sum(state[name].numel() for name in stack.first) for stack in trace.stacks),
        non_block_bytes=non_block_bytes,
    )


def count_rows_of(trace: ModelTrace, batch: BatchShapes) -> int:
    """Rows of a batch, over all stacks, padding included."""
    return sum(_num_rows(stack, batch) for stack in trace.stacks)


def split_shapes(shapes: Sequence[Sequence[BatchShapes]], most: int) -> list[list[BatchShapes]]:
    """Batches of at most so many samples."""
    return [
        [
            {name: (min(most, total - start), *shape[1:]) for name, shape in batch.items()}
            for batch in of_candidate
            for total in [_num_samples(batch)]
            for start in range(0, total, most)
        ]
        for of_candidate in shapes
    ]


def _kinds(inputs: Inputs, trace: ModelTrace, blocks: Sequence[BlockPlan]) -> tuple[BlockKind, ...]:
    state = inputs.skeleton.model.state_dict()
    found: dict[object, list[BlockPlan]] = {}
    for block in blocks:
        prefix = len(block.name)
        tensors = [(plan.name[prefix:], plan.rule, plan.dtype, state[plan.name].shape) for plan in block.tensors]
        groups = [(group.leader, group.num_inputs, *group.outputs.items()) for group in block.groups]
        roles = trace.stacks[block.stack].roles[block.index]
        found.setdefault((block.stack, repr(tensors), repr(groups), roles), []).append(block)
    kinds = []
    for members in found.values():
        block = members[0]
        linears = linears_in(inputs.skeleton.stacks[block.stack].blocks[block.index])
        shapes = {path: tuple(linear.get_parameter("weight").shape) for path, linear in linears.items()}
        kinds.append(
            BlockKind(
                block=block,
                roles=trace.stacks[block.stack].roles[block.index],
                sizes={plan.name: state[plan.name].numel() for plan in block.tensors},
                linears={
                    path: (shape[0], shape[1]) if weight_is_transposed(linears[path]) else (shape[1], shape[0])
                    for path, shape in shapes.items()
                },
                count=len(members),
                num_outputs_read=sum(member is not blocks[-1] for member in members),
            )
        )
    return tuple(kinds)


def _input_bytes(batch: BatchShapes, *, floating: bool) -> int:
    """Of the inputs in floating point (float32), or of all others (int64)."""
    named = {name: math.prod(shape) for name, shape in batch.items()}
    return sum((4 if floating else 8) * n for name, n in named.items() if name.endswith(("ids", "mask")) != floating)


def _num_samples(batch: BatchShapes) -> int:
    return next(iter(batch.values()))[0]


def _num_tokens(stack: StackTrace, batch: BatchShapes) -> int:
    return batch[stack.tokens][1] if stack.tokens is not None and stack.tokens in batch else stack.num_tokens


def _num_rows(stack: StackTrace, batch: BatchShapes) -> int:
    return _num_samples(batch) * _num_tokens(stack, batch)


def _hidden_bytes(trace: ModelTrace, batch: BatchShapes, dtype: torch.dtype) -> int:
    """Of the outputs of all stacks, from their shapes for the rehearsal's two samples."""
    total = 0
    for stack in trace.stacks:
        tokens = _num_tokens(stack, batch)
        for shape in stack.output_shapes:
            scaled = [_num_samples(batch) if i == 0 and n == 2 else n for i, n in enumerate(shape)]
            scaled = [tokens if n == stack.num_tokens and i > 0 else n for i, n in enumerate(scaled)]
            total += math.prod(scaled) * dtype.itemsize
    return total
