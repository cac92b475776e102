"""The Gram matrices of single candidates on disk, which stand for their data in later merges.

    candidate, its data ──► largemerge gram (gram_run.py) ──► FOLDER/sums/*.safetensors, FOLDER/grams.json
    FOLDER ──► the very same model? whole? all groups there? ──► GramReader ──► Gram of the candidate, unscaled

A matrix is XᵀX as it is summed over a candidate's rows, before any weight, scale or norm, so that all of these may
differ from merge to merge. It lies on the disk as kept sums do (kept_sums.py): its lower triangle, row after row, in
float32. In a merge it takes the place of the candidate's runs; what follows is the same as with data. Only right-hand
sides that would be made row by row (fewer tokens than half the inputs) are made of the whole matrix here, which is
another order of the same additions.

With several ranks, one of them reads a candidate's matrices, as if its data were a single batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from largemerge.calibration import CalibrationOutline
from largemerge.checkpoint.digests import digest_of_file
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter
from largemerge.checkpoint.tensor_info import SAFETENSORS_DTYPES, dtype_name
from largemerge.errors import CheckpointError
from largemerge.integrity import damage_of_weights
from largemerge.regression.config import MergeConfig
from largemerge.regression.gram import GRAM_DTYPE, Gram, triangle
from largemerge.regression.gram_record import GRAMS_FILE, GramGroup, GramRecord, ModelFile
from largemerge.regression.inputs import Inputs
from largemerge.regression.kept_sums import groups_by_part, reading_triangle, same_place, some, sums_file
from largemerge.regression.tensor_plan import BlockPlan, HeadPlan, LinearGroup

_NUM_READERS = 4
_DTYPES = {dtype_name(dtype): dtype for dtype in SAFETENSORS_DTYPES.values()}


# Whose they are


def identify(checkpoint: Checkpoint, adapter: Adapter | None) -> dict[str, ModelFile]:
    """Reads all files of a candidate, and returns what tells them from any others.

    Args:
        checkpoint: The candidate as it lies on disk.
        adapter: Its adapters, if it has some.
    """
    files = _files_of(checkpoint, adapter)
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="largemerge-check") as pool:
        digests = pool.map(digest_of_file, files.values())
        return {
            name: ModelFile(bytes=path.stat().st_size, xxh3_128=digest)
            for (name, path), digest in zip(files.items(), digests, strict=True)
        }


def _files_of(checkpoint: Checkpoint, adapter: Adapter | None) -> dict[str, Path]:
    """Name → path of the files of config, weights and adapters; those of an adapter have its number before them."""
    folders = adapter.folders if adapter is not None else ()
    prefixes = {folder: "adapter" if number == 0 else f"adapter {number + 1}" for number, folder in enumerate(folders)}
    paths = {*checkpoint.files, *(adapter.checkpoint.files if adapter is not None else ())}
    paths |= {folder / "adapter_config.json" for folder in folders}
    names = {}
    for path in paths:
        inside = prefixes.get(path.parent)
        names[f"{inside}/{path.name}" if inside else os.path.relpath(path, checkpoint.root)] = path
    return {name: names[name] for name in sorted(names) if names[name].is_file()}


def _model_problems(record: GramRecord, found: Mapping[str, Path], *, contents: bool) -> Iterator[str]:
    """Yields files of a candidate that are not those of the model that a record is about."""
    missing, more = sorted(set(record.model_files) - set(found)), sorted(set(found) - set(record.model_files))
    if missing or more:
        yield f"{record.model} had the files {some(sorted(record.model_files))}, found {some(sorted(found))}"
        return
    sizes = {name: path.stat().st_size for name, path in found.items()}
    differ = [name for name, size in sizes.items() if size != record.model_files[name].bytes]
    same_size = [name for name in found if name not in differ and (contents or name.endswith(".json"))]
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="largemerge-check") as pool:
        digests = dict(zip(same_size, pool.map(lambda name: digest_of_file(found[name]), same_size), strict=True))
    differ += [name for name, digest in digests.items() if digest != record.model_files[name].xxh3_128]
    if differ:
        yield f"{some(sorted(differ))}: {'is' if len(differ) == 1 else 'are'} not what {record.model} had"


# Before a merge


def check_grams(config: MergeConfig, inputs: Inputs, *, contents: bool) -> None:
    """Compares all Gram matrices with their digests, and the candidates with those that they were made of.

    Args:
        config: The configuration.
        inputs: The opened inputs.
        contents: Read everything, candidates included, as fast as the disk; otherwise sizes, headers and configs alone
            are looked at.

    Raises:
        CheckpointError: If matrices are missing or not as they were written, or are another model's; it names all.
    """
    problems = []
    for candidate in config.models:
        if candidate.grams is None:
            continue
        record, folder = config.grams[candidate.label], Path(candidate.grams)
        where = f"{candidate.label}: {folder}"
        stored, adapter = inputs.stored[candidate.label], inputs.adapters.get(candidate.label)
        for problem in _model_problems(record, _files_of(stored, adapter), contents=contents):
            problems.append(
                f"{where}: these Gram matrices are of another model than {candidate.model}: {problem}; expected the "
                "files that they were made of: get those, or give 'data'"
            )
        for name, expected in record.sums.items():
            digests = expected.model_dump()
            for problem in damage_of_weights(folder / name, name, digests, contents=contents):
                problems.append(f"{where}: {problem}; get the folder again, or make it anew with 'largemerge gram'")
    if problems:
        raise CheckpointError(*problems)


def gram_problems(config: MergeConfig, blocks: Sequence[BlockPlan], head: HeadPlan) -> Iterator[str]:
    """Yields groups of linears that are to be solved, and of which some Gram matrices are not there, or do not fit."""
    for name, record in config.grams.items():
        missing, misfits = [], []
        for part, groups in groups_by_part(blocks, head).items():
            for group in groups:
                found = _find(record, part, group)
                if found is None:
                    missing.append(f"{part} ({group.leader})")
                elif found.group.inputs != group.num_inputs:
                    misfits.append(f"{part} ({group.leader}): {found.group.inputs} inputs, here {group.num_inputs}")
        folder = _folder(config, name)
        if missing:
            yield (
                f"{name}: {folder} has no Gram matrices of {some(missing)}, which would be solved; make them with the "
                "same parameters.solve, include and exclude, or change these to solve nothing else"
            )
        if misfits:
            yield f"{name}: {folder} has Gram matrices of other shapes: {some(misfits)}; expected those of this model"


def gram_notes(config: MergeConfig, compute_dtype: torch.dtype) -> Iterator[str]:
    """Notes on Gram matrices that were made otherwise than this merge would make them."""
    for name, record in config.grams.items():
        if record.compute_dtype != dtype_name(compute_dtype):
            yield (
                f"{name}: its Gram matrices come from forward passes in {record.compute_dtype}; this merge would run "
                f"them in {dtype_name(compute_dtype)}"
            )


def gram_outline(config: MergeConfig, name: str) -> CalibrationOutline:
    """What a candidate's data was like, of which there are no samples any more."""
    record = config.grams[name]
    shapes = {key: (each.shape, _DTYPES[each.dtype]) for key, each in record.inputs.items()}
    examples = {key: torch.tensor(numbers) for key, numbers in record.examples.items()}
    return CalibrationOutline(0, 1, shapes, examples, where=f"candidate {name!r}: {_folder(config, name)}")


def gram_fingerprint(config: MergeConfig, name: str) -> str:
    """Returns what changes whenever a candidate's Gram matrices do."""
    return config.grams[name].check


def gram_files(config: MergeConfig) -> list[Path]:
    """Lists the files of all Gram matrices, with their records."""
    folders = {name: _folder(config, name) for name in config.grams}
    names = {name: [GRAMS_FILE, *record.sums] for name, record in config.grams.items()}
    return [folders[name] / each for name, own in names.items() for each in own]


def gram_bytes(config: MergeConfig, blocks: Sequence[BlockPlan], head: HeadPlan) -> int:
    """Bytes of the Gram matrices that a merge reads."""
    groups = [group for of_part in groups_by_part(blocks, head).values() for group in of_part]
    return len(config.grams) * sum(GRAM_DTYPE.itemsize * triangle(group.num_inputs) for group in groups)


def from_grams(config: MergeConfig) -> frozenset[int]:
    """Numbers of the candidates whose Gram matrices stand for their data."""
    return frozenset(number for number, name in enumerate(config.names) if name in config.grams)


def _folder(config: MergeConfig, name: str) -> Path:
    return next(Path(each.grams) for each in config.models if each.label == name and each.grams is not None)


@dataclass(frozen=True)
class _Found:
    """Where the Gram matrix of a group lies.

    Attributes:
        part: Its block, or the head.
        leader: Name of its tensor.
        group: What the record says of it.
    """

    part: str
    leader: str
    group: GramGroup


def _find(record: GramRecord, part: str, group: LinearGroup) -> _Found | None:
    """Finds the Gram matrix of a group by any of its linears: all of them read one tensor.

    Paths are longer ones where a class has a head around its body, and another linear leads where some are not solved.
    """
    own_part = same_place(record.groups, part)
    if own_part is None:
        return None
    leaders = {path: leader for leader, known in record.groups[own_part].items() for path in known.linears}
    places = (same_place(leaders, linear.path) for linear in group.linears)
    place = next((place for place in places if place is not None), None)
    return None if place is None else _Found(own_part, leaders[place], record.groups[own_part][leaders[place]])


# During a merge


@dataclass
class GramReader:
    """Reads the Gram matrices that stand for candidates' data.

    Attributes:
        folders: Number of a candidate → its folder and record.
        bytes_read: Bytes that this rank has read so far.
    """

    folders: Mapping[int, tuple[Path, GramRecord]] = field(default_factory=dict)
    bytes_read: int = field(init=False, default=0)

    @classmethod
    def of(cls, config: MergeConfig) -> GramReader:
        """Makes what a configuration asks for."""
        names = config.names
        return cls({names.index(name): (_folder(config, name), record) for name, record in config.grams.items()})

    def has(self, candidate: int) -> bool:
        """Whether Gram matrices stand for a candidate's data."""
        return candidate in self.folders

    def tokens(self, candidate: int, part: str, group: LinearGroup) -> int:
        """Number of rows that a candidate's Gram matrix of a group is the sum of."""
        return self._found(candidate, part, group).group.tokens

    def read(self, candidate: int, part: str, group: LinearGroup, gram: Gram) -> None:
        """Reads a candidate's Gram matrix of a group, as the present candidate of `gram`.

        Raises:
            CheckpointError: If it holds NaN or infinity, or has been cut short since it was looked at.
        """
        found, folder = self._found(candidate, part, group), self.folders[candidate][0]
        path = folder / sums_file(found.part)
        with reading_triangle(path, found.leader, "make it anew with 'largemerge gram'") as read:
            gram.set_candidate(read)
        self.bytes_read += GRAM_DTYPE.itemsize * triangle(gram.num_inputs)

    def _found(self, candidate: int, part: str, group: LinearGroup) -> _Found:
        found = _find(self.folders[candidate][1], part, group)
        assert found is not None, (part, group.leader)  # or the plan would have had a problem
        return found
