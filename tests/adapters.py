"""Adapters for tiny models: written as peft would save them, or by peft itself, and what peft merges them to."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from cases import weights_in
from safetensors.torch import save_file
from transformers import PreTrainedModel

from largemerge.checkpoint.adapter_places import FindPlaces
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter, open_model, open_reader
from largemerge.model.adapter_names import AdapterNames

Tensors = dict[str, torch.Tensor]


def write_adapter(
    folder: Path,
    shapes: dict[str, tuple[int, int]],
    seed: int = 0,
    whole: Tensors | None = None,
    rank: int = 4,
    **more: Any,
) -> Tensors:
    """Saves an adapter for weights of these shapes as peft would; returns its tensors by their names there."""
    torch.manual_seed(seed)
    tensors: Tensors = {}
    for module, (out, inner) in shapes.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inner)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank)
    tensors |= whole or {}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": list(shapes), "bias": "none"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | more))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return tensors


def shapes_of(folder: Path, *modules: str) -> dict[str, tuple[int, int]]:
    weights = weights_in(folder)
    return {module: (weights[f"{module}.weight"].shape[0], weights[f"{module}.weight"].shape[1]) for module in modules}


def train_with_peft(model: PreTrainedModel, config: Any, folder: Path) -> None:
    """Saves an adapter of peft's, all of whose numbers have moved as if it had been trained."""
    import peft

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / 8)
        adapted.save_pretrained(str(folder))


def merged_by_peft(model: PreTrainedModel, *folders: Path) -> PreTrainedModel:
    """The model that peft makes of a model and adapters, one after the other."""
    import peft

    merged: Any = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for folder in folders:
            merged = peft.PeftModel.from_pretrained(merged, str(folder)).merge_and_unload()
    result: PreTrainedModel = merged
    return result


def read_all(reference: str, find_places: FindPlaces | None = None) -> tuple[Tensors, Checkpoint, Adapter]:
    """All tensors of a model with adapters by their names on disk; read by rows they must be the same."""
    checkpoint, adapter = open_model(reference, find_places=find_places or AdapterNames())
    assert adapter is not None
    with open_reader(checkpoint, adapter) as reader:
        found = {name: reader.read(name) for name in checkpoint.tensors}
    with open_reader(checkpoint, adapter) as reader:
        for name, tensor in found.items():
            assert checkpoint.tensors[name].dtype == tensor.dtype and checkpoint.tensors[name].shape == tensor.shape
            if tensor.dim() and len(tensor) > 2:
                size = len(tensor)
                slices = [slice(0, 1), slice(1, size - 1), slice(size - 1, size)]
                assert torch.equal(torch.cat([reader.read(name, rows) for rows in slices]), tensor), name
                rows = torch.tensor([size - 1, 0])
                assert torch.equal(reader.read(name, rows), tensor[rows]), name
    return found, checkpoint, adapter


def same(found: Tensors, wanted: Tensors) -> list[str]:
    """Names of the tensors that are not the same in both, bit for bit."""
    alike = {name for name in found.keys() & wanted.keys() if torch.equal(found[name], wanted[name])}
    return sorted((found.keys() | wanted.keys()) - alike)
