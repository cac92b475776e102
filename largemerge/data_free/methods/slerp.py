"""Interpolation on a sphere: slerp, NuSLERP, Multi-SLERP, the Karcher mean.

A tensor counts as one long vector; what a method needs of it are its inner products.

    v_i           the tensors, as vectors            G_ij = <v_i, v_j>   summed over pieces, float64
    result        Σ c_i v_i                          the c_i from G alone

So each of these methods reads the tensors twice at most, whatever their size, and iterates over K numbers. Results are
summed in float32 and rounded once.

Shapes: K models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from largemerge.data_free.methods.base import Piece, Pieces
from largemerge.data_free.methods.exact_statistics import inner_products, weighted_sum

_SMALLEST_STEP = 1e-30  # of the Karcher mean: what is divided by is larger
_COLINEAR = 0.9995  # cosine from which on slerp interpolates on the line
_EPS = 1e-8
SMALLEST_SUM = 1e-6
"""Sum of NuSLERP's weights below which both models count half, as in mergekit."""


def products_of_vectors(pieces: Pieces) -> torch.Tensor:
    """Computes G `[K, K]`, float64, of task vectors in the tensors' dtype; without a base, of the tensors."""
    return _products(
        list(piece.tensors) if piece.base is None else [tensor - piece.base for tensor in piece.tensors]
        for piece in pieces()
    )


def products_of_models(pieces: Pieces) -> torch.Tensor:
    """Computes G `[K, K]`, float64, of the tensors; a base is the first of them."""
    return _products(_all_models(piece) for piece in pieces())


def slerp(piece: Piece, products_KK: torch.Tensor) -> torch.Tensor:
    """Computes sin((1-t)θ)/sin θ · A + sin(tθ)/sin θ · B; on the line where A, the base, and B are nearly parallel.

    Shoemake, Animating rotation with quaternion curves, 1985.
    """
    norms = products_KK.diagonal().sqrt().tolist()
    cosine = products_KK[0, 1].item() / math.prod(norm if norm > _EPS else 1.0 for norm in norms)
    t = piece.shared["t"]
    if abs(cosine) > _COLINEAR:
        first, second = 1 - t, t
    else:
        theta = math.acos(cosine)
        first, second = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
    return weighted_sum([piece.origin, piece.tensors[0]], [first, second]).to(piece.origin.dtype)


def nuslerp(piece: Piece, products_KK: torch.Tensor | None) -> torch.Tensor:
    """Merges by slerp of two tensors, or task vectors, at t = w_2 / (w_1 + w_2). The method is mergekit's.

    Args:
        piece: Rows of two models.
        products_KK: Inner products, for the tensor as one vector; `None` for every row or column by itself.
    """
    weights = piece.per_model["weight"]
    t = 0.5 if abs(sum(weights)) < SMALLEST_SUM else weights[1] / sum(weights)
    first, second = _exact_vectors(piece)
    if products_KK is not None:
        norms = products_KK.diagonal().sqrt().clamp(min=1e-7)
        cosine = products_KK[0, 1] / norms.prod()
    else:
        dim = 0 if piece.shared["nuslerp_row_wise"] else -1
        norms = first.norm(dim=dim, keepdim=True).clamp(min=1e-7) * second.norm(dim=dim, keepdim=True).clamp(min=1e-7)
        cosine = ((first * second).sum(dim=dim, keepdim=True) / norms).double()
    theta = cosine.clamp(-1, 1).acos()
    sine = theta.sin()
    straight = sine.abs() < _EPS
    shares = [torch.where(straight, share, (share * theta).sin() / sine).float() for share in (1 - t, t)]
    return _on_base(piece, first.mul_(shares[0]).add_(second.mul_(shares[1])))


def multislerp(piece: Piece, products_KK: torch.Tensor) -> torch.Tensor:
    """Merges by barycentric interpolation: into the tangent space at the weighted mean direction, and back.

    Directions are those of the tensors, or of task vectors where there is a base. The method is mergekit's.

    Raises:
        FloatingPointError: If weighted directions cancel out.
    """
    if len(piece.tensors) == 1:
        return piece.tensors[0]
    weights = torch.tensor(piece.per_model["weight"], dtype=torch.float64)
    weights = weights / weights.sum() if piece.shared["normalize_weights"] else weights
    eps = piece.shared["eps"]
    norms = products_KK.diagonal().sqrt()
    units_KK = torch.diag(1 / (norms + eps))  # row i: the i-th direction, as a combination of the vectors
    mean_K = weights @ units_KK
    mean_norm = _norm(mean_K, products_KK)
    if mean_norm < eps:
        if len(weights) != 2:
            raise FloatingPointError("weighted directions cancel out; choose other weights")
        return _combined(piece, weights)
    mean_K = mean_K / mean_norm
    cosines = units_KK @ products_KK @ mean_K
    tangent_K = weights @ (units_KK - cosines[:, None] * mean_K)
    length = _norm(tangent_K, products_KK) + eps
    direction_K = mean_K * math.cos(length) + tangent_K * (math.sin(length) / length)
    return _combined(piece, direction_K * (norms @ weights))


def karcher(piece: Piece, products_KK: torch.Tensor) -> torch.Tensor:
    """Computes the Karcher mean of the directions on the sphere, times the mean norm. Karcher 1977.

    A step to the mean of all tangents, again and again, until one is shorter than `tol` or `max_iter` have been made.
    A base is one of the models.
    """
    tensors = _all_models(piece)
    count, tol = len(tensors), max(piece.shared["tol"], _SMALLEST_STEP)
    if count == 1:
        return tensors[0]
    norms = products_KK.diagonal().sqrt()
    valid = (norms > tol).nonzero().flatten().tolist()
    if not valid:
        return torch.zeros_like(tensors[0])
    units_KK = torch.diag(torch.where(norms > tol, 1 / norms, 0.0))
    mean_K = units_KK[valid].mean(dim=0)
    length = _norm(mean_K, products_KK)
    mean_K = units_KK[valid[0]] if length < tol else mean_K / length
    for _ in range(piece.shared["max_iter"]):
        step_K = torch.zeros(count, dtype=torch.float64)
        for index in valid:
            cosine = min(1.0, max(-1.0, (mean_K @ products_KK @ units_KK[index]).item()))
            theta = math.acos(cosine)
            if theta >= tol:
                step_K += theta / math.sin(theta) / len(valid) * (units_KK[index] - cosine * mean_K)
        length = _norm(step_K, products_KK)
        if length < tol:
            break
        mean_K = math.cos(length) * mean_K + math.sin(length) / length * step_K
        mean_K = mean_K / max(_norm(mean_K, products_KK), tol)
    return weighted_sum(tensors, (mean_K * norms.mean()).tolist()).to(tensors[0].dtype)


def _all_models(piece: Piece) -> list[torch.Tensor]:
    return [*([piece.base] if piece.base is not None else []), *piece.tensors]


def _products(pieces: Iterable[list[torch.Tensor]]) -> torch.Tensor:
    """Sums the inner products of K vectors over their pieces: `[K, K]`, float64."""
    total: torch.Tensor | None = None
    for rows in pieces:
        gram_KK = inner_products(rows)
        total = gram_KK if total is None else total + gram_KK
    assert total is not None
    return total


def _norm(coefficients_K: torch.Tensor, products_KK: torch.Tensor) -> float:
    """Computes the norm of Σ c_i v_i."""
    return math.sqrt(max(0.0, (coefficients_K @ products_KK @ coefficients_K).item()))


def _combined(piece: Piece, coefficients_K: torch.Tensor) -> torch.Tensor:
    """Computes Σ c_i v_i, where there is a base added to it."""
    return _on_base(piece, weighted_sum(_exact_vectors(piece), coefficients_K.tolist()))


def _exact_vectors(piece: Piece) -> list[torch.Tensor]:
    """Computes the task vectors where there is a base, else copies the tensors; float32, not rounded."""
    tensors = [tensor.to(torch.float32, copy=True) for tensor in piece.tensors]
    return tensors if piece.base is None else [tensor.sub_(piece.base) for tensor in tensors]


def _on_base(piece: Piece, merged: torch.Tensor) -> torch.Tensor:
    """Adds the base, if there is one, to a merged vector (float32, changed in place); rounds to the models' dtype."""
    return (merged if piece.base is None else merged.add_(piece.base)).to(piece.tensors[0].dtype)
