"""Wall time and peak memory of a command, and the machine that it ran on. Linux only."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Measured:
    """What one process took."""

    seconds: float
    """Wall time, with the start of Python and the imports."""
    peak_bytes: int
    """Resident set at its largest. Pages of mapped files count, though the kernel may drop them."""
    peak_anonymous_bytes: int
    """What of it no file stands behind, at its largest as polled every 50 ms."""


def run_measured(command: Sequence[str], log: Path) -> Measured:
    """Runs a command, its output in a file; ends the program, showing the output's end, if it fails."""
    start = time.perf_counter()
    peak = peak_anonymous = 0
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        while process.poll() is None:
            # Not the child's ru_maxrss: that starts from the size of the process that forked it.
            status = _status(process.pid)
            peak = max(peak, status.get("VmHWM", 0))
            peak_anonymous = max(peak_anonymous, status.get("RssAnon", 0))
            time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    return Measured(seconds, peak, peak_anonymous)


def _status(pid: int) -> dict[str, int]:
    """Memory lines of /proc/PID/status, in bytes; empty for a process that has just ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def drop_from_cache(files: Sequence[Path]) -> None:
    """Asks the kernel to forget clean pages of these files; it may keep some."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine() -> dict[str, str | int | float]:
    """What a reader has to know to compare numbers."""
    match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": match[1].strip() if match else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
