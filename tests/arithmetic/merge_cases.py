"""Data-free merges of tiny models, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

NUM_LAYERS = tiny_models.LLM["num_hidden_layers"]
Config = dict[str, Any]


def write_models(folder: Path, architecture: str = "llama", count: int = 4, dtype: torch.dtype = torch.float32) -> None:
    """`model0`, which serves as the base, and others beside it."""
    for seed in range(count):
        tiny_models.perturbed(architecture, seed).to(dtype).save_pretrained(folder / f"model{seed}")


def config_of(folder: Path, method: str, models: list[int] | None = None, **more: Any) -> Config:
    entries = [{"model": str(folder / f"model{seed}")} for seed in models or [1, 2, 3]]
    return {"merge_method": method, "models": entries, **more}


def weighted(folder: Path, method: str = "linear", **more: Any) -> Config:
    config = config_of(folder, method, **more)
    for entry, weight in zip(config["models"], [0.5, 0.3, 0.2], strict=True):
        entry["parameters"] = {"weight": weight}
    return config


def load(out: Path, build: Callable[..., PreTrainedModel] = LlamaForCausalLM) -> PreTrainedModel:
    model, info = build.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model
