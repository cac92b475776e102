"""WUDI in closed form and ACE against their papers' formulas."""

from __future__ import annotations

import data_free_reference as reference
import pytest
import torch
from data_free_reference import SHAPES, check, models, task_vectors

from largemerge.data_free.methods.table import merge_tensors

NARROW = (8, 48)  # with few models, inputs that no task vector knows


@pytest.mark.parametrize("shape", [*SHAPES, NARROW])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_wudi_is_the_minimum_of_least_norm(shape: tuple[int, int], count: int) -> None:
    base, tensors = models(count, shape)
    deltas = task_vectors(base, tensors)
    merged = merge_tensors("wudi", tensors, base)
    check(merged, base, reference.wudi(deltas))
    found = (merged.double() - base.double()).requires_grad_()
    (slope,) = torch.autograd.grad(reference.wudi_loss(found, deltas), found)
    (before,) = torch.autograd.grad(reference.wudi_loss(start := sum(deltas).requires_grad_(), deltas), start)
    assert slope.norm() <= 1e-4 * before.norm()


def test_wudi_is_where_gradient_steps_lead() -> None:
    base, tensors = models(2, (6, 16))
    deltas = task_vectors(base, tensors)
    merged = sum(deltas)
    curvature = torch.linalg.matrix_norm(sum(delta.T @ delta / delta.square().sum() for delta in deltas), 2)
    for _ in range(3000):
        slope = sum(2 * (merged - delta) @ delta.T @ delta / delta.square().sum() for delta in deltas)
        merged = merged - slope / (2 * curvature)
    check(merge_tensors("wudi", tensors, base), base, merged)


@pytest.mark.parametrize("shape", [*SHAPES, NARROW])
def test_wudi_of_equal_models_is_the_model(shape: tuple[int, int]) -> None:
    base, (one,) = models(1, shape)
    check(merge_tensors("wudi", [one] * 3, base), base, *task_vectors(base, [one]))
    check(merge_tensors("wudi", [one, base], base), base, *task_vectors(base, [one]))
    assert torch.equal(merge_tensors("wudi", [base] * 2, base), base)


@pytest.mark.parametrize("shape", [*SHAPES, NARROW])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("sizes", [[1.0] * 5, [3.0, 0.02, 0.3, 9.0, 0.1]])
def test_ace(shape: tuple[int, int], count: int, sizes: list[float]) -> None:
    base, tensors = models(count, shape)
    tensors = [base + size * (tensor - base) for size, tensor in zip(sizes, tensors, strict=False)]
    deltas = task_vectors(base, tensors)
    alike = reference.ace(deltas, tau=1e9)
    expected = reference.ace(deltas)
    assert torch.equal(alike, expected) == (len(set(sizes)) == 1), "both cases are seen"
    check(merge_tensors("ace", tensors, base), base, expected, 1e-4)


def test_parameters_of_ace() -> None:
    base, tensors = models(3, (30, 20))
    tensors[0] = base + 20 * (tensors[0] - base)
    deltas = task_vectors(base, tensors)
    expected = 0.5 * reference.ace(deltas, eps=0.1, k_frac=0.6, tau=0.0)
    options = {"eps": 0.1, "k_frac": 0.6, "heterogeneity": 0.0, "scaling_coefficient": 0.5}
    check(merge_tensors("ace", tensors, base, **options), base, expected, 1e-4)
    assert torch.isfinite(merge_tensors("ace", tensors[:1], base)).all()
