"""As many workers compute at once as there are cores; the others wait for the disk, or for their turn.

More that compute would only take the cores' caches from each other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_worker = threading.local()


class Turns:
    """So many workers at once may compute."""

    def __init__(self, number: int) -> None:
        self._free = threading.Semaphore(number)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Meanwhile this thread has a turn."""
        self._free.acquire()
        _worker.turn = self._free
        try:
            yield
        finally:
            _worker.turn = None
            self._free.release()


@contextmanager
def others_turn() -> Iterator[None]:
    """Meanwhile this thread waits for the disk, and another may compute, if this one had a turn."""
    turn: threading.Semaphore | None = getattr(_worker, "turn", None)
    if turn is None:
        yield
        return
    turn.release()
    try:
        yield
    finally:
        turn.acquire()
