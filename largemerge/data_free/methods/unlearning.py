"""Unlearning by several task vectors of what is to be forgotten: task simplex arithmetic.

    τ_i = W_i - W_0          W_i: fine-tuned on the forget set, each in its own way
    W = W_0 - λ · Σ w_i τ_i / Σ w_i

How much one task vector makes a model forget depends on how it was fine-tuned. Dong et al. (Machine Unlearning via Task
Simplex Arithmetic, NeurIPS 2025) take all points of the simplex whose corners the τ_i are, and the mean of the
functions W_0 - λ τ over them. That mean is no checkpoint. To the first order in τ it is: a point that is drawn evenly
from a simplex is its corners' mean on average. So W is their mean, and how far the corners lie from it, which tells
what higher orders there are, is measured beside. The paper has no public program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from largemerge.data_free.methods.base import Piece
from largemerge.data_free.methods.exact_statistics import inner_products


def task_simplex(piece: Piece) -> torch.Tensor:
    """Subtracts the weighted mean of all task vectors, times `lambda`, from the base."""
    return _mean(piece).mul_(-piece.shared["lambda"]).add_(piece.origin)


def spread_sums(piece: Piece) -> list[float]:
    """Computes what `spread` is made of, of one piece.

    Returns:
        ‖m‖² of the weighted mean; Σ w_i ‖τ_i - m‖² / Σ w_i; every ‖τ_i - m‖²; and <τ_i, τ_j> for j ≤ i, row by row.
    """
    mean, models = _mean(piece), range(len(piece.tensors))
    deltas = [piece.task_vector(model) for model in models]
    products_KK = inner_products(deltas).tolist()
    squares = [delta.sub_(mean).square().sum(dtype=torch.float64).item() for delta in deltas]
    weights = piece.per_model["weight"]
    weighted = math.fsum(w * square for w, square in zip(weights, squares, strict=True)) / sum(weights)
    products = [products_KK[i][j] for i in models for j in range(i + 1)]
    return [mean.square().sum(dtype=torch.float64).item(), weighted, *squares, *products]


def spread(sums: Sequence[float]) -> dict[str, Any]:
    """Says how far task vectors lie from each other.

    Args:
        sums: Sums of `spread_sums` over the pieces of a tensor, or of all tensors.

    Returns:
        `mean_norm`, the norm of the mean; `norms`, of the task vectors; `deviations`, the distances of each from the
        mean; `spread`, their root mean square over the norm of the mean; `cosines`, of each task vector with those
        before it. `None` where something is divided by 0.
    """
    count = (math.isqrt(8 * len(sums) - 7) - 3) // 2  # 2 + K + K (K + 1) / 2 numbers
    mean, weighted, squares, products = sums[0], sums[1], sums[2 : 2 + count], sums[2 + count :]
    rows = [products[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(count)]
    norms = [math.sqrt(row[-1]) for row in rows]

    def cosine(i: int, j: int) -> float | None:
        return rows[i][j] / (norms[i] * norms[j]) if norms[i] and norms[j] else None

    return {
        "mean_norm": math.sqrt(mean),
        "norms": norms,
        "deviations": [math.sqrt(square) for square in squares],
        "spread": math.sqrt(weighted / mean) if mean else None,
        "cosines": [[cosine(i, j) for j in range(i)] for i in range(count)],
    }


def spread_in_words(found: dict[str, Any]) -> str:
    """Says what `spread` has found of a whole model in one line."""
    cosines = [cosine for row in found["cosines"] for cosine in row if cosine is not None]
    if found["spread"] is None or not cosines:
        return "there is one task vector, or they add up to 0"
    apart = f"{found['spread']:.2f} of the length of their mean"
    return f"{apart} from it (root mean square), cosines from {min(cosines):.2f} to {max(cosines):.2f}"


def _mean(piece: Piece) -> torch.Tensor:
    """Computes Σ w_i τ_i / Σ w_i, float32."""
    weights = piece.per_model["weight"]
    total = torch.zeros(piece.origin.shape, dtype=torch.float32, device=piece.origin.device)
    for model, weight in enumerate(weights):
        total.add_(piece.task_vector(model), alpha=weight / sum(weights))
    return total
