"""LOT Merging against a plain dense float64 implementation of its two formulas, and what it refuses.

Of linears       W_0 + ( Σ Δ_i G_i ) ( Σ G_i )⁺            G_i = X_iᵀX_i / N_i · c_i
Of norms         w_0 + Σ α_i s_i ∘ δ_i / Σ α_i s_i         s_i = Σ_n x̂_in², α_i = c_i / N_i
Everything else  W_0 + Σ c_i Δ_i / Σ c_i
"""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import processes
import pytest
import reference
import tiny_models
import torch
from cases import Case, MakeCase, assert_close, merge_and_load, report_of, weights_in, with_base
from processes import (
    PARTS,
    assert_agree,
    check_unbroken,
    device_of_ranks,
    make_long_case,
    make_uneven_case,
    merging,
    parts,
    run_ranks,
)
from reference import Tensors
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import largemerge
from largemerge import ConfigError
from largemerge.regression import passes
from largemerge.regression.averages import RunningScales


def norms_of(model: PreTrainedModel) -> list[str]:
    """Names of the norms in the blocks, but for those that read heads before tokens, which are averaged."""
    others = ("q_norm", "k_norm") if model.config.model_type == "gemma3_text" else ()
    return [
        f"{block_name}.{name}"
        for block_name, block in reference.blocks_of(model)
        for name, module in block.named_modules()
        if module.__class__.__name__.endswith(("LayerNorm", "RMSNorm")) and not name.endswith(others or "\n")
    ]


def normalised(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a norm's scale multiplies."""
    if isinstance(module, nn.LayerNorm):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + module.eps).sqrt()
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def squares(model: PreTrainedModel, names: list[str], inputs: Tensors) -> tuple[Tensors, dict[str, int]]:
    """Σ x̂² of the named norms over all rows that count; and how many tokens these are."""
    is_eager_decoder = model.config._attn_implementation == "eager" and not model.config.is_encoder_decoder
    if not is_eager_decoder or "attention_mask" not in inputs:
        return _squares(model, names, inputs)
    # As in `reference`: sample after sample, without the padding on the right.
    lengths = inputs["attention_mask"].sum(1)
    pairs = zip(inputs["input_ids"], lengths, strict=True)
    parts = [_squares(model, names, {"input_ids": ids[None, :length]})[0] for ids, length in pairs]
    return {name: sum(part[name] for part in parts) for name in names}, dict.fromkeys(names, int(lengths.sum()))


def _squares(model: PreTrainedModel, names: list[str], inputs: Tensors) -> tuple[Tensors, dict[str, int]]:
    found: Tensors = {}
    rows: dict[str, int] = {}

    def hook(name: str):
        def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = normalised(module, args[0])
            mask = reference.rows_that_count(name, inputs)
            rows[name] = x.shape[:-1].numel() if mask is None else int(mask.sum())
            if mask is not None:
                x = x.reshape(mask.numel(), -1, x.shape[-1])[mask.reshape(-1)]
            found[name] = x.reshape(-1, x.shape[-1]).square().sum(0)

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    for handle in handles:
        handle.remove()
    return found, rows


def dense_lot(
    models: list[PreTrainedModel], inputs: list[Tensors], c: list[float], base: PreTrainedModel
) -> PreTrainedModel:
    """The merged model, in float64."""
    models = [copy.deepcopy(model).double() for model in models]
    merged, base = copy.deepcopy(base).double(), copy.deepcopy(base).double()
    start, parameters = dict(base.named_parameters()), [dict(model.named_parameters()) for model in models]
    linears = [
        name for block_name, block in reference.blocks_of(base) for name in reference.linears_of(block_name, block)
    ]
    norms = norms_of(base)
    grams = [reference._grams(model, linears, x) for model, x in zip(models, inputs, strict=True)]
    seen = [squares(model, norms, x) for model, x in zip(models, inputs, strict=True)]
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            deltas = [p[name] - start[name] for p in parameters]
            module, _, leaf = name.rpartition(".")
            if module in linears and leaf == "weight":
                is_conv = isinstance(base.get_submodule(module), Conv1D)
                own = [ci * gram[module] for ci, gram in zip(c, grams, strict=True)]
                right = sum((d.T if is_conv else d) @ g for d, g in zip(deltas, own, strict=True))
                moved = right @ torch.linalg.pinv(sum(own), rtol=1e-11, hermitian=True)
                parameter.copy_(start[name] + (moved.T if is_conv else moved))
            elif module in norms and leaf == "weight":
                alphas = [ci / rows[module] for ci, (_, rows) in zip(c, seen, strict=True)]
                weights = [alpha * found[module] for alpha, (found, _) in zip(alphas, seen, strict=True)]
                parameter.copy_(start[name] + sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights))
            else:
                parameter.copy_(start[name] + sum(ci * d for ci, d in zip(c, deltas, strict=True)) / sum(c))
    return merged


def plan_of(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = largemerge.plan(case.config, probe=False).to_json()
    return found


QUICK = ("llama", "gpt2", "bert", "t5", "clip", "vit", "gemma2", "mixtral")
"""Architectures that differ most; all others are slow tests."""
WEIGHTED = "the scale of a norm: weighted by the squares of what it multiplies"


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny_models.ARCHITECTURES],
)
def test_every_architecture_agrees_with_the_formulas(make_case: MakeCase, architecture: str) -> None:
    case = make_case(architecture, method="lot", weights=[1.0, 3.0])
    base = with_base(case, architecture)
    plan = plan_of(case)["not_solved"]
    weighted = {name.removesuffix(".weight") for name, entry in plan.items() if entry["reason"] == WEIGHTED}
    assert weighted == set(norms_of(base))
    expected = dense_lot(case.models, case.inputs, case.weights, base)
    assert_close(merge_and_load(case), expected, tolerance=5e-4)


@pytest.mark.parametrize("num_candidates", [3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_numbers_of_models_and_padding(
    make_case: MakeCase, architecture: str, padding: str, num_candidates: int
) -> None:
    weights = [1.0, 0.25, 3.0, 1.5, 0.5][:num_candidates]
    case = make_case(architecture, method="lot", num_candidates=num_candidates, padding=padding, weights=weights)
    base = with_base(case, architecture)
    assert_close(merge_and_load(case), dense_lot(case.models, case.inputs, weights, base), tolerance=5e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_directions_that_no_data_has_are_the_bases(make_case: MakeCase, architecture: str) -> None:
    """Fewer tokens than inputs: the pseudoinverse moves nothing there."""
    case = make_case(architecture, method="lot", num_samples=1)
    base = with_base(case, architecture)
    for number, ids in enumerate(([[5, 7]], [[9, 3]])):
        case.inputs[number] = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(1, 2, dtype=torch.int64)}
    for number, tensors in enumerate(case.inputs):
        save_file(tensors, case.folder / f"data{number}.safetensors")
    merged = merge_and_load(case)
    assert_close(merged, dense_lot(case.models, case.inputs, case.weights, base), tolerance=2e-3)
    report = next(iter(report_of(case.folder / "merged")["blocks"].values()))["linears"]
    assert {entry["solver"] for entry in report.values()} == {"eigenvalues_float64"}
    assert all("keep the anchor" in entry["fallbacks"][0] for entry in report.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identical_models_give_themselves_back(make_case: MakeCase, dtype: torch.dtype) -> None:
    """With the base, whose directions that no data has are kept: with data in all of them."""
    case = make_case("vit", method="lot", dtype=dtype)
    with_base(case, "vit")
    case.config["models"][1]["model"] = case.config["models"][0]["model"]
    case.config["models"][1]["name"] = "again"
    case.config["compute_dtype"] = "float32"
    merged = merge_and_load(case)
    norms = {f"{name}.weight" for name in norms_of(case.models[0])}
    of_model = dict(case.models[0].named_parameters())
    for name, parameter in merged.named_parameters():
        if name in norms:
            assert torch.equal(parameter, of_model[name]), name
    assert_close(merged, case.models[0], tolerance=3e-3 if dtype is torch.bfloat16 else 5e-4)


def test_models_that_are_the_base_change_nothing(make_case: MakeCase) -> None:
    case = make_case("llama", method="lot")
    case.config["base_model"] = case.config["models"][0]["model"]
    case.config["models"][1]["model"] = case.config["models"][0]["model"]
    case.config["models"][1]["name"] = "again"
    merged = merge_and_load(case)
    for name, parameter in case.models[0].named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter), name


def test_the_order_of_models_does_not_matter(make_case: MakeCase) -> None:
    case = make_case("bert", method="lot", num_candidates=3, weights=[1.0, 2.0, 0.5])
    with_base(case, "bert")
    largemerge.merge(case.config, case.folder / "one")
    case.config["models"].reverse()
    largemerge.merge(case.config, case.folder / "other")
    assert_agree(case.folder / "one", case.folder / "other", tolerance=5e-4)


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus"])
def test_other_methods_may_weigh_norms_too(make_case: MakeCase, method: str) -> None:
    """RegMean with LOT's choices is LOT; RegMean++ sees other inputs."""
    settings = {"anchor": "base", "off_diagonal_scale": 1.0, "ridge": 0.0, "solve": ["blocks", "norms"]}
    case = make_case("llama", method=method, **settings)
    base = with_base(case, "llama")
    largemerge.merge(case.config, case.folder / "merged")
    case.config |= {"merge_method": "lot", "parameters": {}}
    largemerge.merge(case.config, case.folder / "lot")
    if method == "regmean":
        assert_agree(case.folder / "merged", case.folder / "lot", tolerance=0.0)
        return
    merged, lot = weights_in(case.folder / "merged"), weights_in(case.folder / "lot")
    first = "model.layers.0.input_layernorm.weight"  # embeddings are the average there, and each model's own
    assert not torch.equal(merged[first], lot[first])
    average = sum(model.state_dict()[first] for model in case.models) / 2
    assert not torch.allclose(merged[first], average, rtol=1e-4)
    assert base is not None


def test_the_plan_counts_what_is_read_of_the_base(make_case: MakeCase) -> None:
    case = make_case("llama", method="lot", num_samples=4)
    base = with_base(case, "llama")
    read = largemerge.plan(case.config, probe=False).bytes_read
    case.config["parameters"] = {"anchor": "average"}
    linears = [linear for block in reference.blocks_of(base) for linear in reference.linears_of(*block).values()]
    of_base = sum(linear.weight.nbytes for linear in linears)
    assert read - largemerge.plan(case.config, probe=False).bytes_read == of_base
    report = largemerge.merge(case.config, case.folder / "average")
    case.config["parameters"] = {}
    assert largemerge.merge(case.config, case.folder / "base").bytes_read - report.bytes_read == of_base


def test_without_norms_they_are_averaged(make_case: MakeCase) -> None:
    case = make_case("llama", method="lot", solve=["blocks"])
    with_base(case, "llama")
    merged = merge_and_load(case)
    for name in norms_of(case.models[0]):
        mean = sum(model.get_submodule(name).weight for model in case.models) / 2
        torch.testing.assert_close(merged.get_submodule(name).weight, mean, rtol=1e-6, atol=1e-7)


def test_norms_that_are_excluded_are_the_bases(make_case: MakeCase) -> None:
    case = make_case("llama", method="lot", exclude=["input_layernorm"])
    base = with_base(case, "llama")
    merged = merge_and_load(case)
    reasons = plan_of(case)["not_solved"]
    for name in norms_of(base):
        own, of_base = merged.get_submodule(name).weight, base.get_submodule(name).weight
        assert torch.equal(own, of_base) == ("input_layernorm" in name), name
        assert (reasons[f"{name}.weight"]["reason"] == "excluded") == ("input_layernorm" in name)


@pytest.mark.parametrize("architecture", [pytest.param("llama", marks=pytest.mark.slow), "bert"])
def test_several_passes_give_the_same(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short a block is run for some of its linears at a time, and once for the norms."""
    case = make_uneven_case(tmp_path, architecture, "lot")
    with_base(case, architecture)
    largemerge.merge(case.config, tmp_path / "one")
    original = passes.block_passes
    monkeypatch.setattr(
        passes, "block_passes", lambda block, roles, num, *, advances: original(block, roles, 3, advances=advances)
    )
    largemerge.merge(case.config, tmp_path / "three")
    assert_agree(tmp_path / "three", tmp_path / "one", tolerance=1e-6)


@pytest.mark.parametrize(
    ("architecture", "size"),
    [pytest.param("llama", 2, marks=pytest.mark.slow), ("bert", 3), pytest.param("t5", 2, marks=pytest.mark.slow)],
)
def test_ranks_agree_with_one(tmp_path: Path, architecture: str, size: int) -> None:
    case = make_uneven_case(tmp_path, architecture, "lot")
    with_base(case, architecture)
    case.write_yaml()
    largemerge.merge(case.config, tmp_path / "alone", device=device_of_ranks(size))
    run_ranks(merging(case, tmp_path / "out"), tmp_path, size)
    assert_agree(tmp_path / "out", tmp_path / "alone", tolerance=3e-4)  # systems without a ridge
    for name, tensor in weights_in(tmp_path / "alone").items():
        if "norm" in name.lower():
            torch.testing.assert_close(weights_in(tmp_path / "out")[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_broken_merge_is_gone_on_with(tmp_path: Path) -> None:
    case = make_long_case(tmp_path, "lot")
    case.config["base_model"] = case.config["models"][1]["model"]
    case.write_yaml()
    log = tmp_path / "log"
    assert processes.run(merging(case, tmp_path / "unbroken"), log, kill_at=0) == 0, log.read_text()
    notes = [number for number, line in enumerate(processes.operations(log), start=1) if "journal.jsonl" in line]
    assert processes.run(merging(case, tmp_path / "out"), log, notes[2]) == -signal.SIGKILL
    assert parts(tmp_path / "out") == PARTS[:2]
    assert processes.run(merging(case, tmp_path / "out", "--resume"), log) == 0, log.read_text()
    check_unbroken(case, tmp_path / "out")


# What is refused


def refused(config: dict[str, Any], *mentions: str) -> None:
    with pytest.raises(ConfigError) as caught:
        largemerge.plan(config, probe=False)
    for mention in mentions:
        assert mention in str(caught.value), str(caught.value)


def test_without_a_base(make_case: MakeCase) -> None:
    case = make_case("llama", method="lot", num_samples=4)
    refused(case.config, "parameters.anchor: 'base', which is lot's own choice, needs a 'base_model'")


def test_what_norms_do_not_go_with(make_case: MakeCase) -> None:
    case = make_case("llama", method="lot", num_samples=4)
    with_base(case, "llama")
    config = case.config
    refused(config | {"sequence": {"keep_sums": True}}, "say nothing of what 'norms' multiply", "'keep_samples'")
    refused(config | {"parameters": {"normalization": "frobenius"}}, "parameters.solve: norms", "normalization: tokens")
    refused(config | {"parameters": {"inputs": "merged"}}, "parameters.inputs: lot has no such parameter")
    chain = {"merge_method": "chain", "parameters": {"solve": ["blocks", "norms"]}}
    refused(config | chain, "'granularity: linear'; expected 'granularity: block'")
    model = config["models"][1] | {"calibration": {"grams": str(case.folder)}}
    refused(config | {"models": [config["models"][0], model]}, "say nothing of what 'norms' multiply; expected 'data'")
    refused(config | {"parameters": {"solve": ["blocks", "scales"]}}, "parameters.solve", "'norms'")


def test_grams_are_written_of_linears_alone(make_case: MakeCase) -> None:
    case = make_case("llama", method="lot", num_samples=4)
    with_base(case, "llama")
    with pytest.raises(ConfigError, match=r"parameters.solve: .* none to be written; expected 'solve: \[blocks\]'"):
        largemerge.gram(case.config, case.folder / "grams")


# Scales


def test_an_element_that_no_data_has_is_averaged() -> None:
    scales = RunningScales(("w",))
    own = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    scales.start({"w": own[0]})
    for weight, x in zip(own, ([[2.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]), strict=True):
        scales.add_rows("w", torch.tensor(x))
        scales.finish_candidate({"w": weight}, {"w": 0.5 / len(x)})
    found = scales.finish({"w": torch.tensor([2.0, 4.0])})["w"]
    torch.testing.assert_close(found, torch.tensor([(4.0 * 1 + 1.0 * 3) / 5, 4.0]))
    scales.add_rows("w", torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(FloatingPointError, match="what w multiplies is not finite"):
        scales.finish_candidate({"w": own[0]}, {"w": 1.0})
