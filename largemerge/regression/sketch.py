"""Norms of differences between matrices that are never in memory together.

When the merged weight is known, the candidates' are gone. What is kept of each is a random projection from both
sides, some kilobytes whatever the size; the norm of a difference of projections estimates the norm of the difference:

    ‖M‖²  ≈  ‖L M S‖² / S      S: random signs `[I, S]`; L: rows with random signs, summed into buckets

The relative error of a norm is about 1/√(2S), 12 %.

Shapes: O rows of all linears of a group, I columns, S columns of a sketch, B buckets of all linears.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_COLUMNS = 32
_BUCKETS = 64


class Sketcher:
    """Projects the weights of the linears of a group.

    Args:
        outputs: Rows of each linear; they lie below one another.
        num_inputs: I.
        device: Where the weights are.
    """

    def __init__(self, outputs: Sequence[int], num_inputs: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(num_inputs)
        self._right_IS = _signs((num_inputs, _COLUMNS), generator).to(device)
        self._left_O = _signs((sum(outputs),), generator).to(device)
        own = [torch.arange(rows) % _BUCKETS + number * _BUCKETS for number, rows in enumerate(outputs)]
        self._bucket_O = torch.cat(own).to(device)
        self._num_buckets = _BUCKETS * len(outputs)

    def empty(self) -> torch.Tensor:
        """The sketch of zeros `[B, S]`."""
        return torch.zeros(self._num_buckets, _COLUMNS, device=self._right_IS.device)

    def add_(self, sketch_BS: torch.Tensor, rows: slice, part_OI: torch.Tensor) -> None:
        """Adds some rows of a matrix to its sketch."""
        part_OS = (part_OI @ self._right_IS).mul_(self._left_O[rows, None])
        sketch_BS.index_add_(0, self._bucket_O[rows], part_OS)

    def norm(self, sketch_BS: torch.Tensor, linear: int) -> float:
        """Estimated norm of the part of a matrix that belongs to linear number `linear`."""
        own_BS = sketch_BS[linear * _BUCKETS : (linear + 1) * _BUCKETS]
        return float(own_BS.norm()) / math.sqrt(_COLUMNS)


def sketch_bytes(num_linears: int) -> int:
    """Of one candidate's sketch of a group of linears."""
    return 4 * _BUCKETS * _COLUMNS * num_linears


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
