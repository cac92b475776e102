"""Reduce and broadcast while ranks compute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from largemerge.distributed import collectives, shared_memory
from largemerge.distributed.collectives import AsyncCollectives, Chunk, SharedMemoryTransport, split_into_chunks
from largemerge.distributed.ranks import Ranks
from largemerge.distributed.shared_memory import Node
from largemerge.errors import MergeError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(collectives, "CHUNK_BYTES", 4096)


def some_views() -> list[torch.Tensor]:
    """Tensors larger than a chunk, smaller, not contiguous, without elements or dimensions, of two dtypes."""
    whole = torch.randn(90, 40)
    return [
        torch.randn(70, 33),
        whole[3:50, 5:20],
        torch.empty(0, 4),
        torch.tensor(1.5),
        torch.randn(2, 1500),
        torch.randn(20, 20).bfloat16(),
    ]


def test_chunks_hold_everything_once_and_are_small() -> None:
    views = some_views()
    chunks = list(split_into_chunks(views, 4096))
    assert all(sum(view.nbytes for view in chunk) <= 4096 for chunk in chunks)
    assert all(len({view.dtype for view in chunk}) == 1 for chunk in chunks)
    assert len(chunks) < sum(1 for chunk in chunks for _ in chunk), "small ones share a chunk"
    for chunk in chunks:
        for view in chunk:
            view.zero_()
    assert all(not view.any() for view in views), "views of the tensors themselves"
    assert sum(view.numel() for chunk in chunks for view in chunk) == sum(view.numel() for view in views)


def on_ranks(size: int, run_collectives: Callable[[Ranks, AsyncCollectives], None]) -> None:
    """Runs collectives on each rank, a thread; they meet at a barrier."""
    barrier = threading.Barrier(size, timeout=20)
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        ranks = Ranks(rank=rank, size=size)
        try:
            shared = Node(rank, tuple(range(size)), "largemerge-1-")
            transport = SharedMemoryTransport(rank, range(size), shared, lambda: barrier.wait() and None)
            between = AsyncCollectives(ranks, transport, CPU, (range(size), transport))
            run_collectives(ranks, between)
            between.close()
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    if failures:
        raise failures[0]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shared_memory_reduces_and_broadcasts(size: int, tmp_path: Path) -> None:
    given = [[some_views() for _ in range(size)] for _ in range(5)]
    expected = [[sum(view.float() for view in views) for views in zip(*each, strict=True)] for each in given]
    last = given.pop()

    def run_collectives(ranks: Ranks, between: AsyncCollectives) -> None:
        submitted = []
        for number, each in enumerate(given):
            owner = (number * 2) % size
            submitted.append(between.reduce(each[ranks.rank], owner))
            submitted.append(between.broadcast(each[ranks.rank], owner))
        submitted.append(between.all_reduce(last[ranks.rank]))
        for work in submitted:
            between.wait(work)
        assert ranks.num_bytes == 2 * sum(view.nbytes for each in (*given, last) for view in each[ranks.rank])

    on_ranks(size, run_collectives)
    for each, totals in zip((*given, last), expected, strict=True):
        for views in each:
            for view, first, total in zip(views, each[0], totals, strict=True):
                assert torch.equal(view, first), "the same bits on all ranks"
                close = 1e-5 if view.dtype == torch.float32 else 0.1
                torch.testing.assert_close(view.float(), total, atol=close, rtol=0)
    assert not list(tmp_path.iterdir()), "no names are left"


def test_after_a_failure_nothing_more_is_sent() -> None:
    class Broken:
        calls = 0

        def reduce_(self, chunk: Chunk, owner: int) -> None:
            self.calls += 1
            raise MergeError("rank 1 is gone")

        def broadcast_(self, chunk: Chunk, owner: int) -> None:
            self.calls += 1

    transport = Broken()
    between = AsyncCollectives(Ranks(size=2), transport, CPU)
    submitted = [between.reduce([torch.ones(2)], 0), between.broadcast([torch.ones(2)], 0)]
    for work in submitted:
        with pytest.raises(MergeError, match="rank 1 is gone"):
            between.wait(work)
    between.close()
    assert transport.calls == 1
