"""Tiny Llamas with random weights, tokenizers of their own that are trained on the spot, and adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ENGLISH = ["the merging of models is merely adding and dividing", "models that were trained are merged", "the end"] * 3
CODE = ["def merge(models): return sum(models) / len(models)", "for model in models: print(model.weight)"] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
HIDDEN, LAYERS = 32, 2


def write_inputs(folder: Path) -> Path:
    """All models: `bpe-a` and so on; `lora`, an adapter of `bpe-a`."""
    shutil.rmtree(folder, ignore_errors=True)
    common = _train("BPE", ENGLISH)
    _write_model(folder / "base", 0, common, ["<x>"])
    _write_model(folder / "bpe-a", 1, common, ["<x>", "<y>"], "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    _write_model(folder / "bpe-b", 2, common, ["<y>", "<z>"], "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    _write_model(folder / "code", 3, _train("BPE", CODE), ["<y>"])
    _write_model(folder / "tied-a", 4, common, ["<x>"], tied=True)
    _write_model(folder / "tied-b", 5, common, ["<y>"], tied=True)
    for number, added in enumerate((["<x>"], ["<y>"], ["<y>", "<z>"])):
        _write_model(folder / f"bf16-{number}", 6 + number, common, added, dtype=torch.bfloat16)
    for kind in ("WordPiece", "Unigram"):
        _write_model(folder / f"{kind}-a", 9, _train(kind, ENGLISH), ["<x>"])
        _write_model(folder / f"{kind}-b", 10, _train(kind, CODE), ["<y>"])
    _write_model(folder / "plain", 11, common, [])
    for name, dtype in (("lora", torch.float32), ("lora-bf16", torch.bfloat16)):
        _write_adapter(folder / name, dtype)
    return folder


def _train(kind: str, texts: list[str]) -> tokenizers.Tokenizer:
    made: Any
    options: Any = {"vocab_size": 320, "show_progress": False, "special_tokens": SPECIAL}
    if kind == "BPE":
        made, alphabet = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    elif kind == "WordPiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    made.train_from_iterator(texts, trainer)
    return made


def _write_model(
    folder: Path,
    seed: int,
    tokenizer: tokenizers.Tokenizer,
    added: list[str],
    template: str | None = None,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    copied = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=copied, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_tokens(added)
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def _write_adapter(folder: Path, dtype: torch.dtype) -> None:
    """As peft saves one."""
    folder.mkdir(parents=True)
    torch.manual_seed(20)
    tensors = {}
    for layer in range(LAYERS):
        for module, out, inner in (("self_attn.q_proj", HIDDEN, HIDDEN), ("mlp.down_proj", HIDDEN, 2 * HIDDEN)):
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn(4, inner, dtype=dtype)
            tensors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(out, 4, dtype=dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    config |= {"task_type": "CAUSAL_LM", "use_rslora": True, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
