"""The value of a parameter for one tensor: scalars, gradients, filters, levels."""

from __future__ import annotations

from typing import Any

import pytest

from largemerge.config_file import shown
from largemerge.data_free.config import Levels, evaluate, read_setting
from largemerge.data_free.methods.base import REQUIRED, Choice, FilePath, Flag, Kind, Range
from largemerge.data_free.methods.table import METHODS


@pytest.mark.parametrize(
    ("setting", "t", "expected"),
    [
        (0.3, 0.5, 0.3),
        ([0.0, 1.0], 0.25, 0.25),
        ([0.0, 0.5, 0.0], 0.75, 0.25),
        ([0.0, 0.5, 0.2], 1.0, 0.2),
        ([True, False], 0.9, True),
        ([True, False], 1.0, False),
        ([True, False, True], 0.75, True),
        (["a", "b", "c"], 0.5, "b"),
        ([{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}], 0.25, 0.25),
        ([{"filter": "self_attn", "value": 1.0}, {"filter": "*", "value": 0.5}], 0.0, 0.5),
        ([{"filter": "self_attn", "value": 1.0}], 0.0, None),
        ({"filter": "mlp", "value": 0.7}, 0.0, 0.7),
    ],
)
def test_values(setting: Any, t: float, expected: Any) -> None:
    assert evaluate(setting, "model.layers.0.mlp.up_proj.weight", t) == expected


def test_the_narrowest_level_that_has_a_value_wins() -> None:
    own = {"weight": [{"filter": "mlp", "value": 0.1}]}
    levels = Levels(({}, {"weight": 0.2}, {"weight": 0.3, "t": 0.4}))
    assert levels.value("weight", "mlp", 0.0, own) == 0.1
    assert levels.value("weight", "norm", 0.0, own) == 0.2, "its own filter does not fit"
    assert levels.value("weight", "mlp", 0.0, {}) == 0.2
    assert levels.value("t", "mlp", 0.0) == 0.4 and levels.value("density", "mlp", 0.0) is None


@pytest.mark.parametrize(
    ("kind", "setting", "expected"),
    [
        (Range(), "0.5", 0.5),
        (Range(), " -1e-3", -0.001),
        (Range(), ["0", 1, "0.5"], (0, 1, 0.5)),
        (Range(0, 1), {"filter": "mlp", "value": "1"}, {"filter": "mlp", "value": 1}),
        (Range(0, 1), [{"value": ["0", "1"]}], ({"value": (0, 1)},)),
        (Range(1, whole=True), 10.0, 10),
        (Range(1, whole=True), "3", 3),
        (Flag(), "true", True),
        (Flag(), 0, False),
        (Flag(), [1, "no", True], (True, False, True)),
        (FilePath(), "./fisher", "./fisher"),
        (Range(0, 9, word="unlimited"), "unlimited", "unlimited"),
        (Range(0, 9, word="unlimited"), ["3", " unlimited"], (3, "unlimited")),
        (Choice(("none", "avg")), [{"filter": "mlp", "value": "avg"}], ({"filter": "mlp", "value": "avg"},)),
    ],
)
def test_values_are_read_as_their_kind(kind: Kind, setting: Any, expected: Any) -> None:
    problems: list[str] = []
    found = read_setting(kind, setting, "parameters.it", problems)
    assert found == expected and not problems
    assert repr(found) == repr(expected), "1 and True are equal, but not alike"


@pytest.mark.parametrize(
    ("kind", "setting", "problem"),
    [
        (Range(), "abc", "parameters.it: expected a number, found 'abc'"),
        (Range(), [0, "x"], "parameters.it[1]: expected a number, found 'x'"),
        (Range(), [0, None], "parameters.it[1]: expected a number, found None"),
        (Range(), True, "parameters.it: expected a number, found True"),
        (Range(), float("nan"), "parameters.it: expected a number, found nan"),
        (Range(), "inf", "parameters.it: expected a number, found 'inf'"),
        (Range(0, 1), 1.5, "parameters.it: expected a number from 0 to 1, found 1.5"),
        (Range(0, 1), [{"value": [0, -0.5]}], "parameters.it[0].value[1]: expected a number from 0 to 1, found -0.5"),
        (Range(0, above=True), 0, "parameters.it: expected a number above 0, found 0"),
        (Range(1, whole=True), 2.5, "parameters.it: expected a whole number from 1, found 2.5"),
        (Flag(), "maybe", "parameters.it: expected true or false, found 'maybe'"),
        (Range(0, 9, word="never"), "ever", "parameters.it: expected a number from 0 to 9, or never, found 'ever'"),
        (Range(0, 9, word="never"), 10, "parameters.it: expected a number from 0 to 9, or never, found 10"),
        (Range(word="never"), float("inf"), "parameters.it: expected a number, or never, found inf"),
        (Range(), "never", "parameters.it: expected a number, found 'never'"),
        (Choice(("none", "avg")), "mean", "parameters.it: expected one of none, avg, found 'mean'"),
        (Choice(("none", "avg")), None, "parameters.it: expected one of none, avg, found None"),
        (Choice(("none", "avg")), ["avg", 1], "parameters.it[1]: expected one of none, avg, found 1"),
        (Flag(), 0.5, "parameters.it: expected true or false, found 0.5"),
        (FilePath(), 3, "parameters.it: expected a .safetensors file, or a folder with some, found 3"),
        (
            FilePath(),
            ["a", "b"],
            "parameters.it: expected a .safetensors file, or a folder with some, found ['a', 'b']",
        ),
        (Range(), [], "parameters.it: expected a number, or a list of such, found an empty list"),
        (Range(), [[0.5, 1]], "parameters.it[0]: expected a number, found [0.5, 1]"),
        (Range(), [{"filter": "mlp"}], "parameters.it[0]: expected 'value' and maybe 'filter', found ['filter']"),
        (
            Range(),
            [{"value": 1.0, "weight": 2}],
            "parameters.it[0]: expected 'value' and maybe 'filter', found ['value', 'weight']",
        ),
        (Range(), [{"filter": 12, "value": 1}], "parameters.it[0].filter: expected a part of tensors' names, found 12"),
        (
            Range(),
            [{"value": 1.0}, 0.5],
            "parameters.it[1]: expected an entry of 'filter' and 'value' like the others, found 0.5",
        ),
        (
            Range(),
            10**400,
            "parameters.it: expected a number from -1e+30 to 1e+30, found a whole number of some 401 digits",
        ),
        (Range(), -1e31, "parameters.it: expected a number from -1e+30 to 1e+30, found -1e+31"),
        (Range(), "9" * 5000, f"parameters.it: expected a number, found {shown('9' * 5000)}"),
        (Range(0), 1e31, "parameters.it: expected a number from 0 to 1e+30, found 1e+31"),
        (
            Range(0, above=True),
            1e-320,
            "parameters.it: expected a number above 0 and up to 1e+30, found 1e-320",
        ),
        (
            Range(1, 10_000, whole=True),
            1e9,
            "parameters.it: expected a whole number from 1 to 10000, found 1000000000.0",
        ),
        (Range(0, 1), ["0", "²"], "parameters.it[1]: expected a number from 0 to 1, found '²'"),
        (Flag(), 10**400, "parameters.it: expected true or false, found a whole number of some 401 digits"),
        (FilePath(), "\n", "parameters.it: expected a .safetensors file, or a folder with some, found '\\n'"),
        (Range(), {"value": {"value": 1}}, "parameters.it.value: expected a number, found {'value': 1}"),
    ],
)
def test_mistakes_in_values(kind: Kind, setting: Any, problem: str) -> None:
    problems: list[str] = []
    read_setting(kind, setting, "parameters.it", problems)
    assert problems == [problem]


def test_every_parameter_of_every_method_has_a_kind_and_a_default_of_it() -> None:
    for name, method in METHODS.items():
        defaults = {**method.shared, **method.per_model}
        assert set(method.kinds) == set(defaults), name
        for parameter, default in defaults.items():
            if default is not None and default is not REQUIRED:
                assert method.kinds[parameter].problem(default) is None, (name, parameter)
