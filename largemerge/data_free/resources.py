"""What of a data-free merge a GPU computes: weight matrices, by the methods that factor them.

    worker: read on the CPU → to the GPU, on a stream of its own → formula → back → to its place in the shard

Elementwise work takes the disk's time wherever it is done (see benchmarks/README.md), and stays on the CPU.

How much of it all a data-free merge holds at once: as much as is fast, and fits.

    held = the process + adapters + the largest tasks, one for each worker          (and on a GPU: its largest tasks)

A worker keeps a tensor of all models in memory where its method wants it twice; where that does not fit, it reads the
tensor twice. Where that does not suffice, fewer work side by side. Of elementwise methods there are as many workers as
take little memory, up to two for every core: while one waits for the disk, another computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch

from largemerge.checkpoint.direct_io import with_rounding
from largemerge.config_file import gib
from largemerge.data_free import loader
from largemerge.data_free.config import MemoryLimits
from largemerge.data_free.loader import KEPT_BYTES, is_factored, worker_bytes
from largemerge.data_free.matrices import grouped
from largemerge.data_free.methods.table import METHODS, merge_tensors
from largemerge.data_free.tasks import Layout, Task
from largemerge.devices import CPU, choose_device, warm_up
from largemerge.distributed.ranks import Ranks, device_of_rank
from largemerge.machine import free_on_gpu, memory_in_use

_cuda: Any = torch.cuda  # its streams carry no types
_GPU_MARGIN = 0.9  # of what is free
_WORKSPACE_BYTES = 40 << 20  # of cuBLAS, for every stream: 32 MiB on a Hopper GPU, and alignment
_LITTLE = (768, 512)


@dataclass(frozen=True)
class Accelerator:
    """A GPU beside the CPU, or none.

    Attributes:
        device: Of matrices; the CPU where there is no GPU, or nothing for it to do.
        most_bytes: That a matrix may take there; larger ones are the CPU's.
    """

    device: torch.device = CPU
    most_bytes: int = 0

    @property
    def is_gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type != "cpu"

    def computes(self, method: str, task: Task) -> bool:
        """Whether a task is the GPU's."""
        return self.is_gpu and 0 < device_bytes(method, task) <= self.most_bytes

    def device_of(self, method: str, task: Task) -> torch.device:
        """Where a task is computed."""
        return self.device if self.computes(method, task) else CPU

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Meanwhile this thread's work on the GPU is queued beside that of others; it waits for it itself."""
        if not self.is_gpu:
            yield
            return
        free = _free_streams(self.device)
        stream = free.pop() if free else _cuda.Stream(self.device)
        try:
            with _cuda.stream(stream):
                yield
        finally:
            free.append(stream)


@cache
def _free_streams(device: torch.device) -> list[Any]:
    """Of this process, used again and again: cuBLAS keeps a workspace for each."""
    return []


def accelerated_device(method: str, device: str, ranks: Ranks) -> torch.device:
    """Where the matrices of a method are computed: `auto` is the GPU for methods that factor them, if there is one.

    Raises:
        LargemergeError: If torch knows no such device, or cannot use it.
    """
    if METHODS[method].matrices is None:
        if device != "auto":
            choose_device(device)
        return CPU
    return device_of_rank(device, ranks, shared=True)


def open_accelerator(
    method: str, tasks: Sequence[Task], device: torch.device, limit: int | None, local_ranks: int
) -> tuple[Accelerator, str]:
    """What computes a method's matrices.

    Args:
        method: Name in the table.
        tasks: All of them.
        device: What is wanted.
        limit: Bytes that the user allows there; `None` for this process's part of what is free.
        local_ranks: How many processes share this machine's GPUs.

    Returns:
        The accelerator; and the matrices that are too large for it, in words.
    """
    if device.type == "cpu":
        return Accelerator(), ""
    with Accelerator(device).stream():
        warm_up(device, lambda: _merge_a_little(method, device))
    most = int(_GPU_MARGIN * free_on_gpu(device, local_ranks)) if limit is None else limit
    accelerator = Accelerator(device, most)
    too_large = [task.name for task in tasks if device_bytes(method, task) > accelerator.most_bytes]
    return accelerator, ", ".join(grouped(too_large))


def _merge_a_little(method: str, device: torch.device) -> None:
    base = torch.rand(_LITTLE, device=device)
    with torch.inference_mode():
        merge_tensors(method, [base + torch.rand(_LITTLE, device=device) for _ in range(2)], base).to(CPU)


def device_bytes(method: str, task: Task) -> int:
    """What a task takes on a GPU: tensors, what the formula makes of them, workspace; 0 if it is none of a GPU's."""
    return worker_bytes(method, task, KEPT_BYTES) + _WORKSPACE_BYTES if is_factored(method, task) else 0


_MARGIN = 0.9  # of the memory that is free
_WORKERS_PER_CORE = 2
_LITTLE_BYTES = 1 << 30  # held in all, up to which elementwise methods have more than a few workers
_LEAST_WORKERS = 4  # or as many as there are cores
_WORKERS_OF_GPU = 4  # some compute there side by side, the others read and write
_HANDLES_BYTES = 96 << 20  # that the GPU's libraries hold in host memory for every thread


@dataclass(frozen=True)
class Holding:
    """What is held at once.

    Attributes:
        num_workers: That work side by side.
        kept_bytes: Of a tensor of all models, at most, that is kept between two readings.
        peak_bytes: Anonymous memory, libraries included.
        buffer_bytes: Of it, what tensors are read into.
        accelerator: What computes matrices.
        device_bytes: On the GPU, at most.
    """

    num_workers: int
    kept_bytes: int
    peak_bytes: int
    buffer_bytes: int
    accelerator: Accelerator
    device_bytes: int


@dataclass(frozen=True)
class Limits:
    """What a process may hold.

    Attributes:
        host: What the user allows; `None` for its part of what is free.
        device: The same on a GPU.
        local_ranks: How many processes share this machine's memory.
    """

    host: int | None = None
    device: int | None = None
    local_ranks: int = 1

    def or_those_of(self, memory: MemoryLimits, local_ranks: int) -> Limits:
        """With those of the configuration, where there are none here."""
        host = self.host if self.host is not None else memory.host
        return Limits(host, self.device if self.device is not None else memory.device, local_ranks)


def choose_holding(method: str, layout: Layout, adapter_bytes: int, limits: Limits, device: torch.device) -> Holding:
    """The fastest that fits. What does not becomes a problem of the layout, what is slower than it might be a note.

    Args:
        method: Name in the table.
        layout: All tensors of the output.
        adapter_bytes: That adapters hold.
        limits: Of memory.
        device: Where matrices are computed, if they fit.
    """
    accelerator, too_large = open_accelerator(method, layout.tasks, device, limits.device, limits.local_ranks)
    if too_large:
        layout.notes.append(f"on the CPU, since {gib(accelerator.most_bytes)} of {device} are too little: {too_large}")
    before = memory_in_use(CPU).host_anonymous + adapter_bytes  # the GPU's libraries included
    free = int(_MARGIN * psutil.virtual_memory().available) // limits.local_ranks
    most = limits.host if limits.host is not None else before + free
    threads = torch.get_num_threads()
    largest = {kept: _largest(method, layout.tasks, kept, accelerator) for kept in (loader.KEPT_BYTES, 0)}
    read = {kept: _most_first(loader.read_bytes(method, task, kept) for task in layout.tasks) for kept in largest}
    there = _most_first(device_bytes(method, task) for task in layout.tasks if accelerator.computes(method, task))

    def way(workers: int, kept: int) -> Holding:
        buffers = sum(read[kept][:workers])
        peak = before + sum(largest[kept][:workers]) + with_rounding(buffers) - buffers
        return Holding(workers, kept, peak, buffers, accelerator, sum(there[:workers]))

    most_workers = _WORKERS_OF_GPU if accelerator.is_gpu else threads
    ways = [way(workers, kept) for workers in range(most_workers, 0, -1) for kept in largest]
    fitting = (way for way in ways if way.peak_bytes <= most and way.device_bytes <= accelerator.most_bytes)
    least = min(ways, key=lambda way: way.peak_bytes)
    chosen = next(fitting, least)
    if chosen == ways[0] and METHODS[method].matrices is None:
        # As many as take little: the disk keeps a few cores busy, not all of a large machine's.
        numbers = range(_WORKERS_PER_CORE * threads, min(threads, _LEAST_WORKERS) - 1, -1)
        wanted = [way(workers, chosen.kept_bytes) for workers in numbers]
        chosen = next((way for way in wanted if way.peak_bytes <= min(most, _LITTLE_BYTES)), wanted[-1])
        most_workers = chosen.num_workers
    if chosen.peak_bytes > most and limits.host is not None:
        name = max(layout.tasks, key=lambda task: _host_bytes(method, task, 0, accelerator)).name
        layout.problems.append(
            f"memory.host: {gib(limits.host)} is too little: {method} needs {gib(least.peak_bytes)}, of which "
            f"{gib(least.peak_bytes - before)} for {name}; expected that much"
        )
    elif chosen.num_workers < most_workers or chosen.kept_bytes < ways[0].kept_bytes:
        layout.notes.append(_told(method, ways[0], chosen, most))
    return chosen


def _told(method: str, wanted: Holding, chosen: Holding, most: int) -> str:
    """What is slower than it might be, and why."""
    twice = ", which read tensors twice" if chosen.kept_bytes < wanted.kept_bytes else ""
    device = chosen.accelerator.device
    needed, allowed = gib(wanted.peak_bytes), gib(most)
    if chosen.accelerator.is_gpu:
        needed += f" and {gib(wanted.device_bytes)} on {device}"
        allowed += f" and {gib(chosen.accelerator.most_bytes)} on {device}"
    return (
        f"{method} would hold {needed} with {wanted.num_workers} workers, and may hold {allowed}; workers at a time: "
        f"{chosen.num_workers}{twice}"
    )


def _largest(method: str, tasks: Sequence[Task], kept_bytes: int, accelerator: Accelerator) -> list[int]:
    return _most_first(_host_bytes(method, task, kept_bytes, accelerator) for task in tasks)


def _most_first(numbers: Iterable[int]) -> list[int]:
    return sorted(numbers, reverse=True)


def _host_bytes(method: str, task: Task, kept_bytes: int, accelerator: Accelerator) -> int:
    """What a worker holds at most, on the host, while it is at a task."""
    if accelerator.computes(method, task):
        return 2 * task.num_elements * max(task.dtype.itemsize, task.out_dtype.itemsize) + _HANDLES_BYTES
    return loader.worker_bytes(method, task, kept_bytes)
