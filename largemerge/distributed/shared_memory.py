"""What ranks of one machine share: a candidate's block is read by one of them, and mapped by the others.

The rank that reads puts the tensors into a file in shared memory and makes a link to it for every rank that waits; each
takes its link away when it has mapped the file, so the memory goes when the last one lets go of it.

    one rank:     disk ──► tensors ──► /dev/shm/largemerge-PID-BLOCK.part ──► .for-1  .for-2
    rank 1, 2:                                                       map, unlink │      │

Shared memory is no anonymous memory of any of them. Where there is too little, every rank reads for itself.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from largemerge.checkpoint.tensor_info import Tensors, dtype_name
from largemerge.config_file import gib
from largemerge.distributed.ranks import Ranks

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "largemerge-"
_ALIGNMENT = 64
_POLL_SECONDS = 0.001
_ABANDONED_SECONDS = 24 * 3600
_MOST_SHARE = 0.9  # of what is free when the merge begins


@dataclass(frozen=True)
class Node:
    """Ranks that share a machine's memory.

    Attributes:
        rank: This one.
        others: All ranks of this machine, this one among them, in order.
        prefix: Of the names of files in shared memory; empty where nothing is shared.
    """

    rank: int
    others: tuple[int, ...]
    prefix: str

    def reader(self, wanted_by: Sequence[int]) -> int:
        """Which rank reads what the ranks `wanted_by` want: one for each machine; this one where nothing is shared."""
        here = [rank for rank in wanted_by if rank in self.others]
        return min(here) if self.prefix and here else self.rank

    def load(self, key: str, wanted_by: Sequence[int], read: Callable[[], Tensors]) -> Tensors:
        """Tensors that some ranks want, read by one of those that share a machine.

        Args:
            key: Names them, the same on all ranks, and once in a merge.
            wanted_by: All ranks that call this; this one among them.
            read: Reads them from disk.
        """
        here = [rank for rank in wanted_by if rank in self.others]
        if len(here) < 2 or not self.prefix:
            return read()
        path = self.shared_file(key)
        if self.rank != min(here):
            return _map(_waited_for(_link(path, self.rank)))
        _write(path, read())
        for rank in here[1:]:
            os.link(path, _link(path, rank))
        return _map(path)

    def shared_file(self, name: str) -> Path:
        """A file that all ranks of this machine see."""
        return SHARED_MEMORY / f"{self.prefix}{name}"

    def clean_up(self) -> None:
        """Takes away what is left of this merge in shared memory, after an error too."""
        if self.prefix and self.rank == min(self.others):
            for path in SHARED_MEMORY.glob(f"{self.prefix}*"):
                path.unlink(missing_ok=True)


ALONE = Node(0, (0,), "")
"""Of a single process."""


def find_node(ranks: Ranks, largest_bytes: int, exchange_bytes: int) -> tuple[Node, str]:
    """Collective: which ranks share this machine's memory.

    Args:
        ranks: Of the merge.
        largest_bytes: Of the largest block of a candidate; about three are held at once.
        exchange_bytes: That each rank holds there for sums and merged weights on their way.

    Returns:
        The node; and why nothing is shared, where something could be.
    """
    if ranks.size == 1:
        return ALONE, ""
    places = ranks.gather((_memory_id(), os.getpid(), _free_bytes()))
    own = places[ranks.rank]
    here = tuple(rank for rank, place in enumerate(places) if own[0] and place[0] == own[0])
    if len(here) < 2:
        return Node(ranks.rank, (ranks.rank,), ""), ""
    first = places[here[0]]
    needed = 3 * largest_bytes + len(here) * exchange_bytes
    if needed > first[2] * _MOST_SHARE:
        reason = (
            f"{SHARED_MEMORY} has {gib(first[2])} free, and {gib(needed)} are needed: every rank reads for itself, and "
            "sums go through the network's protocols"
        )
        return Node(ranks.rank, here, ""), reason
    if ranks.rank == here[0]:
        _remove_abandoned()
    return Node(ranks.rank, here, f"{_PREFIX}{first[1]}-"), ""


def _memory_id() -> str:
    """The same for processes that see the same shared memory."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {SHARED_MEMORY.stat().st_dev}" if os.access(SHARED_MEMORY, os.W_OK) else ""
    except OSError:
        return ""


def _free_bytes() -> int:
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0


def _remove_abandoned() -> None:
    """Files of merges that were killed; those of living ones are mapped, and their names gone, within moments."""
    for path in SHARED_MEMORY.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _link(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.for-{rank}")


def _waited_for(path: Path) -> Path:
    while not path.exists():
        time.sleep(_POLL_SECONDS)
    return path


def _write(path: Path, tensors: Tensors) -> None:
    """Layout, then the tensors; they go one by one as they are copied."""
    layout, offset = [], 0
    for name, tensor in tensors.items():
        layout.append((name, dtype_name(tensor.dtype), list(tensor.shape), offset))
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps(layout).encode()
    start = _start_of_tensors(len(header))
    with path.open("xb+") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, start + offset))  # too little room shows here, not as a signal
        with mmap.mmap(stream.fileno(), 0) as memory:
            memory[:8] = len(header).to_bytes(8, "little")
            memory[8 : 8 + len(header)] = header
            for name, dtype, shape, position in layout:
                tensor = tensors.pop(name)
                if tensor.nbytes:
                    _view(memory, dtype, shape, start + position).copy_(tensor)


def _map(path: Path) -> Tensors:
    """The tensors of a file, in its memory; writing to them would change nobody else's. The name goes."""
    with path.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    path.unlink()
    length = int.from_bytes(memory[:8], "little")
    layout = json.loads(memory[8 : 8 + length])
    start = _start_of_tensors(length)
    return {name: _view(memory, dtype, shape, start + position) for name, dtype, shape, position in layout}


def _view(memory: mmap.mmap, dtype_text: str, shape: Sequence[int], offset: int) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, dtype_text)
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(list(shape), dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(list(shape))


def _start_of_tensors(header_bytes: int) -> int:
    return -(-(8 + header_bytes) // _ALIGNMENT) * _ALIGNMENT
