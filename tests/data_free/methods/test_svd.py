"""Methods of singular vectors against their papers' formulas."""

from __future__ import annotations

import data_free_reference as reference
import pytest
import torch
from data_free_reference import SHAPES, check, models, task_vectors

from largemerge.data_free.methods.table import merge_tensors
from largemerge.singular import polar_factor, singular_vectors

MATRIX_METHODS = ["tsv_m", "iso_c", "iso_cts", "dc_merge", "resmerge", "knots", "wudi", "ace"]
SCALES = {
    "tsv_m": "alpha",
    "iso_c": "scaling_factor",
    "iso_cts": "scaling_factor",
    "dc_merge": "alpha",
    "knots": "lambda",
    "ace": "scaling_coefficient",
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formulas(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    base, tensors = models(count, shape)
    base, tensors = base.to(dtype), [tensor.to(dtype) for tensor in tensors]
    deltas = task_vectors(base, tensors)
    check(merge_tensors("tsv_m", tensors, base), base, reference.tsv_m(deltas), 1e-4)
    check(merge_tensors("iso_c", tensors, base), base, reference.iso_c(deltas), 1e-4)
    check(merge_tensors("iso_cts", tensors, base), base, reference.iso_cts(deltas), 1e-4)
    check(merge_tensors("resmerge", tensors, base), base, reference.resmerge(deltas), 1e-4)


def test_parameters() -> None:
    base, tensors = models(3, (40, 30))
    deltas = task_vectors(base, tensors)
    check(merge_tensors("tsv_m", tensors, base, alpha=0.3), base, reference.tsv_m(deltas, 0.3), 1e-4)
    check(merge_tensors("iso_c", tensors, base, scaling_factor=0.3), base, reference.iso_c(deltas, 0.3), 1e-4)
    for fraction in (0.0, 0.5, 1.0):
        options = {"scaling_factor": 0.5, "common_space_fraction": fraction}
        check(merge_tensors("iso_cts", tensors, base, **options), base, reference.iso_cts(deltas, **options), 1e-4)


@pytest.mark.parametrize("common", [0.0, 1.0, -0.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_resmerge(common: float, shape: tuple[int, int]) -> None:
    """Residuals that have something in common are lengthened; without, their mean is all that there is."""
    base, tensors = models(3, shape)
    deltas = [tensor - base for tensor in tensors]
    mean = sum(deltas) / 3
    tensors = [base + delta + common * mean for delta in deltas]
    found = task_vectors(base, tensors)
    for options in ({}, {"rank_topk": 4}, {"src_beta_min": 0.2, "src_beta_max": 0.5, "head_ratio_budget": 0.6}):
        check(merge_tensors("resmerge", tensors, base, **options), base, reference.resmerge(found, **options), 1e-4)


def test_resmerge_of_one_model_of_equal_ones_and_of_the_base() -> None:
    base, (one,) = models(1, (30, 20))
    (delta,) = task_vectors(base, [one])
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    head = s[0] * torch.outer(u[:, 0], vh[0])
    rest = delta - head
    expected = rest + 0.2 * rest.norm() * head / head.norm()
    check(merge_tensors("resmerge", [one], base), base, expected, 1e-4)
    check(merge_tensors("resmerge", [one] * 3, base), base, expected, 1e-4)
    assert torch.equal(merge_tensors("resmerge", [base] * 3, base), base)
    assert torch.equal(merge_tensors("resmerge", [base], base), base)
    low = base + torch.outer(torch.arange(30.0), torch.arange(20.0))
    assert (merge_tensors("resmerge", [low], base) - base).norm() <= 1e-4 * (low - base).norm(), "nothing but a head"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ip_merging(shape: tuple[int, int], dtype: torch.dtype) -> None:
    base, tensors = models(2, shape)
    tensors[1] = base + 0.6 * (tensors[0] - base) + 0.4 * (tensors[1] - base)  # directions in common
    base, tensors = base.to(dtype), [tensor.to(dtype) for tensor in tensors]
    deltas = task_vectors(base, tensors)
    for options in ({}, {"scale": 0.5, "temperature": 3.0}, {"rank": 4, "threshold": 0.0}, {"threshold": 1.0}):
        expected = reference.ip_merging(deltas, **options)
        check(merge_tensors("ip_merging", tensors, base, **options), tensors[0], expected, 1e-4)
        assert expected.any() == (options.get("threshold") != 1.0)


def test_ip_merging_of_a_model_that_is_the_base_or_the_other_one() -> None:
    base, (one, other) = models(2, (30, 20))
    assert torch.equal(merge_tensors("ip_merging", [one, base], base), one)
    assert torch.equal(merge_tensors("ip_merging", [base, one], base), base)
    assert torch.equal(merge_tensors("ip_merging", [one, other], base, scale=0.0), one)
    expected = (one - base).double() / 20**2  # the directions are the same, all of them: p = 1/20
    check(merge_tensors("ip_merging", [one, one], base), one, expected, 1e-4)


@pytest.mark.parametrize("shape", [(), (29,), (5, 3, 4), (4, 3, 2, 2)])
def test_ip_merging_keeps_the_first_models_vectors(shape: tuple[int, ...]) -> None:
    base, tensors = models(2, shape)
    assert torch.equal(merge_tensors("ip_merging", tensors, base), tensors[0])


def test_everything_common_is_iso_c() -> None:
    base, tensors = models(3, (40, 30))
    expected = merge_tensors("iso_c", tensors, base)
    assert torch.allclose(merge_tensors("iso_cts", tensors, base, common_space_fraction=1.0), expected, atol=1e-5)


@pytest.mark.parametrize("method", MATRIX_METHODS)
@pytest.mark.parametrize("shape", [*SHAPES, (29,), (5, 3, 4)])
def test_the_order_of_models_does_not_count(method: str, shape: tuple[int, ...]) -> None:
    base, tensors = models(3, shape)
    forwards, backwards = (merge_tensors(method, order, base) for order in (tensors, tensors[::-1]))
    assert (forwards - backwards).norm() <= 1e-4 * (forwards - base).norm()


@pytest.mark.parametrize("shape", [(), (29,), (5, 3, 4), (4, 3, 2, 2), (2, 40)])
@pytest.mark.parametrize("method", MATRIX_METHODS)
def test_what_is_no_matrix_gets_the_mean(method: str, shape: tuple[int, ...]) -> None:
    base, tensors = models(3, shape)
    options = {SCALES[method]: 0.7} if method in SCALES else {}
    factor = 0.7 if options else 1.0
    check(merge_tensors(method, tensors, base, **options), base, factor * sum(task_vectors(base, tensors)) / 3)


def test_equal_models() -> None:
    base, (one,) = models(1, (30, 20))
    (delta,) = task_vectors(base, [one])
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    tensors = [one] * 4
    check(merge_tensors("tsv_m", tensors, base), base, u[:, :5] @ torch.diag(s[:5]) @ vh[:5], 1e-4)
    check(merge_tensors("iso_c", tensors, base), base, 4 * s.mean() * u @ vh, 1e-4)


def test_a_model_that_is_the_base_adds_nothing_of_its_own() -> None:
    base, tensors = models(2, (30, 20))
    deltas = task_vectors(base, tensors)
    check(merge_tensors("iso_c", [*tensors, base], base), base, reference.iso_c(deltas), 1e-4)
    assert torch.equal(merge_tensors("tsv_m", [base] * 3, base), base)


def test_directions_that_nobody_has_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.zeros(40, 30)
    low = [torch.randn(40, 4, generator=generator) @ torch.randn(4, 30, generator=generator) for _ in range(2)]
    u, s, vh = torch.linalg.svd((low[0] + low[1]).double(), full_matrices=False)
    expected = s.mean() * u[:, :8] @ vh[:8]
    assert (merge_tensors("iso_c", low, base) - expected).norm() <= 1e-4 * expected.norm()
    # 15 of each are asked for and 4 are there.
    parts = [torch.linalg.svd(each.double(), full_matrices=False) for each in low]
    left = reference.polar(torch.cat([u[:, :4] for u, _, _ in parts], dim=1))
    right = reference.polar(torch.cat([vh[:4] for _, _, vh in parts]))
    expected = left @ torch.diag(torch.cat([s[:4] for _, s, _ in parts])) @ right
    assert (merge_tensors("tsv_m", low, base) - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (256, 256)])
@pytest.mark.parametrize("smallest", [0.5, 1e-3, 3e-5])
def test_small_singular_values_are_exact_enough(shape: tuple[int, int], smallest: float) -> None:
    generator = torch.Generator().manual_seed(2)
    size = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, size, generator=generator).double())[0] for n in shape)
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), size, dtype=torch.float64)
    matrix = (left * values @ right.T).float()
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    factor, found = polar_factor(matrix)
    assert factor.dtype == torch.float32 and (factor - u @ vh).norm() <= 1e-4 * size**0.5
    assert torch.allclose(found, s, rtol=1e-5)
    few = size // 3
    left, values, right = (each.double() for each in singular_vectors(matrix, few))
    assert (left * values @ right.T - u[:, :few] * s[:few] @ vh[:few]).norm() <= 1e-4 * s.norm()
    assert (left.T @ left - torch.eye(few)).norm() <= 1e-4 * few**0.5
