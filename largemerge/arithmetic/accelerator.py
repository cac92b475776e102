"""What of a data-free merge a GPU computes: weight matrices, by the methods that factor them.

    worker: read on the CPU → to the GPU, on a stream of its own → formula → back → to its place in the shard

Elementwise work takes the disk's time wherever it is done (see benchmarks/README.md), and stays on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from largemerge.arithmetic.loading import KEPT_BYTES, is_factored, worker_bytes
from largemerge.arithmetic.matrices import grouped
from largemerge.arithmetic.registry import METHODS, merge_tensors
from largemerge.arithmetic.tasks import Task
from largemerge.devices import CPU, choose_device, device_of_rank, warm_up
from largemerge.distributed import Ranks
from largemerge.memory import free_on_gpu

_cuda: Any = torch.cuda  # its streams carry no types
_MARGIN = 0.9  # of what is free
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
    most = int(_MARGIN * free_on_gpu(device, local_ranks)) if limit is None else limit
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
