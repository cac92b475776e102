"""Several merges in one file: their order, what is kept, what is not made again, mistakes in all of them at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_models
import torch
import yaml
from cases import weights_in
from tokenized import ENGLISH, train, write_model
from transformers import AutoTokenizer, LlamaForCausalLM

import largemerge
from largemerge import LargemergeError
from largemerge.cli import main
from largemerge.data_free import engine, multi

Config = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(4):
        tiny_models.perturbed("llama", seed).save_pretrained(tmp_path / f"model{seed}")
    return tmp_path


def linear(*models: str, **more: Any) -> Config:
    entries = [{"model": model} for model in models]
    return {"merge_method": "linear", "models": entries, "parameters": {"weight": 1.0}, **more}


def write(folder: Path, *documents: Config) -> Path:
    path = folder / "merges.yml"
    path.write_text(yaml.safe_dump_all(documents))
    return path


def three(folder: Path) -> Path:
    """Writes merges to the mean of (mean of 0 and 1) and (mean of 2 and the first), out of order, as people may."""
    return write(
        folder,
        linear("first", "second"),
        linear("model2", "first", name="second"),
        linear("model0", "model1", name="first"),
    )


def expected_of_three(folder: Path) -> dict[str, torch.Tensor]:
    a, b, c = (weights_in(folder / f"model{seed}") for seed in range(3))
    first = {name: (a[name] + b[name]) / 2 for name in a}
    return {name: (first[name] + (c[name] + first[name]) / 2) / 2 for name in a}


def test_results_become_models(folder: Path) -> None:
    largemerge.merge(three(folder), folder / "out")
    out, expected = weights_in(folder / "out"), expected_of_three(folder)
    assert all(torch.allclose(out[name], tensor, atol=1e-6) for name, tensor in expected.items())
    LlamaForCausalLM.from_pretrained(folder / "out")
    assert not (folder / "out" / ".largemerge").exists()
    told = json.loads((folder / "out" / "merge_report.json").read_text())
    assert list(told["before"]) == ["first", "second"] and told["before"]["first"]["config"]["name"] == "first"
    documents = list(yaml.safe_load_all((folder / "out" / "largemerge_config.yaml").read_text()))
    assert [document.get("name") for document in documents] == ["first", "second", None]


def test_the_written_configuration_makes_the_same_again(folder: Path) -> None:
    largemerge.merge(three(folder), folder / "out")
    largemerge.merge(folder / "out" / "largemerge_config.yaml", folder / "again")
    out, again = weights_in(folder / "out"), weights_in(folder / "again")
    assert all(torch.equal(out[name], again[name]) for name in out)


@pytest.mark.slow
def test_what_is_kept_is_not_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kept = three(folder), folder / "kept"
    largemerge.merge(path, folder / "out", intermediate_dir=kept)
    assert {each.name for each in kept.iterdir()} == {"first", "second"}
    LlamaForCausalLM.from_pretrained(kept / "first")
    merged: list[str] = []
    merge_one = multi.merge_data_free

    def noting(config: Any, out: Path, **options: Any) -> Any:
        merged.append(Path(out).name)
        return merge_one(config, out, **options)

    monkeypatch.setattr(multi, "merge_data_free", noting)
    largemerge.merge(path, folder / "other", intermediate_dir=kept)
    assert merged == ["other"]
    assert processes.lasting(folder / "other") == processes.lasting(folder / "out")
    changed = write(folder, linear("first", "model3"), linear("model0", "model2", name="first"))
    with pytest.raises(LargemergeError, match=r"kept/first was made from another configuration; --force"):
        largemerge.merge(changed, folder / "third", intermediate_dir=kept)
    merged.clear()
    largemerge.merge(changed, folder / "third", intermediate_dir=kept, force=True)
    assert merged == ["first", "third"]


def test_names_hide_folders_and_may_be_all_named(folder: Path) -> None:
    path = write(folder, linear("model0", "model1", name="model3"), linear("model3", "model2", name="final"))
    largemerge.merge(path, folder / "out")
    a, b, c = (weights_in(folder / f"model{seed}") for seed in range(3))
    for name, tensor in weights_in(folder / "out").items():
        assert torch.allclose(tensor, (a[name] + b[name]) / 4 + c[name] / 2, atol=1e-6), name


def test_one_document_may_have_a_name(folder: Path) -> None:
    largemerge.merge(write(folder, linear("model0", "model1", name="only")), folder / "out")
    LlamaForCausalLM.from_pretrained(folder / "out")


@pytest.mark.parametrize(
    "kill_at", [34, 64, *(pytest.param(number, marks=pytest.mark.slow) for number in (20, 36, 52))]
)
def test_a_killed_series_goes_on(folder: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = three(folder)
    command = ["merge", path, folder / "out", "--quiet"]
    small = {processes.PART_BYTES: "20000"}
    assert processes.finish(processes.start(command, folder / "log", kill_at, environment=small)) < 0
    assert not (folder / "out" / "config.json").exists()
    process = processes.start(command, folder / "log1", environment=small)
    assert processes.finish(process) == 2 and "--resume goes on" in (folder / "log1").read_text()
    process = processes.start([*command, "--resume"], folder / "log2", environment=small)
    assert processes.finish(process) == 0, (folder / "log2").read_text()
    monkeypatch.setattr(engine, "PART_BYTES", 20_000)
    largemerge.merge(path, folder / "unbroken")
    assert processes.lasting(folder / "out") == processes.lasting(folder / "unbroken")


def test_force_begins_afresh_and_replaces(folder: Path) -> None:
    path = three(folder)
    (folder / "out").mkdir()
    (folder / "out" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(LargemergeError, match="is not empty"):
        largemerge.merge(path, folder / "out")
    command = ["merge", path, folder / "out", "--quiet", "--force"]
    assert processes.finish(processes.start(command, folder / "log", 30)) < 0
    largemerge.merge(path, folder / "out", force=True)
    assert not (folder / "out" / "model.safetensors.index.json").exists()
    LlamaForCausalLM.from_pretrained(folder / "out")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("out", "intermediate"), [("model0", None), ("model2", None), (".", None), ("merged", "kept"), ("kept/first", None)]
)
def test_no_document_writes_over_what_another_reads(
    folder: Path, out: str, intermediate: str | None, force: bool
) -> None:
    path = three(folder)
    (folder / "kept").mkdir()
    (folder / "model0").rename(folder / "kept" / "first")
    path.write_text(path.read_text().replace("model0", "./kept/first"))
    (folder / "model0").symlink_to(folder / "kept" / "first")
    before = weights_in(folder / "kept" / "first")
    kept = folder / intermediate if intermediate else None
    message = "the configuration, lies in the output folder" if out == "." else "holds an input"
    with pytest.raises(LargemergeError, match=message):
        largemerge.merge(path, folder / out, intermediate_dir=kept, force=force)
    after = weights_in(folder / "kept" / "first")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list(folder.glob("model*/model.safetensors"))) == 4


@pytest.mark.slow
def test_ranks_make_all_of_them(folder: Path) -> None:
    path = three(folder)
    processes.run_ranks(["merge", path, folder / "out", "--quiet"], folder, 2)
    largemerge.merge(path, folder / "alone")
    assert processes.lasting(folder / "out") == processes.lasting(folder / "alone")


def test_vocabularies_go_through(tmp_path: Path) -> None:
    tokenizer = train("BPE", ENGLISH)
    for seed, added in enumerate((["<x>"], ["<y>"], ["<z>"])):
        write_model(tmp_path / f"model{seed}", seed, tokenizer, added)
    first = linear("model0", "model1", name="first", tokenizer_source="union")
    path = write(tmp_path, first, linear("first", "model2", tokenizer_source="first"))
    assert not largemerge.plan(path).problems
    largemerge.merge(path, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert {"<x>", "<y>"} <= set(ids) and "<z>" not in ids
    assert len(LlamaForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight) == len(ids) == 302


MISTAKES: list[tuple[list[Config], list[str]]] = [
    ([linear("b", name="a"), linear("a", name="b"), linear("a")], ["in a circle: ", "a → b → a"]),
    ([linear("model0", name="a"), linear("model1", name="a"), linear("a")], ["2 documents are called 'a'"]),
    ([linear("model0"), linear("model1")], ["2 documents have none"]),
    ([linear("model0", name="frist"), linear("first")], ["document 2: 'first' is neither", "did you mean 'frist'"]),
    ([linear("model0", name="a"), linear("model1", name="b")], ["a, b: no other document needs them"]),
    ([linear("model0", name="a"), linear("model1")], ["a: no other document needs it; --intermediate-dir"]),
    ([linear("model0", name="../a"), linear("../a")], ["'../a' is no name of a folder"]),
    (
        [linear("model0", name="a", dtpe="float16"), linear("a", parameters={"wight": 1})],
        ["a: dtpe: unknown key", "document 2: parameters.wight: unknown"],
    ),
    ([linear("model0", name="a"), {"merge_method": "regmean"}], ["document 2: merge_method: regmean goes into a file"]),
    (
        [linear("model0", "nowhere/at-all", name="a"), linear("a", "./gone")],
        ["a: nowhere/at-all", "document 2: ./gone: "],
    ),
]


@pytest.mark.parametrize(("documents", "texts"), MISTAKES)
def test_mistakes(folder: Path, documents: list[Config], texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["merge", str(write(folder, *documents)), str(folder / "out")])
    told = capsys.readouterr().err
    assert done.value.code == 2 and all(text in told for text in texts), told
    assert not (folder / "out").exists()


def test_unlike_shapes_are_found_before_the_first_merge(folder: Path) -> None:
    write_model(folder / "narrow", 0, None, num_rows=40)
    write_model(folder / "wide", 0, None, num_rows=41)
    path = write(folder, linear("narrow", "narrow", name="first"), linear("first", "wide"))
    with pytest.raises(LargemergeError, match=r"document 2: model.embed_tokens.weight: shapes differ"):
        largemerge.merge(path, folder / "out")
    assert not (folder / "out").exists()


def test_the_plan_shows_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as done:
            main(["plan", str(three(folder)), *more])
        told = capsys.readouterr().out
        assert done.value.code == 0 and told.index("first") < told.index("second") < told.index("document 1")
    assert list(json.loads(told)["documents"]) == ["first", "second", "document 1"]


def test_the_option_is_for_several(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, linear("model0", "model1"))
    with pytest.raises(SystemExit) as done:
        main(["merge", str(path), str(folder / "out"), "--intermediate-dir", str(folder / "kept")])
    assert done.value.code == 2 and "is for files of several merges" in capsys.readouterr().err
    with pytest.raises(LargemergeError, match="is for files of several merges"):
        largemerge.merge(path, folder / "out", intermediate_dir=folder / "kept")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("out", "intermediate", "expected"),
    [
        ("model0", None, "model0 holds an input"),
        ("link", None, "link holds an input"),
        ("model0/merged", None, "merged lies in an input"),
        ("out", "model0", "lies in an input"),
        ("out", ".", "first is no result of a merge; remove it"),
        ("kept/first", "kept", "expected folders apart"),
        ("kept", "kept/inside", "expected folders apart"),
    ],
)
def test_no_model_is_overwritten_even_by_force(
    folder: Path, out: str, intermediate: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "link").symlink_to("model0")
    tiny_models.perturbed("llama", 5).save_pretrained(folder / "first")  # somebody's, called like a document
    path = three(folder)
    before = snapshot(folder)
    with pytest.raises(LargemergeError, match=expected):
        largemerge.merge(path, out, intermediate_dir=intermediate, force=True)
    assert snapshot(folder) == before


def test_a_finished_series_is_not_resumed(folder: Path) -> None:
    largemerge.merge(three(folder), folder / "out")
    with pytest.raises(LargemergeError, match="holds a finished merge"):
        largemerge.merge(three(folder), folder / "out", resume=True)


def test_a_result_that_was_damaged_since_is_told(folder: Path) -> None:
    path = three(folder)
    largemerge.merge(path, folder / "out", intermediate_dir=folder / "kept")
    file = folder / "kept" / "first" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(LargemergeError, match=r"model\.norm\.weight is not as it was written(.|\n)*--force makes it"):
        largemerge.merge(path, folder / "again", intermediate_dir=folder / "kept")
