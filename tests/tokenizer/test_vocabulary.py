"""Models with tokenizers of their own: whole merges, from files to a model that speaks the output's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest
import tokenized
import torch
import yaml
from cases import weights_in
from tokenized import CODE, EMBEDDINGS, ENGLISH, linear, loads_and_speaks, rows_by_token, train, write_model
from transformers import AutoTokenizer

import largemerge
from largemerge import LargemergeError
from largemerge.data_free import engine, loader
from largemerge.data_free.methods import base


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_union_of_two_vocabularies(tmp_path: Path, kind: str, tied: bool) -> None:
    first = write_model(tmp_path / "a", 0, train(kind, ENGLISH), ["<a>"], special=["<|im|>"], tied=tied)
    second = write_model(tmp_path / "b", 1, train(kind, CODE, 320), ["<b>", "<a>"], more_rows=5, tied=tied)
    assert set(second) - set(first) - {"<b>"}, "the second has regular tokens of its own"
    largemerge.merge(linear(tmp_path, ["a", "b"], [0.25, 0.75], tokenizer_source="union"), tmp_path / "out")
    for name in EMBEDDINGS[: 1 if tied else 2]:
        rows = [rows_by_token(tmp_path / "a", first, name), rows_by_token(tmp_path / "b", second, name)]
        ids = tokenized.check_rows(tmp_path / "out", rows, None, lambda each: 0.25 * each[0] + 0.75 * each[1], name)
    assert set(ids) == set(first) | set(second)
    assert all(ids[token] == number for token, number in first.items()), "the first one's tokens stay where they are"
    loads_and_speaks(tmp_path / "out", "the models are merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {"<|im|>"} <= set(tokenizer.all_special_tokens)
    assert [ids["<b>"], ids["<a>"]] == tokenizer("<b><a>", add_special_tokens=False).input_ids


def test_tokens_of_another_come_out_of_its_texts(tmp_path: Path) -> None:
    first, second = train("BPE", ENGLISH), train("BPE", CODE, 330)
    write_model(tmp_path / "a", 0, first)
    write_model(tmp_path / "b", 1, second)
    largemerge.merge(linear(tmp_path, ["a", "b"], [0.5, 0.5], tokenizer_source="union"), tmp_path / "out")
    union = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ENGLISH:
        pieces_of = union.tokenize(text)
        assert "".join(pieces_of) == "".join(first.encode(text, add_special_tokens=False).tokens)
        assert len(pieces_of) <= len(first.encode(text, add_special_tokens=False).tokens)
    new = set(second.get_vocab()) - set(first.get_vocab())
    for text in CODE:
        tokens = union.tokenize(text)
        assert "".join(tokens) == "".join(second.encode(text, add_special_tokens=False).tokens)
        assert new & set(tokens) and len(tokens) < len(first.encode(text, add_special_tokens=False).tokens)
    assert set(union.get_added_vocab()) == {"<unk>", "<s>", "</s>"}, "no piece of a word is cut out of texts"


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "slerp", "dare_ties"])
def test_with_a_base_its_embeddings_stand_in(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train("BPE", ENGLISH)
    ids = {"base": write_model(tmp_path / "base", 0, tokenizer, ["<x>", "<only-base>"])}
    ids["a"] = write_model(tmp_path / "a", 1, tokenizer, ["<y>", "<x>"])
    ids["b"] = write_model(tmp_path / "b", 2, tokenizer, ["<y>"])
    names = ["a"] if method == "slerp" else ["a", "b"]
    config = linear(tmp_path, names, [0.5] * len(names), base_model=str(tmp_path / "base"), tokenizer_source="union")
    parameters = {"t": 0.3} if method == "slerp" else {"weight": 0.5, "density": 0.6, "lambda": 0.9}
    config |= {"merge_method": method, "parameters": parameters}
    for entry in config["models"]:
        entry.pop("parameters")
    largemerge.merge(config, tmp_path / "out")
    loads_and_speaks(tmp_path / "out", "the end")
    monkeypatch.setattr(loader, "KEPT_BYTES", 0)
    largemerge.merge(config, tmp_path / "read-twice")
    assert processes.lasting(tmp_path / "read-twice") == processes.lasting(tmp_path / "out")

    models = [*names, "base"]
    out_ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert set(out_ids) == set().union(*(ids[name] for name in models))
    for name in EMBEDDINGS:
        rows = [rows_by_token(tmp_path / model, ids[model], name) for model in models]
        dense = [torch.zeros(len(out_ids), rows[0]["<s>"].shape[0]) for _ in models]
        for token, number in out_ids.items():
            for tensor, row in zip(dense, tokenized.expected_row(token, rows, len(models) - 1), strict=True):
                tensor[number] = row
        from largemerge.data_free.methods.table import METHODS, merge_tensors

        row = METHODS[method]
        per_model = {key: [value] * len(names) for key, value in parameters.items() if key in row.per_model}
        options = {key: value for key, value in parameters.items() if key in row.shared}
        expected = merge_tensors(method, dense[:-1], dense[-1], name=name, per_model=per_model, **options)
        assert torch.allclose(weights_in(tmp_path / "out")[name], expected, atol=1e-7), name


def test_the_base_s_tokenizer_or_another_s(tmp_path: Path) -> None:
    tokenizer = train("BPE", ENGLISH)
    first = write_model(tmp_path / "a", 0, tokenizer, ["<a>"], more_rows=3)
    second = write_model(tmp_path / "b", 1, tokenizer, ["<b>", "<a>"])
    config = linear(tmp_path, ["a", "b"], [0.5, 0.5])
    for source, ids in (("base", first), (str(tmp_path / "b"), second)):
        out = tmp_path / f"out-{Path(source).name}"
        largemerge.merge(config | {"tokenizer_source": source, "base_model": str(tmp_path / "a")}, out)
        rows = [rows_by_token(tmp_path / "a", first), rows_by_token(tmp_path / "b", second)]
        found = tokenized.check_rows(out, rows, 0, lambda each: sum(each) / 2, EMBEDDINGS[0])
        assert found == ids and len(weights_in(out)[EMBEDDINGS[0]]) == len(ids)
        loads_and_speaks(out, "the end")
        name = Path(source).name if source != "base" else "a"
        assert (out / "tokenizer.json").read_bytes() == (tmp_path / name / "tokenizer.json").read_bytes()


def test_ids_in_the_config_follow_their_tokens(tmp_path: Path) -> None:
    tokenizer = train("BPE", ENGLISH)
    ids = write_model(tmp_path / "a", 0, tokenizer, ["<a>"], pad="<pad>")
    write_model(tmp_path / "b", 1, train("BPE", ENGLISH, 280), ["<b>", "<a>"], pad="<pad>")
    config = linear(tmp_path, ["a", "b"], [0.5, 0.5], tokenizer_source=str(tmp_path / "b"))
    largemerge.merge(config, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.pad_token_id != ids["<pad>"]
    assert told["pad_token_id"] == made.pad_token_id and told["eos_token_id"] == made.eos_token_id
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["pad_token_id"] == made.pad_token_id


def test_unlike_sizes_without_a_setting_are_refused(tmp_path: Path) -> None:
    tokenizer = train("BPE", ENGLISH)
    write_model(tmp_path / "a", 0, tokenizer)
    write_model(tmp_path / "b", 1, tokenizer, ["<b>"])
    with pytest.raises(LargemergeError, match=r"shapes differ.*tokenizer_source: union"):
        largemerge.merge(linear(tmp_path, ["a", "b"], [0.5, 0.5]), tmp_path / "out")


def long_config(folder: Path) -> Path:
    """Writes the configuration of three models with several pieces and parts, and padding."""
    tokenizer = train("BPE", ENGLISH)
    for seed, added in enumerate((["<x>"], ["<y>", "<x>"], ["<y>", "<z>"])):
        write_model(folder / f"m{seed}", seed, tokenizer, added)
    config = linear(folder, ["m1", "m2"], [0.5, 0.3], base_model=str(folder / "m0"))
    config |= {"merge_method": "ties", "tokenizer": {"source": "union", "pad_to_multiple_of": 64}}
    for entry in config["models"]:
        entry["parameters"]["density"] = 0.5
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_pieces_ranks_and_resuming_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = long_config(tmp_path)
    monkeypatch.setattr(engine, "PART_BYTES", 9000)
    largemerge.merge(path, tmp_path / "whole")
    expected = weights_in(tmp_path / "whole")
    with monkeypatch.context() as small:
        small.setattr(base, "PIECE_ELEMENTS", 500)
        largemerge.merge(path, tmp_path / "cut")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_in(tmp_path / "cut").items())
    command = ["merge", path, tmp_path / "ranks", "--quiet"]
    small_parts = {processes.PART_BYTES: "9000"}
    processes.run_ranks(command, tmp_path, 2, small_parts)
    assert processes.lasting(tmp_path / "ranks") == processes.lasting(tmp_path / "whole")
    command = ["merge", path, tmp_path / "killed", "--quiet"]
    assert processes.finish(processes.start(command, tmp_path / "log", 20, environment=small_parts)) < 0
    process = processes.start([*command, "--resume"], tmp_path / "log2", environment=small_parts)
    assert processes.finish(process) == 0, (tmp_path / "log2").read_text()
    assert processes.lasting(tmp_path / "killed") == processes.lasting(tmp_path / "whole")


def test_a_changed_tokenizer_is_not_resumed(tmp_path: Path) -> None:
    path = long_config(tmp_path)
    command = ["merge", path, tmp_path / "out", "--quiet"]
    assert processes.finish(processes.start(command, tmp_path / "log", 15)) < 0
    settings = tmp_path / "m0" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 77}))
    with pytest.raises(LargemergeError, match=r"cannot be resumed: vocabulary → files"):
        largemerge.merge(path, tmp_path / "out", resume=True)
