"""Images that are corrupted on the way to a model, held against the package's own images given as they are."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import imagecorruptions
import numpy as np
import processes
import pytest
import tiny_models
import torch
import transformers as tf
from PIL import Image
from task_models import enlarge, write_clip, write_processor

import largemerge
from largemerge.evaluation.config import Corruption
from largemerge.evaluation.corruption import PACKAGE, corrupted

KINDS = ("contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "spatter")
SIZE, COUNT, CLASSES, SEED = 40, 24, ("the end", "models", "print"), 5


def by_the_package(image: Image.Image, kind: str, severity: int, row: int, seed: int = SEED) -> Image.Image:
    """What the package makes of an image, with the seed that a task and a row have."""
    number = int(np.random.SeedSequence([seed, row]).generate_state(1)[0])
    np.random.seed(number)
    options = {"seed": number} if kind == "impulse_noise" else {}
    return Image.fromarray(imagecorruptions.corrupt(np.asarray(image), severity, kind, **options))


def images(count: int = COUNT, size: int = SIZE) -> list[Image.Image]:
    """Images with large parts in one colour, and noise."""
    generator = np.random.default_rng(1)
    parts = generator.integers(0, 255, (count, 4, 4, 3)).repeat(size // 4, axis=1).repeat(size // 4, axis=2)
    noise = generator.integers(-20, 20, (count, size, size, 3))
    return [Image.fromarray(each.clip(0, 255).astype(np.uint8)) for each in parts + noise]


def write(path: Path, pictures: list[Image.Image]) -> str:
    """Writes images with labels as a table; returns its path."""
    label: Any = datasets.ClassLabel(names=list(CLASSES))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = {"image": pictures, "label": [number % len(CLASSES) for number in range(len(pictures))]}
    datasets.Dataset.from_dict(rows, features).to_parquet(path)
    return str(path)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A classifier of images with three labels."""
    model = tiny_models.build("vit")
    config = model.config
    config.id2label = dict(enumerate(CLASSES))
    config.label2id = {name: number for number, name in enumerate(CLASSES)}
    torch.manual_seed(0)
    model = type(model)(config)
    enlarge(model)
    model.save_pretrained(tmp_path / "vit")
    write_processor(tmp_path / "vit", config.image_size)
    return tmp_path / "vit"


def classified(folder: Path, pictures: list[Image.Image]) -> list[int]:
    """Classes that a classifier finds, by Transformers alone."""
    model = tf.AutoModelForImageClassification.from_pretrained(folder)
    processor = tf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        found: list[int] = model(**processor(pictures, return_tensors="pt")).logits.argmax(-1).tolist()
    return found


def accuracy(task: dict[str, Any], folder: Path, **more: Any) -> float:
    config = {"tasks": [{"name": "task", "kind": "image_classification", "seed": SEED, **task}], **more}
    found = largemerge.evaluate(config, [folder])
    assert not found.problems
    return float(found.score(folder.name, "task").value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_sees_what_the_package_makes(tmp_path: Path, vit: Path, kind: str) -> None:
    clean = images()
    data = write(tmp_path / "d.parquet", clean)
    changed = [by_the_package(image, kind, 5, row) for row, image in enumerate(clean)]
    found = classified(vit, changed)
    expected = np.mean([number == row % len(CLASSES) for row, number in enumerate(found)])
    assert found != classified(vit, clean), "else the corruption might be left out"
    assert accuracy({"data": data, "corruption": kind}, vit) == pytest.approx(expected)
    assert accuracy({"data": write(tmp_path / "c.parquet", changed)}, vit) == pytest.approx(expected)
    mild = [by_the_package(image, kind, 2, row) for row, image in enumerate(clean)]
    expected = np.mean([number == row % len(CLASSES) for row, number in enumerate(classified(vit, mild))])
    task = {"data": data, "corruption": {"kind": kind, "severity": 2}}
    assert accuracy(task, vit) == pytest.approx(expected)


def test_batches_blocks_and_samples_that_are_drawn_change_no_image(tmp_path: Path, vit: Path) -> None:
    clean = images()
    data = write(tmp_path / "d.parquet", clean)
    changed = [by_the_package(image, "gaussian_noise", 5, row) for row, image in enumerate(clean)]
    task = {"data": data, "corruption": "gaussian_noise"}
    whole = accuracy(task, vit)
    assert accuracy(task | {"batch_size": 1}, vit) == whole
    assert accuracy(task, vit, memory={"host": 1}) == whole
    ready = {"data": write(tmp_path / "c.parquet", changed)}
    for drawn in ({"num_samples": 5}, {"num_samples": 9, "skip": 4}):
        assert accuracy(task | drawn, vit) == accuracy(ready | drawn, vit)


def test_two_ranks_see_what_one_sees(tmp_path: Path, vit: Path) -> None:
    data = write(tmp_path / "d.parquet", images())
    tasks = [
        {"name": kind, "kind": "image_classification", "data": data, "corruption": kind, "batch_size": 4}
        for kind in ("impulse_noise", "motion_blur", "spatter")
    ]
    config = tmp_path / "eval.yaml"
    config.write_text(json.dumps({"tasks": tasks}), encoding="utf-8")
    for size in (1, 2):
        processes.run_ranks(["evaluate", config, vit, "--out", tmp_path / f"by{size}"], tmp_path, size)
    one, two = (json.loads((tmp_path / f"by{size}" / "evaluation.json").read_text()) for size in (1, 2))
    assert [score["metrics"] for score in one["scores"]] == [score["metrics"] for score in two["scores"]]
    assert one["versions"][PACKAGE] == importlib.metadata.version(PACKAGE)
    assert one["settings"]["tasks"][0]["corruption"] == {"kind": "impulse_noise", "severity": 5}


def test_zero_shot_sees_corrupted_images_too(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    clean = images()
    changed = [by_the_package(image, "contrast", 5, row) for row, image in enumerate(clean)]
    classes = tmp_path / "classes.yaml"
    classes.write_text(json.dumps({"class_names": CLASSES, "templates": ["the {}"]}), encoding="utf-8")
    tasks = [
        {"name": "clean", "data": write(tmp_path / "d.parquet", clean)},
        {"name": "made", "data": write(tmp_path / "d.parquet", clean), "corruption": "contrast"},
        {"name": "ready", "data": write(tmp_path / "c.parquet", changed)},
    ]
    config = {"tasks": [task | {"kind": "zero_shot", "classes": str(classes)} for task in tasks], "seed": SEED}
    found = largemerge.evaluate(config, [tmp_path / "clip"])
    clean_score, made, ready = (found.score("clip", task["name"]).value for task in tasks)
    assert made == ready != clean_score


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_row_decide_and_nothing_else(kind: str) -> None:
    (image,) = images(1)
    corruption = Corruption(kind=kind)
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    first = np.asarray(corrupted(image, corruption, 0, 1))
    assert np.random.random() == expected, "others draw from the global generator, too"
    assert np.array_equal(first, np.asarray(corrupted(image, corruption, 0, 1)))
    others = [np.asarray(corrupted(image, corruption, *each)) for each in ((0, 2), (1, 1), (1, 0))]
    is_random = kind in ("gaussian_noise", "impulse_noise", "motion_blur", "spatter")
    assert all(np.array_equal(first, other) != is_random for other in others)


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("kind", KINDS)
def test_small_and_grey_images_are_corrupted_too(kind: str, severity: int) -> None:
    corruption = Corruption(kind=kind, severity=severity)
    (image,) = images(1, 16)
    for row in range(40):  # of spatter, there are draws with no drop at all
        small = corrupted(image, corruption, 0, row)
        assert small.size == (32, 32) and small.mode == "RGB"
        assert np.asarray(small).mean() > 5
    tall = corrupted(image.resize((15, 60)), corruption, 0, 0)
    assert tall.size == (32, 128)
    assert corrupted(image.convert("L"), corruption, 0, 0).mode == "L"


def test_a_missing_package_is_told_before_the_work(tmp_path: Path, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "d.parquet", images(3))
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == PACKAGE:
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    said = r"task 'task': 'corruption' needs imagecorruptions-imaug; pip install 'largemerge\[corruptions\]'"
    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata, "version", version)
        with pytest.raises(largemerge.ConfigError, match=said):
            accuracy({"data": data, "corruption": "spatter"}, vit)
        assert accuracy({"data": data}, vit) >= 0
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "imagecorruptions", None)
        with pytest.raises(largemerge.ConfigError, match=f"{said} .*cannot be imported"):
            accuracy({"data": data, "corruption": "spatter"}, vit)


MISTAKES = {
    "fog": r"tasks\[0\]\.corruption\.kind: expected 'contrast', .* found 'fog'",
    "severity": r"tasks\[0\]\.corruption\.severity: expected a number up to 5, found 6",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_corruptions(mistake: str) -> None:
    corruption = mistake if mistake == "fog" else {"kind": "contrast", "severity": 6}
    task = {"name": "t", "kind": "image_classification", "data": "d.parquet", "corruption": corruption}
    with pytest.raises(largemerge.ConfigError, match=MISTAKES[mistake]):
        largemerge.evaluate({"tasks": [task]}, ["model"])
