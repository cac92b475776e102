"""Names on disk that are not the module's: read, merged, and written back as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny_models
import torch
import transformers as tf
from cases import Case, MakeCase, assert_close, load_merged, merge_and_load, rewrite_weights, weights_in
from safetensors.torch import save_file

import largemerge
from largemerge import CheckpointError, LargemergeError
from largemerge.checkpoint.index import open_checkpoint
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.model.key_mapping import map_keys
from largemerge.model.skeleton import build_skeleton

CONVERTED = ("mixtral", "dinov2_swiglu")


def rename_all(case: Case, rename: Callable[[str], str]) -> dict[str, tuple[int, ...]]:
    """Renames the tensors of every candidate's file; returns the shapes by their new names."""
    for index in range(len(case.models)):
        rewrite_weights(
            case.folder / f"model{index}", lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}
        )
    return shapes(case.folder / "model0")


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights_in(folder).items()}


def reasons(case: Case) -> dict[str, dict[str, str]]:
    """Rule and reason of every tensor that is not solved, from the plan."""
    not_solved: dict[str, dict[str, str]] = largemerge.plan(case.config).to_json()["not_solved"]
    return not_solved


# Renamings


@pytest.mark.parametrize(
    ("architecture", "rename"),
    [
        ("clip_vision", lambda name: f"vision_model.{name}"),
        ("siglip_vision", lambda name: f"vision_model.{name}"),
        (
            "bert",
            lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ),
        ),
        ("gpt2", lambda name: name.removeprefix("transformer.")),
        ("llama", lambda name: name.removeprefix("model.")),
        ("bert", lambda name: name.removeprefix("bert.")),
        ("mixtral", lambda name: name.removeprefix("model.")),
    ],
    ids=[
        "clip prefix",
        "siglip prefix",
        "bert gamma",
        "gpt2 h.0",
        "llama layers.0",
        "bert encoder.0",
        "mixtral layers.0",
    ],
)
def test_checkpoints_under_other_names_come_out_under_them(
    make_case: MakeCase, architecture: str, rename: Callable[[str], str]
) -> None:
    case = make_case(architecture, ridge=0.0)
    expected = reference.merge("regmean_plusplus", case.models, case.inputs, case.weights)
    before = rename_all(case, rename)
    assert before != {name: tuple(tensor.shape) for name, tensor in case.models[0].state_dict().items()}
    assert_close(merge_and_load(case), expected)
    assert shapes(case.folder / "merged") == before


def test_candidates_may_differ_in_their_names(make_case: MakeCase) -> None:
    """The output has the names of the first candidate."""
    case = make_case("clip_vision", ridge=0.0)
    expected = reference.merge("regmean_plusplus", case.models, case.inputs, case.weights)
    before = shapes(case.folder / "model0")
    rewrite_weights(
        case.folder / "model1", lambda tensors: {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    )
    assert_close(merge_and_load(case), expected)
    assert shapes(case.folder / "merged") == before


def test_names_on_disk_and_in_the_module_both_match_patterns(make_case: MakeCase) -> None:
    case = make_case("clip_vision", exclude=[r"^vision_model\.encoder\.layers\.0\.", r"^encoder\.layers\.1\."])
    rename_all(case, lambda name: f"vision_model.{name}")
    plan = largemerge.plan(case.config)
    solved = {tensor.name.split(".")[2] for tensor in plan.tensors if tensor.rule.value == "solved"}
    assert solved == {"2"}
    assert not [note for note in plan.notes if "matches no tensor" in note]


def test_a_pattern_that_matches_nothing_is_noted(make_case: MakeCase) -> None:
    notes = largemerge.plan(make_case(exclude=["attention_proj"], include=["self_attn"]).config).notes
    assert [note for note in notes if "matches no tensor" in note] == [
        "parameters.exclude: 'attention_proj' matches no tensor"
    ]


def test_two_tensors_that_claim_one_parameter_are_refused(make_case: MakeCase) -> None:
    case = make_case("bert")
    name = "bert.embeddings.LayerNorm"
    rewrite_weights(
        case.folder / "model1", lambda tensors: tensors | {f"{name}.gamma": tensors[f"{name}.weight"].clone()}
    )
    with pytest.raises(CheckpointError, match=r"model1: both .*LayerNorm\.(gamma|weight).* are parameter"):
        largemerge.plan(case.config)


def test_tensors_that_the_class_does_not_know_are_averaged_or_copied(make_case: MakeCase) -> None:
    case = make_case(weights=[1.0, 3.0])
    for index, value in enumerate([2.0, 6.0]):
        rewrite_weights(
            case.folder / f"model{index}",
            lambda tensors, value=value: (
                tensors
                | {
                    "extra.weight": torch.full((2, 3), value),
                    "extra.count": torch.tensor([int(value)]),
                    "extra.odd": torch.full((int(value),), value),
                }
            ),
        )
    largemerge.merge(case.config, case.folder / "merged")
    found = weights_in(case.folder / "merged")
    assert torch.equal(found["extra.weight"], torch.full((2, 3), 5.0))
    assert torch.equal(found["extra.count"], torch.tensor([2]))
    assert torch.equal(found["extra.odd"], torch.full((2,), 2.0))
    assert {reasons(case)[f"extra.{name}"]["reason"] for name in ("weight", "count", "odd")} == {
        "unknown to the model class"
    }


# A base of another class


@pytest.fixture
def clip_case(make_case: MakeCase, tmp_path: Path) -> Case:
    """CLIPVisionModel candidates under the Hub's names, and a whole CLIPModel as their base."""
    case = make_case("clip_vision")
    rename_all(case, lambda name: f"vision_model.{name}")
    base = tiny_models.build("clip", seed=5)
    base.save_pretrained(tmp_path / "base")
    case.config["base_model"] = str(tmp_path / "base")
    return case


def test_a_whole_clip_model_as_the_base_of_vision_candidates(clip_case: Case) -> None:
    clip_case.config["parameters"]["exclude"] = [r"position_embedding", r"layers\.2\..*\.bias$"]
    merged = merge_and_load(clip_case)
    base = weights_in(clip_case.folder / "base")
    found = weights_in(clip_case.folder / "merged")
    assert set(found) == set(weights_in(clip_case.folder / "model0"))
    taken = [name for name in found if "position_embedding" in name or (".layers.2." in name and "bias" in name)]
    assert len(taken) == 1 + 8
    assert all(torch.equal(found[name], base[name]) for name in taken)
    assert not any(torch.equal(found[name], base[name]) for name in found if name not in taken)
    assert isinstance(merged, tf.CLIPVisionModel)
    config = json.loads((clip_case.folder / "merged" / "config.json").read_text())
    assert config["architectures"] == ["CLIPVisionModel"]


def test_a_base_of_another_class_is_noted(clip_case: Case) -> None:
    notes = " ".join(largemerge.plan(clip_case.config).notes)
    assert "CLIPModel" in notes and "CLIPVisionModel" in notes


def test_a_base_without_the_head_serves_candidates_with_one(make_case: MakeCase, tmp_path: Path) -> None:
    """A pretrained trunk has no `lm_head`: names and config come from the candidates."""
    case = make_case("llama", exclude=["norm", "lm_head"])
    base = tf.LlamaModel(case.models[0].config)
    base.save_pretrained(tmp_path / "base")
    case.config["base_model"] = str(tmp_path / "base")
    merged = merge_and_load(case).state_dict()
    trunk = base.state_dict()
    assert torch.equal(merged["model.norm.weight"], trunk["norm.weight"])
    averaged = sum(model.lm_head.weight for model in case.models) / 2
    assert torch.allclose(merged["lm_head.weight"], averaged, atol=1e-6)
    assert reasons(case)["lm_head.weight"]["reason"] == "excluded, but the base does not have it"


# Conversions: several tensors on disk make one parameter, or one makes several


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus"])
@pytest.mark.parametrize("architecture", CONVERTED)
def test_converted_checkpoints_come_out_in_their_layout(make_case: MakeCase, architecture: str, method: str) -> None:
    case = make_case(architecture, method=method)
    before = shapes(case.folder / "model0")
    converted = set(before) != set(case.models[0].state_dict())
    assert converted or architecture == "dinov2_swiglu", "which Transformers 5.17 stores as it computes with it"
    merge_and_load(case)
    assert shapes(case.folder / "merged") == before


def test_mixtral_attention_is_solved_and_its_experts_are_averaged(make_case: MakeCase) -> None:
    case = make_case("mixtral", weights=[1.0, 3.0])
    plan = largemerge.plan(case.config)
    solved = {tensor.name.split(".", 3)[3] for tensor in plan.tensors if tensor.rule.value == "solved"}
    assert solved == {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    not_solved = reasons(case)
    for block in range(3):
        for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
            assert not_solved[f"model.layers.{block}.mlp.{name}"]["treatment"] == "averaged"
    assert {entry["reason"] for name, entry in not_solved.items() if "experts" in name} == {"not a linear's weight"}
    merge_and_load(case)
    first, second, merged = (weights_in(case.folder / name) for name in ("model0", "model1", "merged"))
    experts = [name for name in merged if ".experts." in name]
    assert len(experts) == 3 * 3 * 3
    for name in experts:
        assert torch.allclose(merged[name], first[name] * 0.25 + second[name] * 0.75, atol=1e-6), name


@pytest.mark.parametrize("architecture", CONVERTED)
def test_loading_agrees_with_transformers_and_storing_undoes_it(make_case: MakeCase, architecture: str) -> None:
    case = make_case(architecture)
    checkpoint = open_checkpoint(case.folder / "model0", "model0")
    skeleton = build_skeleton(checkpoint)
    names = map_keys(skeleton.model, checkpoint)
    assert not (names.missing or names.unmapped or names.mismatched)
    expected = case.models[0].state_dict()
    with CheckpointReader(checkpoint) as reader:
        loaded = names.load(skeleton.model, list(expected), reader.read)
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    stored = names.store(skeleton.model, loaded)
    on_disk = weights_in(case.folder / "model0")
    assert set(stored) == set(on_disk)
    assert all(torch.equal(stored[name], tensor) for name, tensor in on_disk.items())


@pytest.mark.parametrize("architecture", CONVERTED)
def test_a_block_is_loaded_from_its_own_tensors_alone(make_case: MakeCase, architecture: str) -> None:
    case = make_case(architecture)
    checkpoint = open_checkpoint(case.folder / "model0", "model0")
    skeleton = build_skeleton(checkpoint)
    names = map_keys(skeleton.model, checkpoint)
    (stack,) = skeleton.stacks
    read: list[str] = []
    with CheckpointReader(checkpoint) as reader:

        def note(key: str) -> torch.Tensor:
            read.append(key)
            return reader.read(key)

        names.load(skeleton.model, skeleton.block_tensors(stack, 1), note)
    assert sorted(read) == sorted(name for name in checkpoint.tensors if f"{stack.name}.1." in f".{name}")


def test_swiglu_halves_are_treated_one_by_one(make_case: MakeCase, tmp_path: Path) -> None:
    """`weights_in` on disk is `gate_proj` and `up_proj` in the module; one may be excluded."""
    case = make_case("dinov2_swiglu", exclude=[r"\.up_proj\."])
    base = tiny_models.build("dinov2_swiglu", seed=9)
    base.save_pretrained(tmp_path / "base")
    case.config["base_model"] = str(tmp_path / "base")
    merged = merge_and_load(case).state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(merged[name], tensor) == (".up_proj." in name), name


def test_experts_of_another_number_are_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("mixtral")
    config = case.models[1].config
    config.num_local_experts = 2
    tf.MixtralForCausalLM(config).save_pretrained(tmp_path / "model1")
    with pytest.raises(LargemergeError) as caught:
        largemerge.merge(case.config, tmp_path / "merged")
    assert "num_local_experts is 3 in model0, 2 in model1" in str(caught.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("part", "parameter"), [("w1", "gate_up_proj"), ("w2", "down_proj")])
def test_a_lost_expert_is_named(make_case: MakeCase, tmp_path: Path, part: str, parameter: str) -> None:
    case = make_case("mixtral")
    lost = f"model.layers.1.block_sparse_moe.experts.2.{part}.weight"
    rewrite_weights(
        case.folder / "model1", lambda tensors: {name: value for name, value in tensors.items() if name != lost}
    )
    with pytest.raises(LargemergeError) as caught:
        largemerge.merge(case.config, tmp_path / "merged")
    assert "model1" in str(caught.value) and f"model.layers.1.mlp.experts.{parameter}" in str(caught.value)
    assert not (tmp_path / "merged").exists()


# Tied weights


def untied_copy(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def only_the_head(tensors: dict[str, Any]) -> dict[str, Any]:
    head = tensors.pop("model.embed_tokens.weight")
    return tensors | {"lm_head.weight": head}


@pytest.mark.parametrize("second", [untied_copy, only_the_head, None])
@pytest.mark.parametrize("first", [untied_copy, only_the_head, None])
def test_tied_weights_under_either_name_or_both(
    make_case: MakeCase, first: Callable[..., Any] | None, second: Callable[..., Any] | None
) -> None:
    case = make_case("llama_tied", num_samples=4)
    for index, rewrite in enumerate((first, second)):
        if rewrite is not None:
            rewrite_weights(case.folder / f"model{index}", rewrite)
    merged = merge_and_load(case)
    averaged = sum(model.model.embed_tokens.weight for model in case.models) / 2
    assert torch.allclose(merged.model.embed_tokens.weight, averaged, atol=1e-6)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    name = "lm_head.weight" if first is only_the_head else "model.embed_tokens.weight"
    found = set(weights_in(case.folder / "merged"))
    assert found & {"lm_head.weight", "model.embed_tokens.weight"} == {name}


def test_pickled_candidates_merge_like_any(make_case: MakeCase) -> None:
    """The output is in safetensors all the same."""
    case = make_case(num_samples=4)
    largemerge.merge(case.config, case.folder / "expected")
    for index in range(2):
        folder = case.folder / f"model{index}"
        torch.save(weights_in(folder), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    merge_and_load(case)
    expected, found = (weights_in(case.folder / name) for name in ("expected", "merged"))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list((case.folder / "merged").glob("*.bin"))


def test_shards_of_candidates_need_not_match(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    largemerge.merge(case.config, case.folder / "expected")
    case.models[0].save_pretrained(case.folder / "sharded", max_shard_size="2KB")
    tensors = weights_in(case.folder / "model1")
    (case.folder / "model1" / "model.safetensors").unlink()
    parts = {"b.safetensors": list(tensors)[::2], "a.safetensors": list(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, case.folder / "model1" / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (case.folder / "model1" / "model.safetensors.index.json").write_text(json.dumps(index))
    case.config["models"][0]["model"] = str(case.folder / "sharded")
    largemerge.merge(case.config, case.folder / "merged")
    load_merged(case, case.folder / "merged")
    expected, found = (weights_in(case.folder / name) for name in ("expected", "merged"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
