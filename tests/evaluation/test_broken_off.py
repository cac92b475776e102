"""Measuring a finished merge is broken off, by Ctrl-C or a failure: the merge is whole, and a command goes on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases import exit_code
from processes import ENVIRONMENT
from task_models import TEXTS, write_language_model, write_texts

import largemerge
from largemerge.evaluation import evaluate
from largemerge.output import OutputFolder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two experts, a merge of them with a base, and an evaluation without one; in the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math", "code")):
        write_language_model(tmp_path / name, seed=seed)
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("math", "code")]
    write_yaml("merge.yaml", {"merge_method": "task_arithmetic", "base_model": "base", "models": models})
    write_yaml("eval.yaml", evaluation(4))
    return tmp_path


def write_yaml(name: str, content: dict[str, Any]) -> None:
    Path(name).write_text(yaml.safe_dump(content), encoding="utf-8")


def evaluation(num_texts: int) -> dict[str, Any]:
    write_texts(Path("texts.jsonl"), (TEXTS * num_texts)[:num_texts])
    task = {"name": "texts", "kind": "language_model", "data": "texts.jsonl", "expert": "math"}
    return {"tasks": [task], "batch_size": 1}


def command_in(errors: str) -> list[str]:
    """The arguments of the command that a message gives."""
    words = shlex.split(errors.partition("measure it by: ")[2].strip().splitlines()[0])
    assert words[:2] == ["largemerge", "evaluate"], errors
    return words[1:]


def check_goes_on(errors: str) -> None:
    """The merge is whole, and the command that is given measures what would have been measured."""
    assert "the merge in out is whole" in errors
    assert largemerge.verify("out").problems == ()
    write_yaml("eval.yaml", evaluation(4))  # fewer texts, so that it is soon done
    assert exit_code(*command_in(errors)) == 0
    found = json.loads(Path("out/evaluation.json").read_text(encoding="utf-8"))
    assert [(model["name"], model["role"]) for model in found["models"]] == [
        ("base", "base"),
        ("math", "model"),
        ("code", "model"),
        ("out", "model"),
    ]
    assert all(score["forgetting"] is not None for score in found["scores"] if score["model"] != "base")


def test_ctrl_c_while_a_merge_is_measured(folder: Path) -> None:
    write_yaml("eval.yaml", evaluation(4000))
    report, working = Path("out/merge_report.json"), Path("out/.largemerge")
    command = [sys.executable, "-m", "largemerge", "merge", "merge.yaml", "out", "--evaluate", "eval.yaml", "--quiet"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while process.poll() is None and (not report.exists() or working.exists()):
            time.sleep(0.01)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "largemerge: interrupted; the merge in out is whole" in errors
    assert "Traceback" not in errors and "--resume" not in errors
    assert not Path("out/evaluation.json").exists()
    check_goes_on(errors)


def test_a_failure_while_a_merge_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device", "/scratch")

    def mistaken(*arguments: Any, **options: Any) -> Any:
        raise KeyError("no such thing")

    command = ["merge", "merge.yaml", "out", "--evaluate", "eval.yaml", "--quiet", "--force", "--limit", "3"]
    for failing, code in ((full, 2), (mistaken, 70)):
        with monkeypatch.context() as patched:
            patched.setattr(evaluate, "running", failing)
            assert exit_code(*command) == code
        errors = capsys.readouterr().err
        assert errors.count("is whole") == 1
        assert command_in(errors)[-2:] == ["--limit", "3"]
        check_goes_on(errors)


def test_a_failure_before_the_merge_is_whole_says_nothing_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yaml("eval.yaml", evaluation(4) | {"tasks": []})
    assert exit_code("merge", "merge.yaml", "out", "--evaluate", "eval.yaml", "--quiet") == 2
    assert "is whole" not in capsys.readouterr().err


def test_the_base_is_named_once(folder: Path) -> None:
    assert exit_code("evaluate", "eval.yaml", "math", "--base", "base", "--out", "found") == 0
    found = json.loads(Path("found/evaluation.json").read_text(encoding="utf-8"))
    assert [model["role"] for model in found["models"]] == ["base", "model"]
    config = evaluation(2) | {"base": "base"}
    with pytest.raises(largemerge.LargemergeError, match=r"--base 'code': the evaluation has the base .*base"):
        largemerge.evaluate(config, ["math"], base="code")


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_merge_that_is_whole_is_said_to_be_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], evaluated: bool
) -> None:
    finish = OutputFolder.finish

    def finish_and_be_interrupted(self: OutputFolder, *args: Any, **kwargs: Any) -> Any:
        finish(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "finish", finish_and_be_interrupted)
    more = ["--evaluate", str(folder / "eval.yaml")] if evaluated else []
    assert exit_code("merge", folder / "merge.yaml", folder / "whole", "--quiet", *more) == 130
    told = capsys.readouterr().err
    assert f"the merge in {folder / 'whole'} is whole" in told and "--resume" not in told
    assert ("largemerge evaluate" in told) == evaluated
    assert (folder / "whole" / "config.json").is_file()
