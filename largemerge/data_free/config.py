"""The configuration of a data-free merge: mergekit's YAML as strict, typed models; parameters for one tensor.

    YAML file → load_data_free → DataFreeConfig     checked, paths absolute, values of their parameters' kinds
    DataFreeConfig → Levels → value                 of a parameter, for one tensor

What mergekit passes over is a warning that names the key, and what nobody knows is a mistake. Where the file has one
value, a parameter may also have

    0.5                                  the same value everywhere
    [0.0, 0.5, 1.0]                      a gradient over the layers, from the first to the last, linear in between
    [{filter: mlp, value: 0.3}, {value: 0.5}]    the first value whose filter is part of the tensor's name
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
from pydantic import Field

from largemerge.checkpoint.config_check import MAX_LAYERS
from largemerge.checkpoint.locate import Reference, absolute_reference, split_reference
from largemerge.config_file import (
    LARGEST_SEED,
    WARNING,
    DtypeName,
    Size,
    Strict,
    Truth,
    WholeNumber,
    check_source,
    grouped,
    listed_places,
    nearest,
    plain_values,
    read_known,
    read_yaml,
    shown,
    strict_problems,
    unquoted_whole_number,
    without_helpers,
)
from largemerge.data_free.mergekit_words import FORMER_PARAMETERS, MergekitReader
from largemerge.errors import ConfigError
from largemerge.tokenizer.chat_templates import template_problem
from largemerge.tokenizer.config import BASE, UNION, TokenizerSettings
from largemerge.weight_matching.config import Align

if TYPE_CHECKING:
    from largemerge.data_free.methods.base import Kind, Method

_REFERENCE_KEYS = ("model", "base_model", "candidates", "tokenizer_source", "source", "reference")

CURRICULUM = "curriculum"
"""The `merge_method` that makes several merges."""

_AUXILIARY_PARAMETERS = ("fisher",)  # parameters that are paths: see `Method.auxiliary_parameter`

_MAX_LAYERS = 1 << 20  # any number above is a slip of the pen

Setting = Any
"""A number, truth value or text; a list of them (a gradient); or a list of `{filter, value}`."""
Parameters = dict[str, Setting]
"""Settings by name."""


class ModelEntry(Strict):
    """A model that is merged, with its parameters."""

    model: Reference
    parameters: Parameters = Field(default_factory=dict)


def _read_layer_range(value: object) -> object:
    """Returns two numbers of layers, which may be quoted; raises where there is anything else."""
    numbers = [unquoted_whole_number(number) for number in value] if isinstance(value, list | tuple) else []
    layers = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
    if len(layers) != 2 or len(numbers) != 2 or not all(0 <= number <= _MAX_LAYERS for number in layers):
        raise ValueError(f"expected the first layer and the one after the last, such as [0, 16], found {shown(value)}")
    return tuple(layers)


class SliceSource(ModelEntry):
    """Consecutive layers of a model, with its parameters."""

    layer_range: Annotated[tuple[int, int], pydantic.BeforeValidator(_read_layer_range)]

    @property
    def layers(self) -> range:
        """The numbers of the layers."""
        return range(*self.layer_range)


class OutputSlice(Strict):
    """Consecutive layers of the output, made of the same number of layers of every source."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)


class Module(Strict):
    """How one stack of layers of the output is made, for models that have several."""

    models: tuple[ModelEntry, ...] = ()
    slices: tuple[OutputSlice, ...] = ()
    parameters: Parameters = Field(default_factory=dict)


def _read_steps(value: object) -> object:
    """Returns a list of steps, each its name with its parameters; raises where there is anything else."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list of steps, such as [{{svc: {{alpha: 0.25}}}}], found {shown(value)}")
    steps, problems = [], []
    for entry in value:
        step = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(step, Mapping) or len(step) != 1 or not isinstance(next(iter(step)), str):
            problems.append(
                f"expected every step to be its name and its parameters, such as svc: {{alpha: 0.25}}, "
                f"found {shown(entry)}"
            )
            continue
        ((name, parameters),) = step.items()
        if not isinstance(parameters, Mapping | None):
            problems.append(f"expected parameters of {shown(name)} by name, found {shown(parameters)}")
            continue
        steps.append({name: dict(parameters or {})})
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(steps)


class MemoryLimits(Strict):
    """How much memory a merge may use, in bytes."""

    device: Size | None = None
    """The most memory on the GPU, for methods that use one; default: what is free."""
    host: Size | None = None
    """The most anonymous memory of the process, libraries included; default: what is free."""


class DataFreeConfig(Strict):
    """A whole data-free merge, as the YAML file has it."""

    name: str | None = Field(None, max_length=200)
    """The name that other documents of the same file use for the result as a model."""
    merge_method: str
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[OutputSlice, ...] = ()
    modules: dict[str, Module] = Field(default_factory=dict)
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: DtypeName | None = None
    """The dtype of the computation; default: that of the weights on disk."""
    out_dtype: DtypeName | None = None
    """The dtype of the output; default: that of the computation."""
    tokenizer_source: Reference | None = None
    """`union`, `base`, or a model. By default the output has a copy of the base's tokenizer where there is one, else of
    the first model's, and rows of embeddings are merged by their numbers, not by their tokens."""
    tokenizer: TokenizerSettings | None = None
    """The same as `tokenizer_source`, with more settings."""
    chat_template: str | None = None
    """`auto` for the template that most models have; the name of a built-in one; or a Jinja template."""
    head: str | None = None
    """Whose head the output has, where the models' are of different sizes: `base`, a model, or `none`."""
    allow_crimes: Truth = False
    """Merge models of different classes or configurations all the same; mergekit has this on its command line."""
    trust_remote_code: Truth = False
    """Allow a checkpoint to run Python code that it ships; mergekit has this on its command line."""
    seed: WholeNumber = Field(0, ge=0, le=LARGEST_SEED)
    """Seed of methods that draw random numbers."""
    memory: MemoryLimits = MemoryLimits()
    """Limits of memory; mergekit does not have this key."""
    variant: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]+$")
    """Variant of the models' weights, such as `fp16` for `model.fp16.safetensors`."""
    post: Annotated[tuple[dict[str, Parameters], ...], pydantic.BeforeValidator(_read_steps)] = ()
    """Steps after the merge, in order: each its name, with its parameters; mergekit does not have this key."""
    candidates: tuple[Reference, ...] = ()
    """The models that the steps of `post` hold the merge against; default: all models but the base."""
    align: Align | None = None
    """`weights`: before the merge, neurons and heads of all models are put into the order of one of them, the base or
    the first; or a mapping with another `reference`. mergekit does not have this key."""
    _warnings: tuple[str, ...] = pydantic.PrivateAttr(())
    _strict: bool = pydantic.PrivateAttr(False)

    @property
    def notes(self) -> list[str]:
        """What the file has that does nothing, or something else than in mergekit, as warnings for plan and report."""
        return [f"{WARNING}{text}" for text in self._warnings]

    @property
    def strict(self) -> bool:
        """Whether warnings make the merge impossible; no key of the file, but an option of who runs it."""
        return self._strict

    def read_with(self, warnings: Sequence[str], *, strict: bool) -> DataFreeConfig:
        """Returns a copy that knows the warnings of its file, and whether they are errors."""
        copy = self.model_copy()
        copy._warnings, copy._strict = tuple(warnings), strict
        return copy

    def as_strict(self, strict: bool) -> DataFreeConfig:
        """Returns the configuration, its warnings made errors if `strict`."""
        return self.read_with(self._warnings, strict=True) if strict else self

    def auxiliary_paths(self, parameter: str) -> tuple[str, ...]:
        """Lists all paths that a parameter is set to, anywhere in the file."""
        values = (holder["parameters"].get(parameter) for _, holder, _ in _holders(self.model_dump()))
        return tuple(dict.fromkeys(value for value in values if isinstance(value, str)))

    @property
    def vocabulary(self) -> TokenizerSettings | None:
        """Settings of the output's vocabulary; `None` where embeddings are not arranged by token."""
        if self.tokenizer_source is not None:
            return TokenizerSettings(source=self.tokenizer_source)
        return self.tokenizer

    @property
    def listed(self) -> tuple[str, ...]:
        """References of all models that are listed as parts of the merge, in the order of the file."""
        sources: list[str] = [entry.model for entry in self.models]
        for module in (Module(slices=self.slices), *self.modules.values()):
            sources += [entry.model for entry in module.models]
            sources += [source.model for slice_ in module.slices for source in slice_.sources]
        return tuple(dict.fromkeys(sources))

    @property
    def references(self) -> tuple[str, ...]:
        """References of all models, in the order of the file, the base last if it is named nowhere else."""
        slices = (*self.slices, *(slice_ for module in self.modules.values() for slice_ in module.slices))
        bases = [slice_.base_model for slice_ in slices if slice_.base_model is not None]
        bases += [self.base_model] if self.base_model is not None else []
        return tuple(dict.fromkeys([*self.listed, *self.candidates, *bases]))

    @property
    def aligned_to(self) -> str | None:
        """The model that the others are brought close to before the merge; `None` where they stay as they are."""
        if self.align is None:
            return None
        return self.align.reference or self.base_model or self.references[0]

    @property
    def beside(self) -> frozenset[str]:
        """The models that only the steps of `post` look at, and that are not merged.

        These are candidates that are not listed as parts of the merge; and the base, where the method has none and it
        is not listed either.
        """
        from largemerge.data_free.methods.base import Base
        from largemerge.data_free.methods.table import METHODS

        if not self.post:
            return frozenset()
        base = {self.base_model} if self.base_model is not None else set()
        is_origin_only = METHODS[self.merge_method].base is Base.NONE
        looked_at = {*self.candidates} - base | (base if is_origin_only else set())
        return frozenset(looked_at - set(self.listed))


@dataclass(frozen=True)
class Documents:
    """A file of several merges, separated by `---`, read but not checked.

    Attributes:
        path: Path of the file.
        raw: One mapping for each document, in the order of the file.
        strict: Whether warnings are errors.
    """

    path: Path
    raw: tuple[Mapping[str, Any], ...]
    strict: bool = False


def load_data_free(
    source: str | Path | Mapping[str, Any],
    folder: Path | None = None,
    names: Collection[str] = (),
    other_methods: Sequence[str] = (),
    *,
    strict: bool = False,
) -> DataFreeConfig:
    """Reads and checks a configuration.

    Args:
        source: Path of a YAML file, or a mapping of the same shape. Relative paths inside a file are looked up beside
            that file first, then in the working directory.
        folder: Folder where a mapping's relative paths are looked up first.
        names: Names of other merges of the file, whose results are used like models.
        other_methods: Names of methods that are not data-free, for messages.
        strict: Whether warnings, which the configuration's `notes` have, are to make the merge impossible.

    Raises:
        ConfigError: If anything is wrong; it lists every mistake found.
    """
    check_source(source)
    if isinstance(source, Mapping):
        raw: Mapping[str, Any] = source
    else:
        raw = read_yaml(Path(source))
        folder = Path(source).resolve().parent
    folders = [*([folder] if folder is not None else []), Path.cwd()]
    raw = plain_values(without_helpers(raw, DataFreeConfig.model_fields))
    _check_method(raw.get("merge_method"), other_methods)
    reader = _mergekit_reader(raw["merge_method"])
    raw = reader.read(raw)
    if isinstance(raw.get("post"), list | tuple):
        raw["post"] = [_with_parameters(entry) for entry in raw["post"]]
    problems, warnings = reader.problems, reader.warnings
    if raw.pop("sequence", None) is not None:
        named = f" ({', '.join(other_methods)})" if other_methods else ""
        problems.append(
            f"sequence: is for regression methods{named}; {raw['merge_method']} keeps no sums: leave it out"
        )
    if raw.get("candidates") in ([], ()):
        problems.append("candidates: an empty list; expected models, or no 'candidates' for all models but the base")
    config, unread = read_known(DataFreeConfig, _without_nulls(raw))
    problems += unread
    if config is not None:
        unversioned: list[str] = []
        values = _absolute(config.model_dump(), folders, {UNION, BASE, *names}, unversioned)
        warnings += [f"{reference}: the revision does nothing: this is a folder here" for reference in unversioned]
        read_parameters(values, problems, warnings)
        read_steps(values, problems)
        config = DataFreeConfig.model_validate(values)
        problems += _problems(config)
        warnings += _idle_bases(config)
    if problems:
        more = strict_problems(f"{WARNING}{text}" for text in warnings) if strict else ()
        raise ConfigError(*grouped(problems), *more)
    assert config is not None, "there would be problems"
    return config.read_with(warnings, strict=strict)


def _mergekit_reader(merge_method: str) -> MergekitReader:
    """Makes what reads a file as mergekit does."""
    from largemerge.data_free.methods.table import LITERATURE, METHODS

    levels: dict[str, type[Strict]] = {
        "top": DataFreeConfig,
        "module": Module,
        "slice": OutputSlice,
        "source": SliceSource,
        "entry": ModelEntry,
    }
    row = METHODS[merge_method]
    return MergekitReader(
        keys={level: frozenset(fields.model_fields) for level, fields in levels.items()},
        parameters=_parameters_of([row for name, row in METHODS.items() if name not in LITERATURE]),
        own=_parameters_of([row]) if merge_method in LITERATURE else frozenset(),
    )


def _parameters_of(rows: Sequence[Method]) -> frozenset[str]:
    """Collects the names of some methods' parameters."""
    return frozenset(name for row in rows for name in (*row.shared, *row.per_model))


def _without_nulls(raw: Any) -> Any:
    """Leaves out keys without a value, such as `parameters:` with nothing behind it."""
    if isinstance(raw, Mapping):
        return {key: _without_nulls(value) for key, value in raw.items() if value is not None}
    return [_without_nulls(entry) for entry in raw] if isinstance(raw, list | tuple) else raw


def _with_parameters(step: Any) -> Any:
    """Returns a step of `post` that has no parameters (`- svc:`) with an empty mapping of them."""
    return {name: {} if each is None else each for name, each in step.items()} if isinstance(step, Mapping) else step


def _check_method(name: object, other_methods: Sequence[str]) -> None:
    """Checks the method before all else, since it decides which keys are right."""
    from largemerge.data_free.methods.table import METHODS

    known = sorted([*METHODS, CURRICULUM, *other_methods])
    if name == CURRICULUM:
        raise ConfigError(f"merge_method: {CURRICULUM} makes several merges; expected a method of one merge here")
    if name is None:
        raise ConfigError(f"merge_method: missing; expected one of {known}")
    if not isinstance(name, str) or name not in METHODS:
        hint = nearest(name.lower(), known) if isinstance(name, str) else ""
        raise ConfigError(f"merge_method: {shown(name)} is not known{hint or f'; expected one of {known}'}")


# Parameters


def read_parameters(values: dict[str, Any], problems: list[str], warnings: list[str]) -> None:
    """Reads all parameters of a configuration as what their method takes them for, in place.

    Args:
        values: The configuration as plain values, whose parameters are replaced: by numbers where these were quoted,
            by nothing where they do nothing.
        problems: Mistakes are added here, with their places in the file.
        warnings: What does nothing is added here.
    """
    from largemerge.data_free.methods.base import Base
    from largemerge.data_free.methods.table import METHODS

    method = METHODS[values["merge_method"]]
    anywhere = _parameters_of(list(METHODS.values())) | FORMER_PARAMETERS
    idle: dict[str, list[str]] = {}  # why parameters do nothing, with their places
    for where, holder, base_model in _holders(values):
        kept = {}
        is_base = base_model is not None and method.base in (Base.REQUIRED, Base.OPTIONAL)
        for name, setting in holder["parameters"].items():
            place = f"{where}parameters.{name}"
            known = {*method.shared, *method.per_model}
            if name not in known:
                hint = nearest(name, known)
                if name not in anywhere:
                    hint = hint or f"; {values['merge_method']} has {sorted(known) or 'none'}"
                    problems.append(f"{place}: unknown parameter{hint}")
                else:
                    reason = f"does nothing: {values['merge_method']} has no {name}{hint}"
                    idle.setdefault(reason, []).append(place)
                continue
            kept[name] = read_setting(method.kinds[name], setting, place, problems)
            if base_model is not None and name not in method.per_model:
                del kept[name]
                reason = f"does nothing here: {name} is one for all models; it belongs under the 'parameters' of all"
                idle.setdefault(reason, []).append(place)
            elif is_base and base_model == holder["model"]:
                del kept[name]
                idle.setdefault("does nothing: this model is the base", []).append(place)
        holder["parameters"] = kept
    for reason, places in idle.items():
        warnings.append(f"{listed_places(places)}: {reason}")


def read_steps(values: dict[str, Any], problems: list[str]) -> None:
    """Reads the parameters of all steps of `post` as what the steps take them for, in place.

    Args:
        values: The configuration as plain values, whose steps' parameters are replaced.
        problems: Mistakes are added here, with their places in the file.
    """
    from largemerge.data_free.methods.post import POST_STEPS

    for number, entry in enumerate(values["post"]):
        for name, parameters in entry.items():
            place = f"post[{number}]"
            if name not in POST_STEPS:
                hint = nearest(name.lower(), POST_STEPS) or f"; expected one of {sorted(POST_STEPS)}"
                if name.lower() == "temperature":  # it is one of the steps in papers
                    hint = "; it is fitted to samples, after the merge: largemerge temperature EVAL MODEL OUT"
                problems.append(f"{place}: {shown(name)} is no step that is known{hint}")
                continue
            known = POST_STEPS[name].kinds
            for parameter, setting in parameters.items():
                where = f"{place}.{name}.{parameter}"
                if parameter not in known:
                    hint = nearest(parameter, known) or f"; {name} has {sorted(known)}"
                    problems.append(f"{where}: unknown parameter{hint}")
                else:
                    parameters[parameter] = read_setting(known[parameter], setting, where, problems)


def _holders(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """Yields all that has parameters, with its place, and for a single model, the base or an empty text."""

    def of_entries(entries: Any, where: str, base: str) -> Iterator[tuple[str, dict[str, Any], str | None]]:
        for number, entry in enumerate(entries):
            yield f"{where}[{number}].", entry, base

    base = values["base_model"] or ""
    yield "", values, None
    for prefix, module in (("", values), *((f"modules.{name}.", each) for name, each in values["modules"].items())):
        if prefix:
            yield prefix, module, None
        yield from of_entries(module["models"], f"{prefix}models", base)
        for number, output_slice in enumerate(module["slices"]):
            where = f"{prefix}slices[{number}]."
            yield where, output_slice, None
            yield from of_entries(output_slice["sources"], f"{where}sources", output_slice["base_model"] or base)


def read_setting(kind: Kind, setting: Setting, place: str, problems: list[str]) -> Setting:
    """Reads a setting as values of a kind; mistakes are added to `problems` with their places."""
    from largemerge.data_free.methods.base import FilePath

    if isinstance(setting, Mapping) and not isinstance(kind, FilePath):
        return _read_conditional(kind, setting, place, problems)
    if isinstance(setting, list | tuple) and not isinstance(kind, FilePath):
        if setting and any(isinstance(entry, Mapping) for entry in setting):
            return tuple(
                _read_conditional(kind, entry, f"{place}[{number}]", problems) for number, entry in enumerate(setting)
            )
        return _read_gradient(kind, setting, place, problems)
    return _read_value(kind, setting, place, problems)


def _read_conditional(kind: Kind, setting: Setting, place: str, problems: list[str]) -> Setting:
    if not isinstance(setting, Mapping):
        problems.append(f"{place}: expected an entry of 'filter' and 'value' like the others, found {shown(setting)}")
        return setting
    if "value" not in setting or set(setting) - {"filter", "value"}:
        problems.append(f"{place}: expected 'value' and maybe 'filter', found {shown(sorted(setting))}")
        return setting
    if not isinstance(setting.get("filter", ""), str):
        problems.append(f"{place}.filter: expected a part of tensors' names, found {shown(setting['filter'])}")
    value = setting["value"]
    read = _read_gradient if isinstance(value, list | tuple) else _read_value
    return {**setting, "value": read(kind, value, f"{place}.value", problems)}


def _read_gradient(kind: Kind, setting: Sequence[Any], place: str, problems: list[str]) -> Setting:
    if not setting:
        problems.append(f"{place}: expected {kind.expected}, or a list of such, found an empty list")
    return tuple(_read_value(kind, entry, f"{place}[{number}]", problems) for number, entry in enumerate(setting))


def _read_value(kind: Kind, value: Any, place: str, problems: list[str]) -> Any:
    try:
        return kind.read(value)
    except ValueError as error:
        problems.append(f"{place}: {error}")
        return value


# What only shows when several keys are seen together


@dataclass(frozen=True)
class _Scope:
    """A part of the output that is made of one list of models.

    Attributes:
        where: Place of what all its models share: empty for the whole file, else with a full stop at the end.
        entries: Place and model of every source, with its parameters.
        shared: Parameters that all of them share, at every level.
        base_model: The base.
        is_slice: Whether only the models that are named take part.
    """

    where: str
    entries: tuple[tuple[str, str, Parameters], ...]
    shared: tuple[Parameters, ...]
    base_model: str | None
    is_slice: bool


def _scopes(config: DataFreeConfig) -> Iterator[_Scope]:
    """Yields all parts of a configuration that are made of one list of models."""
    beside = config.beside
    whole = Module(models=config.models, slices=config.slices)
    modules = [("", whole), *((f"modules.{name}.", module) for name, module in config.modules.items())]
    for prefix, module in modules:
        shared = (module.parameters, config.parameters)
        if module.models:
            entries = [
                (f"{prefix}models[{number}]", entry.model, entry.parameters)
                for number, entry in enumerate(module.models)
            ]
            is_merged = config.base_model not in (*(model for _, model, _ in entries), *beside)
            if config.base_model is not None and is_merged:
                entries.append(("base_model", config.base_model, {}))
            yield _Scope(prefix, tuple(entries), shared, config.base_model, is_slice=False)
        for index, output_slice in enumerate(module.slices):
            where = f"{prefix}slices[{index}]."
            sources = tuple(
                (f"{where}sources[{number}]", source.model, source.parameters)
                for number, source in enumerate(output_slice.sources)
            )
            base = output_slice.base_model or config.base_model
            yield _Scope(where, sources, (output_slice.parameters, *shared), base, is_slice=True)


def _problems(config: DataFreeConfig) -> Iterator[str]:
    """Yields what the types alone do not forbid: keys that exclude each other, missing bases and parameters."""
    from largemerge.data_free.methods.base import Base
    from largemerge.data_free.methods.table import METHODS

    method = METHODS[config.merge_method]
    given = [key for key in ("models", "slices", "modules") if getattr(config, key)]
    if len(given) > 1 or (not given and config.base_model is None):
        yield f"expected one of 'models', 'slices' and 'modules', found {' and '.join(map(repr, given)) or 'none'}"
    for name, module in config.modules.items():
        if bool(module.models) == bool(module.slices):
            yield f"modules.{name}: expected one of 'models' and 'slices'"
    yield from _vocabulary_problems(config)
    if config.chat_template and (problem := template_problem(config.chat_template)) is not None:
        yield f"chat_template: {problem}"
    scopes = list(_scopes(config))
    if method.base is Base.REQUIRED and config.base_model is None and not all(scope.base_model for scope in scopes):
        yield f"base_model: {config.merge_method} needs one"
    for stack, depth in _depths(config).items():
        if depth > MAX_LAYERS:
            yield f"{stack}slices: {depth:,} layers in all; expected {MAX_LAYERS:,} at most"
    for scope in scopes:
        models = [model for _, model, _ in scope.entries]
        if method.base is not Base.NONE and not scope.is_slice and set(models) == {scope.base_model}:
            yield f"{scope.where}models: {scope.base_model}, the base, is alone; expected another model beside it"
        if method.base is Base.REQUIRED and scope.base_model is not None and scope.base_model not in models:
            yield (
                f"{scope.where}sources: {config.merge_method} needs the base among them, {scope.base_model}, "
                f"with as many layers as the others; found {models}"
            )
    yield from _missing_parameters(config.merge_method, method, scopes)
    yield from _post_problems(config, scopes)
    yield from _align_problems(config, method)


def _align_problems(config: DataFreeConfig, method: Method) -> Iterator[str]:
    """Yields why the models cannot be aligned before the merge."""
    if config.align is None or not config.references:
        return
    if method.auxiliary_parameter is not None and config.auxiliary_paths(method.auxiliary_parameter):
        yield (
            f"align: the tensors of {method.auxiliary_parameter} would have to be permuted with the models; align the "
            f"models first (largemerge align), compute {method.auxiliary_parameter} for those, and leave align out"
        )
    if set(config.references) == {config.aligned_to}:
        yield f"align: {config.aligned_to} is the only model, and the reference itself; expected another one beside it"


def _post_problems(config: DataFreeConfig, scopes: Sequence[_Scope]) -> Iterator[str]:
    """Yields what the steps of `post` lack: a base, and models that they could hold the merge against."""
    from largemerge.data_free.methods.post import POST_STEPS

    if not config.post:
        if config.candidates:
            yield "candidates: are for the steps of 'post', which are held against them; there are none: leave it out"
        return
    steps = [(name, parameters) for entry in config.post for name, parameters in entry.items()]
    if config.base_model is None and not all(scope.base_model for scope in scopes):
        yield (
            f"post: {', '.join(dict.fromkeys(name for name, _ in steps))}: needs a 'base_model', from which the task "
            "vectors of the merge and of the models are measured"
        )
    for scope in scopes:
        if scope.is_slice and scope.base_model is not None and scope.base_model not in [m for _, m, _ in scope.entries]:
            yield f"{scope.where}sources: post needs the base among them, {scope.base_model}"
    for twice in sorted({model for model in config.candidates if config.candidates.count(model) > 1}):
        yield f"candidates: {twice} is listed twice; expected it once"
    if config.base_model is not None and config.base_model in config.candidates:
        yield f"candidates: {config.base_model} is the base, which has no task vector; leave it out"
    if config.candidates and (config.slices or any(module.slices for module in config.modules.values())):
        yield "candidates: with 'slices', the steps of post hold a merge against its sources; leave it out"
    if config.candidates and config.vocabulary is not None:
        key = "tokenizer_source" if config.tokenizer is None else "tokenizer"
        yield f"candidates: cannot go with '{key}', whose vocabulary is that of all models; expected one of both"
    if not (config.candidates or set(config.listed) - {config.base_model}) and any(
        POST_STEPS[name].reads_candidates({**POST_STEPS[name].parameters, **parameters})
        for name, parameters in steps
        if name in POST_STEPS
    ):
        yield "post: there is no model beside the base that the merge could be held against; name some in 'candidates'"


def _depths(config: DataFreeConfig) -> dict[str, int]:
    """Counts the layers of every stack that slices make, by the place of the stack's key."""
    stacks = {"": config.slices, **{f"modules.{name}.": module.slices for name, module in config.modules.items()}}
    return {
        place: sum(max((len(source.layers) for source in each.sources), default=0) for each in slices)
        for place, slices in stacks.items()
    }


def _idle_bases(config: DataFreeConfig) -> Iterator[str]:
    """Yields the bases that a method would use, were they among the sources of a slice, or that it never uses."""
    from largemerge.data_free.methods.base import Base
    from largemerge.data_free.methods.table import METHODS

    base = METHODS[config.merge_method].base
    for scope in _scopes(config):
        if not scope.is_slice or scope.base_model is None:
            continue
        is_source = scope.base_model in [model for _, model, _ in scope.entries]
        if base is Base.NONE and scope.base_model != config.base_model:
            yield f"{scope.where}base_model: does nothing: {config.merge_method} has no base"
        elif base in (Base.OPTIONAL, Base.MEMBER) and not is_source:
            yield f"{scope.where}sources: {scope.base_model}, the base, does nothing here: it is not among them"


def _missing_parameters(name: str, method: Method, scopes: Sequence[_Scope]) -> Iterator[str]:
    """Yields the parameters that a method needs and that no level has, each once with all models that lack it."""
    from largemerge.data_free.methods.base import REQUIRED, Base

    takes_base = method.base in (Base.REQUIRED, Base.OPTIONAL)
    lacking: dict[tuple[str, bool], dict[str, str]] = {}  # model by place, by parameter and whether it is the base
    for scope in scopes:
        for parameter, default in method.shared.items():
            if default is REQUIRED and not any(parameter in level for level in scope.shared):
                yield f"{scope.where}parameters.{parameter}: {name} needs it"
        for parameter, default in method.per_model.items():
            for place, model, parameters in scope.entries if default is REQUIRED else ():
                has = any(parameter in level for level in (parameters, *scope.shared))
                if not has and not (takes_base and model == scope.base_model):
                    lacking.setdefault((parameter, place == "base_model"), {})[place] = model
    for (parameter, is_base), models in lacking.items():
        expected, places = method.kinds[parameter].expected, list(models)
        if is_base:
            which = f"{models['base_model']}, which it merges like the others: name it among them"
        else:
            which = listed_places(list(dict.fromkeys(models.values())))
            which += f", in {listed_places(places)}" if len(places) > 1 else ""
        where = f"{places[0]}.parameters." if len(places) == 1 and not is_base else ""
        yield f"{where}{parameter}: missing for {which}; expected {expected}"


def _vocabulary_problems(config: DataFreeConfig) -> Iterator[str]:
    if config.tokenizer is not None and config.tokenizer_source is not None:
        yield "expected one of 'tokenizer' and 'tokenizer_source', found both"
    elif config.vocabulary is not None and config.vocabulary.source == BASE and config.base_model is None:
        key = "tokenizer_source" if config.tokenizer is None else "tokenizer.source"
        yield f"{key}: 'base' needs a 'base_model'"
    settings = config.vocabulary
    if settings is None:
        return
    key = "tokenizer_source" if config.tokenizer is None else "tokenizer.source"
    for place, source in ((key, settings.source), *settings.models()):
        if source not in config.references and split_reference(source)[1] is not None:
            yield (
                f"{place}: {shown(source)} is a model with an adapter, and not among the models of this merge; "
                "expected one of them, 'union', 'base', or a model without an adapter"
            )


def _absolute(value: Any, folders: list[Path], names: Collection[str], unversioned: list[str], key: str = "") -> Any:
    """Makes paths of models and auxiliary files absolute where they exist in one of the folders; `names` stay."""
    if isinstance(value, dict):
        return {name: _absolute(inner, folders, names, unversioned, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_absolute(inner, folders, names, unversioned, key) for inner in value)
    if isinstance(value, str) and key in _AUXILIARY_PARAMETERS:
        paths = (folder / os.path.expanduser(value) for folder in folders)
        return next((str(path.resolve()) for path in paths if os.path.exists(path)), value)
    if isinstance(value, str) and key in _REFERENCE_KEYS:
        return absolute_reference(value, folders, names, unversioned)
    return value


def filters_of(config: DataFreeConfig) -> Iterator[tuple[str, str]]:
    """Yields the filters of all parameters, after their places in the file."""
    values = config.model_dump()
    settings = [
        (f"{where}parameters.{name}", setting)
        for where, holder, _ in _holders(values)
        for name, setting in holder["parameters"].items()
    ]
    settings += [
        (f"post[{number}].{step}.{name}", setting)
        for number, entry in enumerate(values["post"])
        for step, parameters in entry.items()
        for name, setting in parameters.items()
    ]
    for place, setting in settings:
        entries = [setting] if isinstance(setting, Mapping) else setting if isinstance(setting, tuple) else ()
        for number, entry in enumerate(entries):
            if isinstance(entry, Mapping) and entry.get("filter") not in (None, "*"):
                yield f"{place}[{number}]", entry["filter"]


def evaluate(setting: Setting, tensor: str, t: float) -> Any:
    """Computes the value of a setting for a tensor; `None` where no filter fits.

    Args:
        setting: What the file has.
        tensor: The tensor's name.
        t: Position of the tensor's layer in its slice: 0 for the first layer, 1 for the last.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return setting
    if all(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            pattern = entry.get("filter")
            if pattern in (None, "*") or pattern in tensor:
                return evaluate(entry["value"], tensor, t)
        return None
    place = t * (len(setting) - 1)
    first = int(place)
    if not all(isinstance(entry, int | float) for entry in setting):
        return setting[first]
    second = min(len(setting) - 1, first + 1)
    share = place - first
    value = (1 - share) * setting[first] + share * setting[second]
    return value != 0 if all(isinstance(entry, bool) for entry in setting) else value


@dataclass(frozen=True)
class Levels:
    """The parameters that all sources of a slice share, from the narrowest level to the widest.

    Attributes:
        shared: Parameters of the slice, of its module and of the whole merge, in this order.
    """

    shared: Sequence[Mapping[str, Setting]] = field(default=())

    def value(self, name: str, tensor: str, t: float, own: Mapping[str, Setting] = MappingProxyType({})) -> Any:
        """Computes a parameter's value for a tensor; `None` where no level has it.

        Args:
            name: Name of the parameter.
            tensor: Name of the tensor.
            t: Position of its layer in the slice, see `evaluate`.
            own: Parameters of the source whose parameter it is, which come before all others.
        """
        for level in (own, *self.shared):
            if name in level:
                value = evaluate(level[name], tensor, t)
                if value is not None:
                    return value
        return None
