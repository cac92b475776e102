"""A comparison is checked as a whole before the first weight is read: all that is wrong with it is told at once.

    config, EVAL.yaml, methods, sweeps, ranges, folder ──► Checked, or one error with every mistake

Each part is looked at as far as the mistakes of the others allow: what is swept is held against the methods' own bounds
even where the configuration cannot be read, and an EVAL.yaml is read whatever is wrong with the settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from largemerge import api
from largemerge.api import EvaluationSource, Memory
from largemerge.config_file import shown
from largemerge.data_free.config import DataFreeConfig
from largemerge.data_free.methods.table import METHODS as DATA_FREE_METHODS
from largemerge.devices import choose_device
from largemerge.distributed.launcher import several_processes
from largemerge.errors import ConfigError, LargemergeError, SystemFailure
from largemerge.evaluation.config import EvaluationConfig, load_evaluation
from largemerge.evaluation.prepare import Job, prepare
from largemerge.evaluation.results import EvaluatedModel
from largemerge.regression.config import MergeConfig
from largemerge.trials.folder import ComparisonFolder
from largemerge.trials.held_out import held_out_tasks, in_words_of_calibration
from largemerge.trials.make import (
    Compared,
    Search,
    Trial,
    check_compared,
    choose_methods,
    is_right_range,
    known_settings,
    make_trials,
    most_samples,
    read_source,
    right_values,
)
from largemerge.trials.objective import Objective, choose_objective
from largemerge.trials.search import optuna_problem
from largemerge.trials.settings import Range, read_ranges, read_sweeps


@dataclass(frozen=True)
class Asked:
    """What a user wants to be tried, as in `compare`."""

    methods: Sequence[str]
    sweep: Mapping[str, Sequence[Any]] | Sequence[str]
    search: Mapping[str, Range | tuple[Any, ...]] | Sequence[str]
    num_trials: int


@dataclass(frozen=True)
class Checked:
    """A comparison in which nothing is wrong, as far as can be known before the first weight is read.

    Attributes:
        compared: The configuration.
        folder: The folder of the comparison.
        trials: The trials and searches, in order.
        tasks: The evaluation.
        models: The models that are merged.
        memory: Limits that override those of the configuration.
        taken: Names of all models that are measured, which no trial may have.
        objective: What trials are compared by.
    """

    compared: Compared
    folder: ComparisonFolder
    trials: tuple[Trial | Search, ...]
    tasks: EvaluationConfig
    models: Sequence[EvaluatedModel]
    memory: Memory
    taken: frozenset[str]
    objective: Objective


@dataclass
class _Mistakes:
    """Everything that is wrong, noted so that what comes after is looked at, too."""

    problems: list[str] = field(default_factory=list)
    _only: LargemergeError | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes what is wrong inside in place of raising it, unless the system itself fails."""
        try:
            yield
        except SystemFailure:
            raise
        except LargemergeError as error:
            self._only = error if not self.problems else None
            self.problems += error.problems

    def tell(self) -> None:
        """Raises an error with all that is wrong, if anything is."""
        if self._only is not None and self._only.problems == tuple(self.problems):
            raise self._only
        if self.problems:
            raise ConfigError(*dict.fromkeys(self.problems))


def check_comparison(
    source: str | Path | Mapping[str, Any],
    evaluation: EvaluationSource | None,
    asked: Asked,
    arguments: Mapping[str, Any],
) -> Checked:
    """Checks all arguments of `compare`, each as far as the mistakes of others allow.

    Args:
        source: The configuration.
        evaluation: The evaluation.
        asked: What is to be tried.
        arguments: The other arguments, by name.

    Raises:
        LargemergeError: With everything that is wrong.
    """
    mistakes = _Mistakes()
    problems = mistakes.problems
    memory = _memory(arguments["memory"], problems)
    problems += api.argument_problems({**arguments, "memory": memory})
    limit, memory = (arguments["limit"], memory) if not problems else (None, Memory())
    out, device = arguments["out"], arguments["device"]
    folder = ComparisonFolder(Path(out) if isinstance(out, str | Path) else Path())
    if isinstance(device, str) and not several_processes():  # a rank chooses its own GPU later
        with mistakes.noted():
            choose_device(device)
    mapping: Mapping[str, Any] = {}
    compared = tasks = loaded = objective = None
    models: list[EvaluatedModel] = []
    taken: frozenset[str] = frozenset()
    with mistakes.noted():
        mapping, beside = read_source(source)
        compared = check_compared(mapping, beside)
    own = mapping.get("merge_method")
    methods = choose_methods(own if isinstance(own, str) else None, asked.methods, problems)
    sweeps, ranges = _right_settings(asked, methods, given=arguments["num_trials"] is not None, problems=problems)
    trials = (
        make_trials(compared, methods, sweeps, ranges, asked.num_trials, problems)
        if compared is not None and type(asked.num_trials) is int
        else ()
    )
    with mistakes.noted():
        if evaluation is not None:
            loaded = load_evaluation(evaluation)
        elif compared is not None or own in DATA_FREE_METHODS:
            loaded = _held_out(compared.config if compared is not None else None, most_samples(sweeps, ranges))
    if compared is not None and loaded is not None:
        with mistakes.noted():
            models, base = api.models_of(compared.config)
            tasks = loaded.with_limits(limit, host=memory.host, device=memory.device, disk=memory.disk)
            if base is not None and tasks.base is None:
                tasks = tasks.model_copy(update={"base": base})
            jobs = _jobs(tasks, models, held_out=evaluation is None)
            taken = frozenset(job.model.name for job in jobs)
            objective = choose_objective(tasks, jobs)
    with mistakes.noted():
        folder.check()
    mistakes.tell()
    assert compared is not None and tasks is not None and objective is not None
    _check_possible(trials, device, memory)
    return Checked(compared, folder, trials, tasks, models, memory, taken, objective)


def _check_possible(trials: Sequence[Trial | Search], device: str, memory: Memory) -> None:
    """Plans one trial by each method; where some are possible, others may fail, and lose no result.

    Raises:
        ConfigError: If none of them can be merged, with the reasons.
    """
    first: dict[str, Trial] = {}
    for each in trials:
        trial = each if isinstance(each, Trial) else each.ends[0]
        first.setdefault(trial.method, trial)
    problems: list[str] = []
    for trial in first.values():
        own = api.plan_problems(trial.raw, device=device, memory=memory)
        if not own:
            return
        problems += own
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def _memory(given: Memory | Mapping[str, Any] | None, problems: list[str]) -> Memory:
    """Reads limits of memory, in words of the command line; notes what is wrong with them."""
    if not isinstance(given, Mapping):
        return given if given is not None else Memory()
    names = tuple(each.name for each in fields(Memory))
    if not set(given) <= set(names):
        problems.append(f"memory: {shown(dict(given))}: expected some of {', '.join(names)}")
        return Memory()
    try:
        return Memory(**given)
    except ConfigError as error:
        words = {f"memory.{name}: ": f"--memory-{name} " for name in given}
        for problem in error.problems:
            word = next((word for word in words if problem.startswith(word)), "")
            problems.append(words.get(word, "") + problem.removeprefix(word))
        return Memory()


def _right_settings(
    asked: Asked, methods: Sequence[str], *, given: bool, problems: list[str]
) -> tuple[dict[str, list[Any]], dict[str, Range]]:
    """Reads what is swept and searched; returns what is right by itself, and notes the rest.

    Args:
        asked: What is to be tried.
        methods: The methods that are tried, as far as they are known.
        given: Whether the user has set the number of trials.
        problems: Gets what is wrong.
    """
    sweeps, ranges = read_sweeps(asked.sweep, problems), read_ranges(asked.search, problems)
    swept = known_settings(sweeps, methods, asked.methods, "--sweep", problems)
    searched = known_settings(ranges, methods, asked.methods, "--search", problems)
    if asked.search and (problem := optuna_problem()) is not None:
        problems.append(problem)
    if given and not asked.search:
        problems.append("--num-trials: is the number of trials of a search; expected --search with it")
    problems += [f"--search {key}: is swept, too; expected one of both" for key in searched if key in sweeps]
    values = {key: right_values(key, sweeps[key], methods, problems) for key in swept}
    right = {key: ranges[key] for key in searched if is_right_range(key, ranges[key], methods, problems)}
    return {key: some for key, some in values.items() if some}, {k: r for k, r in right.items() if k not in sweeps}


def _held_out(config: MergeConfig | DataFreeConfig | None, largest: int | None) -> EvaluationConfig:
    """The evaluation where there is no EVAL.yaml: held-out texts of the calibration data."""
    if not isinstance(config, MergeConfig):
        raise ConfigError(
            "no evaluation: a configuration without calibration data has nothing to hold out; expected an EVAL.yaml"
        )
    return held_out_tasks(config, largest=largest)


def _jobs(tasks: EvaluationConfig, models: Sequence[EvaluatedModel], *, held_out: bool) -> Sequence[Job]:
    """Prepares all tasks; problems with what is held out are told in words of what a user has set."""
    try:
        return prepare(tasks, models).jobs
    except ConfigError as error:
        raise ConfigError(*(in_words_of_calibration(error.problems, tasks) if held_out else error.problems)) from None
