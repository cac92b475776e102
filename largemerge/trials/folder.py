"""The folder of a comparison: whose it is, what is noted in it, and what the notes depend on.

    OUT/.largemerge-comparison    written first: what lies here may be replaced and deleted
        models.json               scores of the models that are merged
        trials/NAME.json          scores of a trial; NAME/ its weights, until they have been measured
        grams/                    Gram matrices that trials share
        best/, best.json          the best merge, and which trial it is

A note holds the key of what it depends on. One of another key, of another shape, or that cannot be read is as if it had
never been: what it stands for is done again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largemerge.checkpoint.locate import split_adapters, split_reference
from largemerge.checkpoint.writer import write_atomically
from largemerge.errors import OutputError
from largemerge.text_files import json_text, read_json

MARK = ".largemerge-comparison"
"""The file that tells a comparison's folder from a user's own."""
_MARK_TEXT = "A folder of `largemerge compare`, which replaces and deletes what lies here.\n"
_LONGEST_PATH = 4096


@dataclass(frozen=True)
class ComparisonFolder:
    """The folder of a comparison.

    Attributes:
        path: The folder, OUT.
    """

    path: Path

    @property
    def models(self) -> Path:
        """The note of the models that are merged."""
        return self.path / "models.json"

    @property
    def grams(self) -> Path:
        """Folder of Gram matrices that trials share."""
        return self.path / "grams"

    @property
    def best(self) -> Path:
        """Folder of the best merge."""
        return self.path / "best"

    def trial(self, name: str) -> Path:
        """Folder of the weights of a trial."""
        return self.path / "trials" / safe_name(name)

    def note_of(self, name: str) -> Path:
        """The note of a trial, or of what trials share."""
        return self.path / "trials" / f"{safe_name(name)}.json"

    def problem(self) -> str | None:
        """Says why a comparison cannot be made here; `None` if it can."""
        if not os.path.lexists(self.path):
            return None
        if not self.path.is_dir():
            return f"{self.path}: is a file; expected a folder for the comparison"
        names = sorted(path.name for path in self.path.iterdir() if path.name != f".{MARK}.partial")
        if not names or MARK in names:
            return None
        return (
            f"{self.path}: holds {names[0]}, and is no folder of an earlier comparison; compare replaces and deletes "
            "what lies in its folder: expected --out with a new or an empty one"
        )

    def check(self) -> None:
        """Checks that a comparison can be made here.

        Raises:
            OutputError: If the folder holds something else.
        """
        problem = self.problem()
        if problem is not None:
            raise OutputError(problem)

    def open(self) -> None:
        """Makes the folder, and marks it.

        Raises:
            OutputError: If it holds something else.
        """
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / MARK, _MARK_TEXT)
        (self.path / "trials").mkdir(exist_ok=True)

    def known(self, note: Path, key: str) -> Any:
        """What an earlier run has found; `None` if it has not, or depended on something else."""
        return _read_note(note).get("found") if _read_note(note).get("key") == key else None

    def begun(self, note: Path, key: str) -> bool:
        """Whether an earlier run has begun the same, and not finished it."""
        found = _read_note(note)
        return found.get("key") == key and found.get("found") is None

    def write(self, note: Path, key: str, found: Any) -> None:
        """Notes what was found, or with `None` that it is begun."""
        write_atomically(note, json_text({"key": key, "found": found}, indent=1) + "\n")

    def holds_best(self, key: str) -> bool:
        """Whether the best merge is that of the trial with this key, as an earlier run has left it."""
        return (self.best / "config.json").is_file() and self.known(self.best.with_suffix(".json"), key) is not None

    def keep_best(self, name: str, key: str, *, link: bool) -> None:
        """Makes a trial's weights the best merge, in the place of an earlier one.

        Args:
            name: Name of the trial.
            key: Its key.
            link: Whether the weights stay in the trial's folder, too, and `best` is a link to them.
        """
        note = self.best.with_suffix(".json")
        note.unlink(missing_ok=True)  # never a note of what is not there
        if self.best.is_symlink():
            self.best.unlink()
        elif self.best.exists():
            shutil.rmtree(self.best)
        if link:
            self.best.symlink_to(self.trial(name).relative_to(self.path), target_is_directory=True)
        else:
            os.replace(self.trial(name), self.best)
        self.write(note, key, {"trial": name})


def _read_note(path: Path) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = read_json(path, error=OutputError)
    except OutputError:
        return {}
    return found


def safe_name(name: str) -> str:
    """Returns a file name for any name, told apart by a digest from others that look alike."""
    plain = "".join(letter if letter.isalnum() or letter in "._=-" else "_" for letter in name)
    return f"{plain[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def fingerprint(tasks: Mapping[str, Any], config: Mapping[str, Any], out: Path, versions: Mapping[str, str]) -> str:
    """Describes what trials depend on beside their own settings: tasks, versions, and files by size and time.

    Args:
        tasks: The evaluation, as plain JSON values.
        config: The configuration that is compared, likewise, of which only the files count.
        out: The folder of the comparison, whose files never count as part of a larger folder.
        versions: Versions of all that decides the results, by package.
    """
    inside = out.resolve()
    files = {path: _files(Path(path), inside) for path in sorted({*_paths(tasks), *_paths(config)})}
    return json_text([tasks, files, dict(versions)])


def _paths(value: Any) -> Iterator[str]:
    """Yields all texts that are absolute paths of something, models apart from their adapters.

    What stands under `memory` is left out: folders of scratch files.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _paths(each) if key != "memory" else ()
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _paths(each)
    elif isinstance(value, str) and value.startswith("/") and len(value) < _LONGEST_PATH and "\0" not in value:
        model, adapters = split_reference(value)
        for each in (model, *(split_adapters(adapters) if adapters else ())):
            path = os.path.abspath(each)
            if path != os.path.sep and os.path.lexists(path):  # a separator of answers may be `/`
                yield path


def _files(path: Path, out: Path) -> list[tuple[str, int, int]]:
    """Lists a file, or all files in a folder: names, sizes and times of the last change."""
    found: list[tuple[str, int, int]] = []
    if not path.is_dir():
        places = [path]
    else:
        places = []
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(each for each in folders if (Path(folder) / each).resolve() != out)
            places += [Path(folder) / name for name in sorted(names)]
    for place in places:
        try:
            status = place.stat()
        except OSError:  # a dangling link, a file that has gone: it is not there
            continue
        found.append((str(place), status.st_size, status.st_mtime_ns))
    return found
