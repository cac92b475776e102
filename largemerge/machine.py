"""This machine and this process: versions and hardware for reports, memory in use and its peak.

Host memory is counted twice over: anonymous memory, which the process has allocated (`RssAnon` on Linux), and the
total, with pages of mapped files, which the kernel may drop at any time. Limits and plans mean the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib.metadata
import os
import platform
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # <malloc.h>
_INTERVAL_SECONDS = 0.05  # reading /proc costs a millisecond; peaks of blocks last longer than this
_MAX_POINTS = 300
_ABANDONED_SECONDS = 120.0  # a scratch folder gets its lock right after it is made
KERNEL_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
"""Environment variable of oneDNN, which keeps a kernel for each shape of a product that it has seen."""
_BASELINE_STEP = 32 << 20
_PACKAGES = ("largemerge", "torch", "transformers", "accelerate", "safetensors", "bitsandbytes")


def versions(*more: str) -> dict[str, str]:
    """Looks up the versions of Python, largemerge and the packages that decide its results, and of `more` packages."""
    return {"python": platform.python_version()} | {package: _version(package) for package in (*_PACKAGES, *more)}


@functools.cache  # a merge notes them four times, and reading one takes some milliseconds
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(device: torch.device) -> dict[str, Any]:
    """Describes this machine: system, processor, memory, device."""
    described = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": str(device),
    }
    if device.type == "cuda":
        described["device_name"] = torch.cuda.get_device_name(device)
    return described


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()


@dataclass(frozen=True)
class MemoryUse:
    """Memory of this process, in bytes.

    Attributes:
        host_anonymous: Memory that the process has allocated.
        host_total: Anonymous memory and the pages of mapped files.
        device: Memory that torch has allocated on the accelerator; 0 without one.
    """

    host_anonymous: int
    host_total: int
    device: int


def memory_in_use(device: torch.device) -> MemoryUse:
    """Measures the memory of this process."""
    total = psutil.Process().memory_info().rss
    on_device = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return MemoryUse(_anonymous_bytes(total), total, on_device)


def baseline_bytes(device: torch.device, at_least: int, held: int = 0) -> int:
    """Anonymous memory of this process before the work, the same for a plan and for the merge after it.

    Freed memory goes back to the system first. Two processes that do the same still differ by a megabyte or so. So the
    measured number is rounded up to a coarse step, and counts only where it is above what such a process always has.

    Args:
        device: The device that computes; its libraries have been loaded.
        at_least: Bytes that a process has that imported what the merge needs.
        held: Bytes of it that a plan counts on their own, such as data that has been read already.
    """
    gc.collect()
    _trim()
    measured = memory_in_use(device).host_anonymous - held
    step = _BASELINE_STEP if measured < 1 << 30 else 4 * _BASELINE_STEP
    return max(at_least, -(-measured // step) * step)


def kernels_kept() -> int:
    """Number of kernels that oneDNN keeps, at most."""
    value = os.environ.get(KERNEL_CACHE, "")
    return int(value) if value.isdecimal() else 1024


def free_on_gpu(device: torch.device, local_ranks: int) -> int:
    """Bytes that are free for each of `local_ranks` processes, spread evenly over this machine's GPUs."""
    return int(torch.cuda.mem_get_info(device)[0]) // -(-local_ranks // torch.cuda.device_count())


def _anonymous_bytes(default: int) -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return default
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
    return int(line.split()[1]) * 1024 if line else default


def reuse_freed_memory(*, sparingly: bool) -> None:
    """Sets how the C library reuses freed memory (glibc; does nothing elsewhere).

    Allocations that come and go, of activations or a block's weights, are fastest when the next one takes the same
    place: a fresh page costs the system more time than the model's own operations on it. But allocations of changing
    sizes leave holes, and a merge then holds more than it uses, up to a third for wide models. Blocks are read by one
    thread and freed by another: both get the same arena. All of this holds for the whole process, so it is for our own
    command, not for a program that imports us.

    Args:
        sparingly: Return freed memory to the system from 1 MiB on, not from 32 MiB on: for merges that must stay
            within little memory, and for those that keep small tensors for a while between larger ones, which would
            leave holes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    largest_reused = (1 if sparingly else 32) << 20  # glibc takes no more than 32 MiB
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, largest_reused)
    mallopt(_M_TRIM_THRESHOLD, max(32 << 20, 4 * largest_reused))


def return_freed_memory(*, above: int) -> None:
    """Returns freed memory to the system where this process holds more than it should (glibc; elsewhere nothing).

    Workspaces of changing sizes, of several threads, leave holes in memory that the C library keeps.

    Args:
        above: Anonymous memory in bytes up to which it may be kept.
    """
    if _anonymous_bytes(0) > above:
        _trim()


def _trim() -> None:
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Makes a folder for the moment where temporary files go; what killed processes have left there goes, too.

    Args:
        purpose: A word for its name, `largemerge-PURPOSE-…`.
    """
    _remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=f"largemerge-{purpose}-", ignore_cleanup_errors=True) as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: then nobody takes it for abandoned
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(folder)
        finally:
            os.close(descriptor)


@functools.cache
def _remove_abandoned() -> None:
    """Removes scratch folders whose processes have been killed: nobody holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob("largemerge-*-????????"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            if time.time() - status.st_mtime < _ABANDONED_SECONDS:
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


class MemoryWatch:
    """Measures memory in a thread and keeps the peaks, also those of short spans. A context manager."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._points: list[tuple[float, int, int]] = []
        self._samples, self._samples_of_point = 0, 1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="largemerge-memory", daemon=True)
        self._peak = memory_in_use(device)

    def __enter__(self) -> MemoryWatch:
        self.follow(self.device)
        self._add_point(self._measure())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def follow(self, device: torch.device) -> None:
        """Measures memory on this device from now on."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.device = device

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self._add_point(self._measure())

    def _add_point(self, now: MemoryUse) -> None:
        """Adds a sample to the points; when there are too many, two become one, and each one to come is as long."""
        if self._samples % self._samples_of_point == 0:
            if len(self._points) == _MAX_POINTS:
                pairs = zip(self._points[::2], self._points[1::2], strict=True)
                self._points = [(a[0], max(a[1], b[1]), max(a[2], b[2])) for a, b in pairs]
                self._samples_of_point *= 2
            self._points.append((time.perf_counter(), now.host_anonymous, now.device))
        else:
            at, host, device = self._points[-1]
            self._points[-1] = (at, max(host, now.host_anonymous), max(device, now.device))
        self._samples += 1

    def over_time(self, start: float) -> list[list[float]]:
        """Returns points: seconds, and the most bytes on host and device from then until the next point.

        There are at most some hundred of them, however long the merge takes.

        Args:
            start: The moment of `time.perf_counter` that seconds are counted from.
        """
        return [[round(at - start, 3), host, device] for at, host, device in list(self._points)]

    def _measure(self) -> MemoryUse:
        now = memory_in_use(self.device)
        self._peak = MemoryUse(
            max(self._peak.host_anonymous, now.host_anonymous),
            max(self._peak.host_total, now.host_total),
            max(self._peak.device, now.device),
        )
        return now

    def peak(self) -> MemoryUse:
        """Returns the peaks so far; those on the device as torch counts them."""
        self._measure()
        if self.device.type == "cuda":
            device = torch.cuda.max_memory_allocated(self.device)
            return MemoryUse(self._peak.host_anonymous, self._peak.host_total, device)
        return self._peak
