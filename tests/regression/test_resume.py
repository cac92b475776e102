"""Going on with an unfinished merge, and what is refused because something has changed since."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_models
import torch
from cases import Case, MakeCase, files_in, touch, weights_in
from processes import PARTS, SHARD, check_unbroken, journal, make_long_case, merging, parts
from safetensors.torch import save_file

import largemerge
from largemerge import OutputError


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A case whose merge was killed right before its third part was noted, in `out`; unbroken in `unbroken`."""
    case = make_long_case(tmp_path_factory.mktemp("half"))
    case.write_yaml()
    log = case.folder / "log"
    assert processes.run(merging(case, case.folder / "unbroken"), log, kill_at=0) == 0, log.read_text()
    notes = [number for number, line in enumerate(processes.operations(log), start=1) if "journal.jsonl" in line]
    assert len(notes) == len(PARTS) + 1  # the last one takes it away
    assert processes.run(merging(case, case.folder / "out"), log, notes[2]) == -signal.SIGKILL
    assert parts(case.folder / "out") == PARTS[:2]
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


def test_memory_limits_may_change_on_the_way(half_done: Case, out: Path, tmp_path: Path) -> None:
    resume(half_done, out, config=changed(half_done, memory={"disk": str(tmp_path / "scratch"), "host": "8GiB"}))
    assert weights_in(out).keys() == weights_in(half_done.folder / "unbroken").keys()
    for name, tensor in weights_in(half_done.folder / "unbroken").items():
        assert torch.equal(weights_in(out)[name], tensor), name


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
    refused(half_done, out, "shards", max_shard_bytes=SHARD // 2)


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


def test_a_merge_killed_again_after_a_torn_journal(half_done: Case, out: Path, tmp_path: Path) -> None:
    """What is noted after the torn line must stand in a line of its own."""
    log = tmp_path / "log"
    before = parts(out)
    with (out / ".largemerge" / "journal.jsonl").open("ab") as stream:
        stream.write(b'{"part": "model.layers.3", "ent')
    assert processes.run(merging(half_done, out, "--resume"), log, kill_at=14) == -signal.SIGKILL
    assert len(before) < len(parts(out)) < len(PARTS)
    resume(half_done, out)
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
    process = processes.start(merging(half_done, out, "--resume"), log, kill_at=8, number=signal.SIGSTOP)
    try:
        processes.wait_until(lambda: log.exists() and len(processes.operations(log)) == 8, process)
        for options in ({"resume": True}, {"resume": False, "force": True}):
            with pytest.raises(OutputError, match="another process is merging into this folder"):
                resume(half_done, out, **options)
        assert process.pid is not None and process.is_alive()
        os.kill(process.pid, signal.SIGCONT)
        assert processes.finish(process) == 0, log.read_text()
    finally:
        process.kill()
    check_unbroken(half_done, out)


def test_the_report_of_a_resumed_merge_covers_all_blocks(half_done: Case, out: Path) -> None:
    finished = [line["entry"] for line in journal(out)]
    report = resume(half_done, out).to_json()
    assert report["resumed_parts"] == len(finished)
    assert [report["outside"], *report["blocks"].values()][: len(finished)] == finished
    unbroken = json.loads((half_done.folder / "unbroken" / "merge_report.json").read_text())
    for name, block in unbroken["blocks"].items():
        assert report["blocks"][name]["linears"] == block["linears"]


def test_a_manifest_that_cannot_be_read_is_told(make_case: MakeCase) -> None:
    case = make_case()
    working = case.folder / "out" / ".largemerge"
    working.mkdir(parents=True)
    (working / "manifest.json").write_text("{")
    with pytest.raises(OutputError, match=r"manifest\.json cannot be read.*--force"):
        largemerge.merge(case.config, case.folder / "out", resume=True)
