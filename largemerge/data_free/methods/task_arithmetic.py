"""Which elements of a task vector are kept, and by how much the rest is scaled up.

    magnitude        the k largest                                  TIES, arXiv 2306.01708
    outliers         but for the largest γ·n, the k largest         Model Breadcrumbs, arXiv 2312.06795
    random           each with probability p                        DARE, arXiv 2311.03099
    ranks            each with p ± ε, by its rank in its row        DELLA, arXiv 2406.11617

k = p·n of a tensor's n elements, exactly. Of equal ones, the first are kept where the largest are, as a stable sort
would have it. What is kept is scaled by Σ|Δ| / Σ|kept| where `rescale` is on. Probabilities are multiples of 2^-16.

Task arithmetic and its kin: differences to a base, sparsified, weighed, maybe agreed upon in sign, added up.

    Δ_i = sparsified(W_i - W_0)        W = W_0 + λ · Σ w_i Δ_i m_i / Σ w_i m_i

m_i is 1, or, for methods that elect a sign for every element, whether w_i Δ_i has the sign of Σ w_i Δ_i. The divisor is
left out unless `normalize` is on. A negative weight takes a task away (arXiv 2212.04089). Differences and products are
rounded to the dtype of the tensors, sums are made in float32 and then rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from largemerge.data_free.methods.base import Piece, Pieces
from largemerge.data_free.methods.exact_statistics import (
    Band,
    integers,
    keep_,
    kept,
    largest,
    largest_of,
    magnitudes,
    mask_of,
    sum_of_magnitudes,
    without_outliers,
)

_SMALLEST_NORM = 1e-7  # below it nothing is scaled
_STEPS = 1 << 16  # of probabilities
_INDEX_BITS = 17  # of the longest row whose ranks fit into 32 bits, beside a magnitude of 15 bits

Mask = Callable[[Piece, torch.Tensor], torch.Tensor]
"""From a piece and a task vector in it to what is kept; called with one piece after the other."""


@dataclass
class Sparsified:
    """How one model's task vector is sparsified.

    Attributes:
        mask: Makes a `Mask` for one pass over all pieces.
        scale: Of what is kept, in the dtype of the task vector; `None` where nothing is scaled.
    """

    mask: Callable[[], Mask]
    scale: torch.Tensor | None = None


def by_row_rank(delta: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of `[…, N]` every element's value by its place in its row: `[N]`, for the smallest magnitude first.

    Equals are in their order. The bits of a magnitude and the element's number make one integer: these are sorted, not
    indices.
    """
    size = delta.shape[-1]
    patterns = magnitudes(delta).reshape(-1, size).numpy()
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


def _limits(size: int, density: float, epsilon: float) -> torch.Tensor:
    """DELLA: the largest random integer with which an element is kept, by its place in a row of some size.

    Probabilities go from density - ε for the smallest element to density + ε for the largest, in float32. The integers
    are those from 0 to 65535, as bits of int16.
    """
    step = 2 * epsilon / max(1, size - 1)
    chances = torch.arange(size, dtype=torch.float32).mul_(step).add_(density - epsilon).mul_(_STEPS)
    return torch.from_numpy(chances.ceil().sub_(1).clamp_(0, _STEPS - 1).numpy().astype(np.uint16).view(np.int16))


def survey_sparsified(pieces: Pieces, method: str) -> list[Sparsified]:
    """What has to be known of all of a tensor before any of it is sparsified.

    Args:
        pieces: Of all models' task vectors.
        method: `magnitude`, `outliers`, `random` or `ranks`.

    Raises:
        FloatingPointError: If probabilities leave the range from 0 to 1.
    """
    first = next(iter(pieces()))
    densities = first.each["density"]
    some = [model for model, density in enumerate(densities) if 0 < density < 1]
    found = [Sparsified(_all if density >= 1 else _nothing) for density in densities]
    for model, mask in zip(some, _masks(pieces, method, some, first) if some else (), strict=True):
        found[model].mask = mask
    if first.options["rescale"]:
        _set_scales(pieces, found)
    return found


def _all() -> Mask:
    return lambda _, delta: torch.full_like(magnitudes(delta), -1)


def _nothing() -> Mask:
    return lambda _, delta: torch.zeros_like(magnitudes(delta))


def _masks(pieces: Pieces, method: str, models: Sequence[int], first: Piece) -> list[Callable[[], Mask]]:
    """Of some models, whose task vectors are neither kept nor dropped as a whole."""
    each = {name: [values[model] for model in models] for name, values in first.each.items()}
    densities = each["density"]
    if method == "random":
        drawn = [partial(_drawn, model, density) for model, density in zip(models, densities, strict=True)]
        return [partial(_same, mask) for mask in drawn]
    if method == "ranks":
        return [
            partial(_same, _by_rank(model, density, epsilon, first))
            for model, density, epsilon in zip(models, densities, each["epsilon"], strict=True)
        ]

    def numbers() -> Iterator[Iterator[torch.Tensor]]:
        return ((piece.tensors[model] for model in models) for piece in pieces())

    if method == "magnitude":
        bands = largest(numbers, first.num_elements, densities)
    else:
        bands = without_outliers(numbers, first.num_elements, densities, each["gamma"])
    return [partial(_by_magnitude, band) for band in bands]


def _same(mask: Mask) -> Mask:
    """Of masks that remember nothing from piece to piece."""
    return mask


def _by_magnitude(band: Band) -> Mask:
    keep = band.new()
    return lambda _, delta: keep(magnitudes(delta))


def _drawn(model: int, density: float, piece: Piece, delta: torch.Tensor) -> torch.Tensor:
    return mask_of(piece.random(model) < round(density * _STEPS), delta.dtype)


def _by_rank(model: int, density: float, epsilon: float, first: Piece) -> Mask:
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


def _set_scales(pieces: Pieces, found: list[Sparsified]) -> None:
    """Sums up magnitudes before and after; what is kept is remembered, a bit for each element."""
    masks = [each.mask() for each in found]
    sums = np.zeros((len(found), 2))
    remembered: list[list[np.ndarray]] = [[] for _ in found]
    dtype = torch.float32
    for piece in pieces():
        for model, of_model in enumerate(masks):
            numbers = piece.tensors[model]
            dtype = numbers.dtype
            mask = of_model(piece, numbers)
            remembered[model].append(np.packbits(mask.reshape(-1).numpy() != 0))
            sums[model, 0] += sum_of_magnitudes(numbers)
            sums[model, 1] += sum_of_magnitudes(kept(numbers, mask))
    for (before, after), packed, each in zip(sums.tolist(), remembered, found, strict=True):
        each.mask = partial(_remembered, packed)
        if before >= _SMALLEST_NORM and after >= _SMALLEST_NORM:
            each.scale = torch.tensor(before, dtype=dtype) / torch.tensor(after, dtype=dtype)


def _remembered(packed: list[np.ndarray]) -> Mask:
    coming = iter(packed)

    def mask(_: Piece, delta: torch.Tensor) -> torch.Tensor:
        kept = np.unpackbits(next(coming), count=delta.numel())
        return mask_of(kept, delta.dtype).view(delta.shape)

    return mask


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
