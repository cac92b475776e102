"""What ranks add up and copy while they compute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from largemerge.distributed import collectives, shared_memory
from largemerge.distributed.collectives import AsyncCollectives, Piece, SharedMemory, cut
from largemerge.distributed.ranks import Ranks
from largemerge.distributed.shared_memory import Node
from largemerge.errors import MergeError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(collectives, "PIECE_BYTES", 4096)


def some_views() -> list[torch.Tensor]:
    """Larger than a piece, smaller, not contiguous, without elements or dimensions, of two dtypes."""
    whole = torch.randn(90, 40)
    return [
        torch.randn(70, 33),
        whole[3:50, 5:20],
        torch.empty(0, 4),
        torch.tensor(1.5),
        torch.randn(2, 1500),
        torch.randn(20, 20).bfloat16(),
    ]


def test_pieces_hold_everything_once_and_are_small() -> None:
    views = some_views()
    pieces = list(cut(views, 4096))
    assert all(sum(view.nbytes for view in piece) <= 4096 for piece in pieces)
    assert all(len({view.dtype for view in piece}) == 1 for piece in pieces)
    assert len(pieces) < sum(1 for piece in pieces for _ in piece), "small ones travel together"
    for piece in pieces:
        for view in piece:
            view.zero_()
    assert all(not view.any() for view in views), "views of the tensors themselves"
    assert sum(view.numel() for piece in pieces for view in piece) == sum(view.numel() for view in views)


def on_ranks(size: int, work: Callable[[Ranks, AsyncCollectives], None]) -> None:
    """Every rank is a thread; they meet at a barrier."""
    barrier = threading.Barrier(size, timeout=20)
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        ranks = Ranks(rank=rank, size=size)
        try:
            shared = Node(rank, tuple(range(size)), "largemerge-1-")
            way = SharedMemory(rank, range(size), shared, lambda: barrier.wait() and None)
            between = AsyncCollectives(ranks, way, CPU, (range(size), way))
            work(ranks, between)
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
def test_shared_memory_adds_up_and_copies(size: int, tmp_path: Path) -> None:
    given = [[some_views() for _ in range(size)] for _ in range(5)]
    expected = [[sum(view.float() for view in views) for views in zip(*each, strict=True)] for each in given]
    last = given.pop()

    def work(ranks: Ranks, between: AsyncCollectives) -> None:
        orders = []
        for number, each in enumerate(given):
            owner = (number * 2) % size
            orders.append(between.reduce(each[ranks.rank], owner))
            orders.append(between.copy(each[ranks.rank], owner))
        orders.append(between.share(last[ranks.rank]))
        for order in orders:
            between.wait(order)
        assert ranks.num_bytes == 2 * sum(view.nbytes for each in (*given, last) for view in each[ranks.rank])

    on_ranks(size, work)
    for each, totals in zip((*given, last), expected, strict=True):
        for views in each:
            for view, first, total in zip(views, each[0], totals, strict=True):
                assert torch.equal(view, first), "the same bits on all ranks"
                close = 1e-5 if view.dtype == torch.float32 else 0.1
                torch.testing.assert_close(view.float(), total, atol=close, rtol=0)
    assert not list(tmp_path.iterdir()), "no names are left"


def test_after_a_failure_nothing_more_is_carried_out() -> None:
    class Broken:
        calls = 0

        def add_up_(self, piece: Piece, owner: int) -> None:
            self.calls += 1
            raise MergeError("rank 1 is gone")

        def copy_(self, piece: Piece, owner: int) -> None:
            self.calls += 1

    carrier = Broken()
    between = AsyncCollectives(Ranks(size=2), carrier, CPU)
    orders = [between.reduce([torch.ones(2)], 0), between.copy([torch.ones(2)], 0)]
    for order in orders:
        with pytest.raises(MergeError, match="rank 1 is gone"):
            between.wait(order)
    between.close()
    assert carrier.calls == 1
