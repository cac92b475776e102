"""Task arithmetic and its kin: differences to a base, sparsified, weighed, maybe agreed upon in sign, added up.

    Δ_i = sparsified(W_i - W_0)        W = W_0 + λ · Σ w_i Δ_i m_i / Σ w_i m_i

m_i is 1, or, for methods that elect a sign for every element, whether w_i Δ_i has the sign of Σ w_i Δ_i. The divisor is
left out unless `normalize` is on. A negative weight takes a task away (arXiv 2212.04089).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from largemerge.datafree.averages import weights_like
from largemerge.datafree.pieces import Piece, Pieces
from largemerge.datafree.selection import OrderStatistic, order_statistics
from largemerge.datafree.sparsify import Band, Sparsified, survey_sparsified

_SMALLEST_DIVISOR = 1e-8


def task_vectors(piece: Piece) -> list[torch.Tensor]:
    """W_i - W_0 of every model."""
    return [tensor - piece.origin for tensor in piece.tensors]


def survey(method: str) -> Callable[[Pieces], list[Sparsified]]:
    """What `merge_task_vectors` has to know beforehand where task vectors are sparsified by `method`."""
    return partial(survey_sparsified, deltas=task_vectors, method=method)


def merge_task_vectors(elects_sign: bool) -> Callable[[list[Sparsified] | None], Callable[[Piece], torch.Tensor]]:
    """Task arithmetic in all its variants.

    Args:
        elects_sign: TIES: only those count whose sign is that of the weighted sum.

    Returns:
        A function from what `survey` has found (`None` where nothing is sparsified) to one that merges one piece after
        the other, in order.
    """

    def begin(sparsified: list[Sparsified] | None) -> Callable[[Piece], torch.Tensor]:
        masks = [(each.mask(), each.scale) for each in sparsified or ()]

        def merge(piece: Piece) -> torch.Tensor:
            deltas = task_vectors(piece)
            for delta, (mask, scale) in zip(deltas, masks, strict=False):  # without masks, all is kept
                delta.mul_(mask(piece, delta))
                if scale is not None:
                    delta.mul_(scale)
            return _combine(piece, torch.stack(deltas), elects_sign)

        return merge

    return begin


def _combine(piece: Piece, deltas: torch.Tensor, elects_sign: bool) -> torch.Tensor:
    base, weights = piece.origin, weights_like(piece)
    deltas = deltas.mul_(weights)
    if elects_sign:
        agree = deltas.sign() == _elected(deltas)
        total, divisor = (deltas * agree).sum(dim=0), (weights * agree).sum(dim=0)
        divisor = divisor.masked_fill_(divisor == 0, 1)
    else:
        total, divisor = deltas.sum(dim=0), weights.sum(dim=0)
        divisor = divisor.masked_fill_(divisor.abs() < _SMALLEST_DIVISOR, 1)
    if piece.options["normalize"]:
        total = total / divisor
    if piece.options["lambda"] != 1:
        total = total * piece.options["lambda"]
    return base + total


def _elected(deltas: torch.Tensor) -> torch.Tensor:
    """+1 where the sum over models is not negative, else -1."""
    return (deltas.sum(dim=0) >= 0).to(deltas.dtype).mul_(2).sub_(1)


# SCE, arXiv 2408.07990: select by variance, calculate weights, erase minorities


@dataclass(frozen=True)
class Selected:
    """What `sce` has to know beforehand.

    Attributes:
        band: Which elements are kept, by their variance over models; `None`: all, `empty`: none.
        shares: Σ Δ_i² / Σ Σ Δ_j², `[K]`.
        empty: Whether none is kept.
    """

    band: Band | None
    shares: torch.Tensor
    empty: bool = False


def survey_sce(pieces: Pieces) -> Selected:
    """Which elements vary most, and how long each task vector is in them."""
    first = next(iter(pieces()))
    density, num_elements = first.options["select_topk"], first.num_elements
    band = None
    if density < 1:
        count = int(sum(int(_variances(piece).count_nonzero()) for piece in pieces()) * density) if density > 0 else 0
        if count == 0:
            return Selected(None, torch.full((len(first.tensors),), 1 / len(first.tensors)), empty=True)
        low: OrderStatistic
        (low,) = order_statistics(lambda: (_variances(piece) for piece in pieces()), [num_elements - count])
        band = Band(low, count - (num_elements - low.num_below - low.num_equal), low_first=True)
    squares = torch.zeros(len(first.tensors), dtype=torch.float64)
    keep = band.new() if band is not None else None
    for piece in pieces():
        kept = keep(_variances(piece)) if keep is not None else None
        for model, delta in enumerate(task_vectors(piece)):
            chosen = delta if kept is None else delta * kept
            squares[model] += chosen.square().sum(dtype=torch.float64)
    means = (squares / num_elements).to(first.origin.dtype)
    total = means.sum()
    shares = torch.full_like(means, 1 / len(means)) if total.abs() < 1e-6 else means / total
    return Selected(band, shares)


def sce(selected: Selected) -> Callable[[Piece], torch.Tensor]:
    """W_0 + Σ s_i Δ_i m_i / Σ s_i m_i over the elements that vary most, s_i by squared length, m_i by elected sign."""
    keep = selected.band.new() if selected.band is not None else None

    def merge(piece: Piece) -> torch.Tensor:
        if selected.empty:
            return piece.origin
        kept = keep(_variances(piece)) if keep is not None else None
        deltas = torch.stack(task_vectors(piece))
        deltas = deltas if kept is None else deltas.mul_(kept)
        agree = deltas.sign() == _elected(deltas)
        shares = selected.shares.to(deltas.dtype).view(-1, *[1] * (deltas.dim() - 1)) * agree
        return piece.origin + (deltas * shares).sum(dim=0) / shares.sum(dim=0).clamp_(min=1e-6)

    return merge


def _variances(piece: Piece) -> torch.Tensor:
    """Over the models, of every element."""
    return torch.stack(task_vectors(piece)).var(dim=0, unbiased=False)
