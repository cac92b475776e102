"""Tensors that ranks of one machine share."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from largemerge.distributed import shared_memory
from largemerge.distributed.ranks import Ranks
from largemerge.distributed.shared_memory import ALONE, Node, find_node


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    return tmp_path


def tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.randn(5, 7).bfloat16(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(9).view(3, 3),
    }


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("read twice")


def test_one_reads_and_the_others_map(memory: Path) -> None:
    expected = tensors()
    found: dict[int, dict[str, torch.Tensor]] = {}

    def load(rank: int) -> None:
        own = Node(rank, (0, 1, 2, 3), "largemerge-1-")
        found[rank] = own.load("block-0-0", (1, 2, 3), (lambda: dict(expected)) if rank == 1 else never)

    threads = [threading.Thread(target=load, args=(rank,)) for rank in (3, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not list(memory.iterdir()), "the names go when all have mapped the file"
    for own in found.values():
        assert set(own) == set(expected)
        for name, tensor in expected.items():
            assert own[name].dtype == tensor.dtype and torch.equal(own[name], tensor), name
    found[2]["weight"].zero_()
    assert torch.equal(found[1]["weight"], expected["weight"]), "nobody writes to another's memory"
    assert len(found) == 3


def test_no_room_is_an_error(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device"):
        Node(0, (0, 1), "largemerge-1-").load("block-0-0", (0, 1), tensors)


def test_what_one_rank_wants_is_not_shared(memory: Path) -> None:
    own = Node(1, (0, 1), "largemerge-1-")
    assert own.load("x", (1, 7), lambda: {"a": torch.ones(1)})["a"] == 1
    assert own.reader((1, 7)) == 1 and own.reader((0, 1)) == 0
    assert Node(1, (0, 1), "").reader((0, 1)) == 1, "every rank reads for itself"
    assert not list(memory.iterdir())


def test_too_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(rank=1, size=2)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, value])
    found, reason = find_node(ranks, 1 << 60, 0)
    assert found == Node(1, (0, 1), "") and "every rank reads for itself" in reason
    found, reason = find_node(ranks, 0, 1 << 60)
    assert found == Node(1, (0, 1), "") and "are needed" in reason
    found, reason = find_node(ranks, 1 << 10, 1 << 10)
    assert found.prefix and not reason


def test_alone() -> None:
    assert find_node(Ranks(), 1, 1) == (ALONE, "")
    assert ALONE.load("x", (0,), lambda: {}) == {} and ALONE.reader((0,)) == 0


def test_what_was_abandoned_goes(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young, other = memory / "largemerge-1-a.for-1", memory / "largemerge-2-b", memory / "other"
    for path in (old, young, other):
        path.touch()
    long_ago = time.time() - 3 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    os.utime(other, (long_ago, long_ago))
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, value])
    own, _ = find_node(Ranks(rank=0, size=2), 1, 1)
    assert {path.name for path in memory.iterdir()} == {young.name, other.name}
    (memory / f"{own.prefix}block").touch()
    own.clean_up()
    assert {path.name for path in memory.iterdir()} == {young.name, other.name}
