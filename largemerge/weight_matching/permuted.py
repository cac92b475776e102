"""A model whose neurons and heads lie in other places: its tensors, permuted as they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.tensor_files import Rows

Axes = Mapping[str, Mapping[int, torch.Tensor]]
"""Name on disk → dimension → which of the stored rows or columns comes to each place."""


class PermutedReader:
    """Reads a model's tensors with its neurons and heads in other places (see `TensorReader`).

    Args:
        inner: Reader of the model's tensors as they lie on disk.
        axes: What is permuted.
    """

    def __init__(self, inner: TensorReader, axes: Axes) -> None:
        self.checkpoint: Checkpoint = inner.checkpoint
        self._inner, self._axes = inner, axes

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._inner.bytes_read

    @property
    def bytes_past_cache(self) -> int:
        """Bytes read so far that did not go through the system's cache."""
        return self._inner.bytes_past_cache

    def read(self, name: str, rows: Rows = None, *, again: bool = False) -> torch.Tensor:
        """Reads a tensor, or some of its rows."""
        axes = self._axes.get(name, {})
        if 0 not in axes:
            tensor = self._inner.read(name, rows, again=again)
        elif rows is None:
            tensor = self._inner.read(name, again=again).index_select(0, axes[0])
        else:
            tensor = self._inner.read(name, axes[0][rows], again=again)
        return tensor.index_select(1, axes[1]) if 1 in axes else tensor
