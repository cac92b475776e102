"""How tasks are shared among workers: large ones side by side, small ones one at a time."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from largemerge.data_free.engine import run_parts
from largemerge.data_free.tasks import Task

FEW = 100  # elements


def task(name: str, num_elements: int) -> Task:
    return Task(name, (num_elements,), (), None, {}, {}, torch.float32, torch.float32)


def is_small(one: Task) -> bool:
    return one.num_elements <= FEW


def test_small_tasks_are_done_one_at_a_time_beside_large_ones() -> None:
    parts = [[task(f"large {part}", 2 * FEW), *(task(f"small {part} {n}", FEW) for n in range(5))] for part in range(2)]
    lock, running, most, seen = threading.Lock(), list[str](), dict[str, int](), list[str]()
    finished: list[int] = []

    def work(one: Task) -> None:
        with lock:
            running.append(one.name)
            seen.append(one.name)
            for kind in ("small", "large"):
                most[kind] = max(most.get(kind, 0), sum(name.startswith(kind) for name in running))
            most["all"] = max(most.get("all", 0), len(running))
        time.sleep(0.005)
        with lock:
            running.remove(one.name)

    before = torch.get_num_threads()
    torch.set_num_threads(2)  # as many compute at once
    try:
        run_parts(parts, work, finished.append, num_workers=4, is_small=is_small)
    finally:
        torch.set_num_threads(before)
    assert most["small"] == 1 and most["all"] == 2
    assert sorted(seen) == sorted(one.name for part in parts for one in part) and finished == [0, 1]


def test_small_tasks_stop_at_an_error() -> None:
    done: list[str] = []

    def work(one: Task) -> None:
        done.append(one.name)
        if one.name == "2":
            raise ValueError("of the third")

    tasks = [task(str(number), FEW) for number in range(50)]
    with pytest.raises(ValueError, match="of the third"):
        run_parts([tasks[:10], tasks[10:]], work, lambda _: None, num_workers=2, is_small=is_small)
    assert done[:3] == ["0", "1", "2"] and len(done) < 50
