"""A comparison as a list of steps.

    config, EVAL.yaml ──► trials, checked ──► models measured ──► Gram matrices collected, if trials share them
                      ──► trial after trial: merged, measured, noted, weights deleted unless the best ──► CompareReport

What is finished is noted in the folder, and is not done again by a later run. RegMean's Gram matrices are those of the
candidates on their own data, the same for every `off_diagonal_scale`, `ridge` and weight: with more than one such trial
they are collected once, and every trial only solves. RegMean++ and its kin collect theirs from what is merged before,
which differs with every setting, so that trials share nothing but what is measured of the models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from largemerge import api
from largemerge.api import EvaluationSource, Memory
from largemerge.checkpoint.writer import write_atomically
from largemerge.distributed.launcher import own_rank, several_processes
from largemerge.distributed.ranks import stay_together
from largemerge.errors import ConfigError, LargemergeError, OutputError, SystemFailure, explain_failures
from largemerge.evaluation.config import EvaluationConfig, load_evaluation
from largemerge.evaluation.evaluate import evaluate_models
from largemerge.evaluation.prepare import prepare
from largemerge.evaluation.results import EvaluatedModel, Evaluation, held_against
from largemerge.machine import versions
from largemerge.output import WORKING_FOLDER
from largemerge.progress import stage
from largemerge.regression.config import MergeConfig
from largemerge.text_files import json_text
from largemerge.trials.held_out import held_out_tasks
from largemerge.trials.make import Trial, make_trials, most_samples, read_raw
from largemerge.trials.page import write_comparison
from largemerge.trials.results import CompareReport, TrialResult

_TRIALS, _GRAMS, _BEST, _MODELS = "trials", "grams", "best", "models.json"
_FEWEST_SHARING = 2


@explain_failures()
def compare(
    config: str | Path | Mapping[str, Any],
    evaluation: EvaluationSource | None = None,
    *,
    out: str | Path,
    methods: Sequence[str] = (),
    sweep: Mapping[str, Sequence[Any]] | None = None,
    device: str = "auto",
    limit: int | None = None,
    memory: Memory | None = None,
    keep_all: bool = False,
    quiet: bool = True,
) -> CompareReport:
    """Merges by several methods or settings, measures every merge, and keeps the best.

    Args:
        config: The path of a YAML file, or a mapping like it.
        evaluation: An evaluation; `None` for the loss on texts of the calibration data that calibration does not draw.
        out: Folder for the trials' results, `best.yaml`, the best merge in `best`, and the pages. What an earlier run
            has finished there is not done again.
        methods: Names of methods; empty for the configuration's own.
        sweep: Values by setting; every combination is tried, for methods that have the setting.
        device: `auto`, `cpu`, `cuda:0`, ….
        limit: Samples of each task, at most.
        memory: Limits that override those of the configuration.
        keep_all: Keep the weights of all trials, not only those of the best.
        quiet: Show no progress.

    Returns:
        The report. A trial that fails says so, and loses no other's result.

    Raises:
        LargemergeError: If anything is wrong with config, evaluation, methods or settings; before the first merge.
    """
    start, memory = time.perf_counter(), memory or Memory()
    raw = read_raw(config)
    trials = make_trials(raw, methods, sweep or {})
    tasks = _tasks(raw, evaluation, trials, limit, memory)
    models, base = api.models_of(api.read_config(raw))
    if base is not None and tasks.base is None:
        tasks = tasks.model_copy(update={"base": base})
    prepare(tasks, models)
    run = _Run(Path(out), tasks, device, memory, quiet, keep_all, _fingerprint(raw, tasks))
    with stay_together():
        return run.all_trials(trials, models, start)


def _tasks(
    raw: Mapping[str, Any],
    source: EvaluationSource | None,
    trials: Sequence[Trial],
    limit: int | None,
    memory: Memory,
) -> EvaluationConfig:
    """The evaluation: that of the user, or held-out texts of the calibration data."""
    if source is not None:
        loaded = load_evaluation(source)
    else:
        own = api.read_config(raw)
        if not isinstance(own, MergeConfig):
            raise ConfigError(
                "no evaluation: a configuration without calibration data has nothing to hold out; expected an EVAL.yaml"
            )
        loaded = held_out_tasks(own, largest=most_samples(trials))
    return loaded.with_limits(limit, host=memory.host, device=memory.device, disk=memory.disk)


def _fingerprint(raw: Mapping[str, Any], tasks: EvaluationConfig) -> str:
    """What trials depend on beside their own settings: tasks, versions, and the models' files by size and time."""
    own = api.read_config(raw)
    models, base = api.models_of(own)
    files: list[Any] = []
    for reference in (*(model.reference for model in models), *([base] if base is not None else [])):
        folder = Path(reference)
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        files += [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()]
    return json_text([tasks.model_dump(mode="json", exclude={"memory"}), files, versions()])


@dataclass
class _Run:
    """The long work of a comparison; attributes as in `compare`."""

    out: Path
    tasks: EvaluationConfig
    device: str
    memory: Memory
    quiet: bool
    keep_all: bool
    fingerprint: str

    def all_trials(self, trials: Sequence[Trial], models: Sequence[EvaluatedModel], start: float) -> CompareReport:
        """Measures the models, then merges and measures trial after trial."""
        self._open()
        measured = self._models(models)
        objective, higher = _objective(measured)
        began = time.perf_counter()
        grams, notes = self._grams(trials)
        shared = time.perf_counter() - began
        results: list[TrialResult] = []
        found: list[Evaluation] = []
        for number, trial in enumerate(trials, 1):
            stage(f"trial {number} of {len(trials)}: {trial.name}")
            result, evaluation = self._trial(trial, grams, measured)
            results.append(result)
            found += [evaluation] if evaluation is not None else []
            self._keep_best(results, higher)
        report = CompareReport(
            trials=tuple(results),
            evaluation=_joined(measured, found),
            objective=objective,
            higher_is_better=higher,
            best_config="",
            shared_seconds=shared,
            seconds=time.perf_counter() - start,
            notes=tuple(notes),
        )
        best = report.best
        if best is not None:
            chosen = next(trial for trial in trials if trial.name == best.name)
            report = replace(report, best_config=chosen.yaml)
            if not (self.out / _BEST).is_dir() and not self.keep_all:
                note = f"the best merge is not in {self.out / _BEST} any more; merge best.yaml to have it again"
                report = replace(report, notes=(*report.notes, note))
        if own_rank() == 0:
            write_comparison(report, self.out)
        return report

    def _open(self) -> None:
        """Makes the folder; refuses one that holds something else."""
        own = {_TRIALS, _GRAMS, _BEST, _MODELS, "best.yaml", *(f"comparison.{end}" for end in ("json", "csv", "html"))}
        if self.out.is_dir():
            others = sorted(path.name for path in self.out.iterdir() if path.name not in own)
            if others:
                raise OutputError(
                    f"{self.out}: holds {others[0]}, which is no comparison's; expected a folder of its own"
                )
        elif self.out.exists():
            raise OutputError(f"{self.out}: is a file; expected a folder")
        (self.out / _TRIALS).mkdir(parents=True, exist_ok=True)

    def _known(self, path: Path, key: str) -> Any:
        """What an earlier run has noted in a file, if it was the same."""
        if not path.is_file():
            return None
        noted = json.loads(path.read_text(encoding="utf-8"))
        return noted["found"] if noted["key"] == key else None

    def _note(self, path: Path, key: str, found: Any) -> None:
        if own_rank() == 0:
            write_atomically(path, json_text({"key": key, "found": found}, indent=1) + "\n")

    def _models(self, models: Sequence[EvaluatedModel]) -> Evaluation:
        """Measures the models that are merged, the base and experts, once."""
        key = _digest(self.fingerprint, [vars(model) for model in models])
        known = self._known(self.out / _MODELS, key)
        if known is not None:
            return Evaluation.from_json(known)
        stage("measuring the models")
        found = evaluate_models(self.tasks, models, device=self.device, quiet=self.quiet)
        if not found.problems:
            self._note(self.out / _MODELS, key, found.to_json())
        return found

    def _grams(self, trials: Sequence[Trial]) -> tuple[dict[str, Path], list[str]]:
        """Collects Gram matrices once, where several trials use the same; returns their folders by candidate."""
        sharing = [trial for trial in trials if _shares_grams(trial)]
        if len(sharing) < _FEWEST_SHARING:
            return {}, []
        if several_processes():
            return {}, ["trials by RegMean share no Gram matrices under a launcher: one process collects them"]
        raw = dict(sharing[0].raw)
        solves_head = any(
            isinstance(trial.config, MergeConfig) and trial.config.method.solves_head for trial in sharing
        )
        if solves_head:
            raw["parameters"] = {**raw.get("parameters", {}), "solve": ["blocks", "head"]}
        filters = ("include", "excluded", "exclude")
        parameters = dict(raw.get("parameters", {}))
        if (
            len({json_text({key: trial.raw.get("parameters", {}).get(key) for key in filters}) for trial in sharing})
            > 1
        ):
            parameters = {key: value for key, value in parameters.items() if key not in filters}  # one for all
        raw["parameters"] = parameters
        folder = self.out / _GRAMS
        solved = [solves_head, *(parameters.get(key) for key in filters)]
        key = _digest(
            self.fingerprint, {"models": raw["models"], "calibration": raw.get("calibration"), "solved": solved}
        )
        noted = self.out / _TRIALS / "grams.json"
        if self._known(noted, key) is None:
            stage("collecting Gram matrices, once for all trials by RegMean")
            working = (folder / WORKING_FOLDER).exists()
            api.gram(
                raw,
                folder,
                device=self.device,
                memory=self.memory,
                quiet=self.quiet,
                resume=working,
                force=folder.exists() and not working,
            )
            self._note(noted, key, True)
        config = sharing[0].config
        assert isinstance(config, MergeConfig)
        folders = {label: folder / label for label in config.names}
        return folders, [f"{len(sharing)} trials by RegMean share the Gram matrices in {folder}"]

    def _trial(
        self, trial: Trial, grams: Mapping[str, Path], measured: Evaluation
    ) -> tuple[TrialResult, Evaluation | None]:
        """Merges and measures one trial, unless that is done."""
        key = _digest(self.fingerprint, trial.raw)
        noted = self.out / _TRIALS / f"{_file_name(trial.name)}.json"
        known = self._known(noted, key)
        if known is not None and (not self.keep_all or self._folder(trial.name).is_dir()):
            evaluation = Evaluation.from_json(known["evaluation"])
            return TrialResult(**known["trial"]), evaluation
        began = time.perf_counter()
        folder = self._folder(trial.name)
        source = _with_grams(trial, grams) if grams and _shares_grams(trial) else trial.raw
        result = TrialResult(trial.name, trial.method, trial.settings, None, 0.0, 0.0)
        try:
            resume = (folder / WORKING_FOLDER / "manifest.json").exists()
            api.merge(
                source,
                folder,
                device=self.device,
                resume=resume,
                force=folder.exists() and not resume,
                quiet=self.quiet,
                verify=False,
                memory=self.memory,
            )
            merged = time.perf_counter()
            model = EvaluatedModel(trial.name, str(folder), "merge")
            alone = self.tasks.model_copy(
                update={"base": None, "tasks": tuple(t.model_copy(update={"expert": None}) for t in self.tasks.tasks)}
            )
            evaluation = evaluate_models(alone, [model], device=self.device, quiet=self.quiet)
        except SystemFailure:
            raise
        except LargemergeError as error:
            return replace(result, merge_seconds=time.perf_counter() - began, error="; ".join(error.problems)), None
        joined = _joined(measured, [evaluation])
        value = None if evaluation.problems else joined.average(trial.name)
        result = replace(
            result,
            objective=value,
            merge_seconds=merged - began,
            evaluate_seconds=time.perf_counter() - merged,
        )
        if not evaluation.problems:
            self._note(noted, key, {"trial": vars(result), "evaluation": evaluation.to_json()})
        return result, evaluation

    def _folder(self, name: str) -> Path:
        return self.out / _TRIALS / _file_name(name)

    def _keep_best(self, results: Sequence[TrialResult], higher: bool) -> None:
        """Moves the newest merge to `best` if it is the best so far, and deletes it otherwise."""
        folder = self._folder(results[-1].name)
        if own_rank() != 0 or self.keep_all or not folder.is_dir():
            return
        sign = 1 if higher else -1
        done = [each for each in results if each.objective is not None]
        if done and max(done, key=lambda each: sign * (each.objective or 0.0)) is results[-1]:
            shutil.rmtree(self.out / _BEST, ignore_errors=True)
            os.replace(folder, self.out / _BEST)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _objective(measured: Evaluation) -> tuple[str, bool]:
    """What trials are compared by, and whether more of it is better.

    Raises:
        ConfigError: If tasks have no common scale.
    """
    if all(task.expert is not None for task in measured.tasks):
        return "of the experts", True
    kinds = {(task.metric, task.better) for task in measured.tasks}
    if len(kinds) > 1:
        names = ", ".join(f"{task.name} ({task.metric})" for task in measured.tasks if task.expert is None)
        raise ConfigError(
            f"tasks: {names} have no common scale, by which trials could be compared; expected 'expert' for each task, "
            "so that scores are shares of the experts'"
        )
    ((metric, better),) = kinds
    return metric, better == "higher"


def _joined(measured: Evaluation, trials: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of the models and the trials, held against the same experts and base."""
    models = (*measured.models, *(model for each in trials for model in each.models))
    scores = (*measured.scores, *(score for each in trials for score in each.scores))
    base = next((model.name for model in measured.models if model.role == "base"), None)
    seconds = measured.seconds + sum(each.seconds for each in trials)
    return replace(measured, models=models, scores=tuple(held_against(scores, measured.tasks, base)), seconds=seconds)


def _shares_grams(trial: Trial) -> bool:
    """Whether a trial's Gram matrices depend on the candidates alone, and may come from files."""
    config = trial.config
    return (
        isinstance(config, MergeConfig)
        and config.merge_method == "regmean"
        and config.method.inputs == "candidate"
        and not config.method.compares
        and config.method.granularity == "block"
        and config.sequence is None
        and not trial.draws_its_own
    )


def _with_grams(trial: Trial, grams: Mapping[str, Path]) -> dict[str, Any]:
    """A trial's configuration with Gram matrices in the place of data."""
    config = trial.config
    assert isinstance(config, MergeConfig)
    models = [
        {**model, "calibration": {"grams": str(grams[label].resolve())}}
        for model, label in zip(trial.raw["models"], config.names, strict=True)
    ]
    return {**trial.raw, "models": models}


def _file_name(name: str) -> str:
    """A file name for a trial, told apart by a digest from others that look alike."""
    plain = "".join(letter if letter.isalnum() or letter in "._=-" else "_" for letter in name)
    return f"{plain[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _digest(fingerprint: str, more: Any) -> str:
    return hashlib.sha256((fingerprint + json_text(more)).encode()).hexdigest()
