"""What a block computes between its linears, as a function of what the linears return.

    y_L: outputs of all linears, any numbers ──► Between ──► x_C: inputs of all linears, and the block's own output

A linear computes y = W x + b. If its rows of W and b change places, so do the features of y, and if the columns of the
W that reads x change places with the features of x, nothing changes behind it. So a permutation of rows and columns
leaves a block's output as it is, whatever the weights are, if and only if what lies between commutes with it. That is
tried here with made-up y: no weight of a linear is needed, however large the block is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from largemerge.model.forward import original_forward, replaced_forwards
from largemerge.model.skeleton import linears_in, weight_is_transposed

RESULT = ""
"""Stands for the block's own output where linears are named."""
_FEW_TOKENS = 12


class _Reached(Exception):
    """Raised to end a run at the last linear that is asked for."""


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """Returns the number of outputs and of inputs of a linear."""
    shape = linear.get_parameter("weight").shape
    return (shape[1], shape[0]) if weight_is_transposed(linear) else (shape[0], shape[1])


class Between:
    """A block without its linears.

    Args:
        block: The block; its other parameters hold numbers.
        single: Arguments that the model gives it for one sample, by position and by name.
        batched: The same for several samples that are all alike.
        num_samples: How many these are.

    Attributes:
        linears: The linears that one pass calls once, in the order in which it does, by path in the block.
        shapes: Shape of what each of them returns for one sample.
    """

    def __init__(self, block: nn.Module, single: Any, batched: Any, num_samples: int) -> None:
        self.block, self.num_samples = block, num_samples
        self._arguments = {1: single, num_samples: batched}
        shapes: dict[str, tuple[int, ...]] = {}
        called: list[str] = []

        def forward(name: str, num_outputs: int) -> Any:
            def answer(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
                called.append(name)
                shapes[name] = (*x.shape[:-1], num_outputs)
                return torch.ones(shapes[name], dtype=x.dtype)

            return answer

        modules = linears_in(block)
        self._run(1, {linear: forward(name, linear_sizes(linear)[0]) for name, linear in modules.items()})
        self.linears = {name: modules[name] for name in called if called.count(name) == 1}
        self.shapes = {name: shapes[name] for name in self.linears}

    def shortened(self) -> Between | None:
        """The same with a few tokens of many; `None` where there are few, or the block cannot be run on fewer."""
        states = next((leaf for leaf in leaves_of(self._arguments[1]) if leaf.dim() == 3), None)
        if states is None or states.shape[1] <= _FEW_TOKENS:
            return None
        length = states.shape[1]

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            axes = [axis for axis, size in enumerate(leaf.shape) if size == length and axis > 0]
            for axis in axes if leaf.shape[-2:] == (length, length) else axes[:1]:
                leaf = leaf.narrow(axis, 0, _FEW_TOKENS)
            return leaf

        single, batched = (tree_map(cut, self._arguments[number]) for number in (1, self.num_samples))
        try:
            return Between(self.block, single, batched, self.num_samples)
        except Exception:  # whatever a block raises that wants all of its tokens
            return None

    def made_up(self, generator: torch.Generator, *, positive: bool = False) -> dict[str, torch.Tensor]:
        """Makes up outputs of all linears for one sample, float64: all positive, or normally distributed."""
        if positive:
            return {
                name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
                for name, shape in self.shapes.items()
            }
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in self.shapes.items()
        }

    def run(
        self, outputs: Mapping[str, torch.Tensor], *, num_samples: int = 1, until: str | None = None
    ) -> dict[str, Any]:
        """Runs the block with given outputs of its linears.

        Args:
            outputs: What each linear returns, for all samples.
            num_samples: How many samples there are: one, or as many as were given.
            until: The linear at which the run may end.

        Returns:
            What each linear reads, by its path; and what the block returns, unless the run has ended before.
        """
        reads: dict[str, Any] = {}

        def forward(name: str) -> Any:
            def answer(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
                reads[name] = x
                if name == until:
                    raise _Reached
                return outputs[name].reshape(*x.shape[:-1], -1).clone()

            return answer

        forwards = {linear: forward(name) for name, linear in self.linears.items()}
        with suppress(_Reached):
            reads[RESULT] = self._run(num_samples, forwards)
        return reads

    def _run(self, num_samples: int, forwards: Mapping[nn.Module, Any]) -> Any:
        """Runs the block on its arguments, with other forwards of some of its modules."""
        args, kwargs = tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, self._arguments[num_samples]
        )
        with replaced_forwards(forwards):
            return original_forward(self.block)(*args, **kwargs)

    @contextmanager
    def parameters(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Puts tensors in the place of parameters of the block while the context is open, by path in it."""
        before: dict[str, Any] = {}
        try:
            for name, tensor in tensors.items():
                module, leaf = self._holder(name)
                before[name] = module._parameters[leaf]
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.requires_grad)
            yield
        finally:
            for name, parameter in before.items():
                module, leaf = self._holder(name)
                module._parameters[leaf] = parameter

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter that is in a place now."""
        return self.block.get_parameter(name)

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.block.get_submodule(path), leaf

    def vectors(self) -> dict[str, nn.Parameter]:
        """The block's vectors that belong to no linear: scales, biases, sinks; by path in the block."""
        paths = tuple(f"{name}." for name in linears_in(self.block))
        return {
            name: parameter
            for name, parameter in self.block.named_parameters()
            if parameter.dim() == 1 and parameter.is_floating_point() and not name.startswith(paths)
        }


def leaves_of(tree: Any) -> list[torch.Tensor]:
    """The tensors of floating point in what a block returns."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def by_sample(x: torch.Tensor, num_samples: int) -> torch.Tensor | None:
    """Returns `[samples, rows, features]`; `None` where rows are not those of samples."""
    rows = math.prod(x.shape[:-1])
    return x.reshape(num_samples, -1, x.shape[-1]) if rows and rows % num_samples == 0 else None


def largest_difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Computes the largest difference of two lists of tensors, relative to the largest number in them."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        scale = max(float(a.abs().max()), float(b.abs().max()), 1e-30) if a.numel() else 1.0
        gap = float((a - b).abs().max()) if a.numel() else 0.0
        worst = max(worst, gap / scale)
        if math.isnan(gap):
            return math.inf
    return worst
