"""Thresholds without sorting are those of a sort."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch

from largemerge.data_free.methods.exact_statistics import Numbers, largest, order_statistics, without_outliers
from largemerge.data_free.methods.exact_statistics import magnitude_bits as patterns
from largemerge.data_free.methods.task_arithmetic import by_row_rank


def magnitudes(dtype: torch.dtype, *, coarse: bool, count: int = 4001) -> torch.Tensor:
    """Draws magnitudes with many equals (`coarse`), or with few."""
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(1)).abs()
    return ((numbers * 4).round() / 4 if coarse else numbers).to(dtype)


def pieces_of(numbers: torch.Tensor, size: int) -> Numbers:
    """Cuts a single set of numbers into pieces."""
    return lambda: ([piece] for piece in numbers.split(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coarse", [False, True])
def test_order_statistics_are_those_of_a_sort(dtype: torch.dtype, coarse: bool) -> None:
    numbers = magnitudes(dtype, coarse=coarse)
    ordered = numbers.sort().values
    ranks = [0, 1, 17, 2000, 3999, 4000]
    (all_found,) = order_statistics(pieces_of(numbers, 700), [ranks])
    for rank, found in zip(ranks, all_found, strict=True):
        assert found.value == ordered[rank].item()
        assert found.num_below == int((numbers < found.value).sum())
        assert found.num_equal == int((numbers == found.value).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.97])
def test_the_largest_are_those_of_a_stable_sort(dtype: torch.dtype, coarse: bool, density: float) -> None:
    numbers = magnitudes(dtype, coarse=coarse)
    expected = torch.zeros(len(numbers), dtype=torch.bool)
    expected[numbers.float().argsort(descending=True, stable=True)[: int(density * len(numbers))]] = True
    keep = largest(pieces_of(numbers, 700), len(numbers), [density])[0].masker()
    assert torch.equal(torch.cat([keep(patterns(piece)) for piece in numbers.split(700)]) == -1, expected)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.01), (0.9, 0.05), (0.2, 0.3), (0.99, 0.2), (0.001, 0.998)])
def test_outliers_go_as_in_a_stable_sort(coarse: bool, density: float, gamma: float) -> None:
    numbers = magnitudes(torch.float32, coarse=coarse)
    count, top = int(density * len(numbers)), int(gamma * len(numbers))
    bottom = len(numbers) - count - top
    bottom, top = (0, top + bottom) if bottom < 0 else (bottom, top)
    expected = torch.zeros(len(numbers), dtype=torch.bool)
    expected[numbers.sort(stable=True).indices[bottom : len(numbers) - top]] = True
    keep = without_outliers(pieces_of(numbers, 700), len(numbers), [density], [gamma])[0].masker()
    found = torch.cat([keep(patterns(piece)) for piece in numbers.split(700)]) == -1
    assert int(found.sum()) == count and torch.equal(found, expected)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_all_equal(value: float) -> None:
    numbers = torch.full((1000,), value)
    keep = largest(pieces_of(numbers, 300), 1000, [0.25])[0].masker()
    found = torch.cat([keep(patterns(piece)) for piece in numbers.split(300)]) == -1
    assert found[:250].all() and not found[250:].any()
    keep = without_outliers(pieces_of(numbers, 300), 1000, [0.5], [0.1])[0].masker()
    found = torch.cat([keep(patterns(piece)) for piece in numbers.split(300)]) == -1
    assert found.nonzero().flatten().tolist() == list(range(400, 900))


def test_at_least_one_is_kept_of_the_largest_but_none_without_outliers() -> None:
    numbers = torch.tensor([1.0, 3.0, 2.0])
    assert largest(pieces_of(numbers, 3), 3, [0.1])[0].masker()(patterns(numbers)).tolist() == [0, -1, 0]
    assert not without_outliers(pieces_of(numbers, 3), 3, [0.1], [0.5])[0].masker()(patterns(numbers)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_sets_at_once_are_each_like_alone(dtype: torch.dtype) -> None:
    sets = [magnitudes(dtype, coarse=coarse) * factor for coarse, factor in ((True, 1), (False, 3), (False, 0.2))]
    ranks = [[0, 1700, 4000], [], [123]]
    passes = []

    def numbers() -> Iterator[Iterable[torch.Tensor]]:
        passes.append(1)
        return iter(zip(*(numbers.split(700) for numbers in sets), strict=True))

    together = order_statistics(numbers, ranks)
    assert together == [order_statistics(pieces_of(one, 700), [of])[0] for one, of in zip(sets, ranks, strict=True)]
    assert len(passes) == (2 if dtype is torch.float32 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_in_rows(dtype: torch.dtype) -> None:
    numbers = magnitudes(dtype, coarse=True, count=4000).view(8, 500)
    expected = numbers.argsort(dim=1, stable=True).argsort(dim=1)
    assert torch.equal(by_row_rank(-numbers, torch.arange(500)), expected), "signs do not count"
