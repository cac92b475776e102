"""A regression merge as a list of steps.

config → open inputs → read calibration data → plan → output folder → tensors outside the blocks
→ block after block → side files, index, config → report

The long work of a merge: everything that is written to shards.

open readers and writer → tensors outside the blocks → block after block
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from largemerge.calibration import CalibrationSet, load_calibration, outline_calibration, outline_from_config
from largemerge.calibration.batches import mapped_inputs, split_batches
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.locate import existing_folder
from largemerge.checkpoint.lora import open_reader
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.writer import Shard, ShardWriter, layout_shards
from largemerge.devices import choose_device
from largemerge.distributed.collectives import SHARED_BYTES, AsyncCollectives, open_collectives
from largemerge.distributed.partition import samples_at_once
from largemerge.distributed.ranks import Ranks, device_of_rank, start_ranks, too_many_threads
from largemerge.distributed.shared_memory import ALONE, Node, find_node
from largemerge.errors import CalibrationError, LargemergeError
from largemerge.machine import MemoryUse, MemoryWatch, versions
from largemerge.model.block_runner import BlockRunner
from largemerge.model.hidden_states import DiskStore, HiddenStates, MemoryStore, Store
from largemerge.output import OutputFolder, check_output, open_for_ranks
from largemerge.progress import Clock, RunProgress
from largemerge.regression.averages import merge_non_block
from largemerge.regression.collect import Settings
from largemerge.regression.config import MergeConfig
from largemerge.regression.engine import Engine
from largemerge.regression.inputs import Inputs, open_inputs
from largemerge.regression.passes import block_passes
from largemerge.regression.plan import MergePlan, Preparation, forecast, make_plan
from largemerge.regression.planning.placement import maps_inputs
from largemerge.regression.planning.rates import Cluster, Machines
from largemerge.regression.planning.workload import OffloadTo
from largemerge.regression.rank_exchange import RankExchange
from largemerge.regression.report import MergeReport, config_text, write_side_files
from largemerge.regression.samples import (
    OwnSamples,
    SampleRunner,
    check_samples,
    for_every_candidate,
    forward_signature,
    loss_input,
    share_samples,
)
from largemerge.regression.weights import Weights


def plan_regression(
    config: MergeConfig,
    *,
    device: str,
    probe: bool,
    num_ranks: int,
    cluster: Cluster | None,
    from_config: bool,
) -> MergePlan:
    """`largemerge.plan` for the regression methods."""
    if cluster is not None:
        machines = Machines(torch.device("cuda"), cluster.num_ranks, cluster.gpus_per_node, cluster)
    else:
        machines = Machines(choose_device(device), num_ranks, num_ranks)
    inputs = open_inputs(config, from_config=from_config)
    outlines = for_every_candidate(config, inputs, outline_from_config if from_config else outline_calibration)
    prepared = make_plan(config, inputs, machines, outlines)
    return forecast(prepared, outlines, machines, probe=probe and not from_config)


def merge_by_regression(
    config: MergeConfig,
    out: Path,
    *,
    device: str,
    resume: bool,
    force: bool,
    max_shard_bytes: int,
    quiet: bool,
    planned: Callable[[MergePlan], None] | None = None,
) -> MergeReport:
    """`largemerge.merge` for the regression methods.

    `planned` is called with the plan before the long work.
    """
    start = time.perf_counter()
    with start_ranks(on_gpus=device != "cpu") as ranks:
        target = ranks.agree(lambda: device_of_rank(device, ranks))
        with MemoryWatch(target) as watch:
            prepared = _prepare(config, target, out, ranks, resume=resume, force=force)
            if planned is not None:
                planned(prepared.preparation.plan)
            shards = layout_shards(prepared.preparation.plan.output, max_shard_bytes)
            manifest = _manifest(prepared, shards)
            with open_for_ranks(out, manifest, prepared.input_paths, ranks, resume=resume, force=force) as folder:
                job = Job(prepared.preparation, prepared.samples, shards, folder, ranks, quiet, Clock(start))
                job.run()
                report = _report(prepared, job, folder, watch.peak(), start, out)
                if ranks.is_first:
                    folder.finish(
                        shards,
                        lambda path: write_side_files(path, prepared.preparation, report),
                        config_text(prepared.preparation),
                    )
        ranks.gather(None)  # nobody says that the merge is done before it is
    return report


@dataclass(frozen=True)
class _Prepared:
    """What is known before the output folder is opened.

    Attributes:
        preparation: The plan, and what it was made from.
        samples: This rank's part of the calibration data.
        calibration: Of every candidate: number of samples and fingerprint.
        input_paths: That must not be written to.
    """

    preparation: Preparation
    samples: OwnSamples
    calibration: Mapping[str, Any]
    input_paths: list[Path]


def _prepare(
    config: MergeConfig, device: torch.device, out: Path, ranks: Ranks, *, resume: bool, force: bool
) -> _Prepared:
    """Reads the calibration data and plans the merge; raises whatever makes it impossible, on all ranks."""

    def plan_it() -> tuple[Preparation, tuple[CalibrationSet, ...], list[Path]]:
        inputs = open_inputs(config)
        input_paths = _input_paths(config, inputs)
        if ranks.is_first:
            check_output(out, input_paths, resume=resume, force=force)
        return *_plan_with_data(config, inputs, device, out, ranks), input_paths

    preparation, calibration, input_paths = ranks.agree(plan_it)
    # Free memory differs from moment to moment, but all must cut the work alike.
    placement = ranks.from_first(preparation.plan.placement)
    preparation = replace(preparation, plan=replace(preparation.plan, placement=placement))
    most = samples_at_once(placement.samples, sum(data.num_samples for data in calibration), ranks.size)
    split = tuple(replace(data, batches=split_batches(data.batches, most)) for data in calibration)
    counted = loss_input(forward_signature(preparation.inputs.skeleton))
    return _Prepared(
        preparation,
        share_samples(split, preparation.plan.blocks, preparation.trace, counted, ranks),
        {data.name: {"num_samples": data.num_samples, "sha256": data.fingerprint} for data in calibration},
        input_paths,
    )


def _report(
    prepared: _Prepared, job: Job, folder: OutputFolder, peak: MemoryUse, start: float, out: Path
) -> MergeReport:
    """Collective: what happened, with the first rank's times."""
    ranks = job.ranks
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
    everybodys = ranks.gather(own)
    return MergeReport.build(
        plan=prepared.preparation.plan,
        inputs=prepared.preparation.inputs,
        calibration=prepared.calibration,
        parts=ranks.from_first(folder.entries),
        prepared_seconds=job.started - start,
        total_seconds=time.perf_counter() - start,
        resumed_parts=job.resumed_parts,
        peak=peak,
        bytes_read=sum(rank["bytes_read"] for rank in everybodys),
        hidden_bytes_on_disk=job.hidden_bytes_on_disk,
        retries=[retry for retries in ranks.gather(job.retries) for retry in retries],
        timeline=job.clock.timeline,
        ranks=everybodys if ranks.size > 1 else (),
        out=out,
    )


def _input_paths(config: MergeConfig, inputs: Inputs) -> list[Path]:
    """Everything on disk that a merge reads and must not write to."""
    paths = [checkpoint.folder for checkpoint in (*inputs.candidates, inputs.base) if checkpoint is not None]
    paths += [adapter.checkpoint.folder for adapter in inputs.adapters.values()]
    data = [Path(candidate.calibration.data) for candidate in config.models if candidate.calibration is not None]
    return paths + [path for path in data if path.exists()]


def _plan_with_data(
    config: MergeConfig, inputs: Inputs, device: torch.device, out: Path, ranks: Ranks
) -> tuple[Preparation, tuple[CalibrationSet, ...]]:
    outlines = for_every_candidate(config, inputs, outline_calibration)
    calibration = for_every_candidate(config, inputs, load_calibration, _keep(config, out))
    machines = Machines(device, ranks.size, ranks.local_size)
    preparation = make_plan(config, inputs, machines, outlines, calibration, out)
    notes = (*preparation.plan.notes, *too_many_threads(ranks, device))
    preparation = replace(preparation, plan=replace(preparation.plan, notes=notes))
    misfits = check_samples(inputs.skeleton, preparation.trace, calibration)
    if misfits:
        raise CalibrationError(*misfits)
    if preparation.plan.problems:
        raise LargemergeError(*preparation.plan.problems)
    return preparation, calibration


def _keep(config: MergeConfig, out: Path) -> Callable[[CalibrationSet], CalibrationSet] | None:
    """Where the user has set limits, pixels and the like wait on disk."""
    if not maps_inputs(config.memory):
        return None
    folder = existing_folder(Path(config.memory.disk) if config.memory.disk is not None else out)
    return lambda calibration: mapped_inputs(calibration, folder)


def _manifest(prepared: _Prepared, shards: Sequence[Shard]) -> dict[str, Any]:
    """What all ranks, and a merge and its continuation, must have in common."""
    inputs, plan = prepared.preparation.inputs, prepared.preparation.plan
    checkpoints = [*inputs.candidates, *([inputs.base] if inputs.base is not None else [])]
    return {
        # Limits may change on the way: what they decide changes no bit, but for the samples at once.
        "config": plan.config.model_dump(mode="json", exclude={"memory": {"device", "host", "disk"}}),
        "inputs": {checkpoint.name: dict(checkpoint.fingerprint) for checkpoint in checkpoints},
        "calibration data": {name: entry["sha256"] for name, entry in prepared.calibration.items()},
        "versions": versions(),
        "device": plan.device.type,
        "samples at once": plan.placement.samples,
        "compute_dtype": str(plan.compute_dtype),
        "shards": {shard.file_name: shard.num_bytes for shard in shards},
    }


OUTSIDE = "outside"


@dataclass
class Job:
    """The long work: everything that is written to shards."""

    preparation: Preparation
    samples: OwnSamples
    shards: tuple[Shard, ...]
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
        """Writes what is not in the journal yet."""
        plan, inputs = self.preparation.plan, self.preparation.inputs
        finished = frozenset(self.folder.entries)
        self.resumed_parts = len(finished)
        if finished == {OUTSIDE, *(block.name for block in plan.blocks)}:
            return
        # Each tensor is read once, unless a block takes several passes, or ranks share a candidate.
        past_cache = plan.placement.passes == 1 and self.ranks.size == 1
        with ExitStack() as stack:
            stack.enter_context(self.ranks.busy())

            def reader(checkpoint: Checkpoint) -> TensorReader:
                adapter = inputs.adapters.get(checkpoint.name)
                return stack.enter_context(open_reader(checkpoint, adapter, past_cache=past_cache))

            weights = Weights(
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
            quiet = self.quiet or not self.ranks.is_first
            progress = stack.enter_context(
                RunProgress(self._num_steps(finished), len(plan.blocks), plan.device, quiet=quiet)
            )
            for note in plan.notes:
                progress.tell(f"note: {note}")
            if OUTSIDE not in finished and self.ranks.is_first:
                self._merge_non_block(weights, progress)
            hidden_states = stack.enter_context(self._hidden_states())
            if self.ranks.size > 1:
                self.node, self.not_shared = find_node(self.ranks, self._largest_block(weights), SHARED_BYTES)
                stack.callback(self.node.clean_up)
            rank_groups = self.samples.shares.rank_groups[
                1:
            ]  # the first candidate is the anchor: it has no right-hand side
            exchange = stack.enter_context(open_collectives(self.ranks, self.node, plan.device, rank_groups))
            self._engine(weights, hidden_states, progress, exchange).run(finished, self.folder.record)
            self.bytes_read = weights.bytes_read
            if plan.placement.hidden_states is OffloadTo.DISK:
                self.hidden_bytes_on_disk = hidden_states.num_bytes

    def _largest_block(self, weights: Weights) -> int:
        """Bytes on disk."""
        blocks = self.preparation.plan.blocks
        return max((weights.stored_bytes(0, [plan.name for plan in block.tensors]) for block in blocks), default=0)

    def _hidden_states(self) -> HiddenStates:
        plan = self.preparation.plan
        waiting = plan.placement.hidden_states
        store: Store
        if waiting is OffloadTo.DISK:
            store = DiskStore(Path(plan.config.memory.disk or self.folder.working))
        else:
            store = MemoryStore(plan.device if waiting is OffloadTo.DEVICE else torch.device("cpu"), plan.device)
        return HiddenStates(store, eight_bit=plan.config.memory.hidden_states_8bit)

    def _engine(
        self, weights: Weights, hidden_states: HiddenStates, progress: RunProgress, exchange: AsyncCollectives | None
    ) -> Engine:
        plan, inputs, trace = self.preparation.plan, self.preparation.inputs, self.preparation.trace
        parameters, placement = plan.config.parameters, plan.placement
        method = plan.config.method
        return Engine(
            settings=Settings(
                method=method,
                shares=plan.config.shares,
                off_diagonal_scale=parameters.off_diagonal_scale,
                ridge=parameters.ridge,
                prefetch=placement.prefetch,
                write_in_background=placement.writes_in_background(plan.device),
            ),
            names=plan.config.names,
            blocks=plan.blocks,
            passes={
                block.name: block_passes(
                    block,
                    trace.stacks[block.stack].roles[block.index],
                    placement.passes,
                    advances=method.advances_while_collecting and block is not plan.blocks[-1],
                )
                for block in plan.blocks
            },
            weights=weights,
            samples=SampleRunner(
                BlockRunner(
                    skeleton=inputs.skeleton,
                    trace=trace,
                    load_non_block=weights.load_non_block,
                    compute_dtype=plan.compute_dtype,
                    device=plan.device,
                    loss_input=loss_input(forward_signature(inputs.skeleton)),
                    retries=self.retries,
                ),
                self.samples,
                hidden_states,
                method.inputs,
            ),
            watcher=progress,
            clock=self.clock,
            together=RankExchange(self.ranks, self.samples.shares, self.node, exchange),
        )

    def _merge_non_block(self, weights: Weights, progress: RunProgress) -> None:
        plan = self.preparation.plan
        self.clock.begin("")
        with self.clock.stage(OUTSIDE):
            merge_non_block(plan.non_block, weights, plan.config.shares, lambda name: progress.step(name, OUTSIDE))
            with self.ranks.blocked():
                weights.own_writer.flush()
        errors = weights.quantization_errors(tensor.name for tensor in plan.non_block)
        entry: dict[str, Any] = {"bytes_read": weights.bytes_read, "bytes_written": weights.own_writer.bytes_written}
        entry |= {"quantization_errors": errors} if errors else {}
        self.folder.record(OUTSIDE, entry | {"seconds": self.clock.seconds()})

    def _num_steps(self, finished: frozenset[str]) -> int:
        plan = self.preparation.plan
        batches = sum(len(data.batches) for data in self.samples.calibration)
        forwards = int(plan.config.method.forwards_merged)
        steps = 0 if OUTSIDE in finished else len(plan.non_block)
        for block in plan.blocks:
            last = block is plan.blocks[-1]
            if block.name in finished:
                steps += 0 if last else batches
            else:
                passes = max(1, min(plan.placement.passes, len(block.groups)))
                steps += batches * (passes + (0 if last else forwards)) + len(block.groups)
        return steps
