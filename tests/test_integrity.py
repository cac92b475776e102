"""`largemerge verify`: a finished merge is compared with its digests, and loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from data_free_cases import weighted, write_models
from safetensors.torch import load_file, save_file

import largemerge
from largemerge import OutputError
from largemerge.cli import main


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge in two shards, with a tokenizer file beside them."""
    folder = tmp_path_factory.mktemp("integrity")
    write_models(folder)
    largemerge.merge(weighted(folder), folder / "out", max_shard_bytes=20_000)
    return folder / "out"


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(merged, tmp_path / "out")
    return tmp_path / "out"


def test_what_was_written_is_whole(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = largemerge.verify(merged)
    assert found.problems == () and found.notes == () and found.class_name == "LlamaForCausalLM"
    tensors = [name for shard in merged.glob("*.safetensors") for name in load_file(shard)]
    assert found.num_tensors == len(tensors) > 10
    assert found.num_files == len([path for path in merged.iterdir() if path.name != "merge_report.json"])
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(merged), "--json"])
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["problems"] == []


def shard_of(out: Path) -> Path:
    return min(out.glob("*.safetensors"))


def flip(out: Path) -> None:
    raw = bytearray(shard_of(out).read_bytes())
    raw[-1] ^= 64
    shard_of(out).write_bytes(raw)


def rename_tensor(out: Path) -> None:
    raw = shard_of(out).read_bytes()
    assert b"embed_tokens" in raw
    shard_of(out).write_bytes(raw.replace(b"embed_tokens", b"embed_tokenz"))


def save_again(out: Path) -> None:
    tensors = load_file(shard_of(out))
    save_file({name: tensor + 0.0 for name, tensor in tensors.items()}, shard_of(out), {"format": "pt"})


def edit_config(out: Path) -> None:
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": tiny_models.LLM["hidden_size"] * 2}))


@pytest.mark.parametrize(
    ("damage", "mentions"),
    [
        (flip, ["is not as it was written", "model-00001"]),
        (lambda out: shard_of(out).unlink(), ["model-00001-of", "is not there"]),
        (lambda out: os.truncate(shard_of(out), 5000), ["has 5000 bytes"]),
        (rename_tensor, ["its header is not as it was written"]),
        (save_again, ["were written"]),
        (edit_config, ["config.json is not as it was written", "embed_tokens", "expects"]),
        (lambda out: (out / "generation_config.json").unlink(), ["generation_config.json is not there"]),
        (lambda out: (out / "model.safetensors.index.json").write_text("{}"), ["index.json is not as it was written"]),
    ],
)
def test_what_has_changed_is_named(
    out: Path, damage: Callable[[Path], Any], mentions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(out)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(out)])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert ended.value.code == 2
    for text in mentions:
        assert text in shown, shown


def weights_of_another(out: Path) -> None:
    shutil.copy(shard_of(out), out / "model.safetensors")  # which Transformers takes before the index


def an_adapter(out: Path) -> None:
    (out / "adapter_config.json").write_text("{}")
    shutil.copy(shard_of(out), out / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("add", "names"),
    [
        (weights_of_another, ["model.safetensors"]),
        (an_adapter, ["adapter_config.json", "adapter_model.safetensors"]),
        (lambda out: (out / "added_tokens.json").write_text('{"hello": 300}'), ["added_tokens.json"]),
        (lambda out: (out / "special_tokens_map.json").write_text("{}"), ["special_tokens_map.json"]),
    ],
)
def test_what_the_merge_has_not_written_and_would_be_loaded_is_named(
    out: Path, add: Callable[[Path], Any], names: list[str]
) -> None:
    (out / "notes.txt").write_text("mine")
    (out / "optimizer.bin").write_bytes(b"mine")
    assert largemerge.verify(out).problems == ()
    add(out)
    problems = largemerge.verify(out).problems
    for name in names:
        assert f"{name} was not written by the merge, and would be loaded; take it away" in problems


def test_a_model_card_may_be_edited(out: Path) -> None:
    (out / "README.md").write_text("# My merge\n")
    assert largemerge.verify(out).problems == ()


@pytest.mark.parametrize(
    "digests",
    [None, {}, [], 5, {"algorithm": "md5", "weights": {}, "files": {}}, {"algorithm": "xxh3_128", "files": {"a": 1}}],
)
def test_a_report_without_digests_is_told(out: Path, digests: Any) -> None:
    path = out / "merge_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digests": digests}))
    with pytest.raises(OutputError, match=r"merge_report\.json has no digests"):
        largemerge.verify(out)


def test_digests_do_not_lead_out_of_the_folder(out: Path) -> None:
    path = out / "merge_report.json"
    report = json.loads(path.read_text())
    report["digests"]["files"]["../../etc/passwd"] = "0"
    path.write_text(json.dumps(report))
    with pytest.raises(OutputError, match="broken ones"):
        largemerge.verify(out)


@pytest.mark.parametrize("what", ["nothing", "a file", "a model", "unfinished"])
def test_what_is_no_finished_merge_is_told(out: Path, what: str) -> None:
    target = out / what
    if what == "a file":
        target.write_text("x")
    elif what == "a model":
        shutil.copytree(out.parent / "out", target)
        (target / "merge_report.json").unlink()
    elif what == "unfinished":
        (target / ".largemerge").mkdir(parents=True)
        (target / ".largemerge" / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match=r"nothing there|a file|merge_report\.json|unfinished"):
        largemerge.verify(target)
