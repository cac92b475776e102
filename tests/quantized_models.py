"""Tiny models quantised by Transformers and bitsandbytes, as users have them, and plain copies of those."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers as tf
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, PreTrainedModel

from largemerge.checkpoint.index import open_checkpoint
from largemerge.checkpoint.reader import CheckpointReader

KINDS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double quantised": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4, double quantised": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
}


def wide(name: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model whose rows are whole blocks of 64: bitsandbytes' CPU kernels are not reliable for others."""
    torch.manual_seed(seed)
    text = tiny_models.LLM | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    encoder = {key: text[key] for key in (*tiny_models.TEXT, "intermediate_size", "max_position_embeddings")}
    builders = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**text)),
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**encoder)),
        "opt": lambda: tf.OPTForCausalLM(
            tf.OPTConfig(vocab_size=64, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
                         word_embed_proj_dim=64, max_position_embeddings=64, pad_token_id=0)
        ),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1)
        ),
    }  # fmt: skip
    model = builders[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def load(model_class: Any, folder: Path, device: str = "cpu", **options: Any) -> PreTrainedModel:
    """Loads a model that is, or becomes, quantised: Transformers puts it on the GPU otherwise, if there is one.

    The GPU rounds some numbers otherwise: whatever is compared bit for bit must be quantised on one kind of device.
    """
    model: PreTrainedModel = model_class.from_pretrained(folder, device_map=device, **options)
    return model


def quantize_folder(folder: Path, kind: str, **settings: Any) -> PreTrainedModel:
    """Replaces a checkpoint by what Transformers makes of it when it loads it quantised and saves it, on the CPU."""
    model_class = getattr(tf, json.loads((folder / "config.json").read_text())["architectures"][0])
    config = BitsAndBytesConfig(**KINDS[kind] | settings)
    model = load(model_class, folder, quantization_config=config)
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    return model


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as largemerge reads it."""
    with CheckpointReader(open_checkpoint(folder, folder.name)) as reader:
        return {name: reader.read(name) for name in reader.checkpoint.tensors}


def plain_copy(folder: Path, out: Path) -> Path:
    """The same checkpoint, dequantised; GPT-2's `Conv1D` the right way round again."""
    infos = open_checkpoint(folder, folder.name).tensors
    tensors = {
        key: tensor.T.contiguous() if infos[key].quantization is not None and ".h." in key else tensor
        for key, tensor in read_all(folder).items()
    }
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out
