"""RegMean++ of CLIP vision towers, written plainly: whole models in float64, hooks, one dense solve per linear.

    python benchmarks/float64_reference.py JOB.json OUT

    G̃_i = ( s·X_iᵀX_i + (1-s)·diag(X_iᵀX_i) ) / tokens_i        W* = ( Σ W_i G̃_i ) ( Σ G̃_i )⁻¹

(arXiv 2508.03121.) All else is the plain mean of the candidates. Nothing is shared with largemerge. JOB.json is written
by `clip_vs_fusionbench.py`; the merged tower goes to OUT, the plain average to OUT/average.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionModel

SOLVED = tuple(f"{linear}.weight" for linear in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"))


@dataclass(frozen=True)
class Difference:
    """How far the solved weights of one tower lie from another's: ‖A - B‖ / ‖B‖, Frobenius."""

    overall: float
    """Over all of them as one vector."""
    worst: float
    """Of one linear, the largest."""
    worst_linear: str
    num_linears: int


def compare(folder: Path, reference: Path) -> Difference:
    """The difference of the solved weights in one checkpoint from those in another.

    Raises:
        ValueError: If the two do not hold the same linears.
    """
    found, expected = _solved(folder), _solved(reference)
    if found.keys() != expected.keys() or not found:
        raise ValueError(f"{folder} and {reference} hold different linears: {found.keys() ^ expected.keys()}")
    differences, norms = {}, {}
    for name in sorted(expected):
        weight_OI = _read(expected[name], name).double()
        differences[name] = (_read(found[name], name).double() - weight_OI).norm().item()
        norms[name] = weight_OI.norm().item()
    relative = {name: differences[name] / norms[name] for name in norms}
    worst = max(relative, key=lambda name: relative[name])
    overall = math.hypot(*differences.values()) / math.hypot(*norms.values())
    return Difference(overall, relative[worst], worst, len(relative))


def _solved(folder: Path) -> dict[str, Path]:
    """Name of every solved weight → its file."""
    files = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()
        files.update({name: path for name in names if name.endswith(SOLVED)})
    return files


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def average(candidates: list[CLIPVisionModel]) -> CLIPVisionModel:
    """The mean of every parameter."""
    merged = copy.deepcopy(candidates[0])
    parameters = [dict(candidate.named_parameters()) for candidate in candidates]
    for name, parameter in merged.named_parameters():
        parameter.copy_(torch.stack([own[name] for own in parameters]).mean(0))
    return merged


def merge(candidates: list[CLIPVisionModel], pixels: list[torch.Tensor], scale: float) -> CLIPVisionModel:
    """The merged tower, float64.

    Args:
        candidates: In float64.
        pixels: By candidate, `[images, 3, size, size]`, float64.
        scale: s, the factor on a Gram's off-diagonal.
    """
    merged = average(candidates)
    blocks = _blocks(merged)
    hidden = [_first_hidden_states(merged, images) for images in pixels]
    for index, block in enumerate(blocks):
        grams: dict[str, list[torch.Tensor]] = defaultdict(list)
        products: dict[str, list[torch.Tensor]] = defaultdict(list)
        for candidate, states in zip(candidates, hidden, strict=True):
            own = _blocks(candidate)[index]
            with _watched(own) as inputs:
                own(states, None)
            for name, linear in _linears(own).items():
                gram_II = _shrunk(inputs[name], scale)
                grams[name].append(gram_II)
                products[name].append(linear.weight @ gram_II)
        for name, linear in _linears(block).items():
            # The Gram is symmetric: W G = R is G Wᵀ = Rᵀ.
            solution_IO = torch.linalg.solve(torch.stack(grams[name]).sum(0), torch.stack(products[name]).sum(0).T)
            linear.weight.copy_(solution_IO.T)
        hidden = [block(states, None) for states in hidden]
    return merged


def _blocks(model: CLIPVisionModel) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _first_hidden_states(model: CLIPVisionModel, images: torch.Tensor) -> torch.Tensor:
    """What the first block is called with."""
    seen: list[torch.Tensor] = []
    handle = _blocks(model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(pixel_values=images)
    handle.remove()
    return seen[0]


@contextmanager
def _watched(block: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Keeps the inputs of linears, `[tokens, in]`."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor) -> None:
        inputs[name] = x.flatten(0, -2)

    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        for name, linear in _linears(block).items()
    ]
    yield inputs
    for handle in handles:
        handle.remove()


def _shrunk(x_NI: torch.Tensor, scale: float) -> torch.Tensor:
    gram_II = x_NI.T @ x_NI / len(x_NI)
    return scale * gram_II + (1 - scale) * gram_II.diagonal().diag()


@torch.no_grad()
def main() -> None:
    """Merges what the job names."""
    job_file, out = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    candidates = [CLIPVisionModel.from_pretrained(path, dtype=torch.float64) for path in job["models"].values()]
    pixels = [load_file(job["calibration"][name])["pixel_values"].double() for name in job["models"]]
    _save(merge(candidates, pixels, job["off_diagonal_scale"]), out)
    _save(average(candidates), out / "average")


def _save(model: CLIPVisionModel, folder: Path) -> None:
    """In float64, under the names that the candidates' files have."""
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": p for name, p in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


if __name__ == "__main__":
    main()
