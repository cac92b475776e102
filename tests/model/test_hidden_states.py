"""Stores of hidden states: each gives back what it was given, the disk without holding it in memory meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from largemerge.errors import MergeError
from largemerge.model.hidden_states import DiskStore, HiddenStates, MemoryStore, Store

CPU = torch.device("cpu")


@pytest.fixture(params=["memory", "disk"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    if request.param == "disk":
        return lambda: DiskStore(tmp_path)
    return lambda: MemoryStore(CPU, CPU)


def output(seed: int, tokens: int = 5) -> tuple[torch.Tensor, None, dict[str, torch.Tensor]]:
    """What a block may return: tensors of several dtypes, in a structure, and things that are no tensors."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, tokens, 48, generator=generator).bfloat16()
    hidden[1, -1] = float("nan")
    return hidden, None, {"bias": torch.randn(1, 3, tokens, tokens, generator=generator), "count": torch.arange(seed)}


def assert_same(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_what_was_put_last_comes_back(make_store: Callable[[], Store]) -> None:
    with HiddenStates(make_store()) as states:
        for turn in range(3):
            for candidate in range(2):
                for batch in range(4):
                    states.prefetch("merged", candidate, batch + 1)
                    if turn:
                        before = states.get("merged", candidate, batch, CPU)
                        assert list(before) == [0]
                        assert_same(before[0][0], output(100 * turn - 100 + 10 * candidate + batch)[0])
                    states.put("merged", candidate, batch, 0, output(100 * turn + 10 * candidate + batch))
        for candidate in range(2):
            for batch in range(4):
                found, expected = states.get("merged", candidate, batch, CPU)[0], output(200 + 10 * candidate + batch)
                assert_same(found[0], expected[0])
                assert found[1] is None
                assert_same(found[2], expected[2])


def test_stacks_are_kept_apart_and_lengths_may_change(make_store: Callable[[], Store]) -> None:
    with HiddenStates(make_store()) as states:
        states.put("merged", 0, 0, 1, torch.ones(2, 3))
        states.put("merged", 0, 0, 0, torch.zeros(4))
        states.put("merged", 0, 0, 1, torch.full((5, 3), 7.0))  # more than before
        states.put("merged", 0, 0, 1, torch.full((1, 3), 8.0))  # less
        found = states.get("merged", 0, 0, CPU)
        assert_same(found, {0: torch.zeros(4), 1: torch.full((1, 3), 8.0)})
        assert states.get("merged", 0, 1, CPU) == {}


def test_the_place_on_disk_is_used_again(tmp_path: Path) -> None:
    with HiddenStates(DiskStore(tmp_path)) as states:
        for _ in range(5):
            for batch in range(3):
                states.put("merged", 0, batch, 0, torch.ones(100))
        assert states.num_bytes == 3 * 400
        assert not list(tmp_path.iterdir()), "the file must be gone when the process is, however it ends"


def test_a_full_disk_is_told_with_its_folder() -> None:
    store = DiskStore(Path("/dev/shm"))
    store._file.close()
    with pytest.raises((MergeError, ValueError)):
        for batch in range(5):
            store.put(("merged", 0, batch, 0), [torch.ones(10)])


@pytest.mark.parametrize("width", [48, 64, 100, 576])
def test_eight_bits_take_less_room_and_keep_nan_where_it_was(width: int) -> None:
    pytest.importorskip("bitsandbytes")
    hidden = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden[1, -1] = float("nan")
    with HiddenStates(MemoryStore(CPU, CPU), eight_bit=True) as states:
        states.put("merged", 0, 0, 0, (hidden, torch.arange(3)))
        found, numbers = states.get("merged", 0, 0, CPU)[0]
        if width % 64 == 0:
            assert states.num_bytes < 0.6 * hidden.nbytes + 24
    assert found.dtype == hidden.dtype and found.shape == hidden.shape
    assert torch.equal(found.isnan(), hidden.isnan()), "a padded token's NaN must not spread to its neighbours"
    assert torch.equal(numbers, torch.arange(3))
    valid = ~hidden.isnan()
    assert 0.001 < (found[valid].float() - hidden[valid].float()).norm() / hidden[valid].float().norm() < 0.02


_HOLDS_LITTLE = """
import sys, torch
from pathlib import Path
from largemerge.model.hidden_states import DiskStore, HiddenStates
from largemerge.machine import memory_in_use
cpu = torch.device("cpu")
number, size = 1600, 64 * 1024  # 256 KiB each
with HiddenStates(DiskStore(Path(sys.argv[1]))) as states:
    states.put("merged", 0, 0, 0, torch.zeros(size))
    states.get("merged", 0, 0, cpu)
    before = peak = memory_in_use(cpu).host_anonymous
    for turn in range(3):
        for batch in range(number):
            states.prefetch("merged", 0, batch + 1)
            if turn:
                assert states.get("merged", 0, batch, cpu)[0][0] == 1000 * turn - 1000 + batch
            states.put("merged", 0, batch, 0, torch.full((size,), 1000.0 * turn + batch))
            peak = max(peak, memory_in_use(cpu).host_anonymous)
    print(states.num_bytes / (peak - before))
"""


def test_the_disk_holds_more_than_twenty_times_the_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HOLDS_LITTLE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 20
