"""Runs one block of a model on hidden states: weights in, hidden states in, hidden states out.

    runner = BlockRunner(skeleton, trace, load_non_block, compute_dtype, device, loss_input)
    where = BlockId(stack, index)
    with runner.block(where, weights, runner.non_block_of(where, owner)) as block:
        for batch, outputs in …:
            output = block.run(batch, outputs, watch=["self_attn.q_proj"], on_input=add_rows)

It knows nothing of merging. `on_input` sees the valid rows of every watched linear's input: padding, and tokens that a
loss mask keeps out, are gone (`valid_mask`, the only place where masks are applied). Weights are put in for the time of
one run, so that two blocks with other weights, or two streams of hidden states, can take turns batch by batch.

A run may stop at a linear, keep what is needed to go on from there (`keep`), and be taken up later (`start`), so that
every linear of a block is run once though each has to wait until the one before it is solved.

What lies outside the blocks (embeddings, an encoder's final norm) is loaded only where the trace says that it is
needed. Everywhere else stands a NaN, one element of memory for a whole tensor, so that reading it by mistake shows.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from largemerge.calibration.batches import Batch, split_batches
from largemerge.checkpoint.tensor_info import Tensors
from largemerge.errors import LargemergeError, MergeError
from largemerge.matmul import faster_linear
from largemerge.model.forward import (
    KeptOutputs,
    Output,
    SharedOutput,
    block_weights,
    keep_output,
    original_forward,
    replaced_forwards,
    resumed_at,
    run_to_end,
    run_until,
    watched_modules,
)
from largemerge.model.inside_block import ResumePoint, copy_of, resumed_forwards
from largemerge.model.skeleton import Skeleton, assign_tensors, fill_with_nan, linears_in
from largemerge.model.trace import LinearRole, ModelTrace, StackTrace

OnInput = Callable[[str, torch.Tensor], None]
"""Called with a linear's path in the block, or the name of what is seen beside, and the valid rows `[N, in]`."""

NonBlock = tuple[Hashable, Tensors]
"""Tensors outside the blocks, by name, after a key that names them."""

Kept = dict[str, Any]
"""What was kept of a run inside a block: `given`, the input of a linear, and `known`, outputs of earlier modules."""


@dataclass(frozen=True)
class Beside:
    """A tensor in a block that is shown, too, beside the inputs of watched linears.

    Attributes:
        module: Path of a module in the block.
        of: Its first `input`, or its `output`.
        rows_of: Path of a linear, or a norm, whose rows the tensor has.
    """

    module: str
    of: Literal["input", "output"]
    rows_of: str

    @property
    def name(self) -> str:
        """Name under which it is shown."""
        return f"{self.of} of {self.module}"


@dataclass(frozen=True)
class _Request:
    """What a run of a block is to do; see `RunningBlock.run`."""

    watch: Sequence[str]
    on_input: OnInput | None
    until: str | None
    beside: Sequence[Beside]
    start: tuple[ResumePoint, Kept] | None
    keep: ResumePoint | None


class LoadNonBlock(Protocol):
    """Reads tensors outside the blocks."""

    def __call__(self, owner: Hashable, parameters: Sequence[str], buffers: Sequence[str]) -> Tensors:
        """Reads all of the parameters, and those of the buffers that the owner's files have, by name in the module."""


@dataclass(frozen=True)
class BlockId:
    """Indices of a block's stack in the skeleton, and of the block in its stack."""

    stack: int
    index: int


@dataclass
class BlockRunner:
    """Runs the blocks of one model.

    Attributes:
        skeleton: The model; its parameters are set and taken away here.
        trace: What a forward pass reads, found out beforehand.
        load_non_block: Reads embeddings and the like.
        compute_dtype: Dtype of the forward passes.
        device: The device that computes.
        loss_input: The input that loss masks belong to, `input_ids` or `decoder_input_ids`.
        max_samples: Number of samples that run at once, at most; halved when memory does not suffice.
        retries: Messages about blocks that were run again in smaller parts.
    """

    skeleton: Skeleton
    trace: ModelTrace
    load_non_block: LoadNonBlock
    compute_dtype: torch.dtype
    device: torch.device
    loss_input: str
    max_samples: int = sys.maxsize
    retries: list[str] = field(default_factory=list)
    _non_block: NonBlock = field(init=False, default_factory=lambda: (None, {}))
    _unused_shapes: dict[tuple[str, str], torch.Size] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for module in self.skeleton.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(self.device)

    @contextmanager
    def block(self, block: BlockId, tensors: Tensors, non_block: NonBlock) -> Iterator[RunningBlock]:
        """Prepares a block with weights; several may be open at a time.

        Args:
            block: The block.
            tensors: The block's weights by path in the block; they are cast and moved here.
            non_block: Embeddings and the like that are read on the way, from `non_block_of`.
        """
        cast = {path: self.cast(tensor) for path, tensor in tensors.items()}
        running = RunningBlock(self, block, cast, non_block)
        try:
            yield running
        finally:
            running.close()

    def non_block_of(self, block: BlockId, owner: Hashable) -> NonBlock:
        """Loads what is needed outside the blocks on the way to a block, unless it was the last to be loaded.

        Returns:
            A key that names what was loaded, and the tensors by name.
        """
        key = (block.stack, block.index == 0, owner)
        if self._non_block[0] != key:
            stack = self.trace.stacks[block.stack]
            self._load_non_block(key, stack.needed_by_first if block.index == 0 else stack.needed_by_later, owner)
        return self._non_block

    def _load_non_block(self, key: Hashable, wanted: frozenset[str], owner: Hashable) -> None:
        """Loads tensors outside the blocks in the place of those that were there; all others become NaN."""
        self._non_block = (None, {})  # frees what was there before anything else comes
        fill_with_nan(self.skeleton, self.device, but=wanted)
        parameters = self.skeleton.non_block_parameters()
        buffers = [name for name in self.skeleton.non_block_tensors() if name not in parameters]
        loaded = self.load_non_block(owner, sorted(wanted), buffers)
        tensors = {name: self.cast(loaded.pop(name)) for name in list(loaded)}
        assign_tensors(self.skeleton, tensors)
        self._non_block = (key, tensors)

    def use_non_block(self, non_block: NonBlock) -> None:
        """Puts tensors from `non_block_of` in their places, if others are there."""
        if self._non_block[0] != non_block[0]:
            fill_with_nan(self.skeleton, self.device, but=set(non_block[1]))
            assign_tensors(self.skeleton, non_block[1])
            self._non_block = non_block

    def end_non_block(self, owner: Hashable, without: Collection[str] = ()) -> NonBlock:
        """Loads what is needed after the blocks, unless it was the last to be loaded; see `non_block_of`.

        Args:
            owner: Owner of the norm and head, for `load_non_block`.
            without: Names of parameters that are not read after all.
        """
        key = ("end", owner, *sorted(without))
        if self._non_block[0] != key:
            self._load_non_block(key, self.trace.end.needed - frozenset(without), owner)
        return self._non_block

    def end(
        self,
        batch: Batch,
        outputs: Mapping[int, Output],
        non_block: NonBlock,
        *,
        watch: Sequence[str] = (),
        on_input: OnInput | None = None,
    ) -> Any:
        """Runs what comes after the last block: final norm and head; only up to the last of `watch`, if it is given.

        Args:
            batch: The forward arguments.
            outputs: Stack index → what its last block returned.
            non_block: Norm and head, from `end_non_block`.
            watch: Paths of linears whose inputs are wanted, in the order in which they run.
            on_input: Called with the valid rows of each input.

        Returns:
            What the model's forward returns, such as an object with `logits`; `None` if it is stopped.
        """
        self.use_non_block(non_block)
        inputs = {name: self.cast(tensor) for name, tensor in batch.inputs.items()}
        roles = {role.name: role for role in self.trace.end.roles}
        masks: dict[int, torch.Tensor | None] = {}

        def see(path: str, x: torch.Tensor) -> None:
            assert on_input is not None
            on_input(path, self.valid_rows_of(batch, roles[path], x, masks))

        seen = {path: partial(see, path) for path in watch} if on_input is not None else {}
        with watched_modules(self.skeleton.model, seen):
            return run_to_end(self.skeleton, inputs, outputs, until=watch[-1] if watch else None)

    def valid_rows_of(
        self, batch: Batch, role: LinearRole, x: torch.Tensor, known: dict[int, torch.Tensor | None]
    ) -> torch.Tensor:
        """The valid rows of what a linear reads; `known` holds the masks of a batch, each made once."""
        stack = role.token_stack
        if stack is None:
            return valid_rows(x, None)
        if stack not in known:
            mask = valid_mask(batch, self.trace.stacks[stack], self.loss_input)
            known[stack] = None if mask is None else mask.to(self.device)
        own = known[stack]
        return valid_rows(x, own.T if own is not None and role.tokens_first else own)

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Moves a tensor to the device that computes, and casts a floating-point one to the forward's dtype."""
        return tensor.to(self.device, self.compute_dtype if tensor.is_floating_point() else None)

    def nan_tensor(self, shape: torch.Size) -> torch.Tensor:
        """Makes a tensor whose values nobody reads: NaN, one element of memory for all of it."""
        return torch.full((), float("nan"), dtype=self.compute_dtype, device=self.device).expand(shape)

    def nan_forward(self, name: str) -> Callable[..., torch.Tensor]:
        """Makes a forward for a module whose output nobody reads: NaN in the shape that the first call finds out."""
        module = self.skeleton.model.get_submodule(name)

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            leaves = tree_flatten((args, kwargs))[0]
            shapes = (leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
            key = (name, repr(list(shapes)))
            if key not in self._unused_shapes:
                self._unused_shapes[key] = original_forward(module)(*args, **kwargs).shape
            return self.nan_tensor(self._unused_shapes[key])

        return forward

    def halve_samples(self, block: str, num_samples: int, error: RuntimeError) -> None:
        """Halves the number of samples that run at once, from here on.

        Raises:
            MergeError: If there is only one sample.
        """
        if num_samples == 1:
            raise MergeError(
                f"{block}: out of memory with a single sample ({str(error).splitlines()[0]}); lower max_length"
            ) from None
        self.max_samples = num_samples // 2
        self.retries.append(
            f"{block}: out of memory with {num_samples} samples at once; from here on at most {self.max_samples}"
        )


class RunningBlock:
    """A block with weights, ready to be run on one batch after another.

    Args:
        runner: The runner of the model.
        block: The block.
        tensors: The block's weights by path in it, on the device and in the dtype of the forward passes.
        non_block: Key and tensors from `BlockRunner.non_block_of`.
    """

    def __init__(self, runner: BlockRunner, block: BlockId, tensors: Tensors, non_block: NonBlock) -> None:
        skeleton, stack = runner.skeleton, runner.trace.stacks[block.stack]
        self._runner, self._block, self._non_block = runner, block, non_block
        self._name = skeleton.stacks[block.stack].block_name(block.index)
        self._module = skeleton.stacks[block.stack].blocks[block.index]
        norms = stack.norms[block.index] if stack.norms else {}
        self._roles = {role.name: role for role in stack.roles[block.index]} | dict(norms)
        self._runs, self._kept = stack.runs[block.index], stack.kept
        self._unused_inputs = stack.unused_inputs if block.index > 0 else frozenset[str]()
        self._tensors: Mapping[str, torch.Tensor] = tensors
        unused = stack.unused_modules if block.index > 0 else ()
        self._forwards = {skeleton.model.get_submodule(name): runner.nan_forward(name) for name in unused}
        for linear in linears_in(self._module).values():
            faster = faster_linear(linear, runner.compute_dtype, runner.device)
            self._forwards |= {} if faster is None else {linear: faster}

    def close(self) -> None:
        """Frees the weights."""
        self._tensors, self._non_block = {}, (None, {})

    def run(
        self,
        batch: Batch,
        outputs: Mapping[int, Output],
        *,
        watch: Sequence[str] = (),
        on_input: OnInput | None = None,
        whole: bool = True,
        beside: Sequence[Beside] = (),
        start: tuple[ResumePoint, Kept] | None = None,
        keep: ResumePoint | None = None,
    ) -> Any:
        """Runs the block on one batch, in halves where memory does not suffice for all of it at once.

        Args:
            batch: The forward arguments, and the loss mask.
            outputs: Stack index → what its last block that has run returned.
            watch: Paths in the block of the linears whose inputs are wanted, in the order in which they run.
            on_input: Called with each input's valid rows, once for each part of the batch.
            whole: Whether the block is run to its end; otherwise only up to the last linear of `watch`.
            beside: Other tensors that `on_input` is shown.
            start: Where the run is taken up, and what was kept there; default: at the block's beginning.
            keep: Where the run stops, at the last linear of `watch`, and what is kept there.

        Returns:
            The block's output; what was kept, if `keep` says so; else `None` if it was not run to its end.

        Raises:
            MergeError: If memory does not suffice for a single sample.
        """
        self._runner.use_non_block(self._non_block)
        until = None if whole or any(self._roles[path].calls > 1 for path in watch) else watch[-1]
        request = _Request(watch, on_input, until, beside, start, keep)
        with block_weights(self._module, self._tensors):
            return self._run_samples(batch, outputs, request, Counter())

    def _run_samples(
        self, batch: Batch, outputs: Mapping[int, Output], request: _Request, seen: Mapping[str, int]
    ) -> Any:
        """Runs some samples; `seen` counts inputs of linears that were shown before a try ran out of memory."""
        runner = self._runner
        if batch.num_samples <= runner.max_samples:
            shown = Counter(seen)
            try:
                return self._run_batch(batch, outputs, request, shown)
            except LargemergeError:
                raise
            except Exception as error:  # whatever a model's code raises
                if not isinstance(error, RuntimeError) or not _is_out_of_memory(error):
                    raise MergeError(_cannot_run(self._name, batch, error)) from error
                runner.halve_samples(self._name, batch.num_samples, error)
            seen = shown
            if runner.device.type == "cuda":
                torch.cuda.empty_cache()
        half = -(-batch.num_samples // 2)
        parts = [
            self._run_samples(
                part,
                _split(outputs, batch.num_samples, rows),
                replace(request, start=_split_start(request.start, batch.num_samples, rows)),
                seen,
            )
            for part, rows in zip(split_batches([batch], half), (slice(0, half), slice(half, None)), strict=True)
        ]
        return _joined(parts, None if request.keep is not None else half)

    def _run_batch(self, batch: Batch, outputs: Mapping[int, Output], request: _Request, shown: Counter[str]) -> Any:
        """Runs one batch at once; counts in `shown` the tensors of each name that `on_input` has seen."""
        runner, before = self._runner, outputs.get(self._block.stack)
        caught: list[Output] = []
        masks: dict[int, torch.Tensor | None] = {}
        called = Counter[str]()
        kept: Kept = {"given": None, "known": {}}

        def show(name: str, x: torch.Tensor, rows_of: str) -> None:
            called[name] += 1
            if request.on_input is not None and called[name] > shown[name]:
                request.on_input(name, runner.valid_rows_of(batch, self._roles[rows_of], x, masks))
                shown[name] += 1

        def see(path: str, x: torch.Tensor) -> None:
            if request.keep is not None and request.keep.given and path == request.until:
                kept["given"] = x
            show(path, x, path)

        def visit(*args: Any, **kwargs: Any) -> Output:
            last = caught[-1] if caught else before
            last = last.last if isinstance(last, KeptOutputs) else last
            caught.append(
                run_until(
                    self._module, request.until, args, kwargs, *([last] if isinstance(last, SharedOutput) else [])
                )
            )
            return caught[-1]

        inputs = {
            name: runner.nan_tensor(tensor.shape) if name in self._unused_inputs else runner.cast(tensor)
            for name, tensor in batch.inputs.items()
        }
        with ExitStack() as stack:
            stack.enter_context(replaced_forwards(self._forwards | self._resumed(request.start)))
            if request.on_input is not None or request.keep is not None:
                for each in request.beside:
                    where = {each.module: partial(show, each.name, rows_of=each.rows_of)}
                    stack.enter_context(watched_modules(self._module, where, of=each.of))
                linears = {path: partial(see, path) for path in request.watch}
                stack.enter_context(watched_modules(self._module, linears))
                own = [path for path in request.keep.known if path not in _known(request.start)] if request.keep else []
                outs = {path: partial(_keep_copy, kept["known"], path) for path in own}
                stack.enter_context(watched_modules(self._module, outs, of="output"))
            run = stack.enter_context(resumed_at(runner.skeleton, self._block.stack, self._block.index, self._runs))
            run(inputs, outputs, visit)
        if request.keep is not None:
            kept["known"] |= {path: _known(request.start)[path] for path in request.keep.known if path not in own}
            return kept
        if caught[-1] is None:
            return None
        return keep_output(caught[-1], before, self._block.index, self._kept)

    def _resumed(self, start: tuple[ResumePoint, Kept] | None) -> dict[torch.nn.Module, Callable[..., Any]]:
        """Forwards of linears with which a run is taken up where an earlier one has stopped."""
        if start is None:
            return {}
        point, inside = start
        answers: dict[str, Any] = dict.fromkeys(point.skipped) | inside["known"]
        return resumed_forwards(self._module, point, inside["given"], answers, self._forwards)


def valid_mask(batch: Batch, stack: StackTrace, loss_input: str) -> torch.Tensor | None:
    """The tokens of a batch that are valid in one stack: neither padding nor kept out by the loss mask.

    Args:
        batch: Forward arguments and loss mask.
        stack: Trace of the stack; it names the input whose tokens the rows are.
        loss_input: The input that the loss mask belongs to, `input_ids` or `decoder_input_ids`.

    Returns:
        Mask `[B, T]`, true for valid tokens; `None` where all tokens are valid.
    """
    if stack.token_input is None:
        return None
    mask = None
    attention = batch.inputs.get(stack.token_input.replace("input_ids", "attention_mask"))
    if attention is not None and attention.dim() == 2:
        mask = attention != 0
    if batch.loss_mask is not None and stack.token_input == loss_input:
        mask = batch.loss_mask if mask is None else mask & batch.loss_mask
    return None if mask is None or bool(mask.all()) else mask


def count_valid_rows(batch: Batch, stack: StackTrace, loss_input: str) -> int:
    """Counts the valid tokens of a batch in one stack; arguments are those of `valid_mask`."""
    return sum(rows_of_samples(batch, stack, loss_input))


def rows_of_samples(batch: Batch, stack: StackTrace, loss_input: str) -> list[int]:
    """Counts the valid tokens of each sample of a batch in one stack; arguments are those of `valid_mask`."""
    mask = valid_mask(batch, stack, loss_input)
    if mask is not None:
        return [int(count) for count in mask.flatten(1).sum(1)]
    num_tokens = stack.num_tokens
    if stack.token_input is not None:
        num_tokens = batch.inputs[stack.token_input].numel() // batch.num_samples
    return [num_tokens] * batch.num_samples


def valid_rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The valid rows `[N, in]` of a linear's input; the others may hold anything, NaN included.

    A token may have several rows, one after the other.
    """
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    return x.reshape(mask.numel(), -1, x.shape[-1])[mask.reshape(-1)].reshape(-1, x.shape[-1])


def _cannot_run(block: str, batch: Batch, error: Exception) -> str:
    shapes = {name: list(tensor.shape) for name, tensor in batch.inputs.items()}
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"{block}: cannot be run on a batch of shapes {shapes}: {type(error).__name__}: {reason}"


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _split(outputs: Mapping[int, Output], num_samples: int, rows: slice) -> dict[int, Output]:
    """Takes some samples of stored outputs; what is not by sample (T5's position biases may be shared) stays whole.

    Raises:
        MergeError: If an output cannot be cut into samples.
    """

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0 or leaf.shape[0] == 1 != num_samples:
            return leaf
        if leaf.shape[0] != num_samples:
            raise MergeError(
                f"out of memory with {num_samples} samples at once, and hidden states of shape {list(leaf.shape)} "
                "cannot be cut into samples; lower calibration.batch_size"
            )
        return leaf[rows]

    return {stack: tree_map(part, output) for stack, output in outputs.items()}


def _split_start(
    start: tuple[ResumePoint, Kept] | None, num_samples: int, rows: slice
) -> tuple[ResumePoint, Kept] | None:
    """Takes some samples of what was kept inside a block: tensors by sample, or by sample and token in one.

    Raises:
        MergeError: If a tensor cannot be cut into samples.
    """
    if start is None:
        return None

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.shape[0] % num_samples:
            raise MergeError(
                f"out of memory with {num_samples} samples at once, and inputs of linears of shape {list(leaf.shape)} "
                "cannot be cut into samples; lower calibration.batch_size"
            )
        of_sample = leaf.shape[0] // num_samples
        return leaf[rows.start * of_sample : None if rows.stop is None else rows.stop * of_sample]

    return start[0], tree_map(part, start[1])


def _keep_copy(kept: dict[str, Any], path: str, output: Any) -> None:
    kept[path] = copy_of(output)  # the model may add to it in its place


def _known(start: tuple[ResumePoint, Kept] | None) -> dict[str, Any]:
    """Outputs of earlier modules that were kept where a run is taken up."""
    return start[1]["known"] if start is not None else {}


def _joined(parts: Sequence[Output], half: int | None) -> Output:
    """Joins what was made of the first `half` samples and of the others; with `None` every tensor is by sample."""
    flat = [tree_flatten(part) for part in parts]

    def by_sample(leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and half in (None, leaf.shape[0])

    leaves = [
        torch.cat(pair) if by_sample(pair[0]) else pair[0] for pair in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(leaves, flat[0][1])
