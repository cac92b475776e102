"""WUDI in closed form and ACE against their papers' formulas."""

from __future__ import annotations

import data_free_reference as reference
import pytest
import torch
from data_free_reference import SHAPES, check, models, task_vectors

from largemerge.data_free.methods.table import merge_tensors

NARROW = (8, 48)  # with few models, inputs that no task vector knows


MINIMUM = {"exp_time": "unlimited", "truncate_rank_ratio": 1.0}


@pytest.mark.parametrize("shape", [*SHAPES, NARROW])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_wudi_is_the_minimum_of_least_norm(shape: tuple[int, int], count: int) -> None:
    base, tensors = models(count, shape)
    deltas = task_vectors(base, tensors)
    merged = merge_tensors("wudi", tensors, base, **MINIMUM)
    check(merged, base, reference.wudi(deltas, **MINIMUM))
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
    check(merge_tensors("wudi", tensors, base, **MINIMUM), base, merged)


@pytest.mark.parametrize("time", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(6, 16), (16, 6)])
def test_wudi_is_where_small_steps_have_come_after_a_time(time: float, shape: tuple[int, int]) -> None:
    base, tensors = models(2, shape)
    deltas = task_vectors(base, tensors)
    merged, num_steps = sum(deltas), 10_000
    squares = sum(delta.T @ delta / delta.square().sum() for delta in deltas)
    right = sum(delta @ delta.T @ delta / delta.square().sum() for delta in deltas)
    for _ in range(num_steps if time else 0):
        merged = merged - time / num_steps * (merged @ squares - right)
    check(merge_tensors("wudi", tensors, base, exp_time=time, truncate_rank_ratio=1.0), base, merged, 1e-3)


@pytest.mark.parametrize("shape", [*SHAPES, NARROW])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time", [0, 3, 300, 1e6, "unlimited"])
def test_wudi_by_the_filter(shape: tuple[int, int], count: int, dtype: torch.dtype, time: float | str) -> None:
    base, tensors = models(count, shape)
    base, tensors = base.to(dtype), [tensor.to(dtype) for tensor in tensors]
    deltas = task_vectors(base, tensors)
    for ratio in (0.02, 0.3, 0.65, 1.0):
        options = {"exp_time": time, "truncate_rank_ratio": ratio}
        check(merge_tensors("wudi", tensors, base, **options), base, reference.wudi(deltas, **options))


def test_more_time_leads_to_the_minimum_and_none_to_the_sum() -> None:
    base, tensors = models(3, (40, 30))
    deltas = task_vectors(base, tensors)
    minimum = merge_tensors("wudi", tensors, base, **MINIMUM)
    far = [
        (merge_tensors("wudi", tensors, base, exp_time=time, truncate_rank_ratio=1.0) - minimum).norm().item()
        for time in (0, 10, 100, 1000, 10_000, 1_000_000)
    ]
    assert far == sorted(far, reverse=True) and far[-1] <= 1e-5 * far[0]
    check(merge_tensors("wudi", tensors, base, exp_time=0), base, sum(deltas))


def test_wudi_with_a_filter_of_models_that_are_the_base() -> None:
    base, (one,) = models(1, (30, 20))
    for options in ({"exp_time": 300}, {"exp_time": "unlimited", "truncate_rank_ratio": 0.5}):
        assert torch.equal(merge_tensors("wudi", [base] * 2, base, **options), base)
        check(merge_tensors("wudi", [one, base], base, **options), base, *task_vectors(base, [one]))


@pytest.mark.parametrize("shape", [*SHAPES, NARROW])
def test_wudi_of_equal_models_is_the_model(shape: tuple[int, int]) -> None:
    base, (one,) = models(1, shape)
    check(merge_tensors("wudi", [one] * 3, base, **MINIMUM), base, *task_vectors(base, [one]))
    check(merge_tensors("wudi", [one, base], base, **MINIMUM), base, *task_vectors(base, [one]))
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


@pytest.mark.parametrize("heterogeneity", [0.0, 0.3])
def test_models_that_left_a_matrix_as_it_was_add_nothing_to_ace(heterogeneity: float) -> None:
    base, tensors = models(2, (30, 20))
    expected = merge_tensors("ace", tensors, base, heterogeneity=heterogeneity)
    for unchanged in ([base], [base, base]):
        found = merge_tensors("ace", [*tensors, *unchanged], base, heterogeneity=heterogeneity)
        assert torch.equal(found, expected)
    alone = merge_tensors("ace", [base, tensors[0]], base, heterogeneity=heterogeneity)
    assert torch.equal(alone, merge_tensors("ace", tensors[:1], base, heterogeneity=heterogeneity))
    assert torch.equal(merge_tensors("ace", [base, base], base, heterogeneity=heterogeneity), base)


def test_ace_refuses_what_its_eps_would_blow_up() -> None:
    base, tensors = models(2, (30, 20))
    tensors[1] = base + 1e-4 * (tensors[1] - base)
    with pytest.raises(FloatingPointError, match="times as long as all task vectors together, since eps"):
        merge_tensors("ace", tensors, base)
    merged = merge_tensors("ace", tensors, base, eps=1e-12)
    assert (merged - base).norm() < 3 * (tensors[0] - base).norm()
