"""What names a model in mergekit's YAML: a folder or a Hub id, maybe a revision, maybe an adapter on top.

    ./model      owner/name      owner/name@revision      ./model+./adapter
    {model: {path: owner/name, revision: main}, lora: {path: ./adapter}}

Everywhere else it is one text, `model@revision+adapter@revision`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field


def _reference(value: object) -> object:
    """The mapping as one text."""
    if not isinstance(value, Mapping):
        return value
    if "model" not in value:
        return _path(value)
    if value.get("override_architecture") is not None:
        raise ValueError("'override_architecture' is not supported: names and shapes come from the files")
    unknown = set(value) - {"model", "lora", "override_architecture"}
    if unknown:
        raise ValueError(f"expected 'model' and maybe 'lora', found {sorted(value)}")
    adapter = value.get("lora")
    return _path(value["model"]) + (f"+{_path(adapter)}" if adapter is not None else "")


def _path(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, Mapping) or set(value) - {"path", "revision"} or not isinstance(value.get("path"), str):
        raise ValueError(f"expected a path, or path and revision, found {value!r}")
    return str(value["path"]) + (f"@{value['revision']}" if value.get("revision") else "")


Reference = Annotated[str, pydantic.BeforeValidator(_reference), Field(min_length=1)]
"""A folder, or a Hub id, with `@revision` if wanted, and `+adapter` if wanted."""


def split_reference(reference: str) -> tuple[str, str | None]:
    """The model and its adapter; a plus sign may also be part of a folder's name."""
    if "+" not in reference or Path(os.path.expanduser(reference)).exists():
        return reference, None
    splits = list(_splits(reference))
    model, adapter = next((each for each in splits if Path(os.path.expanduser(each[0])).is_dir()), splits[0])
    return model, adapter


def absolute_reference(reference: str, folders: Sequence[Path], names: Collection[str] = ()) -> str:
    """With the paths of what lies in one of the folders made absolute; the rest, and `names`, are left as they are."""
    if reference in names:
        return reference
    named = next(((model, adapter) for model, adapter in _splits(reference) if model in names), None)
    if named is not None:
        return f"{named[0]}+{_absolute_path(named[1], folders) or named[1]}"
    whole = _absolute_path(reference, folders)
    if whole is not None or "+" not in reference:
        return whole or reference
    splits = [(_absolute_path(model, folders), adapter) for model, adapter in _splits(reference)]
    found = next(((model, adapter) for model, adapter in splits if model is not None), None)
    model, adapter = found or next(_splits(reference))
    return f"{model}+{_absolute_path(adapter, folders) or adapter}"


def short_name(reference: str) -> str:
    """For tables: the last part of every path."""
    return "+".join(Path(part).name for part in split_reference(reference) if part is not None)


def _splits(reference: str) -> Iterator[tuple[str, str]]:
    for place, letter in enumerate(reference):
        if letter == "+":
            yield reference[:place], reference[place + 1 :]


def _absolute_path(path: str, folders: Sequence[Path]) -> str | None:
    for folder in folders:
        found = folder / os.path.expanduser(path)
        if path and found.is_dir():
            return str(found.resolve())
    return None
