"""Comparisons of tiny merges: what is tried, what is shared, what is kept, and what a second run does again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from cases import weights_in
from task_models import TEXTS, write_language_model, write_texts

import largemerge
from largemerge.trials.make import make_trials, read_raw, swept


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A regression merge of two experts with a base, and calibration texts of which some are left over."""
    write_language_model(tmp_path / "base")
    models = []
    for number, name in enumerate(("math", "code")):
        torch.manual_seed(number)
        expert = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expert.save_pretrained(tmp_path / name)
        tf.AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / name)
        data = write_texts(tmp_path / f"{name}.jsonl", [f"{text} {word}" for text in TEXTS for word in TEXTS])
        models.append({"model": str(tmp_path / name), "calibration": {"data": data}})
    return {
        "merge_method": "regmean",
        "base_model": str(tmp_path / "base"),
        "models": models,
        "calibration": {"num_samples": 8, "batch_size": 4},
    }


def evaluation(folder: Path) -> dict[str, Any]:
    """The loss on texts of both kinds, beside the experts."""
    tasks = [
        {
            "name": name,
            "kind": "language_model",
            "data": str(folder / f"{name}.jsonl"),
            "num_samples": 6,
            "expert": str(folder / name),
        }
        for name in ("math", "code")
    ]
    return {"tasks": tasks, "resamples": 20}


def test_methods_and_settings_become_trials(config: dict[str, Any]) -> None:
    sweep = {"ridge": [1e-4, 1e-2], "density": [0.5], "off_diagonal_scale": [0.5, 1.0]}
    trials = make_trials(read_raw(config), ["regmean", "ties", "linear", "task_arithmetic"], sweep)
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


def test_values_are_read_as_yaml() -> None:
    assert swept(["ridge=1e-4,0.01", "shrinkage=true,false", "anchor=base", "k=3"]) == {
        "ridge": [1e-4, 0.01],
        "shrinkage": [True, False],
        "anchor": ["base"],
        "k": [3],
    }


MISTAKES: dict[str, tuple[list[str], dict[str, list[Any]], str]] = {
    "no method": (["regmaen"], {}, "did you mean 'regmean'"),
    "no setting": (["regmean"], {"rigde": [1.0]}, "have no such setting; did you mean 'ridge'"),
    "a value out of range": (["regmean"], {"ridge": [7.0]}, "regmean ridge=7: parameters.ridge"),
    "twice": (["regmean"], {"ridge": [0.1, 0.1]}, "a value stands twice"),
    "a weight": (["regmean"], {"weight": [0.1]}, "have no such setting"),
    "missing": (["slerp"], {}, "slerp: parameters.t: slerp needs it"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_the_first_merge(config: dict[str, Any], tmp_path: Path, mistake: str) -> None:
    methods, sweep, said = MISTAKES[mistake]
    with pytest.raises(largemerge.ConfigError, match=said):
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", methods=methods, sweep=sweep)
    assert not (tmp_path / "out").exists()


def test_a_merge_without_data_cannot_become_a_regression(config: dict[str, Any]) -> None:
    raw = {
        "merge_method": "linear",
        "models": [{"model": each["model"], "parameters": {"weight": 1}} for each in config["models"]],
    }
    with pytest.raises(largemerge.ConfigError, match="regmean: needs calibration data"):
        make_trials(read_raw(raw), ["linear", "regmean"], {})
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
        "best",
        "best.yaml",
        "comparison.csv",
        "comparison.html",
        "comparison.json",
        "models.json",
        "trials",
    }
    assert not [path for path in (tmp_path / "out" / "trials").iterdir() if path.is_dir()]
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
    assert {path: path.stat().st_mtime_ns for path in notes} == notes
    changed = config | {"models": list(reversed(config["models"]))}
    third = largemerge.compare(changed, evaluation(tmp_path), **arguments)
    assert third.trials[1].merge_seconds != first.trials[1].merge_seconds  # another order is another merge


@pytest.mark.parametrize("solve", [["blocks"], ["blocks", "head"]])
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
    (best,) = (trial for trial in make_trials(read_raw(config), [], sweep) if trial.name == names[1])
    assert yaml.safe_load(best.yaml)["calibration"]["num_samples"] == 16


def test_lists_are_swept_in_yaml(config: dict[str, Any], tmp_path: Path) -> None:
    ((key, values),) = swept(["include=['layers.0'],['layers.1']"]).items()
    assert (key, values) == ("include", [["layers.0"], ["layers.1"]])
    report = largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", sweep={key: values})
    assert not report.problems and len(report.trials) == 2
    assert "layers.0" in (tmp_path / "out" / "comparison.html").read_text()


def test_gram_matrices_have_no_samples_to_sweep(config: dict[str, Any], tmp_path: Path) -> None:
    largemerge.gram(config, tmp_path / "grams")
    for model in config["models"]:
        model["calibration"] = {"grams": str(tmp_path / "grams" / Path(model["model"]).name)}
    with pytest.raises(
        largemerge.LargemergeError, match=r"calibration.num_samples: .*math has 'grams' in place of data"
    ):
        make_trials(read_raw(config), [], {"calibration.num_samples": [1, 2]})


def test_without_an_evaluation_texts_are_held_out(config: dict[str, Any], tmp_path: Path) -> None:
    report = largemerge.compare(config, out=tmp_path / "out", methods=["linear", "regmean"])
    assert [task.name for task in report.evaluation.tasks] == ["math, held out", "code, held out"]
    assert report.evaluation.tasks[0].expert == "math"
    drawn = config["calibration"]["num_samples"]
    assert all(score.num_samples == len(TEXTS) ** 2 - drawn for score in report.evaluation.scores)
    few = dict(config, calibration={"num_samples": 64})
    with pytest.raises(largemerge.LargemergeError, match="'skip: 64' passes over all of them"):
        largemerge.compare(few, out=tmp_path / "few")


def test_one_failing_trial_loses_no_other(config: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"methods": ["linear", "fisher"], "sweep": {}}
    config["models"] = [each | {"parameters": {"weight": 1.0}} for each in config["models"]]
    with pytest.raises(largemerge.ConfigError, match="fisher"):
        largemerge.compare(config, evaluation(tmp_path), out=tmp_path / "out", **arguments)


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
