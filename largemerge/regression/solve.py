"""Solving for a merged weight, anchored at the average.

    minimise over W   Σ_i tr[(W - W_i) G̃_i (W - W_i)ᵀ] + λ ‖W - W̄‖²        W̄ = Σ c_i W_i / Σ c_i

With an anchor A (any weight near the others), E_i = W_i - A and G = Σ G̃_i, the minimum is

    W* = A + X        X (G + λI) = Σ_i E_i G̃_i + λ Ē        λ = ridge · mean(diag G)

Rounding errors scale with the differences E_i, not with the weights, and where the data says nothing X is Ē:
the average, not zero. The system is scaled to a unit diagonal first; features that never fire (a zero on the
diagonal) get the average exactly.

Tried in turn: Cholesky in float32; in float64, where the factorisation fails, the system is ill conditioned,
or the residual is poor; float64 with more ridge, in steps of ten. Each step away from the first is named in
the result.

Shapes: I inputs of a linear, O outputs (of all linears that share the Gram, one after another), V probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MOST_CONDITION = {torch.float32: 1e6, torch.float64: 1e13}
_MOST_RESIDUAL = {torch.float32: 1e-5, torch.float64: 1e-8}
_LEAST_EXTRA_RIDGE = 1e-9
_MOST_EXTRA_RIDGE = 1e-1
_NUM_PROBES = 4
_NUM_ITERATIONS = 4


@dataclass(frozen=True)
class Solution:
    """The update of a weight, and how it was found.

    Attributes:
        update_OI: X above, float32.
        solver: `cholesky_float32` or `cholesky_float64`.
        ridge: The λ used, as a fraction of the mean diagonal.
        condition: Estimate for the system scaled to a unit diagonal, from a few power iterations.
        residual: Estimate of ‖B - XA‖ / ‖B‖, from random probes.
        fallbacks: Why each earlier try was not good enough.
        num_dead_features: Inputs that never fired in any candidate's data.
    """

    update_OI: torch.Tensor
    solver: str
    ridge: float
    condition: float
    residual: float
    fallbacks: tuple[str, ...]
    num_dead_features: int


@dataclass(frozen=True)
class _Try:
    update_OI: torch.Tensor | None
    condition: float
    residual: float
    problem: str | None


def solve_anchored(gram_II: torch.Tensor, rhs_OI: torch.Tensor, mean_OI: torch.Tensor, ridge: float) -> Solution:
    """Solves X (G + λI) = R + λĒ for X.

    Args:
        gram_II: G, the sum of the candidates' Gram matrices, symmetric, float32.
        rhs_OI: R, the sum of E_i G̃_i.
        mean_OI: Ē, the weighted average of the E_i.
        ridge: λ as a fraction of the mean diagonal of G.

    Raises:
        FloatingPointError: If G or R is not finite, or no ridge up to a tenth of the diagonal helps.
    """
    diagonal_I = gram_II.diagonal()
    if not torch.isfinite(diagonal_I).all() or not torch.isfinite(rhs_OI).all():
        raise FloatingPointError("sums are not finite")
    dead_I = diagonal_I == 0
    num_dead = int(dead_I.sum())
    fallbacks: list[str] = []
    attempts = [(torch.float32, ridge), (torch.float64, ridge)]
    extra = max(_LEAST_EXTRA_RIDGE, ridge)
    while extra < _MOST_EXTRA_RIDGE:
        extra *= 10
        attempts.append((torch.float64, extra))
    for dtype, fraction in attempts:
        tried = _attempt(gram_II, rhs_OI, mean_OI, dead_I, fraction, dtype)
        name = f"cholesky_{str(dtype).removeprefix('torch.')}"
        if tried.update_OI is not None:
            update_OI = tried.update_OI
            return Solution(update_OI, name, fraction, tried.condition, tried.residual, tuple(fallbacks), num_dead)
        fallbacks.append(f"{name} with ridge {fraction:.1e}: {tried.problem}")
    raise FloatingPointError("; ".join(fallbacks))


def _attempt(
    gram_II: torch.Tensor,
    rhs_OI: torch.Tensor,
    mean_OI: torch.Tensor,
    dead_I: torch.Tensor,
    ridge: float,
    dtype: torch.dtype,
) -> _Try:
    shift = ridge * gram_II.diagonal().mean(dtype=torch.float64).item()
    # From here on in place: the largest systems must not be in memory more often than needed.
    system_II = gram_II.to(dtype, copy=True)
    system_II.diagonal().add_(shift)
    if shift == 0:
        system_II.diagonal()[dead_I] = 1
    scale_I = system_II.diagonal().rsqrt()
    system_II.mul_(scale_I).mul_(scale_I[:, None])
    rhs_IO = (rhs_OI.to(dtype) + shift * mean_OI.to(dtype)).T.contiguous()
    if shift == 0:
        rhs_IO[dead_I] = mean_OI.T[dead_I].to(dtype)
    rhs_IO.mul_(scale_I[:, None])
    factor_II, info = torch.linalg.cholesky_ex(system_II)
    if int(info) > 0:
        return _Try(None, float("inf"), float("inf"), f"not positive definite at row {int(info)}")
    solution_IO = torch.cholesky_solve(rhs_IO, factor_II)
    condition = estimate_condition(system_II, factor_II)
    residual = _estimate_residual(system_II, solution_IO, rhs_IO)
    if not (condition <= _MOST_CONDITION[dtype]):
        return _Try(None, condition, residual, f"condition {condition:.1e}")
    if not (residual <= _MOST_RESIDUAL[dtype]):
        return _Try(None, condition, residual, f"residual {residual:.1e}")
    update_OI = solution_IO.mul_(scale_I[:, None]).T.to(torch.float32, copy=True)
    return _Try(update_OI.contiguous(), condition, residual, None)


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
