"""This machine and this process: memory over time."""

from __future__ import annotations

import itertools
import mmap
import time

import pytest
import torch

from largemerge import machine
from largemerge.machine import MemoryUse, MemoryWatch


@pytest.mark.parametrize("number", [1, 300, 301, 10_000])
def test_memory_over_time_has_few_points_and_no_peak_is_lost(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = MemoryWatch(torch.device("cpu"))
    peak = number * 2 // 3
    for step in range(number):
        monkeypatch.setattr(time, "perf_counter", lambda step=step: float(step))
        watch._add_point(MemoryUse(5000 if step == peak else step % 1000, 0, 9000 if step == peak // 2 else 1))
    points = watch.over_time(0.0)
    assert min(number, 150) <= len(points) <= 300 and points[0][0] == 0
    times = [at for at, _, _ in points]
    assert times == sorted(set(times))
    gaps = {later - earlier for earlier, later in itertools.pairwise(times)}
    assert len(gaps) <= 1  # what each point stands for is as long as any other
    (at_peak,) = [at for at, host, _ in points if host == 5000]
    length = gaps.pop() if gaps else 1
    assert at_peak <= peak < at_peak + length
    assert max(device for _, _, device in points) == 9000


def test_memory_is_watched_while_the_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_INTERVAL_SECONDS", 0.001)
    start = time.perf_counter()
    with MemoryWatch(torch.device("cpu")) as watch:
        time.sleep(0.02)
        # Not from the heap: it may have as much that earlier tests have freed, and that counts as held already.
        with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            for place in range(0, len(held), mmap.PAGESIZE):
                held[place] = 1
            time.sleep(0.1)
    points = watch.over_time(start)
    assert len(points) > 2 and 0 <= points[0][0] < points[-1][0] < time.perf_counter() - start
    assert max(host for _, host, _ in points) - points[0][1] >= 60 << 20
    assert max(host for _, host, _ in points) <= watch.peak().host_anonymous
