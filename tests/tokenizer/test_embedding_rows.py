"""Embeddings of tokens that a model lacks: settings of single tokens, padding, holes; and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import weights_in
from tokenized import CODE, EMBEDDINGS, ENGLISH, linear, loads_and_speaks, rows_by_token, train, write_model
from transformers import AutoTokenizer, LlamaForCausalLM

import largemerge
from largemerge import LargemergeError
from largemerge.cli import main

NAME = EMBEDDINGS[0]


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, int]]:
    """Saves `a` with `<x>`, `b` and `c` with `<y>`; all have the rest in common."""
    tokenizer = train("BPE", ENGLISH)
    added = {"a": ["<x>"], "b": ["<y>"], "c": ["<y>"]}
    return {name: write_model(tmp_path / name, seed, tokenizer, added[name]) for seed, name in enumerate(added)}


def merged(folder: Path, **tokenizer: Any) -> tuple[dict[str, int], torch.Tensor, Any]:
    config = linear(folder, ["a", "b", "c"], [0.5, 0.25, 0.25], tokenizer=tokenizer)
    report = largemerge.merge(config, folder / "out")
    return AutoTokenizer.from_pretrained(folder / "out").get_vocab(), weights_in(folder / "out")[NAME], report


def test_every_way_to_name_a_source(tmp_path: Path, models: dict[str, dict[str, int]]) -> None:
    a, b, c = (str(tmp_path / name) for name in "abc")
    tokens = {
        "<x>": {"source": {"kind": "zero"}},
        "<y>": {"source": b},
        "<s>": {"source": {"kind": "model_token", "model": c, "token": "</s>"}, "force": True},
        "</s>": {"source": {"kind": "model_token", "model": a, "token": "<s>"}},
        "<new>": {"source": {"kind": "model_token", "model": a, "token_id": 7}},
        "<nothing>": {"source": {"kind": "zero"}, "force": True},
    }
    ids, weight, report = merged(tmp_path, source="union", tokens=tokens)
    rows = {name: rows_by_token(tmp_path / name, models[name]) for name in "abc"}
    seventh = weights_in(tmp_path / "a")[NAME][7]
    expected = {
        "<x>": 0.5 * rows["a"]["<x>"],
        "<y>": 0.75 * rows["b"]["<y>"] + 0.25 * rows["c"]["<y>"],
        "<s>": rows["c"]["</s>"],
        "</s>": 0.5 * rows["a"]["</s>"] + 0.25 * (rows["b"]["</s>"] + rows["c"]["</s>"]),
        "<new>": seventh,
        "<nothing>": torch.zeros_like(seventh),
    }
    for token, row in expected.items():
        assert torch.allclose(weight[ids[token]], row, atol=1e-7), token
    loads_and_speaks(tmp_path / "out", "the end")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("the<new>end")[1] == "<new>"
    (rules,) = report.to_json()["plan"]["vocabulary"]["rules"]
    assert rules["counts"]["as `tokens` says"] == 5, "</s> is in all models: there is nothing to be done"
    assert set(rules["tokens"]["as `tokens` says"]) == set(tokens) - {"</s>"}
    assert any("</s>" in note and "force: true" in note for note in report.plan.notes)


def test_default_rules_are_reported(tmp_path: Path, models: dict[str, dict[str, int]]) -> None:
    _, _, report = merged(tmp_path, tokens={})
    (rules,) = report.to_json()["plan"]["vocabulary"]["rules"]
    assert rules["counts"] == {
        "in all models": 300,
        f"from {tmp_path / 'a'}, the only one that has it": 1,
        "average of the models that have it": 1,
    }
    assert rules["tokens"] == {"average of the models that have it": ["<y>"]}
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["plan"]["vocabulary"]["rows"] == 302


def test_padding_is_the_mean(tmp_path: Path, models: dict[str, dict[str, int]]) -> None:
    ids, weight, report = merged(tmp_path, pad_to_multiple_of=64)
    assert len(weight) == 320 and len(ids) == 302
    assert torch.allclose(weight[302:], weight[:302].double().mean(dim=0).float().expand(18, -1), atol=1e-7)
    (rules,) = report.to_json()["plan"]["vocabulary"]["rules"]
    assert rules["counts"]["mean of all rows: no token"] == 18
    loads_and_speaks(tmp_path / "out", "the end")


def test_tokens_beyond_the_embeddings_have_none(tmp_path: Path) -> None:
    tokenizer = train("BPE", ENGLISH)
    first = write_model(tmp_path / "a", 0, tokenizer, ["<x>", "<lost>"], num_rows=301)
    second = write_model(tmp_path / "b", 1, tokenizer, ["<x>"])
    report = largemerge.merge(
        linear(tmp_path, ["a", "b"], [0.5, 0.5], base_model=str(tmp_path / "a"), tokenizer_source="base"),
        tmp_path / "out",
    )
    assert first["<lost>"] == 301 and "<lost>" not in second
    (rules,) = report.to_json()["plan"]["vocabulary"]["rules"]
    assert rules["tokens"] == {"zeros: in no model": ["<lost>"]}
    weight = weights_in(tmp_path / "out")[NAME]
    assert len(weight) == 302 and not weight[301].any()
    loads_and_speaks(tmp_path / "out", "the end<lost>")


def test_a_model_without_a_tokenizer_is_noted(tmp_path: Path) -> None:
    ids = write_model(tmp_path / "a", 0, train("BPE", ENGLISH), ["<x>"])
    write_model(tmp_path / "b", 1, None, num_rows=301)
    report = largemerge.merge(linear(tmp_path, ["a", "b"], [0.5, 0.5], tokenizer_source="union"), tmp_path / "out")
    assert any("has no tokenizer; its tokens are taken to be those of" in note for note in report.plan.notes)
    a, b = (rows_by_token(tmp_path / name, ids) for name in "ab")
    assert torch.allclose(weights_in(tmp_path / "out")[NAME][ids["<x>"]], (a["<x>"] + b["<x>"]) / 2)


def test_layers_from_other_models(tmp_path: Path, models: dict[str, dict[str, int]]) -> None:
    sources = [
        {"sources": [{"model": str(tmp_path / "a"), "layer_range": [0, 1]}]},
        {"sources": [{"model": str(tmp_path / "b"), "layer_range": [1, 2]}]},
    ]
    config = {"merge_method": "passthrough", "slices": sources, "tokenizer_source": "union"}
    largemerge.merge(config, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    out = weights_in(tmp_path / "out")
    first, last = (
        rows_by_token(tmp_path / "a", models["a"]),
        rows_by_token(tmp_path / "b", models["b"], "lm_head.weight"),
    )
    assert torch.equal(out[NAME][ids["<x>"]], first["<x>"]) and not out[NAME][ids["<y>"]].any()
    assert torch.equal(out["lm_head.weight"][ids["<y>"]], last["<y>"]) and not out["lm_head.weight"][ids["<x>"]].any()
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer_source": "union", "tokenizer": {"source": "union"}}, "one of 'tokenizer' and 'tokenizer_source'"),
    ({"tokenizer_source": "base"}, "tokenizer_source: 'base' needs a 'base_model'"),
    ({"tokenizer": {"source": "base"}}, "tokenizer.source: 'base' needs a 'base_model'"),
    ({"tokenizer": {"sauce": "base"}}, "tokenizer.sauce: unknown key"),
    ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: "),
    ({"tokenizer": {"tokens": {"<s>": {"force": True}}}}, "tokenizer.tokens.<s>: 'force' needs a 'source'"),
    ({"tokenizer": {"tokens": {"<q>": {"source": "./elsewhere"}}}}, "tokens.<q>.source: ./elsewhere is not among"),
    ({"tokenizer": {"tokens": {"<x>": {"source": "B"}}}}, "tokens.<x>.source: B has no token '<x>' with an embedding"),
    (
        {"tokenizer": {"tokens": {"<q>": {"source": {"kind": "model_token", "model": "B", "token_id": 999}}}}},
        "B has no token 999 with an embedding",
    ),
    (
        {"tokenizer": {"tokens": {"<q>": {"source": {"kind": "model_token", "model": "B"}}}}},
        "expected one of 'token' and 'token_id'",
    ),
    ({"tokenizer_source": "./nowhere"}, "tokenizer source: ./nowhere: ./nowhere does not exist"),
    ({"tokenizer_source": {"path": "x", "sha": 1}}, "tokenizer_source: expected a path, or path and revision"),
]


@pytest.mark.parametrize(("more", "text"), MISTAKES)
def test_mistakes(
    tmp_path: Path,
    models: dict[str, dict[str, int]],
    more: dict[str, Any],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    b = str(tmp_path / "b")
    more = json.loads(json.dumps(more).replace('"B"', json.dumps(b)))
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(linear(tmp_path, ["a", "b"], [0.5, 0.5], **more)))
    with pytest.raises(SystemExit) as done:
        main(["merge", str(tmp_path / "merge.yml"), str(tmp_path / "out")])
    assert done.value.code == 2 and text.replace("B has", f"{b} has") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tokenizers_of_unlike_kinds_have_no_union(tmp_path: Path) -> None:
    write_model(tmp_path / "a", 0, train("BPE", ENGLISH))
    write_model(tmp_path / "b", 1, train("WordPiece", CODE))
    config = linear(tmp_path, ["a", "b"], [0.5, 0.5], tokenizer_source="union")
    with pytest.raises(LargemergeError, match=r"WordPiece, that of the base BPE, and .*have no union"):
        largemerge.merge(config, tmp_path / "out")


def test_all_mistakes_with_tokens_at_once(tmp_path: Path, models: dict[str, dict[str, int]]) -> None:
    tokens = {"<x>": {"source": str(tmp_path / "b")}, "<y>": {"source": str(tmp_path / "a")}}
    with pytest.raises(LargemergeError, match=r"2 problems(.|\n)*<x>(.|\n)*<y>"):
        merged(tmp_path, tokens=tokens)


def test_the_plan_shows_the_vocabulary(
    tmp_path: Path, models: dict[str, dict[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "merge.yml").write_text(
        yaml.safe_dump(linear(tmp_path, ["a", "b", "c"], [0.5, 0.25, 0.25], tokenizer_source="union"))
    )
    with pytest.raises(SystemExit) as done:
        main(["plan", str(tmp_path / "merge.yml")])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert done.value.code == 0 and "302 tokens, 302 rows (union)" in told
    assert "1 average of the models that have it ('<y>')" in told
