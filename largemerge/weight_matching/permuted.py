"""A model whose neurons, heads and features lie in other places: its tensors, permuted as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter, open_reader
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.tensor_files import Rows

Axes = Mapping[str, Mapping[int, torch.Tensor]]
"""Name on disk → dimension → which of the stored rows or columns comes to each place."""


@contextmanager
def open_permuted(checkpoint: Checkpoint, adapter: Adapter | None, axes: Axes | None) -> Iterator[TensorReader]:
    """Opens a model's tensors, permuted if anything of the model is.

    Args:
        checkpoint: The checkpoint.
        adapter: Its adapters, if it has any.
        axes: What is permuted; `None` for nothing.
    """
    with open_reader(checkpoint, adapter) as reader:
        yield PermutedReader(reader, axes) if axes is not None else reader


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
        if 0 not in axes or rows is None:
            tensor = self._inner.read(name, rows, again=again)
        else:
            tensor = self._inner.read(name, axes[0][rows], again=again)
        for axis, index in axes.items():
            if axis > 0 or rows is None:
                tensor = tensor.index_select(axis, index)
        return tensor
