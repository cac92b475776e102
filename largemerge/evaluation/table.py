"""The rows of a task's data, and the readers of its texts and images.

data ──► open_table ──► Table: the drawn rows of the columns that the task names
                    ├─► label_numbers: labels as numbers of the classes that they name
                    └─► text_sample ──► text_samples: tokens in batches, and a note of what was cut
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largemerge.calibration.batches import ForwardSignature, Sample
from largemerge.calibration.columns import MAX_PROBLEMS, Fields, sample_order
from largemerge.calibration.config import CalibrationConfig, template_columns
from largemerge.calibration.folders import SPLITS, is_image_folder
from largemerge.calibration.pretokenized import read_tensors
from largemerge.calibration.sources import Source, locate_data, open_source
from largemerge.calibration.tokenizer import TextReader, encode_text, open_text_reader
from largemerge.config_file import nearest
from largemerge.errors import CalibrationError, ConfigError, shorten
from largemerge.evaluation.config import EvaluationConfig, TaskData
from largemerge.evaluation.models import ModelFiles
from largemerge.evaluation.task import Samples
from largemerge.text_files import brief

_TRUE_AND_FALSE = 2
_FEWEST_CORRELATED = 2


@dataclass(frozen=True)
class Table:
    """Rows of a task's data.

    Attributes:
        where: Task and data, for messages.
        rows: The rows that were drawn, with the columns that were asked for.
        numbers: Their numbers in the data.
        source: The whole table.
        settings: How it is read.
        notes: What a user should know of rows that are left out.
    """

    where: str
    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]
    source: Source
    settings: CalibrationConfig
    notes: tuple[str, ...] = ()

    def column(self, name: str, kinds: type | tuple[type, ...], expected: str) -> list[Any]:
        """Returns the values of a column.

        Raises:
            CalibrationError: If values are of other types; it names several rows.
        """
        problems = [
            f"{self.where}: row {number}: {name!r}: expected {expected}, found {brief(row[name])}"
            for number, row in zip(self.numbers, self.rows, strict=True)
            if not isinstance(row[name], kinds) or (isinstance(row[name], bool) and bool not in _as_tuple(kinds))
        ]
        if problems:
            raise CalibrationError(*first_problems(problems))
        return [row[name] for row in self.rows]

    def texts(self, template: str) -> list[str]:
        """Fills a template with the columns that it names."""
        names = template_columns(template)
        for name in names:
            self.column(name, (str, int, float), "text")
        return [template.format_map(row) for row in self.rows]


def first_problems(problems: Sequence[str]) -> list[str]:
    """The first of many problems of one kind, the last of them with how many more there are."""
    *some, last = problems[:MAX_PROBLEMS]
    more = len(problems) - MAX_PROBLEMS
    return [*some, f"{last} (and {more:,} more like it)" if more > 0 else last]


def _as_tuple(kinds: type | tuple[type, ...]) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


def open_source_of(task: TaskData, config: EvaluationConfig, **fields: Any) -> tuple[Source, CalibrationConfig]:
    """Opens a task's data as a table; `fields` as in `TaskData.calibration`.

    Raises:
        CalibrationError: If there is none, or it cannot be read.
    """
    settings = task.calibration(config, **fields)
    folder = Path(settings.data or "").expanduser()
    if task.split is None and folder.is_dir() and is_image_folder(folder):
        splits = sorted(each.name for each in folder.iterdir() if each.is_dir() and each.name in SPLITS)
        if splits:
            raise CalibrationError(
                f"task {task.name!r}: {folder}: holds {' and '.join(splits)}, of which all images would be taken; "
                f"expected one of them, such as {folder / splits[0]}, or 'split: {splits[0]}'"
            )
    where, path = locate_data(settings, f"task {task.name!r}")
    if path is not None and path.suffix.lower() == ".safetensors":
        raise CalibrationError(f"{where}: ready-made tensors have no labels or texts; expected a table, or images")
    source = open_source(settings, where, path)
    if source.columns == ("image",) and source.folder is not None:
        source = _with_folder_labels(source)
    return source, settings


def read_tensors_of(
    task: TaskData, config: EvaluationConfig, signature: ForwardSignature, **fields: Any
) -> tuple[list[Sample], int, str] | None:
    """Reads ready-made tokens, where a task's data is a .safetensors file of them.

    Returns:
        The samples, the batch size, and task and data for messages; `None` where the data is something else.

    Raises:
        CalibrationError: If the tensors do not fit the model, or are no tokens.
    """
    settings = task.calibration(config, **fields)
    where, path = locate_data(settings, f"task {task.name!r}")
    if path is None or path.suffix.lower() != ".safetensors":
        return None
    samples: list[Sample] = []
    for batch in read_tensors(path, settings, signature, where):
        others = [name for name, tensor in batch.inputs.items() if tensor.is_floating_point() or tensor.dim() != 2]
        if others:
            raise CalibrationError(f"{where}: {', '.join(others)}: expected tokens alone, [samples, tokens]")
        masks = [None] * batch.num_samples if batch.loss_mask is None else batch.loss_mask.int().tolist()
        for row, mask in enumerate(masks):
            sequences = {name: tensor[row].tolist() for name, tensor in batch.inputs.items()}
            samples.append(Sample(len(samples), sequences, mask))
    if len(samples) <= task.skip:
        raise CalibrationError(f"{where}: has {len(samples)} samples, and 'skip: {task.skip}' passes over all of them")
    assert settings.batch_size is not None
    return samples[task.skip :], settings.batch_size, where


def _with_folder_labels(source: Source) -> Source:
    """Gives images in folders the names of their folders as labels."""
    rows = source.select(("image",))
    labelled = [{**rows[index], "label": Path(rows[index]["image"]).parent.name} for index in range(len(rows))]
    return Source(source.where, ("image", "label"), len(labelled), lambda columns: labelled, source.folder)


def open_table(
    task: TaskData,
    config: EvaluationConfig,
    wanted: Iterable[tuple[str, str]],
    *,
    later: Sequence[str] = (),
    texts: Sequence[str] = (),
    **fields: Any,
) -> Table:
    """Reads the rows that a task draws.

    Args:
        task: The task.
        config: The evaluation.
        wanted: The setting that names a column, and the column.
        later: Settings of columns that must be there, but are read by whoever needs them.
        texts: Settings of columns with texts; rows in which one is empty are passed over, as calibration does.
        fields: As in `TaskData.calibration`.

    Raises:
        CalibrationError: If columns are missing, with all of them, the data cannot be read, or all texts are empty.
    """
    source, settings = open_source_of(task, config, **fields)
    wanted = list(wanted)
    missing = [
        f"{source.where}: {setting}: no column {column!r}; the columns are {shorten(list(source.columns))}"
        f"{nearest(column, source.columns)}"
        for setting, column in wanted
        if column not in source.columns
    ]
    if missing:
        raise CalibrationError(*missing)
    columns = list(dict.fromkeys(column for setting, column in wanted if setting not in later))
    table = source.select(columns)
    assert settings.num_samples is not None
    order = iter(sample_order(source.num_rows, settings, task.skip))
    filled = [column for setting, column in wanted if setting in texts]
    rows: dict[int, Mapping[str, Any]] = {}
    passed = 0
    while len(rows) + passed < settings.num_samples and (number := next(order, None)) is not None:
        row = table[number] if filled or passed >= task.skip else {}
        if any(isinstance(row[column], str) and not row[column].strip() for column in filled):
            continue
        if passed < task.skip:
            passed += 1
        else:
            rows[number] = row
    if not rows and not passed:
        raise CalibrationError(f"{source.where}: all rows have an empty text; expected at least one with words")
    if not rows:
        raise CalibrationError(all_skipped(source, task))
    num_wanted = min(source.num_rows, settings.num_samples) - task.skip
    fewer = f"{len(rows):,} rows are measured in place of {num_wanted:,}, as others have an empty text"
    notes = (fewer,) if len(rows) < num_wanted else ()
    return Table(source.where, list(rows.values()), list(rows), source, settings, notes)


def all_skipped(source: Source, task: TaskData) -> str:
    """Says that a task passes over all of its data."""
    return (
        f"{source.where}: has {source.num_rows} samples, and 'skip: {task.skip}' passes over all of them; expected "
        "more data, or to skip fewer"
    )


def label_numbers(table: Table, column: str, classes: Sequence[str], of: str) -> list[int]:
    """Turns labels into numbers of classes.

    Args:
        table: The rows.
        column: Column with numbers, names of classes, or true and false for the second and the first of two classes.
        classes: Names of the classes, in order.
        of: Whose classes these are, for messages.

    Raises:
        ConfigError: If labels are none of the classes, or the data has another number of classes.
    """
    values = table.column(column, (int, str, bool), "a label: a number, a name, or true or false")
    if any(isinstance(value, bool) for value in values) and len(classes) != _TRUE_AND_FALSE:
        raise ConfigError(
            f"{table.where}: {column!r} is true or false, and {of} has {len(classes)} ({shorten(list(classes))}); "
            "expected two"
        )
    known = table.source.labels.get(column)
    if known is not None and all(isinstance(value, int) for value in values) and len(known) != len(classes):
        raise ConfigError(
            f"{table.where}: {column!r} has {len(known)} classes ({shorten(list(known))}), and {of} has {len(classes)} "
            f"({shorten(list(classes))}); expected as many"
        )
    by_name = {_plain(name): number for number, name in enumerate(classes)}
    twice = [name for name, count in Counter(map(_plain, classes)).items() if count > 1]
    if twice and any(isinstance(value, str) for value in values):
        raise ConfigError(
            f"{table.where}: {of} has {twice[0]!r} twice, so that its name tells no class; expected numbers"
        )
    places = _places(table, column, known, by_name, of) if known is not None else None
    numbers, problems = [], []
    for row, value in zip(table.numbers, values, strict=True):
        if places is not None and type(value) is int and 0 <= value < len(places):
            numbers.append(places[value])
            continue
        number = int(value) if isinstance(value, int) else by_name.get(_plain(value))
        if number is None and isinstance(value, str) and value.isdecimal():
            number = int(value)
        if number is None or not 0 <= number < len(classes):
            problems.append(
                f"{table.where}: row {row}: {column!r} is {brief(value)}; expected 0 to {len(classes) - 1}, or one of "
                f"{of}: {shorten(list(classes))}"
            )
        else:
            numbers.append(number)
    if problems:
        raise ConfigError(*first_problems(problems))
    return numbers


def numbers_of(table: Table, column: str) -> list[float]:
    """Numbers of a column that others are correlated with.

    Raises:
        CalibrationError: If values are no finite numbers, there is one sample only, or all values are equal.
    """
    values = [float(value) for value in table.column(column, (int, float), "a number")]
    problems = [
        f"{table.where}: row {row}: {column!r}: expected a finite number, found {value}"
        for row, value in zip(table.numbers, values, strict=True)
        if not math.isfinite(value)
    ]
    if problems:
        raise CalibrationError(*first_problems(problems))
    if len(values) < _FEWEST_CORRELATED:
        raise CalibrationError(f"{table.where}: has one sample; expected two or more for a correlation")
    if len(set(values)) == 1:
        raise CalibrationError(
            f"{table.where}: {column!r} is {values[0]:g} in all {len(values):,} samples, with which nothing can be "
            "correlated; expected values that differ"
        )
    return values


def _places(table: Table, column: str, known: Sequence[str], by_name: Mapping[str, int], of: str) -> list[int] | None:
    """Numbers of the classes that the data's own names of its labels mean; `None` where these are other names.

    Raises:
        ConfigError: If some of the names are classes of other numbers, and others are none.
    """
    places = [by_name.get(_plain(name)) for name in known]
    if all(place is not None for place in places):
        return [place for place in places if place is not None]
    moved = next((number for number, place in enumerate(places) if place not in (None, number)), None)
    if moved is not None:
        lacking = known[places.index(None)]
        raise ConfigError(
            f"{table.where}: label {moved} of {column!r} is {known[moved]!r}, which is class {places[moved]} of {of}; "
            f"{lacking!r} is none of its classes: expected the same names, or the same order"
        )
    return None


def _plain(name: str) -> str:
    """A name as it is compared: `Golden_retriever` and `golden retriever` are one."""
    return name.strip().casefold().replace("_", " ").replace("-", " ")


def open_texts(files: ModelFiles, table: Table, signature: ForwardSignature) -> TextReader:
    """Loads the tokenizer of a model, for the texts of a table.

    Raises:
        CalibrationError: If there is none, or the model takes no texts.
    """
    if "input_ids" not in signature.forward_arguments:
        raise CalibrationError(f"{table.where}: {files.name} takes no texts but {sorted(signature.forward_arguments)}")
    fields = Fields("text", None, None, None, None, None)
    return open_text_reader(
        files.text_folder, table.settings, fields, signature, table.where, trust_remote_code=files.trust_remote_code
    )


def as_sample(
    number: int, tokens: Mapping[str, Sequence[int]], mask: list[int] | None, reader: TextReader, num_cut: int = 0
) -> Sample:
    """Makes a sample of tokens, with the attention mask that the model takes."""
    sequences = {name: list(tokens[name]) for name in reader.token_arguments}
    if "attention_mask" in reader.signature.forward_arguments:
        sequences["attention_mask"] = [1] * len(sequences["input_ids"])
    return Sample(number, sequences, mask, num_cut=num_cut)


def text_sample(
    number: int, text: str, reader: TextReader, *, pair: str | None = None, max_length: int | None = None
) -> Sample:
    """Makes a sample of a text, or of a pair of texts, whose end is cut off where it is too long.

    Args:
        number: Number of the sample.
        text: The text.
        reader: The tokenizer.
        pair: The second text of a pair; of a pair the longer text is cut.
        max_length: Tokens that are kept; default: the reader's.
    """
    length = max_length or reader.max_length
    more = {"text_pair": pair} if pair else {}
    tokens = encode_text(reader.tokenizer, text, **more)
    num_tokens = len(tokens["input_ids"])
    if num_tokens > length:
        tokens = encode_text(reader.tokenizer, text, truncation=True, max_length=length, **more)
    return as_sample(number, tokens, None, reader, num_tokens - len(tokens["input_ids"]))


def text_samples(
    samples: Sequence[Sample],
    files: ModelFiles,
    reader: TextReader,
    settings: CalibrationConfig,
    *,
    what: str = "texts",
    limit: str = "",
    kept: str = "their ends are left out",
    more_notes: Sequence[str] = (),
    left: bool = False,
) -> Samples:
    """Groups tokenised texts into batches, and notes what of them was cut off, and whose tokenizer it was.

    Args:
        samples: The texts.
        files: The model.
        reader: Its tokenizer.
        settings: How the data is read.
        what: Words for the texts.
        limit: Words for the limit that they are held to; default: that of the reader.
        kept: Words for what becomes of texts that are too long.
        more_notes: What else is to be told.
        left: Whether padding stands on the left.
    """
    assert settings.batch_size is not None
    notes = [*cut_notes(samples, what, limit or length_limit(reader, settings), kept), *more_notes]
    lent = f"no tokenizer; that of {files.text_lender} is used" if files.text_lender is not None else ""
    return Samples.of(
        samples, settings.batch_size, reader.where, reader.padding, left=left, notes=tuple(notes), lent=lent
    )


def cut_notes(samples: Sequence[Sample], what: str, limit: str, kept: str) -> list[str]:
    """Says how many texts are longer than what is kept of them; nothing where none is."""
    num_cut = sum(sample.num_cut > 0 for sample in samples)
    return [f"{num_cut:,} of {len(samples):,} {what} are longer than {limit}; {kept}"] if num_cut else []


def length_limit(reader: TextReader, settings: CalibrationConfig) -> str:
    """Words for the number of tokens that a reader keeps, and for whose limit that is."""
    if reader.max_length == settings.max_length:
        return f"max_length ({reader.max_length:,} tokens)"
    return f"the {reader.max_length:,} tokens that the tokenizer allows"
