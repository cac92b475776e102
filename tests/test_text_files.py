"""Small files of strangers: whatever lies there ends in its content or in one error, and nothing waits or crashes."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from largemerge.errors import CheckpointError, shorten
from largemerge.text_files import (
    MAX_DEPTH,
    MAX_TEXT_BYTES,
    file_problem,
    inner_path_problem,
    json_text,
    parse_json,
    read_json,
)

NESTED = "[" * MAX_DEPTH + "]" * MAX_DEPTH


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(MAX_TEXT_BYTES + 1)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # names of sockets are short


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "does not exist"),
    "a folder": (Path.mkdir, "is a folder, expected a file"),
    "a named pipe": (os.mkfifo, "is a named pipe, expected a file"),
    "a socket": (listening, "is a socket, expected a file"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a file"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, which does not exist"),
    "a link to itself": (lambda path: path.symlink_to(path), "is a link that leads in a circle"),
    "too much": (sparse, "expected 268,435,456 or fewer"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_told_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, mentions = PLACES[place]
    make(tmp_path / "config.json")
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "config.json", "maths")
    (problem,) = caught.value.problems
    assert problem.startswith(f"maths: {tmp_path / 'config.json'} ") and mentions in problem


def test_a_path_that_cannot_be_is_told(tmp_path: Path) -> None:
    assert file_problem(tmp_path / ("x" * 300)) == "cannot be looked at: File name too long"
    assert file_problem(tmp_path / "a\0b") == "cannot be looked at: embedded null byte"
    assert file_problem(Path(__file__) / "inside") == "cannot be looked at: Not a directory"


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Expecting value"),
    "not UTF-8": (b'{"a": "\xff"}', "is not UTF-8 text: byte 7 is 0xff"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text: byte 0 is 0xff"),
    "cut short": (b'{"a": [1, ', "Expecting value"),
    "more behind": (b"{} {}", "Extra data"),
    "null": (b"null", "holds a NoneType, expected an object"),
    "a list": (b"[]", "holds a list, expected an object"),
    "a number": (b"5", "holds a int, expected an object"),
    "too deep": (b'{"a": ' + NESTED.encode() + b"}", "more than 64 brackets inside each other"),
    "very deep": (b"[" * 200_000, "more than 64 brackets inside each other"),
    "very deep objects": (b'{"a":' * 200_000, "more than 64 brackets inside each other"),
    "a number of 5,000 digits": (b'{"a": ' + b"7" * 5000 + b"}", "is too large"),
    "a number above floats": (b'{"a": -1' + b"0" * 308 + b"}", "is too large"),
    "a float above floats": (b'{"a": 1e999}', "the number 1e999 is too large"),
    "a key twice": (b'{"hidden_size": 8, "hidden_size": 16}', "the key 'hidden_size' stands twice in one object"),
    "half of a character": (b'{"a": "\\ud800"}', "half of a character"),
    "half of a character in a key": (b'{"\\udfff": 1}', "half of a character"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_json_is_told_in_one_line(tmp_path: Path, case: str) -> None:
    content, mentions = BROKEN[case]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "config.json", "maths")
    (problem,) = caught.value.problems
    assert problem.startswith(f"maths: {tmp_path / 'config.json'} ") and mentions in problem
    assert len(problem) < 400 and "\n" not in problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b' {"a": "\\ud83d\\ude00 \\u00b2"}\n', {"a": "😀 ²"}),
        (b'{"a": 1, "a": 1}', {"a": 1}),
        (b'{"limit": [0.0, Infinity]}', {"limit": [0.0, float("inf")]}),  # as Mamba's configs have it
        (b'{"max": 1000000000000000019884624838656}', {"max": 1000000000000000019884624838656}),
        (f'{{"a": {NESTED[1:-1]}}}'.encode(), json.loads(f'{{"a": {NESTED[1:-1]}}}')),
    ],
)
def test_what_others_read_is_read(tmp_path: Path, content: bytes, expected: Any) -> None:
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "link.json").symlink_to("config.json")
    assert read_json(tmp_path / "link.json") == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=50, derandomize=True, deadline=None, database=None)
def test_all_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value


@given(st.text(alphabet='{}[]",:0123456789.eE+-truefalsnNI\\ud8 \n'))
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@example("NaN")
def test_every_text_is_json_or_one_kind_of_error(text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
        with pytest.raises(ValueError):
            parse_json(text)
    else:
        try:
            assert repr(parse_json(text)) == repr(value)
        except ValueError as error:
            assert any(word in str(error) for word in ("twice", "too large", "half", "brackets"))


@pytest.mark.parametrize(
    "path", ["/etc", "../a", "a/../../b", "a\\b", "a\0", "a\nb", "x" * 256, "é" * 128, "a/" * 600, 5, None, ["a"]]
)
def test_paths_that_lead_out_or_nowhere(path: object) -> None:
    assert inner_path_problem(path) is not None


def test_paths_inside_a_folder() -> None:
    assert [inner_path_problem(path) for path in ("", ".", "a", "1_Pooling/é", "..a")] == [None] * 5
    assert inner_path_problem("model-²-of-2.safetensors", name_only=True) is None
    assert [inner_path_problem(path, name_only=True) for path in ("a/b", "", ".", "a/")] == [
        "is no plain file name"
    ] * 4


def test_texts_of_strangers_in_messages() -> None:
    assert shorten("model.layers.²") == "model.layers.²"
    assert shorten("a\nb\x1b[31m\0") == "a\\nb\\x1b[31m\\x00"
    assert shorten("x" * 1_000_000, 20) == "xxxxxxxxxxxxx…xxxxx (1,000,000 characters)"


def test_what_a_terminal_would_obey_is_shown() -> None:
    error = CheckpointError("red: \x1b[31m, turned: \u202e", "two\nlines")
    assert error.problems == ("red: \\x1b[31m, turned: \\u202e", "two\nlines")


def test_numbers_that_json_has_not_are_null() -> None:
    assert json_text({"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf}}) == (
        '{"a": [null, [1.5, null]], "b": {"c": null}}'
    )
