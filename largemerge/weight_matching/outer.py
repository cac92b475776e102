"""What a model computes between the modules that hold its matrices, as a function of what these return.

    y_L: outputs of linears, embeddings, convolutions, experts: made up ──► Outer ──► what each of them reads; outputs

It is to a whole model what `between.py` is to a block. A dimension of a matrix may be permuted if what lies between
follows, whatever the matrix is; so no matrix is needed, however large the model. Norms, class tokens, and other
parameters of their own are there, with made-up values. Blocks that are alike are represented by a few of them.

What a module reads is kept as one number for each feature, Σ_t w_t x_t with random weights w of all other dimensions:
it changes if and only if anything of that feature does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_flatten, tree_unflatten

from largemerge.model.fake_forward import FakeModel, representatives
from largemerge.model.forward import call_model, hand_on, original_forward, replaced_forwards, run_block
from largemerge.model.norms import may_be_norms
from largemerge.model.skeleton import assign_tensors, is_linear
from largemerge.weight_matching.between import linear_sizes

_MAX_ELEMENTS = 1 << 26  # of a parameter that gets made-up values of its own


class Output(NamedTuple):
    """One tensor that a module returns: its path, and the number of the tensor among those that it returns."""

    path: str
    leaf: int


Change = Callable[[torch.Tensor], torch.Tensor]
"""Makes other outputs of a module from those that were made up; features are the last dimension."""


@dataclass(frozen=True)
class Call:
    """What a module was given and returned in the first pass.

    Attributes:
        args: Its arguments by position.
        kwargs: Its arguments by name.
        leaves: What it returned, as a flat list; of tensors that are made up, a tensor of no memory.
        spec: How these make up what it returned.
        feature_axis: The dimension of features in them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    leaves: tuple[Any, ...]
    spec: Any
    feature_axis: int


@dataclass
class Seen:
    """What one pass shows.

    Attributes:
        reads: Module and number of its call → a number for each feature that it reads.
        results: What the model returns, by name.
    """

    reads: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    results: dict[str, torch.Tensor] = field(default_factory=dict)


class Outer:
    """A model without the modules that hold its matrices.

    Args:
        fake: The model with made-up weights, while its context is open.

    Attributes:
        modules: The modules that hold matrices and that a pass calls, by path.
        calls: Their calls.
        raw: Parameters of no such module, by their first name, with made-up values.
        unreached: Names of parameters of modules that no pass calls, in blocks that are run or outside of them.
    """

    def __init__(self, fake: FakeModel) -> None:
        self._fake, self.skeleton = fake, fake.skeleton
        self._inputs = {name: x[-1:] for name, x in fake.inputs.items()}
        self.chosen = [representatives(stack.blocks) for stack in self.skeleton.stacks]
        candidates = _holders(self.skeleton.model, tuple(f"{stack.name}." for stack in self.skeleton.stacks))
        self.calls: dict[str, list[Call]] = {}
        self._run({module: self._recorder(path, module) for path, module in candidates.items()})
        self.modules = {path: candidates[path] for path in self.calls}
        skipped = tuple(
            f"{stack.block_name(index)}."
            for stack, chosen in zip(self.skeleton.stacks, self.chosen, strict=True)
            for index in range(len(stack.blocks))
            if index not in chosen
        )
        holds = {path: {id(p) for p in module.parameters(recurse=False)} for path, module in candidates.items()}
        called = set[int]().union(*(holds[path] for path in self.modules))
        idle = set[int]().union(*holds.values()) - called
        own = {n: p for n, p in self.skeleton.model.named_parameters() if not n.startswith(skipped)}
        generator = torch.Generator().manual_seed(0)
        self.unreached = [name for name, parameter in own.items() if id(parameter) in idle]
        self.raw = {
            name: torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype) + 0.5
            for name, parameter in own.items()
            if id(parameter) not in called | idle and parameter.numel() <= _MAX_ELEMENTS
        }

    def run(
        self,
        changes: Mapping[Output, Change] | None = None,
        parameters: Mapping[str, torch.Tensor] | None = None,
        *,
        transparent: bool = False,
    ) -> Seen:
        """Runs the model once.

        Args:
            changes: Outputs of modules that are not what was made up.
            parameters: Values of `raw` parameters that are not what was made up.
            transparent: Leave out what norms do beside their scale and bias, so that features do not mix.
        """
        seen = Seen()
        forwards: dict[nn.Module, Any] = {}
        if transparent:
            forwards |= {
                module: _without_mixing(module) for module in self.skeleton.model.modules() if _is_leaf(module)
            }
        forwards |= {module: self._answer(path, seen, changes or {}) for path, module in self.modules.items()}
        with self._values({**self.raw, **(parameters or {})}):
            result = self._run(forwards)
        named = result.items() if isinstance(result, Mapping) else enumerate(tree_flatten(result)[0])
        for key, value in named:
            leaves = [leaf for leaf in tree_flatten(value)[0] if _is_float(leaf)]
            seen.results |= {f"{key}" if number == 0 else f"{key}.{number}": x for number, x in enumerate(leaves)}
        return seen

    def outputs(self) -> dict[Output, int]:
        """All tensors of floating point that modules return, with their number of features."""
        return {
            Output(path, number): leaf.shape[calls[0].feature_axis]
            for path, calls in self.calls.items()
            for number, leaf in enumerate(calls[0].leaves)
            if _is_float(leaf) and leaf.dim() > 0
        }

    @contextmanager
    def _values(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        assign_tensors(self.skeleton, tensors)
        try:
            yield
        finally:
            assign_tensors(self.skeleton, {name: self._fake.weights[name] for name in tensors})

    def _run(self, forwards: Mapping[nn.Module, Any]) -> Any:
        """Runs the model, with other forwards of some modules; blocks that are like others hand on what these made."""
        last: dict[int, Any] = {}

        def in_turn(number: int, index: int, block: nn.Module) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if index in self.chosen[number] or number not in last:
                    last[number] = run_block(block, args, kwargs, last.get(number))
                return hand_on(last[number], args, kwargs)

            return forward

        blocks = {
            block: in_turn(number, index, block)
            for number, stack in enumerate(self.skeleton.stacks)
            for index, block in enumerate(stack.blocks)
        }
        with torch.no_grad(), replaced_forwards({**forwards, **blocks}):
            return call_model(self.skeleton, self._inputs)

    def _recorder(self, path: str, module: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if is_linear(module):
                result = torch.empty((*args[0].shape[:-1], linear_sizes(module)[0]), dtype=args[0].dtype)
            else:
                result = original_forward(module)(*args, **kwargs)
            leaves, spec = tree_flatten(result)
            kept = tuple(torch.empty_like(leaf, device="meta") if _is_float(leaf) else leaf for leaf in leaves)
            axis = 1 if isinstance(module, _ConvNd) and result.dim() > 2 else -1
            calls = self.calls.setdefault(path, [])
            given = (args, kwargs) if not is_linear(module) else ((), {})
            calls.append(Call(*given, kept, spec, axis))
            return self._made_up(path, len(calls) - 1, calls[-1], {})

        return forward

    def _answer(self, path: str, seen: Seen, changes: Mapping[Output, Change]) -> Any:
        count = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            number, count = count, count + 1
            given = next((leaf for leaf in tree_flatten((args, kwargs))[0] if _is_float(leaf)), None)
            if given is not None and given.dim() > 0 and not isinstance(self.modules[path], nn.Embedding):
                axis = 1 if isinstance(self.modules[path], _ConvNd) and given.dim() > 2 else -1
                seen.reads[path, number] = _by_feature(given.movedim(axis, -1), _seed(path, number, 0))
            return self._made_up(path, number, self.calls[path][number], changes)

        return forward

    def _made_up(self, path: str, number: int, call: Call, changes: Mapping[Output, Change]) -> Any:
        """Makes up what a module returns: the same numbers in every pass."""
        leaves = []
        for which, leaf in enumerate(call.leaves):
            if not _is_float(leaf):
                leaves.append(leaf)
                continue
            generator = torch.Generator().manual_seed(_seed(path, number, which + 1))
            made = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype)
            change = changes.get(Output(path, which))
            if change is not None:
                made = change(made.movedim(call.feature_axis, -1)).movedim(-1, call.feature_axis)
            leaves.append(made.contiguous())
        return tree_unflatten(leaves, call.spec)


def _holders(model: nn.Module, stacks: tuple[str, ...]) -> dict[str, nn.Module]:
    """Modules that hold matrices: linears, embeddings, convolutions; in blocks others whose matrices are their own."""
    plain = {
        path: module
        for path, module in model.named_modules()
        if is_linear(module) or isinstance(module, nn.Embedding | _ConvNd)
    }
    others = {
        path: module
        for path, module in model.named_modules()
        if path not in plain
        and path.startswith(stacks)
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        and not any(each.startswith(f"{path}.") for each in plain)
    }
    return plain | others


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module may be a norm, or holds nothing at all."""
    return "" in may_be_norms(module) or not (any(True for _ in module.children()) or module.state_dict())


def _without_mixing(module: nn.Module) -> Any:
    """A forward that scales and shifts features as a norm does, and leaves out that it normalises them."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else None
        own = dict(module.named_parameters())
        if not _is_float(x) or any(parameter.shape != x.shape[-1:] for parameter in own.values()):
            return original_forward(module)(*args, **kwargs)
        if not own:
            y = original_forward(module)(*args, **kwargs)
            return x if isinstance(y, torch.Tensor) and y.shape == x.shape else y
        return x * own["weight"] + own.get("bias", 0)

    return forward


def _is_float(leaf: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _seed(path: str, call: int, leaf: int) -> int:
    return zlib.crc32(f"{path} {call} {leaf}".encode())


def _by_feature(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Adds up all rows with random weights, `[features]`, float64."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.float64)
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    return weights @ rows
