"""Large files read and written past the system's cache where that helps, into memory that is used again.

    DataFile    reads and writes at many places of a file
    Buffers     lends memory to long reads, and takes it back when no tensor uses it any more

Bytes that are read or written once gain nothing from the cache, and the copies through it cost more processor time than
many a merge's arithmetic. On a local disk, long reads of what the cache does not hold and long writes therefore go
straight between the disk and a buffer (`O_DIRECT`). Short ones, what is cached already, and all of other file systems
go through the cache. The bytes are the same.

Tensors of all models come and go by gigabytes. On the C library's heap, between other allocations, they would leave
holes; fresh from the system, every page would have to be cleared first. Hence buffers of their own.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import functools
import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import torch

PAGE = 4096
"""Unit of direct transfers in bytes: where they begin and end, in the file and in memory."""
PROBE_SECONDS = 0.12
"""Time that is enough to measure one rate of a machine, in seconds."""
PROBE_BYTES = 64 << 20
"""The most that is read or written to measure a disk's rate."""
THROUGH_CACHE = "LARGEMERGE_THROUGH_CACHE"
"""Environment variable; if it is set, nothing goes past the cache."""
_LOCAL_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "overlay"})
_SHORT_BYTES = 128 << 10  # transfers below this are as fast through the cache
_MAX_CALL_BYTES = 1 << 30  # Linux moves at most 2 GiB in one call
_WRITE_BUFFER_BYTES = 2 << 20  # of each thread that writes
_CACHED_SHARE = 0.5  # of a part of a file: from here on it is read through the cache

_MAX_EXCESS = 4  # a free region may be so many times as large as what is asked for
_ROUNDING = 8  # a region may be longer than what is asked for, by one of so many parts
_HUGE_PAGE_BYTES = 2 << 20


class DataFile:
    """An open file. Safe to use from several threads; a context manager.

    Args:
        path: The file.
        size: Length in bytes that the file gets, if it is opened for writing, too; where the file system can, their
            room on the disk is taken at once. `None`: it is only read.
        buffers: Buffers for long reads; `None`: their memory is allocated.

    Attributes:
        bytes_past_cache: Bytes read and written past the system's cache, so far.

    Raises:
        OSError: If the file cannot be opened, or there is not room enough.
    """

    def __init__(self, path: Path, *, size: int | None = None, buffers: Buffers | None = None) -> None:
        self._space = _aligned if buffers is None else buffers.lend
        self.bytes_past_cache = 0
        self._path = path
        # A file that is written may not be a link: what it led to would be overwritten.
        flags = os.O_RDONLY if size is None else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o644)
        self._direct: int | None = None
        self._is_direct_refused = False
        self._cached: _CachedPages | None = None
        self._lock = threading.Lock()
        self._local = threading.local()
        try:
            self._direct = _open_direct(path, flags & ~os.O_CREAT)
            if size is not None:
                self._take_room(size)
            elif self._direct is not None:
                self._cached = _CachedPages(self._descriptor)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what was written may still be on its way to the disk."""
        if self._cached is not None:
            self._cached.close()
        if self._direct is not None:
            os.close(self._direct)
        os.close(self._descriptor)

    def _take_room(self, size: int) -> None:
        before = os.fstat(self._descriptor).st_size
        try:
            if self._direct is not None and size:
                os.posix_fallocate(self._descriptor, 0, size)
            os.truncate(self._descriptor, size)  # elsewhere sparse: costs nothing until written
        except OSError:
            os.truncate(self._descriptor, before)  # a failed call keeps all the room that it could get
            raise

    def read_tensor(
        self, offset: int, dtype: torch.dtype, shape: tuple[int, ...], *, past_cache: bool = True
    ) -> torch.Tensor:
        """Reads a tensor that lies at a byte position, into memory of its own.

        Args:
            offset: Position of the tensor's first byte.
            dtype: Stored dtype.
            shape: Stored shape.
            past_cache: Read past the cache where that helps; else the tensor stays there for the next time.

        Raises:
            EOFError: If the file ends before the tensor does.
        """
        with self._named():
            return self._read_tensor(offset, dtype, shape, past_cache=past_cache)

    def _read_tensor(
        self, offset: int, dtype: torch.dtype, shape: tuple[int, ...], *, past_cache: bool
    ) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _SHORT_BYTES:
            return read_tensor(self._descriptor, offset, dtype, shape)
        found = self._read_direct(offset, num_bytes) if past_cache else None
        if found is None:
            return read_tensor(self._descriptor, offset, dtype, shape, self._space)
        aligned = offset % dtype.itemsize == 0
        return (found if aligned else found.clone()).view(dtype).reshape(shape)

    def _read_direct(self, offset: int, num_bytes: int) -> torch.Tensor | None:
        """Reads bytes by whole pages past the cache; `None` where they have to come through it."""
        if self._direct is None or self._is_direct_refused or (self._cached and self._cached.holds(offset, num_bytes)):
            return None
        begin, stop = offset // PAGE * PAGE, -(-(offset + num_bytes) // PAGE) * PAGE
        pages = self._space(stop - begin)
        try:
            _fill(self._direct, byte_view(pages), begin, offset - begin + num_bytes, unit=PAGE)
        except OSError as error:
            self._give_up_direct(error)
            return None
        self._count(num_bytes)
        return pages[offset - begin : offset - begin + num_bytes]

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Writes bytes to their place.

        Args:
            offset: Position of the first byte in the file.
            data: The bytes: a vector of uint8 on the CPU.
        """
        with self._named():
            self._write(offset, data)

    def _write(self, offset: int, data: torch.Tensor) -> None:
        view, stop = byte_view(data), offset + data.numel()
        begin, end = -(-offset // PAGE) * PAGE, stop // PAGE * PAGE
        if self._direct is None or self._is_direct_refused or end - begin < _SHORT_BYTES:
            _drain(self._descriptor, view, offset)
            return
        # Whole pages past the cache, the ends through it: their pages hold bytes of other tensors too.
        done = self._write_direct(self._direct, begin, data[begin - offset : end - offset])
        _drain(self._descriptor, view[: begin - offset], offset)
        _drain(self._descriptor, view[begin - offset + done :], begin + done)
        self._count(done)

    def _write_direct(self, descriptor: int, offset: int, data: torch.Tensor) -> int:
        """Writes whole pages by way of a buffer that begins at a page's start; returns how many bytes it wrote."""
        buffer: torch.Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = _aligned(_WRITE_BUFFER_BYTES)
        done = 0
        for part in torch.split(data, _WRITE_BUFFER_BYTES):
            copied = buffer[: part.numel()].copy_(part)
            try:
                _drain(descriptor, byte_view(copied), offset + done)
            except OSError as error:
                self._give_up_direct(error)
                return done
            done += part.numel()
        return done

    def sync(self) -> None:
        """Forces everything written so far onto the disk."""
        with self._named():
            os.fsync(self._descriptor)

    def is_at(self, path: Path) -> bool:
        """Whether the open file is still the one that lies at a path."""
        try:
            found = path.stat(follow_symlinks=False)
        except OSError:
            return False
        own = os.fstat(self._descriptor)
        return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Puts the path into errors of calls that know the file by its number alone."""
        try:
            yield
        except OSError as error:
            error.filename = str(self._path)
            raise

    def _give_up_direct(self, error: OSError) -> None:
        """Goes through the cache from now on, if direct transfers are what is refused."""
        if error.errno != errno.EINVAL:
            raise error
        self._is_direct_refused = True

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes_past_cache += num_bytes


def byte_view(buffer: torch.Tensor) -> memoryview:
    """Returns the memory of a vector of uint8 on the CPU."""
    array: Any = buffer.numpy()
    return memoryview(array)


def read_tensor(
    descriptor: int,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    space: Callable[[int], torch.Tensor] = lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8),
) -> torch.Tensor:
    """Reads a tensor that lies at a byte position of an open file, through the system's cache.

    Args:
        descriptor: File descriptor of the open file.
        offset: Position of the tensor's first byte.
        dtype: Stored dtype.
        shape: Stored shape.
        space: Allocates so many bytes, a vector of uint8.

    Raises:
        EOFError: If the file ends before the tensor does.
    """
    # Bytes first, the dtype as a view: NumPy, which lends the writable buffer, knows no bfloat16.
    buffer = space(math.prod(shape) * dtype.itemsize)
    _fill(descriptor, byte_view(buffer), offset, buffer.numel())
    return buffer.view(dtype).reshape(shape)


def _fill(descriptor: int, view: memoryview, offset: int, wanted: int, unit: int = 1) -> None:
    """Reads `wanted` bytes or more into a buffer; a read that ends between two units has met the end of the file."""
    done = 0
    while done < wanted:
        count = os.preadv(descriptor, [view[done : done + _MAX_CALL_BYTES]], offset + done)
        done += count
        if count == 0 or (done < wanted and done % unit):
            raise EOFError


def _drain(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.pwrite(descriptor, view[done : done + _MAX_CALL_BYTES], offset + done)
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += count


def _aligned(num_bytes: int) -> torch.Tensor:
    """Allocates bytes that begin at a page's start."""
    space = torch.empty(num_bytes + PAGE, dtype=torch.uint8)
    skipped = -space.data_ptr() % PAGE
    return space[skipped : skipped + num_bytes]


def _open_direct(path: Path, flags: int) -> int | None:
    """Opens a file for direct transfers; `None` where they have to go through the cache."""
    direct = getattr(os, "O_DIRECT", None)
    if direct is None or THROUGH_CACHE in os.environ or _file_system(path.resolve().parent) not in _LOCAL_FILE_SYSTEMS:
        return None
    try:
        return os.open(path, flags | direct)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


@functools.cache
def _file_system(folder: Path) -> str:
    """Names the file system that a folder lies on: that of the innermost mount point above it."""
    mounted = {Path(partition.mountpoint): partition.fstype for partition in psutil.disk_partitions(all=True)}
    return next((mounted[place] for place in (folder, *folder.parents) if place in mounted), "")


class _CachedPages:
    """Tells which pages of an open file the system's cache holds, by `mincore`."""

    def __init__(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        self._map = mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if size else None
        # Only an address to ask for: nothing is read by way of it.
        self._address = np.frombuffer(self._map, dtype=np.uint8).ctypes.data if self._map is not None else 0
        self._size = size

    def holds(self, offset: int, num_bytes: int) -> bool:
        """Whether the cache holds most of a part of the file; True where the system does not tell."""
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(offset + num_bytes, self._size) - begin
        if self._map is None or length <= 0:
            return True
        pages = np.empty(-(-length // mmap.PAGESIZE), dtype=np.uint8)
        pointer = ctypes.c_void_p(pages.ctypes.data)
        if _mincore()(ctypes.c_void_p(self._address + begin), ctypes.c_size_t(length), pointer) != 0:
            return True
        return bool((pages & 1).mean() >= _CACHED_SHARE)

    def close(self) -> None:
        """Unmaps the file."""
        if self._map is not None:
            self._map.close()


@functools.cache
def _mincore() -> Any:
    return ctypes.CDLL(None).mincore


class Buffers:
    """Lends regions of memory that begin at a page's start; a region comes back when no tensor uses it any more.

    Args:
        num_bytes: Size of all regions, lent or free, in bytes before rounding. More may be lent; then none stays free.
    """

    def __init__(self, num_bytes: int) -> None:
        self._max_bytes = with_rounding(num_bytes)
        self._free: list[tuple[int, int, mmap.mmap]] = []  # size; number, by order of coming back; region
        self._free_bytes = self._lent_bytes = self._number = 0
        self._returned: deque[mmap.mmap] = deque()  # not sorted in yet
        self._lock = threading.Lock()

    def lend(self, num_bytes: int) -> torch.Tensor:
        """Lends so many bytes, a vector of uint8; they hold whatever was there before."""
        region = self._take(num_bytes)
        array = np.frombuffer(region, dtype=np.uint8, count=num_bytes)
        weakref.finalize(array, self._give_back, region).atexit = False
        return torch.from_numpy(array)

    def _take(self, num_bytes: int) -> mmap.mmap:
        num_bytes = _rounded(num_bytes)
        with self._lock:
            self._sort_in()
            index = bisect.bisect_left(self._free, (num_bytes, 0))
            if index < len(self._free) and self._free[index][0] <= _MAX_EXCESS * num_bytes:
                size = self._free[index][0]
                # The last one to come back may still be in a processor's cache.
                region = self._free.pop(bisect.bisect_left(self._free, (size + 1, 0)) - 1)[2]
                self._free_bytes -= size
                self._lent_bytes += size
                return region
            self._lent_bytes += num_bytes
            self._make_room()
        region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if num_bytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        return region

    def _give_back(self, region: mmap.mmap) -> None:
        self._returned.append(region)
        # The garbage collector may call this at any moment, in the very thread that is taking one: it must not wait.
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        """Sorts in what has come back; called by who holds the lock."""
        while self._returned:
            region = self._returned.popleft()
            self._number += 1
            bisect.insort(self._free, (len(region), self._number, region))
            self._free_bytes += len(region)
            self._lent_bytes -= len(region)
        self._make_room()

    def _make_room(self) -> None:
        """Returns what is too much to the system, the oldest regions first; called by who holds the lock."""
        while self._free and self._free_bytes + self._lent_bytes > self._max_bytes:
            oldest = min(range(len(self._free)), key=lambda index: self._free[index][1])
            self._free_bytes -= self._free.pop(oldest)[0]


def with_rounding(num_bytes: int) -> int:
    """Returns how many bytes regions for `num_bytes` take at most."""
    return num_bytes + num_bytes // _ROUNDING


def _rounded(num_bytes: int) -> int:
    """Rounds a size up, so that tensors of nearly the same size can use the same region."""
    step = max(mmap.PAGESIZE, (1 << num_bytes.bit_length()) // (2 * _ROUNDING))
    return -(-num_bytes // step) * step
