"""Reads rows of all models' embeddings in the order of the output's tokens, a few megabytes at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from largemerge.checkpoint.reader import TensorReader
from largemerge.vocabulary.rules import AVERAGE, MEAN, TokenRows

_SUM_DTYPE = torch.float64
_ELEMENTS_OF_MEAN = 1 << 19  # of a model, read at once when the mean of all rows is wanted


class TokenReader:
    """Reads what a method merges of one tensor with a row for every token.

    Args:
        rows: Which rows.
        inputs: Model and name on disk of every tensor.
        readers: By model.
        dtype: Of what is read.
    """

    def __init__(
        self,
        rows: TokenRows,
        inputs: Sequence[tuple[str, str]],
        readers: Mapping[str, TensorReader],
        dtype: torch.dtype,
    ) -> None:
        self._rows, self._dtype = rows, dtype
        self._sources = [(readers[model], key) for model, key in inputs]
        self._means: list[torch.Tensor] | None = None

    def read(self, span: slice) -> list[torch.Tensor]:
        """Rows of the output, of every model."""
        numbers = np.arange(span.start, span.stop)
        tensors = self._read_tokens(numbers)
        beyond = torch.from_numpy(np.flatnonzero(self._rows.donor[numbers] == MEAN))
        if len(beyond):
            if self._means is None:
                self._means = self._mean_rows()
            for tensor, mean in zip(tensors, self._means, strict=True):
                tensor[beyond] = mean
        return tensors

    def _read_tokens(self, numbers: np.ndarray) -> list[torch.Tensor]:
        """Rows of the output that are tokens; others are zero."""
        own = self._rows.own[:, numbers]
        lacking = (own < 0).any(axis=0)
        defaults = self._defaults(numbers[lacking], own[:, lacking]) if lacking.any() else None
        place = np.cumsum(lacking) - 1  # of a row among those that some model lacks
        tensors = []
        for (reader, key), rows in zip(self._sources, own, strict=True):
            found = np.flatnonzero(rows >= 0)
            read = reader.read_rows(key, torch.from_numpy(rows[found])).to(self._dtype)
            if defaults is not None:
                tensor = torch.zeros((len(rows), *read.shape[1:]), dtype=self._dtype)
                tensor[torch.from_numpy(found)] = read
                missing = np.flatnonzero(rows < 0)
                tensor[torch.from_numpy(missing)] = defaults[torch.from_numpy(place[missing])]
                read = tensor
            tensors.append(read)
        return tensors

    def _defaults(self, numbers: np.ndarray, own: np.ndarray) -> torch.Tensor:
        """The same for all models that lack them."""
        donors, donor_rows = self._rows.donor[numbers], self._rows.donor_row[numbers]
        made: torch.Tensor | None = None
        sums: torch.Tensor | None = None
        averaged = np.flatnonzero(donors == AVERAGE)
        for model, (reader, key) in enumerate(self._sources):
            given = np.flatnonzero(donors == model)
            read = reader.read_rows(key, torch.from_numpy(donor_rows[given])).to(self._dtype)
            if made is None:
                made = torch.zeros((len(numbers), *read.shape[1:]), dtype=self._dtype)
                sums = torch.zeros((len(averaged), *read.shape[1:]), dtype=_SUM_DTYPE)
            made[torch.from_numpy(given)] = read
            having = np.flatnonzero(own[model, averaged] >= 0)
            if len(having):
                assert sums is not None
                more = reader.read_rows(key, torch.from_numpy(own[model, averaged[having]])).to(self._dtype)
                sums[torch.from_numpy(having)] += more
        assert made is not None and sums is not None, "there is a model"
        if len(averaged):
            counts = torch.from_numpy((own[:, averaged] >= 0).sum(axis=0))
            made[torch.from_numpy(averaged)] = (sums / counts.view(-1, *[1] * (sums.dim() - 1))).to(self._dtype)
        return made

    def _mean_rows(self) -> list[torch.Tensor]:
        """The mean over all tokens, of every model."""
        tokens = np.flatnonzero(self._rows.donor != MEAN)
        reader, key = self._sources[0]
        shape = reader.checkpoint.tensors[key].shape
        step = max(1, _ELEMENTS_OF_MEAN // max(1, math.prod(shape[1:])))
        sums: list[torch.Tensor] = []
        for start in range(0, len(tokens), step):
            tensors = self._read_tokens(tokens[start : start + step])
            parts = [tensor.sum(dim=0, dtype=_SUM_DTYPE) for tensor in tensors]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        return [(total / len(tokens)).to(self._dtype) for total in sums]
