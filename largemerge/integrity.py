"""Whether a finished merge is still what was written, and loads: `largemerge verify OUT`.

    OUT/merge_report.json → digests ──► every tensor, header and file of OUT compared
    OUT/config.json, headers        ──► Transformers loads it without numbers: keys and shapes fit the class

Digests are taken while a merge writes (`checkpoint/digests.py`). They find what a disk, a copy or a hand has changed;
they are no protection against forgery, since who changes a file can change the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from largemerge.checkpoint.digests import ALGORITHM, digest_of, digest_of_bytes, digest_of_file
from largemerge.checkpoint.index import open_checkpoint
from largemerge.checkpoint.sentence_modules import transformer_folder, without_modules
from largemerge.checkpoint.side_files import strangers
from largemerge.checkpoint.tensor_files import SafetensorsFile
from largemerge.errors import CheckpointError, LargemergeError, OutputError
from largemerge.model.output_check import try_loading
from largemerge.output import REPORT_FILE, WORKING_FOLDER, check_finished
from largemerge.streams import plain_text
from largemerge.text_files import leads_out, read_json
from largemerge.units import gib

_NUM_READERS = 4
_MAX_PROBLEMS = 20
_FOR_PEOPLE = ("README.md",)  # files that people edit, and that nothing is loaded from


@dataclass(frozen=True)
class FolderCheck:
    """What was found on a finished merge.

    Attributes:
        folder: The folder.
        problems: What is not as it was written, or would not load; empty for a merge that is whole.
        notes: What could not be checked.
        num_tensors: Number of tensors that were compared with their digests.
        num_files: Number of files that were compared with theirs, those of the tensors included.
        num_bytes: Bytes of the weights.
        class_name: The class of Transformers that loads it; empty if none does.
    """

    folder: Path
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    num_tensors: int
    num_files: int
    num_bytes: int
    class_name: str

    def to_json(self) -> dict[str, Any]:
        """The findings as plain JSON values."""
        return {
            "folder": str(self.folder),
            "problems": list(self.problems),
            "notes": list(self.notes),
            "tensors": self.num_tensors,
            "files": self.num_files,
            "bytes": self.num_bytes,
            "class_name": self.class_name,
        }

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows the findings as a table."""
        table = Table(title=f"{self.folder}", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        table.add_row("compared", f"{self.num_tensors} tensors, {gib(self.num_bytes)}; {self.num_files} files")
        table.add_row("loads as", self.class_name or "not checked")
        for note in self.notes:
            table.add_row("note", note)
        for problem in self.problems:
            table.add_row("wrong", problem)
        table.add_row("verdict", "not what was written" if self.problems else "whole: as it was written")
        console.print(table)


def verify_folder(folder: Path, *, trust_remote_code: bool = False) -> FolderCheck:
    """Compares a finished merge with the digests in its report, and lets Transformers load it without numbers.

    Args:
        folder: The output folder of a merge.
        trust_remote_code: Allow the folder's own Python code, where its class needs it.

    Raises:
        OutputError: If the folder holds no finished merge, or one whose report has no digests.
    """
    check_finished(folder)
    digests = _read_digests(folder)
    problems = list(_damage(folder, digests))
    class_name, more, notes = _load(folder, trust_remote_code=trust_remote_code)
    if not problems:  # so the merge, which checked the same before it began, has told this already
        notes, more = [*notes, *(f"as when it was merged: {text}" for text in more)], []
    weights = digests["weights"].values()
    return FolderCheck(
        folder=folder,
        problems=tuple([*problems, *more][:_MAX_PROBLEMS]),
        notes=tuple(notes),
        num_tensors=sum(len(file["tensors"]) for file in weights),
        num_files=len(digests["weights"]) + len(digests["files"]),
        num_bytes=sum(file["bytes"] for file in weights),
        class_name=class_name,
    )


def find_damage(folder: Path) -> list[str]:
    """Lists what in a finished merge is not as it was written.

    Raises:
        OutputError: If its report has no digests.
    """
    return list(_damage(folder, _read_digests(folder)))[:_MAX_PROBLEMS]


def find_damage_of(folder: Path, listed: Sequence[str], *, contents: bool) -> list[str]:
    """Lists what of a finished merge's tensors, and of some files beside them, is not as it was written.

    Args:
        folder: The output folder of a merge.
        listed: Paths in the folder of files that its report must list.
        contents: Read all tensors; otherwise sizes and headers alone are looked at.

    Raises:
        OutputError: If the merge is unfinished, or its report has no digests.
    """
    if (folder / WORKING_FOLDER / "manifest.json").exists():
        raise OutputError(f"{folder} holds an unfinished merge; go on with it: merge … --resume")
    digests = _read_digests(folder)
    problems = []
    for each in listed:
        if each not in digests["files"]:
            problems.append(f"{folder / REPORT_FILE} does not list {each}: it is another merge's")
        elif not (folder / each).is_file() or digest_of_file(folder / each) != digests["files"][each]:
            problems.append(f"{each} is not as it was written")
    for name, expected in digests["weights"].items():
        problems += damage_of_weights(folder / name, name, expected, contents=contents)
    return problems[:_MAX_PROBLEMS]


def _read_digests(folder: Path) -> dict[str, Any]:
    """Reads the digests in a report, and checks that they are what a merge writes."""
    path = folder / REPORT_FILE
    if not path.exists():
        raise OutputError(f"{folder} has no {REPORT_FILE}; expected the folder of a finished merge")
    digests = read_json(path, error=OutputError).get("digests")
    if not isinstance(digests, dict) or not _is_complete(digests):
        raise OutputError(f"{path} has no digests of what was written, or broken ones; merge again to get some")
    if digests["algorithm"] != ALGORITHM:
        raise OutputError(f"{path} has digests by {digests['algorithm']!r}; expected {ALGORITHM}")
    return digests


def _is_complete(digests: Mapping[str, Any]) -> bool:
    def texts(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())

    def inside(names: Mapping[str, Any]) -> bool:
        return not any(map(leads_out, names))

    if not isinstance(digests.get("algorithm"), str):
        return False
    weights, files = digests.get("weights"), digests.get("files")
    if not isinstance(weights, dict) or not isinstance(files, dict) or not texts(files) or not weights:
        return False
    if not inside({**weights, **files}):
        return False
    return all(
        isinstance(file, dict)
        and type(file.get("bytes")) is int
        and isinstance(file.get("header"), str)
        and texts(file.get("tensors"))
        for file in weights.values()
    )


def _damage(folder: Path, digests: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is not as the digests say."""
    for name, digest in digests["files"].items():
        path = folder / name
        if name not in _FOR_PEOPLE and not path.is_file():
            yield f"{name} is not there"
        elif name not in _FOR_PEOPLE and digest_of_file(path) != digest:
            yield f"{name} is not as it was written"
    for name in strangers(folder, (*digests["files"], *digests["weights"])):
        yield f"{name} was not written by the merge, and would be loaded; take it away"
    for name, expected in digests["weights"].items():
        yield from damage_of_weights(folder / name, name, expected)


def damage_of_weights(path: Path, name: str, expected: Mapping[str, Any], *, contents: bool = True) -> Iterator[str]:
    """Yields what is wrong with one file of weights, tensor by tensor if its contents are read.

    Args:
        path: The file.
        name: Its name in messages.
        expected: Its size, and digests of header and tensors, as in the report of a merge.
        contents: Read all tensors; otherwise size and header alone are looked at.
    """
    if not path.is_file():
        yield f"{name} is not there"
        return
    size = path.stat().st_size
    if size != expected["bytes"]:
        yield f"{name} has {size} bytes; {expected['bytes']} were written"
        return
    try:
        file = SafetensorsFile(path)
        header, tensors = file.header, file.tensors()
    except CheckpointError as error:
        yield from (f"{name}: {problem}" for problem in error.problems)
        return
    whole = len(header).to_bytes(8, "little") + header
    if digest_of(whole) != expected["header"]:
        yield f"{name}: its header is not as it was written: names, dtypes, shapes or places of tensors differ"
        return
    if not contents:
        return
    places = {key: (tensors[key].offset or 0, tensors[key].num_bytes) for key in expected["tensors"]}
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        found = pool.map(lambda place: digest_of_bytes(path, *place), places.values())
        for (key, digest), now in zip(expected["tensors"].items(), found, strict=True):
            if now != digest:
                yield f"{name}: {key} is not as it was written"


def _load(folder: Path, *, trust_remote_code: bool) -> tuple[str, list[str], list[str]]:
    """Lets Transformers load a folder without numbers; returns the class, problems and notes."""
    try:
        checkpoint = without_modules(open_checkpoint(folder, folder.name))
    except LargemergeError as error:
        return "", list(error.problems), []
    code = folder / transformer_folder(folder, folder.name)
    verdict = try_loading(checkpoint.config, checkpoint.tensors, code=code, trust_remote_code=trust_remote_code)
    if verdict.not_checked:
        return "", [], [f"not checked: whether it loads ({verdict.not_checked})"]
    problems = [f"{verdict.class_name} does not load it: {verdict.error}"] if verdict.error else []
    problems += [f"{name} is missing: {verdict.class_name} needs it" for name in verdict.missing]
    problems += [f"{name} is not known to {verdict.class_name}" for name in verdict.unexpected]
    problems += [
        f"{name} has the shape {list(found)}; {verdict.class_name} expects {list(wanted)}"
        for name, (found, wanted) in verdict.mismatched.items()
    ]
    return verdict.class_name, problems, []
