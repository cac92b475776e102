"""Searches: ranges as they are written, what is proposed, and that a run which goes on proposes the same."""

from __future__ import annotations

from typing import Any

import pytest

from largemerge.trials.search import Proposals
from largemerge.trials.settings import Range, read_ranges

RANGES: dict[str, Range] = {
    "ridge=1e-6:1e-1:log": Range(1e-6, 0.1, log=True),
    "off_diagonal_scale= 0.1 : 1 ": Range(0.1, 1),
    "calibration.num_samples=1:256:log": Range(1, 256, log=True),
    "t=-1:1": Range(-1, 1),
}
ENDS = "expected the lower and the upper end, such as 0.1:1 or 1e-6:1e-1:log"
MISTAKES = {
    **dict.fromkeys(("ridge=1", "ridge=a:b", "ridge=1:2:lin", "ridge=1:2:log:3", "ridge=:1", "ridge=1e-6,1e-1"), ENDS),
    **dict.fromkeys(("ridge", "ridge="), "expected a setting and its range, such as ridge=1e-6:1e-1:log"),
    "ridge=1:0.1": "1 is not below 0.1; expected the lower end first",
    "ridge=1:1": "1 is not below 1",
    "ridge=0:1:log": "a logarithmic range begins above 0, found 0",
    "ridge=0:inf": "expected two numbers, found inf",
}


@pytest.mark.parametrize("text", RANGES)
def test_ranges_are_read(text: str) -> None:
    problems: list[str] = []
    ((_, found),) = read_ranges([text], problems).items()
    assert found == RANGES[text] and not problems


@pytest.mark.parametrize("text", MISTAKES)
def test_what_is_no_range_is_told(text: str) -> None:
    problems: list[str] = []
    assert read_ranges([text], problems) == {}
    (problem,) = problems
    assert problem.startswith("--search") and MISTAKES[text] in problem


def test_ranges_in_python() -> None:
    problems: list[str] = []
    given: dict[str, Any] = {"a": Range(0, 1), "b": (1, 2), "c": (1e-3, 1, "log"), "d": [2, 1], "e": 3, "f": (0, True)}
    found = read_ranges(given, problems)
    assert found == {"a": Range(0, 1), "b": Range(1, 2), "c": Range(1e-3, 1, log=True)}
    assert [problem.split(":")[0] for problem in problems] == ["--search d", "--search e", "--search f"]
    assert "such as (0.1, 1) or Range(1e-6, 1e-1, log=True)" in problems[1]


def proposed(num_trials: int) -> list[dict[str, int | float]]:
    """Proposals for an objective whose best is at s = 0.6; every fifth trial fails."""
    ranges = {"ridge": Range(1e-6, 0.1, log=True), "s": Range(0.1, 1.0), "k": Range(1, 300, log=True)}
    proposals = Proposals(ranges, higher_is_better=True)
    found = []
    for number in range(num_trials):
        settings = proposals.ask()
        proposals.tell(None if number % 5 == 3 else -abs(settings["s"] - 0.6))
        found.append(settings)
    return found


def test_the_same_is_proposed_to_a_run_that_is_told_the_same() -> None:
    """A longer search begins with the trials of a shorter one, and none depends on how many there will be."""
    short, long = proposed(12), proposed(25)
    assert long[:12] == short and proposed(25) == long
    assert all(1e-6 <= each["ridge"] <= 0.1 and 0.1 <= each["s"] <= 1 for each in long)
    assert all(type(each["k"]) is int and 1 <= each["k"] <= 300 for each in long)
    assert all(round(each["s"], 4) == each["s"] for each in long)
    assert all(float(f"{each['ridge']:.4g}") == each["ridge"] for each in long)


def test_digits_are_as_many_as_a_range_needs() -> None:
    ranges = {"narrow": Range(0.99990, 0.99995), "wide": Range(-2000.0, 9000.0), "log": Range(1e-9, 1.0, log=True)}
    proposals = Proposals(ranges, higher_is_better=False)
    found = []
    for _ in range(8):
        found.append(proposals.ask())
        proposals.tell(0.0)
    assert len({each["narrow"] for each in found}) == 8 and all(0.9999 <= each["narrow"] <= 0.99995 for each in found)
    assert all(each["wide"] == int(each["wide"]) for each in found)
    assert all(float(f"{each['log']:.4g}") == each["log"] for each in found)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_proposals_come_closer_to_what_is_good(higher_is_better: bool) -> None:
    proposals, far = Proposals({"s": Range(0.0, 1.0)}, higher_is_better), list[float]()
    for _ in range(40):
        far.append(abs(proposals.ask()["s"] - 0.05))
        proposals.tell(-far[-1] if higher_is_better else far[-1])
    assert sum(far[20:]) / 20 < 0.4 * sum(far[:10]) / 10


def test_optuna_stays_as_loud_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    proposed(3)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
