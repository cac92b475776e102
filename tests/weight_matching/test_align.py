"""Models permuted to another before they are merged: outputs stay, and what was permuted comes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from cases import weights_in
from transformers import AutoModel, PreTrainedModel

import largemerge
from largemerge.checkpoint.index import open_checkpoint
from largemerge.weight_matching.plan import AlignPlan, plan_alignment
from largemerge.weight_matching.units import random_choice

FAST = ["llama", "gpt2", "gpt_neox", "bert", "t5", "clip"]
FAMILIES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in tiny_models.ARCHITECTURES]


def plan_of(*folders: Path) -> AlignPlan:
    """What is permuted in all models but the first, which they are brought close to."""
    return plan_alignment(
        {str(folder): open_checkpoint(folder, folder.name) for folder in folders}, {}, str(folders[0])
    )


def write_permuted(folder: Path, out: Path, seed: int = 0) -> Path:
    """Saves a model with all its neurons and heads in random places."""
    (model,) = plan_of(folder.parent / folder.name, out_of(folder, out)).models.values()
    generator = torch.Generator().manual_seed(seed)
    loaded = load(folder)
    state = loaded.state_dict()
    for block in model.blocks:
        choices = [random_choice(family, generator) for family in block.units.families]
        for name, axes in block.axes(choices).items():
            for axis, index in axes.items():
                state[name].copy_(state[name].index_select(axis, index))
    loaded.save_pretrained(out)
    return out


def out_of(folder: Path, out: Path) -> Path:
    """A copy of a model, so that a plan has two."""
    load(folder).save_pretrained(out)
    return out


def load(folder: Path) -> PreTrainedModel:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


def outputs(model: PreTrainedModel, kind: str) -> list[torch.Tensor]:
    """All numbers that a model returns, computed in float64."""
    inputs = tiny_models.inputs(kind, 2, 7)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        found = (
            model.double()(**inputs, use_cache=False)
            if kind != "vision" and kind != "clip"
            else model.double()(**inputs)
        )
    return [x for x in found.to_tuple() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_permuted_model_is_the_same_model_and_comes_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    original = tmp_path / "original"
    tiny_models.build(architecture).save_pretrained(original)
    permuted = write_permuted(original, tmp_path / "permuted")
    kind = tiny_models.ARCHITECTURES[architecture].kind
    expected, found = outputs(load(original), kind), outputs(load(permuted), kind)
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    changed = [
        name for name, tensor in weights_in(permuted).items() if not torch.equal(tensor, weights_in(original)[name])
    ]
    assert len(changed) > 3 * tiny_models.ARCHITECTURES[architecture].num_blocks
    config: dict[str, Any] = {
        "merge_method": "linear",
        "models": [
            {"model": str(original), "parameters": {"weight": 0.5}},
            {"model": str(permuted), "parameters": {"weight": 0.5}},
        ],
        "align": "weights",
    }
    largemerge.merge(config, tmp_path / "merged")
    merged = weights_in(tmp_path / "merged")
    for name, tensor in weights_in(original).items():
        assert torch.equal(merged[name], tensor), name
