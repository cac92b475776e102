"""Data, templates, tokenizers and images that crash or stop libraries: an error that names them instead."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenized import CODE, ENGLISH, train, write_model

import largemerge
from largemerge import LargemergeError
from largemerge.calibration import images, tokenizer
from largemerge.calibration.json_rows import check_json_rows
from largemerge.checkpoint.side_files import auto_tokenizer
from largemerge.checkpoint.tokenizer_check import check_tokenizer_files, tokenizer_reason
from largemerge.errors import CalibrationError, CheckpointError
from largemerge.isolation import why_it_fails

DEEP = "[" * 100_000 + "]" * 100_000

ROWS: list[tuple[str, str, str | None]] = [
    ("a.jsonl", "null\n", "line 1: expected an object"),
    ("a.jsonl", '{"text": "a"}\n5\n', "line 2: expected an object"),
    ("a.jsonl", f'{{"text": {DEEP}}}\n', "line 1: nested too deeply"),
    ("a.jsonl", f'{{"text": {"[" * 150}{"]" * 150}}}', "nested more than 100 levels deep"),
    ("a.jsonl", '{"text": "a"}\n{"text": "b', "line 2: not valid JSON"),
    ("a.jsonl", '{"n": ' + "9" * 5000 + "}", "line 1: a number of thousands of digits; expected"),
    ("a.json", "null", "line 1: expected an object"),
    ("a.json", '[{"text": "a"}, null]', "entry 1 of the list: expected an object"),
    ("a.json", '[\n{"text": "a"}\n]', None),
    ("a.jsonl", '{\n"text": "a"}\n{"text":\n"b"}\n', None),
    ("a.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": null}\r\n', None),
]


@pytest.mark.parametrize(("name", "content", "told"), ROWS)
def test_rows_that_are_no_objects_are_told(tmp_path: Path, name: str, content: str, told: str | None) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    found = check_json_rows(tmp_path / name)
    assert (found is None) if told is None else (found is not None and told in found)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        write_model(folder / f"m{seed}", seed, train("BPE", ENGLISH + CODE, 280), num_rows=300)
    return folder


@pytest.fixture
def copied(models: Path, tmp_path: Path) -> Path:
    for seed in (0, 1):
        (tmp_path / f"m{seed}").mkdir()
        for path in (models / f"m{seed}").iterdir():
            (tmp_path / f"m{seed}" / path.name).write_bytes(path.read_bytes())
    return tmp_path


def config_of(folder: Path, method: str = "linear", **more: Any) -> dict[str, Any]:
    data = {"calibration": {"data": str(folder / "data.safetensors")}} if method == "regmean" else {}
    models = [{"model": str(folder / f"m{seed}"), "parameters": {"weight": 0.5}, **data} for seed in (0, 1)]
    return {"merge_method": method, "models": models, **more}


@pytest.mark.parametrize("number", [4_000_000_000, -1, 1.5, "x", None])
def test_tokens_numbered_beyond_reason_are_told(copied: Path, number: Any) -> None:
    path = copied / "m1" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["added_tokens"].append({"id": number, "content": "<new>", "special": True})
    path.write_text(json.dumps(document))
    with pytest.raises(LargemergeError, match=r"m1/tokenizer\.json: added_tokens\[3\]: '<new>': expected a"):
        largemerge.merge(config_of(copied, tokenizer_source="union"), copied / "out", quiet=True)
    assert not (copied / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model", 5, "model: expected keys and values, found 5"),
        ("padding", {"strategy": {"Fixed": 10**9}}, "padding.strategy.Fixed: expected a number from 0 to"),
        ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"}, "`tokenizers` panics"),
    ],
)
def test_tokenizers_that_would_panic_or_never_end_are_told(copied: Path, key: str, value: Any, told: str) -> None:
    path = copied / "m0" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=told):
        auto_tokenizer(copied / "m0")


@pytest.mark.parametrize(
    ("name", "content", "more", "told"),
    [
        ("tokenizer_config.json", "{", {"chat_template": "chatml"}, "tokenizer_config.json"),
        ("generation_config.json", "{", {"tokenizer_source": "union"}, "generation_config.json is not readable JSON"),
        ("generation_config.json", "[]", {}, "generation_config.json: expected keys and values, found []"),
        ("preprocessor_config.json", "{", {}, "preprocessor_config.json is not readable JSON"),
    ],
)
@pytest.mark.parametrize("method", ["linear", "regmean"])
def test_broken_side_files_are_told_before_the_work(
    copied: Path, method: str, name: str, content: str, more: dict[str, Any], told: str
) -> None:
    if method == "regmean":
        if more:
            return
        save_file({"input_ids": torch.randint(0, 200, (4, 6))}, copied / "data.safetensors")
    (copied / "m0" / name).write_text(content)
    with pytest.raises(LargemergeError, match=told.replace("[", "\\[")):
        largemerge.merge(config_of(copied, method, **more), copied / "out", quiet=True)
    assert not (copied / "out").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**11 }}",
        "{{ 10**(10**9) }}",
        "{{ '7' * 10**7 }}",
    ],
)
def test_templates_that_never_end_or_fill_the_memory_are_told(
    copied: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_TEMPLATE_SECONDS", 0.5)
    (copied / "m0" / "chat_template.jinja").write_text(template)
    loaded, start = auto_tokenizer(copied / "m0"), time.monotonic()
    with pytest.raises(CalibrationError, match="the chat template of the tokenizer cannot be used: "):
        tokenizer.check_templates(loaded, [[{"role": "user", "content": "a"}]])
    assert time.monotonic() - start < 10


def test_a_trial_tells_what_happened() -> None:
    assert why_it_fails(lambda: None) is None
    assert why_it_fails(lambda: time.sleep(60), 0.2) == "it takes more than 0.2 s"
    assert why_it_fails(lambda: torch._C._dispatch_dump(1)) is not None  # type: ignore[arg-type]
    import os

    assert why_it_fails(os.abort) == "its library crashes (SIGABRT)"


def test_images_of_other_formats_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(CalibrationError, match=r"the image a\.png cannot be opened: it is none of PNG, JPEG"):
        images._open_image("a.png", tmp_path, None)
    Image.new("RGB", (20, 20)).save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CalibrationError, match=r"the image b\.png has more than 100 pixels"):
        images._open_image("b.png", tmp_path, None)
    gif = io.BytesIO()
    Image.new("P", (4, 4)).save(gif, "GIF")
    assert images._open_image(gif.getvalue(), None, None).size == (4, 4)


def test_code_of_a_tokenizer_is_not_run_whatever_is_answered(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        folder = copied / f"m{seed}"
        (folder / "tok.py").write_text(
            f"from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
            f"Path({str(copied / 'ran')!r}).touch()\nclass Tok(PreTrainedTokenizerFast): pass\n"
        )
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"auto_map": {"AutoTokenizer": [None, "tok.Tok"]}, "tokenizer_class": "Tok"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    with pytest.raises(LargemergeError, match="contains custom code"):
        largemerge.merge(config_of(copied, tokenizer_source="union"), copied / "out", quiet=True)
    assert not (copied / "ran").exists()


LONG = "x" * 10_001


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"unk_token": LONG}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": LONG}}}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image": LONG}}),
        ("special_tokens_map.json", {"additional_special_tokens": ["a", {"content": LONG}]}),
        ("tokenizer.json", {"model": {"vocab": {LONG: 0}}}),
        ("tokenizer.json", {"model": {"vocab": [[LONG, 0.0]]}}),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": LONG}]}),
    ],
)
def test_a_token_of_endless_length_is_told(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="expected tokens of 10,000 characters at most, found"):
        check_tokenizer_files(tmp_path)
    (tmp_path / name).write_text(json.dumps(content).replace(LONG, LONG[1:]))
    check_tokenizer_files(tmp_path)


def test_what_the_library_does_not_know_is_told_with_its_file(copied: Path) -> None:
    path = copied / "m0" / "tokenizer.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "pre_tokenizer": {"type": "NoSuchOne"}}))
    with pytest.raises(Exception) as caught:
        auto_tokenizer(copied / "m0")
    reason = tokenizer_reason(caught.value)
    assert "tokenizer.json: its part of the kind PreTokenizer is not one that this version" in reason
