"""Searches of tiny merges: what is tried, what a later run repeats, and what a search shares with other trials."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml
from cases import weights_in
from comparisons import evaluation

import largemerge
from largemerge import api
from largemerge.errors import MergeError
from largemerge.trials.search import Proposals

SEARCH = {"ridge": (1e-6, 1e-1, "log"), "off_diagonal_scale": (0.1, 1.0)}
TEXTS = ["--search", "ridge=1e-6:1e-1:log", "--search", "off_diagonal_scale=0.1:1.0"]


def names_of(report: largemerge.CompareReport) -> list[str]:
    return [trial.name for trial in report.trials]


def objectives_of(report: largemerge.CompareReport) -> dict[str, float | None]:
    return {trial.name: trial.objective for trial in report.trials}


def test_a_search_keeps_the_best_and_repeats_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"out": tmp_path / "out", "search": SEARCH}
    first = largemerge.compare(config, evaluation(tmp_path), **arguments, num_trials=3)
    assert len(set(names_of(first))) == 3 and not first.problems
    assert "3 trials by RegMean share the Gram matrices" in first.notes[0]
    for trial in first.trials:
        assert 1e-6 <= trial.settings["ridge"] <= 0.1 and 0.1 <= trial.settings["off_diagonal_scale"] <= 1
    assert first.best is not None
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert best["parameters"] == first.best.settings
    largemerge.merge(best, tmp_path / "alone")
    alone, kept = weights_in(tmp_path / "alone"), weights_in(tmp_path / "out" / "best")
    assert all((kept[name] - weight).abs().max() < 1e-6 for name, weight in alone.items())

    notes = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "trials").iterdir()}
    more = largemerge.compare(config, evaluation(tmp_path), **arguments, num_trials=5)
    assert more.trials[:3] == first.trials and len(more.trials) == 5
    assert {path: path.stat().st_mtime_ns for path in notes} == notes
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["searched"]["ridge"] == {"low": 1e-6, "high": 0.1, "log": True}
    assert [trial["settings"] for trial in found["trials"]] == [trial.settings for trial in more.trials]
    rows = (tmp_path / "out" / "comparison.csv").read_text().splitlines()
    assert rows[0].startswith("trial,method,ridge,off_diagonal_scale,objective,") and len(rows) == 6
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "ridge from 1e-06 to 0.1, off_diagonal_scale from 0.1 to 1" in page and "of the best trial so far" in page


@pytest.mark.parametrize("stops_at", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_search_that_is_interrupted_goes_on_as_if_it_had_not_been(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int
) -> None:
    arguments: dict[str, Any] = {"methods": ["linear", "ties"], "search": {"density": (0.1, 0.9)}, "num_trials": 4}
    unbroken = largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "unbroken", **arguments)
    merge, merged = api.merge, list[str]()

    def interrupted(source: Any, out: Path, **options: Any) -> Any:
        merged.append(Path(out).name)
        if len(merged) == stops_at + 1:
            raise KeyboardInterrupt
        return merge(source, out, **options)

    monkeypatch.setattr(api, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", **arguments)
    report = largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", **arguments)
    assert objectives_of(report) == objectives_of(unbroken) and names_of(report) == names_of(unbroken)
    again = {name for name in merged if merged.count(name) > 1}
    assert again <= {merged[stops_at]} | {merged[-1]}  # but for the best, whose weights may be gone


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(evaluation(tmp_path)))

    def command(out: Path) -> list[object]:
        files = [tmp_path / "merge.yaml", tmp_path / "eval.yaml", "--out", out]
        return ["compare", *files, *TEXTS, "--num-trials", "12", "--quiet"]

    def finished() -> bool:
        notes = [path.read_text() for path in (tmp_path / "out" / "trials").glob("regmean*.json")]
        return sum('"objective"' in note for note in notes) >= 4

    killed = processes.start(command(tmp_path / "out"), tmp_path / "log")
    assert processes.wait_until(finished, killed)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    assert processes.finish(killed) == -signal.SIGKILL
    for out in (tmp_path / "out", tmp_path / "unbroken"):
        assert processes.run(command(out), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    found, wanted = (
        json.loads((tmp_path / name / "comparison.json").read_text())["trials"] for name in ("out", "unbroken")
    )
    assert len(wanted) == 12
    assert [(each["name"], each["objective"]) for each in found] == [
        (each["name"], each["objective"]) for each in wanted
    ]


def test_every_method_and_swept_value_has_a_search_of_its_own(config: dict[str, Any], tmp_path: Path) -> None:
    report = largemerge.compare(
        config,
        evaluation(tmp_path),
        out=tmp_path / "out",
        methods=["karcher", "ties", "linear"],
        sweep={"normalize": [True, False]},
        search={"density": (0.2, 0.8), "max_iter": (1, 3)},
        num_trials=4,
    )
    assert not report.problems
    steps = [trial.settings["max_iter"] for trial in report.trials if trial.method == "karcher"]
    assert 1 <= len(steps) <= 3 and len(set(steps)) == len(steps) and set(steps) <= {1, 2, 3}
    assert report.notes == (f"karcher: {4 - len(steps)} of 4 proposals were no others than some before",)
    by_value: dict[bool, list[float]] = {True: [], False: []}
    for trial in report.trials:
        if trial.method == "ties":
            by_value[trial.settings["normalize"]].append(trial.settings["density"])
    assert by_value[True] == by_value[False] and len(set(by_value[True])) == 4  # the first ten are random, and seeded
    assert names_of(report)[-2:] == ["linear normalize=True", "linear normalize=False"]  # which have nothing to search


def test_a_trial_that_fails_is_told_as_failed(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, tell, told, count = api.merge, Proposals.tell, list[float | None](), iter(range(100))

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(count) == 1:
            raise MergeError("not finite")
        return merge(*arguments, **options)

    def noting(proposals: Proposals, objective: float | None) -> None:
        told.append(objective)
        tell(proposals, objective)

    monkeypatch.setattr(api, "merge", failing)
    monkeypatch.setattr(Proposals, "tell", noting)
    report = largemerge.compare(
        config, evaluation(tmp_path), out=tmp_path / "out", methods=["ties"], search=["density=0.1:0.9"], num_trials=3
    )
    assert told == [trial.objective for trial in report.trials]
    assert told[1] is None and told[0] is not None and told[2] is not None
    assert report.problems == (f"{report.trials[1].name}: not finite",)


def test_the_number_of_samples_is_searched_and_held_out(config: dict[str, Any], tmp_path: Path) -> None:
    search = {"calibration.num_samples": (2, 16, "log")}
    report = largemerge.compare(config, out=tmp_path / "out", search=search, num_trials=2)
    assert not report.problems and {task["skip"] for task in report.evaluation.settings["tasks"]} == {16}
    assert all(type(trial.settings["calibration.num_samples"]) is int for trial in report.trials)


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "out of bounds": (
        {"search": {"off_diagonal_scale": (0.1, 2), "ridge": (-1, 7)}},
        [
            "--search off_diagonal_scale=0.1:2: expected a number up to 1, found 2, with regmean",
            "--search ridge=-1:7: expected a number from 0 on, found -1, with regmean",
            "--search ridge=-1:7: expected a number up to 1, found 7, with regmean",
        ],
    ),
    "bounds of each method": (
        {"methods": ["ties", "karcher"], "search": {"density": (0.5, 1.5), "max_iter": (0.5, 3)}},
        [
            "--search density=0.5:1.5: expected a number from 0 to 1, found 1.5, with ties",
            "--search max_iter=0.5:3: expected a whole number from 1 to 10000, found 0.5, with karcher",
        ],
    ),
    "no number": (
        {"search": {"anchor": (0, 1)}},
        ["--search anchor: is no number, with regmean; expected --sweep anchor=…"],
    ),
    "a flag": (
        {"methods": ["ties"], "search": {"normalize": (0, 1)}},
        ["--search normalize: is no number, with ties; expected --sweep normalize=…"],
    ),
    "nobody's": ({"search": {"rigde": (0, 1)}}, ["--search rigde: regmean has no such setting; did you mean 'ridge'?"]),
    "both": (
        {"search": {"ridge": (0, 1)}, "sweep": {"ridge": [0.5]}},
        ["--search ridge: is swept, too; expected one of both"],
    ),
    "a corner": (
        {"methods": ["calibrated"], "sweep": {"granularity": ["average"]}, "search": {"drift": (0, 1)}},
        ["calibrated granularity=average drift=1: parameters.drift: is paid back one linear after the other"],
    ),
    "a number of trials alone": (
        {"num_trials": 3},
        ["--num-trials: is the number of trials of a search; expected --search with it"],
    ),
    "no number of trials": (
        {"num_trials": 0, "search": {"ridge": (0, 1)}},
        ["--num-trials 0: expected a whole number from 1 on"],
    ),
    "things of other kinds": (
        {"sweep": 3, "search": {"ridge": "0:1:log"}, "num_trials": "x", "memory": "4GiB", "limit": 1.5},
        ["memory: '4GiB'", "--limit 1.5", "--num-trials 'x'", "sweep: expected a mapping of", "begins above 0"],
    ),
    "many trials": (
        {"num_trials": 10_001, "search": {"ridge": (0, 1)}},
        ["--sweep, --search: more than 10000 trials; expected fewer values or trials"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_the_first_merge(config: dict[str, Any], tmp_path: Path, mistake: str) -> None:
    arguments, expected = MISTAKES[mistake]
    with pytest.raises(largemerge.ConfigError) as caught:
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", **arguments)
    found = caught.value.problems
    assert len(found) == len(expected), found
    assert all(any(said in problem for problem in found) for said in expected), found
    assert not (tmp_path / "out").exists()


def test_a_missing_optuna_is_told_with_the_other_mistakes(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(largemerge.ConfigError) as caught:
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", search=["ridge=0:7"], num_trials=2)
    install = "--search: needs optuna, which is not installed; pip install 'largemerge[optuna]'"
    assert install in caught.value.problems and len(caught.value.problems) == 2
    with pytest.raises(largemerge.ConfigError, match="occupied"):  # and nobody else needs it
        (tmp_path / "occupied").write_text("")
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "occupied", sweep=["ridge=7"])


@pytest.mark.slow
def test_optuna_is_imported_for_searches_alone(tmp_path: Path) -> None:
    code = "import sys, largemerge.trials.run; print('optuna' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_two_ranks_try_what_one_tries(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(evaluation(tmp_path)))
    found = []
    for size in (1, 2):
        out = tmp_path / f"by{size}"
        command = ["compare", tmp_path / "merge.yaml", tmp_path / "eval.yaml", "--out", out, "--methods"]
        processes.run_ranks([*command, "regmean,ties", *TEXTS, "--num-trials", "3"], tmp_path, size)
        found.append(json.loads((out / "comparison.json").read_text()))
    one, two = found
    assert [trial["name"] for trial in two["trials"]] == [trial["name"] for trial in one["trials"]]
    assert two["best"] == one["best"] and len(one["trials"]) == 4
    for alone, together in zip(one["trials"], two["trials"], strict=True):
        assert together["objective"] == pytest.approx(alone["objective"], rel=1e-4)
