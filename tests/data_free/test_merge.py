"""Whole merges of real files: layers, parameters, dtypes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from cases import weights_in
from data_free_cases import NUM_LAYERS, Config, config_of, load, weighted, write_models
from safetensors.torch import save_file
from transformers import CLIPModel

import largemerge
from largemerge import LargemergeError
from largemerge.data_free import loader, resources
from largemerge.data_free.methods import base
from largemerge.data_free.methods.table import METHODS, merge_tensors


def test_a_merge_loads_and_is_what_its_method_says(tmp_path: Path) -> None:
    write_models(tmp_path)
    report = largemerge.merge(weighted(tmp_path, "ties", base_model=str(tmp_path / "model0")), tmp_path / "out")
    load(tmp_path / "out")
    base, *others = (weights_in(tmp_path / f"model{seed}") for seed in range(4))
    merged = weights_in(tmp_path / "out")
    assert set(merged) == set(base)
    for name, tensor in merged.items():
        per_model = {"weight": [0.5, 0.3, 0.2]}
        expected = merge_tensors("ties", [other[name] for other in others], base[name], name=name, per_model=per_model)
        assert torch.equal(tensor, expected), name
    told = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert told["tensors"]["model.norm.weight"]["each"]["weight"] == [0.5, 0.3, 0.2]
    assert report.to_json()["bytes_written"] == sum(tensor.nbytes for tensor in merged.values())
    assert (tmp_path / "out" / "README.md").exists() and (tmp_path / "out" / "largemerge_config.yaml").exists()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_merges_files(tmp_path: Path, method: str) -> None:
    write_models(tmp_path, dtype=torch.bfloat16)
    row = METHODS[method]
    numbers = [1, 2, 3][: row.num_models[1]]
    config = config_of(tmp_path, method, numbers)
    if row.base.name == "REQUIRED":
        config["base_model"] = str(tmp_path / "model0")
    for entry in config["models"] if row.auxiliary_parameter is not None else ():
        diagonals = {name: tensor.abs() for name, tensor in weights_in(Path(entry["model"])).items()}
        save_file(diagonals, f"{entry['model']}.safetensors")
        entry["parameters"] = {row.auxiliary_parameter: f"{entry['model']}.safetensors"}
    options = {name: 0.3 for name in row.shared if name == "t"}
    config["parameters"] = options | {"weight": 0.4} if "weight" in row.per_model else options
    largemerge.merge(config, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    assert all(torch.isfinite(parameter).all() for parameter in merged.parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "t5", "clip", "llama_tied", "mixtral", "vit"])
def test_any_architecture(tmp_path: Path, architecture: str) -> None:
    write_models(tmp_path, architecture)
    largemerge.merge(weighted(tmp_path), tmp_path / "out")
    models = [weights_in(tmp_path / f"model{seed}") for seed in (1, 2, 3)]
    for name, tensor in weights_in(tmp_path / "out").items():
        if tensor.is_floating_point():
            expected = sum(w * model[name].double() for w, model in zip([0.5, 0.3, 0.2], models, strict=True))
            assert (tensor.double() - expected).norm() <= 1e-6 * expected.norm() + 1e-9, name
    load(tmp_path / "out", type(tiny_models.ARCHITECTURES[architecture].build()))


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.global_scale is not None])
def test_numbers_without_dimensions_in_two_passes(tmp_path: Path, method: str) -> None:
    write_models(tmp_path, "clip")
    largemerge.merge(config_of(tmp_path, method, base_model=str(tmp_path / "model0")), tmp_path / "out")
    out, base, *others = (weights_in(tmp_path / name) for name in ("out", "model0", "model1", "model2", "model3"))
    assert out["logit_scale"].shape == ()
    factors = []
    for name in ("logit_scale", "text_model.final_layer_norm.bias"):
        total = sum(other[name] - base[name] for other in others)
        factors.append(((out[name] - base[name]) / total).reshape(-1))
    torch.testing.assert_close(factors[1], factors[0].expand_as(factors[1]), rtol=1e-3, atol=0)
    load(tmp_path / "out", CLIPModel)


def test_task_negation_unlearns(tmp_path: Path) -> None:
    write_models(tmp_path)
    config = config_of(tmp_path, "task_arithmetic", [1], base_model=str(tmp_path / "model0"))
    config["parameters"] = {"weight": -1.0}
    largemerge.merge(config, tmp_path / "out")
    base, task, merged = (weights_in(tmp_path / name) for name in ("model0", "model1", "out"))
    for name, tensor in merged.items():
        assert torch.allclose(tensor, 2 * base[name] - task[name], atol=1e-6), name


def test_layers_are_stacked(tmp_path: Path) -> None:
    write_models(tmp_path)
    slices = [
        {"sources": [{"model": str(tmp_path / "model1"), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(tmp_path / "model2"), "layer_range": [1, 3], "parameters": {"scale": 0.5}}]},
    ]
    largemerge.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert merged.config.num_hidden_layers == 4 and len(merged.model.layers) == 4
    first, second = weights_in(tmp_path / "model1"), weights_in(tmp_path / "model2")
    state = weights_in(tmp_path / "out")
    name = "mlp.up_proj.weight"
    for layer, (source, number, scale) in enumerate([(first, 0, 1), (first, 1, 1), (second, 1, 0.5), (second, 2, 0.5)]):
        expected = scale * source[f"model.layers.{number}.{name}"]
        assert torch.equal(state[f"model.layers.{layer}.{name}"], expected)
    assert torch.equal(state["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(state["lm_head.weight"], 0.5 * second["lm_head.weight"])


def test_gradients_and_filters(tmp_path: Path) -> None:
    write_models(tmp_path)
    config = config_of(tmp_path, "slerp", [1], base_model=str(tmp_path / "model0"))
    config["parameters"] = {"t": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.25}]}
    plan = largemerge.plan(config)
    used = {task.name: task.shared["t"] for task in plan.tasks}
    mlp = [used[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(NUM_LAYERS)]
    assert mlp == [0.0, 0.5, 1.0]
    assert {value for name, value in used.items() if "mlp" not in name} == {0.25}


def test_modules_have_layers_of_their_own(tmp_path: Path) -> None:
    write_models(tmp_path, "clip")
    entries = config_of(tmp_path, "linear", [1, 2])["models"]

    def module(first: float) -> Config:
        weights = (first, 1 - first)
        return {"models": [{**entry, "parameters": {"weight": w}} for entry, w in zip(entries, weights, strict=True)]}

    text, vision = "text_model.encoder.layers", "vision_model.encoder.layers"
    config = {"merge_method": "linear", "modules": {text: module(1.0), vision: module(0.0)}}
    largemerge.merge(config, tmp_path / "out")
    one, two, merged = (weights_in(tmp_path / name) for name in ("model1", "model2", "out"))
    for name, tensor in merged.items():
        if name.startswith(text):
            assert torch.equal(tensor, one[name])
        elif name.startswith(vision):
            assert torch.equal(tensor, two[name])
    with pytest.raises(LargemergeError, match=f"expected one for each of .*{vision}"):
        largemerge.merge({**config, "modules": {text: module(1.0)}}, tmp_path / "other")
    with pytest.raises(LargemergeError, match="use 'modules'"):
        slices = [{"sources": [{**entries[0], "layer_range": [0, 1]}]}]
        largemerge.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "other")


@pytest.mark.parametrize(("dtype", "out_dtype"), [("float32", "bfloat16"), ("bfloat16", None), (None, "float16")])
def test_dtypes(tmp_path: Path, dtype: str | None, out_dtype: str | None) -> None:
    write_models(tmp_path, dtype=torch.bfloat16)
    config = weighted(tmp_path) | ({"dtype": dtype} if dtype else {}) | ({"out_dtype": out_dtype} if out_dtype else {})
    largemerge.merge(config, tmp_path / "out")
    expected = out_dtype or dtype
    assert {str(tensor.dtype) for tensor in weights_in(tmp_path / "out").values()} == {f"torch.{expected}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == expected


def test_unlike_dtypes_are_noted(tmp_path: Path) -> None:
    write_models(tmp_path, count=2, dtype=torch.bfloat16)
    tiny_models.perturbed("llama", 2).save_pretrained(tmp_path / "model2")
    config = config_of(tmp_path, "linear", [1, 2], parameters={"weight": 0.5})
    plan = largemerge.plan(config)
    assert any("unlike dtypes; computed in float32" in note for note in plan.notes)


def test_a_tied_head_is_the_embeddings(tmp_path: Path) -> None:
    tied = tiny_models.perturbed("llama_tied", 1)
    tied.save_pretrained(tmp_path / "model1")
    write_models(tmp_path / "more", count=1)
    config = {"merge_method": "linear", "parameters": {"weight": 0.5}}
    config["models"] = [{"model": str(tmp_path / "more" / "model0")}, {"model": str(tmp_path / "model1")}]
    largemerge.merge(config, tmp_path / "out")
    other, merged = weights_in(tmp_path / "more" / "model0"), weights_in(tmp_path / "out")
    mean = (other["lm_head.weight"] + weights_in(tmp_path / "model1")["model.embed_tokens.weight"]) / 2
    assert torch.allclose(merged["lm_head.weight"], mean)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp", "breadcrumbs", "sce"])
def test_workers_and_readings_change_nothing(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    config = config_of(tmp_path, method, [1] if method == "slerp" else None, base_model=str(tmp_path / "model0"))
    config["parameters"] = (
        {"t": 0.3} if method == "slerp" else {} if method == "sce" else {"weight": 0.4, "density": 0.5}
    )
    monkeypatch.setattr(base, "PIECE_ELEMENTS", 100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        monkeypatch.setattr(resources, "_SMALL_BYTES", 0)
        assert largemerge.merge(config, tmp_path / "one").plan.num_workers == 1
        torch.set_num_threads(4)
        monkeypatch.setattr(resources, "_SMALL_BYTES", 2 << 30)
        monkeypatch.setattr(loader, "KEPT_BYTES", 0)
        monkeypatch.setattr(loader, "_SPAN_BYTES", 1000)
        report = largemerge.merge(config, tmp_path / "four")
    finally:
        torch.set_num_threads(threads)
    assert report.plan.num_workers == 8 and report.bytes_read > report.plan.bytes_read, "read again, not kept"
    one, four = weights_in(tmp_path / "one"), weights_in(tmp_path / "four")
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_the_seed_decides(tmp_path: Path) -> None:
    write_models(tmp_path)
    config = config_of(tmp_path, "dare_linear", base_model=str(tmp_path / "model0"))
    config["parameters"] = {"weight": 0.5, "density": 0.5}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        largemerge.merge({**config, "seed": seed}, tmp_path / name)
    a, b, c = (weights_in(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
