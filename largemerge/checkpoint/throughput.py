"""Rates at which this disk reads and writes, measured for a fraction of a second, for the time in a plan.

Reading takes some tensors of the checkpoints themselves, so that the rate is that of the system's cache if they lie
there. Writing takes a temporary file that is forced onto the disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from largemerge.checkpoint.direct_io import DataFile
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.locate import existing_folder
from largemerge.checkpoint.reader import CheckpointReader

PROBE_SECONDS = 0.12
"""Time that is enough to measure one rate, in seconds."""
_DISK_BYTES = 64 << 20


def read_rate(checkpoints: Sequence[Checkpoint], *, num_workers: int = 1, past_cache: bool = False) -> float:
    """Measures how fast tensors of all checkpoints are read, in bytes a second.

    Args:
        checkpoints: The checkpoints; as much is read of each.
        num_workers: Number of threads that read.
        past_cache: Read past the system's cache where that helps, as a data-free merge does.
    """
    with ExitStack() as stack:
        readers = [stack.enter_context(CheckpointReader(each, past_cache=past_cache)) for each in checkpoints]
        start = time.perf_counter()

        def read(reader: CheckpointReader) -> None:
            for info in reader.checkpoint.tensors.values():
                if reader.bytes_read >= _DISK_BYTES or time.perf_counter() - start > 4 * PROBE_SECONDS:
                    return
                if info.num_bytes <= _DISK_BYTES:
                    reader.read(info.name)

        with ThreadPoolExecutor(num_workers) as pool:
            list(pool.map(read, readers))
        return max(1, sum(reader.bytes_read for reader in readers)) / (time.perf_counter() - start)


def write_rate(scratch: Path | None, *, num_workers: int = 1) -> float:
    """Measures how fast bytes are forced onto a disk, in bytes a second.

    Args:
        scratch: Folder on the disk, or one yet to be made; `None` for where temporary files go.
        num_workers: Number of threads that write.
    """
    folder = None if scratch is None else existing_folder(scratch)
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8))
    with tempfile.TemporaryDirectory(dir=folder) as made, DataFile(Path(made) / "probe", size=_DISK_BYTES) as file:
        start = time.perf_counter()

        def write(offset: int) -> int:
            if time.perf_counter() - start > 4 * PROBE_SECONDS:
                return 0
            file.write(offset, data)
            return data.numel()

        with ThreadPoolExecutor(num_workers) as pool:
            done = sum(pool.map(write, range(0, _DISK_BYTES, data.numel())))
        file.sync()
        return done / (time.perf_counter() - start)
