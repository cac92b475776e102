"""KnOTS and DC-Merge against their papers' formulas, and TIES on whole matrices."""

from __future__ import annotations

from typing import Any

import data_free_reference as reference
import pytest
import torch
from data_free_reference import SHAPES, check, models, task_vectors

from largemerge.data_free.methods.coordinates import Election, keep_largest_
from largemerge.data_free.methods.table import merge_tensors

TALL, WIDE = (90, 16), (16, 90)  # with few models, outputs that no task vector has; more inputs than outputs
WEIGHTS, DENSITIES = [0.5, 0.8, -0.3], [0.3, 0.6, 1.0]


@pytest.mark.parametrize("shape", [*SHAPES, TALL, WIDE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_knots(shape: tuple[int, int], dtype: torch.dtype) -> None:
    base, tensors = models(3, shape)
    base, tensors = base.to(dtype), [tensor.to(dtype) for tensor in tensors]
    deltas = task_vectors(base, tensors)
    check(merge_tensors("knots", tensors, base), base, reference.knots(deltas), 1e-4)
    per_model = {"weight": WEIGHTS, "density": DENSITIES}
    for normalize in (True, False):
        options: dict[str, Any] = {"normalize": normalize, "lambda": 0.7}
        found = merge_tensors("knots", tensors, base, per_model=per_model, **options)
        expected = reference.knots(deltas, WEIGHTS, DENSITIES, normalize=normalize, scale=0.7)
        check(found, base, expected, 1e-4)


def test_knots_of_one_model_of_equal_ones_and_of_the_base() -> None:
    base, (one,) = models(1, (30, 20))
    (delta,) = task_vectors(base, [one])
    check(merge_tensors("knots", [one], base), base, delta)
    check(merge_tensors("knots", [one] * 3, base), base, delta)
    check(merge_tensors("knots", [one, base], base), base, delta)  # it has no sign anywhere, and does not count
    check(merge_tensors("knots", [one] * 3, base, normalize=False), base, 3 * delta)
    check(merge_tensors("knots", [one], base, per_model={"weight": [-2.0], "density": [1.0]}), base, -delta)
    assert torch.equal(merge_tensors("knots", [base] * 2, base), base)
    nothing = merge_tensors("knots", [one] * 2, base, per_model={"weight": [1.0, 1.0], "density": [0.0, 0.0]})
    assert torch.equal(nothing, base)


def test_knots_of_adapters_stays_in_their_directions() -> None:
    generator = torch.Generator().manual_seed(4)
    base = torch.zeros(40, 30)
    low = [torch.randn(40, 3, generator=generator) @ torch.randn(3, 30, generator=generator) for _ in range(3)]
    per_model = {"weight": [1.0] * 3, "density": [0.3] * 3}
    found = merge_tensors("knots", low, base, per_model=per_model)
    expected = reference.knots([each.double() for each in low], density=[0.3] * 3)
    check(found, base, expected, 1e-4)
    assert int(torch.linalg.matrix_rank(found, rtol=1e-5)) <= 9


def test_vectors_get_task_arithmetic_by_knots() -> None:
    base, tensors = models(3, (29,))
    deltas = task_vectors(base, tensors)
    total = sum(weight * delta for weight, delta in zip(WEIGHTS, deltas, strict=True))
    per_model = {"weight": WEIGHTS, "density": DENSITIES}
    check(merge_tensors("knots", tensors, base, per_model=per_model), base, total / sum(map(abs, WEIGHTS)))
    check(merge_tensors("knots", tensors, base, per_model=per_model, normalize=False), base, total)
    per_model["weight"] = [1.0, -0.5, -0.5]  # which add up to 0
    total = deltas[0] - 0.5 * deltas[1] - 0.5 * deltas[2]
    check(merge_tensors("knots", tensors, base, per_model=per_model, **{"lambda": 2.0}), base, total)


@pytest.mark.parametrize("shape", [*SHAPES, TALL])
@pytest.mark.parametrize(
    ("count", "smoothing"),  # not "avg" of one model: all elements are equal then, and any of them may be the largest
    [(1, "none"), (1, "linear"), *((count, smoothing) for count in (2, 3) for smoothing in ("none", "avg", "linear"))],
)
def test_dc_merge(shape: tuple[int, int], count: int, smoothing: str) -> None:
    base, tensors = models(count, shape)
    deltas = task_vectors(base, tensors)
    for options in ({"select_topk": 0.05}, {"select_topk": 0.4, "alpha": 0.3, "rho": 1.2}, {"select_topk": 1e-9}):
        found = merge_tensors("dc_merge", tensors, base, smoothing=smoothing, **options)
        check(found, base, reference.dc_merge(deltas, smoothing=smoothing, **options), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dc_merge_in_16_bits(dtype: torch.dtype) -> None:
    base, tensors = models(3, (48, 36))
    base, tensors = base.to(dtype), [tensor.to(dtype) for tensor in tensors]
    check(merge_tensors("dc_merge", tensors, base), base, reference.dc_merge(task_vectors(base, tensors)), 1e-4)


def test_dc_merge_of_adapters_with_fewer_directions_than_there_is_room_for() -> None:
    generator = torch.Generator().manual_seed(4)
    base = torch.zeros(40, 30)
    low = [torch.randn(40, r, generator=generator) @ torch.randn(r, 30, generator=generator) for r in (2, 4)]
    parts = [torch.linalg.svd(each.double(), full_matrices=False) for each in low]
    u = reference.polar(torch.cat([u[:, :r] for (u, _, _), r in zip(parts, (2, 4), strict=True)], dim=1))
    vh = reference.polar(torch.cat([vh[:r] for (_, _, vh), r in zip(parts, (2, 4), strict=True)]))
    inner = [reference.kept(u.T @ each.double() @ vh.T, 18) for each in low]
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).double()
    expected = u @ (mask * reference.elected(inner, [1.0, 1.0], normalize=True)) @ vh
    check(merge_tensors("dc_merge", low, base, select_topk=0.5), base, expected, 1e-4)


def test_dc_merge_of_the_base_is_the_base() -> None:
    base, (one,) = models(1, (30, 20))
    for smoothing in ("none", "avg", "linear"):
        assert torch.equal(merge_tensors("dc_merge", [base] * 2, base, smoothing=smoothing), base)
        found = merge_tensors("dc_merge", [one, base], base, smoothing=smoothing, select_topk=1.0)
        (delta,) = task_vectors(base, [one])
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        energy = {"none": s[:10], "avg": s[:10].mean().expand(10)}.get(smoothing)
        if energy is not None:
            check(found, base, u[:, :10] @ torch.diag(energy) @ vh[:10], 1e-4)


def test_an_election_is_the_same_with_all_signs_turned() -> None:
    matrix = torch.tensor([[3.0, -1.0, 2.0, 0.0]])
    other = torch.tensor([[-3.0, -5.0, 1.0, 0.0]])
    for sign in (1, -1):
        election = Election()
        election.add(sign * matrix)
        election.add(sign * other, 2.0)
        expected = sign * torch.tensor([[-6.0 / 2, -11.0 / 3, 4.0 / 3, 0.0]])
        assert torch.allclose(election.result(normalize=True), expected)
    election = Election()
    election.add(matrix.clone())
    election.add(-matrix)
    assert not election.result(normalize=True).any(), "equal sums of both signs leave nothing"


def test_the_largest_elements_are_kept() -> None:
    matrix = torch.tensor([[3.0, -1.0], [2.0, -4.0]])
    for count, expected in ((0, [0.0, 0.0, 0.0, 0.0]), (1, [0.0, 0.0, 0.0, -4.0]), (3, [3.0, 0.0, 2.0, -4.0])):
        kept = matrix.clone()
        keep_largest_(kept, count)
        assert kept.flatten().tolist() == expected
    keep_largest_(matrix, 4)
    assert matrix.flatten().tolist() == [3.0, -1.0, 2.0, -4.0]
