"""Running one block of any Transformers model, inside the model's own forward.

Every block gets another `forward` for the time of the call. To run block l, the model itself is called:

    embeddings → stub … stub → block l → stop
                 (return what   (visit)
                  block l-1
                  returned)

so the model's own code makes masks, position embeddings and per-layer arguments, and does whatever it does
between blocks. Nothing is captured once and replayed wrongly, and no mask is stored. Stacks that run
earlier (an encoder, for a decoder) answer with their last block's output.

    resumed_at    the model up to one block            run_to_end        what comes after the last block, to the logits
    run_until     a block up to one of its linears     watched_modules   shows inputs and outputs inside a block

Some blocks hand more to later ones than what they return: Gemma 3n's write their keys and values into a mapping that
all blocks are given. What a block has changed there travels with its output (`SharedOutput`), and a stub puts it into
the mapping that the model has made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import register_pytree_node

from largemerge.errors import ArchitectureError
from largemerge.model.skeleton import Skeleton

Output = Any
"""What a block returns: a tensor, or a tuple of tensors (T5's position biases)."""

Visit = Callable[..., Output]
"""Called in place of the block's forward, with the arguments that the model gave it.

What it returns matters only to the model between two runs of one block."""

RunToBlock = Callable[[Mapping[str, torch.Tensor], Mapping[int, Output], Visit], None]
"""Calls the model on inputs, given the last output of each stack, up to the block, and visits it."""


@dataclass(frozen=True)
class SharedOutput:
    """What a block returned, and what blocks so far have put into mappings that the model gives to all of them.

    Attributes:
        output: What the block returned.
        shared: Position or name of the argument that is a mapping → the entries that blocks have set in it.
    """

    output: Any
    shared: Mapping[int | str, Mapping[Any, Any]]


register_pytree_node(
    SharedOutput,
    lambda node: ([node.output, {place: dict(entries) for place, entries in node.shared.items()}], None),
    lambda children, _: SharedOutput(*children),
)


@dataclass(frozen=True)
class KeptOutputs:
    """What the last block returned, and blocks before it whose output the model reads, too.

    Attributes:
        last: Output of the last block that has run.
        kept: Index of a block → its output (LLaVA reads the last but one of its vision tower).
    """

    last: Any
    kept: Mapping[int, Any]


register_pytree_node(
    KeptOutputs, lambda node: ([node.last, dict(node.kept)], None), lambda children, _: KeptOutputs(*children)
)

_PACKED = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}


def call_model(skeleton: Skeleton, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Calls the model; patches of images, which it takes in one list, may have a dimension of samples (see there).

    Models that are given a grid of patches for each image (`image_grid_thw`) want the patches of all images below one
    another, `[patches, features]`. Calibration data counts samples by the first dimension of every tensor, so that it
    holds `[samples, patches, features]`, and the grids as `[samples, images, 3]`.
    """
    flat = dict(inputs)
    for grid, patches in _PACKED.items():
        if grid in flat:
            flat[grid] = flat[grid].reshape(-1, flat[grid].shape[-1])
            if patches in flat:
                flat[patches] = flat[patches].reshape(-1, flat[patches].shape[-1])
    return skeleton.model(**flat)


class _BlockReached(Exception):
    """Raised to stop the model's forward at the block that was looked for."""


class _LastLinearReached(Exception):
    """Raised to stop a block's forward at the last watched linear: nobody reads what it would compute after it."""


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Gives modules another `forward` while the context is open."""
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


@contextmanager
def resumed_at(skeleton: Skeleton, stack_index: int, block_index: int, runs: int = 1) -> Iterator[RunToBlock]:
    """Prepares the model to be run up to one block.

    Args:
        skeleton: The model; its parameters outside the stacks must be set as far as the forward needs them.
        stack_index: Index of the stack in `skeleton.stacks`.
        block_index: Index of the block in its stack.
        runs: How often the model runs the block, one time right after the other (ALBERT: as often as it has layers).

    Yields:
        A function of (inputs, outputs, visit): calls the model on `inputs` with every earlier block of stack
        s answering `outputs[s]`, and calls `visit` with the arguments of the block, `runs` times.

    Raises:
        ArchitectureError: If the function, when called, does not reach the block, or reaches another before it.
    """
    target = skeleton.stacks[stack_index].blocks[block_index]
    stored: dict[int, Output] = {}
    visits: list[Visit] = []
    left: list[int] = []

    def reached(*args: Any, **kwargs: Any) -> Output:
        output = visits[-1](*args, **kwargs)
        left[-1] -= 1
        if left[-1] == 0:
            raise _BlockReached
        return hand_on(output, args, kwargs)

    forwards = _stubs(skeleton, stored) | {target: reached}

    def run(inputs: Mapping[str, torch.Tensor], outputs: Mapping[int, Output], visit: Visit) -> None:
        stored.clear()
        stored.update(outputs)
        visits.append(visit)
        left.append(runs)
        try:
            call_model(skeleton, inputs)
        except _BlockReached:
            return
        finally:
            visits.pop()
            left.pop()
            stored.clear()
        name = skeleton.stacks[stack_index].block_name(block_index)
        raise ArchitectureError(f"{skeleton.class_name}: the forward pass never reaches {name}")

    with replaced_forwards(forwards), torch.no_grad():
        yield run


def run_to_end(
    skeleton: Skeleton,
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[int, Output],
    replaced: Mapping[nn.Module, Callable[..., Any]] | None = None,
    until: str | None = None,
) -> Any:
    """Runs what comes after the last block of every stack: final norm, head, logits.

    Args:
        skeleton: The model; its parameters outside the stacks must be set as far as the end needs them.
        inputs: The forward arguments.
        outputs: Stack index → what its last block returned.
        replaced: Modules → forwards to call instead of their own.
        until: Path of a module before which the run stops, if any.

    Returns:
        What the model's own forward returns; `None` if it was stopped.
    """
    with replaced_forwards(_stubs(skeleton, outputs) | dict(replaced or {})), torch.no_grad():
        return _stopped_before(skeleton.model, until, lambda: call_model(skeleton, inputs))


def _stubs(skeleton: Skeleton, outputs: Mapping[int, Output]) -> dict[nn.Module, Callable[..., Output]]:
    """Makes a forward for every block that answers with the stored output of its stack."""

    def stub(number: int, index: int) -> Callable[..., Output]:
        def answer(*args: Any, **kwargs: Any) -> Output:
            if number not in outputs:
                name = skeleton.stacks[number].name
                raise ArchitectureError(f"{skeleton.class_name}: a block of {name} runs earlier than it should")
            output = outputs[number]
            if isinstance(output, KeptOutputs):
                output = output.kept.get(index, output.last)
            return hand_on(output, args, kwargs)

        return answer

    return {
        block: stub(number, index)
        for number, stack in enumerate(skeleton.stacks)
        for index, block in enumerate(stack.blocks)
    }


def hand_on(output: Output, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Gives the model what a block returned, after putting what is shared into the mappings among its arguments."""
    if not isinstance(output, SharedOutput):
        return output
    for place, entries in output.shared.items():
        (args[place] if isinstance(place, int) else kwargs[place]).update(entries)
    return output.output


def keep_output(output: Output, before: Output, index: int, kept: Collection[int]) -> Output:
    """Joins a block's output to those of earlier blocks that the model reads, too.

    Args:
        output: What block `index` returned.
        before: What is stored of the blocks before it.
        index: Index of the block in its stack.
        kept: Indices of the blocks whose output is kept.
    """
    known = dict(before.kept) if isinstance(before, KeptOutputs) else {}
    if index in kept:
        known[index] = output
    return KeptOutputs(output, known) if known else output


def run_block(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], before: Output = None) -> Output:
    """Runs a block.

    Args:
        block: The block, with weights.
        args: Its arguments by position.
        kwargs: Its arguments by name.
        before: What the block before it returned; what is shared since then travels on.

    Returns:
        The block's output; a `SharedOutput` where blocks have changed mappings among their arguments.
    """
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    mappings = {place: value for place, value in places if isinstance(value, MutableMapping)}
    unchanged = {place: dict(mapping) for place, mapping in mappings.items()}
    output = original_forward(block)(*args, **kwargs)
    before = before.last if isinstance(before, KeptOutputs) else before
    known = before.shared if isinstance(before, SharedOutput) else {}
    shared: dict[int | str, dict[Any, Any]] = {}
    for place, mapping in mappings.items():
        old = unchanged[place]
        changed = {key: value for key, value in mapping.items() if key not in old or old[key] is not value}
        if entries := {**known.get(place, {}), **changed}:
            shared[place] = entries
    return SharedOutput(output, shared) if shared else output


def original_forward(block: nn.Module) -> Callable[..., Output]:
    """The forward of the block's class, whatever stands in its place now."""
    forward: Callable[..., Output] = type(block).forward.__get__(block)
    return forward


@contextmanager
def block_weights(block: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Gives a block weights while the context is open; afterwards it is on the meta device again.

    Args:
        block: A block of a skeleton.
        tensors: Path in the block → tensor, for parameters and persistent buffers.
    """
    places = [(block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], path) for path in tensors]
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, leaf, path in places:
            if leaf in module._parameters:
                before.append((module, leaf, module._parameters[leaf]))
                module._parameters[leaf] = nn.Parameter(tensors[path], requires_grad=False)
            else:
                before.append((module, leaf, module._buffers[leaf]))
                module._buffers[leaf] = tensors[path]
        yield
    finally:
        for module, leaf, value in before:
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = value


@contextmanager
def watched_modules(
    block: nn.Module, watch: Mapping[str, Callable[[Any], None]], *, of: Literal["input", "output"] = "input"
) -> Iterator[None]:
    """Shows the first input of modules before they run, or their output afterwards.

    Args:
        block: The block.
        watch: Path in the block → what is called with the tensor.
        of: What is shown.
    """
    handles = []
    for path, visit in watch.items():
        module = block.get_submodule(path)
        if of == "input":
            handles.append(module.register_forward_pre_hook(lambda _, args, visit=visit: visit(args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _, __, output, visit=visit: visit(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_until(
    block: nn.Module, last: str | None, args: Sequence[Any], kwargs: Mapping[str, Any], before: Output = None
) -> Output | None:
    """Runs a block, only up to the input of the linear `last` if one is named; `before` as in `run_block`.

    Returns:
        The block's output; `None` if it was cut short.
    """
    if last is None:
        return run_block(block, args, kwargs, before)
    return _stopped_before(block, last, lambda: original_forward(block)(*args, **kwargs))


def _stopped_before(module: nn.Module, until: str | None, run: Callable[[], Any]) -> Any:
    """Runs a module until it calls a module inside; returns `None` then, else what it computes."""
    if until is None:
        return run()

    def enough(*_: Any) -> None:
        raise _LastLinearReached

    # Hooks run in the order of registration: a watching one has seen the input by now.
    handle = module.get_submodule(until).register_forward_pre_hook(enough)
    try:
        return run()
    except _LastLinearReached:
        return None
    finally:
        handle.remove()
