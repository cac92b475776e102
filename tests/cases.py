"""A case: candidates and calibration files on disk, the same in memory, and a configuration that merges them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedModel

import largemerge


@dataclass
class Case:
    """Candidates on disk, and the same in memory.

    Attributes:
        config: For `largemerge.merge`.
        models: The candidates.
        inputs: Their calibration tensors.
        folder: Where everything lies.
    """

    config: dict[str, Any]
    models: list[PreTrainedModel]
    inputs: list[dict[str, torch.Tensor]]
    folder: Path

    @property
    def weights(self) -> list[float]:
        return [model["parameters"]["weight"] for model in self.config["models"]]

    def write_yaml(self, name: str = "config.yaml") -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(self.config))
        return path


MakeCase = Callable[..., Case]


def load_merged(case: Case, out: Path) -> PreTrainedModel:
    """The merge in `out`; there must be a weight for every parameter, and no other."""
    model, info = type(case.models[0]).from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def merge_and_load(case: Case, name: str = "merged", **options: Any) -> PreTrainedModel:
    largemerge.merge(case.config, case.folder / name, **options)
    return load_merged(case, case.folder / name)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by their names on disk."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def files_in(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if not path.is_dir()}
