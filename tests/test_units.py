"""Numbers as people read them."""

from __future__ import annotations

import pytest

from largemerge.units import counted, duration, gib, operations


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.34, "0.3 s"),
        (9.96, "10 s"),
        (59.7, "1 min"),
        (725, "12 min 5 s"),
        (3599.6, "1 h"),
        (5847, "1 h 37 min"),
        (86399, "1 day"),
        (183600, "2 days 3 h"),
        (float("inf"), "an unknown time"),
        (float("nan"), "an unknown time"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 FLOP"), (12.34e9, "12.3 GFLOP"), (521e15, "521 PFLOP"), (999.6e12, "1 PFLOP"), (3e27, "3000 YFLOP")],
)
def test_operations(count: float, text: str) -> None:
    assert operations(count) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1536, "1.5 KiB"),
        (20 << 20, "20.0 MiB"),
        (3.25 * 2**30, "3.25 GiB"),
        (2**41, "2.00 TiB"),
    ],
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert gib(num_bytes) == text


def test_counted() -> None:
    assert [counted(n, "tensor") for n in (0, 1, 2, 12000)] == ["0 tensors", "1 tensor", "2 tensors", "12,000 tensors"]
    assert counted(2, "batch", "batches") == "2 batches" and counted(1, "batch", "batches") == "1 batch"
