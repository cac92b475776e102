"""Methods that merge the singular vectors of task vectors: TSV-M, Iso-C, Iso-CTS, IP-Merging, ResMerge, OPCM.

    Δ_i = W_i - W_0 = U_i S_i V_iᵀ                 of a weight matrix, `[O, I]`

TSV-M, Iso-C and Iso-CTS merge all models at once. ResMerge adds up parts of one after the other, and OPCM merges one
after the other, each orthogonally to what is merged already: what they keep does not grow with the number of models.

Singular vectors and polar factors are those of `largemerge.singular`: directions whose singular values count as 0 are
left out.

Shapes: O outputs (rows), I inputs (columns), R singular values, min(O, I) at most, K models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from largemerge.data_free.methods.base import Piece, UnscaledDelta
from largemerge.singular import SMALLEST_VALUE, polar_factor, singular_vectors, sum_of_squares

_ROUNDING = 1 + 1e-12  # so that OPCM's `alpha: 1` is all of the singular values


# Methods


def sum_of_task_vectors(piece: Piece) -> torch.Tensor:
    """Computes Σ Δ_i, float32; one model is read after the other."""
    total = piece.task_vector(0)
    for model in range(1, len(piece.tensors)):
        total.add_(piece.task_vector(model))
    return total


def mean_of_task_vectors(scale: str | None = None) -> Callable[[Piece], torch.Tensor]:
    """Makes the merge of tensors that are no weight matrices: W_0 + scale · Σ Δ_i / K.

    Args:
        scale: Name of the shared parameter that scales; `None` for a scale of 1.
    """

    def merge(piece: Piece) -> torch.Tensor:
        factor = 1.0 if scale is None else piece.shared[scale]
        return sum_of_task_vectors(piece).mul_(factor / len(piece.tensors)).add_(piece.origin)

    return merge


def tsv_m(piece: Piece) -> torch.Tensor:
    """Merges task singular vectors, TSV-M: W_0 + alpha · Ũ S Ṽᵀ. Gargiulo et al., arXiv 2412.00081.

    Of every task vector the R // K largest singular values and their vectors; side by side,

        U = [U_1 … U_K]  [O, K·(R//K)]      V = [V_1 … V_K]  [I, K·(R//K)]      S = diag(S_1 … S_K)

    and each of U and V is replaced by the nearest matrix with orthonormal columns: Ũ = P Qᵀ where U = P D Qᵀ.
    """
    rank = min(piece.origin.shape) // len(piece.tensors)
    found = [singular_vectors(piece.task_vector(model), rank) for model in range(len(piece.tensors))]
    lefts, values, rights = zip(*found, strict=True)
    left = polar_factor(torch.cat(lefts, dim=1))[0].mul_(torch.cat(values).to(torch.float32))
    right = polar_factor(torch.cat(rights, dim=1))[0]
    return (left @ right.T).mul_(piece.shared["alpha"]).add_(piece.origin)


def iso_c(piece: Piece) -> torch.Tensor:
    """Merges isotropically in the common subspace, Iso-C. Marczak et al., arXiv 2502.04959.

    The result is W_0 + scaling_factor · s̄ U Vᵀ, where U S Vᵀ = Σ Δ_i, and all singular values become their mean s̄.
    """
    total = sum_of_task_vectors(piece)
    factor, values = polar_factor(total)
    mean = values.sum().item() / min(total.shape)
    return factor.mul(mean * piece.shared["scaling_factor"]).add_(piece.origin)


def iso_cts(piece: Piece) -> torch.Tensor:
    """Merges isotropically in common and task-specific subspaces, Iso-CTS. Marczak et al., arXiv 2502.04959.

    Of U S Vᵀ = Σ Δ_i the C largest singular values and their vectors stay; of every (1 - U_C U_Cᵀ) Δ_i the T largest
    come beside them, C + K·T = R. Then, as in TSV-M and Iso-C,

        W_0 + scaling_factor · s̄ Ũ Ṽᵀ          s̄ the mean of all R singular values

    with Ũ and Ṽ the nearest matrices with orthonormal columns. T = round((R - C₀) / K), C₀ = R · common_space_fraction.
    """
    size, count = min(piece.origin.shape), len(piece.tensors)
    own = round((size - int(size * piece.shared["common_space_fraction"])) / count)
    own = min(own, size // count)
    common = size - own * count
    left, values, right = singular_vectors(sum_of_task_vectors(piece), common)
    lefts, all_values, rights = [left], [values], [right]
    for model in range(count if own else 0):
        delta = piece.task_vector(model)
        delta.sub_(left @ (left.T @ delta))
        for each, parts in zip(singular_vectors(delta, own), (lefts, all_values, rights), strict=True):
            parts.append(each)
    mean = torch.cat(all_values).sum().item() / size
    merged = polar_factor(torch.cat(lefts, dim=1))[0] @ polar_factor(torch.cat(rights, dim=1))[0].T
    return merged.mul_(mean * piece.shared["scaling_factor"]).add_(piece.origin)


def resmerge(piece: Piece) -> torch.Tensor:
    """Merges residuals of task vectors, and a little of their heads, ResMerge: W_0 + A + C. arXiv 2606.02252.

        Δ_i = H_i + R_i          H_i: the `rank_topk` largest singular values
        q_i = R_i / ‖R_i‖        q = Σ q_i / ‖Σ q_i‖        c = mean <q_i, q>        s = mean <q_i, q_j> over pairs
        A = c^β · mean ‖R_i‖ · q          β goes from `src_beta_max` down to `src_beta_min` with (s + c + 2) / 4
        C = head_ratio_budget · p ‖A‖ · Σ H_i / ‖Σ H_i‖          p = mean max(0, cos(H_i, H_j)) over pairs

    If c is 1 / √K or less, as it is of directions that have nothing in common, A is the mean of R_i. For experts from
    reinforcement learning, whose heads are in each other's way. Names and numbers are those of the authors' program; it
    takes (s + c + 2) / 4 for 0 in matrices that belong neither to attention nor to an MLP. A residual that is below a
    millionth of its task vector counts as 0, and so do its cosines.
    """
    rank, count = piece.shared["rank_topk"], len(piece.tensors)
    directions, residuals, heads = (torch.zeros_like(piece.origin, dtype=torch.float32) for _ in range(3))
    norms, factors = [], []
    for model in range(count):
        delta = piece.task_vector(model)
        norm = math.sqrt(sum_of_squares(delta))
        left, values, right = singular_vectors(delta, rank)
        factors.append((left * (values / values.norm()).to(torch.float32), right))
        head = (left * values.to(torch.float32)) @ right.T
        heads += head
        delta -= head
        del head
        norms.append(math.sqrt(sum_of_squares(delta)))
        if norms[-1] <= SMALLEST_VALUE * norm:
            norms[-1] = 0.0
            continue
        residuals += delta
        directions.add_(delta, alpha=1 / norms[-1])
        del delta
    length = math.sqrt(sum_of_squares(directions))
    coherence = min(length / count, 1.0)
    if coherence <= 1 / math.sqrt(count) and count > 1:
        merged = residuals.div_(count)
    else:
        # Of Σ q_i the square is the sum of all <q_i, q_j>, those with themselves among them.
        alike = (length**2 - sum(norm > 0 for norm in norms)) / (count * (count - 1)) if count > 1 else 1.0
        low, high = piece.shared["src_beta_min"], piece.shared["src_beta_max"]
        beta = high - (high - low) * min(max((alike + coherence + 2) / 4, 0.0), 1.0)
        merged = directions.mul_(coherence**beta * sum(norms) / count / length if length else 0.0)
    size, total = math.sqrt(sum_of_squares(heads)), math.sqrt(sum_of_squares(merged))
    budget = piece.shared["head_ratio_budget"] * _mean_agreement(factors)
    return merged.add_(heads, alpha=budget * total / size if size else 0.0).add_(piece.origin)


def _mean_agreement(factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Computes the mean of max(0, <X_i, X_j>) over pairs of matrices that are not 0; 1 of one alone, 0 of none.

    Args:
        factors: Left `[O, R]` and right `[I, R]` factors of every matrix, of norm 1; R is 0 where it is 0.
    """
    known = [pair for pair in factors if pair[1].shape[1]]
    cosines = [
        ((left.T @ other_left) * (right.T @ other_right)).sum().item()
        for i, (left, right) in enumerate(known)
        for other_left, other_right in known[:i]
    ]
    return sum(max(0.0, cosine) for cosine in cosines) / len(cosines) if cosines else float(len(known) == 1)


def ip_merging(piece: Piece) -> torch.Tensor:
    """Merges what a second model knows into the first one's subspace, IP-Merging. Hu et al., arXiv 2510.14387.

        U S Vᵀ = Δ_1        U' S' V'ᵀ = Δ_2        of the `rank` largest singular values, largest first
        c_r = |v_rᵀ v'_r|          p = softmax(temperature · c)          Q = V diag(p)
        W_1 + scale · (Σ S / Σ S') · Δ_2 Q Qᵀ          where max c ≥ threshold, else W_1 as it is

    The first model is one that goes on from the base in another way, such as a vision-language model whose language
    part the base was; the second is an expert of the base. The absolute value is ours: a singular vector has no sign
    of its own.
    """
    first, rank = piece.tensors[0].to(torch.float32), piece.shared["rank"]
    _, s_R, v_IR = singular_vectors(piece.task_vector(0), rank)
    delta_OI = piece.task_vector(1)
    _, other_R, other_IR = singular_vectors(delta_OI, rank)
    count = min(len(s_R), len(other_R))
    cosines_R = (v_IR[:, :count] * other_IR[:, :count]).sum(0).abs()
    if count == 0 or cosines_R.max() < piece.shared["threshold"]:
        return first
    shares_R = torch.softmax(piece.shared["temperature"] * cosines_R, dim=0)
    q_IR = v_IR[:, :count] * shares_R
    ratio = (s_R.sum() / other_R.sum()).item()
    return torch.addmm(first, delta_OI @ q_IR, q_IR.T, alpha=piece.shared["scale"] * ratio)


def first_model(piece: Piece) -> torch.Tensor:
    """Returns the first model's own tensor, float32."""
    return piece.tensors[0].to(torch.float32)


def opcm_matrix(piece: Piece) -> UnscaledDelta:
    """Merges a weight matrix by orthogonal projections, OPCM, before the last factor. Tang et al., arXiv 2501.09522.

        M_1 = Δ_1        M_t = M_{t-1} + P_{t-1}(Δ_t)        Δ_t = W_t - W_0, in the order of the configuration

    U S Vᵀ = M_{t-1}, `[O, I]`; P_{t-1}(Δ) = Δ - U C Vᵀ, where C is UᵀΔV on its diagonal and in its first r rows and
    columns, else 0: the directions of the r largest singular values, whose sum is at most `alpha` of all, are left out,
    and so is what lies along any singular pair. The result is W_0 + M_K · mean ‖Δ_t‖ / ‖M_K‖, norms over the whole
    model. The paper scales by such a factor after every step; since none of these changes U, V or r, the last one is
    all that remains.
    """
    return _merge_in_turn(piece, lambda delta, merged: _project_(delta, merged, piece.shared["alpha"]))


def opcm_fallback(piece: Piece) -> UnscaledDelta:
    """Computes Σ Δ_t of a tensor that is no weight matrix, as in the authors' program."""
    return _merge_in_turn(piece, lambda delta, merged: delta)


def _merge_in_turn(piece: Piece, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> UnscaledDelta:
    """Adds up task vectors one after the other, each changed by what is merged before it."""
    merged, squares = torch.empty(0), []
    for model in range(len(piece.tensors)):
        delta = piece.task_vector(model)
        squares.append(sum_of_squares(delta))
        merged = merged.add_(change(delta, merged)) if model else delta
    return UnscaledDelta(merged, (sum_of_squares(merged), *squares))


def opcm_alone(piece: Piece) -> torch.Tensor:
    """Merges by OPCM a model that has no other tensor than this one, the factor included."""
    made = opcm_matrix(piece) if piece.origin.dim() == 2 else opcm_fallback(piece)
    return made.vector.mul_(opcm_factor(made.squares)).add_(piece.origin)


def opcm_factor(squares: Sequence[float]) -> float:
    """Computes the mean norm of the task vectors over the norm of the merged one; 1 where that is 0.

    Args:
        squares: Σ x² over the whole model, of the merged task vector first, then of every model's.
    """
    merged, *models = (math.sqrt(square) for square in squares)
    return sum(models) / len(models) / merged if merged else 1.0


def _project_(delta_OI: torch.Tensor, merged_OI: torch.Tensor, alpha: float) -> torch.Tensor:
    """Computes P(Δ), in place of Δ: what is left of it orthogonally to the merged task vector (see `opcm_matrix`)."""
    u_OR, s_R, v_IR = singular_vectors(merged_OI)
    if len(s_R) == 0:
        return delta_OI
    count = int((s_R.cumsum(0) <= alpha * s_R.sum() * _ROUNDING).sum())
    rows_RI = u_OR.T @ delta_OI
    # Uᵀ Δ, of which what C keeps is put in its place: C Vᵀ.
    block = rows_RI[:count] @ v_IR[:, :count]
    along_R = (rows_RI * v_IR.T).sum(dim=1, keepdim=True)
    torch.mul(v_IR.T, along_R, out=rows_RI)
    torch.mm(block, v_IR[:, :count].T, out=rows_RI[:count])
    return delta_OI.sub_(u_OR @ rows_RI)
