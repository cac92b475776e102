"""A plan says what the merge finds: samples, tokens, memory, and whether a limit or a disk has room for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from cases import Case, MakeCase
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import largemerge
from largemerge import LargemergeError
from largemerge.checkpoint import room

MIB = 2**20


@pytest.fixture
def texts(make_case: MakeCase) -> Case:
    """Two llamas with a tokenizer and 61 short texts each."""
    case = make_case()
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "models": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    for number, entry in enumerate(case.config["models"]):
        tokenizer.save_pretrained(entry["model"])
        rows = [{"text": " ".join(["the models"] * (1 + row % (2 + number)))} for row in range(61)]
        path = case.folder / f"texts{number}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        entry["calibration"] = {"data": str(path)}
    return case


def test_plan_and_merge_agree(texts: Case) -> None:
    plan = largemerge.plan(texts.config, probe=False)
    report = largemerge.merge(texts.config, texts.folder / "out")
    seen = {name: (entry["num_samples"], entry["tokens"]) for name, entry in report.calibration.items()}
    assert seen == {name: (plan.num_samples[name], plan.num_tokens[name]) for name in plan.config.names}
    assert set(plan.num_samples.values()) == {61}
    beside = [{**plan.footprint.parts, "process": 0}, {**report.plan.footprint.parts, "process": 0}]
    assert beside[0] == beside[1], "the same memory, but for the process itself, which is that of all tests here"
    assert plan.placement == report.plan.placement and plan.notes == report.plan.notes


def test_fewer_samples_than_asked_for(texts: Case) -> None:
    plan = largemerge.plan(texts.config, probe=False)
    notes = [note for note in plan.notes if "61 samples" in note]
    assert len(notes) == 2 and "texts0.jsonl gives 61 samples, fewer than the default of num_samples: 256" in notes[0]
    assert not any(note.startswith("warning: ") for note in notes), "nobody has asked for 256"
    texts.config["calibration"]["num_samples"] = 100
    plan = largemerge.plan(texts.config, probe=False)
    warned = [note for note in plan.notes if note.startswith("warning: model1: its data")]
    assert warned and warned[0].endswith("gives 61 samples, fewer than num_samples: 100")
    assert any("61 samples" in problem for problem in largemerge.plan(texts.config, probe=False, strict=True).problems)
    texts.config["calibration"]["num_samples"] = 61
    assert not [note for note in largemerge.plan(texts.config, probe=False).notes if "61 samples" in note]


@pytest.mark.parametrize(("samples", "told"), [(1, True), (24, False)])
def test_fewer_tokens_than_a_linear_has_inputs_are_told(make_case: MakeCase, samples: int, told: bool) -> None:
    case = make_case(num_samples=samples, padding="none")
    plan = largemerge.plan(case.config, probe=False)
    widest = max(group.num_inputs for block in plan.blocks for group in block.groups)
    assert (sum(plan.num_tokens.values()) < widest) == told
    said = f"{sum(plan.num_tokens.values())} tokens of calibration data in all, fewer than the {widest} inputs"
    assert any(note.startswith(said) for note in plan.notes) == told


def test_a_wrong_field_is_refused_by_the_plan(texts: Case) -> None:
    texts.config["models"][1]["calibration"]["text_field"] = "txt"
    with pytest.raises(LargemergeError, match=r"model1.*text_field: no column 'txt'; the columns are") as planned:
        largemerge.plan(texts.config, probe=False)
    with pytest.raises(LargemergeError) as merged:
        largemerge.merge(texts.config, texts.folder / "out")
    assert str(planned.value) == str(merged.value)


def test_tokens_beyond_the_vocabulary_are_a_problem_of_the_plan(make_case: MakeCase) -> None:
    case = make_case()
    case.inputs[1]["input_ids"][3, 2] = 64
    from safetensors.torch import save_file

    save_file(case.inputs[1], case.folder / "data1.safetensors")
    (problem,) = largemerge.plan(case.config, probe=False).problems
    assert "model1" in problem and "expected 0 to 63" in problem


def test_too_little_room_on_the_disk(texts: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda _: 4096)
    out = texts.folder / "out"
    with pytest.raises(LargemergeError, match=rf"for the output in {out}; 4\.0 KiB are free; make room for"):
        largemerge.merge(texts.config, out)
    assert not out.exists()


def test_too_little_room_without_data(make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"model": entry["model"], "parameters": {"weight": 1.0}} for entry in make_case().config["models"]]
    config = {"merge_method": "linear", "models": entries}
    whole = largemerge.plan(config, probe=False).bytes_written
    free = whole // 2
    monkeypatch.setattr(room, "free_bytes", lambda _: free)
    with pytest.raises(LargemergeError, match=rf"for the output in {tmp_path / 'out'};"):
        largemerge.merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    free = 2 * whole + 10**6
    largemerge.merge(config, tmp_path / "out")
