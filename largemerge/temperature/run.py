"""One softmax temperature for a model, fitted on samples and folded into its weights: `largemerge temperature`.

    EVAL.yaml, model ──► tasks whose outputs are likelihoods ──► what scales the logits ──► the output's plan
              ──► pass 1: the loss as a function of τ ──► τ ──► pass 2, with the tensors as they will be written
              ──► the model written once more, these tensors times 1/τ ──► report

Every logit is divided by one number, so that what a model finds likeliest stays; losses, probabilities and samples
drawn from them change. Pass 2 measures that it is so, and what rounding to 16 bits has done. The model is written by a
merge of its own, by `passthrough` with `scale`: so it may be whatever a merge reads, and its files are as a merge's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from largemerge.checkpoint.lora import open_reader
from largemerge.checkpoint.room import room_problems
from largemerge.checkpoint.side_files import HEADS_FOLDER
from largemerge.data_free.config import DataFreeConfig, load_data_free
from largemerge.data_free.merge import input_folders, merge_data_free
from largemerge.data_free.plan import plan_data_free
from largemerge.errors import CheckpointError, ConfigError, LargemergeError, MergeError
from largemerge.evaluation.config import EvaluationConfig
from largemerge.evaluation.evaluate import run_jobs
from largemerge.evaluation.models import ModelFiles, OpenedModel
from largemerge.evaluation.prepare import Job, name_models, prepare
from largemerge.evaluation.task import Columns, Logits, Metric, Record
from largemerge.machine import versions
from largemerge.output import TEMPERATURE_FILE, check_output
from largemerge.progress import stage
from largemerge.streams import plain_text
from largemerge.temperature.curve import Measured, fit_temperature, joined, measure
from largemerge.temperature.folding import Scaling, find_scaling, scale_setting
from largemerge.text_files import json_text
from largemerge.units import duration

_KINDS = ("language_model", "image_classification", "text_classification", "zero_shot")
_LOGIT_SCALE = "logit_scale"
_PLACEHOLDER = 0.5
_SMALLEST_SCALE = 1e-2  # of CLIP's logit_scale, about log 100 as it is published
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
_OF_16_BITS = 0.03


@dataclass(frozen=True)
class TaskReport:
    """What the temperature has changed in one task.

    Attributes:
        num_samples: Samples that were run.
        before: What was measured of the model.
        after: The same of what was written.
    """

    num_samples: int
    before: Measured
    after: Measured

    @property
    def num_changed(self) -> int:
        """Rows whose likeliest class is another one, which equal logits and rounding alone can bring about."""
        return int((self.before.chosen != self.after.chosen).sum())

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain JSON values."""
        old, new = self.before, self.after
        return {
            "num_samples": self.num_samples,
            "num_predictions": old.num_rows,
            "loss": {"before": old.loss, "after": new.loss},
            "expected_calibration_error": {"before": old.calibration_error, "after": new.calibration_error},
            "accuracy": {"before": old.accuracy, "after": new.accuracy},
            "predictions_changed": self.num_changed,
        }


@dataclass(frozen=True)
class TemperatureReport:
    """What `largemerge temperature` has found and written.

    Attributes:
        model: Reference of the model.
        out: The output folder.
        temperature: τ.
        changed: Factor of every tensor that was changed, by its name on disk.
        what: What these tensors are, in words.
        tasks: Every task.
        notes: What a user should know; warnings begin with `warning: `.
        seconds: Seconds in total.
    """

    model: str
    out: Path
    temperature: float
    changed: Mapping[str, float]
    what: str
    tasks: Mapping[str, TaskReport]
    notes: Sequence[str]
    seconds: float

    @property
    def losses(self) -> tuple[float, float]:
        """Mean over the tasks of their mean losses, before and after, in nats."""
        means = [float(np.mean([of.loss for of in each])) for each in zip(*self._pairs, strict=True)]
        return means[0], means[1]

    @property
    def _pairs(self) -> list[tuple[Measured, Measured]]:
        return [(task.before, task.after) for task in self.tasks.values()]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "versions": versions(),
            "model": self.model,
            "temperature": self.temperature,
            "changed": dict(self.changed),
            "what": self.what,
            "loss": dict(zip(("before", "after"), self.losses, strict=True)),
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows the report as tables."""
        table = Table(title=f"temperature {self.temperature:.4g} → {self.out}")
        for title in ("task", "samples", "predictions", "loss", "ECE", "accuracy", "changed"):
            table.add_column(title, justify="left" if title == "task" else "right")
        for name, task in self.tasks.items():
            before, after = task.before, task.after
            table.add_row(
                name,
                f"{task.num_samples:,}",
                f"{before.num_rows:,}",
                f"{before.loss:.4g} → {after.loss:.4g}",
                f"{before.calibration_error:.2%} → {after.calibration_error:.2%}",
                f"{before.accuracy:.2%} → {after.accuracy:.2%}",
                f"{task.num_changed:,}",
            )
        console.print(table)
        closing = Table(show_header=False)
        closing.add_column()
        closing.add_column(overflow="fold")
        closing.add_row("changed", self.what)
        for key, factor in self.changed.items():
            closing.add_row("", f"{key} × {factor:.6g}")
        closing.add_row("time", duration(self.seconds))
        for note in self.notes:
            closing.add_row("note", note)
        console.print(closing)


def set_temperature(
    config: EvaluationConfig,
    model: str,
    out: Path,
    *,
    device: str,
    resume: bool,
    force: bool,
    max_shard_bytes: int,
    quiet: bool,
) -> TemperatureReport:
    """Fits a temperature, and writes the model with it; arguments as in `largemerge.fit_temperature`."""
    start = time.perf_counter()
    config, notes = _usable(config)
    jobs, more = _jobs(config, model)
    notes += more
    files = jobs[0].files
    stage("finding what scales the logits")
    scaling = _scaling_of(jobs)
    _check_writing(_writing(model, files, dict.fromkeys(scaling.keys, _PLACEHOLDER), config), out, resume, force)
    if (files.checkpoint.root / HEADS_FOLDER).is_dir():
        notes.append(f"warning: the heads that are kept apart in {files.checkpoint.root / HEADS_FOLDER} are not copied")
    scale = _logit_scale(files) if scaling.keys == (_LOGIT_SCALE,) else None
    before = _measured(config, jobs, {}, _exp(scale), device=device, quiet=quiet)
    fit = fit_temperature(before)
    factors = dict.fromkeys(scaling.keys, 1 / fit.temperature)
    if scale is not None:
        factors = {_LOGIT_SCALE: (scale.item() - math.log(fit.temperature)) / scale.item()}
        scale = scale * factors[_LOGIT_SCALE]
    own = dict.fromkeys(scaling.parameters, 1 / fit.temperature)
    after = _measured(config, jobs, own, _exp(scale), device=device, quiet=quiet)
    dtypes = {files.compute_dtype, *(files.checkpoint.tensors[key].dtype for key in scaling.keys)}
    _check_scaled(before, after, fit.temperature, dtypes)
    merge_data_free(
        _writing(model, files, factors, config),
        out,
        device="cpu",
        resume=resume,
        force=force,
        max_shard_bytes=max_shard_bytes,
        quiet=quiet,
    )
    counts = {job.task.name: sum(map(len, job.prepared.samples.groups)) for job in jobs if job.prepared is not None}
    report = TemperatureReport(
        model=model,
        out=out,
        temperature=fit.temperature,
        changed=factors,
        what=scaling.what,
        tasks={name: TaskReport(counts[name], before[name], after[name]) for name in before},
        notes=notes,
        seconds=time.perf_counter() - start,
    )
    (out / TEMPERATURE_FILE).write_text(json_text(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return report


# Before the work


def _usable(config: EvaluationConfig) -> tuple[EvaluationConfig, list[str]]:
    """Leaves out tasks without a likelihood, and all models beside the one that is measured.

    Raises:
        ConfigError: If no task is left.
    """
    notes, tasks = [], []
    for task in config.tasks:
        if task.kind not in _KINDS:
            notes.append(f"task {task.name!r} is left out: {task.kind} has no likelihood to raise")
        elif getattr(task, "head", None) is not None:
            notes.append(f"task {task.name!r} is left out: its head is kept apart, and is no part of the model")
        else:
            tasks.append(task.model_copy(update={"expert": None}))
    if not tasks:
        raise ConfigError(*notes, f"tasks: none is left; expected one of kind {', '.join(_KINDS)}")
    return config.model_copy(update={"tasks": tuple(tasks), "base": None, "published": {}, "resamples": 0}), notes


def _jobs(config: EvaluationConfig, model: str) -> tuple[list[Job], list[str]]:
    """Prepares the tasks for the model; those with one number as output are left out."""
    prepared = prepare(config, name_models([model]))
    notes = list(prepared.notes)
    jobs = []
    for job in prepared.jobs:
        if job.prepared is not None and job.prepared.logits is not None:
            jobs.append(job)
        else:
            notes.append(f"task {job.task.name!r} is left out: the head has one output, which is no likelihood")
    if not jobs:
        raise ConfigError(*notes, f"tasks: none is left; expected one of kind {', '.join(_KINDS)}")
    return jobs, notes


def _scaling_of(jobs: Sequence[Job]) -> Scaling:
    """Finds what scales the logits of all tasks.

    Raises:
        LargemergeError: If it is not the same for all, or there is none.
    """
    found: dict[str, Scaling] = {}
    views: dict[int, Scaling] = {}
    problems: list[str] = []
    for job in jobs:
        where = f"task {job.task.name!r}"
        assert job.opened is not None and job.prepared is not None
        try:
            if job.task.kind == "zero_shot":
                found[job.task.name] = _zero_shot_scaling(job, where)
            else:
                if id(job.opened) not in views:
                    views[id(job.opened)] = find_scaling(job.opened, job.prepared.samples.batch(0), where)
                found[job.task.name] = views[id(job.opened)]
        except LargemergeError as error:
            problems += error.problems
    if problems:
        raise LargemergeError(*problems)
    if len({scaling.keys for scaling in found.values()}) > 1:
        told = "; ".join(f"{name}: {', '.join(scaling.keys)}" for name, scaling in found.items())
        raise ConfigError(f"tasks: their logits are scaled by different tensors ({told}); expected one file for each")
    return next(iter(found.values()))


def _zero_shot_scaling(job: Job, where: str) -> Scaling:
    files = job.files
    kind = files.checkpoint.config.get("model_type")
    if kind != "clip":
        raise ConfigError(f"{where}: {files.name} is of the kind {kind!r}; expected a whole CLIP model, of softmax")
    if _LOGIT_SCALE not in files.checkpoint.tensors:
        raise ConfigError(f"{where}: {files.name} has no {_LOGIT_SCALE}; expected a whole CLIP model")
    scale = _logit_scale(files).item()
    if abs(scale) < _SMALLEST_SCALE:
        raise CheckpointError(f"{where}: {files.name}: {_LOGIT_SCALE} is {scale:g}; expected that of a trained model")
    return Scaling((), (_LOGIT_SCALE,), "CLIP's logit_scale, by the logarithm of the temperature")


def _logit_scale(files: ModelFiles) -> torch.Tensor:
    with open_reader(files.checkpoint, files.adapter) as reader:
        return reader.read(_LOGIT_SCALE)


def _exp(scale: torch.Tensor | None) -> float:
    return math.exp(scale.item()) if scale is not None else 1.0


def _writing(model: str, files: ModelFiles, factors: Mapping[str, float], config: EvaluationConfig) -> DataFreeConfig:
    """The merge that writes the model with some tensors multiplied."""
    scale = scale_setting(factors, files.checkpoint.tensors)
    return load_data_free(
        {
            "merge_method": "passthrough",
            "models": [{"model": model, "parameters": {"scale": scale}}],
            "trust_remote_code": config.trust_remote_code,
        }
    )


def _check_writing(config: DataFreeConfig, out: Path, resume: bool, force: bool) -> None:
    """Checks that the model can be written, as a merge does before its work."""
    plan = plan_data_free(config, device="cpu", probe=False)
    problems = plan.problems or room_problems(plan.needs(out))
    if problems:
        raise LargemergeError(*problems)
    check_output(out, input_folders(plan), resume=resume, force=force)


# The work


def _measured(
    config: EvaluationConfig,
    jobs: Sequence[Job],
    factors: Mapping[str, float],
    scale: float,
    *,
    device: str,
    quiet: bool,
) -> dict[str, Measured]:
    """Runs all tasks; returns what is known of their logits, by task.

    Args:
        config: The evaluation.
        jobs: The tasks.
        factors: Factors of parameters.
        scale: What multiplies the logits of zero-shot tasks.
        device: Device that computes.
        quiet: Show no progress.

    Raises:
        MergeError: If a task fails; it names all that do.
    """
    found: dict[str, Measured] = {}
    opened: dict[int, OpenedModel] = {}
    changed = []
    for job in jobs:
        assert job.prepared is not None and job.prepared.logits is not None and job.opened is not None
        view = opened.setdefault(id(job.opened), replace(job.opened, factors=factors))
        own = replace(
            job.prepared,
            score=_scorer(job.prepared.logits, scale if job.task.kind == "zero_shot" else 1.0),
            finish=_finisher(job.task.name, found),
            metrics=(Metric("loss", lambda columns: float(columns["loss"].sum()), "lower", is_share=False),),
            remark=lambda _: "",
        )
        changed.append(replace(job, prepared=own, opened=view))
    scores = run_jobs(config, changed, device=device, quiet=quiet)
    problems = [f"task {score.task!r}: {score.error}" for score in scores if score.error]
    if problems:
        raise MergeError(*problems)
    return {job.task.name: found[job.task.name] for job in jobs}


def _scorer(logits: Any, scale: float) -> Any:
    def score_with(first: Any) -> Any:
        read: Logits = logits(first)

        def score(output: Any, batch: Any, group: Any) -> list[Record]:
            pairs = read(output, batch, group)
            return [{"found": measure(rows * scale, labels) if len(labels) else None} for rows, labels in pairs]

        return score

    return score_with


def _finisher(task: str, found: dict[str, Measured]) -> Any:
    """Makes what joins the records of a task, and keeps the result in `found`."""

    def finish(records: Mapping[int, Record]) -> Columns:
        parts = [records[number]["found"] for number in sorted(records)]
        found[task] = joined([part for part in parts if part is not None])
        return {"loss": found[task].losses}

    return finish


def _check_scaled(
    before: Mapping[str, Measured], after: Mapping[str, Measured], temperature: float, dtypes: set[torch.dtype]
) -> None:
    """Checks that all logits are divided by the temperature, up to rounding.

    Raises:
        MergeError: If they are not.
    """
    tolerance = max(_TOLERANCES.get(dtype, _OF_16_BITS) for dtype in dtypes)
    problems = []
    for name, old in before.items():
        new = after[name].spreads * temperature
        error = float(np.linalg.norm(new - old.spreads) / np.linalg.norm(old.spreads))
        if not error <= tolerance:
            problems.append(
                f"task {name!r}: with the tensors divided by {temperature:.4g}, logits are off by {error:.1%} of "
                f"being so; expected {tolerance:.1%} at most: something else acts on them after the head. Nothing is "
                "written"
            )
    if problems:
        raise MergeError(*problems)
