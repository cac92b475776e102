"""How much of it all a data-free merge holds at once: as much as is fast, and fits.

    held = the process + adapters + the largest tasks, one for each worker

A worker keeps a tensor of all models in memory where its method wants it twice; where that does not fit, it reads the
tensor twice. Where that does not suffice, fewer work side by side. There are more workers than cores where that takes
little memory: while one waits for the disk, another computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from largemerge.arithmetic import stream
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.tasks import Layout, Task
from largemerge.memory import memory_in_use
from largemerge.sizes import gib

CPU = torch.device("cpu")
_MARGIN = 0.9  # of the memory that is free
_WORKERS_PER_CORE = 2
_LITTLE_BYTES = 1 << 30  # held in all, up to which there are more workers than cores


@dataclass(frozen=True)
class Holding:
    """What is held at once.

    Attributes:
        num_workers: That work side by side.
        kept_bytes: Of a tensor of all models, at most, that is kept between two readings.
        peak_bytes: Anonymous memory, libraries included.
    """

    num_workers: int
    kept_bytes: int
    peak_bytes: int


def choose_holding(method: str, layout: Layout, adapter_bytes: int, limit: int | None, local_ranks: int) -> Holding:
    """The fastest that fits. What does not becomes a problem of the layout, what is slower than it might be a note.

    Args:
        method: Name in the table.
        layout: All tensors of the output.
        adapter_bytes: That adapters hold.
        limit: What the user allows the process; `None` for its part of what is free.
        local_ranks: How many processes share this machine's memory.
    """
    before = memory_in_use(CPU).host_anonymous + adapter_bytes
    most = limit if limit is not None else before + int(_MARGIN * psutil.virtual_memory().available) // local_ranks
    threads = torch.get_num_threads()
    largest = {kept: _largest(method, layout.tasks, kept) for kept in (stream.KEPT_BYTES, 0)}

    def way(workers: int, kept: int) -> Holding:
        return Holding(workers, kept, before + sum(largest[kept][:workers]))

    ways = [way(workers, kept) for workers in range(threads, 0, -1) for kept in largest]
    wanted, least = ways[0], min(ways, key=lambda way: way.peak_bytes)
    chosen = next((way for way in ways if way.peak_bytes <= most), least)
    if chosen == wanted and METHODS[method].matrices is None:
        more = [way(workers, chosen.kept_bytes) for workers in range(_WORKERS_PER_CORE * threads, threads, -1)]
        chosen = next((way for way in more if way.peak_bytes <= min(most, _LITTLE_BYTES)), chosen)
    if chosen.peak_bytes > most and limit is not None:
        layout.problems.append(
            f"memory.host: {gib(limit)} is too little: {method} needs {gib(least.peak_bytes)}, of which "
            f"{gib(least.peak_bytes - before)} for {_name_of_largest(method, layout.tasks)}; expected that much"
        )
    elif chosen.num_workers < threads or chosen.kept_bytes < wanted.kept_bytes:
        twice = ", which read tensors twice" if chosen.kept_bytes < wanted.kept_bytes else ""
        layout.notes.append(
            f"{method} would hold {gib(wanted.peak_bytes)} with {threads} workers, and may hold {gib(most)}; "
            f"workers at a time: {chosen.num_workers}{twice}"
        )
    return chosen


def _largest(method: str, tasks: Sequence[Task], kept_bytes: int) -> list[int]:
    return sorted((stream.worker_bytes(method, task, kept_bytes) for task in tasks), reverse=True)


def _name_of_largest(method: str, tasks: Sequence[Task]) -> str:
    return max(tasks, key=lambda task: stream.worker_bytes(method, task, 0)).name
