"""What is swept, as a user writes it: values as YAML reads them, divided at the commas that stand in nothing."""

from __future__ import annotations

from typing import Any

import pytest

from largemerge.trials.settings import read_sweeps

VALUES: dict[str, list[Any]] = {
    "ridge=1e-4,0.01": [1e-4, 0.01],
    "ridge= 1 , .5e-3 ": [1, 5e-4],
    "shrinkage=true,false": [True, False],
    "anchor=base": ["base"],
    "k=3,'4'": [3, 4.0],
    r"include=['layers\.0\.','layers\.1\.'],['layers\.2\.']": [[r"layers\.0\.", r"layers\.1\."], [r"layers\.2\."]],
    "include=['a{1,2}']": [["a{1,2}"]],
    r"include=['(a|b),[^,]#: ''x'''],['c]']": [["(a|b),[^,]#: 'x'"], ["c]"]],
    "include=[]": [[]],
    "solve=[blocks, head],[blocks]": [["blocks", "head"], ["blocks"]],
    'x="a,b",it\'s': ["a,b", "it's"],
    "x=[[1,2],[3]],{a: 1, b: 2}": [[[1, 2], [3]], {"a": 1, "b": 2}],
}
EMPTY, EXPECTED = "a value is empty; expected one on each side of every comma", "expected values such as 0.1, true or"
MISTAKES = {
    **dict.fromkeys(("ridge=1e-6,", "ridge=,1e-6", "ridge=1e-6,,1e-2", "ridge=1e-6, ", "x=[a],,[b]"), EMPTY),
    **dict.fromkeys(("x=[1", "x=1]", "x=1],[2", "x='a", "x=[a{1,2}]", "x=*a", "x=!!python/name:os", "x=# a"), EXPECTED),
    **dict.fromkeys(("ridge", "=1", "ridge=", "1x=2", ""), "expected a setting and its values, such as ridge=1e-4"),
    "ridge=0.1,1e-1": "ridge: a value stands twice",
    "k=1,1.0": "k: a value stands twice",
}


@pytest.mark.parametrize("text", VALUES)
def test_values_are_read_as_yaml(text: str) -> None:
    problems: list[str] = []
    assert read_sweeps([text], problems) == {text.partition("=")[0]: VALUES[text]}
    assert not problems


@pytest.mark.parametrize("text", MISTAKES)
def test_what_is_no_value_is_told(text: str) -> None:
    problems: list[str] = []
    assert read_sweeps([text], problems) == {}
    (problem,) = problems
    assert problem.startswith("--sweep") and MISTAKES[text] in problem


def test_all_mistakes_are_noted_and_the_rest_is_read() -> None:
    problems: list[str] = []
    assert read_sweeps(["a=1,2", "b=1,", "a=3", "c", "d=x"], problems) == {"a": [1, 2], "d": ["x"]}
    assert [problem.split(":")[0] for problem in problems] == ["--sweep 'b=1,'", "--sweep a", "--sweep 'c'"]
    problems.clear()
    assert read_sweeps({"a": [], "b": 0.1, "c": [1, 2]}, problems) == {"c": [1, 2]}  # type: ignore[dict-item]
    assert all("expected a list of values" in problem for problem in problems) and len(problems) == 2
