"""The configuration of a data-free merge: mergekit's YAML as strict, typed models; parameters for one tensor.

    YAML file → load_data_free → DataFreeConfig     checked, paths absolute
    DataFreeConfig → Levels → value                 of a parameter, for one tensor

What mergekit knows and this does not yet is an error that names the key. Where the file has one value, a parameter may
also have

    0.5                                  the same value everywhere
    [0.0, 0.5, 1.0]                      a gradient over the layers, from the first to the last, linear in between
    [{filter: mlp, value: 0.3}, {value: 0.5}]    the first value whose filter is part of the tensor's name
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

_AUXILIARY_PARAMETERS = ("fisher",)  # parameters that are paths: see `Method.auxiliary_parameter`

Setting = Any
"""A number, truth value or text; a list of them (a gradient); or a list of `{filter, value}`."""
Parameters = dict[str, Setting]
"""Settings by name."""


class ModelEntry(Strict):
    """A model that is merged, with its parameters."""

    model: Reference
    parameters: Parameters = Field(default_factory=dict)


class SliceSource(ModelEntry):
    """Consecutive layers of a model, with its parameters."""

    layer_range: tuple[int, int]

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


class MemoryLimits(Strict):
    """How much memory a merge may use, in bytes."""

    device: Size | None = None
    """The most memory on the GPU, for methods that use one; default: what is free."""
    host: Size | None = None
    """The most anonymous memory of the process, libraries included; default: what is free."""


class DataFreeConfig(Strict):
    """A whole data-free merge, as the YAML file has it."""

    name: str | None = None
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
    seed: int = Field(0, ge=0)
    """Seed of methods that draw random numbers."""
    memory: MemoryLimits = MemoryLimits()
    """Limits of memory; mergekit does not have this key."""
    variant: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]+$")
    """Variant of the models' weights, such as `fp16` for `model.fp16.safetensors`."""
    trust_remote_code: bool = False
    """Allow a checkpoint to run Python code that it ships; the code is copied in any case."""

    def auxiliary_paths(self, parameter: str) -> tuple[str, ...]:
        """Lists all paths that a parameter is set to, anywhere in the file."""
        values = (parameters.get(parameter) for _, parameters in _all_parameters(self))
        return tuple(dict.fromkeys(value for value in values if isinstance(value, str)))

    @property
    def vocabulary(self) -> TokenizerSettings | None:
        """Settings of the output's vocabulary; `None` where embeddings are not arranged by token."""
        if self.tokenizer_source is not None:
            return TokenizerSettings(source=self.tokenizer_source)
        return self.tokenizer

    @property
    def references(self) -> tuple[str, ...]:
        """References of all models, in the order of the file, the base last if it is named nowhere else."""
        sources: list[str] = [entry.model for entry in self.models]
        for module in (Module(slices=self.slices), *self.modules.values()):
            sources += [entry.model for entry in module.models]
            sources += [source.model for slice_ in module.slices for source in slice_.sources]
            sources += [slice_.base_model for slice_ in module.slices if slice_.base_model is not None]
        return tuple(dict.fromkeys([*sources, *([self.base_model] if self.base_model is not None else [])]))


@dataclass(frozen=True)
class Documents:
    """A file of several merges, separated by `---`, read but not checked.

    Attributes:
        path: Path of the file.
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
        folder: Folder where a mapping's relative paths are looked up first.
        names: Names of other merges of the file, whose results are used like models.
        other_methods: Names of methods that are not data-free, for messages.

    Raises:
        ConfigError: If anything is wrong; it lists every mistake found.
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
    """Leaves out keys without a value, such as `parameters:` with nothing behind it."""
    if isinstance(raw, Mapping):
        return {key: _without_nulls(value) for key, value in raw.items() if value is not None}
    return [_without_nulls(entry) for entry in raw] if isinstance(raw, list | tuple) else raw


def _check_method(name: object, other_methods: Sequence[str]) -> None:
    """Checks the method before all else, since it decides which keys are right."""
    from largemerge.data_free.methods.table import METHODS

    known = sorted([*METHODS, *other_methods])
    if name not in METHODS:
        hint = nearest(str(name), known) or f"; expected one of {known}"
        raise ConfigError(f"merge_method: {name!r} is not known{hint}")


def _problems(config: DataFreeConfig) -> Iterator[str]:
    """Yields what the types alone do not forbid: keys that exclude each other, unknown and missing parameters."""
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
    own_bases = bool(config.slices) and all(output_slice.base_model for output_slice in config.slices)
    if method.base is Base.REQUIRED and config.base_model is None and not own_bases:
        yield f"base_model: {config.merge_method} needs one"
    known = {*method.shared, *method.per_model}
    required = {name for name, default in method.shared.items() if default is REQUIRED}
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
    """Yields all parameters, with their places in the file."""

    def of_slices(slices: Iterable[OutputSlice], prefix: str) -> Iterator[tuple[str, Parameters]]:
        for number, output_slice in enumerate(slices):
            yield f"{prefix}slices[{number}].parameters", output_slice.parameters
            for index, source in enumerate(output_slice.sources):
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
    """Makes paths of models and auxiliary files absolute where they exist in one of the folders; `names` stay."""
    if isinstance(value, dict):
        return {name: _absolute(inner, folders, names, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_absolute(inner, folders, names, key) for inner in value)
    if isinstance(value, str) and key in _AUXILIARY_PARAMETERS:
        paths = (folder / os.path.expanduser(value) for folder in folders)
        return next((str(path.resolve()) for path in paths if path.exists()), value)
    if isinstance(value, str) and key in ("model", "base_model", "tokenizer_source", "source"):
        return absolute_reference(value, folders, names)
    return value


def setting_problems(setting: Setting) -> Iterator[str]:
    """Says what is wrong with a setting, without regard to its parameter."""
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
    if not all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in setting):
        return setting[first]
    second = min(len(setting) - 1, first + 1)
    share = place - first
    return (1 - share) * setting[first] + share * setting[second]


@dataclass(frozen=True)
class Levels:
    """The parameters that hold for a slice of the output, from the narrowest level to the widest.

    Attributes:
        sources: Parameters of every source, by its model.
        shared: Parameters of the slice, of its module and of the whole merge, in this order.
    """

    sources: Mapping[str, Mapping[str, Setting]]
    shared: Sequence[Mapping[str, Setting]] = field(default=())

    def value(self, name: str, tensor: str, t: float, model: str | None = None) -> Any:
        """Computes a parameter's value for a tensor; `None` where no level has it.

        Args:
            name: Name of the parameter.
            tensor: Name of the tensor.
            t: Position of its layer in the slice, see `evaluate`.
            model: The model whose parameter it is; `None` for one that all models share.
        """
        own = [self.sources[model]] if model is not None and model in self.sources else []
        for level in (*own, *self.shared):
            if name in level:
                value = evaluate(level[name], tensor, t)
                if value is not None:
                    return value
        return None
