"""Solving for a merged weight, anchored at the average.

    minimise over W   Σ_i tr[(W - W_i) G̃_i (W - W_i)ᵀ] + λ ‖W - W̄‖²        W̄ = Σ c_i W_i / Σ c_i

With an anchor A (any weight near the others), E_i = W_i - A and G = Σ G̃_i, the minimum is

    W* = A + X        X (G + λI) = Σ_i E_i G̃_i + λ Ē        λ = ridge · mean(diag G)

Rounding errors scale with the differences E_i, not with the weights, and where the data says nothing X is Ē:
the average, not zero. The system is scaled to a unit diagonal first; features that never fire (a zero on the
diagonal) get the average exactly.

Tried in turn: Cholesky in float32; Cholesky in float64, where the factorisation fails, the system is ill
conditioned, or the residual is poor; eigenvalues in float64. The last solves only in directions that stand out of
the rounding noise of a float32 Gram matrix, and takes the average in all others; it comes first where there are
fewer tokens than inputs, so that no factorisation can be trusted. Each step away from the first is named.

Shapes: I inputs of a linear, O outputs (of all linears that share the Gram, one after another), V probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MOST_CONDITION = {torch.float32: 1e6, torch.float64: 1e8}
_MOST_RESIDUAL = {torch.float32: 1e-5, torch.float64: 1e-8}
_NOISE = 8 * torch.finfo(torch.float32).eps  # of a float32 Gram's eigenvalues, in parts of the largest
_NUM_PROBES = 4
_NUM_ITERATIONS = 4


@dataclass(frozen=True)
class Solution:
    """The update of a weight, and how it was found.

    Attributes:
        update_OI: X above, float32.
        solver: `cholesky_float32`, `cholesky_float64` or `eigenvalues_float64`.
        condition: Estimate for the system scaled to a unit diagonal, from a few power iterations; for eigenvalues
            that of the part that is solved.
        residual: Estimate of ‖B - XA‖ / ‖B‖, from random probes.
        fallbacks: Why each earlier try was not good enough.
        num_dead_features: Inputs that never fired in any candidate's data.
    """

    update_OI: torch.Tensor
    solver: str
    condition: float
    residual: float
    fallbacks: tuple[str, ...]
    num_dead_features: int


@dataclass(frozen=True)
class _System:
    """X A = B with A = D (G + λI) D, B = (R + λĒ) D, X = update · D⁻¹; D gives A a unit diagonal, or is I."""

    system_II: torch.Tensor
    rhs_IO: torch.Tensor
    mean_IO: torch.Tensor
    scale_I: torch.Tensor


@dataclass(frozen=True)
class _Found:
    scaled_IO: torch.Tensor
    condition: float
    residual: float


class _NotGoodEnoughError(Exception):
    """Why a try is not taken."""


def solve_anchored(
    gram_II: torch.Tensor, rhs_OI: torch.Tensor, mean_OI: torch.Tensor, ridge: float, most_rank: int | None = None
) -> Solution:
    """Solves X (G + λI) = R + λĒ for X.

    Args:
        gram_II: G, the sum of the candidates' Gram matrices, symmetric, float32.
        rhs_OI: R, the sum of E_i G̃_i.
        mean_OI: Ē, the weighted average of the E_i.
        ridge: λ as a fraction of the mean diagonal of G.
        most_rank: The rank that G can have at most, if that is known.

    Raises:
        FloatingPointError: If G or R is not finite.
    """
    diagonal_I = gram_II.diagonal()
    if not torch.isfinite(diagonal_I).all() or not torch.isfinite(rhs_OI).all():
        raise FloatingPointError("sums are not finite")
    fallbacks: list[str] = []
    attempts = [
        ("cholesky_float32", torch.float32, _by_cholesky),
        ("cholesky_float64", torch.float64, _by_cholesky),
        ("eigenvalues_float64", torch.float64, _by_eigenvalues),
    ]
    if most_rank is not None and most_rank < gram_II.shape[0]:
        fallbacks.append(
            f"{most_rank} tokens for {gram_II.shape[0]} inputs: directions that they leave out are averaged"
        )
        attempts = attempts[2:]
    for name, dtype, attempt in attempts:
        # Not scaled for eigenvalues: what is orthogonal to the data must stay so.
        system = _system(gram_II, rhs_OI, mean_OI, ridge, dtype, scaled=attempt is _by_cholesky)
        try:
            found = attempt(system)
        except _NotGoodEnoughError as error:
            fallbacks.append(f"{name}: {error}")
            continue
        update_OI = found.scaled_IO.mul_(system.scale_I[:, None]).T.to(torch.float32, copy=True).contiguous()
        num_dead = int((diagonal_I == 0).sum())
        return Solution(update_OI, name, found.condition, found.residual, tuple(fallbacks), num_dead)
    raise AssertionError("eigenvalues always give a solution")


def _system(
    gram_II: torch.Tensor,
    rhs_OI: torch.Tensor,
    mean_OI: torch.Tensor,
    ridge: float,
    dtype: torch.dtype,
    *,
    scaled: bool,
) -> _System:
    dead_I = gram_II.diagonal() == 0
    shift = ridge * gram_II.diagonal().mean(dtype=torch.float64).item()
    # In place as far as possible: the largest systems must not be in memory more often than needed.
    system_II = gram_II.to(dtype, copy=True)
    system_II.diagonal().add_(shift)
    rhs_IO = (rhs_OI.to(dtype) + shift * mean_OI.to(dtype)).T.contiguous()
    mean_IO = mean_OI.T.to(dtype)
    if shift == 0:
        system_II.diagonal()[dead_I] = 1
        rhs_IO[dead_I] = mean_IO[dead_I]
    if not scaled:
        return _System(system_II, rhs_IO, mean_IO, torch.ones_like(system_II[0]))
    scale_I = system_II.diagonal().rsqrt()
    system_II.mul_(scale_I).mul_(scale_I[:, None])
    return _System(system_II, rhs_IO.mul_(scale_I[:, None]), mean_IO, scale_I)


def _by_cholesky(system: _System) -> _Found:
    dtype = system.system_II.dtype
    factor_II, info = torch.linalg.cholesky_ex(system.system_II)
    if int(info) > 0:
        raise _NotGoodEnoughError(f"not positive definite at row {int(info)}")
    condition = estimate_condition(system.system_II, factor_II)
    if not condition <= _MOST_CONDITION[dtype]:
        raise _NotGoodEnoughError(f"condition {condition:.1e}")
    scaled_IO = torch.cholesky_solve(system.rhs_IO, factor_II)
    residual = _estimate_residual(system.system_II, scaled_IO, system.rhs_IO)
    if not residual <= _MOST_RESIDUAL[dtype]:
        raise _NotGoodEnoughError(f"residual {residual:.1e}")
    return _Found(scaled_IO, condition, residual)


def _by_eigenvalues(system: _System) -> _Found:
    """The solution nearest to the average, in the directions whose eigenvalues stand out of the noise."""
    values_I, vectors_II = torch.linalg.eigh(system.system_II)
    kept = values_I > _NOISE * values_I[-1]
    values_K, vectors_IK = values_I[kept], vectors_II[:, kept]
    mean_IO = system.mean_IO / system.scale_I[:, None]
    change_KO = vectors_IK.T @ (system.rhs_IO - system.system_II @ mean_IO)
    scaled_IO = mean_IO + vectors_IK @ (change_KO / values_K[:, None])
    left_KO = vectors_IK.T @ (system.rhs_IO - system.system_II @ scaled_IO)
    norm = (vectors_IK.T @ system.rhs_IO).norm().item()
    return _Found(scaled_IO, (values_K[-1] / values_K[0]).item(), left_KO.norm().item() / norm if norm > 0 else 0.0)


def estimate_condition(system_II: torch.Tensor, factor_II: torch.Tensor) -> float:
    """Largest over smallest eigenvalue, from power iterations with the matrix and with its inverse.

    Args:
        system_II: Symmetric, positive definite.
        factor_II: Its lower Cholesky factor.
    """
    probes_IV = _probes(system_II)
    largest_IV, smallest_IV = probes_IV, probes_IV
    for _ in range(_NUM_ITERATIONS):
        largest_IV = torch.nn.functional.normalize(system_II @ largest_IV, dim=0)
        smallest_IV = torch.nn.functional.normalize(torch.cholesky_solve(smallest_IV, factor_II), dim=0)
    largest = (largest_IV * (system_II @ largest_IV)).sum(0).max().item()
    smallest = 1 / (smallest_IV * torch.cholesky_solve(smallest_IV, factor_II)).sum(0).max().item()
    return largest / smallest if smallest > 0 else float("inf")


def _estimate_residual(system_II: torch.Tensor, solution_IO: torch.Tensor, rhs_IO: torch.Tensor) -> float:
    """‖(B - AX)ᵀ v‖ / ‖Bᵀ v‖ over random v, which estimates the ratio of Frobenius norms."""
    probes_IV = _probes(system_II)
    right_OV = rhs_IO.T @ probes_IV
    error_OV = right_OV - solution_IO.T @ (system_II @ probes_IV)
    norm = right_OV.norm().item()
    return error_OV.norm().item() / norm if norm > 0 else 0.0


def _probes(like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (like.shape[0], _NUM_PROBES), generator=generator) * 2 - 1
    return signs.to(like)
