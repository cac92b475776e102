"""Layers taken out, put in another order or taken twice: the config follows, or the merge is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel

import largemerge
from largemerge import LargemergeError
from largemerge.checkpoint.index import Checkpoint, open_checkpoint
from largemerge.data_free.layer_config import LayerConfig, depths, follow_layers

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
COMMON |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
COMMON |= {"eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION |= {"image_size": 12, "patch_size": 4}
HALVES = {"d_model": 16, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4, "vocab_size": 64}
HALVES |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}

UP, CUT = [0, 1, 2, 3, 2, 3, 4, 5], [0, 1, 2, 4, 5]
FULL, SLIDING, LINEAR, CHUNKED = (f"{kind}_attention" for kind in ("full", "sliding", "linear", "chunked"))

Build = Callable[[], PreTrainedModel]
MODELS: dict[str, Build] = {
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **COMMON | {"num_key_value_heads": 4},
            **EXPERTS,
            **LATENT,
            n_routed_experts=4,
            first_k_dense_replace=2,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
        )
    ),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(
            **COMMON,
            attn_layer_period=3,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            use_mamba_kernels=False,
            mamba_d_state=8,
            mamba_dt_rank=4,
        )
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**COMMON, head_dim=4, sliding_window=8, sliding_window_pattern=3)
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**COMMON, head_dim=4, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    ),
    "qwen3_next": lambda: tf.Qwen3NextForCausalLM(
        tf.Qwen3NextConfig(
            **COMMON,
            **EXPERTS,
            head_dim=4,
            num_experts=4,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
            layer_types=[LINEAR, LINEAR, FULL] * 2,
        )
    ),
    "falcon_h1": lambda: tf.FalconH1ForCausalLM(tf.FalconH1Config(**COMMON, **MAMBA, mamba_d_ssm=32)),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **COMMON,
            head_dim=4,
            num_local_experts=4,
            intermediate_size_mlp=24,
            interleave_moe_layer_step=2,
            attention_chunk_size=8,
            no_rope_layer_interval=3,
        )
    ),
    "qwen2": lambda: tf.Qwen2ForCausalLM(
        tf.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=8, max_window_layers=4)
    ),
    "granite_hybrid": lambda: tf.GraniteMoeHybridForCausalLM(
        tf.GraniteMoeHybridConfig(
            **COMMON,
            **MAMBA,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=16,
            layer_types=["mamba", "attention", "mamba"] * 2,
        )
    ),
    "lfm2": lambda: tf.Lfm2ForCausalLM(tf.Lfm2Config(**COMMON, layer_types=["conv", FULL, "conv"] * 2)),
    "smollm3": lambda: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**COMMON, no_rope_layer_interval=3)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**COMMON)),
    "cohere2": lambda: tf.Cohere2ForCausalLM(tf.Cohere2Config(**COMMON, sliding_window=8, sliding_window_pattern=3)),
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=64,
            hidden_size=16,
            num_layers=6,
            num_heads=4,
            attention_types=[[["global", "local"], 3]],
            max_position_embeddings=64,
            intermediate_size=24,
        )
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=6, n_head=4, n_positions=32)),
    "bamba": lambda: tf.BambaForCausalLM(tf.BambaConfig(**COMMON, **MAMBA, attn_layer_indices=[1, 4])),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**COMMON, **EXPERTS, num_experts=4, decoder_sparse_step=2, shared_expert_intermediate_size=16)
    ),
    "ernie4_5_moe": lambda: tf.Ernie4_5_MoeForCausalLM(
        tf.Ernie4_5_MoeConfig(
            **COMMON,
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=16,
            moe_layer_start_index=1,
            moe_layer_end_index=4,
            moe_layer_interval=1,
        )
    ),
    "nemotron_h": lambda: tf.NemotronHForCausalLM(
        tf.NemotronHConfig(
            vocab_size=64,
            hidden_size=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            intermediate_size=24,
            layers_block_type=["mamba", "mlp", "attention"] * 2,
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=4,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**HALVES, max_position_embeddings=64)),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(text_config=COMMON | {"num_hidden_layers": 4}, vision_config=VISION, projection_dim=8)
    ),
    "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**VISION, mlp_ratio=2)),
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=tf.LlamaConfig(**COMMON), vision_config=tf.CLIPVisionConfig(**VISION), vision_feature_layer=2
        )
    ),
    "diff_llama": lambda: tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**COMMON)),
}


def saved(folder: Path, name: str, model: PreTrainedModel | None = None) -> Checkpoint:
    torch.manual_seed(0)
    (model or MODELS[name]()).save_pretrained(folder / name)
    return open_checkpoint(folder / name, name)


def follow(checkpoint: Checkpoint, **orders: list[int]) -> LayerConfig:
    """Follows new orders of some stacks, named by the ends of their names; the others stay."""
    layers = {stack: list(range(depth)) for stack, depth in depths(checkpoint).items()}
    for end, order in orders.items():
        (stack,) = (stack for stack in layers if stack.replace(".", "_").endswith(end))
        layers[stack] = order
    sources = {stack: [(checkpoint.name, layer) for layer in order] for stack, order in layers.items()}
    return follow_layers(checkpoint.name, {checkpoint.name: checkpoint}, sources)


def changes(before: Any, after: Any, prefix: str = "") -> dict[str, Any]:
    """What an output's config has otherwise than the reference's: key → new value."""
    found: dict[str, Any] = {}
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            found |= changes(before[key], value, f"{prefix}{key}.")
        elif before.get(key) != value:
            found[prefix + key] = value
    return found


def layer_list(model: PreTrainedModel, *paths: str) -> torch.nn.ModuleList:
    modules = dict(model.named_modules())
    return next(modules[path] for path in paths if path in modules)  # type: ignore[return-value]


def what_computes(layer: torch.nn.Module) -> list[Any]:
    """Class and plain attributes of all modules of a layer, its number left out."""
    return [
        (type(module).__name__, key, value)
        for module in layer.modules()
        for key, value in sorted({"": 0, **vars(module)}.items())
        if key not in ("layer_idx", "layer_id", "training") and isinstance(value, bool | int | str)
        if not key.startswith("_")
    ]


DECODERS = ("model.layers", "transformer.h", "backbone.layers")
UP_AND_CUT: dict[str, tuple[dict[str, Any] | str, dict[str, Any] | str]] = {
    "deepseek_v3": ({"num_hidden_layers": 8}, {"num_hidden_layers": 5}),
    "jamba": (
        {"num_hidden_layers": 8, "attn_layer_period": 5},
        {"num_hidden_layers": 5, "attn_layer_period": 2, "expert_layer_period": 3},
    ),
    "gemma3": (
        {"num_hidden_layers": 8, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL]},
        {"num_hidden_layers": 5, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]},
    ),
    "gpt_oss": (
        {"num_hidden_layers": 8, "layer_types": [SLIDING, FULL] * 4},
        {"num_hidden_layers": 5, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL]},
    ),
    "qwen3_next": (
        {"num_hidden_layers": 8, "layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL, LINEAR, LINEAR, FULL]},
        {"num_hidden_layers": 5, "layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL]},
    ),
    "falcon_h1": ({"num_hidden_layers": 8}, {"num_hidden_layers": 5}),
    "llama4": (
        {
            "num_hidden_layers": 8,
            "moe_layers": [1, 3, 5, 7],
            "no_rope_layers": [1, 1, 0, 1, 0, 1, 1, 0],
            "layer_types": [CHUNKED, CHUNKED, FULL, CHUNKED, FULL, CHUNKED, CHUNKED, FULL],
        },
        {
            "num_hidden_layers": 5,
            "moe_layers": [1, 4],
            "no_rope_layers": [1, 1, 0, 1, 0],
            "layer_types": [CHUNKED, CHUNKED, FULL, CHUNKED, FULL],
        },
    ),
    "qwen2": (
        {"num_hidden_layers": 8, "layer_types": [FULL] * 6 + [SLIDING] * 2},
        {"num_hidden_layers": 5, "layer_types": [FULL] * 3 + [SLIDING] * 2},
    ),
    "granite_hybrid": (
        {"num_hidden_layers": 8, "layer_types": [LINEAR, FULL, *[LINEAR] * 4, FULL, LINEAR]},
        {"num_hidden_layers": 5, "layer_types": [LINEAR, FULL, LINEAR, FULL, LINEAR]},
    ),
    "lfm2": (
        {"num_hidden_layers": 8, "layer_types": ["conv", FULL, *["conv"] * 4, FULL, "conv"]},
        {"num_hidden_layers": 5, "layer_types": ["conv", FULL, "conv", FULL, "conv"]},
    ),
    "smollm3": (
        {"num_hidden_layers": 8, "no_rope_layers": [1, 1, 0, 1, 0, 1, 1, 0], "layer_types": [FULL] * 8},
        {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 0, 1, 0], "layer_types": [FULL] * 5},
    ),
    "phi3": ({"num_hidden_layers": 8}, {"num_hidden_layers": 5}),
    "cohere2": (
        {"num_hidden_layers": 8, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL]},
        {"num_hidden_layers": 5, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]},
    ),
    "gpt_neo": (
        {
            "num_layers": 8,
            "attention_layers": ["global", "local"] * 4,
            "attention_types": [[["global", "local"] * 4, 1]],
        },
        {
            "num_layers": 5,
            "attention_layers": ["global", "local", "global", "global", "local"],
            "attention_types": [[["global", "local", "global", "global", "local"], 1]],
        },
    ),
    "gpt2": ({"n_layer": 8}, {"n_layer": 5}),
    "bamba": (
        {"num_hidden_layers": 8, "attn_layer_indices": [1, 6]},
        {"num_hidden_layers": 5, "attn_layer_indices": [1, 3]},
    ),
    "qwen2_moe": (
        {"num_hidden_layers": 8, "layer_types": [FULL] * 8},
        {"num_hidden_layers": 5, "layer_types": [FULL] * 5, "decoder_sparse_step": 1, "mlp_only_layers": [0, 2, 3]},
    ),
    "ernie4_5_moe": (
        {"num_hidden_layers": 8, "moe_layer_end_index": 6},
        {"num_hidden_layers": 5, "moe_layer_end_index": 3},
    ),
    "nemotron_h": (
        {"layers_block_type": [LINEAR, "mlp", FULL, LINEAR, FULL, LINEAR, "mlp", FULL]},
        {"layers_block_type": [LINEAR, "mlp", FULL, "mlp", FULL]},
    ),
}


@pytest.mark.parametrize("name", UP_AND_CUT)
def test_layers_are_of_the_kind_that_the_config_says(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    checkpoint = saved(tmp_path, name, model)
    before = layer_list(model, *DECODERS)
    (stack,) = depths(checkpoint)
    for order, expected in zip((UP, CUT), UP_AND_CUT[name], strict=True):
        followed = follow(checkpoint, **{stack.rpartition(".")[2]: order})
        assert not followed.problems and not followed.notes
        assert changes(checkpoint.config, followed.config) == expected
        (tmp_path / "config.json").write_text(json.dumps(followed.config))
        with torch.device("meta"):
            made = type(model)(tf.AutoConfig.from_pretrained(tmp_path))
        after = layer_list(made, *DECODERS)
        assert [what_computes(layer) for layer in after] == [what_computes(before[layer]) for layer in order]
        shapes = [{key: tensor.shape for key, tensor in layer.state_dict().items()} for layer in after]
        assert shapes == [{key: t.shape for key, t in before[layer].state_dict().items()} for layer in order]


@pytest.mark.parametrize(
    ("name", "orders", "expected"),
    [
        ("t5", {"encoder_block": [0, 1, 2, 1, 2], "decoder_block": [0, 1]}, {"num_layers": 5, "num_decoder_layers": 2}),
        ("t5", {"encoder_block": [0, 2]}, {"num_layers": 2}),
        (
            "bart",
            {"encoder_layers": [0, 3], "decoder_layers": [0, 1, 2, 1, 2, 3]},
            {"encoder_layers": 2, "decoder_layers": 6},
        ),
        ("bart", {"decoder_layers": [0, 3]}, {"decoder_layers": 2}),
        ("clip", {"vision_model_encoder_layers": [0, 2, 3]}, {"vision_config.num_hidden_layers": 3}),
        ("clip", {"text_model_encoder_layers": [0, 2, 3]}, {"text_config.num_hidden_layers": 3}),
        (
            "dinov2",
            {"encoder_layer": [0, 1, 3]},
            {
                "num_hidden_layers": 3,
                "out_features": ["stage3"],
                "out_indices": [3],
                "stage_names": ["stem", "stage1", "stage2", "stage3"],
            },
        ),
        ("llava", {"language_model_model_layers": CUT}, {"text_config.num_hidden_layers": 5}),
        # The second hidden state of the vision tower is read; the layer before it now comes third.
        (
            "llava",
            {"vision_tower_encoder_layers": [0, 0, 1, 2, 3]},
            {"vision_config.num_hidden_layers": 5, "vision_feature_layer": 3},
        ),
    ],
)
def test_the_right_part_of_the_config_follows(
    name: str, orders: dict[str, list[int]], expected: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, name)
    followed = follow(checkpoint, **orders)
    assert not followed.problems and not followed.notes
    found = changes(checkpoint.config, followed.config)
    assert {key: found.get(key, checkpoint.config.get(key)) for key in found | expected} == expected


def test_layers_that_no_numbers_say_are_refused_with_slices_that_do(tmp_path: Path) -> None:
    (problem,) = follow(saved(tmp_path, "jamba"), layers=[0, 1, 3, 4, 5]).problems
    assert problem.startswith("model.layers.2 would have a JambaMLP as feed_forward, but layer 3 of jamba")
    assert "expert_layer_offset and expert_layer_period" in problem
    assert problem.endswith("layer_range [0, 2] and [2, 6] would do")
    (problem,) = follow(saved(tmp_path, "deepseek_v3"), layers=[*range(4), *range(1, 6)]).problems
    assert "a DeepseekV3MoE as mlp" in problem and problem.endswith("layer_range [0, 4] and [2, 6] would do")
    (problem,) = follow(saved(tmp_path, "t5"), encoder_block=[0, 1, 2, 0, 1]).problems
    assert problem.startswith("encoder.block.3 would have layer.0.SelfAttention.has_relative_attention_bias = False")


def test_a_layer_whose_output_is_read_elsewhere_must_stay(tmp_path: Path) -> None:
    (problem,) = follow(saved(tmp_path, "llava"), vision_tower_encoder_layers=[0, 2, 3]).problems
    assert "vision_feature_layer takes the output of layer 1" in problem


def test_what_follows_from_a_position_is_noted(tmp_path: Path) -> None:
    followed = follow(saved(tmp_path, "diff_llama"), layers=CUT)
    assert not followed.problems and followed.config["num_hidden_layers"] == 5
    (note,) = followed.notes
    assert note.startswith("model.layers.3: the class derives self_attn.lambda_init from a layer's position")


def test_old_configs_without_the_list_that_a_pattern_makes(tmp_path: Path) -> None:
    saved(tmp_path, "gemma3")
    path = tmp_path / "gemma3" / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"]
    path.write_text(json.dumps(config | {"sliding_window_pattern": 3}))
    followed = follow(open_checkpoint(tmp_path / "gemma3", "gemma3"), layers=CUT)
    assert followed.config["layer_types"] == [SLIDING, SLIDING, FULL, SLIDING, FULL] and not followed.problems


def test_without_a_class_keys_follow_by_name(tmp_path: Path) -> None:
    saved(tmp_path, "gemma3")
    path = tmp_path / "gemma3" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "of_my_own", "architectures": ["MyModel"]}))
    followed = follow(open_checkpoint(tmp_path / "gemma3", "gemma3"), layers=CUT)
    assert followed.config["num_hidden_layers"] == 5 and not followed.problems
    assert followed.config["layer_types"] == [SLIDING, SLIDING, FULL, SLIDING, FULL]
    (note,) = followed.notes
    assert "not checked against a class" in note and "of_my_own" in note


def test_numbers_of_layers_that_no_class_reads_follow_too(tmp_path: Path) -> None:
    saved(tmp_path, "phi3")
    path = tmp_path / "phi3" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layers": 6, "num_heads_of_something": 6}))
    checkpoint = open_checkpoint(tmp_path / "phi3", "phi3")
    found = changes(checkpoint.config, follow(checkpoint, layers=CUT).config)
    assert found == {"num_hidden_layers": 5, "n_layers": 5}


def test_layers_of_a_deeper_model(tmp_path: Path) -> None:
    first = saved(tmp_path, "phi3")
    deeper = tf.Phi3ForCausalLM(tf.Phi3Config(**COMMON | {"num_hidden_layers": 9}))
    second = saved(tmp_path, "deeper", deeper)
    order = [("phi3", 0), ("phi3", 1), *(("deeper", layer) for layer in range(2, 9))]
    followed = follow_layers("phi3", {"phi3": first, "deeper": second}, {"model.layers": order})
    assert not followed.problems and followed.config["num_hidden_layers"] == 9


def test_lists_by_layer_come_from_the_model_that_the_layer_is_of(tmp_path: Path) -> None:
    first = saved(tmp_path, "lfm2")
    other = tf.Lfm2ForCausalLM(tf.Lfm2Config(**COMMON, layer_types=[FULL, "conv", FULL, FULL, "conv", FULL]))
    second = saved(tmp_path, "other", other)
    order = [("lfm2", 0), ("lfm2", 1), ("other", 2), ("other", 3), ("other", 4)]
    followed = follow_layers("lfm2", {"lfm2": first, "other": second}, {"model.layers": order})
    assert not followed.problems
    assert followed.config["layer_types"] == ["conv", FULL, FULL, FULL, "conv"]


# Whole merges


def slices(model: str, *ranges: tuple[int, int]) -> list[Any]:
    return [{"sources": [{"model": model, "layer_range": list(each)}]} for each in ranges]


def load(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    model, info = type(like).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.mark.parametrize("name", ["jamba", "llama4"])
def test_stacked_models_load_with_their_sources_weights(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    saved(tmp_path, name, model)
    config = {"merge_method": "passthrough", "slices": slices(str(tmp_path / name), (0, 4), (2, 6))}
    largemerge.merge(config, tmp_path / "out")
    made = load(tmp_path / "out", model)
    before, after = layer_list(model, *DECODERS), layer_list(made, *DECODERS)
    for mine, layer in zip(after, UP, strict=True):
        assert what_computes(mine) == what_computes(before[layer])
        for key, tensor in before[layer].state_dict().items():
            assert torch.equal(mine.state_dict()[key], tensor), key


def test_stacks_under_modules(tmp_path: Path) -> None:
    model = MODELS["t5"]()
    saved(tmp_path, "t5", model)
    folder = str(tmp_path / "t5")
    modules = {
        "encoder.block": {"slices": slices(folder, (0, 3), (1, 3))},
        "decoder.block": {"slices": slices(folder, (0, 2))},
    }
    largemerge.merge({"merge_method": "passthrough", "modules": modules}, tmp_path / "out")
    made = load(tmp_path / "out", model)
    assert (made.config.num_layers, made.config.num_decoder_layers) == (5, 2)
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON))
    llama.save_pretrained(tmp_path / "llama")
    default = {"default": {"slices": slices(str(tmp_path / "llama"), (0, 4), (2, 6))}}
    largemerge.merge({"merge_method": "passthrough", "modules": default}, tmp_path / "out2")
    assert load(tmp_path / "out2", llama).config.num_hidden_layers == 8


def test_a_stack_that_no_config_says_is_refused_before_the_work(tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v3")
    config = {"merge_method": "passthrough", "slices": slices(str(tmp_path / "deepseek_v3"), (0, 4), (1, 6))}
    (problem,) = largemerge.plan(config).problems
    assert problem.startswith("model.layers.4 would have a DeepseekV3MoE as mlp")
    with pytest.raises(LargemergeError, match=r"layer_range \[0, 4\] and \[2, 6\] would do"):
        largemerge.merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
