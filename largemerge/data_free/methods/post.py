"""Steps after a merge: each changes the merged task vector of a weight matrix, one matrix at a time.

    Δ = W_merged - W_0  [O, I]       step: Δ, Δ_1 … Δ_K, parameters → Δ       the output is W_0 + Δ

Δ_i = W_i - W_0 are the task vectors of the candidates, K of them: the models that the merge is held against. Steps run
one after the other, each on what the one before has made.

    svc                  σ_r ← σ_r · K / Σ_i max(α, s_ir)       what candidates share is counted once
    subspace_boosting    σ_r ← max(σ_r, σ_k)                    small directions are raised
    rescale              Δ ← factor · Δ · mean ‖Δ_i‖ / ‖Δ‖      as long as the candidates' task vectors

U diag(σ) Vᵀ = Δ come from `svd.singular_vectors`, which leaves out directions below a millionth of the largest: the
vectors of an SVD are rounding errors there. Here such directions stay as they are.

Shapes: O outputs (rows), I inputs (columns), R singular values, min(O, I) at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from largemerge.data_free.methods.base import Flag, Kind, Range
from largemerge.singular import FACTOR_DTYPE, singular_vectors

Candidates = Callable[[], Iterator[torch.Tensor]]
"""Yields the task vectors of the candidates, `[O, I]`, float32, one after the other; may be called again."""

EQUAL_VALUES = ("iso_c", "iso_cts", "subspace_boosting")
"""Methods and steps after which many singular values are equal, so that the directions `svc` sees are not unique."""

_SMALLEST_RESPONSE = 1e-5  # of a task vector's norm: a smaller one is what rounding in float32 leaves
_ROUNDING = 1 + 1e-12  # so that `beta: 1` is all of the singular values
_SINGLE, _DOUBLE = 4, 8
_LARGEST_FACTOR = 1e6


@dataclass(frozen=True)
class PostStep:
    """One row of the table.

    Attributes:
        title: The step's name in reports and model cards.
        source: The paper.
        apply: Function from a merged task vector, which it may change in place, the candidates' and the parameters to
            the new one.
        parameters: Parameters with their defaults.
        kinds: What values each of the parameters may have.
        reads_candidates: Function from the parameters to whether the candidates' tensors are needed.
        idle: Function from the parameters to why the step changes nothing; `None` if it does.
    """

    title: str
    source: str
    apply: Callable[[torch.Tensor, Candidates, Mapping[str, Any]], torch.Tensor]
    parameters: Mapping[str, Any]
    kinds: Mapping[str, Kind]
    reads_candidates: Callable[[Mapping[str, Any]], bool] = lambda _: True
    idle: Callable[[Mapping[str, Any]], str | None] = lambda _: None


@dataclass(frozen=True)
class Step:
    """A step with the parameters that it has for one matrix.

    Attributes:
        name: A name in `POST_STEPS`.
        parameters: Values of all its parameters, by name.
    """

    name: str
    parameters: Mapping[str, Any]

    @property
    def reads_candidates(self) -> bool:
        """Whether the candidates' tensors are needed."""
        return POST_STEPS[self.name].reads_candidates(self.parameters)


def apply_steps(
    delta_OI: torch.Tensor, steps: Sequence[Step], candidates: Candidates
) -> tuple[torch.Tensor, list[float]]:
    """Runs all steps on the merged task vector of one matrix.

    Args:
        delta_OI: The merged task vector, float32; it may be changed in place.
        steps: The steps, in order.
        candidates: The candidates' task vectors.

    Returns:
        The new task vector, and the Frobenius norms of the merged one and of what every step has made of it.
    """
    norms = [_norm(delta_OI)]
    for step in steps:
        delta_OI = POST_STEPS[step.name].apply(delta_OI, candidates, step.parameters)
        norms.append(_norm(delta_OI))
    return delta_OI, norms


def post_bytes(rows: int, columns: int) -> int:
    """Computes the peak bytes of the steps beside the merged matrix: eight float32 copies, seven float64 Grams."""
    return 8 * rows * columns * _SINGLE + 7 * min(rows, columns) ** 2 * _DOUBLE


# Steps


def svc(delta_OI: torch.Tensor, candidates: Candidates, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Calibrates singular values, SVC. Li et al., arXiv 2602.05536.

    A direction that several task vectors have is added up in their sum. By how much, the candidates' responses in it
    tell:

        Δ = U diag(σ) Vᵀ        a_r = u_rᵀ Δ        a_ir = u_rᵀ Δ_i  [I]
        s_ir = ⟨a_r, a_ir⟩ / ‖a_ir‖²                 1 where the merge has of the direction what candidate i has
        σ_r ← σ_r · K / Σ_i max(α, s_ir)

    `alpha` is α, 1 / K by default; with 1, as the authors have it after TSV-M, no direction grows. A candidate without
    a response (below 1e-5 of its task vector's norm, which rounding leaves) counts as s = 0.
    """
    u_OR, s_R, v_IR = singular_vectors(delta_OI)
    if len(s_R) == 0:
        return delta_OI
    found: list[torch.Tensor] = []
    for candidate_OI in candidates():
        responses_RI = u_OR.T @ candidate_OI
        squares_R = responses_RI.square().sum(dim=1, dtype=FACTOR_DTYPE)
        inner_R = (responses_RI.mul_(v_IR.T)).sum(dim=1, dtype=FACTOR_DTYPE).mul_(s_R)
        has_none_R = squares_R <= (_SMALLEST_RESPONSE * _norm(candidate_OI)) ** 2
        found.append((inner_R / squares_R.masked_fill(has_none_R, 1)).masked_fill(has_none_R, 0))
    alpha = parameters["alpha"] if parameters["alpha"] is not None else 1 / len(found)
    factor_R = len(found) / torch.stack([shares_R.clamp(min=alpha) for shares_R in found]).sum(dim=0)
    return _add_directions(delta_OI, u_OR, (factor_R - 1) * s_R, v_IR)


def subspace_boosting(delta_OI: torch.Tensor, _: Candidates, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Raises small singular values, subspace boosting. Skorobogat et al., arXiv 2506.16506.

        Δ = U diag(σ) Vᵀ, largest first        k the first with σ_1 + … + σ_k ≥ β Σ σ        σ_r ← max(σ_r, σ_k)

    `beta` is β. With 0 all singular values become the largest, with 1 they stay. Directions that count as 0, as those
    beyond the rank of merged adapters do, are not raised: which vectors these are is left to chance.
    """
    u_OR, s_R, v_IR = singular_vectors(delta_OI)
    if len(s_R) == 0:
        return delta_OI
    reached_R = s_R.cumsum(0) * _ROUNDING >= parameters["beta"] * s_R.sum()
    first = int(reached_R.to(torch.uint8).argmax()) if bool(reached_R.any()) else len(s_R) - 1
    return _add_directions(delta_OI, u_OR, (s_R[first] - s_R).clamp_(min=0), v_IR)


def rescale(delta_OI: torch.Tensor, candidates: Candidates, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Scales the task vector: to `factor` times the mean of the candidates' norms, or by `factor` alone.

        Δ ← factor · Δ · mean_i ‖Δ_i‖ / ‖Δ‖            without `match_norm`: Δ ← factor · Δ

    Norms are Frobenius norms, of this matrix alone. This is the calibration in weight space of MAGIC, arXiv 2512.19320,
    with its ρ for `factor`. A task vector of 0 stays.
    """
    factor = parameters["factor"]
    if parameters["match_norm"]:
        own, norms = _norm(delta_OI), [_norm(each) for each in candidates()]
        factor *= sum(norms) / len(norms) / own if own else 0.0
    return delta_OI.mul_(factor)


def _norm(delta_OI: torch.Tensor) -> float:
    """Computes the Frobenius norm in float64."""
    return float(torch.linalg.vector_norm(delta_OI, dtype=FACTOR_DTYPE).item())


def _add_directions(
    delta_OI: torch.Tensor, u_OR: torch.Tensor, change_R: torch.Tensor, v_IR: torch.Tensor
) -> torch.Tensor:
    """Computes Δ + U diag(change) Vᵀ in place of Δ; `u_OR` is lost."""
    return delta_OI.addmm_(u_OR.mul_(change_R.to(torch.float32)), v_IR.T)


POST_STEPS: dict[str, PostStep] = {
    "svc": PostStep(
        "Singular value calibration (SVC)",
        "arXiv 2602.05536",
        svc,
        {"alpha": None},
        {"alpha": Range(0, _LARGEST_FACTOR, above=True)},
    ),
    "subspace_boosting": PostStep(
        "Subspace boosting",
        "arXiv 2506.16506",
        subspace_boosting,
        {"beta": 0.01},
        {"beta": Range(0, 1)},
        reads_candidates=lambda _: False,
        idle=lambda parameters: "beta: 1" if parameters["beta"] == 1 else None,
    ),
    "rescale": PostStep(
        "Rescaling",
        "arXiv 2512.19320",
        rescale,
        {"match_norm": True, "factor": 1.0},
        {"match_norm": Flag(), "factor": Range(0, _LARGEST_FACTOR, above=True)},
        reads_candidates=lambda parameters: bool(parameters["match_norm"]),
        idle=lambda parameters: (
            "factor: 1 without match_norm" if not parameters["match_norm"] and parameters["factor"] == 1 else None
        ),
    ),
}
"""The steps that `post` may list, by name."""
