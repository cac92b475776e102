"""The Gram matrices that a merge keeps for the next one of its sequence, and reads of the one before.

    OUT/sums/model.layers.0.safetensors     a tensor for every group of linears, by the path of its first linear
    OUT/sums/head.safetensors               the same for the head, where it is solved

A tensor is the lower triangle of Σ G̃_i, row after row, in float32: half of the matrix, which is symmetric. It is
written and read some rows at a time. The files are laid out, written, resumed and verified like those of the weights.
What they are of stands in `sums/sequence.json` (sequence.py); digests in the merge's report tie both to its weights.

The Gram matrices of single candidates, which stand for their data (gram_files.py), lie on the disk in the same way.

With several ranks, the one that solves a group reads the earlier sums and adds them, and rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from largemerge.checkpoint.digests import digest_of_file
from largemerge.checkpoint.side_files import HEADS_FOLDER
from largemerge.checkpoint.tensor_files import SafetensorsFile
from largemerge.checkpoint.tensor_info import MODULE_SEPARATOR, OutputTensor
from largemerge.checkpoint.writer import Shard, ShardWriter, layout_file, not_finite
from largemerge.errors import CheckpointError, advised
from largemerge.integrity import find_damage_of
from largemerge.machine import versions
from largemerge.output import REPORT_FILE
from largemerge.regression.config import MergeConfig
from largemerge.regression.gram import GRAM_DTYPE, Gram, triangle
from largemerge.regression.sequence import (
    RECORD_FILE,
    SAMPLES,
    SAMPLES_FILE,
    SUMS_FOLDER,
    KeptGroup,
    MergedModel,
    SequenceRecord,
)
from largemerge.regression.tensor_plan import HEAD, BlockPlan, HeadPlan, LinearGroup

_MAX_SHOWN = 5  # groups, in a message


def groups_by_part(blocks: Sequence[BlockPlan], head: HeadPlan) -> dict[str, tuple[LinearGroup, ...]]:
    """Name of a block, or of the head → its groups, for those that have some."""
    tied = (head.tied,) if head.tied is not None else ()
    parts = {block.name: block.groups for block in blocks} | {HEAD: (*tied, *head.groups)}
    return {part: groups for part, groups in parts.items() if groups}


def kept_tensors(blocks: Sequence[BlockPlan], head: HeadPlan, folder: str = SUMS_FOLDER) -> dict[str, OutputTensor]:
    """Name of a group's Gram matrix, with the file in `folder` that it lies in → its layout on disk."""
    return {
        _name(folder, part, group.leader): OutputTensor(GRAM_DTYPE, (triangle(group.num_inputs),))
        for part, groups in groups_by_part(blocks, head).items()
        for group in groups
    }


def layout_sums(tensors: Mapping[str, OutputTensor]) -> tuple[Shard, ...]:
    """Lays out a file for every block, and one for the head."""
    by_file: dict[str, dict[str, OutputTensor]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(name.partition(MODULE_SEPARATOR)[0], {})[name] = tensor
    return tuple(layout_file(f"{file}.safetensors", group) for file, group in by_file.items())


def sums_file(part: str, folder: str = SUMS_FOLDER) -> str:
    """Path of the file that holds the sums of a block, or of the head."""
    return f"{folder}/{part}.safetensors"


def _name(folder: str, part: str, leader: str) -> str:
    return f"{folder}/{part}{MODULE_SEPARATOR}{leader}"


def sum_files(config: MergeConfig) -> list[Path]:
    """Lists the files of the earlier sums, or samples, with the record; none where there is no earlier merge."""
    folder, record = _previous(config)
    if folder is None or record is None:
        return []
    if record.samples:
        return [folder / RECORD_FILE, folder / SAMPLES_FILE]
    return [folder / RECORD_FILE, *(folder / sums_file(part) for part in record.groups)]


def previous_fingerprint(config: MergeConfig) -> str:
    """Returns what changes whenever the earlier merge or its sums do; empty where there are none."""
    folder, _ = _previous(config)
    report = folder / REPORT_FILE if folder is not None else None
    return digest_of_file(report) if report is not None and report.is_file() else ""


def previous_bytes(config: MergeConfig) -> int:
    """Bytes of the earlier sums; 0 where there are none."""
    record = config.sums_before
    parts = record.groups.values() if record is not None else ()
    return sum(GRAM_DTYPE.itemsize * triangle(group.inputs) for groups in parts for group in groups.values())


def _previous(config: MergeConfig) -> tuple[Path | None, SequenceRecord | None]:
    if config.sequence is None or config.sequence.previous is None:
        return None, None
    return Path(config.sequence.previous), config.merged_before


def check_previous(config: MergeConfig, *, contents: bool) -> None:
    """Compares the earlier merge, weights and sums, with the digests in its report.

    Args:
        config: The configuration.
        contents: Read all of it, as fast as the disk; otherwise sizes and headers alone are looked at.

    Raises:
        CheckpointError: If anything is missing, or not as it was written: the sums would be another checkpoint's.
        OutputError: If the merge is unfinished, or has no digests.
    """
    folder, _ = _previous(config)
    problems = find_damage_of(folder, (RECORD_FILE, "config.json"), contents=contents) if folder is not None else []
    if problems:
        told = [f"sequence.previous: {folder}: {problem}" for problem in problems]
        advice = (
            "what it has kept is good for the weights that were written with it alone: put these back, or merge again"
        )
        raise CheckpointError(*advised(told, advice))


def previous_problems(config: MergeConfig, blocks: Sequence[BlockPlan], head: HeadPlan) -> Iterator[str]:
    """Yields groups of linears that are to be solved, and of which the earlier merge has no sums, or of other shape."""
    (folder, _), record = _previous(config), config.sums_before
    if record is None:
        return
    wanted = [(part, group) for part, groups in groups_by_part(blocks, head).items() for group in groups]
    missing = []
    for part, group in wanted:
        found = _find(record, part, group.leader)
        solved = found.linears if found is not None else ()
        own = [f"{part} ({linear.path})" for linear in group.linears if same_place(solved, linear.path) is None]
        missing += own if found is not None else [f"{part} ({group.leader})"]
    if missing:
        yield (
            f"sequence.previous: {folder} has no sums of {some(missing)}, which would be solved; expected a merge "
            "that solved the same: change parameters.solve, include or exclude to solve nothing else"
        )
    for part, group in wanted:
        found = _find(record, part, group.leader)
        if found is not None and found.inputs != group.num_inputs:
            yield (
                f"sequence.previous: {folder}: the sums of {part} ({group.leader}) have {found.inputs} inputs, the "
                f"models' {group.num_inputs}; expected a merge of models of these shapes"
            )


@dataclass(frozen=True)
class EarlierSums:
    """Where the sums of a group lie among those of the earlier merge.

    Attributes:
        part: Its block, or the head.
        leader: Path of its first linear.
        inputs: Number of inputs.
        tokens: Number of rows that the sums are of.
        linears: Paths of the linears that were solved with them.
    """

    part: str
    leader: str
    inputs: int
    tokens: int
    linears: tuple[str, ...]


def _find(record: SequenceRecord, part: str, leader: str) -> EarlierSums | None:
    """Finds the earlier sums of a group, whose path is a longer one where a class has a head around its body."""
    own_part = same_place(record.groups, part)
    own_leader = same_place(record.groups[own_part], leader) if own_part is not None else None
    if own_part is None or own_leader is None:
        return None
    group = record.groups[own_part][own_leader]
    return EarlierSums(own_part, own_leader, group.inputs, group.tokens, group.linears)


def same_place(known: Collection[str], name: str) -> str | None:
    """Finds a path among others: itself, or else the only one that is its end, or that ends with it."""
    if name in known:
        return name
    alike = [each for each in known if each.endswith(f".{name}") or name.endswith(f".{each}")]
    return alike[0] if len(alike) == 1 else None


def sequence_notes(config: MergeConfig, blocks: Sequence[BlockPlan], head: HeadPlan) -> Iterator[str]:
    """Notes on earlier sums that are of no use, and on models that are merged once more."""
    folder, record = _previous(config)
    if folder is None or record is None:
        return
    if not record.samples:
        yield from _notes_on_sums(config, folder, record, groups_by_part(blocks, head))
    if (folder / HEADS_FOLDER).is_dir():
        yield f"sequence: the heads of the models in {folder} stay in its folder {HEADS_FOLDER}/, and are not copied"
    before = {model.model for model in record.models}
    for candidate in config.models:
        if candidate.model in before:
            yield f"sequence: {candidate.label} ({candidate.model}) was merged before, and counts once more"


def _notes_on_sums(
    config: MergeConfig, folder: Path, record: SequenceRecord, parts: Mapping[str, Sequence[LinearGroup]]
) -> Iterator[str]:
    """Notes on earlier sums that are of no use, and on what cannot be done with sums alone."""
    used = set()
    for part, groups in parts.items():
        for group in groups:
            found = _find(record, part, group.leader)
            solved = found.linears if found is not None else ()
            places = (same_place(solved, linear.path) for linear in group.linears)
            used |= {(found.part, place) for place in places if found is not None and place is not None}
    kept = [
        (part, path) for part, of_part in record.groups.items() for each in of_part.values() for path in each.linears
    ]
    unused = [f"{part} ({path})" for part, path in kept if (part, path) not in used]
    if unused:
        yield f"sequence: {folder} has sums of {some(unused)}, which is not solved here: they are left out"
    if config.method.compares:
        yield (
            f"sequence: {config.merge_method} corrects what the new models need; what {folder} has corrected for the "
            "models in it is mostly lost: merge them with 'sequence: {keep_samples: 256}' in place of sums"
        )


def some(names: Sequence[str]) -> str:
    """Lists some names, and how many there are."""
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more


def make_record(
    config: MergeConfig,
    blocks: Sequence[BlockPlan],
    head: HeadPlan,
    models: Sequence[MergedModel],
    linears: Mapping[str, Any],
    samples: int,
) -> SequenceRecord:
    """Makes the record of a merge that keeps its sums, or samples.

    Args:
        config: The configuration.
        blocks: Plans of all blocks.
        head: What is solved outside of them.
        models: All models merged so far.
        linears: Reports of all solved linears, by parameter name.
        samples: Number of samples that are kept; 0 where there are sums.
    """
    method = config.method
    return SequenceRecord(
        largemerge=versions()["largemerge"],
        merge_method=config.merge_method,
        inputs=method.inputs,
        granularity=method.granularity,
        normalization=method.normalization,
        off_diagonal_scale=method.off_diagonal_scale,
        models=tuple(models),
        samples=samples,
        groups={
            part: {
                group.leader: KeptGroup(
                    inputs=group.num_inputs,
                    tokens=sum(linears[group.linears[0].name]["tokens"].values()),
                    linears=tuple(linear.path for linear in group.linears),
                )
                for group in groups
            }
            for part, groups in (groups_by_part(blocks, head).items() if not samples else ())
        },
    )


@dataclass
class SumWriter:
    """Writes the files of kept sums, each of which is open only while its part is merged; on rank 0 alone.

    Attributes:
        folder: Working folder for the unfinished files.
        tensors: All sums that will be written, from `kept_tensors`.
        shards: Files that `layout_sums` has laid out for them.
        inner: Folder of the files in the working folder.
    """

    folder: Path
    tensors: Mapping[str, OutputTensor]
    shards: Sequence[Shard]
    inner: str = SUMS_FOLDER
    _open: dict[str, ShardWriter] = field(init=False, default_factory=dict)

    def write(self, part: str, leader: str, rows: Iterable[torch.Tensor]) -> None:
        """Writes the lower triangle of a group's matrix, whose numbers come some rows at a time."""
        done = 0
        for numbers in rows:
            self._writer(part).write(_name(self.inner, part, leader), numbers, first_row=done)
            done += len(numbers)

    def _writer(self, part: str) -> ShardWriter:
        if part not in self._open:
            (shard,) = (shard for shard in self.shards if shard.file_name == sums_file(part, self.inner))
            own = {name: self.tensors[name] for name in shard.offsets}
            self._open[part] = ShardWriter(self.folder, own, (shard,)).__enter__()
        return self._open[part]

    def finish(self, part: str) -> dict[str, Any]:
        """Brings the file of a part to the disk and closes it.

        Returns:
            What the journal notes, as `kept`: digests, and the number of bytes; nothing, where nothing was written.
        """
        writer = self._open.pop(part, None)
        if writer is None:
            return {}
        with ExitStack() as stack:
            stack.push(writer)
            writer.flush()
            return {"kept": {"digests": writer.take_digests(), "bytes": writer.bytes_written}}

    def close(self) -> None:
        """Closes what is open, after an error."""
        while self._open:
            self._open.popitem()[1].__exit__(None, None, None)


@contextmanager
def reading_triangle(path: Path, name: str, advice: str) -> Iterator[Callable[[slice], torch.Tensor]]:
    """Opens a file of sums; what it yields reads some numbers of a lower triangle, on the CPU.

    Args:
        path: The file.
        name: Name of the tensor in it.
        advice: What to do where the numbers are of no use.

    Raises:
        CheckpointError: If they hold NaN or infinity, or have been cut short since they were looked at.
    """
    file = SafetensorsFile(path)
    try:
        info = file.tensors()[name]

        def read(numbers: slice) -> torch.Tensor:
            vector = file.read(info, numbers)
            problem = not_finite(vector)
            if problem is not None:
                raise CheckpointError(f"{path}: {name} holds {problem}; {advice}")
            return vector

        yield read
    finally:
        file.close()


@dataclass
class SequenceSums:
    """What a merge reads of the earlier sums, and keeps for a later merge; neither, unless it is one of a sequence.

    Attributes:
        folder: Folder of the earlier merge; `None` if there is none.
        record: Its record.
        share: C / (C + Σ c), what its sums are multiplied by.
        keeps: Whether sums are kept.
        writer: Writes them; `None` where none are kept, and on other ranks than rank 0.
        bytes_read: Bytes of earlier sums that this rank has read so far.
    """

    folder: Path | None = None
    record: SequenceRecord | None = None
    share: float = 0.0
    keeps: bool = False
    writer: SumWriter | None = None
    bytes_read: int = field(init=False, default=0)

    @classmethod
    def of(cls, config: MergeConfig, writer: SumWriter | None) -> SequenceSums:
        """Makes what a configuration asks for."""
        (folder, _), record = _previous(config), config.sums_before
        return cls(folder, record, config.shares[0] if record is not None else 0.0, config.keeps_sums, writer)

    def tokens(self, part: str, leader: str) -> int:
        """Number of rows that the earlier sums of a group are of; 0 without any."""
        found = _find(self.record, part, leader) if self.record is not None else None
        return found.tokens if found is not None else 0

    def add_previous(self, part: str, leader: str, gram: Gram) -> None:
        """Adds the earlier sums of a group to a Gram matrix, between candidates.

        Raises:
            CheckpointError: If they hold NaN or infinity, or have been cut short since they were looked at.
        """
        found = _find(self.record, part, leader) if self.record is not None else None
        if self.folder is None or found is None:
            return
        with reading_triangle(self.folder / sums_file(found.part), found.leader, "make that merge again") as read:
            gram.add_to_sum(read, self.share)
        self.bytes_read += GRAM_DTYPE.itemsize * triangle(gram.num_inputs)

    def keep(self, part: str, leader: str, gram: Gram) -> None:
        """Writes Σ G̃_i of a group, before it is solved, on rank 0 of a merge that keeps sums."""
        if self.writer is not None:
            self.writer.write(part, leader, gram.sum_rows())

    def keep_samples(self, samples: Mapping[str, Iterable[torch.Tensor]]) -> dict[str, Any]:
        """Writes the samples that are kept in place of the sums, on rank 0; see `SumWriter.finish`."""
        for name, parts in samples.items():
            assert self.writer is not None
            self.writer.write(Path(SAMPLES).name, name, parts)
        return self.finish(Path(SAMPLES).name)

    def finish(self, part: str) -> dict[str, Any]:
        """Finishes what is kept of a block, or of the head; see `SumWriter.finish`."""
        return self.writer.finish(part) if self.writer is not None else {}
