"""Averages of models: linear, passthrough, NearSwap, Model Stock, Arcee Fusion.

linear           Σ w_i W_i / Σ w_i                       element by element
passthrough      s W                                     of a single model
nearswap         W_0 + w (W - W_0)                       w from the distance, element by element
model_stock      t W̄ + (1-t) W_0                         t from the angles between task vectors, of a tensor or rows
arcee_fusion     W_0 + Δ where |Δ| · KL is large         KL of a row's softmaxes, threshold from all of the tensor
"""

from __future__ import annotations

import itertools

import torch

from largemerge.data_free.methods.base import Piece, Pieces
from largemerge.data_free.methods.exact_statistics import order_statistics, weighted_sum

_MIN_DISTANCE = 1e-6  # of two elements, in NearSwap; smaller ones count as this
_SINGULAR = 1e-6  # divisor of Model Stock below which the task vectors cancel out


def linear(piece: Piece) -> torch.Tensor:
    """Computes Σ w_i W_i, divided by Σ w_i unless `normalize` is off, in float32. Model soups, arXiv 2203.05482."""
    weights = torch.tensor(piece.per_model["weight"], dtype=torch.float32)
    total = torch.zeros_like(piece.tensors[0], dtype=torch.float32)
    for tensor, weight in zip(piece.tensors, weights, strict=True):
        total.addcmul_(tensor.float(), weight)
    return total.div_(weights.sum()) if piece.shared["normalize"] else total


def passthrough(piece: Piece) -> torch.Tensor:
    """Returns the tensor of a single model, times `scale` where one is given."""
    scale = piece.per_model["scale"][0]
    return piece.tensors[0] if scale is None else piece.tensors[0] * scale


def nearswap(piece: Piece) -> torch.Tensor:
    """Computes A + w (B - A) with w = min(1, t / |A - B|): A, the base, where they differ much, B where they are near.

    The method is mergekit's.
    """
    base, other = piece.origin, piece.tensors[0]
    share: torch.Tensor = (piece.shared["t"] / (base - other).abs_().clamp_(min=_MIN_DISTANCE)).clamp_(0, 1)
    return share * other + (1 - share) * base


def model_stock(piece: Piece, products_KK: torch.Tensor | None) -> torch.Tensor:
    """Computes t W̄ + (1-t) W_0 with t = K cos θ / (1 + (K-1) cos θ), θ the mean angle between task vectors.

    Model Stock, arXiv 2403.19522. Summed in float32 and rounded once.

    Args:
        piece: Rows of K models and the base.
        products_KK: Inner products of the whole tensor's task vectors, for one angle; `None` for one angle of every
            row (`filter_wise`).
    """
    base = piece.origin
    count = len(piece.tensors)
    pairs = list(itertools.combinations(range(count), 2))
    if products_KK is not None:
        norms = products_KK.diagonal().sqrt()
        cosines = [products_KK[i, j] / (norms[i] * norms[j]).clamp(min=1e-6) for i, j in pairs]
        cosine = torch.stack(cosines).clamp(-1, 1).mean()
    else:
        offsets = [tensor.float() - base for tensor in piece.tensors]
        offsets = [offset if offset.dim() > 1 else offset[None] for offset in offsets]
        lengths = [offset.norm(dim=-1) for offset in offsets]
        cosines = [(offsets[i] * offsets[j]).sum(dim=-1) / (lengths[i] * lengths[j]).clamp(min=1e-6) for i, j in pairs]
        cosine = torch.stack([value.clamp(-1, 1) for value in cosines]).mean(dim=0)[..., None]
        cosine = cosine if base.dim() > 1 else cosine.reshape(1)
    divisor = 1 + (count - 1) * cosine
    singular = divisor.abs() < _SINGULAR  # task vectors that cancel out: the base stays
    t = torch.where(singular, 0, count * cosine / divisor.masked_fill(singular, 1)).float()
    average = weighted_sum(piece.tensors, [1 / count] * count)
    return average.mul_(t).add_(base.float() * (1 - t)).to(base.dtype)


def fusion_threshold(pieces: Pieces) -> float:
    """Finds the importance from which on an element is taken from the other model.

    That is median + 1.5 · (third - first quartile) of all importances; exact, not from a sample.
    """
    num_elements = next(iter(pieces())).num_elements
    ranks = [int(share * (num_elements - 1)) for share in (0.25, 0.5, 0.75)]
    (found,) = order_statistics(lambda: ([_importance(piece).clamp_(min=0)] for piece in pieces()), [ranks])
    lowest, median, highest = (statistic.value for statistic in found)
    return median + 1.5 * (highest - lowest)


def arcee_fusion(piece: Piece, threshold: float) -> torch.Tensor:
    """Computes W_0 + Δ where an element's importance reaches the threshold, else W_0. The method is mergekit's."""
    base = piece.origin
    chosen = _importance(piece) >= threshold
    return base + (piece.tensors[0] - base) * chosen


def _importance(piece: Piece) -> torch.Tensor:
    """Computes |Δ| times the Kullback-Leibler divergence of the rows' softmaxes, for every element."""
    base, other = piece.origin, piece.tensors[0]
    p, q = other.softmax(dim=-1) + 1e-8, base.softmax(dim=-1) + 1e-8
    divergence = (p * (p / q).log()).sum(dim=-1, keepdim=True)
    return (other - base).abs() * divergence
