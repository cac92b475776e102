"""Where the time of a merge goes: seconds by stage, and when each stage began."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_SHORTEST_SECONDS = 0.001  # the timeline leaves out what is shorter


class Watcher(Protocol):
    """Is told how far the work is."""

    def step(self, block: str, stage: str, candidate: str | None = None) -> None:
        """One batch or one solve has been done."""


class Clock:
    """Counts the seconds of nested stages; an outer stage pauses while an inner one runs.

    Args:
        start: `time.perf_counter()` at the start of the merge.
    """

    def __init__(self, start: float) -> None:
        self.timeline: list[tuple[float, str, str]] = []
        """When (seconds since the start) which stage of which block began."""
        self._start = start
        self._block = ""
        self._seconds: dict[str, float] = {}
        self._stages: list[str] = []
        self._since = start

    def begin(self, block: str) -> None:
        """From now on it is about another block."""
        self._block, self._seconds = block, {}

    def seconds(self) -> dict[str, float]:
        """By stage, since `begin`."""
        return {stage: round(value, 4) for stage, value in self._seconds.items()}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what happens inside."""
        self._change()
        self._stages.append(name)
        if len(self._stages) == 1 and (not self.timeline or self.timeline[-1][1:] != (name, self._block)):
            self._note(name)
        try:
            yield
        finally:
            self._change()
            self._stages.pop()

    def _note(self, name: str) -> None:
        now = time.perf_counter() - self._start
        if self.timeline and now - self.timeline[-1][0] < _SHORTEST_SECONDS:
            self.timeline.pop()
        self.timeline.append((round(now, 3), name, self._block))

    def _change(self) -> None:
        now = time.perf_counter()
        if self._stages:
            self._seconds[self._stages[-1]] = self._seconds.get(self._stages[-1], 0.0) + now - self._since
        self._since = now
