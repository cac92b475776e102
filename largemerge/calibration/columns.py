"""The columns and rows of a table that become samples, and whether they hold what they should.

    columns, settings, model ──► choose_fields ──► Fields
    number of rows, seed     ──► sample_order  ──► row numbers ──► read_rows ──► Row, checked

Columns: those that the configuration names, and no others. Where it names neither text nor image, the columns `text`
and `image` are taken, as far as the model has a use for them.

Rows: where there are more than samples wanted, they are drawn without replacement by a seeded permutation. Blank texts
are passed over. Only drawn rows are looked at, so a dataset of millions costs no more than one of hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from largemerge.calibration.batches import ForwardSignature
from largemerge.calibration.config import CalibrationConfig, template_columns
from largemerge.calibration.sources import Source
from largemerge.config_file import nearest
from largemerge.errors import CalibrationError, shorten
from largemerge.text_files import brief

MAX_PROBLEMS = 5
"""Number of bad rows in one error; whoever has more has one mistake, not many."""


@dataclass(frozen=True)
class Fields:
    """Names of the columns for each part of a sample, or a template of them; `None` where there is no such part."""

    text: str | None
    template: str | None
    messages: str | None
    target: str | None
    image: str | None
    loss_mask: str | None

    @property
    def has_text(self) -> bool:
        """Whether samples have texts, which become tokens."""
        return any(name is not None for name in (self.text, self.template, self.messages, self.target))

    @property
    def text_columns(self) -> list[str]:
        """Names of the columns that must hold text."""
        templated = template_columns(self.template) if self.template is not None else []
        return [name for name in (self.text, *templated, self.target) if name is not None]

    @property
    def columns(self) -> list[str]:
        """Names of all columns that have to be read."""
        named = (*self.text_columns, self.messages, self.image, self.loss_mask)
        return list(dict.fromkeys(name for name in named if name is not None))


def choose_fields(
    config: CalibrationConfig, columns: tuple[str, ...] | None, signature: ForwardSignature, where: str
) -> Fields:
    """Chooses the columns to read, and checks that settings, columns and model fit together.

    Args:
        config: Settings of the candidate's calibration data.
        columns: Columns of the table; `None` if they are not known yet (then every column is taken to be there).
        signature: Inputs of the model's forward.
        where: Candidate and file, for messages.

    Raises:
        CalibrationError: If something does not fit; it names all mistakes.
    """
    text, image = config.text_field, config.image_field
    if text is None and image is None and config.messages_field is None and config.text_template is None:
        text = "text" if _has(columns, "text") and "input_ids" in signature.forward_arguments else None
        image = "image" if _has(columns, "image") and "pixel_values" in signature.forward_arguments else None
    fields = Fields(
        text, config.text_template, config.messages_field, config.target_field, image, config.loss_mask_field
    )
    problems = [
        *_missing_columns(fields, columns),
        *_nothing_to_read(fields, columns, signature),
        *_misfits_of_the_model(fields, signature, columns),
        *_misfits_among_settings(fields, config, signature),
    ]
    if problems:
        raise CalibrationError(*(f"{where}: {problem}" for problem in problems))
    return fields


def takes_target(signature: ForwardSignature) -> bool:
    """Whether the model has a decoder whose tokens must come from the data."""
    return signature.is_encoder_decoder and "decoder_input_ids" in signature.forward_arguments


def _has(columns: tuple[str, ...] | None, name: str) -> bool:
    return columns is None or name in columns


def _missing_columns(fields: Fields, columns: tuple[str, ...] | None) -> Iterator[str]:
    for kind in ("text", "messages", "target", "image", "loss_mask"):
        column = getattr(fields, kind)
        if column is not None and columns is not None and column not in columns:
            yield f"{kind}_field: no column {column!r}; the columns are {list(columns)}{nearest(column, columns)}"
    for column in template_columns(fields.template) if fields.template is not None else ():
        if columns is not None and column not in columns:
            yield f"text_template: no column {column!r}; the columns are {list(columns)}{nearest(column, columns)}"


def _nothing_to_read(fields: Fields, columns: tuple[str, ...] | None, signature: ForwardSignature) -> Iterator[str]:
    if any(part is not None for part in (fields.text, fields.template, fields.messages, fields.image)):
        return
    takes = signature.forward_arguments
    ways = {"input_ids": ["'text_field'", "'messages_field'"], "pixel_values": ["'image_field'"]}
    ways = {argument: settings for argument, settings in ways.items() if argument in takes}
    if not ways:
        yield (
            f"the model takes neither input_ids nor pixel_values but {sorted(takes)}; "
            "give it ready-made tensors in a .safetensors file"
        )
        return
    expected = "text" if "input_ids" in ways else "image"
    found = list(columns or ())
    settings = " or ".join(setting for group in ways.values() for setting in group)
    yield f"no column {expected!r}; the columns are {found}{nearest(expected, found)}; set {settings}"


def _misfits_of_the_model(
    fields: Fields, signature: ForwardSignature, columns: tuple[str, ...] | None
) -> Iterator[str]:
    takes = sorted(signature.forward_arguments)
    if any(part is not None for part in (fields.text, fields.template, fields.messages)) and "input_ids" not in takes:
        names = {"text_field": fields.text, "text_template": fields.template, "messages_field": fields.messages}
        setting = next(name for name, part in names.items() if part is not None)
        yield f"{setting}: the model takes no input_ids but {takes}; remove it"
    if fields.image is not None and "pixel_values" not in takes:
        yield f"image_field: the model takes no pixel_values but {takes}; remove it"
    if takes_target(signature):
        if fields.target is None:
            known = "" if columns is None else f" (the columns are {list(columns)})"
            yield (
                "an encoder-decoder model needs the decoder's text too: "
                f"add 'target_field' with the name of its column{known}"
            )
        elif signature.decoder_start_token_id is None:
            yield (
                "target_field: the model's configuration has no decoder_start_token_id, with which the decoder "
                "begins; add it to config.json or generation_config.json"
            )
    elif fields.target is not None:
        yield "target_field: the model is no encoder-decoder and reads one text only; remove it"


def _misfits_among_settings(fields: Fields, config: CalibrationConfig, signature: ForwardSignature) -> Iterator[str]:
    if fields.text is not None and fields.messages is not None:
        yield "'text_field' and 'messages_field' exclude each other"
    if config.assistant_only and fields.messages is None:
        yield "assistant_only: needs 'messages_field'"
    if config.assistant_only and signature.is_encoder_decoder:
        yield "assistant_only: marks tokens of the encoder, but statistics are masked over the decoder's; remove it"
    if fields.loss_mask is not None and not fields.has_text and fields.image is not None:
        yield "loss_mask_field: there is one number per token of a text, but no text; remove it"
    if config.pack and (fields.image is not None or signature.is_encoder_decoder):
        partner = "an image" if fields.image is not None else "a target"
        yield f"pack: texts that have {partner} each cannot be joined; remove it"


@dataclass(frozen=True)
class Row:
    """Checked contents of one row of the table; `None` for what was not asked for."""

    index: int
    text: str | None
    messages: list[dict[str, Any]] | None
    target: str | None
    loss_mask: list[int] | None
    image: Any


def sample_order(num_rows: int, config: CalibrationConfig, skip: int = 0) -> Iterator[int]:
    """Yields row numbers in the order in which rows are taken until there are enough.

    If all rows are wanted, they are taken as they come. Otherwise, and always for packing, where it shows only later
    how many texts fill the samples, they are taken by a permutation that `config.seed` draws.

    Args:
        num_rows: Number of rows in the table.
        config: Settings, with every number set.
        skip: How many samples others have drawn before; then the order is theirs, and `config.num_samples` counts
            them, too.
    """
    assert config.num_samples is not None and config.seed is not None
    if num_rows <= (skip or config.num_samples) and not config.pack:
        yield from range(num_rows)
        return
    generator = torch.Generator().manual_seed(config.seed)
    # One by one: as a list, the order of a web-sized dataset would fill the memory.
    for index in torch.randperm(num_rows, generator=generator).numpy():
        yield int(index)


def read_rows(source: Source, fields: Fields, order: Iterable[int], limit: int) -> list[Row]:
    """Reads rows in a given order until `limit` of them are not blank.

    Raises:
        CalibrationError: If a row does not hold what its columns should; it names several.
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
        problem = message_problem(values[fields.messages])
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


def message_problem(messages: Any) -> str | None:
    """Says what is wrong with a conversation; `None` if nothing is."""
    expected = "expected a list of {'role': ..., 'content': ...}"
    if not isinstance(messages, list):
        return f"{expected}, found {_shown(messages)}"
    for turn, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"{expected}, found {_shown(message)} as message {turn}"
        if not isinstance(message.get("role"), str):
            return f"{expected}; message {turn} has no 'role' but {sorted(message)}"
        content = message.get("content")
        others = any(value not in (None, "", []) for key, value in message.items() if key not in ("role", "content"))
        if content is None and not others:  # calls of tools may stand in its place
            return f"{expected}; message {turn} ({shorten(message['role'])}) has no 'content'"
        if content is not None and not isinstance(content, str | list | dict):
            return (
                f"{expected}; the 'content' of message {turn} is {_shown(content)}, expected a text or a list of parts"
            )
    return None


def _shown(value: Any) -> str:
    if value is None:
        return "nothing (null, or the column is missing in this row)"
    return f"{brief(value)} ({type(value).__name__})"
