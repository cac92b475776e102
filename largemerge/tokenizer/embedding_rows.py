"""The rows of the models' embeddings that make those of the output, token by token; and a reader of these rows.

The rules are mergekit's. A model that has a token has its embedding of it. A model that lacks it gets, in this order,

    what `tokens` says (with `force`, even models that have it)
    the embedding of the only model that has it
    the base's, where the base has it
    the average of those that have it
    zeros, where no model has it

Rows beyond the last token, and numbers that no token has, are the mean of the model's rows.

    choose_rows: tokens and their numbers in every model → TokenRows
    TokenReader: TokenRows → rows of every model in the order of the output's tokens, a few megabytes at a time
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
"""Stand in the place of a donor's number: zeros, the average of the models that have a token, the mean of all rows."""

_MAX_LISTED = 100  # tokens of one rule in a report
_SUM_DTYPE = torch.float64
_ELEMENTS_OF_MEAN = 1 << 19  # of a model, read at once when the mean of all rows is wanted

Rows = NDArray[np.int64]
"""Numbers of rows, or of models."""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The rows of some models' embeddings that make those of the output.

    Attributes:
        own: The row of every model for every row of the output, `[models, rows]`; -1 where the model gets the default.
        donor: The number of the model whose row is the default, or `ZERO`, `AVERAGE`, `MEAN`, for every row `[rows]`.
        donor_row: The donor's row, for every row of the output `[rows]`.
        counts: Number of rows that each rule has made, by the rule's name.
        listed: Tokens by rule, where a user may want to know them, a hundred at most.
    """

    own: Rows
    donor: Rows
    donor_row: Rows
    counts: Mapping[str, int]
    listed: Mapping[str, Sequence[str]]

    @property
    def num_rows(self) -> int:
        """Number of rows of the output."""
        return len(self.donor)

    def is_identity(self, num_rows: Sequence[int]) -> bool:
        """Whether the rows of every model, `num_rows` of each, are taken as they lie on disk."""
        in_order = np.arange(self.num_rows)
        return all(rows == self.num_rows for rows in num_rows) and all((own == in_order).all() for own in self.own)


def choose_rows(
    ids: Mapping[str, int],
    model_ids: Mapping[str, Rows],
    num_rows: Mapping[str, int],
    base: str | None,
    tokens: Mapping[str, tuple[TokenSettings, Mapping[str, int] | None]],
) -> tuple[TokenRows, list[str], list[str]]:
    """Applies the rules to every token of the output.

    Args:
        ids: The output's tokens and their numbers.
        model_ids: The numbers that every model, in order, has for the tokens of the output's rows `[rows]`; -1 for
            none.
        num_rows: Number of rows of every model's embeddings; token numbers beyond it count as none.
        base: Name of the base, if it is one of the models.
        tokens: Settings of single tokens; with each the numbers of a model's tokens, where another token of that model
            is named.

    Returns:
        The rows, what is wrong with the settings of single tokens, and the tokens whose settings change nothing.
    """
    models = list(model_ids)
    own = np.stack([np.where(model_ids[model] < num_rows[model], model_ids[model], -1) for model in models])
    present = own >= 0
    count = present.sum(axis=0)
    is_token = np.zeros(own.shape[1], dtype=bool)
    is_token[list(ids.values())] = True
    donor, donor_row = _default_donors(own, is_token, models.index(base) if base in models else None)
    lacking = is_token & (count < len(models))
    by_user: list[str] = []
    unused: list[str] = []
    problems: list[str] = []
    for token, (settings, source_ids) in tokens.items():
        number = ids[token]
        if settings.source is None:
            continue
        if not (lacking[number] or settings.force):
            unused.append(token)
            continue
        source, row = _wanted_row(settings.source, token, model_ids, number, source_ids)
        if source is not None and (source not in models or not 0 <= row < num_rows[source]):
            problems.append(_missing(token, settings.source, source, models))
            continue
        donor[number] = ZERO if source is None else models.index(source)
        donor_row[number] = row
        own[:, number] = -1 if settings.force else own[:, number]
        by_user.append(token)
    counts, listed = _summarize(ids, donor, count, lacking, by_user, models)
    return TokenRows(own, donor, donor_row, counts, listed), problems, unused


def rows_by_number(num_rows: Mapping[str, int], size: int, base: str | None) -> TokenRows:
    """Matches rows by their numbers, for models with one tokenizer and other numbers of rows.

    A model that lacks a row gets the base's, or the average of those that have it; rows that none has are the mean.

    Args:
        num_rows: Number of rows of every model's embeddings, in order.
        size: Number of rows of the output.
        base: Name of the base, if it is one of the models.
    """
    models = list(num_rows)
    in_order = np.arange(size)
    own = np.stack([np.where(in_order < num_rows[model], in_order, -1) for model in models])
    count = (own >= 0).sum(axis=0)
    donor, donor_row = _default_donors(own, count > 0, models.index(base) if base in models else None)
    everywhere, left_out = int((count == len(models)).sum()), max(num_rows.values()) - size
    counts = {"in all models": everywhere, "padding of some models": size - everywhere}
    counts["padding of some models, left out"] = max(0, left_out)
    return TokenRows(own, donor, donor_row, {name: number for name, number in counts.items() if number}, {})


def _default_donors(own: Rows, is_token: NDArray[np.bool_], base: int | None) -> tuple[Rows, Rows]:
    """Chooses the donor of every row and the donor's row by the rules, without the user's settings.

    Args:
        own: The row of every model, `[models, rows]`, -1 for none.
        is_token: Whether a row of the output is a token.
        base: Number of the base among the models.
    """
    present = own >= 0
    count = present.sum(axis=0)
    donor = np.full(own.shape[1], MEAN, dtype=np.int64)
    donor_row = np.full(own.shape[1], -1, dtype=np.int64)
    donor[is_token & (count == 0)] = ZERO
    donor[is_token & (count > 1)] = AVERAGE
    if base is not None:
        donor[is_token & (count > 1) & present[base]] = base
    only = is_token & (count == 1)
    donor[only] = present.argmax(axis=0)[only]
    given = np.flatnonzero(donor >= 0)
    donor_row[given] = own[donor[given], given]
    return donor, donor_row


def _wanted_row(
    source: Any, token: str, model_ids: Mapping[str, Rows], number: int, source_ids: Mapping[str, int] | None
) -> tuple[str | None, int]:
    """Finds the model and the row of it that the user wants for a token; no model and -1 for zeros."""
    if isinstance(source, ZeroSource):
        return None, -1
    if isinstance(source, TokenSource):
        row = source.token_id if source.token_id is not None else (source_ids or {}).get(source.token or "", -1)
        return source.model, row
    return source, int(model_ids[source][number]) if source in model_ids else -1


def _missing(token: str, source: Any, model: str, models: Sequence[str]) -> str:
    where = f"tokenizer.tokens.{token}.source"
    if model not in models:
        return f"{where}: {model} is not among the models whose embeddings are merged: {list(models)}"
    other = source.token if isinstance(source, TokenSource) else token
    wanted = repr(other) if other is not None else str(source.token_id)
    return f"{where}: {model} has no token {wanted} with an embedding; expected a token that it has, or kind: zero"


def _summarize(
    ids: Mapping[str, int],
    donor: Rows,
    count: Rows,
    lacking: NDArray[np.bool_],
    by_user: Sequence[str],
    models: Sequence[str],
) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Counts the rows by rule, and lists the tokens of those rules that a user may want to know."""
    counts: dict[str, int] = {}
    listed: dict[str, list[str]] = {}
    settled = set(by_user)

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
        if wanted and len(listed.setdefault(name, [])) < _MAX_LISTED:
            listed[name].append(token)
    padding = int((donor == MEAN).sum())
    return counts | ({"mean of all rows: no token": padding} if padding else {}), listed


def rule_labels(rows: TokenRows) -> Iterator[str]:
    """Yields how many tokens each rule has made, and the first few of them, for people."""
    for name, number in rows.counts.items():
        some = ", ".join(repr(token) for token in rows.listed.get(name, [])[:5])
        more = ", …" if len(rows.listed.get(name, [])) > 5 else ""
        yield f"{number} {name}" + (f" ({some}{more})" if some else "")


class TokenReader:
    """Reads the rows of all models of one tensor that has a row for every token.

    Args:
        rows: The rows of the models that make those of the output.
        inputs: Model and name on disk of every tensor.
        readers: A reader for every model.
        dtype: The dtype of the rows that are returned.
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
        """Reads some rows of the output, of every model."""
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
        """Reads rows of the output that are tokens, of every model; others are 0."""
        own = self._rows.own[:, numbers]
        lacking = (own < 0).any(axis=0)
        defaults = self._defaults(numbers[lacking], own[:, lacking]) if lacking.any() else None
        place = np.cumsum(lacking) - 1  # of a row among those that some model lacks
        tensors = []
        for (reader, key), rows in zip(self._sources, own, strict=True):
            found = np.flatnonzero(rows >= 0)
            read = reader.read(key, torch.from_numpy(rows[found])).to(self._dtype)
            if defaults is not None:
                tensor = torch.zeros((len(rows), *read.shape[1:]), dtype=self._dtype)
                tensor[torch.from_numpy(found)] = read
                missing = np.flatnonzero(rows < 0)
                tensor[torch.from_numpy(missing)] = defaults[torch.from_numpy(place[missing])]
                read = tensor
            tensors.append(read)
        return tensors

    def _defaults(self, numbers: np.ndarray, own: np.ndarray) -> torch.Tensor:
        """Reads the default of every row, which is the same for all models that lack it."""
        donors, donor_rows = self._rows.donor[numbers], self._rows.donor_row[numbers]
        made: torch.Tensor | None = None
        sums: torch.Tensor | None = None
        averaged = np.flatnonzero(donors == AVERAGE)
        for model, (reader, key) in enumerate(self._sources):
            given = np.flatnonzero(donors == model)
            read = reader.read(key, torch.from_numpy(donor_rows[given])).to(self._dtype)
            if made is None:
                made = torch.zeros((len(numbers), *read.shape[1:]), dtype=self._dtype)
                sums = torch.zeros((len(averaged), *read.shape[1:]), dtype=_SUM_DTYPE)
            made[torch.from_numpy(given)] = read
            having = np.flatnonzero(own[model, averaged] >= 0)
            if len(having):
                assert sums is not None
                more = reader.read(key, torch.from_numpy(own[model, averaged[having]])).to(self._dtype)
                sums[torch.from_numpy(having)] += more
        assert made is not None and sums is not None, "there is a model"
        if len(averaged):
            counts = torch.from_numpy((own[:, averaged] >= 0).sum(axis=0))
            made[torch.from_numpy(averaged)] = (sums / counts.view(-1, *[1] * (sums.dim() - 1))).to(self._dtype)
        return made

    def _mean_rows(self) -> list[torch.Tensor]:
        """Computes the mean over all tokens, of every model."""
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
