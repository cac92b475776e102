"""The files of `configs/paper/`, run as they are shipped, on tiny stand-ins in the working directory."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import exit_code, weights_in
from paper_standins import NUM_TRAIN, num_rows, write_clip_standins, write_language_standins

import largemerge
from largemerge import MergeConfig, load_config
from largemerge.evaluation.config import EvaluationConfig, ZeroShotTask, load_evaluation
from largemerge.evaluation.results import Evaluation

PAPER = Path(__file__).parents[1] / "configs" / "paper"
EIGHT = "evaluation/clip-vit-b-32-eight-tasks.yaml"


def read(folder: Path, merge: str, evaluation: str, **more: Any) -> tuple[MergeConfig, EvaluationConfig]:
    """Reads both files as on a machine that has none of what they name, and writes stand-ins for it."""
    config, tasks = load_config(PAPER / merge), load_evaluation(PAPER / evaluation)
    write_clip_standins(folder, config, tasks, **more)
    return config, tasks


def run(folder: Path, merge: str, evaluation: str) -> Evaluation:
    """Merges and measures as `largemerge merge MERGE merged --evaluate EVAL` does."""
    found: list[Evaluation] = []
    largemerge.merge(PAPER / merge, folder / "merged", evaluate=PAPER / evaluation, evaluated=found.append)
    assert not found[0].problems
    return found[0]


def check(found: Evaluation, config: MergeConfig, tasks: EvaluationConfig) -> None:
    """Every model is measured in every task, on all of its split; experts of other tasks in their own alone."""
    roles = {model.name: model.role for model in found.models}
    assert {name for name, role in roles.items() if role == "candidate"} == set(config.names)
    assert [name for name, role in roles.items() if role in ("base", "merge")] == ["base", "merged"]
    for task in tasks.tasks:
        assert isinstance(task, ZeroShotTask)
        for model, role in roles.items():
            score = found.score(model, task.name)
            if role != "expert":
                assert score is not None and score.num_samples == num_rows(task), (model, task.name)
                assert 0 <= score.metrics["accuracy"] <= 1


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Works in a folder of its own, where the names of the Hub lead to nothing but stand-ins."""
    monkeypatch.chdir(tmp_path)


def test_one_command_merges_and_measures_two_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "clip-vit-b-32-two-tasks.yaml"
    config, _ = read(tmp_path, name, f"evaluation/{name}")
    command = ["merge", PAPER / name, "merged", "--evaluate", PAPER / "evaluation" / name, "--limit", 1]
    assert exit_code(*command) == 0
    written = json.loads(Path("merged/evaluation.json").read_text())
    models = ["base", *config.names, "merged"]
    assert [model["name"] for model in written["models"]] == models
    assert [task["expert"] for task in written["tasks"]] == list(config.names)
    assert [score["num_samples"] for score in written["scores"]] == [1] * 8
    report = json.loads(Path("merged/merge_report.json").read_text())
    calibrated = {name: each["num_samples"] for name, each in report["calibration"].items()}
    assert calibrated == dict.fromkeys(config.names, NUM_TRAIN), "calibration is not limited"
    assert "sun397" in capsys.readouterr().err


@pytest.mark.slow
def test_the_eight_tasks_and_what_is_published_of_them(tmp_path: Path) -> None:
    name = "clip-vit-b-32-eight-tasks.yaml"
    config, tasks = read(tmp_path, name, EIGHT)
    found = run(tmp_path, name, EIGHT)
    check(found, config, tasks)
    _, rows = found.rows()
    assert [row[0] for row in rows[-4:]] == [
        "each task's expert",
        *(f"{name} (published)" for name in ("RegMean", "RegMean++", "experts")),
    ]
    assert [row[9] for row in rows[-3:]] == ["82.4", "84.4", "90.3"]


@pytest.mark.slow
def test_twenty_tasks_with_columns_labels_and_splits_of_their_own(tmp_path: Path) -> None:
    """pcam's labels are true and false, fer2013 has jpg and cls, food101 no test split, svhn and mnist have subsets."""
    name = "clip-vit-b-32-twenty-tasks.yaml"
    config, tasks = read(tmp_path, name, f"evaluation/{name}")
    check(run(tmp_path, name, f"evaluation/{name}"), config, tasks)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((PAPER / "out-of-domain").iterdir()), ids=lambda path: path.stem)
def test_tasks_that_are_not_merged_are_measured_all_the_same(tmp_path: Path, path: Path) -> None:
    name = f"out-of-domain/{path.name}"
    config, tasks = read(tmp_path, name, EIGHT)
    found = run(tmp_path, name, EIGHT)
    check(found, config, tasks)
    unseen = set(tasks.names) - set(config.names)
    assert len(unseen) == 2 and all(name in path.stem for name in unseen)
    experts = {task.name: task.expert for task in found.tasks}
    for name in unseen:
        (expert,) = (model for model in found.models if model.name == experts[name])
        assert expert.role == "expert" and found.score(expert.name, name) is not None
        assert found.score("merged", name).num_samples > 0


PARTS = {
    "early": ([f"layers.{number}." for number in range(4)], "average"),
    "middle": ([f"layers.{number}." for number in range(4, 8)], "average"),
    "late": ([f"layers.{number}." for number in range(8, 12)], "average"),
    "middle-late": ([f"layers.{number}." for number in range(4, 12)], "average"),
    "mlp": ([".mlp."], "base"),
    "attention": ([".self_attn."], "base"),
}
"""By file: parts of the names of what is solved, and what the other linears become."""


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_parts_are_solved_and_the_rest_is_as_published(tmp_path: Path, part: str) -> None:
    name = f"parts/{part}.yaml"
    config, tasks = read(tmp_path, name, EIGHT, num_blocks=12)
    found = run(tmp_path, name, EIGHT)
    check(found, config, tasks)
    merged, base = weights_in(tmp_path / "merged"), weights_in(tmp_path / str(config.base_model))
    experts = [weights_in(tmp_path / candidate.model) for candidate in config.models]
    solved, rest = PARTS[part]
    linears = [key for key in merged if key.endswith((".weight", ".bias")) and (".mlp." in key or ".self_attn." in key)]
    assert len(linears) == 12 * 12
    for key in linears:
        average = sum(expert[key].double() for expert in experts) / len(experts)
        is_average = torch.allclose(merged[key].double(), average, atol=1e-6)
        if any(each in key for each in solved):
            assert is_average == key.endswith(".bias"), key
        else:
            assert torch.equal(merged[key], base[key]) == (rest == "base"), key
            assert is_average == (rest == "average"), key


@pytest.mark.slow
def test_corrupted_images_are_splits_of_their_own(tmp_path: Path) -> None:
    merge, evaluation = "corruptions/clip-vit-b-32-four-tasks.yaml", "evaluation/clip-vit-b-32-corruptions.yaml"
    config, tasks = read(tmp_path, merge, evaluation)
    assert len(tasks.tasks) == 4 * 8 and len({num_rows(task) for task in tasks.tasks}) == 8
    check(run(tmp_path, merge, evaluation), config, tasks)


@pytest.mark.slow
def test_corrupted_images_are_made_of_clean_ones(tmp_path: Path) -> None:
    merge, evaluation = "corruptions/clip-vit-b-32-four-tasks.yaml", "evaluation/clip-vit-b-32-made-corruptions.yaml"
    config, tasks = read(tmp_path, merge, evaluation)
    assert {num_rows(task) for task in tasks.tasks} == {2}
    check(run(tmp_path, merge, evaluation), config, tasks)


@pytest.mark.slow
def test_images_of_one_class_are_enough_to_merge(tmp_path: Path) -> None:
    """The stand-ins have one image of label 0 in every split."""
    config, tasks = read(tmp_path, "data/one-class.yaml", EIGHT)
    check(run(tmp_path, "data/one-class.yaml", EIGHT), config, tasks)
    calibrated = json.loads((tmp_path / "merged" / "merge_report.json").read_text())["calibration"]
    assert {name: each["num_samples"] for name, each in calibrated.items()} == dict.fromkeys(config.names, 1)


def test_orders_have_all_tasks_and_share_out_the_images_of_earlier_ones() -> None:
    sequential = runpy.run_path(str(PAPER / "sequential.py"))
    twenty = load_config(PAPER / "clip-vit-b-32-twenty-tasks.yaml")
    assert len(set(sequential["ORDERS"])) == 5
    for order in range(5):
        configs = [load_config(step) for step in sequential["steps"](order, Path("/nowhere"))]
        new = [candidate for config in configs for candidate in config.models[-4:]]
        assert sorted(candidate.label for candidate in new) == sorted(twenty.names)
        assert all(candidate in twenty.models for candidate in new)
        for number, config in enumerate(configs):
            before = config.models[:-4]
            assert len(before) == 4 * number
            assert {each.model for each in before} == ({f"/nowhere/step-{number}"} if number else set())
            assert sum(each.parameters.weight for each in before) == pytest.approx(min(1, number))
            merged = [each.label for each in new[: 4 * number]]
            assert [each.label for each in before] == [f"so far, {name}" for name in merged]
            for each, expert in zip(before, new, strict=False):
                assert each.calibration is not None and expert.calibration is not None
                drawn = each.calibration.model_copy(update={"num_samples": 256})
                assert drawn == expert.calibration and each.calibration.num_samples == 256 // (4 * number)


@pytest.mark.slow
def test_an_order_is_merged_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "clip-vit-b-32-twenty-tasks.yaml"
    read(tmp_path, name, f"evaluation/{name}")
    monkeypatch.setattr(sys, "argv", ["sequential.py", "3", "out", "--limit", "1"])
    runpy.run_path(str(PAPER / "sequential.py"), run_name="__main__")
    for number in range(1, 6):
        written = json.loads((tmp_path / "out" / f"scores-{number}" / "evaluation.json").read_text())
        scores = [score for score in written["scores"] if score["model"] == f"step-{number}"]
        assert len(scores) == 20 and {score["num_samples"] for score in scores} == {1}


@pytest.mark.slow
def test_scales_numbers_of_samples_and_single_blocks_are_compared(tmp_path: Path) -> None:
    """The sweeps of README.md, with fewer values."""
    name = "clip-vit-b-32-two-tasks.yaml"
    config, tasks = read(tmp_path, name, f"evaluation/{name}")
    sweeps: dict[str, list[Any]] = {
        "off_diagonal_scale": [0.1, 1.0],
        "calibration.num_samples": [1, 4],
        "include": [[r"layers\.0\."], [r"layers\.1\."]],
    }
    # Stand-ins know nothing, and of an expert's score of zero there are no shares: compared by accuracy itself.
    alone = tuple(task.model_copy(update={"expert": None}) for task in tasks.tasks)
    for setting, values in sweeps.items():
        sweep = {setting: values}
        evaluation = tasks.model_copy(update={"tasks": alone})
        found = largemerge.compare(PAPER / name, evaluation, out=tmp_path / setting, sweep=sweep)
        assert not found.problems and len(found.trials) == 2
        check_scores = {trial.name: found.evaluation.score(trial.name, "sun397") for trial in found.trials}
        assert {score.num_samples for score in check_scores.values()} == {num_rows(tasks.tasks[0])}
    assert config.names == tasks.names


@pytest.mark.slow
def test_five_language_experts(tmp_path: Path) -> None:
    name = "llama-3.2-3b-five-experts.yaml"
    config = load_config(PAPER / name)
    columns = ("instruction", "output", "query", "response", "inputs", "targets", "prompt")
    write_language_standins(tmp_path, config, [dict.fromkeys(columns, "the end of the merging")] * 3)
    report = largemerge.merge(PAPER / name, tmp_path / "merged")
    merged, base = weights_in(tmp_path / "merged"), weights_in(tmp_path / str(config.base_model))
    assert report.linears
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[key], base[key].to(torch.bfloat16))
