"""Progress of a long run: a live bar on a terminal, a plain line now and then anywhere else.

Where the time of a merge goes: seconds by stage, and when each stage began.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from largemerge.machine import memory_in_use

_PLAIN_INTERVAL_SECONDS = 10.0


class RunProgress:
    """Shows stage, block, candidate, rate, time left and memory. A context manager.

    Args:
        total: Steps in all: batches through a block, solves, tensors written.
        num_blocks: Of all stacks.
        device: Whose memory is shown.
        quiet: Show nothing.
    """

    def __init__(self, total: int, num_blocks: int, device: torch.device, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, markup=False, emoji=False)
        self._live = self._console.is_terminal and not quiet
        self._total = max(1, total)
        self._num_blocks = num_blocks
        self._device = device
        self._done = 0
        self._start = time.monotonic()
        self._last_line = self._start
        self._blocks: dict[str, int] = {}
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[more]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._task: TaskID = self._bar.add_task("starting", total=self._total, more="")

    def __enter__(self) -> RunProgress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def tell(self, text: str) -> None:
        """Shows a line of its own."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def step(self, block: str, stage: str, candidate: str | None = None) -> None:
        """One step of `stage` has been done."""
        self._done += 1
        if stage != "outside":
            self._blocks.setdefault(block, len(self._blocks) + 1)
        now = time.monotonic()
        if self._live:
            self._bar.update(
                self._task, completed=self._done, description=self._what(block, stage, candidate), more=self._more(now)
            )
        elif now - self._last_line >= _PLAIN_INTERVAL_SECONDS:
            self._last_line = now
            self._console.print(
                f"{100 * self._done / self._total:3.0f}% {self._what(block, stage, candidate)}, {self._more(now)}, "
                f"{_clock((now - self._start) * (self._total - self._done) / self._done)} left",
                highlight=False,
                soft_wrap=True,
            )

    def _what(self, block: str, stage: str, candidate: str | None) -> str:
        where = f"{block} ({self._blocks[block]}/{self._num_blocks})" if block in self._blocks else block
        return f"{stage} {where}" + (f" {candidate}" if candidate else "")

    def _more(self, now: float) -> str:
        memory = memory_in_use(self._device)
        rate = self._done / max(1e-9, now - self._start)
        held = f"{memory.host_anonymous / 2**30:.1f} GiB"
        if memory.device:
            held += f" + {memory.device / 2**30:.1f} GiB on {self._device}"
        return f"{rate:.1f} steps/s, {held}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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
