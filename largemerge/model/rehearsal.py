"""A rehearsal of the block-by-block run before any weight is read.

The real config, at its real widths, is run on a sample of made-up input with made-up weights that cost no
memory (all of them are overlapping views of one short vector). Two runs are compared bit for bit: the plain
forward pass, and the pass resumed at a block. A model that fails here cannot be split, and is refused
before the long work. Blocks that are alike are represented by a few of them; the others pass their input
on, in both runs.

The rehearsal also finds out what no table could tell for every architecture:

- in which order the stacks run,
- which linears read the same tensor (they share one Gram matrix),
- whose padding mask applies to the rows of a linear (a decoder's cross-attention reads encoder rows),
- which parameters outside the stacks matter on the way to a block: all others are poisoned with NaN one
  at a time, and the block's arguments must not change. Those are never loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from largemerge.errors import ArchitectureError
from largemerge.model.forward import Output, original_forward, replaced_forwards, resumed_at
from largemerge.model.skeleton import Skeleton, assign_tensors, linears_in

NUM_SAMPLES = 2
NUM_TOKENS = 7
NUM_DECODER_TOKENS = 5

InputOutline = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Forward argument → (shape of one sample, dtype)."""


@dataclass(frozen=True)
class LinearRole:
    """What the rehearsal saw of one linear.

    Attributes:
        name: Path inside the block.
        group: The first linear that reads the very same tensor.
        rows: Stack whose tokens the rows of the input are; `None` if they are no one's (windows, routed tokens).
    """

    name: str
    group: str
    rows: int | None


@dataclass(frozen=True)
class StackRehearsal:
    """What the rehearsal saw of one stack.

    Attributes:
        tokens: Name of the input whose tokens the rows are (`input_ids`), `None` for images.
        first: Tensors outside the stacks that matter on the way to the first block.
        later: … to any later block.
        roles: By block, the linears in the order in which the forward reaches them.
        output_shapes: By output tensor: its shape for `num_samples` samples of `num_tokens` tokens.
        num_tokens: Rows a sample has in this stack, in the rehearsal.
    """

    tokens: str | None
    first: frozenset[str]
    later: frozenset[str]
    roles: tuple[tuple[LinearRole, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    num_tokens: int


@dataclass(frozen=True)
class Rehearsal:
    """Attributes:
    order: Indices of the stacks, in the order in which they run.
    stacks: By index in the skeleton.
    """

    order: tuple[int, ...]
    stacks: tuple[StackRehearsal, ...]


@dataclass
class _Seen:
    """One block in the plain pass: the arguments it got, what it returned, which linears read what."""

    arguments: Any
    output: Output
    linears: list[tuple[str, torch.Tensor]]


def rehearse(skeleton: Skeleton, outline: InputOutline) -> Rehearsal:
    """Proves that the model can be run block by block, and learns what the run needs to know.

    Args:
        skeleton: Parameters on the meta device; they are back there afterwards.
        outline: What the calibration data will give to the forward.

    Raises:
        ArchitectureError: If the model cannot be run on such input, or not block by block.
    """
    inputs = make_inputs(skeleton, outline)
    fake = _fake_weights(skeleton)
    with assigned(skeleton, fake), torch.no_grad():
        chosen = [_representatives(stack.blocks) for stack in skeleton.stacks]
        seen, order = _plain_pass(skeleton, inputs, chosen)
        _compare_resumed(skeleton, inputs, seen, order)
        stacks = tuple(
            _stack_rehearsal(skeleton, inputs, fake, seen, order, index) for index in range(len(skeleton.stacks))
        )
    return Rehearsal(tuple(order), stacks)


def make_inputs(skeleton: Skeleton, outline: InputOutline) -> dict[str, torch.Tensor]:
    """A few made-up samples: short token sequences with some padding, random pixels."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(skeleton.model.config.get_text_config(), "vocab_size", None) or 2
    inputs = {}
    for name, (shape, dtype) in outline.items():
        if dtype.is_floating_point:
            inputs[name] = torch.randn(NUM_SAMPLES, *shape, generator=generator)
            continue
        length = NUM_DECODER_TOKENS if name.startswith("decoder_") else NUM_TOKENS
        shape = (NUM_SAMPLES, min(shape[0], length), *shape[1:]) if shape else (NUM_SAMPLES,)
        if name.endswith("input_ids"):
            inputs[name] = torch.randint(min(3, vocabulary - 1), vocabulary, shape, generator=generator)
        elif name.endswith("attention_mask"):
            inputs[name] = torch.ones(shape, dtype=dtype)
            inputs[name][0, -1:] = 0
        elif name.endswith("position_ids"):
            inputs[name] = torch.arange(shape[1]).expand(shape).clone()
        else:
            inputs[name] = torch.zeros(shape, dtype=dtype)
    return inputs


def _fake_weights(skeleton: Skeleton) -> dict[str, torch.Tensor]:
    """For every parameter a view of one random vector: element (i, j) is the vector's (i + j)-th from a start."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.named_parameters()}
    longest = max(sum(shape) + 1 for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(longest + 997, generator=generator) * 0.05
    starts = torch.randint(0, 997, (len(shapes),), generator=generator).tolist()
    return {
        name: vector.as_strided(shape, (1,) * len(shape), start)
        for (name, shape), start in zip(shapes.items(), starts, strict=True)
    }


@contextmanager
def assigned(skeleton: Skeleton, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Gives the model tensors for a while; afterwards its parameters are on the meta device again."""
    assign_tensors(skeleton, tensors)
    try:
        yield
    finally:
        assign_tensors(skeleton, {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()})


def _representatives(blocks: tuple[nn.Module, ...]) -> set[int]:
    """The first, second and last block of every kind."""
    kinds: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        kinds.setdefault(_kind(block, index), []).append(index)
    return {0} | {index for members in kinds.values() for index in (*members[:2], members[-1])}


def _kind(block: nn.Module, index: int) -> str:
    """Equal for blocks that compute alike: same modules, same plain attributes but for the block's own number."""
    plain = [
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | float | str) or (isinstance(value, int) and value != index)
    ]
    return f"{block!r} {plain!r}"


def _plain_pass(
    skeleton: Skeleton, inputs: Mapping[str, torch.Tensor], chosen: list[set[int]]
) -> tuple[list[dict[int, _Seen]], list[int]]:
    seen: list[dict[int, _Seen]] = [{} for _ in skeleton.stacks]
    order: list[int] = []
    runs: dict[tuple[int, int], int] = {}

    def recorder(stack: int, index: int, block: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Output:
            if stack not in order:
                order.append(stack)
            runs[stack, index] = runs.get((stack, index), 0) + 1
            if index not in chosen[stack]:
                return next(reversed(seen[stack].values())).output
            arguments = _copied((args, kwargs))
            with _recorded_linears(block) as linears:
                output = original_forward(block)(*args, **kwargs)
            seen[stack][index] = _Seen(arguments, output, linears)
            return output

        return forward

    forwards = {
        block: recorder(number, index, block)
        for number, stack in enumerate(skeleton.stacks)
        for index, block in enumerate(stack.blocks)
    }
    try:
        with replaced_forwards(forwards):
            skeleton.model(**inputs)
    except Exception as error:
        raise _cannot(skeleton, inputs, error) from error
    _check_runs(skeleton, runs)
    return seen, order


def _cannot(skeleton: Skeleton, inputs: Mapping[str, torch.Tensor], error: Exception) -> ArchitectureError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ArchitectureError(
        f"{skeleton.class_name}: cannot be run on calibration inputs {sorted(inputs)}: {text}; "
        f"its forward takes {sorted(skeleton.forward_arguments())}"
    )


def _check_runs(skeleton: Skeleton, runs: Mapping[tuple[int, int], int]) -> None:
    problems = []
    for number, stack in enumerate(skeleton.stacks):
        counts = [runs.get((number, index), 0) for index in range(len(stack.blocks))]
        if set(counts) != {1}:
            problems.append(
                f"{skeleton.class_name}: one forward pass on this calibration data runs the blocks of {stack.name} "
                f"{counts} times, expected once each; if it is no stack of blocks, name the stacks in the config (stacks: [...])"
            )
    if problems:
        raise ArchitectureError(*problems)


@contextmanager
def _recorded_linears(block: nn.Module) -> Iterator[list[tuple[str, torch.Tensor]]]:
    record: list[tuple[str, torch.Tensor]] = []
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: record.append((name, args[0])))
        for name, linear in linears_in(block).items()
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _compare_resumed(
    skeleton: Skeleton, inputs: Mapping[str, torch.Tensor], seen: list[dict[int, _Seen]], order: list[int]
) -> None:
    """Every block that was really run, run again from the output of the one before it: the same, bit for bit."""
    for stack in order:
        for index, expected in seen[stack].items():
            name = skeleton.stacks[stack].block_name(index)
            arguments, output = _resume(skeleton, inputs, seen, order, stack, index)
            if not _equal(arguments, expected.arguments) or not _equal(output, expected.output):
                raise ArchitectureError(
                    f"{skeleton.class_name}: {name} computes something else when the forward pass is resumed there; "
                    "this model cannot be merged block by block"
                )


def _resume(
    skeleton: Skeleton,
    inputs: Mapping[str, torch.Tensor],
    seen: list[dict[int, _Seen]],
    order: list[int],
    stack: int,
    index: int,
    *,
    run_block: bool = True,
) -> tuple[Any, Output]:
    """The arguments of a block in a resumed pass, and its output if it is run."""
    outputs = {earlier: list(seen[earlier].values())[-1].output for earlier in order[: order.index(stack)]}
    before = [seen[stack][number].output for number in seen[stack] if number < index]
    if before:
        outputs[stack] = before[-1]
    caught: list[Any] = []

    def visit(*args: Any, **kwargs: Any) -> None:
        caught.append(_copied((args, kwargs)))
        if run_block:
            caught.append(original_forward(skeleton.stacks[stack].blocks[index])(*args, **kwargs))

    with resumed_at(skeleton, stack, index) as run:
        run(inputs, outputs, visit)
    return caught[0], caught[1] if run_block else None


def _copied(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _equal(left: Any, right: Any) -> bool:
    tensors = [[leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)] for tree in (left, right)]
    if len(tensors[0]) != len(tensors[1]):
        return False
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(*tensors, strict=True)
    )  # fmt: skip


def _stack_rehearsal(
    skeleton: Skeleton,
    inputs: Mapping[str, torch.Tensor],
    fake: Mapping[str, torch.Tensor],
    seen: list[dict[int, _Seen]],
    order: list[int],
    stack: int,
) -> StackRehearsal:
    blocks = skeleton.stacks[stack].blocks
    rows = {number: _rows(seen[number][0].arguments) for number in order}
    by_kind = {_kind(blocks[index], index): _roles(entry, rows, stack) for index, entry in seen[stack].items()}
    later = [index for index in seen[stack] if index > 0]
    matter = [_tensors_that_matter(skeleton, inputs, fake, seen, order, stack, index) for index in later]
    output = tree_flatten(seen[stack][0].output)[0]
    num_tokens = rows[stack][1]
    names = [name for name in inputs if name.endswith("input_ids") and inputs[name].shape == rows[stack]]
    return StackRehearsal(
        tokens=names[0] if names else None,
        first=_tensors_that_matter(skeleton, inputs, fake, seen, order, stack, 0),
        later=frozenset().union(*matter),
        roles=tuple(by_kind[_kind(block, index)] for index, block in enumerate(blocks)),
        output_shapes=tuple(tuple(leaf.shape) for leaf in output if isinstance(leaf, torch.Tensor)),
        num_tokens=num_tokens,
    )


def _rows(arguments: Any) -> tuple[int, int]:
    """Samples and tokens of a stack, from the hidden states that its first block is given."""
    args, kwargs = arguments
    tensors = [leaf for leaf in [*args, *kwargs.values()] if isinstance(leaf, torch.Tensor) and leaf.dim() >= 3]
    hidden_states = kwargs.get("hidden_states", args[0] if args else tensors[0])
    return hidden_states.shape[0], hidden_states[0, ..., 0].numel()


def _roles(entry: _Seen, rows: Mapping[int, tuple[int, int]], own: int) -> tuple[LinearRole, ...]:
    leaders: list[tuple[str, torch.Tensor]] = []
    roles = []
    called = [name for name, _ in entry.linears]
    for name, read in entry.linears:
        if called.count(name) > 1:
            continue  # several times in one pass: its rows are not one tensor's
        leader = next((first for first, tensor in leaders if _same_memory(tensor, read)), None)
        if leader is None:
            leaders.append((name, read))
        roles.append(LinearRole(name, leader or name, _whose_rows(read, rows, own)))
    return tuple(roles)


def _same_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left is right or (
        left.data_ptr() == right.data_ptr() and left.shape == right.shape and left.stride() == right.stride()
    )


def _whose_rows(read: torch.Tensor, rows: Mapping[int, tuple[int, int]], own: int) -> int | None:
    leading = tuple(read.shape[:-1])
    for stack in (own, *rows):
        if leading == rows[stack] or leading == (rows[stack][0] * rows[stack][1],):
            return stack
    return None


class _ReadParameters(TorchFunctionMode):
    """Notes which of the model's parameters any torch function is given."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.read: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_flatten((args, kwargs or {}))[0]:
            if isinstance(leaf, torch.Tensor) and id(leaf) in self.names:
                self.read.add(self.names[id(leaf)])
        return func(*args, **(kwargs or {}))


def _tensors_that_matter(
    skeleton: Skeleton,
    inputs: Mapping[str, torch.Tensor],
    fake: Mapping[str, torch.Tensor],
    seen: list[dict[int, _Seen]],
    order: list[int],
    stack: int,
    index: int,
) -> frozenset[str]:
    """Outside tensors whose values reach the block's arguments: those that show when they are poisoned."""
    outside = set(skeleton.outside_tensors())
    names = {id(parameter): name for name, parameter in skeleton.model.named_parameters()}
    with _ReadParameters(names) as mode:
        expected, _ = _resume(skeleton, inputs, seen, order, stack, index, run_block=False)
    matter = set()
    for name in sorted(mode.read & outside):
        poison = fake[name].new_full((), float("nan")).expand(fake[name].shape)
        assign_tensors(skeleton, {name: poison})
        try:
            arguments, _ = _resume(skeleton, inputs, seen, order, stack, index, run_block=False)
        finally:
            assign_tensors(skeleton, {name: fake[name]})
        if not _equal(arguments, expected):
            matter.add(name)
    return frozenset(matter)
