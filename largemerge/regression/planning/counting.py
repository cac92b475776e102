"""Counts what a merge has to do: rows, bytes and operations, from shapes alone.

    model, tensor plans, batch shapes ──► measure_workload ──► Workload

This is the only place where planning looks at blocks, linears and sums. Multiplications and additions:

    candidate forward   2·N·I·O for every linear that is reached, and attention 4·N·T·I
    Gram                N·I²             half of it, for it is symmetric
    right-hand side     2·I²·O, or 4·N·I·O where that is less, for all candidates but the first
    own features        2·N·I² + 2·I²·O, or 4·N·I·O where that is less, and 2·N·I·O where drift is paid back
    solve               I³/3 + 2·I²·O
    subspaces           in place of right-hand side and solve: products and eigenvectors in float64 (essential.py)
    merged forward      like a candidate's, all linears

Where two streams of hidden states run, candidate forward is the sum of both.

Shapes: N rows of one candidate, T rows of one sample, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from largemerge.calibration import CalibrationOutline, CalibrationSet
from largemerge.model.inside_block import ResumePoint
from largemerge.model.skeleton import linears_in, weight_is_transposed
from largemerge.model.trace import LinearRole, ModelTrace, StackTrace
from largemerge.regression.averages import AVERAGE_CHUNK_BYTES
from largemerge.regression.config import MergeConfig
from largemerge.regression.essential import (
    candidate_bytes,
    essential_operations,
    essential_sums_bytes,
    factor_elements,
    merge_bytes,
)
from largemerge.regression.gram import GRAM_DTYPE, panels, triangle, triangle_buffer_bytes
from largemerge.regression.gram_files import from_grams
from largemerge.regression.group_sums import (
    DIFFERENCE_CHUNK_BYTES,
    correction_bytes,
    features_by_rows,
    multiplies_by_rows,
    panel_bytes,
    sketch_bytes,
    solves_only_seen,
    sums_bytes,
)
from largemerge.regression.inputs import Inputs
from largemerge.regression.methods import RegressionMethod
from largemerge.regression.passes import BlockPass, goes_by_linear, plan_passes
from largemerge.regression.planning.workload import (
    BatchShapes,
    BlockNumbers,
    ForwardNumbers,
    GramGroups,
    GroupNumbers,
    HeadNumbers,
    PassNumbers,
    ProbeShapes,
    Workload,
)
from largemerge.regression.shrinkage import fold_operations, fold_sums_bytes
from largemerge.regression.solve import may_need_float64, solve_operations
from largemerge.regression.tensor_plan import BlockPlan, HeadPlan, LinearGroup, MergeRule, TensorPlan

_SCALE_BYTES = 4 * torch.float64.itemsize  # held of each element of a norm's scale
_MEMORY_TRIPS = 6  # a value that a linear computes is read or written this often, by activations, norms, additions


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
    config: MergeConfig,
    inputs: Inputs,
    trace: ModelTrace,
    blocks: Sequence[BlockPlan],
    non_block: Sequence[TensorPlan],
    head: HeadPlan,
    shapes: Sequence[Sequence[BatchShapes]],
    gram_groups: GramGroups | None = None,
) -> Workload:
    """Counts what a merge, or one rank of it, has to do with some calibration batches.

    Args:
        config: The configuration.
        inputs: The opened inputs.
        trace: Trace of the model.
        blocks: Plans of all blocks.
        non_block: Plans of the tensors outside the blocks.
        head: What of these is solved.
        shapes: Shapes of the batches, by candidate.
        gram_groups: Groups of ranks that add up Gram matrices; `None` where the batches are all there are.
    """
    method, maps_inputs = config.method, config.memory.maps_inputs
    dtype, state = inputs.skeleton.dtype, inputs.skeleton.model.state_dict()
    non_block_bytes = sum(state[plan.name].numel() * plan.dtype.itemsize for plan in non_block if plan.name in state)
    batches = [batch for of_candidate in shapes for batch in of_candidate]
    floating = [sum(_input_bytes(batch, floating=True) for batch in of_candidate) for of_candidate in shapes]
    rows = stack_rows(trace, shapes)
    sample_rows = _sample_rows(trace, batches)
    kinds = _kinds(inputs, trace, blocks, reads_end=method.reads_end)
    hidden = [_hidden_bytes(trace, batch, dtype, method, kinds) for batch in batches]
    summed = from_grams(config) if gram_groups is None else gram_groups.summed
    counter = _BlockCounter(
        method=method,
        trace=trace,
        dtype=dtype,
        num_candidates=len(inputs.candidates),
        tokens_before=(config.sums_before.tokens if config.sums_before is not None else 0)
        + sum(record.tokens for record in config.grams.values()),
        num_sums_read=int(config.sums_before is not None) + len(summed),
        keeps_sums=config.keeps_sums,
        summed=summed,
        rows=rows,
        sample_rows=sample_rows,
        gram_groups=gram_groups,
    )
    return Workload(
        num_candidates=len(inputs.candidates),
        forwards_merged=method.forwards_merged,
        hidden_itemsize=dtype.itemsize,
        blocks=tuple(counter.block(kind) for kind in kinds),
        head=_head_numbers(head, method, trace, rows),
        has_rows=tuple(any(of_candidate.values()) or number in summed for number, of_candidate in enumerate(rows)),
        batch_samples=max((_num_samples(batch) for batch in batches), default=1),
        num_batches=len(batches),
        sample_hidden_bytes=max(
            (size // _num_samples(batch) for size, batch in zip(hidden, batches, strict=True)), default=0
        ),
        hidden_bytes=sum(hidden),
        input_bytes=sum(_input_bytes(batch, floating=False) for batch in batches)
        + (0 if maps_inputs else sum(floating)),
        loading_bytes=max(floating) if maps_inputs else 0,
        first_bytes=dtype.itemsize
        * (2 if method.forwards_merged and method.follows_candidates else 1)
        * max(sum(state[name].numel() for name in stack.needed_by_first) for stack in trace.stacks),
        non_block_bytes=non_block_bytes,
        non_block_buffer_bytes=min(non_block_bytes, 8 * AVERAGE_CHUNK_BYTES),
        adapter_bytes=inputs.adapter_bytes,
        num_kernels=len({tuple(sorted(batch.items())) for batch in batches})
        * (1 + max((len(set(kind.linears.values())) for kind in kinds), default=0)),
        probe=_probe_shapes(kinds, sample_rows, dtype),
    )


def count_rows_of(trace: ModelTrace, batch: BatchShapes) -> int:
    """Counts the rows of a batch, over all stacks, padding included."""
    return sum(_num_rows(stack, batch) for stack in trace.stacks)


def split_shapes(shapes: Sequence[Sequence[BatchShapes]], max_samples: int) -> list[list[BatchShapes]]:
    """Splits batches into ones of at most `max_samples` samples."""
    return [
        [
            {name: (min(max_samples, total - start), *shape[1:]) for name, shape in batch.items()}
            for batch in of_candidate
            for total in [_num_samples(batch)]
            for start in range(0, total, max_samples)
        ]
        for of_candidate in shapes
    ]


def stack_rows(trace: ModelTrace, shapes: Sequence[Sequence[BatchShapes]]) -> tuple[dict[int, int], ...]:
    """Counts the rows of all batches, padding included, by candidate and stack."""
    return tuple(
        {number: sum(_num_rows(trace.stacks[number], batch) for batch in of_candidate) for number in trace.order}
        for of_candidate in shapes
    )


@dataclass(frozen=True)
class _BlockKind:
    """Blocks that are alike: the plan of one of them, and the shapes of its tensors.

    Attributes:
        block: Plan of one of the blocks.
        roles: The block's linears in the order in which the forward reaches them.
        sizes: Parameter name → number of elements.
        linears: Path of a linear in the block → number of inputs, number of outputs.
        count: Number of blocks of this kind.
        num_outputs_read: Number of blocks of this kind whose output is read by a later one.
    """

    block: BlockPlan
    roles: tuple[LinearRole, ...]
    sizes: Mapping[str, int]
    linears: Mapping[str, tuple[int, int]]
    count: int
    num_outputs_read: int

    def bytes_of(self, names: Sequence[str], dtype: torch.dtype | None = None) -> int:
        """Bytes of some tensors of a block, as they are written or in one dtype."""
        dtypes = {plan.name: dtype or plan.dtype for plan in self.block.tensors}
        return sum(self.sizes[name] * dtypes[name].itemsize for name in names)

    def cast_bytes(self, names: Sequence[str], dtype: torch.dtype) -> int:
        """Bytes of the copies of some tensors in the forward's dtype, where that is not the stored one."""
        wanted = set(names)
        return self.bytes_of([p.name for p in self.block.tensors if p.dtype != dtype and p.name in wanted], dtype)

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the block."""
        return [plan.name for plan in self.block.tensors]

    def reached(self, until: str | None, *, order_only: bool) -> list[str]:
        """Paths of the linears that a forward pass runs before it stops at `until`; of all, if it does not stop."""
        order = [role.name for role in self.roles]
        if until is None:
            return order if order_only else list(self.linears)
        return order[: order.index(until)] if until in order else []


@dataclass(frozen=True)
class _BlockCounter:
    """Counts what the blocks of one kind take.

    Attributes:
        method: The method's row in the table.
        trace: Trace of the model.
        dtype: Dtype of the forward passes.
        num_candidates: Number of candidates.
        tokens_before: Number of tokens that sums on the disk are of.
        num_sums_read: Number of sums of a group that are read from the disk: an earlier merge's, and candidates'.
        keeps_sums: Whether the sums of this merge are kept.
        summed: Numbers of the candidates whose Gram matrices stand for their data.
        rows: Number of rows by candidate and stack.
        sample_rows: Number of rows of one sample, at most, by stack.
        gram_groups: Groups of ranks that add up Gram matrices; `None` where there is one rank.
    """

    method: RegressionMethod
    trace: ModelTrace
    dtype: torch.dtype
    num_candidates: int
    tokens_before: int
    num_sums_read: int
    keeps_sums: bool
    summed: frozenset[int]
    rows: Sequence[Mapping[int, int]]
    sample_rows: Mapping[int, int]
    gram_groups: GramGroups | None

    def block(self, kind: _BlockKind) -> BlockNumbers:
        """Counts what one kind of block takes."""
        groups = tuple(map(_group_numbers, kind.block.groups))
        last_pass = self._plan_passes(kind, 1)[-1]
        max_passes = 1 if last_pass.runs_merged else max(1, len(groups))
        on_disk = GRAM_DTYPE.itemsize * sum(triangle(group.num_inputs) for group in groups)
        return BlockNumbers(
            count=kind.count,
            num_outputs_read=kind.num_outputs_read,
            is_first=kind.block.index == 0,
            bytes=kind.bytes_of(kind.names),
            cast_bytes=kind.cast_bytes(kind.names, self.dtype),
            forward=self._forward(kind, None, collects=False, start=last_pass.keep if last_pass.runs_merged else None),
            whole=self._forward(kind, None, collects=False),
            groups=groups,
            exchanged_bytes=self._exchanged_bytes(kind),
            shared_gram_bytes=self._shared_gram_bytes(kind.block),
            previous_bytes=on_disk * self.num_sums_read,
            kept_bytes=on_disk if self.keeps_sums else 0,
            passes=tuple(self._passes(kind, num_passes) for num_passes in range(1, max_passes + 1)),
        )

    def _plan_passes(self, kind: _BlockKind, num_passes: int) -> tuple[BlockPass, ...]:
        advances = self.method.follows_candidates
        return plan_passes(self.method, kind.block, self.trace, num_passes, advances=advances)

    def _passes(self, kind: _BlockKind, num_passes: int) -> tuple[PassNumbers, ...]:
        """Counts what each of `num_passes` passes over a block takes."""
        advances = self.method.follows_candidates
        passes = self._plan_passes(kind, num_passes)
        return tuple(self._pass(kind, block_pass, advances=advances and block_pass.last) for block_pass in passes)

    def _pass(self, kind: _BlockKind, block_pass: BlockPass, *, advances: bool) -> PassNumbers:
        """Counts what one pass over a block takes."""
        solved = [linear.name for group in block_pass.groups for linear in group.linears]
        all_solved = {linear.name for group in kind.block.groups for linear in group.linears}
        unaveraged = set() if block_pass.starts else all_solved
        averaged = sum(kind.sizes[n] for n in kind.names if n not in unaveraged) * 4 if block_pass.averages else 0
        whole = advances or bool(block_pass.norms)
        until = None if whole else (block_pass.groups[-1].leader if block_pass.groups else "")
        scales = _SCALE_BYTES * sum(norm.size for norm in block_pass.norms)
        merged = kind.names if block_pass.runs_merged else []
        largest_group = max((4 * group.num_inputs * group.num_outputs for group in block_pass.groups), default=0)
        stacks = [(group, kind.block.stack_of(group)) for group in block_pass.groups]
        widest = max((group.num_inputs for group in block_pass.groups), default=0)
        return PassNumbers(
            read_bytes=kind.bytes_of(block_pass.tensor_names),
            cast_bytes=kind.cast_bytes(block_pass.tensor_names, self.dtype),
            merged_bytes=kind.bytes_of(merged) + kind.cast_bytes(merged, self.dtype),
            solved_bytes=self._solved_bytes(kind, solved),
            largest_solved_bytes=max((self._solved_bytes(kind, [name]) for name in solved), default=0),
            sums_bytes=averaged
            + scales
            + sum(map(self._sums_bytes, block_pass.groups))
            + self._cross_bytes(kind, block_pass),
            chunk_bytes=max(
                3 * min(DIFFERENCE_CHUNK_BYTES, largest_group),
                triangle_buffer_bytes(widest) if self.num_sums_read or self.keeps_sums else 0,
                *(map(candidate_bytes, block_pass.groups) if self.method.merges_subspaces else ()),
            ),
            fallback_bytes=self._fallback_bytes(block_pass.groups),
            runs=bool(block_pass.groups) or whole,
            forward=self._forwards(kind, block_pass, until),
            gram_operations=sum(rows[stack] * group.num_inputs**2 for group, stack in stacks for rows in self.rows),
            right_hand_side_operations=self._right_hand_side_operations(kind, block_pass.groups),
            groups=tuple(map(_group_numbers, block_pass.groups)),
        )

    def _solved_bytes(self, kind: _BlockKind, names: Sequence[str]) -> int:
        """Bytes of solved weights; of merged task vectors, float32, and the base's weights, where these wait."""
        return kind.bytes_of(names) + (kind.bytes_of(names, GRAM_DTYPE) if self.method.scales_layers else 0)

    def _sums_bytes(self, group: LinearGroup) -> int:
        """Bytes of the sums of a group."""
        if self.method.merges_subspaces:
            return essential_sums_bytes(group, self.num_candidates)
        return sums_bytes(group)

    def _right_hand_side_operations(self, kind: _BlockKind, groups: Sequence[LinearGroup]) -> float:
        """Operations of all candidates' right-hand sides; of subspaces, all that comes after the Gram matrices."""
        if self.method.merges_subspaces:
            present = sum(any(of.values()) for of in self.rows) + len(self.summed)
            return sum(essential_operations(group, self.num_candidates) for group in groups) * (
                present / max(1, self.num_candidates)
            )
        stacks = [(group, kind.block.stack_of(group)) for group in groups]
        return sum(
            self._right_hand_side_factor(candidate, stack, group.num_inputs) * group.num_inputs * group.num_outputs
            for group, stack in stacks
            for candidate in range(1, len(self.rows))
        ) + sum(self._features_operations(kind.block, group) for group in groups)

    def _forwards(self, kind: _BlockKind, block_pass: BlockPass, until: str | None) -> ForwardNumbers:
        """Counts the runs of one pass: of the candidates, of what is merged so far, or of both in turns."""
        if not block_pass.runs_merged:
            once = self._forward(kind, until, collects=True)
            return once + once if self.method.compares else once
        if not block_pass.groups:
            return ForwardNumbers(0, 0, 0)
        merged = self._forward(kind, block_pass.groups[-1].leader, collects=True, start=block_pass.start)
        if self.method.compares:
            return merged + self._forward(kind, until, collects=True, start=block_pass.start)
        return merged + self._forward(kind, None, collects=False) if until is None else merged

    def _cross_bytes(self, kind: _BlockKind, block_pass: BlockPass) -> int:
        """Bytes of the sums of products with the candidates' own features."""
        if not self.method.compares:
            return 0
        rows = max((of_candidate[kind.block.stack] for of_candidate in self.rows), default=0)
        by_rows = {g.leader: features_by_rows(rows, g.num_inputs, g.num_outputs) for g in block_pass.groups}
        cross = sum(group.num_inputs**2 for group in block_pass.groups if not by_rows[group.leader])
        waiting = sum(
            group.num_inputs * group.num_outputs
            for group in block_pass.groups
            if self.method.by_norm and (by_rows[group.leader] or self.method.drift > 0)
        )
        shrunk = sum(map(correction_bytes, block_pass.groups)) if self.method.shrinks else 0
        return GRAM_DTYPE.itemsize * (cross + waiting) + shrunk

    def _features_operations(self, block: BlockPlan, group: LinearGroup) -> float:
        """Operations of what the candidates' own features add to a right-hand side."""
        if not self.method.compares:
            return 0
        size, outputs, total = group.num_inputs, group.num_outputs, 0
        paid_back = sum(linear.num_outputs for linear in group.linears if linear.residual is not None)
        for of_candidate in self.rows:
            rows = of_candidate[block.stack_of(group)]
            if features_by_rows(rows, size, outputs):
                total += 4 * rows * size * outputs
            else:
                total += 2 * rows * size * (size + paid_back) + 2 * size**2 * outputs
            if self.method.shrinks:
                total += fold_operations(len(group.linears), size, rows)
        return total

    def _forward(
        self, kind: _BlockKind, until: str | None, *, collects: bool, start: ResumePoint | None = None
    ) -> ForwardNumbers:
        """Counts running all candidates' data through a block, up to the linear `until`, and a Gram's float32 rows."""
        order = [role.name for role in kind.roles]
        passed = {*start.known, *start.skipped} if start is not None else set()
        reached = [path for path in kind.reached(until, order_only=False) if path not in passed]
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

    def _right_hand_side_factor(self, candidate: int, stack: int, num_inputs: int) -> float:
        """Operations of a candidate's right-hand side, for each pair of an input and an output."""
        if candidate in self.summed:
            return 2 * num_inputs
        rows = self.rows[candidate][stack]
        groups = self.gram_groups
        if rows and groups is not None and groups.group_sizes[candidate] > 1:
            whole = not multiplies_by_rows(groups.total_rows[candidate][stack], num_inputs)
            return 2 * num_inputs / groups.group_sizes[candidate] if whole else 4 * rows
        return 4 * rows if multiplies_by_rows(rows, num_inputs) else 2 * num_inputs

    def _fallback_bytes(self, groups: Sequence[LinearGroup]) -> int:
        """Bytes of a second attempt in float64; of eigenvectors, where there are fewer tokens than inputs.

        Of subspaces, what merging takes beyond what each candidate has taken.
        """
        if self.method.merges_subspaces:
            merging = max((merge_bytes(group, self.num_candidates) for group in groups), default=0)
            return max(0, merging - max(map(candidate_bytes, groups), default=0))
        num_inputs = max((group.num_inputs for group in groups), default=0)
        max_rank = self.tokens_before + sum(max(rows.values()) for rows in self.rows)
        scale = self.method.off_diagonal_scale
        if max_rank < num_inputs and solves_only_seen(self.method.ridge, scale):
            return 32 * num_inputs**2
        return 8 * num_inputs**2 if may_need_float64(num_inputs, scale) else 0

    def _exchanged_bytes(self, kind: _BlockKind) -> int:
        """Bytes of sums, solved weights and averages of one block that ranks exchange."""
        averaged = [plan.name for plan in kind.block.tensors if plan.rule is MergeRule.AVERAGED]
        total = 2 * kind.bytes_of(averaged, GRAM_DTYPE)  # reduced to one rank, broadcast to all
        total += _SCALE_BYTES * sum(norm.size for norm in kind.block.norms)  # two sums, likewise
        for group in kind.block.groups:
            size, outputs = group.num_inputs, group.num_outputs
            total += self.num_candidates * sketch_bytes(len(group.linears))
            merged = GRAM_DTYPE if self.method.scales_layers else None
            total += sum((merged or linear.dtype).itemsize * size * linear.num_outputs for linear in group.linears)
            if self.method.merges_subspaces:
                total += GRAM_DTYPE.itemsize * (factor_elements(group, self.num_candidates) + size)
                total += 3 * GRAM_DTYPE.itemsize * self.num_candidates * len(group.linears)  # norms, directions
                continue
            total += (
                GRAM_DTYPE.itemsize * (_exchanged_elements(size) + size * outputs)
                + group.mean_dtype.itemsize * size * outputs
            )
            total += GRAM_DTYPE.itemsize * _exchanged_elements(size) if self.keeps_sums else 0  # owner to writer
        return total

    def _shared_gram_bytes(self, block: BlockPlan) -> int:
        """Bytes of Gram matrices of one block that this rank all-reduces."""
        if self.gram_groups is None:
            return 0
        all_count = self.method.merges_subspaces
        shared = [n for n, size in enumerate(self.gram_groups.group_sizes) if size > 1 and (n > 0 or all_count)]
        total = 0
        for group in block.groups:
            rows = [self.gram_groups.total_rows[number][block.stack_of(group)] for number in shared]
            whole = sum(all_count or not multiplies_by_rows(count, group.num_inputs) for count in rows)
            total += 2 * whole * GRAM_DTYPE.itemsize * _exchanged_elements(group.num_inputs)
        return total


def _head_numbers(
    head: HeadPlan, method: RegressionMethod, trace: ModelTrace, rows: Sequence[Mapping[int, int]]
) -> HeadNumbers:
    """Counts what solving the head takes."""
    last, num_candidates = trace.order[-1], len(rows)
    tied = [head.tied] if head.tied is not None else []
    grams = products = 0.0
    sums = panel = folds = 0
    for group in (*tied, *head.groups):
        size, compares = group.num_inputs, method.compares and group is not head.tied
        stack = last if group.token_stack is None else group.token_stack
        total = sum(of_candidate[stack] for of_candidate in rows)
        grams += total * size**2 * (3 if compares else 1)
        products += solve_operations(size, group.num_outputs)
        products += 2 * size**2 * group.num_outputs * (num_candidates * (2 if compares else 1) - 1)
        sums = max(sums, GRAM_DTYPE.itemsize * size**2 * (num_candidates * (2 if compares else 1) + 1))
        if compares and method.shrinks:
            folds = max(folds, (num_candidates + 1) * fold_sums_bytes(1, size))
            grams += fold_operations(1, size, total)
        widest = max(linear.num_outputs for linear in group.linears)
        chunk = min(panel_bytes(size), GRAM_DTYPE.itemsize * widest * size)
        panel = max(panel, (2 * num_candidates + 4) * chunk)
    return HeadNumbers(head.tied is not None, grams, products, sums + folds, panel)


def _group_numbers(group: LinearGroup) -> GroupNumbers:
    return GroupNumbers(group.leader, group.num_inputs, group.num_outputs)


def _exchanged_elements(size: int) -> int:
    """Number of elements of a Gram matrix that are exchanged: those on and above its diagonal panels."""
    return sum((size - piece.start) * (piece.stop - piece.start) for piece in panels(size))


def _probe_shapes(kinds: Sequence[_BlockKind], sample_rows: Mapping[int, int], dtype: torch.dtype) -> ProbeShapes:
    """Shapes of the kind of blocks that most of the model's parameters belong to."""
    kind = max(kinds, key=lambda kind: sum(kind.sizes.values()) * kind.count)
    inputs, outputs = max(kind.linears.values(), key=lambda shape: shape[0] * shape[1], default=(1, 1))
    gram_size = max((group.num_inputs for group in kind.block.groups), default=inputs)
    rows = max(1, sample_rows[kind.block.stack])  # none where Gram matrices stand for all data
    return ProbeShapes(rows, inputs, outputs, gram_size, dtype)


def _kinds(
    inputs: Inputs, trace: ModelTrace, blocks: Sequence[BlockPlan], *, reads_end: bool
) -> tuple[_BlockKind, ...]:
    """Groups blocks whose tensors, linears and roles are alike."""
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
            _BlockKind(
                block=block,
                roles=trace.stacks[block.stack].roles[block.index],
                sizes={plan.name: state[plan.name].numel() for plan in block.tensors},
                linears={
                    path: (shape[0], shape[1]) if weight_is_transposed(linears[path]) else (shape[1], shape[0])
                    for path, shape in shapes.items()
                },
                count=len(members),
                num_outputs_read=sum(reads_end or member is not blocks[-1] for member in members),
            )
        )
    return tuple(kinds)


def _input_bytes(batch: BatchShapes, *, floating: bool) -> int:
    """Bytes of a batch's inputs in floating point (float32), or of all others (int64)."""
    named = {name: math.prod(shape) for name, shape in batch.items()}
    return sum((4 if floating else 8) * n for name, n in named.items() if name.endswith(("ids", "mask")) != floating)


def _num_samples(batch: BatchShapes) -> int:
    return next(iter(batch.values()))[0]


def _num_tokens(stack: StackTrace, batch: BatchShapes) -> int:
    """Number of tokens of one sample of a batch in a stack."""
    tokens = batch.get(stack.token_input) if stack.token_input is not None else None
    return tokens[1] if tokens is not None else stack.num_tokens


def _num_rows(stack: StackTrace, batch: BatchShapes) -> int:
    return _num_samples(batch) * _num_tokens(stack, batch)


def _sample_rows(trace: ModelTrace, batches: Sequence[BatchShapes]) -> dict[int, int]:
    """Number of rows of one sample, at most, by stack."""
    return {
        number: max((_num_rows(trace.stacks[number], batch) // _num_samples(batch) for batch in batches), default=0)
        for number in trace.order
    }


def _hidden_bytes(
    trace: ModelTrace, batch: BatchShapes, dtype: torch.dtype, method: RegressionMethod, kinds: Sequence[_BlockKind]
) -> int:
    """Bytes of all streams of hidden states for a batch, between blocks, and inside of one from linear to linear."""
    streams = int(method.forwards_merged) + int(method.follows_candidates)
    inside = 1 + int(method.compares)
    widest = max((_inside_features(kind, trace, method) for kind in kinds), default=0)
    rows = max(_num_rows(stack, batch) for stack in trace.stacks)
    return streams * _output_bytes(trace, batch, dtype) + inside * rows * widest * dtype.itemsize


def _inside_features(kind: _BlockKind, trace: ModelTrace, method: RegressionMethod) -> int:
    """Number of features of a token that are kept inside a block, at most."""
    points = trace.stacks[kind.block.stack].resume_points
    if not points or not goes_by_linear(method, kind.block, trace):
        return 0
    known = points[kind.block.index]
    groups = [(group, known[group.leader]) for group in kind.block.groups if group.leader in known]
    kept = [
        (group.num_inputs if point.given else 0) + sum(_width(kind, path) for path in point.known)
        for group, point in groups
    ]
    return max(kept, default=0)


def _width(kind: _BlockKind, path: str) -> int:
    """Number of outputs of a linear; of a module, those of the last linear in it."""
    inside = [role.name for role in kind.roles if f"{role.name}.".startswith(f"{path}.")]
    return kind.linears[inside[-1]][1]


def _output_bytes(trace: ModelTrace, batch: BatchShapes, dtype: torch.dtype) -> int:
    """Bytes of the outputs of all stacks for a batch, scaled from those for the trace's two samples."""
    total = 0
    for stack in trace.stacks:
        tokens = _num_tokens(stack, batch)
        for shape in stack.output_shapes:
            scaled = [_num_samples(batch) if i == 0 and n == 2 else n for i, n in enumerate(shape)]
            scaled = [tokens if n == stack.num_tokens and i > 0 else n for i, n in enumerate(scaled)]
            total += math.prod(scaled) * dtype.itemsize
    return total
