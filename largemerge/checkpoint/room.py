"""Room on disks: what a merge will write where, and whether there is room for all of it.

What lies on one file system is added up. What a merge has there already, from a run that it resumes, counts as
there; what is replaced only at the end, by `--force`, does not. A file system that does not say how much is free, or
lies by a quota, is found out by writing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from largemerge.checkpoint.locate import existing_folder
from largemerge.units import gib

BYTES_OF_REPORT = 2 << 10
"""Bytes of report, index and headers, for every tensor."""
INTERMEDIATE_FOLDER = "intermediate"
"""Folder in the working folder, for results of merges that this one is made of."""


@dataclass(frozen=True)
class Need:
    """Something that will be written.

    Attributes:
        path: Folder that it will lie in, which need not be there yet.
        num_bytes: Bytes that it will take.
        what: Words for it, in a message.
        reuses: Folder whose files are part of it already, or go before it is written, but for results of earlier
            merges in it; `None` if there is none.
    """

    path: Path
    num_bytes: int
    what: str
    reuses: Path | None = None


def room_problems(needs: Iterable[Need]) -> list[str]:
    """Says which file systems have too little room for all that will be written to them."""
    by_device: dict[int, list[Need]] = {}
    for need in needs:
        device = _device(need.path)
        if device is not None and need.num_bytes > 0:
            by_device.setdefault(device, []).append(need)
    return [problem for on_one in by_device.values() for problem in _problems(on_one)]


def _problems(needs: list[Need]) -> Iterator[str]:
    free = free_bytes(needs[0].path)
    if free is None:
        return
    present = sum(allocated_bytes(folder) for folder in {need.reuses for need in needs} if folder is not None)
    missing = sum(need.num_bytes for need in needs) - free - present
    if missing <= 0:
        return
    parts = ", ".join(f"{gib(need.num_bytes)} for {need.what} in {need.path}" for need in needs)
    there = f" beside {gib(present)} that are there already" if present else ""
    yield (
        f"too little room on the disk: needs {parts}; {gib(free)} are free{there}; make room for {gib(missing)} more, "
        "or choose a folder on another disk"
    )


def free_bytes(path: Path) -> int | None:
    """Bytes that may still be written where a folder is, or would be; `None` where the system does not say."""
    try:
        found = os.statvfs(existing_folder(path))
    except (OSError, ValueError):
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def allocated_bytes(folder: Path) -> int:
    """Bytes of disk that the files in a folder take, without results of earlier merges; 0 where there is none."""
    total = 0
    for parent, folders, names in os.walk(folder, onerror=lambda _: None):
        if INTERMEDIATE_FOLDER in folders and Path(parent) == folder:
            folders.remove(INTERMEDIATE_FOLDER)
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except OSError:
                continue
    return total


def _device(path: Path) -> int | None:
    """Number of the file system of a folder that is, or would be, there."""
    try:
        return os.stat(existing_folder(path)).st_dev
    except (OSError, ValueError):
        return None
