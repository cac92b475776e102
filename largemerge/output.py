"""The output folder, from its first byte to a finished checkpoint, crashes and resumes in between.

    OUT/.largemerge/              while the merge runs
        manifest.json             config, fingerprints of all inputs and data, versions, layout
        journal.jsonl             one line for each finished part, appended once its bytes are on disk
        model-….safetensors       shards under way
        lock                      held by the running process
        side/                     the files beside the weights, on their way
        finishing                 there from when the first file goes to its place in OUT
        intermediate/             results of earlier merges, where one configuration has several

A line of the journal holds the digests of all tensors of its part, and one of itself. When a merge is resumed, a line
that does not hold, and a part whose bytes are not on the disk as they were written, are as if they had never been.

At the end: shards, side files, the index, `config.json` last, then the working folder goes. A folder without
`config.json`, or with a working folder, is no finished merge. The report has the digests of all files; `integrity.py`
holds a finished merge against them.

Where ranks share a merge, all must agree on the manifest; rank 0 opens the folder and writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from largemerge.checkpoint.digests import ALGORITHM, digest_of, digest_of_bytes, digest_of_file
from largemerge.checkpoint.index import Checkpoint, read_bytes
from largemerge.checkpoint.locate import existing_folder
from largemerge.checkpoint.quantized import fold_quantized
from largemerge.checkpoint.room import INTERMEDIATE_FOLDER as INTERMEDIATE_FOLDER
from largemerge.checkpoint.sentence_modules import split_name
from largemerge.checkpoint.side_files import SideFiles, remove_checkpoint, strangers
from largemerge.checkpoint.tensor_files import SafetensorsFile
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.checkpoint.writer import Shard, sync, weight_index, write_atomically
from largemerge.distributed.ranks import Ranks
from largemerge.errors import LargemergeError, MergeError, OutputError, advised
from largemerge.machine import scratch_folder
from largemerge.text_files import json_text

_MAX_PROBLEMS = 20
WORKING_FOLDER = ".largemerge"
REPORT_FILE = "merge_report.json"
"""The report of a finished merge, with the digests of its files."""
PAGE_FILE = "merge_report.html"
"""The page that shows it, if somebody has asked for one."""
EVALUATION_FILES = ("evaluation.json", "evaluation.csv", "evaluation.html")
"""What an evaluation of the merge has found, if there was one."""
TEMPERATURE_FILE = "temperature_report.json"
"""What has been found of a model that was written with another temperature."""
_SIDE_FOLDER, _FINISHING = "side", "finishing"
_ALWAYS_WRITTEN = ("config.json", "README.md", "largemerge_config.yaml", "model.safetensors.index.json", REPORT_FILE)
_WORKING_FILES = ("manifest.json", "journal.jsonl", "lock", _FINISHING)
_NUM_READERS = 4  # threads that compare digests


@dataclass(frozen=True)
class PartKind:
    """Parts of a merge whose tensors go to the same files.

    Attributes:
        parts: Their names in the journal.
        folder: Folder of the files while they are written.
        shards: The files.
        sizes: Bytes of every tensor in them, by name on disk.
        key: What an entry of the journal calls their digests; `digests` for those of the output.
    """

    parts: Collection[str]
    folder: Path
    shards: tuple[Shard, ...]
    sizes: Mapping[str, int]
    key: str = "digests"


@dataclass
class OutputFolder:
    """The output of one merge, begun or resumed.

    Attributes:
        path: The folder, OUT.
        replaces: Whether an earlier checkpoint here is to be replaced at the end.
        entries: Entries of the journal by the name of the finished part.
        redone: Why parts that an earlier run had finished are done again.
    """

    path: Path
    replaces: bool
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    redone: list[str] = field(default_factory=list)

    @property
    def working(self) -> Path:
        """Path of the working folder."""
        return self.path / WORKING_FOLDER

    def record(self, part: str, entry: Mapping[str, Any]) -> None:
        """Notes in the journal that a part is finished; its bytes must be on disk by now."""
        with _open_plain(self.working / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as stream:
            stream.write(_checked_json({"part": part, "entry": entry}).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.entries[part] = dict(entry)

    def drop_damaged(self, kinds: Iterable[PartKind]) -> None:
        """Forgets what a resumed run cannot rely on: parts that nobody knows, or whose bytes are not as written.

        Args:
            kinds: All kinds of parts. Sizes and headers of their files are put right.
        """
        known: set[str] = set()
        for kind in kinds:
            known.update(kind.parts)
            wanted = {part: self.entries[part].get(kind.key, {}) for part in kind.parts if part in self.entries}
            if not wanted:
                continue
            damaged = self._damaged(kind, wanted)
            if damaged and self._is_finishing:
                self._take_back(kind.shards)
            for part, reason in damaged.items():
                del self.entries[part]
                self.redone.append(f"{part} is done again: {reason}")
        for part in sorted(set(self.entries) - known):
            del self.entries[part]

    def _damaged(self, kind: PartKind, wanted: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Compares tensors on the disk with their digests; returns why a part is not as it was written."""
        places = {
            name: (self._place(kind.folder, shard), offset, kind.sizes[name])
            for shard in kind.shards
            for name, offset in shard.offsets.items()
        }
        for shard in kind.shards:
            _mend_frame(self._place(kind.folder, shard), shard)
        with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="largemerge-check") as pool:

            def reason(item: tuple[str, Mapping[str, str]]) -> str | None:
                for name, digest in item[1].items():
                    file, offset, num_bytes = places[name]
                    found = digest_of_bytes(file, offset, num_bytes)
                    if found != digest:
                        return f"{name} in {file} is {'not as it was written' if found is not None else 'not there'}"
                return None

            reasons = zip(wanted, pool.map(reason, wanted.items()), strict=True)
            return {part: text for part, text in reasons if text is not None}

    @property
    def _is_finishing(self) -> bool:
        """Whether files have begun to go to their places; only then is a shard in OUT one of this merge."""
        return (self.working / _FINISHING).exists()

    def _place(self, folder: Path, shard: Shard) -> Path:
        """Path of a shard: in the folder where it is written, or, where a crash came late, at its place in OUT."""
        inside = folder / shard.file_name
        return self.path / shard.file_name if self._is_finishing and not inside.exists() else inside

    def _take_back(self, shards: Iterable[Shard]) -> None:
        """Moves shards that are at their places back to where they are written."""
        for shard in shards:
            moved, inside = self.path / shard.file_name, self.working / shard.file_name
            if not inside.exists() and moved.exists():
                inside.parent.mkdir(parents=True, exist_ok=True)
                moved.replace(inside)
        sync(self.working)
        (self.working / _FINISHING).unlink()

    def written(self, shards: tuple[Shard, ...], config: Mapping[str, Any]) -> Checkpoint:
        """Opens the finished shards, wherever a crash has left them, as a checkpoint that can be read.

        Args:
            shards: All shards, written and flushed.
            config: Contents of the output's `config.json`.
        """
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            found = SafetensorsFile(self._place(self.working, shard)).tensors()
            tensors |= {name: found[split_name(name)[1]] for name in shard.offsets}
        return Checkpoint("output", self.path, config, fold_quantized(tensors, config, "output", read_bytes), {})

    def finish(
        self,
        shards: tuple[Shard, ...],
        write_side_files: Callable[[Path], None],
        config: str,
        report: Mapping[str, Any],
        inner: str = "",
    ) -> dict[str, Any]:
        """Makes the folder a checkpoint; may be repeated after a crash at any point.

        Everything is written as a whole before the first file goes to its place. Until then, what an earlier
        checkpoint here consists of is untouched.

        Args:
            shards: All shards, written and flushed.
            write_side_files: Writes tokenizer, model card, … into a folder.
            config: Text of `config.json`, which comes last.
            report: What `merge_report.json` will hold, beside the digests of all files.
            inner: Folder inside this one for the transformer and its config, in sentence-transformers' old layout.

        Returns:
            What `merge_report.json` holds beside `report`: digests, and why parts were done again.

        Raises:
            MergeError: If the files of the weights are not what was laid out.
            OutputError: If something is in the way of a file.
        """
        self.check_written(shards)
        side = self._empty_side()
        (side / inner).mkdir(parents=True, exist_ok=True)
        write_side_files(side)
        index = weight_index(shards)
        if index is not None:
            (side / inner / "model.safetensors.index.json").write_text(index, encoding="utf-8")
        (side / inner / "config.json").write_text(config, encoding="utf-8")
        digests = {str(file.relative_to(side)): digest_of_file(file) for file in _files_below(side)}
        more = {"redone_parts": self.redone, "digests": self._digests(shards, digests)}
        (side / REPORT_FILE).write_text(json_text({**report, **more}, indent=2) + "\n", encoding="utf-8")
        self._put_in_place(side, shards, [str(PurePosixPath(inner, "config.json"))], remove_checkpoint)
        return more

    def finish_records(
        self, shards: tuple[Shard, ...], records: Mapping[str, str], remove: Callable[[Path, Collection[Path]], None]
    ) -> None:
        """Makes the folder one of tensors that are no checkpoint; may be repeated after a crash, as `finish`.

        Args:
            shards: All files of tensors, written and flushed.
            records: Texts by path in the folder, which come last: they say that the tensors are there.
            remove: Removes what an earlier run has left here, but for some files; called where it is to be replaced.

        Raises:
            MergeError: If the files of tensors are not what was laid out.
            OutputError: If something is in the way of a file.
        """
        self.check_written(shards)
        side = self._empty_side()
        for name, text in records.items():
            (side / name).parent.mkdir(parents=True, exist_ok=True)
            (side / name).write_text(text, encoding="utf-8")
        self._put_in_place(side, shards, list(records), remove)

    def _empty_side(self) -> Path:
        """Makes the folder for the files beside the tensors anew."""
        side = self.working / _SIDE_FOLDER
        shutil.rmtree(side, ignore_errors=True)
        side.mkdir(parents=True)
        return side

    def _put_in_place(
        self,
        side: Path,
        shards: tuple[Shard, ...],
        last: Sequence[str],
        remove: Callable[[Path, Collection[Path]], None],
    ) -> None:
        """Moves the shards and the files in `side` to their places, those of `last` after all others are there."""
        staged = [str(file.relative_to(side)) for file in _files_below(side)]
        self.check_places([*staged, *(shard.file_name for shard in shards)])
        for file in _files_below(side):
            sync(file)
        write_atomically(self.working / _FINISHING, "")
        if self.replaces:
            names = {shard.file_name for shard in shards}
            remove(self.path, {self.path / name for name in names if not (self.working / name).exists()})
            for name in (PAGE_FILE, *EVALUATION_FILES, TEMPERATURE_FILE):  # they show the earlier merge
                (self.path / name).unlink(missing_ok=True)
        for shard in shards:
            if self._place(self.working, shard) != self.path / shard.file_name:
                self._move(self.working, shard.file_name)
        for name in staged:
            if name not in last:
                self._move(side, name)
        self._sync_folders([*staged, *(shard.file_name for shard in shards)])
        _check_strangers(self.path, [*staged, *(shard.file_name for shard in shards)])
        for name in last:
            self._move(side, name)
        self._sync_folders(last)
        clean_up(self.working)

    def _digests(self, shards: Iterable[Shard], side_files: Mapping[str, str]) -> dict[str, Any]:
        """What the report says of all files, for `integrity.py`."""
        return {"algorithm": ALGORITHM, "weights": self.digests_of(shards), "files": dict(side_files)}

    def digests_of(self, shards: Iterable[Shard]) -> dict[str, dict[str, Any]]:
        """Size, and digests of header and tensors, of every shard, by its name; for `integrity.damage_of_weights`."""
        tensors = {name: digest for entry in self.entries.values() for name, digest in entry.get("digests", {}).items()}
        return {
            shard.file_name: {
                "bytes": shard.num_bytes,
                "header": digest_of(shard.header),
                "tensors": {split_name(name)[1]: tensors[name] for name in shard.offsets},
            }
            for shard in shards
        }

    def check_places(self, names: Iterable[str]) -> None:
        """Checks that nothing but a file lies where a file is to go, and that no link leads elsewhere.

        Raises:
            OutputError: If something is in the way; it names all.
        """
        problems, real = [], self.path.resolve()
        for name in names:
            place = self.path / name
            if place.is_dir() and not place.is_symlink():
                problems.append(f"{place} is a folder; a file of the merge belongs there")
            parent = place.parent.resolve()
            if parent != real and real not in parent.parents:
                problems.append(f"{place.parent} is a link that leads out of {self.path}; nothing is written there")
        if problems:
            advice = "take it out of the way, then go on with --resume; what was merged is safe"
            raise OutputError(*(f"{problem}; {advice}" for problem in dict.fromkeys(problems)))

    def _move(self, folder: Path, name: str) -> None:
        """Moves a file to its place in OUT."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).replace(self.path / name)

    def _sync_folders(self, names: Iterable[str]) -> None:
        for folder in {(self.path / name).parent for name in names}:
            if folder.is_dir():
                sync(folder)

    def check_written(self, shards: tuple[Shard, ...]) -> None:
        """Compares every file of weights with its layout, which was checked to load before the long work.

        Raises:
            MergeError: If a file has another size, or holds tensors of other names, shapes or dtypes.
        """
        problems = []
        for shard in shards:
            file = self._place(self.working, shard)
            if not file.exists():
                problems.append(f"{file} is not there")
                continue
            with file.open("rb") as stream:
                header = stream.read(len(shard.header))
            if file.stat().st_size != shard.num_bytes:
                problems.append(f"{file} has {file.stat().st_size} bytes; expected {shard.num_bytes}")
            elif header != shard.header:
                problems.append(f"{file}: its header is not the one that was laid out for it")
        if problems:
            advice = f"what was merged is in {self.working}; --resume finds out what of it is whole, and does the rest"
            raise MergeError(*advised(problems[:_MAX_PROBLEMS], advice))


class InputWatch:
    """Notices when files that a merge is made of change while it runs, or before it is resumed.

    Args:
        checkpoints: All checkpoints that are read, adapters and auxiliary tensors included.
        side_files: Sources of the files that are copied, by their names in the output.
        data: Files of calibration data.

    Attributes:
        digests: Digests of the side files by their names in the output, for the manifest.
    """

    def __init__(
        self, checkpoints: Iterable[Checkpoint], side_files: Mapping[str, Path], data: Iterable[Path] = ()
    ) -> None:
        self._side_files = dict(side_files)
        self._stamps = {file: _stamp(file) for checkpoint in checkpoints for file in checkpoint.files}
        self._stamps |= {file: _stamp(file) for file in data}
        self.digests = {name: digest_of_file(file) for name, file in self._side_files.items()}

    def check(self) -> None:
        """Looks at all files again.

        Raises:
            MergeError: If one has changed; it names all of them.
        """
        changed = [str(file) for file, stamp in self._stamps.items() if _stamp(file) != stamp]
        for name, file in self._side_files.items():
            if not file.is_file() or digest_of_file(file) != self.digests[name]:
                changed.append(str(file))
        if changed:
            told = [f"{file} has changed, or was deleted, while it was being read" for file in changed[:_MAX_PROBLEMS]]
            raise MergeError(*advised(told, "the output may be of both; start afresh with --force"))


def rehearse(
    checkpoints: Iterable[Checkpoint],
    side_files: SideFiles,
    write: Callable[..., None],
    ranks: Ranks,
    data: Iterable[Path] = (),
) -> InputWatch:
    """Writes all files beside the weights for the moment, so that what is wrong with one is told before the long work.

    Args:
        checkpoints: All checkpoints that are read.
        side_files: The files that are copied.
        write: Writes the files beside the weights into a folder, given `rehearsal=True`.
        ranks: The ranks; the first one writes.
        data: Files of calibration data.

    Returns:
        What notices when inputs change from now on.

    Raises:
        LargemergeError: If one cannot be read, is not what it should be, or holds NaN.
    """
    watch = InputWatch(checkpoints, side_files.files, data)
    if ranks.is_first:
        with scratch_folder("rehearsal") as folder:
            (folder / side_files.inner).mkdir(parents=True, exist_ok=True)
            write(folder, rehearsal=True)
    return watch


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What tells a file from another at the same place; `None` if there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def clean_up(working: Path) -> None:
    """Removes the working folder of a finished merge; a crash on the way leaves what `check_output` removes later."""
    (working / "manifest.json").unlink(missing_ok=True)  # from here on there is nothing to resume
    shutil.rmtree(working)


def _mend_frame(file: Path, shard: Shard) -> None:
    """Gives a shard that is there its size and header; what its tensors hold is another question."""
    if not file.is_file():
        return
    with file.open("rb") as stream:
        header = stream.read(len(shard.header))
    if header == shard.header and file.stat().st_size == shard.num_bytes:
        return
    with _open_plain(file, os.O_RDWR) as written:
        written.truncate(shard.num_bytes)
        written.write(shard.header)


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _open_plain(path: Path, flags: int) -> BinaryIO:
    """Opens a file of the working folder for writing, but follows no link: what it led to is somebody else's."""
    return os.fdopen(os.open(path, flags | os.O_NOFOLLOW, 0o644), "r+b" if flags & os.O_RDWR else "wb")


def _checked_json(value: Mapping[str, Any]) -> str:
    """Makes one line of JSON that holds its own digest."""
    return json.dumps({**value, "check": digest_of(json.dumps(value).encode())})


def _read_checked(line: str | bytes) -> dict[str, Any] | None:
    """Reads what `_checked_json` made; `None` if it is anything else, or was changed."""
    try:
        value = json.loads(line)
        check = value.pop("check")
        return value if check == digest_of(json.dumps(value).encode()) else None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


@contextmanager
def open_output(
    path: Path, manifest: Mapping[str, Any], inputs: list[Path], *, resume: bool, force: bool
) -> Iterator[OutputFolder]:
    """Begins or resumes a merge in `path`, and holds its lock meanwhile.

    Args:
        path: The folder, OUT.
        manifest: Everything that a resumed run must have in common with the one before.
        inputs: Folders that must not be written to.
        resume: Go on with what is there.
        force: Replace what is there.

    Raises:
        OutputError: If the folder is in the way, busy, or was begun with other inputs.
    """
    check_output(path, inputs, resume=resume, force=force)
    working = path / WORKING_FOLDER
    replaces = force and any(_others(path))
    if working.exists() and not resume:
        with _locked(working):
            for entry in working.iterdir():
                if entry.is_dir() and entry.name != INTERMEDIATE_FOLDER:
                    shutil.rmtree(entry)
                elif not entry.is_dir() and entry.name != "lock":
                    entry.unlink()
    resuming = (working / "manifest.json").exists()
    try:
        working.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be made: {error.strerror}; choose another folder") from None
    with _locked(working):
        if resuming:
            before = _read_manifest(working / "manifest.json")
            _check_same(before["manifest"], json.loads(json.dumps(manifest)), path)
            replaces = before["replaces"]
        else:
            write_atomically(
                working / "manifest.json", _checked_json({"manifest": manifest, "replaces": replaces}) + "\n"
            )
        folder = OutputFolder(path, replaces, _read_journal(working / "journal.jsonl"))
        folder.check_places([*manifest.get("shards", ()), *manifest.get("side files", ()), *_ALWAYS_WRITTEN])
        yield folder


def check_output(path: Path, inputs: list[Path], *, resume: bool, force: bool) -> None:
    """Refuses an output folder that is in the way, before anything is done.

    What a crash has left of the working folder of a finished merge is removed here when it is to be resumed.

    Raises:
        OutputError: If it is in the way; it says what is there and what to do.
    """
    try:
        _check_kind(path)
        check_no_input(path, inputs, force=force)
        others, working = _others(path), path / WORKING_FOLDER
        _check_links(working)
        begun = (working / "manifest.json").exists()
    except (OSError, ValueError) as error:
        raise OutputError(f"{str(path)[:200]!r} cannot be the output folder: {error}") from None
    goes_on = resume and begun and not (working / _FINISHING).exists()
    if goes_on and not _read_manifest(working / "manifest.json")["replaces"]:  # an earlier checkpoint is no stranger
        _check_strangers(path, [])
    if resume and not begun and others:
        state = "holds nothing to resume"
        if (path / REPORT_FILE).exists():
            state = "holds a finished merge"
            if working.exists():
                with _locked(working):
                    clean_up(working)
        raise OutputError(f"{path} {state} (found {others[:5]}); choose another folder, or --force to replace it")
    if not resume and not force and begun:
        raise OutputError(f"{path} holds an unfinished run; --resume goes on with it, --force starts afresh")
    if not resume and not force and others:
        raise OutputError(f"{path} is not empty (found {others[:5]}); choose another folder, or --force to replace it")


def check_finished(path: Path) -> None:
    """Checks that a folder holds a finished merge, as far as names tell.

    Raises:
        OutputError: If it does not; it says what is there instead.
    """
    if not path.is_dir():
        raise OutputError(f"{path}: {'a file' if path.exists() else 'nothing there'}; expected a merge's folder")
    if (path / WORKING_FOLDER / "manifest.json").exists():
        raise OutputError(f"{path} holds an unfinished merge; go on with it: merge … --resume")
    if not (path / REPORT_FILE).exists():
        raise OutputError(f"{path} has no {REPORT_FILE}; expected the folder of a finished merge")


def _check_strangers(path: Path, ours: Collection[str]) -> None:
    """Refuses to go on beside files that would be loaded as part of the output, and are not this merge's.

    Raises:
        OutputError: If there are any.
    """
    found = strangers(path, ours)
    if found:
        raise OutputError(
            f"{path} holds {', '.join(found[:5])}, which this merge has not written and which would be loaded with its "
            "output; take it away, then go on with --resume"
        )


def _check_kind(path: Path) -> None:
    """Checks that a folder is there, or can be made."""
    if path.is_symlink() and not path.exists():
        raise OutputError(f"{path} is a link to {os.readlink(path)}, which is not there; expected a folder, or nothing")
    present = existing_folder(path)
    if not present.is_dir():
        raise OutputError(f"{present} is a file; expected a folder, or nothing")
    if not os.access(present, os.W_OK | os.X_OK):
        raise OutputError(f"{present}: no permission to write there; choose another folder")


def _check_links(working: Path) -> None:
    """Refuses a working folder that is a link, or holds one: what it leads to would be overwritten or emptied.

    Results of earlier merges inside are checkpoints like any other, and are not looked into.
    """
    entries = [entry for entry in working.iterdir() if entry.name != INTERMEDIATE_FOLDER] if working.is_dir() else []
    below = [inner for entry in entries if entry.is_dir() and not entry.is_symlink() for inner in entry.rglob("*")]
    for place in (working, *(working / name for name in (INTERMEDIATE_FOLDER,)), *entries, *below):
        if place.is_symlink():
            raise OutputError(f"{place} is a link; nothing is written through it: remove it, or choose another folder")
    if working.exists() and not working.is_dir():
        raise OutputError(f"{working} is a file; a merge keeps a folder of this name: remove it")
    folders = (INTERMEDIATE_FOLDER, _SIDE_FOLDER)
    for place in (*entries, *below):
        if place.is_file() and place.stat().st_nlink > 1:
            raise OutputError(
                f"{place} is one file with another name elsewhere (a hard link), which a merge would write over; "
                "remove it, or choose another folder"
            )
    for entry in entries:
        if entry.name in folders or (entry.is_dir() and entry.name not in _WORKING_FILES):
            is_right, expected = entry.is_dir(), "a folder"
        else:
            is_right, expected = entry.is_file(), "a file"
        if not is_right:
            raise OutputError(f"{entry} is not {expected}, as a merge makes it; remove it, or choose another folder")


def check_no_input(path: Path, inputs: list[Path], *, force: bool) -> None:
    """Refuses to write where inputs lie.

    Raises:
        OutputError: If `path` is an input, lies in one, or holds one that `force` would delete.
    """
    resolved = path.resolve()
    for folder in inputs:
        if resolved / WORKING_FOLDER in folder.resolve().parents:
            continue  # made for this very merge
        if _is_same(resolved, folder) or (resolved in folder.resolve().parents and force):
            raise OutputError(f"{path} holds an input ({folder}); choose another output folder")
        if folder.resolve() in resolved.parents:
            raise OutputError(f"{path} lies in an input ({folder}); choose an output folder outside it")


def _is_same(path: Path, folder: Path) -> bool:
    """Whether two paths are one folder, by whatever names."""
    try:
        return path == folder.resolve() or path.samefile(folder)
    except OSError:
        return False


def _others(path: Path) -> list[str]:
    if not path.exists():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.name != WORKING_FOLDER)


@contextmanager
def _locked(working: Path) -> Iterator[None]:
    with _open_plain(working / "lock", os.O_WRONLY | os.O_CREAT) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{working.parent}: another process is writing into this folder right now") from None
        yield


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = _read_checked(path.read_bytes())
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error}; start afresh with --force") from None
    if manifest is None or set(manifest) != {"manifest", "replaces"}:
        raise OutputError(f"{path} is not as a merge has written it; start afresh with --force")
    return manifest


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the entries of finished parts; a line that a crash or somebody else has spoiled says nothing."""
    entries: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return entries
    raw = path.read_bytes()
    complete = raw[: raw.rfind(b"\n") + 1]
    if complete != raw:
        # A line cut off by a crash says nothing; the part that it was about is done again.
        with _open_plain(path, os.O_RDWR) as stream:
            stream.truncate(len(complete))
    for line in complete.splitlines():
        record = _read_checked(line)
        if record is not None and isinstance(record.get("entry"), dict):
            entries[str(record.get("part"))] = record["entry"]
    return entries


def _check_same(before: Any, now: Any, path: Path) -> None:
    found = list(changes(before, now))
    if found:
        told = [f"{path}: cannot be resumed: {change}" for change in found[:_MAX_PROBLEMS]]
        raise OutputError(*advised(told, "put back what changed, or start afresh with --force"))


def changes(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Yields every place where two manifests differ: `config → seed was 1 and is 2`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from changes(before.get(key), now.get(key), f"{where} → {key}" if where else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from changes(old, new, f"{where}[{index}]")
    elif before != now:
        yield f"{where} was {before!r} and is {now!r}"


@contextmanager
def open_for_ranks(
    out: Path, manifest: Mapping[str, Any], inputs: list[Path], ranks: Ranks, *, resume: bool, force: bool
) -> Iterator[OutputFolder]:
    """Opens the output folder on rank 0, and tells the other ranks what is finished in it (collective).

    Raises:
        LargemergeError: If manifests differ between ranks; an `OutputError` as `open_output` does.
    """
    first = ranks.from_first(manifest)

    def check() -> None:
        unlike = changes(first, manifest)
        problems = [f"{change} here; expected the same config, files and versions everywhere" for change in unlike]
        if problems:
            raise LargemergeError(*problems[:_MAX_PROBLEMS])

    ranks.agree(check)
    with ExitStack() as stack:

        def open_it() -> OutputFolder:
            if not ranks.is_first:
                return OutputFolder(out, replaces=False)
            return stack.enter_context(open_output(out, manifest, inputs, resume=resume, force=force))

        folder = ranks.agree(open_it)
        folder.entries = ranks.from_first(folder.entries)
        yield folder


def drop_damaged(folder: OutputFolder, ranks: Ranks, kinds: Sequence[PartKind]) -> None:
    """Forgets, on all ranks, finished parts whose bytes are not on the disk as they were written (collective)."""

    def check() -> None:
        if ranks.is_first:
            folder.drop_damaged(kinds)

    ranks.agree(check)
    folder.entries = ranks.from_first(folder.entries)
    folder.redone = ranks.from_first(folder.redone)
