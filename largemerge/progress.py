"""Progress of a long run, and where its time goes.

    stage            what is being done before there are steps to count: importing, reading headers, planning
    showing_stages   shows it: a live line on a terminal, a plain line for what takes long anywhere else
    StepBar          a live bar on a terminal, a plain line now and then anywhere else
    RunProgress      that bar for a merge: stage, block, candidate, rate, memory
    Clock            seconds by stage, and when each stage began, for the report

Whoever merges reports steps and stages to them, and need not know how they are shown. Nothing here imports torch: the
first stage is to import it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status

from largemerge.log import LOGGER, STAGES, stage
from largemerge.units import duration

if TYPE_CHECKING:
    import torch

__all__ = ["Clock", "RunProgress", "StepBar", "Watcher", "showing_stages", "stage"]

_PLAIN_INTERVAL_SECONDS = 10.0
_PLAIN_STAGE_SECONDS = 5.0  # a stage gets a plain line once it takes this long
_MIN_TIMELINE_SECONDS = 0.001  # the timeline leaves out what is shorter


class Watcher(Protocol):
    """Follows the steps of a merge."""

    def step(self, block: str, stage: str, candidate: str | None = None) -> None:
        """Counts one batch or one solve that has been done."""


class _StageDisplay(logging.Handler):
    """Shows the stage that is under way: on a terminal at once, elsewhere once it takes long."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._console = Console(stderr=True, markup=False, emoji=False)
        self._status = Status("", console=self._console) if self._console.is_terminal else None
        self._changed = threading.Event()
        self._text = ""
        if self._status is None:
            threading.Thread(target=self._tell_long_ones, name="largemerge-stages", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a stage in place of the one before; nothing where it has no text."""
        self._text = record.getMessage()
        self._changed.set()
        if self._status is not None:
            self._status.update(self._text)
            (self._status.start if self._text else self._status.stop)()

    def close(self) -> None:
        """Shows nothing from now on."""
        self._text = ""
        self._changed.set()
        if self._status is not None:
            self._status.stop()
        super().close()

    def _tell_long_ones(self) -> None:
        while self._changed.wait():
            self._changed.clear()
            text = self._text
            if text and not self._changed.wait(_PLAIN_STAGE_SECONDS):
                self._console.print(f"largemerge: {text}", highlight=False, soft_wrap=True)


@contextmanager
def showing_stages(*, quiet: bool = False) -> Iterator[None]:
    """Shows what `stage` says while the block runs, on standard error; once, if blocks are nested."""
    if quiet or any(isinstance(handler, _StageDisplay) for handler in STAGES.handlers):
        yield
        return
    display, level = _StageDisplay(), STAGES.level
    STAGES.addHandler(display)
    STAGES.setLevel(logging.INFO)
    try:
        yield
    finally:
        STAGES.removeHandler(display)
        STAGES.setLevel(level)
        display.close()


class StepBar:
    """Shows how many steps of a run are done, and the time left. A context manager.

    Args:
        total: Number of steps.
        console: Console to show it on; nothing is shown if it is quiet.
    """

    def __init__(self, total: int, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal and not console.quiet
        self._total = max(1, total)
        self._done = 0
        self._start = time.monotonic()
        self._last_line = self._start
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[more]}", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID = self._bar.add_task("starting", total=self._total, more="")

    def __enter__(self) -> StepBar:
        stage("")
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    @property
    def rate(self) -> float:
        """Steps a second so far."""
        return self._done / max(1e-9, time.monotonic() - self._start)

    def advance(self, text: str, more: Callable[[], str] = str) -> None:
        """Counts one step.

        Args:
            text: Description of the step.
            more: Returns what else to show; called only when it is shown.
        """
        self._done += 1
        LOGGER.debug("%d/%d %s", self._done, self._total, text)
        now = time.monotonic()
        if self._live:
            self._bar.update(self._task, completed=self._done, description=text, more=more())
        elif now - self._last_line >= _PLAIN_INTERVAL_SECONDS:
            self._last_line = now
            left = duration((now - self._start) * (self._total - self._done) / self._done)
            shown = ", ".join(part for part in (text, more(), f"{left} left") if part)
            self._console.print(f"{100 * self._done / self._total:3.0f}% {shown}", highlight=False, soft_wrap=True)


class RunProgress:
    """Shows stage, block, candidate, rate, time left and memory of a merge. A context manager.

    Args:
        total: Number of steps: batches through a block, solves, tensors written.
        num_blocks: Number of blocks in all stacks.
        device: The device whose memory is shown.
        quiet: Show nothing.
    """

    def __init__(self, total: int, num_blocks: int, device: torch.device, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, markup=False, emoji=False)
        self._bar = StepBar(total, self._console)
        self._num_blocks = num_blocks
        self._device = device
        self._blocks: dict[str, int] = {}

    def __enter__(self) -> RunProgress:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def tell(self, text: str) -> None:
        """Shows a line of its own, above the bar."""
        LOGGER.debug("%s", text)
        self._console.print(text, highlight=False, soft_wrap=True)

    def step(self, block: str, stage: str, candidate: str | None = None) -> None:
        """Counts one step of a stage."""
        if stage != "outside" and block != "head":  # these two are no blocks
            self._blocks.setdefault(block, len(self._blocks) + 1)
        where = f"{block} ({self._blocks[block]}/{self._num_blocks})" if block in self._blocks else block
        self._bar.advance(f"{stage} {where}" + (f" {candidate}" if candidate else ""), self._rate_and_memory)

    def _rate_and_memory(self) -> str:
        from largemerge.machine import memory_in_use

        memory = memory_in_use(self._device)
        held = f"{memory.host_anonymous / 2**30:.1f} GiB"
        if memory.device:
            held += f" + {memory.device / 2**30:.1f} GiB on {self._device}"
        return f"{self._bar.rate:.1f} steps/s, {held}"


class Clock:
    """Counts the seconds of nested stages; an outer stage pauses while an inner one runs.

    Args:
        start: `time.perf_counter()` at the start of the merge.

    Attributes:
        timeline: Seconds since the start, stage and block, for every stage that began.
    """

    def __init__(self, start: float) -> None:
        self.timeline: list[tuple[float, str, str]] = []
        self._start = start
        self._block = ""
        self._seconds: dict[str, float] = {}
        self._stages: list[str] = []
        self._since = start

    def begin(self, block: str) -> None:
        """Starts to count for another block, from zero."""
        self._block, self._seconds = block, {}

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of every stage since `begin`."""
        return {stage: round(value, 4) for stage, value in self._seconds.items()}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time inside for a stage."""
        self._add_elapsed()
        self._stages.append(name)
        if len(self._stages) == 1 and (not self.timeline or self.timeline[-1][1:] != (name, self._block)):
            self._note_start(name)
        try:
            yield
        finally:
            self._add_elapsed()
            self._stages.pop()

    def _note_start(self, stage: str) -> None:
        now = time.perf_counter() - self._start
        if self.timeline and now - self.timeline[-1][0] < _MIN_TIMELINE_SECONDS:
            self.timeline.pop()
        self.timeline.append((round(now, 3), stage, self._block))

    def _add_elapsed(self) -> None:
        """Adds the time since the last change to the innermost stage."""
        now = time.perf_counter()
        if self._stages:
            self._seconds[self._stages[-1]] = self._seconds.get(self._stages[-1], 0.0) + now - self._since
        self._since = now
