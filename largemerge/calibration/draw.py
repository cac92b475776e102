"""Which rows of the data become samples, and whether they hold what they should.

Where there are more rows than samples wanted, they are drawn without replacement by a seeded
permutation. Blank texts are passed over. Only drawn rows are looked at, so a dataset of millions
costs no more than one of hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from largemerge.calibration.fields import Fields
from largemerge.calibration.sources import Source
from largemerge.config_calibration import CalibrationConfig, template_columns
from largemerge.errors import CalibrationError

MAX_PROBLEMS = 5
"""Bad rows told in one error; whoever has more has one mistake, not many."""


@dataclass(frozen=True)
class Row:
    """What one row holds, checked; None for what was not asked for."""

    index: int
    text: str | None
    messages: list[dict[str, Any]] | None
    target: str | None
    loss_mask: list[int] | None
    image: Any


def draw_order(num_rows: int, config: CalibrationConfig) -> Iterator[int]:
    """The order in which rows are taken until there are enough.

    As they come if all are wanted; else, and always for packing (where it shows only later how
    many texts fill the samples), by a permutation drawn with `config.seed`.
    """
    assert config.num_samples is not None and config.seed is not None
    if num_rows <= config.num_samples and not config.pack:
        yield from range(num_rows)
        return
    generator = torch.Generator().manual_seed(config.seed)
    # One by one: as a list, the order of a web-sized dataset would fill the memory.
    for index in torch.randperm(num_rows, generator=generator).numpy():
        yield int(index)


def read_rows(source: Source, fields: Fields, order: Iterable[int], limit: int) -> list[Row]:
    """Reads rows in this order until `limit` of them are not blank.

    Raises:
        CalibrationError: A row does not hold what its columns should; several at once.
    """
    table = source.select(fields.columns)
    rows: list[Row] = []
    problems: list[str] = []
    for index in order:
        if len(rows) == limit or len(problems) >= MAX_PROBLEMS:
            break
        values = table[index]
        found = _row_problems(values, fields)
        problems += [f"{source.where}: row {index}: {problem}" for problem in found]
        if not found and not _is_blank(values, fields):
            rows.append(_row(index, values, fields))
    if problems:
        raise CalibrationError(*problems)
    return rows


def _row(index: int, values: Mapping[str, Any], fields: Fields) -> Row:
    def value(field: str | None) -> Any:
        return None if field is None else values[field]

    mask = value(fields.loss_mask)
    return Row(
        index=index,
        text=fields.template.format_map(values) if fields.template is not None else value(fields.text),
        messages=value(fields.messages),
        target=value(fields.target),
        loss_mask=None if mask is None else [int(number) for number in mask],
        image=value(fields.image),
    )


def _is_blank(values: Mapping[str, Any], fields: Fields) -> bool:
    texts = [values[field] for field in (fields.text, fields.target) if field is not None]
    if fields.template is not None:
        texts.append("".join(values[field] for field in template_columns(fields.template)))
    return any(not text.strip() for text in texts) or (fields.messages is not None and not values[fields.messages])


def _row_problems(values: Mapping[str, Any], fields: Fields) -> list[str]:
    problems = []
    for field in fields.text_columns:
        if not isinstance(values[field], str):
            problems.append(f"{field!r}: expected text, found {_shown(values[field])}")
    if fields.messages is not None:
        problem = _message_problem(values[fields.messages])
        if problem:
            problems.append(f"{fields.messages!r}: {problem}")
    if fields.loss_mask is not None:
        mask = values[fields.loss_mask]
        if not isinstance(mask, list) or any(number not in (0, 1) for number in mask):
            problems.append(f"{fields.loss_mask!r}: expected a list of 0 and 1, one per token, found {_shown(mask)}")
    if fields.image is not None and not isinstance(values[fields.image], str | bytes | dict):
        found = _shown(values[fields.image])
        problems.append(f"{fields.image!r}: expected an image or the path of one, found {found}")
    return problems


def _message_problem(messages: Any) -> str | None:
    expected = "expected a list of {'role': ..., 'content': ...}"
    if not isinstance(messages, list):
        return f"{expected}, found {_shown(messages)}"
    for turn, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"{expected}, found {_shown(message)} as message {turn}"
        if not isinstance(message.get("role"), str):
            return f"{expected}; message {turn} has no 'role' but {sorted(message)}"
    return None


def _shown(value: Any) -> str:
    if value is None:
        return "nothing (null, or the column is missing in this row)"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
