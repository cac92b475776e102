"""A tensor of all models at once, cut into pieces.

Where the cuts are depends on the tensor's shape and on the method alone, never on how much memory there is or on how
many workers there are: so random numbers, which are drawn piece by piece, are the same everywhere.

What a data-free method is: one row of the table in `registry.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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


REQUIRED = object()
"""In the place of a default: there is none."""

Merge = Callable[[Piece], torch.Tensor]
"""Merges one piece after the other, in order."""


class Base(Enum):
    """What a method wants of `base_model`."""

    NONE = "is not used: leave base_model out, or name it among the models"
    OPTIONAL = "is optional"
    REQUIRED = "is needed"
    MEMBER = "is one of the models, if there is one"


@dataclass(frozen=True)
class Way:
    """How a method goes about a tensor.

    Attributes:
        cut: Where the tensor may be cut.
        survey: Reads all pieces first; what it finds goes to `Method.begin`.
        one_by_one: A model's tensor is read when the method asks for it, and not kept.
        twice: It asks for every one twice: small ones are kept.
        less_base: All that the method wants of a model is its task vector: a piece's tensors are W_i - W_0, and
            merging, not the survey, may change them.
    """

    cut: Cut
    survey: Callable[[Pieces], Any] | None = None
    one_by_one: bool = False
    less_base: bool = False
    twice: bool = False

    @property
    def reads_again(self) -> bool:
        """Whether tensors that are not kept are read twice."""
        return self.survey is not None or self.twice


@dataclass(frozen=True)
class Range:
    """Which values a parameter may have."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False
    """`low` itself is not one of them."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value."""
        kinds = int if self.whole else int | float
        number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        if number and self.low <= value <= self.high and not (self.above and value == self.low):
            return None
        low = "" if self.low == -math.inf else f" {'above' if self.above else 'from'} {self.low:g}"
        high = "" if self.high == math.inf else f" to {self.high:g}"
        return f"expected a {'whole ' if self.whole else ''}number{low}{high}, found {value!r}"


@dataclass(frozen=True)
class Matrices:
    """A method whose formula is one of matrices.

    Attributes:
        others: Merges the pieces of what is no weight matrix, or too large a one.
        others_are: What `others` makes of them, for people.
        work_bytes: From a matrix's rows and columns to what the formula allocates, at most, beside the tensors that it
            is given.
    """

    others: Merge
    others_are: str
    work_bytes: Callable[[int, int], int]


@dataclass(frozen=True)
class Unscaled:
    """A merged task vector, or a piece of one, before the whole model's factor.

    Attributes:
        vector: float32.
        squares: Of it and of every model's task vector, in this order: Σ x².
    """

    vector: torch.Tensor
    squares: tuple[float, ...]


@dataclass(frozen=True)
class Scaled:
    """A method that makes merged task vectors first, and multiplies all of them by one factor of the whole model.

    Attributes:
        matrix: Merges a weight matrix.
        others: Merges the pieces of what is none.
        factor: From the sums of `Unscaled.squares` over the whole model.
    """

    matrix: Callable[[Piece], Unscaled]
    others: Callable[[Piece], Unscaled]
    factor: Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: For people.
        source: Paper, or where it comes from.
        way: From the parameters of all models together.
        begin: From what the survey has found, to what merges the pieces.
        base: What it wants of `base_model`.
        num_models: Fewest and most models, the base not counted.
        options: Parameters of all models together, with their defaults.
        each: Parameters of every model, with their defaults; the base needs none.
        ranges: Of parameters that are numbers of some range.
        companion: The parameter of every model that names a folder or file of tensors as large as the model's own.
        matrices: Of methods whose formula is one of matrices.
        scaled: Of methods with a factor of the whole model; `begin` then knows one tensor only.
    """

    title: str
    source: str
    way: Callable[[Mapping[str, Any]], Way]
    begin: Callable[[Any], Merge]
    base: Base
    num_models: tuple[int, int] = (1, 1 << 30)
    options: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    companion: str | None = None
    matrices: Matrices | None = None
    scaled: Scaled | None = None


def way_of(method: Method, options: Mapping[str, Any], *, other: bool) -> tuple[Way, Callable[[Any], Merge]]:
    """The way and `begin` for one tensor.

    Args:
        method: The row.
        options: Of this tensor.
        other: The method's formula is one of matrices, and the tensor is none.
    """
    if not other or method.matrices is None:
        return method.way(options), method.begin
    # The factor of a model that is one tensor is known when all of it is.
    return Way(Cut.ELEMENTS if method.scaled is None else Cut.WHOLE), plain(method.matrices.others)


def always(cut: Cut, survey: Callable[[Pieces], Any] | None = None, **more: bool) -> Callable[[Mapping[str, Any]], Way]:
    """The same way whatever the parameters are; `more` as `Way` has it."""
    return lambda _: Way(cut, survey, **more)


def plain(merge: Merge) -> Callable[[Any], Merge]:
    """Of a method that surveys nothing."""
    return lambda _: merge


def knowing(merge: Callable[[Piece, Any], torch.Tensor]) -> Callable[[Any], Merge]:
    """Of a method that looks at what its survey has found in every piece."""
    return lambda found: lambda piece: merge(piece, found)
