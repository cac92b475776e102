"""What a trial run tells of the inside of a block: where its linears write to, and where a run can be taken up.

    Residual       the tensor to which a linear's output is added: in the trial run after = before + output, bit by bit
    ResumePoint    a run that starts at the inputs of some linear: which outputs of earlier linears it still reads,
                   found by filling each of them with NaN

No table of architectures says so. In a Llama block:

    h ─► norm ─► q, k, v ─► attention ─► o ─► (+ h) ─► norm ─► gate, up ─► · ─► down ─► (+) ─►
                                                                └ resumed here, a run reads the output of o, and not
                                                                  those of q, k and v

so that a block can be run linear by linear though all samples wait at every linear for its weight. Where all of a
module lies before that place (here all of the attention), its output is kept in the place of the linear's, and none of
it is run again. As little as can be is kept meanwhile:

    gate, up   the output of the attention: what they read is made of it again
    down       the same, and no more: gate and up are run again, for what down reads is wider than anything else
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from largemerge.model.fake_forward import FakeModel, equal_trees
from largemerge.model.forward import original_forward, replaced_forwards
from largemerge.model.skeleton import linears_in, weight_is_transposed


class _Output(Enum):
    OUTPUT = "output"


OUTPUT = _Output.OUTPUT
"""Stands for a linear's output in what a module around it returns."""


@dataclass(frozen=True)
class Residual:
    """The tensor to which the output of a linear is added.

    Attributes:
        module: Path in the block of a module whose input it is; it runs before the linear.
        linears: Linears that run before, and whose outputs are added to it, too: those of parallel blocks.
    """

    module: str
    linears: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResumePoint:
    """A run of a block that starts at some linears, or a little before.

    Attributes:
        given: Linears that read one tensor, which was kept from an earlier run; empty where it is made again.
        known: Earlier linears, or modules with all their linears, whose outputs are still read, and were kept, too.
        skipped: Earlier linears whose outputs nobody reads any more, or that lie in a module that is not run.
        around: A module around the one given linear that returns what the linear does, and of which nothing else is
            run (an attention, around its output projection); empty if there is none.
        returned: What that module returns, `OUTPUT` in the place of the linear's output.
    """

    given: tuple[str, ...]
    known: tuple[str, ...]
    skipped: tuple[str, ...]
    around: str = ""
    returned: Any = None


@dataclass
class _Run:
    """What was seen of one run of a block.

    Attributes:
        seen: Number of modules and linears before, path, and first input of each submodule that was called.
        outputs: Linear → number of modules before its end, and its output.
        returned: Module → what it returned.
        output: What the block returned.
    """

    seen: list[tuple[int, str, torch.Tensor]] = field(default_factory=list)
    outputs: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    returned: dict[str, Any] = field(default_factory=dict)
    output: Any = None


def find_residuals(fake: FakeModel, stack: int, index: int) -> dict[str, Residual]:
    """Finds the linears of a block whose outputs are added to a tensor as they are, and that tensor.

    Args:
        fake: The model with made-up weights.
        stack: Index of the block's stack.
        index: Index of the block in its stack; it runs once in a forward pass.
    """
    run = _watched_run(fake, stack, index)
    returned = [leaf for leaf in tree_flatten(run.output)[0] if isinstance(leaf, torch.Tensor)]
    ends = [(len(run.seen) + len(run.outputs), leaf) for leaf in returned if leaf.is_floating_point()]
    afters = [*((number, tensor) for number, _, tensor in run.seen), *ends]
    found: dict[str, Residual] = {}
    for path, (number, output) in run.outputs.items():
        before = [(name, tensor) for at, name, tensor in run.seen if at < number]
        later = [tensor for at, tensor in afters if at >= number]
        residual = _added_to(before, [output], later)
        if residual is not None:
            found[path] = Residual(residual)
    left = [path for path in run.outputs if path not in found]
    for first, second in ((a, b) for place, a in enumerate(left) for b in left[place + 1 :]):
        number, output = run.outputs[first]
        before = [(name, tensor) for at, name, tensor in run.seen if at < number]
        residual = _added_to(before, [output, run.outputs[second][1]], [tensor for _, tensor in ends])
        if residual is not None:
            found |= {first: Residual(residual), second: Residual(residual, (first,))}
    return found


def _added_to(
    before: Sequence[tuple[str, torch.Tensor]], outputs: Sequence[torch.Tensor], later: Sequence[torch.Tensor]
) -> str | None:
    """The first module whose input, with the outputs added in any order, is one of the later tensors."""
    flat = [output.reshape(-1, output.shape[-1]) for output in outputs]
    if any(output.shape != flat[0].shape or not output.nan_to_num().any() for output in flat):
        return None
    targets = [tensor.reshape(-1, tensor.shape[-1]) for tensor in later if tensor.numel() == flat[0].numel()]
    targets = [target for target in targets if target.shape == flat[0].shape]
    for name, tensor in before if targets else ():
        if tensor.numel() != flat[0].numel() or tensor.shape[-1] != flat[0].shape[-1]:
            continue
        start = tensor.reshape(flat[0].shape)
        sums = [start + flat[0]]
        if len(flat) == 2:
            sums = [sums[0] + flat[1], start + flat[1] + flat[0], start + (flat[0] + flat[1])]
        if any(equal_trees(total, target) for total in sums for target in targets):
            return name
    return None


def find_resume_points(
    fake: FakeModel, stack: int, index: int, groups: Sequence[Sequence[str]], watched: Collection[str] = ()
) -> tuple[ResumePoint | None, ...]:
    """Finds out how runs of a block can be taken up at groups of linears.

    Args:
        fake: The model with made-up weights.
        stack: Index of the block's stack.
        index: Index of the block in its stack; it runs once in a forward pass.
        groups: Linears that read one tensor, by group, in the order in which they run; each is called once.
        watched: Modules that must be run, for they are watched; their input may be, where they are not.

    Returns:
        For each group a point; `None` where its runs start at the block's beginning: because nothing has to be kept, or
        because a run that starts there comes to another result.
    """
    whole = _watched_run(fake, stack, index)
    inputs = {path: tensor for _, path, tensor in whole.seen}
    order = list(whole.outputs)
    points: list[ResumePoint | None] = []
    sizes: list[int] = []
    for group in groups:
        leader = min(group, key=order.index)
        earlier = [path for path in order[: order.index(leader)] if path not in group]

        def works(point: ResumePoint, leader: str = leader, earlier: Sequence[str] = earlier) -> bool:
            known = {path: whole.returned[path] for path in point.known}
            try:
                again = _watched_run(fake, stack, index, point, inputs[leader], dict.fromkeys(earlier) | known)
            # A model's code may refuse NaN, or write into what is stored.
            except (RuntimeError, ValueError, IndexError):
                return False
            later = [path for path in order if path not in earlier]
            same = all(equal_trees(again.outputs[path][1], whole.outputs[path][1]) for path in later)
            return same and equal_trees(again.output, whole.output)

        def resumed(known: Sequence[str], given: Sequence[str] = group) -> bool:
            return works(ResumePoint(tuple(given), tuple(known), ()))

        known = [] if resumed(()) else [p for p in earlier if not resumed([q for q in earlier if q != p])]
        for path in list(known):
            for module in _enclosing(path, order, earlier, watched):
                without = [each for each in known if not each.startswith(f"{module}.")]
                if path in known and _as_large(whole, module, path) and resumed([*without, module]):
                    known = [*without, module]
        given = () if resumed(known, ()) else tuple(group)
        point = ResumePoint(given, tuple(known), tuple(path for path in earlier if path not in known))
        if len(given) == 1:
            around = (
                replace(point, around=module, returned=returned)
                for module in _enclosing(leader, order, [*earlier, leader], watched)
                if (returned := _returned_around(whole, module, leader)) is not None
            )
            point = next(filter(works, around), point)
        takes_up = bool(given or known) and works(point)
        kept = [*(inputs[path] for path in given[:1]), *(whole.returned[path] for path in known)] if takes_up else []
        points.append(point if takes_up else None)
        sizes.append(_num_elements(kept))
    return _keeping_least(points, sizes)


def _keeping_least(points: Sequence[ResumePoint | None], sizes: Sequence[int]) -> tuple[ResumePoint | None, ...]:
    """Takes runs up one group earlier where less is kept there, as far as that lowers the most that is ever kept.

    Args:
        points: Where runs can be taken up, by group.
        sizes: Number of elements that are kept there.
    """
    chosen = list(range(len(points)))
    while chosen:
        most = max(sizes[number] for number in chosen)
        fullest = [group for group, number in enumerate(chosen) if sizes[number] == most]
        if not all(
            chosen[group] == group > 0 and points[group - 1] is not None and sizes[group - 1] < most
            for group in fullest
        ):
            break
        for group in fullest:
            chosen[group] = group - 1
    return tuple(points[number] for number in chosen)


def _num_elements(tree: Any) -> int:
    return sum(leaf.numel() for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor))


def _enclosing(path: str, order: Sequence[str], earlier: Sequence[str], watched: Collection[str]) -> Iterator[str]:
    """Modules around a linear, outermost first, all of whose linears run before, and in which nothing is watched."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        inside = [each for each in order if each.startswith(f"{module}.")]
        if set(inside) <= set(earlier) and not any(each.startswith(f"{module}.") for each in watched):
            yield module


def _as_large(run: _Run, module: str, linear: str) -> bool:
    """Whether a module returns no more numbers than a linear in it."""
    if module not in run.returned:
        return False
    return _num_elements(run.returned[module]) <= run.outputs[linear][1].numel()


def _returned_around(run: _Run, module: str, linear: str) -> Any:
    """What a module returns, if that is the output of a linear and nothing else; else `None`."""
    output = run.outputs[linear][1]

    def marked(leaf: Any) -> Any:
        return OUTPUT if isinstance(leaf, torch.Tensor) and equal_trees(leaf, output) else leaf

    returned = tree_map(marked, run.returned.get(module))
    leaves = tree_flatten(returned)[0]
    plain = all(leaf is OUTPUT or leaf is None or isinstance(leaf, bool | int | float) for leaf in leaves)
    return returned if plain and leaves.count(OUTPUT) == 1 else None


def _watched_run(
    fake: FakeModel,
    stack: int,
    index: int,
    point: ResumePoint | None = None,
    given: torch.Tensor | None = None,
    answers: Mapping[str, Any] | None = None,
) -> _Run:
    """Runs a block; with an input given to some linears, and others answering with kept outputs or NaN."""
    block = fake.skeleton.stacks[stack].blocks[index]
    run = _Run()
    forwards = resumed_forwards(block, point, given, answers or {}) if point is not None else {}
    with _recorded(block, run), replaced_forwards(forwards):
        run.output = fake.resume(stack, index)[1]
    return run


@contextmanager
def _recorded(block: nn.Module, run: _Run) -> Iterator[None]:
    """Records the first input of every submodule, and outputs of linears: copies, for later code may change them."""
    linears = linears_in(block)

    def before(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point() and args[0].dim() > 1:
                run.seen.append((len(run.seen) + len(run.outputs), path, args[0].clone()))

        return record

    def after(path: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def record(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            run.outputs[path] = (len(run.seen) + len(run.outputs), output.clone())

        return record

    def returned(path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: run.returned.__setitem__(path, copy_of(output))

    handles = [
        module.register_forward_pre_hook(before(path)) for path, module in block.named_modules() if module is not block
    ]
    handles += [linear.register_forward_hook(after(path)) for path, linear in linears.items()]
    handles += [module.register_forward_hook(returned(path)) for path, module in block.named_modules() if path]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def resumed_forwards(
    block: nn.Module,
    point: ResumePoint,
    given: torch.Tensor | None,
    answers: Mapping[str, Any],
    compute: Mapping[nn.Module, Callable[..., torch.Tensor]] | None = None,
) -> dict[nn.Module, Callable[..., Any]]:
    """Makes forwards of modules with which a run of their block starts in its middle.

    Args:
        block: The block.
        point: Where it starts.
        given: What the given linears read in place of their argument.
        answers: Path of a module → what it returns; `None` for a linear that returns NaN, one element of memory for the
            whole.
        compute: Linear → how it is computed, where not by its own forward.
    """

    def reading(linear: nn.Module, x: torch.Tensor) -> Callable[..., torch.Tensor]:
        own = (compute or {}).get(linear) or original_forward(linear)
        return lambda *_: own(x)

    def answering(linear: Any, output: Any) -> Callable[..., Any]:
        if output is not None:
            return lambda *_, **__: copy_of(output)  # the model may add to it in its place
        width = linear.nf if weight_is_transposed(linear) else linear.out_features

        def forward(x: torch.Tensor) -> torch.Tensor:
            return torch.full((), float("nan"), dtype=x.dtype, device=x.device).expand(*x.shape[:-1], width)

        return forward

    def around(linear: nn.Module) -> Callable[..., Any]:
        return lambda *_, **__: tree_map(lambda leaf: linear(given) if leaf is OUTPUT else leaf, point.returned)

    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for path in point.given:
        assert given is not None
        forwards[block.get_submodule(path)] = reading(block.get_submodule(path), given)
    if point.around:
        forwards[block.get_submodule(point.around)] = around(block.get_submodule(point.given[0]))
    return forwards | {
        block.get_submodule(path): answering(block.get_submodule(path), y) for path, y in answers.items()
    }


def copy_of(output: Any) -> Any:
    """Copies what a module has returned, tensor by tensor."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)
