"""The residual stream and the blocks of a model, brought close to the reference's in turn.

The features of the stream come to the places where all that belongs to them is closest (weight matching, Ainsworth et
al. 2023), whatever is permuted inside the blocks as it was found last:

    A[n, m] = Σ_tensors ⟨a_n, b_m⟩        π = argmax Σ_n A[n, π(n)]        a linear assignment problem

    tensors of no block's families ──► A ──► π: the start        nothing permuted: the other start
    π ──► blocks matched, one at a time ──► A ──► π ──► …        until nothing improves, `MAX_ROUNDS` at most

Each round reads the models twice: to match the blocks, and for A, which is added up tensor by tensor, large tables some
rows at a time. The round whose sum is the largest holds; so the stream never makes it worse than the blocks alone.
A matrix that reads and writes the stream counts as if its other side stayed as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.tensor_files import Rows
from largemerge.checkpoint.writer import why_unmergeable
from largemerge.distributed.ranks import Ranks
from largemerge.errors import CheckpointError
from largemerge.matmul import product
from largemerge.weight_matching.matching import GAIN, MAX_ROUNDS, assign
from largemerge.weight_matching.parts import Entry, Parts
from largemerge.weight_matching.permuted import Axes
from largemerge.weight_matching.plan import PIECE_BYTES, ModelPlan
from largemerge.weight_matching.stream_tensors import StreamPlan, StreamTensor
from largemerge.weight_matching.units import decoded, encoded

Orders = Mapping[str, torch.Tensor]
"""Name of a stream → the feature that comes to each place."""
MatchBlocks = Callable[[str, str, Axes], Mapping[str, Entry]]
"""Matches all blocks: what their parts are called, which round it is, axes of the streams → entry of each block."""


@dataclass(frozen=True)
class _Round:
    """Blocks matched with the streams in some order.

    Attributes:
        orders: The orders of the streams.
        blocks: What was found in each block.
        streams: What was found of each stream afterwards.
    """

    orders: Orders
    blocks: Mapping[str, Entry]
    streams: Mapping[str, Entry]

    @property
    def value(self) -> float:
        """Σ ⟨a, b⟩ of all streams."""
        return math.fsum(entry["value"] for entry in self.streams.values())

    def improved(self, plan: ModelPlan) -> Orders:
        """The orders that are best once the blocks are as they are now."""
        return {stream.name: decoded(self.streams[stream.name]["members"], stream.size) for stream in plan.streams}


@dataclass(frozen=True)
class Descended:
    """What was found for one model.

    Attributes:
        orders: The orders of the streams.
        blocks: What was found in each block.
        streams: What the report has of each stream.
    """

    orders: Orders
    blocks: Mapping[str, Entry]
    streams: Mapping[str, Entry]


def round_parts(name: str, blocks: Sequence[str]) -> Iterator[str]:
    """Yields what the journal calls all that may be found for one model.

    Args:
        name: What begins the names of its parts.
        blocks: Its blocks.
    """
    yield f"{name}: start"
    for number in range(1, MAX_ROUNDS + 1):
        yield f"{name}: round {number}: streams"
        yield from (f"{name}: round {number}: {block}" for block in blocks)


def descend(
    name: str,
    plan: ModelPlan,
    parts: Parts,
    readers: Callable[[], tuple[TensorReader, TensorReader]],
    match_blocks: MatchBlocks,
) -> Descended:
    """Matches the streams and the blocks of a model in turn. Collective.

    Args:
        name: What begins the names of the model's parts in the journal.
        plan: What is permuted in the model.
        parts: The journal, and the ranks.
        readers: Opens readers of the model and of the reference.
        match_blocks: Matches all blocks.

    Raises:
        CheckpointError: If a tensor holds NaN or infinity.
    """
    same = {stream.name: torch.arange(stream.size) for stream in plan.streams}

    def improve(orders: Orders, inside: Axes, *, alone: bool) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for stream in plan.streams:
            parts.tell(f"aligning the residual stream of {stream.name}")
            found[stream.name] = _improved(plan, stream, orders, inside, readers, parts.ranks, alone=alone)
        return found

    def one_round(number: int, orders: Orders) -> _Round:
        fixed = axes_of(plan, orders)
        blocks = match_blocks(f"{name}: round {number}", f" (round {number})", fixed)
        inside = inside_axes(plan, blocks)
        streams = parts.together(f"{name}: round {number}: streams", lambda: improve(orders, inside, alone=False))
        return _Round(orders, blocks, streams)

    first = best = one_round(1, same)
    number = 1
    begun = parts.together(f"{name}: start", lambda: improve(same, {}, alone=True))
    start = {stream.name: decoded(begun[stream.name]["members"], stream.size) for stream in plan.streams}
    if not _are_equal(start, same):
        number = 2
        other = one_round(number, start)
        best = other if _is_better(other, best) else best
    while number < MAX_ROUNDS and not _are_equal(best.improved(plan), best.orders):
        number += 1
        following = one_round(number, best.improved(plan))
        if not _is_better(following, best):
            break
        best = following
    blocks = {block: {**entry, "before": first.blocks[block]["before"]} for block, entry in best.blocks.items()}
    streams = {stream.name: _reported(stream, best, number) for stream in plan.streams}
    return Descended(best.orders, blocks, streams)


def axes_of(plan: ModelPlan, orders: Orders) -> dict[str, dict[int, torch.Tensor]]:
    """What of a model is permuted by orders of its streams, by names on disk."""
    axes: dict[str, dict[int, torch.Tensor]] = {}
    for stream in plan.streams:
        if not torch.equal(orders[stream.name], torch.arange(stream.size)):
            for tensor in stream.tensors:
                axes.setdefault(tensor.key, {})[tensor.axis] = orders[stream.name]
    return axes


def inside_axes(plan: ModelPlan, entries: Mapping[str, Entry]) -> dict[str, dict[int, torch.Tensor]]:
    """What of a model is permuted inside its blocks, by names on disk."""
    axes: dict[str, dict[int, torch.Tensor]] = {}
    for block in plan.blocks:
        for parameter, of in block.axes(block.choices(entries[block.name])).items():
            axes.setdefault(plan.model.mapping.renamed[parameter], {}).update(of)
    return axes


def joined_axes(*every: Axes) -> dict[str, dict[int, torch.Tensor]]:
    """Puts axes together that have no dimension of a tensor in common."""
    joined: dict[str, dict[int, torch.Tensor]] = {}
    for axes in every:
        for key, of in axes.items():
            assert not joined.get(key, {}).keys() & of.keys(), key
            joined.setdefault(key, {}).update(of)
    return joined


def _reported(stream: StreamPlan, best: _Round, rounds: int) -> dict[str, Any]:
    entry, order = best.streams[stream.name], best.orders[stream.name]
    norm, inside = math.sqrt(entry["ours"] * entry["theirs"]) or 1.0, best.blocks.values()
    moved = int((order != torch.arange(stream.size)).sum())
    stays = not moved and all(block["before"] == block["after"] for block in inside)
    return {
        "size": stream.size,
        "moved": moved,
        "rounds": rounds,
        "before": entry["plain"] / norm,
        "after": entry["plain" if stays else "value"] / norm,
        "members": encoded(order),
    }


def _are_equal(one: Orders, other: Orders) -> bool:
    return all(torch.equal(order, other[name]) for name, order in one.items())


def _is_better(one: _Round, other: _Round) -> bool:
    return one.value > other.value + GAIN * abs(other.value)


def _improved(
    plan: ModelPlan,
    stream: StreamPlan,
    orders: Orders,
    inside: Axes,
    readers: Callable[[], tuple[TensorReader, TensorReader]],
    ranks: Ranks,
    *,
    alone: bool,
) -> dict[str, Any]:
    """Finds the best order of a stream, given all others and the blocks. Collective.

    Args:
        plan: What is permuted in the model.
        stream: The stream.
        orders: The orders of all streams.
        inside: What is permuted inside the blocks, by names on disk.
        readers: Opens readers of the model and of the reference.
        ranks: The ranks, which share the tensors.
        alone: Whether only tensors count that nothing else is permuted in.

    Returns:
        The order, Σ ⟨a, b⟩ as it is in the order given and with nothing permuted, Σ b², Σ a².
    """
    size = stream.size
    total_DD = torch.zeros(size, size, dtype=torch.float64)
    numbers = torch.zeros(3, dtype=torch.float64)
    others = joined_axes(inside, axes_of(plan, orders))
    tensors = [each for each in stream.compared if not (alone and plan.is_shared(each))]
    for tensor in tensors[ranks.rank :: ranks.size]:
        _add_tensor(total_DD, numbers, tensor, others.get(tensor.key, {}), *readers())
    ranks.add_up_(total_DD)
    ranks.add_up_(numbers)

    def best() -> dict[str, Any]:
        before = orders[stream.name].numpy()
        members, value = assign(total_DD.numpy(), before, GAIN)
        plain, ours, theirs = numbers.tolist()
        return {
            "value": value,
            "members": encoded(torch.from_numpy(members)),
            "plain": plain,
            "ours": ours,
            "theirs": theirs,
        }

    return ranks.by_first(best)


def _add_tensor(
    total_DD: torch.Tensor,
    numbers: torch.Tensor,
    tensor: StreamTensor,
    axes: Mapping[int, torch.Tensor],
    ours: TensorReader,
    theirs: TensorReader,
) -> None:
    """Adds what one tensor says of a stream: ⟨a_n, b_m⟩ of all features; ⟨a, b⟩ as it lies there, Σ b², Σ a²."""
    assert tensor.other is not None
    shape, size = ours.checkpoint.tensors[tensor.key].shape, len(total_DD)
    others = {axis: index for axis, index in axes.items() if axis != tensor.axis}
    for rows in _pieces(shape, 0 if others else tensor.axis):
        mine, other = _read(ours, tensor.key, rows), _read(theirs, tensor.other, rows)
        numbers += torch.stack([(mine * other).sum(dtype=torch.float64), _square(mine), _square(other)])
        for axis, index in others.items():
            mine = mine.index_select(axis, index)
        left, right = (x.movedim(tensor.axis, 0).reshape(size, -1).contiguous() for x in (other, mine))
        total_DD += product(left, right)


def _pieces(shape: Sequence[int], fixed: int) -> Iterator[slice | None]:
    """Yields rows of a large tensor, a piece at a time; all of one whose rows must stay together."""
    row_bytes = 4 * math.prod(shape[1:])
    if fixed == 0 or row_bytes * shape[0] <= PIECE_BYTES:
        yield None
        return
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _read(reader: TensorReader, key: str, rows: Rows) -> torch.Tensor:
    tensor = reader.read(key, rows)
    problem = why_unmergeable(reader.checkpoint.name, key, tensor)
    if problem is not None:
        raise CheckpointError(problem)
    return tensor.to(torch.float32)


def _square(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(dtype=torch.float64)
