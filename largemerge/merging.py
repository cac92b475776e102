"""A regression merge as a list of steps.

config → open inputs → read calibration data → plan → output folder → tensors outside the blocks
→ block after block → side files, index, config → report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from largemerge.calibration import CalibrationSet, assume_calibration, load_calibration, outline_calibration
from largemerge.calibration.batches import split_batches
from largemerge.calibration.fit import sample_problems
from largemerge.calibration.spool import spooled
from largemerge.checkpoint.writer import Shard, layout_shards
from largemerge.cluster import Cluster
from largemerge.config import MergeConfig, load_config
from largemerge.devices import choose_device, device_of_rank
from largemerge.distributed import Ranks, start_ranks, too_many_threads
from largemerge.environment import versions
from largemerge.errors import CalibrationError, LargemergeError
from largemerge.forecast import forecast
from largemerge.inputs import Inputs, open_inputs
from largemerge.job import Job
from largemerge.memory import MemoryUse, MemoryWatch
from largemerge.merge_plan import MergePlan, Preparation
from largemerge.output import OutputFolder, check_output, existing_folder
from largemerge.placement import waits_on_disk
from largemerge.planning import Machines, make_plan
from largemerge.rank_output import open_for_ranks
from largemerge.regression.clock import Clock
from largemerge.report import MergeReport
from largemerge.samples import OwnSamples, for_every_candidate, loss_tokens, model_needs, share_samples
from largemerge.sharing import samples_at_once
from largemerge.side_files import config_text, write_side_files

ConfigSource = str | Path | Mapping[str, Any] | MergeConfig


def plan_regression(
    config: ConfigSource,
    *,
    device: str,
    probe: bool,
    num_ranks: int,
    cluster: Cluster | None,
    from_config: bool,
) -> MergePlan:
    """`largemerge.plan` for the regression methods."""
    resolved = load_config(config)
    if cluster is not None:
        machines = Machines(torch.device("cuda"), cluster.num_ranks, cluster.gpus_per_node, cluster)
    else:
        machines = Machines(choose_device(device), num_ranks, num_ranks)
    inputs = open_inputs(resolved, from_config=from_config)
    outlines = for_every_candidate(resolved, inputs, assume_calibration if from_config else outline_calibration)
    prepared = make_plan(resolved, inputs, machines, outlines)
    return forecast(prepared, outlines, machines, probe=probe and not from_config)


def merge_by_regression(
    config: ConfigSource,
    out: str | Path,
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
    resolved = load_config(config)
    with start_ranks(on_gpus=device != "cpu") as ranks:
        target = ranks.agree(lambda: device_of_rank(device, ranks))
        with MemoryWatch(target) as watch:
            prepared = _prepare(resolved, target, Path(out), ranks, resume=resume, force=force)
            if planned is not None:
                planned(prepared.preparation.plan)
            shards = layout_shards(prepared.preparation.plan.output, max_shard_bytes)
            manifest = _manifest(prepared, shards)
            with open_for_ranks(Path(out), manifest, prepared.input_paths, ranks, resume=resume, force=force) as folder:
                job = Job(prepared.preparation, prepared.samples, shards, folder, ranks, quiet, Clock(start))
                job.run()
                report = _report(prepared, job, folder, watch.peak(), start)
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
    counted = loss_tokens(model_needs(preparation.inputs.skeleton))
    return _Prepared(
        preparation,
        share_samples(split, preparation.plan.blocks, preparation.rehearsal, counted, ranks),
        {data.name: {"num_samples": data.num_samples, "sha256": data.fingerprint} for data in calibration},
        input_paths,
    )


def _report(prepared: _Prepared, job: Job, folder: OutputFolder, peak: MemoryUse, start: float) -> MergeReport:
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
    )


def _input_paths(config: MergeConfig, inputs: Inputs) -> list[Path]:
    """Everything on disk that a merge reads and must not write to."""
    paths = [checkpoint.folder for checkpoint in (*inputs.candidates, inputs.base) if checkpoint is not None]
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
    misfits = sample_problems(inputs.skeleton, preparation.rehearsal, calibration)
    if misfits:
        raise CalibrationError(*misfits)
    if preparation.plan.problems:
        raise LargemergeError(*preparation.plan.problems)
    return preparation, calibration


def _keep(config: MergeConfig, out: Path) -> Callable[[CalibrationSet], CalibrationSet] | None:
    """Where the user has set limits, pixels and the like wait on disk."""
    if not waits_on_disk(config.memory):
        return None
    folder = existing_folder(Path(config.memory.disk) if config.memory.disk is not None else out)
    return lambda calibration: spooled(calibration, folder)


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
