"""Reinforced Agent Merging: task vectors whose elements one model alone has changed stay whole (arXiv 2601.13572).

m_i says where |Δ_i| > ε, so where model i has changed anything; c = Σ m_i counts the models that have:

    ram           W_0 + Σ m_i Δ_i / max(c, 1)
    ramplus_tl    W_0 + Σ m_i Δ_i · (λ_i where c = 1, else 1 / c)
                  λ_i = 1 + r · min(ρ_i, α),    ρ_i = shared elements / elements of model i alone, of the tensor

Differences and quotients are rounded to the dtype of the tensors, sums are made in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from largemerge.data_free.methods.base import Piece, Pieces


def ram(piece: Piece) -> torch.Tensor:
    """Adds to the base the mean, over the models that have changed an element, of what they have changed."""
    total = _sum_of_changes(piece, [1.0] * len(piece.tensors))
    return total.to(piece.origin.dtype).add_(piece.origin)


def ramplus_tl(piece: Piece, factors: Sequence[float]) -> torch.Tensor:
    """Does the same, with each model's own elements multiplied by its factor.

    Args:
        piece: Task vectors of all models, and the base.
        factors: λ_i of every model, from `rescaling_factors`.
    """
    return _sum_of_changes(piece, factors).add_(piece.origin).to(piece.origin.dtype)


def rescaling_factors(pieces: Pieces) -> list[float]:
    """Computes λ_i of every model from all of a tensor."""
    shared: list[int] = []
    unique: list[int] = []
    for piece in pieces():
        masks, counts = _changed(piece)
        if not shared:
            shared, unique = [0] * len(masks), [0] * len(masks)
        for model, mask in enumerate(masks):
            shared[model] += int((mask & (counts > 1)).sum())
            unique[model] += int((mask & (counts == 1)).sum())
    first = next(iter(pieces())).shared
    epsilon, r, alpha = first["epsilon"], first["r"], first["alpha"]
    # A model without elements of its own has nothing that its factor would multiply.
    ratios = [mine / max(alone, epsilon) if alone else 0.0 for mine, alone in zip(shared, unique, strict=True)]
    return [1 + r * min(max(ratio, 0), alpha) for ratio in ratios]


def _changed(piece: Piece) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Finds the elements that every model has changed, and how many models have changed an element."""
    masks = [delta.abs() > piece.shared["epsilon"] for delta in piece.tensors]
    counts = torch.zeros(masks[0].shape, dtype=torch.int32)
    for mask in masks:
        counts += mask
    return masks, counts


def _sum_of_changes(piece: Piece, factors: Sequence[float]) -> torch.Tensor:
    """Sums what was changed in float32: of one model alone times its factor, of several divided by their number."""
    masks, counts = _changed(piece)
    alone, divisor = counts == 1, counts.clamp(min=1)
    total = torch.zeros(masks[0].shape, dtype=torch.float32)
    for delta, mask, factor in zip(piece.tensors, masks, factors, strict=True):
        changed = delta * mask
        total += torch.where(alone, changed.float() * factor, (changed / divisor).float())
    return total
