"""The configuration of `largemerge merge-adapters`: which adapters, how much of each, and how.

    merge_method: svd
    models: [{model: ./math-lora, parameters: {weight: 0.5}}, {model: ./code-lora}]
    parameters: {rank: 16}

The shape is that of a merge of models, and every `model` is an adapter alone. `base_model` is read for DoRA only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from largemerge.adapter_tools.factor_methods import METHODS
from largemerge.checkpoint.locate import Reference, absolute_reference
from largemerge.config_file import (
    DtypeName,
    Strict,
    Truth,
    check_source,
    explain,
    read_yaml,
    shown,
    to_json,
    without_helpers,
)
from largemerge.errors import ConfigError

MethodName = Literal["cat", "svd", "linear", "ties", "knots"]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class AdapterParameters(Strict):
    """What is set for one adapter."""

    weight: _Finite = 1.0
    """Factor of its ΔW."""


class AdapterEntry(Strict):
    """One adapter."""

    model: Reference
    """Its folder, or its Hub id."""
    parameters: AdapterParameters = AdapterParameters()
    """What is set for it."""


class SharedParameters(Strict):
    """What is set for the method."""

    rank: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    """Rank of the result; by default the largest of the adapters' for `svd`, that of the whole merge for `knots`."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of elements that are kept: of each factor by `ties`, 0.5 by default; of each adapter's coordinates by
    `knots`, all by default."""
    normalize: Truth | None = None
    """Whether `knots` divides by the sum of the weights of the adapters that agree; on by default."""
    lambda_: Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)] | None = Field(None, alias="lambda")
    """Factor of the whole merge by `knots`; by default 1."""

    def given(self) -> dict[str, Any]:
        """The parameters that are set, by the names of the file."""
        return {name: value for name, value in self.model_dump(by_alias=True).items() if value is not None}


class AdapterMergeConfig(Strict):
    """Adapters of one base that become one."""

    merge_method: MethodName
    """How."""
    models: Annotated[tuple[AdapterEntry, ...], Field(min_length=1)]
    """The adapters."""
    parameters: SharedParameters = SharedParameters()
    """What is set for the method."""
    base_model: Reference | None = None
    """The model that all adapters are of, whose weights are read if one of them is a DoRA; by default the one that they
    name."""
    dtype: DtypeName | None = None
    """Dtype of the factors; by default the widest of the adapters'."""
    _folders: tuple[Path, ...] = pydantic.PrivateAttr((Path(),))

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders that relative paths may start from."""
        return self._folders


def load_adapter_merge(source: str | Path | Mapping[str, Any]) -> AdapterMergeConfig:
    """Reads and checks a configuration.

    Args:
        source: The path of a YAML file, or a mapping like it; relative paths are looked up beside the file first, then
            in the working directory.

    Raises:
        ConfigError: If there are mistakes; it names all of them.
    """
    check_source(source)
    raw = source if isinstance(source, Mapping) else read_yaml(Path(source))
    raw = without_helpers(raw, AdapterMergeConfig.model_fields)
    method = raw.get("merge_method")
    if isinstance(method, str) and method not in METHODS:
        raise ConfigError(
            f"merge_method: expected one of {', '.join(METHODS)}, found {method!r}; other methods merge models: "
            "largemerge merge, with model+adapter"
        )
    try:
        config = AdapterMergeConfig.model_validate_json(to_json(raw))
    except pydantic.ValidationError as error:
        raise ConfigError(*explain(error, AdapterMergeConfig)) from None
    problems = list(_misfits(config))
    if problems:
        raise ConfigError(*problems)
    folders = [Path.cwd()] if isinstance(source, Mapping) else [Path(source).resolve().parent, Path.cwd()]
    entries = [each.model_copy(update={"model": _absolute(each.model, folders)}) for each in config.models]
    names = [each.model for each in entries]
    problems = [
        f"models: {name} is listed {names.count(name)} times; expected it once, with the sum of its weights"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    problems += [
        f"models: {shown(name)} has a model before the adapter; expected {shown(name.rpartition('+')[2])} alone"
        for name in names
        if "+" in name and not os.path.isdir(name)
    ]
    if problems:
        raise ConfigError(*problems)
    base = config.base_model and absolute_reference(config.base_model, folders)
    config = config.model_copy(update={"models": tuple(entries), "base_model": base})
    config._folders = tuple(folders)
    return config


def _misfits(config: AdapterMergeConfig) -> Iterator[str]:
    """Yields parameters that the method does not take, and what makes all of the result 0."""
    for name in config.parameters.given():
        if name not in METHODS[config.merge_method].parameters:
            takers = [method for method, each in METHODS.items() if name in each.parameters]
            yield f"parameters.{name}: {config.merge_method} has none; expected with {', '.join(takers)}"
    if config.parameters.lambda_ == 0:
        yield "parameters.lambda: 0: nothing of any adapter would be in the output; expected another number"
    if not any(each.parameters.weight for each in config.models):
        yield "models: weight: 0 for every adapter: nothing of any would be in the output; expected another number"


def _absolute(reference: str, folders: list[Path]) -> str:
    for folder in folders:
        found = folder / os.path.expanduser(reference)
        if os.path.isdir(found):
            return str(found.resolve())
    return reference
