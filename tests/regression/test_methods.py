"""The table of regression methods: what a row says is what is done, and what is not built is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cases import MakeCase

import largemerge
from largemerge import ConfigError
from largemerge.regression import methods
from largemerge.regression.methods import METHODS


def test_rows_say_what_the_two_methods_are() -> None:
    assert set(METHODS) == {"regmean", "regmean_plusplus"}
    assert METHODS["regmean"].advances_while_collecting and not METHODS["regmean"].forwards_merged
    assert METHODS["regmean_plusplus"].forwards_merged and not METHODS["regmean_plusplus"].advances_while_collecting
    for row in METHODS.values():
        assert "arXiv" in row.source and not list(row.not_built())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "linear"}, "granularity 'linear' is not built; expected 'block'"),
        ({"target": 1.0}, "target 1.0 is not built; expected 0"),
        ({"anchor": "base"}, "anchor 'base' is not built; expected 'average'"),
    ],
)
def test_a_row_that_asks_for_what_is_not_built_is_refused(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    row = replace(METHODS["regmean_plusplus"], title="Chain", **changes)
    monkeypatch.setitem(methods.METHODS, "chain", row)
    case = make_case(num_samples=4, method="chain")
    with pytest.raises(ConfigError, match=message):
        largemerge.merge(case.config, case.folder / "out")
    assert not (case.folder / "out").exists()


def test_a_new_row_is_a_method(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, and the configuration, the plan, the merge and the report know it."""
    row = replace(METHODS["regmean_plusplus"], title="Again", parameters=frozenset({"ridge"}))
    monkeypatch.setitem(methods.METHODS, "again", row)
    case = make_case(num_samples=4, method="again")
    assert largemerge.plan(case.config, probe=False).to_json()["merge_method"] == "again"
    report = largemerge.merge(case.config, case.folder / "out")
    assert report.config.merge_method == "again"
    case.config["parameters"] = {"off_diagonal_scale": 0.5}
    with pytest.raises(ConfigError, match=r"parameters\.off_diagonal_scale: again has no such parameter"):
        largemerge.plan(case.config)


def test_an_unknown_name_is_told_with_all_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"regmean.*task_arithmetic"):
        largemerge.plan({"merge_method": "zzz", "models": []})
