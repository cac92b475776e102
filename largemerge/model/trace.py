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
  at a time, and the block's arguments must not change. Those are never loaded;
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
from largemerge.model.fake_forward import InputOutline, SeenBlock, Trial, block_kind, equal_trees, trial_run
from largemerge.model.forward import Output, original_forward, replaced_forwards, run_to_end
from largemerge.model.skeleton import Skeleton, assign_tensors


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
class StackTrace:
    """What the rehearsal saw of one stack.

    Attributes:
        tokens: Name of the input whose tokens the rows are (`input_ids`), `None` for images.
        first: Tensors outside the stacks that matter on the way to the first block.
        later: … to any later block.
        unused: Modules outside the stacks that run on the way to a later block though nobody reads their output.
        unused_inputs: Floating-point inputs whose values no longer matter on the way to a later block.
        roles: By block, the linears in the order in which the forward reaches them.
        output_shapes: By output tensor: its shape for `num_samples` samples of `num_tokens` tokens.
        num_tokens: Rows a sample has in this stack, in the rehearsal.
    """

    tokens: str | None
    first: frozenset[str]
    later: frozenset[str]
    unused: frozenset[str]
    unused_inputs: frozenset[str]
    roles: tuple[tuple[LinearRole, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    num_tokens: int


@dataclass(frozen=True)
class ModelTrace:
    """What the rehearsal saw of the whole model.

    Attributes:
        order: Indices of the stacks, in the order in which they run.
        stacks: By index in the skeleton.
    """

    order: tuple[int, ...]
    stacks: tuple[StackTrace, ...]


def trace_model(skeleton: Skeleton, outline: InputOutline) -> ModelTrace:
    """Proves that the model can be run block by block, and learns what the run needs to know.

    Args:
        skeleton: Parameters on the meta device; they are back there afterwards.
        outline: What the calibration data will give to the forward.

    Raises:
        ArchitectureError: If the model cannot be run on such input, or not block by block.
    """
    with trial_run(skeleton, outline) as trial:
        _compare_resumed(trial)
        stacks = tuple(_trace_stack(trial, index) for index in range(len(skeleton.stacks)))
    return ModelTrace(tuple(trial.order), stacks)


def _compare_resumed(trial: Trial) -> None:
    """Every block that was really run, run again from the output of the one before it: the same, bit for bit."""
    for stack in trial.order:
        for index, expected in trial.seen[stack].items():
            name = trial.skeleton.stacks[stack].block_name(index)
            arguments, output = trial.resume(stack, index)
            if not equal_trees(arguments, expected.arguments) or not equal_trees(output, expected.output):
                raise ArchitectureError(
                    f"{trial.skeleton.class_name}: {name} computes something else when the forward pass is resumed "
                    "there; this model cannot be merged block by block"
                )


def _trace_stack(trial: Trial, stack: int) -> StackTrace:
    blocks = trial.skeleton.stacks[stack].blocks
    seen = trial.seen[stack]
    rows = {number: _rows(trial.seen[number][0].arguments) for number in trial.order}
    roles_by_kind = {block_kind(blocks[index], index): _roles(entry, rows, stack) for index, entry in seen.items()}
    later = [index for index in seen if index > 0]
    matter = [_tensors_that_matter(trial, stack, index) for index in later]
    output = [leaf for leaf in tree_flatten(seen[0].output)[0] if isinstance(leaf, torch.Tensor)]
    tokens = [name for name, x in trial.inputs.items() if name.endswith("input_ids") and tuple(x.shape) == rows[stack]]
    return StackTrace(
        tokens=tokens[0] if tokens else None,
        first=_tensors_that_matter(trial, stack, 0),
        later=frozenset().union(*matter),
        unused=_unused_modules(trial, stack, later),
        unused_inputs=_unused_inputs(trial, stack, later),
        roles=tuple(roles_by_kind[block_kind(block, index)] for index, block in enumerate(blocks)),
        output_shapes=tuple(tuple(leaf.shape) for leaf in output),
        num_tokens=rows[stack][1],
    )


def _rows(arguments: Any) -> tuple[int, int]:
    """Samples and tokens of a stack, from the hidden states that its first block is given."""
    args, kwargs = arguments
    tensors = [leaf for leaf in [*args, *kwargs.values()] if isinstance(leaf, torch.Tensor) and leaf.dim() >= 3]
    hidden_states = kwargs.get("hidden_states", args[0] if args else tensors[0])
    return hidden_states.shape[0], hidden_states[0, ..., 0].numel()


def _roles(entry: SeenBlock, rows: Mapping[int, tuple[int, int]], own: int) -> tuple[LinearRole, ...]:
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


def needed_at_end(
    skeleton: Skeleton,
    order: Sequence[int],
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[int, Output],
) -> frozenset[str]:
    """Finds the parameters outside the stacks that are read after the last block of the first stack to run.

    Args:
        skeleton: Its parameters outside the stacks may hold anything, on the device of the inputs.
        order: The stacks in the order in which they run.
        inputs: The forward arguments.
        outputs: By stack: what its last block returned.

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


def _tensors_that_matter(trial: Trial, stack: int, index: int) -> frozenset[str]:
    """Outside tensors whose values reach the block's arguments: those that show when they are poisoned."""
    skeleton = trial.skeleton
    non_block = set(skeleton.non_block_tensors())
    names = {id(parameter): name for name, parameter in skeleton.model.named_parameters()}
    with _ReadParameters(names) as mode:
        expected, _ = trial.resume(stack, index, run_block=False)
    matter = set()
    for name in sorted(mode.read & non_block):
        fake = trial.fake[name]
        assign_tensors(skeleton, {name: fake.new_full((), float("nan")).expand(fake.shape)})
        try:
            arguments, _ = trial.resume(stack, index, run_block=False)
        finally:
            assign_tensors(skeleton, {name: fake})
        if not equal_trees(arguments, expected):
            matter.add(name)
    return frozenset(matter)


def _unused_modules(trial: Trial, stack: int, blocks: Sequence[int]) -> frozenset[str]:
    """Leaf modules whose output, replaced by NaN, changes nothing in the arguments of any of the blocks."""
    skeleton = trial.skeleton
    prefixes = tuple(each.name + "." for each in skeleton.stacks)
    leaves = {
        name: module
        for name, module in skeleton.model.named_modules()
        if not name.startswith(prefixes) and not list(module.children()) and list(module.parameters())
    }
    expected = {index: trial.resume(stack, index, run_block=False)[0] for index in blocks}

    def unread(names: Sequence[str]) -> bool:
        called: list[nn.Module] = []
        with replaced_forwards({leaves[name]: _poisoned(leaves[name], called) for name in names}):
            same = [equal_trees(trial.resume(stack, index, run_block=False)[0], expected[index]) for index in blocks]
        return all(same) and len(called) >= len(names)

    unused = [name for name in leaves if blocks and unread([name])]
    return frozenset(unused) if unused and unread(unused) else frozenset()


def _unused_inputs(trial: Trial, stack: int, blocks: Sequence[int]) -> frozenset[str]:
    """Floating-point inputs that, replaced by NaN, change nothing in the arguments of any of the blocks."""
    floating = [name for name, tensor in trial.inputs.items() if tensor.is_floating_point()]

    def unread(name: str) -> bool:
        nan = torch.full_like(trial.inputs[name], float("nan"))
        inputs = {**trial.inputs, name: nan}
        resumed = [trial.resume(stack, index, run_block=False, inputs=inputs)[0] for index in blocks]
        expected = [trial.resume(stack, index, run_block=False)[0] for index in blocks]
        return all(equal_trees(*pair) for pair in zip(resumed, expected, strict=True))

    return frozenset(name for name in floating if blocks and unread(name))


def _poisoned(module: nn.Module, called: list[nn.Module]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(module)
        output = original_forward(module)(*args, **kwargs)
        return output.new_full((), float("nan")).expand(output.shape)

    return forward
