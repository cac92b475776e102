"""Mistakes in data-free merges are reported before the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import transformers as tf
import yaml
from data_free_cases import NUM_LAYERS, Config, config_of, weighted, write_models
from transformers import LlamaForCausalLM

import largemerge
from largemerge import LargemergeError

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
