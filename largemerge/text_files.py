"""Small files of strangers, read with care: what lies at a path, its text, its JSON.

    path ──► a regular file, links followed? ──► of a sane size? ──► UTF-8? ──► JSON, not too deep? ──► of this type?

Checkpoints come from strangers: where a `config.json` should be, there may be a named pipe, whose reader waits for
ever, or brackets in brackets, at which a parser gives up. Every reader of JSON goes through here, so that each of these
ends with one message. What lies at a path is looked at before it is opened.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from largemerge.errors import CheckpointError, LargemergeError, shorten

MAX_TEXT_BYTES = 256 << 20
"""Size of the largest text that is read; the largest tokenizers known have 40 MB."""
MAX_FILE_BYTES = 4 << 30
"""Size of the largest file beside the weights that is read or copied as it is, such as a language model's."""
MAX_DEPTH = 64
"""Brackets inside brackets that JSON may have: what reads it later is recursive, and no config has ten."""
_LARGEST_NUMBER = 10**308  # a float holds no more
_MAX_NAME_BYTES, _MAX_PATH = 255, 1024
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_TYPES: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    float: "a number",
}


def brief(value: object) -> str:
    """Shows a value of strangers as Python writes it, in sixty characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_line(error: BaseException, length: int) -> str:
    """Returns the first line of an error's message, shortened; its type's name where it has none."""
    return shorten((str(error).strip().splitlines() or [type(error).__name__])[0], length)


def json_text(value: Any, indent: int | None = None) -> str:
    """Writes JSON as every reader takes it: numbers that are not finite, which it has not, become `null`."""

    def finite(part: Any) -> Any:
        if isinstance(part, float) and not math.isfinite(part):
            return None
        if isinstance(part, Mapping):
            return {key: finite(each) for key, each in part.items()}
        return list(map(finite, part)) if isinstance(part, list | tuple) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def file_problem(path: Path, max_bytes: int | None = None) -> str | None:
    """Says why there is no file at a path that can be read, links followed; `None` if there is one. Opens nothing.

    Args:
        path: The path.
        max_bytes: Maximum of the file's size; `None`: any.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            return f"is a link to {shorten(os.readlink(path))}, which does not exist"
        return "does not exist"
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return "is a link that leads in a circle"
        return f"cannot be looked at: {os_reason(error)}"
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), "something else")
        return f"is {kind}, expected a file"
    if max_bytes is not None and status.st_size > max_bytes:
        return f"has {status.st_size:,} bytes, expected {max_bytes:,} or fewer"
    return None


def os_reason(error: BaseException) -> str:
    """Says what an error of the operating system means, without the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def read_file(
    path: Path, name: str = "", *, max_bytes: int = MAX_TEXT_BYTES, error: type[LargemergeError] = CheckpointError
) -> bytes:
    """Reads a small file.

    Args:
        path: The file; links are followed.
        name: What the user calls what it belongs to; messages begin with it.
        max_bytes: Maximum of its size.
        error: Type of the error that is raised.

    Raises:
        LargemergeError: Of the type `error`, if there is no regular file, it is too large, or it cannot be read.
    """
    begin = f"{name}: {path}" if name else str(path)
    problem = file_problem(path, max_bytes)
    if problem is not None:
        raise error(f"{begin} {problem}")
    try:
        size = os.stat(path).st_size
        if not size:
            return b""  # some files of the system's say so, and wait for ever
        with path.open("rb") as stream:
            return stream.read(size)
    except OSError as failure:
        raise error(f"{begin} cannot be read: {os_reason(failure)}") from None


def read_text(path: Path, name: str = "", *, error: type[LargemergeError] = CheckpointError) -> str:
    """Reads a small file of UTF-8 text, with a byte order mark or without (see `read_file`)."""
    raw = read_file(path, name, error=error)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        begin = f"{name}: {path}" if name else str(path)
        raise error(f"{begin} is not UTF-8 text: byte {failure.start} is {raw[failure.start]:#04x}") from None


def read_json(
    path: Path,
    name: str = "",
    *,
    expected: type | tuple[type, ...] = dict,
    error: type[LargemergeError] = CheckpointError,
) -> Any:
    """Reads a JSON file.

    Args:
        path: The file; links are followed.
        name: What the user calls what it belongs to; messages begin with it.
        expected: Type of what it holds; `object`: any.
        error: Type of the error that is raised.

    Raises:
        LargemergeError: Of the type `error`, if there is no such file, it is no JSON, or it holds something else.
    """
    begin = f"{name}: {path}" if name else str(path)
    text = read_text(path, name, error=error)
    try:
        value = parse_json(text)
    except ValueError as failure:
        raise error(f"{begin} is not readable JSON: {failure}") from None
    if not isinstance(value, expected):
        wanted = " or ".join(_TYPES.get(each, each.__name__) for each in _as_tuple(expected))
        raise error(f"{begin} holds a {type(value).__name__}, expected {wanted}")
    return value


def parse_json(text: str, *, strict: bool = False) -> Any:
    """Parses JSON text; all that can go wrong is one type of error.

    A key that stands twice in one object with other values is an error, since readers disagree on which one counts.

    Args:
        text: The text.
        strict: Whether to refuse what JSON itself does not have (`NaN`, `Infinity`), numbers that no float holds, and
            every key that stands twice.

    Raises:
        ValueError: If it is no JSON (a `json.JSONDecodeError`), has keys twice, halves of characters or huge numbers,
            or is too deep; its text is the reason.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) < len(items):
            before: dict[str, Any] = {}
            for key, value in items:
                if key in before and (strict or repr(before[key]) != repr(value)):
                    raise ValueError(f"the key {shorten(key)!r} stands twice in one object")
                before[key] = value
        return made

    def constant(word: str) -> float:
        if strict:
            raise ValueError(f"{word} is no number of JSON")
        return float(word)

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ValueError(f"the number {shorten(digits)} is too large")
        return value

    def whole(digits: str) -> int:
        # Python itself refuses more digits than 4,300, with a message about itself.
        value = int(digits) if len(digits) < 400 else _LARGEST_NUMBER
        if not -_LARGEST_NUMBER < value < _LARGEST_NUMBER:
            raise ValueError(f"the number {shorten(digits)} is too large")
        return value

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number, parse_int=whole)
        too_deep = _depth_beyond(value, MAX_DEPTH)
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ValueError(f"more than {MAX_DEPTH} brackets inside each other")
    if _HALF_PAIR.search(text) is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a character, such as \\ud800, stands in a text") from None
    return value


def _depth_beyond(value: Any, limit: int) -> bool:
    """Whether lists and objects lie deeper in each other than a limit; without recursion."""
    level = [value]
    for _ in range(limit):
        inside: list[Any] = []
        for each in level:
            inside.extend(each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
        level = [each for each in inside if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _as_tuple(expected: type | tuple[type, ...]) -> tuple[type, ...]:
    return expected if isinstance(expected, tuple) else (expected,)


def leads_out(path: str) -> bool:
    """Whether a relative path of strangers may lead out of the folder that it is to lie in."""
    parts = PurePosixPath(path)
    return parts.is_absolute() or ".." in parts.parts


def inner_path_problem(path: object, *, name_only: bool = False) -> str | None:
    """Says why a text of strangers is no path inside a folder; `None` if it is one.

    Args:
        path: What should be the path.
        name_only: Whether it must be a plain name, without a folder; else "", the folder itself, is one, too.
    """
    if not isinstance(path, str):
        return "is no text"
    if not path.isprintable():
        return "holds characters that no name has"
    parts = PurePosixPath(path).parts
    if leads_out(path) or "\\" in path:
        return "leads out of its folder"
    if any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in parts) or len(path) > _MAX_PATH:
        return "is too long for a name"
    if name_only and parts != (path,):
        return "is no plain file name"
    return None
