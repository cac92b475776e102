"""Configuration files: YAML read strictly, with one error for all mistakes.

    path ──► read_yaml, read_documents ──► mappings ──► a `Strict` model of either kind of merge
                                                             └─► explain: one message for each mistake

The types that both kinds of merge share are here, too: dtypes by name, sizes such as 8GiB, numbers in quotes.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from largemerge.errors import ConfigError
from largemerge.units import gib as gib

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _full_dtype_name(value: object) -> object:
    """Returns the name of a dtype without `torch.`, and not abbreviated."""
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return _DTYPE_ALIASES.get(name, name) if isinstance(name, str) else name


DtypeName = Annotated[Literal["float32", "bfloat16", "float16"], pydantic.BeforeValidator(_full_dtype_name)]
"""Dtypes by the names that configurations use; `checkpoint.tensor_info.torch_dtype` makes torch's of them."""


def unquoted_whole_number(value: object) -> object:
    """Returns the whole number in quotes, or written as `8.0`; anything else as it is."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+\s*", value):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def unquoted_truth(value: object) -> object:
    """Returns the truth value in quotes; anything else as it is."""
    words: dict[str, object] = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else value


WholeNumber = Annotated[int, pydantic.BeforeValidator(unquoted_whole_number)]
"""A whole number, which may be quoted."""
Truth = Annotated[bool, pydantic.BeforeValidator(unquoted_truth)]
"""True or false, which may be quoted."""

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


def _check_size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int, pydantic.BeforeValidator(_check_size), Field(ge=1)]
"""A size in bytes: a number, or a text such as 8GiB."""


WARNING = "warning: "
"""Begins those notes of a plan that `--strict` makes errors."""


def strict_problems(notes: Iterable[str]) -> list[str]:
    """Returns the warnings among a plan's notes as problems, for `--strict`."""
    return [f"{note.removeprefix(WARNING)} (a warning without --strict)" for note in notes if note.startswith(WARNING)]


class Strict(BaseModel):
    """Base of all parts of a configuration: unknown keys and values of another type are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class YamlMapping(dict[str, Any]):
    """The mapping in a YAML file.

    Attributes:
        anchored: Keys that hold an anchor (`&name`) which is used (`*name`) elsewhere in the file.
    """

    anchored: frozenset[str] = frozenset()


def without_helpers(raw: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Leaves out keys that only hold what the rest of a file refers to.

    These are keys that begin with `x-`, `_` or `.`, and unknown ones with an anchor that is used elsewhere.

    Args:
        raw: The mapping in a file.
        known: The keys that a configuration has.
    """
    anchored = raw.anchored if isinstance(raw, YamlMapping) else frozenset()
    return {
        key: value
        for key, value in raw.items()
        if key in known or not (str(key).startswith(("x-", "_", ".")) or key in anchored)
    }


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
        found = list(_load_all(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    documents = [raw for raw in found if raw is not None] or [None]
    for raw in documents:
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected keys such as 'merge_method' and 'models', found {type(raw).__name__}")
    return documents


def _load_all(text: str) -> Iterator[Any]:
    """Yields what every document holds; a mapping knows which of its keys hold anchors."""
    loader = _YamlLoader(text)
    try:
        while loader.check_data():  # type: ignore[no-untyped-call]
            loader.forget_anchors()
            raw = loader.get_data()
            if isinstance(raw, dict):
                raw = YamlMapping(raw)
                raw.anchored = loader.anchored_keys()
            yield raw
    finally:
        loader.dispose()


class _YamlLoader(yaml.SafeLoader):
    """Loads YAML as people write it: `1e-6` is a number, and a key given twice is a mistake."""

    def forget_anchors(self) -> None:
        """Begins another document."""
        self._defined: list[tuple[str, int]] = []  # anchors, with their places in the text
        self._used: set[str] = set()
        self._places: list[tuple[str, int, int]] = []  # top-level keys, with where their values begin and end

    def anchored_keys(self) -> frozenset[str]:
        """Finds the top-level keys of the document whose values have an anchor that is used."""
        return frozenset(
            key
            for key, start, end in self._places
            if any(start <= place <= end and anchor in self._used for anchor, place in self._defined)
        )

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Remembers anchors, and what is used of them."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self._used.add(str(event.anchor))
        elif event.anchor is not None:
            self._defined.append((event.anchor, event.start_mark.index))
        node = super().compose_node(parent, index)
        if parent is None and isinstance(node, yaml.MappingNode):
            self._places = [(str(key.value), key.end_mark.index, value.end_mark.index) for key, value in node.value]
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Refuses keys that are given twice, before those that `<<` brings along are added."""
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        for key, _ in node.value:
            if key.value != "<<" and keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here more than once", key.start_mark
                )
        return node


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
            text, told = _expected(detail)
            yield f"{where}: {text}" + ("" if told else f", found {_found(detail['input'])}")


_EXPECTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "string_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number from {ge:g} on",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number up to {le:g}",
    "string_too_short": "a text of {min_length} characters or more",
    "too_short": "{min_length} entries or more",
    "too_long": "{max_length} entries or fewer",
}
"""What is expected where pydantic finds a mistake of some type; in braces, what its error says."""


def _expected(detail: Any) -> tuple[str, bool]:
    """Says what was expected, and whether this says already what was found."""
    context = detail.get("ctx", {})
    if detail["type"] in _EXPECTED:
        return f"expected {_EXPECTED[detail['type']].format(**context)}", False
    text = detail["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:], "found" in text or isinstance(detail["input"], dict | list)


def _found(value: Any) -> str:
    """Describes what stands in the place of something else."""
    if isinstance(value, list):
        return f"{len(value)} entries" if value else "an empty list"
    return f"the keys {sorted(map(str, value))}" if isinstance(value, dict) else repr(value)


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
