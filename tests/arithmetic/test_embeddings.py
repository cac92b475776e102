"""Which tensors have a row for every token, in models of many kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models

from largemerge import LargemergeError
from largemerge.checkpoint.index import open_checkpoint
from largemerge.vocabulary.embeddings import find_token_tensors

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


@pytest.mark.parametrize("architecture", sorted(EXPECTED))
def test_they_are_found(tmp_path: Path, architecture: str) -> None:
    tiny_models.perturbed(architecture, 0).save_pretrained(tmp_path)
    assert find_token_tensors(open_checkpoint(tmp_path, architecture)) == EXPECTED[architecture]


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_others_are_refused(tmp_path: Path, architecture: str) -> None:
    tiny_models.perturbed(architecture, 0).save_pretrained(tmp_path)
    with pytest.raises(LargemergeError, match=REFUSED[architecture]):
        find_token_tensors(open_checkpoint(tmp_path, architecture))
