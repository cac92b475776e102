"""Mistakes in data-free merges are reported before the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf
import yaml
from cases import rewrite_weights
from data_free_cases import NUM_LAYERS, Config, config_of, weighted, write_models
from transformers import LlamaForCausalLM

import largemerge
from largemerge import ConfigError, LargemergeError
from largemerge.data_free import engine

MISTAKES: list[tuple[str, Config, str]] = [
    ("ties", {}, "base_model: ties needs one"),
    ("tie", {}, "did you mean 'ties'"),
    ("linear", {"parameters": {"wieght": 1.0}}, "did you mean 'weight'"),
    (
        "linear",
        {"parameters": {"weight": []}},
        "parameters.weight: expected a number, or a list of such, found an empty list",
    ),
    ("linear", {}, "weight: missing for"),
    ("linear", {"chat_template": "chatlm"}, "chat_template: 'chatlm' is not known; expected 'auto', one of ['alpaca',"),
    ("linear", {"chat_template": "{% for %}"}, "chat_template: not a Jinja template: line 1"),
    ("linear", {"chat_template": "chatml", "parameters": {"weight": 1}}, "chat_template: no model has a tokenizer"),
    ("linear", {"out_dype": "float16"}, "out_dype: unknown key; did you mean 'out_dtype'"),
    ("linear", {"models": []}, "expected one of 'models', 'slices' and 'modules', found none"),
    ("passthrough", {}, "passthrough merges 1 models, found 3"),
    ("nearswap", {"base_model": "BASE"}, "parameters.t: nearswap needs it"),
    ("slerp", {"base_model": "BASE", "parameters": {"t": 0.5}}, "slerp merges 1 models beside the base, found 3"),
]


def test_the_base_alone_is_no_merge(tmp_path: Path) -> None:
    write_models(tmp_path)
    base = str(tmp_path / "model0")
    config = {"merge_method": "slerp", "base_model": base, "models": [{"model": base}], "parameters": {"t": 0.5}}
    with pytest.raises(ConfigError, match=r"models: .*model0, the base, is alone; expected another model beside it"):
        largemerge.plan(config)


def test_a_module_of_an_unknown_name_is_told(tmp_path: Path) -> None:
    write_models(tmp_path)
    entry = {"models": [{"model": str(tmp_path / "model0")}]}
    for name, is_known in (("foo", False), ("default", True), ("text_decoder", True), ("model.layers", True)):
        problems = largemerge.plan({"merge_method": "passthrough", "modules": {name: entry}}, probe=False).problems
        assert bool(problems) != is_known, name
        assert is_known or "modules: found ['foo'], expected one for each of ['model.layers']" in problems[0]


def test_more_layers_than_any_model_has_are_told_at_once(tmp_path: Path) -> None:
    write_models(tmp_path)
    part = {"sources": [{"model": str(tmp_path / "model0"), "layer_range": [0, 2]}]}
    with pytest.raises(ConfigError, match="slices: 12,000 layers in all; expected 10,000 at most"):
        largemerge.plan({"merge_method": "passthrough", "slices": [part] * 6000})


def test_reports_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    write_models(tmp_path)
    config = weighted(tmp_path)
    for entry, weight in zip(config["models"], (1e-30, 1e30, 1.0), strict=False):
        entry["parameters"]["weight"] = weight
    rewrite_weights(tmp_path / "model0", lambda tensors: {key: tensor * 1e18 for key, tensor in tensors.items()})
    largemerge.merge(config, tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / "out" / "merge_report.json").read_text(), parse_constant=refuse)


# What stands in the file, with BASE for the base, and all that is wrong with it.
TOLD_TOGETHER: list[tuple[str, list[str]]] = [
    (
        """{merge_method: linear, models: [{model: A, parameters: {weight: abc}},
        {model: B, parameters: {weight: [0, x]}}]}""",
        [
            "models[0].parameters.weight: expected a number, found 'abc'",
            "models[1].parameters.weight[1]: expected a number, found 'x'",
        ],
    ),
    (
        "{merge_method: linear, models: [{model: A}, {model: B}], parameters: {normalize: maybe}}",
        [
            "parameters.normalize: expected true or false, found 'maybe'",
            "weight: missing for A, B, in models[0], models[1]; expected a number",
        ],
    ),
    (
        "{merge_method: linear, base_model: BASE, models: [{model: A, parameters: {weight: 1}}]}",
        ["weight: missing for BASE, which it merges like the others: name it among them; expected a number"],
    ),
    (
        """{merge_method: ties, base_model: BASE, parameters: {lambda: x, wieght: 1}, models: [
        {model: A, parameters: {weight: .nan, density: 1.5}},
        {model: B, parameters: {weight: true, density: -0.5}}]}""",
        [
            "parameters.lambda: expected a number from -1e+06 to 1e+06, found 'x'",
            "parameters.wieght: unknown parameter; did you mean 'weight'?",
            "models[0].parameters.weight: expected a number, found nan",
            "models[0].parameters.density: expected a number from 0 to 1, found 1.5",
            "models[1].parameters.weight: expected a number, found True",
            "models[1].parameters.density: expected a number from 0 to 1, found -0.5",
        ],
    ),
    (
        "{merge_method: slerp, base_model: BASE, slices: [{sources: [{model: A, layer_range: [0, 3]}]}]}",
        [
            "slices[0].sources: slerp needs the base among them, BASE, with as many layers as the others; found ['A']",
            "slices[0].parameters.t: slerp needs it",
        ],
    ),
    (
        """{merge_method: ties, parameters: {weight: 1}, slices: [{sources: [{model: A, layer_range: [0, 3]}]},
        {base_model: B, sources: [{model: A, layer_range: [0, 3]}, {model: B, layer_range: [0, 3]}]}]}""",
        ["base_model: ties needs one"],
    ),
    (
        """{merge_method: passthrough, slices: [{sources: [{model: A, layer_range: [0]},
        {model: B, layer_range: '0-3'}]}, {sources: []}, {sources: {model: A}}]}""",
        [
            "slices[0].sources[0].layer_range: expected the first layer and the one after the last, such as [0, 16], "
            "found [0]",
            "slices[0].sources[1].layer_range: expected the first layer and the one after the last, such as [0, 16], "
            "found '0-3'",
            "slices[1].sources: expected 1 or more entries, found an empty list",
            "slices[2].sources: expected a list, found the keys ['model']",
        ],
    ),
    (
        "{merge_method: linear, models: {A: 1}, parameters: [weight], dtype: float8, seed: -1, allow_crimes: perhaps}",
        [
            "models: expected a list, found the keys ['A']",
            "parameters: expected keys and values, found 1 entry",
            "dtype: expected 'float32', 'bfloat16' or 'float16', found 'float8'",
            "allow_crimes: expected true or false, found 'perhaps'",
            "seed: expected a number from 0 on, found -1",
        ],
    ),
    (
        "{merge_method: linear, models: [A, {model: B@x, revision: y, parameters: {weight: 1}}]}",
        [
            "models[1].revision: stands here twice, beside 'model' and in it; expected one",
            "models[0]: expected keys and values, found 'A'",
        ],
    ),
    (
        "{merge_method: tsv_m, base_model: BASE, models: [{model: A}, {model: B}], alpha: 0.5}",
        ["alpha: unknown key; it belongs under 'parameters'"],
    ),
]


@pytest.mark.parametrize(("text", "problems"), TOLD_TOGETHER)
def test_all_mistakes_of_a_file_are_told_together(tmp_path: Path, text: str, problems: list[str]) -> None:
    (tmp_path / "merge.yml").write_text(text)
    with pytest.raises(ConfigError) as error:
        largemerge.plan(tmp_path / "merge.yml")
    assert list(error.value.problems) == problems


@pytest.mark.parametrize(
    ("method", "parameters", "problem"),
    [
        (
            "linear",
            {"weight": 0},
            "weight: 0, 0, 0 add up to 0, which the sum is divided by; choose others, or normalize",
        ),
        ("multislerp", {"weight": [1, 0]}, "weight: 0, 0, 0 add up to 0"),
        ("della", {"weight": 1, "density": 0.9}, "density 0.9 ± epsilon 0.15 leaves the range from 0 to 1"),
        ("ties", {"weight": [{"filter": "mlp", "value": 1}]}, "none of its filters fits"),
    ],
)
def test_values_that_do_not_go_together(tmp_path: Path, method: str, parameters: Config, problem: str) -> None:
    write_models(tmp_path)
    base = {"base_model": str(tmp_path / "model0")} if method in ("della", "ties") else {}
    problems = largemerge.plan(config_of(tmp_path, method, parameters=parameters, **base), probe=False).problems
    assert len(problems) == (3 if method == "ties" else 1), "not one for each tensor"
    assert all(problem in told for told in problems)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four models in float32, and two in float16."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    write_models(folder / "half", count=2, dtype=torch.float16)
    return folder


MLP = ", ".join(f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
OF_MLP: list[dict[str, Any]] = [{"filter": "mlp", "value": 0}, {"value": 1}]


@pytest.mark.parametrize(
    ("method", "parameters", "weights", "problem"),
    [
        (
            "linear",
            {},
            [1, -1],
            "weight: 1, -1 add up to 0, which the sum is divided by; choose others, or normalize: ",
        ),
        ("linear", {}, [1, -0.9999999], "weight: 1, -1 add up to 0"),
        ("linear", {}, [1e10, -1e10], "weight: 1e+10, -1e+10 add up to 0"),
        ("linear", {"normalize": False}, [0, 0], "weight: 0, 0 are so small that the output would be 0; choose others"),
        ("linear", {}, [[{"filter": "mlp", "value": -1}, {"value": 1}], 1], f"normalize: false ({MLP})"),
        ("linear", {}, [[1, 0, 1], [0, 0, 0]], "add up to 0, which the sum is divided by; choose others, or normalize"),
        ("multislerp", {}, [1, -1], "weight: 1, -1 add up to 0"),
        (
            "multislerp",
            {"normalize_weights": False},
            [1e-9, 1e-9],
            "weight: 1e-09, 1e-09 are together below eps, 1e-08",
        ),
        ("ties", {"density": 0}, [1, 1], "density: 0 for every model: nothing of any model would be in the output"),
        ("dare_linear", {"density": [0, 0]}, [1, 1], "density: 0 for every model: nothing of any model"),
        ("sce", {"select_topk": 0}, [], "select_topk: 0: nothing of any model would be in the output"),
        ("passthrough", {"scale": 0}, [], "scale: 0: nothing of any model would be in the output"),
        ("consensus_ta", {"prun_thre_k": 3}, [], "prun_thre_k: expected 2 at most, the number of models, found 3"),
        ("della", {"density": [0.9, 0.5, 0.5]}, [1, 1], "density 0.9 ± epsilon 0.15 leaves the range from 0 to 1"),
        ("knots", {"density": 0}, [1, 1], "density: 0 for every model: nothing of any model would be in the output"),
        ("resmerge", {"src_beta_min": 2}, [], "src_beta_min: expected 1 at most, which is src_beta_max, found 2"),
    ],
)
def test_parameters_that_leave_no_number(
    models: Path, method: str, parameters: Config, weights: list[Any], problem: str
) -> None:
    needs_base = method in ("ties", "dare_linear", "sce", "consensus_ta", "della", "knots", "resmerge")
    base = {"base_model": str(models / "model0")} if needs_base else {}
    config = config_of(models, method, [1] if method == "passthrough" else [1, 2], parameters=parameters, **base)
    for entry, weight in zip(config["models"], weights, strict=False):
        entry["parameters"] = {"weight": weight}
    (found,) = largemerge.plan(config, probe=False).problems
    assert problem in found


@pytest.mark.parametrize(
    ("method", "parameters", "weights", "note"),
    [
        ("task_arithmetic", {}, [0, 0], "warning: weight: 0 for every model: the base as it is"),
        ("task_arithmetic", {"lambda": 0}, [1, 1], "warning: lambda: 0: the base as it is"),
        ("ties", {"density": OF_MLP}, [1, 1], f"warning: density: 0 for every model: the base as it is ({MLP})"),
        ("task_arithmetic", {"normalize": True}, [1, -1], "warning: weight: 1, -1 add up to 0: the sum is not divided"),
        ("nuslerp", {}, [1, -1], "warning: weight: 1, -1 add up to 0: both models count half, as in mergekit"),
        ("iso_c", {"scaling_factor": 0}, [], "warning: scaling_factor: 0: the base as it is"),
        ("dc_merge", {"alpha": 0}, [], "warning: alpha: 0: the base as it is"),
        ("task_arithmetic", {"normalize": True}, [1, -2], "warning: weight: 1, -2 add up to less than 0, and 'normal"),
        ("ties", {}, [1, -0.5], "warning: weight: 1, -0.5: 'normalize' divides by the sum of the weights that agree"),
        ("task_simplex", {"lambda": 0}, [1, 1], "warning: lambda: 0: the base as it is"),
    ],
)
def test_parameters_that_change_nothing_are_named(
    models: Path, method: str, parameters: Config, weights: list[Any], note: str
) -> None:
    base = {"base_model": str(models / "model0")} if method != "nuslerp" else {}
    config = config_of(models, method, [1, 2], parameters=parameters, **base)
    for entry, weight in zip(config["models"], weights, strict=False):
        entry["parameters"] = {"weight": weight}
    plan = largemerge.plan(config, probe=False)
    assert not plan.problems and sum(told.startswith(note) for told in plan.notes) == 1


def test_factors_fit_into_the_dtype(models: Path) -> None:
    config = config_of(models / "half", "passthrough", [1], parameters={"scale": 1e5})
    expected = "scale: 100000 does not fit into float16; expected up to 65504"
    assert largemerge.plan(config, probe=False).problems == [expected]
    assert not largemerge.plan(config | {"dtype": "float32", "out_dtype": "bfloat16"}, probe=False).problems


@pytest.mark.parametrize("is_vocabulary", [False, True])
def test_heads_of_other_sizes_are_no_vocabularies(tmp_path: Path, is_vocabulary: bool) -> None:
    """Of a class that nobody knows, only the sizes in the config tell which tensors are tables of tokens."""
    for number in (1, 2):
        folder = tmp_path / f"model{number}"
        sizes = tiny_models.LLM | ({"vocab_size": 64 + number} if is_vocabulary else {"num_labels": 1 + number})
        build = LlamaForCausalLM if is_vocabulary else tf.LlamaForSequenceClassification
        build(tf.LlamaConfig(**sizes)).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        names = {"model_type": "nobodys", "architectures": ["NobodysModel"]}
        (folder / "config.json").write_text(json.dumps(config | names))
    with pytest.raises(LargemergeError) as error:
        largemerge.merge({"merge_method": "linear", "models": two_of(tmp_path)}, tmp_path / "out")
    assert "shapes differ" in str(error.value)
    assert ("tokenizer_source: union" in str(error.value)) == is_vocabulary


def two_of(folder: Path) -> list[Config]:
    return [{"model": str(folder / f"model{number}"), "parameters": {"weight": 1}} for number in (1, 2)]


def test_a_tokenizer_comes_from_no_model_with_an_adapter(tmp_path: Path) -> None:
    config = {"merge_method": "linear", "models": [{"model": "o/a", "parameters": {"weight": 1}}]}
    for more, place in (
        ({"tokenizer_source": "o/b+o/adapter"}, "tokenizer_source"),
        ({"tokenizer": {"tokens": {"x": {"source": "o/b+o/adapter"}}}}, "tokenizer.tokens.x.source"),
    ):
        with pytest.raises(ConfigError) as caught:
            largemerge.plan(config | more)
        (problem,) = caught.value.problems
        assert problem.startswith(f"{place}: 'o/b+o/adapter' is a model with an adapter, and not among the models")


def test_anchors_do_not_excuse_a_key_that_nothing_refers_to(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text("merge_method: linear\nparamters: &p {weight: 1}\nmodels: [{model: a}]\n")
    with pytest.raises(ConfigError, match="paramters: unknown key; did you mean 'parameters'"):
        largemerge.plan(path)


@pytest.mark.parametrize(("method", "more", "text"), MISTAKES)
def test_mistakes_are_told_before_the_work(tmp_path: Path, method: str, more: Config, text: str) -> None:
    write_models(tmp_path)
    more = {key: str(tmp_path / "model0") if value == "BASE" else value for key, value in more.items()}
    with pytest.raises(LargemergeError) as error:
        largemerge.merge(config_of(tmp_path, method) | more, tmp_path / "out")
    assert text in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unlike_models_are_told_all_at_once(tmp_path: Path) -> None:
    write_models(tmp_path)
    sizes = tiny_models.LLM | {"intermediate_size": 32}
    LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(tmp_path / "model3")
    with pytest.raises(LargemergeError) as error:
        largemerge.merge(weighted(tmp_path), tmp_path / "out")
    assert str(error.value).count("shapes differ") == 3 * NUM_LAYERS
    with pytest.raises(LargemergeError, match=r"layer_range \[1, 9\].*expected some of \[0, 3\]"):
        slices = [{"sources": [{"model": str(tmp_path / "model1"), "layer_range": [1, 9]}]}]
        largemerge.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")


def test_paths_are_looked_up_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    config = {"merge_method": "linear", "models": [{"model": "model1"}, {"model": "./model2"}]}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config | {"parameters": {"weight": 1.0}}))
    monkeypatch.chdir("/")
    assert not largemerge.plan(tmp_path / "merge.yml").problems


def test_keys_without_values_are_none(tmp_path: Path) -> None:
    write_models(tmp_path)
    empty = {"base_model": None, "slices": None, "tokenizer": None, "chat_template": None, "dtype": None}
    config = weighted(tmp_path) | empty | {"parameters": None}
    config["models"][0]["parameters"]["weight"] = [{"filter": None, "value": 0.5}]
    plan = largemerge.plan(config)
    assert not plan.problems and plan.tasks[0].per_model["weight"] == [0.5, 0.3, 0.2]
    with pytest.raises(LargemergeError, match=r"slices\[0\].residual_wait: unknown key"):
        largemerge.plan({"merge_method": "linear", "slices": [{"sources": [], "residual_wait": 0.5}]})


def test_options_of_other_methods_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path)
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(weighted(tmp_path)))
    from largemerge.cli import main

    for arguments, text in (
        (["merge", path, tmp_path / "out", "--memory-disk", tmp_path], "--memory-disk: not for data-free methods"),
        (["merge", path, tmp_path / "out", "--device", "cuda:99"], "expected auto, cpu or cuda:0"),
        (["plan", path, "--device", "warp"], "expected auto, cpu or cuda:0"),
        (["plan", path, "--num-ranks", "2"], "are for regression methods"),
    ):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        assert done.value.code == 2 and text in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["plan", str(path)])
    assert done.value.code == 0 and "to write" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("generation_config.json", "{", "generation_config.json"),
        ("generation_config.json", "[1]", "generation_config.json"),
        ("generation_config.json", '{"cache_implementation": "none such"}', "generation_config.json"),
    ],
)
def test_what_is_wrong_beside_the_weights_is_told_before_the_work(
    tmp_path: Path, file: str, content: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path)
    (tmp_path / "model1" / file).write_text(content)
    monkeypatch.setattr(engine, "run_parts", None)  # nothing may be merged
    with pytest.raises(LargemergeError, match=expected):
        largemerge.merge(weighted(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
