"""Methods that take a task vector for what is known of the task's inputs: WUDI, ACE. They solve what RegMean solves.

    Δ_i = W_i - W_0  [O, I]           G_i ∝ Δ_iᵀ Δ_i  [I, I]           M = ( Σ Δ_i G_i ) ( Σ G_i )⁻¹

The rows of a linear's gradient are inputs of that linear, weighed, and so are those of its task vector: Δ_iᵀ Δ_i stands
for the Gram matrix of inputs that nobody has. Sums and solves are float64. Weights are `[O, I]`: a layer that stores
`[I, O]` (GPT-2's) is transposed before and after.

Shapes: O outputs, I inputs, K models.
"""

from __future__ import annotations

import math

import torch

from largemerge.data_free.methods.base import Piece
from largemerge.singular import FACTOR_DTYPE, gram, singular_vectors, sum_of_squares

UNLIMITED = "unlimited"
"""The `exp_time` of WUDI's minimum itself."""

_RIDGE = 1e-11  # of the mean diagonal element: what makes the minimum unique where it is not
_SMALLEST_EIGENVALUE = 1e-12  # of the largest one: smaller ones count as 0
_MAX_LENGTH = 10.0  # of what ACE merges, in lengths of all task vectors together
_TINY = 1e-12  # keeps divisors and arguments of logarithms from 0


def wudi(piece: Piece) -> torch.Tensor:
    """Merges by WUDI: W_0 + M(t), where M(t) goes from Σ Δ_i towards argmin Σ ‖(M - Δ_i) Δ_iᵀ‖² / ‖Δ_i‖².

        H_i = Δ_iᵀ Δ_i / ‖Δ_i‖²          H = Σ H_i = V Λ Vᵀ          D = Σ Δ_i H_i          M(0) = Σ Δ_i

    Cheng et al., arXiv 2503.08099, take 300 steps of Adam, each of 1e-5 (FusionBench: 400), and stop before the minimum
    is reached. Half the loss has the gradient M H - D, so that descent in small steps is, after the time t,

        M(t) = M(0) + (D - M(0) H) V g(Λ) Vᵀ          g(λ) = (1 - exp(-tλ)) / λ,  or t where λ is 0

    which is SWUDI's exponential filter (Wei et al., arXiv 2606.07289, and their program): small λ, in which few rows of
    task vectors say what the inputs are, are left where they began. t is `exp_time`. SWUDI also keeps only the largest
    λ, a share of `truncate_rank_ratio` of all that there are, rounded up: for the others g is 0.

    With `exp_time: unlimited` g(λ) is 1/λ, or 0 where λ counts as 0. Of all λ that is the minimum itself, D H⁺, of
    least norm where there are several: where no task vector lies, M is 0. It comes from a Cholesky factor, without
    eigenvalues. Task vectors that are 0 do not count.
    """
    time, ratio = piece.shared["exp_time"], piece.shared["truncate_rank_ratio"]
    filtered = time != UNLIMITED or ratio < 1
    outputs, inputs = piece.origin.shape
    sums_II = piece.origin.new_zeros(inputs, inputs, dtype=FACTOR_DTYPE)
    right_OI = piece.origin.new_zeros(outputs, inputs, dtype=FACTOR_DTYPE)
    start_OI = torch.zeros_like(right_OI) if filtered else right_OI
    for model in range(len(piece.tensors)):
        delta = piece.task_vector(model).to(FACTOR_DTYPE)
        square = delta.square().sum()
        if square == 0:
            continue
        if filtered:
            start_OI += delta
        gram_II = gram(delta).div_(square)
        sums_II += gram_II
        if 2 * outputs < inputs:
            right_OI.addmm_(gram(delta.T), delta / square)
        else:
            right_OI.addmm_(delta, gram_II)
        del delta, gram_II
    if not filtered:
        return _solve_symmetric(right_OI, sums_II).to(torch.float32).add_(piece.origin)
    right_OI.addmm_(start_OI, sums_II, alpha=-1)
    return start_OI.add_(_filtered(right_OI, sums_II, time, ratio)).to(torch.float32).add_(piece.origin)


def _filtered(right_OI: torch.Tensor, sums_II: torch.Tensor, time: float | str, ratio: float) -> torch.Tensor:
    """Computes B V g(Λ) Vᵀ `[O, I]`, see `wudi`, of the largest eigenvalues of V Λ Vᵀ.

    Args:
        right_OI: B.
        sums_II: V Λ Vᵀ.
        time: t, or `unlimited`.
        ratio: Share of the eigenvalues whose g is not 0.
    """
    kept = max(1, math.ceil(round(len(sums_II) * ratio, 6)))  # 0.55 of 100 are 55, whatever the product's last bit
    values_R, vectors_IR = (part[..., -kept:] for part in torch.linalg.eigh(sums_II))
    values_R = values_R.clamp(min=0)
    if time == UNLIMITED:
        known = values_R > _SMALLEST_EIGENVALUE * values_R[-1]
        filter_R = torch.where(known, 1 / values_R, 0.0)
    else:
        time = float(time)
        # What is lost of λ where tλ is tiny changes nothing: there g is t.
        small = values_R * time < _TINY
        filter_R = torch.where(small, time, -torch.expm1(-time * values_R) / values_R)
    return torch.mm(torch.mm(right_OI, vectors_IR).mul_(filter_R), vectors_IR.T)


def _solve_symmetric(right_OI: torch.Tensor, sums_II: torch.Tensor) -> torch.Tensor:
    """Computes B A⁺ `[O, I]`, where the rows of B, on the right side, lie in the range of A, the sums.

    By Cholesky it is B A (A + λ)⁻², λ = 1e-11 of A's mean diagonal element: in directions that A does not know, the
    first division makes little of B's rounding errors, the second one nothing. Where rounding has made A indefinite,
    B A⁺ comes from A's eigenvalues.
    """
    mean = sums_II.diagonal().mean()
    if mean == 0:
        return torch.zeros_like(right_OI)
    ridge = _RIDGE * mean
    damped_II = sums_II.clone()
    damped_II.diagonal().add_(ridge)
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    del damped_II
    if not failed:
        once_IO = torch.cholesky_solve(right_OI.T, lower_II)
        return once_IO.sub_(torch.cholesky_solve(once_IO, lower_II).mul_(ridge)).T
    del lower_II
    values_I, vectors_II = torch.linalg.eigh(sums_II)
    known = values_I > _SMALLEST_EIGENVALUE * values_I[-1]
    vectors_II = vectors_II[:, known]
    return torch.mm(torch.mm(right_OI, vectors_II) / values_I[known], vectors_II.T)


def ace(piece: Piece) -> torch.Tensor:
    """Merges by ACE, adaptive covariance estimation: W_0 + scaling_coefficient · M. Xu et al., arXiv 2603.02945.

        Δ̃_i = Δ_i - their mean row              Σ_i = Δ̃_iᵀ Δ̃_i, divided by its trace t_i where tasks are unlike
        R_i = Σ_i + eps·1, or + eps/t_i·1        cᵀ = mean row of Σ Σ_i, divided by mean ‖Δ_i‖² where tasks are unlike
        M₀ = ( Σ Δ̃_i R_i ) ( Σ R_i + 1cᵀ )⁻¹     every row of 1cᵀ is cᵀ

    Tasks are unlike if Var(log ‖Δ_i‖²) / mean(log ‖Δ_i‖²)² > `heterogeneity`. Then M = M₀ + s̄ U Vᵀ, where U and V
    belong to the `k_frac` largest singular values of M₀ + Σ Δ_i (Σ_i - ΣR_i/K), and s̄ is their mean; else M = M₀.

    As its authors' program has it, and a transcription of the paper's equations. The names of `eps` and `k_frac` and
    all defaults are the program's; the threshold has no name there. Models whose Δ̃_i is zeros add nothing and are no
    task here: there, eps/t_i would be without bounds.

    Raises:
        FloatingPointError: If M is far longer than all Δ_i together, since eps/t_i is large.
    """
    parameters = piece.shared
    models = [model for model in range(len(piece.tensors)) if _has_rows_of_its_own(piece.task_vector(model))]
    count = len(models)
    if not models:
        return piece.origin.to(torch.float32, copy=True)
    squares = torch.tensor([sum_of_squares(piece.task_vector(model)) for model in models], dtype=FACTOR_DTYPE)
    unlike = _heterogeneity(squares) > parameters["heterogeneity"]
    outputs, inputs = piece.origin.shape
    sums_II = piece.origin.new_zeros(inputs, inputs, dtype=FACTOR_DTYPE)
    right_OI, total_OI, extra_OI = (piece.origin.new_zeros(outputs, inputs, dtype=FACTOR_DTYPE) for _ in range(3))
    ridges = 0.0
    for model in models:
        delta = piece.task_vector(model).to(FACTOR_DTYPE)
        centred = delta - delta.mean(dim=0, keepdim=True)
        gram_II = gram(centred)
        trace = gram_II.trace().item() + _TINY
        ridge = parameters["eps"] / trace if unlike else parameters["eps"]
        if unlike:
            gram_II /= trace
            total_OI += delta
            extra_OI.addmm_(delta, gram_II)
        sums_II += gram_II
        right_OI.addmm_(centred, gram_II).add_(centred, alpha=ridge)
        ridges += ridge
    prior_I = sums_II.mean(dim=0) / (squares.mean().item() + _TINY if unlike else 1.0)
    sums_II.diagonal().add_(ridges)
    merged_OI = torch.linalg.solve(sums_II + prior_I, right_OI, left=False)
    if unlike:
        fused_OI = merged_OI + extra_OI - total_OI @ sums_II / count
        u_OR, s_R, v_IR = singular_vectors(fused_OI.to(torch.float32), int(min(outputs, inputs) * parameters["k_frac"]))
        merged_OI += (u_OR @ v_IR.T).mul_(s_R.mean().item() if len(s_R) else 0.0)
    length = merged_OI.norm().item() / squares.sqrt().sum().item()
    if unlike and length > _MAX_LENGTH:
        raise FloatingPointError(
            f"what is merged is {length:.3g} times as long as all task vectors together, since eps, "
            f"{parameters['eps']:g}, is large beside the shortest one's ‖Δ‖², {squares.min().item():.3g}; expected a "
            "smaller eps, or a larger heterogeneity, above which tasks are unlike"
        )
    merged: torch.Tensor = merged_OI.mul_(parameters["scaling_coefficient"]).to(torch.float32)
    return merged.add_(piece.origin)


def _has_rows_of_its_own(delta_OI: torch.Tensor) -> bool:
    """Whether rows of Δ_i differ, so that Δ̃_i is not zeros."""
    return bool((delta_OI != delta_OI[:1]).any())


def _heterogeneity(squares_K: torch.Tensor) -> float:
    """Computes Var(log ‖Δ_i‖²) / mean(log ‖Δ_i‖²)² from the ‖Δ_i‖²; 0 for a single task."""
    if len(squares_K) == 1:
        return 0.0
    logarithms = (squares_K + _TINY).log()
    return (logarithms.var() / (logarithms.mean().square() + _TINY)).item()
