"""What a plan knows of calibration data: all of it where it is small, and about the same where it is large."""

from __future__ import annotations

from math import prod

import pytest
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil

from largemerge.calibration import load_calibration, survey
from largemerge.calibration.survey import held_bytes, is_made_up, survey_calibration, without_contents
from largemerge.errors import CalibrationError

ROWS = [{"text": " ".join(["cat"] * (1 + number % 12))} for number in range(60)]


def shapes_of(calibration):
    return [{name: tuple(x.shape) for name, x in batch.inputs.items()} for batch in calibration.batches]


@pytest.fixture(params=["jsonl", "txt", "csv", "parquet", "folder"])
def data(request, tmp_path, write_jsonl):
    """The same rows in every kind of table."""
    import pandas

    path = tmp_path / f"texts.{request.param}"
    if request.param == "txt":
        path.write_text("\n\n".join(row["text"] for row in ROWS))
    elif request.param == "csv":
        pandas.DataFrame(ROWS).to_csv(path, index=False)
    elif request.param == "parquet":
        pandas.DataFrame(ROWS).to_parquet(path)
    elif request.param == "folder":
        path.mkdir()
        (path / "rows.jsonl").write_bytes(write_jsonl(ROWS).read_bytes())
    else:
        path = write_jsonl(ROWS)
    return path


def test_small_data_is_read_as_the_merge_reads_it(data, make_config, checkpoint, text_signature):
    arguments = make_config(data, num_samples=256), "math", checkpoint, text_signature
    found, expected = survey_calibration(*arguments), load_calibration(*arguments)
    assert found.fingerprint == expected.fingerprint and found.num_samples == 60 and not found.estimated


def test_of_large_files_the_first_rows_are_read(data, make_config, checkpoint, text_signature, monkeypatch):
    monkeypatch.setattr(survey, "MAX_BYTES", 10)
    monkeypatch.setattr(survey, "_FIRST_ROWS", 24)
    config = make_config(data, num_samples=50, batch_size=5)
    found = survey_calibration(config, "math", checkpoint, text_signature)
    expected = load_calibration(config, "math", checkpoint, text_signature)
    assert found.num_samples == expected.num_samples == 50 and is_made_up(found)
    assert "50 samples, taken to be as long as the first 24 rows" in found.estimated
    elements = [sum(prod(batch["input_ids"]) for batch in shapes_of(one)) for one in (found, expected)]
    assert elements[0] == pytest.approx(elements[1], rel=0.15)
    assert held_bytes(found) < 1000


def test_many_samples_are_as_long_as_some(make_config, checkpoint, text_signature, write_jsonl, monkeypatch):
    monkeypatch.setattr(survey, "MAX_SAMPLES", 24)
    config = make_config(write_jsonl(ROWS), num_samples=100, batch_size=5)
    found = survey_calibration(config, "math", checkpoint, text_signature)
    assert found.num_samples == 60 and is_made_up(found)
    assert shapes_of(found)[0] == {"input_ids": (5, 12), "attention_mask": (5, 12)}
    assert shapes_of(found)[-1]["input_ids"][1] <= 2


@pytest.mark.parametrize("large", [False, True])
def test_a_field_that_is_not_there(data, make_config, checkpoint, text_signature, monkeypatch, large):
    if large:
        monkeypatch.setattr(survey, "MAX_BYTES", 10)
    with pytest.raises(CalibrationError, match=r"text_field: no column 'txet'; the columns are .*did you mean 'text'"):
        survey_calibration(make_config(data, text_field="txet"), "math", checkpoint, text_signature)


def test_bad_first_rows_of_a_large_file_are_told_and_no_error(
    make_config, checkpoint, text_signature, write_jsonl, monkeypatch
):
    monkeypatch.setattr(survey, "MAX_BYTES", 10)
    rows = [{"text": None}, *ROWS]
    found = survey_calibration(make_config(write_jsonl(rows), num_samples=20), "math", checkpoint, text_signature)
    assert found.num_samples == 20 and "its first rows are no good" in found.estimated and "row 0" in found.estimated
    assert shapes_of(found)[0]["input_ids"][1] == 16, "an upper bound"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", "null\n", "line 1: expected an object"),  # the library's reader ends the process there
        ("a.jsonl", '{"text": ' + "[" * 5000 + "]" * 5000 + "}\n", "line 1: nested too deeply"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1: the key 'text' stands twice"),
        ("a.csv", "x,text\n1,a,b\n2,c,d\n", "line 2 has 3 cells, expected 2"),
        ("folder/a.csv", "x,text\n1,a\n2\n", "a.csv: line 3 has 1 cell, expected 2"),
    ],
)
def test_first_rows_of_large_files_are_checked(
    make_config, checkpoint, text_signature, tmp_path, monkeypatch, name, content, told
):
    monkeypatch.setattr(survey, "MAX_BYTES", 1)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    config = make_config(path if path.parent == tmp_path else path.parent)
    with pytest.raises(CalibrationError, match=told):
        survey.survey_calibration(config, "math", checkpoint, text_signature)


def test_datasets_of_the_hub_are_not_looked_at(make_config, checkpoint, text_signature):
    found = survey_calibration(make_config("owner/texts"), "math", checkpoint, text_signature)
    assert found.num_samples == 4 and shapes_of(found)[0] == {"input_ids": (2, 16), "attention_mask": (2, 16)}
    assert "owner/texts: taken to have 4 samples of full length" in found.estimated


def test_images_are_counted(make_config, tmp_path, vision_signature, monkeypatch):
    monkeypatch.setattr(survey, "MAX_IMAGES", 3)
    CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}).save_pretrained(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(7):
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / f"{number}.png")
    found = survey_calibration(
        make_config(tmp_path / "images", num_samples=256, batch_size=4), "cars", tmp_path, vision_signature
    )
    assert shapes_of(found) == [{"pixel_values": (4, 3, 12, 12)}, {"pixel_values": (3, 3, 12, 12)}]
    assert "7 samples, taken to be as long as 3 that were read" in found.estimated


def test_large_tensors_are_known_from_their_header(make_config, tmp_path, text_signature, monkeypatch):
    import torch

    monkeypatch.setattr(survey, "MAX_BYTES", 10)
    save_file({"input_ids": torch.ones(5, 7, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    found = survey_calibration(make_config(tmp_path / "ids.safetensors"), "math", tmp_path, text_signature)
    assert shapes_of(found) == [{"input_ids": (2, 7)}, {"input_ids": (2, 7)}] and not found.estimated


def test_without_contents_pixels_take_no_memory(make_config, tmp_path, text_signature):
    import torch

    save_file({"inputs_embeds": torch.ones(4, 7, 8)}, tmp_path / "x.safetensors")
    signature = type(text_signature)(frozenset({"inputs_embeds"}), False, None, None)
    found = survey_calibration(make_config(tmp_path / "x.safetensors"), "math", tmp_path, signature)
    emptied = without_contents(found)
    assert shapes_of(emptied) == shapes_of(found) and held_bytes(emptied) <= 8 < held_bytes(found)
