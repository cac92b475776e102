"""Which elements of a task vector are kept, and by how much the rest is scaled up.

    magnitude        the k largest                                  TIES, arXiv 2306.01708
    outliers         but for the largest γ·n, the k largest         Model Breadcrumbs, arXiv 2312.06795
    random           each with probability p                        DARE, arXiv 2311.03099
    ranks            each with p ± ε, by its rank in its row        DELLA, arXiv 2406.11617

k = p·n of a tensor's n elements, exactly. Of equal ones, the first are kept where the largest are, as a stable sort
would have it. What is kept is scaled by Σ|Δ| / Σ|kept| where `rescale` is on. Probabilities are multiples of 2^-16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from largemerge.arithmetic.band import Band, largest, without_outliers
from largemerge.arithmetic.bits import kept, magnitudes, mask_of
from largemerge.arithmetic.pieces import Piece, Pieces
from largemerge.arithmetic.sums import sum_of_magnitudes

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
