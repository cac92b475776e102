"""Which rows of a stack's hidden states enter the statistics, and how many there are.

Where activations come from: one block with given weights, run on the calibration data of one candidate.

Hidden states wait between blocks, one copy. What lies outside the stacks (embeddings, an encoder's final norm) is
loaded only where the rehearsal saw that it matters; everywhere else stands a NaN, one element of memory for a
whole tensor, so that a mistake could not go unnoticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from largemerge.calibration.batches import Batch, CalibrationSet, split_batches
from largemerge.checkpoint.tensor_info import Tensors
from largemerge.errors import MergeError
from largemerge.matmul import faster_linear
from largemerge.model.forward import (
    Output,
    block_weights,
    original_forward,
    replaced_forwards,
    resumed_at,
    run_until,
    watched_linears,
)
from largemerge.model.hidden_states import HiddenStates
from largemerge.model.skeleton import Skeleton, assign_tensors, linears_in, poison_outside
from largemerge.model.trace import Rehearsal, StackRehearsal
from largemerge.regression.tensor_plan import BlockPlan
from largemerge.regression.weights import Weights


def row_mask(batch: Batch, stack: StackRehearsal, loss_tokens: str) -> torch.Tensor | None:
    """The tokens of a batch that count in one stack.

    Args:
        batch: Forward arguments and loss mask.
        stack: Says whose tokens the rows are.
        loss_tokens: The input that the loss mask belongs to, `input_ids` or `decoder_input_ids`.

    Returns:
        bool `[B, T]`; `None` where all count.
    """
    if stack.tokens is None:
        return None
    mask = None
    attention = batch.inputs.get(stack.tokens.replace("input_ids", "attention_mask"))
    if attention is not None and attention.dim() == 2:
        mask = attention != 0
    if batch.loss_mask is not None and stack.tokens == loss_tokens:
        mask = batch.loss_mask if mask is None else mask & batch.loss_mask
    return None if mask is None or bool(mask.all()) else mask


def count_rows(batch: Batch, stack: StackRehearsal, loss_tokens: str) -> int:
    """How many rows of a batch count in one stack."""
    mask = row_mask(batch, stack, loss_tokens)
    if mask is not None:
        return int(mask.sum())
    if stack.tokens is not None:
        return batch.inputs[stack.tokens].numel()
    return next(iter(batch.inputs.values())).shape[0] * stack.num_tokens


Masks = Mapping[int, torch.Tensor | None]
"""Stack → which of its tokens count, bool `[B, T]`; `None` if all do."""

VisitInput = Callable[[str, torch.Tensor, Masks], None]
"""Called with a linear's path in the block, its input `[..., in]`, and the batch's masks."""


@dataclass
class Samples:
    """One run of a block over batches.

    Attributes:
        block: Which.
        module: Of the skeleton.
        until: The linear at whose input it stops, if it does.
        masks: Of the present batch.
        seen: Linears whose inputs on the present batch have been visited.
    """

    block: BlockPlan
    module: torch.nn.Module
    until: str | None
    masks: Masks = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)


@dataclass
class Activations:
    """Runs blocks on calibration data.

    Attributes:
        skeleton: Of the model; its parameters are set and taken away here.
        rehearsal: What the rehearsal saw.
        calibration: By candidate, as far as it is this rank's.
        row_counts: By candidate and stack: rows that count, on all ranks together.
        own_row_counts: Those of them that this rank has.
        weights: Where embeddings and the like are read from.
        hidden_states: Waiting between blocks.
        compute_dtype: Of the forward passes.
        device: That computes.
        loss_tokens: The input that loss masks belong to.
        most_samples: That are run at once; halved when memory does not suffice.
        retries: What had to be run again in smaller parts.
    """

    skeleton: Skeleton
    rehearsal: Rehearsal
    calibration: Sequence[CalibrationSet]
    row_counts: Sequence[Sequence[int]]
    own_row_counts: Sequence[Sequence[int]]
    weights: Weights
    hidden_states: HiddenStates
    compute_dtype: torch.dtype
    device: torch.device
    loss_tokens: str
    most_samples: int = sys.maxsize
    retries: list[str] = field(default_factory=list)
    _outside_for: tuple[int, bool, int | None] | None = field(init=False, default=None)
    _idle_shapes: dict[tuple[str, torch.Size], torch.Size] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for module in self.skeleton.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(self.device)

    def num_rows(self, candidate: int, stack: int) -> int:
        """Rows of a candidate's data that count in a stack, on all ranks together."""
        return self.row_counts[candidate][stack]

    def num_own_rows(self, candidate: int, stack: int) -> int:
        """Those of them that this rank has."""
        return self.own_row_counts[candidate][stack]

    def run(
        self,
        block: BlockPlan,
        candidate: int,
        tensors: Tensors,
        *,
        outside_of: int | None,
        keep: bool,
        watch: Sequence[str] = (),
        visit: VisitInput | None = None,
    ) -> Iterator[None]:
        """Runs a block on all batches of one candidate, and pauses after each.

        Args:
            block: Which one.
            candidate: Whose data.
            tensors: The block's weights, by parameter name.
            outside_of: Whose embeddings and the like: a candidate's, or `None` for the merged ones.
            keep: Store the block's output as the next hidden states. Otherwise the block is run only as far as
                the last linear of `watch`.
            watch: Linears to watch, by path in the block, in the order in which they run.
            visit: Sees their inputs.
        """
        module = self.skeleton.stacks[block.stack].blocks[block.index]
        until = None if keep else watch[-1]
        samples = Samples(block, module, until)

        def see(path: str, x: torch.Tensor) -> None:
            if visit is not None and path not in samples.seen:
                visit(path, x, samples.masks)
                samples.seen.add(path)

        self.set_outside(block, outside_of)
        watching = watched_linears(module, watch, see) if visit is not None else nullcontext()
        idle = self.rehearsal.stacks[block.stack].idle if block.index > 0 else ()
        forwards = {self.skeleton.model.get_submodule(name): self._idle_forward(name) for name in idle}
        for linear in linears_in(module).values():
            faster = faster_linear(linear, self.compute_dtype, self.device)
            forwards |= {} if faster is None else {linear: faster}
        with block_weights(module, self._for_forward(block, tensors)), replaced_forwards(forwards), watching:
            for number, batch in enumerate(self.calibration[candidate].batches):
                self.hidden_states.ahead(candidate, number + 1)
                outputs = self.hidden_states.get(candidate, number, self.device)
                output = self._run_samples(samples, batch, outputs, frozenset())
                if keep:
                    self.hidden_states.put(candidate, number, block.stack, output)
                del output, outputs
                yield

    def _run_samples(
        self, samples: Samples, batch: Batch, outputs: Mapping[int, Output], seen: frozenset[str]
    ) -> Output:
        """Runs a block on a batch, in halves where memory does not suffice for all of it at once.

        Args:
            samples: What stays the same from batch to batch.
            batch: To run on.
            outputs: The stored outputs of the stacks.
            seen: Linears whose inputs on this batch have been visited by a try that ran out of memory later on.
        """
        if batch.num_samples <= self.most_samples:
            samples.seen = set(seen)
            samples.masks = self._masks(batch)
            try:
                return self._run_batch(samples, batch, outputs)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(samples.block.name, batch.num_samples, error)
            seen = frozenset(samples.seen)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        half = -(-batch.num_samples // 2)
        parts = [
            self._run_samples(samples, part, _split(outputs, batch.num_samples, rows), seen)
            for part, rows in zip(split_batches([batch], half), (slice(0, half), slice(half, None)), strict=True)
        ]
        return _joined(parts, half)

    def _halve(self, block: str, num_samples: int, error: RuntimeError) -> None:
        if num_samples == 1:
            raise MergeError(
                f"{block}: out of memory with a single sample ({str(error).splitlines()[0]}); lower max_length"
            ) from None
        self.most_samples = num_samples // 2
        self.retries.append(
            f"{block}: out of memory with {num_samples} samples at once; from here on at most {self.most_samples}"
        )

    def _run_batch(self, samples: Samples, batch: Batch, outputs: Mapping[int, Output]) -> Output:
        caught: list[Output] = []

        def visit(*args: Any, **kwargs: Any) -> None:
            caught.append(run_until(samples.module, samples.until, args, kwargs))

        idle = self.rehearsal.stacks[samples.block.stack].idle_inputs if samples.block.index > 0 else ()
        inputs = {
            name: self._nan(tensor.shape) if name in idle else self._cast(tensor)
            for name, tensor in batch.inputs.items()
        }
        with resumed_at(self.skeleton, samples.block.stack, samples.block.index) as run:
            run(inputs, outputs, visit)
        return caught[0]

    def _idle_forward(self, name: str) -> Callable[..., torch.Tensor]:
        """For a module whose output nobody reads: NaN of the right shape, which is found out once for each input."""
        module = self.skeleton.model.get_submodule(name)

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            key = (name, x.shape)
            if key not in self._idle_shapes:
                self._idle_shapes[key] = original_forward(module)(x, *args, **kwargs).shape
            return self._nan(self._idle_shapes[key])

        return forward

    def _nan(self, shape: torch.Size) -> torch.Tensor:
        """A tensor whose values nobody reads; all of it is one element of memory."""
        return torch.full((), float("nan"), dtype=self.compute_dtype, device=self.device).expand(shape)

    def _masks(self, batch: Batch) -> dict[int, torch.Tensor | None]:
        masks = {}
        for stack, seen in enumerate(self.rehearsal.stacks):
            mask = row_mask(batch, seen, self.loss_tokens)
            masks[stack] = None if mask is None else mask.to(self.device)
        return masks

    def _for_forward(self, block: BlockPlan, tensors: Tensors) -> Tensors:
        """A block's tensors by path in the block, in the forward's dtype."""
        prefix = block.name + "."
        return {name.removeprefix(prefix): self._cast(tensor) for name, tensor in tensors.items()}

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.compute_dtype if tensor.is_floating_point() else None)

    def set_outside(self, block: BlockPlan, candidate: int | None) -> None:
        """Loads what outside the stacks matters on the way to a block, and nothing else.

        For the merged weights (no candidate) the first call for a block is collective.
        """
        wanted_for = (block.stack, block.index == 0, candidate)
        if self._outside_for == wanted_for:
            return
        self._outside_for = wanted_for
        seen = self.rehearsal.stacks[block.stack]
        wanted = set(seen.first if block.index == 0 else seen.later)
        poison_outside(self.skeleton, self.device, but=wanted)
        parameters = dict(self.skeleton.model.named_parameters())
        buffers = [name for name in self.skeleton.outside_tensors() if name not in parameters]
        names = [*sorted(wanted), *(name for name in buffers if self.weights.inputs.reference_names.has(name))]
        loaded = self.weights.merged(names) if candidate is None else self.weights.candidate(candidate, names)
        for name in names:
            assign_tensors(self.skeleton, {name: self._cast(loaded.pop(name))})


def counted_rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Rows `[N, in]` of a linear's input that count; the others may be anything, NaN included."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if mask is None else flat[mask.reshape(-1)]


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _split(outputs: Mapping[int, Output], num_samples: int, rows: slice) -> dict[int, Output]:
    """Some samples of stored outputs; what is not by sample (T5's position biases may be shared) stays whole."""

    def part(leaf: Any) -> Any:
        by_sample = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == num_samples
        return leaf[rows] if by_sample else leaf

    return {stack: tree_map(part, output) for stack, output in outputs.items()}


def _joined(parts: Sequence[Output], half: int) -> Output:
    """The output for a whole batch, from that for its first `half` samples and that for the others."""
    flat = [tree_flatten(part) for part in parts]
    leaves = [
        torch.cat(pair) if isinstance(pair[0], torch.Tensor) and pair[0].dim() and pair[0].shape[0] == half else pair[0]
        for pair in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(leaves, flat[0][1])
