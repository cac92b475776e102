"""A probe of this machine: the rates that a plan's time estimate needs, in a few seconds.

Every kind of product is timed at the model's own shapes, cut down where they are large.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from largemerge.checkpoint.data_file import DataFile
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
    read, write = read_rate([checkpoint]), write_rate(scratch)
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


def read_rate(checkpoints: Sequence[Checkpoint], *, num_workers: int = 1, past_cache: bool = False) -> float:
    """Bytes a second of some tensors of all checkpoints; from the system's cache, if that is where they are.

    Args:
        checkpoints: As much is read of each.
        num_workers: Read side by side.
        past_cache: As a data-free merge reads.
    """
    with ExitStack() as stack:
        readers = [stack.enter_context(CheckpointReader(each, past_cache=past_cache)) for each in checkpoints]
        start = time.perf_counter()

        def read(reader: CheckpointReader) -> None:
            for info in reader.checkpoint.tensors.values():
                if reader.bytes_read >= _DISK_BYTES or time.perf_counter() - start > 4 * _SECONDS:
                    return
                if info.num_bytes <= _DISK_BYTES:
                    reader.read(info.name)

        with ThreadPoolExecutor(num_workers) as pool:
            list(pool.map(read, readers))
        return max(1, sum(reader.bytes_read for reader in readers)) / (time.perf_counter() - start)


def write_rate(scratch: Path | None, *, num_workers: int = 1) -> float:
    """Bytes a second, forced onto the disk; `None` for where temporary files go."""
    folder = None if scratch is None else existing_folder(scratch)
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8))
    with tempfile.TemporaryDirectory(dir=folder) as made, DataFile(Path(made) / "probe", size=_DISK_BYTES) as file:
        start = time.perf_counter()

        def write(offset: int) -> int:
            if time.perf_counter() - start > 4 * _SECONDS:
                return 0
            file.write(offset, data)
            return data.numel()

        with ThreadPoolExecutor(num_workers) as pool:
            done = sum(pool.map(write, range(0, _DISK_BYTES, data.numel())))
        file.sync()
        return done / (time.perf_counter() - start)
