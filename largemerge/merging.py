"""The public API, and the job itself: a list of steps.

config → open inputs → read calibration data → plan → output folder → tensors outside the blocks
→ block after block → side files, index, config → report
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from largemerge.average import merge_outside
from largemerge.calibration import CalibrationSet, load_calibration, outline_calibration
from largemerge.calibration.batches import split_batches
from largemerge.calibration.fit import sample_problems
from largemerge.calibration.hidden_states import DiskStore, HiddenStates, MemoryStore, Store
from largemerge.calibration.spool import spooled
from largemerge.checkpoint.metadata import copy_side_files, find_processor, find_tokenizer, model_card, output_config
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.checkpoint.writer import Shard, ShardWriter, layout_shards
from largemerge.config import MergeConfig, load_config
from largemerge.errors import CalibrationError, LargemergeError
from largemerge.estimate import Waiting
from largemerge.inputs import Inputs, open_inputs
from largemerge.memory import MemoryWatch
from largemerge.output import OutputFolder, check_output, open_output
from largemerge.passes import block_passes
from largemerge.placement import existing_folder, waits_on_disk
from largemerge.planning import MergePlan, Preparation, choose_device, make_plan
from largemerge.progress import RunProgress
from largemerge.quantization import quantization_settings
from largemerge.regression.activations import Activations
from largemerge.regression.clock import Clock
from largemerge.regression.engine import Engine, Settings
from largemerge.report import MergeReport, config_yaml, versions
from largemerge.samples import for_every_candidate, loss_tokens, model_needs
from largemerge.weights import Weights

ConfigSource = str | Path | Mapping[str, Any] | MergeConfig
OUTSIDE = "outside"
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
            job = _Job(preparation, calibration, shards, folder, quiet, Clock(start))
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
                lambda path: _write_side_files(path, preparation, report),
                _config_text(preparation),
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


@dataclass
class _Job:
    """The long work: everything that is written to shards."""

    preparation: Preparation
    calibration: tuple[CalibrationSet, ...]
    shards: tuple[Shard, ...]
    folder: OutputFolder
    quiet: bool
    clock: Clock
    started: float = field(init=False, default_factory=time.perf_counter)
    resumed_parts: int = field(init=False, default=0)
    bytes_read: int = field(init=False, default=0)
    hidden_bytes_on_disk: int = field(init=False, default=0)
    retries: list[str] = field(init=False, default_factory=list)

    def run(self) -> None:
        """Writes what is not in the journal yet."""
        plan, inputs = self.preparation.plan, self.preparation.inputs
        finished = frozenset(self.folder.entries)
        self.resumed_parts = len(finished)
        if finished == {OUTSIDE, *(block.name for block in plan.blocks)}:
            return
        with ExitStack() as stack:
            weights = Weights(
                inputs=inputs,
                readers=[stack.enter_context(CheckpointReader(candidate)) for candidate in inputs.candidates],
                base_reader=stack.enter_context(CheckpointReader(inputs.base)) if inputs.base is not None else None,
                writer=stack.enter_context(ShardWriter(self.folder.working, plan.output, self.shards)),
            )
            progress = stack.enter_context(
                RunProgress(self._num_steps(finished), len(plan.blocks), plan.device, quiet=self.quiet)
            )
            if OUTSIDE not in finished:
                self._merge_outside(weights, progress)
            hidden_states = stack.enter_context(self._hidden_states())
            self._engine(weights, hidden_states, progress).run(finished, self.folder.record)
            self.bytes_read = weights.bytes_read
            if plan.placement.hidden_states is Waiting.DISK:
                self.hidden_bytes_on_disk = hidden_states.num_bytes

    def _hidden_states(self) -> HiddenStates:
        plan = self.preparation.plan
        waiting = plan.placement.hidden_states
        store: Store
        if waiting is Waiting.DISK:
            store = DiskStore(Path(plan.config.memory.disk or self.folder.working))
        else:
            store = MemoryStore(plan.device if waiting is Waiting.DEVICE else torch.device("cpu"), plan.device)
        return HiddenStates(store, eight_bit=plan.config.memory.hidden_states_8bit)

    def _engine(self, weights: Weights, hidden_states: HiddenStates, progress: RunProgress) -> Engine:
        plan, inputs, rehearsal = self.preparation.plan, self.preparation.inputs, self.preparation.rehearsal
        parameters, placement = plan.config.parameters, plan.placement
        own_stream = plan.config.merge_method == "regmean"
        return Engine(
            settings=Settings(
                own_stream=own_stream,
                shares=plan.config.shares,
                off_diagonal_scale=parameters.off_diagonal_scale,
                ridge=parameters.ridge,
                prefetch=placement.prefetch,
            ),
            names=plan.config.names,
            blocks=plan.blocks,
            passes={
                block.name: block_passes(
                    block,
                    rehearsal.stacks[block.stack].roles[block.index],
                    placement.passes,
                    keeps_outputs=own_stream and block is not plan.blocks[-1],
                )
                for block in plan.blocks
            },
            weights=weights,
            activations=Activations(
                skeleton=inputs.skeleton,
                rehearsal=rehearsal,
                calibration=self.calibration,
                weights=weights,
                hidden_states=hidden_states,
                compute_dtype=plan.compute_dtype,
                device=plan.device,
                loss_tokens=loss_tokens(model_needs(inputs.skeleton)),
                retries=self.retries,
            ),
            watcher=progress,
            clock=self.clock,
        )

    def _merge_outside(self, weights: Weights, progress: RunProgress) -> None:
        plan = self.preparation.plan
        self.clock.begin("")
        with self.clock.stage(OUTSIDE):
            merge_outside(plan.outside, weights, plan.config.shares, lambda name: progress.step(name, OUTSIDE))
            weights.writer.flush()
        errors = weights.quantization_errors(tensor.name for tensor in plan.outside)
        entry: dict[str, Any] = {"bytes_read": weights.bytes_read, "bytes_written": weights.writer.bytes_written}
        entry |= {"quantization_errors": errors} if errors else {}
        self.folder.record(OUTSIDE, entry | {"seconds": self.clock.seconds()})

    def _num_steps(self, finished: frozenset[str]) -> int:
        plan = self.preparation.plan
        batches = sum(len(data.batches) for data in self.calibration)
        forwards = 0 if plan.config.merge_method == "regmean" else 1
        steps = 0 if OUTSIDE in finished else len(plan.outside)
        for block in plan.blocks:
            last = block is plan.blocks[-1]
            if block.name in finished:
                steps += 0 if last else batches
            else:
                passes = max(1, min(plan.placement.passes, len(block.groups)))
                steps += batches * (passes + (0 if last else forwards)) + len(block.groups)
        return steps


def _manifest(
    preparation: Preparation, calibration: Sequence[CalibrationSet], shards: Sequence[Shard]
) -> dict[str, Any]:
    inputs, plan = preparation.inputs, preparation.plan
    checkpoints = [*inputs.candidates, *([inputs.base] if inputs.base is not None else [])]
    return {
        "config": plan.config.model_dump(mode="json"),
        "inputs": {checkpoint.name: dict(checkpoint.fingerprint) for checkpoint in checkpoints},
        "calibration data": {data.name: data.fingerprint for data in calibration},
        "versions": versions(),
        "device": plan.device.type,
        "samples at once": plan.placement.samples,
        "compute_dtype": str(plan.compute_dtype),
        "shards": {shard.file_name: shard.num_bytes for shard in shards},
    }


def _config_text(preparation: Preparation) -> str:
    dtype = preparation.plan.output_dtype
    settings = quantization_settings(preparation.plan.config.output, dtype)
    return output_config(preparation.inputs.reference, dtype, settings)


def _write_side_files(path: Path, preparation: Preparation, report: MergeReport) -> None:
    inputs, config = preparation.inputs, preparation.plan.config
    folders = {checkpoint.name: checkpoint.folder for checkpoint in inputs.candidates}
    if inputs.base is not None:
        folders["base"] = inputs.base.folder
    preferred = [folders["base" if inputs.base is not None else inputs.candidates[0].name], *folders.values()]
    source = config.tokenizer_source
    tokenizer = find_tokenizer(*preferred) if source is None else folders[source]
    processor = find_processor(*preferred)
    copy_side_files(path, inputs.reference.folder, tokenizer, processor, with_code=config.trust_remote_code)
    yaml_text = config_yaml(config)
    (path / "largemerge_config.yaml").write_text(yaml_text, encoding="utf-8")
    (path / "README.md").write_text(
        model_card(
            method=config.merge_method,
            class_name=preparation.plan.class_name,
            models=[
                {
                    "name": candidate.label,
                    "model": candidate.model,
                    "weight": candidate.parameters.weight,
                    "data": Path(candidate.calibration.data).name if candidate.calibration else "",
                }
                for candidate in config.models
            ],
            base=config.base_model,
            config_yaml=yaml_text,
            version=versions()["largemerge"],
        ),
        encoding="utf-8",
    )
    (path / "merge_report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
