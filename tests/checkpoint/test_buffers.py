"""Memory that is lent and comes back."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from largemerge.checkpoint.direct_io import PAGE, THROUGH_CACHE, Buffers, DataFile

SIZE = 8 << 20


def private_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_it_comes_back_when_the_last_tensor_is_gone() -> None:
    buffers = Buffers(4 * SIZE)
    lent = buffers.lend(SIZE).fill_(1)
    assert lent.data_ptr() % PAGE == 0 and len(lent) == SIZE
    part = lent[10:20].view(torch.int8)
    place = lent.data_ptr()
    del lent
    other = buffers.lend(SIZE).fill_(2)
    assert other.data_ptr() != place and part.tolist() == [1] * 10, "still in use"
    del part
    assert buffers.lend(SIZE // 2).data_ptr() == place, "a larger one will do"
    assert buffers.lend(SIZE // 8).data_ptr() != place, "not one that is much larger"
    assert other.eq(2).all()


def test_only_so_much_stays_free() -> None:
    buffers = Buffers(2 * SIZE)
    gc.collect()
    before = private_bytes()
    lent = [buffers.lend(SIZE).fill_(number) for number in range(12)]
    assert private_bytes() - before > 10 * SIZE
    del lent
    assert private_bytes() - before < 4 * SIZE


def test_what_waits_makes_room_for_what_is_lent() -> None:
    buffers = Buffers(3 * SIZE)
    first, second = (buffers.lend(SIZE).fill_(0) for _ in range(2))
    place = first.data_ptr()
    del first
    again = buffers.lend(SIZE)
    assert again.data_ptr() == place, "it waited"
    del again
    gc.collect()
    before = private_bytes()
    large = buffers.lend(2 * SIZE).fill_(1)
    assert private_bytes() - before < SIZE + SIZE // 2, "and was given back: 3 are lent"
    assert len(large) == 2 * SIZE and len(second) == SIZE


def test_many_threads_never_share_a_region() -> None:
    buffers = Buffers(4 * SIZE)

    def work(number: int) -> bool:
        for size in (1 << 16, 3 << 16, 1 << 18) * 20:
            lent = buffers.lend(size).fill_(number)
            torch.ones(100).sum()
            if not bool(lent.eq(number).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("through", [False, True])
def test_files_read_into_it(tmp_path: Path, through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if through:
        monkeypatch.setenv(THROUGH_CACHE, "1")
    expected = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    (tmp_path / "data").write_bytes(expected.numpy().tobytes())
    buffers = Buffers(4 << 20)
    with DataFile(tmp_path / "data", buffers=buffers) as file:
        tensors = [file.read_tensor(offset, torch.uint8, (300_000,)) for offset in (0, 5, 4096, 700_000)]
        for tensor, offset in zip(tensors, (0, 5, 4096, 700_000), strict=True):
            assert torch.equal(tensor, expected[offset : offset + 300_000])
