"""The value of a parameter for one tensor: scalars, gradients, filters, levels."""

from __future__ import annotations

from typing import Any

import pytest

from largemerge.data_free.config import Levels, evaluate, setting_problems


@pytest.mark.parametrize(
    ("setting", "t", "expected"),
    [
        (0.3, 0.5, 0.3),
        ([0.0, 1.0], 0.25, 0.25),
        ([0.0, 0.5, 0.0], 0.75, 0.25),
        ([0.0, 0.5, 0.2], 1.0, 0.2),
        ([True, False], 0.9, True),
        ([True, False], 1.0, False),
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
    "setting", [[], [{"filter": "mlp"}], [{"value": 1.0}, 0.5], [{"value": 1.0, "weight": 2}], [[0.5, []]]]
)
def test_mistakes(setting: Any) -> None:
    assert list(setting_problems(setting))
