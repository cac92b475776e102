"""Task arithmetic and its kin: differences to a base, sparsified, weighed, maybe agreed upon in sign, added up.

    Δ_i = sparsified(W_i - W_0)        W = W_0 + λ · Σ w_i Δ_i m_i / Σ w_i m_i

m_i is 1, or, for methods that elect a sign for every element, whether w_i Δ_i has the sign of Σ w_i Δ_i. The divisor is
left out unless `normalize` is on. A negative weight takes a task away (arXiv 2212.04089). Differences and products are
rounded to the dtype of the tensors, sums are made in float32 and then rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from largemerge.arithmetic.band import Band, largest_of
from largemerge.arithmetic.bits import integers, keep_, kept, magnitudes
from largemerge.arithmetic.pieces import Piece, Pieces
from largemerge.arithmetic.sparsify import Sparsified, survey_sparsified

_SMALLEST_DIVISOR = 1e-8


def survey(method: str) -> Callable[[Pieces], list[Sparsified]]:
    """What `merge_task_vectors` has to know beforehand where task vectors are sparsified by `method`."""
    return partial(survey_sparsified, method=method)


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
            deltas = list(piece.tensors)
            for delta, (mask, scale) in zip(deltas, masks, strict=False):  # without masks, all is kept
                keep_(delta, mask(piece, delta))
                if scale is not None:
                    delta.mul_(scale)
            return _combine(piece, deltas, elects_sign)

        return merge

    return begin


def _combine(piece: Piece, deltas: list[torch.Tensor], elects_sign: bool) -> torch.Tensor:
    """Adds up; the task vectors are used up."""
    base = piece.origin
    weights = torch.tensor(piece.each["weight"], dtype=base.dtype)
    for delta, weight in zip(deltas, weights, strict=True):
        if weight != 1:
            delta.mul_(weight)
    normalize = piece.options["normalize"]
    if elects_sign:
        total, divisor = _agreed(deltas, weights if normalize else None)
    else:
        total, divisor = _sum(deltas).to(base.dtype), weights.float().sum()
        divisor = divisor if divisor.abs() >= _SMALLEST_DIVISOR else torch.ones(())
    if normalize:
        total.div_(divisor.to(base.dtype))
    if piece.options["lambda"] != 1:
        total.mul_(piece.options["lambda"])
    return total.add_(base)


def _sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """In float32."""
    remaining = iter(tensors)
    total = next(remaining).to(torch.float32, copy=True)
    for tensor in remaining:
        total.add_(tensor)
    return total


def agree_(deltas: list[torch.Tensor]) -> torch.Tensor:
    """Leaves of task vectors what has the sign of their sum: its magnitude, else 0.

    Returns:
        The sign by itself, for `give_sign_`. A sum of 0 counts as positive.
    """
    total = _sum(deltas).add_(0.0)  # not -0
    sign = integers(total.to(deltas[0].dtype))
    sign &= torch.iinfo(sign.dtype).min
    for delta in deltas:
        # The other sign's bit makes an integer negative.
        integers(delta).bitwise_xor_(sign).clamp_(min=0)
    return sign


def give_sign_(magnitudes: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Makes those negative whose sign is."""
    integers(magnitudes).bitwise_xor_(sign)
    return magnitudes


def _counted(delta: torch.Tensor) -> torch.Tensor:
    """Of what `agree_` has left: 1 where there is something, else 0; integers."""
    return integers(delta).clamp(max=1)


def _agreed(deltas: list[torch.Tensor], weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of those that agree, in the dtype of `deltas`, and of their weights (1 where there are none), float32."""
    sign = agree_(deltas)
    divisor = torch.ones(()) if weights is None else _sum_of_weights(deltas, weights.tolist())
    return give_sign_(_sum(deltas).to(deltas[0].dtype), sign), divisor


def _sum_of_weights(deltas: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Of the models that have a part in an element, float32; 1 instead of 0."""
    if min(weights) == max(weights) > 0:
        count = _counted(deltas[0])
        for delta in deltas[1:]:
            count.add_(_counted(delta))
        # Where there is none, nothing is divided: any number will do.
        return count.clamp_(min=1).float().mul_(weights[0])
    divisor = torch.zeros_like(deltas[0], dtype=torch.float32)
    for delta, weight in zip(deltas, weights, strict=True):
        divisor.add_(_counted(delta).float(), alpha=weight)
    return divisor.add_(torch.from_numpy(divisor.numpy() == 0))


# SCE, arXiv 2408.07990: select by variance, calculate weights, erase minorities


@dataclass(frozen=True)
class Selected:
    """What `sce` has to know beforehand.

    Attributes:
        band: Which elements are kept, by their variance over models; `None`: all.
        shares: Σ Δ_i² / Σ Σ Δ_j², `[K]`.
    """

    band: Band | None
    shares: torch.Tensor


def survey_sce(pieces: Pieces) -> Selected:
    """Which elements vary most, and how long each task vector is in them."""
    first = next(iter(pieces()))
    density, num_elements = first.options["select_topk"], first.num_elements
    band = None
    if density < 1:
        count = int(sum(int(_variances(piece).count_nonzero()) for piece in pieces()) * density) if density > 0 else 0
        band = Band(empty=True)
        if count > 0:
            (band,) = largest_of(lambda: ([_variances(piece)] for piece in pieces()), num_elements, [count])
    squares = torch.zeros(len(first.tensors), dtype=torch.float64)
    keep = _keeper(band)
    for piece in pieces():
        for model, delta in enumerate(keep(piece)):
            squares[model] += delta.square().sum(dtype=torch.float64)
    means = (squares / num_elements).to(first.origin.dtype)
    total = means.sum()
    shares = torch.full_like(means, 1 / len(means)) if total.abs() < 1e-6 else means / total
    return Selected(band, shares)


def sce(selected: Selected) -> Callable[[Piece], torch.Tensor]:
    """W_0 + Σ s_i Δ_i m_i / Σ s_i m_i over the elements that vary most, s_i by squared length, m_i by elected sign."""
    keep = _keeper(selected.band)

    def merge(piece: Piece) -> torch.Tensor:
        deltas = keep(piece)
        sign = agree_(deltas)
        divisor = torch.zeros_like(piece.origin, dtype=torch.float32)
        for delta, share in zip(deltas, selected.shares.tolist(), strict=True):
            divisor.add_(_counted(delta).float(), alpha=share)
            delta.mul_(share)
        merged = give_sign_(_sum(deltas).to(piece.origin.dtype), sign)
        return merged.div_(divisor.to(merged.dtype).clamp_(min=1e-6)).add_(piece.origin)

    return merge


def _keeper(band: Band | None) -> Callable[[Piece], list[torch.Tensor]]:
    """A function to the task vectors of one piece after the other, as far as they are kept."""
    keep = band.new() if band is not None else None

    def of_piece(piece: Piece) -> list[torch.Tensor]:
        if keep is None:
            return list(piece.tensors)
        mask = keep(magnitudes(_variances(piece)))
        return [kept(delta, mask) for delta in piece.tensors]

    return of_piece


def _variances(piece: Piece) -> torch.Tensor:
    """Over the models, of every element."""
    return torch.stack(list(piece.tensors)).var(dim=0, unbiased=False)
