"""The two ways in: read a candidate's calibration data, or say beforehand how large it will be.

Both find and check the same things in the same order, so whatever can be known without reading the
samples fails in the outline already.

How large calibration data will be, from the configuration alone: where neither data nor tokenizer is at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from largemerge.calibration.batches import (
    Batch,
    CalibrationOutline,
    CalibrationSet,
    ForwardSignature,
    Sample,
    fingerprint_batches,
    group_samples,
    pad_samples,
)
from largemerge.calibration.columns import Fields, Row, choose_fields, draw_order, read_rows, takes_target
from largemerge.calibration.config import CalibrationConfig
from largemerge.calibration.images import load_image_processor, outline_images, read_images
from largemerge.calibration.pretokenized import outline_tensors, read_tensors
from largemerge.calibration.sources import Source, is_image_folder, list_images, locate_data, open_source
from largemerge.calibration.text import pack, tokenise
from largemerge.calibration.tokenizer import TextReader, open_text_reader
from largemerge.checkpoint.side_files import find_processor, find_tokenizer
from largemerge.errors import CalibrationError


def load_calibration(
    config: CalibrationConfig,
    name: str,
    checkpoint: Path,
    signature: ForwardSignature,
    *,
    base: Path | None = None,
    trust_remote_code: bool = False,
) -> CalibrationSet:
    """Reads a candidate's calibration data.

    Args:
        config: Where it lies and how it is read; every number set (`CalibrationConfig.with_defaults`).
        name: The candidate's.
        checkpoint: The candidate's folder, with its tokenizer or image processor.
        signature: What the model's forward takes.
        base: The base's folder: its tokenizer or image processor is used where the candidate has none.
        trust_remote_code: Allow the checkpoint's tokenizer or image processor to be code that it ships.

    Returns:
        At most `num_samples` samples in batches; fewer if the data has fewer.

    Raises:
        CalibrationError: The data cannot be read, or fits neither the settings nor the model.
    """
    _assert_resolved(config)
    where, path = locate_data(config, name)
    if path is not None and _is_tensors(path):
        batches = read_tensors(path, config, signature, where)
    else:
        source = open_source(config, where, path)
        fields = choose_fields(config, source.columns, signature, where)
        folders = (checkpoint, *([base] if base is not None else []))
        batches = _read_table(source, fields, config, folders, signature, trust_remote_code)
    _check_that_something_counts(batches, where)
    return CalibrationSet(name, batches, fingerprint_batches(batches))


def outline_calibration(
    config: CalibrationConfig,
    name: str,
    checkpoint: Path,
    signature: ForwardSignature,
    *,
    base: Path | None = None,
    trust_remote_code: bool = False,
) -> CalibrationOutline:
    """Says what `load_calibration` will give, at most, without reading samples.

    It takes the same arguments. Of a table whose columns are not known before it is read, those that
    the configuration names are taken to be there, or else whatever the model takes.

    Raises:
        CalibrationError: What can be known already to be missing or not to fit.
    """
    _assert_resolved(config)
    assert config.num_samples is not None and config.batch_size is not None
    where, path = locate_data(config, name)
    if path is not None and _is_tensors(path):
        return outline_tensors(path, config, signature, where)
    images = list_images(path) if path is not None and is_image_folder(path) else []
    is_text = path is not None and path.is_file() and path.suffix.lower() == ".txt"
    columns = ("text",) if is_text else ("image",) if images else None
    fields = choose_fields(config, columns, signature, where)
    inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    folders = (checkpoint, *([base] if base is not None else []))
    if fields.has_text:
        tokenizer = find_tokenizer(*folders)
        reader = open_text_reader(tokenizer, config, fields, signature, where, trust_remote_code=trust_remote_code)
        inputs |= {argument: ((reader.max_length,), torch.int64) for argument in reader.arguments}
    if fields.image is not None:
        processor = load_image_processor(find_processor(*folders), where, trust_remote_code=trust_remote_code)
        inputs |= outline_images(images[0] if images else None, processor, signature, where)
    num_samples = min(len(images), config.num_samples) if images else config.num_samples
    return CalibrationOutline(num_samples, config.batch_size, inputs)


def _assert_resolved(config: CalibrationConfig) -> None:
    numbers = (config.num_samples, config.max_length, config.batch_size, config.seed)
    assert all(isinstance(number, int) for number in numbers), "call CalibrationConfig.with_defaults first"


def _is_tensors(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".safetensors"


def _read_table(
    source: Source,
    fields: Fields,
    config: CalibrationConfig,
    folders: tuple[Path, ...],
    signature: ForwardSignature,
    trust_remote_code: bool,
) -> tuple[Batch, ...]:
    """Draw rows, tokenise, group by length, pad, open images."""
    assert config.num_samples is not None and config.batch_size is not None
    where = source.where
    reader = processor = None
    if fields.has_text:
        tokenizer = find_tokenizer(*folders)
        reader = open_text_reader(tokenizer, config, fields, signature, where, trust_remote_code=trust_remote_code)
    if fields.image is not None:
        processor = load_image_processor(find_processor(*folders), where, trust_remote_code=trust_remote_code)
    samples = _read_samples(source, fields, config, reader)
    if not samples:
        raise CalibrationError(f"{where}: all texts are empty; expected at least one with words")
    groups = group_samples(samples, config.batch_size)
    batches = [pad_samples(group, reader.padding if reader else {}) for group in groups]
    if processor is not None:
        pixels = read_images(groups, processor, source.folder, signature, where)
        batches = [replace(batch, inputs=batch.inputs | more) for batch, more in zip(batches, pixels, strict=True)]
    return tuple(batches)


def _read_samples(source: Source, fields: Fields, config: CalibrationConfig, reader: TextReader | None) -> list[Sample]:
    assert config.num_samples is not None
    order = draw_order(source.num_rows, config)
    if config.pack and reader is not None:
        return pack(_rows_in_parts(source, fields, order), reader, config.num_samples)
    rows = read_rows(source, fields, order, config.num_samples)
    if reader is not None:
        return tokenise(rows, reader)
    return [Sample(row.index, {}, None, row.image) for row in rows]


def _rows_in_parts(source: Source, fields: Fields, order: Iterator[int]) -> Iterator[Row]:
    """Packing does not know how many rows it takes: not many more are read than it asks for."""
    while part := list(itertools.islice(order, 64)):
        yield from read_rows(source, fields, part, len(part))


def _check_that_something_counts(batches: tuple[Batch, ...], where: str) -> None:
    if any(batch.loss_mask is None or batch.loss_mask.any() for batch in batches):
        return
    raise CalibrationError(
        f"{where}: the loss mask keeps every token of every sample out (as truncated); expected some to count. "
        "Raise 'max_length' if what counts stands late in the samples"
    )


def outline_from_config(
    config: CalibrationConfig,
    name: str,
    checkpoint: Path,
    signature: ForwardSignature,
    *,
    base: Path | None = None,
    trust_remote_code: bool = False,
) -> CalibrationOutline:
    """`num_samples` texts of `max_length` tokens; it takes the arguments of `outline_calibration`.

    Raises:
        CalibrationError: The model takes something else than texts.
    """
    assert config.num_samples is not None and config.max_length is not None and config.batch_size is not None
    if "input_ids" not in signature.forward_arguments or "pixel_values" in signature.forward_arguments:
        raise CalibrationError(f"candidate {name!r}: only models of text can be planned from {checkpoint}/config.json")
    arguments = ["input_ids", "attention_mask"]
    if takes_target(signature):
        arguments += ["decoder_attention_mask", "decoder_input_ids"]
    shape: tuple[int, ...] = (config.max_length,)
    inputs = {name: (shape, torch.int64) for name in arguments if name in signature.forward_arguments}
    return CalibrationOutline(config.num_samples, config.batch_size, inputs)
