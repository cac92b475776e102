"""What a merge has to do, in plain numbers: rows, bytes and operations, counted from shapes alone.

    model, tensors, batch shapes ──► measure_workload ──► Workload: one row of numbers for every kind of block
                                                             and number of passes

This is the only place where planning looks at blocks, linears and sums. `placement.py` (what is held), `cost.py` (how
long it takes) and `ranks.py` (who does it) add and multiply what stands here. Blocks that are alike are counted once.

    candidate forward   2·N·I·O for every linear that is reached, and attention 4·N·T·I
    Gram                N·I²             half of it, for it is symmetric
    right-hand side     2·I²·O, or 4·N·I·O where that is less, for all candidates but the first
    solve               I³/3 + 2·I²·O
    merged forward      like a candidate's, all linears

Shapes: N rows of one candidate, T rows of one sample, I inputs, O outputs.
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
from largemerge.regression.averages import CHUNK_BYTES as AVERAGE_CHUNK_BYTES
from largemerge.regression.gram import GRAM_DTYPE, panels
from largemerge.regression.group_sums import CHUNK_BYTES, multiplies_by_rows, sketch_bytes
from largemerge.regression.inputs import Inputs
from largemerge.regression.methods import RegressionMethod
from largemerge.regression.passes import BlockPass, block_passes, group_bytes
from largemerge.regression.solve import may_need_float64
from largemerge.regression.tensor_plan import BlockPlan, LinearGroup, MergeRule

_MEMORY_TRIPS = 6  # a value that a linear computes is read or written this often, by activations, norms, additions


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
class GroupNumbers:
    """The linears of one group that is solved.

    Attributes:
        leader: Its name.
        num_inputs: I.
        num_outputs: O, of all its linears.
    """

    leader: str
    num_inputs: int
    num_outputs: int

    @property
    def solve_operations(self) -> int:
        """Multiplications and additions of a factorisation and two triangular solves."""
        return self.num_inputs**3 // 3 + 2 * self.num_inputs**2 * self.num_outputs


@dataclass(frozen=True)
class ForwardNumbers:
    """Running the data of all candidates through a block, or a part of it.

    Attributes:
        operations: Of its linears, and of attention.
        moved_bytes: Activations that are read and written on the way.
        sample_bytes: Activations of one sample that are held.
    """

    operations: float
    moved_bytes: float
    sample_bytes: int


@dataclass(frozen=True)
class PassNumbers:
    """One pass over a block: all candidates are run, and some groups are solved.

    Attributes:
        read_bytes: Tensors that are read of every candidate.
        cast_bytes: Copies of them in the forward's dtype, where that is not the stored one.
        solved_bytes: Weights that are solved.
        largest_solved_bytes: The largest of them.
        sums_bytes: Sums of the groups, and running averages.
        chunk_bytes: Differences of weights in float32, and what is made of them.
        fallback_bytes: A second try at the hardest solve.
        runs: Whether the candidates' data is run at all.
        forward: Of the candidates.
        gram_operations: Of all candidates.
        right_hand_side_operations: Of all candidates.
        groups: That are solved.
    """

    read_bytes: int
    cast_bytes: int
    solved_bytes: int
    largest_solved_bytes: int
    sums_bytes: int
    chunk_bytes: int
    fallback_bytes: int
    runs: bool
    forward: ForwardNumbers
    gram_operations: int
    right_hand_side_operations: float
    groups: tuple[GroupNumbers, ...]


@dataclass(frozen=True)
class BlockNumbers:
    """Blocks that are alike.

    Attributes:
        count: How many there are.
        num_outputs_read: How many of them compute something that somebody reads.
        is_first: Whether one of them is the first of its stack, so that embeddings are held beside it.
        bytes: All tensors of one block, as they are written.
        cast_bytes: Copies of them in the forward's dtype, where that is not the stored one.
        forward: Of the merged block.
        groups: All that are solved.
        exchanged_bytes: Sums, solved weights and averages of one block that ranks exchange.
        shared_gram_bytes: Gram matrices that a rank all-reduces with others, there and back.
        passes: By number of passes, from one on: what each of them takes.
    """

    count: int
    num_outputs_read: int
    is_first: bool
    bytes: int
    cast_bytes: int
    forward: ForwardNumbers
    groups: tuple[GroupNumbers, ...]
    exchanged_bytes: int
    shared_gram_bytes: int
    passes: tuple[tuple[PassNumbers, ...], ...]

    def in_passes(self, number: int) -> tuple[PassNumbers, ...]:
        """The passes, if there are so many; one for every group where those are fewer."""
        return self.passes[min(number, len(self.passes)) - 1]


@dataclass(frozen=True)
class ProbeShapes:
    """Shapes at which a machine is measured: those of the blocks that most of the model consists of.

    Attributes:
        sample_rows: Rows of one sample.
        num_inputs: Of the largest linear.
        num_outputs: Of the largest linear.
        gram_size: Rows of the largest Gram matrix.
        dtype: Dtype of the forward passes.
    """

    sample_rows: int
    num_inputs: int
    num_outputs: int
    gram_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Workload:
    """What a merge, or one rank of it, has to do.

    Attributes:
        num_candidates: K.
        forwards_merged: Whether merged blocks are run to make the next hidden states.
        hidden_itemsize: Bytes of an element of hidden states.
        blocks: All blocks, by kind.
        has_rows: By candidate: whether there is any of its data.
        batch_samples: Samples in the largest batch.
        num_batches: Of all candidates.
        sample_hidden_bytes: Outputs of all stacks for one sample, at most.
        hidden_bytes: Outputs of all stacks for all samples.
        input_bytes: Calibration inputs that are held all the time.
        loading_bytes: Calibration inputs that are held only until they are on disk.
        first_bytes: Tensors outside the stacks that the first block needs, in the forward's dtype.
        non_block_bytes: All tensors outside the stacks, as they are written.
        non_block_buffer_bytes: What is held of them while they are averaged.
        adapter_bytes: What adapters keep in memory.
        probe: Shapes at which a machine is measured.
    """

    num_candidates: int
    forwards_merged: bool
    hidden_itemsize: int
    blocks: tuple[BlockNumbers, ...]
    has_rows: tuple[bool, ...]
    batch_samples: int
    num_batches: int
    sample_hidden_bytes: int
    hidden_bytes: int
    input_bytes: int
    loading_bytes: int
    first_bytes: int
    non_block_bytes: int
    non_block_buffer_bytes: int
    adapter_bytes: int
    probe: ProbeShapes

    @property
    def exchanged_bytes(self) -> int:
        """Bytes that every rank gives or gets: sums, solved weights, averages, merged embeddings."""
        return self.first_bytes + sum(kind.count * kind.exchanged_bytes for kind in self.blocks)

    @property
    def shared_gram_bytes(self) -> int:
        """Bytes of Gram matrices that this rank all-reduces with others."""
        return sum(kind.count * kind.shared_gram_bytes for kind in self.blocks)

    @property
    def max_passes(self) -> int:
        """The most passes that a block can be solved in."""
        return max((len(kind.passes) for kind in self.blocks), default=1)


@dataclass(frozen=True)
class RankShare:
    """One rank's share of a merge, beside its batches.

    Attributes:
        total_rows: By candidate and stack: rows of all ranks.
        group_sizes: By candidate: how many ranks, itself counted, share its right-hand sides with this one.
    """

    total_rows: Sequence[Mapping[int, int]]
    group_sizes: Sequence[int]


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
    maps_inputs: bool,
    non_block_bytes: int,
    share: RankShare | None = None,
) -> Workload:
    """Counts everything.

    Args:
        inputs: Opened checkpoints.
        trace: Of the model.
        blocks: All blocks.
        shapes: By candidate: the shapes of its batches.
        method: Row of the table.
        off_diagonal_scale: s.
        maps_inputs: Whether calibration inputs in floating point wait in a mapped file.
        non_block_bytes: All tensors outside the stacks, as they are written.
        share: One rank's, where the batches are not all there are.
    """
    dtype = inputs.skeleton.dtype
    state = inputs.skeleton.model.state_dict()
    batches = [batch for of_candidate in shapes for batch in of_candidate]
    hidden = [_hidden_bytes(trace, batch, dtype) for batch in batches]
    floating = [sum(_input_bytes(batch, floating=True) for batch in of_candidate) for of_candidate in shapes]
    rows = stack_rows(trace, shapes)
    sample_rows = {
        number: max((_num_rows(trace.stacks[number], batch) // _num_samples(batch) for batch in batches), default=0)
        for number in trace.order
    }
    kinds = _kinds(inputs, trace, blocks)
    counter = _Counter(method, off_diagonal_scale, dtype, len(inputs.candidates), rows, sample_rows, share)
    return Workload(
        num_candidates=len(inputs.candidates),
        forwards_merged=method.forwards_merged,
        hidden_itemsize=dtype.itemsize,
        blocks=tuple(counter.block(kind) for kind in kinds),
        has_rows=tuple(any(of_candidate.values()) for of_candidate in rows),
        batch_samples=max((_num_samples(batch) for batch in batches), default=1),
        num_batches=len(batches),
        sample_hidden_bytes=max(
            (size // _num_samples(batch) for size, batch in zip(hidden, batches, strict=True)), default=0
        ),
        hidden_bytes=sum(hidden),
        input_bytes=sum(_input_bytes(batch, floating=False) for batch in batches)
        + (0 if maps_inputs else sum(floating)),
        loading_bytes=max(floating) if maps_inputs else 0,
        first_bytes=dtype.itemsize * max(sum(state[name].numel() for name in stack.first) for stack in trace.stacks),
        non_block_bytes=non_block_bytes,
        non_block_buffer_bytes=min(non_block_bytes, 8 * AVERAGE_CHUNK_BYTES),
        adapter_bytes=inputs.adapter_bytes,
        probe=_probe_shapes(kinds, sample_rows, dtype),
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


def stack_rows(trace: ModelTrace, shapes: Sequence[Sequence[BatchShapes]]) -> tuple[dict[int, int], ...]:
    """Rows of all batches, padding included, by candidate and stack."""
    return tuple(
        {number: sum(_num_rows(trace.stacks[number], batch) for batch in of_candidate) for number in trace.order}
        for of_candidate in shapes
    )


@dataclass(frozen=True)
class _Kind:
    """Blocks that are alike: one of them, and what its tensors and linears are.

    Attributes:
        block: One of them.
        roles: Its linears in the order in which the forward reaches them.
        sizes: Elements of every tensor.
        linears: Path → (inputs, outputs) of every linear.
        count: How many blocks there are.
        num_outputs_read: How many of them compute something that somebody reads.
    """

    block: BlockPlan
    roles: tuple[LinearRole, ...]
    sizes: Mapping[str, int]
    linears: Mapping[str, tuple[int, int]]
    count: int
    num_outputs_read: int

    def bytes_of(self, names: Sequence[str], dtype: torch.dtype | None = None) -> int:
        """Bytes of some of its tensors, as they are written or in one dtype."""
        dtypes = {plan.name: dtype or plan.dtype for plan in self.block.tensors}
        return sum(self.sizes[name] * dtypes[name].itemsize for name in names)

    def cast_bytes(self, names: Sequence[str], dtype: torch.dtype) -> int:
        """Bytes of the copies of some tensors in the forward's dtype, where that is not the stored one."""
        wanted = set(names)
        return self.bytes_of([p.name for p in self.block.tensors if p.dtype != dtype and p.name in wanted], dtype)

    @property
    def names(self) -> list[str]:
        """Names of all its tensors."""
        return [plan.name for plan in self.block.tensors]

    def reached(self, until: str | None, *, order_only: bool) -> list[str]:
        """The linears that a forward pass multiplies with before it stops at `until`; all, if it does not stop."""
        order = [role.name for role in self.roles]
        if until is None:
            return order if order_only else list(self.linears)
        return order[: order.index(until)] if until in order else []


@dataclass(frozen=True)
class _Counter:
    """Counts what one kind of block takes; what all kinds have in common."""

    method: RegressionMethod
    off_diagonal_scale: float
    dtype: torch.dtype
    num_candidates: int
    rows: Sequence[Mapping[int, int]]
    sample_rows: Mapping[int, int]
    share: RankShare | None

    def block(self, kind: _Kind) -> BlockNumbers:
        """Counts one kind of block."""
        groups = tuple(map(_group_numbers, kind.block.groups))
        return BlockNumbers(
            count=kind.count,
            num_outputs_read=kind.num_outputs_read,
            is_first=kind.block.index == 0,
            bytes=kind.bytes_of(kind.names),
            cast_bytes=kind.cast_bytes(kind.names, self.dtype),
            forward=self._forward(kind, None, collects=False),
            groups=groups,
            exchanged_bytes=self._exchanged_bytes(kind),
            shared_gram_bytes=self._shared_gram_bytes(kind.block),
            passes=tuple(self._passes(kind, number) for number in range(1, max(1, len(groups)) + 1)),
        )

    def _passes(self, kind: _Kind, number: int) -> tuple[PassNumbers, ...]:
        advances = self.method.advances_while_collecting
        made = block_passes(kind.block, kind.roles, number, advances=advances)
        return tuple(self._pass(kind, each, advances=advances and each.last) for each in made)

    def _pass(self, kind: _Kind, each: BlockPass, *, advances: bool) -> PassNumbers:
        solved = [linear.name for group in each.groups for linear in group.linears]
        all_solved = {linear.name for group in kind.block.groups for linear in group.linears}
        averaged = sum(kind.sizes[name] for name in kind.names if name not in all_solved) * 4 if each.averages else 0
        until = None if advances else (each.groups[-1].leader if each.groups else "")
        largest_group = max((4 * group.num_inputs * group.num_outputs for group in each.groups), default=0)
        stacks = [(group, kind.block.stack_of(group)) for group in each.groups]
        return PassNumbers(
            read_bytes=kind.bytes_of(each.reads),
            cast_bytes=kind.cast_bytes(each.reads, self.dtype),
            solved_bytes=kind.bytes_of(solved),
            largest_solved_bytes=max((kind.bytes_of([name]) for name in solved), default=0),
            sums_bytes=averaged + sum(map(group_bytes, each.groups)),
            chunk_bytes=3 * min(CHUNK_BYTES, largest_group),
            fallback_bytes=self._fallback_bytes(max((group.num_inputs for group in each.groups), default=0)),
            runs=bool(each.groups) or advances,
            forward=self._forward(kind, until, collects=True),
            gram_operations=sum(rows[stack] * group.num_inputs**2 for group, stack in stacks for rows in self.rows),
            right_hand_side_operations=sum(
                self._times_rows(number, stack, group.num_inputs) * group.num_inputs * group.num_outputs
                for group, stack in stacks
                for number in range(1, len(self.rows))
            ),
            groups=tuple(map(_group_numbers, each.groups)),
        )

    def _forward(self, kind: _Kind, until: str | None, *, collects: bool) -> ForwardNumbers:
        """Counts all candidates' data through a block, up to the linear `until`, and what a Gram's rows take."""
        order = [role.name for role in kind.roles]
        reached = kind.reached(until, order_only=False)
        stack = kind.block.stack
        rows = sum(of_candidate[stack] for of_candidate in self.rows)
        weights = sum(kind.linears[path][0] * kind.linears[path][1] for path in reached)
        first_width = kind.linears[order[0]][0] if order else 0
        attention = 4 * self.sample_rows[stack] * first_width if len(reached) > 2 else 0
        features = sum(kind.linears[path][1] for path in reached) + 2 * first_width
        held = sum(kind.linears[path][1] for path in kind.reached(until, order_only=True))
        widest_group = max((group.num_inputs for group in kind.block.groups), default=0)
        widest = max((sizes[0] for sizes in kind.linears.values()), default=0)
        float32_rows = 4 * widest_group if collects and until is not None else 0
        row_bytes = (held + 4 * widest) * self.dtype.itemsize + float32_rows
        return ForwardNumbers(
            operations=rows * (2 * weights + attention),
            moved_bytes=_MEMORY_TRIPS * rows * features * self.dtype.itemsize,
            sample_bytes=self.sample_rows[stack] * row_bytes,
        )

    def _times_rows(self, number: int, stack: int, size: int) -> float:
        """Operations of a candidate's right-hand side for every input and output."""
        rows = self.rows[number][stack]
        share = self.share
        if rows and share is not None and share.group_sizes[number] > 1:
            whole = not multiplies_by_rows(share.total_rows[number][stack], size)
            return 2 * size / share.group_sizes[number] if whole else 4 * rows
        return 4 * rows if multiplies_by_rows(rows, size) else 2 * size

    def _fallback_bytes(self, num_inputs: int) -> int:
        """Bytes of a second try in float64; of eigenvectors, where the whole Gram has too few tokens."""
        max_rank = sum(max(rows.values()) for rows in self.rows)
        if self.off_diagonal_scale == 1 and max_rank < num_inputs:
            return 32 * num_inputs**2
        return 8 * num_inputs**2 if may_need_float64(num_inputs, self.off_diagonal_scale) else 0

    def _exchanged_bytes(self, kind: _Kind) -> int:
        averaged = [plan.name for plan in kind.block.tensors if plan.rule is MergeRule.AVERAGED]
        total = 2 * kind.bytes_of(averaged, GRAM_DTYPE)  # reduced to one rank, broadcast to all
        for group in kind.block.groups:
            size, outputs = group.num_inputs, group.num_outputs
            total += GRAM_DTYPE.itemsize * (_half(size) + size * outputs) + group.mean_dtype.itemsize * size * outputs
            total += self.num_candidates * sketch_bytes(len(group.linears))
            total += sum(linear.dtype.itemsize * size * linear.num_outputs for linear in group.linears)
        return total

    def _shared_gram_bytes(self, block: BlockPlan) -> int:
        if self.share is None:
            return 0
        shared = [number for number, size in enumerate(self.share.group_sizes) if size > 1 and number > 0]
        total = 0
        for group in block.groups:
            rows = [self.share.total_rows[number][block.stack_of(group)] for number in shared]
            whole = sum(not multiplies_by_rows(each, group.num_inputs) for each in rows)
            total += 2 * whole * GRAM_DTYPE.itemsize * _half(group.num_inputs)
        return total


def _group_numbers(group: LinearGroup) -> GroupNumbers:
    return GroupNumbers(group.leader, group.num_inputs, group.num_outputs)


def _half(size: int) -> int:
    """Elements of a Gram matrix that are exchanged: those on and above its diagonal panels."""
    return sum((size - piece.start) * (piece.stop - piece.start) for piece in panels(size))


def _probe_shapes(kinds: Sequence[_Kind], sample_rows: Mapping[int, int], dtype: torch.dtype) -> ProbeShapes:
    kind = max(kinds, key=lambda kind: sum(kind.sizes.values()) * kind.count)
    inputs, outputs = max(kind.linears.values(), key=lambda shape: shape[0] * shape[1], default=(1, 1))
    gram_size = max((group.num_inputs for group in kind.block.groups), default=inputs)
    return ProbeShapes(sample_rows[kind.block.stack], inputs, outputs, gram_size, dtype)


def _kinds(inputs: Inputs, trace: ModelTrace, blocks: Sequence[BlockPlan]) -> tuple[_Kind, ...]:
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
            _Kind(
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
