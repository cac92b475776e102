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
    run_until     a block up to one of its linears     watched_linears   shows inputs of a block's linears
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from largemerge.errors import ArchitectureError
from largemerge.model.skeleton import Skeleton

Output = Any
"""What a block returns: a tensor, or a tuple of tensors (T5's position biases)."""

Visit = Callable[..., None]
"""Called in place of the block's forward, with the arguments that the model gave it."""

RunToBlock = Callable[[Mapping[str, torch.Tensor], Mapping[int, Output], Visit], None]
"""Calls the model on inputs, given the last output of each stack, up to the block, and visits it."""

OnInputTensor = Callable[[str, torch.Tensor], None]
"""Called with a watched linear's path and its input `[..., in]`."""


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
def resumed_at(skeleton: Skeleton, stack_index: int, block_index: int) -> Iterator[RunToBlock]:
    """Prepares the model to be run up to one block.

    Args:
        skeleton: The model; its parameters outside the stacks must be set as far as the forward needs them.
        stack_index: Index of the stack in `skeleton.stacks`.
        block_index: Index of the block in its stack.

    Yields:
        A function of (inputs, outputs, visit): calls the model on `inputs` with every earlier block of stack
        s answering `outputs[s]`, and calls `visit` with the arguments of the block.

    Raises:
        ArchitectureError: If the function, when called, does not reach the block, or reaches another before it.
    """
    target = skeleton.stacks[stack_index].blocks[block_index]
    stored: dict[int, Output] = {}
    visits: list[Visit] = []

    def reached(*args: Any, **kwargs: Any) -> Output:
        visits[-1](*args, **kwargs)
        raise _BlockReached

    forwards = _stubs(skeleton, stored) | {target: reached}

    def run(inputs: Mapping[str, torch.Tensor], outputs: Mapping[int, Output], visit: Visit) -> None:
        stored.clear()
        stored.update(outputs)
        visits.append(visit)
        try:
            skeleton.model(**inputs)
        except _BlockReached:
            return
        finally:
            visits.pop()
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
) -> Any:
    """Runs what comes after the last block of every stack: final norm, head, logits.

    Args:
        skeleton: The model; its parameters outside the stacks must be set as far as the end needs them.
        inputs: The forward arguments.
        outputs: Stack index → what its last block returned.
        replaced: Modules → forwards to call instead of their own.

    Returns:
        What the model's own forward returns.
    """
    with replaced_forwards(_stubs(skeleton, outputs) | dict(replaced or {})), torch.no_grad():
        return skeleton.model(**inputs)


def _stubs(skeleton: Skeleton, outputs: Mapping[int, Output]) -> dict[nn.Module, Callable[..., Output]]:
    """Makes a forward for every block that answers with the stored output of its stack."""

    def stub(index: int) -> Callable[..., Output]:
        def answer(*args: Any, **kwargs: Any) -> Output:
            if index not in outputs:
                name = skeleton.stacks[index].name
                raise ArchitectureError(f"{skeleton.class_name}: a block of {name} runs earlier than it should")
            return outputs[index]

        return answer

    stubs = [stub(index) for index in range(len(skeleton.stacks))]
    return {block: stubs[index] for index, stack in enumerate(skeleton.stacks) for block in stack.blocks}


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
def watched_linears(block: nn.Module, paths: Sequence[str], visit: OnInputTensor) -> Iterator[None]:
    """Calls `visit` with the input of each linear in `paths`, before it runs."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: visit(path, args[0])

    handles = [block.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_until(block: nn.Module, last: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Output | None:
    """Runs a block, only up to the input of the linear `last` if one is named.

    Returns:
        The block's output; `None` if it was cut short.
    """
    if last is None:
        return original_forward(block)(*args, **kwargs)

    def enough(*_: Any) -> None:
        raise _LastLinearReached

    # Hooks run in the order of registration: the watching one has seen the input by now.
    handle = block.get_submodule(last).register_forward_pre_hook(enough)
    try:
        return original_forward(block)(*args, **kwargs)
    except _LastLinearReached:
        return None
    finally:
        handle.remove()
