"""Builds the page of a finished merge, and writes it to a file.

read_report → Facts → sections ──► Page ──► OUT/merge_report.html, or another file
"""

from __future__ import annotations

from pathlib import Path

from largemerge.checkpoint.writer import write_atomically
from largemerge.errors import OutputError
from largemerge.merge_page import sections
from largemerge.merge_page.facts import Facts, read_evaluation, read_report
from largemerge.output import PAGE_FILE
from largemerge.pages.page import Page
from largemerge.text_files import os_reason

_SUFFIXES = (".html", ".htm")
_FIRST, _MADE_BY, _NUM_LAST_BYTES = b"<!doctype html>", "Made by largemerge report", 1000
"""What tells a page of a merge from any other file: its beginning, and the words in its last bytes."""


def build_page(out: Path) -> Page:
    """Builds the page of the merge in a folder.

    Args:
        out: The folder; it is only read.

    Raises:
        OutputError: If it holds no finished merge, or a report of another shape.
    """
    report = read_report(out)
    facts = Facts(report, read_evaluation(out))
    made = [
        sections.at_a_glance(facts),
        *sections.evaluation(facts),
        sections.drift(facts),
        sections.block_table(facts),
        sections.movement(facts),
        sections.solves(facts),
        sections.data(facts),
        sections.time_and_memory(facts),
        sections.tensors(facts),
        sections.notes(facts),
        sections.origin(facts),
    ]
    version = report.versions.get("largemerge", "of unknown version")
    return Page(
        title=f"{facts.method}: {len(facts.candidates)} models → {out.resolve().name}",
        summary=f"What a merge did, block by block and candidate by candidate. Merged with largemerge {version}.",
        sections=[section for section in made if section is not None],
        footer=f"{_MADE_BY}, from merge_report.json. This file needs nothing beside it.",
    )


def write_page(out: Path, output: Path | None = None) -> Path:
    """Writes the page of a merge; an earlier page that is there is replaced, as a whole.

    Args:
        out: The folder of a finished merge.
        output: The file; `None` for `merge_report.html` in the folder.

    Returns:
        The file.

    Raises:
        OutputError: If the folder holds no finished merge, or the file cannot be written, or is something else than a
            page.
    """
    path = out / PAGE_FILE if output is None else output
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected a file for the page, such as {path / PAGE_FILE}")
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path} does not end in .html; expected a file for the page, such as {path.stem}.html")
    text = build_page(out).html()
    if path.is_file() and not _is_page(path):
        raise OutputError(f"{path} is there, and is no page of a merge; delete it, or choose another file for --output")
    try:
        write_atomically(path, text)
    except OSError as error:
        advice = "--output FILE writes it elsewhere" if output is None else "choose another file for --output"
        raise OutputError(f"{path} cannot be written: {os_reason(error)}; {advice}") from None
    return path


def _is_page(path: Path) -> bool:
    """Whether a file is the page of a merge, by its first and its last words."""
    with path.open("rb") as stream:
        begin = stream.read(len(_FIRST))
        stream.seek(max(0, path.stat().st_size - _NUM_LAST_BYTES))
        return begin == _FIRST and _MADE_BY.encode() in stream.read(_NUM_LAST_BYTES)
