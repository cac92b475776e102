"""Merges that are killed or interrupted at any moment: gone on with, the result is that of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
from cases import Case, files_in, touch
from processes import PARTS, check_unbroken, journal, lasting, make_long_case, merging, parts


@pytest.fixture(scope="module", params=["regmean_plusplus", "regmean"])
def long_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A case with its unbroken merge in `unbroken`, done by a process of its own."""
    case = make_long_case(tmp_path_factory.mktemp(request.param), request.param)
    case.write_yaml()
    log = case.folder / "log"
    assert processes.run(merging(case, case.folder / "unbroken"), log) == 0, log.read_text()
    return case


@pytest.mark.slow
def test_killed_after_every_block(long_case: Case, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    done: list[dict[str, Any]] = []
    for number in range(1, len(PARTS)):
        process = processes.start(merging(long_case, out, "--resume"), log)
        # A running merge may come further than this before it is killed.
        processes.wait_until(lambda number=number: len(journal(out)) >= number, process)
        process.kill()
        processes.finish(process)
        if (out / "config.json").exists():
            break  # to the very end, even
        now = journal(out)
        assert now[: len(done)] == done, "a finished block was solved again"
        assert [line["part"] for line in now] == PARTS[: len(now)]
        done = now
    assert done
    check_finished_or_finished_before(long_case, out, processes.run(merging(long_case, out, "--resume"), log), log)
    report = json.loads((out / "merge_report.json").read_text())
    assert [report["outside"], *report["blocks"].values()][: len(done)] == [
        {key: value for key, value in line["entry"].items() if key != "digests"} for line in done
    ]


def test_killed_at_random_moments(long_case: Case, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    generator = random.Random(0)
    longest, kills = 0.4, 0
    for _ in range(10):
        process = processes.start(merging(long_case, out, "--resume"), log)
        process.join(generator.uniform(0.0, longest))
        process.kill()
        kills += processes.finish(process) == -signal.SIGKILL
        if (out / "config.json").exists():
            if kills >= 3:
                break
            # A fast machine was done before it could be killed: begin again, and kill sooner.
            shutil.rmtree(out)
            longest /= 2
    assert kills > 0
    check_finished_or_finished_before(long_case, out, processes.run(merging(long_case, out, "--resume"), log), log)


@pytest.mark.slow
@pytest.mark.parametrize("long_case", ["regmean_plusplus"], indirect=True)
def test_killed_while_blocks_are_on_their_way_to_the_disk(long_case: Case, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    in_background = {processes.WRITES_BEHIND: "1"}
    for number in range(8, 18):
        command = merging(long_case, out, "--resume")
        process = processes.start(command, log, number, environment=in_background)
        if processes.finish(process) != -signal.SIGKILL:
            break
        now = journal(out)
        assert [line["part"] for line in now] == PARTS[: len(now)]
    assert number > 9
    code = processes.finish(processes.start(command, log, environment=in_background))
    check_finished_or_finished_before(long_case, out, code, log)


def check_finished_or_finished_before(case: Case, out: Path, code: int, log: Path) -> None:
    """A merge that was killed right before its end has finished: there is nothing to go on with."""
    if code != 0:
        assert code == 2 and "holds a finished merge" in log.read_text(), log.read_text()
        assert not (out / ".largemerge" / "manifest.json").exists()
        shutil.rmtree(out / ".largemerge", ignore_errors=True)
    check_unbroken(case, out)


OLD = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.mark.parametrize("long_case", ["regmean_plusplus"], indirect=True)
def test_killed_before_its_first_operation_on_a_file_then_its_second_and_so_on(long_case: Case, tmp_path: Path) -> None:
    """Every moment from making the folder to removing the working folder."""
    out, log = tmp_path / "out", tmp_path / "log"
    for number in range(1, 100):
        code = processes.run(merging(long_case, out, "--resume"), log, number)
        if code != -signal.SIGKILL:
            break
        if (out / "config.json").exists():
            assert without_working_folder(lasting(out)) == lasting(long_case.folder / "unbroken")
    assert number > len(PARTS)
    check_finished_or_finished_before(long_case, out, code, log)


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("long_case", ["regmean_plusplus"], indirect=True)
def test_killed_before_operations_of_the_last_stage(long_case: Case, tmp_path: Path, every: int) -> None:
    """Where the old checkpoint in the folder goes and the new one comes; quickly, before every sixth operation."""
    touch(tmp_path / "old", *OLD, "notes.txt")
    shutil.copytree(tmp_path / "old", tmp_path / "whole")
    log = tmp_path / "whole.log"
    assert processes.run(merging(long_case, tmp_path / "whole", "--force"), log, kill_at=0) == 0
    operations = processes.operations(log)
    last_part = max(index for index, line in enumerate(operations) if "journal.jsonl" in line and " open " in line)
    num_last = len(operations) - last_part - 1
    assert num_last >= len(OLD) + 6

    shutil.copytree(tmp_path / "old", tmp_path / "ready")
    assert processes.run(merging(long_case, tmp_path / "ready", "--force"), log, last_part + 2) == -signal.SIGKILL
    assert parts(tmp_path / "ready") == PARTS
    old = files_in(tmp_path / "old")
    assert without_working_folder(files_in(tmp_path / "ready")) == old, "touched before the new one was there"

    expected = lasting(long_case.folder / "unbroken") | {"notes.txt": old["notes.txt"]}
    for number in range(3, num_last + 3, every):  # a resumed run makes the folder and takes the lock first
        out, log = tmp_path / f"out{number}", tmp_path / f"log{number}"
        shutil.copytree(tmp_path / "ready", out)
        assert processes.run(merging(long_case, out, "--resume"), log, number) == -signal.SIGKILL
        found = without_working_folder(lasting(out))
        if "config.json" in found and found["config.json"] != old["config.json"]:
            assert found == expected, f"looks finished, but is not: {log.read_text()}"
        code = processes.run(merging(long_case, out, "--resume"), log)
        (out / "notes.txt").unlink()
        check_finished_or_finished_before(long_case, out, code, log)


def without_working_folder(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.startswith(".largemerge")}


@pytest.mark.parametrize("long_case", ["regmean_plusplus"], indirect=True)
def test_ctrl_c_prints_a_command_that_goes_on(long_case: Case, tmp_path: Path) -> None:
    """The hint holds for a folder whose name needs quotes, and repeats options that must be given again."""
    out, log = tmp_path / "the output", tmp_path / "log"
    slow = Case(json.loads(json.dumps(long_case.config)), long_case.models, long_case.inputs, tmp_path)
    slow.config["calibration"]["batch_size"] = 2
    slow.write_yaml()
    arguments = [str(argument) for argument in merging(slow, out, "--device", "cpu")]
    environment = os.environ | processes.ENVIRONMENT
    command = [sys.executable, "-m", "largemerge", *arguments]

    def listen() -> None:  # also where the tests run in the background of a shell, which has them ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=listen) as process:
        processes.wait_until(lambda: journal(out) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert not (out / "config.json").exists()
    assert 0 < len(journal(out)) < len(PARTS)
    (line,) = [line.strip() for line in text.splitlines() if line.strip().startswith("largemerge merge ")]
    words = shlex.split(line)
    assert words[0] == "largemerge" and "--resume" in words
    assert processes.run(words[1:], log) == 0, log.read_text()
    assert processes.run(merging(slow, tmp_path / "unbroken", "--device", "cpu"), log) == 0, log.read_text()
    check_unbroken(slow, out)
