"""Which configurations are data-free: all whose method is not one of the regression methods."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largemerge.arithmetic.config import DataFreeConfig
from largemerge.config import MergeConfig, MergeMethod
from largemerge.config_file import read_documents, read_yaml

REGRESSION_METHODS: tuple[str, ...] = typing.get_args(MergeMethod)


def has_documents(source: str | Path | Mapping[str, Any] | MergeConfig | DataFreeConfig) -> bool:
    """Whether it is a file of several merges, separated by `---`.

    Raises:
        ConfigError: If there is no such file, or it is not YAML.
    """
    return isinstance(source, str | Path) and len(read_documents(Path(source))) > 1


def is_data_free(source: str | Path | Mapping[str, Any] | MergeConfig | DataFreeConfig) -> bool:
    """Whether a configuration names another method than the regression methods.

    Raises:
        ConfigError: If there is no such file, or it is not YAML.
    """
    if isinstance(source, MergeConfig | DataFreeConfig):
        return isinstance(source, DataFreeConfig)
    raw = source if isinstance(source, Mapping) else read_yaml(Path(source))
    method = raw.get("merge_method")
    return isinstance(method, str) and method not in REGRESSION_METHODS
