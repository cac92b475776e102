"""A probe of this machine: the rates that a plan's time estimate needs, in a few seconds.

Every kind of product is timed at the model's own shapes, cut down where they are large.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.output import existing_folder
from largemerge.regression.factor import cholesky_
from largemerge.regression.gram import Gram, float32_means_float32
from largemerge.regression.product import product
from largemerge.timing import Rates
from largemerge.workload import Workload

_MOST_FEATURES = 2048
_MOST_ROWS = 2048
_DISK_BYTES = 64 << 20
_SECONDS = 0.12  # for each rate
_BATCH_SECONDS = 2e-3  # of Python and small operations on the way to a block


def measure_rates(
    work: Workload,
    checkpoint: Checkpoint,
    scratch: Path | None,
    device: torch.device,
    samples: int,
    *,
    at_once: int = 1,
) -> Rates:
    """Times products, copies, reads and writes.

    Args:
        work: Whose shapes count.
        checkpoint: A candidate, of which some megabytes are read.
        scratch: A folder to write a temporary file to; `None` for the system's.
        device: That computes.
        samples: That run at once.
        at_once: As many ranks compute side by side, each with its part of the cores; the rates are those of one.
    """
    read, write = read_rate(checkpoint), write_rate(scratch)
    if at_once == 1 or device.type != "cpu":
        return replace(_compute_rates(work, device, samples), read=read, write=write)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // at_once))
    try:
        with ThreadPoolExecutor(at_once) as pool:
            each = list(pool.map(lambda _: _compute_rates(work, device, samples), range(at_once)))
    finally:
        torch.set_num_threads(threads)
    mean = {name: sum(getattr(rates, name) for rates in each) / at_once for name in vars(each[0])}
    return Rates(**mean | {"read": read, "write": write})


def _compute_rates(work: Workload, device: torch.device, samples: int) -> Rates:
    """All but those of the disk."""
    kind = max(work.kinds, key=lambda kind: sum(kind.sizes.values()) * kind.count)
    rows = min(_MOST_ROWS, samples * work.sample_rows[kind.block.stack])
    inputs, outputs = max(kind.linears.values(), key=lambda shape: shape[0] * shape[1])
    inputs, outputs = min(inputs, _MOST_FEATURES), min(outputs, _MOST_FEATURES)
    size = min(_MOST_FEATURES, max((group.num_inputs for group in kind.block.groups), default=inputs))
    x_NI = torch.randn(rows, inputs, device=device).to(work.compute_dtype)
    weight_OI = torch.randn(outputs, inputs, device=device).to(work.compute_dtype)
    x_NS = torch.randn(rows, size, device=device).to(work.compute_dtype)
    left_SS, gram = torch.randn(size, size, device=device), Gram(size, device)
    system_SS = left_SS @ left_SS.T / size + torch.eye(size, device=device)
    work_SS = torch.empty_like(system_SS)
    large = torch.empty(16 << 20, dtype=torch.uint8, device=device)
    with float32_means_float32():
        return Rates(
            linear=2 * rows * inputs * outputs / _seconds(lambda: product(x_NI, weight_OI), device),
            gram=rows * size**2 / _seconds(lambda: gram.add_rows(x_NS), device),
            product=2 * size**3 / _seconds(lambda: product(left_SS, system_SS), device),
            cholesky=size**3 / 3 / _seconds(lambda: cholesky_(work_SS.copy_(system_SS)), device),
            memory=2 * large.nbytes / _seconds(lambda: large.clone(), device),
            read=math.inf,
            write=math.inf,
            batch_seconds=_BATCH_SECONDS,
        )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, the median of several after one that warms up."""
    work()
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (time.perf_counter() - begin < _SECONDS and len(times) < 50):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_rate(checkpoint: Checkpoint) -> float:
    """Bytes a second of some tensors; from the page cache, if that is where they are."""
    done = 0
    with CheckpointReader(checkpoint) as reader:
        start = time.perf_counter()
        for info in checkpoint.tensors.values():
            if done >= _DISK_BYTES or time.perf_counter() - start > 4 * _SECONDS:
                break
            if info.num_bytes <= _DISK_BYTES:
                reader.read(info.name)
                done += info.num_bytes
        return max(1, done) / (time.perf_counter() - start)


def write_rate(scratch: Path | None) -> float:
    """Bytes a second, forced onto the disk; `None` for where temporary files go."""
    folder = None if scratch is None else existing_folder(scratch)
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as stream:
        start = time.perf_counter()
        done = 0
        while done < _DISK_BYTES and time.perf_counter() - start < 4 * _SECONDS:
            stream.write(data)
            done += len(data)
        stream.flush()
        os.fsync(stream.fileno())
        return done / (time.perf_counter() - start)
