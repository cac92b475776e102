"""The output folder, from its first byte to a finished checkpoint, crashes and resumes in between.

    OUT/.largemerge/              while the merge runs
        manifest.json             config, fingerprints of all inputs and data, versions, layout
        journal.jsonl             one line for each finished part, appended once its bytes are on disk
        model-….safetensors       shards under way
        lock                      held by the running process
        intermediate/             results of earlier merges, where one configuration has several

At the end: side files, shards, the index, `config.json` last, then the working folder goes. A folder
without `config.json`, or with a working folder, is no finished merge.

Where ranks share a merge, all must agree on the manifest; rank 0 opens the folder and writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from largemerge.checkpoint.index import Checkpoint, read_bytes
from largemerge.checkpoint.locate import existing_folder
from largemerge.checkpoint.quantized import fold_quantized
from largemerge.checkpoint.room import INTERMEDIATE_FOLDER as INTERMEDIATE_FOLDER
from largemerge.checkpoint.sentence_modules import split_name
from largemerge.checkpoint.side_files import remove_side_files
from largemerge.checkpoint.tensor_files import SafetensorsFile
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.checkpoint.writer import Shard, sync_folder, weight_index, write_atomically
from largemerge.distributed.ranks import Ranks
from largemerge.errors import LargemergeError, MergeError, OutputError

_MAX_PROBLEMS = 20
WORKING_FOLDER = ".largemerge"
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index*.json", "*.bin", "*.bin.index*.json", "adapter_config.json")


@dataclass
class OutputFolder:
    """The output of one merge, begun or resumed.

    Attributes:
        path: The folder, OUT.
        replaces: Whether an earlier checkpoint here is to be replaced at the end.
        entries: Entries of the journal by the name of the finished part.
    """

    path: Path
    replaces: bool
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def working(self) -> Path:
        """Path of the working folder."""
        return self.path / WORKING_FOLDER

    def record(self, part: str, entry: Mapping[str, Any]) -> None:
        """Notes in the journal that a part is finished; its bytes must be on disk by now."""
        line = json.dumps({"part": part, "entry": entry}) + "\n"
        with (self.working / "journal.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self.entries[part] = dict(entry)

    def written(self, shards: tuple[Shard, ...], config: Mapping[str, Any]) -> Checkpoint:
        """Opens the finished shards, wherever a crash has left them, as a checkpoint that can be read.

        Args:
            shards: All shards, written and flushed.
            config: Contents of the output's `config.json`.
        """
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            inside = self.working / shard.file_name
            found = SafetensorsFile(inside if inside.exists() else self.path / shard.file_name).tensors()
            tensors |= {name: found[split_name(name)[1]] for name in shard.offsets}
        return Checkpoint("output", self.path, config, fold_quantized(tensors, config, "output", read_bytes), {})

    def finish(
        self,
        shards: tuple[Shard, ...],
        write_side_files: Callable[[Path], None],
        config: str,
        inner: str = "",
    ) -> None:
        """Makes the folder a checkpoint; may be repeated after a crash at any point.

        Args:
            shards: All shards, written and flushed.
            write_side_files: Writes tokenizer, report, … into a folder.
            config: Text of `config.json`, which is written last.
            inner: Folder inside this one for the transformer and its config, in sentence-transformers' old layout.

        Raises:
            MergeError: If the files of the weights are not what was laid out.
        """
        self.check_written(shards)
        if self.replaces:
            self._remove_earlier({shard.file_name for shard in shards})
        model = self.path / inner
        if inner:
            model.mkdir(parents=True, exist_ok=True)
        write_side_files(self.path)
        for shard in shards:
            target = self.path / shard.file_name
            if (self.working / shard.file_name).exists():
                if target.parent != self.path:
                    target.parent.mkdir(parents=True, exist_ok=True)
                (self.working / shard.file_name).replace(target)
        for folder in {self.path, *((self.path / shard.file_name).parent for shard in shards)}:
            sync_folder(folder)
        index = weight_index(shards)
        if index is not None:
            write_atomically(model / "model.safetensors.index.json", index)
        write_atomically(model / "config.json", config)
        (self.working / "manifest.json").unlink()  # from here on there is nothing to resume
        shutil.rmtree(self.working)

    def _remove_earlier(self, names: set[str]) -> None:
        """Removes an earlier checkpoint: first what makes it one, then its weights, but for shards of this merge."""
        kept = {self.path / name for name in names if not (self.working / name).exists()}
        remove_side_files(self.path, kept)
        for pattern in _WEIGHT_FILES:
            for old in self.path.glob(pattern):
                if old not in kept:
                    old.unlink()

    def check_written(self, shards: tuple[Shard, ...]) -> None:
        """Compares every file of weights with its layout, which was checked to load before the long work.

        Raises:
            MergeError: If a file has another size, or holds tensors of other names, shapes or dtypes.
        """
        problems = []
        for shard in shards:
            moved = self.path / shard.file_name
            file = self.working / shard.file_name if (self.working / shard.file_name).exists() else moved
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
            advice = f"what was merged is in {self.working}, and nothing of it is lost; merge again with --force"
            raise MergeError(*problems[:_MAX_PROBLEMS], advice)


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
                elif entry.is_file() and entry.name != "lock":
                    entry.unlink()
    resuming = (working / "manifest.json").exists()
    working.mkdir(parents=True, exist_ok=True)
    with _locked(working):
        if resuming:
            before = _read_manifest(working / "manifest.json")
            _check_same(before["manifest"], json.loads(json.dumps(manifest)), path)
            replaces = before["replaces"]
        else:
            text = json.dumps({"manifest": manifest, "replaces": replaces}, indent=2)
            write_atomically(working / "manifest.json", text)
        yield OutputFolder(path, replaces, _read_journal(working / "journal.jsonl"))


def check_output(path: Path, inputs: list[Path], *, resume: bool, force: bool) -> None:
    """Refuses an output folder that is in the way, before anything is done.

    Raises:
        OutputError: If it is in the way; it says what is there and what to do.
    """
    present = existing_folder(path)
    if not present.is_dir():
        raise OutputError(f"{present} is a file; expected a folder, or nothing")
    check_no_input(path, inputs, force=force)
    if not path.exists():
        return
    begun = (path / WORKING_FOLDER / "manifest.json").exists()
    others = _others(path)
    if resume:
        if not begun and others:
            state = "holds a finished merge" if (path / "merge_report.json").exists() else "holds no merge to resume"
            raise OutputError(f"{path} {state} (found {others[:5]}); choose another folder, or --force to replace it")
        return
    if begun and not force:
        raise OutputError(f"{path} holds an unfinished merge; --resume goes on with it, --force starts afresh")
    if others and not force:
        raise OutputError(f"{path} is not empty (found {others[:5]}); choose another folder, or --force to replace it")


def check_no_input(path: Path, inputs: list[Path], *, force: bool) -> None:
    """Refuses to write where inputs lie.

    Raises:
        OutputError: If `path` is an input, or holds one that `force` would delete.
    """
    resolved = path.resolve()
    for folder in inputs:
        if resolved / WORKING_FOLDER in folder.resolve().parents:
            continue  # made for this very merge
        if resolved == folder.resolve() or (resolved in folder.resolve().parents and force):
            raise OutputError(f"{path} holds an input of this merge ({folder}); choose another output folder")


def _others(path: Path) -> list[str]:
    if not path.exists():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.name != WORKING_FOLDER)


@contextmanager
def _locked(working: Path) -> Iterator[None]:
    with (working / "lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{working.parent}: another process is merging into this folder right now") from None
        yield


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {error}; start afresh with --force") from None
    return manifest


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return entries
    raw = path.read_bytes()
    complete = raw[: raw.rfind(b"\n") + 1]
    if complete != raw:
        # A line cut off by a crash says nothing; the part that it was about is done again.
        with path.open("r+b") as stream:
            stream.truncate(len(complete))
    for line in complete.splitlines():
        record = json.loads(line)
        entries[record["part"]] = record["entry"]
    return entries


def _check_same(before: Any, now: Any, path: Path) -> None:
    found = list(changes(before, now))
    if found:
        raise OutputError(
            *(f"{path}: cannot be resumed: {change}" for change in found[:_MAX_PROBLEMS]),
            "put back what changed, or start afresh with --force",
        )


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
