"""LoRA adapters for tiny models, written as peft would save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cases import weights_in
from safetensors.torch import save_file

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
