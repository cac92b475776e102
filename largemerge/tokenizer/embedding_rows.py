"""What the embedding of every token of the output is, for every model; the rules are mergekit's.

A model that has a token has its embedding of it. A model that lacks it gets, in this order,

    what `tokens` says (with `force`, even models that have it)
    the embedding of the only model that has it
    the base's, where the base has it
    the average of those that have it
    zeros, where no model has it

Rows beyond the last token, and numbers that no token has, are the mean of the model's rows.

Reads rows of all models' embeddings in the order of the output's tokens, a few megabytes at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from largemerge.checkpoint.reader import TensorReader
from largemerge.tokenizer.config import TokenSettings, TokenSource, ZeroSource

ZERO, AVERAGE, MEAN = -1, -2, -3
"""In the place of a donor's number."""
_MOST_LISTED = 100

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Which rows of some models' embeddings make those of the output.

    Attributes:
        own: By model and row of the output: the model's row; -1 where it gets the row's default.
        donor: By row: the number of the model whose row is the default, or `ZERO`, `AVERAGE`, `MEAN`.
        donor_row: By row: which of its rows.
        counts: How many rows by rule, for people.
        listed: Tokens by rule, where a user may want to know them, up to a sensible number.
    """

    own: Rows
    donor: Rows
    donor_row: Rows
    counts: Mapping[str, int]
    listed: Mapping[str, Sequence[str]]

    @property
    def num_rows(self) -> int:
        """Of the output."""
        return len(self.donor)

    def is_plain(self, num_rows: Sequence[int]) -> bool:
        """Whether every model's rows are taken as they lie on disk; `num_rows` says how many each has."""
        in_order = np.arange(self.num_rows)
        return all(rows == self.num_rows for rows in num_rows) and all((own == in_order).all() for own in self.own)


def choose_rows(
    ids: Mapping[str, int],
    natural: Mapping[str, Rows],
    num_rows: Mapping[str, int],
    base: str | None,
    tokens: Mapping[str, tuple[TokenSettings, Mapping[str, int] | None]],
) -> tuple[TokenRows, list[str], list[str]]:
    """Applies the rules.

    Args:
        ids: The output's tokens.
        natural: By model, in order: for every row of the output, the number that its token has there, -1 for none.
        num_rows: By model: how many rows its embeddings have; numbers beyond count as none.
        base: Its name, where it is one of the models.
        tokens: What the user says; and the numbers of the model's tokens, where another token is named.

    Returns:
        The rows, what is wrong with the user's wishes, and which of these change nothing.
    """
    models = list(natural)
    own = np.stack([np.where(natural[model] < num_rows[model], natural[model], -1) for model in models])
    present = own >= 0
    count = present.sum(axis=0)
    donor = np.full(own.shape[1], MEAN, dtype=np.int64)
    donor_row = np.full(own.shape[1], -1, dtype=np.int64)
    is_token = np.zeros(own.shape[1], dtype=bool)
    is_token[list(ids.values())] = True
    donor[is_token & (count == 0)] = ZERO
    donor[is_token & (count > 1)] = AVERAGE
    if base in models:
        donor[is_token & (count > 1) & present[models.index(base)]] = models.index(base)
    only = is_token & (count == 1)
    donor[only] = present.argmax(axis=0)[only]
    given = np.flatnonzero(donor >= 0)
    donor_row[given] = own[donor[given], given]
    lacking = is_token & (count < len(models))
    asked: list[str] = []
    idle: list[str] = []
    problems: list[str] = []
    for token, (settings, source_ids) in tokens.items():
        number = ids[token]
        if settings.source is None:
            continue
        if not (lacking[number] or settings.force):
            idle.append(token)
            continue
        source, row = _asked_row(settings.source, token, natural, number, source_ids)
        if source is not None and (source not in models or not 0 <= row < num_rows[source]):
            problems.append(_missing(token, settings.source, source, models))
            continue
        donor[number] = ZERO if source is None else models.index(source)
        donor_row[number] = row
        own[:, number] = -1 if settings.force else own[:, number]
        asked.append(token)
    counts, listed = _told(ids, donor, count, lacking, asked, models, base)
    return TokenRows(own, donor, donor_row, counts, listed), problems, idle


def _asked_row(
    source: Any, token: str, natural: Mapping[str, Rows], number: int, source_ids: Mapping[str, int] | None
) -> tuple[str | None, int]:
    """The model and its row, where the user names one."""
    if isinstance(source, ZeroSource):
        return None, -1
    if isinstance(source, TokenSource):
        row = source.token_id if source.token_id is not None else (source_ids or {}).get(source.token or "", -1)
        return source.model, row
    return source, int(natural[source][number]) if source in natural else -1


def _missing(token: str, source: Any, model: str, models: Sequence[str]) -> str:
    where = f"tokenizer.tokens.{token}.source"
    if model not in models:
        return f"{where}: {model} is not among the models whose embeddings are merged: {list(models)}"
    other = source.token if isinstance(source, TokenSource) else token
    wanted = repr(other) if other is not None else str(source.token_id)
    return f"{where}: {model} has no token {wanted} with an embedding; expected a token that it has, or kind: zero"


def _told(
    ids: Mapping[str, int],
    donor: Rows,
    count: Rows,
    lacking: NDArray[np.bool_],
    asked: Sequence[str],
    models: Sequence[str],
    base: str | None,
) -> tuple[dict[str, int], dict[str, list[str]]]:
    counts: dict[str, int] = {}
    listed: dict[str, list[str]] = {}
    settled = set(asked)

    def rule(token: str, number: int) -> tuple[str, bool]:
        if token in settled:
            return "as `tokens` says", True
        if not lacking[number]:
            return "in all models", False
        if donor[number] == ZERO:
            return "zeros: in no model", True
        if donor[number] == AVERAGE:
            return "average of the models that have it", True
        donor_name = models[donor[number]]
        only = "the only one that has it" if count[number] == 1 else "the base"
        return f"from {donor_name}, {only}", False

    for token, number in ids.items():
        name, wanted = rule(token, number)
        counts[name] = counts.get(name, 0) + 1
        if wanted and len(listed.setdefault(name, [])) < _MOST_LISTED:
            listed[name].append(token)
    padding = int((donor == MEAN).sum())
    return counts | ({"mean of all rows: no token": padding} if padding else {}), listed


def labels(rows: TokenRows) -> Iterator[str]:
    """For people: how many tokens by rule."""
    for name, number in rows.counts.items():
        some = ", ".join(repr(token) for token in rows.listed.get(name, [])[:5])
        more = ", …" if len(rows.listed.get(name, [])) > 5 else ""
        yield f"{number} {name}" + (f" ({some}{more})" if some else "")


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
