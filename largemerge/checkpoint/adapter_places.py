"""Where the weights that an adapter names lie on disk.

    adapter's module path + leaf ──► Places.find ──► Place: names on disk, shape, module

An adapter names modules of the model that it was trained on; a checkpoint's file may have other names (those of an
older Transformers, or of a tower without its prefix) or another layout (experts one by one, fused in the module).
`model/adapter_names.py` finds the places through the model's class. What stands here goes by the names on disk alone,
for models whose class cannot be had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from largemerge.checkpoint.index import Checkpoint

INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""Ends of the names of input embeddings."""
_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Block:
    """A rectangle of one matrix, or of one expert's matrix in a tensor of several.

    Attributes:
        expert: The expert, or `None` for a matrix.
        axis: Axis of the matrix that is cut.
        start: First index on that axis.
        stop: Index behind the last one.
        transposed: Whether the other tensor holds the rectangle's transpose.
    """

    expert: int | None
    axis: int
    start: int
    stop: int
    transposed: bool

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """Returns the rectangle of a matrix, as the other tensor holds it; a view."""
        cut = matrix.narrow(self.axis, self.start, self.stop - self.start)
        return cut.T if self.transposed else cut


@dataclass(frozen=True)
class Place:
    """Where one parameter of the adapter's model lies on disk.

    Attributes:
        pieces: Names on disk that it is made of, each with its block of the parameter, or `None` if it is all of it.
        inside: The block of the tensor on disk that it is, where that holds more than this parameter.
        shape: Its shape in the module.
        fused: Whether the module holds it in a tensor of several experts.
        tied: Names of all parameters that are this very tensor, the one on disk first; one where it is not tied.
        separable: Those of them, but the first, that an untied model has as tensors of their own.
        module: The module that holds it, on the meta device; `None` if the class is not known.
        has_blocks: Whether what lies on disk are blocks of it; else nothing can be added to it there.
    """

    pieces: Mapping[str, Block | None]
    shape: tuple[int, ...]
    inside: Block | None = None
    fused: bool = False
    tied: tuple[str, ...] = ()
    separable: tuple[str, ...] = ()
    module: nn.Module | None = None
    has_blocks: bool = True

    @property
    def key(self) -> str | None:
        """Its name on disk, where it is one tensor of its own."""
        found = next(iter(self.pieces), None)
        return found if len(self.pieces) == 1 and self.inside is None and self.pieces[str(found)] is None else None


class Places(Protocol):
    """Finds where an adapter's weights lie in one model's file."""

    @property
    def by_class(self) -> bool:
        """Whether the model's class is known."""

    @property
    def way(self) -> str:
        """How names are matched, in words."""

    def find(self, name: str) -> Place | None:
        """Finds a parameter by the name that an adapter has for it.

        Args:
            name: Module path and leaf, such as `model.layers.0.mlp.down_proj.weight`.

        Returns:
            The place; without pieces where the class has that parameter and the file has not; `None` if neither has.
        """

    def parameters_of(self, path: str) -> list[str]:
        """Names of the parameters that a module itself holds, in its order; none if the class is not known."""


FindPlaces = Callable[[Checkpoint, Mapping[str, Any]], Places]
"""Makes the places of a model's checkpoint, for an adapter with this `adapter_config.json`."""


class PlacesByName:
    """Places by the names on disk alone: the same name, or the only one with another prefix.

    Args:
        model: The model's checkpoint.
    """

    by_class = False
    way = "by the names on disk"

    def __init__(self, model: Checkpoint) -> None:
        self._model = model
        self._by_suffix = index_suffixes(model.tensors)

    def find(self, name: str) -> Place | None:
        """Finds a parameter by its name on disk (see `Places`)."""
        tensors = self._model.tensors
        key = name if name in tensors else find_by_suffix(name, self._by_suffix)
        if key is None:
            return self._find_tied(name)
        head: tuple[str, ...] = ()
        if self._model.config.get("tie_word_embeddings") and key.endswith(INPUT_EMBEDDINGS):
            head = () if any(other.endswith(_HEADS) for other in tensors) else (_HEADS[0],)
        return Place({key: None}, tensors[key].shape, tied=(key, *head), separable=head)

    def parameters_of(self, path: str) -> list[str]:
        """Nothing: the class is not known."""
        return []

    def _find_tied(self, name: str) -> Place | None:
        """Finds the embeddings that a head without a tensor of its own is tied to."""
        if not self._model.config.get("tie_word_embeddings") or not name.endswith(_HEADS):
            return None
        found = [key for key in self._model.tensors if key.endswith(INPUT_EMBEDDINGS)]
        if len(found) != 1:
            return None
        tied = (found[0], name)
        return Place({found[0]: None}, self._model.tensors[found[0]].shape, tied=tied, separable=(name,))


def places_by_name(model: Checkpoint, config: Mapping[str, Any]) -> Places:
    """Makes the places of a model by the names on disk alone (see `FindPlaces`)."""
    return PlacesByName(model)


def index_suffixes(names: Mapping[str, Any]) -> dict[str, str | None]:
    """Indexes names by all their suffixes; `None` where two share one."""
    index: dict[str, str | None] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            suffix = ".".join(parts[start:])
            index[suffix] = name if suffix not in index else None
    return index


def find_by_suffix(name: str, index: Mapping[str, str | None]) -> str | None:
    """Finds the only name that ends with `name`, or that `name` ends with, as `transformer.h.0…` and `h.0…` do."""
    if name in index:
        return index[name]
    parts = name.split(".")
    # What lies on disk must be the whole of the suffix: `h.0.attn.c_attn.weight`, not any other tensor's tail.
    wholes = (".".join(parts[start:]) for start in range(1, len(parts) - 1))
    return next((whole for whole in wholes if index.get(whole) == whole), None)
