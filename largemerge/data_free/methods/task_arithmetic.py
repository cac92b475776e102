"""Task arithmetic and its kin: TIES, DARE, Model Breadcrumbs, DELLA, SCE.

Differences to a base, sparsified, weighed, maybe agreed upon in sign, added up:

    Δ_i = sparsified(W_i - W_0)        W = W_0 + λ · Σ w_i Δ_i m_i / Σ w_i m_i

m_i is 1, or, for methods that elect a sign for every element, whether w_i Δ_i has the sign of Σ w_i Δ_i. The divisor is
left out unless `normalize` is on. A negative weight subtracts a task (arXiv 2212.04089). Differences and products are
rounded to the dtype of the tensors, sums are made in float32 and then rounded.

Which elements of a task vector are kept:

    magnitude        the k largest                                  TIES, arXiv 2306.01708
    outliers         the k largest after the γ·n largest            Model Breadcrumbs, arXiv 2312.06795
    random           each with probability p                        DARE, arXiv 2311.03099
    ranks            each with p ± ε, by its rank in its row        DELLA, arXiv 2406.11617

k = p·n of a tensor's n elements, exactly. Of equal ones, the first are kept where the largest are, as a stable sort
would have it. What is kept is scaled by Σ|Δ| / Σ|kept| where `rescale` is on. Probabilities are multiples of 2^-16.

SCE (arXiv 2408.07990) selects elements by their variance over the models, calculates weights from what is left of the
task vectors, and erases minorities by electing signs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from largemerge.data_free.methods.base import Piece, Pieces
from largemerge.data_free.methods.exact_statistics import (
    MagnitudeRange,
    apply_mask,
    apply_mask_,
    as_integers,
    largest,
    largest_of,
    magnitude_bits,
    mask_of,
    sum_of_magnitudes,
    without_outliers,
)

_SMALLEST_NORM = 1e-7  # of a task vector, as Σ|Δ|; below it nothing is scaled
_SMALLEST_DIVISOR = 1e-8  # sum of weights below which nothing is divided
_STEPS = 1 << 16  # of probabilities
_INDEX_BITS = 17  # of the longest row whose ranks fit into 32 bits, beside a magnitude of 15 bits

Mask = Callable[[Piece, torch.Tensor], torch.Tensor]
"""Function from a piece and a task vector in it to the mask of what is kept; called with one piece after the other."""


# Sparsifying


@dataclass
class Sparsified:
    """How one model's task vector is sparsified.

    Attributes:
        mask: Makes a `Mask` for one pass over all pieces.
        scale: Factor of what is kept, in the dtype of the task vector; `None` where nothing is scaled.
    """

    mask: Callable[[], Mask]
    scale: torch.Tensor | None = None


def plan_sparsification(pieces: Pieces, method: str) -> list[Sparsified]:
    """Finds out of all of a tensor what has to be known before any of it is sparsified, for every model.

    Args:
        pieces: Task vectors of all models.
        method: The way to choose elements: `magnitude`, `outliers`, `random` or `ranks`.

    Raises:
        FloatingPointError: If probabilities leave the range from 0 to 1.
    """
    first = next(iter(pieces()))
    densities = first.per_model["density"]
    some = [model for model, density in enumerate(densities) if 0 < density < 1]
    found = [Sparsified(_keep_all if density >= 1 else _keep_nothing) for density in densities]
    for model, mask in zip(some, _masks(pieces, method, some, first) if some else (), strict=True):
        found[model].mask = mask
    if first.shared["rescale"]:
        _set_scales(pieces, found)
    return found


def _keep_all() -> Mask:
    return lambda _, delta: torch.full_like(magnitude_bits(delta), -1)


def _keep_nothing() -> Mask:
    return lambda _, delta: torch.zeros_like(magnitude_bits(delta))


def _masks(pieces: Pieces, method: str, models: Sequence[int], first: Piece) -> list[Callable[[], Mask]]:
    """Makes the masks of those models whose task vectors are neither kept nor dropped as a whole."""
    per_model = {name: [values[model] for model in models] for name, values in first.per_model.items()}
    densities = per_model["density"]
    if method == "random":
        drawn = [partial(_drawn, model, density) for model, density in zip(models, densities, strict=True)]
        return [partial(_stateless, mask) for mask in drawn]
    if method == "ranks":
        return [
            partial(_stateless, _by_rank(model, density, epsilon, first))
            for model, density, epsilon in zip(models, densities, per_model["epsilon"], strict=True)
        ]

    def numbers() -> Iterator[Iterator[torch.Tensor]]:
        return ((piece.tensors[model] for model in models) for piece in pieces())

    if method == "magnitude":
        ranges = largest(numbers, first.num_elements, densities)
    else:
        ranges = without_outliers(numbers, first.num_elements, densities, per_model["gamma"])
    return [partial(_by_magnitude, kept) for kept in ranges]


def _stateless(mask: Mask) -> Mask:
    """Returns the same mask for every pass: one that remembers nothing from piece to piece."""
    return mask


def _by_magnitude(kept: MagnitudeRange) -> Mask:
    mask_piece = kept.masker()
    return lambda _, delta: mask_piece(magnitude_bits(delta))


def _drawn(model: int, density: float, piece: Piece, delta: torch.Tensor) -> torch.Tensor:
    return mask_of(piece.random(model) < round(density * _STEPS), delta.dtype)


def _by_rank(model: int, density: float, epsilon: float, first: Piece) -> Mask:
    """Makes the mask of DELLA; rows are taken along the second dimension, a vector is one row."""
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise FloatingPointError(f"density {density} ± epsilon {epsilon} leaves the range from 0 to 1")
    shape = first.tensors[model].shape
    limits = _limits(shape[1] if len(shape) > 1 else shape.numel(), density, epsilon)

    def mask(piece: Piece, delta: torch.Tensor) -> torch.Tensor:
        rows = delta.movedim(1, -1) if delta.dim() > 1 else delta.reshape(1, -1)
        highest = by_row_rank(rows.contiguous(), limits)
        highest = (highest.movedim(-1, 1) if delta.dim() > 1 else highest).reshape(delta.shape)
        return mask_of(piece.random(model) <= highest.numpy().view(np.uint16), delta.dtype)

    return mask


def _limits(size: int, density: float, epsilon: float) -> torch.Tensor:
    """Computes the largest random integer with which DELLA keeps an element, by its place in a row of some size.

    Probabilities go from density - ε for the smallest element to density + ε for the largest, in float32. The integers
    are those from 0 to 65535, as bits of int16.
    """
    step = 2 * epsilon / max(1, size - 1)
    chances = torch.arange(size, dtype=torch.float32).mul_(step).add_(density - epsilon).mul_(_STEPS)
    return torch.from_numpy(chances.ceil().sub_(1).clamp_(0, _STEPS - 1).numpy().astype(np.uint16).view(np.int16))


def by_row_rank(delta: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Gives every element the value of its rank in its row.

    Equals are in their order. The bits of a magnitude and the element's number make one integer: these are sorted, not
    indices.

    Args:
        delta: Rows, `[…, N]`.
        values: The value of every rank, `[N]`, the smallest magnitude's first.
    """
    size = delta.shape[-1]
    patterns = magnitude_bits(delta).reshape(-1, size).numpy()
    small = patterns.dtype == np.int16 and size <= 1 << _INDEX_BITS
    unsigned, shift = (np.uint32, _INDEX_BITS) if small else (np.uint64, 32)
    packed = patterns.astype(unsigned)
    packed <<= unsigned(shift)
    packed |= np.arange(size, dtype=unsigned)
    packed.sort(axis=-1)
    packed &= unsigned((1 << shift) - 1)
    found = torch.empty(packed.shape, dtype=values.dtype)
    found.scatter_(1, torch.from_numpy(packed.astype(np.int64)), values.expand(packed.shape))
    return found.view(delta.shape)


def _set_scales(pieces: Pieces, found: list[Sparsified]) -> None:
    """Sets the scales from sums of magnitudes before and after; the masks are remembered, a bit for each element."""
    masks = [sparsified.mask() for sparsified in found]
    sums = np.zeros((len(found), 2))
    remembered: list[list[np.ndarray]] = [[] for _ in found]
    dtype = torch.float32
    for piece in pieces():
        for model, mask_piece in enumerate(masks):
            numbers = piece.tensors[model]
            dtype = numbers.dtype
            mask = mask_piece(piece, numbers)
            remembered[model].append(np.packbits(mask.reshape(-1).numpy() != 0))
            sums[model, 0] += sum_of_magnitudes(numbers)
            sums[model, 1] += sum_of_magnitudes(apply_mask(numbers, mask))
    for (before, after), packed, sparsified in zip(sums.tolist(), remembered, found, strict=True):
        sparsified.mask = partial(_remembered, packed)
        if before >= _SMALLEST_NORM and after >= _SMALLEST_NORM:
            sparsified.scale = torch.tensor(before, dtype=dtype) / torch.tensor(after, dtype=dtype)


def _remembered(packed: list[np.ndarray]) -> Mask:
    """Makes a mask from the bits of every piece."""
    coming = iter(packed)

    def mask(_: Piece, delta: torch.Tensor) -> torch.Tensor:
        kept = np.unpackbits(next(coming), count=delta.numel())
        return mask_of(kept, delta.dtype).view(delta.shape)

    return mask


# Merging


def merge_task_vectors(elects_sign: bool) -> Callable[[list[Sparsified] | None], Callable[[Piece], torch.Tensor]]:
    """Makes the `Method.prepare` of task arithmetic in all its variants.

    Args:
        elects_sign: Whether, as in TIES, only those count whose sign is that of the weighted sum.

    Returns:
        A function from what `plan_sparsification` has found (`None` where nothing is sparsified) to one that merges one
        piece after the other, in order.
    """

    def prepare(sparsified: list[Sparsified] | None) -> Callable[[Piece], torch.Tensor]:
        masks = [(of_model.mask(), of_model.scale) for of_model in sparsified or ()]

        def merge(piece: Piece) -> torch.Tensor:
            deltas = list(piece.tensors)
            for delta, (mask, scale) in zip(deltas, masks, strict=False):  # without masks, all is kept
                apply_mask_(delta, mask(piece, delta))
                if scale is not None:
                    delta.mul_(scale)
            return _combine(piece, deltas, elects_sign)

        return merge

    return prepare


def _combine(piece: Piece, deltas: list[torch.Tensor], elects_sign: bool) -> torch.Tensor:
    """Weighs and adds up task vectors, which are changed in place, and adds the base."""
    base = piece.origin
    weights = torch.tensor(piece.per_model["weight"], dtype=base.dtype)
    for delta, weight in zip(deltas, weights, strict=True):
        if weight != 1:
            delta.mul_(weight)
    normalize = piece.shared["normalize"]
    if elects_sign:
        total, divisor = _sum_agreeing(deltas, weights if normalize else None)
    else:
        total, divisor = _sum(deltas).to(base.dtype), weights.float().sum()
        divisor = divisor if divisor.abs() >= _SMALLEST_DIVISOR else torch.ones(())
    if normalize:
        total.div_(divisor.to(base.dtype))
    if piece.shared["lambda"] != 1:
        total.mul_(piece.shared["lambda"])
    return total.add_(base)


def _sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Computes the sum of some tensors in float32."""
    remaining = iter(tensors)
    total = next(remaining).to(torch.float32, copy=True)
    for tensor in remaining:
        total.add_(tensor)
    return total


def _elect_sign_(deltas: list[torch.Tensor]) -> torch.Tensor:
    """Replaces task vectors, in place, by the magnitudes of elements that have the sign of the sum; others become 0.

    Returns:
        The elected sign by itself, as bits, for `_restore_sign_`. A sum of 0 counts as positive.
    """
    total = _sum(deltas).add_(0.0)  # not -0
    sign = as_integers(total.to(deltas[0].dtype))
    sign &= torch.iinfo(sign.dtype).min
    for delta in deltas:
        # The other sign's bit makes an integer negative.
        as_integers(delta).bitwise_xor_(sign).clamp_(min=0)
    return sign


def _restore_sign_(magnitudes: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Restores the elected sign, in place."""
    as_integers(magnitudes).bitwise_xor_(sign)
    return magnitudes


def _is_agreeing(delta: torch.Tensor) -> torch.Tensor:
    """Marks with 1, else 0, as integers, the elements that `_elect_sign_` has left."""
    return as_integers(delta).clamp(max=1)


def _sum_agreeing(deltas: list[torch.Tensor], weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the elements that agree in sign, in the dtype of `deltas`, and their weights, float32 (1 without any)."""
    sign = _elect_sign_(deltas)
    divisor = torch.ones(()) if weights is None else _sum_of_weights(deltas, weights.tolist())
    return _restore_sign_(_sum(deltas).to(deltas[0].dtype), sign), divisor


def _sum_of_weights(deltas: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Sums the weights of the models that agree, for every element, float32; 1 instead of 0."""
    if min(weights) == max(weights) > 0:
        count = _is_agreeing(deltas[0])
        for delta in deltas[1:]:
            count.add_(_is_agreeing(delta))
        # Where there is none, nothing is divided: any number will do.
        return count.clamp_(min=1).float().mul_(weights[0])
    divisor = torch.zeros_like(deltas[0], dtype=torch.float32)
    for delta, weight in zip(deltas, weights, strict=True):
        divisor.add_(_is_agreeing(delta).float(), alpha=weight)
    return divisor.add_(torch.from_numpy(divisor.numpy() == 0))


# SCE


@dataclass(frozen=True)
class Selection:
    """The elements that `sce` keeps, and the weights of the models.

    Attributes:
        kept: The elements that are kept, by their variance over models; `None` for all of them.
        shares: Σ Δ_i² / Σ Σ Δ_j² over the kept elements, `[K]`.
    """

    kept: MagnitudeRange | None
    shares: torch.Tensor


def select_by_variance(pieces: Pieces) -> Selection:
    """Finds the elements that vary most over the models, and how long each task vector is in them."""
    first = next(iter(pieces()))
    density, num_elements = first.shared["select_topk"], first.num_elements
    kept = None
    if density < 1:
        count = int(sum(int(_variances(piece).count_nonzero()) for piece in pieces()) * density) if density > 0 else 0
        kept = MagnitudeRange(empty=True)
        if count > 0:
            (kept,) = largest_of(lambda: ([_variances(piece)] for piece in pieces()), num_elements, [count])
    squares = torch.zeros(len(first.tensors), dtype=torch.float64)
    keep = _keeper(kept)
    for piece in pieces():
        for model, delta in enumerate(keep(piece)):
            squares[model] += delta.square().sum(dtype=torch.float64)
    means = (squares / num_elements).to(first.origin.dtype)
    total = means.sum()
    shares = torch.full_like(means, 1 / len(means)) if total.abs() < 1e-6 else means / total
    return Selection(kept, shares)


def sce(selection: Selection) -> Callable[[Piece], torch.Tensor]:
    """Makes the merge of SCE: W_0 + Σ s_i Δ_i m_i / Σ s_i m_i over the elements that vary most.

    s_i is a model's share of the squared lengths, m_i says whether Δ_i has the elected sign.
    """
    keep = _keeper(selection.kept)

    def merge(piece: Piece) -> torch.Tensor:
        deltas = keep(piece)
        sign = _elect_sign_(deltas)
        divisor = torch.zeros_like(piece.origin, dtype=torch.float32)
        for delta, share in zip(deltas, selection.shares.tolist(), strict=True):
            divisor.add_(_is_agreeing(delta).float(), alpha=share)
            delta.mul_(share)
        merged = _restore_sign_(_sum(deltas).to(piece.origin.dtype), sign)
        return merged.div_(divisor.to(merged.dtype).clamp_(min=1e-6)).add_(piece.origin)

    return merge


def _keeper(kept: MagnitudeRange | None) -> Callable[[Piece], list[torch.Tensor]]:
    """Makes a function from one piece after the other to its task vectors, with 0 for elements that are not kept."""
    mask_piece = kept.masker() if kept is not None else None

    def keep(piece: Piece) -> list[torch.Tensor]:
        if mask_piece is None:
            return list(piece.tensors)
        mask = mask_piece(magnitude_bits(_variances(piece)))
        return [apply_mask(delta, mask) for delta in piece.tensors]

    return keep


def _variances(piece: Piece) -> torch.Tensor:
    """Computes the variance over the models of every element, in float32, and rounds it to the dtype of the pieces.

    Σ (Δ_i - mean)² / K, a model at a time: `torch.var` along the first dimension takes twenty times as long.
    """
    mean = _sum(piece.tensors).div_(len(piece.tensors))
    squares = torch.zeros_like(mean)
    for delta in piece.tensors:
        apart = delta - mean
        squares.addcmul_(apart, apart)
    return squares.div_(len(piece.tensors)).to(piece.tensors[0].dtype)
