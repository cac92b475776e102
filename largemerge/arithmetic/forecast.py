"""How long a data-free merge takes: a probe of the disk, and of the method itself on one piece.

disk         bytes read / rate + bytes written / rate
computing    Σ cost of every tensor · seconds per cost, over the workers that compute at once; cost as in `stream.cost`
total        the longer of the two, for one goes on beside the other
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from largemerge.arithmetic.loading import is_factored
from largemerge.arithmetic.pieces import PIECE_ELEMENTS
from largemerge.arithmetic.plan import DataFreePlan
from largemerge.arithmetic.registry import merge_tensors
from largemerge.arithmetic.stream import cost, one_thread_each
from largemerge.arithmetic.tasks import Task
from largemerge.devices import CPU
from largemerge.probe import read_rate, write_rate

_MOST_SIDE = {"cpu": 384, "cuda": 4096}  # the shorter one, of a matrix that is factored for the probe
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
    at_once = min(workers, torch.get_num_threads())
    for device, tasks in _alike(plan):
        seconds = sum(cost(method, task) for task in tasks) * _seconds_per_cost(method, tasks, device)
        computing += seconds / (at_once if device.type == "cpu" else 1)
    return {"disk": round(disk, 2), "computing": round(computing, 2), "total": round(max(disk, computing), 2)}


def _alike(plan: DataFreePlan) -> Iterator[tuple[torch.device, list[Task]]]:
    """Tasks of which one tells of the others, and where they are computed: matrices of one shape, and all the rest."""
    method, kinds = plan.config.merge_method, dict[Any, list[Task]]()
    for task in plan.layout.tasks:
        if not task.copied and task.num_elements:
            device = plan.holding.accelerator.device_of(method, task)
            kinds.setdefault((device, task.shape if is_factored(method, task) else None), []).append(task)
    yield from ((device, tasks) for (device, _), tasks in kinds.items())


def _seconds_per_cost(method: str, tasks: Sequence[Task], device: torch.device) -> float:
    """Of the largest of some tasks, cut down to a piece, or, where matrices are factored, to a smaller one."""
    task = max(tasks, key=lambda each: each.num_elements)
    if is_factored(method, task):
        rows, columns = reversed(task.shape) if task.inputs_first else task.shape
        scale = min(1.0, _MOST_SIDE[device.type] / min(rows, columns))
        shape: tuple[int, ...] = (round(rows * scale), round(columns * scale))
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
        for _ in range(2 if device.type == "cpu" else 1):
            start = time.perf_counter()
            merge_tensors(method, tensors, origin, each=task.each, companions=companions, **task.options).to(CPU)
            times.append(time.perf_counter() - start)
    return min(times) / (base.numel() * (min(shape) if is_factored(method, task) else 1))
