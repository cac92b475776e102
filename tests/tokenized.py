"""Tiny language models with tokenizers of their own, trained on the spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny_models
import tokenizers
import torch
from cases import weights_in
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ENGLISH = ["the merging of models is merely adding and dividing", "models that were trained are merged", "the end"]
CODE = [
    "def merge(models): return sum(models) / len(models)",
    "for model in models: print(model.weight)",
    "class Merge:",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
Rows = dict[str, torch.Tensor]
Config = dict[str, Any]


def train(kind: str, texts: Sequence[str], size: int = 300) -> tokenizers.Tokenizer:
    """Trains a tokenizer of one kind: `BPE`, `WordPiece` or `Unigram`."""
    made: tokenizers.Tokenizer
    options: Any = {"vocab_size": size, "show_progress": False, "special_tokens": SPECIAL}
    if kind == "BPE":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=size, show_progress=False, special_tokens=SPECIAL, initial_alphabet=alphabet
        )
    elif kind == "WordPiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=False)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, show_progress=False, special_tokens=SPECIAL, unk_token="<unk>"
        )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def write_model(
    folder: Path,
    seed: int,
    tokenizer: tokenizers.Tokenizer | None,
    added: Sequence[str] = (),
    *,
    special: Sequence[str] = (),
    more_rows: int = 0,
    pad: str | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    num_rows: int | None = None,
) -> dict[str, int]:
    """Saves a random Llama and its tokenizer; returns the tokens' numbers."""
    fast: Any = None
    if tokenizer is not None:
        copied = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": pad} if pad else {})
        fast = PreTrainedTokenizerFast(tokenizer_object=copied, **named)
        fast.add_tokens(list(added))
        fast.add_special_tokens({"additional_special_tokens": list(special)})
        fast.save_pretrained(folder)
    rows = num_rows if num_rows is not None else len(fast) + more_rows
    torch.manual_seed(seed)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": fast.pad_token_id if fast is not None else None}
    sizes = tiny_models.LLM | {"vocab_size": rows, "tie_word_embeddings": tied, "num_hidden_layers": 2} | ids
    LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).save_pretrained(folder)
    return dict(fast.get_vocab()) if fast is not None else {}


def rows_by_token(folder: Path, ids: dict[str, int], name: str = "model.embed_tokens.weight") -> Rows:
    """Reads the embedding of every token that has one."""
    weight = weights_in(folder)[name]
    return {token: weight[number] for token, number in ids.items() if number < len(weight)}


def expected_row(token: str, rows: Sequence[Rows], base: int | None) -> list[torch.Tensor]:
    """Computes every model's embedding of a token by the default rules."""
    having = [each[token] for each in rows if token in each]
    like = next(iter(rows[0].values()))
    if not having:
        default = torch.zeros_like(like)
    elif len(having) > 1 and base is not None and token in rows[base]:
        default = rows[base][token]
    else:
        default = torch.stack(having).double().mean(dim=0).to(like.dtype)
    return [each.get(token, default) for each in rows]


def check_rows(
    out: Path, rows: Sequence[Rows], base: int | None, merge: Callable[[list[torch.Tensor]], torch.Tensor], name: str
) -> dict[str, int]:
    """Holds the output's embeddings against the rules, token by token; returns its tokens' numbers."""
    ids: dict[str, int] = AutoTokenizer.from_pretrained(out).get_vocab()
    weight = weights_in(out)[name]
    assert max(ids.values()) < len(weight)
    for token, number in ids.items():
        expected = merge([row.double() for row in expected_row(token, rows, base)])
        assert torch.allclose(weight[number].double(), expected, atol=1e-6), token
    return ids


def linear(folder: Path, names: list[str], weights: list[float], **more: Any) -> Config:
    models = [
        {"model": str(folder / name), "parameters": {"weight": weight}}
        for name, weight in zip(names, weights, strict=True)
    ]
    return {"merge_method": "linear", "models": models, **more}


def loads_and_speaks(out: Path, text: str) -> None:
    """Checks that the output loads as people load it, and that its tokens are rows of its embeddings."""
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    num_rows = model.get_input_embeddings().weight.shape[0]
    assert model.config.vocab_size == num_rows >= len(tokenizer)
    encoded = tokenizer(text, return_tensors="pt")
    assert int(encoded["input_ids"].max()) < num_rows
    assert tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert torch.isfinite(model(input_ids=encoded["input_ids"]).logits).all()
