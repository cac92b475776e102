"""Properties that hold whatever the data, and which tensors are merged how."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from cases import (
    MakeCase,
    assert_close,
    average,
    load_merged,
    merge_and_load,
    report_of,
    weights_in,
    write_case,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel

import largemerge
from largemerge import LargemergeError

METHODS = ("regmean", "regmean_plusplus")


# Numbers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "clip_vision", "t5", "mixtral"])
def test_identical_candidates_come_back_as_they_are(
    tmp_path: Path, architecture: str, dtype: torch.dtype, method: str
) -> None:
    kind = tiny_models.ARCHITECTURES[architecture].kind
    model = tiny_models.perturbed(architecture, 0).to(dtype)
    inputs = [tiny_models.inputs(kind, 6, seed) for seed in range(3)]
    case = write_case(tmp_path, [model] * 3, inputs, method=method, weights=[1.0, 3.0, 0.7])
    report = largemerge.merge(case.config, tmp_path / "merged")
    expected, found = weights_in(tmp_path / "model0"), weights_in(tmp_path / "merged")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name
    for entry in report.linears.values():
        assert entry["relative_distance_to_average"] == 0
        assert set(entry["relative_distance_to_candidates"].values()) == {0}


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_candidates_does_not_matter(make_case: MakeCase, method: str) -> None:
    case = make_case(num_candidates=3, weights=[1.0, 2.0, 0.5], method=method)
    first = merge_and_load(case, "first")
    case.config["models"] = [case.config["models"][index] for index in (2, 0, 1)]
    assert_close(merge_and_load(case, "second"), first, tolerance=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_model_with_data_of_two_kinds_may_stand_twice(tmp_path: Path, method: str) -> None:
    """With half of the weight each: as many tokens, so the mean of its Gram matrices is that of all its data."""
    first, second = tiny_models.perturbed("clip_vision", 0), tiny_models.perturbed("clip_vision", 1)
    one, two, three = (tiny_models.inputs("vision", 6, seed) for seed in range(3))
    both = {name: torch.cat([one[name], two[name]]) for name in one}
    cases = []
    for name, models, inputs, weights in (
        ("once", [first, second], [both, three], [1.0, 1.0]),
        ("twice", [first, first, second], [one, two, three], [0.5, 0.5, 1.0]),
    ):
        (tmp_path / name).mkdir()
        cases.append(write_case(tmp_path / name, models, inputs, method=method, weights=weights))
    assert_close(merge_and_load(cases[1]), merge_and_load(cases[0]), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "t5"])
def test_the_batch_size_does_not_matter(make_case: MakeCase, architecture: str, method: str) -> None:
    case = make_case(architecture, method=method, batch_size=24)
    expected = merge_and_load(case, "24")
    for batch_size in (1, 5):
        case.config["calibration"]["batch_size"] = batch_size
        assert_close(merge_and_load(case, str(batch_size)), expected, tolerance=1e-5)


def test_scaling_all_weights_changes_nothing(make_case: MakeCase) -> None:
    case = make_case(weights=[1.0, 2.0])
    first = merge_and_load(case, "first")
    for model in case.config["models"]:
        model["parameters"]["weight"] *= 8
    assert_close(merge_and_load(case, "second"), first, tolerance=0)


def test_tensors_outside_the_blocks_are_averaged_in_pieces(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer that holds three and a half rows of the embedding gives what one that holds all gives."""
    case = make_case(weights=[1.0, 3.0])
    whole = merge_and_load(case, "whole")
    monkeypatch.setattr("largemerge.regression.averages.AVERAGE_CHUNK_BYTES", 3 * 64 + 32)
    assert_close(merge_and_load(case, "pieces"), whole, tolerance=0)
    expected = average(case, "model.embed_tokens.weight")
    assert torch.allclose(whole.model.embed_tokens.weight.double(), expected, atol=1e-6)


def inputs_of(model: PreTrainedModel, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Input of a linear of a model, one row per token."""
    caught: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(**tensors)
    handle.remove()
    return caught[0].flatten(0, -2)[tensors["attention_mask"].bool().flatten()].double()


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_what_too_few_tokens_never_excite_is_averaged(make_case: MakeCase, ridge: float) -> None:
    """Two times three tokens span at most 6 of the 16 directions that the first block's linears read."""
    case = make_case(method="regmean", num_samples=1, padding="none", off_diagonal_scale=1.0, ridge=ridge)
    for index in range(2):
        case.inputs[index] = {"input_ids": case.inputs[index]["input_ids"][:, :3].contiguous()}
        save_file(case.inputs[index], case.folder / f"data{index}.safetensors")
        case.inputs[index]["attention_mask"] = torch.ones(1, 3)
    merged = merge_and_load(case)
    assert all(tensor.isfinite().all() for tensor in merged.state_dict().values())
    name = "model.layers.0.self_attn.q_proj"
    rows = torch.cat([inputs_of(model, name, inputs) for model, inputs in zip(case.models, case.inputs, strict=True)])
    _, scale, directions = torch.linalg.svd(rows, full_matrices=True)
    assert len(scale) == 6
    silent, excited = directions[6:].T, directions[:6].T
    expected = average(case, f"{name}.weight")
    difference = merged.state_dict()[f"{name}.weight"].double() - expected
    assert (difference @ silent).norm() / (expected @ silent).norm() < 1e-3
    assert (difference @ excited).norm() / (expected @ excited).norm() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_features_that_never_fire_get_the_average(make_case: MakeCase, method: str) -> None:
    dead = [0, 5, 6]
    case = make_case(method=method)
    for index, model in enumerate(case.models):
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[dead] = 0
        model.save_pretrained(case.folder / f"model{index}")
    merged = merge_and_load(case).state_dict()
    report = report_of(case.folder / "merged")["blocks"]["model.layers.1"]["linears"]
    for path in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{path}.weight"
        assert report[name]["num_dead_features"] == 3
        expected = average(case, name)
        assert torch.allclose(merged[name].double()[:, dead], expected[:, dead], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(merged[name].double(), expected, rtol=1e-2)


# Include and exclude


@pytest.mark.parametrize("with_base", [False, True])
def test_excluded_tensors_come_from_the_base_or_are_averaged(make_case: MakeCase, with_base: bool) -> None:
    case = make_case(exclude=[r"layers\.1\.mlp", r"^model\.norm", r"k_proj"], num_samples=6)
    base = tiny_models.build("llama", seed=7)
    if with_base:
        base.save_pretrained(case.folder / "pretrained")
        case.config["base_model"] = str(case.folder / "pretrained")
    merged = merge_and_load(case).state_dict()
    treatments = {tensor.name: tensor for tensor in largemerge.plan(case.config).tensors}
    for name, tensor in merged.items():
        excluded = "layers.1.mlp" in name or name == "model.norm.weight" or "k_proj" in name
        assert torch.equal(tensor, base.state_dict()[name]) == (excluded and with_base), name
        if excluded and not with_base:
            assert torch.allclose(tensor.double(), average(case, name), atol=1e-6), name
            assert treatments[name].rule.value == "averaged"
            assert treatments[name].reason == "excluded, and there is no base"
        if excluded and with_base:
            assert (treatments[name].rule.value, treatments[name].reason) == ("base", "excluded")


def test_what_is_not_included_is_averaged(make_case: MakeCase) -> None:
    case = make_case(include=["self_attn", "norm"], exclude=["o_proj"], num_samples=6)
    merged = merge_and_load(case).state_dict()
    solved = set(report_of(case.folder / "merged")["blocks"]["model.layers.0"]["linears"])
    assert solved == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"}
    for name, tensor in merged.items():
        is_average = torch.allclose(tensor.double(), average(case, name), atol=1e-6)
        assert is_average == (not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))), name


def test_linears_that_are_not_included_may_be_the_bases(make_case: MakeCase) -> None:
    """With their biases; norms and embeddings are averaged, and what is excluded is the base's as ever."""
    case = make_case(
        "clip_vision", include=[r"\.mlp\."], excluded="base", exclude=["fc2", "pre_layrnorm"], num_samples=6
    )
    base = tiny_models.build("clip_vision", seed=7)
    base.save_pretrained(case.folder / "pretrained")
    case.config["base_model"] = str(case.folder / "pretrained")
    planned = {tensor.name: tensor for tensor in largemerge.plan(case.config).tensors}
    report = largemerge.merge(case.config, case.folder / "merged")
    merged = load_merged(case, case.folder / "merged").state_dict()
    assert "self_attn.q_proj.bias" in "".join(merged)
    for name, tensor in merged.items():
        left_out, excluded = "self_attn" in name, "fc2" in name or "pre_layrnorm" in name
        assert torch.equal(tensor, base.state_dict()[name]) == (left_out or excluded), name
        if left_out:
            assert (planned[name].rule.value, planned[name].reason) == ("base", "not included"), name
        elif not excluded and not name.endswith("fc1.weight"):
            assert torch.allclose(tensor.double(), average(case, name), atol=1e-6), name
    assert set(report.linears) == {name for name in merged if name.endswith("fc1.weight")}


def test_nothing_left_to_solve_is_refused(make_case: MakeCase) -> None:
    case = make_case(include=["nothing"], num_samples=4)
    with pytest.raises(LargemergeError, match=r"nothing is left to solve.*include.*exclude"):
        largemerge.merge(case.config, case.folder / "merged")
    assert not (case.folder / "merged").exists()


def test_a_base_of_another_dtype_is_rounded_to_the_candidates(make_case: MakeCase) -> None:
    case = make_case(exclude=["norm"], num_samples=4, dtype=torch.bfloat16)
    base = tiny_models.build("llama", seed=7)
    base.save_pretrained(case.folder / "pretrained")
    case.config["base_model"] = str(case.folder / "pretrained")
    merged = merge_and_load(case)
    found = weights_in(case.folder / "merged")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(found["model.norm.weight"], base.model.norm.weight.bfloat16())
    assert merged.dtype == torch.bfloat16
