"""Models on disk whose neurons, heads and features have changed places, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from cases import weights_in
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from largemerge.checkpoint.index import open_checkpoint
from largemerge.weight_matching.plan import AlignPlan, plan_alignment
from largemerge.weight_matching.units import random_choice

METADATA = {"format": "pt"}


def plan_of(*folders: Path, residual_stream: bool = False) -> AlignPlan:
    """What is permuted in all models but the first, which they are brought close to."""
    opened = {str(folder): open_checkpoint(folder, folder.name) for folder in folders}
    return plan_alignment(opened, {}, str(folders[0]), residual_stream=residual_stream)


def load(folder: Path) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


def write_permuted(folder: Path, out: Path, noise: float = 0.0, *, residual_stream: bool = False) -> Path:
    """Saves a model with all its neurons and heads in random places, and with a little noise if asked for.

    The features of its residual streams, too, if that is asked for.
    """
    loaded = load(folder)
    generator = torch.Generator().manual_seed(0)
    for parameter in loaded.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * noise)
    loaded.save_pretrained(out)
    (model,) = plan_of(folder, out, residual_stream=residual_stream).models.values()
    weights, renamed = load_file(out / "model.safetensors"), model.model.mapping.renamed
    for block in model.blocks:
        choices = [random_choice(family, generator) for family in block.units.families]
        for name, axes in block.axes(choices).items():
            for axis, index in axes.items():
                weights[renamed[name]] = weights[renamed[name]].index_select(axis, index)
    for stream in model.streams:
        index = torch.randperm(stream.size, generator=generator)
        for tensor in stream.tensors:
            weights[tensor.key] = weights[tensor.key].index_select(tensor.axis, index)
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, out / "model.safetensors", METADATA)
    return out


def outputs(model: PreTrainedModel, kind: str) -> list[torch.Tensor]:
    """All numbers that a model returns."""
    with torch.no_grad():
        found = model(**tiny_models.inputs(kind, 2, 7))
    return [x for x in found.to_tuple() if isinstance(x, torch.Tensor)]


def assert_same(expected: Path, found: Path) -> None:
    """All tensors of two folders are the same, bit for bit."""
    theirs = weights_in(found)
    assert theirs.keys() == weights_in(expected).keys()
    for name, tensor in weights_in(expected).items():
        assert torch.equal(theirs[name], tensor), name


def merge_of(*folders: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(folder), "parameters": {"weight": 1 / len(folders)}} for folder in folders]
    return {"merge_method": "linear", "models": models, "align": "weights", **more}


def saved(folder: Path, family: str, task: str, **config: Any) -> Path:
    """Saves a small model of a class, all of its vectors made up."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "pad_token_id": 0}
    own = getattr(transformers, f"{family}Config")(**{**sizes, **heads, **config})
    torch.manual_seed(sum(map(ord, folder.name)))
    model = getattr(transformers, f"{family}{task}")(own)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.rand_like(parameter))
    model.save_pretrained(folder)
    return folder
