"""Which elements of a task vector are kept, and by how much the rest is scaled up.

    magnitude        the k largest                                  TIES, arXiv 2306.01708
    outliers         but for the largest γ·n, the k largest         Model Breadcrumbs, arXiv 2312.06795
    random           each with probability p                        DARE, arXiv 2311.03099
    ranks            each with p ± ε, by its rank in its row        DELLA, arXiv 2406.11617

k = p·n of a tensor's n elements, exactly. Of equal ones, the first are kept where the largest are, as a stable sort
would have it. What is kept is scaled by Σ|Δ| / Σ|kept| where `rescale` is on. Probabilities are multiples of 2^-16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from largemerge.arithmetic.band import largest, without_outliers
from largemerge.arithmetic.bits import keep_, magnitudes, mask_of
from largemerge.arithmetic.pieces import Piece, Pieces

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


def row_ranks(delta: torch.Tensor) -> torch.Tensor:
    """The place of every element in its row by magnitude, smallest first, from 0; equals in their order. `[…, N]`.

    The bits of a magnitude and the element's number make one integer: these are sorted, not indices.
    """
    size = delta.shape[-1]
    patterns = magnitudes(delta).reshape(-1, size).numpy()
    small = patterns.dtype == np.int16 and size <= 1 << _INDEX_BITS
    unsigned, shift = (np.uint32, _INDEX_BITS) if small else (np.uint64, 32)
    packed = patterns.astype(unsigned) << unsigned(shift) | np.arange(size, dtype=unsigned)
    packed.sort(axis=-1)
    order = (packed & unsigned((1 << shift) - 1)).astype(np.int64)
    ranks = np.empty(order.shape, dtype=np.int32)
    places = np.arange(size, dtype=np.int32)
    for row, of_row in zip(ranks, order, strict=True):
        row[of_row] = places
    return torch.from_numpy(ranks).view(delta.shape)


def keep_probabilities(delta: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """DELLA: from density - ε for the smallest element of a row to density + ε for the largest, float32."""
    if delta.dim() < 2:
        return keep_probabilities(delta.reshape(1, -1), density, epsilon).view(delta.shape)
    ranks = row_ranks(delta.movedim(1, -1).contiguous()).movedim(-1, 1)
    step = 2 * epsilon / max(1, delta.shape[1] - 1)
    return ranks.float().mul_(step).add_(density - epsilon)


def survey_sparsified(pieces: Pieces, deltas: Callable[[Piece], list[torch.Tensor]], method: str) -> list[Sparsified]:
    """What has to be known of all of a tensor before any of it is sparsified.

    Args:
        pieces: Of all models.
        deltas: The task vectors of a piece.
        method: `magnitude`, `outliers`, `random` or `ranks`.

    Raises:
        FloatingPointError: If probabilities leave the range from 0 to 1.
    """
    first = next(iter(pieces()))
    found = [_masks(pieces, deltas, method, model, first) for model in range(len(first.tensors))]
    if first.options["rescale"]:
        _set_scales(pieces, deltas, found)
    return found


def _masks(
    pieces: Pieces, deltas: Callable[[Piece], list[torch.Tensor]], method: str, model: int, first: Piece
) -> Sparsified:
    each: dict[str, Any] = {name: values[model] for name, values in first.each.items()}
    density = each["density"]
    if density >= 1:
        return Sparsified(lambda: lambda _, delta: torch.full_like(magnitudes(delta), -1))
    if density <= 0:
        return Sparsified(lambda: lambda _, delta: torch.zeros_like(magnitudes(delta)))
    if method == "random":
        return Sparsified(lambda: partial(_drawn, model, density))
    if method == "ranks":
        epsilon = each["epsilon"]
        if density + epsilon >= 1 or density - epsilon <= 0:
            raise FloatingPointError(f"density {density} ± epsilon {epsilon} leaves the range from 0 to 1")
        return Sparsified(lambda: partial(_drawn_by_rank, model, density, epsilon))

    def numbers() -> Iterable[torch.Tensor]:
        return (deltas(piece)[model] for piece in pieces())

    if method == "magnitude":
        band = largest(numbers, first.num_elements, density)
    else:
        band = without_outliers(numbers, first.num_elements, density, each["gamma"])

    def by_magnitude() -> Mask:
        keep = band.new()
        return lambda _, delta: keep(magnitudes(delta))

    return Sparsified(by_magnitude)


def _drawn(model: int, density: float, piece: Piece, delta: torch.Tensor) -> torch.Tensor:
    return mask_of(piece.random(model) < round(density * _STEPS), delta.dtype)


def _drawn_by_rank(model: int, density: float, epsilon: float, piece: Piece, delta: torch.Tensor) -> torch.Tensor:
    chances = keep_probabilities(delta, density, epsilon).mul_(_STEPS).numpy()
    return mask_of(piece.random(model) < chances, delta.dtype)


def _set_scales(pieces: Pieces, deltas: Callable[[Piece], list[torch.Tensor]], found: list[Sparsified]) -> None:
    """Sums up magnitudes before and after; what is kept is remembered, a bit for each element."""
    masks = [each.mask() for each in found]
    sums = np.zeros((len(found), 2))
    remembered: list[list[np.ndarray]] = [[] for _ in found]
    dtype = torch.float32
    for piece in pieces():
        for model, delta in enumerate(deltas(piece)):
            dtype = delta.dtype
            mask = masks[model](piece, delta)
            remembered[model].append(np.packbits(mask.reshape(-1).numpy().view(np.uint8)[:: mask.element_size()] != 0))
            sums[model, 0] += delta.abs().sum(dtype=torch.float64).item()
            sums[model, 1] += keep_(delta, mask).abs().sum(dtype=torch.float64).item()
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
