"""No more workers compute at once than there are turns, and who waits for the disk gives its turn away."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from largemerge.data_free.loader import Turns, others_turn


def test_so_many_at_once_and_more_while_some_wait() -> None:
    turns, lock = Turns(2), threading.Lock()
    computing = waiting = most_computing = most_waiting = 0

    def work(_: int) -> None:
        nonlocal computing, waiting, most_computing, most_waiting
        with turns.taken():
            for _ in range(3):
                with lock:
                    computing += 1
                    most_computing = max(most_computing, computing)
                time.sleep(0.002)
                with lock:
                    computing -= 1
                with others_turn():
                    with lock:
                        waiting += 1
                        most_waiting = max(most_waiting, waiting)
                    time.sleep(0.02)
                    with lock:
                        waiting -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert most_computing == 2 < most_waiting


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns(1)
    for _ in range(3):
        with pytest.raises(ValueError), turns.taken(), others_turn():
            raise ValueError
    with turns.taken(), others_turn(), turns.taken():
        pass  # somebody else's would be the same


def test_without_a_turn_nothing_is_given_away() -> None:
    with others_turn(), others_turn():
        pass
