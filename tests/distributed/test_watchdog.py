"""Rank 0 keeps the store of the watchdog: where it is stopped, no call may wait for ever."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import processes
import pytest

from largemerge import LargemergeError
from largemerge.distributed.launcher import Launch
from largemerge.distributed.ranks import _Meeting, start_ranks
from largemerge.distributed.watchdog import Heartbeat, StallWatch, TimedStore, join_store, open_store


def keep_store(pipe: Connection) -> None:
    """Keeps a store, as rank 0 does, until the process is killed."""
    store = open_store()
    pipe.send(store.port)
    time.sleep(3600)


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, int]]:
    """The process that keeps a store, and its port."""
    monkeypatch.setenv("LARGEMERGE_RANK_TIMEOUT", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes"])
    ours, theirs = context.Pipe()
    for name, value in processes.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    process = context.Process(target=keep_store, args=(theirs,))
    process.start()
    yield process, ours.recv()
    process.kill()
    process.join(60)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_calls_end_where_rank_0_is_gone(keeper: tuple[Any, int], number: signal.Signals) -> None:
    process, port = keeper
    store = TimedStore(join_store(port), limit=0.5)
    store.set("beat-0", "1")
    assert store.get(["beat-0"]) == ["1"]
    os.kill(process.pid, number)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        for _ in range(100):  # it stops a moment later, and the kernel still takes what is only written
            store.set("beat-1", "2")
            store.get(["beat-0"])
            time.sleep(0.01)
    assert time.monotonic() - start < 5
    with pytest.raises(RuntimeError, match="is lost"):
        store.get(["beat-0"])
    assert time.monotonic() - start < 5.1


def test_a_heartbeat_stops_in_time_where_rank_0_is_stopped(keeper: tuple[Any, int]) -> None:
    process, port = keeper
    heartbeat = Heartbeat(join_store(port), 1, 2, StallWatch())
    os.kill(process.pid, signal.SIGSTOP)
    start = time.monotonic()
    heartbeat.start()
    heartbeat.stop("it has failed")
    assert time.monotonic() - start < 4


def test_a_stop_of_all_ranks_together_is_forgiven() -> None:
    """Ctrl-Z, and the merge goes on with `fg`."""
    heartbeat = object.__new__(Heartbeat)
    seen = {1: ("7", 100.0)}
    assert heartbeat._forgive(seen, 1.1) == seen
    assert heartbeat._forgive(seen, 3600.0) == {1: ("7", 3700.0)}


def test_who_has_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port())}.items():
        monkeypatch.setenv(name, value)
    meeting = _Meeting(Launch(0, 3, 0, 3))
    thread = threading.Thread(target=meeting.join, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while len(meeting._missing) == 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert meeting.why_late().startswith("rank 0: ranks 1, 2 have not come within 300 s, of 3; start all of them")
    second = _Meeting(Launch(2, 3, 2, 3))
    threading.Thread(target=second.join, daemon=True).start()
    while len(meeting._missing) == 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert meeting.why_late().startswith("rank 0: rank 1 has not come within 300 s, of 3; start all of them")
    store = join_store(int(os.environ["MASTER_PORT"]))
    store.set("largemerge-1", "here")
    thread.join(10)
    assert not thread.is_alive()


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        told = f"MASTER_PORT={port}: rank 0 cannot listen there"
        with pytest.raises(LargemergeError, match=told) as caught, start_ranks():
            pass
    assert "choose a free port" in str(caught.value)
