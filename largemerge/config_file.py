"""Configuration files: YAML read strictly, with one error for all mistakes.

    path ──► read_yaml, read_documents ──► mappings ──► plain_values ──► a `Strict` model of either kind of merge
                                                             └─► explain: one message for each kind of mistake

Whatever a file holds, reading it takes seconds at most: the size of a file, the values in it and their nesting are
limited, aliases counted as often as they stand.

The types that both kinds of merge share are here, too: dtypes by name, sizes such as 8GiB, numbers in quotes; so are
messages' words for values (`shown`), and the users' regular expressions (`matches`).
"""

from __future__ import annotations

import difflib
import json
import numbers
import os
import re
import reprlib
import stat
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import regex
import yaml
from pydantic import BaseModel, ConfigDict, Field

from largemerge.errors import ConfigError, shorten
from largemerge.units import gib

_MAX_FILE_BYTES = 1 << 20  # takes some ten seconds at most; configurations of hundreds of layers have a tenth of it
_MAX_VALUES, _MAX_DEPTH, _MAX_DOCUMENTS = 200_000, 50, 1000
_MAX_NUMBER = 10**308  # what a float holds
_MAX_SIZE = (1 << 63) - 1
_MAX_LINES, _MAX_PLACES = 50, 3  # of one error; of one line
_SEARCH_SECONDS = 1.0  # a search takes microseconds, unless the pattern backtracks without end
_LONGEST_LINE = 1500
_LONGEST_WORD = 80  # that is compared with others
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _full_dtype_name(value: object) -> object:
    """Returns the name of a dtype without `torch.`, and not abbreviated."""
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return _DTYPE_ALIASES.get(name, name) if isinstance(name, str) else name


DtypeName = Annotated[Literal["float32", "bfloat16", "float16"], pydantic.BeforeValidator(_full_dtype_name)]
"""Dtypes by the names that configurations use; `checkpoint.tensor_info.torch_dtype` makes torch's of them."""


def unquoted_whole_number(value: object) -> object:
    """Returns the whole number in quotes, or written as `8.0`; anything else as it is."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d{1,400}\s*", value):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def unquoted_truth(value: object) -> object:
    """Returns the truth value in quotes; anything else as it is."""
    words: dict[str, object] = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else value


LARGEST_SEED = (1 << 63) - 1
"""The largest seed that all random number generators take."""
LARGEST_COUNT = (1 << 31) - 1
"""The largest number of samples, tokens and the like; any above is a slip of the pen."""
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
    except (pydantic.ValidationError, ValueError, OverflowError):
        size = 0
    if not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"{shown(text)}: expected a size such as 5GB, 500MB or 2GiB")
    return size


def size_in_bytes(size: object) -> int:
    """Returns a size in bytes: a whole number from 1 on, or a text such as `5GB`.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(size, str):
        return parse_size(size)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"{shown(size)}: expected a size such as 5GB, 500MB or 2GiB, or a number of bytes from 1 on")
    return size


def _check_size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int, pydantic.BeforeValidator(_check_size), Field(ge=1, le=_MAX_SIZE)]
"""A size in bytes: a number, or a text such as 8GiB."""


_Model = TypeVar("_Model", bound=BaseModel)

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


def check_source(source: object) -> None:
    """Checks that a configuration is given as a path or a mapping.

    Raises:
        ConfigError: If it is anything else.
    """
    if not isinstance(source, str | os.PathLike | Mapping):
        raise ConfigError(f"config: expected the path of a YAML file, or a mapping like it, found {shown(source)}")


def read_yaml(path: Path, keys: str = "'merge_method' and 'models'") -> dict[str, Any]:
    """Reads the mapping in a YAML file.

    Args:
        path: The file.
        keys: Some of the keys that are expected, for the message where it holds something else.

    Raises:
        ConfigError: If there is no such file, or it does not hold mappings.
    """
    documents = read_documents(path, keys)
    if len(documents) > 1:
        raise ConfigError(f"{path}: expected one document, found {len(documents)}, separated by '---'")
    return documents[0]


def read_documents(path: Path, keys: str = "'merge_method' and 'models'") -> list[dict[str, Any]]:
    """Reads the mappings in a YAML file, where `---` separates several; empty ones are left out.

    Args:
        path: The file.
        keys: Some of the keys that are expected, for the message where it holds something else.

    Raises:
        ConfigError: If there is no such file, or it does not hold mappings.
    """
    text = _read_text(path)
    documents: list[Any] = []
    try:
        for raw in _load_all(text):
            documents += [raw] if raw is not None else []
            if len(documents) > _MAX_DOCUMENTS:
                raise ConfigError(f"{path}: expected {_MAX_DOCUMENTS} documents at most, found more")
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_problem(error)}") from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError):
        # What Python finds wrong with an escape or a directive; PyYAML lets it through.
        raise ConfigError(f"{path}: not valid YAML: it holds a letter or number that is none") from None
    for raw in documents or [None]:
        if not isinstance(raw, dict):
            what = "nothing" if raw is None else f"{type(raw).__name__}: {shown(raw)}"
            raise ConfigError(f"{path}: expected keys such as {keys}, found {what}")
    return documents


def _read_text(path: Path) -> str:
    """Reads a file that may be anything."""
    name = shorten(str(path), 200) if str(path).isprintable() else shown(str(path))
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{name}: no such configuration file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot be read: {_system_reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise ConfigError(f"{name}: is {kind}; expected a YAML file")
    try:
        with open(path, "rb") as stream:
            # Some files of the system's say that they are empty, and wait for ever.
            data = stream.read(min(status.st_size, _MAX_FILE_BYTES + 1))
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {_system_reason(error)}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(
            f"{name}: larger than {gib(_MAX_FILE_BYTES)}; expected a configuration, which takes some KiB: is this "
            "another file?"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        what = (
            "the text is UTF-16; save it as UTF-8" if wide else f"expected UTF-8, and {error.reason} at {error.start}"
        )
        raise ConfigError(f"{name}: not valid YAML: {what}") from None


def _system_reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Describes in one line what is wrong with a file, and where."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        return where + shorten("; ".join(filter(None, (error.problem, error.context))), 200)
    return shorten(" ".join(str(error).split()), 200)


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


def read_flow(text: str) -> list[Any]:
    """Reads values as YAML reads those between the brackets of a list, such as `a, [b, c]`.

    Raises:
        yaml.YAMLError: If the text is no YAML.
    """
    try:
        (values,) = _load_all(f"[{text}]")
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error
    if not isinstance(values, list):
        raise yaml.YAMLError("closes a bracket that it has not opened")
    return values


class _YamlLoader(yaml.SafeLoader):
    """Loads YAML as people write it: `1e-6` is a number, a date a text; a key is a text, and given once."""

    # PyYAML's own, but for dates and a lone equals sign.
    yaml_implicit_resolvers = {  # noqa: RUF012 (it is the loader's own, as in PyYAML)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def forget_anchors(self) -> None:
        """Begins another document."""
        self._defined: list[tuple[str, int]] = []  # anchors, with their places in the text
        self._used: set[str] = set()
        self._places: list[tuple[str, int, int]] = []  # top-level keys, with where their values begin and end
        self._depth = 0
        self._values: dict[yaml.Node, int] = {}  # values in a node that is finished, aliases counted in full

    def anchored_keys(self) -> frozenset[str]:
        """Finds the top-level keys of the document whose values have an anchor that is used."""
        return frozenset(
            key
            for key, start, end in self._places
            if any(start <= place <= end and anchor in self._used for anchor, place in self._defined)
        )

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Remembers anchors and what is used of them, and ends where there is too much."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self._used.add(str(event.anchor))
        elif event.anchor is not None:
            self._defined.append((event.anchor, event.start_mark.index))
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _refusal(f"nested deeper than {_MAX_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent) and node not in self._values:
            raise _refusal(f"{shown(event.anchor)} stands inside itself", event)
        self._count_values(node, event)
        if parent is None and isinstance(node, yaml.MappingNode):
            self._places = [(str(key.value), key.end_mark.index, value.end_mark.index) for key, value in node.value]
        return node

    def _count_values(self, node: Any, event: Any) -> None:
        """Counts what a node holds once all aliases are written out."""
        if node in self._values:
            return
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(self._values[each] for each in node.value)
        elif isinstance(node, yaml.MappingNode):
            total += sum(self._values[key] + self._values[value] for key, value in node.value)
        if total > _MAX_VALUES:
            raise _refusal(f"more than {_MAX_VALUES} values, aliases written out", event)
        self._values[node] = total

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Reads keys as texts, and refuses those given twice, before those that `<<` brings along are added."""
        node = super().compose_mapping_node(anchor)
        known: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "expected a text as key", key.start_mark)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            key.tag = "tag:yaml.org,2002:str"
            if key.value in known:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key.value)} stands here more than once", key.start_mark
                )
            known.add(key.value)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Makes a plain value, and says where one is no value of its tag."""
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.constructor.ConstructorError(
                None, None, f"the tag {shown(tag)} is not known; expected plain values", node.start_mark
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown(node.value)} cannot be read as {kind}", node.start_mark
            ) from None


def _refusal(problem: str, event: Any) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, problem, event.start_mark)


_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def plain_values(raw: Any) -> Any:
    """Returns a raw configuration as JSON has it: keys are texts, paths texts, tuples lists, numbers Python's own.

    Raises:
        ConfigError: If it holds anything else; it lists every such place.
    """
    problems: list[str] = []
    values = _plain(raw, "", 0, [0], problems)
    if problems:
        raise ConfigError(*grouped(problems))
    return values


def _plain(value: Any, place: str, depth: int, count: list[int], problems: list[str]) -> Any:
    count[0] += 1
    where = place or "configuration"
    if depth > _MAX_DEPTH or count[0] > _MAX_VALUES:
        what = f"nested deeper than {_MAX_DEPTH} levels" if depth > _MAX_DEPTH else f"more than {_MAX_VALUES} values"
        raise ConfigError(f"{shorten(where, 200)}: {what}; does something hold itself?")
    if isinstance(value, Mapping):
        plain = {}
        for key, inner in value.items():
            if not isinstance(key, str):
                problems.append(f"{where}: expected texts as keys, found {shown(key)}")
            elif _text_problem(key):
                problems.append(f"{where}: expected a key {_text_problem(key)}, found {shown(key)}")
            else:
                plain[key] = _plain(inner, _dotted((place, key) if place else (key,)), depth + 1, count, problems)
        return plain
    if isinstance(value, list | tuple):
        return [_plain(each, f"{place}[{number}]", depth + 1, count, problems) for number, each in enumerate(value)]
    return _plain_scalar(value, where, problems)


def _plain_scalar(value: Any, where: str, problems: list[str]) -> Any:
    if isinstance(value, os.PathLike) and isinstance(os.fspath(value), str):
        value = os.fspath(value)
    if isinstance(value, str):
        if problem := _text_problem(value):
            problems.append(f"{where}: expected a text {problem}, found {shown(value)}")
        return value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        if abs(int(value)) > _MAX_NUMBER:
            problems.append(f"{where}: expected a smaller number, found {shown(int(value))}")
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    problems.append(f"{where}: expected a text, a number, true, false, a list or keys, found {shown(value)}")
    return None


def _text_problem(text: str) -> str:
    """Says what a text should be without: characters that no file name, and no UTF-8, can have."""
    if "\0" in text:
        return "without NUL characters"
    return "without halves of surrogate pairs" if any("\ud800" <= letter <= "\udfff" for letter in text) else ""


def to_json(raw: Any) -> str:
    """Writes a raw configuration as JSON text.

    Raises:
        ConfigError: If it holds what JSON cannot.
    """
    return json.dumps(plain_values(raw))


def read_known(kind: type[_Model], raw: Any) -> tuple[_Model | None, list[str]]:
    """Reads a part of a configuration, with lists as tuples; one whose only mistakes are unknown keys without them.

    So what is wrong with the rest can be told together with the unknown keys.

    Args:
        kind: What it is read as.
        raw: Its values, as YAML has them.

    Returns:
        What was read, `None` where it cannot be; and the mistakes.
    """
    try:
        return kind.model_validate_json(to_json(raw)), []
    except pydantic.ValidationError as error:
        problems = explain(error, kind)
        unknown = [detail["loc"] for detail in error.errors(include_url=False) if detail["type"] == "extra_forbidden"]
        if len(unknown) < error.error_count():
            return None, problems
    try:
        return kind.model_validate_json(to_json(_without(raw, unknown))), problems
    except pydantic.ValidationError:  # something hangs on a key that is unknown
        return None, problems


def _without(raw: Any, places: Iterable[tuple[int | str, ...]]) -> Any:
    """Copies values without some keys, by their places as pydantic tells them: names of kinds stand between keys."""
    copied = json.loads(to_json(raw))
    for place in places:
        holder = copied
        for step in place[:-1]:
            is_there = step in holder if isinstance(holder, dict) else isinstance(step, int) and step < len(holder)
            holder = holder[step] if is_there else holder
        if isinstance(holder, dict):
            holder.pop(place[-1], None)
    return copied


# Messages


class _Short(reprlib.Repr):
    """Shows values in a hundred characters or little more."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 4, 6, 6
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        """Shows a whole number; of a large one, its number of digits."""
        digits = x.bit_length() * 30103 // 100000 + 1
        return repr(x) if digits <= 40 else f"a whole number of some {digits} digits"


_SHORT = _Short()


def shown(value: object) -> str:
    """Shows a value in a message, as Python writes it; a long one is shortened."""
    text = _SHORT.repr(value)  # with its own marks of what it leaves out
    return text if len(text) <= 200 else f"{text[:100]}…{text[-50:]}"


def grouped(problems: Iterable[str]) -> list[str]:
    """Makes one line of mistakes that differ in their places alone, `place: what is wrong`, and ends after some."""
    places: dict[str, list[str]] = {}
    for problem in dict.fromkeys(problems):
        place, colon, text = problem.partition(": ")
        places.setdefault(text if colon else problem, []).append(place if colon else "")
    lines = [f"{listed_places(where)}: {text}" if where[0] else text for text, where in places.items()]
    lines = [shorten(line, _LONGEST_LINE) for line in lines]
    return lines if len(lines) <= _MAX_LINES else [*lines[:_MAX_LINES], f"and {len(lines) - _MAX_LINES} more mistakes"]


def listed_places(places: Sequence[str]) -> str:
    """Lists places, the first ones by name."""
    more = len(places) - _MAX_PLACES
    rest = f" (and {more} more place{'s' if more > 1 else ''})" if more > 0 else ""
    return ", ".join(places[:_MAX_PLACES]) + rest


def explain(error: pydantic.ValidationError, root: type[BaseModel]) -> list[str]:
    """Lists the mistakes that pydantic found, with the nearest known key for an unknown one.

    Args:
        error: The error that validating raised.
        root: The model that was validated against.
    """
    details = error.errors(include_url=False)
    holders = {detail["loc"][:length] for detail in details for length in range(len(detail["loc"]))}
    unknown: dict[tuple[int | str, ...], list[str]] = {}
    problems = []
    for detail in details:
        location, kind = detail["loc"], detail["type"]
        if kind == "too_short" and location in holders:
            continue  # pydantic does not count the items that have mistakes of their own
        if kind == "extra_forbidden":
            unknown.setdefault(location[:-1], []).append(str(location[-1]))
            if len(unknown[location[:-1]]) <= _MAX_PLACES:
                known = _known_keys(root, location[:-1])
                hint = nearest(str(location[-1]), known)
                problems.append(f"{_dotted(location)}: unknown key{hint or f'; expected one of {sorted(known)}'}")
        elif kind == "missing":
            problems.append(f"{_dotted(location)}: missing")
        else:
            text, told = _expected(detail)
            problems.append(f"{_dotted(location)}: {text}" + ("" if told else f", found {_found(detail['input'])}"))
    for location, keys in unknown.items():
        if (more := len(keys) - _MAX_PLACES) > 0:
            known = sorted(_known_keys(root, location))
            problems.append(f"{_dotted(location)}: {more} more unknown key{'s' if more > 1 else ''}; expected {known}")
    return grouped(problems)


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
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number from {ge:g} on",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number up to {le:g}",
    "string_too_short": "a text of {min_length} or more characters",
    "too_short": "{min_length} or more entries",
    "too_long": "up to {max_length} entries",
    "string_too_long": "a text of up to {max_length} characters",
    "string_pattern_mismatch": "a text like {pattern}",
    "string_unicode": "a text",
    "literal_error": "{expected}",
}
"""What is expected where pydantic finds a mistake of some type; in braces, what its error says."""


def _expected(detail: Any) -> tuple[str, bool]:
    """Says what was expected, and whether this says already what was found."""
    context = detail.get("ctx", {})
    if detail["type"] in _EXPECTED:
        return f"expected {_EXPECTED[detail['type']].format(**context)}", False
    if detail["type"] != "value_error":  # of types that no field has now
        return "expected another value", False
    text = shorten(context["error"], 500)
    return text[:1].lower() + text[1:], "found" in text or isinstance(detail["input"], dict | list)


def _found(value: Any) -> str:
    """Describes what stands in the place of something else."""
    if isinstance(value, list):
        return f"{len(value)} entr{'ies' if len(value) > 1 else 'y'}" if value else "an empty list"
    return f"the keys {shown(sorted(map(str, value)))}" if isinstance(value, dict) else shown(value)


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{shorten(part)}" if text else shorten(part)
    return text or "configuration"


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean …?` for the nearest known word, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6) if len(word) <= _LONGEST_WORD else []
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
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and typing.get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


# Regular expressions of users


def _check_regex(pattern: str) -> str:
    """Returns the pattern; raises where it is no regular expression."""
    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        reason = shorten(str(error) or type(error).__name__, 200)
        raise ValueError(f"{shown(pattern)} is not a regular expression: {reason}") from None
    return pattern


Regex = Annotated[str, Field(max_length=10_000), pydantic.AfterValidator(_check_regex)]
"""A regular expression that a user wrote."""


def matches(pattern: str, text: str, where: str = "") -> bool:
    """Says whether a regular expression that a user wrote is found in a text.

    Args:
        pattern: The regular expression.
        text: What is searched.
        where: Key or file that the pattern stands in, for messages.

    Raises:
        ConfigError: If the search takes too long, as it does where repetitions stand inside repetitions.
    """
    try:
        return regex.search(pattern, text, timeout=_SEARCH_SECONDS) is not None
    except TimeoutError:
        raise ConfigError(
            f"{where + ': ' if where else ''}{shown(pattern)} takes more than {_SEARCH_SECONDS:g} s to be searched in "
            f"{shown(text)}; expected a regular expression without repetitions inside repetitions, such as (a+)+"
        ) from None
