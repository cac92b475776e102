"""CLIP vision towers that were never trained, and real images to calibrate them on.

A base has random weights of the sizes that a working transformer has: linears keep the scale of what passes through
them, those that write into the residual stream are smaller by the root of their number, the gains of norms are spread.
A candidate is the base and a small random difference in every tensor. Names on disk are those of the Hub's
checkpoints (`vision_model.…`), which every release of Transformers reads.

Images are scikit-learn's handwritten digits, one digit per task, each task in its own colours and orientation.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from transformers import CLIPVisionConfig, CLIPVisionModel

DIFFERENCE = 0.02
"""Of a candidate from the base, as a fraction of each tensor's root mean square."""
GRAIN = 0.1
"""Noise on the pixels, which run from 0 to 1: an enlarged 8 × 8 image has no texture of its own."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Geometry:
    """Shape of a vision tower."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int = 224

    def config(self) -> CLIPVisionConfig:
        """For Transformers."""
        return CLIPVisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            patch_size=self.patch_size,
            image_size=self.image_size,
            architectures=["CLIPVisionModel"],
            dtype="float32",
        )


VIT_B_32 = Geometry(768, 3072, 12, 12, patch_size=32)
VIT_L_14 = Geometry(1024, 4096, 24, 16, patch_size=14)
TINY = Geometry(64, 256, 3, 4, patch_size=16, image_size=64)


def make_checkpoints(folder: Path, geometry: Geometry, tasks: list[str]) -> dict[str, Path]:
    """Writes `base` and one candidate per task in float32, unless these very ones are there.

    Args:
        folder: Where they go.
        geometry: Of the towers.
        tasks: Names; the number of a task is the seed of its candidate.

    Returns:
        Name → folder; `base` first.
    """
    folders = {name: folder / name for name in ("base", *tasks)}
    wanted = json.dumps([dataclasses.asdict(geometry), tasks, DIFFERENCE])
    marker = folder / "made.json"
    if marker.is_file() and marker.read_text() == wanted:
        return folders
    shutil.rmtree(folder, ignore_errors=True)
    base = _base_tensors(geometry)
    for seed, (name, target) in enumerate(folders.items()):
        print(f"writing {target.name} of {folder.name}", flush=True)
        tensors = base if name == "base" else _candidate_tensors(base, seed)
        geometry.config().save_pretrained(target)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    marker.write_text(wanted)
    return folders


def _base_tensors(geometry: Geometry) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with init_empty_weights():
        model = CLIPVisionModel(geometry.config())
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        tensors[f"vision_model.{name.removeprefix('vision_model.')}"] = _scaled(name, noise, geometry.num_layers)
    return tensors


def _scaled(name: str, noise: torch.Tensor, num_layers: int) -> torch.Tensor:
    if "norm" in name and name.endswith("weight"):
        return (0.3 * noise).exp()
    if noise.dim() == 1:
        return 0.02 * noise
    std = 1 / math.sqrt(noise[0].numel())
    if name.endswith(("out_proj.weight", "fc2.weight")):
        std /= math.sqrt(2 * num_layers)
    return std * noise


def _candidate_tensors(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator) * (DIFFERENCE * tensor.square().mean().sqrt())
        for name, tensor in base.items()
    }


def make_images(folder: Path, tasks: list[str], num_images: int, size: int) -> dict[str, Path]:
    """Writes the calibration images of every task: a .safetensors file with `pixel_values` `[images, 3, size, size]`.

    Args:
        folder: Where the files go.
        tasks: Names.
        num_images: Per task.
        size: Height and width in pixels.

    Returns:
        Task → file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    files = {}
    for number, task in enumerate(tasks):
        eights = torch.from_numpy(digits.images[digits.target == number % 10][:num_images]).float() / 16
        if len(eights) < num_images:
            raise SystemExit(f"{task}: {num_images} images wanted, there are {len(eights)} of its digit")
        files[task] = folder / f"{task}.safetensors"
        save_file({"pixel_values": _pixels(eights, number, size)}, files[task])
    return files


def _pixels(eights: torch.Tensor, number: int, size: int) -> torch.Tensor:
    """Images `[N, 8, 8]` from 0 to 1, enlarged, turned, coloured and normalised as CLIP's processor would."""
    generator = torch.Generator().manual_seed(number)
    large = torch.nn.functional.interpolate(eights[:, None], size=(size, size), mode="bilinear")
    ink, paper = torch.rand(2, 3, 1, 1, generator=generator)
    coloured = torch.rot90(paper + (ink - paper) * large, number % 4, dims=(2, 3))
    grainy = (coloured + GRAIN * torch.randn(coloured.shape, generator=generator)).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((grainy - mean) / std).contiguous()
