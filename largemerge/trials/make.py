"""Trials of a comparison: one configuration for every method and every combination of settings.

    config, methods, sweeps, ranges ──► Trial: name, settings, configuration
                                    └─► Search: where the settings of later trials are looked for

A configuration of a regression method is turned into one of a method without data by leaving out what only the former
has, and the other way round it cannot be: there is no data in it. Settings that a method does not have are not swept
for it; a setting that no method has is a mistake. Beside what stands under `parameters`, the number of calibration
samples may be swept. Where settings are searched, the method's trials are made as they are proposed; what is known
before are the ends of the ranges.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic
import yaml

from largemerge import api
from largemerge.api import Config
from largemerge.calibration.config import CalibrationDefaults
from largemerge.config_file import (
    check_source,
    explain,
    grouped,
    nearest,
    read_documents,
    to_json,
    without_helpers,
)
from largemerge.data_free.config import CURRICULUM, DataFreeConfig
from largemerge.data_free.inputs import short_names
from largemerge.data_free.methods.base import REQUIRED, Base
from largemerge.data_free.methods.base import Range as NumberKind
from largemerge.data_free.methods.table import METHODS as DATA_FREE_METHODS
from largemerge.errors import ConfigError
from largemerge.regression.config import CandidateParameters, MergeConfig, MethodParameters
from largemerge.regression.methods import METHODS as REGRESSION_METHODS
from largemerge.trials.settings import Range, text_of

_SAMPLES = "calibration.num_samples"
_ANY_METHOD = frozenset(("include", "excluded", "exclude"))
_KNOWN_METHODS = (*REGRESSION_METHODS, *DATA_FREE_METHODS)
_MOST_RANGES = 6  # of which all combinations of ends are looked at
MOST_TRIALS = 10_000
"""Trials of a comparison, at most."""


@dataclass(frozen=True)
class Trial:
    """A merge that is tried.

    Attributes:
        name: Its name: the method, and what was set.
        method: The method.
        settings: What was set, by name.
        raw: The configuration, as a YAML file would hold it, paths absolute.
        config: The same, read and checked.
        heads: Name of a model in the configuration that is compared → what a head of its own is called beside this
            trial's merge, where that is another.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    raw: Mapping[str, Any]
    config: Config
    heads: Mapping[str, str] = field(default_factory=dict)

    def other(self, settings: Mapping[str, Any]) -> Trial:
        """Makes the trial with other values of some of its settings.

        Raises:
            ConfigError: If its configuration has mistakes.
        """
        return replace(make_trial(self.raw, self.method, {**self.settings, **settings}), heads=self.heads)

    @property
    def draws_its_own(self) -> bool:
        """Whether its calibration samples are not those of the configuration that is compared."""
        return _SAMPLES in self.settings

    @property
    def yaml(self) -> str:
        """The configuration as a YAML file."""
        return yaml.safe_dump(dict(self.raw), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Search:
    """Trials of one method, some of whose settings are proposed from what the trials before have come to.

    Attributes:
        name: The method, and what is swept: the same for all of its trials.
        ranges: Where to look, by setting; of whole numbers where the setting is one.
        num_trials: Number of trials.
        ends: Trials at the ends of the ranges, right as all between them; the first two are the lowest and the highest.
    """

    name: str
    ranges: Mapping[str, Range]
    num_trials: int
    ends: tuple[Trial, ...]

    def trial(self, proposed: Mapping[str, int | float]) -> Trial:
        """Makes a trial of what is proposed.

        Raises:
            ConfigError: If settings contradict each other there, and did not at the ends.
        """
        return self.ends[0].other(proposed)


@dataclass(frozen=True)
class Compared:
    """The configuration that is compared.

    Attributes:
        raw: As a YAML file would hold it, paths absolute.
        config: The same, read and checked.
    """

    raw: Mapping[str, Any]
    config: MergeConfig | DataFreeConfig

    @property
    def method(self) -> str:
        """Its own method."""
        return str(self.raw["merge_method"])


def read_source(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], Path | None]:
    """Reads the mapping of one merge, unchecked, and the folder in which its relative paths are looked up first.

    Raises:
        ConfigError: If there is no such file, or it holds no mapping, or several.
    """
    check_source(source)
    if isinstance(source, Mapping):
        return source, None
    path = Path(source)
    documents = read_documents(path)
    if len(documents) > 1:
        raise ConfigError(f"{source}: has {len(documents)} merges, separated by '---'; expected one to compare")
    return documents[0], path.resolve().parent


def check_compared(mapping: Mapping[str, Any], folder: Path | None) -> Compared:
    """Checks the configuration that is compared; arguments are what `read_source` returns.

    Raises:
        ConfigError: If it has mistakes.
    """
    checked = api.read_mapping(mapping, folder)
    raw = copy.deepcopy(without_helpers(mapping, type(checked).model_fields))
    resolved = checked.model_dump(mode="json", exclude_unset=True)
    for key in ("base_model", "models", "memory", "sequence", "slices", "modules", "tokenizer_source", "tokenizer"):
        if key in raw and key in resolved:  # paths are absolute there, and models that settings name have their names
            raw[key] = resolved[key]
    return Compared(raw, checked)


def choose_methods(own: str | None, methods: Sequence[str], problems: list[str]) -> tuple[str, ...]:
    """Returns the methods that are tried, as far as they are known; notes those that are not, or cannot be.

    Args:
        own: The configuration's own method; `None` where it is not known.
        methods: Names of methods; empty for the configuration's own.
        problems: Gets what is wrong.
    """
    problems += [
        f"--methods {name}: a chain of merges, which no comparison makes; merge it, and `evaluate` the result"
        if name == CURRICULUM
        else f"--methods {name}: no method{nearest(name, _KNOWN_METHODS)}; expected one of {', '.join(_KNOWN_METHODS)}"
        for name in dict.fromkeys(methods)
        if name not in _KNOWN_METHODS
    ]
    if own in DATA_FREE_METHODS:
        problems += [
            f"--methods {name}: needs calibration data, which a configuration of {own} has not; expected one of a "
            "regression method, with 'calibration' for every model"
            for name in dict.fromkeys(methods)
            if name in REGRESSION_METHODS
        ]
    chosen = tuple(name for name in dict.fromkeys(methods) if name in _KNOWN_METHODS)
    return chosen if methods or own not in _KNOWN_METHODS else (own,)


def known_settings(
    settings: Mapping[str, Any], methods: Sequence[str], named: Sequence[str], option: str, problems: list[str]
) -> list[str]:
    """Lists the settings that some method has; notes those that none has.

    Args:
        settings: What is swept or searched, by setting.
        methods: The methods that are tried, from `choose_methods`.
        named: Their names as the user gave them; with one that is no method, a setting may be any method's.
        option: What the settings were given by, for messages.
        problems: Gets what is wrong.
    """
    all_known = bool(methods) and set(named) <= set(_KNOWN_METHODS)
    asked = methods if all_known else _KNOWN_METHODS
    known = sorted(set().union(*map(_parameters, asked)))
    who = f"{', '.join(asked)} {'has' if len(asked) == 1 else 'have'}" if all_known else "methods have"
    problems += [
        f"{option} {key}: {who} no such setting{nearest(str(key), known)}" for key in settings if key not in known
    ]
    return [key for key in settings if key in known]


def right_values(
    key: str, values: Sequence[Any], methods: Sequence[str], problems: list[str], given: str = ""
) -> list[Any]:
    """Returns the values that a setting may have with each method that has it; notes the others.

    Args:
        key: The setting.
        values: What is swept, or the ends of a range.
        methods: The methods that are tried; empty where none is known: then a value is wrong that is so with any.
        problems: Gets what is wrong.
        given: What the user has written, for messages; default: the sweep of the value.
    """
    those = [method for method in methods or _KNOWN_METHODS if key in _parameters(method)]
    right = []
    for value in values:
        found: dict[str, list[str]] = {}
        for method in those:
            for problem in value_problems(method, key, value):
                found.setdefault(problem, []).append(method)
        if methods:
            told = [f"{problem}, with {', '.join(who)}" for problem, who in found.items()]
        else:
            told = list(found)[:1] if sum(map(len, found.values())) >= len(those) else []
        what = given or f"--sweep {key}={text_of(value)}"
        problems += [f"{what}: {problem}" for problem in told if f"{what}: {problem}" not in problems]
        right += [] if told else [value]
    return right


def is_right_range(key: str, limits: Range, methods: Sequence[str], problems: list[str]) -> bool:
    """Whether each method that has a setting can have all numbers of a range; notes why not. Arguments as above."""
    those = [method for method in methods or _KNOWN_METHODS if key in _parameters(method)]
    texts = [method for method in those if _number_kind(method, key) is None]
    if texts and (methods or texts == those):
        who = f", with {', '.join(texts)}" if methods else ""
        problems.append(f"--search {key}: is no number{who}; expected --sweep {key}=…")
        return False
    given = f"--search {key}={text_of(limits.low)}:{text_of(limits.high)}{':log' if limits.log else ''}"
    return len(right_values(key, [limits.low, limits.high], methods, problems, given)) > 1


def _number_kind(method: str, key: str) -> type[int] | type[float] | None:
    """Whether a setting of a method is a whole number, a number, or none."""
    if method in DATA_FREE_METHODS:
        kind = DATA_FREE_METHODS[method].kinds.get(key)
        return None if not isinstance(kind, NumberKind) else int if kind.whole else float
    if key == _SAMPLES:
        return int
    return float if MethodParameters.model_fields[key].annotation == (float | None) else None


def value_problems(method: str, key: str, value: Any) -> list[str]:
    """Lists what is wrong with a value of a setting, whatever else the configuration says."""
    if method in DATA_FREE_METHODS:
        kind = DATA_FREE_METHODS[method].kinds.get(key)
        if kind is None or isinstance(value, list | tuple | Mapping):  # gradients and filters: whole merges are read
            return []
        problem = kind.problem(value)
        return [problem] if problem is not None else []
    model: type[pydantic.BaseModel] = CalibrationDefaults if key == _SAMPLES else MethodParameters
    name = key.rpartition(".")[2]
    try:
        model.model_validate_json(to_json({name: value}))
    except pydantic.ValidationError as error:
        return [problem.removeprefix(f"{name}: ") for problem in explain(error, model)]
    except ConfigError as error:
        return list(error.problems)
    return []


def make_trials(
    compared: Compared,
    methods: Sequence[str],
    sweeps: Mapping[str, Sequence[Any]],
    ranges: Mapping[str, Range],
    num_trials: int,
    problems: list[str],
) -> tuple[Trial | Search, ...]:
    """Makes the trials of a comparison, and a search for each method, and each combination of values, that has one.

    Args:
        compared: The configuration.
        methods: Names of methods, from `choose_methods`.
        sweeps: Values by setting, right by themselves.
        ranges: Ranges by setting, likewise.
        num_trials: Number of trials of each search.
        problems: Gets what is wrong with configurations as a whole.
    """
    made: list[Trial | Search] = []
    found: list[str] = []
    count = 0
    before = dict(compared.raw.get("sequence") or {}).get("previous")
    problems += [
        f"--methods {method}: would leave out {before}, which sequence.previous merges with the models; expected a "
        "regression method, or a configuration that has it under 'models'"
        for method in methods
        if before is not None and method in DATA_FREE_METHODS
    ]
    for method in methods:
        if method in REGRESSION_METHODS and compared.method not in REGRESSION_METHODS:
            continue
        swept = {key: values for key, values in sweeps.items() if key in _parameters(method)}
        searched = {key: _of_kind(method, key, limits) for key, limits in ranges.items() if key in _parameters(method)}
        count += math.prod(map(len, swept.values())) * (num_trials if searched else 1)
        if count > MOST_TRIALS:
            problems.append(f"--sweep, --search: more than {MOST_TRIALS} trials; expected fewer values or trials")
            return ()
        for values in itertools.product(*swept.values()):
            settings = dict(zip(swept, values, strict=True))
            trials: list[Trial] = []
            for ends in _ends(searched):
                try:
                    trials.append(make_trial(compared.raw, method, {**settings, **ends}))
                except ConfigError as error:
                    found += [f"{trial_name(method, {**settings, **ends})}: {problem}" for problem in error.problems]
            made += [Search(trial_name(method, settings), searched, num_trials, tuple(trials))] if searched else trials
    problems += grouped(found)
    return tuple(made)


def _of_kind(method: str, key: str, limits: Range) -> Range:
    """A range as a method's setting has it, which `is_right_range` has checked."""
    whole = limits.whole() if _number_kind(method, key) is int else None
    return whole if whole is not None else limits.real()


def _ends(ranges: Mapping[str, Range]) -> list[dict[str, Any]]:
    """The lowest and the highest numbers of all ranges, then all other combinations, unless there are very many."""
    lowest, highest = ({key: getattr(limits, end) for key, limits in ranges.items()} for end in ("low", "high"))
    if not ranges:
        return [{}]
    if len(ranges) > _MOST_RANGES:
        return [lowest, highest]
    corners = itertools.product(*((each.low, each.high) for each in ranges.values()))
    mixed = [dict(zip(ranges, corner, strict=True)) for corner in corners]
    return [lowest, highest, *(each for each in mixed if each not in (lowest, highest))]


def make_trial(raw: Mapping[str, Any], method: str, settings: Mapping[str, Any]) -> Trial:
    """Makes one trial.

    Raises:
        ConfigError: If its configuration has mistakes.
    """
    made = _of_method(raw, method)
    parameters = {**made.get("parameters", {}), **{key: settings[key] for key in settings if key != _SAMPLES}}
    if parameters:
        made["parameters"] = parameters
    if _SAMPLES in settings:
        made = _with_samples(made, settings[_SAMPLES])
    if method in REGRESSION_METHODS and "weight" in settings:
        raise ConfigError("weight: a regression method has one for each model; expected other settings to sweep")
    for model in made.get("models", ()):  # what is swept is not what a model sets for itself
        own = {key: value for key, value in model.get("parameters", {}).items() if key not in settings}
        model.pop("parameters", None)
        if own:
            model["parameters"] = own
    heads = _names_of_heads(raw["models"]) if method in DATA_FREE_METHODS and "models" in raw else {}
    return Trial(trial_name(method, settings), method, dict(settings), made, api.read_config(made), heads)


def _names_of_heads(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names that a user has given models → those that merges without data have for their heads."""
    short = short_names([model["model"] for model in models])
    return {model["name"]: short[model["model"]] for model in models if model.get("name") is not None}


def _with_samples(made: Mapping[str, Any], num_samples: Any) -> dict[str, Any]:
    """The configuration with another number of calibration samples of every model.

    Raises:
        ConfigError: If a model has Gram matrices in place of data, which no number of samples changes.
    """
    models = []
    for model in made["models"]:
        own = dict(model["calibration"])
        if "grams" in own:
            raise ConfigError(
                f"{_SAMPLES}: {model['model']} has 'grams' in place of data; expected 'data' to draw from"
            )
        own.pop("num_samples", None)
        models.append({**model, "calibration": own})
    return {**made, "models": models, "calibration": {**made.get("calibration", {}), "num_samples": num_samples}}


def most_samples(sweeps: Mapping[str, Sequence[Any]], ranges: Mapping[str, Range]) -> int | None:
    """The largest number of calibration samples that trials are made with; `None` where it is not set for them."""
    searched = [int(ranges[_SAMPLES].high)] if _SAMPLES in ranges else []
    return max([*(value for value in sweeps.get(_SAMPLES, ()) if type(value) is int), *searched], default=None)


def trial_name(method: str, settings: Mapping[str, Any]) -> str:
    """The name of a trial: `regmean ridge=0.01`."""
    return " ".join([method, *(f"{key}={text_of(value)}" for key, value in settings.items())])


def with_other_name(trial: Trial, taken: Collection[str]) -> Trial:
    """Renames a trial that is called like a model, whose scores stand beside its own."""
    name = trial.name
    while name in taken:
        name += " (trial)"
    return replace(trial, name=name)


def _parameters(method: str) -> frozenset[str]:
    """Names of the settings of a method, those under `parameters` by their names there."""
    if method in REGRESSION_METHODS:
        return REGRESSION_METHODS[method].parameters | _ANY_METHOD | {_SAMPLES}
    row = DATA_FREE_METHODS[method]
    return frozenset(row.shared) | frozenset(row.per_model)


def _of_method(raw: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The configuration with another method, without what that does not have."""
    made = copy.deepcopy(dict(raw))
    before, made["merge_method"] = str(raw["merge_method"]), method
    known = _parameters(method)
    if method != before:
        kept = {key: value for key, value in dict(made.pop("parameters", {})).items() if key in known}
        made |= {"parameters": kept} if kept else {}
    if method in REGRESSION_METHODS or before not in REGRESSION_METHODS:
        models = made.get("models", ()) if method != before else ()
        for model in models if method not in REGRESSION_METHODS else ():
            model["parameters"] = {k: v for k, v in model.get("parameters", {}).items() if k in known}
        return made
    made = {key: value for key, value in made.items() if key in DataFreeConfig.model_fields}
    if "memory" in made:
        made["memory"] = {key: made["memory"][key] for key in ("device", "host") if key in made["memory"]}
    if DATA_FREE_METHODS[method].base in (Base.NONE, Base.MEMBER):
        made.pop("base_model", None)  # it was no model to be merged before
    models = list(made.get("models", ()))
    made["models"] = [_without_data(model, method, len(models)) for model in models]
    references = {model["name"]: model["model"] for model in models if "name" in model}
    made |= {key: _by_reference(made[key], references) for key in ("tokenizer_source", "tokenizer") if key in made}
    return made


def _by_reference(settings: Any, references: Mapping[str, str]) -> Any:
    """Settings of the tokenizer with models by reference, as merges without data call them, in place of names."""
    if isinstance(settings, str):
        return references.get(settings, settings)
    if not isinstance(settings, Mapping):
        return settings
    tokens = {token: _by_reference(each, references) for token, each in dict(settings.get("tokens") or {}).items()}
    named = {key: _by_reference(settings[key], references) for key in ("source", "model") if key in settings}
    return {**settings, **named, **({"tokens": tokens} if tokens else {})}


def _without_data(model: Mapping[str, Any], method: str, count: int) -> dict[str, Any]:
    """A model of a regression merge for a method without data: its weight, if the method has one.

    Where a method does not divide by the sum of the weights, such as task arithmetic, they are shared out: 1/K each.
    """
    row = DATA_FREE_METHODS[method]
    weight = dict(model.get("parameters", {})).get("weight", CandidateParameters().weight)
    if row.shared.get("normalize") is False:
        weight = weight / count
    needs = row.per_model.get("weight") is REQUIRED
    return {"model": model["model"], **({"parameters": {"weight": weight}} if needs else {})}
