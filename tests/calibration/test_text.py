"""Texts become tokens: truncated, packed, masked, with a target."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from largemerge.calibration import ForwardSignature, load_calibration
from largemerge.calibration.text import _mask_of_kept
from largemerge.errors import CalibrationError

PAD, EOS = 3, 2
BERT = "<s> $A </s>"


@pytest.fixture
def load(make_config, checkpoint, text_signature):
    def run(data, signature=text_signature, folder=checkpoint, **settings):
        return load_calibration(make_config(data, **settings), "math", folder, signature)

    return run


@pytest.fixture
def complaint(load):
    def find(data, *arguments, **settings):
        with pytest.raises(CalibrationError) as caught:
            load(data, *arguments, **settings)
        return "\n".join(caught.value.problems)

    return find


def tokens(calibration):
    """The samples' ids without padding, in order."""
    return [
        ids[mask.bool()].tolist()
        for batch in calibration.batches
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    ]


def texts(*contents):
    return [{"text": content} for content in contents]


def test_batches_are_padded_to_their_own_longest(load, write_jsonl, ids):
    path = write_jsonl(texts("cat", "the cat sat on a mat", "hello world", "  ", "", "how are you"))

    calibration = load(path)

    first, second = calibration.batches
    assert first.inputs["input_ids"].tolist() == [ids("the cat sat on a mat"), ids("how are you") + [PAD] * 3]
    assert first.inputs["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert second.inputs["input_ids"].tolist() == [ids("hello world"), [*ids("cat"), PAD]]
    assert second.inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert set(first.inputs) == {"input_ids", "attention_mask"}
    assert first.loss_mask is None
    assert calibration.num_samples == 4


def test_long_texts_are_truncated(load, write_jsonl, ids):
    assert tokens(load(write_jsonl(texts("the cat sat on a mat")), max_length=3)) == [ids("the cat sat")]


def test_truncation_keeps_the_special_tokens(load, write_jsonl, ids, tmp_path, save_tokenizer):
    folder = save_tokenizer(tmp_path / "bert", frame=BERT, truncation_side="left", padding_side="left")
    path = write_jsonl(texts("the cat sat on a mat", "hello"))

    batch = load(path, folder=folder, max_length=4).batches[0]

    assert batch.inputs["input_ids"].tolist() == [ids("<s> the cat </s>"), [*ids("<s> hello </s>"), PAD]]


def test_the_tokenizers_own_limit_counts(load, write_jsonl, ids, tmp_path, save_tokenizer):
    folder = save_tokenizer(tmp_path / "short", model_max_length=2)
    assert tokens(load(write_jsonl(texts("the cat sat")), folder=folder)) == [ids("the cat")]


def test_no_room_beside_the_special_tokens(complaint, write_jsonl, tmp_path, save_tokenizer):
    folder = save_tokenizer(tmp_path / "bert", frame=BERT)
    problem = complaint(write_jsonl(texts("the cat")), folder=folder, max_length=2)
    assert "max_length: 2 leaves no room beside the 2 special tokens" in problem
    assert "expected at least 3" in problem


@pytest.mark.parametrize(
    ("tokenizer_options", "config_pad", "expected"),
    [
        ({}, 7, PAD),
        ({"pad_token": None}, 7, 7),
        ({"pad_token": None}, -1, EOS),
        ({"pad_token": None, "eos_token": None}, None, 0),
    ],
)
def test_pad_token(
    load, write_jsonl, tmp_path, save_tokenizer, text_signature, tokenizer_options, config_pad, expected
):
    folder = save_tokenizer(tmp_path / "pad", **tokenizer_options)
    calibration = load(
        write_jsonl(texts("the cat", "sat")), replace(text_signature, pad_token_id=config_pad), folder=folder
    )
    assert calibration.batches[0].inputs["input_ids"][1, 1] == expected


def test_token_types_only_where_both_sides_know_them(load, write_jsonl, tmp_path, save_tokenizer, text_signature):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    knows = save_tokenizer(tmp_path / "knows", frame=BERT.replace("$A", "$A:1"), model_input_names=names)
    path = write_jsonl(texts("the cat", "sat"))
    takes = replace(text_signature, forward_arguments=text_signature.forward_arguments | {"token_type_ids"})

    inputs = load(path, takes, folder=knows).batches[0].inputs

    assert inputs["token_type_ids"].tolist() == [[0, 1, 1, 0], [0, 1, 0, 0]]
    assert "token_type_ids" not in load(path, folder=knows).batches[0].inputs
    assert "token_type_ids" not in load(path, takes).batches[0].inputs


def test_model_without_attention_mask_has_its_padding_in_the_loss_mask(load, write_jsonl):
    signature = ForwardSignature(frozenset({"input_ids"}), False, None, None)
    batch = load(write_jsonl(texts("the cat", "sat")), signature).batches[0]
    assert set(batch.inputs) == {"input_ids"}
    assert batch.loss_mask is not None and batch.loss_mask.tolist() == [[True, True], [True, False]]


def test_samples_are_drawn_by_the_seed(load, write_jsonl):
    path = write_jsonl(texts(*(f"cat {' '.join(['sat'] * n)}" for n in range(20))))
    lengths = [[len(t) for t in tokens(load(path, num_samples=5, seed=seed, max_length=32))] for seed in (0, 0, 1)]

    assert lengths[0] == lengths[1] != lengths[2]
    assert len(set(lengths[0])) == 5 and lengths[0] == sorted(lengths[0], reverse=True)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    assert sorted(lengths[0]) == sorted(n + 1 for n in order[:5])


def test_blank_texts_are_replaced_by_others_in_drawing(load, write_jsonl):
    path = write_jsonl(texts(*(["", "cat"] * 10)))
    assert load(path, num_samples=8).num_samples == 8


def test_fingerprint_follows_data_tokenizer_and_settings(load, write_jsonl, tmp_path, save_tokenizer):
    path = write_jsonl(texts("the cat sat", "on a mat"))
    plain = load(path).fingerprint
    assert plain == load(path).fingerprint
    framed = save_tokenizer(tmp_path / "framed", frame=BERT)
    others = [
        load(path, folder=framed).fingerprint,
        load(path, max_length=2).fingerprint,
        load(path, batch_size=1).fingerprint,
        load(write_jsonl(texts("the cat sat", "on a cat"), "other.jsonl")).fingerprint,
    ]
    assert len({plain, *others}) == 5


# Loss masks


def test_loss_mask_field(load, write_jsonl):
    path = write_jsonl(
        [{"text": "the cat sat", "mask": [0, 1, 1]}, {"text": "hello", "mask": [1]}, {"text": "a", "mask": [0]}]
    )
    calibration = load(path, loss_mask_field="mask")
    first, second = (batch.loss_mask for batch in calibration.batches)
    assert first is not None and first.tolist() == [[False, True, True], [True, False, False]]
    assert second is not None and second.tolist() == [[False]]


def test_loss_mask_is_truncated_along(load, write_jsonl, tmp_path, save_tokenizer):
    path = write_jsonl([{"text": "the cat sat on a mat", "mask": [0, 1, 0, 1, 1, 1, 1, 0]}])
    folder = save_tokenizer(tmp_path / "bert", frame=BERT)
    mask = load(path, folder=folder, loss_mask_field="mask", max_length=4).batches[0].loss_mask
    assert mask is not None and mask.tolist() == [[False, True, False, False]]  # <s> the cat </s>


def test_mask_of_kept_tokens():
    assert _mask_of_kept([0, 1, 0, 1], [5, 6, 7, 8], [5, 6]) == [0, 1]
    assert _mask_of_kept([0, 1, 0, 1], [5, 6, 7, 8], [5, 8]) == [0, 1]
    assert _mask_of_kept([1, 1, 0, 0], [5, 6, 7, 8], [7, 8]) == [0, 0]
    with pytest.raises(CalibrationError, match="other tokens than its first ones"):
        _mask_of_kept([0, 1, 0], [5, 6, 7], [6])


def test_loss_mask_of_another_length(complaint, write_jsonl):
    path = write_jsonl([{"text": "the cat sat", "mask": [0, 1]}, {"text": "hello", "mask": [1, 1]}])
    problem = complaint(path, loss_mask_field="mask", max_length=2)
    assert "row 0: loss_mask_field: 2 numbers, but the text has 3 tokens" in problem
    assert "row 1: loss_mask_field: 2 numbers, but the text has 1 tokens" in problem


def test_loss_mask_that_is_none(complaint, write_jsonl):
    path = write_jsonl([{"text": "the cat", "mask": "01"}])
    assert "'mask': expected a list of 0 and 1, one per token, found '01' (str)" in complaint(
        path, loss_mask_field="mask"
    )


def test_loss_mask_that_keeps_everything_out(complaint, write_jsonl):
    path = write_jsonl([{"text": "the cat sat", "mask": [0, 0, 1]}])
    assert "keeps every token of every sample out" in complaint(path, loss_mask_field="mask", max_length=2)


# Packing


def test_packing_fills_samples(load, write_jsonl, ids):
    path = write_jsonl(texts("the cat sat", "", "the cat sat", "the cat sat", "the cat sat"))

    calibration = load(path, pack=True, max_length=5)

    stream = ids("the cat sat </s> the cat sat </s> the cat sat </s> the cat sat")
    assert tokens(calibration) == [stream[:5], stream[5:10], stream[10:15]]
    assert calibration.batches[0].loss_mask is None


def test_packing_stops_at_num_samples(load, write_jsonl):
    path = write_jsonl(texts(*["the cat sat"] * 200))
    assert [len(t) for t in tokens(load(path, pack=True, max_length=5, num_samples=3))] == [5, 5, 5]


def test_packing_keeps_the_only_sample_though_partial(load, write_jsonl, ids):
    path = write_jsonl(texts("a mat", "a mat"))
    assert tokens(load(path, pack=True)) == [ids("a mat </s> a mat")]


def test_packing_draws_texts_by_the_seed(load, write_jsonl):
    path = write_jsonl(texts(*["the", "cat", "sat", "on", "a", "mat", "hello", "world"]))
    packed = [tokens(load(path, pack=True, seed=seed)) for seed in (0, 0, 1)]
    assert packed[0] == packed[1] != packed[2]
    assert sorted(packed[0][0]) == sorted(packed[2][0])


def test_packing_does_not_double_the_end_of_text(load, write_jsonl, ids, tmp_path, save_tokenizer):
    folder = save_tokenizer(tmp_path / "framed", frame="$A </s>")
    path = write_jsonl(texts("a mat", "a mat"))
    assert tokens(load(path, pack=True, folder=folder)) == [ids("a mat </s> a mat </s>")]


def test_packing_needs_an_end_of_text(complaint, write_jsonl, tmp_path, save_tokenizer):
    folder = save_tokenizer(tmp_path / "endless", eos_token=None)
    problem = complaint(write_jsonl(texts("cat")), pack=True, folder=folder)
    assert "pack: the tokenizer" in problem and "has no end-of-text token" in problem


# Encoder-decoder


def test_targets_are_shifted_right(load, write_jsonl, ids, seq2seq_signature):
    path = write_jsonl([{"text": "the cat", "target": "hello world you"}, {"text": "on a mat", "target": "fine"}])

    batch = load(path, seq2seq_signature, target_field="target").batches[0]

    assert batch.inputs["input_ids"].tolist() == [ids("on a mat"), [*ids("the cat"), PAD]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[*ids("<s>"), PAD, PAD], ids("<s> hello world")]
    assert batch.inputs["decoder_attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert set(batch.inputs) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    assert batch.loss_mask is None


def test_loss_mask_is_over_the_decoders_tokens(load, write_jsonl, seq2seq_signature):
    path = write_jsonl([{"text": "the cat", "target": "hello world you", "mask": [0, 1, 1]}])
    batch = load(path, seq2seq_signature, target_field="target", loss_mask_field="mask", max_length=2).batches[0]
    assert batch.inputs["decoder_input_ids"].shape == (1, 2)
    assert batch.loss_mask is not None and batch.loss_mask.tolist() == [[False, True]]


def test_loss_mask_of_the_encoders_length(complaint, write_jsonl, seq2seq_signature):
    path = write_jsonl([{"text": "the cat", "target": "hello world you", "mask": [0, 1]}])
    problem = complaint(path, seq2seq_signature, target_field="target", loss_mask_field="mask")
    assert "row 0: loss_mask_field: 2 numbers, but the text has 3 tokens" in problem


def test_blank_targets_are_passed_over(load, write_jsonl, seq2seq_signature, ids):
    path = write_jsonl([{"text": "the cat", "target": " "}, {"text": "a mat", "target": "fine"}])
    assert tokens(load(path, seq2seq_signature, target_field="target")) == [ids("a mat")]


# Mistakes


def test_no_tokenizer(complaint, write_jsonl, tmp_path):
    path = write_jsonl(texts("the cat"))
    folder = tmp_path / "bare"
    folder.mkdir()
    assert f"no tokenizer in {folder}; put the files of the model's tokenizer there" in complaint(path, folder=folder)
    # Transformers builds an empty tokenizer for this one.
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert f"no tokenizer in {folder}" in complaint(path, folder=folder)


def test_tokenizer_of_bytes_needs_no_vocabulary(load, write_jsonl, tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    assert tokens(load(write_jsonl(texts("ab")), folder=tmp_path / "bytes")) == [[100, 101, 1]]


def test_broken_tokenizer(complaint, write_jsonl, checkpoint):
    (checkpoint / "tokenizer.json").write_text("{")
    problem = complaint(write_jsonl(texts("the cat")))
    assert f"the tokenizer in {checkpoint} cannot be loaded" in problem


def test_fields_that_are_no_text(complaint, write_jsonl):
    problem = complaint(write_jsonl([{"text": "the cat"}, {"text": 5}, {"text": None}, {"other": 1}]))
    assert "candidate 'math'" in problem
    if "expected values of one type" in problem:  # older versions of `datasets` read no such column
        assert "row 1: 'text': expected values of one type, found a number after a string" in problem
        return
    assert "row 1: 'text': expected text, found 5 (int)" in problem
    assert "row 2: 'text': expected text, found nothing (null, or the column is missing in this row)" in problem
    assert "row 3: " in problem


def test_problems_are_capped(complaint, write_jsonl):
    problem = complaint(write_jsonl([{"text": number} for number in range(100)]), num_samples=100)
    assert problem.count("expected text") == 5


def test_nothing_but_blank_texts(complaint, write_jsonl):
    assert "all texts are empty; expected at least one with words" in complaint(write_jsonl(texts("", "  ")))
