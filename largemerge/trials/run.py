"""A comparison as a list of steps.

    config, EVAL.yaml ──► trials, checked ──► models measured ──► Gram matrices collected, if trials share them
                      ──► trial after trial: proposed, merged, measured, noted, weights deleted unless the best
                      ──► the best in `best` ──► CompareReport

What is finished is noted in the folder, and is not done again by a later run. RegMean's Gram matrices are those of the
candidates on their own data, the same for every `off_diagonal_scale`, `ridge` and weight: with more than one such trial
they are collected once, by one process, and every trial only solves. RegMean++ and its kin collect theirs from what is
merged before, which differs with every setting, so that trials share nothing but what is measured of the models.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from largemerge import api
from largemerge.api import EvaluationSource, Memory
from largemerge.distributed.launcher import own_rank, read_launch
from largemerge.distributed.ranks import start_ranks, stay_together
from largemerge.errors import ConfigError, LargemergeError, SystemFailure, explain_failures
from largemerge.evaluation.config import EvaluationConfig
from largemerge.evaluation.evaluate import evaluate_models, versions_of
from largemerge.evaluation.results import EvaluatedModel, Evaluation, held_against
from largemerge.output import WORKING_FOLDER
from largemerge.progress import stage
from largemerge.regression.config import MergeConfig, load_config
from largemerge.regression.gram_run import write_grams
from largemerge.text_files import json_text
from largemerge.trials.check import Asked, Checked, check_comparison
from largemerge.trials.folder import ComparisonFolder, fingerprint, safe_name
from largemerge.trials.make import (
    Search,
    Trial,
    trial_name,
    with_other_name,
)
from largemerge.trials.objective import Objective
from largemerge.trials.page import write_comparison
from largemerge.trials.results import CompareReport, TrialResult, best_of
from largemerge.trials.search import Proposals
from largemerge.trials.settings import Range

Value = TypeVar("Value")
DEFAULT_NUM_TRIALS = 20
"""Trials of each study of a search, unless set."""
_FEWEST_SHARING = 2
_ONLY_MERGED = ("tokenizer_source", "tokenizer", "head")  # of no matter to Gram matrices; they name models


@explain_failures()
def compare(
    config: str | Path | Mapping[str, Any],
    evaluation: EvaluationSource | None = None,
    *,
    out: str | Path,
    methods: Sequence[str] = (),
    sweep: Mapping[str, Sequence[Any]] | Sequence[str] | None = None,
    search: Mapping[str, Range | tuple[Any, ...]] | Sequence[str] | None = None,
    num_trials: int | None = None,
    device: str = "auto",
    limit: int | None = None,
    memory: Memory | Mapping[str, Any] | None = None,
    keep_all: bool = False,
    quiet: bool = True,
) -> CompareReport:
    """Merges by several methods or settings, measures every merge, and keeps the best.

    Args:
        config: The path of a YAML file, or a mapping like it.
        evaluation: An evaluation; `None` for the loss on texts of the calibration data that calibration does not draw.
        out: Folder for the trials' results, `best.yaml`, the best merge in `best`, and the pages. What an earlier run
            has finished there is not done again, unless models or data have changed since.
        methods: Names of methods, or one name; empty for the configuration's own.
        sweep: Values by setting, or texts as on the command line, `ridge=1e-4,1e-2`; every combination is tried, for
            methods that have the setting.
        search: Ranges by setting, a `Range` or `(low, high)` or `(low, high, "log")`, or texts as on the command line,
            `ridge=1e-6:1e-1:log`. optuna proposes trial after trial, with a study for each method that has one of the
            settings, and for each combination of swept values. The same arguments propose the same trials.
        num_trials: Number of trials of each study; `None` for 20.
        device: `auto`, `cpu`, `cuda:0`, ….
        limit: Samples of each task, at most.
        memory: Limits that override those of the configuration; or a mapping of its attributes.
        keep_all: Keep the weights of all trials, not only those of the best; then `best` is a link to its trial's.
        quiet: Show no progress.

    Returns:
        The report. A trial that fails says so, and loses no other's result.

    Raises:
        LargemergeError: If anything is wrong with config, evaluation, methods, settings or folder, before the first
            model is measured; or if an expert, by whose score trials are compared, has none, before the first merge.
    """
    start = time.perf_counter()
    options = {"device": device, "limit": limit, "memory": memory, "num_trials": num_trials}
    flags = {"keep_all": keep_all, "quiet": quiet}
    methods = [methods] if isinstance(methods, str) else methods
    asked = Asked(methods, sweep or {}, search or {}, DEFAULT_NUM_TRIALS if num_trials is None else num_trials)
    checked = check_comparison(config, evaluation, asked, {"out": out, **options, **flags})
    compared, tasks, folder = checked.compared, checked.tasks, checked.folder
    measured = tasks.model_dump(mode="json", exclude={"memory"})
    depends_on = fingerprint(measured, compared.raw, folder.path, versions_of(tasks.tasks))
    run = _Run(folder, tasks, checked.objective, device, checked.memory, quiet, keep_all, depends_on)
    with stay_together():
        return run.all_trials(checked, start)


@dataclass
class _Tried:
    """What has been tried so far.

    Attributes:
        measured: Scores of the models that are merged.
        grams: Folders of Gram matrices that trials share, by candidate.
        taken: Names that no trial may have.
        num_trials: Number of trials in all.
        trials: The trials that were made, in order.
        results: What each came to, and those that could not be made.
        evaluations: Their scores.
    """

    measured: Evaluation
    grams: Mapping[str, Path]
    taken: frozenset[str]
    num_trials: int
    trials: list[Trial] = field(default_factory=list)
    results: list[TrialResult] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    def result_of(self, trial: Trial) -> TrialResult | None:
        """What the same trial has come to; `None` if it has not been tried."""
        name = with_other_name(trial, self.taken).name
        return next((result for result in self.results if result.name == name), None)

    def failed(self, method: str, settings: Mapping[str, Any], error: LargemergeError) -> None:
        """Notes a trial that could not be made."""
        name = trial_name(method, settings)
        if all(result.name != name for result in self.results):
            self.results.append(TrialResult(name, method, settings, None, 0.0, 0.0, "; ".join(error.problems)))


@dataclass
class _Run:
    """The long work of a comparison; attributes as in `compare`, and how many trials an earlier run had done."""

    folder: ComparisonFolder
    tasks: EvaluationConfig
    objective: Objective
    device: str
    memory: Memory
    quiet: bool
    keep_all: bool
    fingerprint: str
    reused: int = field(init=False, default=0)

    def all_trials(self, checked: Checked, start: float) -> CompareReport:
        """Measures the models, then merges and measures trial after trial."""
        _by_first(self.folder.open)
        measured = self._models(checked.models)
        self.objective.check_experts(measured)
        began = time.perf_counter()
        grams, notes = self._grams(checked.trials)
        tried = _Tried(measured, grams, checked.taken, sum(map(_num_trials, checked.trials)))
        shared = time.perf_counter() - began
        for each in checked.trials:
            if isinstance(each, Trial):
                self._try(each, tried)
            else:
                notes += self._search(each, tried)
        searches = [each for each in checked.trials if isinstance(each, Search)]
        best = best_of(tried.results, self.objective.higher_is_better)
        chosen = next((trial for trial in tried.trials if best is not None and trial.name == best.name), None)
        if chosen is not None:
            notes += self._keep_best(chosen, grams)
        if self.reused:
            notes.append(
                f"{self.reused} of {len(tried.results)} trials had been measured before, and were not done again"
            )
        report = CompareReport(
            trials=tuple(tried.results),
            evaluation=_joined(measured, tried.evaluations),
            objective=self.objective.name,
            higher_is_better=self.objective.higher_is_better,
            best_config=chosen.yaml if chosen is not None else "",
            shared_seconds=shared,
            seconds=time.perf_counter() - start,
            searched=dict(item for each in searches for item in each.ranges.items()),
            notes=tuple(notes),
        )
        if own_rank() == 0:
            write_comparison(report, self.folder.path)
        return report

    def _search(self, search: Search, tried: _Tried) -> list[str]:
        """Tries what is proposed, each told what came of those before; returns notes."""
        proposals = Proposals(search.ranges, self.objective.higher_is_better) if own_rank() == 0 else None
        repeated = 0
        for _ in range(search.num_trials):
            proposed = _by_first(lambda: proposals.ask() if proposals is not None else {})
            try:
                trial = search.trial(proposed)
            except ConfigError as error:
                settings = {**search.ends[0].settings, **proposed}
                tried.failed(search.ends[0].method, settings, error)
                result = None
            else:
                known = tried.result_of(trial)
                repeated += known is not None
                result = known if known is not None else self._try(trial, tried)
            if proposals is not None:
                proposals.tell(result.objective if result is not None else None)
        if not repeated:
            return []
        return [f"{search.name}: {repeated} of {search.num_trials} proposals were no others than some before"]

    def _try(self, trial: Trial, tried: _Tried) -> TrialResult:
        """Merges and measures one trial, and keeps its weights if it is the best so far."""
        named = with_other_name(trial, tried.taken)
        stage(f"trial {len(tried.results) + 1} of {tried.num_trials}: {named.name}")
        result, evaluation = self._trial(named, tried.grams, tried.measured)
        tried.trials.append(named)
        tried.results.append(result)
        tried.evaluations += [evaluation] if evaluation is not None else []
        self._drop_all_but_best(tried.results)
        return result

    def _note(self, path: Path, key: str, found: Any) -> None:
        if own_rank() == 0:
            self.folder.write(path, key, found)

    def _models(self, models: Sequence[EvaluatedModel]) -> Evaluation:
        """Measures the models that are merged, the base and experts, once."""
        key = _digest(self.fingerprint, [vars(model) for model in models])
        known = _read_evaluation(self.folder.known(self.folder.models, key))
        if known is not None:
            return known
        stage("measuring the models")
        found = evaluate_models(self.tasks, models, device=self.device, quiet=self.quiet)
        if not found.problems:
            self._note(self.folder.models, key, found.to_json())
        return found

    def _grams(self, trials: Sequence[Trial | Search]) -> tuple[dict[str, Path], list[str]]:
        """Collects Gram matrices once, where several trials use the same; returns their folders by candidate."""
        known = [(each, each if isinstance(each, Trial) else each.ends[0]) for each in trials]
        sharing = [trial for _, trial in known if _shares_grams(trial)]
        num_sharing = sum(_num_trials(each) for each, trial in known if _shares_grams(trial))
        if num_sharing < _FEWEST_SHARING:
            return {}, []
        if num_sharing < (size := read_launch().size):  # of whom all but one would wait
            together = f"{size} processes collect them for each trial in less time than one does for all"
            return {}, [f"{num_sharing} trials by RegMean share no Gram matrices: {together}"]
        config = sharing[0].config
        assert isinstance(config, MergeConfig)
        inside = {label: _folder_name(label) for label in config.names}
        raw = {key: value for key, value in sharing[0].raw.items() if key not in _ONLY_MERGED}
        raw["models"] = [
            {**model, "name": inside[label]} for model, label in zip(raw["models"], config.names, strict=True)
        ]
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
        folder = self.folder.grams
        solved = [solves_head, *(parameters.get(key) for key in filters)]
        key = _digest(
            self.fingerprint, {"models": raw["models"], "calibration": raw.get("calibration"), "solved": solved}
        )
        noted = self.folder.note_of("grams")

        def collect() -> None:
            if self.folder.known(noted, key) is not None and folder.is_dir():
                return
            stage("collecting Gram matrices, once for all trials by RegMean")
            working = (folder / WORKING_FOLDER).exists() and self.folder.begun(noted, key)
            self.folder.write(noted, key, None)
            write_grams(
                api.limited(load_config(raw, to_gram=True), self.memory),
                folder,
                device=self.device,
                quiet=self.quiet,
                resume=working,
                force=folder.exists() and not working,
            )
            self.folder.write(noted, key, True)

        _by_first(collect)
        return {label: folder / name for label, name in inside.items()}, [
            f"{num_sharing} trials by RegMean share the Gram matrices in {folder}"
        ]

    def _trial(
        self, trial: Trial, grams: Mapping[str, Path], measured: Evaluation
    ) -> tuple[TrialResult, Evaluation | None]:
        """Merges and measures one trial, unless that is done."""
        key, noted = self._key(trial), self.folder.note_of(trial.name)
        known = _read_trial(self.folder.known(noted, key))
        if known is not None and (not self.keep_all or self.folder.trial(trial.name).is_dir()):
            self.reused += 1
            return known
        began = time.perf_counter()
        result = TrialResult(trial.name, trial.method, trial.settings, None, 0.0, 0.0)
        try:
            self._merge(trial, grams)
            merged = time.perf_counter()
            model = EvaluatedModel(trial.name, str(self.folder.trial(trial.name)), "merge")
            evaluation = evaluate_models(self._tasks_of(trial), [model], device=self.device, quiet=self.quiet)
        except SystemFailure:
            raise
        except LargemergeError as error:
            return replace(result, merge_seconds=time.perf_counter() - began, error="; ".join(error.problems)), None
        value, lacking = self.objective.of(_joined(measured, [evaluation]), trial.name)
        result = replace(
            result,
            objective=value,
            merge_seconds=merged - began,
            evaluate_seconds=time.perf_counter() - merged,
            error=lacking,
        )
        if not evaluation.problems:
            self._note(noted, key, {"trial": vars(result), "evaluation": evaluation.to_json()})
        return result, evaluation

    def _tasks_of(self, trial: Trial) -> EvaluationConfig:
        """The tasks for a trial's merge alone, with the names that heads have beside it."""
        tasks = []
        for task in self.tasks.tasks:
            head: str = getattr(task, "head", None) or ""
            renamed = {"head": trial.heads[head]} if head in trial.heads else {}
            tasks.append(task.model_copy(update={"expert": None, **renamed}))
        return self.tasks.model_copy(update={"base": None, "tasks": tuple(tasks)})

    def _key(self, trial: Trial) -> str:
        return _digest(self.fingerprint, trial.raw)

    def _merge(self, trial: Trial, grams: Mapping[str, Path]) -> None:
        """Merges a trial; one that was interrupted goes on, if it is the same."""
        folder = self.folder.trial(trial.name)
        source = _with_grams(trial, grams) if grams and _shares_grams(trial) else trial.raw
        resume, force = _by_first(lambda: self._begin(trial, source))
        api.merge(
            source,
            folder,
            device=self.device,
            resume=resume,
            force=force,
            quiet=self.quiet,
            verify=False,
            memory=self.memory,
        )

    def _begin(self, trial: Trial, source: Mapping[str, Any]) -> tuple[bool, bool]:
        """Notes that a merge begins; returns whether it goes on where an earlier run stopped, or replaces it."""
        noted, folder = self.folder.note_of(trial.name), self.folder.trial(trial.name)
        key = _digest(self.fingerprint, [source])
        resume = self.folder.begun(noted, key) and (folder / WORKING_FOLDER / "manifest.json").exists()
        if self.folder.known(noted, self._key(trial)) is None:  # what was measured is not forgotten
            self.folder.write(noted, key, None)
        return resume, folder.exists() and not resume

    def _drop_all_but_best(self, results: Sequence[TrialResult]) -> None:
        """Deletes the weights of trials that are not the best so far."""
        if own_rank() != 0 or self.keep_all:
            return
        best = best_of(results, self.objective.higher_is_better)
        for result in results:
            folder = self.folder.trial(result.name)
            if result is not best and folder.is_dir():
                shutil.rmtree(folder)

    def _keep_best(self, trial: Trial, grams: Mapping[str, Path]) -> list[str]:
        """Sees to it that `best` holds the best merge, made again where its weights are gone; returns notes."""
        key, folder = self._key(trial), self.folder.trial(trial.name)
        there = _by_first(lambda: folder.is_dir() or self.folder.holds_best(key))
        if not there:
            stage(f"merging the best again, whose weights are gone: {trial.name}")
            try:
                self._merge(trial, grams)
            except SystemFailure:
                raise
            except LargemergeError as error:
                why = "; ".join(error.problems)
                return [f"{self.folder.best} does not hold {trial.name}, which could not be merged again: {why}"]
        if own_rank() == 0 and folder.is_dir():
            self.folder.keep_best(trial.name, key, link=self.keep_all)
        return []


def _by_first(step: Callable[[], Value]) -> Value:
    """Runs a step on rank 0 alone (collective); what it returns, or that it failed, holds for all."""
    with start_ranks() as ranks:
        return ranks.by_first(step)


def _read_evaluation(noted: Any) -> Evaluation | None:
    """Reads an evaluation that was noted; `None` where there is none, or where a number of it is missing."""
    try:
        found = Evaluation.from_json(noted)
        numbers = [number for score in found.scores for number in (*score.metrics.values(), *(score.interval or ()))]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    return found if all(isinstance(number, int | float) for number in numbers) else None


def _read_trial(noted: Any) -> tuple[TrialResult, Evaluation] | None:
    """Reads a trial that was noted; `None` where there is none that can be read."""
    try:
        result, evaluation = TrialResult(**noted["trial"]), _read_evaluation(noted["evaluation"])
    except (TypeError, KeyError):
        return None
    return (result, evaluation) if evaluation is not None else None


def _joined(measured: Evaluation, trials: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of the models and the trials, held against the same experts and base."""
    models = (*measured.models, *(model for each in trials for model in each.models))
    scores = (*measured.scores, *(score for each in trials for score in each.scores))
    base = next((model.name for model in measured.models if model.role == "base"), None)
    seconds = measured.seconds + sum(each.seconds for each in trials)
    return replace(measured, models=models, scores=tuple(held_against(scores, measured.tasks, base)), seconds=seconds)


def _num_trials(planned: Trial | Search) -> int:
    """Number of trials of what is planned, with those that are proposed twice."""
    return planned.num_trials if isinstance(planned, Search) else 1


def _shares_grams(trial: Trial) -> bool:
    """Whether a trial's Gram matrices depend on the candidates alone, and may come from files."""
    config = trial.config
    return (
        isinstance(config, MergeConfig)
        and config.merge_method == "regmean"
        and config.method.sums_stand_alone
        and not config.method.counts_tokens
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


def _folder_name(label: str) -> str:
    """A candidate's name as that of a folder: the same, where it can be one."""
    return label if Path(label).name == label and not label.startswith(".") else f"model-{safe_name(label)}"


def _digest(fingerprint: str, more: Any) -> str:
    return hashlib.sha256((fingerprint + json_text(more)).encode()).hexdigest()
