"""Comparisons of tiny merges: what is tried, what is shared, what is kept, and what a second run does again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import transformers as tf
import yaml
from cases import weights_in
from comparisons import evaluation
from task_models import TEXTS, write_jsonl, write_texts

import largemerge
from largemerge import ConfigError
from largemerge.calibration import load_calibration
from largemerge.evaluation.config import load_evaluation
from largemerge.evaluation.prepare import prepare
from largemerge.evaluation.results import EvaluatedModel
from largemerge.model.signature import forward_signature
from largemerge.regression.config import load_config
from largemerge.trials import run
from largemerge.trials.held_out import held_out_tasks
from largemerge.trials.make import Trial, check_compared, choose_methods, make_trials
from largemerge.trials.objective import Objective, choose_objective
from largemerge.trials.settings import read_sweeps


def trials_of(
    config: dict[str, Any], methods: Sequence[str] = (), sweep: dict[str, list[Any]] | None = None
) -> tuple[Trial, ...]:
    """The trials of a comparison in which nothing is wrong."""
    problems: list[str] = []
    compared = check_compared(config, None)
    trials = make_trials(compared, choose_methods(compared.method, methods, problems), sweep or {}, {}, 1, problems)
    assert not problems, problems
    return trials


def kept_trial(out: Path) -> str:
    """The trial whose merge is in `best`, as the folder notes it; `best.yaml` must be its configuration."""
    name = str(json.loads((out / "best.json").read_text())["found"]["trial"])
    assert json.loads((out / "comparison.json").read_text())["best"] == name
    report = json.loads((out / "best" / "merge_report.json").read_text())
    made, wanted = report["config"], yaml.safe_load((out / "best.yaml").read_text())
    assert made["merge_method"] == wanted["merge_method"]
    return name


def test_methods_and_settings_become_trials(config: dict[str, Any]) -> None:
    sweep = {"ridge": [1e-4, 1e-2], "density": [0.5], "off_diagonal_scale": [0.5, 1.0]}
    trials = trials_of(config, ["regmean", "ties", "linear", "task_arithmetic"], sweep)
    assert [trial.name for trial in trials] == [
        "regmean ridge=0.0001 off_diagonal_scale=0.5",
        "regmean ridge=0.0001 off_diagonal_scale=1",
        "regmean ridge=0.01 off_diagonal_scale=0.5",
        "regmean ridge=0.01 off_diagonal_scale=1",
        "ties density=0.5",
        "linear",
        "task_arithmetic density=0.5",
    ]
    by_name = {trial.name: trial.raw for trial in trials}
    assert "calibration" not in by_name["linear"]
    weights = {name: by_name[name]["models"][0]["parameters"]["weight"] for name in list(by_name)[4:]}
    # Task arithmetic adds up; the others divide by the sum of the weights.
    assert weights == {"ties density=0.5": 1.0, "linear": 1.0, "task_arithmetic density=0.5": 0.5}


def test_other_values_have_other_names(config: dict[str, Any]) -> None:
    trials = trials_of(config, [], {"ridge": [1e-3, 1.0000001e-3]})
    assert [trial.name for trial in trials] == ["regmean ridge=0.001", "regmean ridge=0.0010000001"]


MISTAKES: dict[str, tuple[list[str], dict[str, list[Any]], str]] = {
    "no method": (["regmaen"], {}, "did you mean 'regmean'"),
    "a chain": (["curriculum"], {}, "--methods curriculum: a chain of merges"),
    "no setting": (["regmean"], {"rigde": [1.0]}, "regmean has no such setting; did you mean 'ridge'"),
    "a value out of range": (["regmean"], {"ridge": [7.0]}, "--sweep ridge=7: expected a number up to 1, found 7.0"),
    "twice": (["regmean"], {"ridge": [0.1, 0.1]}, "a value stands twice"),
    "twice, as whole numbers, too": (["regmean"], {"ridge": [1, 1.0]}, "a value stands twice"),
    "a weight": (["regmean"], {"weight": [0.1]}, "has no such setting"),
    "missing": (["slerp"], {}, "slerp: parameters.t: slerp needs it"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_the_first_merge(config: dict[str, Any], tmp_path: Path, mistake: str) -> None:
    methods, sweep, said = MISTAKES[mistake]
    with pytest.raises(largemerge.ConfigError, match=said):
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", methods=methods, sweep=sweep)
    assert not (tmp_path / "out").exists()


def test_a_merge_without_data_cannot_become_a_regression(config: dict[str, Any], tmp_path: Path) -> None:
    raw = {
        "merge_method": "linear",
        "models": [{"model": each["model"], "parameters": {"weight": 1}} for each in config["models"]],
    }
    with pytest.raises(largemerge.ConfigError, match="regmean: needs calibration data"):
        largemerge.compare(raw, evaluation(tmp_path), out="nowhere", methods=["linear", "regmean"])
    with pytest.raises(largemerge.ConfigError, match="without calibration data has nothing to hold out"):
        largemerge.compare(raw, out="nowhere")


def test_trials_are_compared_and_the_best_is_kept(config: dict[str, Any], tmp_path: Path) -> None:
    report = largemerge.compare(
        config,
        evaluation(tmp_path),
        out=tmp_path / "out",
        methods=["linear", "regmean_plusplus"],
        sweep={"off_diagonal_scale": [0.1, 1.0]},
    )
    assert [trial.name for trial in report.trials] == [
        "linear",
        "regmean_plusplus off_diagonal_scale=0.1",
        "regmean_plusplus off_diagonal_scale=1",
    ]
    assert {model.role for model in report.evaluation.models} == {"base", "candidate", "merge"}
    best = max(report.trials, key=lambda trial: trial.objective or 0.0)
    assert report.best == best and report.objective == "of the experts"
    for trial in report.trials:
        scores = [report.evaluation.score(trial.name, task) for task in ("math", "code")]
        experts = [report.evaluation.score(task, task) for task in ("math", "code")]
        shares = [expert.value / score.value for score, expert in zip(scores, experts, strict=True)]
        assert trial.objective == pytest.approx(sum(shares) / 2)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        ".largemerge-comparison",
        "best",
        "best.json",
        "best.yaml",
        "comparison.csv",
        "comparison.html",
        "comparison.json",
        "models.json",
        "trials",
    }
    assert not [path for path in (tmp_path / "out" / "trials").iterdir() if path.is_dir()]
    assert kept_trial(tmp_path / "out") == best.name
    # The file makes the kept merge again.
    largemerge.merge(yaml.safe_load((tmp_path / "out" / "best.yaml").read_text()), tmp_path / "again")
    again, kept = weights_in(tmp_path / "again"), weights_in(tmp_path / "out" / "best")
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_what_is_finished_is_not_done_again(config: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"out": tmp_path / "out", "methods": ["linear", "ties"]}
    first = largemerge.compare(config, evaluation(tmp_path), **arguments)
    notes = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "trials").iterdir()}
    second = largemerge.compare(config, evaluation(tmp_path), **arguments | {"methods": ["linear", "ties", "sce"]})
    assert second.trials[:2] == first.trials
    assert "2 of 3 trials had been measured before, and were not done again" in second.notes
    assert not any("measured before" in note for note in first.notes)
    assert "Trials" in str(second) and "sce" in str(second)
    assert {path: path.stat().st_mtime_ns for path in notes} == notes
    changed = config | {"models": list(reversed(config["models"]))}
    third = largemerge.compare(changed, evaluation(tmp_path), **arguments)
    assert third.trials[1].merge_seconds != first.trials[1].merge_seconds  # another order is another merge


@pytest.mark.parametrize("solve", [pytest.param(["blocks"], marks=pytest.mark.slow), ["blocks", "head"]])
def test_regmean_collects_its_gram_matrices_once(config: dict[str, Any], tmp_path: Path, solve: list[str]) -> None:
    config["parameters"] = {"solve": solve}
    sweep = {"off_diagonal_scale": [0.1, 0.5, 1.0], "ridge": [1e-6, 1e-2]}
    report = largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", sweep=sweep, keep_all=True)
    assert len(report.trials) == 6 and not report.problems
    assert "share the Gram matrices" in report.notes[0]
    largemerge.merge(
        config | {"parameters": {"solve": solve, "off_diagonal_scale": 0.5, "ridge": 1e-2}}, tmp_path / "alone"
    )
    (folder,) = (tmp_path / "out" / "trials").glob("*scale=0.5*ridge=0.01*/")
    shared, alone = weights_in(folder), weights_in(tmp_path / "alone")
    for name, weight in alone.items():
        assert torch.allclose(shared[name], weight, atol=1e-6), name


@pytest.mark.slow
def test_two_ranks_share_gram_matrices_too(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(evaluation(tmp_path)))
    found = []
    for size in (1, 2):
        out = tmp_path / f"by{size}"
        command = ["compare", tmp_path / "merge.yaml", tmp_path / "eval.yaml", "--out", out, "--keep-all"]
        processes.run_ranks([*command, "--sweep", "ridge=1e-6,1e-2"], tmp_path, size)
        found.append(json.loads((out / "comparison.json").read_text()))
    assert [each["notes"][0].partition(" in ")[0] for each in found] == [
        "2 trials by RegMean share the Gram matrices"
    ] * 2
    one, two = (
        {path.relative_to(out): path.read_bytes() for path in (out / "grams").rglob("*.safetensors")}
        for out in (tmp_path / "by1", tmp_path / "by2")
    )
    assert one and one == two
    for alone in (tmp_path / "by1" / "trials").glob("*/"):
        together = weights_in(tmp_path / "by2" / "trials" / alone.name)
        assert all(torch.allclose(together[name], weight, atol=1e-6) for name, weight in weights_in(alone).items())
    # Three ranks collect them for each of two trials faster than one does for both.
    command = ["compare", tmp_path / "merge.yaml", tmp_path / "eval.yaml", "--out", tmp_path / "by3"]
    processes.run_ranks([*command, "--sweep", "ridge=1e-6,1e-2"], tmp_path, 3)
    three = json.loads((tmp_path / "by3" / "comparison.json").read_text())
    assert "share no Gram matrices: 3 processes" in three["notes"][0] and not (tmp_path / "by3" / "grams").exists()
    for alone, together in zip(found[0]["trials"], three["trials"], strict=True):
        assert together["objective"] == pytest.approx(alone["objective"], rel=1e-4)


def test_the_number_of_samples_is_swept(config: dict[str, Any], tmp_path: Path) -> None:
    """Every trial collects its own Gram matrices, and what is held out is what none of them draws."""
    config["models"][1]["calibration"]["num_samples"] = 4  # which gives way, as what models set for themselves does
    sweep = {"calibration.num_samples": [2, 16]}
    report = largemerge.compare(config, out=tmp_path / "out", methods=["regmean", "linear"], sweep=sweep, keep_all=True)
    assert not report.problems and not (tmp_path / "out" / "grams").exists()
    names = [f"regmean calibration.num_samples={number}" for number in (2, 16)]
    assert {trial.name for trial in report.trials} == {*names, "linear"}
    drawn = []
    for folder in sorted((tmp_path / "out" / "trials").glob("regmean*/")):
        found = json.loads((folder / "merge_report.json").read_text())["calibration"]
        drawn.append({name: each["num_samples"] for name, each in found.items()})
    assert drawn == [{"math": 16, "code": 16}, {"math": 2, "code": 2}]
    assert {task["skip"] for task in report.evaluation.settings["tasks"]} == {16}
    (best,) = (trial for trial in trials_of(config, [], sweep) if trial.name == names[1])
    assert yaml.safe_load(best.yaml)["calibration"]["num_samples"] == 16


def test_lists_are_swept_in_yaml(config: dict[str, Any], tmp_path: Path) -> None:
    sweep = ["include=['layers.0'],['layers.1']"]
    assert read_sweeps(sweep, []) == {"include": [["layers.0"], ["layers.1"]]}
    report = largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", sweep=sweep)
    assert not report.problems and len(report.trials) == 2
    assert "layers.0" in (tmp_path / "out" / "comparison.html").read_text()


def test_gram_matrices_have_no_samples_to_sweep(config: dict[str, Any], tmp_path: Path) -> None:
    largemerge.gram(config, tmp_path / "grams")
    for model in config["models"]:
        model["calibration"] = {"grams": str(tmp_path / "grams" / Path(model["model"]).name)}
    with pytest.raises(
        largemerge.LargemergeError, match=r"calibration.num_samples: .*math has 'grams' in place of data"
    ):
        largemerge.compare(
            config, evaluation(tmp_path), out=tmp_path / "out", sweep={"calibration.num_samples": [1, 2]}
        )


def test_without_an_evaluation_texts_are_held_out(config: dict[str, Any], tmp_path: Path) -> None:
    report = largemerge.compare(config, out=tmp_path / "out", methods=["linear", "regmean"])
    assert [task.name for task in report.evaluation.tasks] == ["math, held out", "code, held out"]
    assert report.evaluation.tasks[0].expert == "math"
    drawn = config["calibration"]["num_samples"]
    assert all(score.num_samples == len(TEXTS) ** 2 - drawn for score in report.evaluation.scores)
    few = dict(config, calibration={"num_samples": 64})
    said = r"math\.jsonl: calibration draws 64 samples, which uses all of the data .* a lower 'num_samples'"
    with pytest.raises(largemerge.ConfigError, match=said) as caught:
        largemerge.compare(few, out=tmp_path / "few")
    assert "skip" not in str(caught.value) and len(caught.value.problems) == 2


def test_one_failing_trial_loses_no_other(config: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"methods": ["linear", "fisher"], "sweep": {}}
    config["models"] = [each | {"parameters": {"weight": 1.0}} for each in config["models"]]
    with pytest.raises(largemerge.ConfigError, match="fisher"):
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", **arguments)


def test_what_no_method_can_merge_is_told_before_anything_is_measured(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "evaluate_models", None)
    file = Path(config["models"][1]["model"]) / "config.json"
    settings = json.loads(file.read_text())
    with pytest.raises(largemerge.LargemergeError, match="even the smallest placement"):
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", memory=largemerge.Memory(host="1MiB"))
    file.write_text(json.dumps(settings | {"hidden_act": "gelu"}))
    with pytest.raises(largemerge.LargemergeError, match="hidden_act"):
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", methods=["linear", "regmean"])
    assert not (tmp_path / "out").exists()


def test_the_command_compares(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(evaluation(tmp_path)), encoding="utf-8")
    command = [sys.executable, "-m", "largemerge", "compare", "merge.yaml", "eval.yaml", "--methods", "linear,ties"]
    command += ["--sweep", "density=0.2,0.8", "--limit", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ties density=0.8" in done.stdout and "Trials" in done.stdout
    found = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert len(found["trials"]) == 3 and found["best"]
    assert "<script" not in (tmp_path / "comparison" / "comparison.html").read_text()


# Whose the folder is


@pytest.mark.parametrize("name", ["best/thesis.txt", "best.yaml", "models.json", "trials/mine.txt", "grams/mine.txt"])
def test_a_folder_of_the_users_own_is_refused(config: dict[str, Any], tmp_path: Path, name: str) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(
        largemerge.OutputError, match=f"out: holds {name.partition('/')[0]}, and is no folder of an earl"
    ):
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", methods=["linear"])
    assert path.read_text() == "mine" and len([each for each in (tmp_path / "out").rglob("*") if each.is_file()]) == 1


def test_an_occupied_folder_is_told_with_the_other_mistakes(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(largemerge.ConfigError, match=r"did you mean 'linear'[\s\S]*out: is a file; expected a folder"):
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", methods=["liner"])


@pytest.mark.slow
def test_notes_that_cannot_be_read_are_as_if_there_were_none(config: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"out": tmp_path / "out", "methods": ["linear", "ties"]}
    first = largemerge.compare(config, evaluation(tmp_path), **arguments)
    models = tmp_path / "out" / "models.json"
    noted = json.loads(models.read_text())
    for score in noted["found"]["scores"]:
        score["interval"] = [None, None]  # what JSON makes of NaN
    linear, _ = sorted((tmp_path / "out" / "trials").glob("*.json"))
    for text in (json.dumps(noted), "[1, 2]", "{", json.dumps({"key": noted["key"], "found": [1]})):
        models.write_text(text)
        linear.write_text(text)
        again = largemerge.compare(config, evaluation(tmp_path), **arguments)
        assert scores_of(again) == scores_of(first) and again.trials[1] == first.trials[1]
        assert again.trials[0].merge_seconds != first.trials[0].merge_seconds


def scores_of(report: largemerge.CompareReport) -> list[tuple[str, str, float | None, Any]]:
    return [(each.model, each.task, each.value, each.interval) for each in report.evaluation.scores]


# What notes depend on


@pytest.mark.slow
def test_what_is_noted_depends_on_the_data(config: dict[str, Any], tmp_path: Path) -> None:
    """Other texts under the same name: of the tasks, then of calibration, and of what both lie in."""
    tasks = evaluation(tmp_path)
    shutil.copy(tmp_path / "math.jsonl", tmp_path / "tasks.jsonl")
    tasks["tasks"][0]["data"] = str(tmp_path / "tasks.jsonl")
    arguments: dict[str, Any] = {"out": tmp_path / "out", "sweep": {"off_diagonal_scale": [0.2, 0.9]}}
    reports = [largemerge.compare(config, tasks, **arguments)]
    write_texts(tmp_path / "tasks.jsonl", ["another text altogether", "and one more"])
    reports.append(largemerge.compare(config, tasks, **arguments))
    write_texts(tmp_path / "math.jsonl", ["merging is an end", "what is it to be"] * 9)
    reports.append(largemerge.compare(config, tasks, **arguments))
    before, other_tasks, other_calibration = (
        [report.evaluation.score(report.trials[0].name, task).value for task in ("math", "code")] for report in reports
    )
    assert other_tasks[0] != before[0] and other_tasks[1] == before[1]
    assert all(other != earlier for other, earlier in zip(other_calibration, other_tasks, strict=True))
    assert reports[1].evaluation.score("math", "math").num_samples == 2
    assert largemerge.compare(config, tasks, **arguments).trials == reports[2].trials


# What `best` holds


def test_best_holds_the_best_of_the_last_run(config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: dict[str, Any] = {"out": out, "methods": ["linear", "ties"]}
    both = largemerge.compare(config, evaluation(tmp_path), **arguments)
    assert both.best is not None
    (worse,) = (trial.name for trial in both.trials if trial.name != both.best.name)
    first = weights_in(out / "best")
    # The worse one alone: measured already, its weights are gone, and are made again.
    alone = largemerge.compare(config, evaluation(tmp_path), **arguments | {"methods": [worse]})
    assert alone.trials[0] in both.trials and kept_trial(out) == worse
    assert any(not torch.equal(first[name], weight) for name, weight in weights_in(out / "best").items())
    largemerge.compare(config, evaluation(tmp_path), **arguments)
    assert kept_trial(out) == both.best.name
    assert all(torch.equal(first[name], weight) for name, weight in weights_in(out / "best").items())
    assert not [path for path in (out / "trials").iterdir() if path.is_dir()]
    # All weights are kept: those of the best are in both places.
    largemerge.compare(config, evaluation(tmp_path), **arguments, keep_all=True)
    assert (out / "best").resolve().parent == out / "trials" and kept_trial(out) == both.best.name
    assert len([path for path in (out / "trials").iterdir() if path.is_dir()]) == 2
    largemerge.compare(config, evaluation(tmp_path), **arguments)
    assert not (out / "best").is_symlink() and kept_trial(out) == both.best.name
    assert not [path for path in (out / "trials").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_what_was_interrupted_and_is_another_now_starts_afresh(config: dict[str, Any], tmp_path: Path) -> None:
    """Neither a trial nor Gram matrices under way are gone on with once their settings are others."""
    arguments: dict[str, Any] = {"out": tmp_path / "out", "sweep": {"off_diagonal_scale": [0.2, 0.9]}}
    largemerge.compare(config, evaluation(tmp_path), **arguments)
    for folder in (tmp_path / "out" / "grams", *(tmp_path / "out" / "trials").glob("*scale=0.2*.json")):
        working = folder.with_name(folder.name.removesuffix(".json"))
        (working / ".largemerge").mkdir(parents=True)
        (working / ".largemerge" / "manifest.json").write_text('{"of": "another run"}')
    changed = dict(config, calibration={"num_samples": 6, "batch_size": 4})
    report = largemerge.compare(changed, evaluation(tmp_path), **arguments)
    assert not report.problems


# What is compared with what


def test_an_expert_without_a_score_stops_before_the_first_merge(config: dict[str, Any], tmp_path: Path) -> None:
    """Raw losses in the place of shares would make the worst trial the best."""
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "math")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tf.AutoTokenizer.from_pretrained(tmp_path / "math").save_pretrained(tmp_path / "nan")
    tasks = evaluation(tmp_path)
    tasks["tasks"][0]["expert"] = str(tmp_path / "nan")
    said = r"task 'math': its expert nan failed \(.*not finite.*\); trials cannot be compared by shares of its score"
    with pytest.raises(largemerge.LargemergeError, match=said):
        largemerge.compare(config, tasks, out=tmp_path / "out", methods=["linear"])
    assert not list((tmp_path / "out" / "trials").iterdir())


def test_a_score_of_zero_has_no_shares(config: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": text, "answer": "never written"} for text in TEXTS[:3]]
    data = write_jsonl(tmp_path / "questions.jsonl", rows)
    task = {"kind": "generation", "data": data, "prompt": "{question}", "max_new_tokens": 2}
    tasks = [{"name": name, "expert": str(tmp_path / name), **task} for name in ("math", "code")]
    with pytest.raises(
        largemerge.LargemergeError, match=r"its expert math reaches 0 in exact_match, of which"
    ) as caught:
        largemerge.compare(config, {"tasks": tasks}, out=tmp_path / "out", methods=["linear"])
    assert len(caught.value.problems) == 2
    # Without experts there is a common scale: the score itself.
    alone = [{key: value for key, value in each.items() if key != "expert"} for each in tasks]
    report = largemerge.compare(config, {"tasks": alone}, out=tmp_path / "out", methods=["linear"])
    assert report.objective == "exact_match" and report.trials[0].objective == 0.0


def test_a_trial_that_fails_in_a_task_has_no_objective_and_says_so(config: dict[str, Any], tmp_path: Path) -> None:
    report = largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", methods=["linear"])
    objective = Objective("of the experts", higher_is_better=True, of_experts=True)
    assert objective.of(report.evaluation, "linear") == (report.trials[0].objective, "")
    first, *others = [score for score in report.evaluation.scores if score.model == "linear"]
    failed = replace(first, metrics={}, normalized=None, error="no memory")
    found = objective.of(replace(report.evaluation, scores=(failed, *others)), "linear")
    assert found == (None, "cannot be compared: failed in math")
    found = objective.of(replace(report.evaluation, scores=(replace(first, normalized=None), *others)), "linear")
    assert found == (None, "cannot be compared: has no share of the expert's score in math")


def test_a_model_called_like_a_trial_is_told_apart(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "math").rename(tmp_path / "linear")
    config["models"][0]["model"] = str(tmp_path / "linear")
    tasks = evaluation(tmp_path)
    tasks["tasks"][0]["expert"] = str(tmp_path / "linear")
    report = largemerge.compare(config, tasks, out=tmp_path / "out", methods=["linear"])
    (trial,) = report.trials
    assert trial.name == "linear (trial)" and kept_trial(tmp_path / "out") == trial.name
    own, expert = (report.evaluation.score(name, "math") for name in (trial.name, "linear"))
    assert own is not None and expert is not None and own.value != expert.value
    assert expert.normalized == 1.0 and own.normalized == pytest.approx(expert.value / own.value)


def test_no_common_scale_is_told_before_anything_is_measured(config: dict[str, Any], tmp_path: Path) -> None:
    tasks = evaluation(tmp_path)
    del tasks["tasks"][0]["expert"]
    data = write_jsonl(tmp_path / "questions.jsonl", [{"question": TEXTS[0], "answer": "4"}])
    tasks["tasks"][1] = {"name": "sums", "kind": "generation", "data": data, "prompt": "{question}"}
    with pytest.raises(largemerge.ConfigError, match=r"math \(loss\), sums \(exact_match\) have no common scale"):
        largemerge.compare(config, tasks, out=tmp_path / "out", methods=["linear"])
    assert not (tmp_path / "out").exists()


# What trials share, and what is held out


@pytest.mark.slow
def test_names_that_are_no_folders_share_gram_matrices(config: dict[str, Any], tmp_path: Path) -> None:
    config["models"][0]["name"], config["models"][1]["name"] = "a/b", ".hidden"
    config["tokenizer_source"] = "a/b"
    report = largemerge.compare(config, out=tmp_path / "out", sweep={"ridge": [1e-6, 1e-2]}, keep_all=True)
    assert not report.problems and "2 trials by RegMean share the Gram matrices" in report.notes[0]
    largemerge.merge(config | {"parameters": {"ridge": 1e-2}}, tmp_path / "alone")
    (folder,) = (tmp_path / "out" / "trials").glob("*ridge=0.01*/")
    shared, alone = weights_in(folder), weights_in(tmp_path / "alone")
    assert all(torch.allclose(shared[name], weight, atol=1e-6) for name, weight in alone.items())


def test_packed_texts_are_held_out_behind_those_of_calibration(config: dict[str, Any], tmp_path: Path) -> None:
    """Of texts with a word of their own each, no word is in both halves but that of the text at the border."""
    words = [f"{number:03d}" for number in range(60)]
    for name in ("math", "code"):
        write_texts(tmp_path / f"{name}.jsonl", [f"{word} the models that were merged {word}" for word in words])
    config["calibration"] = {"num_samples": 4, "batch_size": 4, "max_length": 32}
    for model in config["models"]:
        model["calibration"]["pack"] = True
    checked = load_config(config)
    tasks = held_out_tasks(checked)
    job = prepare(tasks, [EvaluatedModel("math", str(tmp_path / "math"), "candidate")]).jobs[0]
    assert job.task.name == "math, held out" and job.prepared is not None and job.opened is not None
    settings = checked.models[0].calibration
    assert settings is not None
    signature = forward_signature(job.opened.skeleton)
    drawn = load_calibration(settings, "math", tmp_path / "math", signature)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "math")

    def words_in(sequences: Iterable[Any]) -> set[str]:
        text = " ".join(tokenizer.decode(each) for each in sequences)
        return {word for word in words if word in text}

    before = words_in(row for batch in drawn.batches for row in batch.inputs["input_ids"])
    after = words_in(each.sequences["input_ids"] for group in job.prepared.samples.groups for each in group)
    assert len(before) > 4 and len(after) > 4 and len(before & after) <= 1


def test_what_a_sequence_has_merged_is_never_left_out(config: dict[str, Any], tmp_path: Path) -> None:
    largemerge.merge({**config, "sequence": {}}, tmp_path / "before")
    path = tmp_path / "next.yaml"
    path.write_text(yaml.safe_dump({**config, "models": config["models"][:1], "sequence": {"previous": "before"}}))
    compared = check_compared(yaml.safe_load(path.read_text()), tmp_path)
    assert compared.raw["sequence"]["previous"] == str(tmp_path / "before")
    problems: list[str] = []
    make_trials(compared, ["linear", "regmean"], {}, {}, 1, problems)
    (problem,) = problems
    assert problem.startswith("--methods linear: would leave out ") and str(tmp_path / "before") in problem


def test_heads_are_called_as_trials_without_data_call_them(config: dict[str, Any]) -> None:
    for number, model in enumerate(config["models"]):
        model["name"] = f"own{number}"
    by_method = {trial.method: trial.heads for trial in trials_of(config, ["regmean", "linear"])}
    folders = [Path(model["model"]).name for model in config["models"]]
    assert by_method == {"regmean": {}, "linear": dict(zip(["own0", "own1"], folders, strict=False))}


def test_a_task_that_no_model_is_measured_in_needs_its_expert() -> None:
    task = {"name": "mood", "kind": "text_classification", "data": "mood.csv", "head": "mood"}
    tasks = load_evaluation({"tasks": [task]})
    with pytest.raises(ConfigError, match=r"tasks: mood: no model has the head .* expected 'expert'"):
        choose_objective(tasks, [])


def test_one_method_needs_no_list(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--methods lineal: no method; did you mean 'linear'"):
        largemerge.compare(config, out=tmp_path / "out", methods="lineal")


@pytest.mark.parametrize("settings", [{"tokenizer_source": "./{}"}, {"tokenizer": {"source": "./{}"}}], ids=str)
def test_the_tokenizers_model_is_found_from_anywhere(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    model = Path(config["models"][1]["model"])
    given = json.loads(json.dumps(settings).replace("{}", model.name))
    config["models"] = [{**each, "model": f"./{Path(each['model']).name}"} for each in config["models"]]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    compared = check_compared(config | given, model.parent)
    problems: list[str] = []
    trials = make_trials(compared, ["regmean", "linear"], {}, {}, 1, problems)
    assert not problems and all(isinstance(trial, Trial) for trial in trials)
    named, referenced = (trial.raw for trial in trials if isinstance(trial, Trial))
    (key,) = given

    def source(raw: Mapping[str, Any]) -> Any:
        return raw[key] if key == "tokenizer_source" else raw[key]["source"]

    assert (source(named), source(referenced)) == (compared.raw["models"][1]["name"], str(model))
    assert source(check_compared({**referenced, key: given[key]}, model.parent).raw) == str(model)
