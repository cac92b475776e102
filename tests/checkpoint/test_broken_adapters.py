"""Adapters by strangers: settings and tensors of the wrong kind end in one error, before anything is merged."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from adapters import merged_by_peft, read_all, same, shapes_of, train_with_peft, write_adapter
from cases import weights_in
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from largemerge.checkpoint import adapter_fit, adapter_targets
from largemerge.checkpoint.adapter_fit import config_problems
from largemerge.checkpoint.adapter_places import places_by_name
from largemerge.checkpoint.lora import open_model
from largemerge.errors import CheckpointError
from largemerge.model.adapter_names import AdapterNames

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
KEY = f"base_model.model.{Q}"
RIGHT = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp("llama")
    model = tiny_models.perturbed("llama", 0)
    model.save_pretrained(folder)
    return model, folder


def problems(folder: Path, adapter: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(f"{folder}+{adapter}")
    assert all(len(problem) < 600 for problem in caught.value.problems)
    return str(caught.value)


NAN, INF = float("nan"), float("inf")
SETTINGS: list[tuple[str, object, str]] = [
    *(("r", value, "expected a number") for value in (None, True, "4", [4], {}, "(a+)+$")),
    *(("r", value, "expected a whole number above 0") for value in (0, -1, 1.5)),
    *(("r", value, "expected a finite number") for value in (NAN, INF)),
    *(("lora_alpha", value, "expected a number") for value in (None, True, "6", [])),
    *(("lora_alpha", value, "expected a finite number") for value in (NAN, INF, -INF, 1e39, 10**300)),
    *(("rank_pattern", value, "expected numbers by pattern") for value in (5, "q_proj", ["q_proj"], True)),
    *(("rank_pattern", {"q_proj": value}, "rank_pattern['q_proj'] is") for value in (0, -1, 2.5, NAN, "4", None, [4])),
    *(("alpha_pattern", {"q_proj": value}, "alpha_pattern['q_proj'] is") for value in (NAN, INF, "4", None, True)),
    *(("alpha_pattern", {value: 4}, "is no regular expression") for value in ("(", "[", "*", "(?P<x>", "\\", "(?(")),
    *((key, 1, "expected true or false") for key in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias")),
    *((key, "false", "expected true or false") for key in ("use_dora", "inference_mode", "ensure_weight_tying")),
    *(("modules_to_save", value, "expected a list of names") for value in (5, "lm_head", [5], [""], {"a": 1})),
    *(("target_parameters", value, "expected a list of names") for value in (5, "a", [None])),
    *(("target_modules", value, "expected a pattern, or a list of names") for value in (5, [5], {"a": 1}, True)),
    *(("trainable_token_indices", value, "token ids from 0 on") for value in (5, [-1], [1.0], [True], {"a": 5}, "1")),
    ("layers_to_transform", "3", "a layer's number"),
    ("base_model_name_or_path", 5, "expected a text"),
    ("bias", "some", "expected 'none', 'all' or 'lora_only'"),
    ("init_lora_weights", "unheard-of", "which is not known"),
    ("init_lora_weights", 5, "expected true, false, or a name"),
    ("loftq_config", [5], "expected keys and values"),
    ("lora_dropout", NAN, "expected a finite number"),
    ("new_number", INF, "expected a finite number"),
    ("peft_type", 5, "expected the kind of the adapter"),
    ("peft_type", None, "expected the kind of the adapter"),
]


@pytest.mark.parametrize(("key", "value", "mentions"), SETTINGS)
def test_settings_that_are_none(key: str, value: object, mentions: str) -> None:
    found = list(config_problems({**RIGHT, key: value}))
    assert found and all(key in problem for problem in found) and any(mentions in problem for problem in found)


@pytest.mark.parametrize("pattern", ["all-linear", ".*q_proj"])
def test_a_pattern_and_layers_do_not_go_together(pattern: str) -> None:
    (found,) = config_problems({**RIGHT, "target_modules": pattern, "layers_to_transform": [0]})
    assert f"target_modules is the pattern {pattern!r}, and layers_to_transform is [0], which peft takes with" in found
    assert list(config_problems({**RIGHT, "target_modules": pattern, "layers_to_transform": []})) == []


def test_settings_are_told_all_at_once() -> None:
    found = list(config_problems({**RIGHT, "r": 0, "lora_alpha": NAN, "use_dora": 5, "modules_to_save": 3}))
    assert len(found) == 4


@pytest.mark.parametrize(
    "more",
    [
        {"lora_alpha": 0},
        {"lora_alpha": -3.5},
        {"r": 4.0},
        {"rank_pattern": None, "alpha_pattern": {}, "modules_to_save": None, "use_dora": None, "loftq_config": {}},
        {"target_modules": "all-linear", "init_lora_weights": True},
        {"target_modules": ["q_proj"], "layers_to_transform": 3},
        {"rank_pattern": {r"^model\.layers\.\d+\..*q_proj": 4, "a|b": 2}},
        {"trainable_token_indices": {"embed_tokens": [0, 5]}},
        {"init_lora_weights": "gaussian", "bias": "lora_only", "task_type": "CAUSAL_LM"},
    ],
)
def test_settings_of_peft_are_taken(more: dict[str, Any]) -> None:
    assert list(config_problems(RIGHT | more)) == []


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "A of whole numbers": ({"lora_A": ones(4, 16, dtype=torch.int64)}, "lora_A.weight is int64"),
    "A of truth": ({"lora_A": ones(4, 16, dtype=torch.bool)}, "lora_A.weight is bool"),
    "A in one dimension": ({"lora_A": ones(16)}, "q_proj"),
    "A too narrow": ({"lora_A": ones(4, 15)}, "A [4, 15] and B [16, 4] do not fit it"),
    "rank 0": ({"lora_A": ones(0, 16), "lora_B": ones(16, 0)}, "of rank 0 and 0, adapter_config.json says 4"),
    "no B": ({"lora_B": None}, "expected lora_A and lora_B, found ['lora_A']"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_factors_that_do_not_fit(tmp_path: Path, llama: tuple[PreTrainedModel, Path], case: str) -> None:
    changed, mentions = TENSORS[case]
    write_adapter(tmp_path, shapes_of(llama[1], Q))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, tensor in changed.items():
        del tensors[f"{KEY}.{name}.weight"]
        if tensor is not None:
            tensors[f"{KEY}.{name}.weight"] = tensor
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert mentions in problems(llama[1], tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.norm.weight", ones(8)),
        ("model.norm.weight", ones(32)),
        ("model.norm.weight", ones(0)),
        ("model.norm.weight", ones(16, 1)),
        ("model.norm.weight", ones(16, dtype=torch.int64)),
        (f"{DOWN}.weight", ones(8, 24)),
        ("model.embed_tokens.weight", ones(0, 16)),
        ("model.embed_tokens.weight", ones(70, 8)),
    ],
)
def test_whole_tensors_of_another_size(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], name: str, tensor: torch.Tensor
) -> None:
    """Only vocabularies may have another length, whatever the method: `passthrough` would hand it on."""
    write_adapter(tmp_path, shapes_of(llama[1], Q), whole={name: tensor})
    assert f"replaces {name}" in problems(llama[1], tmp_path)


def test_an_adapter_that_changes_nothing(tmp_path: Path, llama: tuple[PreTrainedModel, Path]) -> None:
    write_adapter(tmp_path, {}, whole={"model.norm.original_module.weight": ones(16)})
    assert "changes nothing of its model" in problems(llama[1], tmp_path)


def test_names_of_a_thousand_parts_are_matched_quickly(tmp_path: Path, llama: tuple[PreTrainedModel, Path]) -> None:
    write_adapter(tmp_path, {}, whole={"x." * 480 + "²": ones(4, 16)})
    assert f"but {llama[1].name} has no tensor x.x.x" in problems(llama[1], tmp_path)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.bfloat16, torch.float16)])
def test_factors_of_two_dtypes(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    model, folder = llama
    write_adapter(tmp_path, shapes_of(folder, Q))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    changed = {key: tensor.to(dtypes["lora_B" in key]) for key, tensor in tensors.items()}
    save_file(changed, tmp_path / "adapter_model.safetensors")
    found, _, _ = read_all(f"{folder}+{tmp_path}")
    expected = merged_by_peft(model, tmp_path).state_dict()[f"{Q}.weight"]
    assert torch.allclose(found[f"{Q}.weight"], expected, atol=1e-5)
    assert not torch.equal(found[f"{Q}.weight"], weights_in(folder)[f"{Q}.weight"])


@pytest.mark.parametrize("says", [True, False])
def test_a_bias_of_b_is_there_just_where_the_config_says_so(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], says: bool
) -> None:
    whole = {} if says else {f"{Q}.lora_B.bias": ones(16)}
    write_adapter(tmp_path, shapes_of(llama[1], Q), whole=whole, lora_bias=says)
    assert f"{Q}.weight: lora_bias is {says}, but found ['lora_A', 'lora_B'" in problems(llama[1], tmp_path)


# DoRA


@pytest.mark.parametrize("shape", [(15,), (1,), (0,), (16, 2)])
def test_a_magnitude_of_another_size(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], shape: tuple[int, ...]
) -> None:
    whole = {f"{Q}.lora_magnitude_vector": torch.ones(shape)}
    write_adapter(tmp_path, shapes_of(llama[1], Q), whole=whole, use_dora=True)
    assert "expected a number for each of 16 outputs" in problems(llama[1], tmp_path)


def test_a_row_of_zeros_is_named_rather_than_divided_by(tmp_path: Path, llama: tuple[PreTrainedModel, Path]) -> None:
    weights = weights_in(llama[1])
    weights[f"{Q}.weight"][3] = 0
    (tmp_path / "model").mkdir()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text((llama[1] / "config.json").read_text())
    write_adapter(
        tmp_path / "dora", shapes_of(llama[1], Q), whole={f"{Q}.lora_magnitude_vector": ones(16)}, use_dora=True
    )
    tensors = load_file(tmp_path / "dora" / "adapter_model.safetensors")
    tensors[f"{KEY}.lora_B.weight"][3] = 0
    save_file(tensors, tmp_path / "dora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{Q}.weight: use_dora divides by the length of row 3, which is zero"):
        read_all(f"{tmp_path / 'model'}+{tmp_path / 'dora'}")


@pytest.mark.parametrize("value", [NAN, INF])
def test_factors_that_are_not_finite_are_named(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], value: float
) -> None:
    write_adapter(tmp_path, shapes_of(llama[1], Q))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[f"{KEY}.lora_A.weight"][2, 5] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight in the adapter holds numbers that are not fin"):
        read_all(f"{llama[1]}+{tmp_path}")


# Patterns

ENDLESS = r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\8\7\6[!?]"


def test_a_pattern_without_an_end_is_named(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_fit, "_MAX_PATTERN_SECONDS", 0.1)
    write_adapter(tmp_path, shapes_of(llama[1], Q, DOWN), rank_pattern={ENDLESS: 4})
    told = problems(llama[1], tmp_path)
    assert "adapter_config.json: rank_pattern: " in told and "takes too long to match" in told


def test_a_pattern_of_layers_without_an_end_is_named(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_targets, "_MAX_SECONDS_EACH", 0.1)
    settings = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [ENDLESS]}
    write_adapter(tmp_path, shapes_of(llama[1], Q), **settings)
    told = problems(llama[1], tmp_path)
    assert "layers_pattern: " in told and "takes too long to match" in told


def test_patterns_are_those_of_peft_in_kinds_that_peft_merges(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path]
) -> None:
    """Loops in loops would hang Python's own expressions, which peft takes."""
    peft = pytest.importorskip("peft")
    model, folder = llama
    config = peft.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={r"layers\.\d\.mlp\.\w+": 2})
    train_with_peft(model, config, tmp_path)
    expected = merged_by_peft(model, tmp_path).state_dict()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    saved["rank_pattern"] = {r"([a-z0-9_.]+)+[!?]": 3, **saved["rank_pattern"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    found, _, _ = read_all(f"{folder}+{tmp_path}")
    assert same(found, dict(expected)) == []


# Files


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("make", "mentions"),
    [
        (os.mkfifo, "is a named pipe"),
        (Path.mkdir, "is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.symlink_to(path.name), "leads in a circle"),
        (lambda path: path.symlink_to("absent"), "which does not exist"),
        (lambda path: path.write_bytes(b""), "adapter_"),
        (lambda path: path.write_text("[" * 100_000), "adapter_"),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_files_that_are_none(
    tmp_path: Path,
    llama: tuple[PreTrainedModel, Path],
    name: str,
    make: Callable[[Path], object],
    mentions: str,
    alone: bool,
) -> None:
    write_adapter(tmp_path, shapes_of(llama[1], Q), base_model_name_or_path=str(llama[1]))
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        open_model(str(tmp_path) if alone else f"{llama[1]}+{tmp_path}")
    assert mentions in str(caught.value) and str(tmp_path / name) in str(caught.value)


# Adapters that are not whole


ALL = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")]


def problems_without(folder: Path, adapter: Path, left_out: str, **more: Any) -> str:
    """The problems of an adapter of all layers from whose file the names that match are removed."""
    write_adapter(adapter, shapes_of(folder, *ALL), **{"target_modules": ["q_proj", "v_proj"], **more})
    open_model(f"{folder}+{adapter}")
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if re.search(left_out, key) is None}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, adapter / "adapter_model.safetensors")
    return problems(folder, adapter)


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ALL, r"model\.layers\.\d+\.self_attn\.(q|v)_proj"],
)
@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        (r"layers\.1\.", "model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj of the model"),
        (
            r"v_proj",
            "model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj, model.layers.2.self_attn.v_proj",
        ),
        (
            r"layers\.[12]|v_proj",
            "model.layers.0.self_attn.v_proj, model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj "
            "and 2 more of the model",
        ),
    ],
)
def test_factors_that_the_settings_name_and_the_file_lacks(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], targets: object, left_out: str, named: str
) -> None:
    told = problems_without(llama[1], tmp_path, left_out, target_modules=targets)
    assert f"target_modules names {named}" in told
    assert "the file is not whole" in told


@pytest.mark.parametrize(
    "more",
    [
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"exclude_modules": r".*\.1\..*"},
        {"target_modules": r".*\.[02]\.self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj", "c_attn"], "exclude_modules": [ALL[2], "1.self_attn.v_proj"]},
    ],
)
def test_layers_that_the_settings_leave_out_may_lack(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], more: dict[str, Any]
) -> None:
    shapes = shapes_of(llama[1], *(path for path in ALL if ".1." not in path))
    write_adapter(tmp_path, shapes, **{"target_modules": ["q_proj", "v_proj"], **more})
    _, adapter = open_model(f"{llama[1]}+{tmp_path}")
    assert adapter is not None and len(adapter.deltas) == 4


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"target_modules": ["nope"]}, "target_modules is ['nope'], which matches none of the 1 modules"),
        ({"target_modules": "nope"}, "target_modules is 'nope', which matches none of the 1 modules"),
        ({"target_modules": "(("}, "target_modules: '((' is no regular expression"),
        ({"modules_to_save": ["(("]}, "modules_to_save: '((' is no regular expression"),
        ({"exclude_modules": "["}, "exclude_modules: '[' is no regular expression"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, but"),
        ({"modules_to_save": ["classifier", "score"]}, "modules_to_save names classifier, score, but"),
        ({"target_modules": [Q, "lm_head"]}, "target_modules names lm_head of the model"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices names tokens, but"),
    ],
)
def test_settings_that_name_what_the_file_lacks(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], more: dict[str, Any], told: str
) -> None:
    write_adapter(tmp_path, shapes_of(llama[1], Q), **more)
    assert told in problems(llama[1], tmp_path)


# Adapters that hold more than their settings name


V = [path for path in ALL if path.endswith("v_proj")]
LEFT_OUT: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_proj"]}, f"target_modules is ['q_proj'], which does not name {', '.join(V)}, but"),
    ({"target_modules": r".*\.q_proj"}, f"which does not name {', '.join(V)}, but"),
    ({"target_modules": ["q_proj", "proj"]}, f"which does not name {', '.join(V)}, but"),
    ({"target_modules": ["q_proj", *V[1:]]}, f"which does not name {V[0]}, but"),
    ({"target_modules": []}, "target_modules is [], which matches none of the 6 modules"),
    ({"target_modules": ""}, "target_modules is '', which matches none of the 6 modules"),
    ({"target_modules": None, "target_parameters": ["x.y"]}, "target_modules is None, which matches none of the 6"),
    ({"layers_to_transform": [0, 2]}, f"layers_to_transform is [0, 2], which leaves out {ALL[2]}, {ALL[3]}, but"),
    ({"layers_to_transform": 1}, f"layers_to_transform is 1, which leaves out {ALL[0]}, {ALL[1]}, {ALL[4]} and 1 more"),
    ({"layers_to_transform": [9]}, f"which leaves out {ALL[0]}, {ALL[1]}, {ALL[2]} and 3 more, but"),
    ({"layers_to_transform": [0, 1, 2], "layers_pattern": "h"}, "layers_to_transform is [0, 1, 2], which leaves out"),
    ({"exclude_modules": ["v_proj"]}, f"exclude_modules is ['v_proj'], which leaves out {', '.join(V)}, but"),
    ({"exclude_modules": r".*\.1\..*"}, f"which leaves out {ALL[2]}, {ALL[3]}, but"),
    ({"modules_to_save": ["v_proj"]}, f"modules_to_save is ['v_proj'], which leaves out {', '.join(V)}, but"),
]


@pytest.mark.parametrize(("more", "told"), LEFT_OUT)
def test_factors_that_the_settings_do_not_name(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], more: dict[str, Any], told: str
) -> None:
    """peft leaves those modules alone, without a word; or refuses, where nothing is left."""
    write_adapter(tmp_path, shapes_of(llama[1], *ALL), **{"target_modules": ["q_proj", "v_proj"], **more})
    found = problems(llama[1], tmp_path)
    assert told in found and ("expected the adapter's own config" in found or "are not of one adapter" in found)


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": r"model\.layers\.[0-2]\.self_attn\.(q|v)_proj"},
        {"target_modules": ALL},
        {"target_modules": [*ALL[2:], "0.self_attn.q_proj", "0.self_attn.v_proj"]},
        {"layers_to_transform": [0, 1, 2, 9]},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": ["h", "layers"]},
        {"layers_to_transform": []},
        {"target_modules": ALL, "layers_to_transform": [0]},
        {"exclude_modules": ["k_proj", "proj", "1"]},
        {"modules_to_save": []},
        {"target_parameters": []},
        {"target_modules": None},
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_factors_that_the_settings_name_in_other_words(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], more: dict[str, Any], known: bool
) -> None:
    write_adapter(tmp_path, shapes_of(llama[1], *ALL), **{"target_modules": ["q_proj", "v_proj"], **more})
    places = AdapterNames() if known else places_by_name
    _, adapter = open_model(f"{llama[1]}+{tmp_path}", find_places=places)
    assert adapter is not None and len(adapter.deltas) == 6


@pytest.mark.parametrize("kind", ["IA3", "LOHA"])
def test_other_kinds_hold_no_more_than_their_settings_name(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], kind: str
) -> None:
    peft = pytest.importorskip("peft")
    config = {
        "IA3": lambda: peft.IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
        "LOHA": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    }[kind]()
    train_with_peft(llama[0], config, tmp_path)
    open_model(f"{llama[1]}+{tmp_path}", find_places=AdapterNames())
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"target_modules": ["q_proj"]}))
    assert f"target_modules is ['q_proj'], which does not name {', '.join(V)}" in problems(llama[1], tmp_path)


def test_a_head_is_none_of_all_linear(tmp_path: Path, llama: tuple[PreTrainedModel, Path]) -> None:
    model, folder = llama
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    write_adapter(tmp_path, shapes_of(folder, *linears), target_modules="all-linear")
    assert "target_modules is 'all-linear', which does not name lm_head, but" in problems(folder, tmp_path)
    linears.remove("lm_head")
    write_adapter(tmp_path, shapes_of(folder, *linears), target_modules="all-linear")
    for places in (AdapterNames(), places_by_name):
        _, adapter = open_model(f"{folder}+{tmp_path}", find_places=places)
        assert adapter is not None and len(adapter.deltas) == len(linears)


def test_a_head_that_is_tied_is_another_module_than_the_embeddings(tmp_path: Path) -> None:
    """With `ensure_weight_tying`, peft adapts both where the settings name one."""
    peft = pytest.importorskip("peft")
    model = tiny_models.perturbed("llama_tied", 0)
    model.save_pretrained(tmp_path / "m")
    settings = {"r": 4, "init_lora_weights": False, "target_modules": ["embed_tokens", "lm_head"]}
    train_with_peft(model, peft.LoraConfig(**settings), tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {"target_modules": ["lm_head"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(saved))
    told = problems(tmp_path / "m", tmp_path / "adapter")
    assert "target_modules is ['lm_head'], which does not name model.embed_tokens, but" in told
    settings |= {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    train_with_peft(model, peft.LoraConfig(**settings), tmp_path / "both")
    open_model(f"{tmp_path / 'm'}+{tmp_path / 'both'}", find_places=AdapterNames())


@pytest.mark.parametrize("named", [None, ["embed_tokens"]])
def test_modules_saved_that_the_settings_do_not_name(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], named: list[str] | None
) -> None:
    whole = {f"{name}.modules_to_save.weight": ones(64, 16) for name in ("lm_head", "model.embed_tokens")}
    write_adapter(tmp_path, shapes_of(llama[1], Q), whole=whole, modules_to_save=named)
    told = problems(llama[1], tmp_path)
    names = "lm_head, model.embed_tokens" if named is None else "lm_head"
    assert f"modules_to_save is {named}, which does not name {names}, but" in told
    write_adapter(tmp_path, shapes_of(llama[1], Q), whole=whole, modules_to_save=["lm_head", "embed_tokens"])
    open_model(f"{llama[1]}+{tmp_path}")


def test_mistakes_of_all_layers_are_one_message(tmp_path: Path, llama: tuple[PreTrainedModel, Path]) -> None:
    write_adapter(tmp_path, shapes_of(llama[1], *ALL), use_dora=True)
    with pytest.raises(CheckpointError) as caught:
        open_model(f"{llama[1]}+{tmp_path}")
    (problem,) = caught.value.problems
    assert f"{ALL[0]}.weight: use_dora is True" in problem
    assert problem.endswith(f"; the same with {ALL[1]}.weight, {ALL[2]}.weight and 3 more")
    assert len(list(config_problems({**RIGHT, "bias": 5}))) == 1


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int8, torch.float8_e8m0fnu])
def test_tensors_of_another_dtype_are_one_message(
    tmp_path: Path, llama: tuple[PreTrainedModel, Path], dtype: torch.dtype
) -> None:
    weights = weights_in(llama[1])
    save_file(
        {key: torch.ones(tensor.shape).to(dtype) for key, tensor in weights.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text((llama[1] / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        open_model(str(tmp_path))
    assert len(caught.value.problems) <= 2 and "the same with model." in str(caught.value)
