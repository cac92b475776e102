"""Reduce and broadcast between ranks, in the background.

A thread carries out one collective after the other, in the same order on all ranks, while the main thread computes.
Tensors are moved in chunks of some megabytes, so that little memory is needed beside them:

    AsyncCollectives    reduce, broadcast, all_reduce: queued, each returns a `Future` to wait for
      Transport         moves one chunk
        SharedMemoryTransport    ranks of one machine: each writes its chunk where the owner sees it and adds it up
        TorchTransport           all others: torch.distributed, by gloo or NCCL
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

CHUNK_BYTES = 8 << 20
"""Size of one chunk of a collective, in bytes: of the buffer that a rank holds for it, and twice that in shared memory.
"""
GPU_CHUNK_BYTES = 64 << 20
"""Size of one chunk on a GPU, where every call costs a launch."""
SHARED_BYTES = 4 * CHUNK_BYTES
"""Shared memory of one rank in bytes: two chunks for collectives of all ranks, two for those of its group."""

_distributed: Any = torch.distributed  # its collectives carry no types

Chunk = Sequence[torch.Tensor]
"""Views of one dtype that are moved together."""


class AsyncCollectives:
    """Collectives that run in a thread. All ranks must call the same methods in the same order.

    Args:
        ranks: The ranks of the merge.
        transport: Moves chunks between all ranks.
        device: The device of all tensors.
        group: The ranks of this rank's group and the transport between them, if it is in one.
    """

    def __init__(
        self,
        ranks: Ranks,
        transport: Transport,
        device: torch.device,
        group: tuple[Sequence[int], Transport] | None = None,
    ) -> None:
        self._ranks, self._transport, self._device, self._group = ranks, transport, device, group
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._stream = SideStream(device)
        # Where another rank is gone, this thread may stand still for ever; the process ends all the same.
        self._thread = threading.Thread(target=self._run, name="largemerge-exchange", daemon=True)
        self._thread.start()

    def reduce(self, views: Sequence[torch.Tensor], owner: int) -> Future[Any]:
        """Makes the owner's tensors the sums of all ranks' (collective); those of other ranks are overwritten."""
        return self._submit(views, lambda chunk: self._transport.reduce_(chunk, owner))

    def broadcast(self, views: Sequence[torch.Tensor], owner: int) -> Future[Any]:
        """Copies the owner's tensors to all ranks (collective)."""
        return self._submit(views, lambda chunk: self._transport.broadcast_(chunk, owner))

    def all_reduce(self, views: Sequence[torch.Tensor]) -> Future[Any]:
        """Makes the tensors of all ranks of this rank's group the sums of theirs (collective in the group)."""
        assert self._group is not None
        members, transport = self._group

        def move(chunk: Chunk) -> None:
            transport.reduce_(chunk, members[0])
            transport.broadcast_(chunk, members[0])

        return self._submit(views, move, times=2)

    def wait(self, work: Future[Any]) -> None:
        """Waits until a collective is finished; before, nobody may touch its tensors."""
        with self._ranks.blocked():
            event = work.result()
        self._stream.wait(event)

    def close(self) -> None:
        """Finishes all collectives and ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _submit(self, views: Sequence[torch.Tensor], move: Callable[[Chunk], None], *, times: int = 1) -> Future[Any]:
        ready = self._stream.record()

        def run() -> Any:
            with self._stream.wait_then_run(ready), self._ranks.timed(times * sum(view.nbytes for view in views)):
                for chunk in split_into_chunks(views, chunk_bytes(self._device)):
                    move(chunk)
            return self._stream.done()

        work: Future[Any] = Future()
        self._queue.put((run, work))
        return work

    def _run(self) -> None:
        failure: BaseException | None = None
        while (submitted := self._queue.get()) is not None:
            run, work = submitted
            try:
                if failure is not None:  # the ranks are no longer at the same collective
                    raise failure
                work.set_result(run())
            except BaseException as error:
                failure = error
                work.set_exception(error)


@contextmanager
def open_collectives(
    ranks: Ranks, node: Node, device: torch.device, rank_groups: Sequence[Sequence[int]]
) -> Iterator[AsyncCollectives | None]:
    """Opens collectives between all ranks and within each group (collective); yields `None` for a single rank."""
    if ranks.size == 1:
        yield None
        return
    with ranks.blocked(), ranks.timed():
        transport = open_transport(ranks.rank, range(ranks.size), node, device)
        assert transport is not None
        group = None
        for members in rank_groups:
            own = open_transport(ranks.rank, members, node, device) if len(members) > 1 else None
            group = (members, own) if own is not None else group
    collectives = AsyncCollectives(ranks, transport, device, group)
    yield collectives
    collectives.close()  # not after an error: the others may be gone


class Transport(Protocol):
    """A way to move chunks between some ranks; every call is collective."""

    def reduce_(self, chunk: Chunk, owner: int) -> None:
        """Makes the owner's views the sums of all ranks'; those of other ranks may be overwritten."""

    def broadcast_(self, chunk: Chunk, owner: int) -> None:
        """Copies the owner's views to all ranks."""


def open_transport(rank: int, members: Sequence[int], node: Node, device: torch.device) -> Transport | None:
    """Opens a transport between some ranks (collective of all ranks); `None` for those that are not among them."""
    group = _distributed.new_group(list(members))
    if rank not in members:
        return None
    if device.type != "cpu" or not node.prefix or not set(members) <= set(node.others):
        return TorchTransport(rank, group, device)
    token = torch.zeros(1)

    def meet() -> None:
        _distributed.all_reduce(token, group=group)

    return SharedMemoryTransport(rank, members, node, meet)


class TorchTransport:
    """Moves chunks by torch.distributed: gloo or NCCL (see `Transport`).

    Args:
        rank: This rank.
        group: A process group that nothing else uses.
        device: The device of all tensors.
    """

    def __init__(self, rank: int, group: Any, device: torch.device) -> None:
        self._rank, self._group, self._device = rank, group, device
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reduce_(self, chunk: Chunk, owner: int) -> None:
        """Makes the owner's views the sums of all ranks'."""
        flat = self._flat(chunk)
        _distributed.reduce(flat, dst=owner, group=self._group)
        if self._rank == owner:
            _unpack(flat, chunk)

    def broadcast_(self, chunk: Chunk, owner: int) -> None:
        """Copies the owner's views to all ranks."""
        flat = self._flat(chunk)
        _distributed.broadcast(flat, src=owner, group=self._group)
        if self._rank != owner:
            _unpack(flat, chunk)

    def _flat(self, chunk: Chunk) -> torch.Tensor:
        """Returns all views as one vector; without a copy where there is one, and it is contiguous."""
        if len(chunk) == 1 and chunk[0].is_contiguous():
            return chunk[0].view(-1)
        if not len(self._buffer):
            self._buffer = torch.empty(chunk_bytes(self._device), dtype=torch.uint8, device=self._device)
        flat = self._buffer[: sum(view.nbytes for view in chunk)].view(chunk[0].dtype)
        _pack(chunk, flat)
        return flat


class SharedMemoryTransport:
    """Moves chunks by memory that all members see (see `Transport`).

    A rank's buffer has two halves, used in turn: one is written while another rank may still read the other. A rank
    that has met the others for the next chunk has read the one before.

    Args:
        rank: This rank.
        members: The ranks that exchange.
        node: Their machine.
        meet: Returns when all members have called it.
    """

    def __init__(self, rank: int, members: Sequence[int], node: Node, meet: Callable[[], None]) -> None:
        self._rank, self._meet, self._half = rank, meet, 0
        paths = {member: node.shared_file(f"exchange-{member}") for member in members}
        with paths[rank].open("xb") as stream:
            os.posix_fallocate(stream.fileno(), 0, 2 * CHUNK_BYTES)  # too little room shows here, not as a signal
        meet()
        self._buffers: dict[int, torch.Tensor] = {}
        for member, path in paths.items():
            with path.open("r+b") as stream:
                self._buffers[member] = torch.frombuffer(mmap.mmap(stream.fileno(), 0), dtype=torch.uint8)
        meet()
        paths[rank].unlink()

    def reduce_(self, chunk: Chunk, owner: int) -> None:
        """Makes the owner's views the sums of all ranks'."""
        half = self._next_half()
        if self._rank != owner:
            _pack(chunk, self._buffer(self._rank, half, chunk))
        self._meet()
        if self._rank == owner:
            for other in self._buffers:
                if other != owner:
                    _unpack(self._buffer(other, half, chunk), chunk, add=True)

    def broadcast_(self, chunk: Chunk, owner: int) -> None:
        """Copies the owner's views to all ranks."""
        half = self._next_half()
        if self._rank == owner:
            _pack(chunk, self._buffer(owner, half, chunk))
        self._meet()
        if self._rank != owner:
            _unpack(self._buffer(owner, half, chunk), chunk)

    def _next_half(self) -> int:
        self._half = 1 - self._half
        return self._half

    def _buffer(self, rank: int, half: int, chunk: Chunk) -> torch.Tensor:
        """The part of a rank's buffer that holds the chunk, as a vector of its dtype."""
        start = half * CHUNK_BYTES
        return self._buffers[rank][start : start + sum(view.nbytes for view in chunk)].view(chunk[0].dtype)


def chunk_bytes(device: torch.device) -> int:
    """Size of one chunk of a collective, in bytes."""
    return CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES


def split_into_chunks(views: Sequence[torch.Tensor], max_bytes: int) -> Iterator[Chunk]:
    """Splits tensors into chunks of one dtype and at most `max_bytes`, in order; small neighbours share a chunk."""
    chunk: list[torch.Tensor] = []
    filled = 0
    for part in (part for view in views for part in _split(view, max_bytes)):
        if chunk and (filled + part.nbytes > max_bytes or part.dtype != chunk[0].dtype):
            yield chunk
            chunk, filled = [], 0
        chunk.append(part)
        filled += part.nbytes
    if chunk:
        yield chunk


def _split(view: torch.Tensor, max_bytes: int) -> Iterator[torch.Tensor]:
    """Splits one tensor, between rows where they are small enough."""
    if view.nbytes <= max_bytes:
        if view.numel():
            yield view
        return
    row_bytes = view.nbytes // len(view)
    if row_bytes > max_bytes:
        for row in view:
            yield from _split(row, max_bytes)
        return
    step = max_bytes // row_bytes
    yield from (view[start : start + step] for start in range(0, len(view), step))


def _pack(chunk: Chunk, flat: torch.Tensor) -> None:
    """Copies all views into a vector."""
    start = 0
    for view in chunk:
        flat[start : start + view.numel()].view(view.shape).copy_(view)
        start += view.numel()


def _unpack(flat: torch.Tensor, chunk: Chunk, *, add: bool = False) -> None:
    """Copies a vector into all views, or adds it to them."""
    start = 0
    for view in chunk:
        part = flat[start : start + view.numel()].view(view.shape)
        if add:
            view.add_(part)
        elif part.data_ptr() != view.data_ptr():
            view.copy_(part)
        start += view.numel()
