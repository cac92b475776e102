"""Ctrl-C, SIGTERM and SIGHUP end the command at any moment: one line, no traceback, and a merge that can go on.

    at first        nothing has been written yet: the process ends at once, since an exception in the middle of an
                    import of torch may be swallowed, or abort in C++
    raising()       from here on a signal raises `Interrupted` in the main thread, so that all is closed in order
    a second time   the same signal again ends the process at once; so does the first one after some seconds, where the
                    main thread is in code that does not return
    ending()        the work is done, and signals no longer matter

A thread reads the signals from a pipe that the interpreter's handler, in C, writes to: it sees them also while the main
thread computes in C++. What is ignored when the process begins, as by `nohup`, stays ignored.

Only a process of our own does this, and before anything is imported: see `__main__.py`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

TYPE_CHECKING = False  # that of `typing`, whose import would take as long as all of these
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_GRACE_SECONDS = 10.0
_WRITE_SECONDS = 1.0
_AGAIN_SECONDS = 0.02
_SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides
_EXIT_BASE = 128  # as shells count


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(describe_signal(number))


def describe_signal(number: int) -> str:
    """Words for a signal, as in `ended by SIGTERM`."""
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def exit_code(error: KeyboardInterrupt) -> int:
    """Exit code of a process that a signal has ended: 130 after Ctrl-C."""
    return _EXIT_BASE + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


class _State:
    """What the signals of this process do; there is one such state, as there is one process."""

    installed = False
    raises = False
    taken: tuple[signal.Signals, ...] = ()
    first: int | None = None  # the signal that came first
    repeats = 0  # signals that are no new ones
    safe = "what is finished is safe: go on with --resume"


def install() -> None:
    """Takes over the signals of this process; once, in its main thread, before anything large is imported."""
    if _State.installed or threading.current_thread() is not threading.main_thread():
        return
    _State.installed = True
    taken = tuple(number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN)
    _State.taken = taken
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in taken:
        signal.signal(number, _handle)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    sys.unraisablehook = _again_where_swallowed
    os.register_at_fork(after_in_child=lambda: _leave_to_system(taken))
    threading.Thread(target=_watch, args=(reading, taken), name="largemerge-signals", daemon=True).start()


def raising() -> None:
    """From now on a signal raises `Interrupted` in the main thread."""
    _State.raises = True


def is_safe(text: str) -> None:
    """Sets what a process that ends at once says of what it leaves, and how to go on."""
    _State.safe = text


def ending() -> None:
    """From now on signals are ignored: the process is about to end, with the code that it has anyway."""
    for number in _State.taken:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame: FrameType | None) -> None:
    if not _State.raises:
        _end(number, describe_signal(number))
    if _State.first is None:
        _State.first = number
        raise Interrupted(number)


def _watch(reading: int, taken: tuple[signal.Signals, ...]) -> None:
    """Sees signals as they come, and ends the process where the main thread does not."""
    first: int | None = None
    while True:
        for number in os.read(reading, 1):
            if number not in taken:
                continue
            if _State.repeats:
                _State.repeats -= 1
            elif first is None:
                first = number
                threading.Thread(target=_end_late, args=(number,), name="largemerge-signals", daemon=True).start()
            elif number == first:  # of a launcher that sends others after the terminal's, one is enough
                _end(number, f"{describe_signal(number)} again, and ended at once; {_State.safe}")


def _end_late(number: int) -> None:
    time.sleep(_GRACE_SECONDS)
    _end(number, f"{describe_signal(number)}; {_State.safe}")


def _end(number: int, text: str) -> None:
    """Ends the process at once, with a line; never waits for a lock that the main thread holds, or for a terminal."""
    if not _is_other_rank():
        thread = threading.Thread(target=_write, args=(f"\nlargemerge: {text}\n",), daemon=True)
        thread.start()
        thread.join(_WRITE_SECONDS)
    os._exit(_EXIT_BASE + number)


def _write(text: str) -> None:
    with suppress(OSError):
        os.write(2, (_SHOW_CURSOR * os.isatty(2) + text).encode())


def _is_other_rank() -> bool:
    """Whether another process of the same merge tells the same."""
    return os.environ.get("RANK", "0") not in ("", "0") and os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def _again_where_swallowed(unraisable: Any) -> None:
    """Raises an interrupt again that came in a destructor or a callback, where Python would only print it."""
    if isinstance(unraisable.exc_value, Interrupted) and _State.first is not None:
        number, _State.first = _State.first, None
        _State.repeats += 1
        # By another thread, a moment later: here, the exception would be swallowed once more.
        threading.Thread(target=_signal_main_thread, args=(number,), name="largemerge-signals", daemon=True).start()
        return
    sys.__unraisablehook__(unraisable)


def _signal_main_thread(number: int) -> None:
    time.sleep(_AGAIN_SECONDS)
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _leave_to_system(taken: tuple[signal.Signals, ...]) -> None:
    """Gives a child its signals back: it would write them into its parent's pipe."""
    signal.set_wakeup_fd(-1)
    for number in taken:
        signal.signal(number, signal.SIG_DFL)
