"""Reading YAML that nobody should write, words for values in messages, and regular expressions of users."""

from __future__ import annotations

import itertools
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from largemerge import ConfigError
from largemerge.api import read_config
from largemerge.config_file import (
    grouped,
    matches,
    nearest,
    parse_size,
    plain_values,
    read_documents,
    read_yaml,
    shown,
    size_in_bytes,
)

GOOD = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
LETTERS = "abcdefghijklmno"
ALIASES = "".join(
    f"{letter}: &{letter} [{', '.join([f'*{before}'] * 9)}]\n" for before, letter in itertools.pairwise(LETTERS)
)
MERGED = "".join(
    f"{letter}: &{letter} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, letter in itertools.pairwise(LETTERS)
)

BROKEN: dict[str, tuple[str | bytes, str]] = {
    "deep lists": ("a: " + "[" * 100_000, "line 1, column 53: nested deeper than 50 levels"),
    "deep mappings": ("{a: " * 5000, "nested deeper than 50 levels"),
    "deep blocks": ("- " * 5000 + "x", "nested deeper than 50 levels"),
    "a list inside itself": ("&a [*a]", "line 1, column 5: 'a' stands inside itself"),
    "a mapping inside itself": (GOOD + "parameters: &a {x: [*a]}", "line 3, column 21: 'a' stands inside itself"),
    "aliases": ("a: &a [x, x]\n" + ALIASES, "more than 200000 values, aliases written out"),
    "merge keys": ("a: &a {k: 1}\n" + MERGED, "more than 200000 values, aliases written out"),
    "many digits": ("seed: " + "9" * 5000, "line 1, column 7: '9999"),
    "no number": ("seed: 0b_", "'0b_' cannot be read as int"),
    "a number to base 60": (GOOD + "seed: 1" + ":59" * 2000 + ".5", "cannot be read as float"),
    "a directive": ("%YAML 1." + "9" * 5000 + "\n---\na: 1", "a letter or number that is none"),
    "an escape": ('name: "\\UFFFFFFFF"', "a letter or number that is none"),
    "python": ("name: !!python/object/apply:os.getcwd []", "the tag '!!python/object/apply:os.getcwd' is not known"),
    "binary": ("name: !!binary aGk=", "the tag '!!binary' is not known; expected plain values"),
    "a set": ("name: !!set {a, b}", "the tag '!!set' is not known"),
    "a time": ("name: !!timestamp 2001-12-14", "the tag '!!timestamp' is not known"),
    "a tag of their own": ("name: !mine x", "the tag '!mine' is not known"),
    "a text as number": ("seed: !!int x", "'x' cannot be read as int"),
    "a list as key": ("? [a]\n: 1", "expected a text as key"),
    "a key twice": ("1: a\n'1': b", "line 2, column 1: the key '1' stands here more than once"),
    "a NUL": (b"\0" * 9, "unacceptable character #x0000"),
    "UTF-16": (GOOD.encode("utf-16"), "the text is UTF-16; save it as UTF-8"),
    "Latin-1": ("name: é".encode("latin-1"), "expected UTF-8, and unexpected end of data at 6"),
    "much": (b"#" * (1 << 20) + b"\n", "larger than 1.0 MiB"),
    "a long alias": ("a: *" + "x" * 100_000, "found undefined alias"),
    "many documents": ("--- a\n" * 1001, "expected 1000 documents at most"),
    "nothing": (" \n", "found nothing"),
    "a number alone": ("5", "found int: 5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_told_at_once_and_shortly(tmp_path: Path, name: str) -> None:
    content, expected = BROKEN[name]
    path = tmp_path / "merge.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    begin = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ") and expected in problem and len(problem) < len(str(path)) + 400
    assert time.process_time() - begin < 5


def test_what_people_write_is_read(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    text = "a: 2020-99-99\nyes: 1e-3\n1: &x {k: v}\nnull: {<<: *x, k: w}\nb: =\nc: !!str 5\nd: [*x, *x]\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_yaml(path) == {
        "a": "2020-99-99",
        "yes": 0.001,
        "1": {"k": "v"},
        "null": {"k": "w"},
        "b": "=",
        "c": "5",
        "d": [{"k": "v"}, {"k": "v"}],
    }
    path.write_text("--- {a: 1}\n---\n--- {b: 2}\n")
    assert read_documents(path) == [{"a": 1}, {"b": 2}]


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for path, expected in (
        (tmp_path, "is a folder; expected a YAML file"),
        (tmp_path / "pipe", "is no regular file; expected a YAML file"),
        (Path("/dev/zero"), "is no regular file"),
        (tmp_path / "loop", "cannot be read: "),
        (tmp_path / "dangling", "no such configuration file"),
        (tmp_path / "file" / "below", "no such configuration file"),
        (tmp_path / ("x" * 5000), "cannot be read: "),
        (Path("a\0b"), "'a\\x00b': cannot be read: "),
    ):
        with pytest.raises(ConfigError) as caught:
            read_config(path)
        assert expected in str(caught.value) and len(str(caught.value)) < 400


def test_many_mistakes_are_few_lines(tmp_path: Path) -> None:
    """In far less than the minutes that comparing each with each would take."""
    path = tmp_path / "merge.yaml"
    names = [f"key_{number}" for number in range(2000)]
    begin = time.process_time()
    for text, problems in (
        (
            GOOD + "".join(f"{name}: 1\n" for name in names),
            ["key_0, key_1, key_2: unknown key; expected one of ", "configuration: 1997 more unknown keys; expected ["],
        ),
        (
            GOOD + "parameters:\n" + "".join(f"  {name}: 1\n" for name in names),
            [
                "parameters.key_0, parameters.key_1, parameters.key_2 (and 1997 more places): unknown parameter; "
                "linear has ['normalize', 'weight']"
            ],
        ),
        (
            "merge_method: linear\nmodels:\n" + "".join(f"- {{model: {name}}}\n" for name in names),
            [
                "weight: missing for key_0, key_1, key_2 (and 1997 more places), in models[0], models[1], models[2] "
                "(and 1997 more places); expected a number"
            ],
        ),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_config(path)
        assert len(caught.value.problems) == len(problems)
        assert all(found.startswith(begun) for found, begun in zip(caught.value.problems, problems, strict=True))
    assert time.process_time() - begin < 30


def test_a_missing_parameter_of_all_slices_is_one_line() -> None:
    slices = [
        {"sources": [{"model": "a", "layer_range": [n, n + 1]}, {"model": "b", "layer_range": [n, n + 1]}]}
        for n in range(39)
    ]
    with pytest.raises(ConfigError) as caught:
        read_config({"merge_method": "linear", "slices": slices})
    assert caught.value.problems == (
        "weight: missing for a, b, in slices[0].sources[0], slices[0].sources[1], slices[1].sources[0] (and 75 more "
        "places); expected a number",
    )


# Values of a mapping


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def inside_itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({1: 2}, "configuration.x: expected texts as keys, found 1"),
        ({None: 1, ("a",): 1}, "configuration.x: expected texts as keys, found None"),
        (b"x", "expected a text, a number, true, false, a list or keys, found b'x'"),
        ({1, 2}, "found {1, 2}"),
        (object, "found <class 'object'>"),
        ("a\0b", "expected a text without NUL characters, found 'a\\x00b'"),
        ("\ud800", "expected a text without halves of surrogate pairs, found '\\ud800'"),
        ({"a\0": 1}, "expected a key without NUL characters, found 'a\\x00'"),
        ([10**5000], "expected a smaller number, found a whole number of some 5001 digits"),
        (nested(60), "nested deeper than 50 levels; does something hold itself?"),
        (inside_itself(), "nested deeper than 50 levels"),
        ([0] * 200_000, "more than 200000 values"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_no_file_has(value: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config({"merge_method": "linear", "x": value})
    assert problem.removeprefix("configuration.") in str(caught.value)


def test_plain_values() -> None:
    raw = {"a": Path("x/y"), "b": (1, None), "c": np.float32(0.5), "d": np.int64(3), "e": {"f": True}}
    assert plain_values(raw) == {"a": "x/y", "b": [1, None], "c": 0.5, "d": 3, "e": {"f": True}}
    assert type(plain_values(raw)["c"]) is float and type(plain_values(raw)["d"]) is int


# Words


def test_values_in_messages_are_short() -> None:
    assert shown("abc") == "'abc'" and shown(0.5) == "0.5" and shown([1, "a"]) == "[1, 'a']"
    assert shown(10**400) == "a whole number of some 401 digits"
    for value in ("é" * 10**6, ["x" * 1000] * 1000, nested(500), {str(n): "y" * 99 for n in range(999)}, inside_itself):
        assert len(shown(value)) <= 200


def test_mistakes_that_differ_in_place_alone_are_one_line() -> None:
    assert grouped(["a: x", "b: y", "c: x", "a: x", "plain"]) == ["a, c: x", "b: y", "plain"]
    assert grouped(f"m[{n}]: x" for n in range(5)) == ["m[0], m[1], m[2] (and 2 more places): x"]
    assert grouped(f"m: {n}" for n in range(60)) == [*(f"m: {n}" for n in range(50)), "and 10 more mistakes"]


def test_the_nearest_word_of_none_is_none() -> None:
    assert nearest("wieght", ["weight", "t"]) == "; did you mean 'weight'?"
    assert nearest("w" * 10**6, ["weight"]) == ""


@pytest.mark.parametrize("text", ["1e400", "nan", "inf", "-5GB", "0", "0GB", "", "x", "9" * 400, "9" * 5000 + "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 5GB, 500MB or 2GiB") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("size", [None, True, 0, -1, 1.5, float("nan"), 1 << 63, b"5GB", [1]])
def test_what_is_no_size_either(size: Any) -> None:
    with pytest.raises(ValueError, match="expected a size such as 5GB"):
        size_in_bytes(size)
    assert size_in_bytes("2 KiB") == size_in_bytes(2048) == 2048


# Regular expressions


def test_a_regular_expression_cannot_hang() -> None:
    assert matches(r"layers\.\d+\.mlp", "model.layers.12.mlp.up_proj") and not matches("^mlp", "model.mlp")
    begin = time.process_time()
    with pytest.raises(ConfigError, match=re.escape("parameters.include: '(a|aa)+$' takes more than 1 s")):
        matches("(a|aa)+$", "a" * 60 + "b", "parameters.include")
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("pattern", ["(", "a**", "(?P<x>", "(" * 5000, "[z-a]", "x" * 10_001])
def test_what_is_no_regular_expression(pattern: str) -> None:
    models = [{"model": name, "calibration": {"data": "d"}} for name in "ab"]
    with pytest.raises(ConfigError) as caught:
        read_config({"merge_method": "regmean", "models": models, "parameters": {"include": [pattern]}})
    (problem,) = caught.value.problems
    assert problem.startswith("parameters.include[0]: ") and len(problem) < 400
