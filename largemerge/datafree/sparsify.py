"""Which elements of a task vector are kept, and by how much the rest is scaled up.

    magnitude        the k largest                                  TIES, arXiv 2306.01708
    outliers         but for the largest γ·n, the k largest         Model Breadcrumbs, arXiv 2312.06795
    random           each with probability p                        DARE, arXiv 2311.03099
    ranks            each with p ± ε, by its rank in its row        DELLA, arXiv 2406.11617

k = p·n of a tensor's n elements, exactly. Of equal ones, the first are kept where the largest are, as a stable sort
would have it. What is kept is scaled by Σ|Δ| / Σ|kept| where `rescale` is on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from largemerge.datafree.pieces import Piece, Pieces
from largemerge.datafree.selection import OrderStatistic, order_statistics

_SMALLEST_NORM = 1e-7  # below it nothing is scaled


@dataclass
class Band:
    """Keeps the elements whose places, were they sorted by magnitude, lie in a range; equals in their order.

    Attributes:
        low: The smallest one that is kept; `None`: from the very smallest on.
        num_low: How many of those equal to it are kept.
        low_first: Whether these are the first of them, or the last.
        high: The smallest one that is dropped for being large; `None`: up to the largest.
        num_high: How many of those equal to it are kept, the first ones.
    """

    low: OrderStatistic | None
    num_low: int
    low_first: bool
    high: OrderStatistic | None = None
    num_high: int = 0

    def new(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from the magnitudes of one piece after the other to what is kept of each, bool."""
        seen = {"low": 0, "high": 0}

        def some_equals(kept: torch.Tensor, equal: torch.Tensor, which: str, first: int, stop: int) -> None:
            """Keeps the equals with numbers from `first` on up to `stop`, over all pieces."""
            places = equal.reshape(-1).nonzero().flatten()
            start = seen[which]
            seen[which] += len(places)
            kept.view(-1)[places[max(0, first - start) : max(0, stop - start)]] = True

        def keep(magnitudes: torch.Tensor) -> torch.Tensor:
            kept = torch.ones_like(magnitudes, dtype=torch.bool)
            if self.low is not None:
                kept = magnitudes > self.low.value
            if self.high is not None:
                kept &= magnitudes < self.high.value
            low_counts = self.low is not None and (self.high is None or self.low.value < self.high.value)
            if low_counts and self.low is not None:
                first = 0 if self.low_first else self.low.num_equal - self.num_low
                some_equals(kept, magnitudes == self.low.value, "low", first, first + self.num_low)
            if self.high is not None:
                # With low and high equal, one run of equals is cut at both ends.
                dropped = 0 if low_counts or self.low is None else self.low.num_equal - self.num_low
                some_equals(kept, magnitudes == self.high.value, "high", dropped, self.num_high)
            return kept

        return keep


NOTHING = Band(None, 0, True, OrderStatistic(0.0, 0, 0), 0)


@dataclass
class Sparsified:
    """How one model's task vector is sparsified.

    Attributes:
        mask: Makes a function from (piece, task vector) to what is kept, for one pass over all pieces.
        scale: Of what is kept, in the dtype of the task vector; `None` where nothing is scaled.
    """

    mask: Callable[[], Callable[[Piece, torch.Tensor], torch.Tensor]]
    scale: torch.Tensor | None = None


def largest(magnitudes: Callable[[], Iterable[torch.Tensor]], num_elements: int, density: float) -> Band:
    """The k = density · n largest, at least one."""
    count = max(1, int(density * num_elements))
    (low,) = order_statistics(magnitudes, [num_elements - count])
    num_larger = num_elements - low.num_below - low.num_equal
    return Band(low, count - num_larger, low_first=True)


def without_outliers(
    magnitudes: Callable[[], Iterable[torch.Tensor]], num_elements: int, density: float, gamma: float
) -> Band:
    """The k largest but for γ·n larger ones; fewer outliers go where there are not k others."""
    count, num_top = int(density * num_elements), int(gamma * num_elements)
    num_bottom = num_elements - count - num_top
    if num_bottom < 0:
        num_top, num_bottom = num_top + num_bottom, 0
    if count == 0:
        return NOTHING
    low, high = order_statistics(magnitudes, [min(num_bottom, num_elements - 1), num_elements - max(1, num_top)])
    # A stable sort, smallest first, has the first of some equals lowest: those go first.
    band = Band(low, low.num_equal - (num_bottom - low.num_below), low_first=False)
    if num_top > 0:
        band.high, band.num_high = high, num_elements - num_top - high.num_below
    return band


def row_ranks(magnitudes: torch.Tensor) -> torch.Tensor:
    """The place of every element in its row, smallest first, from 0; equals in their order. int64 `[…, N]`.

    The bits of a magnitude and the element's number make one integer: these are sorted, not indices.
    """
    size = magnitudes.shape[-1]
    rows = magnitudes.reshape(-1, size).float().contiguous()
    patterns = rows.view(torch.int32).numpy().astype(np.uint64)
    shift = np.uint64(32)
    packed = np.sort(patterns << shift | np.arange(size, dtype=np.uint64), axis=-1)
    order = (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(size), order.shape), axis=-1)
    return torch.from_numpy(ranks).view(magnitudes.shape)


def keep_probabilities(delta: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """DELLA: from density - ε for the smallest element of a row to density + ε for the largest, float32."""
    if delta.dim() < 2:
        return keep_probabilities(delta.reshape(1, -1), density, epsilon).view(delta.shape)
    ranks = row_ranks(delta.abs().movedim(1, -1)).movedim(-1, 1)
    share = ranks.float() / max(1, delta.shape[1] - 1)
    return share.mul_(2 * epsilon).add_(density - epsilon)


def survey_sparsified(pieces: Pieces, deltas: Callable[[Piece], list[torch.Tensor]], method: str) -> list[Sparsified]:
    """What has to be known of all of a tensor before any of it is sparsified.

    Args:
        pieces: Of all models.
        deltas: The task vectors of a piece.
        method: `magnitude`, `outliers`, `random` or `ranks`.
    """
    first = next(iter(pieces()))
    found = [_masks(pieces, deltas, method, model, first) for model in range(len(first.tensors))]
    if not first.options["rescale"]:
        return found
    for model, sparsified in enumerate(found):
        sparsified.scale = _scale(pieces, deltas, model, sparsified.mask())
    return found


def _masks(
    pieces: Pieces, deltas: Callable[[Piece], list[torch.Tensor]], method: str, model: int, first: Piece
) -> Sparsified:
    each: dict[str, Any] = {name: values[model] for name, values in first.each.items()}
    density, num_elements = each["density"], first.num_elements

    def magnitudes() -> Iterable[torch.Tensor]:
        return (deltas(piece)[model].abs_() for piece in pieces())

    if density >= 1:
        return Sparsified(lambda: lambda _, delta: torch.ones_like(delta, dtype=torch.bool))
    if density <= 0:
        return Sparsified(lambda: lambda _, delta: torch.zeros_like(delta, dtype=torch.bool))
    if method == "random":
        return Sparsified(lambda: lambda piece, _: piece.uniform(model) < density)
    if method == "ranks":
        epsilon = each["epsilon"]
        if density + epsilon >= 1 or density - epsilon <= 0:
            raise FloatingPointError(f"density {density} ± epsilon {epsilon} leaves the range from 0 to 1")
        return Sparsified(
            lambda: lambda piece, delta: piece.uniform(model) < keep_probabilities(delta, density, epsilon)
        )
    if method == "magnitude":
        band = largest(magnitudes, num_elements, density)
    else:
        band = without_outliers(magnitudes, num_elements, density, each["gamma"])

    def by_magnitude() -> Callable[[Piece, torch.Tensor], torch.Tensor]:
        keep = band.new()
        return lambda _, delta: keep(delta.abs())

    return Sparsified(by_magnitude)


def _scale(
    pieces: Pieces,
    deltas: Callable[[Piece], list[torch.Tensor]],
    model: int,
    mask: Callable[[Piece, torch.Tensor], torch.Tensor],
) -> torch.Tensor | None:
    before = after = 0.0
    dtype = torch.float32
    for piece in pieces():
        delta = deltas(piece)[model]
        dtype = delta.dtype
        magnitudes = delta.abs().float()
        before += magnitudes.sum(dtype=torch.float64).item()
        after += magnitudes.mul_(mask(piece, delta)).sum(dtype=torch.float64).item()
    if before < _SMALLEST_NORM or after < _SMALLEST_NORM:
        return None
    return torch.tensor(before, dtype=dtype) / torch.tensor(after, dtype=dtype)
