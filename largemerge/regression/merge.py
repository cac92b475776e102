"""A regression merge as a list of steps.

    merge_by_regression   config → open inputs → read calibration data → plan → output folder → Job
                          → side files, index, config → report
    Job.run               open readers and writer → tensors outside the blocks → block after block (`engine.py`)

Every rank runs all of this. Rank 0 alone shows progress, has the writer of the output (`Weights.writer`), merges the
tensors outside the blocks, and finishes the folder.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from largemerge.calibration import (
    CalibrationOutline,
    CalibrationSet,
    load_calibration,
    outline_calibration,
    outline_from_config,
)
from largemerge.calibration.batches import mmap_inputs, split_batches
from largemerge.calibration.survey import is_made_up, survey_calibration, without_contents
from largemerge.checkpoint.index import Checkpoint, shared_folders
from largemerge.checkpoint.locate import existing_folder
from largemerge.checkpoint.lora import open_reader
from largemerge.checkpoint.reader import CheckpointReader, TensorReader
from largemerge.checkpoint.room import Need, room_problems
from largemerge.checkpoint.writer import (
    NotFiniteError,
    Shard,
    ShardWriter,
    layout_shards,
    stored_sizes,
)
from largemerge.comparison import ComparedTensor, Comparison, Verification
from largemerge.devices import choose_device
from largemerge.distributed.collectives import SHARED_BYTES, AsyncCollectives, open_collectives
from largemerge.distributed.partition import samples_at_once
from largemerge.distributed.ranks import Ranks, device_of_rank, start_ranks, too_many_threads
from largemerge.distributed.shared_memory import ALONE, Node, find_node
from largemerge.errors import CalibrationError, LargemergeError, MergeError
from largemerge.machine import MemoryWatch, versions
from largemerge.model.block_runner import BlockRunner
from largemerge.model.classes import oriented
from largemerge.model.hidden_states import DiskStore, HiddenStates, MemoryStore, Store
from largemerge.model.signature import forward_signature, loss_input
from largemerge.output import OutputFolder, PartKind, check_output, drop_damaged, open_for_ranks, rehearse
from largemerge.progress import Clock, RunProgress, stage
from largemerge.regression.averages import merge_non_block
from largemerge.regression.collect import EngineSettings, SampleRunner
from largemerge.regression.config import MergeConfig
from largemerge.regression.embeddings import TokenCounts, arguments_of, average_by_token, count_tokens
from largemerge.regression.engine import Engine
from largemerge.regression.gram_files import GramReader, check_grams, from_grams, gram_files
from largemerge.regression.inputs import Inputs, open_inputs
from largemerge.regression.kept_sums import SequenceSums, SumWriter, check_previous, layout_sums, sum_files
from largemerge.regression.layer_scales import (
    SCRATCH_DIGESTS,
    SCRATCH_FOLDER,
    layer_scales,
    unscaled_part,
    write_scaled,
)
from largemerge.regression.passes import goes_by_linear, plan_passes
from largemerge.regression.plan import MergePlan, PlannedMerge, forecast, make_plan
from largemerge.regression.planning.rates import Cluster, Machines
from largemerge.regression.planning.workload import OffloadTo
from largemerge.regression.rank_exchange import RankExchange
from largemerge.regression.report import MergeReport, config_text, write_side_files
from largemerge.regression.samples import (
    RankSamples,
    check_samples,
    no_outline,
    no_samples,
    partition_samples,
    read_all,
)
from largemerge.regression.tensor_plan import HEAD, MergeRule, TensorPlan
from largemerge.regression.tokens import ArrangedReader
from largemerge.regression.weights import Weights
from largemerge.weight_matching.run import journal_kind, match_models

_MAX_DATA_FILES = 10_000
NON_BLOCK = "outside"
"""Name of the part that holds all tensors outside the blocks, in journal, report and progress."""


def plan_regression(
    config: MergeConfig,
    *,
    device: str,
    probe: bool,
    num_ranks: int,
    cluster: Cluster | None,
    from_config: bool,
) -> MergePlan:
    """Plans a merge by a regression method; arguments as in `largemerge.plan`."""
    if cluster is not None:
        machines = Machines(torch.device("cuda"), cluster.num_ranks, cluster.gpus_per_node, cluster)
    else:
        machines = Machines(choose_device(device), num_ranks, num_ranks)
    stage("reading the headers of all models")
    inputs = open_inputs(config, from_config=from_config)
    if not from_config:
        check_previous(config, contents=False)
        check_grams(config, inputs, contents=False)
    stage("looking at the calibration data")
    outline = outline_from_config if from_config else outline_calibration
    outlines = read_all(config, inputs, outline, partial(no_outline, config))
    samples = partial(no_samples, config)
    calibration = None
    if not from_config:
        calibration = read_all(config, inputs, survey_calibration, samples, _mapped(config, inputs))
    planned = make_plan(config, inputs, machines, outlines, calibration)
    if calibration is not None:
        real = [data for data in calibration if not is_made_up(data)]
        misfits = check_samples(inputs.skeleton, planned.trace, real, any_ids=inputs.tokens is not None)
        planned = replace(planned, plan=replace(planned.plan, problems=(*misfits, *planned.plan.problems)))
    stage("measuring this machine")
    return forecast(planned, outlines, calibration, machines, probe=probe and not from_config)


def _mapped(config: MergeConfig, inputs: Inputs) -> Callable[[CalibrationSet], CalibrationSet]:
    """Makes what gives a plan's data the output's token ids, and lets go of pixels, of which only shapes matter."""
    tokens = inputs.tokens

    def transform(data: CalibrationSet) -> CalibrationSet:
        if tokens is not None and not is_made_up(data):
            data = tokens.map_ids(data, takes_unknown=config.method.inputs == "candidate")
        return without_contents(data)

    return transform


def merge_by_regression(
    config: MergeConfig,
    out: Path,
    *,
    device: str,
    resume: bool,
    force: bool,
    max_shard_bytes: int,
    quiet: bool,
    verify: bool = True,
    planned: Callable[[MergePlan], None] | None = None,
) -> MergeReport:
    """Merges by a regression method; arguments as in `largemerge.merge`, and `planned` is called with the plan."""
    start = time.perf_counter()
    with start_ranks(on_gpus=device != "cpu") as ranks:
        target = ranks.agree(lambda: device_of_rank(device, ranks))
        with MemoryWatch(target) as memory:
            prepared = _prepare(config, target, out, ranks, resume=resume, force=force)
            if planned is not None:
                planned(prepared.planned.plan)
            inputs = prepared.planned.inputs
            side_files = prepared.planned.files.copied
            shards = layout_shards(prepared.planned.plan.output, max_shard_bytes, side_files.inner)
            sums = layout_sums(prepared.planned.plan.kept_sums)
            opened = [*inputs.stored.values(), *(adapter.checkpoint for adapter in inputs.adapters.values())]
            opened += inputs.aligned_to.values()
            write = partial(write_side_files, planned=prepared.planned)
            watch = ranks.agree(lambda: rehearse(opened, side_files, write, ranks, data_files(config)))
            manifest = manifest_of(prepared.planned, prepared.calibration, (*shards, *sums)) | {
                "side files": watch.digests
            }
            stage("opening the output folder")
            with open_for_ranks(out, manifest, prepared.input_paths, ranks, resume=resume, force=force) as folder:
                scratch = layout_shards(prepared.planned.plan.unscaled, max_shard_bytes)
                kinds = _part_kinds(prepared.planned.plan, (*shards, *sums), scratch, folder.working)
                kinds += [journal_kind(inputs.matching, folder.working)] if inputs.matching is not None else []
                drop_damaged(folder, ranks, kinds)
                if inputs.matching is not None:
                    inputs = replace(inputs, matched=match_models(inputs.matching, folder, ranks, quiet=quiet))
                    prepared = replace(prepared, planned=replace(prepared.planned, inputs=inputs))
                    write = partial(write_side_files, planned=prepared.planned)
                job = Job(
                    planned=prepared.planned,
                    samples=prepared.samples,
                    token_counts=prepared.token_counts,
                    kept_samples=prepared.kept_samples,
                    shards=shards,
                    sums=sums,
                    scratch=scratch,
                    folder=folder,
                    ranks=ranks,
                    quiet=quiet,
                    clock=Clock(start),
                )
                job.run()
                stage("measuring what of every model is in the output, and finishing it")
                job.clock.begin("")
                with job.clock.stage("verify_and_finish"):
                    verified = _verify(prepared.planned, shards, folder) if verify and ranks.is_first else None
                report = _report(prepared, job, folder, memory, start, out)
                report = replace(report, verified=verified)
                written: dict[str, Any] = {}
                if ranks.is_first:
                    watch.check()
                    written = folder.finish(
                        (*shards, *sums),
                        partial(write, report=report),
                        config_text(prepared.planned),
                        report.to_json(),
                        side_files.inner,
                    )
        written = ranks.from_first(written)  # nobody says that the merge is done before it is
    return replace(report, written=written)


@dataclass(frozen=True)
class _Prepared:
    """What is known before the output folder is opened.

    Attributes:
        planned: The plan, with the inputs and the trace that it was made from.
        samples: This rank's part of the calibration data.
        token_counts: How often tokens occur in all data; `None` where nobody asked, and on other ranks than 0.
        kept_samples: What is kept of the data for a later merge of the sequence, by forward argument, some samples at a
            time; on rank 0.
        calibration: Number of samples and fingerprint of every candidate's data, by name.
        input_paths: Paths that must not be written to.
    """

    planned: PlannedMerge
    samples: RankSamples
    token_counts: TokenCounts | None
    kept_samples: Mapping[str, Iterator[torch.Tensor]]
    calibration: Mapping[str, Any]
    input_paths: list[Path]


def _prepare(
    config: MergeConfig, device: torch.device, out: Path, ranks: Ranks, *, resume: bool, force: bool
) -> _Prepared:
    """Reads the calibration data and plans the merge; raises whatever makes it impossible, on all ranks."""

    def plan_it() -> tuple[PlannedMerge, tuple[CalibrationSet, ...], list[Path]]:
        stage("reading the headers of all models")
        inputs = open_inputs(config)
        input_paths = paths_read(config, inputs)
        if ranks.is_first:
            check_output(out, input_paths, resume=resume, force=force)
            if config.merged_before is not None:
                stage("comparing the earlier merge with its digests")
                check_previous(config, contents=True)
            if config.grams:
                stage("comparing Gram matrices, and the models that they are of, with their digests")
                check_grams(config, inputs, contents=True)
        planned, _, calibration = plan_with_data(config, inputs, device, out, ranks)
        return planned, calibration, input_paths

    planned, calibration, input_paths = ranks.agree(plan_it)
    # Free memory differs from moment to moment, but all must cut the work alike.
    placement = ranks.from_first(planned.plan.placement)
    planned = replace(planned, plan=replace(planned.plan, placement=placement))
    samples = samples_of_rank(planned, calibration, ranks)
    seen = {
        data.name: {
            "num_samples": data.num_samples,
            "tokens": max(rows) or planned.plan.num_tokens[data.name],
            "sha256": data.fingerprint,
        }
        for data, rows in zip(calibration, samples.row_counts, strict=True)
    }
    for name, record in config.grams.items():
        seen[name] |= {"num_samples": record.num_samples, "data": record.data, "data_sha256": record.data_sha256}
    counts = None
    if planned.plan.embedding is not None and ranks.is_first:
        skeleton, name = planned.inputs.skeleton, planned.plan.embedding.name
        num_rows = skeleton.model.get_parameter(name).shape[0]
        counts = count_tokens(calibration, config.shares, num_rows, arguments_of(skeleton, name))
    kept = planned.plan.kept_samples
    kept_samples = kept.read(calibration) if kept is not None and ranks.is_first else {}
    return _Prepared(planned, samples, counts, kept_samples, seen, input_paths)


def samples_of_rank(planned: PlannedMerge, calibration: Sequence[CalibrationSet], ranks: Ranks) -> RankSamples:
    """Cuts the data of all candidates into batches that are run at once, and keeps this rank's part."""
    num_samples = sum(data.num_samples for data in calibration)
    max_samples = samples_at_once(planned.plan.placement.samples, num_samples, ranks.size)
    return partition_samples(
        tuple(replace(data, batches=split_batches(data.batches, max_samples)) for data in calibration),
        planned.plan.blocks,
        planned.trace,
        loss_input(forward_signature(planned.inputs.skeleton)),
        ranks,
        in_groups=planned.plan.config.method.needs_whole_grams,
        summed=from_grams(planned.plan.config),
    )


def _report(
    prepared: _Prepared, job: Job, folder: OutputFolder, memory: MemoryWatch, start: float, out: Path
) -> MergeReport:
    """Collective: makes the report, with rank 0's times."""
    ranks, peak = job.ranks, memory.peak()
    own: dict[str, Any] = {
        "host_anonymous": peak.host_anonymous,
        "host_total": peak.host_total,
        "device": peak.device,
        "bytes_read": job.bytes_read,
        "bytes_communicated": ranks.num_bytes,
        "seconds_communicating": round(ranks.seconds, 3),
        "reads_shared_with": list(job.node.others) if job.node.prefix else [],
        "reads_not_shared": job.not_shared,
    }
    of_ranks = ranks.gather(own)
    return MergeReport.build(
        plan=prepared.planned.plan,
        inputs=prepared.planned.inputs,
        calibration=prepared.calibration,
        parts={name: _without_digests(entry) for name, entry in ranks.from_first(folder.entries).items()},
        prepared_seconds=job.started - start,
        total_seconds=time.perf_counter() - start,
        resumed_parts=job.resumed_parts,
        peak=peak,
        bytes_read=sum(rank["bytes_read"] for rank in of_ranks),
        hidden_bytes_on_disk=job.hidden_bytes_on_disk,
        retries=[retry for retries in ranks.gather(job.retries) for retry in retries],
        timeline=job.clock.timeline,
        memory_over_time=memory.over_time(start),
        ranks=of_ranks if ranks.size > 1 else (),
        out=out,
    )


def _without_digests(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the journal as the report shows it: digests stand in one place for all parts."""
    return {key: value for key, value in entry.items() if key not in ("digests", SCRATCH_DIGESTS)}


def _part_names(plan: MergePlan) -> list[str]:
    """Names of the parts that the output is written in."""
    return [NON_BLOCK, *([HEAD] if plan.head else []), *(block.name for block in plan.blocks)]


def _part_kinds(
    plan: MergePlan, shards: tuple[Shard, ...], scratch: tuple[Shard, ...], working: Path
) -> list[PartKind]:
    """The kinds of parts that the journal may have, with their files."""
    kinds = [PartKind(_part_names(plan), working, shards, stored_sizes({**plan.output, **plan.kept_sums}))]
    if plan.unscaled:
        names, sizes = plan.first_steps, stored_sizes(plan.unscaled)
        kinds.append(PartKind(names, working / SCRATCH_FOLDER, scratch, sizes, SCRATCH_DIGESTS))
    return kinds


def paths_read(config: MergeConfig, inputs: Inputs) -> list[Path]:
    """Paths that a merge reads and must not write to."""
    paths = [checkpoint.root for checkpoint in (*inputs.checkpoints, *inputs.aligned_to.values())]
    paths += [folder for adapter in inputs.adapters.values() for folder in adapter.folders]
    return paths + _data_paths(config)


def _data_paths(config: MergeConfig) -> list[Path]:
    """Lists the files and folders of calibration data that are here, and not on the Hub."""
    given = [each.calibration for each in config.models if each.calibration is not None]
    data = [Path(each.data or each.grams or "").expanduser() for each in given]
    return [path for path in data if path.exists()]


def data_files(config: MergeConfig) -> list[Path]:
    """Lists the local files of calibration data and earlier sums; of a folder, as many as are seen in a moment."""
    grams = {Path(each.grams) for each in config.models if each.grams is not None}
    data = [path for path in _data_paths(config) if path not in grams]
    found = [*(path for path in data if path.is_file()), *sum_files(config), *gram_files(config)]
    for folder in (path for path in data if path.is_dir()):
        found += itertools.islice((path for path in folder.rglob("*") if path.is_file()), _MAX_DATA_FILES)
    return found


def plan_with_data(
    config: MergeConfig,
    inputs: Inputs,
    device: torch.device,
    out: Path,
    ranks: Ranks,
    *,
    writes_model: bool = True,
) -> tuple[PlannedMerge, tuple[CalibrationOutline, ...], tuple[CalibrationSet, ...]]:
    """Reads all candidates' data and plans with it; raises where data or plan have problems.

    Args:
        config: The configuration.
        inputs: The opened inputs.
        device: The device that computes.
        out: The output folder.
        ranks: The ranks of the merge.
        writes_model: Whether the output folder must have room for the merged model.
    """
    stage("reading the calibration data")
    outlines = read_all(config, inputs, outline_calibration, partial(no_outline, config))
    if config.memory.maps_inputs:
        needed = sum(outline.floating_bytes for outline in outlines)
        room = room_problems([Need(_mapped_folder(config, out), needed, "pixels and the like")])
        if room:
            raise LargemergeError(*room)
    samples = partial(no_samples, config)
    calibration = read_all(config, inputs, load_calibration, samples, _transform(config, inputs, out))
    machines = Machines(device, ranks.size, ranks.local_size)
    planned = make_plan(config, inputs, machines, outlines, calibration, out, writes_model=writes_model)
    notes = (*planned.plan.notes, *too_many_threads(ranks, device))
    planned = replace(planned, plan=replace(planned.plan, notes=notes))
    misfits = check_samples(inputs.skeleton, planned.trace, calibration, any_ids=inputs.tokens is not None)
    if misfits:
        raise CalibrationError(*misfits)
    if planned.plan.problems:
        raise LargemergeError(*planned.plan.problems)
    return planned, outlines, calibration


def _transform(config: MergeConfig, inputs: Inputs, out: Path) -> Callable[[CalibrationSet], CalibrationSet] | None:
    """Makes what gives data the output's token ids, and offloads pixels to a mapped file where there are limits."""
    tokens, maps = inputs.tokens, config.memory.maps_inputs
    if tokens is None and not maps:
        return None
    folder = _mapped_folder(config, out)

    def transform(data: CalibrationSet) -> CalibrationSet:
        if tokens is not None:
            data = tokens.map_ids(data, takes_unknown=config.method.inputs == "candidate")
        return mmap_inputs(data, folder) if maps else data

    return transform


def _mapped_folder(config: MergeConfig, out: Path) -> Path:
    """The folder of the mapped files of calibration inputs."""
    return existing_folder(Path(config.memory.disk) if config.memory.disk is not None else out)


def manifest_of(planned: PlannedMerge, calibration: Mapping[str, Any], shards: Sequence[Shard]) -> dict[str, Any]:
    """What must be the same on all ranks, and when a merge is resumed; `calibration` as in the report."""
    inputs, plan = planned.inputs, planned.plan
    return {
        # Limits may change on the way: what they decide changes no bit, but for the samples at once.
        "config": plan.config.model_dump(mode="json", exclude={"memory": {"device", "host", "disk"}}),
        "inputs": {
            **{checkpoint.name: dict(checkpoint.fingerprint) for checkpoint in inputs.checkpoints},
            **{name: dict(checkpoint.fingerprint) for name, checkpoint in inputs.aligned_to.items()},
        },
        "calibration data": {name: entry["sha256"] for name, entry in calibration.items()},
        "versions": versions(),
        "device": plan.device.type,
        "samples at once": plan.placement.samples,
        "compute_dtype": str(plan.compute_dtype),
        "shards": {shard.file_name: shard.num_bytes for shard in shards},
        **({"vocabulary": inputs.tokens.fingerprint()} if inputs.tokens is not None else {}),
    }


def _verify(planned: PlannedMerge, shards: tuple[Shard, ...], folder: OutputFolder) -> Verification:
    """Measures how much of every candidate is in the finished tensors, from a sample of their rows."""
    start = time.perf_counter()
    comparison, inputs, plan = Comparison(), planned.inputs, planned.plan
    config = json.loads(config_text(planned))
    by_block = [(block.name, tensor) for block in plan.blocks for tensor in block.tensors]
    by_block += [(NON_BLOCK, tensor) for tensor in plan.non_block]
    with ExitStack() as stack:
        written = oriented(inputs.skeleton.model, folder.written(shards, config), None)
        output = stack.enter_context(CheckpointReader(written))
        readers = {
            each.name: inputs.permuted(
                each.name, stack.enter_context(open_reader(inputs.on_disk(each), inputs.adapters.get(each.name)))
            )
            for each in inputs.checkpoints
        }
        by_token = inputs.tokens.parameters if inputs.tokens is not None else frozenset()
        for block, tensor in by_block:
            if tensor.name in by_token:
                continue  # the same row is another token in another model
            for key, keys in inputs.keys_by_model(tensor.name).items():
                if tensor.rule is MergeRule.COPIED or key not in plan.output:
                    continue
                infos = [inputs.by_name[name].tensors[own] for name, own in keys.items()]
                reads = {name: partial(readers[name].read, own) for name, own in keys.items()}
                base = reads.pop(inputs.base.name, None) if inputs.base is not None else None
                plain = all(info.quantization is None for info in infos) and plan.output[key].quantization is None
                shape = plan.output[key].shape
                comparison.add(ComparedTensor(block, shape, partial(output.read, key), reads, base, plain))
    return comparison.finish(time.perf_counter() - start)


@dataclass
class Job:
    """The long work of a merge: writes all shards.

    Attributes:
        planned: The plan, with the inputs and the trace that it was made from.
        samples: This rank's part of the calibration data.
        token_counts: How often tokens occur in all data; `None` where nobody asked, and on other ranks than 0.
        kept_samples: What is kept of the data for a later merge of the sequence, by forward argument, some samples at a
            time; on rank 0, until it is written.
        shards: Layout of the output's files.
        sums: Layout of the files of sums that are kept beside them.
        scratch: Layout of the files of merged task vectors that wait for the scales of their layers.
        folder: The output folder, with the journal of finished parts.
        ranks: The ranks of the merge.
        quiet: Whether no progress is shown.
        clock: Counts seconds by stage.
        started: When the job was made, in seconds of `time.perf_counter`.
        resumed_parts: Number of parts that an earlier run had finished.
        bytes_read: Bytes that this rank read from candidates and base.
        hidden_bytes_on_disk: Bytes that hidden states took on disk.
        retries: Messages about blocks that were run again in smaller parts.
        node: Ranks that share this machine's memory.
        not_shared: Why nothing is shared, where something could be; else "".
    """

    planned: PlannedMerge
    samples: RankSamples
    token_counts: TokenCounts | None
    kept_samples: Mapping[str, Iterator[torch.Tensor]]
    shards: tuple[Shard, ...]
    sums: tuple[Shard, ...]
    scratch: tuple[Shard, ...]
    folder: OutputFolder
    ranks: Ranks
    quiet: bool
    clock: Clock
    started: float = field(init=False, default_factory=time.perf_counter)
    resumed_parts: int = field(init=False, default=0)
    bytes_read: int = field(init=False, default=0)
    hidden_bytes_on_disk: int = field(init=False, default=0)
    retries: list[str] = field(init=False, default_factory=list)
    node: Node = field(init=False, default=ALONE)
    not_shared: str = field(init=False, default="")

    def run(self) -> None:
        """Writes every part that is not in the journal yet."""
        plan = self.planned.plan
        own_parts = {*_part_names(plan), *plan.first_steps}  # not those of an alignment
        finished = frozenset(self.folder.entries) & own_parts
        self.resumed_parts = len(finished)
        if finished.issuperset(_part_names(plan)):
            return
        with ExitStack() as stack:
            stack.enter_context(self.ranks.busy())
            weights = self._open_weights(stack)
            stack.enter_context(self._as_merge_error(weights))
            quiet = self.quiet or not self.ranks.is_first
            progress = stack.enter_context(
                RunProgress(self._num_steps(finished), len(plan.blocks), plan.device, quiet=quiet)
            )
            for note in (*plan.notes, *self.folder.redone):
                progress.tell(f"note: {note}")
            sequence, grams = self._open_sums(stack), GramReader.of(plan.config)
            if NON_BLOCK not in finished and self.ranks.is_first:
                self._merge_non_block(weights, progress, sequence)
            self.kept_samples = {}  # other ranks' data is let go of
            if plan.unscaled:
                self._merge_and_scale(weights, progress, sequence, grams, stack)
            else:
                done = partial(self._record, written=weights)
                self._merge_blocks(weights, progress, sequence, grams, stack, finished, done)
            self.bytes_read = weights.bytes_read + sequence.bytes_read + grams.bytes_read

    def _merge_blocks(
        self,
        weights: Weights,
        progress: RunProgress,
        sequence: SequenceSums,
        grams: GramReader,
        stack: ExitStack,
        finished: frozenset[str],
        done: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """Merges all blocks, and the head, that are not finished; `done` notes each in the journal."""
        plan = self.planned.plan
        hidden_states = stack.enter_context(hidden_states_of(plan, self.folder.working))
        if self.ranks.size > 1:
            self.node, self.not_shared = find_node(self.ranks, self._largest_block(weights), SHARED_BYTES)
            stack.callback(self.node.clean_up)
            self.ranks.before_end(self.node.clean_up)
        # In a regression the first candidate is the anchor: it has no right-hand side to compute together.
        first = 0 if plan.config.method.needs_whole_grams else 1
        rank_groups = self.samples.partition.rank_groups[first:]
        collectives = stack.enter_context(open_collectives(self.ranks, self.node, plan.device, rank_groups))
        self._engine(weights, hidden_states, progress, collectives, sequence, grams).run(finished, done)
        if plan.placement.hidden_states is OffloadTo.DISK:
            self.hidden_bytes_on_disk = hidden_states.num_bytes

    def _merge_and_scale(
        self,
        weights: Weights,
        progress: RunProgress,
        sequence: SequenceSums,
        grams: GramReader,
        stack: ExitStack,
    ) -> None:
        """Merges all blocks to scratch files, then scales their merged task vectors (see `layer_scales.py`)."""
        plan, folder = self.planned.plan, self.folder.working / SCRATCH_FOLDER
        scratch = None
        if self.ranks.is_first:
            folder.mkdir(exist_ok=True)
            scratch = stack.enter_context(ShardWriter(folder, plan.unscaled, self.scratch))
        unscaled = replace(weights, output=plan.unscaled, writer=scratch, writes_parameters=True)
        finished = self._unscaled_blocks()

        def done(block: str, entry: dict[str, Any]) -> None:
            self._record(unscaled_part(block), entry, unscaled, SCRATCH_DIGESTS)

        if len(finished) < len(plan.blocks):
            self._merge_blocks(unscaled, progress, sequence, grams, stack, finished, done)
        if scratch is None:
            return
        entries = self.folder.entries
        first_steps = {block.name: entries[unscaled_part(block.name)] for block in plan.blocks}
        reports = {name: report for entry in first_steps.values() for name, report in entry["linears"].items()}
        scales = layer_scales(plan.blocks, {name: report["norm"] for name, report in reports.items()})
        for block in plan.blocks:
            if block.name in entries:
                continue
            self.clock.begin(block.name)
            before, first_step = weights.own_writer.bytes_written, first_steps[block.name]
            with self.clock.stage("scale"):
                linears = write_scaled(block, scales, reports, scratch, weights)
            seconds = Counter(first_step["seconds"]) + Counter(self.clock.seconds())
            errors = weights.quantization_errors(plan.name for plan in block.tensors)
            entry = {
                "linears": linears,
                "bytes_read": first_step["bytes_read"],
                "bytes_written": weights.own_writer.bytes_written - before,
                **({"quantization_errors": errors} if errors else {}),
                "seconds": dict(seconds),
            }
            self._record(block.name, entry, weights)
            progress.step(block.name, "scale")

    def _unscaled_blocks(self) -> frozenset[str]:
        """Names of the blocks of which the first of two steps is finished."""
        blocks = self.planned.plan.blocks
        return frozenset(block.name for block in blocks if unscaled_part(block.name) in self.folder.entries)

    def _open_weights(self, stack: ExitStack) -> Weights:
        """Opens readers of all inputs, and on rank 0 the writer."""
        plan, inputs = self.planned.plan, self.planned.inputs
        # Each tensor is read once, unless a block or the head takes several passes, ranks share a candidate, or two
        # adapters a base.
        method = plan.config.method
        several = method.granularity != "block" or bool(plan.head) or method.scales_layers
        read_once = plan.placement.passes == 1 and self.ranks.size == 1 and not several
        shared = shared_folders(inputs.checkpoints)

        def reader(checkpoint: Checkpoint) -> TensorReader:
            adapter, on_disk = inputs.adapters.get(checkpoint.name), inputs.on_disk(checkpoint)
            past_cache = read_once and checkpoint.folder.resolve() not in shared
            opened = stack.enter_context(open_reader(on_disk, adapter, past_cache=past_cache))
            opened = inputs.permuted(checkpoint.name, opened)
            return opened if inputs.tokens is None else ArrangedReader(opened, checkpoint, inputs.tokens)

        return Weights(
            inputs=inputs,
            readers=[reader(candidate) for candidate in inputs.candidates],
            base_reader=reader(inputs.base) if inputs.base is not None else None,
            output=plan.output,
            writer=(
                stack.enter_context(ShardWriter(self.folder.working, plan.output, self.shards))
                if self.ranks.is_first
                else None
            ),
            ranks=self.ranks,
            device=plan.device,
        )

    def _open_sums(self, stack: ExitStack) -> SequenceSums:
        """Makes what reads earlier sums, and on rank 0 writes those that are kept."""
        writer = None
        if self.sums and self.ranks.is_first:
            writer = SumWriter(self.folder.working, self.planned.plan.kept_sums, self.sums)
            stack.callback(writer.close)
        return SequenceSums.of(self.planned.plan.config, writer)

    def _largest_block(self, weights: Weights) -> int:
        """Bytes on disk of the first candidate's largest block."""
        blocks = self.planned.plan.blocks
        return max((weights.stored_bytes(0, [plan.name for plan in block.tensors]) for block in blocks), default=0)

    def _engine(
        self,
        weights: Weights,
        hidden_states: HiddenStates,
        progress: RunProgress,
        collectives: AsyncCollectives | None,
        sequence: SequenceSums,
        grams: GramReader,
    ) -> Engine:
        """Makes the engine from plan and configuration."""
        plan, trace = self.planned.plan, self.planned.trace
        placement, method = plan.placement, plan.config.method
        return Engine(
            settings=EngineSettings(
                method=method,
                shares=plan.config.shares,
                num_merged=plan.config.num_merged,
                prefetch=placement.prefetch,
                write_in_background=placement.writes_in_background(plan.device),
            ),
            names=plan.config.names,
            blocks=plan.blocks,
            passes={
                block.name: plan_passes(
                    method,
                    block,
                    trace,
                    placement.passes,
                    advances=method.follows_candidates and (method.reads_end or block is not plan.blocks[-1]),
                )
                for block in plan.blocks
            },
            head=plan.head,
            weights=weights,
            samples=SampleRunner(
                block_runner(self.planned, weights, self.retries),
                self.samples,
                hidden_states,
            ),
            watcher=progress,
            clock=self.clock,
            rank_exchange=RankExchange(self.ranks, self.samples.partition, self.node, collectives),
            sequence=sequence,
            grams=grams,
        )

    def _merge_non_block(self, weights: Weights, progress: RunProgress, sequence: SequenceSums) -> None:
        """Writes all tensors outside the blocks, and samples that are kept, and notes it in the journal."""
        plan = self.planned.plan
        self.clock.begin("")
        averaged = [tensor for tensor in plan.non_block if tensor.rule is not MergeRule.SOLVED]
        with self.clock.stage(NON_BLOCK):
            others = self._others(weights)
            merge_non_block(averaged, weights, plan.config.shares, lambda name: progress.step(name, NON_BLOCK), others)
            with self.ranks.blocked():
                weights.own_writer.flush()
        errors = weights.quantization_errors(tensor.name for tensor in averaged)
        entry: dict[str, Any] = {"bytes_read": weights.bytes_read, "bytes_written": weights.own_writer.bytes_written}
        entry |= {"quantization_errors": errors} if errors else {}
        entry |= sequence.keep_samples(self.kept_samples)
        self._record(NON_BLOCK, entry | {"seconds": self.clock.seconds()}, weights)

    def _others(self, weights: Weights) -> dict[str, Callable[[TensorPlan], None]]:
        """What writes tensors that are not plainly averaged: an embedding whose tokens are counted."""
        plan = self.planned.plan
        if plan.embedding is None or self.token_counts is None:
            return {}
        write = partial(
            average_by_token,
            weights=weights,
            shares=plan.config.shares,
            counts=self.token_counts,
            prior=plan.config.method.embedding_prior,
        )
        return {plan.embedding.name: write}

    def _record(self, part: str, entry: Mapping[str, Any], written: Weights, key: str = "digests") -> None:
        """Notes a finished part in the journal, with the digests of all that was written since the last one.

        Args:
            part: Its name.
            entry: What is noted.
            written: What has written it.
            key: What the entry calls the digests.
        """
        kept = entry.get("kept", {"digests": {}, "bytes": 0})
        noted = {name: value for name, value in entry.items() if name != "kept"}
        noted["bytes_written"] += kept["bytes"]
        self.folder.record(part, {**noted, key: kept["digests"] | written.own_writer.take_digests()})

    @contextmanager
    def _as_merge_error(self, weights: Weights) -> Iterator[None]:
        """Names the model, or the setting, where NaN or infinity in a tensor comes from."""
        try:
            yield
        except NotFiniteError as error:
            raise MergeError(f"{error.name}: {error}: {self._why_not_finite(error.name, weights)}") from None

    def _why_not_finite(self, key: str, weights: Weights) -> str:
        plan, inputs = self.planned.plan, self.planned.inputs
        names = [tensor.name for tensors in (plan.non_block, *(b.tensors for b in plan.blocks)) for tensor in tensors]
        method = plan.config.method
        other = f"a ridge above {method.ridge:g}"
        if method.merges_subspaces:
            other = f"a scale below {method.scale:g}" + (", or scale_layers: false" if method.scale_layers else "")
        return weights.why_not_finite([name for name in names if key in (name, *inputs.keys_by_model(name))]) or (
            "all models hold finite numbers there; set a dtype that holds more (bfloat16, float32), compute_dtype: "
            f"float32, or {other}"
        )

    def _num_steps(self, finished: frozenset[str]) -> int:
        """Number of steps that progress will count."""
        plan = self.planned.plan
        scaled = 0
        if plan.unscaled:
            scaled = sum(block.name not in finished for block in plan.blocks)
            finished = self._unscaled_blocks() | (finished & {NON_BLOCK})
        batches = sum(len(data.batches) for data in self.samples.calibration)
        forwards = int(plan.config.method.forwards_merged)
        streams = forwards + int(plan.config.method.follows_candidates)
        steps = scaled
        if NON_BLOCK not in finished:
            steps += sum(tensor.rule is not MergeRule.SOLVED for tensor in plan.non_block)
        if plan.head and HEAD not in finished:
            tied = batches * len(plan.blocks) + 1 if plan.head.tied is not None else 0
            steps += tied + len(plan.head.groups) * (batches + 1)
        for block in plan.blocks:
            read = plan.config.method.reads_end or block is not plan.blocks[-1]
            if block.name in finished:
                steps += batches * streams if read else 0
            else:
                by_linear = goes_by_linear(plan.config.method, block, self.planned.trace)
                passes = len(block.groups) if by_linear else max(1, min(plan.placement.passes, len(block.groups)))
                steps += batches * (passes + (forwards if read else 0)) + len(block.groups)
        return steps


def hidden_states_of(plan: MergePlan, working: Path) -> HiddenStates:
    """Makes the store of hidden states that the placement chose: on the device, in host memory, or on disk.

    Args:
        plan: The plan.
        working: Folder for those on disk, unless the user has named one.
    """
    offload = plan.placement.hidden_states
    store: Store
    if offload is OffloadTo.DISK:
        store = DiskStore(Path(plan.config.memory.disk or working))
    else:
        store = MemoryStore(plan.device if offload is OffloadTo.DEVICE else torch.device("cpu"), plan.device)
    return HiddenStates(store, eight_bit=plan.config.memory.hidden_states_8bit)


def block_runner(planned: PlannedMerge, weights: Weights, retries: list[str]) -> BlockRunner:
    """Makes what runs one block; messages about blocks that are run again in smaller parts go to `retries`."""
    plan, skeleton = planned.plan, planned.inputs.skeleton
    return BlockRunner(
        skeleton=skeleton,
        trace=planned.trace,
        load_non_block=weights.load_non_block,
        compute_dtype=plan.compute_dtype,
        device=plan.device,
        loss_input=loss_input(forward_signature(skeleton)),
        retries=retries,
    )
