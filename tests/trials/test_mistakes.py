"""Mistakes of every kind, each beside each other: none hides another, and all are told with exit code 2."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from task_models import TEXTS, write_language_model, write_texts

from largemerge import config_file
from largemerge.cli import main

MISTAKES: dict[str, str] = {
    "a key of the configuration": "compute_dtyp: unknown key",
    "a number of the configuration": "parameters.ridge: expected a number from 0 on",
    "a file of the configuration": "nowhere.yaml: no such configuration file",
    "a kind of the evaluation": "did you mean 'language_model'?",
    "data of the evaluation": "gone.jsonl",
    "no such evaluation": "gone.yaml: no such configuration file",
    "a method": "--methods regmaen: no method; did you mean 'regmean'?",
    "a text that is no sweep": "--sweep 'ridge': expected a setting and its values",
    "an empty value": "--sweep 'anchor_scale=1,': a value is empty",
    "a value twice": "--sweep ridge: a value stands twice",
    "a value out of range": "--sweep off_diagonal_scale=7: expected a number up to 1",
    "a text for a number": "--sweep off_diagonal_scale=much: expected a number",
    "samples": "--sweep calibration.num_samples=0: expected a number from 1 on",
    "nobody's setting": "--sweep rigde: ",
    "a text that is no range": "--search 't=1': expected the lower and the upper end",
    "a range upside down": "--search 'drift=1:0': 1 is not below 0",
    "a range out of bounds": "--search anchor_scale=1:99: expected a number up to 10",
    "no number to search": "--search excluded: is no number",
    "a folder": "out: holds mine.txt, and is no folder of an earlier comparison",
    "a limit": "--limit 0: expected a whole number from 1 on",
    "limits of memory": "--memory-host 'much': expected a size such as 5GB",
    "a device": "--device gpu: not known; expected auto, cpu or cuda:0",
}
SAME = (
    {"a key of the configuration", "a number of the configuration", "a file of the configuration"},
    {"a kind of the evaluation", "data of the evaluation", "no such evaluation"},
    {"a value out of range", "a text for a number"},
)
"""Of these there is one at a time: the files that they stand in are one, or the value is."""
NEEDS_THE_MODELS = {"data of the evaluation"}
"""What can be seen only where the configuration is right."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, their data, and files with and without mistakes."""
    path = tmp_path_factory.mktemp("mistakes")
    (path / "out").mkdir()
    (path / "out" / "mine.txt").write_text("mine")
    models = []
    for name in ("math", "code"):
        write_language_model(path / name)
        data = write_texts(path / f"{name}.jsonl", [f"{text} {word}" for text in TEXTS for word in TEXTS])
        models.append({"model": str(path / name), "calibration": {"data": data, "num_samples": 8}})
    config = {"merge_method": "regmean", "models": models}
    task = {"name": "math", "kind": "language_model", "data": str(path / "math.jsonl"), "num_samples": 6}
    files: dict[str, Any] = {
        "merge": config,
        "a key of the configuration": config | {"compute_dtyp": "float32"},
        "a number of the configuration": config | {"parameters": {"ridge": -1}},
        "eval": {"tasks": [task]},
        "a kind of the evaluation": {"tasks": [task | {"kind": "languag_model"}]},
        "data of the evaluation": {"tasks": [task | {"data": str(path / "gone.jsonl")}]},
    }
    for name, content in files.items():
        (path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return path


def command_with(mistakes: set[str], folder: Path) -> list[str]:
    """The command line with some mistakes."""
    config = next((name for name in mistakes if name.endswith("of the configuration")), "merge")
    config = "nowhere" if config.startswith("a file") else config
    evaluation = next((name for name in mistakes if name.endswith("of the evaluation")), "eval")
    evaluation = "gone" if "no such evaluation" in mistakes else evaluation
    options = {
        "a method": ["--methods", "regmean,regmaen"],
        "a text that is no sweep": ["--sweep", "ridge"],
        "an empty value": ["--sweep", "anchor_scale=1,"],
        "a value twice": ["--sweep", "ridge=0.1,1e-1"],
        "a value out of range": ["--sweep", "off_diagonal_scale=0.5,7"],
        "a text for a number": ["--sweep", "off_diagonal_scale=much"],
        "samples": ["--sweep", "calibration.num_samples=0,4"],
        "nobody's setting": ["--sweep", "rigde=0.1"],
        "a text that is no range": ["--search", "t=1"],
        "a range upside down": ["--search", "drift=1:0"],
        "a range out of bounds": ["--search", "anchor_scale=1:99"],
        "no number to search": ["--search", "excluded=0:1"],
        "a limit": ["--limit", "0"],
        "limits of memory": ["--memory-host", "much", "--memory-device", "0"],
        "a device": ["--device", "gpu"],
    }
    out = folder / ("out" if "a folder" in mistakes else "fresh")
    given = [word for name in options if name in mistakes for word in options[name]]
    return ["compare", str(folder / f"{config}.yaml"), str(folder / f"{evaluation}.yaml"), "--out", str(out), *given]


ALONE = [pytest.param((name,), id=name) for name in MISTAKES]
PAIRS = [
    pytest.param(pair, id=" and ".join(pair), marks=pytest.mark.slow)
    for pair in itertools.combinations(MISTAKES, 2)
    if not any(set(pair) <= one for one in SAME)
]


@pytest.mark.parametrize("names", [*ALONE, *PAIRS])
def test_no_mistake_hides_another(names: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command_with(set(names), folder))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and not (folder / "fresh").exists()
    seen = {name for name in names if MISTAKES[name] in told}
    hidden = set(names) - seen
    if any(name.endswith("of the configuration") for name in names):
        hidden -= NEEDS_THE_MODELS
    assert not hidden, told
    assert ("limits of memory" in names) is ("--memory-device '0'" in told)
    count = int(told.split("largemerge: ")[-1].split(" ")[0]) if " problems:" in told else 1
    assert count == len(seen) + ("limits of memory" in names), told  # which are two


def test_all_of_them_are_told_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = set(MISTAKES) - NEEDS_THE_MODELS - {"a file of the configuration", "a key of the configuration"}
    names -= {"no such evaluation", "a text for a number"}
    with pytest.raises(SystemExit):
        main(command_with(names, folder))
    told = capsys.readouterr().err
    assert not [name for name in names if MISTAKES[name] not in told], told


def test_each_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_text = config_file._read_text

    def counting(path: Path) -> str:
        read.append(path.name)
        return read_text(path)

    monkeypatch.setattr(config_file, "_read_text", counting)
    with pytest.raises(SystemExit):
        main(command_with({"a folder"}, folder))  # which is told when all else has been looked at
    assert read == ["merge.yaml", "eval.yaml"]
