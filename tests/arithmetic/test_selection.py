"""Thresholds without sorting are those of a sort."""

from __future__ import annotations

import pytest
import torch

from largemerge.arithmetic.band import largest, without_outliers
from largemerge.arithmetic.bits import magnitudes as patterns
from largemerge.arithmetic.selection import order_statistics
from largemerge.arithmetic.sparsify import row_ranks


def magnitudes(dtype: torch.dtype, *, coarse: bool, count: int = 4001) -> torch.Tensor:
    """With many equals, or with few."""
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(1)).abs()
    return ((numbers * 4).round() / 4 if coarse else numbers).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coarse", [False, True])
def test_order_statistics_are_those_of_a_sort(dtype: torch.dtype, coarse: bool) -> None:
    numbers = magnitudes(dtype, coarse=coarse)
    ordered = numbers.sort().values
    ranks = [0, 1, 17, 2000, 3999, 4000]
    for rank, found in zip(ranks, order_statistics(lambda: numbers.split(700), ranks), strict=True):
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
    keep = largest(lambda: numbers.split(700), len(numbers), density).new()
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
    keep = without_outliers(lambda: numbers.split(700), len(numbers), density, gamma).new()
    found = torch.cat([keep(patterns(piece)) for piece in numbers.split(700)]) == -1
    assert int(found.sum()) == count and torch.equal(found, expected)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_all_equal(value: float) -> None:
    numbers = torch.full((1000,), value)
    keep = largest(lambda: numbers.split(300), 1000, 0.25).new()
    found = torch.cat([keep(patterns(piece)) for piece in numbers.split(300)]) == -1
    assert found[:250].all() and not found[250:].any()
    keep = without_outliers(lambda: numbers.split(300), 1000, 0.5, 0.1).new()
    found = torch.cat([keep(patterns(piece)) for piece in numbers.split(300)]) == -1
    assert found.nonzero().flatten().tolist() == list(range(400, 900))


def test_at_least_one_is_kept_of_the_largest_but_none_without_outliers() -> None:
    numbers = torch.tensor([1.0, 3.0, 2.0])
    assert largest(lambda: [numbers], 3, 0.1).new()(patterns(numbers)).tolist() == [0, -1, 0]
    assert not without_outliers(lambda: [numbers], 3, 0.1, 0.5).new()(patterns(numbers)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_in_rows(dtype: torch.dtype) -> None:
    numbers = magnitudes(dtype, coarse=True, count=4000).view(8, 500)
    expected = numbers.argsort(dim=1, stable=True).argsort(dim=1)
    assert torch.equal(row_ranks(-numbers).long(), expected), "signs do not count"
