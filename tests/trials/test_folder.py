"""What the notes of a comparison depend on: every file that an evaluation or a configuration names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from largemerge.evaluation.config import load_evaluation
from largemerge.evaluation.evaluate import versions_of
from largemerge.trials.folder import ComparisonFolder, fingerprint

VERSIONS = {"torch": "2.13.0"}
FILES = (
    "data.jsonl",
    "classes.yaml",
    "head.safetensors",
    "images/cat/0.png",
    "base/1_Pooling/config.json",
    "lora/a.bin",
)


@pytest.fixture
def named(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tasks and a configuration that name all files, some by the folders that they lie in."""
    for name in (*FILES, "scratch/states", "expert/config.json", "out/trials/a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    task = {
        "classes": str(tmp_path / "classes.yaml"),
        "head": str(tmp_path / "head.safetensors"),
        "data": str(tmp_path / "images"),
        "separator": "/",
    }
    model = {"model": f"{tmp_path}/base+{tmp_path}/lora", "calibration": {"data": str(tmp_path / "data.jsonl")}}
    return {"tasks": [task]}, {"models": [model], "memory": {"disk": str(tmp_path / "scratch")}}


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_named_counts(
    named: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, name: str
) -> None:
    before = fingerprint(*named, tmp_path / "out", VERSIONS)
    status = (tmp_path / name).stat()
    (tmp_path / name).write_text(name.upper())  # as many bytes
    os.utime(tmp_path / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert fingerprint(*named, tmp_path / "out", VERSIONS) != before


def test_what_is_not_named_does_not_count(named: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    before = fingerprint(*named, tmp_path / "out", VERSIONS)
    (tmp_path / "scratch" / "states").write_text("other states")
    (tmp_path / "expert" / "config.json").write_text("{}")
    assert fingerprint(*named, tmp_path / "out", VERSIONS) == before


def test_the_folder_itself_does_not_count_inside_of_another(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    tasks = {"tasks": [{"data": str(tmp_path)}]}
    folder = ComparisonFolder(tmp_path / "out")
    before = fingerprint(tasks, {}, folder.path, VERSIONS)
    folder.open()
    folder.write(folder.note_of("linear"), "key", 1)
    assert fingerprint(tasks, {}, folder.path, VERSIONS) == before
    assert fingerprint(tasks, {}, tmp_path / "elsewhere", VERSIONS) != before


def test_versions_count_of_the_packages_that_the_tasks_need(tmp_path: Path) -> None:
    data = {"name": "digits", "kind": "image_classification", "data": str(tmp_path)}
    plain = load_evaluation({"tasks": [data]})
    noisy = load_evaluation({"tasks": [{**data, "corruption": {"kind": "spatter"}}]})
    assert set(versions_of(noisy.tasks)) - set(versions_of(plain.tasks)) == {"imagecorruptions-imaug"}
    newer = VERSIONS | {"imagecorruptions-imaug": "1.2"}
    assert fingerprint({}, {}, tmp_path, newer) != fingerprint({}, {}, tmp_path, VERSIONS)


def test_notes_hold_for_their_key_alone(tmp_path: Path) -> None:
    folder = ComparisonFolder(tmp_path / "out")
    folder.open()
    assert folder.problem() is None
    note = folder.note_of("a/trial")
    assert note.parent == tmp_path / "out" / "trials" and note != folder.note_of("a_trial")
    folder.write(note, "first", None)
    assert folder.begun(note, "first") and not folder.begun(note, "other") and folder.known(note, "first") is None
    folder.write(note, "first", {"score": 1})
    assert folder.known(note, "first") == {"score": 1} and folder.known(note, "other") is None
    assert not folder.begun(note, "first")
