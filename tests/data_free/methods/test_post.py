"""Steps after a merge against their papers' formulas, dense, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from data_free_reference import Deltas, rescale, subspace_boosting, svc

from largemerge.data_free.methods.post import POST_STEPS, Step, apply_steps

SHAPES = [(37, 24), (24, 37), (32, 32), (1, 9), (9, 1), (5, 64)]


def make(count: int, shape: tuple[int, ...], rank: int | None = None, seed: int = 3) -> Deltas:
    """Makes task vectors with something in common, float32."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> torch.Tensor:
        if rank is None:
            return torch.randn(shape, generator=generator)
        left, right = (torch.randn(size, rank, generator=generator) for size in shape)
        return left @ right.T

    common = one()
    return [0.01 * (common + one()) for _ in range(count)]


def run(merged: torch.Tensor, deltas: Deltas, *steps: tuple[str, dict[str, Any]]) -> torch.Tensor:
    def candidates() -> Iterator[torch.Tensor]:
        yield from (delta.clone() for delta in deltas)

    given = [Step(name, {**POST_STEPS[name].parameters, **parameters}) for name, parameters in steps]
    found, norms = apply_steps(merged.clone(), given, candidates)
    assert found.dtype == torch.float32 and found.shape == merged.shape
    assert len(norms) == len(steps) + 1
    assert norms[0] == pytest.approx(merged.double().norm().item(), rel=1e-6)
    assert norms[-1] == pytest.approx(found.double().norm().item(), rel=1e-6)
    return found


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found.double() - expected.double()).norm() <= tolerance * expected.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_formulas(shape: tuple[int, ...], count: int, scale: float) -> None:
    deltas = make(count, shape)
    merged = scale * sum(deltas[1:], deltas[0])
    exact, exact_merged = [delta.double() for delta in deltas], merged.double()
    for alpha in (0.05, 1 / count, 1.0, 3.0):
        assert close(run(merged, deltas, ("svc", {"alpha": alpha})), svc(exact_merged, exact, alpha))
    assert close(run(merged, deltas, ("svc", {})), svc(exact_merged, exact, 1 / count)), "1 / K by default"
    for beta in (0.0, 0.01, 0.3, 0.9, 1.0):
        assert close(run(merged, deltas, ("subspace_boosting", {"beta": beta})), subspace_boosting(exact_merged, beta))
    assert close(run(merged, deltas, ("rescale", {})), rescale(exact_merged, exact), 1e-6)
    assert close(run(merged, deltas, ("rescale", {"factor": 1.7})), rescale(exact_merged, exact, 1.7), 1e-6)
    assert close(run(merged, deltas, ("rescale", {"factor": 1.7, "match_norm": False})), 1.7 * exact_merged, 1e-6)


def test_what_all_share_is_counted_once() -> None:
    (delta,) = make(1, (20, 30))
    equal = [delta] * 4
    assert close(run(4 * delta, equal, ("svc", {})), delta), "the sum of equal models is the model again"
    assert close(run(delta, equal, ("svc", {})), delta), "their mean stays"
    assert close(run(0.1 * delta, equal, ("svc", {"alpha": 1.0})), 0.1 * delta), "with 1 nothing grows"
    assert close(run(0.1 * delta, equal, ("svc", {"alpha": 1e-3})), delta)
    assert close(run(-delta, equal, ("svc", {"alpha": 0.5})), -2 * delta), "what goes against it counts as alpha"


def test_directions_of_single_models_stay() -> None:
    first, second = torch.zeros(8, 8), torch.zeros(8, 8)
    first[0, 0], second[1, 1] = 3.0, 2.0
    assert close(run(first + second, [first, second], ("svc", {"alpha": 1.0})), first + second), (
        "a response is there or 1"
    )
    grown = run(first + second, [first, second], ("svc", {"alpha": 0.5}))
    assert close(grown, (first + second) * 2 / 1.5), "a model without any counts as alpha"


def test_one_candidate_that_is_the_merge_changes_nothing() -> None:
    (delta,) = make(1, (20, 30))
    assert close(run(delta, [delta], ("svc", {}), ("rescale", {})), delta, 1e-6)


@pytest.mark.parametrize("name", POST_STEPS)
def test_the_order_of_candidates_does_not_count(name: str) -> None:
    deltas = make(4, (20, 30))
    merged = 0.4 * sum(deltas[1:], deltas[0])
    assert close(run(merged, deltas, (name, {})), run(merged, deltas[::-1], (name, {})), 1e-5)


@pytest.mark.parametrize("name", POST_STEPS)
def test_nothing_stays_nothing(name: str) -> None:
    deltas = make(3, (6, 5))
    assert not run(torch.zeros(6, 5), deltas, (name, {})).any()
    zeros = [torch.zeros(6, 5)] * 3
    found = run(deltas[0], zeros, (name, {}))
    assert found.isfinite().all(), "candidates that are the base"


def test_candidates_that_are_the_base_count_as_alpha() -> None:
    deltas = make(2, (20, 30))
    found = run(deltas[0], [deltas[0], torch.zeros(20, 30)], ("svc", {"alpha": 0.5}))
    assert close(found, deltas[0] * 2 / 1.5)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_directions_that_nobody_has_stay_as_they_are(shape: tuple[int, int]) -> None:
    deltas = make(3, shape, rank=2)
    merged = sum(deltas[1:], deltas[0])
    u, s, vh = torch.linalg.svd(merged.double(), full_matrices=False)
    low = u[:, :8] * s[:8] @ vh[:8]
    boosted = run(merged, deltas, ("subspace_boosting", {"beta": 0.0}))
    assert close(boosted, s[0] * u[:, :8] @ vh[:8])
    assert close(merged, low, 1e-5) and torch.linalg.matrix_rank(boosted.double(), rtol=1e-4) == 8
    shares = run(merged, deltas, ("svc", {}))
    expected = sum(
        s[r]
        * 3
        / sum(max(1 / 3, float((u[:, r] @ merged.double()) @ (a := u[:, r] @ d.double()) / (a @ a))) for d in deltas)
        * torch.outer(u[:, r], vh[r])
        for r in range(8)
    )
    assert close(shares, expected, 1e-3)


def test_responses_that_are_rounding_count_as_none() -> None:
    first, second = torch.zeros(64, 64), torch.zeros(64, 64)
    generator = torch.Generator().manual_seed(0)
    first[:32], second[32:] = torch.randn(32, 64, generator=generator), torch.randn(32, 64, generator=generator)
    # Singular vectors of the sum mix both; those of `first` alone know nothing of `second`.
    found = run(first, [first, second], ("svc", {"alpha": 1.0}))
    assert close(found, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits(dtype: torch.dtype) -> None:
    base = torch.randn(24, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    deltas = [(base.float() + delta).to(dtype).float() - base.float() for delta in make(3, (24, 20))]
    merged = sum(deltas[1:], deltas[0])
    exact = [delta.double() for delta in deltas]
    assert close(run(merged, deltas, ("svc", {})), svc(merged.double(), exact, 1 / 3))
    assert close(run(merged, deltas, ("subspace_boosting", {})), subspace_boosting(merged.double(), 0.01))


def test_steps_run_in_order() -> None:
    deltas = make(3, (24, 20))
    exact, merged = [delta.double() for delta in deltas], 0.4 * sum(deltas[1:], deltas[0])
    steps: list[tuple[str, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = [
        ("svc", {"alpha": 0.5}, lambda each: svc(each, exact, 0.5)),
        ("subspace_boosting", {"beta": 0.2}, lambda each: subspace_boosting(each, 0.2)),
        ("rescale", {"factor": 1.1}, lambda each: rescale(each, exact, 1.1)),
    ]
    for order in (steps, [steps[2], steps[0], steps[1]]):  # after boosting, singular vectors are not unique
        expected = merged.double()
        for _, _, formula in order:
            expected = formula(expected)
        assert close(run(merged, deltas, *((name, parameters) for name, parameters, _ in order)), expected)
