"""Reading tensors one at a time, into memory of their own.

`pread` into a fresh buffer instead of a mapped file: the kernel's page cache still helps, but no mapped
pages pile up in the process, and reads from a helper thread run while this one computes.
"""

from __future__ import annotations

import math
import os
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.quantized import dequantize
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.errors import CheckpointError

_MOST_BYTES_AT_ONCE = 1 << 30  # Linux moves at most 2 GiB in one call
_GAP_BYTES = 32 << 10  # between two rows: reading them in vain costs less than another call


def byte_view(buffer: torch.Tensor) -> memoryview:
    """The memory of a one-dimensional uint8 tensor on the CPU."""
    array: Any = buffer.numpy()
    return memoryview(array)


def read_tensor(descriptor: int, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Reads a tensor that lies at a byte position of an open file.

    Raises:
        EOFError: If the file ends before the tensor does.
    """
    # Bytes first, the dtype as a view: NumPy, which lends the writable buffer, knows no bfloat16.
    buffer = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    view = byte_view(buffer)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + _MOST_BYTES_AT_ONCE]], offset + done)
        if count == 0:
            raise EOFError
        done += count
    return buffer.view(dtype).reshape(shape)


class TensorReader(Protocol):
    """Reads tensors of one model: from its files alone, or with an adapter."""

    @property
    def checkpoint(self) -> Checkpoint:
        """What there is to read."""

    @property
    def bytes_read(self) -> int:
        """So far."""

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or some rows of it."""

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows, in any order."""


class CheckpointReader:
    """Reads tensors of one checkpoint by name. A context manager; safe to use from several threads.

    Attributes:
        checkpoint: What it reads.
        bytes_read: So far.
        seconds: Spent reading, so far.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self.seconds = 0.0
        self._descriptors: dict[Path, int] = {}
        self._pickles: dict[Path, Mapping[str, torch.Tensor]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._pickles.clear()

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, on the CPU, with its own memory, in its stored dtype; quantised weights are dequantised.

        Args:
            name: On disk.
            rows: Only this part of the first dimension.

        Raises:
            CheckpointError: If the file has become shorter since its header was read.
        """
        info = self.checkpoint.tensors[name]
        start = time.perf_counter()
        tensor = self._read_plain(info, rows) if info.quantization is None else self._read_quantized(info, rows)
        with self._lock:
            self.seconds += time.perf_counter() - start
        return tensor

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a tensor, in any order, as `read` returns them.

        Args:
            name: On disk.
            rows: Their numbers; one may come more than once.
        """
        info = self.checkpoint.tensors[name]
        if not len(rows):
            return torch.empty((0, *info.shape[1:]), dtype=info.dtype)
        if info.offset is None:
            return self._read_pickle(info, rows)
        assert info.quantization is None, "checked before: blocks of 64 numbers know no rows"
        wanted, places = torch.unique(rows, return_inverse=True)
        gap = 1 + _GAP_BYTES // max(1, info.num_bytes // max(1, info.shape[0]))
        starts = torch.cat([torch.tensor([0]), 1 + torch.nonzero(wanted.diff() > gap).view(-1)]).tolist()
        parts = []
        for start, stop in zip(starts, [*starts[1:], len(wanted)], strict=True):
            first = int(wanted[start])
            read = self.read(name, slice(first, int(wanted[stop - 1]) + 1))
            parts.append(read if len(read) == stop - start else read[wanted[start:stop] - first])
        return torch.cat(parts)[places]

    def _read_plain(self, info: TensorInfo, rows: slice | None = None) -> torch.Tensor:
        tensor = self._read_pickle(info, rows) if info.offset is None else self._read_bytes(info, info.offset, rows)
        with self._lock:
            self.bytes_read += tensor.nbytes
        return tensor

    def _read_quantized(self, info: TensorInfo, rows: slice | None) -> torch.Tensor:
        assert info.quantization is not None
        parts = {name: self._read_plain(part) for name, part in info.parts.items()}
        tensor = dequantize(info.name, parts, info.quantization, info.dtype)
        return tensor if rows is None else tensor[rows].clone()  # blocks of 64 numbers know no rows

    def _read_bytes(self, info: TensorInfo, offset: int, rows: slice | None) -> torch.Tensor:
        shape = info.shape
        if rows is not None:
            row_bytes = info.num_bytes // max(1, shape[0])
            offset += rows.start * row_bytes
            shape = (rows.stop - rows.start, *shape[1:])
        try:
            return read_tensor(self._descriptor(info.file), offset, info.dtype, shape)
        except EOFError:
            raise CheckpointError(
                f"{info.file}: ended in the middle of {info.name}; was it changed meanwhile?"
            ) from None

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def _read_pickle(self, info: TensorInfo, rows: slice | torch.Tensor | None) -> torch.Tensor:
        with self._lock:
            state = self._pickles.get(info.file)
            if state is None:
                mapped = zipfile.is_zipfile(info.file)
                state = torch.load(info.file, map_location="cpu", weights_only=True, mmap=mapped)
                if not mapped:
                    self._pickles[info.file] = state  # the format of before 2020: it can be read only as a whole
        tensor = state[info.name]
        return (tensor if rows is None else tensor[rows]).clone(memory_format=torch.contiguous_format)
