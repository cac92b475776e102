"""What a run tells: a log file, the report as JSON, details, and stages before there is progress."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from cases import Case, exit_code, write_pair

from largemerge import progress
from largemerge.log import LOGGER, stage, tell, writing_log


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = write_pair(tmp_path_factory.mktemp("log"))
    made.write_yaml()
    return made


def test_a_log_has_stages_steps_and_the_report_with_times(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, config = tmp_path / "merge.log", case.folder / "config.yaml"
    assert exit_code("merge", config, tmp_path / "out", "--quiet", "--log-file", log) == 0
    assert capfd.readouterr() == ("", "")
    first, *lines = log.read_text().splitlines()
    assert first == "# log of largemerge, times in UTC"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO) ", line) for line in lines), lines
    text = "\n".join(lines)
    for part in ("reading the headers", "reading the calibration data", "collect model.layers.0", "exit code 0"):
        assert part in text, part
    report = next(line.partition(" report: ")[2] for line in lines if " report: " in line)
    assert json.loads(report) == json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert exit_code("merge", config, tmp_path / "out", "--log-file", log) == 2
    again = log.read_text().splitlines()
    assert again[: len(lines) + 1] == [first, *lines], "a log is added to"
    told = capfd.readouterr().err.removeprefix("largemerge: ").strip()
    assert any(line.endswith(f"INFO {told}") for line in again) and "Traceback" in "\n".join(again)
    assert not LOGGER.handlers


def test_a_log_of_another_rank_is_a_file_of_its_own(tmp_path: Path) -> None:
    with writing_log(tmp_path / "log", 3):
        LOGGER.debug("something")
    assert (tmp_path / "log.rank3").read_text().endswith("DEBUG something\n") and not (tmp_path / "log").exists()


def in_the_way(kind: str, folder: Path) -> Path:
    path = folder / "log"
    if kind == "another file":
        path.write_text("merge_method: linear\n")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a circle of links":
        path.symlink_to(path)
    elif kind == "a long name":
        path = folder / ("x" * 5000)
    elif kind == "no such folder":
        path = folder / "nowhere" / "log"
    elif kind == "in OUT":
        path = folder / "out" / "log"
    else:
        assert kind == "below a file"
        (folder / "file").touch()
        path = folder / "file" / "log"
    return path


@pytest.mark.parametrize(
    ("kind", "mentions"),
    [
        ("another file", "holds something else; expected a new file, or a log to add to"),
        ("a folder", "Is a directory; it is a folder; expected a file"),
        ("a pipe", "expected a new file"),
        ("a circle of links", "Too many levels of symbolic links"),
        ("a long name", "File name too long; choose a shorter name"),
        ("no such folder", "No such file or directory"),
        ("in OUT", "is in OUT"),
        ("below a file", "Not a directory"),
    ],
)
def test_what_is_no_log_is_left_alone(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, mentions: str
) -> None:
    path = in_the_way(kind, tmp_path)
    before = path.read_bytes() if os.path.isfile(path) else b""
    assert exit_code("merge", case.folder / "config.yaml", tmp_path / "out", "--log-file", path) == 2
    told = capfd.readouterr().err
    assert told.startswith("largemerge: --log-file ") and mentions in told and len(told) < 500, told
    assert not (tmp_path / "out").exists() and (path.read_bytes() if os.path.isfile(path) else b"") == before


def test_a_full_disk_ends_the_log_alone(case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("merge", case.folder / "config.yaml", tmp_path / "out", "--quiet", "--log-file", "/dev/full") == 0
    assert capfd.readouterr().err.count("No space left on device") == 1
    assert (tmp_path / "out" / "config.json").exists()


def test_the_report_as_json(case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("merge", case.folder / "config.yaml", tmp_path / "out", "--json") == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert "21 solved" not in printed.err, "there is no table"


def test_details(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("plan", case.folder / "config.yaml", "--no-probe", "-v") == 0
    printed = capfd.readouterr()
    assert "INFO reading the headers of all models" in printed.err and "21 solved" in printed.out
    assert exit_code("plan", "nowhere.yaml", "-v") == 2
    told = capfd.readouterr().err
    assert "\nlargemerge: nowhere.yaml: no such configuration file\n" in told and "Traceback" not in told
    assert exit_code("merge", "a", "b", "--quiet", "-v") == 2
    assert "not allowed with" in capfd.readouterr().err


@pytest.mark.parametrize("verbose", [False, True])
def test_a_mistake_of_ours_asks_for_a_report(
    case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], verbose: bool
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("one and one\nis three")

    monkeypatch.setattr("largemerge.api.plan", broken)
    assert exit_code("plan", case.folder / "config.yaml", *(["-v"] if verbose else [])) == 70
    told = capfd.readouterr().err
    assert "unexpected AssertionError: one and one; this is a mistake in largemerge, not yours: please report" in told
    assert (told.count("Traceback") == 1) is verbose and ("--verbose or --log-file" in told) is not verbose


def test_a_stage_that_takes_long_gets_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_STAGE_SECONDS", 0.1)
    with progress.showing_stages(), progress.showing_stages():
        stage("briefly")
        stage("reading for long")
        time.sleep(0.4)
        tell("something else")
        stage("")
        time.sleep(0.2)
    stage("nobody listens")
    assert capfd.readouterr().err == "largemerge: reading for long\nlargemerge: something else\n"
