"""Methods that merge the singular vectors of task vectors: TSV-M, Iso-C, Iso-CTS.

    Δ_i = W_i - W_0 = U_i S_i V_iᵀ                 of a weight matrix, `[O, I]`

An SVD leaves open what U and V are where singular values are 0, and so do the papers' programs, whose results there
depend on the library. Here such directions are left out (`factors.py`): they add nothing.

Shapes: O outputs, I inputs, R = min(O, I), K models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from largemerge.arithmetic.factors import polar_factor, singular_vectors
from largemerge.arithmetic.pieces import Piece


def task_vector(piece: Piece, model: int) -> torch.Tensor:
    """W_i - W_0, float32."""
    return piece.tensors[model].to(torch.float32).sub(piece.origin.to(torch.float32))


def sum_of_task_vectors(piece: Piece) -> torch.Tensor:
    """Σ Δ_i, float32; one model is read after the other."""
    total = task_vector(piece, 0)
    for model in range(1, len(piece.tensors)):
        total.add_(task_vector(piece, model))
    return total


def mean_of_task_vectors(scale: str | None = None) -> Callable[[Piece], torch.Tensor]:
    """A function that merges what is no weight matrix: W_0 + scale · Σ Δ_i / K.

    Args:
        scale: Name of the parameter that scales; `None`: 1.
    """

    def merge(piece: Piece) -> torch.Tensor:
        factor = 1.0 if scale is None else piece.options[scale]
        return sum_of_task_vectors(piece).mul_(factor / len(piece.tensors)).add_(piece.origin)

    return merge


def tsv_m(piece: Piece) -> torch.Tensor:
    """Task singular vectors, TSV-M: W_0 + alpha · Ũ S Ṽᵀ. Gargiulo et al., arXiv 2412.00081.

    Of every task vector the R // K largest singular values and their vectors; side by side,

        U = [U_1 … U_K]  [O, K·(R//K)]      V = [V_1 … V_K]  [I, K·(R//K)]      S = diag(S_1 … S_K)

    and each of U and V is replaced by the nearest matrix with orthonormal columns: Ũ = P Qᵀ where U = P D Qᵀ.
    """
    rank = min(piece.origin.shape) // len(piece.tensors)
    found = [singular_vectors(task_vector(piece, model), rank) for model in range(len(piece.tensors))]
    lefts, values, rights = zip(*found, strict=True)
    left = polar_factor(torch.cat(lefts, dim=1))[0].mul_(torch.cat(values).to(torch.float32))
    right = polar_factor(torch.cat(rights, dim=1))[0]
    return (left @ right.T).mul_(piece.options["alpha"]).add_(piece.origin)


def iso_c(piece: Piece) -> torch.Tensor:
    """Isotropic merging in the common subspace: W_0 + scaling_factor · s̄ U Vᵀ. Marczak et al., arXiv 2502.04959.

    U S Vᵀ = Σ Δ_i, and all singular values become their mean s̄.
    """
    total = sum_of_task_vectors(piece)
    factor, values = polar_factor(total)
    mean = values.sum().item() / min(total.shape)
    return factor.mul(mean * piece.options["scaling_factor"]).add_(piece.origin)


def iso_cts(piece: Piece) -> torch.Tensor:
    """Isotropic merging in common and task-specific subspaces, Iso-CTS. Marczak et al., arXiv 2502.04959.

    Of U S Vᵀ = Σ Δ_i the C largest singular values and their vectors stay; of every (1 - U_C U_Cᵀ) Δ_i the T largest
    come beside them, C + K·T = R. Then, as in TSV-M and Iso-C,

        W_0 + scaling_factor · s̄ Ũ Ṽᵀ          s̄ the mean of all R singular values

    with Ũ and Ṽ the nearest matrices with orthonormal columns. T = round((R - C₀) / K), C₀ = R · common_space_fraction.
    """
    size, count = min(piece.origin.shape), len(piece.tensors)
    own = round((size - int(size * piece.options["common_space_fraction"])) / count)
    own = min(own, size // count)
    common = size - own * count
    left, values, right = singular_vectors(sum_of_task_vectors(piece), common)
    lefts, all_values, rights = [left], [values], [right]
    for model in range(count if own else 0):
        delta = task_vector(piece, model)
        delta.sub_(left @ (left.T @ delta))
        for each, parts in zip(singular_vectors(delta, own), (lefts, all_values, rights), strict=True):
            parts.append(each)
    mean = torch.cat(all_values).sum().item() / size
    merged = polar_factor(torch.cat(lefts, dim=1))[0] @ polar_factor(torch.cat(rights, dim=1))[0].T
    return merged.mul_(mean * piece.options["scaling_factor"]).add_(piece.origin)
