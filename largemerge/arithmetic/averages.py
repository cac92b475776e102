"""Methods that look at one element of every model, and at nothing else."""

from __future__ import annotations

import torch

from largemerge.arithmetic.pieces import Piece


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
