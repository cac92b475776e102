"""Checks of JSON files with samples, before the library that makes a table of them sees them.

    lines ──► an object each ──► right      a line that is none by itself ──► the whole file as values one after another

The library (Arrow's reader, behind `datasets`) ends the process with a signal where the first row is `null`, or where
brackets are nested some thousand deep; and it takes a list for a row.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largemerge.errors import shorten

MAX_DEPTH = 100
"""Levels that a sample may be nested; the library takes fewer."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"\s*")
_TOO_LONG = "a number of thousands of digits; expected numbers up to 1.8e308"
_EXPECTED = 'expected an object such as {"text": ...}'


class _RowError(ValueError):
    """What is wrong with a row that is JSON, in our words."""


def check_json_rows(path: Path, most: int | None = None) -> str | None:
    """Says where a JSON file is at fault: with one object a line, objects one after another, or one list of them.

    Args:
        path: The file, `.jsonl` or `.json`.
        most: Characters after which no more lines are looked at; a file whose values span lines is looked at whole.

    Returns:
        Which line is at fault, what was found and expected; `None` if nothing is.
    """
    status = path.stat()
    return _check(path, status.st_size, status.st_mtime_ns, most)


@functools.lru_cache(maxsize=64)
def _check(path: Path, num_bytes: int, modified_ns: int, most: int | None) -> str | None:
    """Checks a file; what came out is kept as long as its size and time stay the same."""
    number = length = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                length += len(line)
                if line.strip():
                    row = _DECODER.decode(line)
                    if isinstance(row, list) and number == 1:
                        return _problem_of_list(row, file.read())
                    problem = _problem_of(row, line)
                    if problem is not None:
                        return f"line {number}: {problem}"
                if most is not None and length > most:
                    return None
    except json.JSONDecodeError as error:
        return _check_whole(path, f"line {number}: not valid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return f"line {number}: nested too deeply; {_EXPECTED}"
    except UnicodeDecodeError as error:
        return f"not readable as UTF-8 text: {error}"
    except _RowError as error:
        return f"line {number}: {error}"
    except ValueError:  # the one that is left
        return f"line {number}: {_TOO_LONG}"
    return None


def _check_whole(path: Path, by_line: str) -> str | None:
    """Reads values that may span lines; where the first is not valid either, what was found by lines is the answer."""
    text = path.read_text(encoding="utf-8-sig")
    place, count = _end_of_space(text, 0), 0
    while place < len(text):
        line = text.count("\n", 0, place) + 1
        try:
            value, end = _DECODER.raw_decode(text, place)
        except json.JSONDecodeError as error:
            return (
                by_line
                if count == 0 and error.lineno == 1
                else (f"line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}")
            )
        except RecursionError:
            return f"line {line}: nested too deeply; {_EXPECTED}"
        except _RowError as error:
            return f"{'in the list of samples' if text[place] == '[' else f'line {line}'}: {error}"
        except ValueError:
            return f"line {line}: {_TOO_LONG}"
        if isinstance(value, list) and count == 0:
            return _problem_of_list(value, text[end:])
        problem = _problem_of(value, text[place:end])
        if problem is not None:
            return f"line {line}: {problem}"
        place, count = _end_of_space(text, end), count + 1
    return None


def _end_of_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _problem_of_list(rows: list[Any], rest: str) -> str | None:
    if rest.strip():
        return f"more text behind a list of samples: {rest.strip()[:40]!r}"
    for place, row in enumerate(rows):
        problem = _problem_of(row, json.dumps(row) if not isinstance(row, dict) else None)
        if problem is not None:
            return f"entry {place} of the list: {problem}"
    return None


def _problem_of(row: Any, text: str | None) -> str | None:
    if not isinstance(row, dict):
        return f"{_EXPECTED}, found {(text or repr(row)).strip()[:60]}"
    if text is None or text.count("[") + text.count("{") > MAX_DEPTH:
        problem = _depth_problem(row)
        if problem is not None:
            return problem
    if text is None or _SURROGATE.search(text):
        return _surrogate_problem(row)
    return None


def _surrogate_problem(row: Mapping[str, Any]) -> str | None:
    for key, value in row.items():
        try:
            json.dumps([key, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return f"{shorten(key)!r}: half of a character, {half}, stands in a text; write whole characters"
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object whose keys stand once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _RowError(f"the key {shorten(twice)!r} stands twice in one object; remove one of them")
    return made


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _RowError(f"the number {shorten(digits)} is too large; expected numbers up to 1.8e308")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite)


def _depth_problem(row: Any) -> str | None:
    level = [row]
    for _ in range(MAX_DEPTH):
        inside = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [each for values in inside for each in values if isinstance(each, dict | list)]
        if not level:
            return None
    return f"nested more than {MAX_DEPTH} levels deep; {_EXPECTED}"
