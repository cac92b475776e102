"""Candidates and calibration files on disk, made on the spot."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from cases import Case, MakeCase
from safetensors.torch import save_file
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture
def make_case(tmp_path: Path) -> MakeCase:
    """Writes K candidates of an architecture and their calibration data; returns a config that merges them."""

    def make(
        architecture: str = "llama",
        *,
        method: str = "regmean_plusplus",
        num_candidates: int = 2,
        num_samples: int = 24,
        batch_size: int = 7,
        padding: str = "right",
        weights: list[float] | None = None,
        dtype: torch.dtype = torch.float32,
        **parameters: Any,
    ) -> Case:
        kind = tiny_models.ARCHITECTURES[architecture].kind
        models, inputs, entries = [], [], []
        for index in range(num_candidates):
            model = tiny_models.perturbed(architecture, index).to(dtype)
            tensors = tiny_models.inputs(kind, num_samples, index, padding)
            model.save_pretrained(tmp_path / f"model{index}")
            save_file(tensors, tmp_path / f"data{index}.safetensors")
            models.append(model)
            inputs.append(tensors)
            entries.append(
                {
                    "model": str(tmp_path / f"model{index}"),
                    "calibration": {"data": str(tmp_path / f"data{index}.safetensors")},
                    "parameters": {"weight": weights[index] if weights else 1.0},
                }
            )
        config = {
            "merge_method": method,
            "models": entries,
            "calibration": {"batch_size": batch_size},
            "parameters": parameters,
        }
        return Case(config, models, inputs, tmp_path)

    return make
