"""Merges in sequence: one expert after the other gives what all at once give."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from cases import Case, assert_close, load_merged, write_case
from safetensors.torch import load_file

import largemerge

WEIGHTS = [1.0, 2.0, 0.5, 1.5]


def make_experts(folder: Path, architecture: str, method: str, *, samples: int = 60, **parameters: Any) -> Case:
    """Four experts with their data, and the configuration that merges all at once."""
    kind = tiny_models.ARCHITECTURES[architecture].kind
    models = [tiny_models.perturbed(architecture, seed) for seed in range(4)]
    inputs = [tiny_models.inputs(kind, samples + 5 * seed, seed) for seed in range(4)]
    return write_case(folder, models, inputs, method=method, weights=WEIGHTS, **parameters)


def step(case: Case, numbers: list[int], previous: Path | None = None, **more: Any) -> dict[str, Any]:
    """The configuration that merges some of the experts into an earlier merge."""
    config = copy.deepcopy(case.config)
    config["models"] = [config["models"][number] for number in numbers]
    config["sequence"] = {"keep_sums": True} | ({"previous": str(previous)} if previous is not None else {}) | more
    return config


def merge_in_steps(case: Case, steps: list[list[int]]) -> Path:
    """Merges the experts step by step; returns the folder of the last merge."""
    out: Path | None = None
    for number, numbers in enumerate(steps):
        config = step(case, numbers, out)
        out = case.folder / f"step{number}"
        largemerge.merge(config, out)
    assert out is not None
    return out


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [
        ("llama", {}),
        ("llama", {"off_diagonal_scale": 1.0}),
        ("gpt2", {}),
        ("t5", {}),
        ("clip_vision", {"off_diagonal_scale": 0.5}),
        ("mixtral", {}),
    ],
)
def test_one_after_the_other_is_all_at_once(tmp_path: Path, architecture: str, parameters: dict[str, Any]) -> None:
    case = make_experts(tmp_path, architecture, "regmean", **parameters)
    largemerge.merge(case.config, tmp_path / "batch")
    out = merge_in_steps(case, [[0, 1], [2], [3]])
    assert_close(load_merged(case, out), load_merged(case, tmp_path / "batch"), 2e-4)
