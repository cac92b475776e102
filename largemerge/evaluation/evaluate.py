"""An evaluation as a list of steps.

    prepare ──► jobs, a task with a model each ──► whole or block by block
            ──► model after model: all tasks that see it alike at once ──► records ──► scores ──► Evaluation

What can be known before the first weight is read has been told by `prepare.py`. What fails here fails alone: the other
tasks keep their results.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from largemerge.calibration.batches import Batch, CalibrationSet, mmap_inputs
from largemerge.checkpoint.tensor_info import dtype_name
from largemerge.distributed.ranks import Ranks, device_of_rank, start_ranks
from largemerge.errors import ConfigError, LargemergeError, SystemFailure
from largemerge.evaluation.config import (
    EvaluationConfig,
    HarnessTask,
    Task,
)
from largemerge.evaluation.corruption import PACKAGE, with_corruption
from largemerge.evaluation.harness import run_harness
from largemerge.evaluation.metrics import interval
from largemerge.evaluation.models import OpenedModel
from largemerge.evaluation.prepare import Job, expert_among, headline_metric, prepare, view_key
from largemerge.evaluation.results import EvaluatedModel, EvaluatedTask, Evaluation, Score, held_against
from largemerge.evaluation.running import Limits, RunningModel, Way, running, working_bytes, write_answers
from largemerge.evaluation.task import Columns, FirstPass, Prepared, Record, Samples
from largemerge.machine import free_on_gpu, machine, memory_in_use, versions
from largemerge.progress import RunProgress
from largemerge.text_files import first_line
from largemerge.units import gib

_OVERHEAD = 1.1
"""Weights in memory take a little more than their bytes."""
_SHARE_OF_FREE = 0.8


def evaluate_models(
    config: EvaluationConfig,
    models: Sequence[EvaluatedModel],
    *,
    device: str = "auto",
    quiet: bool = True,
) -> Evaluation:
    """Measures models in all tasks of an evaluation.

    Args:
        config: The evaluation, from `load_evaluation`.
        models: The models; the base of the evaluation and experts that are not among them are added.
        device: `auto`, `cpu`, `cuda:0`, ….
        quiet: Show no progress.

    Returns:
        The scores; tasks that failed say why.

    Raises:
        LargemergeError: If models, data and tasks do not fit together; before the first weight is read.
    """
    start = time.perf_counter()
    with start_ranks(on_gpus=device != "cpu") as ranks:
        target = ranks.agree(lambda: device_of_rank(device, ranks))
        prepared = ranks.agree(lambda: prepare(config, models))
        jobs = prepared.jobs
        measured = {job.task.name for job in jobs}
        unmeasured = [task for task in config.tasks if task.name not in measured]
        if unmeasured:
            expected = "expected a merge that has kept it, the path of its file, or a classifier as the task's 'expert'"
            heads = [(task.name, getattr(task, "head", "")) for task in unmeasured]
            raise ConfigError(*(f"task {name!r}: no model has the head {head!r}; {expected}" for name, head in heads))
        limits = _limits(config, target, ranks)
        run = _Run(config, limits, ranks, quiet=quiet or not ranks.is_first)
        scores = run.run(jobs)
        everyone = tuple(dict.fromkeys(job.model for job in jobs))
        tasks = tuple(_described(task, jobs, everyone) for task in config.tasks)
        base = next((model.name for model in everyone if model.role == "base"), None)
        return Evaluation(
            tasks=tasks,
            models=everyone,
            scores=tuple(held_against(scores, tasks, base)),
            settings=config.model_dump(mode="json"),
            versions=versions_of(config.tasks),
            machine=machine(target),
            seconds=time.perf_counter() - start,
            notes=(*prepared.notes, *_limit_notes(config, limits), *run.notes),
        )


def versions_of(tasks: Sequence[Task]) -> dict[str, str]:
    """Looks up the versions of all that decides the scores of some tasks."""
    corruptions = (PACKAGE,) if with_corruption(tasks) else ()
    harness = ("lm_eval",) if any(isinstance(task, HarnessTask) for task in tasks) else ()
    return versions(*corruptions, *harness)


def run_jobs(config: EvaluationConfig, jobs: Sequence[Job], *, device: str = "auto", quiet: bool = True) -> list[Score]:
    """Runs jobs that are prepared, in this process.

    Args:
        config: The evaluation.
        jobs: Tasks with their models.
        device: `auto`, `cpu`, `cuda:0`, ….
        quiet: Show no progress.
    """
    with start_ranks(on_gpus=device != "cpu") as ranks:
        limits = _limits(config, device_of_rank(device, ranks), ranks)
        return _Run(config, limits, ranks, quiet=quiet).run(jobs)


def _limits(config: EvaluationConfig, device: torch.device, ranks: Ranks) -> Limits:
    """What may be held, beside what the process holds already."""
    memory, held = config.memory, memory_in_use(device).host_anonymous
    free = psutil.virtual_memory().available // ranks.local_size
    host_room = max(0, memory.host - held) if memory.host is not None else int(free * _SHARE_OF_FREE)
    room = host_room
    if device.type != "cpu":
        on_gpu = int(free_on_gpu(device, ranks.local_size) * _SHARE_OF_FREE)
        room = memory.device if memory.device is not None else on_gpu
    return Limits(device, room, host_room, Path(memory.disk or tempfile.gettempdir()))


def _limit_notes(config: EvaluationConfig, limits: Limits) -> list[str]:
    """Notes on a limit that the process is above already, before it has read a model."""
    limit = config.memory.host
    if limit is None or limits.host_bytes:
        return []
    return [
        f"memory.host is {gib(limit)}, and Python with its libraries holds more than that; models are run block by "
        "block, in as little beside it as goes"
    ]


@dataclass
class _Run:
    """The long work of an evaluation.

    Attributes:
        config: The evaluation.
        limits: Device and memory.
        ranks: The ranks; each runs a part of the batches.
        quiet: Whether no progress is shown.
        notes: What a user should know of what has come out.
    """

    config: EvaluationConfig
    limits: Limits
    ranks: Ranks
    quiet: bool
    notes: list[str] = field(init=False, default_factory=list)
    _made: dict[tuple[str, ...], Any] = field(init=False, default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> list[Score]:
        """Runs all jobs; those of one model that see it alike together."""
        groups: dict[str, list[Job]] = {}
        for job in jobs:
            key = view_key(job.prepared.view) if job.prepared is not None else f"harness {job.model.name}"
            groups.setdefault(f"{job.model.name} {key}", []).append(job)
        ways = {key: self._way(group) for key, group in groups.items()}
        steps = sum(self._steps(group, ways[key]) for key, group in groups.items())
        blocks = max((_num_blocks(job.opened) for job in jobs if job.opened is not None), default=1)
        scores: dict[tuple[str, str], Score] = {}
        with self.ranks.busy(), RunProgress(steps, blocks, self.limits.device, quiet=self.quiet) as progress:
            for key, group in groups.items():
                for score in self._scores(group, ways[key], progress):
                    scores[score.model, score.task] = score
        return [scores[job.model.name, job.task.name] for job in jobs]

    def _way(self, group: Sequence[Job]) -> Way:
        """Whether the model of a group is run whole; the same on all ranks."""
        opened = group[0].opened
        if opened is None:
            return "whole"
        texts = [
            replace(job.prepared.samples, pixels=None).batch(0)
            for job in group
            if job.prepared is not None and job.prepared.samples.groups[0][0].sequences
        ]
        needed = int(opened.num_bytes * (_OVERHEAD - 1)) + working_bytes(opened, texts)
        return self.ranks.from_first(self.limits.way(opened, needed))

    def _steps(self, group: Sequence[Job], way: Way) -> int:
        batches = sum(len(self._own(job.prepared.samples)) for job in group if job.prepared is not None)
        opened = group[0].opened
        return max(1, batches * (1 if way == "whole" or opened is None else _num_blocks(opened) + 1))

    def _own(self, samples: Samples) -> Samples:
        return samples.shared(self.ranks.rank, self.ranks.size)

    def _scores(self, group: Sequence[Job], way: Way, progress: RunProgress) -> Iterator[Score]:
        """Runs the tasks that see one model alike."""
        if group[0].prepared is None:
            for job in group:
                yield from self._harness(job)
            return
        results: dict[str, _Found] = {job.task.name: _Found() for job in group}
        firsts = {job.task.name: self._first(job, results[job.task.name]) for job in group}
        model = group[0].opened
        assert model is not None

        def step(block: str) -> None:
            progress.step(block or "all blocks", "evaluate", group[0].model.name)

        try:
            with running(model, way, self.limits, step) as run:
                self._run_tasks(run, group, results, firsts)
        except LargemergeError as error:
            for found in results.values():
                found.error = found.error or "; ".join(error.problems)
        for job in group:
            yield self._score(job, results[job.task.name], way)

    def _first(self, job: Job, found: _Found) -> Any:
        """The result of the pass that a task needs before, made once for all models that share it."""
        prepared = job.prepared
        if prepared is None or prepared.first is None:
            return None
        first: FirstPass = prepared.first
        assert job.first is not None
        key = first.key
        if key not in self._made:
            began = time.perf_counter()
            own = self._own(first.samples)
            texts = [own.batch(0)] if len(own) else []
            way = self.ranks.from_first(self.limits.way(job.first, working_bytes(job.first, texts)))
            records: dict[int, Record] = {}
            error = ""
            try:
                if len(own):
                    with running(job.first, way, self.limits) as run:
                        batches = self._batches(own, way)
                        for group, batch, output in zip(own.groups, batches, run.outputs(batches), strict=True):
                            records |= _by_number(group, first.score(output, batch, group))
            except LargemergeError as failed:
                error = "; ".join(failed.problems)
            parts = self.ranks.gather((records, error))
            error = next((each for _, each in parts if each), "")
            made = None if error else first.finish(_joined(part for part, _ in parts))
            self._made[key] = made, error
            found.seconds = time.perf_counter() - began
        made, found.error = self._made[key]
        return made

    def _batches(self, samples: Samples, way: Way) -> Sequence[Batch]:
        """The batches of a task: made one after another where the model is whole, else once for all blocks."""
        if way == "whole":
            return _Lazy(samples)
        made: list[Batch] = []
        for batch in samples.batches():
            pixels = len(samples) * sum(x.nbytes for x in batch.inputs.values() if x.is_floating_point())
            if pixels > self.limits.host_bytes // 4:  # each goes to the disk before the next is made
                batch = mmap_inputs(CalibrationSet("", (batch,), ""), self.limits.disk).batches[0]
            made.append(batch)
        return made

    def _run_tasks(
        self, run: RunningModel, group: Sequence[Job], results: Mapping[str, _Found], firsts: Mapping[str, Any]
    ) -> None:
        """Runs the batches of all tasks of a group; block by block, those with the same arguments in one pass."""
        ready = [job for job in group if not results[job.task.name].error]
        writing = [job for job in ready if job.prepared is not None and job.prepared.generating is not None]
        reading = [job for job in ready if job not in writing]
        together: list[list[Job]] = [[job] for job in reading]
        if run.way == "by block":
            by_arguments: dict[tuple[Any, ...], list[Job]] = {}
            for job in reading:
                by_arguments.setdefault(_arguments(job), []).append(job)
            together = list(by_arguments.values())
        for jobs in together:
            self._read(run, jobs, results, firsts)
        for job in writing:
            assert job.prepared is not None and job.prepared.generating is not None
            found, own = results[job.task.name], self._own(job.prepared.samples)
            began = time.perf_counter()
            try:
                answers = write_answers(run, own, job.prepared.generating, self.limits.device)
                for group_, output in zip(own.groups, answers, strict=True):
                    found.records |= _by_number(group_, job.prepared.score(None)(output, Batch({}, None), group_))
            except Exception as error:
                found.error = _told(error)
            found.seconds += time.perf_counter() - began

    def _read(
        self, run: RunningModel, jobs: Sequence[Job], results: Mapping[str, _Found], firsts: Mapping[str, Any]
    ) -> None:
        """Runs batches, and scores what comes out."""
        began = time.perf_counter()
        owners: list[tuple[Job, Any]] = []
        problem: dict[str, str] = {}
        parts: list[Sequence[Batch]] = []
        for job in jobs:
            assert job.prepared is not None
            own = self._own(job.prepared.samples)
            try:
                made = self._batches(own, run.way)
            except LargemergeError as error:
                problem[job.task.name] = "; ".join(error.problems)
                continue
            parts.append(made)
            owners += [(job, samples) for samples in own.groups]
        batches = parts[0] if len(parts) == 1 else [batch for part in parts for batch in part]
        try:
            outputs = run.outputs(batches) if len(batches) else iter(())
            for (job, samples), (batch, output) in zip(owners, _paired(batches, outputs), strict=True):
                assert job.prepared is not None
                found = results[job.task.name]
                try:
                    score = job.prepared.score(firsts[job.task.name])
                    found.records |= _by_number(samples, score(output, batch, samples))
                except LargemergeError as error:
                    problem.setdefault(job.task.name, "; ".join(error.problems))
        except SystemFailure:
            raise
        except LargemergeError as error:
            for job in jobs:
                problem.setdefault(job.task.name, "; ".join(error.problems))
        seconds = time.perf_counter() - began
        total = sum(len(self._own(job.prepared.samples)) for job in jobs if job.prepared is not None)
        for job in jobs:
            assert job.prepared is not None
            found = results[job.task.name]
            found.error = found.error or problem.get(job.task.name, "")
            found.seconds += seconds * len(self._own(job.prepared.samples)) / max(1, total)

    def _score(self, job: Job, found: _Found, way: Way) -> Score:
        """Collective: makes the score of all ranks' records."""
        parts = self.ranks.gather((found.records, found.error))
        error = next((each for _, each in parts if each), "").replace(f"task {job.task.name!r}: ", "")  # told anyway
        assert job.prepared is not None and job.opened is not None
        score = Score(job.task.name, job.model.name, {}, seconds=found.seconds, way=way, error=error)
        if error:
            return score
        columns = job.prepared.finish(_joined(part for part, _ in parts))
        if not all(bool(np.isfinite(column).all()) for column in columns.values()):
            lacking = f"; its files have no {', '.join(sorted(job.opened.lacking))}" if job.opened.lacking else ""
            dtype = dtype_name(job.files.compute_dtype)
            return replace(score, error=f"outputs are not finite, computed in {dtype}{lacking}")
        undefined = next((why for metric in job.prepared.metrics if (why := metric.undefined(columns))), "")
        if undefined:
            return replace(score, error=undefined)
        remark = job.prepared.remark(columns)
        self.notes += [f"task {job.task.name!r}, {job.model.name}: {remark}"] if remark else []
        metrics = {metric.name: metric.compute(columns) for metric in job.prepared.metrics}
        return replace(
            score,
            metrics=metrics,
            interval=self._interval(job.prepared, columns),
            num_samples=len(next(iter(columns.values()))),
        )

    def _interval(self, prepared: Prepared, columns: Columns) -> tuple[float, float] | None:
        config = self.config
        return interval(
            prepared.metrics[0],
            columns,
            resamples=config.resamples,
            confidence=config.confidence,
            seed=config.seed,
        )

    def _harness(self, job: Job) -> Iterator[Score]:
        """Runs tasks of lm-eval, on rank 0."""
        began = time.perf_counter()
        task = job.task
        assert isinstance(task, HarnessTask)
        metrics: dict[str, float] = {}
        error, count, half = "", 0, None
        if self.ranks.is_first:
            with self.ranks.blocked():
                try:
                    metrics, count, half = run_harness(task, self.config, job.files, self.limits.device)
                except Exception as failed:
                    error = _told(failed)
        metrics, count, half, error = self.ranks.from_first((metrics, count, half, error))
        value = next(iter(metrics.values()), 0.0)
        spread = (value - half, value + half) if half is not None else None
        seconds = time.perf_counter() - began
        yield Score(task.name, job.model.name, metrics, spread, count, seconds, "whole", error)


@dataclass
class _Found:
    """What running one task with one model has given so far."""

    records: dict[int, Record] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


class _Lazy(Sequence[Batch]):
    """Batches that are made when they are asked for, the last of them kept."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._last: tuple[int, Batch] | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        if self._last is None or self._last[0] != number:
            self._last = (number, self._samples.batch(number))
        return self._last[1]


def _paired(batches: Sequence[Batch], outputs: Iterator[Any]) -> Iterator[tuple[Batch, Any]]:
    """Yields batches with their outputs; an output is asked for before its batch, which may be made only then."""
    for number, output in enumerate(outputs):
        yield batches[number], output


def _told(error: BaseException) -> str:
    if isinstance(error, SystemFailure) or not isinstance(error, Exception):
        raise error
    return "; ".join(error.problems) if isinstance(error, LargemergeError) else first_line(error, 200)


def _by_number(samples: Sequence[Any], records: Sequence[Record]) -> dict[int, Record]:
    return {sample.row: record for sample, record in zip(samples, records, strict=True)}


def _joined(parts: Any) -> dict[int, Record]:
    joined: dict[int, Record] = {}
    for part in parts:
        joined |= part
    return joined


def _arguments(job: Job) -> tuple[Any, ...]:
    """Names of the arguments of a task's batches."""
    assert job.prepared is not None
    samples = job.prepared.samples
    return (*sorted(samples.groups[0][0].sequences), samples.pixels is not None)


def _num_blocks(opened: OpenedModel) -> int:
    return sum(len(stack.blocks) for stack in opened.skeleton.stacks)


def _described(task: Task, jobs: Sequence[Job], models: Sequence[EvaluatedModel]) -> EvaluatedTask:
    """What a task is, for the results."""
    own = next(job for job in jobs if job.task.name == task.name)
    expert = expert_among(task, models)
    name = expert.name if expert is not None else None
    if own.prepared is None:
        return EvaluatedTask(task.name, task.kind, headline_metric(own), "higher", True, name)
    metric = own.prepared.metrics[0]
    return EvaluatedTask(task.name, task.kind, metric.name, metric.better, metric.is_share, name)
