"""Trials of a comparison: one configuration for every method and every combination of settings.

    config, methods, sweeps ──► Trial: name, settings, configuration

A configuration of a regression method is turned into one of a method without data by leaving out what only the former
has, and the other way round it cannot be: there is no data in it. Settings that a method does not have are not swept
for it; a setting that no method has is a mistake. Beside what stands under `parameters`, the number of calibration
samples may be swept.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from largemerge import api
from largemerge.api import Config
from largemerge.config_file import nearest, read_documents, shown, without_helpers
from largemerge.data_free.config import DataFreeConfig
from largemerge.data_free.methods.base import REQUIRED, Base
from largemerge.data_free.methods.table import METHODS as DATA_FREE_METHODS
from largemerge.errors import ConfigError
from largemerge.regression.config import CandidateParameters, MergeConfig
from largemerge.regression.methods import METHODS as REGRESSION_METHODS

_SAMPLES = "calibration.num_samples"
_ANY_METHOD = frozenset(("include", "excluded", "exclude"))
_KNOWN_METHODS = (*REGRESSION_METHODS, *DATA_FREE_METHODS)
_MOST_TRIALS = 10_000


@dataclass(frozen=True)
class Trial:
    """A merge that is tried.

    Attributes:
        name: Its name: the method, and what was set.
        method: The method.
        settings: What was set, by name.
        raw: The configuration, as a YAML file would hold it, paths absolute.
        config: The same, read and checked.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    raw: Mapping[str, Any]
    config: Config

    @property
    def draws_its_own(self) -> bool:
        """Whether its calibration samples are not those of the configuration that is compared."""
        return _SAMPLES in self.settings

    @property
    def yaml(self) -> str:
        """The configuration as a YAML file."""
        return yaml.safe_dump(dict(self.raw), sort_keys=False, allow_unicode=True)


def read_raw(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Reads a configuration as it stands, with absolute paths.

    Raises:
        ConfigError: If it has mistakes, or several merges.
    """
    checked = api.read_config(source)
    if isinstance(source, Mapping):
        raw = dict(source)
    else:
        documents = read_documents(Path(source))
        if len(documents) > 1:
            raise ConfigError(f"{source}: has {len(documents)} merges, separated by '---'; expected one to compare")
        raw = documents[0]
    assert isinstance(checked, MergeConfig | DataFreeConfig)
    known = MergeConfig.model_fields if isinstance(checked, MergeConfig) else DataFreeConfig.model_fields
    raw = copy.deepcopy(without_helpers(raw, known))
    resolved = checked.model_dump(mode="json", exclude_unset=True)
    for key in ("base_model", "models", "memory"):  # their paths are absolute now
        if key in raw:
            raw[key] = resolved[key]
    for key in ("models", "slices", "modules"):
        if key in raw and key in resolved:
            raw[key] = resolved[key]
    return raw


def parse_values(text: str, option: str = "--sweep") -> tuple[str, list[Any]]:
    """Reads `key=value,value,…`; values are YAML, so that numbers are numbers.

    Raises:
        ConfigError: If it is something else.
    """
    key, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", key.strip()) or not values.strip():
        raise ConfigError(f"{option} {shown(text)}: expected a setting and its values, such as ridge=1e-4,1e-2")
    if not all(part.strip() for part in values.split(",")):
        raise ConfigError(f"{option} {shown(text)}: a value is empty; expected one on each side of every comma")
    try:
        found = [_value(part) for part in values.split(",")]
    except yaml.YAMLError:
        raise ConfigError(f"{option} {shown(text)}: expected values such as 0.1 or true, with commas between") from None
    return key.strip(), found


def _value(text: str) -> Any:
    """A value as YAML, and `1e-4` as a number, which PyYAML takes for a text."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def make_trials(
    raw: Mapping[str, Any], methods: Sequence[str], sweeps: Mapping[str, Sequence[Any]]
) -> tuple[Trial, ...]:
    """Makes the trials of a comparison.

    Args:
        raw: The configuration, from `read_raw`.
        methods: Names of methods; empty for the configuration's own.
        sweeps: Values by setting.

    Raises:
        ConfigError: If a method is none, a setting is nobody's, or a configuration has mistakes; with all of them.
    """
    own = str(raw["merge_method"])
    chosen = list(dict.fromkeys(methods)) or [own]
    problems = [
        f"--methods {name}: no method{nearest(name, _KNOWN_METHODS)}; expected one of {', '.join(_KNOWN_METHODS)}"
        for name in chosen
        if name not in _KNOWN_METHODS
    ]
    chosen = [name for name in chosen if name in _KNOWN_METHODS]
    if own not in REGRESSION_METHODS:
        problems += [
            f"--methods {name}: needs calibration data, which a configuration of {own} has not; expected one of a "
            "regression method, with 'calibration' for every model"
            for name in chosen
            if name in REGRESSION_METHODS
        ]
    for key, values in sweeps.items():
        if chosen and not any(key in _parameters(name) for name in chosen):
            known = sorted(set().union(*map(_parameters, chosen)))
            problems.append(f"--sweep {key}: {', '.join(chosen)} have no such setting{nearest(key, known)}")
        if len(set(map(_shown, values))) < len(values):
            problems.append(f"--sweep {key}: a value stands twice")
    if problems:
        raise ConfigError(*problems)
    trials: list[Trial] = []
    for method in chosen:
        swept = {key: values for key, values in sweeps.items() if key in _parameters(method)}
        if len(trials) + math.prod(map(len, swept.values())) > _MOST_TRIALS:
            raise ConfigError(f"--sweep: more than {_MOST_TRIALS} trials; expected fewer values")
        for values in itertools.product(*swept.values()):
            settings = dict(zip(swept, values, strict=True))
            try:
                trials.append(make_trial(raw, method, settings))
            except ConfigError as error:
                problems += [f"{trial_name(method, settings)}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(*problems)
    return tuple(trials)


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
    return Trial(trial_name(method, settings), method, dict(settings), made, api.read_config(made))


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


def most_samples(trials: Sequence[Trial]) -> int | None:
    """The largest number of calibration samples that trials are made with; `None` where it is not swept."""
    return max((trial.settings[_SAMPLES] for trial in trials if trial.draws_its_own), default=None)


def trial_name(method: str, settings: Mapping[str, Any]) -> str:
    """The name of a trial: `regmean ridge=0.01`."""
    return " ".join([method, *(f"{key}={_shown(value)}" for key, value in settings.items())])


def with_other_names(trials: Sequence[Trial], taken: Collection[str]) -> tuple[Trial, ...]:
    """Renames trials that are called like a model, whose scores stand beside theirs."""
    renamed = []
    for trial in trials:
        name = trial.name
        while name in taken:
            name += " (trial)"
        renamed.append(replace(trial, name=name))
    return tuple(renamed)


def _shown(value: Any) -> str:
    """A value in the name of a trial; other values have other names."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value or value != value else repr(value)


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
    return made


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


def swept(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Reads the sweeps of the command line.

    Raises:
        ConfigError: If one is none, or a setting stands twice.
    """
    found: dict[str, list[Any]] = {}
    problems: list[str] = []
    for text in texts:
        try:
            key, values = parse_values(text)
        except ConfigError as error:
            problems += error.problems
            continue
        if key in found:
            problems.append(f"--sweep {key}: stands twice; expected all its values in one")
        found[key] = values
    if problems:
        raise ConfigError(*problems)
    return found
