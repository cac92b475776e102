"""Traces a model before any weight is read: proves that it can be run block by block, and learns what a block reads.

The real config, at its real widths, is run on made-up input with made-up weights that cost no memory (see
`fake_forward.py`). Two passes are compared bit for bit: the plain forward pass, and the pass resumed at a block. A
model that fails here cannot be split, and is refused before the long work.

    fake forward passes ──► trace_model ──► ModelTrace: one StackTrace a stack, one LinearRole a linear

The trace also holds what no table could tell for every architecture:

- in which order the stacks run,
- which linears read the same tensor (they share one Gram matrix),
- whose padding mask applies to the rows of a linear (a decoder's cross-attention reads encoder rows),
- which parameters outside the stacks are needed on the way to a block: each is filled with NaN in turn, and those
  that leave the block's arguments as they were are never loaded,
- which modules outside the stacks (a patch embedding) run again on the way to every later block though
  nobody reads what they compute, and which inputs (pixels) nobody reads any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from largemerge.errors import ArchitectureError
from largemerge.model.fake_forward import BlockRecord, FakeModel, InputOutline, block_kind, equal_trees, fake_model
from largemerge.model.forward import Output, original_forward, replaced_forwards, run_to_end
from largemerge.model.skeleton import Skeleton, assign_tensors


@dataclass(frozen=True)
class LinearRole:
    """What one linear reads.

    Attributes:
        name: Path of the linear in its block.
        group: Path of the first linear that reads the very same tensor.
        token_stack: Stack whose tokens the rows of the input are; `None` if they are no stack's (windows, routed
            tokens).
    """

    name: str
    group: str
    token_stack: int | None


@dataclass(frozen=True)
class StackTrace:
    """What the blocks of one stack read, and what they return.

    Attributes:
        token_input: Name of the input whose tokens the rows are (`input_ids`); `None` for images.
        needed_by_first: Names of the tensors outside the stacks that are needed on the way to the first block.
        needed_by_later: Names of the tensors outside the stacks that are needed on the way to any later block.
        unused_modules: Modules outside the stacks that run on the way to a later block though nobody reads their
            output.
        unused_inputs: Floating-point inputs whose values nobody reads on the way to a later block.
        roles: The linears of each block in the order in which the forward reaches them.
        output_shapes: Shapes of a block's output tensors, for the trace's samples of `num_tokens` tokens.
        num_tokens: Rows that one sample has in this stack, in the trace.
    """

    token_input: str | None
    needed_by_first: frozenset[str]
    needed_by_later: frozenset[str]
    unused_modules: frozenset[str]
    unused_inputs: frozenset[str]
    roles: tuple[tuple[LinearRole, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    num_tokens: int


@dataclass(frozen=True)
class ModelTrace:
    """What a forward pass of a model reads, and in which order its stacks run.

    Attributes:
        order: Indices of the stacks in the order in which they run.
        stacks: Traces of the stacks in the order of the skeleton.
    """

    order: tuple[int, ...]
    stacks: tuple[StackTrace, ...]


def trace_model(skeleton: Skeleton, outline: InputOutline) -> ModelTrace:
    """Proves that the model can be run block by block, and learns what the run needs to know.

    Args:
        skeleton: The model, parameters on the meta device; they are back there afterwards.
        outline: Shapes and dtypes of the forward arguments that the calibration data will give.

    Raises:
        ArchitectureError: If the model cannot be run on such input, or not block by block.
    """
    with fake_model(skeleton, outline) as fake:
        _compare_resumed(fake)
        stacks = tuple(_trace_stack(fake, index) for index in range(len(skeleton.stacks)))
    return ModelTrace(tuple(fake.order), stacks)


def _compare_resumed(fake: FakeModel) -> None:
    """Runs every recorded block again from the output of the one before it; raises unless bits are the same."""
    for stack in fake.order:
        for index, expected in fake.records[stack].items():
            name = fake.skeleton.stacks[stack].block_name(index)
            arguments, output = fake.resume(stack, index)
            if not equal_trees(arguments, expected.arguments) or not equal_trees(output, expected.output):
                raise ArchitectureError(
                    f"{fake.skeleton.class_name}: {name} computes something else when the forward pass is resumed "
                    "there; this model cannot be merged block by block"
                )


def _trace_stack(fake: FakeModel, stack: int) -> StackTrace:
    blocks = fake.skeleton.stacks[stack].blocks
    records = fake.records[stack]
    rows = {number: _samples_and_tokens(fake.records[number][0].arguments) for number in fake.order}
    roles_by_kind = {block_kind(blocks[index], index): _roles(entry, rows, stack) for index, entry in records.items()}
    later = [index for index in records if index > 0]
    needed = [_needed_tensors(fake, stack, index) for index in later]
    output = [leaf for leaf in tree_flatten(records[0].output)[0] if isinstance(leaf, torch.Tensor)]
    tokens = [name for name, x in fake.inputs.items() if name.endswith("input_ids") and tuple(x.shape) == rows[stack]]
    return StackTrace(
        token_input=tokens[0] if tokens else None,
        needed_by_first=_needed_tensors(fake, stack, 0),
        needed_by_later=frozenset().union(*needed),
        unused_modules=_unused_modules(fake, stack, later),
        unused_inputs=_unused_inputs(fake, stack, later),
        roles=tuple(roles_by_kind[block_kind(block, index)] for index, block in enumerate(blocks)),
        output_shapes=tuple(tuple(leaf.shape) for leaf in output),
        num_tokens=rows[stack][1],
    )


def _samples_and_tokens(arguments: Any) -> tuple[int, int]:
    """Number of samples and of tokens in a stack, from the hidden states that its first block is given."""
    args, kwargs = arguments
    tensors = [leaf for leaf in [*args, *kwargs.values()] if isinstance(leaf, torch.Tensor) and leaf.dim() >= 3]
    hidden_states = kwargs.get("hidden_states", args[0] if args else tensors[0])
    return hidden_states.shape[0], hidden_states[0, ..., 0].numel()


def _roles(entry: BlockRecord, rows: Mapping[int, tuple[int, int]], own: int) -> tuple[LinearRole, ...]:
    """Says what each linear of a block of stack `own` reads."""
    leaders: list[tuple[str, torch.Tensor]] = []
    roles = []
    called = [name for name, _ in entry.linears]
    for name, read in entry.linears:
        if called.count(name) > 1:
            continue  # several times in one pass: its rows are not one tensor's
        leader = next((first for first, tensor in leaders if _same_memory(tensor, read)), None)
        if leader is None:
            leaders.append((name, read))
        roles.append(LinearRole(name, leader or name, _token_stack(read, rows, own)))
    return tuple(roles)


def _same_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left is right or (
        left.data_ptr() == right.data_ptr() and left.shape == right.shape and left.stride() == right.stride()
    )


def _token_stack(read: torch.Tensor, rows: Mapping[int, tuple[int, int]], own: int) -> int | None:
    """The stack whose samples and tokens a linear's input has; `own` is asked first."""
    leading = tuple(read.shape[:-1])
    for stack in (own, *rows):
        if leading == rows[stack] or leading == (rows[stack][0] * rows[stack][1],):
            return stack
    return None


class _ReadParameters(TorchFunctionMode):
    """Notes which parameters are passed to any torch function.

    Attributes:
        names: Parameter id → name.
        read: Names that were noted.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.read: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_flatten((args, kwargs or {}))[0]:
            if isinstance(leaf, torch.Tensor) and id(leaf) in self.names:
                self.read.add(self.names[id(leaf)])
        return func(*args, **(kwargs or {}))


def needed_at_end(
    skeleton: Skeleton,
    order: Sequence[int],
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[int, Output],
) -> frozenset[str]:
    """Finds the parameters outside the stacks that are read after the last block of the first stack to run.

    Args:
        skeleton: The model; its parameters outside the stacks may hold anything, on the device of the inputs.
        order: Indices of the stacks in the order in which they run.
        inputs: The forward arguments.
        outputs: Stack index → what its last block returned.

    Returns:
        Names of final norms, heads and the like; with several stacks also what the others read on their way.
    """
    non_block = set(skeleton.non_block_tensors())
    mode = _ReadParameters({id(parameter): name for name, parameter in skeleton.model.named_parameters()})
    last = skeleton.stacks[order[0]].blocks[-1]

    def answer_and_forget(*args: Any, **kwargs: Any) -> Output:
        mode.read.clear()
        return outputs[order[0]]

    replaced: dict[nn.Module, Callable[..., Any]] = {last: answer_and_forget}
    model: Any = skeleton.model
    head = model.get_output_embeddings()
    read = set[str]()
    if isinstance(head, nn.Linear):  # its product would be as large as the logits, and only its names are wanted
        read = {mode.names[id(parameter)] for parameter in head.parameters()}
        replaced[head] = lambda x: x[..., :1].expand(*x.shape[:-1], head.out_features)
    with mode:
        run_to_end(skeleton, inputs, outputs, replaced)
    return frozenset((read | mode.read) & non_block)


def _needed_tensors(fake: FakeModel, stack: int, index: int) -> frozenset[str]:
    """Tensors outside the stacks whose values reach a block's arguments: filled with NaN, they change those."""
    skeleton = fake.skeleton
    non_block = set(skeleton.non_block_tensors())
    names = {id(parameter): name for name, parameter in skeleton.model.named_parameters()}
    with _ReadParameters(names) as mode:
        expected, _ = fake.resume(stack, index, run_block=False)
    needed = set()
    for name in sorted(mode.read & non_block):
        weight = fake.weights[name]
        assign_tensors(skeleton, {name: weight.new_full((), float("nan")).expand(weight.shape)})
        try:
            arguments, _ = fake.resume(stack, index, run_block=False)
        finally:
            assign_tensors(skeleton, {name: weight})
        if not equal_trees(arguments, expected):
            needed.add(name)
    return frozenset(needed)


def _unused_modules(fake: FakeModel, stack: int, blocks: Sequence[int]) -> frozenset[str]:
    """Leaf modules whose output changes nothing in the arguments of the blocks when it is NaN."""
    skeleton = fake.skeleton
    prefixes = tuple(each.name + "." for each in skeleton.stacks)
    leaves = {
        name: module
        for name, module in skeleton.model.named_modules()
        if not name.startswith(prefixes) and not list(module.children()) and list(module.parameters())
    }
    expected = {index: fake.resume(stack, index, run_block=False)[0] for index in blocks}

    def unread(names: Sequence[str]) -> bool:
        called: list[nn.Module] = []
        with replaced_forwards({leaves[name]: _nan_forward(leaves[name], called) for name in names}):
            same = [equal_trees(fake.resume(stack, index, run_block=False)[0], expected[index]) for index in blocks]
        return all(same) and len(called) >= len(names)

    unused = [name for name in leaves if blocks and unread([name])]
    return frozenset(unused) if unused and unread(unused) else frozenset()


def _unused_inputs(fake: FakeModel, stack: int, blocks: Sequence[int]) -> frozenset[str]:
    """Floating-point inputs that change nothing in the arguments of the blocks when they are NaN."""
    floating = [name for name, tensor in fake.inputs.items() if tensor.is_floating_point()]

    def unread(name: str) -> bool:
        nan = torch.full_like(fake.inputs[name], float("nan"))
        inputs = {**fake.inputs, name: nan}
        resumed = [fake.resume(stack, index, run_block=False, inputs=inputs)[0] for index in blocks]
        expected = [fake.resume(stack, index, run_block=False)[0] for index in blocks]
        return all(equal_trees(*pair) for pair in zip(resumed, expected, strict=True))

    return frozenset(name for name in floating if blocks and unread(name))


def _nan_forward(module: nn.Module, called: list[nn.Module]) -> Callable[..., Any]:
    """Makes a forward that returns NaN in the shape of the module's output, and notes that it was called."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(module)
        output = original_forward(module)(*args, **kwargs)
        return output.new_full((), float("nan")).expand(output.shape)

    return forward
