"""Consensus TA, Localize-and-Stitch and Fisher against their papers' formulas; whole, and cut into pieces."""

from __future__ import annotations

import data_free_reference as reference
import pytest
import torch
from data_free_reference import check, models, task_vectors

from largemerge.data_free.methods import base
from largemerge.data_free.methods.table import merge_tensors

SHAPES = [(37, 24), (29,), (), (5, 3, 4, 2)]


@pytest.fixture(params=[1 << 19, 100], ids=["whole", "cut"], autouse=True)
def piece_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PIECE_ELEMENTS", request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("count", "votes"), [(2, 2), (3, 2), (3, 0), (5, 1), (5, 6)])
def test_consensus(shape: tuple[int, ...], count: int, votes: int) -> None:
    base, tensors = models(count, shape)
    deltas = task_vectors(base, tensors)
    expected = 0.4 * reference.consensus_ta(deltas, 0.5, votes)
    per_model = {"tall_mask_lambda": [0.5] * count}
    check(
        merge_tensors("consensus_ta", tensors, base, per_model=per_model, prun_thre_k=votes, scaling_factor=0.4),
        base,
        expected,
    )


def test_consensus_of_two_that_agree_and_one_that_does_not() -> None:
    base = torch.zeros(1, 4)
    tensors = [torch.tensor([row]) for row in ([1.0, 1.0, 0.1, 0.0], [1.0, -1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 5.0])]
    # λ = 0.4: in the first column 1 > 0.4 · 2 for all three; in the last one only one task is served.
    per_model = {"tall_mask_lambda": [0.4] * 3}
    assert merge_tensors("consensus_ta", tensors, base, per_model=per_model)[0].tolist() == [3.0, 0.0, 0.0, 0.0]


def largest(delta: torch.Tensor, share: float) -> torch.Tensor:
    order = delta.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(delta.numel(), dtype=torch.float64)
    mask[order[: max(1, int(share * delta.numel()))]] = 1
    return mask.view(delta.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shares", [[0.05, 0.05], [0.2, 0.5, 0.9], [1.0, 1.0, 0.0, 0.3, 0.1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_localize_and_stitch(shape: tuple[int, ...], shares: list[float], dtype: torch.dtype) -> None:
    base, tensors = models(len(shares), shape)
    base, tensors = base.to(dtype), [tensor.to(dtype) for tensor in tensors]
    # Of float32 differences: of two elements that are equal there, the first one.
    deltas = [(tensor.float() - base.float()).double() for tensor in tensors]
    masks = [largest(delta, share) for delta, share in zip(deltas, shares, strict=True)]
    total = sum(mask * delta for mask, delta in zip(masks, deltas, strict=True))
    expected = total / sum(masks).clamp(min=1)
    check(merge_tensors("localize_and_stitch", tensors, base, per_model={"sparsity": shares}), base, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_fisher(shape: tuple[int, ...], count: int) -> None:
    _, tensors = models(count, shape)
    generator = torch.Generator().manual_seed(9)
    diagonals = [torch.rand(shape, generator=generator) ** 8 * 1e-9 for _ in range(count)]
    weights = [1.0, 2.0, 0.5, 1.0, 3.0][:count]
    found = merge_tensors("fisher", tensors, per_model={"fisher": [""] * count, "weight": weights}, auxiliary=diagonals)
    shares = [weight * diagonal.double() for weight, diagonal in zip(weights, diagonals, strict=True)]
    expected = sum(share * tensor for share, tensor in zip(shares, tensors, strict=True)) / sum(shares)
    check(found, torch.zeros(shape), expected)


def test_fisher_where_nobody_knows_anything() -> None:
    tensors = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])]
    diagonals = [torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 7.0, 0.0])]
    per_model = {"fisher": ["", ""], "weight": [1.0, 2.0]}
    assert merge_tensors("fisher", tensors, per_model=per_model, auxiliary=diagonals).tolist() == [3.0, 5.0, 3.0]
    with pytest.raises(FloatingPointError, match="negative or NaN"):
        merge_tensors("fisher", tensors, per_model=per_model, auxiliary=[diagonals[0], -diagonals[1]])


@pytest.mark.parametrize("method", ["consensus_ta", "localize_and_stitch"])
def test_the_order_of_models_does_not_count(method: str) -> None:
    base, tensors = models(3, (37, 24))
    assert torch.allclose(merge_tensors(method, tensors, base), merge_tensors(method, tensors[::-1], base), atol=1e-6)
