"""How corrections are scaled down as far as folds of the data disagree about them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import MakeCase, report_of
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

import largemerge
from largemerge import ConfigError
from largemerge.regression.shrinkage import FoldSums, combinations, parts_in_folds

FOLDS = ((0, 3), (0, 2), (1, 4), (2, 0), (3, 1))


@pytest.mark.parametrize(
    ("count", "seen", "expected"),
    [
        (10, 0, [(0, slice(0, 5)), (1, slice(5, 9)), (3, slice(9, 10))]),
        (4, 0, [(0, slice(0, 4))]),
        (6, 4, [(0, slice(0, 1)), (1, slice(1, 5)), (3, slice(5, 6))]),
        (10, 20, [(0, slice(0, 5)), (1, slice(5, 9)), (3, slice(9, 10))]),  # in the third run of a linear
        (20, 0, [(0, slice(0, 10)), (1, slice(10, 18)), (3, slice(18, 20))]),  # two rows of every token
        (12, 0, [(0, slice(0, 5)), (1, slice(5, 9)), (3, slice(9, 12))]),  # more rows than tokens
    ],
)
def test_rows_belong_to_the_folds_of_their_samples(count: int, seen: int, expected: list[Any]) -> None:
    assert parts_in_folds(FOLDS, count, seen) == expected


def factor_of(corrections: list[torch.Tensor]) -> float:
    """The factor where every fold holds one row: an axis of its own inputs, or of all folds, times a correction."""
    sums = FoldSums.of_inputs(len(corrections[0]), torch.device("cpu"))
    for fold, row in enumerate(corrections):
        sums.add(row[None], row[None], {}, [(fold, slice(0, 1))], 1 / len(corrections))
    sums.finish_candidate(1.0)
    return sums.factors(lambda rows_NI: rows_NI)[""]


def test_what_all_folds_say_is_kept_and_what_none_repeats_is_not() -> None:
    row = torch.randn(12, generator=torch.Generator().manual_seed(0))
    assert factor_of([row] * 8) == pytest.approx(1)
    assert factor_of(list(torch.eye(12)[:8])) == 0
    assert factor_of([row]) == 1  # one fold says nothing about how folds differ


def test_the_energy_of_the_signal_is_kept() -> None:
    """Eight folds with the signal s and noise n_f in new directions: of |Σ R|² = |8 s|² + 8 |n|², |8 s|² is kept."""
    signal = torch.eye(12)[11]
    noise = 2 * torch.eye(12)[:8]
    sums = FoldSums({"linear": 12}, 12, torch.device("cpu"))
    sums.start_candidate(lambda rows: torch.eye(12)[rows], lambda: iter([slice(0, 5), slice(5, 12)]))
    for fold in range(8):
        # The row of every fold is the first axis, on which the outputs are compared.
        sums.add(torch.eye(12)[:1], (signal + noise[fold])[None], {}, [(fold, slice(0, 1))], 1 / 8)
    sums.finish_candidate(0.5)
    assert sums.factors(lambda rows_NI: rows_NI * 3)["linear"] == pytest.approx(math.sqrt(64 / (64 + 8 * 4)))


def test_many_outputs_are_combined_and_few_are_not() -> None:
    few, many = combinations({"few": 3, "many": 100}, 10).values()
    assert torch.equal(few[:3], torch.eye(3)) and not few[3:].any()
    assert set(many.unique().tolist()) == {-1.0, 1.0} and many.shape == (16, 100)


def test_equal_samples_agree_and_different_ones_do_not(make_case: MakeCase) -> None:
    case = make_case("llama", method="calibrated", num_samples=16)
    different = largemerge.merge(case.config, case.folder / "different")
    factors = [entry["shrinkage"] for entry in different.linears.values()]
    assert len(factors) == 3 * 7 + 1 and max(factors) < 0.999 and min(factors) >= 0
    for entry in case.config["models"]:
        path = entry["calibration"]["data"]
        save_file(tree_map(lambda x: x[:1].expand(16, *x.shape[1:]).contiguous(), load_file(path)), path)
    equal = largemerge.merge(case.config, case.folder / "equal")
    factors = [entry["shrinkage"] for entry in equal.linears.values()]
    assert min(factors) > 0.999
    case.config["parameters"] = {"shrinkage": False}
    largemerge.merge(case.config, case.folder / "off")
    assert "shrinkage" not in str(report_of(case.folder / "off")["blocks"])


def test_a_single_sample_is_cut_into_halves(make_case: MakeCase) -> None:
    case = make_case("llama", method="calibrated", num_samples=1)
    report = largemerge.merge(case.config, case.folder / "merged")
    factors = [entry["shrinkage"] for entry in report.linears.values()]
    assert 0 <= min(factors) < max(factors) <= 1


def test_nothing_to_shrink_is_refused(make_case: MakeCase) -> None:
    case = make_case("llama", method="chain", shrinkage=True)
    with pytest.raises(ConfigError, match=r"parameters.shrinkage: scales what 'target' and 'drift' add; set one"):
        largemerge.plan(case.config)
