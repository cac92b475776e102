"""Configurations: what is read from YAML, and what every mistake in it is answered with."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
import yaml

from largemerge import ConfigError, MergeConfig, load_config
from largemerge.api import read_config
from largemerge.data_free.config import CURRICULUM, DataFreeConfig, load_data_free
from largemerge.data_free.methods.table import METHODS
from largemerge.regression.methods import METHODS as REGRESSION

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs").rglob("*.y*ml")
    if path.parent.name != "evaluation"  # which are no merges, and read in test_paper_configs.py
)

GOOD: dict[str, Any] = {
    "merge_method": "regmean_plusplus",
    "models": [
        {"model": "owner/maths", "calibration": {"data": "maths.jsonl"}, "parameters": {"weight": 2}},
        {"model": "owner/code", "calibration": {"data": "code.jsonl", "num_samples": 16}},
    ],
    "calibration": {"batch_size": 4},
    "parameters": {"ridge": 0.001, "exclude": ["embed", r"\.lm_head\."]},
}


def good() -> dict[str, Any]:
    """A configuration without a mistake, to put some into."""
    return copy.deepcopy(GOOD)


def put(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Sets `models.0.calibration.data` and the like."""
    *parents, leaf = path.split(".")
    target: Any = raw
    for part in parents:
        target = target[int(part)] if part.isdigit() else target.setdefault(part, {})
    target[leaf] = value
    return raw


def problems_of(raw: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(raw)
    return caught.value.problems


def test_a_good_configuration_has_defaults_filled_in() -> None:
    config = load_config(good())
    maths, code = (candidate.calibration for candidate in config.models)
    assert maths is not None and code is not None
    assert (maths.num_samples, maths.batch_size, maths.max_length, maths.seed) == (256, 4, 2048, 0)
    assert (code.num_samples, code.batch_size) == (16, 4)
    assert config.parameters.off_diagonal_scale == 0.95
    assert config.weights == (2.0, 1.0)
    assert config.shares == (2 / 3, 1 / 3)


@pytest.mark.parametrize(
    ("path", "where", "suggestion"),
    [
        ("merge_metod", "merge_metod", "merge_method"),
        ("base_modle", "base_modle", "base_model"),
        ("parameters.rigde", "parameters.rigde", "ridge"),
        ("calibration.batchsize", "calibration.batchsize", "batch_size"),
        ("models.1.modle", "models[1].modle", "model"),
        ("models.0.calibration.num_sample", "models[0].calibration.num_sample", "num_samples"),
        ("models.0.parameters.wieght", "models[0].parameters.wieght", "weight"),
    ],
)
def test_unknown_keys_come_with_the_nearest_right_one(path: str, where: str, suggestion: str) -> None:
    assert problems_of(put(good(), path, 1)) == (f"{where}: unknown key; did you mean {suggestion!r}?",)


def test_an_unknown_key_that_is_near_to_none_comes_with_all() -> None:
    (problem,) = problems_of(put(good(), "models.0.parameters.zzz", 1))
    assert problem == "models[0].parameters.zzz: unknown key; expected one of ['weight']"


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("parameters.ridge", "x", "'x'"),
        ("parameters.ridge", "0.1", "'0.1'"),
        ("parameters.off_diagonal_scale", True, "True"),
        ("parameters.include", "attn", "'attn'"),
        ("parameters.exclude", [3], "3"),
        ("calibration.num_samples", "256", "'256'"),
        ("calibration.num_samples", 2.5, "2.5"),
        ("calibration.seed", None, "None"),
        ("models.0.model", 7, "7"),
        ("models.0.name", ["a"], ""),
        ("models.0.calibration", "data.jsonl", "'data.jsonl'"),
        ("models.0.calibration.pack", "yes", "'yes'"),
        ("models.0.calibration.one_per", "paragraph", "'paragraph'"),
        ("models.0.parameters.weight", "heavy", "'heavy'"),
        ("models", "a and b", "'a and b'"),
        ("merge_method", "regmean++", "'regmean++'"),
        ("dtype", "float8", "'float8'"),
        ("compute_dtype", "float64", "'float64'"),
        ("stacks", "model.layers", "'model.layers'"),
        ("trust_remote_code", 1, "1"),
        ("base_model", {"modle": "x"}, ""),
    ],
)
def test_wrong_types_are_told_with_what_was_found(path: str, value: Any, found: str) -> None:
    (problem,) = problems_of(put(good(), path, value))
    dotted = path.replace(".0", "[0]")
    assert problem.startswith(dotted)
    assert found in problem


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("parameters.ridge", -1e-9),
        ("parameters.ridge", 1.5),
        ("parameters.ridge", float("nan")),
        ("parameters.off_diagonal_scale", 1.01),
        ("parameters.off_diagonal_scale", -0.1),
        ("parameters.off_diagonal_scale", float("nan")),
        ("models.0.parameters.weight", 0),
        ("models.0.parameters.weight", -1),
        ("models.0.parameters.weight", float("inf")),
        ("models.0.parameters.weight", float("nan")),
        ("models.0.calibration.num_samples", 0),
        ("models.0.calibration.max_length", 0),
        ("models.0.calibration.batch_size", -2),
        ("models.0.calibration.seed", -1),
        ("models.0.name", ""),
        ("models.0.model", ""),
        ("models.0.calibration.data", ""),
        ("base_model", ""),
        ("calibration.num_samples", 0),
        ("calibration.batch_size", 0),
    ],
)
def test_numbers_out_of_range_and_empty_names_are_refused(path: str, value: Any) -> None:
    (problem,) = problems_of(put(good(), path, value))
    assert problem.startswith(path.replace(".0", "[0]") + ":")


@pytest.mark.parametrize(("path", "value"), [("ridge", 0), ("ridge", 1), ("off_diagonal_scale", 0)])
def test_the_ends_of_a_range_are_in_it(path: str, value: int) -> None:
    assert getattr(load_config(put(good(), f"parameters.{path}", value)).parameters, path) == value


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("models", "models"),
        ("models.1.model", "models[1].model"),
    ],
)
def test_missing_keys_are_named(path: str, where: str) -> None:
    raw = good()
    *parents, leaf = path.split(".")
    target: Any = raw
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    del target[leaf]
    assert problems_of(raw) == (f"{where}: missing",)


def test_a_missing_method_comes_with_all_methods() -> None:
    raw = good()
    del raw["merge_method"]
    assert problems_of(raw) == (f"merge_method: missing; expected one of {sorted(REGRESSION)}",)
    with pytest.raises(ConfigError) as caught:
        read_config(raw)
    assert str(sorted([*METHODS, *REGRESSION, CURRICULUM])) in str(caught.value)


def test_one_model_is_too_few() -> None:
    raw = good()
    del raw["models"][1]
    (problem,) = problems_of(raw)
    assert problem.startswith("models:") and "2" in problem


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_broken_regex_is_quoted_with_the_reason(kind: str) -> None:
    (problem,) = problems_of(put(good(), f"parameters.{kind}", ["fine", "attn.(q|k"]))
    assert problem.startswith(f"parameters.{kind}[1]: 'attn.(q|k' is not a regular expression: ")
    assert "unterminated subpattern" in problem


def test_candidates_of_one_name_are_refused() -> None:
    raw = put(put(good(), "models.0.model", "first/tuned"), "models.1.model", "second/tuned")
    (problem,) = problems_of(raw)
    assert "2 candidates are called 'tuned'" in problem
    assert load_config(put(raw, "models.1.name", "other")).names == ("tuned", "other")


def test_a_candidate_may_not_take_the_name_of_the_base() -> None:
    """`tokenizer_source: base`, the report and the manifest would not know which of the two is meant."""
    raw = put(put(good(), "models.0.name", "base"), "base_model", "owner/pretrained")
    (problem,) = problems_of(raw)
    assert "'base'" in problem and "name" in problem


def test_tokenizer_source_is_base_or_a_candidate() -> None:
    (problem,) = problems_of(put(good(), "tokenizer_source", "math"))
    assert "'math'" in problem and "did you mean 'maths'?" in problem
    (problem,) = problems_of(put(good(), "tokenizer_source", "base"))
    assert problem == "tokenizer_source: 'base' needs a 'base_model'"
    with_base = put(put(good(), "tokenizer_source", "base"), "base_model", "owner/base")
    assert load_config(with_base).tokenizer_source == "base"
    assert load_config(put(good(), "tokenizer_source", "code")).tokenizer_source == "code"


def test_every_candidate_without_calibration_is_named() -> None:
    raw = good()
    for model in raw["models"]:
        del model["calibration"]
    assert problems_of(raw) == (
        "models[0] (maths), models[1] (code): regmean_plusplus needs calibration data; add calibration: {data: FILE}",
    )


@pytest.mark.parametrize(
    ("settings", "mentions"),
    [
        ({"assistant_only": True}, "messages_field"),
        ({"messages_field": "chat", "text_field": "text"}, "exclude each other"),
        ({"pack": True, "loss_mask_field": "mask"}, "exclude each other"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], mentions: str) -> None:
    raw = good()
    raw["models"][1]["calibration"] |= settings
    (problem,) = problems_of(raw)
    assert problem.startswith("models[1] (code).calibration") and mentions in problem


def test_what_is_not_included_needs_a_base_to_be_of() -> None:
    raw = put(good(), "parameters.excluded", "base")
    (problem,) = problems_of(raw)
    assert problem.startswith("parameters.excluded: is for what 'include' leaves out, and there is none")
    (problem,) = problems_of(put(raw, "parameters.include", ["mlp"]))
    assert problem == "parameters.excluded: 'base' needs a 'base_model'; expected one, or 'excluded: average'"
    assert load_config(put(raw, "base_model", "owner/base")).parameters.excluded == "base"
    (problem,) = problems_of(put(raw, "parameters.excluded", "bases"))
    assert problem.startswith("parameters.excluded: ") and "'bases'" in problem


def test_all_mistakes_are_told_at_once() -> None:
    raw = good()
    put(raw, "parameters.ridge", "x")
    put(raw, "parameters.rigde", 1)
    put(raw, "parameters.exclude", ["("])
    put(raw, "models.0.parameters.weight", -1)
    put(raw, "models.1.calibration.batch_size", "8")
    put(raw, "models.1.calibratoin", {})
    put(raw, "dtype", "half")
    with pytest.raises(ConfigError) as caught:
        load_config(raw)
    assert len(caught.value.problems) == 7
    text = str(caught.value)
    assert text.startswith("7 problems:\n")
    for where in (
        "parameters.ridge:",
        "parameters.rigde:",
        "parameters.exclude[0]:",
        "models[0].parameters.weight:",
        "models[1].calibration.batch_size:",
        "models[1].calibratoin:",
        "dtype:",
    ):
        assert f"\n  - {where}" in text


def test_mistakes_among_right_values_are_told_at_once() -> None:
    raw = put(put(good(), "tokenizer_source", "base"), "models.1.name", "maths")
    del raw["models"][0]["calibration"]
    assert len(problems_of(raw)) == 3


# Files


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def written(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return written


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("", "merge_method"),
        ("# only a comment\n", "merge_method"),
        ("- a\n- b\n", "list"),
        ("just words", "str"),
        ("merge_method: [regmean", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("merge_method: regmean\nmerge_method: regmean_plusplus\n", "'merge_method' stands here more than once"),
        ("parameters:\n  ridge: 0.1\n  ridge: 0.2\n", "'ridge' stands here more than once"),
        ("models:\n- {model: a, model: b}\n", "'model' stands here more than once"),
        ("? [a, b]\n: c\n", "not valid YAML"),
        ("merge_method: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_files_that_hold_no_configuration(write: Callable[[str], Path], text: str, mentions: str) -> None:
    path = write(text)
    (problem,) = problems_of(path)
    assert str(path) in problem and mentions in problem


def test_a_binary_file_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00\x93")
    (problem,) = problems_of(tmp_path / "config.yaml")
    assert "not valid YAML" in problem


def test_no_such_file(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "absent.yaml") == (f"{tmp_path / 'absent.yaml'}: no such configuration file",)
    assert problems_of(str(tmp_path)) == (f"{tmp_path}: is a folder; expected a YAML file",)


@pytest.mark.parametrize(
    ("text", "number"), [("1e-6", 1e-6), ("1E-3", 1e-3), ("5.e-1", 0.5), ("1.0e-6", 1e-6), ("0", 0.0), (".5", 0.5)]
)
def test_numbers_as_people_write_them(write: Callable[[str], Path], text: str, number: float) -> None:
    raw = yaml.safe_dump(put(good(), "parameters.ridge", "RIDGE")).replace("RIDGE", text)
    assert load_config(write(raw)).parameters.ridge == number


def test_a_quoted_number_is_text(write: Callable[[str], Path]) -> None:
    raw = yaml.safe_dump(put(good(), "parameters.ridge", "RIDGE")).replace("RIDGE", "'1e-6'")
    (problem,) = problems_of(write(raw))
    assert problem.startswith("parameters.ridge:") and "'1e-6'" in problem


def test_yaml_anchors_and_merge_keys(write: Callable[[str], Path]) -> None:
    path = write(
        "merge_method: regmean\n"
        "models:\n"
        "- {model: a, calibration: &c {data: a.jsonl, num_samples: 3}}\n"
        "- {model: b, calibration: {<<: *c, data: b.jsonl}}\n"
    )
    calibration = load_config(path).models[1].calibration
    assert calibration is not None
    assert (calibration.data, calibration.num_samples) == ("b.jsonl", 3)


def test_paths_are_looked_up_beside_the_file_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, elsewhere = tmp_path / "beside", tmp_path / "elsewhere"
    for folder in (beside, elsewhere):
        (folder / "tuned").mkdir(parents=True)
        (folder / "both.jsonl").touch()
    (elsewhere / "here.jsonl").touch()
    (elsewhere / "pretrained").mkdir()
    (beside / "config.yaml").write_text(
        "merge_method: regmean\n"
        "base_model: pretrained\n"
        "models:\n"
        "- {model: tuned, calibration: {data: both.jsonl}}\n"
        "- {model: owner/on-the-hub, calibration: {data: here.jsonl}}\n"
    )
    monkeypatch.chdir(elsewhere)
    config = load_config(beside / "config.yaml")
    first, second = config.models
    assert first.calibration is not None and second.calibration is not None
    assert first.model == str(beside / "tuned")
    assert first.calibration.data == str(beside / "both.jsonl")
    assert second.model == "owner/on-the-hub"
    assert second.calibration.data == str(elsewhere / "here.jsonl")
    assert config.base_model == str(elsewhere / "pretrained")
    assert load_config(Path("../beside/config.yaml")) == config


def test_paths_of_a_mapping_are_looked_up_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tuned").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    raw = put(put(good(), "models.0.model", "./tuned"), "models.1.model", "~/tuned")
    raw["models"][1]["name"] = "again"
    config = load_config(raw)
    assert [candidate.model for candidate in config.models] == [str(tmp_path / "tuned")] * 2


def test_the_home_of_nobody_is_no_crash() -> None:
    config = load_config(put(good(), "models.0.model", "~no-such-user/tuned"))
    assert config.models[0].model == "~no-such-user/tuned"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("owner/tuned", "tuned"),
        ("owner/tuned@v1.0", "tuned@v1.0"),
        ("./some/folder/", "folder"),
        ("/absolute/path", "path"),
        ("plain", "plain"),
    ],
)
def test_names_default_to_the_last_part_of_the_path(model: str, name: str) -> None:
    assert load_config(put(good(), "models.0.model", model)).names[0] == name


def test_the_default_name_is_what_the_user_wrote_not_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "4f2a").mkdir()
    (tmp_path / "tuned").symlink_to(tmp_path / "4f2a")
    assert load_config(put(good(), "models.0.model", str(tmp_path / "tuned"))).names[0] == "tuned"


def test_loading_a_loaded_configuration_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tuned").mkdir()
    raw = put(put(good(), "models.0.model", str(tmp_path / "tuned")), "models.1.calibration.split", "test")
    config = load_config(raw)
    monkeypatch.chdir(tmp_path)
    again = load_config(config)
    assert isinstance(again, MergeConfig)
    assert again == config
    assert load_config(config.model_dump(mode="json", exclude_none=True)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    config = read_config(path)
    if isinstance(config, DataFreeConfig):
        assert config == load_data_free(path) and config.merge_method in METHODS
        return
    assert config == load_config(path) == load_config(config)


def fields_of(model: type[pydantic.BaseModel]) -> Iterator[str]:
    """Names of a configuration's keys, and of those inside them."""
    for name, field in model.model_fields.items():
        yield name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, pydantic.BaseModel):
                yield from fields_of(part)


def test_the_annotated_file_has_every_key() -> None:
    text = (Path(__file__).parents[2] / "configs" / "annotated.yaml").read_text()
    assert [name for name in sorted(set(fields_of(MergeConfig))) if not re.search(rf"\b{name}\b", text)] == []
