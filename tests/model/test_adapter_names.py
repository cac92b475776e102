"""Adapters on models whose files have other names, or another layout, than the module that they were trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf
from adapters import merged_by_peft, read_all, same, train_with_peft
from cases import weights_in
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from largemerge import LargemergeError

peft = pytest.importorskip("peft")

Rename = Callable[[str], str]


def lora(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **more})


def rename_weights(folder: Path, rename: Rename) -> None:
    weights = weights_in(folder)
    save_file(
        {rename(name): tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def rename_adapter(folder: Path, rename: Rename) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


def check(tmp_path: Path, model: PreTrainedModel, rename: Rename, **more: Any) -> None:
    """A model whose file has other names, and an adapter of the model as it is."""
    model.save_pretrained(tmp_path / "model")
    rename_weights(tmp_path / "model", rename)
    train_with_peft(model, lora(**more), tmp_path / "adapter")
    found, _, adapter = read_all(f"{tmp_path / 'model'}+{tmp_path / 'adapter'}")
    merged_by_peft(model, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    assert same(found, {rename(name): tensor for name, tensor in weights_in(tmp_path / "merged").items()}) == []
    assert adapter.deltas and not adapter.notes


def test_without_the_prefix_of_a_head(tmp_path: Path) -> None:
    model = tiny_models.perturbed("gpt2", 0)
    check(tmp_path, model, lambda name: name.removeprefix("transformer."), target_modules=["c_attn", "wte"])


def test_two_linears_that_lie_on_disk_as_one(tmp_path: Path) -> None:
    model = tiny_models.perturbed("dinov2_swiglu", 0)
    check(tmp_path, model, str, target_modules=["gate_proj", "up_proj", "down_proj"])
    assert not any("gate_proj" in name for name in weights_in(tmp_path / "model"))
    train_with_peft(model, peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[]), tmp_path / "ia3")
    with pytest.raises(LargemergeError, match=r"up_proj lies on disk in another layout; merge the adapter"):
        read_all(f"{tmp_path / 'model'}+{tmp_path / 'ia3'}")


def test_an_adapter_of_the_bare_model(tmp_path: Path) -> None:
    model: Any = tiny_models.perturbed("llama", 0)
    model.save_pretrained(tmp_path / "model")
    train_with_peft(model.model, lora(target_modules=["q_proj"]), tmp_path / "adapter")
    found, _, _ = read_all(f"{tmp_path / 'model'}+{tmp_path / 'adapter'}")
    merged = merged_by_peft(model.model, tmp_path / "adapter").state_dict()
    wanted = {f"model.{name}": tensor for name, tensor in merged.items()}
    assert same(found, wanted | {"lm_head.weight": model.lm_head.weight.detach()}) == []


def test_gamma_and_beta(tmp_path: Path) -> None:
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    model = tiny_models.perturbed("bert", 0)
    check(tmp_path, model, old, target_modules=["query"], bias="all", modules_to_save=["LayerNorm"])


def test_a_tower_on_the_whole_model(tmp_path: Path) -> None:
    whole = tiny_models.perturbed("clip", 0)
    whole.save_pretrained(tmp_path / "model")
    tower = tf.CLIPVisionModel.from_pretrained(tmp_path / "model")
    train_with_peft(tower, lora(target_modules=["q_proj", "fc1"]), tmp_path / "adapter")
    found, _, adapter = read_all(f"{tmp_path / 'model'}+{tmp_path / 'adapter'}")
    merged_by_peft(tower, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    before, merged = weights_in(tmp_path / "model"), weights_in(tmp_path / "merged")
    assert same(found, before | merged) == [] and len(adapter.deltas) == 6 and set(merged) < set(before)


def vlm_config() -> tf.Qwen2_5_VLConfig:
    text = tiny_models.LLM | {"vocab_size": 80, "layer_types": ["full_attention"] * 3}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "num_heads": 4}
    vision |= {"patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16}
    ids = {"image_token_id": 70, "video_token_id": 71, "vision_start_token_id": 72, "vision_end_token_id": 73}
    return tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


@pytest.mark.parametrize("old_adapter", [False, True])
@pytest.mark.parametrize("old_model", [False, True])
def test_vision_language_models_of_before_and_after_4_52(tmp_path: Path, old_model: bool, old_adapter: bool) -> None:
    def new(name: str) -> str:
        return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)

    torch.manual_seed(0)
    model = tf.Qwen2_5_VLForConditionalGeneration(vlm_config())
    model.save_pretrained(tmp_path / "model")
    assert "model.layers.0.self_attn.q_proj.weight" in weights_in(tmp_path / "model"), "saved by the older names"
    rename = str if old_model else new
    rename_weights(tmp_path / "model", rename)
    modules = r".*language_model.*\.(q_proj|down_proj)|.*visual.*qkv"
    train_with_peft(model, lora(target_modules=modules, modules_to_save=["lm_head"]), tmp_path / "adapter")
    merged_by_peft(model, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    if old_adapter:
        rename_adapter(tmp_path / "adapter", lambda name: name.replace("language_model.", ""))
    found, _, _ = read_all(f"{tmp_path / 'model'}+{tmp_path / 'adapter'}")
    assert same(found, {rename(name): tensor for name, tensor in weights_in(tmp_path / "merged").items()}) == []


def test_a_text_model_on_a_vision_language_model(tmp_path: Path) -> None:
    tf.Qwen2_5_VLForConditionalGeneration(vlm_config()).save_pretrained(tmp_path / "model")
    text = tf.Qwen2ForCausalLM(tf.Qwen2Config(**tiny_models.LLM | {"vocab_size": 80}))
    train_with_peft(text, lora(target_modules=["q_proj"]), tmp_path / "adapter")
    _, _, adapter = read_all(f"{tmp_path / 'model'}+{tmp_path / 'adapter'}")
    assert set(adapter.deltas) == {f"model.layers.{index}.self_attn.q_proj.weight" for index in range(3)}


# Experts


def moe() -> PreTrainedModel:
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(
        **tiny_models.LLM, head_dim=4, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8
    )
    return tf.Qwen3MoeForCausalLM(config)


def single_experts(model: PreTrainedModel, folder: Path, names: dict[str, str], router: str | None = None) -> None:
    """Writes an adapter that has factors for every single expert, as peft did with Transformers 4."""
    torch.manual_seed(2)
    hidden, inner, number = 16, model.config.moe_intermediate_size, model.config.num_experts
    tensors = {}
    for layer in range(model.config.num_hidden_layers):
        shapes = {
            f"model.layers.{layer}.{path.format(expert)}": (hidden, inner) if role == "down" else (inner, hidden)
            for expert in range(number)
            for role, path in names.items()
        }
        if router is not None:
            shapes[f"model.layers.{layer}.{router}"] = (number, hidden)
        for module, (out, into) in shapes.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, into)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, 4)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = sorted({path.rpartition(".")[2] for path in [*names.values(), *([router] if router else [])]})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": leaves, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


QWEN = {role: f"mlp.experts.{{}}.{role}_proj" for role in ("gate", "up", "down")}
MIXTRAL = {"gate": "block_sparse_moe.experts.{}.w1", "down": "block_sparse_moe.experts.{}.w2"}
MIXTRAL |= {"up": "block_sparse_moe.experts.{}.w3"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["fused", "single", "mixtral"])
def test_experts_fused_and_single(tmp_path: Path, adapter: str, dtype: torch.dtype) -> None:
    model = (tiny_models.perturbed("mixtral", 0) if adapter == "mixtral" else moe()).to(dtype)
    if adapter == "fused":
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"]
        more = {"rank_pattern": {r".*\.gate_up_proj": 6}, "alpha_pattern": {r".*\.gate_up_proj": 9}}
        train_with_peft(model, lora(target_modules=["q_proj"], target_parameters=targets, **more), tmp_path / "adapter")
    elif adapter == "single":
        single_experts(model, tmp_path / "adapter", QWEN)
    else:
        model.config.moe_intermediate_size, model.config.num_experts = 24, 3
        single_experts(model, tmp_path / "adapter", MIXTRAL, "block_sparse_moe.gate")
    merged = merged_by_peft(model, tmp_path / "adapter")
    for single in (True, False):
        layout = "single" if single else "fused"
        model.save_pretrained(tmp_path / layout, save_original_format=single)
        merged.save_pretrained(tmp_path / f"merged-{layout}", save_original_format=single)
        assert single == any("experts.2." in name for name in weights_in(tmp_path / layout))
        found, _, _ = read_all(f"{tmp_path / layout}+{tmp_path / 'adapter'}")
        assert same(found, weights_in(tmp_path / f"merged-{layout}")) == []


def test_some_of_the_experts(tmp_path: Path) -> None:
    model = moe()
    model.save_pretrained(tmp_path / "model", save_original_format=False)
    single_experts(model, tmp_path / "adapter", {"up": QWEN["up"]})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if ".layers.1.mlp.experts.2." in name}
    save_file(kept, file)
    found, _, _ = read_all(f"{tmp_path / 'model'}+{tmp_path / 'adapter'}")
    wanted = weights_in(tmp_path / "model")
    down, up = (next(tensor for name, tensor in kept.items() if f"lora_{letter}" in name) for letter in "AB")
    wanted["model.layers.1.mlp.experts.gate_up_proj"][2, 8:] += up @ down * 2
    assert same(found, wanted) == []
    save_file({name: torch.ones(3, 3) for name in kept}, file)
    with pytest.raises(
        LargemergeError, match=r"experts\.2\.up_proj\.weight is \[8, 16\]; A \[3, 3\] and B \[3, 3\] do not"
    ):
        read_all(f"{tmp_path / 'model'}+{tmp_path / 'adapter'}")
