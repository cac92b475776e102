"""What will be written where is added up for each disk, and held against what is free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from largemerge.checkpoint import room
from largemerge.checkpoint.room import INTERMEDIATE_FOLDER, Need, allocated_bytes, free_bytes, room_problems

MIB = 2**20


@pytest.fixture
def ten_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all disks have 10 MiB free."""
    monkeypatch.setattr(room, "free_bytes", lambda _: 10 * MIB)


@pytest.mark.usefixtures("ten_mib")
def test_needs_on_one_disk_are_added_up(tmp_path: Path) -> None:
    output, states = Need(tmp_path / "out", 6 * MIB, "the output"), Need(tmp_path / "scratch", 5 * MIB, "hidden states")
    assert room_problems([output]) == room_problems([states]) == []
    (problem,) = room_problems([output, states])
    assert (
        f"6.0 MiB for the output in {tmp_path / 'out'}, 5.0 MiB for hidden states in {tmp_path / 'scratch'}" in problem
    )
    assert "10.0 MiB are free" in problem and "make room for 1.0 MiB more" in problem


@pytest.mark.usefixtures("ten_mib")
def test_needs_on_other_disks_are_not(tmp_path: Path) -> None:
    assert (
        room_problems([Need(tmp_path, 9 * MIB, "the output"), Need(Path("/dev/shm"), 9 * MIB, "hidden states")]) == []
    )


@pytest.mark.usefixtures("ten_mib")
def test_what_is_there_already_counts(tmp_path: Path) -> None:
    need = Need(tmp_path, 12 * MIB, "the output", tmp_path / ".largemerge")
    assert room_problems([need])
    inner = tmp_path / ".largemerge" / INTERMEDIATE_FOLDER
    inner.mkdir(parents=True)
    (inner / "model.safetensors").write_bytes(os.urandom(3 * MIB))
    assert room_problems([need]), "results that the merge is made of stay to its end"
    (tmp_path / ".largemerge" / "model.safetensors").write_bytes(os.urandom(3 * MIB))
    assert room_problems([need]) == []
    assert 3 * MIB <= allocated_bytes(tmp_path / ".largemerge") < 4 * MIB


def test_a_system_that_does_not_say_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    huge = [Need(tmp_path, 1 << 60, "the output")]
    assert room_problems(huge), "else this would not be a test"
    monkeypatch.setattr(os, "statvfs", fails)
    assert free_bytes(tmp_path) is None and room_problems(huge) == []
    assert room_problems([Need(tmp_path / "a\0b", 1 << 60, "the output")]) == []
