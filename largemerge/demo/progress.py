"""How far the training is: a live bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL_SECONDS = 10.0

Step = Callable[[str, str], None]
"""To be called after each step, with what is being done and how it goes."""


@contextmanager
def training_progress(total: int) -> Iterator[Step]:
    """Shows `total` steps on standard error, until left."""
    console = Console(stderr=True)
    with _bar(console, total) if console.is_terminal else _lines(console, total) as step:
        yield step


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Step]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("training", total=total)
        yield lambda what, how: progress.update(task, advance=1, description=f"{what}, {how}")


@contextmanager
def _lines(console: Console, total: int) -> Iterator[Step]:
    done = 0
    last = time.monotonic()

    def step(what: str, how: str) -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last >= _PLAIN_INTERVAL_SECONDS:
            last = time.monotonic()
            console.print(f"{100 * done / total:3.0f}% {what}, {how}", highlight=False, soft_wrap=True)

    yield step
