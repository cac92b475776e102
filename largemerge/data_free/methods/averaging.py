"""Methods that look at one element of every model, and at nothing else.

Methods that weigh whole tensors or rows by how the models lie to each other.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from largemerge.data_free.methods.base import Piece, Pieces
from largemerge.data_free.methods.exact_statistics import order_statistics, weighted_sum


def linear(piece: Piece) -> torch.Tensor:
    """Σ w_i W_i, divided by Σ w_i unless `normalize` is off, in float32. Model soups, arXiv 2203.05482."""
    weights = torch.tensor(piece.each["weight"], dtype=torch.float32)
    total = torch.zeros_like(piece.tensors[0], dtype=torch.float32)
    for tensor, weight in zip(piece.tensors, weights, strict=True):
        total.addcmul_(tensor.float(), weight)
    return total.div_(weights.sum()) if piece.options["normalize"] else total


def passthrough(piece: Piece) -> torch.Tensor:
    """The tensor of a single model, times `scale` where one is given."""
    scale = piece.each["scale"][0]
    return piece.tensors[0] if scale is None else piece.tensors[0] * scale


def nearswap(piece: Piece) -> torch.Tensor:
    """A + w (B - A) with w = min(1, t / |A - B|): the base where models differ much, the other where they are near."""
    base, other = piece.origin, piece.tensors[0]
    share: torch.Tensor = (piece.options["t"] / (base - other).abs_().clamp_(min=1e-6)).clamp_(0, 1)
    return share * other + (1 - share) * base


_SINGULAR = 1e-6


def model_stock(piece: Piece, products_KK: torch.Tensor | None) -> torch.Tensor:
    """T W̄ + (1-t) W_0 with t = K cos θ / (1 + (K-1) cos θ), θ the mean angle between task vectors.

    Model Stock, arXiv 2403.19522. One angle for a tensor, or one for every row (`filter_wise`). Summed in float32 and
    rounded once.
    """
    base = piece.origin
    count = len(piece.tensors)
    pairs = list(itertools.combinations(range(count), 2))
    if products_KK is not None:
        norms = products_KK.diagonal().sqrt()
        each = [products_KK[i, j] / (norms[i] * norms[j]).clamp(min=1e-6) for i, j in pairs]
        cosine = torch.stack(each).clamp(-1, 1).mean()
    else:
        offsets = [tensor.float() - base for tensor in piece.tensors]
        offsets = [offset if offset.dim() > 1 else offset[None] for offset in offsets]
        lengths = [offset.norm(dim=-1) for offset in offsets]
        each = [(offsets[i] * offsets[j]).sum(dim=-1) / (lengths[i] * lengths[j]).clamp(min=1e-6) for i, j in pairs]
        cosine = torch.stack([value.clamp(-1, 1) for value in each]).mean(dim=0)[..., None]
        cosine = cosine if base.dim() > 1 else cosine.reshape(1)
    divisor = 1 + (count - 1) * cosine
    singular = divisor.abs() < _SINGULAR  # task vectors that cancel out: the base stays
    t = torch.where(singular, 0, count * cosine / divisor.masked_fill(singular, 1)).float()
    average = weighted_sum(piece.tensors, [1 / count] * count)
    return average.mul_(t).add_(base.float() * (1 - t)).to(base.dtype)


@dataclass(frozen=True)
class FusionThreshold:
    """The importance from which on a parameter is taken from the other model."""

    value: float


def _importance(piece: Piece) -> torch.Tensor:
    """|Δ| times the Kullback-Leibler divergence of the rows' softmaxes."""
    base, other = piece.origin, piece.tensors[0]
    p, q = other.softmax(dim=-1) + 1e-8, base.softmax(dim=-1) + 1e-8
    divergence = (p * (p / q).log()).sum(dim=-1, keepdim=True)
    return (other - base).abs() * divergence


def survey_importance(pieces: Pieces) -> FusionThreshold:
    """Median + 1.5 · (third - first quartile) of all importances; exact, not from a sample."""
    num_elements = next(iter(pieces())).num_elements
    ranks = [int(share * (num_elements - 1)) for share in (0.25, 0.5, 0.75)]
    (found,) = order_statistics(lambda: ([_importance(piece).clamp_(min=0)] for piece in pieces()), [ranks])
    lowest, median, highest = (statistic.value for statistic in found)
    return FusionThreshold(median + 1.5 * (highest - lowest))


def arcee_fusion(piece: Piece, threshold: FusionThreshold) -> torch.Tensor:
    """W_0 + Δ where a parameter matters, by its importance; W_0 elsewhere."""
    base = piece.origin
    chosen = _importance(piece) >= threshold.value
    return base + (piece.tensors[0] - base) * chosen
