"""Trials in a process of their own: what may crash, hang or fill the memory does so there, and is told as an error.

    function ──► a fork of this process, with limits of time and memory ──► None, or why it failed, in words

Libraries of other languages end with a signal on some inputs, raise what is no `Exception` (`PanicException`), or never
return. A fork has all that is loaded here, costs some milliseconds, and may die.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator

SECONDS, GIGABYTES = 60.0, 4
"""Limits of a trial: time, and memory beyond what this process has."""

PANIC = "PanicException"
"""Type of what a library in Rust raises instead of an error; what it raises is no `Exception`."""


def why_it_fails(function: Callable[[], object], seconds: float = SECONDS) -> str | None:
    """Tries a function in a fork of this process, where its output is thrown away.

    Args:
        function: What may fail; what it changes in memory is lost.
        seconds: Time that it may take.

    Returns:
        Why it fails, in one line; `None` if it does not. Where a system has no forks, nothing is tried.
    """
    if not hasattr(os, "fork"):
        return None
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the child starts none
        child = os.fork()
    if child == 0:
        _run_in_child(function, reading, writing, seconds)
    os.close(writing)
    try:
        return _result(child, reading, seconds)
    finally:
        os.close(reading)


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turns the panics of libraries in Rust, which no `except Exception` holds, into a `RuntimeError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise RuntimeError(f"the library `tokenizers` panics: {error}") from None


def _run_in_child(function: Callable[[], object], reading: int, writing: int, seconds: float) -> None:
    """Runs the function, writes why it fails, and ends the process without any clean-up."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(int(seconds) + 5)  # should this process's parent be gone
        os.close(reading)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        _limit_memory()
        function()
        code = 0
    except BaseException as error:
        with contextlib.suppress(BaseException):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            os.write(writing, f"{type(error).__name__}: {lines[0] if lines else ''}".strip(": ").encode()[:2000])
    finally:
        os._exit(code)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        most = used + (GIGABYTES << 30)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))


def _result(child: int, reading: int, seconds: float) -> str | None:
    """Waits for the child, and says why it has failed."""
    end = time.monotonic() + seconds
    pause, found, status = 0.0005, 0, 0
    try:
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                break
            if time.monotonic() > end:
                return f"it takes more than {seconds:g} s"
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if not found:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"its library crashes ({signal.Signals(os.WTERMSIG(status)).name})"
    if os.WEXITSTATUS(status) == 0:
        return None
    return os.read(reading, 2000).decode(errors="replace") or "it fails"
