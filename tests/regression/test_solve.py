"""Solves against dense float64 formulas, and every step of the ladder."""

from __future__ import annotations

import pytest
import torch

from largemerge.regression.solve import estimate_condition, solve_anchored

INPUTS, OUTPUTS = 40, 9


def system(seed: int = 0, num_rows: int = 200, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """G, R and Ē of three candidates, in float64; the first candidate is the anchor."""
    generator = torch.Generator().manual_seed(seed)
    gram = torch.zeros(INPUTS, INPUTS, dtype=torch.float64)
    rhs, mean = torch.zeros(OUTPUTS, INPUTS).double(), torch.zeros(OUTPUTS, INPUTS).double()
    for index in range(3):
        x = torch.randn(num_rows, INPUTS, generator=generator).double()
        x = x if scales is None else x * scales
        own = x.T @ x / num_rows / 3
        difference = torch.randn(OUTPUTS, INPUTS, generator=generator).double() * (index > 0)
        gram, rhs, mean = gram + own, rhs + difference @ own, mean + difference / 3
    return gram, rhs, mean


def exact(gram: torch.Tensor, rhs: torch.Tensor, mean: torch.Tensor, ridge: float) -> torch.Tensor:
    shift = ridge * gram.diagonal().mean()
    return torch.linalg.solve(gram + shift * torch.eye(INPUTS).double(), (rhs + shift * mean).T).T


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1])
def test_a_well_posed_system_is_solved_in_float32(ridge: float) -> None:
    gram, rhs, mean = system()
    found = solve_anchored(gram.float(), rhs.float(), mean.float(), ridge)
    assert found.solver == "cholesky_float32" and not found.fallbacks
    expected = exact(gram, rhs, mean, ridge)
    assert (found.update_OI - expected).norm() / expected.norm() < 1e-5
    assert found.residual < 1e-5


def test_features_of_very_different_size_need_no_fallback() -> None:
    gram, rhs, mean = system(scales=torch.logspace(-5, 5, INPUTS).double())
    found = solve_anchored(gram.float(), rhs.float(), mean.float(), 0.0)
    assert found.solver == "cholesky_float32"
    expected = exact(gram, rhs, mean, 0.0)
    assert ((found.update_OI - expected).norm(dim=0) / expected.norm(dim=0)).max() < 1e-4


def test_an_ill_conditioned_system_goes_to_float64_and_says_so() -> None:
    gram, _, mean = system()
    _, vectors = torch.linalg.eigh(gram)
    gram = vectors @ torch.diag(torch.logspace(-6.6, 0, INPUTS).double()) @ vectors.T
    gram32 = ((gram + gram.T) / 2).float()
    found = solve_anchored(gram32, (mean @ gram).float(), mean.float(), 0.0)
    assert found.solver == "cholesky_float64"
    assert any(text.startswith("cholesky_float32: ") for text in found.fallbacks)


@pytest.mark.parametrize("most_rank", [None, 12])
def test_directions_without_data_get_the_average(most_rank: int | None) -> None:
    gram, rhs, mean = system(num_rows=4)  # three candidates with four rows each: rank 12 of 40
    found = solve_anchored(gram.float(), rhs.float(), mean.float(), 0.0, most_rank)
    assert found.solver == "eigenvalues_float64" and found.fallbacks
    _, vectors = torch.linalg.eigh(gram)
    silent = vectors[:, : INPUTS - 12]
    assert ((found.update_OI - mean) @ silent).norm() / (mean @ silent).norm() < 1e-4
    assert (found.update_OI.double() @ gram - rhs).norm() / rhs.norm() < 1e-4


def test_dead_features_get_exactly_the_average() -> None:
    gram, rhs, mean = system(scales=torch.tensor([0.0] * 3 + [1.0] * (INPUTS - 3)).double())
    found = solve_anchored(gram.float(), rhs.float(), mean.float(), 0.0)
    assert found.solver == "cholesky_float32" and found.num_dead_features == 3
    torch.testing.assert_close(found.update_OI[:, :3].double(), mean[:, :3], rtol=1e-6, atol=1e-7)


def test_identical_candidates_need_no_update() -> None:
    gram, _, _ = system()
    zero = torch.zeros(OUTPUTS, INPUTS)
    assert torch.equal(solve_anchored(gram.float(), zero, zero, 1e-6).update_OI, zero)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_refused(bad: float) -> None:
    gram, rhs, mean = (tensor.float() for tensor in system())
    gram[3, 3] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        solve_anchored(gram, rhs, mean, 0.0)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_the_condition_is_estimated_within_a_factor_of_three(condition: float) -> None:
    gram, _, _ = system()
    _, vectors = torch.linalg.eigh(gram)
    matrix = (
        vectors @ torch.diag(torch.logspace(0, float(torch.tensor(condition).log10()), INPUTS).double()) @ vectors.T
    )
    found = estimate_condition(matrix, torch.linalg.cholesky(matrix))
    assert condition / 3 <= found <= condition * 1.01
