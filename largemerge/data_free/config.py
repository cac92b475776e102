"""What a parameter is for one tensor.

0.5                                  the same everywhere
[0.0, 0.5, 1.0]                      a gradient over the layers, from the first to the last, linear in between
[{filter: mlp, value: 0.3}, {value: 0.5}]    the first whose filter is part of the tensor's name

The configuration of a data-free merge: mergekit's YAML, as strict, typed models.

What mergekit knows and this does not yet is an error that names the key. Paths come out absolute.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
from pydantic import Field

from largemerge.checkpoint.locate import Reference, absolute_reference
from largemerge.config_file import DtypeName, Size, Strict, explain, nearest, read_yaml, to_json
from largemerge.errors import ConfigError
from largemerge.tokenizer.chat_templates import template_problem
from largemerge.tokenizer.config import BASE, UNION, TokenizerSettings

Setting = Any
"""A number, truth value or text; a list of them (a gradient); or a list of `{filter, value}`."""


def setting_problems(setting: Setting) -> Iterator[str]:
    """What is wrong with it."""
    if isinstance(setting, Mapping):
        if "value" not in setting or set(setting) - {"filter", "value"}:
            yield f"expected 'value' and maybe 'filter', found {sorted(setting)}"
        else:
            yield from setting_problems(setting["value"])
    elif isinstance(setting, list | tuple):
        conditions = [isinstance(entry, Mapping) for entry in setting]
        if not setting or (any(conditions) and not all(conditions)):
            yield f"expected numbers, or entries of 'filter' and 'value', found {setting!r}"
        for entry in setting:
            yield from setting_problems(entry)
    elif setting is not None and not isinstance(setting, bool | int | float | str):
        yield f"expected a number, a list of numbers, or entries of 'filter' and 'value', found {setting!r}"


def evaluate(setting: Setting, tensor: str, t: float) -> Any:
    """Its value for a tensor, `None` where no filter fits.

    Args:
        setting: As in the file.
        tensor: Its name.
        t: Where its layer stands among those of its slice: 0 for the first, 1 for the last.
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
    if not all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in setting):
        return setting[first]
    second = min(len(setting) - 1, first + 1)
    share = place - first
    return (1 - share) * setting[first] + share * setting[second]


@dataclass(frozen=True)
class Levels:
    """The parameters that hold for a slice of the output, from the narrowest level to the widest.

    Attributes:
        sources: Of every source, by its model.
        together: Of the slice, its module, the whole merge.
    """

    sources: Mapping[str, Mapping[str, Setting]]
    together: Sequence[Mapping[str, Setting]] = field(default=())

    def value(self, name: str, tensor: str, t: float, model: str | None = None) -> Any:
        """The parameter for a tensor, `None` where no level has it.

        Args:
            name: Of the parameter.
            tensor: Name of the tensor.
            t: Where its layer stands.
            model: Whose; `None` for what all models have in common.
        """
        own = [self.sources[model]] if model is not None and model in self.sources else []
        for level in (*own, *self.together):
            if name in level:
                value = evaluate(level[name], tensor, t)
                if value is not None:
                    return value
        return None


Parameters = dict[str, Setting]

_COMPANIONS = ("fisher",)  # parameters that are paths: see `Method.companion`


class ModelEntry(Strict):
    """One of the models, with its parameters."""

    model: Reference
    parameters: Parameters = Field(default_factory=dict)


class SliceSource(ModelEntry):
    """Some layers of a model."""

    layer_range: tuple[int, int]

    @property
    def layers(self) -> range:
        """Their numbers."""
        return range(*self.layer_range)


class OutputSlice(Strict):
    """Layers of the output, from the same number of layers of some models."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)


class Module(Strict):
    """A stack of layers of the output, for models that have several."""

    models: tuple[ModelEntry, ...] = ()
    slices: tuple[OutputSlice, ...] = ()
    parameters: Parameters = Field(default_factory=dict)


class MemoryLimits(Strict):
    """How much a merge may hold."""

    device: Size | None = None
    """Most memory on the GPU, for methods that use one; default: what is free."""
    host: Size | None = None
    """Most anonymous memory of the process, libraries included; default: what is free."""


class DataFreeConfig(Strict):
    """A whole merge."""

    name: str | None = None
    """Under which other documents of the same file name the result as a model."""
    merge_method: str
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[OutputSlice, ...] = ()
    modules: dict[str, Module] = Field(default_factory=dict)
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: DtypeName | None = None
    """In which it is computed; default: in which the weights are stored."""
    out_dtype: DtypeName | None = None
    """In which it is written; default: as computed."""
    tokenizer_source: Reference | None = None
    """`union`, `base`, or a model; default: a copy of the base's tokenizer where there is one, else the first model's,
    and rows of embeddings are merged by their numbers, not by their tokens."""
    tokenizer: TokenizerSettings | None = None
    """`tokenizer_source` with more settings."""
    chat_template: str | None = None
    """`auto`: the one that most models have; a built-in one's name; or a Jinja template."""
    seed: int = Field(0, ge=0)
    """Of random methods."""
    memory: MemoryLimits = MemoryLimits()
    """Not mergekit's."""

    def companions(self, parameter: str) -> tuple[str, ...]:
        """Everything that a parameter is set to anywhere, where it is a text."""
        values = (parameters.get(parameter) for _, parameters in _all_parameters(self))
        return tuple(dict.fromkeys(value for value in values if isinstance(value, str)))

    @property
    def vocabulary(self) -> TokenizerSettings | None:
        """How embeddings are arranged by token, if they are."""
        if self.tokenizer_source is not None:
            return TokenizerSettings(source=self.tokenizer_source)
        return self.tokenizer

    @property
    def references(self) -> tuple[str, ...]:
        """All models, in the order in which the file names them, the base last if it is named nowhere else."""
        sources: list[str] = [entry.model for entry in self.models]
        for module in (Module(slices=self.slices), *self.modules.values()):
            sources += [entry.model for entry in module.models]
            sources += [source.model for piece in module.slices for source in piece.sources]
            sources += [piece.base_model for piece in module.slices if piece.base_model is not None]
        return tuple(dict.fromkeys([*sources, *([self.base_model] if self.base_model is not None else [])]))


@dataclass(frozen=True)
class Documents:
    """A file of several merges, separated by `---`, read but not checked.

    Attributes:
        path: The file.
        raw: One mapping for each document, in the order of the file.
    """

    path: Path
    raw: tuple[dict[str, Any], ...]


def load_data_free(
    source: str | Path | Mapping[str, Any],
    folder: Path | None = None,
    names: Collection[str] = (),
    other_methods: Sequence[str] = (),
) -> DataFreeConfig:
    """Reads and checks a configuration.

    Args:
        source: Path of a YAML file, or a mapping of the same shape. Relative paths inside a file are looked up beside
            that file first, then in the working directory.
        folder: Where the mapping's paths are looked up first.
        names: Of other merges, whose results are named like models.
        other_methods: Names of methods that are not data-free, for messages.

    Raises:
        ConfigError: With every mistake found.
    """
    if isinstance(source, Mapping):
        raw: Any = dict(source)
    else:
        raw = read_yaml(Path(source))
        folder = Path(source).resolve().parent
    folders = [*([folder] if folder is not None else []), Path.cwd()]
    _check_method(raw.get("merge_method"), other_methods)
    try:
        config = DataFreeConfig.model_validate_json(to_json(_without_nulls(raw)))
    except pydantic.ValidationError as error:
        raise ConfigError(*explain(error, DataFreeConfig)) from None
    problems = list(_problems(config))
    if problems:
        raise ConfigError(*problems)
    return DataFreeConfig.model_validate(_absolute(config.model_dump(), folders, {UNION, BASE, *names}))


def _without_nulls(raw: Any) -> Any:
    """A key without a value, as in `parameters:` with nothing behind it, is as good as none."""
    if isinstance(raw, Mapping):
        return {key: _without_nulls(value) for key, value in raw.items() if value is not None}
    return [_without_nulls(each) for each in raw] if isinstance(raw, list | tuple) else raw


def _check_method(name: object, other_methods: Sequence[str]) -> None:
    """First of all: the keys that are right depend on it."""
    from largemerge.data_free.methods.table import METHODS

    known = sorted([*METHODS, *other_methods])
    if name not in METHODS:
        hint = nearest(str(name), known) or f"; expected one of {known}"
        raise ConfigError(f"merge_method: {name!r} is not known{hint}")


def _problems(config: DataFreeConfig) -> Iterator[str]:
    from largemerge.data_free.methods.base import REQUIRED, Base
    from largemerge.data_free.methods.table import METHODS

    method = METHODS[config.merge_method]
    given = [key for key in ("models", "slices", "modules") if getattr(config, key)]
    if len(given) != 1:
        yield f"expected one of 'models', 'slices' and 'modules', found {' and '.join(map(repr, given)) or 'none'}"
    for name, module in config.modules.items():
        if bool(module.models) == bool(module.slices):
            yield f"modules.{name}: expected one of 'models' and 'slices'"
    yield from _vocabulary_problems(config)
    if config.chat_template and (problem := template_problem(config.chat_template)) is not None:
        yield f"chat_template: {problem}"
    own_bases = bool(config.slices) and all(piece.base_model for piece in config.slices)
    if method.base is Base.REQUIRED and config.base_model is None and not own_bases:
        yield f"base_model: {config.merge_method} needs one"
    known = {*method.options, *method.each}
    required = {name for name, default in method.options.items() if default is REQUIRED}
    found: set[str] = set()
    for where, parameters in _all_parameters(config):
        found |= set(parameters)
        for name, setting in parameters.items():
            if name not in known:
                hint = nearest(name, known) or f"; {config.merge_method} has {sorted(known) or 'none'}"
                yield f"{where}.{name}: unknown parameter{hint}"
            else:
                yield from (f"{where}.{name}: {problem}" for problem in setting_problems(setting))
    for name in sorted(required - found):
        yield f"parameters.{name}: {config.merge_method} needs it"


def _all_parameters(config: DataFreeConfig) -> Iterator[tuple[str, Parameters]]:
    """All of them, with their places in the file."""

    def of_slices(slices: Iterable[OutputSlice], prefix: str) -> Iterator[tuple[str, Parameters]]:
        for number, piece in enumerate(slices):
            yield f"{prefix}slices[{number}].parameters", piece.parameters
            for index, source in enumerate(piece.sources):
                yield f"{prefix}slices[{number}].sources[{index}].parameters", source.parameters

    yield "parameters", config.parameters
    for index, entry in enumerate(config.models):
        yield f"models[{index}].parameters", entry.parameters
    yield from of_slices(config.slices, "")
    for name, module in config.modules.items():
        yield f"modules.{name}.parameters", module.parameters
        for index, entry in enumerate(module.models):
            yield f"modules.{name}.models[{index}].parameters", entry.parameters
        yield from of_slices(module.slices, f"modules.{name}.")


def _vocabulary_problems(config: DataFreeConfig) -> Iterator[str]:
    if config.tokenizer is not None and config.tokenizer_source is not None:
        yield "expected one of 'tokenizer' and 'tokenizer_source', found both"
    elif config.vocabulary is not None and config.vocabulary.source == BASE and config.base_model is None:
        key = "tokenizer_source" if config.tokenizer is None else "tokenizer.source"
        yield f"{key}: 'base' needs a 'base_model'"


def _absolute(value: Any, folders: list[Path], names: Collection[str], key: str = "") -> Any:
    """Paths of models that lie in one of the folders, made absolute; but for what other things are called."""
    if isinstance(value, dict):
        return {name: _absolute(inner, folders, names, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_absolute(inner, folders, names, key) for inner in value)
    if isinstance(value, str) and key in _COMPANIONS:
        paths = (folder / os.path.expanduser(value) for folder in folders)
        return next((str(path.resolve()) for path in paths if path.exists()), value)
    if isinstance(value, str) and key in ("model", "base_model", "tokenizer_source", "source"):
        return absolute_reference(value, folders, names)
    return value
