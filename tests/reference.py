"""RegMean and RegMean++ written plainly: whole models in float64, hooks on every linear, dense solves.

Nothing here knows of stubs, streams, shared Grams or anchors; it follows the papers' formulas.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Tensors = dict[str, torch.Tensor]

STACKS = (
    "vision_model.encoder.layers",
    "text_model.encoder.layers",
    "encoder.layers",
    "encoder.layer",
    "encoder.block",
    "decoder.block",
    "model.encoder.layers",
    "model.decoder.layers",
    "decoder.layers",
    "model.layers",
    "vit.layers",
    "vit.encoder.layer",
    "transformer.h",
    "gpt_neox.layers",
    "bert.encoder.layer",
    "roberta.encoder.layer",
    "distilbert.transformer.layer",
    "transformer.layer",
    "layers",
)
CROSS = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")


def blocks_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """(name, block) in the order in which they run."""
    modules = dict(model.named_modules())
    lists = [name for name in STACKS if isinstance(modules.get(name), nn.ModuleList)]
    return [(f"{name}.{index}", block) for name in lists for index, block in enumerate(modules[name])]


def linears_of(block_name: str, block: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{block_name}.{name}": module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def rows_that_count(name: str, inputs: Tensors) -> torch.Tensor | None:
    """The padding mask for a linear's input, by its name."""
    if "vision_model" in name or ("pixel_values" in inputs and "input_ids" not in inputs):
        return None
    decoder = "decoder_input_ids" in inputs and ".decoder." in f".{name}" and not name.endswith(CROSS)
    mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    return None if mask is None else mask.bool()


def grams(model: PreTrainedModel, names: list[str], inputs: Tensors) -> Tensors:
    """XᵀX / tokens of the named linears, over all samples at once."""
    modules = dict(model.named_modules())
    collected: Tensors = {}

    def hook(name: str):
        def record(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            mask = rows_that_count(name, inputs)
            x = args[0].reshape(-1, args[0].shape[-1])
            x = x if mask is None else x[mask.reshape(-1)]
            collected[name] = x.T @ x / x.shape[0]

        return record

    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    for handle in handles:
        handle.remove()
    return collected


def trimmed_grams(model: PreTrainedModel, names: list[str], inputs: Tensors) -> Tensors:
    """The same, sample after sample without its padding (which must be on the right)."""
    lengths = inputs["attention_mask"].sum(1)
    total: Tensors = {}
    for ids, length in zip(inputs["input_ids"], lengths, strict=True):
        for name, gram in grams(model, names, {"input_ids": ids[None, :length]}).items():
            total[name] = total.get(name, 0) + gram * length / lengths.sum()
    return total


def solve(weights: list[torch.Tensor], gram: list[torch.Tensor], c: list[float], scale: float, ridge: float):
    """( Σ W_i G̃_i + λ W̄ ) ( Σ G̃_i + λ I )⁻¹; where that is singular, the solution nearest to the average."""
    scaled = [ci * (scale * g + (1 - scale) * g.diagonal().diag()) for ci, g in zip(c, gram, strict=True)]
    total = sum(scaled)
    mean = sum(ci * w for ci, w in zip(c, weights, strict=True)) / sum(c)
    system = total + ridge * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
    right = sum((w - mean) @ g for w, g in zip(weights, scaled, strict=True))
    return mean + right @ torch.linalg.pinv(system, rtol=1e-11, hermitian=True)


def merge(
    method: str,
    models: list[PreTrainedModel],
    inputs: list[Tensors],
    c: list[float],
    scale: float = 0.95,
    ridge: float = 0.0,
    include: str = "",
    base: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The merged model, in float64; linears in whose names is no `include` are averaged, or those of a base."""
    models = [copy.deepcopy(model).double() for model in models]
    merged = copy.deepcopy(models[0])
    parameters = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(sum(ci * p[name] for ci, p in zip(c, parameters, strict=True)) / sum(c))
        for block_name, block in blocks_of(merged) if base is not None else []:
            for name in linears_of(block_name, block):
                if include not in name:
                    merged.get_submodule(name).load_state_dict(base.get_submodule(name).state_dict())
    whole = None
    if method == "regmean":
        every = [name for block_name, block in blocks_of(merged) for name in linears_of(block_name, block)]
        whole = [_grams(model, every, x) for model, x in zip(models, inputs, strict=True)]
    pairs = list(zip(models, inputs, strict=True))
    for block_name, block in blocks_of(merged):
        names = list(linears_of(block_name, block))
        collected = whole or [_hybrid_grams(merged, model, block_name, names, x) for model, x in pairs]
        for name in filter(lambda name: include in name, names):
            conv = isinstance(merged.get_submodule(name), Conv1D)
            weights = [p[f"{name}.weight"].T if conv else p[f"{name}.weight"] for p in parameters]
            solved = solve(weights, [g[name] for g in collected], c, scale, ridge)
            with torch.no_grad():
                merged.get_submodule(name).weight.copy_(solved.T if conv else solved)
    return merged


def _hybrid_grams(
    merged: PreTrainedModel, candidate: PreTrainedModel, block_name: str, names: list[str], inputs: Tensors
) -> Tensors:
    """Merged blocks before `block_name`, the candidate's block there."""
    hybrid = copy.deepcopy(merged)
    hybrid.get_submodule(block_name).load_state_dict(candidate.get_submodule(block_name).state_dict())
    return _grams(hybrid, names, inputs)


def _grams(model: PreTrainedModel, names: list[str], inputs: Tensors) -> Tensors:
    # Eager attention adds float64's most negative number to float32 scores: a query that sees only padding gets
    # NaN, which a reference in float64 must not. T5, eager in older Transformers, adds no such number.
    is_eager_decoder = model.config._attn_implementation == "eager" and not model.config.is_encoder_decoder
    if is_eager_decoder and "attention_mask" in inputs:
        return trimmed_grams(model, names, inputs)
    return grams(model, names, inputs)
