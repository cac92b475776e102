"""Tiny real Transformers models, one builder per architecture, and calibration inputs for each.

Widths are small enough for a dense float64 reference, sliding windows are smaller than the sequences,
and encoder and decoder lengths differ, so that a mistake in masks or in rows shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCAB_SIZE = 64
TEXT = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
LLM = TEXT | {"intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLM |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 12, "patch_size": 4}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Architecture:
    """How to build one tiny model and what its forward eats.

    Attributes:
        build: Makes a model with random weights.
        kind: `text`, `vision`, `clip` (both) or `seq2seq`.
        num_blocks: Blocks of all stacks together.
    """

    build: Callable[[], PreTrainedModel]
    kind: str = "text"
    num_blocks: int = 3


def _clip_config() -> tf.CLIPConfig:
    text = TEXT | {"intermediate_size": 24, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    return tf.CLIPConfig(text_config=text, vision_config=dict(VISION), projection_dim=8)


def _bert(config_class: type, model_class: type, **more: object) -> PreTrainedModel:
    return model_class(config_class(**TEXT, intermediate_size=24, max_position_embeddings=64, **more))


ARCHITECTURES: dict[str, Architecture] = {
    "clip_vision": Architecture(lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION)), "vision"),
    "clip": Architecture(lambda: tf.CLIPModel(_clip_config()), "clip", 6),
    "siglip_vision": Architecture(lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)), "vision"),
    "vit": Architecture(lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=5)), "vision"),
    "dinov2": Architecture(lambda: tf.Dinov2Model(tf.Dinov2Config(**VISION, mlp_ratio=2)), "vision"),
    "dinov2_swiglu": Architecture(
        lambda: tf.Dinov2Model(tf.Dinov2Config(**VISION, mlp_ratio=2, use_swiglu_ffn=True)), "vision"
    ),
    "llama": Architecture(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLM))),
    "llama_tied": Architecture(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLM, tie_word_embeddings=True))),
    "mistral": Architecture(lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLM, sliding_window=4))),
    "mixtral": Architecture(
        lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**LLM, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager")
        )
    ),
    "qwen2": Architecture(
        lambda: tf.Qwen2ForCausalLM(
            tf.Qwen2Config(**LLM, use_sliding_window=True, sliding_window=4, layer_types=SLIDING)
        )
    ),
    "qwen3": Architecture(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLM, head_dim=4))),
    "gemma2": Architecture(
        lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(**LLM, head_dim=4, query_pre_attn_scalar=4, sliding_window=4, layer_types=SLIDING)
        )
    ),
    "gemma3_text": Architecture(
        lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(**LLM, head_dim=4, query_pre_attn_scalar=4, sliding_window=4, layer_types=SLIDING)
        )
    ),
    "phi3": Architecture(lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LLM, sliding_window=4))),
    "olmo2": Architecture(lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**LLM))),
    "gpt2": Architecture(
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=3, n_head=4, n_positions=64, bos_token_id=1)
        )
    ),
    "gpt_neox": Architecture(
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT, intermediate_size=24, max_position_embeddings=64))
    ),
    "opt": Architecture(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(**TEXT, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=0)
        )
    ),
    "bert": Architecture(lambda: _bert(tf.BertConfig, tf.BertForMaskedLM)),
    "roberta": Architecture(lambda: _bert(tf.RobertaConfig, tf.RobertaForMaskedLM, pad_token_id=0)),
    "distilbert": Architecture(
        lambda: tf.DistilBertForMaskedLM(
            tf.DistilBertConfig(vocab_size=VOCAB_SIZE, dim=16, hidden_dim=24, n_layers=3, n_heads=4)
        )
    ),
    "t5": Architecture(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=VOCAB_SIZE, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
        ),
        "seq2seq",
        4,
    ),
    "bart": Architecture(
        lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(
                vocab_size=VOCAB_SIZE,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                max_position_embeddings=64,
                pad_token_id=0,
            )
        ),
        "seq2seq",
        4,
    ),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model with weights large enough that every block matters."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def perturbed(model_name: str, seed: int, scale: float = 0.05) -> PreTrainedModel:
    """A fine-tuned candidate: the base of `build(model_name)` plus noise of its own."""
    model = build(model_name)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def inputs(kind: str, num_samples: int, seed: int, padding: str = "right", length: int = 11) -> dict[str, torch.Tensor]:
    """Calibration tensors of `kind`: ids `[N, T]` with padding masks, pixels `[N, 3, 12, 12]`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    if kind in ("vision", "clip"):
        tensors["pixel_values"] = torch.randn(num_samples, 3, 12, 12, generator=generator)
    if kind in ("text", "clip", "seq2seq"):
        tensors |= _ids("", num_samples, length, generator, padding)
    if kind == "seq2seq":
        tensors |= _ids("decoder_", num_samples, length - 4, generator, padding)
    return tensors


def _ids(
    prefix: str, num_samples: int, length: int, generator: torch.Generator, padding: str
) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB_SIZE, (num_samples, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (num_samples,), generator=generator)
    if padding == "none":
        return {f"{prefix}input_ids": ids}
    position = torch.arange(length)
    mask = position < lengths[:, None] if padding == "right" else position >= length - lengths[:, None]
    return {f"{prefix}input_ids": ids * mask, f"{prefix}attention_mask": mask.long()}
