"""What a candidate's calibration data will be, found out in bounded time, for plans.

    small data              read as the merge reads it ──► exact
    many samples, images    some samples, drawn as the merge draws them ──► all taken to be like these
    large files             their first rows ──► all taken to be like these
    datasets of the Hub     not looked at ──► upper bounds

What is not read is made up: tensors of the right shapes that hold no memory.
"""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from largemerge.calibration.batches import Batch, CalibrationOutline, CalibrationSet, ForwardSignature
from largemerge.calibration.columns import choose_fields
from largemerge.calibration.config import CalibrationConfig
from largemerge.calibration.folders import TABLE_BUILDERS, folder_notes, is_image_folder, list_images
from largemerge.calibration.load import load_calibration, outline_calibration, read_table
from largemerge.calibration.sources import (
    Source,
    cache_problem,
    check_headers,
    check_rows,
    in_our_words,
    locate_data,
    open_source,
    tables_to_check,
)
from largemerge.errors import CalibrationError

MAX_BYTES = 64 << 20
"""Size of a file or folder that is opened as the merge opens it; of larger ones the first rows are read."""
MAX_SAMPLES, MAX_IMAGES = 1024, 32
"""Samples that are read, at most, of texts or tensors, and of images."""
_FIRST_ROWS, _FIRST_CHARACTERS = 256, 4 << 20  # of large files
_READ_AHEAD = 16 << 20  # characters; the stream takes JSON in pieces of 10 MiB
_MAX_FILES = 10_000  # of a folder that are counted

_Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape of one sample and dtype, by forward argument."""


def survey_calibration(
    config: CalibrationConfig,
    name: str,
    checkpoint: Path,
    signature: ForwardSignature,
    *,
    base: Path | None = None,
    trust_remote_code: bool = False,
) -> CalibrationSet:
    """Finds out what `load_calibration` will return for the same arguments.

    Returns:
        The data itself where it is small. Otherwise as many samples, in batches of about the same shapes, without
        contents; `estimated` says what they rest on.

    Raises:
        CalibrationError: If the data cannot be read, or does not fit the settings or the model, as far as that is
            looked at.
    """
    options: dict[str, Any] = {"base": base, "trust_remote_code": trust_remote_code}
    arguments = (name, checkpoint, signature)
    where, path = locate_data(config, f"candidate {name!r}")
    assert config.num_samples is not None and config.batch_size is not None
    if path is None or _num_bytes(path) > MAX_BYTES:
        outline = outline_calibration(config, *arguments, **options)
        is_tensors = path is not None and path.suffix.lower() == ".safetensors"
        if path is None or is_tensors or is_image_folder(path):
            bounds = "" if path is not None else f"{where}: taken to have {config.num_samples} samples of full length"
            notes = folder_notes(path, where)
            return _made_up(name, [outline.inputs], outline.num_samples, config.batch_size, bounds, where, notes)
        return _from_first_rows(config, outline, where, path, arguments, options)
    most = MAX_IMAGES if "pixel_values" in signature.forward_arguments else MAX_SAMPLES
    if path.suffix.lower() == ".safetensors" or config.num_samples <= most:
        return load_calibration(config, *arguments, **options)
    count = len(list_images(path)) if is_image_folder(path) else open_source(config, where, path).num_rows
    if count <= most or config.pack:
        return load_calibration(config, *arguments, **options)
    some = load_calibration(config.model_copy(update={"num_samples": most}), *arguments, **options)
    wanted = min(count, config.num_samples)
    text = f"{where}: {wanted} samples, taken to be as long as {some.num_samples} that were read"
    return _made_up(name, _sample_shapes(some), wanted, config.batch_size, text, where, some.notes)


def _num_bytes(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    files = [path] if path.is_file() else itertools.islice((file for file in path.rglob("*")), _MAX_FILES)
    total = 0
    for file in files:
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue  # whoever reads it will say so
    return total


def _from_first_rows(
    config: CalibrationConfig,
    outline: CalibrationOutline,
    where: str,
    path: Path,
    arguments: tuple[str, Path, ForwardSignature],
    options: Mapping[str, Any],
) -> CalibrationSet:
    """Estimates a large table's samples from its first rows; bad rows there need not be among those drawn later."""
    name, checkpoint, signature = arguments
    assert config.num_samples is not None and config.batch_size is not None
    source, is_whole = _first_rows(config, where, path)
    fields = choose_fields(config, source.columns, signature, where)
    folders = (checkpoint, *([options["base"]] if options["base"] is not None else []))
    few = config.model_copy(update={"num_samples": min(config.num_samples, source.num_rows)})
    wanted = few.num_samples if is_whole and not config.pack else config.num_samples
    assert wanted is not None
    notes = folder_notes(path, where)
    try:
        batches = read_table(source, fields, few, folders, signature, options["trust_remote_code"])
    except CalibrationError as error:
        text = f"{where}: taken to have {wanted} samples of full length, for its first rows are no good: {error}"
        return _made_up(name, [outline.inputs], wanted, config.batch_size, text, where, notes)
    shapes = _sample_shapes(CalibrationSet(name, batches, ""))
    text = f"{where}: {wanted} samples, taken to be as long as the first {source.num_rows} rows"
    return _made_up(name, shapes, wanted, config.batch_size, text, where, notes)


def _first_rows(config: CalibrationConfig, where: str, path: Path) -> tuple[Source, bool]:
    """Reads the first rows of a table; returns also whether there are no others."""
    if path.is_file() and path.suffix.lower() == ".txt":
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            content = stream.read(_FIRST_CHARACTERS)
        parts = content.split("\n") if config.one_per == "line" else re.split(r"\n(?:[^\S\n]*\n)+", content)
        rows: list[dict[str, Any]] = [{"text": part} for part in parts if part.strip()][:_FIRST_ROWS]
        columns: tuple[str, ...] = ("text",)
        return Source(where, columns, len(rows), lambda _: rows, None), False
    rows = _streamed(config, where, path)
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    whole = [{column: row.get(column) for column in columns} for row in rows]
    folder = path.parent if path.is_file() else path
    return Source(where, columns, len(whole), lambda _: whole, folder), len(whole) < _FIRST_ROWS


def _streamed(config: CalibrationConfig, where: str, path: Path) -> list[dict[str, Any]]:
    """Reads the first rows of a table without the rest of it."""
    import datasets

    builder = TABLE_BUILDERS[path.suffix.lower()] if path.is_file() else str(path)
    options: dict[str, Any] = {"data_files": glob.escape(str(path))} if path.is_file() else {"name": config.subset}
    if path.is_file() and path.suffix.lower() == ".csv":
        options["keep_default_na"] = False
    _check_first_rows(path, where)
    check_headers([path] if path.is_file() else [*path.rglob("*.parquet"), *path.rglob("*.csv")], where)
    try:
        stream = datasets.load_dataset(builder, split=config.split, streaming=True, **options)
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Image):
                stream = stream.cast_column(column, datasets.Image(decode=False))
        return [dict(row) for row in itertools.islice(stream, _FIRST_ROWS)]
    except Exception as error:  # whatever `datasets` and its readers raise, it is about the user's data
        told = cache_problem(error, path) or in_our_words(str(error), config.split)
        reason = f"cannot be read: {type(error).__name__}: {error}".strip().split("\n")[0]
        raise CalibrationError(f"{where}: {told or reason}") from None


def _check_first_rows(path: Path, where: str) -> None:
    """Checks the rows that a stream may read ahead; of a folder's files, those that come first."""
    room = MAX_BYTES
    for file in tables_to_check(path):
        check_rows([file], where, _READ_AHEAD)
        room -= min(file.stat().st_size, _READ_AHEAD)
        if room <= 0:
            return


def _sample_shapes(data: CalibrationSet) -> list[_Shapes]:
    """Shapes of every sample, without the padding of its batch."""
    return [_shapes_of(batch, index) for batch in data.batches for index in range(batch.num_samples)]


def _shapes_of(batch: Batch, index: int) -> _Shapes:
    """Shapes of one sample of a batch: as long as the mask of its tokens says, if there is one."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, x in batch.inputs.items():
        mask = batch.inputs.get("decoder_attention_mask" if name.startswith("decoder_") else "attention_mask")
        masked = mask is not None and x.shape == mask.shape
        found[name] = ((int(mask[index].sum()),) if masked and mask is not None else tuple(x.shape[1:]), x.dtype)
    return found


def _made_up(
    name: str,
    samples: list[_Shapes],
    count: int,
    batch_size: int,
    estimated: str,
    where: str,
    notes: tuple[str, ...],
) -> CalibrationSet:
    """Makes batches of as many samples as wanted whose shapes are spread like those of some."""
    chosen = [samples[index * len(samples) // count] for index in range(count)]
    groups = (chosen[start : start + batch_size] for start in range(0, count, batch_size))
    batches = tuple(Batch(dict(_tensors(group)), None) for group in groups)
    return CalibrationSet(name, batches, "", estimated, where, notes)


def _tensors(group: list[_Shapes]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a batch, which hold one number each."""
    for name, (first, dtype) in group[0].items():
        shape = [max(sizes) for sizes in zip(*(sample[name][0] for sample in group), strict=True)] or list(first)
        one = torch.ones(1, dtype=dtype) if name.endswith("mask") else torch.zeros(1, dtype=dtype)
        yield name, one.view([1] * (1 + len(shape))).expand(len(group), *shape)


def is_made_up(data: CalibrationSet) -> bool:
    """Whether the data has shapes alone, and no contents."""
    return not data.fingerprint


def held_bytes(data: CalibrationSet) -> int:
    """Bytes of memory that the data takes, as it is now."""
    return sum(x.untyped_storage().nbytes() for batch in data.batches for x in batch.inputs.values())


def without_contents(data: CalibrationSet) -> CalibrationSet:
    """Returns the data with tensors that hold no memory in place of those in floating point."""

    def emptied(batch: Batch) -> Batch:
        inputs = {
            name: torch.zeros(1, dtype=x.dtype).view([1] * x.dim()).expand(x.shape) if x.is_floating_point() else x
            for name, x in batch.inputs.items()
        }
        return replace(batch, inputs=inputs)

    return replace(data, batches=tuple(map(emptied, data.batches)))
