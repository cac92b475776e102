"""Batches and solves over ranks; what ranks agree on, and the devices they get."""

from __future__ import annotations

import pytest
import torch

from largemerge.distributed import ranks
from largemerge.distributed.partition import choose_owners, partition_batches, samples_at_once
from largemerge.distributed.ranks import Ranks, device_of_rank, join_problems, start_ranks, too_many_threads
from largemerge.errors import LargemergeError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_batch_has_one_rank_and_ranks_have_neighbours(size: int) -> None:
    costs = [[5, 3, 1], [4], [2, 2, 2, 2]]
    shares = partition_batches(costs, size).batches
    items = [(candidate, number) for share in shares for candidate, numbers in enumerate(share) for number in numbers]
    assert items == [(candidate, number) for candidate, batches in enumerate(costs) for number in range(len(batches))]
    loads = [sum(costs[c][n] for c, numbers in enumerate(share) for n in numbers) for share in shares]
    assert max(loads) <= sum(map(sum, costs)) / size + 5, "no rank has more than its part and one batch"


def test_whole_candidates_where_that_is_even() -> None:
    assert partition_batches([[4], [4], [2, 2], [4]], 2).batches == (((0,), (0,), (), ()), ((), (), (0, 1), (0,)))


def test_a_candidate_is_kept_whole_where_splitting_it_costs_more() -> None:
    costs = [[20, 20], [15, 15], [15, 15], [15, 15]]  # the first one has no right-hand sides
    assert partition_batches(costs, 2, [0, 20, 20, 20]).batches[1][:2] == ((), ())
    assert partition_batches([[30] * 2, [40] * 4], 2, [0, 5]).batches[0][1] == (0,), (
        "but not where that would be too uneven"
    )


def test_a_group_ends_with_its_candidate_at_the_same_time() -> None:
    shares = partition_batches([[6] * 2, [4] * 9, [6] * 2], 3)
    assert shares.ranks_with_data == ((0,), (0, 1, 2), (2,))
    assert shares.rank_groups == ((), (0, 1), (2,)), "rank 2 goes on with the last candidate"


def test_no_rank_has_two_candidates_where_right_hand_sides_would_be_made_twice() -> None:
    costs = [[1.0] * 64 for _ in range(3)]
    shares = partition_batches(costs, 16, [0.0, 100.0, 100.0])
    assert all(sum(map(bool, own)) == 1 for own in shares.batches)
    assert shares.rank_groups == shares.ranks_with_data
    alone, *others = map(len, shares.rank_groups)
    assert alone < min(others), "who has right-hand sides has more ranks"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_all_ranks_of_a_candidate_are_its_group_where_they_must_be(size: int) -> None:
    shares = partition_batches([[5, 3, 1], [4], [2, 2, 2, 2]], size, [0, 9, 9], in_groups=True)
    assert shares.rank_groups == shares.ranks_with_data or all(len(ranks) == 1 for ranks in shares.ranks_with_data)
    counts = [sum(len(own[candidate]) for own in shares.batches) for candidate in range(3)]
    assert counts == [3, 1, 4] and (size > 3 or sum(map(any, shares.batches)) == min(size, 3))


def test_ranks_without_work() -> None:
    shares = partition_batches([[8], [8]], 4)
    assert sum(1 for share in shares.batches if any(share)) == 2
    assert all(len(rank_group) == 1 for rank_group in shares.rank_groups)


def test_solves_are_spread_by_cost() -> None:
    owners = choose_owners({"down": 64, "q": 8, "o": 8, "gate": 24}, 2)
    assert owners["down"] == 0 and {owners[name] for name in ("q", "o", "gate")} == {1}
    assert owners == choose_owners({"gate": 24, "o": 8, "q": 8, "down": 64}, 2), "the order says nothing"


def test_too_many_threads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_num_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    cpu = torch.device("cpu")
    assert not list(too_many_threads(Ranks(size=2, local_size=2), cpu))
    (text,) = too_many_threads(Ranks(size=8, local_size=4), cpu)
    assert "4 ranks of 3 threads each share 8 cores" in text and "OMP_NUM_THREADS=2" in text
    assert not list(too_many_threads(Ranks(size=4, local_size=4), torch.device("cuda")))


def test_ranks_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(2):
        ranks = Ranks(rank=4 + rank, size=8, local_rank=rank, local_size=2)
        assert device_of_rank("auto", ranks) == device_of_rank("cuda", ranks) == torch.device("cuda", rank)
    assert chosen[::2] == chosen[1::2] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    crowded = Ranks(rank=2, size=3, local_rank=2, local_size=3)
    with pytest.raises(LargemergeError, match=r"--device auto: 3 ranks .* share 2 GPUs; .*one rank for each GPU, or"):
        device_of_rank("auto", crowded)
    assert device_of_rank("auto", crowded, shared=True) == torch.device("cuda", 0)
    assert device_of_rank("cpu", crowded) == torch.device("cpu")


def test_every_rank_gets_batches() -> None:
    assert samples_at_once(8, 1000, 1) == 8 and samples_at_once(8, 1000, 4) == 8
    assert samples_at_once(8, 96, 8) == 3 and samples_at_once(8, 5, 64) == 1


def test_problems_say_whose_they_are() -> None:
    joined = join_problems([("a", "b"), ("b",), ("b", "c")])
    assert joined == ["rank 0: a", "b", "rank 2: c"]


def test_alone_nothing_is_asked_of_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with start_ranks() as ranks:
        assert ranks == Ranks() and ranks.is_first
        assert ranks.gather("x") == ["x"] and ranks.agree(lambda: 3) == 3
