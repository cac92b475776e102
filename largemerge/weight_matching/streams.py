"""The residual streams of a model: which dimension of which parameter belongs to one, found without a table.

Embeddings, class tokens and the outputs of blocks are added up, and norms, blocks and heads read the sum. If its
features change places in all that writes to it and in all that reads it, the model computes what it did before.

    an embedding changes half of its features ──► who reads exactly these: readers
    another module's outputs, or a parameter, change the same half ──► readers see exactly these: it writes, too
    all of it permuted, norms as they are ──► readers and only they see the permutation, outputs stay: a stream

The first two are looked at with norms that do not normalise (see `outer.py`), so that features do not mix. The last is
the proof; a stream that does not pass it stays as it is, and the reason is told. So does one of which a part is not
reached by the inputs that are made up: a projector of images where there are tokens alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_flatten, tree_map

from largemerge.model.fake_forward import FakeModel, block_kind
from largemerge.model.forward import original_forward
from largemerge.model.skeleton import is_linear, weight_is_transposed
from largemerge.weight_matching.outer import Outer, Output, Seen
from largemerge.weight_matching.units import Tensor

_TOLERANCE = 1e-5  # of relative differences where nothing should differ: norms compute in float32, whatever they get
_CHANGED = 1e-9  # a relative difference above it is none of rounding in float64
_MAX_TRIES = 64  # of dimensions of a module whose matrices are its own
_MAX_ELEMENTS = 1 << 28  # of such a matrix, of one expert


@dataclass(frozen=True)
class Stream:
    """A residual stream, whose features may be permuted.

    Attributes:
        name: The stacks whose blocks it goes through.
        size: Number of its features.
        places: The parameters that have it as a dimension; tied ones once.
        results: Outputs of the model, beside the first, that come in the new order.
    """

    name: str
    size: int
    places: tuple[Tensor, ...]
    results: tuple[str, ...]


@dataclass
class _Found:
    """A stream as it is found.

    Attributes:
        size: Number of its features.
        writers: Outputs of modules that are added to it.
        readers: Paths of modules that read it.
        vectors: Parameters that are parts of it, or scale it, and their dimension.
        results: Outputs of the model that are the stream.
        odd: Modules that read it in another layout.
    """

    size: int
    writers: set[Output] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)
    vectors: dict[str, int] = field(default_factory=dict)
    results: set[str] = field(default_factory=set)
    odd: set[str] = field(default_factory=set)


class _Stays(Exception):
    """Raised with the reason for which a stream stays as it is."""


def find_streams(fake: FakeModel) -> tuple[list[Stream], list[str]]:
    """Finds the residual streams of a model that may be permuted.

    Args:
        fake: The model with made-up weights of float64, while its context is open.

    Returns:
        The streams, and of all others why they stay.
    """
    outer = Outer(fake)
    streams, held = list[Stream](), list[str]()
    for found in _joined(outer, _grown(outer)):
        name = _stacks_of(outer, found)
        if name is None:
            continue
        try:
            streams.append(_proved(outer, found, name))
        except _Stays as why:
            held.append(f"the residual stream of {name} stays: {why}")
    return streams, held


# Finding


def _grown(outer: Outer) -> Iterator[_Found]:
    """Yields what belongs together, from the outputs of each module outside of the blocks that are not found yet."""
    sizes, plain = outer.outputs(), outer.run(transparent=True)
    known: set[Output] = set()
    for seed, size in sizes.items():
        if size < 2 or _in_block(outer, seed.path) or seed in known:
            continue
        chosen = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
        chosen[:2] = torch.tensor([True, False])
        found = _Found(size)
        exact, odd = _reached(outer, plain, [seed], {}, chosen)
        groups: dict[str, list[Output]] = {}
        for output, own in sizes.items():
            if own == size and output != seed:
                groups.setdefault(f"{_pattern(output.path)} {output.leaf}", []).append(output)
        found.writers.add(seed)
        for writers in groups.values():
            own_exact, own_odd = _reached(outer, plain, writers, {}, chosen)
            if own_exact & exact and not own_odd - odd:
                found.writers.update(writers)
                exact |= own_exact
        for vectors in _vector_groups(outer, size):
            own_exact, own_odd = _reached(outer, plain, [], vectors, chosen)
            if own_exact & exact and not own_odd - odd:
                found.vectors |= vectors
                exact |= own_exact
        known |= found.writers
        found.readers = {path for path in exact if path in outer.modules}
        found.results = {path.removeprefix("= ") for path in exact if path not in outer.modules}
        found.odd = odd
        yield found


def _vector_groups(outer: Outer, size: int) -> list[dict[str, int]]:
    """Parameters of no matrix with a dimension of a size, alike ones of all blocks together, and the dimension."""
    groups: dict[tuple[str, int], dict[str, int]] = {}
    for name, parameter in outer.raw.items():
        for axis, own in enumerate(parameter.shape):
            if own == size:
                groups.setdefault((_pattern(name), axis), {})[name] = axis
    return list(groups.values())


def _reached(
    outer: Outer, plain: Seen, writers: Sequence[Output], vectors: Mapping[str, int], chosen: torch.Tensor
) -> tuple[set[str], set[str]]:
    """Changes some features of outputs or parameters, and returns who sees exactly these, and who something else."""

    def bump(x: torch.Tensor) -> torch.Tensor:
        return torch.where(chosen, x + 1, x)

    parameters = {name: bump(outer.raw[name].movedim(axis, -1)).movedim(-1, axis) for name, axis in vectors.items()}
    seen = outer.run(dict.fromkeys(writers, bump), parameters, transparent=True)
    exact, odd = set[str](), set[str]()
    for (path, _), before, after in _pairs(plain, seen):
        changed = (after - before).abs() > _CHANGED * max(float(before.abs().max()), 1e-30)
        if not bool(changed.any()):
            continue
        changed = changed.reshape(-1, changed.shape[-1]).any(0)
        (exact if torch.equal(changed, chosen) else odd).add(path)
    return exact - odd, odd


def _pairs(plain: Seen, seen: Seen) -> Iterator[tuple[tuple[str, int], torch.Tensor, torch.Tensor]]:
    for key, before in plain.reads.items():
        yield key, before, seen.reads[key]
    for name, before in plain.results.items():
        yield (f"= {name}", 0), before, seen.results[name]


def _joined(outer: Outer, every: Iterator[_Found]) -> list[_Found]:
    """Joins what shares a parameter: an encoder and a decoder with one embedding, a head that is tied to it."""
    joined: list[_Found] = []
    for found in every:
        for other in [each for each in joined if each.size == found.size and _shared(outer, each, found)]:
            joined.remove(other)
            found = _Found(
                found.size,
                found.writers | other.writers,
                found.readers | other.readers,
                found.vectors | other.vectors,
                found.results | other.results,
                found.odd | other.odd,
            )
        joined.append(found)
    return joined


def _shared(outer: Outer, one: _Found, other: _Found) -> bool:
    return bool(_plain_places(outer, one) & _plain_places(outer, other))


def _stacks_of(outer: Outer, found: _Found) -> str | None:
    """The stacks whose blocks read and write a stream; `None` where there are none."""
    paths = [*found.readers, *(output.path for output in found.writers)]
    names = [stack.name for stack in outer.skeleton.stacks if any(path.startswith(f"{stack.name}.") for path in paths)]
    return ", ".join(names) or None


def _in_block(outer: Outer, path: str) -> bool:
    return path.startswith(tuple(f"{stack.name}." for stack in outer.skeleton.stacks))


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


# Proving


def _proved(outer: Outer, found: _Found, name: str) -> Stream:
    """Tries a stream, and finds its parameters.

    Raises:
        _Stays: If it may not be permuted.
    """
    odd = sorted(path for path in found.odd if path in outer.modules)
    if odd:
        raise _Stays(f"{odd[0]} reads its features in groups, or mixed")
    results = _tried(outer, found)
    places = _plain_places(outer, found) | _places_of_own(outer, found)
    _check_ties(outer, found, places)
    places |= _of_alike_blocks(outer, places)
    places |= _of_alike_modules(outer, found, places)
    known = {place.name for place in places}
    state = outer.skeleton.model.state_dict()
    parameters = {each for each, _ in outer.skeleton.model.named_parameters(remove_duplicate=False)}
    for each, tensor in state.items():
        if each not in parameters and tensor.is_floating_point() and found.size in tensor.shape:
            raise _Stays(f"{each} may belong to it, and is no parameter")
    for each in outer.unreached:
        if each not in known and found.size in outer.skeleton.model.get_parameter(each).shape:
            raise _Stays(f"{each} may belong to it, and is not reached by inputs that are made up")
    return Stream(name, found.size, tuple(sorted(places)), results)


def _tried(outer: Outer, found: _Found) -> tuple[str, ...]:
    """Permutes a stream; returns the outputs of the model that come in the new order, beside the first.

    Raises:
        _Stays: If anything but its readers sees that.
    """
    plain = outer.run()
    generator = torch.Generator().manual_seed(found.size)
    moved: set[str] = set()
    for _ in range(2):
        index = torch.randperm(found.size, generator=generator).roll(1)
        parameters = {name: outer.raw[name].index_select(axis, index) for name, axis in found.vectors.items()}
        writes = dict.fromkeys(found.writers, lambda x, index=index: x[..., index])
        seen = outer.run(writes, parameters)
        for (path, _), before, after in _pairs(plain, seen):
            is_result = path.startswith("= ")
            if path in found.readers:
                before = before[..., index]
            if _differ(before, after):
                if not is_result or before.shape[-1:] != index.shape or _differ(before[..., index], after):
                    what = path.removeprefix("= ")
                    kind = (
                        "of groups of features, or of norms over parts of it" if path in found.readers else "not of it"
                    )
                    raise _Stays(f"what {what} gets changes when features change places ({kind})")
                moved.add(path.removeprefix("= "))
    first = next(iter(plain.results), None)
    if first in moved:
        raise _Stays(f"{first}, which the model returns first, is the stream itself, and would come in another order")
    return tuple(name for name in plain.results if name in moved)


def _differ(before: torch.Tensor, after: torch.Tensor) -> bool:
    if before.shape != after.shape:
        return True
    scale = max(float(before.abs().max()), float(after.abs().max()), 1e-30) if before.numel() else 1.0
    finite = torch.equal(before.isfinite(), after.isfinite())
    gap = (before - after).nan_to_num(0.0, 0.0, 0.0).abs()
    return not finite or bool((gap > _TOLERANCE * min(scale, 1e30)).any())


def _plain_places(outer: Outer, found: _Found) -> set[Tensor]:
    """Parameters of linears, embeddings and convolutions, and vectors, and which dimension of them is the stream."""
    first = _first_names(outer)
    places = {Tensor(first[name], axis) for name, axis in found.vectors.items()}
    for path in found.readers:
        module = outer.modules[path]
        if is_linear(module):
            places.add(Tensor(first[f"{path}.weight"], 0 if weight_is_transposed(module) else 1))
        elif isinstance(module, _ConvNd):
            places.add(Tensor(first[f"{path}.weight"], 1))
    for path, _ in found.writers:
        module = outer.modules[path]
        if is_linear(module) or isinstance(module, _ConvNd):
            places.add(Tensor(first[f"{path}.weight"], int(is_linear(module) and weight_is_transposed(module))))
            if getattr(module, "bias", None) is not None:
                places.add(Tensor(first[f"{path}.bias"], 0))
        elif isinstance(module, nn.Embedding):
            places.add(Tensor(first[f"{path}.weight"], 1))
    return places


def _check_ties(outer: Outer, found: _Found, places: Collection[Tensor]) -> None:
    """Checks that modules which share a parameter of the stream belong to it, too.

    Raises:
        _Stays: If one does not.
    """
    first, known = _first_names(outer), {place.name for place in places}
    inside = found.readers | {output.path for output in found.writers}
    for path, module in outer.modules.items():
        for name, _ in module.named_parameters(recurse=False):
            if path not in inside and first[f"{path}.{name}"] in known:
                raise _Stays(f"{path} shares {first[f'{path}.{name}']}, and reads something else with it")


def _first_names(outer: Outer) -> dict[str, str]:
    """The first of all names of every parameter."""
    names = {name: name for name, _ in outer.skeleton.model.named_parameters(remove_duplicate=False)}
    return names | {alias: one for one, aliases in outer.skeleton.aliases.items() for alias in aliases}


def _places_of_own(outer: Outer, found: _Found) -> set[Tensor]:
    """Finds the dimensions of modules whose matrices are their own, such as experts: by trying them on the module.

    Raises:
        _Stays: If none will do.
    """
    own = {
        path: module
        for path, module in outer.modules.items()
        if not (is_linear(module) or isinstance(module, nn.Embedding | _ConvNd))
        and (path in found.readers or any(output.path == path for output in found.writers))
    }
    first, places = _first_names(outer), set[Tensor]()
    known: dict[str, dict[str, int]] = {}
    for path, module in own.items():
        pattern = _pattern(f"{path} {module!r}")
        axes = known.get(pattern)
        if axes is None or not _follows(outer, found, path, axes):
            axes = next(
                (tried for tried in _combinations(module, found.size) if _follows(outer, found, path, tried)), None
            )
        if axes is None:
            raise _Stays(f"no dimension of {path} was found that follows it")
        known[pattern] = axes
        places |= {Tensor(first[f"{path}.{name}"], axis) for name, axis in axes.items()}
    for path, module in outer.modules.items():
        if isinstance(module, _ConvNd) and path in found.readers and getattr(module, "groups", 1) != 1:
            raise _Stays(f"{path} is a convolution of groups of its features")
    return places


def _combinations(module: nn.Module, size: int) -> Iterator[dict[str, int]]:
    """Yields which dimension of each of a module's own parameters may be the stream, most of them first."""
    parameters = dict(module.named_parameters(recurse=False))
    options = [
        [(name, axis) for axis in range(parameter.dim() - 1, -1, -1) if parameter.shape[axis] == size] + [None]
        for name, parameter in parameters.items()
    ]
    for chosen in itertools.islice(itertools.product(*options), _MAX_TRIES):
        yield dict(each for each in chosen if each is not None)


def _follows(outer: Outer, found: _Found, path: str, axes: Mapping[str, int]) -> bool:
    """Whether a module computes the same with the stream permuted in some dimensions of its parameters."""
    module, call = outer.modules[path], outer.calls[path][0]
    generator = torch.Generator().manual_seed(1)
    index = torch.randperm(found.size, generator=generator).roll(1)
    parameters, permuted = {}, {}
    for name, parameter in module.named_parameters(recurse=False):
        kept = parameter.shape[-2:]
        if kept.numel() > _MAX_ELEMENTS:
            return False
        made = torch.randn(kept, generator=generator, dtype=torch.float32).to(parameter.dtype)
        axis = axes.get(name)
        own = axis - (parameter.dim() - len(kept)) if axis is not None else None
        if own is not None and own < 0:
            return False
        parameters[name] = made.expand(parameter.shape)
        permuted[name] = made.index_select(own, index).expand(parameter.shape) if own is not None else parameters[name]
    args, kwargs = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (call.args, call.kwargs)
    )
    before = _called(module, parameters, args, kwargs)
    if path in found.readers:
        first = next(
            leaf
            for leaf in tree_flatten((args, kwargs))[0]
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        )
        args, kwargs = tree_map(lambda leaf: leaf[..., index] if leaf is first else leaf, (args, kwargs))
    after = _called(module, permuted, args, kwargs)
    if before is None or after is None:
        return False
    for leaf, (one, other) in enumerate(zip(before, after, strict=True)):
        if not isinstance(one, torch.Tensor):
            continue
        if Output(path, leaf) in found.writers:
            one = one[..., index]
        if _differ(one.to(torch.float64), other.to(torch.float64)):
            return False
    return True


def _called(
    module: nn.Module, parameters: Mapping[str, torch.Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any] | None:
    """What a module returns with other parameters of its own; `None` where it cannot be called with them."""
    before = dict(module._parameters)
    try:
        for name, tensor in parameters.items():
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        with torch.no_grad():
            return tree_flatten(original_forward(module)(*args, **kwargs))[0]
    except Exception:  # whatever a module raises
        return None
    finally:
        module._parameters.update(before)


# What is like something that was proved


def _of_alike_blocks(outer: Outer, places: Collection[Tensor]) -> set[Tensor]:
    """Places in blocks that were not run: those of a block that computes alike."""
    found, first = set[Tensor](), _first_names(outer)
    for stack, chosen in zip(outer.skeleton.stacks, outer.chosen, strict=True):
        kinds = {block_kind(stack.blocks[index], index): index for index in sorted(chosen)}
        for index, block in enumerate(stack.blocks):
            if index in chosen:
                continue
            like = f"{stack.block_name(kinds[block_kind(block, index)])}."
            for place in places:
                if place.name.startswith(like):
                    name = f"{stack.block_name(index)}.{place.name.removeprefix(like)}"
                    found.add(Tensor(first[name], place.axis))
    return found


def _of_alike_modules(outer: Outer, found: _Found, places: Collection[Tensor]) -> set[Tensor]:
    """Places in what no pass reaches: an expert beside others, a token for masks beside the class token."""
    model = outer.skeleton.model

    def kind(name: str) -> tuple[str, tuple[int, ...]]:
        return _pattern(name), tuple(model.get_parameter(name).shape)

    wanted = {name: kind(name) for name in outer.unreached}
    alike = {Tensor(name, axis) for name, own in wanted.items() for other, axis in places if kind(other) == own}
    owners = {name.rpartition(".")[0] for name in found.vectors if outer.raw[name].dim() > 1}
    known = {place.name for place in places}
    for name, parameter in outer.raw.items():
        is_token = parameter.dim() > 1 and parameter.numel() == found.size and name.rpartition(".")[0] in owners
        if is_token and name not in known:
            alike.add(Tensor(name, list(parameter.shape).index(found.size)))
    return alike
