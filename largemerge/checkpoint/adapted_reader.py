"""Reads a model's weights with an adapter applied: no merged copy is ever written.

B·A is computed in float32 and the sum rounded to the dtype of W, as peft's `merge_and_unload` does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from largemerge.checkpoint.adapters import DELTA_DTYPE, MOST_FACTORS, Adapter, Delta
from largemerge.checkpoint.buffers import Buffers
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.reader import CheckpointReader, TensorReader


class AdaptedReader:
    """Reads a model's tensors with an adapter applied.

    Args:
        model: Reads the model's tensors, replaced ones included.
        own: Reads the adapter's.
        adapter: What is added to them.
    """

    def __init__(self, model: CheckpointReader, own: CheckpointReader, adapter: Adapter) -> None:
        self.checkpoint = model.checkpoint
        self._model, self._own, self._adapter = model, own, adapter
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        """So far, of both."""
        return self._model.bytes_read + self._own.bytes_read

    @property
    def bytes_past_cache(self) -> int:
        """Of them, past the system's cache."""
        return self._model.bytes_past_cache

    def read(self, name: str, rows: slice | None = None, *, again: bool = False) -> torch.Tensor:
        """A tensor, or some rows of it, with what the adapter adds."""
        return self._adapted(name, self._model.read(name, rows, again=again), slice(None) if rows is None else rows)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows, in any order, with what the adapter adds."""
        return self._adapted(name, self._model.read_rows(name, rows), rows)

    def _adapted(self, name: str, weight: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        delta = self._adapter.deltas.get(name)
        if delta is None:
            return weight
        down, up = self._both(name, delta)
        product = down[:, rows].T @ up.T if delta.transposed else up[rows] @ down
        adapted = weight.to(torch.promote_types(weight.dtype, DELTA_DTYPE)) + delta.scale * product
        if delta.magnitude is not None:
            magnitude = self._own.read(delta.magnitude).to(adapted.dtype)[rows]
            adapted *= (magnitude / adapted.norm(dim=1)).unsqueeze(1)
        return adapted.to(weight.dtype)

    def _both(self, name: str, delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, kept for the next pieces of the same weight."""
        with self._lock:
            found = self._factors.get(name)
        if found is None:
            found = (self._own.read(delta.down).to(DELTA_DTYPE), self._own.read(delta.up).to(DELTA_DTYPE))
            with self._lock:
                if len(self._factors) >= MOST_FACTORS:
                    del self._factors[next(iter(self._factors))]
                self._factors[name] = found
        return found


@contextmanager
def open_reader(checkpoint: Checkpoint, adapter: Adapter | None, buffers: Buffers) -> Iterator[TensorReader]:
    """Reads a model's tensors, with its adapter if it has one; what is read once does not fill the system's cache."""
    with CheckpointReader(checkpoint, past_cache=True, buffers=buffers) as reader:
        if adapter is None:
            yield reader
            return
        with CheckpointReader(adapter.checkpoint) as own:
            yield AdaptedReader(reader, own, adapter)
