"""What a merge runs on: versions and machine, for reports and manifests.

How much memory this process holds, and the most that it held.

Host memory is counted twice over: anonymous (what the process allocated: `RssAnon` on Linux) and total
(with the pages of mapped files, which the kernel may drop at any time).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

_PACKAGES = ("largemerge", "torch", "transformers", "accelerate", "safetensors", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of largemerge and of what it stands on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the merge ran on."""
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


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # <malloc.h>
_INTERVAL_SECONDS = 0.05  # reading /proc costs a millisecond; peaks of blocks last longer than this


@dataclass(frozen=True)
class MemoryUse:
    """Bytes.

    Attributes:
        host_anonymous: Allocated by the process.
        host_total: With mapped files.
        device: Allocated by torch on the accelerator; 0 without one.
    """

    host_anonymous: int
    host_total: int
    device: int


def memory_in_use(device: torch.device) -> MemoryUse:
    """What the process holds now."""
    total = psutil.Process().memory_info().rss
    on_device = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return MemoryUse(_anonymous_bytes(total), total, on_device)


def free_on_gpu(device: torch.device, local_ranks: int) -> int:
    """Bytes: the part of each of so many processes, shared out evenly over this machine's GPUs."""
    return int(torch.cuda.mem_get_info(device)[0]) // -(-local_ranks // torch.cuda.device_count())


def _anonymous_bytes(otherwise: int) -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return otherwise
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
    return int(line.split()[1]) * 1024 if line else otherwise


def reuse_freed_memory(*, sparingly: bool) -> None:
    """Fixes what the C library does with freed memory (glibc; nothing elsewhere).

    Pieces that come and go, an activation or a block's weights, are fastest when the next one takes the same place: a
    fresh page costs the system more time than the model's own operations on it. But pieces of changing sizes leave
    holes, and a merge then holds more than it uses, up to a third for wide models. Blocks are read by one thread and
    given back by another: both share one arena. It is a setting of the whole process: for a program of ours, not for
    somebody's who imports us.

    Args:
        sparingly: Give even medium pieces back to the system at once: for merges that must stay within little memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    largest_reused = (8 if sparingly else 32) << 20  # glibc takes no more than 32 MiB
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, largest_reused)
    mallopt(_M_TRIM_THRESHOLD, 4 * largest_reused)


class MemoryWatch:
    """Samples memory in a thread while it is entered, and keeps the peaks. A context manager."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="largemerge-memory", daemon=True)
        self._peak = memory_in_use(device)

    def __enter__(self) -> MemoryWatch:
        self.follow(self.device)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def follow(self, device: torch.device) -> None:
        """From now on, memory on this device."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.device = device

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self._note()

    def _note(self) -> None:
        now = memory_in_use(self.device)
        self._peak = MemoryUse(
            max(self._peak.host_anonymous, now.host_anonymous),
            max(self._peak.host_total, now.host_total),
            max(self._peak.device, now.device),
        )

    def peak(self) -> MemoryUse:
        """The most held so far."""
        self._note()
        if self.device.type == "cuda":
            device = torch.cuda.max_memory_allocated(self.device)
            return MemoryUse(self._peak.host_anonymous, self._peak.host_total, device)
        return self._peak
