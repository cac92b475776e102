"""The public API: a merge as a list of steps.

config → open inputs → read calibration data → plan → output folder → tensors outside the blocks
→ block after block → side files, index, config → report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from largemerge.calibration import CalibrationSet, load_calibration, outline_calibration
from largemerge.calibration.batches import split_batches
from largemerge.calibration.fit import sample_problems
from largemerge.calibration.spool import spooled
from largemerge.checkpoint.writer import Shard, layout_shards
from largemerge.config import MergeConfig, load_config
from largemerge.errors import CalibrationError, LargemergeError
from largemerge.inputs import Inputs, open_inputs
from largemerge.job import Job
from largemerge.memory import MemoryWatch
from largemerge.merge_plan import MergePlan, Preparation
from largemerge.output import check_output, existing_folder, open_output
from largemerge.placement import waits_on_disk
from largemerge.planning import choose_device, make_plan
from largemerge.regression.clock import Clock
from largemerge.report import MergeReport, versions
from largemerge.samples import for_every_candidate
from largemerge.side_files import config_text, write_side_files

ConfigSource = str | Path | Mapping[str, Any] | MergeConfig
DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


def plan(config: ConfigSource, *, device: str = "auto", probe: bool = True) -> MergePlan:
    """Plans a merge from configs and headers alone; of weights and samples it reads none.

    Args:
        config: A path, a mapping or a `MergeConfig`.
        device: `auto`, `cpu`, `cuda:0`, ….
        probe: Measure this machine for a few seconds (products, copies, some megabytes of a candidate read), so that
            the plan says how long the merge will take.

    Raises:
        LargemergeError: If the inputs cannot be opened. What merely makes the merge impossible is in the
            plan's `problems`.
    """
    resolved = load_config(config)
    inputs = open_inputs(resolved)
    outlines = for_every_candidate(resolved, inputs, outline_calibration)
    return make_plan(resolved, inputs, choose_device(device), outlines, probe=probe).plan


def merge(
    config: ConfigSource,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    quiet: bool = True,
) -> MergeReport:
    """Merges the candidates of a configuration into one checkpoint.

    Args:
        config: A path, a mapping or a `MergeConfig`.
        out: The output folder; new or empty unless `resume` or `force`.
        device: `auto`, `cpu`, `cuda:0`, ….
        resume: Go on with an interrupted merge; the result is bit for bit that of an unbroken run.
        force: Replace what is in `out`, once the merge is finished.
        max_shard_bytes: Size of a shard, unless one tensor is larger.
        quiet: Show no progress.

    Returns:
        What happened; the same is in `out/merge_report.json`.

    Raises:
        LargemergeError: For anything wrong with config, inputs, data or output, before the long work.
    """
    start = time.perf_counter()
    resolved = load_config(config)
    target = choose_device(device)
    out = Path(out)
    with MemoryWatch(target) as watch:
        inputs = open_inputs(resolved)
        input_paths = _input_paths(resolved, inputs)
        check_output(out, input_paths, resume=resume, force=force)
        preparation, calibration = _prepare(resolved, inputs, target, out)
        shards = layout_shards(preparation.plan.output, max_shard_bytes)
        manifest = _manifest(preparation, calibration, shards)
        with open_output(out, manifest, input_paths, resume=resume, force=force) as folder:
            job = Job(preparation, calibration, shards, folder, quiet, Clock(start))
            job.run()
            report = MergeReport.build(
                plan=preparation.plan,
                inputs=inputs,
                calibration=calibration,
                parts=folder.entries,
                prepared_seconds=job.started - start,
                total_seconds=time.perf_counter() - start,
                resumed_parts=job.resumed_parts,
                peak=watch.peak(),
                bytes_read=job.bytes_read,
                hidden_bytes_on_disk=job.hidden_bytes_on_disk,
                retries=job.retries,
                timeline=job.clock.timeline,
            )
            folder.finish(
                shards,
                lambda path: write_side_files(path, preparation, report),
                config_text(preparation),
            )
    return report


def _input_paths(config: MergeConfig, inputs: Inputs) -> list[Path]:
    """Everything on disk that a merge reads and must not write to."""
    paths = [checkpoint.folder for checkpoint in (*inputs.candidates, inputs.base) if checkpoint is not None]
    data = [Path(candidate.calibration.data) for candidate in config.models if candidate.calibration is not None]
    return paths + [path for path in data if path.exists()]


def _prepare(
    config: MergeConfig, inputs: Inputs, device: torch.device, out: Path
) -> tuple[Preparation, tuple[CalibrationSet, ...]]:
    """Reads the calibration data and plans the merge; raises whatever makes it impossible."""
    outlines = for_every_candidate(config, inputs, outline_calibration)
    calibration = for_every_candidate(config, inputs, load_calibration, _keep(config, out))
    preparation = make_plan(config, inputs, device, outlines, calibration, out)
    misfits = sample_problems(inputs.skeleton, preparation.rehearsal, calibration)
    if misfits:
        raise CalibrationError(*misfits)
    if preparation.plan.problems:
        raise LargemergeError(*preparation.plan.problems)
    samples = preparation.plan.placement.samples
    return preparation, tuple(replace(data, batches=split_batches(data.batches, samples)) for data in calibration)


def _keep(config: MergeConfig, out: Path) -> Callable[[CalibrationSet], CalibrationSet] | None:
    """Where the user has set limits, pixels and the like wait on disk."""
    if not waits_on_disk(config.memory):
        return None
    folder = existing_folder(Path(config.memory.disk) if config.memory.disk is not None else out)
    return lambda calibration: spooled(calibration, folder)


def _manifest(
    preparation: Preparation, calibration: Sequence[CalibrationSet], shards: Sequence[Shard]
) -> dict[str, Any]:
    inputs, plan = preparation.inputs, preparation.plan
    checkpoints = [*inputs.candidates, *([inputs.base] if inputs.base is not None else [])]
    return {
        # Limits may change on the way: what they decide changes no bit, but for the samples at once.
        "config": plan.config.model_dump(mode="json", exclude={"memory": {"device", "host", "disk"}}),
        "inputs": {checkpoint.name: dict(checkpoint.fingerprint) for checkpoint in checkpoints},
        "calibration data": {data.name: data.fingerprint for data in calibration},
        "versions": versions(),
        "device": plan.device.type,
        "samples at once": plan.placement.samples,
        "compute_dtype": str(plan.compute_dtype),
        "shards": {shard.file_name: shard.num_bytes for shard in shards},
    }
