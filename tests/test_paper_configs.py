"""The merges of `configs/paper/` and their evaluations: which experts, on which data, with which settings.

That every merge is a valid configuration is in `regression/test_config.py`; `test_paper_runs.py` runs them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from largemerge import MergeConfig, load_config
from largemerge.evaluation.config import EvaluationConfig, HarnessTask, TaskData, ZeroShotTask, load_evaluation
from largemerge.evaluation.prompts import load_prompts

PAPER = Path(__file__).parents[1] / "configs" / "paper"
CLIP = sorted(PAPER.glob("clip-*.yaml"))
EVALUATIONS = sorted((PAPER / "evaluation").glob("*.yaml"))
EIGHT = ["sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
LANGUAGE = sorted(PAPER.glob("*-five-experts.yaml"))
CORRUPTED = ("made-corruptions", "corruptions")
NUM_TASKS = {"two": 2, "four": 4, "eight": 8, "twelve": 12, "sixteen": 16, "twenty": 20}
BASES = {
    "clip-vit-b-32": "openai/clip-vit-base-patch32",
    "clip-vit-b-16": "openai/clip-vit-base-patch16",
    "clip-vit-l-14": "openai/clip-vit-large-patch14",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
}


def read(path: Path) -> MergeConfig:
    config = load_config(path)
    assert config.merge_method == "regmean_plusplus"
    assert config.base_model == next(base for short, base in BASES.items() if path.name.startswith(short))
    return config


def data_of(config: MergeConfig) -> dict[str, str]:
    """Names of a merge's experts → their data."""
    found = {}
    for candidate in config.models:
        assert candidate.calibration is not None and candidate.calibration.split == "train"
        found[candidate.label] = candidate.calibration.data
    return found


def test_all_files_are_there() -> None:
    clip = [f"clip-vit-{size}-{number}-tasks" for number in NUM_TASKS for size in ("b-32", "b-16", "l-14")]
    language = [f"{short}-five-experts" for short in BASES if not short.startswith("clip")]
    assert sorted(path.stem for path in PAPER.glob("*.yaml")) == sorted(clip + language)


@pytest.mark.parametrize("path", CLIP, ids=[path.stem for path in CLIP])
def test_clip_experts_have_their_own_data_in_the_published_order(path: Path) -> None:
    config = read(path)
    number = NUM_TASKS[path.stem.split("-")[-2]]
    names = list(data_of(config))
    assert names == list(data_of(read(PAPER / "clip-vit-b-32-twenty-tasks.yaml")))[:number]
    family = str(config.base_model).removeprefix("openai/")
    assert [candidate.model for candidate in config.models] == [f"tanganke/{family}_{name}" for name in names]
    assert {name: load_prompts(name).dataset for name in names} == data_of(config)
    for candidate in config.models:
        data = candidate.calibration
        assert data is not None and data.image_field == ("jpg" if candidate.label == "fer2013" else "image")
        assert (data.num_samples, data.batch_size) == (256, 32)
    assert config.parameters.off_diagonal_scale == 0.95


def variants(folder: str) -> list[Path]:
    return sorted((PAPER / folder).glob("*.yaml"))


VARIANTS = [*variants("out-of-domain"), *variants("parts"), *variants("corruptions"), *variants("data")]


@pytest.mark.parametrize("path", VARIANTS, ids=[path.stem for path in VARIANTS])
def test_other_experiments_merge_the_same_experts_on_the_same_data(path: Path) -> None:
    """So that what differs is what the experiment is about: the tasks, or the parts that are solved."""
    config, eight = load_config(path), read(PAPER / "clip-vit-b-32-eight-tasks.yaml")
    known = {candidate.label: candidate for candidate in eight.models}
    if path.parent.name == "data":  # whose experts are the same, and whose images are others
        assert all(each.calibration != known[each.label].calibration for each in config.models)
        models = [each.model_copy(update={"calibration": known[each.label].calibration}) for each in config.models]
        config = config.model_copy(update={"models": tuple(models)})
    assert all(candidate == known[candidate.label] for candidate in config.models)
    left_out = [name for name in EIGHT if name not in config.names]
    assert len(left_out) == {"out-of-domain": 2, "parts": 0, "data": 0, "corruptions": 4}[path.parent.name]
    if path.parent.name == "out-of-domain":
        assert sorted(left_out) == sorted(name for name in EIGHT if name in path.stem.removeprefix("without-"))
    if path.parent.name == "parts":
        assert config.parameters.include
        config = config.model_copy(update={"parameters": eight.parameters})
    assert config.model_copy(update={"models": eight.models}) == eight


def sources(config: MergeConfig) -> dict[str, tuple[str | None, str | None, str | None]]:
    """Names of a merge's experts → data, subset, and the column of images."""
    found = {candidate.label: candidate.calibration for candidate in config.models}
    return {name: (each.data, each.subset, each.image_field) for name, each in found.items() if each is not None}


@pytest.mark.parametrize("path", EVALUATIONS, ids=[path.stem for path in EVALUATIONS])
def test_evaluations_are_of_the_merges_experts_data_and_classes(path: Path) -> None:
    evaluation = load_evaluation(path)
    if path.stem.endswith("-five-experts"):
        merge = PAPER / path.name.replace("-code-of-", "-")
        experts = {candidate.label: candidate.model for candidate in read(merge).models}
        assert {task.name: task.expert for task in evaluation.tasks}.items() <= experts.items()
        assert all(isinstance(task, HarnessTask) for task in evaluation.tasks)
        return
    twenty = read(PAPER / "clip-vit-b-32-twenty-tasks.yaml")
    known, short = sources(twenty), next(short for short in BASES if path.name.startswith(short))
    family = BASES[short].removeprefix("openai/")
    assert evaluation.base == BASES[short]
    for task in evaluation.tasks:
        assert isinstance(task, ZeroShotTask)
        name = task.name.partition(" ")[0]
        assert (task.data, task.subset, task.image_field or "image") == known[name]
        assert (task.expert, task.text_model) == (f"tanganke/{family}_{name}", evaluation.base)
        assert load_prompts(task.classes).dataset == task.data
        assert task.label_field == ("cls" if name == "fer2013" else "label")


@pytest.mark.parametrize("path", CLIP, ids=[path.stem for path in CLIP])
def test_every_merge_has_an_evaluation_of_its_tasks(path: Path) -> None:
    merge, evaluation = read(path), load_evaluation(PAPER / "evaluation" / path.name)
    assert evaluation.names == merge.names
    assert [task.expert for task in evaluation.tasks] == [candidate.model for candidate in merge.models]
    assert [split for split in splits(evaluation).values() if split is not None] == ["validation"] * (
        "food101" in merge.names
    )
    assert bool(evaluation.published) == path.stem.endswith("eight-tasks")


def splits(evaluation: EvaluationConfig) -> dict[str, str | None]:
    """Names of tasks → the split that is named; `None` for the test split."""
    return {task.name: task.split for task in evaluation.tasks if isinstance(task, TaskData)}


def test_settings_are_chosen_on_images_that_no_merge_draws() -> None:
    evaluation = load_evaluation(PAPER / "evaluation" / "clip-vit-b-32-validation.yaml")
    assert list(evaluation.names) == EIGHT and set(splits(evaluation).values()) == {"train"}
    for task, candidate in zip(evaluation.tasks, read(PAPER / "clip-vit-b-32-eight-tasks.yaml").models, strict=True):
        assert isinstance(task, ZeroShotTask) and candidate.calibration is not None
        drawn = candidate.calibration
        assert (task.skip, task.seed or evaluation.seed) == (drawn.num_samples, drawn.seed)
        assert task.num_samples is not None


def test_corruptions_are_splits() -> None:
    evaluation = load_evaluation(PAPER / "evaluation" / "clip-vit-b-32-corruptions.yaml")
    merge = load_config(PAPER / "corruptions" / "clip-vit-b-32-four-tasks.yaml")
    assert len(evaluation.tasks) == 8 * len(merge.models)
    for name, split in splits(evaluation).items():
        task, kind = name.split(" ")
        assert task in merge.names and (split or "clean") == kind


def test_corruptions_are_made_of_the_same_images_as_those_that_are_splits() -> None:
    made, split = (load_evaluation(PAPER / "evaluation" / f"clip-vit-b-32-{name}.yaml") for name in CORRUPTED)
    assert made.names == split.names and made.base == split.base
    for task, other in zip(made.tasks, split.tasks, strict=True):
        assert isinstance(task, ZeroShotTask) and isinstance(other, ZeroShotTask)
        assert (task.corruption.kind if task.corruption is not None else None) == other.split
        assert task.model_copy(update={"corruption": None, "split": other.split}) == other


@pytest.mark.parametrize("path", LANGUAGE, ids=[path.stem for path in LANGUAGE])
def test_language_experts_have_the_data_of_their_own_domain(path: Path) -> None:
    config = read(path)
    assert list(data_of(config)) == ["instruction", "math", "coding", "multilingual", "safety"]
    family = str(config.base_model).partition("/")[2]
    for candidate in config.models:
        name, data = candidate.label, candidate.calibration
        assert candidate.model == f"MergeBench/{family}_{name}"
        assert data is not None and data.data == f"MergeBench/{name}_val"
        assert (data.num_samples, data.max_length) == (256, 2048)
        assert data.text_template is not None and data.text_template.count("{") == 2
    assert config.parameters.off_diagonal_scale == 0.1
    assert config.parameters.exclude == ("embed_tokens", "lm_head") and config.dtype == "bfloat16"


def test_all_language_experts_are_given_the_same_texts() -> None:
    first, *others = ([candidate.calibration for candidate in read(path).models] for path in LANGUAGE)
    assert others and all(other == first for other in others)


def test_the_readme_tells_the_order_and_its_links_lead_somewhere() -> None:
    text = (PAPER / "README.md").read_text(encoding="utf-8")
    told = text.partition("Order of the twenty**:")[2].partition(".\n")[0]
    assert re.split(r",\s+", told.strip()) == list(data_of(read(PAPER / "clip-vit-b-32-twenty-tasks.yaml")))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    assert links and all((PAPER / link.partition("#")[0]).exists() for link in links)
