"""Sums of short runs are those of float64, whatever is left over at the end."""

from __future__ import annotations

import pytest
import torch

from largemerge.data_free.methods.exact_statistics import inner_products, sum_of_magnitudes

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1,), (4095,), (64, 64), (3, 4097), (2, 0)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_of_magnitudes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = numbers(shape, dtype, 0)
    assert sum_of_magnitudes(given) == pytest.approx(given.double().abs().sum().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_inner_products(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    vectors = [numbers(shape, dtype, seed) for seed in range(3)]
    flat_KN = torch.stack([vector.reshape(-1).double() for vector in vectors])
    found = inner_products(vectors)
    lengths = flat_KN.norm(dim=1)
    assert found.dtype is torch.float64
    assert ((found - flat_KN @ flat_KN.T).abs() <= 1e-6 * lengths[:, None] * lengths).all()
