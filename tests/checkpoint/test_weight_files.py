"""Which files are read as weights: variants, wrapped weights, names with prefixes; and advice where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from cases import weights_in
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import largemerge
from largemerge.checkpoint.index import open_checkpoint
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_of_transformers(tmp_path: Path, sharded: bool) -> None:
    model = tiny_models.build("llama")
    size = "20KB" if sharded else "1GB"
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.fp16.json").exists() == sharded
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors.* set variant: fp16\."):
        open_checkpoint(tmp_path, "maths")
    checkpoint = open_checkpoint(tmp_path, "maths", "fp16")
    assert checkpoint.tensors.keys() == model.state_dict().keys() and checkpoint.notes == ()
    model.save_pretrained(tmp_path)
    plain, other = (open_checkpoint(tmp_path, "maths", variant) for variant in (None, "bf16"))
    assert plain.tensors == other.tensors and plain.tensors.keys() == checkpoint.tensors.keys()
    assert other.notes == (f"maths: no variant 'bf16' in {tmp_path}; read model.safetensors",)


@pytest.mark.parametrize("method", ["linear", "regmean"])
def test_both_kinds_of_merge_know_variants(tmp_path: Path, method: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"input_ids": [1, 2, 3, 4]}\n')
    save_file({"input_ids": torch.randint(0, 20, (4, 6))}, tmp_path / "data.safetensors")
    models: list[dict[str, Any]] = []
    for seed in (0, 1):
        folder = tmp_path / f"m{seed}"
        tiny_models.perturbed("llama", seed).save_pretrained(folder, variant="fp16")
        more = {"parameters": {"weight": 1.0}, "calibration": {"data": str(tmp_path / "data.safetensors")}}
        models.append({"model": str(folder), **{key: more[key] for key in more if method != "linear" or key[0] == "p"}})
    largemerge.merge({"merge_method": method, "models": models, "variant": "fp16"}, tmp_path / "out", quiet=True)
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_file_that_the_config_names(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "transformers_weights": "other.safetensors"}')
    for name in ("model", "other"):
        save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")
    assert list(open_checkpoint(folder, "m").tensors) == ["other"]


@pytest.mark.parametrize(
    ("named", "mentions"),
    [
        ("../other.safetensors", "leads out"),
        ("/other.safetensors", "leads out"),
        ("absent.safetensors", "does not exist"),
        ("x" * 300, "too long"),
        ("a\0b", "characters that no name has"),
        ("", "is a folder"),
        (5, "is no text"),
    ],
)
def test_a_config_that_names_no_file_of_its_folder_is_refused_rather_than_ignored(
    folder: Path, named: object, mentions: str
) -> None:
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_weights": named}))
    with pytest.raises(CheckpointError, match="transformers_weights is") as caught:
        open_checkpoint(folder, "m")
    assert mentions in str(caught.value)


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_wrapped_weights_are_read_and_told(folder: Path, key: str, prefix: str) -> None:
    weights = {f"model.layers.{index}.weight": torch.full((3, 2), float(index)) for index in range(2)}
    weights["lm_head.weight"] = torch.ones(2)
    saved = {key: {prefix + name: tensor for name, tensor in weights.items()}, "epoch": 3, "loss": torch.tensor(0.5)}
    torch.save(saved, folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(folder, "maths")
    assert checkpoint.tensors.keys() == weights.keys()
    assert f"under {key!r}; epoch, loss beside it left out" in checkpoint.notes[0]
    assert len(checkpoint.notes) == 1 + prefix.count(".")
    with CheckpointReader(checkpoint) as reader:
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in weights.items())
        assert torch.equal(reader.read("model.layers.1.weight", slice(1, 2)), torch.ones(1, 2))


def test_names_that_are_right_are_left_alone(folder: Path) -> None:
    for names in (["model.layers.0.weight", "model.norm.weight"], ["module.a", "b"], ["model.a", "lm_head.weight"]):
        save_file({name: torch.ones(1) for name in names}, folder / "model.safetensors")
        checkpoint = open_checkpoint(folder, "m")
        assert set(checkpoint.tensors) == set(names) and checkpoint.notes == ()


def test_a_compiled_model_merges_into_one_that_loads(tmp_path: Path) -> None:
    models = []
    for seed in (0, 1):
        tiny_models.perturbed("llama", seed).save_pretrained(tmp_path / f"m{seed}")
        stored = weights_in(tmp_path / f"m{seed}")
        save_file({f"_orig_mod.{key}": value for key, value in stored.items()}, tmp_path / f"m{seed}/model.safetensors")
        models.append({"model": str(tmp_path / f"m{seed}"), "parameters": {"weight": 0.5}})
    report = largemerge.merge({"merge_method": "linear", "models": models}, tmp_path / "out", quiet=True)
    assert sum("'_orig_mod.', which torch.compile puts there" in note for note in report.plan.notes) == 2
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_several_states_in_one_file_are_refused_with_the_way_to_mend_it(folder: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"several keys, model, ema; .*torch\.save\(saved\['model'\]"):
        open_checkpoint(folder, "m")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16])
def test_other_numbers_are_refused_by_name(folder: Path, dtype: torch.dtype) -> None:
    tensor = (
        torch.quantize_per_tensor(torch.ones(2), 1.0, 0, dtype) if dtype == torch.quint8 else torch.ones(2).to(dtype)
    )
    torch.save({"a": tensor}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"^m: .*pytorch_model\.bin"):
        open_checkpoint(folder, "m")


ADVICE = {
    "model-Q4_K_M.gguf": "gguf_file='model-Q4_K_M.gguf'",
    "consolidated.00.pth": "Meta's or Mistral's own layout",
    "consolidated.safetensors": "Meta's or Mistral's own layout",
    "tf_model.h5": "TensorFlow's: convert it with Transformers 4",
    "flax_model.msgpack": "from_flax=True",
    "pytorch_model.safetensors": "rename it to model.safetensors",
    "last.ckpt": "rename it to pytorch_model.bin",
    "model-00001-of-00002.safetensors": "fetch the file whose name ends with .index.json",
    "pytorch_model.fp16.bin": "set variant: fp16",
    "diffusion_pytorch_model.safetensors": "is a model of Diffusers",
    "zero_to_fp32.py": "python zero_to_fp32.py",
    "pytorch_model_fsdp_0/x": "accelerate merge-weights",
    "model.onnx": "cannot be read",
}


@pytest.mark.parametrize("name", ADVICE)
def test_other_files_of_weights_come_with_advice(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, "maths")
    assert ADVICE[name] in str(caught.value) and name.split("/")[0] in str(caught.value)


def test_a_pipeline_of_diffusers_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"pipeline of Diffusers.*\(text_encoder\)"):
        open_checkpoint(tmp_path, "maths")


@pytest.mark.parametrize("method", ["linear", "ties", "passthrough"])
def test_float64_goes_in_and_comes_out_and_float32_between_is_told(tmp_path: Path, method: str) -> None:
    for seed in (0, 1, 2):
        tiny_models.perturbed("llama", seed).double().save_pretrained(tmp_path / f"m{seed}")
    used = (1,) if method == "passthrough" else (1, 2)
    models: list[dict[str, Any]] = [{"model": str(tmp_path / f"m{seed}")} for seed in used]
    for entry in models if method != "passthrough" else []:
        entry["parameters"] = {"weight": 0.5} | ({"density": 1.0} if method == "ties" else {})
    base = {"base_model": str(tmp_path / "m0")} if method == "ties" else {}
    report = largemerge.merge({"merge_method": method, "models": models, **base}, tmp_path / "out", quiet=True)
    assert all("float64; merges compute in float32" in note for note in report.plan.notes) and report.plan.notes
    parts, merged = [weights_in(tmp_path / f"m{seed}") for seed in used], weights_in(tmp_path / "out")
    tolerance = 0.0 if method == "passthrough" else 1e-6
    for key, value in merged.items():
        assert value.dtype == torch.float64
        if method != "ties":
            expected = sum(part[key] for part in parts) / len(parts)
            assert torch.allclose(value, expected, rtol=tolerance, atol=tolerance / 10)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float64"
