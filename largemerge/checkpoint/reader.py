"""Reading tensors one at a time, into memory of their own.

`pread` into a fresh buffer instead of a mapped file: the kernel's page cache still helps, but no mapped
pages pile up in the process, and reads from a helper thread run while this one computes.

Reading ahead: the next item is loaded by a thread while the present one is in use.
"""

from __future__ import annotations

import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import torch

from largemerge.checkpoint.direct_io import Buffers, DataFile
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.quantized import dequantize
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.errors import CheckpointError

_GAP_BYTES = 32 << 10  # between two rows: reading them in vain costs less than another call


class TensorReader(Protocol):
    """Reads tensors of one model: from its files alone, or with an adapter."""

    @property
    def checkpoint(self) -> Checkpoint:
        """What there is to read."""

    @property
    def bytes_read(self) -> int:
        """So far."""

    @property
    def bytes_past_cache(self) -> int:
        """Of them, those that did not go through the system's cache."""

    def read(self, name: str, rows: slice | None = None, *, again: bool = False) -> torch.Tensor:
        """A tensor, or some rows of it; it stays in the system's cache where it is to be read again."""

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows, in any order."""


class CheckpointReader:
    """Reads tensors of one checkpoint by name. A context manager; safe to use from several threads.

    Args:
        checkpoint: What it reads.
        buffers: Lend memory to tensors; `None`: it is allocated.
        past_cache: Leave nothing in the system's cache but what is to be read again: for tensors that are read once.

    Attributes:
        checkpoint: What it reads.
        bytes_read: So far.
        bytes_past_cache: Of them, past the system's cache.
        seconds: Spent reading, so far.
    """

    def __init__(self, checkpoint: Checkpoint, *, past_cache: bool = False, buffers: Buffers | None = None) -> None:
        self.checkpoint = checkpoint
        self._past_cache, self._buffers = past_cache, buffers
        self.bytes_read = 0
        self.seconds = 0.0
        self._files: dict[Path, DataFile] = {}
        self._pickles: dict[Path, Mapping[str, torch.Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def bytes_past_cache(self) -> int:  # noqa: D102 (see above)
        with self._lock:
            return sum(file.bytes_past_cache for file in self._files.values())

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._pickles.clear()

    def read(self, name: str, rows: slice | None = None, *, again: bool = False) -> torch.Tensor:
        """A tensor, on the CPU, with its own memory, in its stored dtype; quantised weights are dequantised.

        Args:
            name: On disk.
            rows: Only this part of the first dimension.
            again: It will be read again soon.

        Raises:
            CheckpointError: If the file has become shorter since its header was read.
        """
        info = self.checkpoint.tensors[name]
        start = time.perf_counter()
        if info.quantization is None:
            tensor = self._read_plain(info, rows, again=again)
        else:
            tensor = self._read_quantized(info, rows, again=again)
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

    def _read_plain(self, info: TensorInfo, rows: slice | None = None, *, again: bool = False) -> torch.Tensor:
        if info.offset is None:
            tensor = self._read_pickle(info, rows)
        else:
            tensor = self._read_bytes(info, info.offset, rows, past_cache=self._past_cache and not again)
        with self._lock:
            self.bytes_read += tensor.nbytes
        return tensor

    def _read_quantized(self, info: TensorInfo, rows: slice | None, *, again: bool) -> torch.Tensor:
        assert info.quantization is not None
        again = again or rows is not None  # each part of the rows reads it whole
        parts = {name: self._read_plain(part, again=again) for name, part in info.parts.items()}
        tensor = dequantize(info.name, parts, info.quantization, info.dtype)
        return tensor if rows is None else tensor[rows].clone()  # blocks of 64 numbers know no rows

    def _read_bytes(self, info: TensorInfo, offset: int, rows: slice | None, *, past_cache: bool) -> torch.Tensor:
        shape = info.shape
        if rows is not None:
            row_bytes = info.num_bytes // max(1, shape[0])
            offset += rows.start * row_bytes
            shape = (rows.stop - rows.start, *shape[1:])
        try:
            return self._open(info.file).read_tensor(offset, info.dtype, shape, past_cache=past_cache)
        except EOFError:
            raise CheckpointError(
                f"{info.file}: ended in the middle of {info.name}; was it changed meanwhile?"
            ) from None

    def _open(self, file: Path) -> DataFile:
        with self._lock:
            if file not in self._files:
                self._files[file] = DataFile(file, buffers=self._buffers)
            return self._files[file]

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


Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


@contextmanager
def prefetched(
    load: Callable[[Item], Loaded], items: Sequence[Item], *, ahead: bool = True
) -> Iterator[Iterator[Loaded]]:
    """Yields an iterator over `load(item)` for every item, one ahead of its reader.

    An error while loading is raised where the item is asked for.

    Args:
        load: Called once for every item, in order.
        items: What to load.
        ahead: If not, an item is loaded only when it is asked for, so that there is never more than one.
    """
    if not ahead:
        yield (load(item) for item in items)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="largemerge-read") as pool:

        def loaded() -> Iterator[Loaded]:
            coming: Future[Loaded] | None = pool.submit(load, items[0]) if items else None
            for position in range(len(items)):
                assert coming is not None
                present = coming.result()
                coming = pool.submit(load, items[position + 1]) if position + 1 < len(items) else None
                yield present
                del present  # its memory must not wait for the next one

        yield loaded()
