"""Solves against dense float64 formulas, and every step of the ladder."""

from __future__ import annotations

import pytest
import torch

from largemerge.regression.gram import Gram, panels
from largemerge.regression.solve import (
    Factor,
    Solution,
    cholesky_,
    estimate_condition,
    may_need_float64,
    solve_,
    solve_anchored_,
)

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


def solved(
    gram: torch.Tensor, rhs: torch.Tensor, mean: torch.Tensor, ridge: float, max_rank: int | None = None
) -> tuple[Solution, torch.Tensor]:
    """The solution of a system that is given as plain matrices, and X."""
    sums = Gram(gram.shape[0], torch.device("cpu"))
    for number, rows in enumerate(panels(gram.shape[0])):
        sums.halves_II[rows.stop :, rows] = gram[rows.stop :, rows].float()
        sums._sum_blocks[number].copy_(gram[rows, rows])
    update = rhs.float().clone()
    return solve_anchored_(sums, update, mean.float(), ridge, max_rank), update


def exact(gram: torch.Tensor, rhs: torch.Tensor, mean: torch.Tensor, ridge: float) -> torch.Tensor:
    shift = ridge * gram.diagonal().mean()
    return torch.linalg.solve(gram + shift * torch.eye(gram.shape[0]).double(), (rhs + shift * mean).T).T


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1])
def test_a_well_posed_system_is_solved_in_float32(ridge: float) -> None:
    gram, rhs, mean = system()
    found, update = solved(gram, rhs, mean, ridge)
    assert found.solver == "cholesky_float32" and not found.fallbacks
    expected = exact(gram, rhs, mean, ridge)
    assert (update - expected).norm() / expected.norm() < 1e-5
    assert found.residual < 1e-5


def test_features_of_very_different_size_need_no_fallback() -> None:
    gram, rhs, mean = system(scales=torch.logspace(-5, 5, INPUTS).double())
    found, update = solved(gram, rhs, mean, 0.0)
    assert found.solver == "cholesky_float32"
    expected = exact(gram, rhs, mean, 0.0)
    assert ((update - expected).norm(dim=0) / expected.norm(dim=0)).max() < 1e-4


def test_an_ill_conditioned_system_goes_to_float64_and_says_so() -> None:
    gram, _, mean = system()
    _, vectors = torch.linalg.eigh(gram)
    gram = vectors @ torch.diag(torch.logspace(-6.6, 0, INPUTS).double()) @ vectors.T
    gram32 = ((gram + gram.T) / 2).float()
    found, _ = solved(gram32, mean @ gram, mean, 0.0)
    assert found.solver == "cholesky_float64"
    assert any(text.startswith("cholesky_float32: ") for text in found.fallbacks)


@pytest.mark.parametrize("max_rank", [None, 12])
def test_directions_without_data_get_the_average(max_rank: int | None) -> None:
    gram, rhs, mean = system(num_rows=4)  # three candidates with four rows each: rank 12 of 40
    found, update = solved(gram, rhs, mean, 0.0, max_rank)
    assert found.solver == "eigenvalues_float64" and found.fallbacks
    _, vectors = torch.linalg.eigh(gram)
    silent = vectors[:, : INPUTS - 12]
    assert ((update - mean) @ silent).norm() / (mean @ silent).norm() < 1e-4
    assert (update.double() @ gram - rhs).norm() / rhs.norm() < 1e-4


def test_dead_features_get_exactly_the_average() -> None:
    gram, rhs, mean = system(scales=torch.tensor([0.0] * 3 + [1.0] * (INPUTS - 3)).double())
    found, update = solved(gram, rhs, mean, 0.0)
    assert found.solver == "cholesky_float32" and found.num_dead_features == 3
    torch.testing.assert_close(update[:, :3].double(), mean[:, :3], rtol=1e-6, atol=1e-7)


def test_identical_candidates_need_no_update() -> None:
    gram, _, _ = system()
    zero = torch.zeros(OUTPUTS, INPUTS)
    assert torch.equal(solved(gram, zero, zero, 1e-6)[1], zero)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_refused(bad: float) -> None:
    gram, rhs, mean = (tensor.float() for tensor in system())
    gram[3, 3] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        solved(gram, rhs, mean, 0.0)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_the_condition_is_estimated_within_a_factor_of_three(condition: float) -> None:
    gram, _, _ = system()
    _, vectors = torch.linalg.eigh(gram)
    matrix = (
        vectors @ torch.diag(torch.logspace(0, float(torch.tensor(condition).log10()), INPUTS).double()) @ vectors.T
    )
    factor = cholesky_(matrix.clone())
    assert isinstance(factor, Factor)
    found = estimate_condition(lambda rows: rows @ matrix, factor)
    assert condition / 3 <= found <= condition * 1.01


@pytest.mark.parametrize("num_inputs", [1, 255, 256, 700, 1024, 1500])
def test_factors_and_solutions_in_place_are_those_of_a_library(num_inputs: int) -> None:
    x = torch.randn(2 * num_inputs, num_inputs, generator=torch.Generator().manual_seed(1)).double()
    matrix = x.T @ x / len(x) + torch.eye(num_inputs).double()
    given = matrix.clone()
    upper = torch.ones_like(given, dtype=torch.bool).triu()
    for rows in panels(num_inputs):
        upper[rows, rows] = False
    factor = cholesky_(given)
    assert isinstance(factor, Factor)
    expected = torch.linalg.cholesky(matrix)
    assert torch.equal(given[upper], matrix[upper]), "what lies above the diagonal panels must be left alone"
    torch.testing.assert_close(given.tril(), expected)
    rhs = torch.randn(5, num_inputs).double()
    torch.testing.assert_close(solve_(rhs.clone(), factor), torch.linalg.solve(matrix, rhs.T).T)


def test_a_matrix_that_is_not_positive_definite_is_told_at_its_row() -> None:
    matrix = torch.eye(400)
    matrix[300, 300] = -1
    assert cholesky_(matrix) == 301


def test_a_large_system_takes_every_step_of_the_ladder_over_several_panels() -> None:
    generator = torch.Generator().manual_seed(2)
    size = 600
    orthogonal, _ = torch.linalg.qr(torch.randn(size, size, generator=generator).double())
    mean = torch.randn(OUTPUTS, size, generator=generator).double()
    for exponent, solver in ((-2, "cholesky_float32"), (-6.6, "cholesky_float64"), (-12, "eigenvalues_float64")):
        gram = orthogonal @ torch.diag(torch.logspace(exponent, 0, size).double()) @ orthogonal.T
        gram = ((gram + gram.T) / 2).float()
        found, update = solved(gram, mean @ gram.double(), mean, 0.0)
        assert found.solver == solver
        rhs = (mean @ gram.double()).float().double()
        assert (update.double() @ gram.double() - rhs).norm() / rhs.norm() < 1e-4


@pytest.mark.parametrize("scale", [0.0, 0.5, 0.95])
def test_a_shrunk_gram_of_any_rank_is_solved_in_float32(scale: float) -> None:
    gram, _, mean = system(num_rows=1)  # rank 3 of 40
    shrunk = scale * gram + (1 - scale) * gram.diagonal().diag()
    assert not may_need_float64(INPUTS, scale) and may_need_float64(INPUTS, 1.0)
    found, _ = solved(shrunk, mean @ shrunk, mean, 0.0)
    assert found.solver == "cholesky_float32"
    assert found.condition <= (scale * INPUTS + 1 - scale) / (1 - scale) * 1.01
