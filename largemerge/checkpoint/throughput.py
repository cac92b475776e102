"""TODO."""

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

_DISK_BYTES = 64 << 20
_SECONDS = 0.12  # for each rate


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
