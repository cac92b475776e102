"""What the merges of `smollm2_vs_plain.py` are given: experts, calibration tokens, held-out tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from corpora import KINDS, load_corpus
from experts import sequences


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    num_samples: int = 16
    """Calibration sequences per expert."""
    length: int = 256
    """Tokens of a sequence."""
    heldout_sequences: int = 32
    """Per kind of text."""


@dataclass(frozen=True)
class Inputs:
    """What all of them are given."""

    base: Path
    experts: Mapping[str, Path]
    tokens: Mapping[str, Path]
    """By expert: a .safetensors file with `input_ids`."""
    heldout: Mapping[str, torch.Tensor]


def real_inputs(work: Path, speed: Path, sizes: Sizes) -> Inputs:
    """The experts of `smollm2_experts.py`, tokens of its calibration files, and its held-out tokens."""
    experts = {kind: work / "experts" / kind for kind in KINDS}
    calibration = {kind: work / "calibration" / f"{kind}.jsonl" for kind in KINDS}
    lacking = [path for path in (work / "base", *experts.values(), *calibration.values()) if not path.exists()]
    if lacking:
        raise SystemExit(f"{lacking[0]} is missing; first run smollm2_experts.py --no-merges --work {work}")
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    tokens = {}
    for kind, path in calibration.items():
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        tokens[kind] = sequences(texts, tokenizer, count=sizes.num_samples, length=sizes.length)
    heldout = {
        kind: sequences(
            load_corpus(kind, work / "packages").heldout, tokenizer, count=sizes.heldout_sequences, length=sizes.length
        )
        for kind in KINDS
    }
    return Inputs(work / "base", experts, _save_tokens(tokens, speed), heldout)


def tiny_inputs(speed: Path, sizes: Sizes) -> Inputs:
    """A random Llama, and experts that are it with some noise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    folders = {name: speed / "tiny" / name for name in ("base", *KINDS)}
    model = LlamaForCausalLM(config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for folder in folders.values():
        model.load_state_dict({name: value + 0.01 * torch.randn_like(value) for name, value in state.items()})
        model.to(torch.bfloat16).save_pretrained(folder)
        model.float()
    tokens = {kind: torch.randint(96, (sizes.num_samples, sizes.length)) for kind in KINDS}
    heldout = {kind: torch.randint(96, (sizes.heldout_sequences, sizes.length)) for kind in KINDS}
    return Inputs(folders.pop("base"), folders, _save_tokens(tokens, speed), heldout)


def _save_tokens(tokens: Mapping[str, torch.Tensor], speed: Path) -> dict[str, Path]:
    (speed / "tokens").mkdir(exist_ok=True)
    paths = {kind: speed / "tokens" / f"{kind}.safetensors" for kind in tokens}
    for kind, path in paths.items():
        save_file({"input_ids": tokens[kind]}, path)
    return paths
