"""One block with weights: put in, watched, taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from largemerge.model.forward import Output, original_forward


class _Enough(Exception):
    """The last watched linear has been reached: what the block would compute after it, nobody reads."""


VisitRows = Callable[[str, torch.Tensor], None]
"""Called with a watched linear's path and its input `[..., in]`."""


@contextmanager
def block_weights(block: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Gives a block weights for a while; afterwards it is on the meta device again.

    Args:
        block: A block of a skeleton.
        tensors: By path in the block; parameters and persistent buffers.
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
def watched_linears(block: nn.Module, paths: Sequence[str], visit: VisitRows) -> Iterator[None]:
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
    """Runs a block, only as far as the input of the linear `last` if one is named.

    Returns:
        The block's output, `None` if it was cut short.
    """
    if last is None:
        return original_forward(block)(*args, **kwargs)

    def enough(*_: Any) -> None:
        raise _Enough

    # Hooks run in the order of registration: the watching one has seen the input by now.
    handle = block.get_submodule(last).register_forward_pre_hook(enough)
    try:
        return original_forward(block)(*args, **kwargs)
    except _Enough:
        return None
    finally:
        handle.remove()
