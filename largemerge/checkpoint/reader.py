"""The tensors of a model, read one at a time, by name, into memory of their own.

    TensorReader        the protocol that merges read through
    CheckpointReader    the files of a checkpoint put together; quantised weights dequantised
    (AdaptedReader)     another reader with an adapter on top, in `lora.py`

`prefetched` loads the next item in a thread while the present one is in use; `read_rate` measures how fast tensors
come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import torch

from largemerge.checkpoint.direct_io import PROBE_BYTES, PROBE_SECONDS, Buffers
from largemerge.checkpoint.float8 import FP8, dequantize_float8
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.quantized import dequantize
from largemerge.checkpoint.tensor_files import Rows, TensorFile, open_tensor_file
from largemerge.checkpoint.tensor_info import TensorInfo


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
            for name, info in reader.checkpoint.tensors.items():
                if reader.bytes_read >= PROBE_BYTES or time.perf_counter() - start > 4 * PROBE_SECONDS:
                    return
                if info.num_bytes <= PROBE_BYTES:
                    reader.read(name)

        with ThreadPoolExecutor(num_workers) as pool:
            list(pool.map(read, readers))
        return max(1, sum(reader.bytes_read for reader in readers)) / (time.perf_counter() - start)


Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class TensorReader(Protocol):
    """Reads the tensors of one model, whatever lies on disk. Safe to use from several threads."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that is read: names, shapes, dtypes."""

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""

    @property
    def bytes_past_cache(self) -> int:
        """Bytes read so far that did not go through the system's cache."""

    def read(self, name: str, rows: Rows = None, *, again: bool = False) -> torch.Tensor:
        """Reads a tensor on the CPU, in memory of its own, in its stored dtype.

        Args:
            name: Name on disk.
            rows: Rows to read; `None` for all.
            again: Whether the tensor will be read again soon, so that the system's cache should keep it.
        """


class CheckpointReader:
    """Reads the tensors of one checkpoint (see `TensorReader`). A context manager.

    Args:
        checkpoint: The checkpoint.
        past_cache: Leave nothing in the system's cache but what is to be read again: for tensors that are read once.
        buffers: Buffers for tensors; `None`: their memory is allocated.
    """

    def __init__(self, checkpoint: Checkpoint, *, past_cache: bool = False, buffers: Buffers | None = None) -> None:
        self.checkpoint = checkpoint
        self._past_cache, self._buffers = past_cache, buffers
        self._files: dict[Path, TensorFile] = {}
        self._bytes_of_closed = 0
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        with self._lock:
            return self._bytes_of_closed + sum(file.bytes_read for file in self._files.values())

    @property
    def bytes_past_cache(self) -> int:
        """Bytes read so far that did not go through the system's cache."""
        with self._lock:
            return sum(file.bytes_past_cache for file in self._files.values())

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bytes_of_closed = self.bytes_read
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, name: str, rows: Rows = None, *, again: bool = False) -> torch.Tensor:
        """Reads a tensor; a quantised weight comes back dequantised.

        Args:
            name: Name on disk.
            rows: Rows to read; `None` for all.
            again: Whether the tensor will be read again soon.

        Raises:
            CheckpointError: If the file has become shorter since its header was read.
        """
        info = self.checkpoint.tensors[name]
        if info.quantization is None:
            (plain,) = info.parts.values() or (info,)  # under another name, maybe in another dtype
            return self._read_stored(plain, rows, again=again).to(info.dtype)
        if info.quantization.method == FP8:
            stored = self._read_stored(info.parts[info.name], rows, again=again)
            scales = {key: self._read_stored(part, again=True) for key, part in info.parts.items() if key != info.name}
            return dequantize_float8(stored, scales, info.name, info.quantization, info.dtype, rows)
        again = again or rows is not None  # each part of the rows reads it whole
        parts = {part: self._read_stored(stored, again=again) for part, stored in info.parts.items()}
        tensor = dequantize(info.name, parts, info.quantization, info.dtype)
        return tensor if rows is None else tensor[rows].clone()  # blocks of 64 numbers know no rows

    def _read_stored(self, info: TensorInfo, rows: Rows = None, *, again: bool) -> torch.Tensor:
        return self._file(info.file).read(info, rows, past_cache=self._past_cache and not again)

    def _file(self, path: Path) -> TensorFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = open_tensor_file(path, self._buffers)
            return self._files[path]


@contextmanager
def prefetched(
    load: Callable[[Item], Loaded], items: Sequence[Item], *, ahead: bool = True
) -> Iterator[Iterator[Loaded]]:
    """Yields an iterator over `load(item)` for every item, one ahead of its reader.

    An error while loading is raised where the item is asked for.

    Args:
        load: Loads one item; called once for each, in order.
        items: All items.
        ahead: If False, an item is loaded only when it is asked for, so that there is never more than one.
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
