"""Stand-ins for what the files of `configs/paper/` name: tiny models and data in folders that are called as on the Hub.

Whoever reads such a file in the working directory that has these folders finds them there, so that the files are run
as they are shipped. Columns, types of labels, splits and subsets are those of the Hub's data sets, as far as they are
known; models are of the classes that lie there, with the files that lie there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers as tf
from PIL import Image
from task_models import write_clip, write_jsonl, write_language_model

from largemerge import MergeConfig
from largemerge.evaluation.config import EvaluationConfig, ZeroShotTask
from largemerge.evaluation.prompts import load_prompts

NUM_TRAIN = 5
"""Rows of each train split."""


def write_clip_standins(folder: Path, merge: MergeConfig, evaluation: EvaluationConfig, num_blocks: int = 3) -> None:
    """Writes base, experts and images of a merge and its evaluation.

    Args:
        folder: The working directory that the files will be read in.
        merge: The merge.
        evaluation: Its evaluation, of zero-shot tasks.
        num_blocks: Blocks of the vision towers.
    """
    assert merge.base_model is not None
    write_clip(folder / merge.base_model, num_blocks)
    tasks = [task for task in evaluation.tasks if isinstance(task, ZeroShotTask)]
    experts = dict.fromkeys([*(each.model for each in merge.models), *(str(task.expert) for task in tasks)])
    for seed, expert in enumerate(experts):
        tower = tf.CLIPVisionModel.from_pretrained(folder / merge.base_model)
        _tune(tower, seed)
        tower.save_pretrained(folder / expert)  # no image processor, no projection, no text tower
    for data in dict.fromkeys(task.data for task in tasks):
        _write_images(folder, [task for task in tasks if task.data == data])


def num_rows(task: ZeroShotTask) -> int:
    """Rows of the split that a task reads; every split has another number of them."""
    splits = ["test", "validation", "contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur"]
    splits += ["pixelate", "spatter"]
    return NUM_TRAIN if task.split == "train" else 2 + splits.index(task.split or "test")


def _write_images(folder: Path, tasks: Sequence[ZeroShotTask]) -> None:
    """Writes the splits of one data set that tasks read, and a train split, as Parquet files."""
    first = tasks[0]
    column, names = first.image_field or "image", load_prompts(first.classes).class_names
    label: Any = datasets.ClassLabel(names=list(names))
    if first.classes == "pcam":
        label = datasets.Value("bool")
    elif first.classes == "fer2013":
        label = datasets.Value("int64")
    features = datasets.Features({column: datasets.Image(), first.label_field: label})
    inside = first.subset or "data"
    (folder / first.data / inside).mkdir(parents=True)
    sizes = {"train": NUM_TRAIN} | {task.split or "test": num_rows(task) for task in tasks}
    generator = np.random.default_rng(len(names))
    for split, rows in sizes.items():
        pixels = generator.integers(0, 255, (rows, 8, 8, 3), dtype=np.uint8)
        numbers = [0, *generator.integers(1, len(names), rows - 1)]
        labels = [bool(x) if first.classes == "pcam" else int(x) for x in numbers]
        table = datasets.Dataset.from_dict(
            {column: [Image.fromarray(each) for each in pixels], first.label_field: labels}, features
        )
        table.to_parquet(folder / first.data / inside / f"{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"{inside}/{split}-*"} for split in sizes]
    card = {"configs": [{"config_name": first.subset or "default", "data_files": files}]}
    (folder / first.data / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n", encoding="utf-8")


def _tune(model: tf.PreTrainedModel, seed: int) -> None:
    """Moves all weights a little, as fine-tuning does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.01 + 0.1 * parameter.abs().mean()))


def write_language_standins(folder: Path, merge: MergeConfig, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the base, experts and texts of a merge of language models.

    Args:
        folder: The working directory that the file will be read in.
        merge: The merge.
        rows: Rows of every data set, with the columns of all of them.
    """
    assert merge.base_model is not None
    write_language_model(folder / merge.base_model)
    for seed, candidate in enumerate(merge.models):
        expert = tf.AutoModelForCausalLM.from_pretrained(folder / merge.base_model)
        _tune(expert, seed)
        expert.save_pretrained(folder / candidate.model)
        tf.AutoTokenizer.from_pretrained(folder / merge.base_model).save_pretrained(folder / candidate.model)
        assert candidate.calibration is not None and candidate.calibration.data is not None
        data = folder / candidate.calibration.data
        data.mkdir(parents=True)
        write_jsonl(data / "train.jsonl", rows)
