"""`largemerge gram`: writes the Gram matrices of every model of a configuration, to be used in place of its data.

    write_grams   config ──► one candidate after the other, each as if it were alone: opened, its data read, planned
                  ──► output folder ──► blocks ──► records (gram_record.py)

A candidate runs through its own blocks on its own data, as in RegMean (arXiv 2212.09849), block after block and within
the same limits as a merge. Only the matrices XᵀX are held, of as many groups of linears at once as the plan says, and
written (gram_files.py). Nothing lies at its place in the folder before all of it is written; what is finished is noted
in a journal, so that a run that was killed can go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from largemerge.calibration import CalibrationOutline, CalibrationSet
from largemerge.checkpoint.lora import open_reader
from largemerge.checkpoint.reader import TensorReader, prefetched
from largemerge.checkpoint.room import Need, room_problems
from largemerge.checkpoint.tensor_info import OutputTensor, Tensors, dtype_name
from largemerge.checkpoint.writer import Shard, stored_sizes
from largemerge.devices import Transfer, choose_device
from largemerge.distributed.ranks import Ranks
from largemerge.errors import LargemergeError, MergeError
from largemerge.machine import MemoryUse, MemoryWatch, versions
from largemerge.model.fake_forward import placeholder_tokens
from largemerge.output import WORKING_FOLDER, InputWatch, OutputFolder, PartKind, check_output, open_output
from largemerge.progress import RunProgress, stage
from largemerge.regression.collect import SampleRunner, Watched, why_not_finite
from largemerge.regression.config import CandidateConfig, MergeConfig, MethodParameters, OutputConfig
from largemerge.regression.gram import Gram, Scratch, float32_means_float32
from largemerge.regression.gram_files import identify
from largemerge.regression.gram_record import GRAMS_FILE, GramGroup, GramRecord, InputShape, ModelFile, SumsFile
from largemerge.regression.head import collect_own
from largemerge.regression.inputs import Inputs, open_inputs
from largemerge.regression.kept_sums import SumWriter, groups_by_part, kept_tensors, layout_sums
from largemerge.regression.merge import (
    block_runner,
    data_files,
    hidden_states_of,
    manifest_of,
    paths_read,
    plan_with_data,
    samples_of_rank,
)
from largemerge.regression.passes import BlockPass, plan_passes
from largemerge.regression.plan import PlannedMerge
from largemerge.regression.samples import RankSamples
from largemerge.regression.sequence import SUMS_FOLDER
from largemerge.regression.tensor_plan import HEAD, BlockPlan
from largemerge.regression.weights import Weights
from largemerge.streams import plain_text
from largemerge.units import counted, duration, gib


@dataclass(frozen=True)
class GramReport:
    """What `largemerge gram` has written.

    Attributes:
        out: The output folder, as the user named it.
        records: Name of a candidate → the folder of its Gram matrices, and what they are of.
        notes: What a user should know.
        resumed_parts: Number of parts that an earlier run had finished.
        redone_parts: Why parts that an earlier run had finished were done again.
        seconds: Seconds in total.
        peak: Measured peak of memory in use.
    """

    out: Path
    records: Mapping[str, tuple[Path, GramRecord]]
    notes: tuple[str, ...]
    resumed_parts: int
    redone_parts: tuple[str, ...]
    seconds: float
    peak: MemoryUse

    @property
    def bytes_written(self) -> int:
        """Bytes of all files of Gram matrices."""
        return sum(record.num_bytes for _, record in self.records.values())

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "folders": {name: str(folder) for name, (folder, _) in self.records.items()},
            "records": {name: record.model_dump(mode="json") for name, (_, record) in self.records.items()},
            "notes": list(self.notes),
            "resumed_parts": self.resumed_parts,
            "redone_parts": list(self.redone_parts),
            "seconds": round(self.seconds, 3),
            "bytes_written": self.bytes_written,
            "peak_bytes": {"host_anonymous": self.peak.host_anonymous, "device": self.peak.device},
        }

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows the report as a table."""
        table = Table(title=f"Gram matrices of {counted(len(self.records), 'model')} → {self.out}", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for name, (folder, record) in self.records.items():
            seen = f"{counted(record.num_samples, 'sample')} of {record.data}, {counted(record.tokens, 'token')}"
            table.add_row(name, f"{seen} → {folder}")
        table.add_row("disk", f"{gib(self.bytes_written)} written")
        table.add_row("time", duration(self.seconds))
        table.add_row("peak memory", f"{gib(self.peak.host_anonymous)} anonymous")
        for note in (*self.notes, *self.redone_parts):
            table.add_row("note", note)
        console.print(table)


@dataclass(frozen=True)
class _Candidate:
    """A candidate whose Gram matrices are written, and what is known before they are.

    Attributes:
        config: Its part of the configuration.
        planned: The plan of a merge of this candidate alone, with its inputs and trace.
        samples: Its calibration data.
        outline: Shapes of its data.
        data: Its data's number of samples and fingerprint.
        model_files: What tells its files from any others.
        folder: Folder of its Gram matrices in the output folder: "" for the output folder itself.
        tensors: Layout of its Gram matrices on disk.
        shards: Layout of their files.
    """

    config: CandidateConfig
    planned: PlannedMerge
    samples: RankSamples
    outline: CalibrationOutline
    data: CalibrationSet
    model_files: Mapping[str, ModelFile]
    folder: str
    tensors: Mapping[str, OutputTensor]
    shards: tuple[Shard, ...]

    @property
    def parts(self) -> dict[str, str]:
        """Block, or `head` → its name in the journal, for those that have groups of linears."""
        groups = groups_by_part(self.planned.plan.blocks, self.planned.plan.head)
        return {part: f"{self.config.label}/{part}" for part in groups}

    @property
    def sums_folder(self) -> str:
        """Folder of the files of its Gram matrices in the output folder."""
        return _sums_folder(self.folder)

    @property
    def num_bytes(self) -> int:
        """Bytes of the files of its Gram matrices."""
        return sum(shard.num_bytes for shard in self.shards)


def write_grams(config: MergeConfig, out: Path, *, device: str, resume: bool, force: bool, quiet: bool) -> GramReport:
    """Writes the Gram matrices of every model of a configuration; arguments as in `largemerge.gram`.

    One process does it all: of several, one calls it.
    """
    start = time.perf_counter()
    with MemoryWatch(choose_device(device)) as memory:
        candidates = _prepare_all(config, out, memory.device, resume=resume, force=force)
        shards = tuple(shard for each in candidates for shard in each.shards)
        manifest = {
            each.config.label: manifest_of(
                each.planned, {each.data.name: {"sha256": each.data.fingerprint}}, each.shards
            )
            for each in candidates
        }
        watch = InputWatch(_checkpoints(candidates), {}, data_files(config))
        named = {"grams": manifest, "shards": [shard.file_name for shard in shards]}
        stage("opening the output folder")
        with open_output(out, named, _paths_read(config, candidates), resume=resume, force=force) as folder:
            folder.drop_damaged([_part_kind(candidates, folder.working)])
            resumed = len(folder.entries)
            steps = sum(_num_steps(each, folder.entries) for each in candidates)
            num_blocks = sum(len(each.planned.plan.blocks) for each in candidates)
            notes = tuple(dict.fromkeys(note for each in candidates for note in each.planned.plan.notes))
            with RunProgress(steps, num_blocks, memory.device, quiet=quiet) as progress:
                for note in (*notes, *folder.redone):
                    progress.tell(f"note: {note}")
                for each in candidates:
                    _write_candidate(each, folder, progress)
            watch.check()
            records = {each.config.label: _record(each, folder) for each in candidates}
            texts = {str(Path(each.folder, GRAMS_FILE)): records[each.config.label].to_text() for each in candidates}
            folder.finish_records(shards, texts, _remove_earlier)
        placed = {each.config.label: (out / each.folder, records[each.config.label]) for each in candidates}
        seconds = time.perf_counter() - start
        return GramReport(out, placed, notes, resumed, tuple(folder.redone), seconds, memory.peak())


# Before the work


def _prepare_all(
    config: MergeConfig, out: Path, device: torch.device, *, resume: bool, force: bool
) -> list[_Candidate]:
    """Opens all candidates, reads their data and plans; raises with the problems of all of them."""
    problems = list(_name_problems(config))
    if (out / "config.json").exists():
        problems.append(f"{out} holds a checkpoint, and --force would not replace it; choose another folder")
    candidates = []
    for candidate in config.models:
        single = _alone(config, candidate)
        try:
            stage(f"reading the headers of {candidate.label}")
            inputs = open_inputs(single)
            check_output(out, paths_read(single, inputs), resume=resume, force=force)
            candidates.append(_prepare(single, inputs, out, candidate.label if len(config.models) > 1 else "", device))
        except LargemergeError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    needs = [Need(out, sum(each.num_bytes for each in candidates), "Gram matrices", reuses=out / WORKING_FOLDER)]
    most = max((each.planned.plan.footprint.disk for each in candidates), default=0)
    needs += [Need(Path(config.memory.disk or out), most, "hidden states")] if most else []
    problems += room_problems(needs)
    if problems:
        raise LargemergeError(*problems)
    return candidates


def _name_problems(config: MergeConfig) -> Iterator[str]:
    """Yields names of candidates that cannot be names of folders, where each has one."""
    for index, candidate in enumerate(config.models if len(config.models) > 1 else ()):
        if Path(candidate.label).name != candidate.label or candidate.label.startswith("."):
            yield f"models[{index}].name: {candidate.label!r} would be a folder in OUT; expected a name without '/'"


def _alone(config: MergeConfig, candidate: CandidateConfig) -> MergeConfig:
    """A configuration of one model, without what decides only how models are merged."""
    given = config.parameters
    solved = tuple(part for part in given.solve or () if part != "embeddings")  # counts tokens, and has no sums
    return config.model_copy(
        update={
            "models": (candidate,),
            "merge_method": "regmean",
            "parameters": MethodParameters(solve=solved or None, include=given.include, exclude=given.exclude),
            "output": OutputConfig(),
            "dtype": None,
            "tokenizer_source": None,
            "tokenizer": None,
            "head": None,
        }
    )


def _prepare(config: MergeConfig, inputs: Inputs, out: Path, folder: str, device: torch.device) -> _Candidate:
    """Reads the data of one candidate, and plans; raises whatever makes it impossible."""
    ranks, name = Ranks(), config.names[0]
    planned, (outline,), (data,) = plan_with_data(config, inputs, device, out, ranks, writes_model=False)
    stage(f"reading the files of {name}, which say whose the Gram matrices are")
    tensors = kept_tensors(planned.plan.blocks, planned.plan.head, _sums_folder(folder))
    return _Candidate(
        config=config.models[0],
        planned=planned,
        samples=samples_of_rank(planned, (data,), ranks),
        outline=outline,
        data=data,
        model_files=identify(inputs.stored[name], inputs.adapters.get(name)),
        folder=folder,
        tensors=tensors,
        shards=layout_sums(tensors),
    )


def _sums_folder(folder: str) -> str:
    return str(Path(folder, SUMS_FOLDER))


def _checkpoints(candidates: Sequence[_Candidate]) -> Iterator[Any]:
    for each in candidates:
        inputs = each.planned.inputs
        yield from (*inputs.stored.values(), *(adapter.checkpoint for adapter in inputs.adapters.values()))


def _paths_read(config: MergeConfig, candidates: Sequence[_Candidate]) -> list[Path]:
    return list(dict.fromkeys(path for each in candidates for path in paths_read(config, each.planned.inputs)))


def _part_kind(candidates: Sequence[_Candidate], working: Path) -> PartKind:
    """The parts that the journal may have, with their files."""
    return PartKind(
        parts=[name for each in candidates for name in each.parts.values()],
        folder=working,
        shards=tuple(shard for each in candidates for shard in each.shards),
        sizes=stored_sizes({name: tensor for each in candidates for name, tensor in each.tensors.items()}),
    )


# The work


def _unfinished(each: _Candidate, finished: Collection[str]) -> tuple[list[str], Sequence[BlockPlan]]:
    """Parts that are still to be written, and the blocks that are run for them."""
    todo = [part for part, name in each.parts.items() if name not in finished]
    blocks = each.planned.plan.blocks
    last = max((number for number, block in enumerate(blocks) if block.name in todo), default=-1)
    return todo, blocks if HEAD in todo else blocks[: last + 1]


def _passes(each: _Candidate, todo: Sequence[str], block: BlockPlan, *, advances: bool) -> tuple[BlockPass, ...]:
    """The passes over one block; one that only runs it where its matrices are written already."""
    plan = each.planned.plan
    if block.name in todo:
        return plan_passes(plan.config.method, block, each.planned.trace, plan.placement.passes, advances=advances)
    return (BlockPass((), tuple(tensor.name for tensor in block.tensors), averages=False, last=True),)


def _num_steps(each: _Candidate, finished: Collection[str]) -> int:
    """Number of steps that progress will count."""
    todo, blocks = _unfinished(each, finished)
    batches = len(each.samples.calibration[0].batches)
    passes = sum(len(_passes(each, todo, block, advances=True)) for block in blocks)
    return passes * batches + int(HEAD in todo)


def _write_candidate(each: _Candidate, folder: OutputFolder, progress: RunProgress) -> None:
    """Runs a candidate's blocks on its data and writes its Gram matrices, as far as they are not in the journal."""
    todo, blocks = _unfinished(each, folder.entries)
    if not todo:
        return
    plan = each.planned.plan
    with ExitStack() as stack:
        weights = _open_weights(each, stack)
        hidden_states = stack.enter_context(hidden_states_of(plan, folder.working))
        samples = SampleRunner(block_runner(each.planned, weights, []), each.samples, hidden_states)
        writer = SumWriter(folder.working, each.tensors, each.shards, each.sums_folder)
        stack.callback(writer.close)
        stack.enter_context(float32_means_float32())
        ends = {block.name: block is not blocks[-1] or HEAD in todo for block in blocks}
        passes = [
            (block, block_pass)
            for block in blocks
            for block_pass in _passes(each, todo, block, advances=ends[block.name])
        ]
        transfer, scratch = Transfer(plan.device), Scratch()

        def load(item: tuple[BlockPlan, BlockPass]) -> Callable[[], Tensors]:
            return transfer.begin(weights.read_candidate(0, item[1].tensor_names))

        loaded = stack.enter_context(prefetched(load, passes, ahead=plan.placement.prefetch))
        for (block, block_pass), arrive in zip(passes, loaded, strict=True):
            grams = {group.leader: Gram(group.num_inputs, plan.device, scratch) for group in block_pass.groups}
            watched = Watched(list(grams), partial(_add, grams))
            advance = block_pass.last and ends[block.name]
            for _ in samples.run(block, 0, arrive(), "candidate", advance=advance, watched=watched):
                progress.step(block.name, "gram", each.config.label)
            for leader, gram in grams.items():
                if not torch.isfinite(gram.candidate_diagonal()).all():
                    what = f"{block.name}.{leader}: activations are not finite on the data of {each.config.label}"
                    raise MergeError(why_not_finite(weights, samples.runner, block, what))
                writer.write(block.name, leader, gram.candidate_rows())
            del grams
            if block_pass.last and block.name in todo:
                tokens = {group.leader: samples.num_rows(0, block.stack_of(group)) for group in block.groups}
                _finish_part(each, block.name, tokens, writer, folder)
        if HEAD in todo:
            _write_head(each, samples, writer, folder, scratch)
            progress.step(HEAD, "gram", each.config.label)


def _add(grams: Mapping[str, Gram], leader: str, x_NI: torch.Tensor) -> None:
    grams[leader].add_rows(x_NI)


def _write_head(
    each: _Candidate, samples: SampleRunner, writer: SumWriter, folder: OutputFolder, scratch: Scratch
) -> None:
    """Writes the Gram matrices of what follows the blocks, which have all run."""
    head, tokens = each.planned.plan.head, {}
    for group in (*((head.tied,) if head.tied is not None else ()), *head.groups):
        gram, counts = Gram(group.num_inputs, each.planned.plan.device, scratch), list[int]()

        def add(x_NI: torch.Tensor, gram: Gram = gram, counts: list[int] = counts) -> None:
            gram.add_rows(x_NI)
            counts.append(len(x_NI))

        collect_own(head, group, samples, each.planned.inputs.heads, 0, add)
        if not math.isfinite(gram.candidate_norm()):
            raise MergeError(
                f"{group.leader}: activations are not finite on the data of {each.config.label}; check that its "
                "weights are not far too large, or try compute_dtype: float32"
            )
        writer.write(HEAD, group.leader, gram.candidate_rows())
        tokens[group.leader] = sum(counts)
    _finish_part(each, HEAD, tokens, writer, folder)


def _finish_part(
    each: _Candidate, part: str, tokens: Mapping[str, int], writer: SumWriter, folder: OutputFolder
) -> None:
    """Brings the file of a block, or of the head, to the disk, and notes it in the journal."""
    folder.record(each.parts[part], {"digests": writer.finish(part)["kept"]["digests"], "tokens": dict(tokens)})


def _open_weights(each: _Candidate, stack: ExitStack) -> Weights:
    """Opens readers of a candidate, and of the base if there is one."""
    inputs = each.planned.inputs

    def reader(name: str) -> TensorReader:
        on_disk = inputs.on_disk(inputs.by_name[name])
        opened: TensorReader = stack.enter_context(open_reader(on_disk, inputs.adapters.get(name)))
        return opened

    return Weights(
        inputs=inputs,
        readers=[reader(inputs.candidates[0].name)],
        base_reader=reader(inputs.base.name) if inputs.base is not None else None,
        output={},
        writer=None,
        ranks=Ranks(),
        device=each.planned.plan.device,
    )


# What is said of them


def _record(each: _Candidate, folder: OutputFolder) -> GramRecord:
    """Makes the record of one candidate's Gram matrices, all of which are in the journal."""
    plan, inputs = each.planned.plan, each.planned.inputs
    data = each.config.calibration.data if each.config.calibration is not None else None
    entries = {part: folder.entries[name] for part, name in each.parts.items()}
    sums = folder.digests_of(each.shards)
    return GramRecord(
        versions=versions(),
        model=_public(each.config.model),
        class_name=inputs.skeleton.class_name,
        model_files=dict(each.model_files),
        data=_public(data or ""),
        data_sha256=each.data.fingerprint,
        num_samples=each.data.num_samples,
        inputs={
            name: InputShape(shape=shape, dtype=dtype_name(dtype))
            for name, (shape, dtype) in each.outline.inputs.items()
        },
        examples=_examples(each),
        compute_dtype=dtype_name(plan.compute_dtype),
        gram_dtype="float32",
        groups={
            part: {
                group.leader: GramGroup(
                    inputs=group.num_inputs,
                    tokens=entries[part]["tokens"][group.leader],
                    linears=tuple(linear.path for linear in group.linears),
                )
                for group in groups
            }
            for part, groups in groups_by_part(plan.blocks, plan.head).items()
        },
        sums={str(Path(name).relative_to(each.folder)): SumsFile(**digests) for name, digests in sums.items()},
    )


def _public(reference: str) -> str:
    """A reference as it may be published: of paths on this machine, the last parts."""
    return "+".join(Path(part).name if Path(part).exists() else part for part in reference.split("+"))


def _examples(each: _Candidate) -> dict[str, list[Any]]:
    """Integers of the first samples, where only the places of images or sounds in them are kept of the tokens."""
    special = torch.tensor(sorted(placeholder_tokens(each.planned.inputs.skeleton.model.config)), dtype=torch.int64)
    other = next(number for number in range(len(special) + 1) if number not in special)

    def masked(name: str, x: torch.Tensor) -> list[Any]:
        kept = torch.where(torch.isin(x.long(), special), x.long(), other) if name.endswith("input_ids") else x
        numbers: list[Any] = kept.tolist()
        return numbers

    return {name: masked(name, x) for name, x in each.outline.examples.items()}


def _remove_earlier(out: Path, kept: Collection[Path]) -> None:
    """Removes the Gram matrices that lie in a folder, the records first."""
    records = [path for path in (out / GRAMS_FILE, *out.glob(f"*/{GRAMS_FILE}")) if path.is_file()]
    for record in records:
        record.unlink()
    for record in records:
        for path in record.parent.glob(f"{SUMS_FOLDER}/*.safetensors"):
            if path not in kept:
                path.unlink()
