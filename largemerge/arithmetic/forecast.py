"""How long a data-free merge takes: a probe of the disk, and of the method itself on one piece.

disk         bytes read / rate + bytes written / rate
computing    Σ cost of every tensor · seconds per cost, over the workers that compute at once; cost as in `stream.cost`
total        the longer of the two, for one goes on beside the other
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from largemerge.arithmetic.pieces import PIECE_ELEMENTS
from largemerge.arithmetic.plan import DataFreePlan
from largemerge.arithmetic.registry import METHODS, merge_tensors
from largemerge.arithmetic.stream import cost, one_thread_each
from largemerge.arithmetic.tasks import Task
from largemerge.devices import CPU
from largemerge.probe import read_rate, write_rate

_MOST_SIDE = {"cpu": 384, "cuda": 2048}  # of a matrix that is factored for the probe
_COLUMNS = 1024


def estimate_seconds(plan: DataFreePlan) -> dict[str, float]:
    """Seconds by stage of a plan without problems, from a probe of about a second.

    Where the output will lie is not known yet: the rate of writing is that of the system's temporary files.
    """
    method = plan.config.merge_method
    workers = plan.num_workers
    read = read_rate(list(plan.checkpoints.values()), num_workers=workers, past_cache=True)
    moved = plan.bytes_written + 2 * plan.scratch_bytes
    disk = plan.bytes_read / read + moved / write_rate(None, num_workers=workers)
    computing = 0.0
    merged = [task for task in plan.layout.tasks if not task.copied and task.num_elements]
    accelerator, at_once = plan.holding.accelerator, min(plan.num_workers, torch.get_num_threads())
    kinds: dict[tuple[bool, bool], list[Task]] = {}  # by whether they are matrices, and whether the GPU computes them
    for task in merged:
        of_gpu = accelerator.computes(method, task)
        kinds.setdefault((METHODS[method].matrices is not None and task.is_matrix, of_gpu), []).append(task)
    for (_, of_gpu), kind in kinds.items():
        device = accelerator.device if of_gpu else CPU
        seconds = sum(cost(method, task) for task in kind) * _seconds_per_cost(method, kind, device)
        computing += seconds / (1 if of_gpu else at_once)
    return {"disk": round(disk, 2), "computing": round(computing, 2), "total": round(max(disk, computing), 2)}


def _seconds_per_cost(method: str, tasks: Sequence[Task], device: torch.device) -> float:
    """Of the largest of some tasks, cut down to a piece."""
    task = max(tasks, key=lambda each: each.num_elements)
    factored = METHODS[method].matrices is not None and task.is_matrix
    if factored:
        rows, columns = (min(_MOST_SIDE[device.type], size) for size in task.shape)
        shape: tuple[int, ...] = (columns, rows) if task.inputs_first else (rows, columns)
    elif len(task.shape) < 2 or task.otherwise:
        shape = (min(PIECE_ELEMENTS, task.num_elements),)
    else:
        columns = min(task.num_elements // task.shape[0], _COLUMNS)
        shape = (max(1, min(task.shape[0], PIECE_ELEMENTS // columns)), columns)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).to(device)
    tensors = [(base + 0.1 * torch.randn(shape, generator=generator).to(device)).to(task.dtype) for _ in task.sources]
    companions = [torch.rand(shape, generator=generator) for _ in task.companions]
    origin = base.to(task.dtype) if task.base is not None else None
    times = []
    with one_thread_each(), torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            merge_tensors(method, tensors, origin, each=task.each, companions=companions, **task.options).to(CPU)
            times.append(time.perf_counter() - start)
    elements = base.numel()
    return min(times) / (elements * (min(shape) if factored else 1))
