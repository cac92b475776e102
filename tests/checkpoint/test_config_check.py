"""Broken `config.json`s: told before the work, with key, what was found and what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from data_free_cases import weighted, write_models
from safetensors.torch import save_file
from tiny_models import inputs

import largemerge
from largemerge import CheckpointError, LargemergeError
from largemerge.checkpoint.config_check import check_config
from largemerge.model import skeleton

BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"architectures": 5}, "architectures: expected a list of class names such as ['LlamaForCausalLM'], found 5"),
    ({"architectures": [5]}, "architectures: expected a list of class names such as ['LlamaForCausalLM'], found [5]"),
    ({"architectures": ["LlamaConfig"]}, "found 'LlamaConfig', which is no model"),
    ({"model_type": 5}, "model_type: expected a name such as 'llama', found 5"),
    ({"dtype": 5}, "dtype: expected the name of a dtype such as 'bfloat16', found 5"),
    ({"auto_map": []}, "auto_map: expected names of classes"),
    ({"quantization_config": 5}, "quantization_config: expected keys and values, found 5"),
    ({"id2label": {"a": "b"}}, "id2label: expected numbers and their labels, found 'a' for a number"),
    ({"hidden_size": 0}, "hidden_size: expected 1 or more, found 0"),
    ({"hidden_size": "16"}, "config.json: hidden_size: expected a whole number, found "),
    ({"hidden_size": None}, "config.json: hidden_size: expected a whole number, found "),
    ({"vocab_size": -5}, "vocab_size: expected 0 or more, found -5"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 10000, found 1000000000"),
    ({"num_hidden_layers": 9_999}, "far more than there are tensors in its files"),
    ({"num_labels": 10**9}, "num_labels: expected at most 2000000, found 1000000000"),
    ({"hidden_act": "nosuch"}, "nosuch"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number, found NaN"),
    ({"intermediate_size": 10**15}, "intermediate_size: expected at most 100000000, found 1000000000000000"),
    ({"vocab_size": 10**12}, "vocab_size: expected at most 100000000, found 1000000000000"),
    ({"dtype": "float99"}, "dtype: expected the name of a dtype such as 'bfloat16', found 'float99'"),
    ({"rope_parameters": {"rope_theta": "a"}}, "rope_parameters.rope_theta: expected a number, found 'a'"),
    ({"output_hidden_states": "x"}, "output_hidden_states: expected true or false, found 'x'"),
    ({"pad_token_id": 999}, "pad_token_id: expected a token's number below vocab_size, found 999"),
    ({"num_attention_heads": 3}, "config.json: The hidden size (16) is not a multiple of"),
    ({"to_dict": "x"}, "to_dict: no setting of a model; remove it"),
    ({"text_config": {}}, "LlamaForCausalLM cannot be built from config.json: a value has a type or size"),
    ({"text_config": 3}, "text_config: expected keys and values, found 3"),
    ({"vision_config": [1]}, "vision_config: expected keys and values, found [1]"),
    ({"text_config": {"depths": [2, 10**6]}}, "text_config.depths.1: expected at most 10000, found 1000000"),
    ({"rope_theta": 10**30}, "rope_theta: expected a number of 64 bits, found one of 100"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("configs")
    write_models(made)
    save_file(inputs("causal", 2, 0), made / "data.safetensors")
    return made


CASES = [("linear", *each) for each in BROKEN] + [("regmean", *each) for each in BROKEN[::6]]


@pytest.mark.parametrize(("method", "changes", "told"), CASES)
def test_a_broken_config_is_told(folder: Path, tmp_path: Path, method: str, changes: dict[str, Any], told: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (folder / "model1").iterdir():
        (broken / path.name).symlink_to(path)
    config = json.loads((folder / "model1" / "config.json").read_text()) | changes
    (broken / "config.json").unlink()
    (broken / "config.json").write_text(json.dumps(config))
    merge = weighted(folder, method)
    merge["models"][0]["model"] = str(broken)
    if method == "regmean":
        for entry in merge["models"]:
            entry["calibration"] = {"data": str(folder / "data.safetensors")}
    with pytest.raises(LargemergeError) as caught:
        largemerge.merge(merge, tmp_path / "out", quiet=True)
    assert told in str(caught.value) and "broken" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_mistakes_are_told_at_once_and_those_of_deep_configs_end() -> None:
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"a": deep}
    with pytest.raises(CheckpointError) as caught:
        check_config({"architectures": 5, "n_layer": -1, "deep": deep}, "m")
    assert [problem.partition(": ")[2].split(":")[1].strip() for problem in caught.value.problems] == [
        "architectures",
        "n_layer",
        "deep.a.a…",
    ]


NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"rms_norm_eps": -1}, "rms_norm_eps: expected a number from 0 to 1, found -1"),
    ({"layer_norm_eps": 1e300}, "layer_norm_eps: expected a number from 0 to 1, found 1e+300"),
    ({"vision_config": {"layer_norm_epsilon": 2}}, "vision_config.layer_norm_epsilon: expected a number from 0 to 1"),
    ({"eps": float("inf")}, "eps: expected a number from 0 to 1, found inf"),
    ({"rope_theta": 0}, "rope_theta: expected a finite number above 0, found 0"),
    ({"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters.rope_theta: expected a finite number above 0"),
    ({"rope_scaling": {"factor": 0}}, "rope_scaling.factor: expected a finite number above 0, found 0"),
    ({"rope_parameters": {"full": {"factor": -2.0}}}, "rope_parameters.full.factor: expected a finite number above 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: expected 1 or more, found 0"),
    ({"vision_config": {"patch_size": [0, 14]}}, "vision_config.patch_size.0: expected 1 or more, found 0"),
    ({"initializer_range": float("-inf")}, "initializer_range: expected a finite number, found -inf"),
    ({"model_type": None}, "neither model_type nor architectures nor auto_map, only ['model_type']"),
    ({"model_type": "", "architectures": []}, "neither model_type nor architectures nor auto_map"),
]


@pytest.mark.parametrize(("changes", "told"), NUMBERS)
def test_numbers_out_of_their_range_and_configs_of_no_model(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_config({"model_type": "llama", **changes}, "m")
    assert len(caught.value.problems) == 1 and f"m: config.json: {told}" in str(caught.value)


def test_numbers_of_right_configs_pass() -> None:
    right = {"layer_norm_eps": 0, "inference_num_steps": 68, "num_steps": 10, "time_step_limit": [0.0, float("inf")]}
    right |= {"head_dim": None, "num_key_value_heads": None, "factor": 0, "layer_rope_theta": [0, 10000.0]}
    check_config({"model_type": "llama", **right}, "m")
    check_config({"auto_map": {"AutoConfig": "mine.MyConfig"}}, "m")


@pytest.mark.parametrize("kind", ["llama", "mamba2", "swin", "t5", "xlnet", "deberta-v2", "mixtral", "clip", "bamba"])
def test_right_configs_pass(kind: str) -> None:
    check_config(json.loads(tf.AutoConfig.for_model(kind).to_json_string(use_diff=False)), kind)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_kernels_that_a_config_names_are_not_used(key: str) -> None:
    config = tf.MixtralConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    named = json.loads(config.to_json_string()) | {key: "kernels-community/flash-attn", "architectures": None}
    made = skeleton.build_model(skeleton.bare_checkpoint(named, "m"))
    assert made.config._attn_implementation == "sdpa"
    assert "kernels" not in str(made.config._experts_implementation)
    assert skeleton._without_kernels({"a": [{key: 1, "b": 2}], key: 3}) == {"a": [{"b": 2}]}


def test_tables_that_no_memory_holds_are_not_computed() -> None:
    with skeleton._bounded(10), pytest.raises(skeleton._TooLarge, match="a table of"):
        torch.arange(3 << 30)
    with skeleton._bounded(10):
        assert torch.arange(5).sum() == 10
