"""Texts to tokens: truncated or packed, with a loss mask, with a target for the decoder.

    rows ──► tokenise: one sample each, truncated   (a conversation by its chat template, see `tokenizer.py`)
         └─► pack: joined, cut into full samples

Packing joins texts, the end-of-text token between them, and cuts the stream into full samples:
nothing is padded, and nothing is left out because it stands late in a long text.

A decoder reads the target shifted by one: position t holds token t-1 and predicts token t, and
position 0 holds `decoder_start_token_id`. A loss mask goes with what is predicted, as labels do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from largemerge.calibration.batches import Sample
from largemerge.calibration.columns import MAX_PROBLEMS, Row, takes_target
from largemerge.calibration.tokenizer import TextReader, encode_conversation, encode_text
from largemerge.errors import CalibrationError

Tokens = dict[str, list[int]]
"""Numbers for each token, by forward argument (`input_ids`, …)."""

Mask = list[int] | None
"""0 or 1 for each token; `None` if all count."""

MAX_LAST_TOKENS = 8
"""Maximum of special tokens that a tokenizer adds at the end (BERT 1, T5 1, NLLB 2)."""


def tokenise(rows: Sequence[Row], reader: TextReader, *, whole_target: bool = False) -> list[Sample]:
    """Turns rows into samples, one each, truncated. Texts without any token are left out.

    Args:
        rows: The rows.
        reader: The tokenizer, and how it is used.
        whole_target: Whether a decoder's tokens hold the last one of the target, too, which it only predicts.

    Raises:
        CalibrationError: If a loss mask has another length, or the chat template rejects a conversation; it names
            several rows.
    """
    samples: list[Sample] = []
    problems: list[str] = []
    for row in rows:
        try:
            sample = _sample(row, reader, whole_target)
        except CalibrationError as error:
            problems += _in_row(row, reader, error)
            if len(problems) >= MAX_PROBLEMS:
                break
        else:
            if all(sample.sequences.values()):
                samples.append(sample)
    if problems:
        raise CalibrationError(*problems)
    return samples


def pack(rows: Iterable[Row], reader: TextReader, num_samples: int) -> list[Sample]:
    """Joins texts and cuts them into samples of exactly `max_length` tokens, until there are enough.

    What is left at the end is dropped, unless it is all there is; the last sample says how many tokens that are.

    Raises:
        CalibrationError: If the chat template rejects a conversation.
    """
    length, eos = reader.max_length, reader.tokenizer.eos_token_id
    stream: Tokens = {name: [] for name in reader.token_arguments}
    stream_mask: list[int] = []
    has_mask = False
    for row in rows:
        try:
            tokens, mask = _encode(row, reader)
        except CalibrationError as error:
            raise CalibrationError(*_in_row(row, reader, error)) from None
        ids = stream["input_ids"]
        if ids and tokens["input_ids"] and ids[-1] != eos:
            for name, values in stream.items():
                values.append(eos if name == "input_ids" else 0)
            stream_mask.append(1 if mask is None else 0)
        for name, values in tokens.items():
            stream[name] += values
        stream_mask += [1] * len(tokens["input_ids"]) if mask is None else mask
        has_mask = has_mask or mask is not None
        if len(ids) >= num_samples * length:
            break
    num_tokens = len(stream_mask)
    num_cut = min(num_tokens // length, num_samples) or min(num_tokens, 1)
    parts = [slice(index * length, (index + 1) * length) for index in range(num_cut)]
    samples = []
    for index, part in enumerate(parts):
        tokens = {name: values[part] for name, values in stream.items()}
        sequences, mask = _with_attention_mask(tokens, stream_mask[part] if has_mask else None, "", reader)
        samples.append(Sample(index, sequences, mask))
    if samples and num_cut < num_samples:  # else there are as many as were asked for
        samples[-1] = replace(samples[-1], num_cut=max(0, num_tokens - num_cut * length))
    return samples


def _in_row(row: Row, reader: TextReader, error: CalibrationError) -> list[str]:
    return [f"{reader.where}: row {row.index}: {problem}" for problem in error.problems]


def _sample(row: Row, reader: TextReader, whole_target: bool) -> Sample:
    sequences: Tokens = {}
    mask: Mask = None
    num_cut = 0
    if row.text is not None or row.messages is not None:
        whole, mask = _encode(row, reader)
        sequences, mask = _with_attention_mask(*_truncate(row, whole, mask, reader), "", reader)
        num_cut = len(whole["input_ids"]) - len(sequences["input_ids"])
    if takes_target(reader.signature):
        tokens, mask, num_cut_there = _decoder_tokens(row, reader, whole_target)
        decoder, mask = _with_attention_mask(tokens, mask, "decoder_", reader)
        sequences |= decoder
        num_cut += num_cut_there
    return Sample(row.index, sequences, mask, row.image, num_cut)


def _encode(row: Row, reader: TextReader) -> tuple[Tokens, Mask]:
    """Encodes the row's whole text or conversation; returns its tokens and the mask over them."""
    mask: Mask = None
    if row.messages is not None:
        encoded, mask = encode_conversation(reader.tokenizer, row.messages, assistant_only=reader.assistant_only)
    else:
        encoded = encode_text(reader.tokenizer, row.text)
    tokens = {name: list(encoded[name]) for name in reader.token_arguments}
    if row.loss_mask is None or takes_target(reader.signature):
        return tokens, mask
    _check_lengths(row.loss_mask, tokens["input_ids"])
    both = row.loss_mask if mask is None else [a * b for a, b in zip(mask, row.loss_mask, strict=True)]
    return tokens, both


def _truncate(row: Row, whole: Tokens, mask: Mask, reader: TextReader) -> tuple[Tokens, Mask]:
    length = reader.max_length
    if len(whole["input_ids"]) <= length:
        return whole, mask
    if row.messages is not None:
        # The template wrote every special token, so the tokenizer has none to keep at the end.
        short = {name: values[:length] for name, values in whole.items()}
    else:
        encoded = encode_text(reader.tokenizer, row.text, truncation=True, max_length=length)
        short = {name: list(encoded[name]) for name in whole}
    return short, None if mask is None else _mask_of_kept(mask, whole["input_ids"], short["input_ids"])


def _decoder_tokens(row: Row, reader: TextReader, whole_target: bool) -> tuple[Tokens, Mask, int]:
    """Encodes the target; returns the decoder's tokens, the mask over them, and how many are cut off."""
    start = reader.signature.decoder_start_token_id
    assert start is not None and row.target is not None, "checked when the columns were chosen"
    whole: list[int] = list(encode_text(reader.tokenizer, text_target=row.target)["input_ids"])
    target, mask = whole, row.loss_mask
    if mask is not None:
        _check_lengths(mask, whole)
    if len(whole) > reader.max_length:
        encoded = encode_text(reader.tokenizer, text_target=row.target, truncation=True, max_length=reader.max_length)
        target = list(encoded["input_ids"])
        mask = None if mask is None else _mask_of_kept(mask, whole, target)
    num_cut = len(whole) - len(target)
    if whole_target and target:
        return {"decoder_input_ids": [start, *target]}, None if mask is None else [0, *mask], num_cut
    return {"decoder_input_ids": [start, *target[:-1]] if target else []}, mask, num_cut


def _check_lengths(mask: list[int], ids: list[int]) -> None:
    if len(mask) != len(ids):
        raise CalibrationError(
            f"loss_mask_field: {len(mask)} numbers, but the text has {len(ids)} tokens (special tokens included); "
            "expected one number per token, before truncation"
        )


def _mask_of_kept(mask: list[int], whole: list[int], short: list[int]) -> list[int]:
    """Cuts a mask to the tokens that truncation has kept: the first ones, and special ones at the end."""
    for num_last in range(min(len(short), MAX_LAST_TOKENS) + 1):
        num_first, last = len(short) - num_last, len(whole) - num_last
        if whole[:num_first] + whole[last:] == short:
            return mask[:num_first] + mask[last:]
    raise CalibrationError(
        "loss_mask_field: the tokenizer truncates this text to other tokens than its first ones, so the mask "
        "cannot follow; raise 'max_length' or shorten the text"
    )


def _with_attention_mask(tokens: Tokens, mask: Mask, prefix: str, reader: TextReader) -> tuple[Tokens, Mask]:
    """Adds the attention mask; where the forward takes none, the loss mask keeps the padding out."""
    ones = [1] * len(tokens[f"{prefix}input_ids"])
    name = f"{prefix}attention_mask"
    if name in reader.signature.forward_arguments:
        return {**tokens, name: ones}, mask
    return tokens, ones if mask is None else mask
