"""The table of regression methods: what a row says is what is done, and what is not built is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import MakeCase

import largemerge
from largemerge import ConfigError
from largemerge.regression import methods
from largemerge.regression.methods import METHODS


def test_rows_say_what_the_methods_are() -> None:
    assert set(METHODS) == {"regmean", "lot", "esm", "regmean_plusplus", "chain", "calibrated", "featcal"}
    assert METHODS["regmean"].follows_candidates and not METHODS["regmean"].forwards_merged
    assert METHODS["regmean_plusplus"].forwards_merged and not METHODS["regmean_plusplus"].follows_candidates
    assert METHODS["chain"].forwards_merged and not METHODS["chain"].compares
    assert METHODS["calibrated"].compares and METHODS["calibrated"].solves_head
    assert METHODS["featcal"].by_norm and METHODS["featcal"].compares and not METHODS["featcal"].solves_head
    assert METHODS["lot"].solves_norms and not METHODS["lot"].sums_stand_alone
    assert METHODS["esm"].sums_stand_alone and METHODS["esm"].scales_layers and METHODS["esm"].needs_whole_grams
    for row in METHODS.values():
        assert "arXiv" in row.source and not list(row.mistakes())


def test_a_new_row_is_a_method(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, and the configuration, the plan, the merge and the report know it."""
    row = replace(METHODS["regmean_plusplus"], title="Again", parameters=frozenset({"ridge"}))
    monkeypatch.setitem(methods.METHODS, "again", row)
    case = make_case(num_samples=4, method="again")
    assert largemerge.plan(case.config, probe=False).to_json()["merge_method"] == "again"
    report = largemerge.merge(case.config, case.folder / "out")
    assert report.config.merge_method == "again"
    case.config["parameters"] = {"off_diagonal_scale": 0.5}
    with pytest.raises(
        ConfigError,
        match=r"off_diagonal_scale: again has no such parameter, as .* takes exclude, excluded, include, ridge",
    ):
        largemerge.plan(case.config)


def test_a_method_that_needs_a_base_says_so(make_case: MakeCase) -> None:
    case = make_case(num_samples=4, method="featcal")
    with pytest.raises(ConfigError, match=r"'task_arithmetic', which is featcal's own choice, needs a 'base_model'"):
        largemerge.plan(case.config)
    case.config["parameters"] = {"anchor": "average"}
    assert not largemerge.plan(case.config, probe=False).problems


def test_an_unknown_name_is_told_with_all_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"regmean.*task_arithmetic"):
        largemerge.plan({"merge_method": "zzz", "models": []})
