"""A tensor of all models at once, cut into pieces.

Where the cuts are depends on the tensor's shape and on the method alone, never on how much memory there is or on how
many workers there are: so random numbers, which are drawn piece by piece, are the same everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

PIECE_ELEMENTS = 1 << 19
"""Of one model: a megabyte in 16 bits, so that a piece of some models stays in a core's cache."""


class Cut(Enum):
    """Where a method allows a tensor to be cut: between any elements, between rows, or nowhere."""

    ELEMENTS = "elements"
    ROWS = "rows"
    WHOLE = "whole"


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor of all models.

    Attributes:
        tensors: Of every model but the base, all of one shape and dtype; for some methods less the base (see
            `Way.less_base`).
        base: Of the base, where the method has one.
        each: Parameters of every model, by name, in the order of `tensors`.
        options: Parameters of all models together, by name.
        first: Number of the first element in the whole tensor.
        num_elements: Of the whole tensor.
        key: Of random numbers: seed, tensor, piece.
        companions: What belongs to each of `tensors` and has its shape; empty for methods that want none.
    """

    tensors: Sequence[torch.Tensor]
    base: torch.Tensor | None
    each: Mapping[str, Sequence[Any]]
    options: Mapping[str, Any]
    first: int = 0
    num_elements: int = 0
    key: str = ""
    companions: Sequence[torch.Tensor] = ()

    @property
    def origin(self) -> torch.Tensor:
        """The base, for methods that need one."""
        assert self.base is not None, "the configuration is checked before"
        return self.base

    def random(self, model: int) -> np.ndarray:
        """Random integers from 0 to 65535, in the shape of the piece; the same whenever asked for."""
        seed = hashlib.sha256(f"{self.key} {model}".encode()).digest()
        generator = np.random.SFC64(list(np.frombuffer(seed, dtype=np.uint32)))
        shape = self.tensors[model].shape
        raw = generator.random_raw(-(-shape.numel() // 4))
        return np.frombuffer(raw, dtype=np.uint16)[: shape.numel()].reshape(shape)


Pieces = Callable[[], Iterator[Piece]]
"""All pieces of a tensor, in order; may be called again."""


def rows_of_pieces(shape: Sequence[int], cut: Cut) -> list[slice]:
    """Which rows each piece of a tensor of some shape has; a vector's rows are its elements."""
    num_rows = shape[0] if shape else 1
    row_elements = 1
    for size in shape[1:]:
        row_elements *= size
    if cut is Cut.WHOLE or (cut is Cut.ROWS and len(shape) < 2):
        step = max(1, num_rows)
    else:
        step = max(1, PIECE_ELEMENTS // max(1, row_elements))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
