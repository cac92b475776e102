"""Merges with exact inputs and calibrated targets, written plainly: whole models in float64, hooks, dense solves.

Block after block, and in a block group after group of linears that read the same tensor, W* minimises

    Σ_i α_i ‖ X_i Wᵀ − T_i ‖² + λ ‖ W − W_a ‖²,    T_i = (1−β) X_i W_iᵀ + β E_i W_iᵀ + γ D_i,    α_i = c_i / (Σc · N_i)

    X_i  [n_i, I]  what the group reads on candidate i's data, once everything before it is merged
    E_i  [n_i, I]  what it reads there in the candidate's own model
    D_i  [n_i, O]  how far the tensor that the linear's output is added to is from the candidate's own

where β is the target, γ the drift, and N_i is n_i, or the norm of X_iᵀX_i. W_a is the weighted average, which all
that is not solved keeps, or lies on the line from a base through it. With shrinkage, what T_i adds to X_i W_iᵀ is
multiplied by the root of the part of its energy in which folds of the samples agree.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Literal

import torch
from reference import Tensors, blocks_of, linears_of, rows_that_count
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from largemerge.regression.shrinkage import combinations

Place = tuple[str, Literal["input", "output"]]
"""A module's name and a side of it: where hooks see a tensor."""
Rows = dict[Place, torch.Tensor]

BLOCK: Place = ("", "input")


def _before(module: str) -> list[Place]:
    return [(module, "input")]


_LLAMA = {"self_attn.o_proj": [BLOCK], "mlp.down_proj": _before("post_attention_layernorm")}
_BERT = {"attention.output.dense": [BLOCK], "output.dense": _before("intermediate.dense")}
_CLIP = {"self_attn.out_proj": [BLOCK], "mlp.fc2": _before("layer_norm2")}

RESIDUALS: dict[str, dict[str, list[Place]]] = {
    # Normalised before attention and before the MLP: x + f(norm(x)).
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": {"attn.c_proj": [BLOCK], "mlp.c_proj": _before("ln_2")},
    "opt": {"self_attn.out_proj": [BLOCK], "fc2": _before("final_layer_norm")},
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _CLIP,
    "vit": {
        "attention.o_proj": [BLOCK],
        "mlp.fc2": _before("layernorm_after"),
        "attention.output.dense": [BLOCK],  # these two in older Transformers
        "output.dense": _before("layernorm_after"),
    },
    "t5": {
        "layer.0.SelfAttention.o": [BLOCK],
        "layer.1.EncDecAttention.o": _before("layer.1.layer_norm"),
        "layer.1.DenseReluDense.wo": _before("layer.1.layer_norm"),
        "layer.2.DenseReluDense.wo": _before("layer.2.layer_norm"),
    },
    # Normalised after the sum: norm(x + f(x)).
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {"attention.out_lin": [BLOCK], "ffn.lin2": _before("ffn.lin1")},
    "bart": {
        "self_attn.out_proj": [BLOCK],
        "encoder_attn.out_proj": _before("encoder_attn.q_proj"),
        "fc2": _before("fc1"),
    },
    # Attention and MLP side by side: x + attention(x) + mlp(x).
    "gpt_neox": {"attention.dense": [BLOCK], "mlp.dense_4h_to_h": [BLOCK, ("attention.dense", "output")]},
    # What the linears give is normalised or scaled before it is added.
    "gemma2": {},
    "gemma3_text": {},
    "olmo2": {},
    "dinov2": {},
}
"""By model type: the linears of a block whose output is added to something, and where that is seen in the block."""


def merge(
    models: list[PreTrainedModel],
    inputs: list[Tensors],
    c: list[float],
    *,
    inputs_from: Literal["merged", "candidate"] = "merged",
    granularity: Literal["linear", "average", "block"] = "linear",
    target: float = 0.0,
    drift: float = 0.0,
    scale: float = 1.0,
    ridge: float = 0.0,
    solve: Collection[str] = ("blocks",),
    normalization: Literal["tokens", "frobenius"] = "tokens",
    base: PreTrainedModel | None = None,
    anchor_scale: float = 0.0,
    shrinkage: bool = False,
) -> PreTrainedModel:
    """The merged model, in float64.

    The blocks before come from `inputs_from`. With granularity `block` the block itself is the candidate's own, and the
    drift is what that model sees; with `linear` it is the merged one, with `average` the candidates' average. A head
    reads what `inputs_from` says. With a `base` the anchor is W_0 + `anchor_scale` Σ Δ_i.
    """
    models = [copy.deepcopy(model).double() for model in models]
    merged = average(models, c)
    start = copy.deepcopy(merged)
    anchor = (
        start if base is None else average([copy.deepcopy(base).double(), start], [1 - (s := anchor_scale * len(c)), s])
    )
    calls = first_inputs(merged, inputs[0])
    numbers = {
        "target": target,
        "drift": drift,
        "scale": scale,
        "ridge": ridge,
        "by_norm": normalization == "frobenius",
        "samples": inputs if shrinkage else None,
    }
    own = [rows_seen(model, places_of(model, list(calls)), x) for model, x in zip(models, inputs, strict=True)]

    if "head" in solve and has_tied_head(merged):
        merge_linears(merged, models, anchor, own, own, [tied_head(merged)], c, **numbers)
    for block_name, block in blocks_of(merged) if "blocks" in solve else []:
        for group in groups(calls, linears_of(block_name, block)):
            if granularity == "block":
                used = [with_block_of(model, merged, block_name) for model in models]
            elif granularity == "average":
                used = [with_block_of(start, merged, block_name)] * len(models)
            else:
                used = [merged] * len(models)
            if inputs_from == "candidate":
                used = [with_block_of(u, model, block_name) for u, model in zip(used, models, strict=True)]
            seen = [rows_seen(u, places_of(merged, group), x) for u, x in zip(used, inputs, strict=True)]
            merge_linears(merged, models, anchor, own, seen, group, c, **numbers)
    if "head" in solve:
        for group in groups(calls, head_linears(merged, calls)):
            used = models if inputs_from == "candidate" else [merged] * len(models)
            seen = [rows_seen(u, places_of(merged, group), x) for u, x in zip(used, inputs, strict=True)]
            merge_linears(merged, models, anchor, own, seen, group, c, **numbers)
    return merged


def merge_linears(
    merged: PreTrainedModel,
    models: list[PreTrainedModel],
    anchor: PreTrainedModel,
    own: list[Rows],
    seen: list[Rows],
    names: Iterable[str],
    c: list[float],
    *,
    target: float,
    drift: float,
    scale: float,
    ridge: float,
    by_norm: bool,
    samples: list[Tensors] | None,
) -> None:
    """Puts solved weights into `merged`; `own` are rows of the candidates' own models, `seen` those to be mapped."""
    names = list(names)
    num_inputs = own[0][names[0], "input"].shape[1]
    signs = combinations({name: outputs_of(merged.get_submodule(name)) for name in names}, num_inputs)
    for name in names:
        linear = merged.get_submodule(name)
        is_conv = isinstance(linear, Conv1D)  # its weight is [in, out]
        weights = [model.get_submodule(name).weight.detach() for model in models]
        weights = [weight.T if is_conv else weight for weight in weights]
        kept = anchor.get_submodule(name).weight.detach()
        kept = kept.T if is_conv else kept
        x, e = ([rows[name, "input"] for rows in every] for every in (seen, own))
        places = residual_places(merged, name)
        d = [sum(o[place] - s[place] for place in places) for o, s in zip(own, seen, strict=True)]
        folds = None
        if samples is not None and (target or drift):
            folds = [fold_of_rows(merged, name, len(rows), samples, i) for i, rows in enumerate(x)]
        in_head = block_of(merged, name) is None
        by = combinations({"": x[0].shape[1]}, x[0].shape[1])[""] if in_head else signs[name]
        solved = solve_linear(
            weights, kept, x, e, d if places else None, c, target, drift, scale, ridge, by_norm, folds, by, in_head
        )
        with torch.no_grad():
            linear.weight.copy_(solved.T if is_conv else solved)


def solve_linear(
    weights: list[torch.Tensor],
    anchor: torch.Tensor,
    x: list[torch.Tensor],
    e: list[torch.Tensor],
    d: list[torch.Tensor] | None,
    c: list[float],
    target: float,
    drift: float,
    scale: float,
    ridge: float,
    by_norm: bool,
    folds: list[torch.Tensor] | None,
    signs: torch.Tensor,
    in_head: bool,
) -> torch.Tensor:
    """W* [O, I]; `scale` is on everything off the Grams' diagonals, and on what the targets add.

    Folds agree, or not, in combinations of the outputs, `signs`; of the inputs for a head.
    """
    shares = [ci / sum(c) for ci in c]
    mean = sum(share * weight for share, weight in zip(shares, weights, strict=True))
    system, right = torch.zeros_like(mean.T @ mean), torch.zeros_like(mean)
    added = torch.zeros_like(mean)
    by_fold = torch.zeros(8, len(signs), mean.shape[1], dtype=mean.dtype)
    of_fold = torch.zeros(8, dtype=mean.dtype)
    for i, (share, weight) in enumerate(zip(shares, weights, strict=True)):
        gram = x[i].T @ x[i]
        alpha = share / (gram.norm() if by_norm else len(x[i]))
        gram = alpha * (scale * gram + (1 - scale) * gram.diagonal().diag())
        system += gram
        right += (weight - mean) @ gram
        wanted = target * (e[i] - x[i]) @ weight.T
        if d is not None:
            wanted = wanted + drift * d[i]
        added += scale * alpha * wanted.T @ x[i]
        for fold in range(8) if folds is not None else ():
            rows = folds[i] == fold
            compared = (target * (e[i] - x[i]) if in_head else wanted)[rows]
            by_fold[fold] += scale * alpha * signs.double() @ compared.T @ x[i][rows]
            of_fold[fold] += share * rows.sum() / len(rows)
    lam = ridge / len(c) if by_norm else ridge * system.diagonal().mean()
    system += lam * torch.eye(len(system), dtype=system.dtype)
    right += lam * (anchor - mean)
    inverse = torch.linalg.pinv(system, rtol=1e-11, hermitian=True)
    factor = 1.0
    if folds is not None:
        energies = torch.einsum("fqi,ij,gqj->fg", by_fold, inverse, by_fold)
        common = (energies.sum() - energies.trace()) / (1 - of_fold.square().sum())
        factor = float((common / energies.sum()).clamp(0, 1).sqrt()) if energies.sum() > 0 else 1.0
    return mean + (right + factor * added) @ inverse


def outputs_of(linear: nn.Module) -> int:
    """Number of outputs of a linear."""
    return linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]


def fold_of_rows(model: PreTrainedModel, name: str, num_rows: int, samples: list[Tensors], index: int) -> torch.Tensor:
    """Folds of the rows that a linear reads of one candidate's data: eight, over which the samples are spread."""
    counts = [len(next(iter(inputs.values()))) for inputs in samples]
    mask = rows_that_count(name if block_of(model, name) else f"decoder.{name}", samples[index])
    if mask is None or num_rows % int(mask.sum()) != 0:
        of_rows = torch.arange(counts[index]).repeat_interleave(num_rows // counts[index])
    else:
        of_rows = torch.arange(counts[index])[:, None].expand(mask.shape)[mask.bool()]
        of_rows = of_rows.repeat_interleave(num_rows // len(of_rows))
    if counts[index] == 1:
        return (torch.arange(num_rows) >= num_rows // 2) * 4
    return of_rows * 8 // counts[index]


def average(models: list[PreTrainedModel], c: list[float]) -> PreTrainedModel:
    """A model of weighted averages."""
    merged = copy.deepcopy(models[0])
    parameters = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(sum(ci * p[name] for ci, p in zip(c, parameters, strict=True)) / sum(c))
    return merged


def with_block_of(giver: PreTrainedModel, model: PreTrainedModel, block_name: str) -> PreTrainedModel:
    """A copy of `model` with one block of another."""
    hybrid = copy.deepcopy(model)
    hybrid.get_submodule(block_name).load_state_dict(giver.get_submodule(block_name).state_dict())
    return hybrid


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the output head is the input embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def tied_head(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def head_linears(model: PreTrainedModel, calls: Tensors) -> list[str]:
    """Linears outside the blocks that run after a block, in the order in which they run; a tied head is none."""
    blocks = [name for name, _ in blocks_of(model)]
    order = list(calls)
    after = order[order.index(blocks[0]) :]
    tied = tied_head(model) if has_tied_head(model) else ""
    return [name for name in after if block_of(model, name) is None and name != tied]


def groups(calls: Tensors, names: Collection[str]) -> list[list[str]]:
    """The named linears in the order in which they run, together where they read the same tensor."""
    found: dict[int, list[str]] = {}
    for name, tensor in calls.items():
        if name in names:
            found.setdefault(id(tensor), []).append(name)
    return list(found.values())


def block_of(model: PreTrainedModel, name: str) -> str | None:
    """Name of the block that a module is or is part of."""
    return next((block for block, _ in blocks_of(model) if f"{name}.".startswith(f"{block}.")), None)


def residual_places(model: PreTrainedModel, linear: str) -> list[Place]:
    """Where the tensors are seen that a linear's output is added to."""
    block = block_of(model, linear)
    if block is None:
        return []
    table = dict(RESIDUALS[model.config.model_type])
    if not getattr(model.config, "do_layer_norm_before", True):  # OPT
        table["fc2"] = _before("fc1")
    if not getattr(model.config, "use_parallel_residual", True):  # GPT-NeoX
        table["mlp.dense_4h_to_h"] = _before("post_attention_layernorm")
    places = table.get(linear.removeprefix(f"{block}."), [])
    return [(f"{block}.{module}".rstrip("."), side) for module, side in places]


def places_of(model: PreTrainedModel, names: Collection[str]) -> list[Place]:
    """What has to be seen to merge the named linears."""
    inputs: list[Place] = [(name, "input") for name in names]
    return inputs + [place for name in names for place in residual_places(model, name)]


def first_inputs(model: PreTrainedModel, inputs: Tensors) -> Tensors:
    """The very tensors that blocks and linears read, in the order in which they run."""
    blocks = [block for _, block in blocks_of(model)]
    found: Tensors = {}
    handles = []
    for name, module in model.named_modules():
        if module in blocks or isinstance(module, nn.Linear | Conv1D):
            hook = _record_input(found, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def _record_input(found: dict, key: object):
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        found.setdefault(key, args[0] if args else kwargs["hidden_states"])

    return hook


def _record_output(found: dict, key: object):
    def hook(_: nn.Module, args: tuple, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        found.setdefault(key, output if isinstance(output, torch.Tensor) else output[0])

    return hook


def run(model: PreTrainedModel, inputs: Tensors) -> None:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})


def rows_seen(model: PreTrainedModel, places: list[Place], inputs: Tensors) -> Rows:
    """The rows [n, width] at each place that are no padding."""
    # As in `reference`: with eager attention, in float64, a query that sees only padding gives NaN. Samples then run
    # one by one, without their padding, which must be on the right.
    is_eager_decoder = model.config._attn_implementation == "eager" and not model.config.is_encoder_decoder
    if not is_eager_decoder or "attention_mask" not in inputs:
        return _rows_seen(model, places, inputs)
    lengths = inputs["attention_mask"].sum(1)
    parts = [
        _rows_seen(model, places, {"input_ids": ids[None, :length]})
        for ids, length in zip(inputs["input_ids"], lengths, strict=True)
    ]
    return {place: torch.cat([part[place] for part in parts]) for place in places}


def _rows_seen(model: PreTrainedModel, places: list[Place], inputs: Tensors) -> Rows:
    found: Rows = {}
    handles = []
    for name, side in places:
        module = model.get_submodule(name)
        if side == "input":
            hook = _record_input(found, (name, side))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_record_output(found, (name, side))))
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return {place: _valid(model, place[0], found[place], inputs) for place in places}


def _valid(model: PreTrainedModel, name: str, tensor: torch.Tensor, inputs: Tensors) -> torch.Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1])
    # What follows the blocks of an encoder and a decoder follows the decoder.
    mask = rows_that_count(name if block_of(model, name) else f"decoder.{name}", inputs)
    is_pooled = mask is None or len(rows) != mask.numel()
    return rows if is_pooled else rows[mask.reshape(-1)]
