"""Essential Subspace Merging against a plain dense float64 implementation of its formulas, and what it refuses.

Of linears       W_0 + f · scale · s̄_U s̄_V · polar(U) polar(V), f = (‖M‖ / mean ‖M‖)² over the layers of one kind
Everything else  Σ W_i / K
"""

from __future__ import annotations

import copy

import pytest
import reference
import tiny_models
import torch
from cases import MakeCase, assert_close, merge_and_load, report_of, with_base
from reference import Tensors
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import largemerge


def polar(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P Qᵀ of P S Qᵀ without directions that are zero, and the mean of S."""
    p, s, q = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return p[:, kept] @ q[kept], s.mean()


def dense_merge(
    deltas: list[torch.Tensor], grams: list[torch.Tensor], scale: float = 2.0, power: float = 0.15
) -> torch.Tensor:
    """M of one linear, by the outputs' side alone."""
    k = max(1, len(deltas[0]) // len(deltas))
    mean = sum(delta.norm() for delta in deltas) / len(deltas)
    lefts, rights = [], []
    for delta, gram in zip(deltas, grams, strict=True):
        values, vectors = torch.linalg.eigh(delta @ gram @ delta.T)
        values, vectors = values.flip(0)[:k].clone(), vectors.flip(1)[:, :k]
        values[values < 1e-6 * values[0].clamp_min(1e-300)] = 0
        e = torch.where(values > 0, (values / values.mean()) ** power, 0) if values[0] > 0 else torch.zeros_like(values)
        e = e / e.mean() if values[0] > 0 else e
        lefts.append(vectors * e)
        rights.append(e[:, None] * (vectors.T @ delta) * (delta.norm() / mean) ** 2)
    u, v = torch.cat(lefts, 1), torch.cat(rights, 0)
    c = v.norm(dim=0)
    (left, s_u), (right, s_v) = polar(u), polar(v * (c / c.mean()) ** 2)
    return scale * s_u * s_v * left @ right


def dense_esm(
    models: list[PreTrainedModel],
    inputs: list[Tensors],
    base: PreTrainedModel,
    *,
    scale_layers: bool = True,
    **settings: float,
) -> PreTrainedModel:
    """The merged model, in float64."""
    models = [copy.deepcopy(model).double() for model in models]
    merged, base = copy.deepcopy(base).double(), copy.deepcopy(base).double()
    blocks = [(name, reference.linears_of(name, block)) for name, block in reference.blocks_of(base)]
    linears: dict[str, nn.Module] = {name: linear for _, of_block in blocks for name, linear in of_block.items()}
    grams = [reference._grams(model, list(linears), x) for model, x in zip(models, inputs, strict=True)]
    moved = {}
    for name, linear in linears.items():
        deltas = [model.get_submodule(name).weight.data - linear.weight.data for model in models]
        deltas = [delta.T for delta in deltas] if isinstance(linear, Conv1D) else deltas
        moved[name] = dense_merge(deltas, [gram[name] for gram in grams], **settings)
    if scale_layers:
        kinds: dict[str, list[str]] = {}
        for block_name, of_block in blocks:
            stack = block_name.rpartition(".")[0]
            for name in of_block:
                kinds.setdefault(stack + name.removeprefix(block_name), []).append(name)
        for names in kinds.values():
            norms = {name: moved[name].norm() for name in names}
            for name in names:
                moved[name] = moved[name] * (norms[name] / (sum(norms.values()) / len(names))) ** 2
    start = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            module, _, leaf = name.rpartition(".")
            if module in linears and leaf == "weight":
                delta = moved[module].T if isinstance(linears[module], Conv1D) else moved[module]
                parameter.copy_(start[name] + delta)
            else:
                parameter.copy_(sum(dict(model.named_parameters())[name] for model in models) / len(models))
    return merged


QUICK = ("llama", "gpt2", "t5", "vit")
"""Architectures that differ most; all others are slow tests."""


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny_models.ARCHITECTURES],
)
def test_every_architecture_agrees_with_the_formulas(make_case: MakeCase, architecture: str) -> None:
    case = make_case(architecture, method="esm")
    base = with_base(case, architecture)
    plan = largemerge.plan(case.config, probe=False)
    merged = merge_and_load(case)
    assert_close(merged, dense_esm(case.models, case.inputs, base), tolerance=2e-3)
    report = report_of(case.folder / "merged")
    assert report["bytes_read"] == plan.bytes_read and report["bytes_written"] == plan.bytes_written
    assert not (case.folder / "merged" / ".largemerge").exists()
