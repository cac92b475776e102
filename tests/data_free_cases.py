"""Data-free merges of tiny models, for tests."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_models
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

import largemerge
from largemerge.data_free import engine

NUM_LAYERS = tiny_models.LLM["num_hidden_layers"]
Config = dict[str, Any]


def write_models(folder: Path, architecture: str = "llama", count: int = 4, dtype: torch.dtype = torch.float32) -> None:
    """Saves `model0`, which serves as the base, and others beside it."""
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


def kill_and_resume(path: Path, folder: Path, kill_at: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills a merge at its n-th operation on files, resumes it, and compares it with an unbroken one, bit for bit."""
    command = ["merge", path, folder / "out", "--quiet", "--max-shard-size", "1MB"]
    small = {processes.PART_BYTES: str(part_bytes)}
    assert processes.finish(processes.start(command, folder / "log", kill_at, environment=small)) == -signal.SIGKILL
    assert not (folder / "out" / "config.json").exists()
    process = processes.start([*command, "--resume"], folder / "log2", environment=small)
    assert processes.finish(process) == 0, (folder / "log2").read_text()
    monkeypatch.setattr(engine, "PART_BYTES", part_bytes)
    largemerge.merge(path, folder / "unbroken", max_shard_bytes=10**6)
    assert processes.lasting(folder / "out") == processes.lasting(folder / "unbroken")
