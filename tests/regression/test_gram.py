"""Gram matrices against float64."""

from __future__ import annotations

import pytest
import torch

from largemerge.regression.gram import Gram, float32_means_float32, panels

CPU = torch.device("cpu")


def candidates(num_inputs: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Batches of rows of three candidates."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(rows, num_inputs, generator=generator).to(dtype) for rows in sizes]
        for sizes in ((50, 1, 0, 211), (30,), (7, 300))
    ]


def tilde(x: torch.Tensor, alpha: float, scale: float) -> torch.Tensor:
    """G̃ in float64."""
    gram = x.double().T @ x.double()
    return alpha * (scale * gram + (1 - scale) * gram.diagonal().diag())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_inputs", [1, 7, 300, 600])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_sums_and_products_are_exact_but_for_rounding(dtype: torch.dtype, num_inputs: int, scale: float) -> None:
    gram, expected = Gram(num_inputs, CPU), torch.zeros(num_inputs, num_inputs).double()
    rows = torch.randn(5, num_inputs)
    for number, batches in enumerate(candidates(num_inputs, dtype)):
        alpha = 0.1 * (number + 1)
        for batch in batches:
            gram.add_rows(batch)
        own = tilde(torch.cat(batches), alpha, scale)
        product = torch.ones(5, num_inputs)
        gram.add_candidate_product_(product, rows, alpha, scale)
        reference = 1 + rows.double() @ own
        assert (product - reference).norm() / reference.norm() < 2e-6
        gram.finish_candidate(alpha, scale)
        expected += own
    torch.testing.assert_close(gram.diagonal().double(), expected.diagonal(), rtol=2e-6, atol=0)
    whole = gram.full_sum()
    assert (whole.double() - expected).norm() / expected.norm() < 2e-6
    assert torch.equal(whole, whole.T)


def test_the_sum_survives_what_is_done_to_the_lower_half() -> None:
    gram = Gram(600, CPU)
    gram.add_rows(torch.randn(700, 600))
    gram.finish_candidate(1.0, 0.9)
    before = gram.full_sum().clone()
    for rows in panels(600):
        gram.halves_II[rows.start :, rows] = float("nan")
    vectors = torch.randn(3, 600)
    torch.testing.assert_close(gram.sum_product(vectors), vectors @ before, rtol=1e-4, atol=1e-2)
    assert torch.equal(gram.full_sum(), before)


def test_a_candidate_without_rows_adds_nothing() -> None:
    gram = Gram(300, CPU)
    gram.add_rows(torch.randn(10, 300))
    gram.finish_candidate(1.0, 1.0)
    before = gram.diagonal()
    product = torch.zeros(2, 300)
    gram.add_candidate_product_(product, torch.ones(2, 300), 1.0, 0.5)
    assert not product.any() and not gram.candidate_diagonal().any()
    gram.finish_candidate(1.0, 0.5)
    assert torch.equal(gram.diagonal(), before)


def test_the_precision_of_other_products_is_left_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    Gram(8, CPU).add_rows(torch.ones(3, 8, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_float32_products_are_exact_whatever_the_process_has_set() -> None:
    left, right = torch.randn(64, 512), torch.randn(512, 64)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with float32_means_float32():
            product = left @ right
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
    assert (product - left.double() @ right.double()).norm() / product.norm() < 1e-6
