"""Tensors that ranks of one machine share: one of them reads a candidate's block, the others map it.

The rank that reads writes the tensors into a safetensors file in shared memory, and makes a link to it for every rank
that waits. Each rank removes its link once it has mapped the file, so the memory is freed when the last one drops its
tensors.

    rank 0:       disk ──► tensors ──► /dev/shm/largemerge-PID-BLOCK ──► .for-1  .for-2
    rank 1, 2:                                                  map, unlink │      │

Shared memory is not anonymous memory of any rank. Where there is too little of it, every rank reads for itself.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from largemerge.checkpoint.tensor_info import OutputTensor, Tensors
from largemerge.checkpoint.writer import ShardWriter, layout_shards
from largemerge.distributed.ranks import Ranks
from largemerge.units import gib

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "largemerge-"
_POLL_SECONDS = 0.001
_ABANDONED_SECONDS = 24 * 3600
_MAX_SHARE = 0.9  # of the shared memory that is free when the merge begins


@dataclass(frozen=True)
class Node:
    """Ranks that share a machine's memory.

    Attributes:
        rank: This rank.
        others: All ranks of this machine in order, this one included.
        prefix: Start of the names of this merge's files in shared memory; empty where nothing is shared.
    """

    rank: int
    others: tuple[int, ...]
    prefix: str

    def reader(self, wanted_by: Sequence[int]) -> int:
        """Returns the rank that reads for this one, among `wanted_by`: itself where nothing is shared."""
        here = [rank for rank in wanted_by if rank in self.others]
        return min(here) if self.prefix and here else self.rank

    def load(self, key: str, wanted_by: Sequence[int], read: Callable[[], Tensors]) -> Tensors:
        """Loads tensors that several ranks want; one rank of each machine reads them.

        Args:
            key: Name of these tensors: the same on all ranks, and used once in a merge.
            wanted_by: All ranks that call this, this one included.
            read: Reads the tensors from disk.

        Raises:
            OSError: If there is not room enough in shared memory.
        """
        here = [rank for rank in wanted_by if rank in self.others]
        if len(here) < 2 or not self.prefix:
            return read()
        path = self.shared_file(key)
        if self.rank != min(here):
            return _map(_wait_for(_link(path, self.rank)))
        _write(path, read())
        for rank in here[1:]:
            os.link(path, _link(path, rank))
        return _map(path)

    def shared_file(self, name: str) -> Path:
        """Path of a file in shared memory, which all ranks of this machine see."""
        return SHARED_MEMORY / f"{self.prefix}{name}"

    def clean_up(self) -> None:
        """Removes what is left of this merge in shared memory, which after an error may be much."""
        if self.prefix and self.rank == min(self.others):
            for path in SHARED_MEMORY.glob(f"{self.prefix}*"):
                path.unlink(missing_ok=True)


ALONE = Node(0, (0,), "")
"""The node of a single process."""


def find_node(ranks: Ranks, largest_bytes: int, exchange_bytes: int) -> tuple[Node, str]:
    """Finds the ranks that share this machine's memory (collective).

    Args:
        ranks: The ranks of the merge.
        largest_bytes: Size of a candidate's largest block; about three are in shared memory at once.
        exchange_bytes: Size of each rank's buffers for collectives in shared memory.

    Returns:
        The node, and the reason if nothing is shared although several ranks are on this machine.
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
    if needed > first[2] * _MAX_SHARE:
        reason = (
            f"{SHARED_MEMORY} has {gib(first[2])} free, and {gib(needed)} are needed: every rank reads for itself, and "
            "sums go through the network's protocols"
        )
        return Node(ranks.rank, here, ""), reason
    if ranks.rank == here[0]:
        _remove_abandoned()
    return Node(ranks.rank, here, f"{_PREFIX}{first[1]}-"), ""


def _memory_id() -> str:
    """Identifies this machine's shared memory: equal for processes that see the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {SHARED_MEMORY.stat().st_dev}" if os.access(SHARED_MEMORY, os.W_OK) else ""
    except OSError:
        return ""


def _free_bytes() -> int:
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0


def _remove_abandoned() -> None:
    """Removes files of merges that were killed. Those of running merges lose their names within moments."""
    for path in SHARED_MEMORY.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _link(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.for-{rank}")


def _wait_for(path: Path) -> Path:
    while not path.exists():
        time.sleep(_POLL_SECONDS)
    return path


def _write(path: Path, tensors: Tensors) -> None:
    """Writes a safetensors file, and drops each tensor once it is copied, so that none is held twice.

    By `pwrite`: too little room is an error here. Through a mapped file it would be a signal that ends the process.
    """
    outputs = {name: OutputTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (shard,) = layout_shards(outputs, sys.maxsize)
    shards = (dataclasses.replace(shard, file_name=path.name),)
    with ShardWriter(path.parent, outputs, shards, checked=False) as writer:
        for name in outputs:
            writer.write(name, tensors.pop(name))


def _map(path: Path) -> Tensors:
    """Maps the tensors of a file, copy on write, and removes its name."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    path.unlink()
    return tensors
