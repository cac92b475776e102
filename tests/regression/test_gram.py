"""Gram matrices against float64."""

from __future__ import annotations

import pytest
import torch

from largemerge.regression.gram import add_gram_, mirror_, shrink_off_diagonal_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_inputs", [1, 7, 300, 600])
def test_gram_is_exact_but_for_the_rounding_of_sums(dtype: torch.dtype, num_inputs: int) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(rows, num_inputs).to(dtype) for rows in (50, 1, 0, 211)]
    lower = torch.zeros(num_inputs, num_inputs)
    for part in parts:
        add_gram_(lower, part)
    x = torch.cat(parts).double()
    expected = x.T @ x
    gram = mirror_(lower)
    assert (gram.double() - expected).norm() / expected.norm() < 2e-6
    assert torch.equal(gram, gram.T)


def test_the_precision_of_other_products_is_left_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    add_gram_(torch.zeros(8, 8), torch.ones(3, 8, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_shrinking_keeps_the_diagonal(scale: float) -> None:
    gram = torch.arange(16.0).reshape(4, 4) + 1
    expected = scale * gram + (1 - scale) * gram.diagonal().diag()
    torch.testing.assert_close(shrink_off_diagonal_(gram.clone(), scale), expected)
