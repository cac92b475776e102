"""Tiny models of Transformers' classes: configs shrunk by the names of their keys, and inputs made from signatures.

A config's defaults are those of a published model. `shrink` walks them and makes widths, heads, layers, experts,
vocabularies and pictures small, so that what belongs together still fits together. It is a list of rules about names
that configs share; `EXCEPTIONS` holds what the rules cannot know.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

NUM_LAYERS = 4
VOCABULARY = 128
NUM_SAMPLES, NUM_TOKENS, NUM_DECODER_TOKENS = 6, 13, 7

RULES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|num_embeddings$|char_vocab|vocabulary_size|codebook_size", VOCABULARY),
    (r"num_kv_shared_layers", 2),
    (r"num_feat_extract_layers|num_conv_pos|num_codebooks", 99),
    (r"^(n|num|topk)_group", 1),
    (r"^mm_tokens_per_image", 4),
    (r"num_nextn_predict|num_mtp|mtp_num", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start|moe_layer_offset|mlp_only", 1),
    (r"(^|_)(num_hidden_layers|n_layers?|num_layers|layers|depth|num_blocks|n_blocks|layer_num)$", NUM_LAYERS),
    (r"rotary_dim", 4),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|qk_head_dim|index_head_dim", 8),
    (r"(q|o)_lora_rank|kv_lora_rank|lora_rank", 16),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_headdim|mamba_d_head|mamba_head_dim", 8),
    (r"head_dim$|head_size|kv_channels|d_kv|attention_head_dim|key_head_dim|_d_head$|dim_head|^d_head", 8),
    (r"num_(key_value|kv)_heads|n_head_kv|num_kv_heads|key_value_heads|multi_query_group_num", 2),
    (r"(num|n)_(attention_|encoder_|decoder_)?heads?$|attention_heads|num_heads|n_heads?$|heads$", 4),
    (r"(num|n)_(local_|routed_|total_)?experts$|moe_num_experts", 4),
    (r"experts_per_tok|topk$|top_k|moe_k|num_selected_experts", 2),
    (r"n_group|topk_group|num_shared_experts|n_shared_experts", 1),
    (r"intermediate|^dff$|ffn_(hidden|dim|embed)|_ffn_dim|ffn_dim|d_ff|d_inner|mlp_dim|n_inner|ffn_size|inner_size|mlp_size"
     r"|expand_size|feedforward", 48),
    (r"state_size|d_state|ssm_state|mamba_state", 8),
    (r"time_step_rank|dt_rank", 4),
    (r"image_size|img_size|input_size|^image_height|^image_width", 32),
    (r"window|chunk_size|attention_chunk|block_size|local_attention|chunk_length", 8),
    (r"position|n_ctx|context_length|max_seq|seq_length|max_length|n_positions|max_sequence", 64),
    (r"mel_bins|feature_size|input_feat|num_mel", 16),
    (r"max_source|max_target|max_temporal", 64),
    (r"hidden_size|d_model|n_embd|embed_dim|embedding_size|embd|hidden_dim|^dim$|_dim$|width|model_dim|^d_embed$|size$"
     r"|channels|dim$|features$", 32),
)  # fmt: skip
"""Pattern of a key → what a larger number of that name becomes; the first that matches."""

KEPT = re.compile(
    r"num_channels|in_channels|in_chans|kernel|stride|padding|factor|scale|ratio|patch_size$|_token(?!s)|conv_groups?$|positional.*groups$|in_groups$"
)

DROPPED = ("id2label", "label2id", "architectures", "transformers_version", "dtype", "torch_dtype", "model_type")
DROPPED += ("_name_or_path", "per_layer_config")

QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "DoryConfig": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "FalconH1Config": {"mamba_d_ssm": 64},
    "HunYuanDenseV1Config": {"head_dim": 8},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "MinistralConfig": {"head_dim": 8},
    "NemotronConfig": {"head_dim": 8, "num_key_value_heads": 2},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    "XmodConfig": {"default_language": "en_XX"},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "ReformerConfig": {"axial_pos_embds": False, "attention_head_size": 8, "feed_forward_size": 48},
    "EsmConfig": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "Zamba2Config": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "ZambaConfig": {"attention_head_dim": 16, "attention_hidden_size": 64, "n_mamba_heads": 2},
    "Wav2Vec2BertConfig": {"vocab_size": VOCABULARY},
    "Qwen2VLConfig": {"text_config": {"rope_parameters": QWEN_ROPE}},
    "Qwen2_5_VLConfig": {"text_config": {"rope_parameters": QWEN_ROPE}},
    "SwinConfig": {"window_size": 4},
    "DonutSwinConfig": {"window_size": 4},
}
"""Config or model class → what the rules cannot know."""


def shrink(values: Any, key: str = "", layers: int | None = None, ids: dict[int, int] | None = None) -> Any:
    """Shrinks a config given as a dictionary; `ids` are the special tokens so far, old → new."""
    ids = {} if ids is None else ids
    if isinstance(values, Mapping):
        if not all(isinstance(name, str) for name in values):
            return values
        own = next((v for k, v in values.items() if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", k)), layers)
        small = {
            name: shrink(value, name, own if isinstance(own, int) else None, ids)
            for name, value in values.items()
            if name not in DROPPED
        }
        if values.get("num_key_value_heads") == values.get("num_attention_heads") is not None:
            small["num_key_value_heads"] = small["num_attention_heads"]
        if "spatial_merge_size" in values and "window_size" in values:  # Qwen2.5-VL's windows of merged patches
            small["window_size"] = 32
        return small
    if isinstance(values, list | tuple):
        return _shrink_list(list(values), key, layers, ids)
    if isinstance(values, bool) or not isinstance(values, int):
        return values
    return _shrink_number(values, key, ids)


def _shrink_list(values: list[Any], key: str, layers: int | None, ids: dict[int, int]) -> list[Any]:
    if layers is not None and len(values) == layers and layers > NUM_LAYERS and not isinstance(values[0], Mapping):
        kinds = list(dict.fromkeys(values))
        return [_shrink_number(v, key, ids) if type(v) is int else v for v in (kinds * NUM_LAYERS)[:NUM_LAYERS]]
    if key == "mrope_section":
        return [2, 1, 1]
    if key == "image_grid_pinpoints":
        return [[32, 32]]
    if values and all(type(value) is int for value in values):
        if re.search("depths|layers|blocks", key):
            return [min(value, 2) for value in values]
        if re.search("index|indices|features", key):
            return values
        if re.search("heads", key):
            return [min(value, 2) for value in values]
        if max(values) >= 64 and not re.search("token|id", key):
            return [16 * (1 + sorted(set(values)).index(value)) if value >= 64 else value for value in values]
    return [shrink(value, key, None, ids) for value in values]


def _shrink_number(value: int, key: str, ids: dict[int, int]) -> int:
    if re.search(r"token_id|token_index|_id$|_idx$|_ids$|token_type", key) and "vocab" not in key:
        return ids.setdefault(value, VOCABULARY - 1 - len(ids)) if value >= VOCABULARY // 2 else value
    if KEPT.search(key) or value <= 1:
        return value if not re.search("patch_size$", key) or value < 8 else 8
    for pattern, small in RULES:
        if re.search(pattern, key):
            return min(value, small)
    return value


def tiny_config(model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """Makes a tiny config of a model class.

    Raises:
        Exception: Whatever Transformers raises where its class cannot be built so small.
    """
    config_class: Any = model_class.config_class
    values = shrink(config_class().to_dict())
    changed = EXCEPTIONS.get(config_class.__name__, {}) | EXCEPTIONS.get(model_class.__name__, {})
    config: PreTrainedConfig = config_class(**_updated(values, changed))
    return config


def _updated(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            values[key] = _updated(values[key], value)
        else:
            values[key] = value
    return values


def tiny_model(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Builds a tiny model with random weights large enough that every block matters."""
    torch.manual_seed(0)
    config = tiny_config(model_class)
    if (
        getattr(config, "is_encoder_decoder", False) is False
        and model_class.__name__.endswith(("ForCausalLM", "LMHeadModel"))
        and hasattr(config, "is_decoder")
    ):
        config.is_decoder = True
    no_cache(config)
    model = model_class(config).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 40_000_000:
        raise ValueError(f"still has {size:,} parameters")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.nan_to_num_(0.0).clamp_(-2, 2).add_(torch.randn(parameter.shape) * 0.05)
    return model


def no_cache(config: PreTrainedConfig) -> None:
    """As in training: some classes leave masks out where they are to fill a cache."""
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        if hasattr(part, "use_cache"):
            part.use_cache = False


def perturbed(model: PreTrainedModel, folder: Any, seed: int, scale: float = 0.05) -> PreTrainedModel:
    """Reads a model again and adds noise to it, as fine-tuning would."""
    other = type(model).from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return other


# Inputs

Inputs = dict[str, torch.Tensor]


def make_inputs(model: PreTrainedModel, kind: str, seed: int) -> Inputs:
    """Makes calibration tensors `[N, ...]` for a model, from what its forward takes."""
    generator = torch.Generator().manual_seed(seed)
    takes = set(inspect.signature(model.forward).parameters)
    inputs: Inputs = {}
    if kind in ("vision", "multimodal"):
        inputs |= pixels(model, takes, generator)
    if kind == "audio":
        inputs |= sounds(model, takes, generator)
    if "input_ids" in takes and kind in ("causal", "masked", "seq2seq", "multimodal"):
        inputs |= tokens(model, takes, generator, images=inputs if kind == "multimodal" else None)
    if "decoder_input_ids" in takes and kind in ("seq2seq", "audio", "multimodal") and is_encoder_decoder(model):
        shape = (NUM_SAMPLES, NUM_DECODER_TOKENS)
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY // 2, shape, generator=generator)
    return inputs


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether a decoder reads tokens of its own."""
    return (
        bool(getattr(model.config, "is_encoder_decoder", False))
        or "decoder_input_ids" in inspect.signature(model.forward).parameters
    )


def tokens(model: PreTrainedModel, takes: set[str], generator: torch.Generator, images: Inputs | None) -> Inputs:
    """Token ids, the last three of every second sample padding; image tokens in front where there are images."""
    ids = torch.randint(3, VOCABULARY // 2, (NUM_SAMPLES, NUM_TOKENS), generator=generator)
    ids[ids == image_token(model)] = 1
    if images:
        ids = torch.cat([image_tokens(model, images), ids], dim=1)
    inputs = {"input_ids": ids}
    if "attention_mask" in takes:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][::2, -3:] = 0
    if images and "mm_token_type_ids" in takes:
        inputs["mm_token_type_ids"] = (ids == image_token(model)).long()
    elif images and "token_type_ids" in takes:
        inputs["token_type_ids"] = (ids == image_token(model)).long()
    if model.config.model_type in ("xlnet",):
        inputs.pop("attention_mask")
    return inputs


def image_token(model: Any) -> int | None:
    """The token that stands for a feature of an image, by the names that configs have for it."""
    names = ("image_token_id", "image_token_index", "image_token", "media_placeholder_token_id")
    parts = (model.config, getattr(model.config, "text_config", None))
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def image_tokens(model: Any, images: Inputs) -> torch.Tensor:
    """Places of the images' features: as many tokens as the model itself makes features of an image."""
    token = image_token(model)
    if token is None:
        return torch.zeros(NUM_SAMPLES, 0, dtype=torch.long)
    method = model.get_image_features if hasattr(model, "get_image_features") else model.model.get_image_features
    flat = model_inputs(images)
    known = set(inspect.signature(method).parameters)
    with torch.no_grad():
        features = method(**{name: x for name, x in flat.items() if name in known})
    features = getattr(features, "pooler_output", features)
    rows = (
        sum(f.shape[:-1].numel() for f in features)
        if isinstance(features, list | tuple)
        else features.shape[:-1].numel()
    )
    return torch.full((NUM_SAMPLES, rows // NUM_SAMPLES), token)


PACKED = ("pixel_values", "image_grid_thw")
"""Inputs of which a batch has no dimension of samples where images are cut into patches of any number."""


def model_inputs(inputs: Inputs) -> Inputs:
    """The tensors as the model takes them: patches of all images in one list."""
    packed = PACKED if "image_grid_thw" in inputs else ()
    return {name: x.flatten(0, 1) if name in packed else x for name, x in inputs.items()}


def _part(config: Any, *names: str) -> Any:
    return next((part for name in names if (part := getattr(config, name, None)) is not None), config)


def pixels(model: Any, takes: set[str], generator: torch.Generator) -> Inputs:
    """Random pixels in the size that the vision config names."""
    config = _part(model.config, "vision_config", "backbone_config")
    patch = getattr(config, "patch_size", 8)
    size = getattr(config, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = next((v for n in ("num_channels", "in_channels", "in_chans") if (v := getattr(config, n, None))), 3)
    if "image_grid_thw" in takes:
        frames = getattr(config, "temporal_patch_size", 1)
        grid = torch.tensor([1, 4, 4])
        values = torch.randn(NUM_SAMPLES, 16, channels * frames * patch * patch, generator=generator)
        return {"pixel_values": values, "image_grid_thw": grid.expand(NUM_SAMPLES, 1, 3).contiguous()}
    name = next((name for name in ("pixel_values", "pixel_values_videos") if name in takes), None)
    if name is None:
        return {}
    shape: tuple[int, ...] = (NUM_SAMPLES, channels, height, width)
    if config.model_type in ("videomae", "vivit", "timesformer", "vjepa2", "videoprism_vision_model", "videoprism"):
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 2)
        shape = (NUM_SAMPLES, frames, channels, height, width)
    if model.config.model_type in ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision"):
        shape = (NUM_SAMPLES, 2, channels, height, width)
    inputs = {name: torch.randn(shape, generator=generator)}
    if model.config.model_type in ("idefics2", "idefics3", "smolvlm"):
        inputs[name] = inputs[name].unsqueeze(1)
    if "image_sizes" in takes and model.config.model_type not in ("llava", "vipllava"):
        inputs["image_sizes"] = torch.tensor([[height, width]]).expand(NUM_SAMPLES, 2).contiguous()
    return inputs


MEL_NAMES = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
VISION_NAMES = ("num_channels", "in_channels", "in_chans")


def sounds(model: Any, takes: set[str], generator: torch.Generator) -> Inputs:
    """Random sound: waves, or features in the size that the config names."""
    config = model.config
    if "input_values" in takes and "input_features" not in takes:
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
            return {
                "input_values": torch.randn(NUM_SAMPLES, config.max_length, config.num_mel_bins, generator=generator)
            }
        return {"input_values": torch.randn(NUM_SAMPLES, 2000, generator=generator)}
    part = _part(config, "encoder_config", "audio_config")
    mels = next(
        (value for name in MEL_NAMES if (value := getattr(part, name, None))),
        16,
    )
    if "whisper" in config.model_type:
        return {"input_features": torch.randn(NUM_SAMPLES, mels, 2 * config.max_source_positions, generator=generator)}
    return {"input_features": torch.randn(NUM_SAMPLES, 64, mels, generator=generator)}


KINDS: dict[str, tuple[str, ...]] = {
    "causal": ("CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "vision": ("IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
    "audio": ("AUDIO_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ"),
    "multimodal": ("IMAGE_TEXT_TO_TEXT",),
}
"""Kind → the lists of Transformers' auto classes that it takes."""


def classes_of(kind: str) -> list[str]:
    """Names of Transformers' model classes of a kind, in order, each in the first kind that has it."""
    from transformers.models.auto import modeling_auto

    def names(of: str) -> list[str]:
        mappings = (getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in KINDS[of])
        found = [value for mapping in mappings for value in mapping.values()]
        return sorted({name for value in found for name in ([value] if isinstance(value, str) else value)})

    # A class of two lists (a vision-language model is a causal one, too) belongs to the last.
    later = {name for other in list(KINDS)[list(KINDS).index(kind) + 1 :] for name in names(other)}
    return [name for name in names(kind) if name not in later]
