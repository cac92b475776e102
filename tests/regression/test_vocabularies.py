"""Candidates whose vocabularies differ: rows by token, texts through each one's own tokenizer, one output size."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference
import tokenizers
import torch
import yaml
from cases import report_of, weights_in
from processes import assert_agree, run_ranks
from tokenized import CODE, EMBEDDINGS, ENGLISH, Config, check_rows, loads_and_speaks, rows_by_token, train, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import largemerge
from largemerge import LargemergeError
from largemerge.output import OutputFolder

METHODS = ["regmean", "regmean_plusplus"]
FIVE = Path(__file__).parents[2] / "configs" / "paper" / "llama-3.2-3b-five-experts.yaml"


@pytest.fixture(scope="module")
def english() -> tokenizers.Tokenizer:
    return train("BPE", ENGLISH)


@pytest.fixture(scope="module")
def code() -> tokenizers.Tokenizer:
    return train("BPE", CODE, 320)


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def configuration(folder: Path, names: list[str], method: str, **more: Any) -> Config:
    """Names of models → a merge of them, each on its own texts."""
    write_texts(folder / "a.jsonl", ENGLISH)
    write_texts(folder / "b.jsonl", CODE)
    models = [
        {"model": str(folder / name), "calibration": {"data": str(folder / f"{name[0]}.jsonl")}} for name in names
    ]
    calibration = {"num_samples": 8, "max_length": 24, "batch_size": 1}
    return {"merge_method": method, "models": models, "calibration": calibration, **more}


def permute(source: Path, out: Path) -> None:
    """Writes a model whose tokens have other numbers, with their rows; else it is the same."""
    shutil.copytree(source, out)
    document = json.loads((source / "tokenizer.json").read_text())
    vocabulary, fixed = document["model"]["vocab"], {entry["id"] for entry in document["added_tokens"]}
    movable = sorted(number for number in vocabulary.values() if number not in fixed)
    moved = dict(zip(movable, random.Random(0).sample(movable, len(movable)), strict=True))
    document["model"]["vocab"] = {token: moved.get(number, number) for token, number in vocabulary.items()}
    (out / "tokenizer.json").write_text(json.dumps(document))
    model = AutoModelForCausalLM.from_pretrained(source)
    before, after = torch.tensor(list(moved)), torch.tensor(list(moved.values()))
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight[after] = weight[before].clone()
    model.save_pretrained(out)


@pytest.mark.parametrize("method", [*METHODS, "calibrated"])
def test_other_numbers_of_the_same_tokens_change_nothing(
    tmp_path: Path, method: str, english: tokenizers.Tokenizer
) -> None:
    for seed, name in enumerate(("a", "b")):
        write_model(tmp_path / name, seed, english)
    permute(tmp_path / "b", tmp_path / "b2")
    largemerge.merge(configuration(tmp_path, ["a", "b"], method), tmp_path / "same")
    config = configuration(tmp_path, ["a", "b2"], method)
    (note,) = [note for note in largemerge.plan(config, probe=False).notes if "vocabularies differ" in note]  # type: ignore[union-attr]
    assert re.search(
        r"\d+ rows are other tokens, such as .* in a, .* in b2.*averaged by number.*tokenizer_source", note
    )
    largemerge.merge(config | {"tokenizer_source": "a"}, tmp_path / "moved")
    expected, found = weights_in(tmp_path / "same"), weights_in(tmp_path / "moved")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # And the other way round: the output has the other one's tokenizer.
    largemerge.merge(config | {"tokenizer_source": "b2"}, tmp_path / "theirs")
    ids = [AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() for name in ("same", "theirs")]
    assert ids[1] == AutoTokenizer.from_pretrained(tmp_path / "b2").get_vocab() != ids[0]
    theirs = weights_in(tmp_path / "theirs")
    for name, tensor in expected.items():
        if name in EMBEDDINGS:
            assert all(torch.equal(theirs[name][ids[1][token]], tensor[ids[0][token]]) for token in ids[0])
        else:
            assert torch.equal(theirs[name], tensor), name
    loads_and_speaks(tmp_path / "theirs", "the models are merged")


def arranged(folder: Path, out: Path, others: list[Path], extra: tuple[str, ...] = ()) -> PreTrainedModel:
    """A model with a row for every token of the output, by the default rules, then for `extra` ones of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(out).get_vocab()
    own = AutoTokenizer.from_pretrained(folder).get_vocab()
    of_all = [AutoTokenizer.from_pretrained(other).get_vocab() for other in others]
    for name, embedding in (
        ("model.embed_tokens.weight", model.get_input_embeddings()),
        ("lm_head.weight", model.lm_head),
    ):
        rows = [rows_by_token(other, vocabulary, name) for other, vocabulary in zip(others, of_all, strict=True)]
        mine = rows_by_token(folder, own, name)
        made = torch.zeros(max(ids.values()) + 1 + len(extra), embedding.weight.shape[1])
        for token, number in ids.items():
            having = [each[token] for each in rows if token in each]
            made[number] = mine[token] if token in mine else torch.stack(having).mean(dim=0)
        for place, token in enumerate(extra):
            made[max(ids.values()) + 1 + place] = mine[token]
        embedding.weight = torch.nn.Parameter(made)
    return model


def own_inputs(folder: Path, out: Path, texts: list[str], extra: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Texts through a model's own tokenizer, in the output's ids."""
    tokenizer, ids = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out).get_vocab()
    ids |= {token: max(ids.values()) + 1 + place for place, token in enumerate(extra)}
    encoded = [tokenizer(text, truncation=True, max_length=24).input_ids for text in texts]
    length = max(map(len, encoded))
    rows = [[ids[token] for token in tokenizer.convert_ids_to_tokens(each)] for each in encoded]
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
    }


def assert_linears(out: Path, expected: PreTrainedModel) -> None:
    found = weights_in(out)
    for name, tensor in expected.state_dict().items():
        if ".layers." in name:
            error = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-12)
            assert error < 1e-4, (name, error)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, english: tokenizers.Tokenizer, code: tokenizers.Tokenizer) -> Path:
    """Two models with tokens of their own; the second has padded rows, too."""
    folder = tmp_path_factory.mktemp("two")
    write_model(folder / "a", 0, english, ["<a>"])
    write_model(folder / "b", 1, code, ["<b>", "<a>"], more_rows=5)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_union_is_merged_by_token(two: Path, tmp_path: Path, method: str) -> None:
    config = configuration(two, ["a", "b"], method, tokenizer_source="union")
    for model, weight in zip(config["models"], (1.0, 3.0), strict=True):
        model["parameters"] = {"weight": weight}
    report = largemerge.merge(config, tmp_path / "out")
    ids = [AutoTokenizer.from_pretrained(two / name).get_vocab() for name in ("a", "b")]
    for name in EMBEDDINGS:
        rows = [rows_by_token(two / model, ids[place], name) for place, model in enumerate(("a", "b"))]
        found = check_rows(tmp_path / "out", rows, None, lambda each: 0.25 * each[0] + 0.75 * each[1], name)
    assert set(found) == {*ids[0], *ids[1]}
    folders = [two / "a", two / "b"]
    models = [arranged(folder, tmp_path / "out", folders) for folder in folders]
    inputs = [own_inputs(*pair) for pair in zip(folders, [tmp_path / "out"] * 2, (ENGLISH, CODE), strict=True)]
    assert_linears(tmp_path / "out", reference.merge(method, models, inputs, [1.0, 3.0]))
    loads_and_speaks(tmp_path / "out", "def merge(models)")
    plan = report_of(tmp_path / "out")["plan"]["vocabulary"]
    assert plan["source"] == "union" and plan["rows"] == len(found) and plan["rules"][0]["counts"]
    assert "rows matched by token" in report.plan.to_json()["not_solved"]["lm_head.weight"]["reason"]


def test_tokens_that_the_output_lacks(two: Path, tmp_path: Path) -> None:
    """RegMean runs a candidate on its own embeddings of them; RegMean++ has none, and says so."""
    config = configuration(two, ["a", "b"], "regmean", tokenizer_source="a")
    config["models"][1]["calibration"]["data"] = str(two / "extra.jsonl")
    texts = ["class Merge:", "for <b> in <a>"]
    write_texts(two / "extra.jsonl", texts)
    report = largemerge.merge(config, tmp_path / "out")
    lacking = set(AutoTokenizer.from_pretrained(two / "b").get_vocab()) - set(
        AutoTokenizer.from_pretrained(two / "a").get_vocab()
    )
    used = AutoTokenizer.from_pretrained(two / "b")
    extra = tuple(sorted({token for text in texts for token in used.tokenize(text)} & lacking))
    assert "<b>" in extra
    note = next(note for note in report.plan.notes if "not in the output's vocabulary" in note)
    assert note.startswith("b: ") and "own embeddings" in note
    folders = [two / "a", two / "b"]
    models = [arranged(folder, tmp_path / "out", folders, extra if folder.name == "b" else ()) for folder in folders]
    first = models[0].model.embed_tokens.weight
    for weight in (models[0].model.embed_tokens, models[0].lm_head):
        weight.weight = torch.nn.Parameter(torch.cat([weight.weight, torch.zeros(len(extra), first.shape[1])]))
    inputs = [own_inputs(folders[0], tmp_path / "out", ENGLISH), own_inputs(folders[1], tmp_path / "out", texts, extra)]
    assert_linears(tmp_path / "out", reference.merge("regmean", models, inputs, [1.0, 1.0]))
    assert len(weights_in(tmp_path / "out")["lm_head.weight"]) == len(AutoTokenizer.from_pretrained(two / "a"))
    config["merge_method"] = "regmean_plusplus"
    with pytest.raises(LargemergeError, match=r"'b': \d+ of \d+ tokens .* not in the output's .*'<b>'.*union"):
        largemerge.merge(config, tmp_path / "refused")


@pytest.mark.parametrize("base", [None, 304, 312])
def test_padded_rows_are_recognised(tmp_path: Path, base: int | None, english: tokenizers.Tokenizer) -> None:
    """The output has the base's number of rows, or the first one's; rows that only some have are theirs."""
    sizes = {"a": 312, "b": 304} | ({"c": base} if base else {})
    ids = [
        write_model(tmp_path / name, seed, english, num_rows=size) for seed, (name, size) in enumerate(sizes.items())
    ]
    config = configuration(tmp_path, ["a", "b"], "regmean_plusplus")
    config |= {"base_model": str(tmp_path / "c")} if base else {}
    report = largemerge.merge(config, tmp_path / "out")
    size = base or 312
    tensors = {name: weights_in(tmp_path / name) for name in sizes}
    found = weights_in(tmp_path / "out")
    for name in EMBEDDINGS:
        a, b = tensors["a"][name].double(), tensors["b"][name].double()
        assert len(found[name]) == size and max(ids[0].values()) < 304
        assert torch.allclose(found[name][:304].double(), (a[:304] + b[:304]) / 2, atol=1e-6)
        if size > 304:  # what b has of these: the base's, else a's
            theirs = tensors["c"][name][304:].double() if base else a[304:]
            assert torch.allclose(found[name][304:].double(), (a[304:] + theirs) / 2, atol=1e-6)
    loads_and_speaks(tmp_path / "out", "the end")
    vocabulary = report.plan.to_json()["vocabulary"]
    rows = {("base" if name == "c" else name): number for name, number in sizes.items()}
    assert vocabulary["source"] == "padded rows" and vocabulary["rows_of_models"] == rows
    for name in ("a", "b"):  # without their padding, the models merge to the same blocks
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        model.resize_token_embeddings(304)
        model.save_pretrained(tmp_path / name)
    config.pop("base_model", None)
    largemerge.merge(config, tmp_path / "trimmed")
    trimmed = weights_in(tmp_path / "trimmed")
    assert all(torch.equal(found[name], trimmed[name]) for name in trimmed if name not in EMBEDDINGS)


@pytest.mark.parametrize("excluded", [True, False])
def test_the_five_llama_experts(tmp_path: Path, english: tokenizers.Tokenizer, excluded: bool) -> None:
    """The configuration as it is shipped, with rows as the five have them; and without what it excludes."""
    config = yaml.safe_load(FIVE.read_text())
    if not excluded:
        del config["parameters"]["exclude"]
    write_model(tmp_path / "base", 9, english, num_rows=128256, tied=True, dtype=torch.bfloat16)
    config["base_model"] = str(tmp_path / "base")
    row = {
        key: "merge the models" for key in ("instruction", "output", "query", "response", "inputs", "targets", "prompt")
    }
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row | {"query": f"{i}"}) + "\n" for i in range(3)))
    for number, entry in enumerate(config["models"]):
        size = 128320 if number in (1, 2) else 128256
        folder = tmp_path / entry["name"]
        write_model(folder, number, english, num_rows=size, tied=True, dtype=torch.bfloat16)
        entry["model"] = str(folder)
        text = {"text_template": entry["calibration"]["text_template"]}
        entry["calibration"] = {"data": str(tmp_path / "data.jsonl"), **text}
    largemerge.merge(config, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vocab_size == 128256 == len(model.get_input_embeddings().weight)
    merged = model.get_input_embeddings().weight.float()
    if excluded:
        assert torch.equal(merged, weights_in(tmp_path / "base")["model.embed_tokens.weight"].float())
        return
    five = [
        weights_in(Path(entry["model"]))["model.embed_tokens.weight"][:128256].float() for entry in config["models"]
    ]
    assert torch.allclose(merged, sum(five) / 5, atol=1e-2)


def test_settings_of_single_tokens(two: Path, tmp_path: Path) -> None:
    tokens = {
        "<new>": {"source": {"kind": "model_token", "model": str(two / "b"), "token": "<b>"}},
        "<a>": {"source": "b", "force": True},
    }
    tokenizer = {"source": str(two / "a"), "tokens": tokens, "pad_to_multiple_of": 32}
    config = configuration(two, ["a", "b"], "regmean", tokenizer=tokenizer)
    largemerge.merge(config, tmp_path / "out")
    ids, theirs = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (tmp_path / "out", two / "b"))
    found, b = weights_in(tmp_path / "out"), weights_in(two / "b")
    for name in EMBEDDINGS:
        assert len(found[name]) % 32 == 0
        assert torch.allclose(found[name][ids["<new>"]], b[name][theirs["<b>"]], atol=1e-6)
        assert torch.allclose(found[name][ids["<a>"]], b[name][theirs["<a>"]], atol=1e-6)
    wrong = configuration(two, ["a", "b"], "regmean", tokenizer={"source": "c", "tokens": {"<x>": {"source": "d"}}})
    with pytest.raises(LargemergeError) as caught:
        largemerge.plan(wrong, probe=False)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "tokenizer.source",
        "tokenizer.tokens.<x>.source",
    ]


def test_vocabularies_of_other_sizes_are_refused(two: Path, tmp_path: Path, english: tokenizers.Tokenizer) -> None:
    """A token more is no padding; where it lies in padding of the others, it is told."""
    with pytest.raises(LargemergeError, match=r"rows are other tokens, such as .* in a, .* in b; set tokenizer_source"):
        largemerge.plan(configuration(two, ["a", "b"], "regmean"), probe=False)
    write_model(tmp_path / "a", 0, english)
    write_model(tmp_path / "b", 1, english, ["<more>"])
    config = configuration(tmp_path, ["a", "b"], "regmean")
    with pytest.raises(LargemergeError, match=r"a lacks 1 tokens such as '<more>'; set tokenizer_source: union"):
        largemerge.merge(config, tmp_path / "out")
    write_model(tmp_path / "a", 0, english, more_rows=1)
    assert any("a lacks 1 tokens such as '<more>'" in note for note in largemerge.plan(config, probe=False).notes)  # type: ignore[union-attr]


@pytest.mark.slow
def test_ranks_and_a_crash_change_nothing(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(two, ["a", "b"], "regmean_plusplus", tokenizer_source="union")
    largemerge.merge(config, tmp_path / "alone", device="cpu")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run_ranks(["merge", path, tmp_path / "ranks", "--quiet", "--device", "cpu"], tmp_path, 2)
    assert_agree(tmp_path / "ranks", tmp_path / "alone")
    with monkeypatch.context() as patch:
        record = OutputFolder.record

        def stop(self: OutputFolder, part: str, entry: Any) -> None:
            record(self, part, entry)
            raise KeyboardInterrupt

        patch.setattr(OutputFolder, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            largemerge.merge(config, tmp_path / "out", device="cpu")
    with pytest.raises(LargemergeError, match="tokenizer_source was 'union' and is 'a'"):
        largemerge.merge(config | {"tokenizer_source": "a", "merge_method": "regmean"}, tmp_path / "out", resume=True)
    largemerge.merge(config, tmp_path / "out", device="cpu", resume=True)
    alone, out = weights_in(tmp_path / "alone"), weights_in(tmp_path / "out")
    assert all(torch.equal(out[name], alone[name]) for name in alone)
