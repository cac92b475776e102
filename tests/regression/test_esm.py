"""Essential Subspace Merging against a plain dense float64 implementation of its formulas, and what it refuses.

Of linears       W_0 + f · scale · s̄_U s̄_V · polar(U) polar(V), f = (‖M‖ / mean ‖M‖)² over the layers of one kind
Everything else  Σ W_i / K
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny_models
import torch
from cases import (
    MakeCase,
    assert_close,
    exit_code,
    load_merged,
    merge_and_load,
    report_of,
    weights_in,
    with_base,
)
from processes import assert_agree, device_of_ranks, lasting, make_uneven_case, merging, parts, run_ranks
from reference import Tensors
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import largemerge
from largemerge import ConfigError
from largemerge.merge_page.build import build_page
from largemerge.output import OutputFolder
from largemerge.regression import passes
from largemerge.regression.essential import direction_weights, directions, merge_factors, num_directions
from largemerge.regression.layer_scales import layer_scales
from largemerge.regression.tensor_plan import BlockPlan, LinearGroup, LinearPlan

TOLERANCE = 2e-3
"""Of a merged weight, relative: polar factors raise the small singular values of float32 factors to those of others."""


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


QUICK = ("gpt2", "t5")
"""Architectures that differ most; all others are slow tests."""


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny_models.ARCHITECTURES],
)
def test_every_architecture_agrees_with_the_formulas(make_case: MakeCase, architecture: str) -> None:
    case = make_case(architecture, method="esm")
    base = with_base(case, architecture)
    assert_close(merge_and_load(case), dense_esm(case.models, case.inputs, base), tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("num_candidates", "settings"),
    [(3, {"scale": 1.0}), (2, {"scale_layers": False, "power": 0.0}), pytest.param(5, {}, marks=pytest.mark.slow)],
)
def test_settings_and_numbers_of_models(make_case: MakeCase, num_candidates: int, settings: dict[str, Any]) -> None:
    case = make_case("bert", method="esm", num_candidates=num_candidates, padding="left", **settings)
    base = with_base(case, "bert")
    assert_close(merge_and_load(case), dense_esm(case.models, case.inputs, base, **settings), tolerance=TOLERANCE)
    scales = {each["layer_scale"] for each in linears_of(case.folder / "merged").values()}
    assert scales == {1.0} if not settings.get("scale_layers", True) else len(scales) > 10


def linears_of(out: Path) -> dict[str, Any]:
    """Reports of all linears."""
    return {name: entry for block in report_of(out)["blocks"].values() for name, entry in block["linears"].items()}


def test_few_tokens_have_few_directions(make_case: MakeCase) -> None:
    """Those that there are not add nothing, and the report counts them."""
    case = make_case("llama", method="esm")
    base = with_base(case, "llama")
    for number, ids in enumerate(([[5, 7, 6]], [[9, 3, 4]])):
        case.inputs[number] = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
        save_file(case.inputs[number], case.folder / f"data{number}.safetensors")
    report = largemerge.merge(case.config, case.folder / "merged")
    assert (
        "than directions that would be merged of each model, 12 in the widest linear: model0 3, model1 3"
        in "\n".join(report.plan.notes)
    )
    assert_close(
        load_merged(case, case.folder / "merged"),
        dense_esm(case.models, case.inputs, base),
        tolerance=TOLERANCE,
    )
    found = linears_of(case.folder / "merged")
    assert {count for each in found.values() for count in each["directions"].values()} == {3}
    assert {each["directions_wanted"] for each in found.values()} == {4, 8, 12}
    assert "directions" in str(report) and "fewer in 21 linears" in str(report)
    page = build_page(case.folder / "merged")
    (section,) = (section for section in page.sections if section.title == "Essential subspaces")
    chart, table = section.parts
    assert chart.chart.title == "Scale of the merged task vectors, by block"
    assert f"{max(each['layer_scale'] for each in found.values()):.3g}" in [row[1] for row in table.rows]
    assert {row[4] for row in table.rows} == {3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(make_case: MakeCase, dtype: torch.dtype) -> None:
    """Nothing is rounded before it is scaled: as far from the formulas as rounding is."""
    case = make_case("vit", method="esm", dtype=dtype)
    base = with_base(case, "vit").to(dtype)
    base.save_pretrained(case.folder / "pretrained")
    case.config["compute_dtype"] = "float32"
    merged, expected = merge_and_load(case), dense_esm(case.models, case.inputs, base)
    for name, tensor in expected.state_dict().items():
        error = (merged.state_dict()[name].double() - tensor).norm() / tensor.norm()
        assert error < torch.finfo(dtype).eps, name
    assert {tensor.dtype for tensor in weights_in(case.folder / "merged").values()} == {dtype}


def test_models_that_are_the_base_change_nothing(make_case: MakeCase) -> None:
    case = make_case("gpt2", method="esm")
    case.config["base_model"] = case.config["models"][0]["model"]
    case.config["models"][1] |= {"model": case.config["models"][0]["model"], "name": "again"}
    merged = merge_and_load(case)
    for name, parameter in case.models[0].named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter), name


def test_the_order_of_models_does_not_matter_nor_passes_nor_where_grams_come_from(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("vit", method="esm", num_candidates=3)
    with_base(case, "vit")
    largemerge.merge(case.config, case.folder / "one")
    case.config["models"].reverse()
    largemerge.merge(case.config, case.folder / "other")
    assert_agree(case.folder / "one", case.folder / "other", tolerance=TOLERANCE)
    case.config["models"].reverse()

    original = passes.block_passes
    with monkeypatch.context() as patch:
        patch.setattr(
            passes, "block_passes", lambda block, roles, num, *, advances: original(block, roles, 3, advances=advances)
        )
        largemerge.merge(case.config, case.folder / "three")
    assert_agree(case.folder / "three", case.folder / "one", tolerance=1e-6)

    largemerge.gram(case.config, case.folder / "grams")
    for model in case.config["models"]:
        model["calibration"] = {"grams": str(case.folder / "grams" / Path(model["model"]).name)}
    largemerge.merge(case.config, case.folder / "from-grams")
    assert_agree(case.folder / "from-grams", case.folder / "one", tolerance=1e-6)


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("bert", 3), pytest.param("llama", 5, marks=pytest.mark.slow), pytest.param("gpt2", 2, marks=pytest.mark.slow)],
)
def test_ranks_agree_with_one(tmp_path: Path, architecture: str, size: int) -> None:
    case = make_uneven_case(tmp_path, architecture, "esm", num_candidates=2)
    for model in case.config["models"]:
        del model["parameters"]
    with_base(case, architecture)
    case.write_yaml()
    largemerge.merge(case.config, tmp_path / "alone", device=device_of_ranks(size))
    run_ranks(merging(case, tmp_path / "out"), tmp_path, size)
    assert_agree(tmp_path / "out", tmp_path / "alone", tolerance=TOLERANCE)
    found, alone = linears_of(tmp_path / "out"), linears_of(tmp_path / "alone")
    for name, entry in alone.items():
        assert found[name]["directions"] == entry["directions"] and found[name]["tokens"] == entry["tokens"]
        assert found[name]["layer_scale"] == pytest.approx(entry["layer_scale"], rel=1e-2)


# Two steps


class StoppedError(Exception):
    """What stops a merge in the middle."""


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Stops merges once the journal has so many parts."""
    record = OutputFolder.record

    def record_and_stop(folder: OutputFolder, part: str, entry: Mapping[str, Any]) -> None:
        record(folder, part, entry)
        if len(folder.entries) == count:
            raise StoppedError

    monkeypatch.setattr(OutputFolder, "record", record_and_stop)


def test_a_broken_merge_is_gone_on_with(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either step; a scratch file that is damaged meanwhile is made again."""
    case = make_case("llama", method="esm")
    with_base(case, "llama")
    unbroken, out = case.folder / "unbroken", case.folder / "out"
    small = {"max_shard_bytes": 20_000}
    largemerge.merge(case.config, unbroken, **small)
    blocks = [f"model.layers.{number}" for number in range(3)]
    steps = ["outside", *(f"unscaled {block}" for block in blocks), *blocks]
    for count in (2, 5):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            stop_after(patch, count)
            largemerge.merge(case.config, out, resume=True, **small)
        assert parts(out) == steps[:count]
    scratch = sorted((out / ".largemerge" / "scratch").iterdir())
    content = bytearray(scratch[-1].read_bytes())
    content[-4:] = b"\0\0\0\0"
    scratch[-1].write_bytes(content)
    report = largemerge.merge(case.config, out, resume=True, **small)
    assert report.resumed_parts == 4
    assert report_of(out)["redone_parts"][0].startswith("unscaled model.layers.2 is done again: ")
    assert lasting(out) == lasting(unbroken)
    assert list(report_of(out)["blocks"]) == blocks


def test_the_plan_says_what_waits_on_the_disk(make_case: MakeCase) -> None:
    case = make_case("llama", method="esm", num_samples=4, dtype=torch.bfloat16)
    base = with_base(case, "llama")
    base.to(torch.bfloat16).save_pretrained(case.folder / "pretrained")
    plan = largemerge.plan(case.config, probe=False)
    linears = [linear for block in reference.blocks_of(base) for linear in reference.linears_of(*block).values()]
    elements = sum(linear.weight.numel() for linear in linears)
    norms = sum(parameter.numel() for name, parameter in base.named_parameters() if "layernorm" in name)
    assert plan.scratch_bytes == 4 * elements + 2 * norms == plan.to_json()["scratch_bytes"]
    assert "in between, of merged task vectors" in " ".join(str(plan).replace("│", " ").split())
    assert plan.to_json()["not_solved"]["lm_head.weight"] == {"treatment": "averaged", "reason": "not in a block"}
    once = case.config | {"parameters": {"scale_layers": False}}
    other = largemerge.plan(once, probe=False)
    assert "scratch_bytes" not in other.to_json() and plan.bytes_read - other.bytes_read == 2 * elements
    read = largemerge.merge(case.config, case.folder / "merged").bytes_read
    assert read - largemerge.merge(once, case.folder / "once").bytes_read == 2 * elements


# What is refused


def test_what_it_does_not_go_with(make_case: MakeCase, capsys: pytest.CaptureFixture[str]) -> None:
    """All mistakes at once."""
    case = make_case("llama", method="esm", num_samples=4, weights=[1.0, 2.0], ridge=0.1, scale=11, power=-1)
    config = case.config | {"sequence": {"keep_sums": True}}
    for text in ("parameters.scale", "parameters.power"):
        with pytest.raises(ConfigError, match=text):
            largemerge.plan(config)
    config["parameters"] = {"ridge": 0.1, "solve": ["head"]}
    case.config = config
    assert exit_code("merge", case.write_yaml(), case.folder / "out") == 2
    told = " ".join(capsys.readouterr().err.split())
    for mention in (
        "base_model: missing; esm merges what each model has learned beyond it",
        "sequence: esm merges the subspaces of all models at once, and has no sums that a later merge could go on from",
        "models: have weights 1, 2; esm weighs each model by the norm of its task vector",
        "parameters.ridge, parameters.solve: esm has no such parameter",
        "it takes exclude, excluded, include, power, scale, scale_layers",
    ):
        assert mention in told, told
    assert "Traceback" not in told


def test_other_methods_have_none_of_its_settings(make_case: MakeCase) -> None:
    case = make_case("llama", method="regmean", num_samples=4, scale=1.0, scale_layers=True)
    with pytest.raises(
        ConfigError, match=r"parameters.scale, parameters.scale_layers: regmean has no such parameter, as esm have"
    ):
        largemerge.plan(case.config)


# The formulas


def random_case(outputs: int, inputs: int, num_models: int, tokens: int = 200) -> tuple[list[torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(outputs * inputs + num_models)
    deltas = [torch.randn(outputs, inputs, generator=generator) * (1 + model) for model in range(num_models)]
    x = [torch.randn(tokens, inputs, generator=generator).double() for _ in range(num_models)]
    return deltas, [rows.T @ rows for rows in x]


def by_parts(deltas: list[torch.Tensor], grams: list[torch.Tensor]) -> torch.Tensor:
    """M, by the package's functions."""
    lefts, rights, k = [], [], num_directions(len(deltas[0]), len(deltas))
    for delta, gram in zip(deltas, grams, strict=True):
        left, right = torch.zeros(len(delta), k), torch.zeros(k, delta.shape[1])
        vectors, values = directions(delta, gram, k)
        if len(values):
            e = direction_weights(values, k, 0.15)
            left[:, : len(values)] = vectors * e
            right[: len(values)] = e[:, None] * (vectors.T @ delta.double())
        lefts.append(left)
        rights.append(right)
    norms = torch.stack([delta.double().norm() for delta in deltas])
    return merge_factors(torch.cat(lefts, 1), torch.cat(rights), norms, 2.0, k * len(deltas))


@pytest.mark.parametrize(
    ("outputs", "inputs", "num_models"),
    [(12, 12, 3), (30, 7, 2), (7, 30, 2), (1, 9, 2), (9, 1, 2), (1, 1, 1), (3, 8, 5), (8, 3, 1), (40, 9, 3)],
)
def test_either_side_gives_the_formulas(outputs: int, inputs: int, num_models: int) -> None:
    deltas, grams = random_case(outputs, inputs, num_models)
    expected = dense_merge([delta.double() for delta in deltas], grams)
    torch.testing.assert_close(by_parts(deltas, grams).double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


def test_task_vectors_of_low_rank_zero_and_identical_ones() -> None:
    deltas, grams = random_case(16, 10, 3)
    deltas[1] = deltas[1][:, :2] @ deltas[1][:2]
    vectors, values = directions(deltas[1], grams[1], 5)
    assert len(values) == 2 and torch.allclose(vectors.T @ vectors, torch.eye(2).double(), atol=1e-6)
    expected = dense_merge([delta.double() for delta in deltas], grams)
    torch.testing.assert_close(by_parts(deltas, grams).double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    deltas[1].zero_()  # adds nothing but to the means
    assert torch.isfinite(by_parts(deltas, grams)).all() and by_parts(deltas, grams).abs().max() > 0
    zero = [torch.zeros_like(delta) for delta in deltas]
    assert torch.equal(by_parts(zero, grams), zero[0])
    unseen = [torch.zeros_like(gram) for gram in grams]
    assert torch.equal(by_parts(deltas, unseen), zero[0])
    same = by_parts([deltas[0]] * 3, [grams[0]] * 3)
    order = by_parts(deltas[::-1], grams[::-1])
    torch.testing.assert_close(order, by_parts(deltas, grams), rtol=1e-4, atol=1e-4)
    assert torch.linalg.matrix_rank(same, rtol=1e-4) == 5, "the k directions that all have"


def test_layers_of_one_kind_are_scaled_by_their_norms() -> None:
    linear = LinearPlan("q", "", 1, torch.float32)
    blocks = [
        BlockPlan(
            stack=stack,
            index=index,
            name=f"{stack}.{index}",
            tensors=(),
            groups=(LinearGroup("q", None, 1, (replace(linear, name=f"{stack}.{index}.q"),), transposed=False),),
        )
        for stack, index in ((0, 0), (0, 1), (1, 0))
    ]
    norms = {"0.0.q": 1.0, "0.1.q": 3.0, "1.0.q": 5.0}
    assert layer_scales(blocks, norms) == {"0.0.q": 0.25, "0.1.q": 2.25, "1.0.q": 1.0}
    assert set(layer_scales(blocks, dict.fromkeys(norms, 0.0)).values()) == {1.0}
