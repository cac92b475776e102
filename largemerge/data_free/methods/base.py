"""What a data-free method is, and what it is given: a row of the table in `table.py`, pieces of tensors.

A method goes over a tensor once or twice, a piece of all models at a time:

    access(shared parameters)     → how the tensor is read: where it may be cut, whether there is a first pass
    first_pass(all pieces)        → statistics of the whole tensor, such as thresholds or inner products
    prepare(statistics)           → merge
    merge(piece), for every piece → the merged rows

Where a tensor is cut depends on its shape and on the method alone, never on how much memory or how many workers there
are. So random numbers, which are drawn piece by piece, are the same everywhere.
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

from largemerge.config_file import shown

PIECE_ELEMENTS = 1 << 19
"""Elements of one model in a piece: a megabyte in 16 bits, so that a piece of some models stays in a core's cache."""

LARGEST = 1e30
"""The largest number of a parameter that knows no other bound: sums and products of some still fit into float32."""

REQUIRED = object()
"""Stands in the place of a default for parameters that have none."""


class Cut(Enum):
    """Where a method allows a tensor to be cut: between any elements, between rows, or nowhere."""

    ELEMENTS = "elements"
    ROWS = "rows"
    WHOLE = "whole"


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor of all models.

    Attributes:
        tensors: Rows of every model but the base, all of one shape and dtype; some methods are given task vectors
            instead (see `Access.as_task_vectors`).
        base: Rows of the base, where the method has one.
        per_model: Parameters of every model, by name, in the order of `tensors`.
        shared: Parameters of all models together, by name.
        num_elements: Number of elements of the whole tensor.
        key: Seed, tensor and piece, which random numbers depend on.
        auxiliary: Tensors that belong to `tensors` one by one and have their shape, such as Fisher diagonals; empty
            for methods that need none.
    """

    tensors: Sequence[torch.Tensor]
    base: torch.Tensor | None
    per_model: Mapping[str, Sequence[Any]]
    shared: Mapping[str, Any]
    num_elements: int = 0
    key: str = ""
    auxiliary: Sequence[torch.Tensor] = ()

    @property
    def origin(self) -> torch.Tensor:
        """The base, for methods that need one."""
        assert self.base is not None, "the configuration is checked before"
        return self.base

    def task_vector(self, model: int) -> torch.Tensor:
        """Computes Δ_i = W_i - W_0 in float32, for methods whose `tensors` are the models' own."""
        return self.tensors[model].to(torch.float32).sub(self.origin.to(torch.float32))

    def random(self, model: int) -> np.ndarray:
        """Draws integers from 0 to 65535 in the shape of the piece; the same ones at every call."""
        seed = hashlib.sha256(f"{self.key} {model}".encode()).digest()
        generator = np.random.SFC64(list(np.frombuffer(seed, dtype=np.uint32)))
        shape = self.tensors[model].shape
        raw = generator.random_raw(-(-shape.numel() // 4))
        return np.frombuffer(raw, dtype=np.uint16)[: shape.numel()].reshape(shape)


Pieces = Callable[[], Iterator[Piece]]
"""Yields all pieces of a tensor, in order; may be called again."""

Merge = Callable[[Piece], torch.Tensor]
"""Merges one piece after the other, in order."""


def rows_of_pieces(shape: Sequence[int], cut: Cut) -> list[slice]:
    """Cuts a tensor of some shape into the rows of its pieces; a vector's rows are its elements."""
    num_rows = shape[0] if shape else 1
    row_elements = 1
    for size in shape[1:]:
        row_elements *= size
    if cut is Cut.WHOLE or (cut is Cut.ROWS and len(shape) < 2):
        step = max(1, num_rows)
    else:
        step = max(1, PIECE_ELEMENTS // max(1, row_elements))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


class Base(Enum):
    """What `base_model` means to a method."""

    NONE = "is not used: leave base_model out, or name it among the models"
    OPTIONAL = "is optional"
    REQUIRED = "is needed"
    MEMBER = "is one of the models, if there is one"


@dataclass(frozen=True)
class Access:
    """How a method reads a tensor.

    Attributes:
        cut: The places where the tensor may be cut.
        first_pass: Function that reads all pieces before any is merged; `Method.prepare` gets what it returns.
        lazy: Whether a model's tensor is read only when the method asks for it, and not kept.
        as_task_vectors: Whether a piece's tensors are W_i - W_0. Merging may change them in place, the first pass may
            not.
        reread: Whether a lazy method asks for every tensor twice, so that small ones are worth keeping.
    """

    cut: Cut
    first_pass: Callable[[Pieces], Any] | None = None
    lazy: bool = False
    as_task_vectors: bool = False
    reread: bool = False

    @property
    def reads_twice(self) -> bool:
        """Whether tensors that are not kept are read twice."""
        return self.first_pass is not None or self.reread


@dataclass(frozen=True)
class Range:
    """The kind of a parameter whose values are numbers from `low` to `high`.

    Attributes:
        low: The smallest number.
        high: The largest number.
        whole: Whether only whole numbers are allowed.
        above: Whether `low` itself, which is 0, is excluded, and what float32 would round to it, too.
        word: A word that may stand in the place of a number, for what lies beyond all of them; empty for none.
    """

    low: float = -LARGEST
    high: float = LARGEST
    whole: bool = False
    above: bool = False
    word: str = ""

    @property
    def expected(self) -> str:
        """What the values are, in words."""
        return self._in_words(everything=False)

    def _in_words(self, *, everything: bool) -> str:
        """Describes the range; its widest bounds only if asked for."""
        low = f" {'above' if self.above else 'from'} {self.low:g}" if everything or self.low > -LARGEST else ""
        high = f"{' and up' if self.above else ''} to {self.high:g}" if everything or self.high < LARGEST else ""
        return f"a {'whole ' if self.whole else ''}number{low}{high}{f', or {self.word}' if self.word else ''}"

    def read(self, value: Any) -> Any:
        """Returns a value as a number, which may be quoted in the file, or as the word that stands for one.

        Raises:
            ValueError: If it is neither, or lies outside the range.
        """
        if self.word and isinstance(value, str) and value.strip() == self.word:
            return self.word
        number = _as_number(value)
        if self.whole and isinstance(number, float) and number.is_integer():
            number = int(number)
        if not isinstance(number, int if self.whole else int | float) or not -math.inf < number < math.inf:
            raise ValueError(f"expected {self.expected}, found {shown(value)}")
        lowest = 1 / LARGEST if self.above else self.low
        if lowest <= number <= self.high:
            return number
        is_extreme = number < -LARGEST or (number > self.low and not lowest <= number <= LARGEST)
        raise ValueError(f"expected {self._in_words(everything=is_extreme)}, found {shown(value)}")

    def problem(self, value: Any) -> str | None:
        """Says what is wrong with a value; `None` if nothing is."""
        return _problem(self, value)


@dataclass(frozen=True)
class Flag:
    """The kind of a parameter that is true or false."""

    expected = "true or false"

    def read(self, value: Any) -> Any:
        """Returns a value as a truth value, which may be quoted in the file, or be 1 or 0.

        Raises:
            ValueError: If it is none.
        """
        if isinstance(value, str) and value.strip().lower() in _TRUTHS:
            return _TRUTHS[value.strip().lower()]
        if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
            return bool(value)
        raise ValueError(f"expected {self.expected}, found {shown(value)}")

    def problem(self, value: Any) -> str | None:
        """Says what is wrong with a value; `None` if nothing is."""
        return _problem(self, value)


@dataclass(frozen=True)
class Choice:
    """The kind of a parameter that is one of some words.

    Attributes:
        words: The words.
    """

    words: tuple[str, ...]

    @property
    def expected(self) -> str:
        """What the values are, in words."""
        return f"one of {', '.join(self.words)}"

    def read(self, value: Any) -> Any:
        """Returns a value that is one of the words.

        Raises:
            ValueError: If it is none.
        """
        if isinstance(value, str) and value.strip() in self.words:
            return value.strip()
        raise ValueError(f"expected {self.expected}, found {shown(value)}")

    def problem(self, value: Any) -> str | None:
        """Says what is wrong with a value; `None` if nothing is."""
        return _problem(self, value)


@dataclass(frozen=True)
class FilePath:
    """The kind of a parameter that is the path of a file, or of a folder with some, of tensors."""

    expected = "a .safetensors file, or a folder with some"

    def read(self, value: Any) -> Any:
        """Returns a value that is a text.

        Raises:
            ValueError: If it is none.
        """
        if isinstance(value, str) and value.strip():
            return value
        raise ValueError(f"expected {self.expected}, found {shown(value)}")

    def problem(self, value: Any) -> str | None:
        """Says what is wrong with a value; `None` if nothing is."""
        return _problem(self, value)


Kind = Range | Flag | Choice | FilePath
"""What values a parameter may have."""

_TRUTHS = {word: True for word in ("true", "yes", "on", "1")} | {word: False for word in ("false", "no", "off", "0")}


def _as_number(value: Any) -> Any:
    """Reads a number in quotes; anything that is no number comes back as `None`."""
    if isinstance(value, str):
        try:
            return float(value) if not value.strip().lstrip("+-").isdigit() else int(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _problem(kind: Kind, value: Any) -> str | None:
    try:
        kind.read(value)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class MatrixFormula:
    """What else there is to know of a method whose formula holds for weight matrices only.

    Attributes:
        fallback: Merges the pieces of every other tensor.
        fallback_name: What `fallback` computes, in words for reports.
        work_bytes: Function from a matrix's rows and columns to the most bytes that the formula allocates beside the
            tensors that it is given.
    """

    fallback: Merge
    fallback_name: str
    work_bytes: Callable[[int, int], int]


@dataclass(frozen=True)
class UnscaledDelta:
    """A merged task vector, or a piece of one, before it is multiplied by the whole model's factor.

    Attributes:
        vector: The merged task vector, float32.
        squares: Σ x² of the merged task vector, then of every model's.
    """

    vector: torch.Tensor
    squares: tuple[float, ...]


@dataclass(frozen=True)
class GlobalScale:
    """How a method with a factor of the whole model merges: all task vectors first, then each times that factor.

    Attributes:
        matrix: Merges a weight matrix.
        fallback: Merges the pieces of any other tensor.
        factor: Function from the sums of `UnscaledDelta.squares` over the whole model to the factor.
    """

    matrix: Callable[[Piece], UnscaledDelta]
    fallback: Callable[[Piece], UnscaledDelta]
    factor: Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Measurement:
    """What a method measures of the models while it merges them, for the report.

    Attributes:
        name: What it is called in the report.
        title: The same on the terminal.
        sums: Function from a piece to numbers that add up over the pieces of a tensor, and over tensors.
        summary: Function from such sums to what the report has, plain JSON values.
        in_words: Function from a summary of the whole model to a line for the terminal.
    """

    name: str
    title: str
    sums: Callable[[Piece], list[float]]
    summary: Callable[[Sequence[float]], dict[str, Any]]
    in_words: Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: The method's name in reports and model cards.
        source: The paper, or where else the method comes from.
        access: Function from the shared parameters to how a tensor is read.
        prepare: Function from what the first pass has found (`None` without one) to what merges the pieces.
        base: What `base_model` means to the method.
        num_models: Fewest and most models, the base not counted.
        shared: Parameters of all models together, with their defaults.
        per_model: Parameters of every model, with their defaults; the base needs none.
        kinds: What values each of the parameters may have.
        conflict: Function from the parameters of every model and the shared ones, each right by itself, to what is
            wrong with them together; `None` if nothing is.
        idle: Function from the same to why nothing of any model would be added to the base; `None` if something is.
        note: Function from the same to what a user should know of them; `None` if nothing.
        auxiliary_parameter: Name of the parameter whose value for each model is a file or folder of tensors as large
            as the model's own.
        matrix_formula: The rest of a method whose formula holds for weight matrices only.
        global_scale: The functions of a method with a factor of the whole model; its `prepare` merges a tensor as if
            it were the whole model.
        measurement: What is measured while tensors are merged, for the report.
        leads: Whether the first model is the one that is changed, so that all of the output has a place in it.
    """

    title: str
    source: str
    access: Callable[[Mapping[str, Any]], Access]
    prepare: Callable[[Any], Merge]
    base: Base
    num_models: tuple[int, int] = (1, 1 << 30)
    shared: Mapping[str, Any] = field(default_factory=dict)
    per_model: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    conflict: Callable[[Mapping[str, Sequence[Any]], Mapping[str, Any]], str | None] = lambda _, __: None
    idle: Callable[[Mapping[str, Sequence[Any]], Mapping[str, Any]], str | None] = lambda _, __: None
    note: Callable[[Mapping[str, Sequence[Any]], Mapping[str, Any]], str | None] = lambda _, __: None
    auxiliary_parameter: str | None = None
    matrix_formula: MatrixFormula | None = None
    global_scale: GlobalScale | None = None
    measurement: Measurement | None = None
    leads: bool = False

    @property
    def chooses_elements(self) -> bool:
        """Whether single elements of a model may be left out, so that what is not finite among them would not show."""
        return not {"density", "sparsity", "select_topk"}.isdisjoint((*self.per_model, *self.shared))


def select_formula(
    method: Method, shared: Mapping[str, Any], *, falls_back: bool
) -> tuple[Access, Callable[[Any], Merge]]:
    """Selects how one tensor is read and what prepares its merge: the method's formula, or its fallback.

    Args:
        method: The row of the table.
        shared: The shared parameters of this tensor.
        falls_back: Whether the tensor is no weight matrix, which matters only to methods of weight matrices.
    """
    if not falls_back or method.matrix_formula is None:
        return method.access(shared), method.prepare
    # A factor of a model that is this tensor alone is known only when all of the tensor is: nothing may be cut.
    cut = Cut.ELEMENTS if method.global_scale is None else Cut.WHOLE
    return Access(cut), without_first_pass(method.matrix_formula.fallback)


def fixed_access(
    cut: Cut, first_pass: Callable[[Pieces], Any] | None = None, **more: bool
) -> Callable[[Mapping[str, Any]], Access]:
    """Makes a `Method.access` that ignores the parameters; `more` are the other fields of `Access`."""
    return lambda _: Access(cut, first_pass, **more)


def without_first_pass(merge: Merge) -> Callable[[Any], Merge]:
    """Makes the `Method.prepare` of a method that merges every piece without a look at the others."""
    return lambda _: merge


def with_first_pass(merge: Callable[[Piece, Any], torch.Tensor]) -> Callable[[Any], Merge]:
    """Makes the `Method.prepare` of a method that merges a piece by what the first pass has found."""
    return lambda found: lambda piece: merge(piece, found)
