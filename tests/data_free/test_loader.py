"""Compute slots: as many workers compute at once as there are slots; one that waits for the disk releases its own."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from largemerge.data_free.loader import ComputeSlots, release_slot

MANY = 1 << 20  # elements, which take the disk a while


def test_so_many_at_once_and_more_while_some_wait() -> None:
    slots, lock = ComputeSlots(2), threading.Lock()
    computing = waiting = most_computing = most_waiting = 0

    def work(_: int) -> None:
        nonlocal computing, waiting, most_computing, most_waiting
        with slots.acquire():
            for _ in range(3):
                with lock:
                    computing += 1
                    most_computing = max(most_computing, computing)
                time.sleep(0.002)
                with lock:
                    computing -= 1
                with release_slot(MANY):
                    with lock:
                        waiting += 1
                        most_waiting = max(most_waiting, waiting)
                    time.sleep(0.02)
                    with lock:
                        waiting -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert most_computing == 2 < most_waiting


def test_an_error_releases_the_slot() -> None:
    slots = ComputeSlots(1)
    for _ in range(3):
        with pytest.raises(ValueError), slots.acquire(), release_slot(MANY):
            raise ValueError
    with slots.acquire(), release_slot(MANY), slots.acquire():
        pass  # somebody else's would be the same


def test_without_a_slot_nothing_is_released() -> None:
    with release_slot(MANY), release_slot(MANY):
        pass


def test_a_few_elements_do_not_release_the_slot() -> None:
    slots = ComputeSlots(1)
    with slots.acquire(), release_slot(10):
        assert not slots._free.acquire(blocking=False)
    with slots.acquire(), release_slot(MANY):
        assert slots._free.acquire(blocking=False)
        slots._free.release()
