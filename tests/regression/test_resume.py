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
from cases import Case, files_in, touch, weights_in
from processes import PARTS, SHARD, check_unbroken, journal, make_long_case, merging, parts
from safetensors import safe_open
from safetensors.torch import save_file

import largemerge
from largemerge import MergeError, OutputError
from largemerge.output import OutputFolder


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
        ({"calibration__batch_size": 3}, ("batch_size was 21 and is 3",)),
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
    refused(half_done, out, "unfinished run", "--resume", resume=False)


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
    refused(half_done, tmp_path / "other", "holds nothing to resume", "notes.txt")


def test_a_second_process_is_refused(half_done: Case, out: Path, tmp_path: Path) -> None:
    """While the first one stands still."""
    log = tmp_path / "log"
    process = processes.start(merging(half_done, out, "--resume"), log, kill_at=8, number=signal.SIGSTOP)
    try:
        processes.wait_until(lambda: log.exists() and len(processes.operations(log)) == 8, process)
        for options in ({"resume": True}, {"resume": False, "force": True}):
            with pytest.raises(OutputError, match="another process is writing into this folder"):
                resume(half_done, out, **options)
        assert process.pid is not None and process.is_alive()
        os.kill(process.pid, signal.SIGCONT)
        assert processes.finish(process) == 0, log.read_text()
    finally:
        process.kill()
    check_unbroken(half_done, out)


def test_the_report_of_a_resumed_merge_covers_all_blocks(half_done: Case, out: Path) -> None:
    finished = [{key: value for key, value in line["entry"].items() if key != "digests"} for line in journal(out)]
    report = resume(half_done, out).to_json()
    assert report["resumed_parts"] == len(finished)
    assert [report["outside"], *report["blocks"].values()][: len(finished)] == finished
    unbroken = json.loads((half_done.folder / "unbroken" / "merge_report.json").read_text())
    for name, block in unbroken["blocks"].items():
        assert report["blocks"][name]["linears"] == block["linears"]


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"null", b"\x00" * 40, b"[" * 100_000, b"\xff\xfe"])
def test_a_manifest_that_is_not_as_written_is_told(half_done: Case, out: Path, content: bytes) -> None:
    (out / ".largemerge" / "manifest.json").write_bytes(content)
    refused(half_done, out, "manifest.json is not as a merge has written it")


def test_an_edited_manifest_is_told(half_done: Case, out: Path) -> None:
    path = out / ".largemerge" / "manifest.json"
    path.write_text(path.read_text().replace('"replaces": false', '"replaces": true'))
    refused(half_done, out, "manifest.json is not as a merge has written it")


# What lies on the disk is not what the journal says


def some_tensor(out: Path) -> tuple[Path, int]:
    """The shard that holds a tensor of the first finished block, and where it begins."""
    name = next(name for name in journal(out)[1]["entry"]["digests"] if name.endswith("q_proj.weight"))
    for shard in sorted((out / ".largemerge").glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            if name in file.keys():  # noqa: SIM118 (it is no mapping)
                raw = shard.read_bytes()
                length = int.from_bytes(raw[:8], "little")
                return shard, 8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    raise AssertionError(name)


def flip(shard: Path, place: int) -> None:
    raw = bytearray(shard.read_bytes())
    raw[place] ^= 1
    shard.write_bytes(raw)


def swap(shard: Path, place: int) -> None:
    other = next(each for each in sorted(shard.parent.glob("*.safetensors")) if each != shard)
    first, second = shard.read_bytes(), other.read_bytes()
    shard.write_bytes(second)
    other.write_bytes(first)


DAMAGES: dict[str, Callable[[Path, int], object]] = {
    "deleted": lambda shard, place: shard.unlink(),
    "cut": lambda shard, place: os.truncate(shard, place + 5),
    "emptied": lambda shard, place: os.truncate(shard, 0),
    "zeroed": lambda shard, place: shard.write_bytes(bytes(shard.stat().st_size)),
    "flipped": flip,
    "swapped": swap,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_lost_between_two_runs_is_done_again(half_done: Case, out: Path, damage: str) -> None:
    DAMAGES[damage](*some_tensor(out))
    report = resume(half_done, out)
    assert report.resumed_parts < len(PARTS[:2])
    check_unbroken(half_done, out)
    redone = json.loads((out / "merge_report.json").read_text())["redone_parts"]
    assert any(text.startswith("model.layers.0 is done again: ") for text in redone), redone


@pytest.mark.parametrize("damage", ["deleted", "flipped"])
def test_what_was_lost_after_a_crash_at_the_end_is_done_again(
    half_done: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """When shards have gone to their places already, and all but `config.json`."""
    out = tmp_path / "out"
    move = OutputFolder._move

    def crash(folder: OutputFolder, source: Path, name: str) -> None:
        if name == "config.json":
            raise KeyboardInterrupt
        move(folder, source, name)

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "_move", crash)
        with pytest.raises(KeyboardInterrupt):
            resume(half_done, out)
    shard = sorted(out.glob("*.safetensors"))[2]
    DAMAGES[damage](shard, shard.stat().st_size - 3)
    resume(half_done, out)
    check_unbroken(half_done, out)


@pytest.mark.parametrize("line", [b"garbage\n", b"\x00\x00\n", b"{}\n", b"[]\n", b"null\n", b"[" * 50_000 + b"\n"])
def test_a_spoiled_line_of_the_journal_says_nothing(half_done: Case, out: Path, line: bytes) -> None:
    path = out / ".largemerge" / "journal.jsonl"
    _, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(line + second + line)
    assert resume(half_done, out).resumed_parts == 1
    check_unbroken(half_done, out)


def test_an_edited_line_of_the_journal_says_nothing(half_done: Case, out: Path) -> None:
    path = out / ".largemerge" / "journal.jsonl"
    path.write_text(path.read_text().replace('"part": "outside"', '"part": "model.layers.2"'))
    assert resume(half_done, out).resumed_parts == 1
    check_unbroken(half_done, out)


def test_side_files_that_changed_since_are_named(half_done: Case, out: Path) -> None:
    path = half_done.folder / "model0" / "generation_config.json"
    before = path.read_bytes()
    try:
        path.write_text('{"max_length": 7}')
        refused(half_done, out, "side files → generation_config.json")
    finally:
        path.write_bytes(before)


def test_an_input_that_changes_meanwhile_is_noticed(
    half_done: Case, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = half_done.folder / "model1" / "model.safetensors"
    times = path.stat()
    check = OutputFolder.written

    def touch_it(folder: OutputFolder, *rest: Any) -> Any:
        os.utime(path)
        return check(folder, *rest)

    monkeypatch.setattr(OutputFolder, "written", touch_it)
    try:
        with pytest.raises(MergeError, match=r"model1/model\.safetensors has changed, or was deleted, while"):
            resume(half_done, out)
    finally:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not (out / "config.json").exists()
