"""Configuration files: YAML read strictly, with one error for all mistakes.

    path ──► read_yaml, read_documents ──► mappings ──► a `Strict` model of either kind of merge
                                                             └─► explain: one message for each mistake

The types that both kinds of merge share are here, too: dtypes by name, sizes such as 8GiB.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from largemerge.errors import ConfigError

DtypeName = Literal["float32", "bfloat16", "float16"]
"""Dtypes by the names that configurations use; `checkpoint.tensor_info.torch_dtype` makes torch's of them."""

_BYTE_SIZE = pydantic.TypeAdapter(pydantic.ByteSize)
# Bits are no size here; and pydantic would read 4,5GB as 4 bytes.
_WHOLE_SIZE = re.compile(r"\s*\d*\.?\d+\s*([kmgtpe]i?)?b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Reads a size such as `5GB`, `500MiB`, `2G` or `1000000`, in bytes.

    Raises:
        ValueError: If the text is not a size.
    """
    try:
        size = int(_BYTE_SIZE.validate_python(text)) if _WHOLE_SIZE.fullmatch(text) else 0
    except pydantic.ValidationError:
        size = 0
    if size < 1:
        raise ValueError(f"{text!r}: expected a size such as 5GB, 500MB or 2GiB")
    return size


def gib(num_bytes: float) -> str:
    """Formats a size in bytes with a unit that suits it: `1.5 KiB`, `20.0 MiB`, `3.25 GiB`."""
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.2f} GiB"


def _check_size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int, pydantic.BeforeValidator(_check_size), Field(ge=1)]
"""A size in bytes: a number, or a text such as 8GiB."""


class Strict(BaseModel):
    """Base of all parts of a configuration: unknown keys and values of another type are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file.

    Raises:
        ConfigError: If there is no such file, or it does not hold mappings.
    """
    documents = read_documents(path)
    if len(documents) > 1:
        raise ConfigError(f"{path}: expected one document, found {len(documents)}, separated by '---'")
    return documents[0]


def read_documents(path: Path) -> list[dict[str, Any]]:
    """Reads the mappings in a YAML file, where `---` separates several; empty ones are left out.

    Raises:
        ConfigError: If there is no such file, or it does not hold mappings.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        found = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_YamlLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    documents = [raw for raw in found if raw is not None] or [None]
    for raw in documents:
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected keys such as 'merge_method' and 'models', found {type(raw).__name__}")
    return documents


class _YamlLoader(yaml.SafeLoader):
    """Loads YAML as people write it: `1e-6` is a number, and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here more than once", key.start_mark
                )
        return super().construct_mapping(node, deep=deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def to_json(raw: Any) -> str:
    """Writes a raw configuration as JSON text.

    Raises:
        ConfigError: If it holds what JSON cannot.
    """
    try:
        return json.dumps(raw, default=str)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the configuration cannot be read: {error}") from None


def explain(error: pydantic.ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """Yields a message for each mistake that pydantic found, with the nearest known key for an unknown one.

    Args:
        error: The error that validating raised.
        root: The model that was validated against.
    """
    details = error.errors()
    for detail in details:
        where = _dotted(detail["loc"])
        kind = detail["type"]
        inner = [other["loc"] for other in details if len(other["loc"]) > len(detail["loc"])]
        if kind == "too_short" and any(location[: len(detail["loc"])] == detail["loc"] for location in inner):
            continue  # pydantic does not count the items that have mistakes of their own
        if kind == "extra_forbidden":
            known = _known_keys(root, detail["loc"][:-1])
            hint = nearest(str(detail["loc"][-1]), known)
            yield f"{where}: unknown key{hint or f'; expected one of {sorted(known)}'}"
        elif kind == "missing":
            yield f"{where}: missing"
        else:
            found = "" if isinstance(detail["input"], dict | list) else f", found {detail['input']!r}"
            yield f"{where}: {_lower_first(detail['msg'].removeprefix('Value error, '))}{found}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "configuration"


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean …?` for the nearest known word, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        nested = next(_models_in(field.annotation), None) if field is not None else None
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and typing.get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
