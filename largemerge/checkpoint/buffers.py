"""Memory that tensors are read into, used again and again.

Tensors of all models come and go by gigabytes. From the C library's heap, where other memory comes and goes between
them, they would leave holes; fresh from the system, every page would have to be cleared first.
"""

from __future__ import annotations

import bisect
import mmap
import threading
import weakref
from collections import deque

import numpy as np
import torch

_WASTE = 4  # a free region may be so many times as large as what is asked for
_ROUNDING = 8  # a region may be longer than what is asked for, by one of so many parts
_HUGE_BYTES = 2 << 20  # of a large page


class Buffers:
    """Lends regions of memory that begin at a page's start; one comes back when no tensor uses it any more.

    Args:
        num_bytes: Lent and waiting for the next to ask, before rounding. More may be lent; then nothing waits.
    """

    def __init__(self, num_bytes: int) -> None:
        self._most = with_rounding(num_bytes)
        self._free: list[tuple[int, int, mmap.mmap]] = []  # size, a number that orders equals, region
        self._free_bytes = self._lent_bytes = self._number = 0
        self._returned: deque[mmap.mmap] = deque()  # not sorted in yet
        self._lock = threading.Lock()

    def lend(self, num_bytes: int) -> torch.Tensor:
        """One-dimensional, uint8; whatever was there before."""
        region = self._take(num_bytes)
        array = np.frombuffer(region, dtype=np.uint8, count=num_bytes)
        weakref.finalize(array, self._give_back, region).atexit = False
        return torch.from_numpy(array)

    def _take(self, num_bytes: int) -> mmap.mmap:
        num_bytes = _rounded(num_bytes)
        with self._lock:
            self._sort_in()
            index = bisect.bisect_left(self._free, (num_bytes, 0))
            if index < len(self._free) and self._free[index][0] <= _WASTE * num_bytes:
                size = self._free[index][0]
                # The last one to come back may still be in a processor's cache.
                region = self._free.pop(bisect.bisect_left(self._free, (size + 1, 0)) - 1)[2]
                self._free_bytes -= size
                self._lent_bytes += size
                return region
            self._lent_bytes += num_bytes
            self._make_room()
        region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if num_bytes >= _HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
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
        """What has come back; by who holds the lock."""
        while self._returned:
            region = self._returned.popleft()
            self._number += 1
            bisect.insort(self._free, (len(region), self._number, region))
            self._free_bytes += len(region)
            self._lent_bytes -= len(region)
        self._make_room()

    def _make_room(self) -> None:
        """The system gets back what is too much, the first to have come back first; by who holds the lock."""
        while self._free and self._free_bytes + self._lent_bytes > self._most:
            oldest = min(range(len(self._free)), key=lambda index: self._free[index][1])
            self._free_bytes -= self._free.pop(oldest)[0]


def with_rounding(num_bytes: int) -> int:
    """What regions for so many bytes take at most."""
    return num_bytes + num_bytes // _ROUNDING


def _rounded(num_bytes: int) -> int:
    """So that what is nearly as long takes the same region."""
    step = max(mmap.PAGESIZE, (1 << num_bytes.bit_length()) // (2 * _ROUNDING))
    return -(-num_bytes // step) * step
