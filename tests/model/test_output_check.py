"""Whether a checkpoint loads, told without its numbers: as `from_pretrained` tells it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import largemerge
from largemerge.checkpoint.index import Checkpoint, open_checkpoint
from largemerge.model import output_check
from largemerge.model.output_check import LoadingVerdict, check_loads, try_loading

Tensors = dict[str, torch.Tensor]


def _qwen2_vl() -> PreTrainedModel:
    text = tiny_models.LLM | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=vision))


def _bert() -> PreTrainedModel:
    return tf.BertForSequenceClassification(tf.BertConfig(**tiny_models.TEXT, intermediate_size=24))


def _bloom() -> PreTrainedModel:
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4))


SEEN = ("llama", "llama_tied", "mixtral", "clip", "t5", "gpt2", "vit", "opt", "roberta")
BUILD: dict[str, Callable[[], PreTrainedModel]] = {name: tiny_models.ARCHITECTURES[name].build for name in SEEN}
BUILD |= {"bert_with_head": _bert, "qwen2_vl": _qwen2_vl, "bloom": _bloom}


def spoiled(good: Tensors) -> dict[str, Tensors]:
    """The tensors of a file, whole, and spoiled in several ways."""
    names = sorted(good)
    matrix = next(name for name in names if ".1." in name and good[name].dim() == 2)
    rest = {name: tensor for name, tensor in good.items() if name != matrix}
    return {
        "whole": good,
        "dropped": rest,
        "first dropped": {name: good[name] for name in names[1:]},
        "last dropped": {name: good[name] for name in names[:-1]},
        "added": good | {"surplus.weight": torch.zeros(2)},
        "renamed": rest | {f"x.{matrix}": good[matrix]},
        "reshaped": good | {matrix: torch.zeros(3, 5)},
        "old buffers": good | {"h.0.rotary_emb.inv_freq": torch.zeros(2), "embeddings.position_ids": torch.zeros(1, 3)},
    }


@pytest.mark.parametrize("name", BUILD)
def test_the_verdict_is_that_of_from_pretrained(name: str, tmp_path: Path) -> None:
    model = BUILD[name]()
    model.save_pretrained(tmp_path)
    for how, tensors in spoiled(load_file(tmp_path / "model.safetensors")).items():
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            tmp_path / "model.safetensors",
            {"format": "pt"},
        )
        checkpoint = open_checkpoint(tmp_path, name)
        verdict = try_loading(checkpoint.config, checkpoint.tensors)
        try:
            _, info = type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
        except RuntimeError:  # experts of other shapes cannot be put together
            assert verdict.error, how
            continue
        assert verdict.class_name == type(model).__name__ and not verdict.not_checked
        assert set(verdict.missing) == set(info["missing_keys"]), how
        assert set(verdict.unexpected) == set(info["unexpected_keys"]), how
        shapes = {key: (tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"]}
        assert verdict.mismatched == shapes, how
        assert verdict.is_clean == (how == "whole") or how in ("old buffers", "first dropped"), how


def _six_layers(name: str) -> PreTrainedModel:
    kind = type(tiny_models.build(name))
    config = tiny_models.build(name).config
    layers = {"num_hidden_layers": 6, "num_layers": 6, "num_decoder_layers": 6, "n_layer": 6}
    changed = {key: value for key, value in layers.items() if hasattr(config, key)}
    return kind(type(config).from_dict(config.to_dict() | changed))


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "gpt2", "bert"])
def test_layers_that_are_like_others_need_not_be_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _six_layers(name)
    model.save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, name)
    third = sorted(key for key in good if re.match(r"\D+\.2\.", key))
    matrix = next(key for key in third if good[key].dim() == 2)
    tensors = checkpoint.tensors
    lacking = {key: info for key, info in tensors.items() if key != matrix}

    def third_like(key: str) -> str:
        return re.sub(r"\d", "2", key, count=1)

    cases = {
        "whole": tensors,
        "dropped": lacking,
        "renamed": lacking | {f"{matrix}.old": tensors[matrix]},
        "added": tensors | {f"{matrix}.old": tensors[matrix]},
        "reshaped": tensors | {matrix: replace(tensors[matrix], shape=(3, 5))},
        "a layer dropped": {key: info for key, info in tensors.items() if key not in third},
        "dropped everywhere": {key: info for key, info in tensors.items() if third_like(key) != matrix},
    }
    loaded: list[int] = []
    load = output_check._load

    def counted(model_class: object, config: object, given: Mapping[str, object]) -> object:
        loaded.append(len(given))
        return load(model_class, config, given)

    monkeypatch.setattr(output_check, "_load", counted)
    for how, given in cases.items():
        whole = try_loading(checkpoint.config, given)
        monkeypatch.setattr(output_check, "_MANY_TENSORS", 0)
        loaded.clear()
        assert try_loading(checkpoint.config, given) == whole, how
        assert whole.is_clean == (how == "whole"), how
        assert (len(loaded) == 1) == whole.is_clean and loaded[0] < len(given), how
        monkeypatch.undo()
        monkeypatch.setattr(output_check, "_load", counted)


def test_a_layer_too_many_or_too_few_is_told_among_layers_that_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_check, "_MANY_TENSORS", 0)
    _six_layers("llama").save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path, "six")
    for number in (5, 7):
        verdict = try_loading({**checkpoint.config, "num_hidden_layers": number}, checkpoint.tensors)
        assert bool(verdict.missing) == (number > 6) and bool(verdict.unexpected) == (number < 6)
        assert len(verdict.missing or verdict.unexpected) == 9


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.build("llama").save_pretrained(folder)
    return open_checkpoint(folder, "llama")


def without(checkpoint: Checkpoint, *names: str) -> Checkpoint:
    return replace(checkpoint, tensors={key: info for key, info in checkpoint.tensors.items() if key not in names})


def test_an_output_may_lack_what_its_reference_lacks(llama: Checkpoint) -> None:
    norm, head = "model.norm.weight", "lm_head.weight"
    assert not check_loads(llama.config, llama.tensors, llama).problems
    findings = check_loads(llama.config, without(llama, head).tensors, llama)
    assert findings.problems == (
        f"the output would lack 1 tensor that LlamaForCausalLM needs by its config, and that would be random: {head}",
    )
    (note,) = check_loads(llama.config, without(llama, head).tensors, without(llama, head)).notes
    assert note.startswith("as in llama, the output lacks 1 tensor") and note.endswith(head)
    (problem,) = check_loads(llama.config, without(llama, norm).tensors, without(llama, norm)).problems
    assert "llama: its files lack 1 tensor that LlamaForCausalLM needs" in problem and norm in problem


def test_the_same_tensor_of_another_layer_is_known_where_layers_move(llama: Checkpoint) -> None:
    buffer = next(iter(llama.tensors.values()))
    reference = replace(llama, tensors={**llama.tensors, "model.layers.2.rotary_emb.old": buffer})
    output = replace(llama, tensors={**llama.tensors, "model.layers.1.rotary_emb.old": buffer})
    assert check_loads(llama.config, output.tensors, reference).problems
    assert not check_loads(llama.config, output.tensors, reference, restacked=True).problems


def test_a_config_that_does_not_fit_is_a_problem(llama: Checkpoint) -> None:
    (problem,) = check_loads(dict(llama.config) | {"num_hidden_layers": 2}, llama.tensors, llama).problems
    assert problem.startswith("the output would hold 9 tensors that LlamaForCausalLM has no place for")
    findings = check_loads(dict(llama.config) | {"intermediate_size": 32}, llama.tensors, llama)
    assert "[24, 16]; by its config [32, 16] is expected" in findings.problems[1]
    (problem,) = check_loads(dict(llama.config) | {"architectures": ["NoSuchModel"]}, llama.tensors, llama).problems
    assert "could not be loaded" in problem and "NoSuchModel" in problem


def test_classes_that_nobody_has_are_noted(llama: Checkpoint) -> None:
    unknown = replace(llama, config=dict(llama.config) | {"model_type": "of_my_own"})
    findings = check_loads(unknown.config, unknown.tensors, unknown)
    assert not findings.problems and findings.notes[0].startswith("not checked: ")
    verdict = try_loading(unknown.config, unknown.tensors)
    assert verdict == LoadingVerdict(not_checked=verdict.not_checked) and "of_my_own" in verdict.not_checked


def test_plans_say_what_the_reference_lacks(llama: Checkpoint, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny_models.build("llama").save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        del tensors["lm_head.weight"]
        save_file(tensors | {"of.no.use": torch.zeros(2)}, file, {"format": "pt"})
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in ("a", "b")]
    notes = largemerge.plan({"merge_method": "linear", "models": models}).notes
    assert [note for note in notes if "lacks 1 tensor" in note and "lm_head.weight" in note]
    assert [note for note in notes if "holds 1 tensor" in note and "of.no.use" in note]
    out = tmp_path / "out"
    largemerge.merge({"merge_method": "linear", "models": models}, out)
    assert json.loads((out / "merge_report.json").read_text())["plan"]["notes"] == notes


def test_files_with_fewer_layers_than_the_config_counts(tmp_path: Path) -> None:
    """As when a shard is lost on the way, and its index with it."""
    model = tiny_models.perturbed("llama", 0)
    model.save_pretrained(tmp_path / "cut")
    path = tmp_path / "cut" / "config.json"
    layers = model.config.num_hidden_layers
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers + 1}))
    checkpoint = open_checkpoint(tmp_path / "cut", "cut")
    found = check_loads(checkpoint.config, checkpoint.tensors, checkpoint)
    assert len(found.problems) == 1 and f"model.layers.{layers}." in found.problems[0]
    assert "cut: its files lack 9 tensors of layers that its config.json counts" in found.problems[0]
