"""Merges that are killed, interrupted, and gone on with: the result is that of an unbroken run, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_models
import torch
import transformers as tf
from cases import Case, files_in, load_merged, touch, write_case
from safetensors.torch import save_file

import largemerge
from largemerge import OutputError

NUM_BLOCKS = 5
PARTS = ["outside", *(f"model.layers.{index}" for index in range(NUM_BLOCKS))]
SHARD = 9000
METHODS = ("regmean", "regmean_plusplus")


def make_long_case(folder: Path, method: str = "regmean_plusplus") -> Case:
    """A merge of about a second."""
    folder.mkdir(parents=True, exist_ok=True)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(tf.LlamaForCausalLM(tf.LlamaConfig(**(tiny_models.LLM | {"num_hidden_layers": NUM_BLOCKS}))))
    return write_case(folder, models, [tiny_models.inputs("text", 40, seed) for seed in range(2)], method=method)


def merging(case: Case, out: Path, *options: object) -> list[object]:
    return ["merge", case.folder / "config.yaml", out, "--quiet", "--max-shard-size", str(SHARD), *options]


@pytest.fixture(scope="module", params=METHODS)
def long_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A case with its unbroken merge in `unbroken`, done by a process of its own."""
    case = make_long_case(tmp_path_factory.mktemp(request.param), request.param)
    case.write_yaml()
    log = case.folder / "log"
    assert processes.run(merging(case, case.folder / "unbroken"), log) == 0, log.read_text()
    return case


def journal(out: Path) -> list[dict[str, Any]]:
    path = out / ".largemerge" / "journal.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def parts(out: Path) -> list[str]:
    return [line["part"] for line in journal(out)]


def lasting(folder: Path) -> dict[str, bytes]:
    """The files of a merge but for the report, which has times in it."""
    return {name: content for name, content in files_in(folder).items() if name != "merge_report.json"}


def check_unbroken(case: Case, out: Path) -> None:
    assert lasting(out) == lasting(case.folder / "unbroken")
    report = json.loads((out / "merge_report.json").read_text())
    assert list(report["blocks"]) == PARTS[1:]
    load_merged(case, out)


def test_killed_after_every_block(long_case: Case, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    done: list[dict[str, Any]] = []
    for number in range(1, len(PARTS)):
        process = processes.start(merging(long_case, out, "--resume"), log)
        # A running merge may come further than this before it is killed.
        processes.wait_until(lambda number=number: len(journal(out)) >= number, process)
        process.kill()
        processes.finish(process)
        assert not (out / "config.json").exists()
        now = journal(out)
        assert now[: len(done)] == done, "a finished block was solved again"
        assert [line["part"] for line in now] == PARTS[: len(now)]
        done = now
    assert processes.run(merging(long_case, out, "--resume"), log) == 0, log.read_text()
    check_unbroken(long_case, out)
    report = json.loads((out / "merge_report.json").read_text())
    assert report["resumed_parts"] == len(done)
    assert [report["outside"], *report["blocks"].values()][: len(done)] == [line["entry"] for line in done]


def test_killed_at_random_moments(long_case: Case, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    generator = random.Random(0)
    kills = 0
    for _ in range(12):
        process = processes.start(merging(long_case, out, "--resume"), log)
        process.join(generator.uniform(0.02, 0.4))
        process.kill()
        if processes.finish(process) == 0:
            break
        kills += 1
        if not (out / ".largemerge").exists():
            shutil.rmtree(out, ignore_errors=True)
    else:
        assert processes.run(merging(long_case, out, "--resume"), log) == 0, log.read_text()
    assert kills > 0
    check_unbroken(long_case, out)


OLD = ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "adapter_config.json")


def test_killed_before_its_first_operation_on_a_file_then_its_second_and_so_on(half_done: Case, tmp_path: Path) -> None:
    """From making the folder to the end of the working folder."""
    out, log = tmp_path / "out", tmp_path / "log"
    for number in range(1, 100):
        code = processes.run(merging(half_done, out, "--resume"), log, number)
        if code != -signal.SIGKILL:
            break
        if (out / "config.json").exists():
            assert without_working_folder(lasting(out)) == lasting(half_done.folder / "unbroken")
    assert number > len(PARTS)
    check_finished_or_finished_before(half_done, out, code, log)


def test_killed_before_every_operation_of_the_last_stage(half_done: Case, tmp_path: Path) -> None:
    """Where the old checkpoint in the folder goes and the new one comes."""
    touch(tmp_path / "old", *OLD, "notes.txt")
    shutil.copytree(tmp_path / "old", tmp_path / "whole")
    log = tmp_path / "whole.log"
    assert processes.run(merging(half_done, tmp_path / "whole", "--force"), log, kill_at=0) == 0
    operations = [line for line in log.read_text().splitlines() if line.startswith("operation ")]
    last_part = max(index for index, line in enumerate(operations) if "journal.jsonl" in line and " open " in line)
    num_last = len(operations) - last_part - 1
    assert num_last >= len(OLD) + 6

    shutil.copytree(tmp_path / "old", tmp_path / "ready")
    assert processes.run(merging(half_done, tmp_path / "ready", "--force"), log, last_part + 2) == -signal.SIGKILL
    assert parts(tmp_path / "ready") == PARTS
    old = files_in(tmp_path / "old")
    assert without_working_folder(files_in(tmp_path / "ready")) == old, "touched before the new one was there"

    expected = lasting(half_done.folder / "unbroken") | {"notes.txt": old["notes.txt"]}
    for number in range(2, num_last + 2):  # the first one of a resumed run opens the lock
        out, log = tmp_path / f"out{number}", tmp_path / f"log{number}"
        shutil.copytree(tmp_path / "ready", out)
        assert processes.run(merging(half_done, out, "--resume"), log, number) == -signal.SIGKILL
        found = without_working_folder(lasting(out))
        if "config.json" in found and found["config.json"] != old["config.json"]:
            assert found == expected, f"looks finished, but is not: {log.read_text()}"
        code = processes.run(merging(half_done, out, "--resume"), log)
        (out / "notes.txt").unlink()
        check_finished_or_finished_before(half_done, out, code, log)


def without_working_folder(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.startswith(".largemerge")}


def check_finished_or_finished_before(case: Case, out: Path, code: int, log: Path) -> None:
    """A merge killed while it took its working folder away has finished: there is nothing to go on with."""
    if code != 0:
        assert code == 2 and "holds a finished merge" in log.read_text(), log.read_text()
        assert not (out / ".largemerge" / "manifest.json").exists()
        shutil.rmtree(out / ".largemerge", ignore_errors=True)
    check_unbroken(case, out)


# Resuming what cannot be resumed, or need not be


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A case whose merge was killed after two parts, in `out`; the unbroken one is in `unbroken`."""
    case = make_long_case(tmp_path_factory.mktemp("half"))
    case.write_yaml()
    log = case.folder / "log"
    assert processes.run(merging(case, case.folder / "unbroken"), log) == 0, log.read_text()
    process = processes.start(merging(case, case.folder / "out"), log)
    assert processes.wait_until(lambda: len(journal(case.folder / "out")) >= 2, process)
    process.kill()
    processes.finish(process)
    assert 2 <= len(journal(case.folder / "out")) < len(PARTS)
    return case


@pytest.fixture
def out(half_done: Case, tmp_path: Path) -> Path:
    """A copy of the half-done merge."""
    shutil.copytree(half_done.folder / "out", tmp_path / "out")
    return tmp_path / "out"


def resume(case: Case, out: Path, **changes: Any) -> largemerge.MergeReport:
    options: dict[str, Any] = {"max_shard_bytes": SHARD, "resume": True} | changes
    return largemerge.merge(options.pop("config", case.config), out, **options)


def changed(case: Case, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(case.config))
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        target = config
        for part in parents:
            target = target[int(part)] if part.isdigit() else target[part]  # type: ignore[call-overload]
        target[leaf] = value
    return config


def refused(case: Case, out: Path, *mentions: str, **changes: Any) -> None:
    before = files_in(out)
    with pytest.raises(OutputError) as caught:
        resume(case, out, **changes)
    assert files_in(out) == before
    for text in (*mentions, "--force"):
        assert text in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"parameters__ridge": 0.5}, ("config → parameters → ridge was", "0.5")),
        ({"calibration__batch_size": 3}, ("batch_size was 7 and is 3",)),
        ({"dtype": "bfloat16"}, ("config → dtype was None and is 'bfloat16'",)),
        ({"compute_dtype": "bfloat16"}, ("compute_dtype",)),
        ({"merge_method": "regmean"}, ("merge_method was 'regmean_plusplus' and is 'regmean'",)),
        ({"models__1__parameters__weight": 2.0}, ("config → models[1] → parameters → weight was 1.0 and is 2.0",)),
    ],
)
def test_another_configuration_is_refused(
    half_done: Case, out: Path, changes: dict[str, Any], mentions: tuple[str, ...]
) -> None:
    refused(half_done, out, *mentions, config=changed(half_done, **changes))


def test_another_order_of_candidates_is_refused(half_done: Case, out: Path) -> None:
    config = changed(half_done)
    config["models"].reverse()
    refused(half_done, out, "config → models[0]", config=config)


def test_other_shards_are_refused(half_done: Case, out: Path) -> None:
    refused(half_done, out, "shards", max_shard_bytes=SHARD - 2000)


def rewrite_config(folder: Path) -> None:
    path = folder / "model0" / "config.json"
    path.write_text(path.read_text() + "\n")


def rewrite_data(folder: Path) -> None:
    save_file(tiny_models.inputs("text", 40, 99), folder / "data1.safetensors")


@pytest.mark.parametrize(
    ("file", "change", "mentions"),
    [
        ("model1/model.safetensors", lambda folder: os.utime(folder / "model1" / "model.safetensors"),
         ("inputs → model1 → model.safetensors → modified_ns",)),
        ("model0/config.json", rewrite_config, ("inputs → model0 → config.json → bytes",)),
        ("data1.safetensors", rewrite_data, ("calibration data → model1",)),
    ],
)  # fmt: skip
def test_files_that_changed_since_are_named(
    half_done: Case, out: Path, file: str, change: Callable[[Path], None], mentions: tuple[str, ...]
) -> None:
    path = half_done.folder / file
    content, times = path.read_bytes(), path.stat()
    try:
        change(half_done.folder)
        refused(half_done, out, *mentions)
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    resume(half_done, out)
    check_unbroken(half_done, out)


@pytest.mark.parametrize("torn", [b'{"part": "model.layers.3", "ent', b'{"part"', b"\x00" * 40])
def test_the_end_of_a_torn_journal_is_done_again(half_done: Case, out: Path, torn: bytes) -> None:
    before = parts(out)
    with (out / ".largemerge" / "journal.jsonl").open("ab") as stream:
        stream.write(torn)
    report = resume(half_done, out)
    assert report.resumed_parts == len(before)
    check_unbroken(half_done, out)


def test_a_part_that_is_not_in_the_journal_is_done_again(half_done: Case, out: Path) -> None:
    """Whatever lies in its place in the shards by now."""
    path = out / ".largemerge" / "journal.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert resume(half_done, out).resumed_parts == 1
    check_unbroken(half_done, out)


def test_without_resume_or_force_an_unfinished_merge_is_left_alone(half_done: Case, out: Path) -> None:
    refused(half_done, out, "unfinished merge", "--resume", resume=False)


def test_force_starts_afresh(half_done: Case, out: Path) -> None:
    assert resume(half_done, out, resume=False, force=True).resumed_parts == 0
    check_unbroken(half_done, out)


@pytest.mark.parametrize("exists", [False, True])
def test_resuming_nothing_starts_afresh(half_done: Case, tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "new").mkdir()
    assert resume(half_done, tmp_path / "new").resumed_parts == 0
    check_unbroken(half_done, tmp_path / "new")


def test_resuming_a_finished_merge_is_refused(half_done: Case, tmp_path: Path) -> None:
    shutil.copytree(half_done.folder / "unbroken", tmp_path / "finished")
    refused(half_done, tmp_path / "finished", "holds a finished merge")


def test_resuming_in_a_folder_of_other_things_is_refused(half_done: Case, tmp_path: Path) -> None:
    touch(tmp_path / "other", "notes.txt")
    refused(half_done, tmp_path / "other", "holds no merge to resume", "notes.txt")


def test_a_second_process_is_refused(half_done: Case, out: Path, tmp_path: Path) -> None:
    """While the first one stands still."""
    log = tmp_path / "log"
    before = len(journal(out))
    process = processes.start(merging(half_done, out, "--resume"), log)
    try:
        assert processes.wait_until(lambda: len(journal(out)) > before, process)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        for options in ({"resume": True}, {"resume": False, "force": True}):
            with pytest.raises(OutputError, match="another process is merging into this folder"):
                resume(half_done, out, **options)
        os.kill(process.pid, signal.SIGCONT)
        assert processes.finish(process) == 0, log.read_text()
    finally:
        process.kill()
    check_unbroken(half_done, out)


def test_ctrl_c_prints_a_command_that_goes_on(half_done: Case, tmp_path: Path) -> None:
    """In a folder whose name needs quotes, with options that must be given again."""
    out = tmp_path / "the output"
    environment = os.environ | processes.ENVIRONMENT
    python = [sys.executable, "-m", "largemerge"]
    arguments = [str(argument) for argument in merging(half_done, out, "--device", "cpu")]
    with subprocess.Popen([*python, *arguments], stderr=subprocess.PIPE, text=True, env=environment) as process:
        processes.wait_until(lambda: journal(out) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert not (out / "config.json").exists()
    (line,) = [line.strip() for line in text.splitlines() if line.strip().startswith("largemerge merge ")]
    command = shlex.split(line)
    assert command[0] == "largemerge" and "--resume" in command
    assert processes.run(command[1:], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    check_unbroken(half_done, out)


def test_the_report_of_a_resumed_merge_covers_all_blocks(half_done: Case, out: Path) -> None:
    finished = [line["entry"] for line in journal(out)]
    report = resume(half_done, out).to_json()
    assert report["resumed_parts"] == len(finished)
    assert [report["outside"], *report["blocks"].values()][: len(finished)] == finished
    unbroken = json.loads((half_done.folder / "unbroken" / "merge_report.json").read_text())
    for name, block in unbroken["blocks"].items():
        assert report["blocks"][name]["linears"] == block["linears"]
