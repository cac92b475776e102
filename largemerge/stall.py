"""Does this process still do something? A rank that hangs beats on, for its heartbeat is a thread of its own.

During the long work a process is taken to hang when none of its threads has computed, and nothing has come from or gone
to a disk, for a while, and when it does not wait for another rank or for the disk's word that data is safe, either.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

_LEAST_CPU_SHARE = 0.02  # of one core; less is the noise of threads that look on
_ONLOOKERS = ("largemerge-heartbeat", "largemerge-memory")


class StallWatch:
    """Looks at this process while it `works`; `waits` says when it has a reason to do nothing."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._main = threading.main_thread()
        self._reasons = 1  # for doing nothing: at first, there is no long work
        self._lock = threading.Lock()
        self._seen = (time.monotonic(), self._cpu_seconds(), self._disk_bytes())
        self._last_busy = self._seen[0]

    @contextmanager
    def works(self) -> Iterator[None]:
        """Meanwhile this process has something to do."""
        self._add(-1)
        try:
            yield
        finally:
            self._add(1)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Meanwhile this process waits for another rank, or for the disk."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def _add(self, number: int) -> None:
        with self._lock:
            self._reasons += number
            self._last_busy = time.monotonic()

    def idle_seconds(self) -> float:
        """For how long nothing has happened. To be called every second or so."""
        now, cpu, disk = time.monotonic(), self._cpu_seconds(), self._disk_bytes()
        before, cpu_before, disk_before = self._seen
        self._seen = now, cpu, disk
        busy = cpu - cpu_before >= _LEAST_CPU_SHARE * (now - before) or disk != disk_before
        if busy or self._reasons:
            self._last_busy = now
        return now - self._last_busy

    def where(self) -> str:
        """What the main thread is at: the innermost function, and the innermost of ours."""
        frame = sys._current_frames().get(self._main.ident or 0)
        calls = []
        while frame is not None:
            module = str(frame.f_globals.get("__name__", "?"))
            calls.append((module, f"{module}.{frame.f_code.co_name}, line {frame.f_lineno}"))
            frame = frame.f_back
        ours = next((text for module, text in calls if module.startswith("largemerge.")), None)
        return " in ".join(dict.fromkeys(text for text in (calls[0][1] if calls else None, ours) if text))

    def _cpu_seconds(self) -> float:
        """Of all threads but those that look on, rich's display among them."""
        onlookers = {
            thread.native_id
            for thread in threading.enumerate()
            if thread.name.startswith(_ONLOOKERS) or type(thread).__module__.startswith("rich.")
        }
        return float(sum(t.user_time + t.system_time for t in self._process.threads() if t.id not in onlookers))

    def _disk_bytes(self) -> int:
        with suppress(AttributeError, psutil.Error, OSError):  # not everywhere, and not in every container
            counters = self._process.io_counters()
            return int(counters.read_bytes + counters.write_bytes)
        return 0
