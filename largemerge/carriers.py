"""Ways by which tensors travel between ranks, a piece of some megabytes at a time.

Ranks that share a machine's memory exchange through it: each writes its piece where the others see it, and the owner
adds them up. All others go through torch.distributed: gloo or NCCL.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from largemerge.node import Node

PIECE_BYTES = 8 << 20
"""That travel at once. Through shared memory every rank holds two such pieces there, else one beside its tensors."""
SHARED_BYTES = 4 * PIECE_BYTES
"""Of shared memory that a rank holds: two pieces for the exchange with all, two for that with its team."""
GPU_PIECE_BYTES = 64 << 20
"""That travel at once on a GPU, where every call costs a launch."""

_distributed: Any = torch.distributed

Piece = Sequence[torch.Tensor]
"""Views of one dtype that travel together."""


class Carrier(Protocol):
    """A way between ranks; every call is collective."""

    def add_up_(self, piece: Piece, owner: int) -> None:
        """The owner's views become the sum of all; the others' are of no use afterwards."""

    def copy_(self, piece: Piece, owner: int) -> None:
        """Everybody's views become the owner's."""


class Collectives:
    """Through torch.distributed: gloo or NCCL.

    Args:
        rank: This one.
        group: Of these calls alone.
        device: Of the tensors.
    """

    def __init__(self, rank: int, group: Any, device: torch.device) -> None:
        self._rank, self._group, self._device = rank, group, device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def add_up_(self, piece: Piece, owner: int) -> None:
        """See `Carrier`."""
        flat = self._flat(piece)
        _distributed.reduce(flat, dst=owner, group=self._group)
        if self._rank == owner:
            _unpack(flat, piece)

    def copy_(self, piece: Piece, owner: int) -> None:
        """See `Carrier`."""
        flat = self._flat(piece)
        _distributed.broadcast(flat, src=owner, group=self._group)
        if self._rank != owner:
            _unpack(flat, piece)

    def _flat(self, piece: Piece) -> torch.Tensor:
        """All views as one vector: themselves, where they are one already."""
        if len(piece) == 1 and piece[0].is_contiguous():
            return piece[0].view(-1)
        if not len(self._memory):
            self._memory = torch.empty(piece_bytes(self._device), dtype=torch.uint8, device=self._device)
        flat = self._memory[: sum(view.nbytes for view in piece)].view(piece[0].dtype)
        _pack(piece, flat)
        return flat


class SharedMemory:
    """Through memory that all ranks see.

    Of the two halves of a rank's buffer one is written while the other may still be read: a rank that has met the
    others for the next piece has read the one before.

    Args:
        rank: This one.
        members: The ranks that exchange.
        node: That they share.
        meet: Collective: returns when all members have called it.
    """

    def __init__(self, rank: int, members: Sequence[int], node: Node, meet: Callable[[], None]) -> None:
        self._rank, self._meet, self._half = rank, meet, 0
        paths = {member: node.shared_file(f"exchange-{member}") for member in members}
        with paths[rank].open("xb") as stream:
            os.posix_fallocate(stream.fileno(), 0, 2 * PIECE_BYTES)  # too little room shows here, not as a signal
        meet()
        self._buffers: dict[int, torch.Tensor] = {}
        for member, path in paths.items():
            with path.open("r+b") as stream:
                self._buffers[member] = torch.frombuffer(mmap.mmap(stream.fileno(), 0), dtype=torch.uint8)
        meet()
        paths[rank].unlink()

    def add_up_(self, piece: Piece, owner: int) -> None:
        """See `Carrier`."""
        half = self._next_half()
        if self._rank != owner:
            _pack(piece, self._seen(self._rank, half, piece))
        self._meet()
        if self._rank == owner:
            for other in self._buffers:
                if other != owner:
                    _unpack(self._seen(other, half, piece), piece, adds=True)

    def copy_(self, piece: Piece, owner: int) -> None:
        """See `Carrier`."""
        half = self._next_half()
        if self._rank == owner:
            _pack(piece, self._seen(owner, half, piece))
        self._meet()
        if self._rank != owner:
            _unpack(self._seen(owner, half, piece), piece)

    def _next_half(self) -> int:
        self._half = 1 - self._half
        return self._half

    def _seen(self, rank: int, half: int, piece: Piece) -> torch.Tensor:
        start = half * PIECE_BYTES
        return self._buffers[rank][start : start + sum(view.nbytes for view in piece)].view(piece[0].dtype)


def open_carrier(rank: int, members: Sequence[int], node: Node, device: torch.device) -> Carrier | None:
    """Collective: between some ranks, `None` for all others."""
    group = _distributed.new_group(list(members))
    if rank not in members:
        return None
    if device.type != "cpu" or not node.prefix or not set(members) <= set(node.others):
        return Collectives(rank, group, device)
    token = torch.zeros(1)

    def meet() -> None:
        _distributed.all_reduce(token, group=group)

    return SharedMemory(rank, members, node, meet)


def piece_bytes(device: torch.device) -> int:
    """That travel at once."""
    return PIECE_BYTES if device.type == "cpu" else GPU_PIECE_BYTES


def cut(views: Sequence[torch.Tensor], most: int) -> Iterator[Piece]:
    """Parts of the views, in order, as many together as are of one dtype and have `most` bytes at most."""
    piece: list[torch.Tensor] = []
    filled = 0
    for part in (part for view in views for part in _split(view, most)):
        if piece and (filled + part.nbytes > most or part.dtype != piece[0].dtype):
            yield piece
            piece, filled = [], 0
        piece.append(part)
        filled += part.nbytes
    if piece:
        yield piece


def _split(view: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Rows of a tensor, as many together as have `most` bytes at most."""
    if view.nbytes <= most:
        if view.numel():
            yield view
        return
    row_bytes = view.nbytes // len(view)
    if row_bytes > most:
        for row in view:
            yield from _split(row, most)
        return
    step = most // row_bytes
    yield from (view[start : start + step] for start in range(0, len(view), step))


def _pack(piece: Piece, flat: torch.Tensor) -> None:
    start = 0
    for view in piece:
        flat[start : start + view.numel()].view(view.shape).copy_(view)
        start += view.numel()


def _unpack(flat: torch.Tensor, piece: Piece, *, adds: bool = False) -> None:
    start = 0
    for view in piece:
        part = flat[start : start + view.numel()].view(view.shape)
        if adds:
            view.add_(part)
        elif part.data_ptr() != view.data_ptr():
            view.copy_(part)
        start += view.numel()
