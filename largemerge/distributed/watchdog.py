"""A watchdog for the ranks of a merge: one that dies, hangs or fails ends the merge of all, and is named.

    Heartbeat    a thread of each rank writes a beat into a store that rank 0 keeps, and looks at those of the others
    TimedStore   that store, whose calls end in time: they would wait for ever where rank 0 is stopped or cut off
    StallWatch   whether this process still does something, since its heartbeat goes on where the main thread hangs
    deadline     ends this process where something takes too long before all heartbeats run

A rank whose beat stands still for `beat_limit()` seconds is gone: killed, stopped, or its machine lost. One that has
failed, or finds that it hangs, writes why. A rank that sees this ends its own process, since it may be in a collective
with the rank that is gone, which would never return. What is finished is on disk.

A process hangs if, while it has work, none of its threads computes and nothing is read or written for as long, and it
waits neither for another rank nor for the disk to confirm what was written.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # the built-in one from Python 3.11 on
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psutil
import torch

from largemerge.distributed.launcher import beat_limit
from largemerge.errors import EXIT_CODE
from largemerge.log import tell

_MIN_CPU_SHARE = 0.02  # of one core; less is the noise of threads that only watch
_WATCHING_THREADS = tuple(
    f"largemerge-{name}" for name in ("heartbeat", "memory", "store", "signals", "stages", "dead")
)
_INTERVAL_SECONDS = 1.0
_GRACE_SECONDS = 3.0  # for the main thread to end by itself, which often finds a broken connection first
_TELL_SECONDS = 2.0  # for the last message: who reads the terminal may be stopped, too
_FAILED, _DONE = "failed ", "done"


class StallWatch:
    """Watches whether this process computes, reads or writes, in the times marked as `busy` and not as `blocked`."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._main = threading.main_thread()
        self._reasons_to_wait = 1  # at first, there is no work
        self._lock = threading.Lock()
        self._seen = (time.monotonic(), self._cpu_seconds(), self._disk_bytes())
        self._last_busy = self._seen[0]

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Marks a time in which this process has work to do."""
        self._add(-1)
        try:
            yield
        finally:
            self._add(1)

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Marks a time in which this process waits for another rank or for the disk."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def _add(self, number: int) -> None:
        with self._lock:
            self._reasons_to_wait += number
            self._last_busy = time.monotonic()

    def idle_seconds(self) -> float:
        """Seconds since this process last did something, or had a reason not to. To be called about every second."""
        now, cpu, disk = time.monotonic(), self._cpu_seconds(), self._disk_bytes()
        before, cpu_before, disk_before = self._seen
        self._seen = now, cpu, disk
        busy = cpu - cpu_before >= _MIN_CPU_SHARE * (now - before) or disk != disk_before
        if busy or self._reasons_to_wait:
            self._last_busy = now
        return now - self._last_busy

    def where(self) -> str:
        """Names the innermost function that the main thread is in, and the innermost one of largemerge."""
        frame = sys._current_frames().get(self._main.ident or 0)
        calls = []
        while frame is not None:
            module = str(frame.f_globals.get("__name__", "?"))
            calls.append((module, f"{module}.{frame.f_code.co_name}, line {frame.f_lineno}"))
            frame = frame.f_back
        ours = next((text for module, text in calls if module.startswith("largemerge.")), None)
        return " in ".join(dict.fromkeys(text for text in (calls[0][1] if calls else None, ours) if text))

    def _cpu_seconds(self) -> float:
        """CPU time of all threads but those that only watch or draw, in seconds."""
        watching = {
            thread.native_id
            for thread in threading.enumerate()
            if thread.name.startswith(_WATCHING_THREADS) or type(thread).__module__.startswith("rich.")
        }
        return float(sum(t.user_time + t.system_time for t in self._process.threads() if t.id not in watching))

    def _disk_bytes(self) -> int:
        with suppress(AttributeError, psutil.Error, OSError):  # not everywhere, and not in every container
            counters = self._process.io_counters()
            return int(counters.read_bytes + counters.write_bytes)
        return 0


class TimedStore:
    """A store of torch.distributed whose calls end in time, carried out by a thread of their own.

    Args:
        store: The store: from `open_store` on rank 0, from `join_store` on the others.
        limit: Seconds that a call may take.
    """

    def __init__(self, store: Any, limit: float) -> None:
        self._store, self._limit, self._is_lost = store, limit, False
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="largemerge-store", daemon=True).start()

    def set(self, key: str, value: str) -> None:
        """Sets a value.

        Raises:
            RuntimeError: If rank 0 does not answer in time, or has ended.
        """
        self._call(lambda: self._store.set(key, value))

    def get(self, keys: Sequence[str]) -> list[str]:
        """Looks up values.

        Raises:
            RuntimeError: If rank 0 does not answer in time, or has ended.
        """
        return [value.decode() for value in self._call(lambda: self._store.multi_get(list(keys)))]

    def _call(self, function: Callable[[], Any]) -> Any:
        if self._is_lost:
            raise RuntimeError("the store is lost")
        result: Future[Any] = Future()
        self._queue.put((function, result))
        try:
            return result.result(self._limit)
        except FutureTimeout as error:
            raise RuntimeError("the store has not answered") from error
        finally:
            self._is_lost = not result.done() or result.exception() is not None

    def _run(self) -> None:
        while True:
            function, result = self._queue.get()
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)


def open_store() -> Any:
    """Opens the store of all beats at a free port, on rank 0."""
    return _store(0, is_first=True)


def join_store(port: int) -> Any:
    """Connects to rank 0's store, on any other rank."""
    return _store(port, is_first=False)


def _store(port: int, *, is_first: bool) -> Any:
    distributed: Any = torch.distributed  # its store carries no types
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    patience = timedelta(seconds=max(5.0, beat_limit()))
    return distributed.TCPStore(host, port, None, is_first, patience, wait_for_workers=False)


class Heartbeat:
    """Writes this rank's beat and looks at those of the others, in a thread.

    Args:
        store: The store of all beats: from `open_store` on rank 0, from `join_store` on the others.
        rank: This rank.
        size: Number of ranks.
        watch: Says whether this process hangs.
    """

    def __init__(self, store: Any, rank: int, size: int, watch: StallWatch) -> None:
        self._limit = beat_limit()
        self._store, self._rank, self._watch = TimedStore(store, self._limit), rank, watch
        self._others = [other for other in range(size) if other != rank]
        self._stopped = threading.Event()
        self._gone = threading.Event()
        self._why = ""
        self._clean_up: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="largemerge-heartbeat", daemon=True)
        self._store.set(_key(rank), "0")

    def before_end(self, clean_up: Callable[[], None]) -> None:
        """Has something called before this thread ends the process."""
        self._clean_up.append(clean_up)

    def start(self) -> None:
        """Starts the thread; all ranks must have made their heartbeats by now."""
        self._thread.start()

    def stop(self, failure: str | None = None) -> None:
        """Ends the thread and tells the other ranks that this one is done, or why it has failed."""
        self._stopped.set()
        self._thread.join(self._limit)
        try:
            self._store.set(_key(self._rank), _DONE if failure is None else _FAILED + failure)
        except RuntimeError:
            return  # the first rank has left already

    def why_gone(self) -> str:
        """Says which rank is gone and why, after a connection has broken; waits until that is known."""
        self._gone.wait(self._limit + _GRACE_SECONDS + 2 * _INTERVAL_SECONDS)
        return self._why or "the connection to another rank has broken"

    def _run(self) -> None:
        seen = {rank: ("", time.monotonic()) for rank in self._others}
        number, last = 0, time.monotonic()
        while not self._stopped.wait(_INTERVAL_SECONDS):
            number += 1
            seen = self._forgive(seen, time.monotonic() - last)
            try:
                self._store.set(_key(self._rank), str(number))
                beats = self._store.get([_key(rank) for rank in self._others])
            except RuntimeError:
                self._end("rank 0 cannot be reached: it has ended, was stopped, or is cut off")
                return
            last = time.monotonic()
            if self._watch.idle_seconds() > self._limit:
                self._hangs()
            why = self._look(seen, beats)
            if why is not None:
                self._end(why)
                return

    def _forgive(self, seen: dict[int, tuple[str, float]], pause: float) -> dict[int, tuple[str, float]]:
        """Gives the others more time where this process itself has been stopped: with Ctrl-Z, all of them are."""
        if pause < 3 * _INTERVAL_SECONDS:
            return seen
        return {rank: (beat, when + pause) for rank, (beat, when) in seen.items()}

    def _hangs(self) -> None:
        """Tells the other ranks that this one hangs, and ends this process."""
        why = f"hangs: for {self._limit:.0f} s it has computed, read and written nothing, in {self._watch.where()}"
        with suppress(RuntimeError):
            self._store.set(_key(self._rank), _FAILED + why)
        if self._rank == 0:  # the store goes with this process
            time.sleep(2 * _INTERVAL_SECONDS)
        end_process(f"rank {self._rank} {why}; {GO_ON}", self._clean_up)

    def _look(self, seen: dict[int, tuple[str, float]], beats: list[str]) -> str | None:
        """Notes the beats that have changed; says which rank is gone, if one is."""
        now = time.monotonic()
        for rank, beat in zip(self._others, beats, strict=True):
            if beat.startswith(_FAILED):
                return f"rank {rank} has failed: {beat.removeprefix(_FAILED)}"
            if beat == _DONE or beat != seen[rank][0]:
                seen[rank] = (beat, now)
            elif now - seen[rank][1] > self._limit:
                quiet = f"rank {rank} has not answered for {self._limit:.0f} s"
                return f"{quiet}: it was killed, was stopped, or is cut off"
        return None

    def _end(self, why: str) -> None:
        """Tells the main thread, and ends the process if that does not.

        At the end of a merge, rank 0 and its store may be gone before this rank stops looking, which it does a moment
        later.
        """
        self._why = why
        self._gone.set()
        if not self._stopped.wait(_GRACE_SECONDS):
            end_process(f"{why}; {GO_ON}" if self._rank == 0 or "rank 0" in why else "", self._clean_up)


GO_ON = "what is finished is safe: go on with --resume"
"""Closing words of a message about a rank that is gone."""


def end_process(message: str, clean_up: Sequence[Callable[[], None]] = (), code: int = EXIT_CODE) -> None:
    """Ends this process at once, whatever its main thread does.

    Args:
        message: What is told before; empty for nothing.
        clean_up: Called before.
        code: The exit code.
    """

    def last_words() -> None:
        if message:
            tell(message)
        for call in clean_up:
            with suppress(OSError):
                call()

    thread = threading.Thread(target=last_words, daemon=True)
    thread.start()
    thread.join(_TELL_SECONDS)
    os._exit(code)


@contextmanager
def deadline(seconds: float, message: Callable[[], str], code: int = EXIT_CODE) -> Iterator[None]:
    """Ends this process if what is inside takes longer.

    Args:
        seconds: How long it may take.
        message: Returns what is told then.
        code: The exit code.
    """
    over = threading.Event()

    def wait() -> None:
        if not over.wait(seconds):
            end_process(message(), code=code)

    threading.Thread(target=wait, name="largemerge-deadline", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _key(rank: int) -> str:
    return f"beat-{rank}"
