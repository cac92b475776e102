"""The ways in: read a candidate's calibration data, or say beforehand how large it will be.

    load_calibration      locate ──► columns ──► rows ──► tokens, pixels ──► batches ──► CalibrationSet
    outline_calibration   locate ──► columns ──► tokenizer, one image ──────────────► CalibrationOutline
    outline_from_config   settings alone, where neither data nor tokenizer is at hand ──► CalibrationOutline

The first two find and check the same things in the same order, so that whatever can be known without reading samples
fails in the outline already.
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
    counting_tokens,
    fingerprint_batches,
    group_samples,
    pad_samples,
)
from largemerge.calibration.columns import Fields, Row, choose_fields, read_rows, sample_order, takes_target
from largemerge.calibration.config import CalibrationConfig
from largemerge.calibration.folders import folder_notes, is_image_folder, list_images
from largemerge.calibration.images import load_image_processor, outline_images, read_images
from largemerge.calibration.pretokenized import outline_tensors, read_tensors
from largemerge.calibration.sources import Source, locate_data, open_source
from largemerge.calibration.text import pack, tokenise
from largemerge.calibration.tokenizer import TextReader, check_templates, open_text_reader
from largemerge.checkpoint.side_files import find_processor, find_tokenizer
from largemerge.config_file import WARNING
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
        config: Settings, with every number set (`CalibrationConfig.with_defaults`).
        name: Name of the candidate.
        checkpoint: The candidate's folder, with its tokenizer or image processor.
        signature: Inputs of the model's forward.
        base: The base's folder, whose tokenizer or image processor is used where the candidate has none.
        trust_remote_code: Allow the checkpoint's tokenizer or image processor to be code that it ships.

    Returns:
        At most `num_samples` samples in batches; fewer if the data has fewer.

    Raises:
        CalibrationError: If the data cannot be read, or does not fit the settings or the model.
    """
    _assert_resolved(config)
    where, path = locate_data(config, f"candidate {name!r}")
    if path is not None and _is_tensors(path):
        batches = read_tensors(path, config, signature, where)
    else:
        source = open_source(config, where, path)
        fields = choose_fields(config, source.columns, signature, where)
        folders = (checkpoint, *([base] if base is not None else []))
        batches = read_table(source, fields, config, folders, signature, trust_remote_code)
    notes = _check_masks(batches, signature, where, is_tensors=path is not None and _is_tensors(path))
    notes = (*folder_notes(path, where), *notes)
    return CalibrationSet(name, batches, fingerprint_batches(batches), where=where, notes=notes)


def outline_calibration(
    config: CalibrationConfig,
    name: str,
    checkpoint: Path,
    signature: ForwardSignature,
    *,
    base: Path | None = None,
    trust_remote_code: bool = False,
) -> CalibrationOutline:
    """Finds upper bounds of what `load_calibration` will return for the same arguments, without reading samples.

    Where the columns of a table are not known before it is read, those that the configuration names are taken to be
    there, or else all that the model has a use for.

    Raises:
        CalibrationError: If something is missing or does not fit, as far as that can be known already.
    """
    _assert_resolved(config)
    assert config.num_samples is not None and config.batch_size is not None
    where, path = locate_data(config, f"candidate {name!r}")
    if path is not None and _is_tensors(path):
        return replace(outline_tensors(path, config, signature, where), where=where)
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
    return CalibrationOutline(num_samples, config.batch_size, inputs, where=where)


def outline_from_config(
    config: CalibrationConfig,
    name: str,
    checkpoint: Path,
    signature: ForwardSignature,
    *,
    base: Path | None = None,
    trust_remote_code: bool = False,
) -> CalibrationOutline:
    """Outlines `num_samples` texts of `max_length` tokens; takes the same arguments as `outline_calibration`.

    Raises:
        CalibrationError: If the model takes something else than texts.
    """
    assert config.num_samples is not None and config.max_length is not None and config.batch_size is not None
    if "input_ids" not in signature.forward_arguments or "pixel_values" in signature.forward_arguments:
        raise CalibrationError(f"candidate {name!r}: only models of text can be planned from {checkpoint}/config.json")
    arguments = ["input_ids", "attention_mask"]
    if takes_target(signature):
        arguments += ["decoder_attention_mask", "decoder_input_ids"]
    shape: tuple[int, ...] = (config.max_length,)
    inputs = {name: (shape, torch.int64) for name in arguments if name in signature.forward_arguments}
    return CalibrationOutline(config.num_samples, config.batch_size, inputs, where=f"candidate {name!r}")


def _assert_resolved(config: CalibrationConfig) -> None:
    numbers = (config.num_samples, config.max_length, config.batch_size, config.seed)
    assert all(isinstance(number, int) for number in numbers), "call CalibrationConfig.with_defaults first"


def _is_tensors(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".safetensors"


def read_table(
    source: Source,
    fields: Fields,
    config: CalibrationConfig,
    folders: tuple[Path, ...],
    signature: ForwardSignature,
    trust_remote_code: bool,
) -> tuple[Batch, ...]:
    """Draws rows of a table, tokenises, groups by length, pads, opens images.

    Args:
        source: The table.
        fields: The columns that become samples.
        config: Settings, with every number set.
        folders: Folders that the tokenizer or image processor may be in, in order.
        signature: Inputs of the model's forward.
        trust_remote_code: Allow the tokenizer or image processor to be code that comes with it.

    Raises:
        CalibrationError: If rows do not hold what their columns should, or do not fit the model.
    """
    assert config.num_samples is not None and config.batch_size is not None
    where = source.where
    reader = processor = None
    if fields.has_text:
        tokenizer = find_tokenizer(*folders)
        reader = open_text_reader(tokenizer, config, fields, signature, where, trust_remote_code=trust_remote_code)
    if fields.image is not None:
        processor = load_image_processor(find_processor(*folders), where, trust_remote_code=trust_remote_code)
    samples = read_samples(source, fields, config, reader)
    if not samples:
        raise CalibrationError(f"{where}: all texts are empty; expected at least one with words")
    groups = group_samples(samples, config.batch_size)
    batches = [pad_samples(group, reader.padding if reader else {}) for group in groups]
    if processor is not None:
        pixels = read_images(groups, processor, source.folder, signature, where)
        batches = [replace(batch, inputs=batch.inputs | more) for batch, more in zip(batches, pixels, strict=True)]
    return tuple(batches)


def read_samples(
    source: Source,
    fields: Fields,
    config: CalibrationConfig,
    reader: TextReader | None,
    *,
    whole_target: bool = False,
    skip: int = 0,
) -> list[Sample]:
    """Draws rows of a table, and tokenises their texts.

    Args:
        source: The table.
        fields: The columns that become samples.
        config: Settings, with every number set.
        reader: The tokenizer; `None` where there is no text.
        whole_target: Whether a decoder's tokens hold the last one of the target, which it only predicts.
        skip: Samples that others have drawn before; see `sample_order`. Those are left out.

    Raises:
        CalibrationError: If rows do not hold what their columns should; it names several.
    """
    assert config.num_samples is not None
    order = sample_order(source.num_rows, config, skip)
    if config.pack and reader is not None:
        return pack(_rows_in_parts(source, fields, order, reader), reader, config.num_samples)[skip:]
    rows = read_rows(source, fields, order, config.num_samples)[skip:]
    if reader is not None:
        _check_templates(rows, reader)
        return tokenise(rows, reader, whole_target=whole_target)
    return [Sample(row.index, {}, None, row.image) for row in rows]


def _rows_in_parts(source: Source, fields: Fields, order: Iterator[int], reader: TextReader) -> Iterator[Row]:
    """Reads rows some at a time, for packing, which does not know beforehand how many it needs."""
    while part := list(itertools.islice(order, 64)):
        rows = read_rows(source, fields, part, len(part))
        _check_templates(rows, reader)
        yield from rows


def _check_templates(rows: list[Row], reader: TextReader) -> None:
    try:
        check_templates(reader.tokenizer, [row.messages for row in rows if row.messages is not None])
    except CalibrationError as error:
        raise CalibrationError(*(f"{reader.where}: {problem}" for problem in error.problems)) from None


def _check_masks(
    batches: tuple[Batch, ...], signature: ForwardSignature, where: str, *, is_tensors: bool
) -> tuple[str, ...]:
    """Makes sure that some token counts: one that is no padding, and that the loss mask does not keep out.

    Returns:
        Notes: how many samples have no such token.
    """
    masks = [counting_tokens(batch, signature) for batch in batches if batch.loss_mask is not None]
    without = sum(int((~mask.flatten(1).any(dim=1)).sum()) for mask in masks)
    total = sum(batch.num_samples for batch in batches)
    if not without:
        return ()
    if is_tensors:
        hint = "expected 1 for tokens that count, where the attention mask has 1 as well"
    else:
        hint = "expected some to count. Raise 'max_length' if what counts stands late in the samples"
    if without < total:
        return (
            f"{WARNING}{where}: {without} of {total} samples add nothing: the loss mask "
            f"keeps every token of theirs out (as padded or truncated); {hint}",
        )
    raise CalibrationError(
        f"{where}: the loss mask keeps every token of every sample out (as padded or truncated); {hint}"
    )
