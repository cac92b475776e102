"""The ways in: what is read, and what the outline says beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from largemerge.calibration import load_calibration, outline_calibration, survey
from largemerge.calibration.config import CalibrationConfig
from largemerge.errors import CalibrationError

SENTENCES = ["the cat sat on a mat", "hello world", "how are you", "fine thanks", "a cat"]


@pytest.fixture
def files(tmp_path, write_jsonl):
    """The same texts in several kinds of files."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"text": text} for text in SENTENCES]
    (tmp_path / "data.txt").write_text("\n\n".join(SENTENCES))
    (tmp_path / "data.csv").write_text("\n".join(["text", *SENTENCES]))
    (folder / "data.jsonl").write_bytes(write_jsonl(rows).read_bytes())
    return [tmp_path / "data.jsonl", tmp_path / "data.txt", tmp_path / "data.csv", folder]


def test_the_kind_of_file_makes_no_difference(files, make_config, checkpoint, text_signature):
    loaded = [load_calibration(make_config(path, num_samples=3), "math", checkpoint, text_signature) for path in files]
    assert len({calibration.fingerprint for calibration in loaded}) == 1
    assert loaded[0].num_samples == 3


@pytest.mark.parametrize("settings", [{}, {"num_samples": 2}, {"max_length": 3}, {"pack": True, "max_length": 4}])
def test_outline_is_an_upper_bound(files, make_config, checkpoint, text_signature, settings):
    config = make_config(files[0], **settings)
    outline = outline_calibration(config, "math", checkpoint, text_signature)
    calibration = load_calibration(config, "math", checkpoint, text_signature)

    assert calibration.num_samples <= outline.num_samples
    for batch in calibration.batches:
        assert batch.num_samples <= outline.batch_size
        assert set(batch.inputs) == set(outline.inputs)
        for name, tensor in batch.inputs.items():
            (length,), dtype = outline.inputs[name]
            assert tensor.shape[1] <= length and tensor.dtype == dtype


def test_outline_reads_no_samples(make_config, checkpoint, text_signature, write_jsonl):
    config = make_config(write_jsonl(["this is no JSON"]))
    outline = outline_calibration(config, "math", checkpoint, text_signature)
    assert outline.num_samples == 4 and outline.batch_size == 2
    assert outline.inputs == {"input_ids": ((16,), torch.int64), "attention_mask": ((16,), torch.int64)}


def test_outline_knows_the_tokenizers_limit_and_arguments(make_config, tmp_path, save_tokenizer, text_signature):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    folder = save_tokenizer(tmp_path / "bert", model_max_length=5, model_input_names=names)
    signature = replace(text_signature, forward_arguments=text_signature.forward_arguments | {"token_type_ids"})
    outline = outline_calibration(make_config("owner/texts"), "math", folder, signature)
    assert set(outline.inputs) == set(names)
    assert outline.inputs["token_type_ids"] == ((5,), torch.int64)


def test_outline_of_an_encoder_decoder(make_config, checkpoint, seq2seq_signature, write_jsonl):
    path = write_jsonl([{"text": "the cat", "target": "fine"}])
    outline = outline_calibration(make_config(path, target_field="target"), "math", checkpoint, seq2seq_signature)
    names = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    assert outline.inputs == {name: ((16,), torch.int64) for name in names}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data": "missing.jsonl"}, "no such file or folder"),
        ({"data": "owner/name", "assistant_only": True}, "assistant_only: needs 'messages_field'"),
        ({"data": "owner/name", "max_length": 1}, "max_length: 1 leaves no room"),
        ({"data": "owner/name", "messages_field": "chat"}, "has no chat template"),
        ({"data": "owner/name", "pack": True}, "has no end-of-text token"),
    ],
)
def test_outline_finds_mistakes(make_config, tmp_path, save_tokenizer, text_signature, settings, expected):
    folder = save_tokenizer(tmp_path / "bare", frame="<s> $A", eos_token=None)
    with pytest.raises(CalibrationError, match=expected):
        outline_calibration(make_config(settings.pop("data"), **settings), "math", folder, text_signature)


def test_text_file_for_an_encoder_decoder(make_config, checkpoint, seq2seq_signature, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("the cat")
    for function in (load_calibration, outline_calibration):
        with pytest.raises(CalibrationError, match=r"add 'target_field'.*\(the columns are \['text'\]\)"):
            function(make_config(path), "math", checkpoint, seq2seq_signature)


def test_numbers_must_be_set(checkpoint, text_signature):
    with pytest.raises(AssertionError, match="with_defaults"):
        load_calibration(CalibrationConfig(data="data.jsonl"), "math", checkpoint, text_signature)


def test_a_template_joins_columns(make_config, checkpoint, text_signature, write_jsonl, ids):
    path = write_jsonl([{"ask": "how are you", "say": "fine"}, {"ask": "hello", "say": ""}, {"ask": " ", "say": ""}])
    config = make_config(path, text_template="{ask} <assistant> {say}")
    (batch,) = load_calibration(config, "math", checkpoint, text_signature).batches
    assert batch.inputs["input_ids"][0].tolist() == ids("how are you <assistant> fine")
    assert batch.inputs["input_ids"][1, :2].tolist() == ids("hello <assistant>")
    assert len(batch.inputs["input_ids"]) == 2  # a row whose columns are all blank is passed over


def test_a_template_wants_text(make_config, checkpoint, text_signature, write_jsonl):
    config = make_config(write_jsonl([{"ask": "hello", "say": 3}]), text_template="{ask} {say}")
    with pytest.raises(CalibrationError, match="row 0: 'say': expected text, found 3"):
        load_calibration(config, "math", checkpoint, text_signature)


def test_the_base_lends_its_tokenizer(files, make_config, tmp_path, checkpoint, text_signature):
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(CalibrationError, match="bare"):
        load_calibration(make_config(files[0]), "math", bare, text_signature)
    lent = load_calibration(make_config(files[0]), "math", bare, text_signature, base=checkpoint)
    assert lent.fingerprint == load_calibration(make_config(files[0]), "math", checkpoint, text_signature).fingerprint


def test_samples_whose_only_tokens_that_count_are_cut_off_are_noted(
    make_config, checkpoint, text_signature, write_jsonl
):
    rows = [{"text": "the cat sat", "mask": mask} for mask in ([1, 0, 0], [0, 0, 1], [0, 0, 0])]
    path = write_jsonl(rows)
    for max_length, count in ((2, 2), (3, 1)):
        config = make_config(path, loss_mask_field="mask", max_length=max_length)
        (note,) = load_calibration(config, "math", checkpoint, text_signature).notes
        assert (
            f"'math': {path}: {count} of 3 samples add nothing: the loss mask keeps every token of theirs out" in note
        )
        assert note.startswith("warning: ") and "Raise 'max_length'" in note


def test_notes_on_a_folder_come_with_the_data(
    make_config, tmp_path, save_image_processor, vision_signature, monkeypatch
):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    (folder / "labels.csv").write_text("a.png,cat")
    arguments = (make_config(folder), "cars", save_image_processor(tmp_path / "vision"), vision_signature)
    for most in (survey.MAX_BYTES, 0):  # as it is, and as a folder that is too large for a plan to read
        monkeypatch.setattr(survey, "MAX_BYTES", most)
        for read in (load_calibration, survey.survey_calibration):
            (note,) = read(*arguments).notes
            assert f"{folder}: 1 file beside the images not read: labels.csv. Of tables, a metadata.csv or" in note
