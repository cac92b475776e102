"""Models whose files differ, though they are of one class: other names, layouts, ties, buffers, classes, configs.

What is right is computed from the models as Transformers loads them, whatever their files say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_models
import tiny_models
import torch
import transformers as tf
from cases import report_of, rewrite_weights, weights_in
from data_free_cases import load
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import largemerge
from largemerge import LargemergeError, MergeError
from largemerge.data_free.methods.table import METHODS

Rename = Callable[[str], str]
VL_TEXT = tiny_models.LLM | {
    "num_hidden_layers": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 10000.0},
    "layer_types": ["full_attention"] * 2,
}
VL_VISION = {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "num_heads": 4}
VL_VISION |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16}


def linear(*folders: Path, weights: tuple[float, ...] = (0.7, 0.3), **more: Any) -> dict[str, Any]:
    models = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(folders, weights, strict=True)
    ]
    return {"merge_method": "linear", "models": models, **more}


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_model_with_a_gap_in_its_layers_is_refused_rather_than_left_out(tmp_path: Path, lacking: int) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(folders):
        tiny_models.perturbed("llama", number).save_pretrained(folder)
    rewrite_weights(folders[lacking], lambda tensors: {k: v for k, v in tensors.items() if ".layers.1." not in k})
    with pytest.raises(LargemergeError, match=f"{folders[lacking]}: its files lack 9 tensors of layers that its"):
        largemerge.merge(linear(*folders), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("method", ["linear", "regmean"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_weights_of_whole_numbers_are_refused(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(folders):
        tiny_models.perturbed("llama", number).save_pretrained(folder)
    rewrite_weights(folders[0], lambda tensors: tensors | {"model.norm.weight": torch.ones(16, dtype=dtype)})
    config = linear(*folders) | {"merge_method": method}
    if method == "regmean":
        save_file({"input_ids": torch.ones(4, 8, dtype=torch.int64)}, tmp_path / "data.safetensors")
        config |= {"calibration": {"batch_size": 2}}
        config["models"] = [
            entry | {"calibration": {"data": str(tmp_path / "data.safetensors")}} for entry in config["models"]
        ]
    with pytest.raises(LargemergeError, match=f"model.norm.weight: a weight in {str(dtype).removeprefix('torch.')}"):
        largemerge.merge(config, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def check_average(out: Path, folders: list[Path], build: type[PreTrainedModel], weights: tuple[float, ...]) -> None:
    """Compares the output, as it loads, with the average of the models, as they load."""
    merged = load(out, build).state_dict()
    models = [build.from_pretrained(folder).state_dict() for folder in folders]
    for name, tensor in merged.items():
        expected = sum(weight * model[name].double() for weight, model in zip(weights, models, strict=True))
        assert torch.allclose(tensor.double(), torch.as_tensor(expected), atol=1e-6), name


def body_only(name: str) -> str:
    return name.partition(".")[2] if name.startswith(("transformer.", "model.", "bert.")) else name


def old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def named_anew(name: str) -> str:
    """Names of vision-language models since Transformers 4.52."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def bloom() -> PreTrainedModel:
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4))


def qwen_vl() -> PreTrainedModel:
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = tf.Qwen2_5_VLConfig(text_config=VL_TEXT, vision_config=VL_VISION, tie_word_embeddings=False, **ids)
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def noisy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: architecture.build for name, architecture in tiny_models.ARCHITECTURES.items()},
    "bloom": bloom,
    "qwen_vl": qwen_vl,
}
RENAMED: list[tuple[str, Rename]] = [
    ("gpt2", body_only),
    ("opt", lambda name: name.removeprefix("model.")),
    ("bloom", body_only),
    ("bert", old_norms),
    ("qwen_vl", named_anew),
]


@pytest.mark.parametrize("first", [0, 1], ids=["old names first", "old names last"])
@pytest.mark.parametrize(("architecture", "rename"), RENAMED, ids=[name for name, _ in RENAMED])
def test_other_names_on_disk(tmp_path: Path, architecture: str, rename: Rename, first: int) -> None:
    folders = [tmp_path / "other", tmp_path / "plain"]
    for seed, folder in enumerate(folders):
        noisy(BUILDERS[architecture](), seed).save_pretrained(folder)
    rewrite_weights(folders[0], lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert set(weights_in(folders[0])) != set(weights_in(folders[1])), "the names differ"
    order = folders if first == 0 else folders[::-1]
    largemerge.merge(linear(*order), tmp_path / "out")
    check_average(tmp_path / "out", order, type(BUILDERS[architecture]()), (0.7, 0.3))
    assert set(weights_in(tmp_path / "out")) == set(weights_in(order[0])), "the first one's names"


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("fused_first", [True, False])
def test_experts_that_are_fused_on_disk_beside_single_ones(tmp_path: Path, fused_first: bool, method: str) -> None:
    single, fused = tmp_path / "single", tmp_path / "fused"
    tiny_models.perturbed("mixtral", 1).save_pretrained(single)
    tiny_models.perturbed("mixtral", 2).save_pretrained(fused, save_original_format=False)
    assert any(".experts.0." in name for name in weights_in(single))
    assert not any(".experts.0." in name for name in weights_in(fused))
    order = [fused, single] if fused_first else [single, fused]
    if method == "linear":
        report = largemerge.merge(linear(*order), tmp_path / "out")
        check_average(tmp_path / "out", order, tf.MixtralForCausalLM, (0.7, 0.3))
    else:  # of task vectors, with the base in one layout and the candidate in the other
        config = linear(order[1], weights=(0.5,)) | {"base_model": str(order[0]), "merge_method": "task_arithmetic"}
        report = largemerge.merge(config, tmp_path / "out")
        check_average(tmp_path / "out", [order[0], order[1]], tf.MixtralForCausalLM, (0.5, 0.5))
    assert set(weights_in(tmp_path / "out")) == set(weights_in(order[0])), "the layout of the first one"
    assert any("converted to the layout" in note for note in report.plan.notes)


@pytest.mark.parametrize("body_first", [True, False])
def test_a_body_beside_the_whole_model(tmp_path: Path, body_first: bool) -> None:
    whole, body = tmp_path / "whole", tmp_path / "body"
    tiny_models.perturbed("llama", 1).save_pretrained(whole)
    inner: Any = tiny_models.perturbed("llama", 2)
    inner.model.save_pretrained(body)
    order = [body, whole] if body_first else [whole, body]
    report = largemerge.merge(linear(*order), tmp_path / "out")
    merged = load(tmp_path / "out")
    head = tf.LlamaForCausalLM.from_pretrained(whole).lm_head.weight
    assert torch.equal(merged.get_output_embeddings().weight, head), "only one model has a head: it is taken"
    bodies = [tf.LlamaModel.from_pretrained(folder).state_dict() for folder in order]
    for name, tensor in merged.base_model.state_dict().items():
        assert torch.allclose(tensor, 0.7 * bodies[0][name] + 0.3 * bodies[1][name], atol=1e-6), name
    assert any("lm_head.weight: only" in note for note in report.plan.notes)


@pytest.mark.parametrize("base", ["clip", "tower"])
def test_a_tower_beside_a_whole_clip(tmp_path: Path, base: str) -> None:
    whole: Any = tiny_models.perturbed("clip", 0)
    whole.save_pretrained(tmp_path / "clip")
    towers = []
    for seed in (1, 2):
        tower = tf.CLIPVisionModel.from_pretrained(tmp_path / "clip")
        noisy(tower, seed).save_pretrained(tmp_path / f"tower{seed}")
        towers.append(tf.CLIPVisionModel.from_pretrained(tmp_path / f"tower{seed}").state_dict())
    start = tf.CLIPVisionModel.from_pretrained(tmp_path / "clip")
    start.save_pretrained(tmp_path / "tower")
    folders = (tmp_path / "tower1", tmp_path / "tower2")
    config = linear(*folders, weights=(0.3, 0.4)) | {"merge_method": "task_arithmetic"}
    largemerge.merge(config | {"base_model": str(tmp_path / base)}, tmp_path / "out")
    merged = load(tmp_path / "out", tf.CLIPModel if base == "clip" else tf.CLIPVisionModel)
    found = merged.vision_model.state_dict() if base == "clip" else merged.state_dict()
    for name, origin in start.state_dict().items():
        expected = origin + 0.3 * (towers[0][name] - origin) + 0.4 * (towers[1][name] - origin)
        assert torch.allclose(found[name], expected, atol=1e-6), name
    if base == "clip":
        assert torch.equal(merged.text_projection.weight, whole.text_projection.weight), "the rest is the base's"


@pytest.fixture(scope="module")
def text_and_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model, an expert of it, and two vision-language models whose language part was the text model, too."""
    folder = tmp_path_factory.mktemp("text-and-vision")
    text: Any = tiny_models.perturbed("llama", 0)
    text.save_pretrained(folder / "base")
    noisy(tf.LlamaForCausalLM.from_pretrained(folder / "base"), 1).save_pretrained(folder / "expert")
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    for seed in (2, 3):
        whole: Any = tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=text.config, vision_config=vision))
        whole.model.language_model.load_state_dict(text.model.state_dict())
        whole.lm_head.load_state_dict(text.lm_head.state_dict())
        noisy(whole, seed).save_pretrained(folder / f"whole{seed}")
    return folder


@pytest.mark.parametrize("models", [("whole2", "expert"), ("expert", "whole2"), ("whole2", "expert", "whole3")])
@pytest.mark.parametrize(
    "method",
    [
        "task_arithmetic",
        "tsv_m",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ties", "model_stock", "karcher")),
    ],
)
def test_a_text_expert_goes_into_the_language_part_of_a_vision_language_model(
    text_and_vision: Path, tmp_path: Path, method: str, models: tuple[str, ...]
) -> None:
    folder = text_and_vision
    entries: list[dict[str, Any]] = [{"model": str(folder / name)} for name in models]
    if method in ("task_arithmetic", "ties"):
        entries = [entry | {"parameters": {"weight": 0.5}} for entry in entries]
    config = {"merge_method": method, "base_model": str(folder / "base"), "models": entries}
    largemerge.merge(config, tmp_path / "out")
    found, missing = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(missing.values()), "it loads with every tensor in its place"
    wholes = [tf.LlavaForConditionalGeneration.from_pretrained(folder / name) for name in models if "whole" in name]
    for name in ("model.vision_tower", "model.multi_modal_projector"):
        own = [whole.get_submodule(name).state_dict() for whole in wholes]
        for key, tensor in found.get_submodule(name).state_dict().items():
            torch.testing.assert_close(tensor, torch.stack([each[key] for each in own]).mean(0))
    base, expert = (tf.LlamaForCausalLM.from_pretrained(folder / name) for name in ("base", "expert"))
    languages = [*(whole.model.language_model for whole in wholes), expert.model]
    for key, origin in base.model.state_dict().items():
        tensor = found.model.language_model.state_dict()[key]
        own = [language.state_dict()[key] for language in languages]
        assert all(not torch.equal(tensor, each) for each in (origin, *own)), f"{key}: nothing was merged"
        if method == "task_arithmetic":
            torch.testing.assert_close(tensor, origin + 0.5 * sum(each - origin for each in own))
    told = " ".join(report_of(tmp_path / "out")["plan"]["notes"])
    assert ("their weighted mean" if len(wholes) > 1 else "and it is copied") in told


def test_a_model_that_is_only_measured_from_does_not_count_as_lacking_a_stack(
    text_and_vision: Path, tmp_path: Path
) -> None:
    """Of passthrough and linear, the base of `post` is not merged: what it lacks is merged all the same."""
    folder = text_and_vision
    config = {
        "merge_method": "passthrough",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "whole2"), "parameters": {"scale": 0.5}}],
        "post": [{"rescale": {"match_norm": False, "factor": 1.5}}],
    }
    largemerge.merge(config, tmp_path / "out")
    found, whole = weights_in(tmp_path / "out"), weights_in(folder / "whole2")
    vision = [name for name in found if "language_model" not in name and found[name].is_floating_point()]
    assert any(".layers." in name for name in vision)
    assert all(torch.allclose(found[name], 0.5 * whole[name]) for name in vision)


def test_ip_merging_teaches_a_vision_language_model_what_a_text_expert_knows(
    text_and_vision: Path, tmp_path: Path
) -> None:
    folder = text_and_vision
    entries = [{"model": str(folder / name)} for name in ("whole2", "expert")]
    parameters = {"threshold": 0.05, "temperature": 2}
    config = {"merge_method": "ip_merging", "base_model": str(folder / "base"), "parameters": parameters}
    largemerge.merge(config | {"models": entries}, tmp_path / "out")
    found, whole = weights_in(tmp_path / "out"), weights_in(folder / "whole2")
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, whole[name])}
    assert changed and all("language_model" in name and "_proj" in name for name in changed)
    load(tmp_path / "out", tf.LlavaForConditionalGeneration)
    of_whole = config | {"base_model": str(folder / "whole3"), "models": entries}
    largemerge.merge(of_whole, tmp_path / "of-whole")
    for name, tensor in weights_in(tmp_path / "of-whole").items():
        assert "language_model" in name or torch.equal(tensor, whole[name]), f"{name}: the first model's own"
    with pytest.raises(LargemergeError, match=r"which lacks .* of .*whole2; expected the model that is to learn first"):
        largemerge.merge(config | {"models": entries[::-1]}, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


BUFFERS: list[tuple[str, dict[str, torch.Tensor]]] = [
    ("llama", {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.arange(2.0) for layer in range(3)}),
    ("bert", {"bert.embeddings.position_ids": torch.arange(64)[None]}),
    ("clip", {"vision_model.embeddings.position_ids": torch.arange(10)[None]}),
]


@pytest.mark.parametrize("first", [0, 1], ids=["with them first", "with them last"])
@pytest.mark.parametrize(("architecture", "buffers"), BUFFERS, ids=[name for name, _ in BUFFERS])
def test_buffers_that_older_files_hold(
    tmp_path: Path, architecture: str, buffers: dict[str, torch.Tensor], first: int
) -> None:
    folders = [tmp_path / "old", tmp_path / "new"]
    for seed, folder in enumerate(folders):
        tiny_models.perturbed(architecture, seed).save_pretrained(folder)
    rewrite_weights(folders[0], lambda tensors: tensors | buffers)
    order = folders if first == 0 else folders[::-1]
    report = largemerge.merge(linear(*order), tmp_path / "out")
    check_average(tmp_path / "out", order, type(tiny_models.build(architecture)), (0.7, 0.3))
    assert not set(buffers) & set(weights_in(tmp_path / "out")), "the class makes them itself"
    assert any(next(iter(buffers)).rpartition(".")[2] in note for note in report.plan.notes), "and the plan says so"


# Ties


def write_tied(folder: Path) -> tuple[Path, Path, Path]:
    """A tied base, a tied fine-tune, and one with a head of its own."""
    base, tied, untied = folder / "base", folder / "tied", folder / "untied"
    tiny_models.build("llama_tied").save_pretrained(base)
    tiny_models.perturbed("llama_tied", 1).save_pretrained(tied)
    tiny_models.perturbed("llama", 2).save_pretrained(untied)
    return base, tied, untied


@pytest.mark.parametrize("order", ["tied untied", "untied tied", "base"])
def test_a_head_of_its_own_beside_tied_models(tmp_path: Path, order: str) -> None:
    base, tied, untied = write_tied(tmp_path)
    if order == "base":
        config = linear(tied, untied, weights=(0.5, 0.5)) | {"merge_method": "task_arithmetic", "base_model": str(base)}
    else:
        config = linear(*(tmp_path / name for name in order.split()), weights=(0.5, 0.5))
    largemerge.merge(config, tmp_path / "out")
    merged = load(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["tie_word_embeddings"] is False and "lm_head.weight" in weights_in(tmp_path / "out")
    mean = {name: 0.5 * tensor + 0.5 * weights_in(untied)[name] for name, tensor in weights_in(tied).items()}
    head = 0.5 * weights_in(tied)["model.embed_tokens.weight"] + 0.5 * weights_in(untied)["lm_head.weight"]
    assert torch.allclose(merged.get_output_embeddings().weight, head, atol=1e-6)
    assert torch.allclose(merged.get_input_embeddings().weight, mean["model.embed_tokens.weight"], atol=1e-6)


def test_a_stored_head_that_is_the_same_stays_tied(tmp_path: Path) -> None:
    _, tied, _ = write_tied(tmp_path)
    other = tmp_path / "both"
    tiny_models.perturbed("llama_tied", 3).save_pretrained(other)
    rewrite_weights(other, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    for order in ([tied, other], [other, tied]):
        largemerge.merge(linear(*order), tmp_path / "out", force=True)
        check_average(tmp_path / "out", order, tf.LlamaForCausalLM, (0.7, 0.3))
        assert "lm_head.weight" not in weights_in(tmp_path / "out"), "written once"


def test_a_head_that_was_trained_though_the_config_says_tied(tmp_path: Path) -> None:
    _, tied, untied = write_tied(tmp_path)
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    largemerge.merge(linear(tied, untied), tmp_path / "out")
    merged = load(tmp_path / "out")
    head = 0.7 * weights_in(tied)["model.embed_tokens.weight"] + 0.3 * weights_in(untied)["lm_head.weight"]
    assert torch.allclose(merged.get_output_embeddings().weight, head, atol=1e-6)


# Configs


def llama(folder: Path, seed: int, **more: Any) -> Path:
    noisy(tf.LlamaForCausalLM(tf.LlamaConfig(**tiny_models.LLM | more)), seed).save_pretrained(folder)
    return folder


CRIMES: dict[str, Callable[[Path], object]] = {
    "num_attention_heads is 4": lambda folder: llama(folder, 2, num_attention_heads=8, num_key_value_heads=4),
    "hidden_act is 'silu'": lambda folder: llama(folder, 2, hidden_act="gelu"),
    "a 'mistral' model is": lambda folder: tf.MistralForCausalLM(tf.MistralConfig(**tiny_models.LLM)).save_pretrained(
        folder
    ),
}


@pytest.mark.parametrize("told", CRIMES)
def test_models_that_compute_otherwise_are_refused_unless_allowed(tmp_path: Path, told: str) -> None:
    a, b = llama(tmp_path / "a", 1), tmp_path / "b"
    CRIMES[told](b)
    with pytest.raises(LargemergeError, match=f"{told}.*allow_crimes"):
        largemerge.merge(linear(a, b), tmp_path / "out")
    report = largemerge.merge(linear(a, b, allow_crimes=True), tmp_path / "out")
    assert any(note.startswith("warning: ") and told in note for note in report.plan.notes)


def test_other_positions_are_a_note(tmp_path: Path) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    a, b = llama(tmp_path / "a", 1), llama(tmp_path / "b", 2, max_position_embeddings=128, rms_norm_eps=1e-5, **rope)
    notes = largemerge.plan(linear(a, b), probe=False).notes
    for key in ("rope_theta", "max_position_embeddings", "rms_norm_eps"):
        assert any(key in note and f"the output takes {a}'s" in note for note in notes), key


def test_labels_in_another_order_are_kept_apart(tmp_path: Path) -> None:
    folders = []
    for seed, labels in enumerate(({0: "no", 1: "yes"}, {0: "yes", 1: "no"})):
        config = tf.BertConfig(**tiny_models.TEXT, intermediate_size=24, id2label=labels)
        folders.append(tmp_path / f"m{seed}")
        noisy(tf.BertForSequenceClassification(config), seed).save_pretrained(folders[-1])
    report = largemerge.merge(linear(*folders), tmp_path / "out")
    load(tmp_path / "out", tf.BertModel)
    assert "the labels of m0 are no, yes, those of m1 yes, no" in report.plan.to_json()["heads"]["reason"]


# Each entry is its own


def test_one_model_twice_has_both_weights(tmp_path: Path) -> None:
    a, b = llama(tmp_path / "a", 1), llama(tmp_path / "b", 2)
    largemerge.merge(linear(a, b, a, weights=(0.2, 0.5, 0.3)), tmp_path / "out")
    check_average(tmp_path / "out", [a, b], tf.LlamaForCausalLM, (0.5, 0.5))


def test_two_layers_of_one_model_in_one_slice(tmp_path: Path) -> None:
    a = llama(tmp_path / "a", 1)
    mixed = [
        {"model": str(a), "layer_range": [0, 1], "parameters": {"weight": 0.2}},
        {"model": str(a), "layer_range": [2, 3], "parameters": {"weight": 0.8}},
    ]
    slices = [{"sources": [{"model": str(a), "layer_range": [0, 2]}]}, {"sources": mixed}]
    config = {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1.0}}
    largemerge.merge(config, tmp_path / "out")
    load(tmp_path / "out")
    own, merged = weights_in(a), weights_in(tmp_path / "out")
    for rest in ("mlp.up_proj.weight", "input_layernorm.weight"):
        expected = 0.2 * own[f"model.layers.0.{rest}"] + 0.8 * own[f"model.layers.2.{rest}"]
        assert torch.allclose(merged[f"model.layers.2.{rest}"], expected, atol=1e-6)


def test_a_base_alone_is_a_merge_of_nothing(tmp_path: Path) -> None:
    a = llama(tmp_path / "a", 1)
    report = largemerge.merge({"merge_method": "task_arithmetic", "base_model": str(a)}, tmp_path / "out")
    assert weights_in(tmp_path / "out").keys() == weights_in(a).keys()
    assert all(torch.equal(tensor, weights_in(a)[name]) for name, tensor in weights_in(tmp_path / "out").items())
    assert {task.copied for task in report.plan.tasks} == {"nothing is merged into the base"}


# What only some have


def test_tensors_that_a_layer_lacks_are_refused_by_name(tmp_path: Path) -> None:
    a, b = llama(tmp_path / "a", 1), llama(tmp_path / "b", 2, attention_bias=True)
    with pytest.raises(LargemergeError, match=r"model\.layers\.\*\.self_attn\.q_proj\.bias"):
        largemerge.merge(linear(a, b), tmp_path / "out")


def test_a_head_that_the_base_lacks_is_averaged_and_told(tmp_path: Path) -> None:
    config = tf.BertConfig(**tiny_models.TEXT, intermediate_size=24, num_labels=3)
    base: Any = noisy(tf.BertModel(config), 0)
    base.save_pretrained(tmp_path / "base")
    folders = []
    for seed in (1, 2):
        folders.append(tmp_path / f"m{seed}")
        noisy(tf.BertForSequenceClassification(config), seed).save_pretrained(folders[-1])
    config_ = linear(*folders, weights=(0.2, 0.6)) | {"merge_method": "ties", "base_model": str(tmp_path / "base")}
    report = largemerge.merge(config_, tmp_path / "out")
    merged = load(tmp_path / "out", tf.BertForSequenceClassification)
    heads = [weights_in(folder)["classifier.weight"] for folder in folders]
    assert torch.allclose(merged.classifier.weight, 0.25 * heads[0] + 0.75 * heads[1], atol=1e-6)
    assert any("classifier.weight" in note and "weighted mean" in note for note in report.plan.notes)
    assert report_of(tmp_path / "out")["plan"]["class"] == "BertForSequenceClassification"


@pytest.mark.parametrize("method", ["ties", "dare_ties", "tsv_m", "model_stock"])
def test_tensors_without_elements_are_copied(tmp_path: Path, method: str) -> None:
    folders = [llama(tmp_path / name, seed) for seed, name in enumerate(["base", "a", "b"])]
    for folder in folders:
        rewrite_weights(folder, lambda tensors: tensors | {"model.norm.empty": torch.empty(0, 4)})
    config = linear(*folders[1:]) | {"merge_method": method, "base_model": str(folders[0])}
    if method in ("tsv_m", "model_stock"):
        config["models"] = [{"model": entry["model"]} for entry in config["models"]]
    largemerge.merge(config, tmp_path / "out")
    assert weights_in(tmp_path / "out")["model.norm.empty"].shape == (0, 4)


# Where no class can be had


def test_custom_code_is_matched_by_name(tmp_path: Path) -> None:
    folders = [llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.Config"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text("raise SystemExit('this code must not run')")
    report = largemerge.merge(linear(*folders), tmp_path / "out")
    assert any("matched by their names on disk" in note for note in report.plan.notes)
    merged, a, b = (weights_in(folder) for folder in (tmp_path / "out", *folders))
    assert all(torch.allclose(merged[name], 0.7 * a[name] + 0.3 * b[name], atol=1e-6) for name in a)


# What is in the output


def test_the_report_says_how_much_of_each_model_is_left(tmp_path: Path) -> None:
    base, a, b = (tiny_models.perturbed("llama", seed) for seed in range(3))
    for name, model in (("base", base), ("a", a), ("b", b)):
        model.save_pretrained(tmp_path / name)
    config = linear(tmp_path / "a", tmp_path / "b", weights=(0.9, 0.2))
    config |= {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    largemerge.merge(config, tmp_path / "out")
    told = report_of(tmp_path / "out")["verified"]
    states = [model.state_dict() for model in (base, a, b)]
    prefix = "model.layers.1."
    deltas = [
        torch.cat([(state[name] - states[0][name]).flatten() for name in state if name.startswith(prefix)])
        for state in states[1:]
    ]
    merged = 0.9 * deltas[0] + 0.2 * deltas[1]
    for name, delta in zip(("a", "b"), deltas, strict=True):
        expected = torch.cosine_similarity(delta, merged, dim=0).item()
        found = told["candidates"][str(tmp_path / name)]["by_block"]["model.layers.1"]["cosine"]
        assert abs(found - expected) < 1e-3, name
    largemerge.merge(config, tmp_path / "out2", verify=False)
    assert "verified" not in report_of(tmp_path / "out2")


@pytest.mark.parametrize(("value", "found"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_what_is_not_finite_is_refused_with_model_and_tensor(tmp_path: Path, value: float, found: str) -> None:
    a, b = llama(tmp_path / "a", 1), llama(tmp_path / "b", 2)

    def broken(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.norm.weight"][3] = value
        return tensors

    rewrite_weights(b, broken)
    with pytest.raises(MergeError, match=f"model.norm.weight: linear: .*{found}: .*b holds {found} in model.norm"):
        largemerge.merge(linear(a, b), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def put_number(folder: Path, key: str, value: float) -> None:
    """Replaces one element of a checkpoint's matrix."""

    def replaced(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[key][1, 2] = value
        return tensors

    rewrite_weights(folder, replaced)


@pytest.mark.parametrize(("step", "where"), [("subspace_boosting", "models"), ("svc", "models"), ("svc", "candidates")])
def test_steps_after_a_merge_hide_nothing_that_is_not_finite(tmp_path: Path, step: str, where: str) -> None:
    folders = [llama(tmp_path / name, seed) for seed, name in enumerate("abc")]
    key = "model.layers.0.mlp.up_proj.weight"
    put_number(folders[1], key, float("nan"))
    other = {"models": folders[2:], "candidates": folders[2:]} | {where: folders[1:]}
    config = {"merge_method": "linear", "base_model": str(folders[0]), "post": [step]}
    config["models"] = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in other["models"]]
    config["candidates"] = [str(folder) for folder in other["candidates"]]
    with pytest.raises(MergeError, match=rf"{re.escape(key)}: .*b holds NaN in {re.escape(key)}"):
        largemerge.merge(config, tmp_path / "out")


@pytest.mark.parametrize(
    "method", [name for name, row in METHODS.items() if row.chooses_elements or row.matrix_formula is not None]
)
def test_methods_that_choose_or_factor_leave_nothing_out_unnoticed(tmp_path: Path, method: str) -> None:
    folders = [llama(tmp_path / name, seed) for seed, name in enumerate("abc")]
    key = "model.layers.0.mlp.up_proj.weight"
    put_number(folders[1], key, float("inf"))
    row = METHODS[method]
    given = {name: 0.5 for name in ("weight", "density") if name in row.per_model}
    models = [{"model": str(folder), "parameters": given} for folder in folders[1:]]
    config = {"merge_method": method, "models": models, "base_model": str(folders[0])}
    with pytest.raises(MergeError, match=rf"{re.escape(key)}: .*b holds infinity in {re.escape(key)}"):
        largemerge.merge(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("stored", "value", "more", "told"),
    [
        (torch.float64, 1e300, {}, "a's model.norm.weight goes up to 5e+299, more than float32 holds, in which models"),
        (torch.float64, -1e300, {}, "a's model.norm.weight goes up to 5e+299, more than float32 holds, in which"),
        (torch.float64, 1e300, {"out_dtype": "float16"}, "goes up to 5e+299, more than float32 holds, in which models"),
        (torch.float32, 1e6, {"out_dtype": "float16"}, "more than float16 holds; set out_dtype: bfloat16 or float32"),
        (torch.float32, 1e6, {"dtype": "float16"}, "more than float16 holds; set dtype: bfloat16 or float32"),
        (torch.float32, 3e38, {}, "finite numbers there, up to 3e+38; what is computed of them overflows: look at the"),
        (
            torch.float16,
            6e4,
            {},
            "overflows: look at the parameters (weight [2.0, 2.0], normalize False), or set a dtype",
        ),
    ],
)
def test_what_overflows_is_told_by_where_it_does(
    tmp_path: Path, stored: torch.dtype, value: float, more: dict[str, Any], told: str
) -> None:
    folders = [llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for number, folder in enumerate(folders):

        def large(tensors: dict[str, torch.Tensor], is_last: bool = number == 1) -> dict[str, torch.Tensor]:
            made = {name: tensor.to(stored) for name, tensor in tensors.items()}
            made["model.norm.weight"][3] = value if is_last else value / 2
            return made

        rewrite_weights(folder, large)
    config = linear(*folders, weights=(2.0, 2.0)) | {"parameters": {"normalize": False}} | more
    with pytest.raises(MergeError) as caught:
        largemerge.merge(config, tmp_path / "out")
    assert told in str(caught.value) and "inf," not in str(caught.value)


# Heads that cannot be merged


def write_classifiers(folder: Path) -> tuple[Any, list[Path]]:
    """A BERT for masked tokens, and fine-tunes of it with two and with three labels."""
    sizes = tiny_models.TEXT | {"intermediate_size": 24, "max_position_embeddings": 64}
    base: Any = noisy(tf.BertForMaskedLM(tf.BertConfig(**sizes)), 0)
    base.save_pretrained(folder / "base")
    folders = []
    for number, labels in enumerate((2, 3), start=1):
        model: Any = tf.BertForSequenceClassification(tf.BertConfig(**sizes, num_labels=labels))
        model.bert.load_state_dict(base.bert.state_dict(), strict=False)
        noisy(model, number).save_pretrained(folder / f"m{number}")
        folders.append(folder / f"m{number}")
    return base, folders


@pytest.mark.parametrize("head", [None, "m2"])
def test_heads_of_other_sizes_lie_beside_the_merged_body(tmp_path: Path, head: str | None) -> None:
    base, folders = write_classifiers(tmp_path)
    config = linear(*folders, weights=(0.4, 0.3)) | {"merge_method": "task_arithmetic"}
    config |= {"base_model": str(tmp_path / "base")} | ({"head": head} if head else {})
    report = largemerge.merge(config, tmp_path / "out")
    models = [tf.BertForSequenceClassification.from_pretrained(folder) for folder in folders]
    if head is None:
        merged: Any = load(tmp_path / "out", tf.BertModel)
        body = merged.state_dict()
    else:
        merged = load(tmp_path / "out", tf.BertForSequenceClassification)
        body = merged.bert.state_dict()
        assert torch.equal(merged.classifier.weight, models[1].classifier.weight) and merged.config.num_labels == 3
    for name, origin in base.bert.state_dict().items():
        expected = origin + sum(
            w * (m.bert.state_dict()[name] - origin) for w, m in zip((0.4, 0.3), models, strict=True)
        )
        assert torch.allclose(body[name], expected, atol=1e-6), name
    for number, model in enumerate(models, start=1):
        kept = load_file(tmp_path / "out" / "heads" / f"m{number}.safetensors")
        assert torch.equal(kept["classifier.weight"], model.classifier.weight)
    told = report.plan.to_json()["heads"]
    assert told["in_the_model"] == (head or "none") and set(told["beside_it"]) == {"m1", "m2"}
    assert "heads/m1.safetensors" in (tmp_path / "out" / "README.md").read_text()


def test_a_body_that_holds_another_model_is_a_body(tmp_path: Path) -> None:
    sizes: dict[str, Any] = tiny_models.TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
    base: Any = noisy(tf.OPTForCausalLM(tf.OPTConfig(**sizes, pad_token_id=0)), 0)
    base.save_pretrained(tmp_path / "base")
    folders = []
    for number, labels in enumerate((2, 3), start=1):
        folders.append(tmp_path / f"m{number}")
        config = tf.OPTConfig(**sizes, pad_token_id=0, num_labels=labels)
        noisy(tf.OPTForSequenceClassification(config), number).save_pretrained(folders[-1])
    for more in ({}, {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}):
        largemerge.merge(linear(*folders, weights=(0.4, 0.6)) | more, tmp_path / "out", force=True)
        merged = load(tmp_path / "out", tf.OPTModel).state_dict()
        bodies = [tf.OPTModel.from_pretrained(folder).state_dict() for folder in folders]
        for name, tensor in merged.items():
            assert torch.allclose(tensor, 0.4 * bodies[0][name] + 0.6 * bodies[1][name], atol=1e-5), name


def test_a_model_of_which_nothing_would_be_in_the_output_is_refused(tmp_path: Path) -> None:
    a, b = llama(tmp_path / "a", 1), llama(tmp_path / "b", 2)
    rewrite_weights(b, lambda tensors: {f"strange.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(LargemergeError, match=r"b: its files lack .* of other names: strange\."):
        largemerge.merge(linear(a, b), tmp_path / "out")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize(
    "lost", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_every_model_has_what_its_own_class_needs(tmp_path: Path, which: str, lost: str) -> None:
    a, b = llama(tmp_path / "a", 1), llama(tmp_path / "b", 2)
    rewrite_weights(tmp_path / which, lambda tensors: {k: v for k, v in tensors.items() if k != lost})
    with pytest.raises(LargemergeError) as caught:
        largemerge.plan(linear(a, b))
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / which}: its files lack 1 tensor") and lost in told, told


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 4}, "lack 9 tensors of layers that its config.json counts: model.layers.3."),
        ({"num_hidden_layers": 1}, "hold 18 tensors of more layers than its config.json counts: model.layers.1."),
        ({"vocab_size": 60}, "model.embed_tokens.weight is [64, 16] in its files, and [60, 16] by its config.json"),
        ({"intermediate_size": 28}, "in its files, and [28, 16] by its config.json"),
    ],
)
def test_every_model_is_as_its_own_config_says(tmp_path: Path, which: str, changes: dict[str, Any], told: str) -> None:
    a, b = llama(tmp_path / "a", 1), llama(tmp_path / "b", 2)
    edit_config(tmp_path / which, **changes)
    with pytest.raises(LargemergeError) as caught:
        largemerge.plan(linear(a, b))
    assert f"{tmp_path / which}: " in str(caught.value) and told in str(caught.value)


def test_models_of_other_depths_are_told_so(tmp_path: Path) -> None:
    a, b = llama(tmp_path / "a", 1), llama(tmp_path / "b", 2, num_hidden_layers=2)
    with pytest.raises(LargemergeError, match=r"model\.layers: models have unlike numbers of layers"):
        largemerge.merge(linear(a, b), tmp_path / "out")


# Vocabularies without settings


def with_tokenizer(folder: Path, seed: int, rows: int, words: str) -> Path:
    tokens = {token: number for number, token in enumerate(["<unk>", *words.split()])}
    tokenizer = Tokenizer(WordLevel(tokens, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return llama(folder, seed, vocab_size=rows)


def test_rows_of_padding_are_matched_by_number(tmp_path: Path) -> None:
    a = with_tokenizer(tmp_path / "a", 1, 16, "a b c d e")
    b = with_tokenizer(tmp_path / "b", 2, 24, "a b c d e")
    for order, weights in (([a, b], (0.7, 0.3)), ([b, a], (0.3, 0.7))):
        report = largemerge.merge(linear(*order, weights=weights), tmp_path / "out", force=True)
        merged = load(tmp_path / "out")
        rows = 16 if order[0] == a else 24
        found = merged.get_input_embeddings().weight
        own = [weights_in(folder)["model.embed_tokens.weight"] for folder in (a, b)]
        assert found.shape[0] == rows == merged.config.vocab_size
        assert torch.allclose(found[:16], 0.7 * own[0] + 0.3 * own[1][:16], atol=1e-6)
        assert any("padding" in note for note in report.plan.notes)


def test_a_token_without_a_row_is_no_padding(tmp_path: Path) -> None:
    a = with_tokenizer(tmp_path / "a", 1, 16, "a b c d e")
    b = with_tokenizer(tmp_path / "b", 2, 5, "a b c d e")
    for order in ([a, b], [b, a]):
        (problem, *_) = largemerge.plan(linear(*order), probe=False).problems
        assert "model.embed_tokens.weight: shapes differ" in problem and "[5, 16]" in problem


def test_other_tokens_at_the_same_numbers_are_told(tmp_path: Path) -> None:
    a = with_tokenizer(tmp_path / "a", 1, 16, "a b c d e")
    b = with_tokenizer(tmp_path / "b", 2, 16, "a c b d e")
    notes = largemerge.plan(linear(a, b), probe=False).notes
    assert any("2 numbers are other tokens" in note and "tokenizer_source" in note for note in notes)


def vit(folder: Path, seed: int, **more: Any) -> Path:
    config = tf.ViTConfig(**tiny_models.VISION, **more)
    noisy(tf.ViTForImageClassification(config), seed).save_pretrained(folder)
    return folder


def test_a_pooler_that_no_model_has_is_written_as_the_class_makes_it(tmp_path: Path) -> None:
    a, b = vit(tmp_path / "a", 1, num_labels=3), vit(tmp_path / "b", 2, num_labels=4)
    report = largemerge.merge(linear(a, b), tmp_path / "out")
    merged: Any = load(tmp_path / "out", tf.ViTModel)
    assert torch.isfinite(merged.pooler.dense.weight).all() and merged.pooler.dense.weight.abs().sum() > 0
    assert any("pooler.dense.weight" in note and "not trained" in note for note in report.plan.notes)
    largemerge.merge(linear(a, b), tmp_path / "again")
    again: Any = load(tmp_path / "again", tf.ViTModel)
    assert torch.equal(again.pooler.dense.weight, merged.pooler.dense.weight)


@pytest.mark.parametrize("head", [None, "base", "b", "none"])
def test_labels_that_differ_beside_a_base(tmp_path: Path, head: str | None) -> None:
    labels = [{0: "cat", 1: "dog"}, {0: "cat", 1: "dog"}, {0: "dog", 1: "cat"}]
    base, a, b = (vit(tmp_path / name, seed, id2label=labels[seed]) for seed, name in enumerate(["base", "a", "b"]))
    config = (
        linear(a, b) | {"merge_method": "task_arithmetic", "base_model": str(base)} | ({"head": head} if head else {})
    )
    report = largemerge.merge(config, tmp_path / "out")
    merged: Any = load(tmp_path / "out", tf.ViTModel if head == "none" else tf.ViTForImageClassification)
    if head != "none":
        expected = tf.ViTForImageClassification.from_pretrained(b if head == "b" else base)
        assert torch.equal(merged.classifier.weight, expected.classifier.weight)
        assert merged.config.id2label == expected.config.id2label
    assert not any("only" in note and "classifier" in note for note in report.plan.notes)


def test_a_base_that_is_a_candidate_too(tmp_path: Path) -> None:
    a, b = vit(tmp_path / "a", 1, num_labels=3), vit(tmp_path / "b", 2, num_labels=4)
    config = linear(a, b) | {"merge_method": "task_arithmetic", "base_model": str(a)}
    report = largemerge.merge(config, tmp_path / "out")
    assert report.plan.to_json()["heads"]["beside_it"].keys() == {"a", "b"}


def test_quantised_conv1d_lies_as_a_linear_and_is_merged_as_conv1d(tmp_path: Path) -> None:
    folders, plain = [], []
    for seed, kind in enumerate(("nf4", "int8")):
        folders.append(tmp_path / f"m{seed}")
        quantized_models.wide("gpt2", seed).save_pretrained(folders[-1])
        quantized_models.quantize_folder(folders[-1], kind)
        plain.append(quantized_models.plain_copy(folders[-1], tmp_path / f"plain{seed}"))
    largemerge.merge(linear(*folders), tmp_path / "out")
    largemerge.merge(linear(*plain), tmp_path / "expected")
    load(tmp_path / "out", tf.GPT2LMHeadModel)
    merged, expected = weights_in(tmp_path / "out"), weights_in(tmp_path / "expected")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
