"""Folders of sentence-transformers: modules with weights are merged, and the output has the layout of the inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import weights_in
from data_free_cases import kill_and_resume
from safetensors.torch import load_file, save_file
from tokenized import ENGLISH, train
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

import largemerge
from largemerge.errors import LargemergeError

MODULES = {"2_Dense": {"linear.weight": (5, 8), "linear.bias": (5,)}, "3_LayerNorm": {"norm.weight": (5,)}}
SHARES = (0.25, 0.75)


def write_encoder(root: Path, seed: int, inner: str = "", *, pickled: bool = False) -> None:
    """A tiny BERT with a pooling and two modules with weights, laid out as sentence-transformers does."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)).save_pretrained(root / inner)
    wordpiece = train("WordPiece", ENGLISH, 60)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=wordpiece, unk_token="<unk>", pad_token="</s>")
    tokenizer.save_pretrained(root / inner)
    (root / inner / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    entries = [{"idx": 0, "name": "0", "path": inner, "type": "sentence_transformers.models.Transformer"}]
    for index, name in enumerate(("1_Pooling", *MODULES), start=1):
        kind = f"sentence_transformers.models.{name[2:]}"
        entries.append({"idx": index, "name": str(index), "path": name, "type": kind})
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
    (root / "modules.json").write_text(json.dumps(entries))
    for name, shapes in MODULES.items():
        tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
        if pickled:
            torch.save(tensors, root / name / "pytorch_model.bin")
        else:
            save_file(tensors, root / name / "model.safetensors")


def read_module(root: Path, module: str) -> dict[str, torch.Tensor]:
    file = root / module / "pytorch_model.bin"
    return torch.load(file) if file.exists() else load_file(root / module / "model.safetensors")


def config_of(folders: list[Path], method: str) -> dict[str, Any]:
    """A merge by a method, with the shares as weights."""
    models = [
        {"model": str(folder), "parameters": {"weight": share}} for folder, share in zip(folders, SHARES, strict=True)
    ]
    if method.startswith("regmean"):
        data = folders[0].parent / "data.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ENGLISH))
        models = [{**model, "calibration": {"data": str(data), "max_length": 16}} for model in models]
    return {"merge_method": method, "models": models}


@pytest.mark.parametrize("method", ["linear", "regmean"])
@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_modules_are_merged_and_the_layout_is_kept(tmp_path: Path, inner: str, method: str) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        write_encoder(folder, seed, inner, pickled=bool(seed))
    config, out = config_of(folders, method), tmp_path / "out"
    report = largemerge.merge(config, out, quiet=True, max_shard_bytes=4000)
    for module, shapes in MODULES.items():
        first, second, merged = (read_module(folder, module) for folder in (*folders, out))
        assert merged.keys() == shapes.keys()
        for key, value in merged.items():
            expected = SHARES[0] * first[key].double() + SHARES[1] * second[key].double()
            assert torch.allclose(value.double(), expected, atol=1e-6)
    assert "modules of sentence-transformers that are merged, too: 2_Dense, 3_LayerNorm" in report.plan.notes
    written = json.loads((out / "merge_report.json").read_text())
    assert "2_Dense::linear.weight" in json.dumps(written["plan"] if method == "regmean" else written["tensors"])
    _, info = BertModel.from_pretrained(out / inner, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (out / inner / "model.safetensors.index.json").exists()
    assert not (out / "config.json").exists() or not inner
    assert AutoTokenizer.from_pretrained(out / inner)("the models")["input_ids"][0] != 0
    files = {str(path.relative_to(folders[0])) for path in folders[0].rglob("*") if path.is_file()}
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files - {"model.safetensors", "0_Transformer/model.safetensors"} <= made
    again = largemerge.plan({**config, "models": [{**config["models"][0], "model": str(out)}, config["models"][1]]})
    assert not again.problems, "an output is an input"


def test_a_killed_merge_of_modules_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate("ab"):
        write_encoder(tmp_path / name, seed, "0_Transformer")
    path = tmp_path / "merge.yaml"
    path.write_text(json.dumps(config_of([tmp_path / "a", tmp_path / "b"], "linear")))
    kill_and_resume(path, tmp_path, 22, 1000, monkeypatch)
    assert read_module(tmp_path / "out", "2_Dense").keys() == MODULES["2_Dense"].keys()


def test_one_layout_replaces_another(tmp_path: Path) -> None:
    for seed, name in enumerate("abcd"):
        write_encoder(tmp_path / name, seed, "0_Transformer" if name in "ab" else "")
    largemerge.merge(config_of([tmp_path / "a", tmp_path / "b"], "linear"), tmp_path / "out", quiet=True)
    config = config_of([tmp_path / "c", tmp_path / "d"], "linear")
    largemerge.merge(config, tmp_path / "out", quiet=True, force=True)
    assert not (tmp_path / "out" / "0_Transformer").exists() or not any((tmp_path / "out" / "0_Transformer").iterdir())
    assert weights_in(tmp_path / "out") and read_module(tmp_path / "out", "3_LayerNorm")


@pytest.mark.parametrize("method", ["linear", "regmean"])
def test_modules_that_only_some_have_or_of_other_shapes_are_told(tmp_path: Path, method: str) -> None:
    for seed, name in enumerate("ab"):
        write_encoder(tmp_path / name, seed)
    shutil.rmtree(tmp_path / "a" / "3_LayerNorm")
    save_file(
        {"linear.weight": torch.ones(4, 8), "linear.bias": torch.ones(4)}, tmp_path / "b/2_Dense/model.safetensors"
    )
    with pytest.raises(LargemergeError) as caught:
        largemerge.merge(config_of([tmp_path / "a", tmp_path / "b"], method), tmp_path / "out", quiet=True)
    text = str(caught.value)
    assert "module 3_LayerNorm: " in text and "has no norm.weight, which" in text
    assert "module 2_Dense: the shapes of linear.weight differ" in text and "[5, 8]" in text and "[4, 8]" in text


@pytest.mark.parametrize("path", ["../b/2_Dense", "/etc", 3])
def test_modules_cannot_lead_out_of_their_folder(tmp_path: Path, path: object) -> None:
    for seed, name in enumerate("ab"):
        write_encoder(tmp_path / name, seed)
    modules = json.loads((tmp_path / "a" / "modules.json").read_text())
    (tmp_path / "a" / "modules.json").write_text(json.dumps([*modules, {"path": path, "type": "x.Dense"}]))
    with pytest.raises(LargemergeError, match=r"names the folder .* expected one inside its own"):
        largemerge.merge(config_of([tmp_path / "a", tmp_path / "b"], "linear"), tmp_path / "out", quiet=True)


def test_module_weights_in_another_format_are_told(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_encoder(tmp_path / name, seed)
    (tmp_path / "a/2_Dense/model.safetensors").rename(tmp_path / "a/2_Dense/dense.safetensors")
    with pytest.raises(LargemergeError, match=r"module 2_Dense has weights in dense\.safetensors; expected"):
        largemerge.merge(config_of([tmp_path / "a", tmp_path / "b"], "linear"), tmp_path / "out", quiet=True)
