"""The merges of `configs/paper/`: which experts, on which data, with which settings.

That every file is a valid configuration is in `regression/test_config.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from largemerge import MergeConfig, load_config
from largemerge.evaluation.prompts import load_prompts

PAPER = Path(__file__).parents[1] / "configs" / "paper"
CLIP = sorted(PAPER.glob("clip-*.yaml"))
LANGUAGE = sorted(PAPER.glob("*-five-experts.yaml"))
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
    clip = [f"clip-vit-b-32-{number}-tasks" for number in NUM_TASKS]
    clip += ["clip-vit-b-16-eight-tasks", "clip-vit-l-14-eight-tasks"]
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
    assert links and all((PAPER / link).exists() for link in links)
