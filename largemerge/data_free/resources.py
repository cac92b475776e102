"""The resources of a data-free merge: how many workers, how much memory, CPU or GPU. As much as is fast, and fits.

    held = the process + adapters + the largest tasks, one for each worker          (and on a GPU: its largest tasks)

A worker keeps a tensor of all models in memory where its method reads it twice; where that does not fit, it reads the
tensor twice. Where that does not suffice, fewer work side by side. Of elementwise methods there are as many workers as
take little memory, up to two for every core: while one waits for the disk, another computes.

A GPU merges weight matrices, by the methods that factor them. Elementwise work takes the disk's time wherever it is
done (see benchmarks/README.md), and stays on the CPU.

    worker: read on the CPU → to the GPU, on a stream of its own → formula → back → to its place in the shard
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
from largemerge.checkpoint.tensor_info import kinds_of_names
from largemerge.data_free import loader
from largemerge.data_free.config import MemoryLimits
from largemerge.data_free.loader import KEPT_BYTES, is_factored, worker_bytes
from largemerge.data_free.methods.table import METHODS, merge_tensors
from largemerge.data_free.tasks import OutputTasks, Task
from largemerge.devices import CPU, choose_device, warm_up
from largemerge.distributed.ranks import Ranks, device_of_rank
from largemerge.machine import baseline_bytes, free_on_gpu
from largemerge.singular import singular_vectors
from largemerge.units import counted, gib

PROCESS_BYTES = 320 << 20
"""Anonymous memory of a process, at the least, that has imported what a data-free merge needs."""
_MARGIN = 0.9  # of the host memory that is free, where the user has set no limit
_WORKERS_PER_CORE = 2
_SMALL_BYTES = 1 << 30  # held in all, up to which elementwise methods have more than a few workers
_MIN_WORKERS = 4  # or as many as there are cores

_cuda: Any = torch.cuda  # its streams carry no types
_GPU_MARGIN = 0.9  # of the GPU's memory that is free
_GPU_WORKERS = 4  # some compute there side by side, the others read and write
_WORKSPACE_BYTES = 40 << 20  # of cuBLAS, for every stream: 32 MiB on a Hopper GPU, and alignment
_HANDLES_BYTES = 96 << 20  # that the GPU's libraries hold in host memory for every thread
_SMALL_SHAPE = (768, 512)  # of a matrix that warms up the GPU


@dataclass(frozen=True)
class Accelerator:
    """A GPU beside the CPU, or none.

    Attributes:
        device: Device of weight matrices; the CPU where there is no GPU, or nothing for it to do.
        max_bytes: The most bytes that a matrix may take on the GPU; larger ones are merged on the CPU.
    """

    device: torch.device = CPU
    max_bytes: int = 0

    @property
    def is_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type != "cpu"

    def computes(self, method: str, task: Task) -> bool:
        """Whether a task is merged on the GPU."""
        return self.is_gpu and 0 < device_bytes(method, task) <= self.max_bytes

    def device_of(self, method: str, task: Task) -> torch.device:
        """Returns the device that a task is merged on."""
        return self.device if self.computes(method, task) else CPU

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Gives this thread a CUDA stream of its own while the block runs; the thread waits for its own results."""
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


@dataclass(frozen=True)
class Resources:
    """Workers and memory of a merge.

    Attributes:
        num_workers: Number of workers that merge side by side.
        kept_bytes: The most bytes of a tensor of all models that a worker keeps between two passes.
        peak_bytes: Peak anonymous memory of the process, libraries included.
        buffer_bytes: The part of it that tensors are read into.
        accelerator: The GPU that weight matrices are merged on, if there is one.
        device_bytes: Peak memory on the GPU.
    """

    num_workers: int
    kept_bytes: int
    peak_bytes: int
    buffer_bytes: int
    accelerator: Accelerator
    device_bytes: int


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that a process may use.

    Attributes:
        host: Bytes of host memory that the user allows; `None` for the process's part of what is free.
        device: The same on a GPU.
        local_ranks: Number of processes that share this machine's memory.
    """

    host: int | None = None
    device: int | None = None
    local_ranks: int = 1

    def with_defaults(self, memory: MemoryLimits, local_ranks: int) -> MemoryBudget:
        """Fills in the limits of the configuration where there are none here."""
        host = self.host if self.host is not None else memory.host
        return MemoryBudget(host, self.device if self.device is not None else memory.device, local_ranks)


def choose_resources(
    method: str, output: OutputTasks, adapter_bytes: int, limits: MemoryBudget, device: torch.device
) -> Resources:
    """Chooses the fastest resources that fit.

    What cannot fit becomes one of the problems of `output`, what is slower than it might be a note.

    Args:
        method: Name of the method in the table.
        output: The tasks of the merge.
        adapter_bytes: Bytes that adapters hold.
        limits: The memory that this process may use.
        device: Device that weight matrices are merged on, if they fit.
    """
    tasks = output.tasks
    accelerator, too_large = open_accelerator(method, tasks, device, limits.device, limits.local_ranks)
    if too_large:
        output.notes.append(f"on the CPU, since {gib(accelerator.max_bytes)} of {device} are too little: {too_large}")
    present = baseline_bytes(CPU, PROCESS_BYTES) + adapter_bytes  # the GPU's libraries included
    free = int(_MARGIN * psutil.virtual_memory().available) // limits.local_ranks
    allowed = limits.host if limits.host is not None else present + free
    threads = torch.get_num_threads()
    some = _some_of_each_kind(tasks, max(_GPU_WORKERS, _MIN_WORKERS, _WORKERS_PER_CORE * threads))
    largest = {kept: _largest(method, some, kept, accelerator) for kept in (loader.KEPT_BYTES, 0)}
    read = {kept: _descending(loader.read_bytes(method, task, kept) for task in some) for kept in largest}
    on_gpu = _descending(device_bytes(method, task) for task in some if accelerator.computes(method, task))

    def with_workers(workers: int, kept: int) -> Resources:
        buffers = sum(read[kept][:workers])
        peak = present + sum(largest[kept][:workers]) + with_rounding(buffers) - buffers
        return Resources(workers, kept, peak, buffers, accelerator, sum(on_gpu[:workers]))

    max_workers = _GPU_WORKERS if accelerator.is_gpu else threads
    choices = [with_workers(workers, kept) for workers in range(max_workers, 0, -1) for kept in largest]
    fitting = (one for one in choices if one.peak_bytes <= allowed and one.device_bytes <= accelerator.max_bytes)
    smallest = min(choices, key=lambda one: one.peak_bytes)
    chosen = next(fitting, smallest)
    if chosen == choices[0] and METHODS[method].matrix_formula is None and not accelerator.is_gpu:
        # As many as take little: the disk keeps a few cores busy, not all of a large machine's.
        numbers = range(_WORKERS_PER_CORE * threads, min(threads, _MIN_WORKERS) - 1, -1)
        wanted = [with_workers(workers, chosen.kept_bytes) for workers in numbers]
        chosen = next((one for one in wanted if one.peak_bytes <= min(allowed, _SMALL_BYTES)), wanted[-1])
        max_workers = chosen.num_workers
    if chosen.peak_bytes > allowed and limits.host is not None:
        name = max(tasks, key=lambda task: _host_bytes(method, task, 0, accelerator)).name
        output.problems.append(
            f"memory.host: {gib(limits.host)} is too little: {method} needs {gib(smallest.peak_bytes)}, of which "
            f"{gib(smallest.peak_bytes - present)} for {name}; expected that much"
        )
    elif chosen.num_workers < max_workers or chosen.kept_bytes < choices[0].kept_bytes:
        output.notes.append(_describe_shortage(method, choices[0], chosen, allowed))
    return chosen


def _describe_shortage(method: str, wanted: Resources, chosen: Resources, allowed_bytes: int) -> str:
    """Says that the merge is slower than it might be, and why."""
    twice = ", which read tensors twice" if chosen.kept_bytes < wanted.kept_bytes else ""
    device = chosen.accelerator.device
    needed, allowed = gib(wanted.peak_bytes), gib(allowed_bytes)
    if chosen.accelerator.is_gpu:
        needed += f" and {gib(wanted.device_bytes)} on {device}"
        allowed += f" and {gib(chosen.accelerator.max_bytes)} on {device}"
    return (
        f"{method} would hold {needed} with {counted(wanted.num_workers, 'worker')}, and may hold {allowed}; "
        f"workers at a time: {chosen.num_workers}{twice}"
    )


def _some_of_each_kind(tasks: Sequence[Task], number: int) -> list[Task]:
    """Takes so many of the tasks that differ by names and numbers alone: of a mixture's experts there are thousands."""
    found: dict[Any, list[Task]] = {}
    for task in tasks:
        plain = (task.shape, task.dtype, task.out_dtype, len(task.inputs), len(task.auxiliary), task.inputs_first)
        kind = (*plain, task.instead, bool(task.copied), bool(task.fallback_reason), str(task.shared))
        beside = (task.token_rows is None, task.post is None)
        alike = found.setdefault((*kind, *beside), [])
        if len(alike) < number:
            alike.append(task)
    return [task for alike in found.values() for task in alike]


def _largest(method: str, tasks: Sequence[Task], kept_bytes: int, accelerator: Accelerator) -> list[int]:
    """Computes the peak host memory of a worker at every task, the largest first."""
    return _descending(_host_bytes(method, task, kept_bytes, accelerator) for task in tasks)


def _descending(numbers: Iterable[int]) -> list[int]:
    return sorted(numbers, reverse=True)


def _host_bytes(method: str, task: Task, kept_bytes: int, accelerator: Accelerator) -> int:
    """Computes the peak host memory of a worker while it merges a task."""
    if accelerator.computes(method, task):
        return loader.host_bytes_beside_gpu(method, task, kept_bytes) + _HANDLES_BYTES
    return loader.worker_bytes(method, task, kept_bytes)


# The GPU


@cache
def _free_streams(device: torch.device) -> list[Any]:
    """Streams of this process that no thread uses now; they are reused, since cuBLAS keeps a workspace for each."""
    return []


def accelerated_device(method: str, device: str, ranks: Ranks, *, has_steps: bool = False) -> torch.device:
    """Chooses the device of weight matrices: with `auto` a GPU, if there is one and anything factors them.

    Args:
        method: Name of the method in the table.
        device: The device that the user has named.
        ranks: The ranks that share the merge.
        has_steps: Whether steps after the merge factor matrices.

    Raises:
        LargemergeError: If torch knows no such device, or cannot use it.
    """
    if METHODS[method].matrix_formula is None and not has_steps:
        if device != "auto":
            choose_device(device)
        return CPU
    return device_of_rank(device, ranks, shared=True)


def open_accelerator(
    method: str, tasks: Sequence[Task], device: torch.device, limit: int | None, local_ranks: int
) -> tuple[Accelerator, str]:
    """Warms up the device of a method's weight matrices, and sees how much memory there is.

    Args:
        method: Name of the method in the table.
        tasks: All tasks of the merge.
        device: Device from `accelerated_device`.
        limit: Bytes that the user allows there; `None` for this process's part of what is free.
        local_ranks: Number of processes that share this machine's GPUs.

    Returns:
        The accelerator; and the names of matrices that are too large for it, in words.
    """
    if device.type == "cpu":
        return Accelerator(), ""
    with Accelerator(device).stream():
        warm_up(device, lambda: _merge_small_matrix(method, device))
    accelerator = Accelerator(device, int(_GPU_MARGIN * free_on_gpu(device, local_ranks)) if limit is None else limit)
    too_large = [task.name for task in tasks if device_bytes(method, task) > accelerator.max_bytes]
    return accelerator, ", ".join(kinds_of_names(too_large))


def _merge_small_matrix(method: str, device: torch.device) -> None:
    """Merges a small matrix on the GPU, so that its libraries are loaded and what they hold is seen."""
    base = torch.rand(_SMALL_SHAPE, device=device)
    with torch.inference_mode():
        if METHODS[method].matrix_formula is None:
            singular_vectors(base)[0].to(CPU)
            return
        merge_tensors(method, [base + torch.rand(_SMALL_SHAPE, device=device) for _ in range(2)], base).to(CPU)


def device_bytes(method: str, task: Task) -> int:
    """Computes the bytes of a task on a GPU: tensors, work of the formula, workspace; 0 if it stays on the CPU."""
    return worker_bytes(method, task, KEPT_BYTES) + _WORKSPACE_BYTES if is_factored(method, task) else 0
