"""Tensors with a row for every token are found in models of many kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from tokenized import ENGLISH, check_rows, rows_by_token, train, write_model
from transformers import BertConfig, BertForMaskedLM

import largemerge
from largemerge import LargemergeError
from largemerge.checkpoint.index import open_checkpoint
from largemerge.model.alignment import align
from largemerge.tokenizer.token_ids import find_token_tensors

EXPECTED = {
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "llama_tied": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight"},
    "gpt_neox": {"gpt_neox.embed_in.weight", "embed_out.weight"},
    "opt": {"model.decoder.embed_tokens.weight"},
    "bert": {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"},
    "distilbert": {"distilbert.embeddings.word_embeddings.weight", "vocab_projector.bias"},
    "t5": {"shared.weight"},
    "gemma3_text": {"model.embed_tokens.weight"},
}
REFUSED = {"vit": "no token embeddings", "clip_vision": "no token embeddings", "bart": "in the second dimension"}


def token_tensors(folder: Path) -> frozenset[str]:
    checkpoint = open_checkpoint(folder, "m")
    return find_token_tensors(align({"m": checkpoint}, {}, "m"), checkpoint)


@pytest.mark.parametrize("architecture", sorted(EXPECTED))
def test_they_are_found(tmp_path: Path, architecture: str) -> None:
    tiny_models.perturbed(architecture, 0).save_pretrained(tmp_path)
    assert token_tensors(tmp_path) == EXPECTED[architecture]


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_others_are_refused(tmp_path: Path, architecture: str) -> None:
    tiny_models.perturbed(architecture, 0).save_pretrained(tmp_path)
    with pytest.raises(LargemergeError, match=REFUSED[architecture]):
        token_tensors(tmp_path)


def test_a_bias_of_the_head_goes_with_it(tmp_path: Path) -> None:
    ids = []
    for seed, added in enumerate((["<x>"], ["<y>", "<x>"])):
        ids.append(write_model(tmp_path / f"m{seed}", seed, train("WordPiece", ENGLISH), added))
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(seed)
        model = BertForMaskedLM(BertConfig(vocab_size=len(ids[-1]), **sizes))
        torch.nn.init.normal_(model.cls.predictions.bias)
        model.save_pretrained(tmp_path / f"m{seed}")
    models = [{"model": str(tmp_path / f"m{seed}"), "parameters": {"weight": 0.5}} for seed in range(2)]
    config = {"merge_method": "linear", "models": models, "tokenizer_source": "union"}
    largemerge.merge(config, tmp_path / "out")
    for name in ("cls.predictions.bias", "bert.embeddings.word_embeddings.weight"):
        rows = [rows_by_token(tmp_path / f"m{seed}", ids[seed], name) for seed in range(2)]
        found = check_rows(tmp_path / "out", rows, None, lambda each: (each[0] + each[1]) / 2, name)
    assert len(BertForMaskedLM.from_pretrained(tmp_path / "out").cls.predictions.bias) == len(found)
