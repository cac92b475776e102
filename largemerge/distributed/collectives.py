"""Ways by which tensors travel between ranks, a piece of some megabytes at a time.

Ranks that share a machine's memory exchange through it: each writes its piece where the others see it, and the owner
adds them up. All others go through torch.distributed: gloo or NCCL.

Sums that are added up, and weights that are spread, among ranks, while they compute.

    views of tensors → pieces of some megabytes → a carrier → the owner's views, or everybody's

A thread does it, one order after the other, the same on all ranks, while the main thread goes on.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from largemerge.devices import SideStream
from largemerge.distributed.ranks import Ranks
from largemerge.distributed.shared_memory import Node

PIECE_BYTES = 8 << 20
"""That travel at once. Through shared memory every rank holds two such pieces there, else one beside its tensors."""
SHARED_BYTES = 4 * PIECE_BYTES
"""Of shared memory that a rank holds: two pieces for the exchange with all, two for that with its team."""
GPU_PIECE_BYTES = 64 << 20
"""That travel at once on a GPU, where every call costs a launch."""

_distributed: Any = torch.distributed

Piece = Sequence[torch.Tensor]
"""Views of one dtype that travel together."""


class Transport(Protocol):
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
        """See `Transport`."""
        flat = self._flat(piece)
        _distributed.reduce(flat, dst=owner, group=self._group)
        if self._rank == owner:
            _unpack(flat, piece)

    def copy_(self, piece: Piece, owner: int) -> None:
        """See `Transport`."""
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
        """See `Transport`."""
        half = self._next_half()
        if self._rank != owner:
            _pack(piece, self._seen(self._rank, half, piece))
        self._meet()
        if self._rank == owner:
            for other in self._buffers:
                if other != owner:
                    _unpack(self._seen(other, half, piece), piece, adds=True)

    def copy_(self, piece: Piece, owner: int) -> None:
        """See `Transport`."""
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


def open_transport(rank: int, members: Sequence[int], node: Node, device: torch.device) -> Transport | None:
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


class AsyncCollectives:
    """Carries out orders in the background; all ranks give the same orders, one after the other.

    Args:
        ranks: All of them.
        carrier: The way between all.
        device: Of the tensors.
        rank_group: This rank's, and the way between its members, if it has one.
    """

    def __init__(
        self,
        ranks: Ranks,
        carrier: Transport,
        device: torch.device,
        rank_group: tuple[Sequence[int], Transport] | None = None,
    ) -> None:
        self._ranks, self._transport, self._device, self._rank_group = ranks, carrier, device, rank_group
        self._orders: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._stream = SideStream(device)
        # Where another rank is gone, this thread may stand still for ever; the process ends all the same.
        self._thread = threading.Thread(target=self._run, name="largemerge-exchange", daemon=True)
        self._thread.start()

    def reduce(self, views: Sequence[torch.Tensor], owner: int) -> Future[Any]:
        """Collective: the owner's tensors become the sums of all; the others' are of no use afterwards."""
        return self._order(views, lambda piece: self._transport.add_up_(piece, owner))

    def copy(self, views: Sequence[torch.Tensor], owner: int) -> Future[Any]:
        """Collective: everybody's tensors become the owner's."""
        return self._order(views, lambda piece: self._transport.copy_(piece, owner))

    def share(self, views: Sequence[torch.Tensor]) -> Future[Any]:
        """Collective in this rank's team: everybody's tensors become the sums of all."""
        assert self._rank_group is not None
        members, carrier = self._rank_group

        def carry(piece: Piece) -> None:
            carrier.add_up_(piece, members[0])
            carrier.copy_(piece, members[0])

        return self._order(views, carry, times=2)

    def wait(self, order: Future[Any]) -> None:
        """Until it is carried out: nobody may touch its tensors before."""
        with self._ranks.blocked():
            arrived = order.result()
        self._stream.wait(arrived)

    def close(self) -> None:
        """After the last order."""
        self._orders.put(None)
        self._thread.join()

    def _order(self, views: Sequence[torch.Tensor], carry: Callable[[Piece], None], *, times: int = 1) -> Future[Any]:
        ready = self._stream.record()

        def work() -> Any:
            with self._stream.wait_then_run(ready), self._ranks.timed(times * sum(view.nbytes for view in views)):
                for piece in cut(views, piece_bytes(self._device)):
                    carry(piece)
            return self._stream.done()

        order: Future[Any] = Future()
        self._orders.put((work, order))
        return order

    def _run(self) -> None:
        failure: BaseException | None = None
        while (order := self._orders.get()) is not None:
            work, result = order
            try:
                if failure is not None:  # the ranks are no longer at the same order
                    raise failure
                result.set_result(work())
            except BaseException as error:
                failure = error
                result.set_exception(error)


@contextmanager
def open_collectives(
    ranks: Ranks, node: Node, device: torch.device, rank_groups: Sequence[Sequence[int]]
) -> Iterator[AsyncCollectives | None]:
    """Collective: between all ranks, and between those of every team; `None` for a single one."""
    if ranks.size == 1:
        yield None
        return
    everybody = open_transport(ranks.rank, range(ranks.size), node, device)
    assert everybody is not None
    rank_group = None
    for members in rank_groups:
        own = open_transport(ranks.rank, members, node, device) if len(members) > 1 else None
        rank_group = (members, own) if own is not None else rank_group
    exchange = AsyncCollectives(ranks, everybody, device, rank_group)
    yield exchange
    exchange.close()  # not after an error: the others may be gone
