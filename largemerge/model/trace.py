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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from largemerge.errors import ArchitectureError, LargemergeError
from largemerge.model.fake_forward import (
    NUM_SAMPLES,
    BlockRecord,
    Examples,
    FakeModel,
    InputOutline,
    block_kind,
    equal_trees,
    fake_model,
    placeholder_tokens,
)
from largemerge.model.forward import (
    KeptOutputs,
    Output,
    hand_on,
    original_forward,
    replaced_forwards,
    run_to_end,
)
from largemerge.model.inside_block import Residual, ResumePoint, find_residuals, find_resume_points
from largemerge.model.norms import is_norm, may_be_norms
from largemerge.model.skeleton import Skeleton, assign_tensors, linears_in

_Found = TypeVar("_Found", bound=Mapping[str, Any])


@dataclass(frozen=True)
class LinearRole:
    """What one linear reads, or one norm.

    Attributes:
        name: Path of the linear in its block.
        group: Path of the first linear that reads the very same tensor.
        token_stack: Stack whose tokens the rows of the input are; `None` if they are no stack's (windows, routed
            tokens).
        calls: How often one forward pass of the model calls the linear.
        tokens_first: Whether the input lies `[tokens, samples, in]`.
    """

    name: str
    group: str
    token_stack: int | None
    calls: int = 1
    tokens_first: bool = False


@dataclass(frozen=True)
class StackTrace:
    """What the blocks of one stack read, and what they return.

    Attributes:
        token_input: Name of the input whose tokens the rows are (`input_ids`); `None` for images.
        unmatched: Whether the rows depend on tokens with a padding mask, and yet are not those of any input, so that
            the mask does not fit (pooled tokens).
        needed_by_first: Names of the tensors outside the stacks that are needed on the way to the first block.
        needed_by_later: Names of the tensors outside the stacks that are needed on the way to any later block.
        unused_modules: Modules outside the stacks that run on the way to a later block though nobody reads their
            output.
        unused_inputs: Floating-point inputs whose values nobody reads on the way to a later block.
        roles: The linears of each block in the order in which the forward reaches them.
        output_shapes: Shapes of a block's output tensors, for the trace's samples of `num_tokens` tokens.
        num_tokens: Rows that one sample has in this stack, in the trace.
        kept: Blocks whose output later stacks read, beside the last one's.
        residuals: Of each block, linear → the tensor to which its output is added; empty where nobody asked.
        resume_points: Of each block, first linear of those that read one tensor → how a run is taken up there.
        runs: How often each block runs in one forward pass: 0 where the calibration data does not reach it.
        norms: Of each block, path of a norm → what it reads; empty where nobody asked.
    """

    token_input: str | None
    unmatched: bool
    needed_by_first: frozenset[str]
    needed_by_later: frozenset[str]
    unused_modules: frozenset[str]
    unused_inputs: frozenset[str]
    roles: tuple[tuple[LinearRole, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    num_tokens: int
    runs: tuple[int, ...]
    kept: frozenset[int] = frozenset()
    residuals: tuple[Mapping[str, Residual], ...] = ()
    resume_points: tuple[Mapping[str, ResumePoint], ...] = ()
    norms: tuple[Mapping[str, LinearRole], ...] = ()


@dataclass(frozen=True)
class EndTrace:
    """What comes after the blocks: final norms, pooling, projections, the head.

    Attributes:
        roles: Linears that run there once, and whose output reaches no later block, in the order in which they run, and
            a head that is tied to the embedding; a `token_stack` of `None` stands for one row by sample, or of images.
        needed: Names of the parameters outside the stacks that are read there.
    """

    roles: tuple[LinearRole, ...]
    needed: frozenset[str]


@dataclass(frozen=True)
class ModelTrace:
    """What a forward pass of a model reads, and in which order its stacks run.

    Attributes:
        order: Indices of the stacks that run, in the order in which they do.
        stacks: Traces of the stacks in the order of the skeleton.
        end: Trace of what comes after the blocks.
    """

    order: tuple[int, ...]
    stacks: tuple[StackTrace, ...]
    end: EndTrace


def trace_model(
    skeleton: Skeleton,
    outline: InputOutline,
    examples: Examples | None = None,
    where: str = "",
    *,
    inside: bool = False,
    norms: bool = False,
) -> ModelTrace:
    """Proves that the model can be run block by block, and learns what the run needs to know.

    Args:
        skeleton: The model, parameters on the meta device; they are back there afterwards.
        outline: Shapes and dtypes of the forward arguments that the calibration data will give.
        examples: Integers of the first samples, where images or sounds stand beside tokens.
        where: Candidate and data that the outline is of, for messages.
        inside: Whether to look into the blocks, too, for runs from linear to linear.
        norms: Whether to find the norms in the blocks, and what they read.

    Raises:
        ArchitectureError: If the model cannot be run on such input, or not block by block.
    """
    with fake_model(skeleton, outline, examples or {}, where) as fake:
        try:
            _find_kept(fake)
            _compare_resumed(fake)
            depending = _depending_on_tokens(fake)
            stacks = tuple(
                _trace_stack(fake, index, depending, inside=inside, norms=norms)
                if index in fake.order
                else _unused_stack(len(stack.blocks))
                for index, stack in enumerate(skeleton.stacks)
            )
            end = _trace_end(fake, stacks)
        except LargemergeError:
            raise
        except Exception as error:  # whatever a model's code raises when it is resumed in the middle
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ArchitectureError(
                f"{skeleton.class_name}: the forward pass cannot be resumed at a block ({type(error).__name__}: "
                f"{reason}); this model cannot be merged block by block: use a method that needs no data"
            ) from error
    return ModelTrace(tuple(fake.order), stacks, end)


def _find_kept(fake: FakeModel) -> None:
    """Finds the blocks whose output later stacks read though others run after them: filled with NaN, it shows."""
    for position, stack in enumerate(fake.order[1:], 1):
        expected = fake.records[stack][0].arguments
        if equal_trees(fake.resume(stack, 0, run_block_too=False)[0], expected):
            continue
        for earlier in fake.order[:position]:
            ran = [index for of, index in fake.runs if of == earlier]
            before = fake.kept.get(earlier, frozenset())
            fake.kept[earlier] = frozenset(ran)
            everything, _ = fake.resume(stack, 0, run_block_too=False)
            fake.kept[earlier] = (
                frozenset(
                    index
                    for index in ran[:-1]
                    if not equal_trees(
                        fake.resume(
                            stack, 0, run_block_too=False, earlier_outputs={earlier: fake.outputs(earlier, but=index)}
                        )[0],
                        everything,
                    )
                )
                | before
            )


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


def _unused_stack(num_blocks: int) -> StackTrace:
    """The trace of a stack that the calibration data does not reach, such as a vision tower where all is text."""
    nothing = frozenset[str]()
    return StackTrace(None, False, nothing, nothing, nothing, nothing, ((),) * num_blocks, (), 0, (0,) * num_blocks)


def _trace_stack(fake: FakeModel, stack: int, depending: frozenset[int], *, inside: bool, norms: bool) -> StackTrace:
    blocks = fake.skeleton.stacks[stack].blocks
    records = fake.records[stack]
    assert 0 in records, "the first block of a stack runs first"
    # Rows of stacks that run later are not there yet: what looks like them does so by chance.
    earlier = fake.order[: fake.order.index(stack) + 1]
    rows = {number: _samples_and_tokens(fake, fake.records[number][0].arguments[0]) for number in earlier}
    runs = tuple(fake.runs.get((stack, index), 0) for index in range(len(blocks)))
    roles = {index: _roles(entry, rows, stack) for index, entry in records.items()}
    later = [index for index in records if index > 0]
    needed = [_needed_tensors(fake, stack, index) for index in later]
    looked_into = [index for index in records if inside and runs[index] == 1]
    residuals = {index: find_residuals(fake, stack, index) for index in looked_into}
    resume_points = {index: _resume_points(fake, stack, index, roles[index], residuals[index]) for index in looked_into}
    found_norms = {index: _norms(blocks[index], entry, rows, stack) for index, entry in records.items() if norms}
    leaves = [tree_flatten(entry.output)[0] for entry in records.values()]
    outputs = [[leaf for leaf in own if isinstance(leaf, torch.Tensor)] for own in leaves]
    output = max(outputs, key=lambda own: sum(leaf.numel() for leaf in own))
    tokens = [name for name, x in fake.inputs.items() if name.endswith("input_ids") and tuple(x.shape) == rows[stack]]
    return StackTrace(
        token_input=tokens[0] if tokens else None,
        unmatched=not tokens and stack in depending and any(name.endswith("attention_mask") for name in fake.inputs),
        needed_by_first=_needed_tensors(fake, stack, 0),
        needed_by_later=frozenset().union(*needed),
        unused_modules=_unused_modules(fake, stack, later),
        unused_inputs=_unused_inputs(fake, stack, later),
        roles=_roles_of_all(fake, stack, roles),
        output_shapes=tuple(tuple(leaf.shape) for leaf in output),
        num_tokens=rows[stack][1],
        runs=runs,
        kept=fake.kept.get(stack, frozenset()),
        residuals=_of_like_blocks(blocks, residuals) if inside else (),
        resume_points=_of_like_blocks(blocks, resume_points) if inside else (),
        norms=_of_like_blocks(blocks, found_norms) if norms else (),
    )


def _resume_points(
    fake: FakeModel, stack: int, index: int, roles: Sequence[LinearRole], residuals: Mapping[str, Residual]
) -> dict[str, ResumePoint]:
    """How runs of a block are taken up, by the first of the linears that read one tensor; only where it works."""
    if any(role.calls > 1 for role in roles):
        return {}
    groups: dict[str, list[str]] = {}
    for role in roles:
        groups.setdefault(role.group, []).append(role.name)
    watched = {path for residual in residuals.values() for path in (residual.module, *residual.linears)}
    points = find_resume_points(fake, stack, index, list(groups.values()), watched)
    return {leader: point for leader, point in zip(groups, points, strict=True) if point is not None}


def _trace_end(fake: FakeModel, stacks: Sequence[StackTrace]) -> EndTrace:
    """Runs what comes after the blocks, and sees which linears run there, on which rows."""
    skeleton, outputs = fake.skeleton, {stack: fake.outputs(stack) for stack in fake.order}
    reads: list[tuple[str, torch.Tensor]] = []
    in_blocks: list[int] = []
    prefixes = tuple(f"{stack.name}." for stack in skeleton.stacks)
    linears = {name: linear for name, linear in linears_in(skeleton.model).items() if not name.startswith(prefixes)}
    model: Any = skeleton.model
    head = model.get_output_embeddings()
    replaced: dict[nn.Module, Callable[..., Any]] = {}
    if isinstance(head, nn.Linear):  # a made-up matrix of the vocabulary's size would have to be written out
        replaced[head] = lambda x: x.new_zeros((*x.shape[:-1], head.out_features))

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: reads.append((name, args[0])) if in_blocks and args else None

    first = skeleton.stacks[fake.order[0]].blocks[0]
    handles = [first.register_forward_pre_hook(lambda *_: in_blocks.append(0))]
    handles += [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        run_to_end(skeleton, fake.inputs, outputs, replaced)
    finally:
        for handle in handles:
            handle.remove()
    rows = {number: _samples_and_tokens(fake, fake.records[number][0].arguments[0]) for number in fake.order}
    reaching = frozenset[str]().union(*(stack.needed_by_first | stack.needed_by_later for stack in stacks))
    parameters = {id(parameter): name for name, parameter in skeleton.model.named_parameters()}
    tensors, images = dict(reads), stacks[fake.order[-1]].token_input is None

    def is_known(role: LinearRole) -> bool:
        """Whether the rows of a linear's input are known, and what it computes reaches no later block."""
        linear = linears[role.name]
        reaches = parameters[id(linear.weight)] in reaching and linear is not head  # a tied head is the embedding
        pooled = [size for size in tensors[role.name].shape[:-1] if size != 1] == [NUM_SAMPLES]
        return role.calls == 1 and not reaches and (role.token_stack is not None or images or pooled)

    roles = filter(is_known, _roles(BlockRecord([], None, reads), rows, fake.order[-1]))
    return EndTrace(tuple(roles), needed_at_end(skeleton, fake.order, fake.inputs, outputs))


def _of_like_blocks(blocks: Sequence[nn.Module], known: Mapping[int, _Found]) -> tuple[_Found, ...]:
    """What is known of some blocks, for all of them: others are like the second and the last of their kind, or empty.

    What is empty costs time or exactness of a method, and is told; so two that differ are no error here.
    """
    members: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        members.setdefault(block_kind(block, index), []).append(index)
    found: dict[int, Any] = {}
    for own in members.values():
        recorded = [known[index] for index in own if index in known]
        same = recorded[-1] if recorded and recorded[-1] == recorded[max(0, len(recorded) - 2)] else {}
        found |= {index: known.get(index, same) for index in own}
    return tuple(found[index] for index in range(len(blocks)))


def _roles_of_all(
    fake: FakeModel, stack: int, known: Mapping[int, tuple[LinearRole, ...]]
) -> tuple[tuple[LinearRole, ...], ...]:
    """Roles of the linears of every block: blocks that have no record are like the second and the last of their kind.

    Raises:
        ArchitectureError: If those two are unlike. The first may be: Funnel's first layer pools its queries.
    """
    blocks = fake.skeleton.stacks[stack].blocks
    members: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        members.setdefault(block_kind(block, index), []).append(index)
    roles: dict[int, tuple[LinearRole, ...]] = {}
    for own in members.values():
        recorded = [known[index] for index in own if index in known]
        for index in own:
            roles[index] = known.get(index, ())
            if index not in known and fake.runs.get((stack, index)):
                if recorded[-1] != recorded[-2]:
                    raise ArchitectureError(
                        f"{fake.skeleton.class_name}: the linears of {fake.skeleton.stacks[stack].block_name(index)} "
                        "and those of like blocks read different tensors; this model cannot be merged block by block"
                    )
                roles[index] = recorded[-1]
    return tuple(roles[index] for index in range(len(blocks)))


def _depending_on_tokens(fake: FakeModel) -> frozenset[int]:
    """Stacks whose first block is given something else where the tokens are others, and images in their places."""
    kept = torch.tensor(sorted(placeholder_tokens(fake.skeleton.model.config)), dtype=torch.int64)
    others: dict[str, torch.Tensor] = {}
    for name, ids in fake.inputs.items():
        if name.endswith("input_ids"):
            rolled = ids.roll(1, dims=0)
            others[name] = torch.where(torch.isin(ids, kept) | torch.isin(rolled, kept), ids, rolled)
    if not others:
        return frozenset()
    given = [fake.records[stack][0].arguments for stack in fake.order]
    again = fake.first_arguments({**fake.inputs, **others})
    return frozenset(
        stack for stack, arguments in zip(fake.order, given, strict=True) if not equal_trees(arguments, again[stack])
    )


def _samples_and_tokens(fake: FakeModel, arguments: Any) -> tuple[int, int]:
    """Number of samples and of tokens in a stack, from the hidden states that its first block is given."""
    args, kwargs = arguments
    hidden_states = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(hidden_states, torch.Tensor):
        leaves = tree_flatten((hidden_states, args, kwargs))[0]
        floating = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        hidden_states = next((leaf for leaf in floating if leaf.dim() >= 3), floating[0] if floating else None)
    if hidden_states is None:
        raise ArchitectureError(f"{fake.skeleton.class_name}: a block is given no hidden states")
    leading = tuple(hidden_states.shape[:-1])
    for name, tensor in fake.inputs.items():  # Gemma 3n's blocks are given several streams of the same tokens
        pairs = [leading[start : start + 2] for start in range(len(leading) - 1)]
        either = {tuple(tensor.shape), tuple(tensor.shape[::-1])}
        if name.endswith("input_ids") and tensor.dim() == 2 and not either.isdisjoint(pairs):
            return tensor.shape[0], tensor.shape[1]
    if leading and leading[0] == NUM_SAMPLES:
        return NUM_SAMPLES, math.prod(leading[1:])
    return NUM_SAMPLES, math.prod(leading) // NUM_SAMPLES


def _roles(entry: BlockRecord, rows: Mapping[int, tuple[int, int]], own: int) -> tuple[LinearRole, ...]:
    """Says what each linear of a block of stack `own` reads."""
    reads: dict[str, list[torch.Tensor]] = {}
    for name, read in entry.linears:
        reads.setdefault(name, []).append(read)
    leaders: list[tuple[str, list[torch.Tensor]]] = []
    roles = []
    for name, tensors in reads.items():
        leader = next((first for first, others in leaders if _all_same_memory(others, tensors)), None)
        if leader is None:
            leaders.append((name, tensors))
        stacks = {_token_stack(read, rows, own) for read in tensors}
        token_stack, tokens_first = stacks.pop() if len(stacks) == 1 else (None, False)
        roles.append(LinearRole(name, leader or name, token_stack, len(tensors), tokens_first))
    return tuple(roles)


def _norms(
    block: nn.Module, entry: BlockRecord, rows: Mapping[int, tuple[int, int]], own: int
) -> dict[str, LinearRole]:
    """Says what each norm of a block of stack `own` reads; those that are given more than one tensor are left out."""
    alone = [(name, read) for name, read in entry.norms if read is not None]
    several = {name for name, read in entry.norms if read is None}
    unclear = {name for name, read in alone if read.dim() > 3 and read.shape[1] == read.shape[2]}  # heads, or tokens
    modules = may_be_norms(block)
    reads: dict[str, list[torch.Tensor]] = {}
    for name, read in alone:
        reads.setdefault(name, []).append(read)
    roles = _roles(BlockRecord([], None, alone), rows, own)
    return {
        role.name: replace(role, group=role.name, token_stack=None if role.name in unclear else role.token_stack)
        for role in roles
        if role.name not in several
        and all(read.shape[-1] == modules[role.name].get_parameter("weight").shape[0] for read in reads[role.name])
        and is_norm(modules[role.name])
    }


def _all_same_memory(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(_same_memory, left, right))


def _same_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left is right or (
        left.data_ptr() == right.data_ptr() and left.shape == right.shape and left.stride() == right.stride()
    )


def _token_stack(read: torch.Tensor, rows: Mapping[int, tuple[int, int]], own: int) -> tuple[int | None, bool]:
    """The stack whose samples and tokens a linear's input has, and whether tokens come first; `own` is asked first.

    A dimension of one, as in `[samples, 1, tokens, rank]`, changes nothing in the order of the rows. Dimensions after
    samples and tokens, as in `[samples, tokens, heads, size]`, give every token several rows.
    """
    leading = [size for size in read.shape[:-1] if size != 1]
    for stack in (own, *rows):
        samples, tokens = rows[stack]
        for expected in ([size for size in (samples, tokens) if size != 1], [samples * tokens]):
            if leading[: len(expected)] == expected:
                return stack, False
        if leading[:2] == [tokens, samples]:
            return stack, True
    return None, False


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
        output = outputs[order[0]]
        return hand_on(output.last if isinstance(output, KeptOutputs) else output, args, kwargs)

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
        expected, _ = fake.resume(stack, index, run_block_too=False)
    needed = set()
    for name in sorted(mode.read & non_block):
        weight = fake.weights[name]
        assign_tensors(skeleton, {name: weight.new_full((), float("nan")).expand(weight.shape)})
        try:
            arguments, _ = fake.resume(stack, index, run_block_too=False)
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
    expected = {index: fake.resume(stack, index, run_block_too=False)[0] for index in blocks}

    def unread(names: Sequence[str]) -> bool:
        called: list[nn.Module] = []
        with replaced_forwards({leaves[name]: _nan_forward(leaves[name], called) for name in names}):
            try:
                resumed = [fake.resume(stack, index, run_block_too=False)[0] for index in blocks]
            except RuntimeError:  # the model writes into the module's output, which is one NaN for all its elements
                return False
        same = map(equal_trees, resumed, (expected[index] for index in blocks))
        return all(same) and len(called) >= len(names)

    unused = [name for name in leaves if blocks and unread([name])]
    return frozenset(unused) if unused and unread(unused) else frozenset()


def _unused_inputs(fake: FakeModel, stack: int, blocks: Sequence[int]) -> frozenset[str]:
    """Floating-point inputs that change nothing in the arguments of the blocks when they are NaN."""
    floating = [name for name, tensor in fake.inputs.items() if tensor.is_floating_point()]

    def unread(name: str) -> bool:
        nan = torch.full_like(fake.inputs[name], float("nan"))
        inputs = {**fake.inputs, name: nan}
        resumed = [fake.resume(stack, index, run_block_too=False, inputs=inputs)[0] for index in blocks]
        expected = [fake.resume(stack, index, run_block_too=False)[0] for index in blocks]
        return all(equal_trees(*pair) for pair in zip(resumed, expected, strict=True))

    return frozenset(name for name in floating if blocks and unread(name))


def _nan_forward(module: nn.Module, called: list[nn.Module]) -> Callable[..., Any]:
    """Makes a forward that returns NaN in the shape of the module's output, and notes that it was called."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original_forward(module)(*args, **kwargs)
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        called.append(module)
        return output.new_full((), float("nan")).expand(output.shape)

    return forward
