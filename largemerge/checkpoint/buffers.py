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
_HUGE_BYTES = 2 << 20  # of a large page


class Buffers:
    """Lends regions of memory that begin at a page's start; one comes back when no tensor uses it any more.

    Args:
        free_bytes: That are kept for the next to ask, at most.
    """

    def __init__(self, free_bytes: int) -> None:
        self._most = free_bytes
        self._free: list[tuple[int, int, mmap.mmap]] = []  # size, a number that orders equals, region
        self._free_bytes = self._number = 0
        self._returned: deque[mmap.mmap] = deque()  # not sorted in yet
        self._lock = threading.Lock()

    def lend(self, num_bytes: int) -> torch.Tensor:
        """One-dimensional, uint8; whatever was there before."""
        region = self._take(num_bytes)
        array = np.frombuffer(region, dtype=np.uint8, count=num_bytes)
        weakref.finalize(array, self._give_back, region).atexit = False
        return torch.from_numpy(array)

    def _take(self, num_bytes: int) -> mmap.mmap:
        with self._lock:
            self._sort_in()
            index = bisect.bisect_left(self._free, (num_bytes, 0))
            if index < len(self._free) and self._free[index][0] <= _WASTE * num_bytes:
                size, _, region = self._free.pop(index)
                self._free_bytes -= size
                return region
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
        while self._free_bytes > self._most:
            self._free_bytes -= self._free.pop()[0]  # the largest; the system gets it back
