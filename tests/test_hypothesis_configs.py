"""Whatever stands anywhere in a configuration gives a configuration or a short, plain `ConfigError`, nothing else.

`benchmarks/fuzz_configs.py` makes the configurations up; here some of them are tried, always the same.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings

from largemerge.data_free.config import DataFreeConfig
from largemerge.regression.config import MergeConfig

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "fuzz_configs.py"))
BRIEF = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_every_place_is_told_in_plain_words() -> None:
    tried = list(FUZZ["sweep"](step=11))
    assert len(tried) > 700 and [(what, failed) for what, failed in tried if failed is not None] == []


def test_every_key_is_tried() -> None:
    def keys(model: type[pydantic.BaseModel]) -> set[str]:
        found = set(model.model_fields)
        for field in model.model_fields.values():
            parts = [field.annotation, *get_args(field.annotation)]
            parts += [inner for part in parts for inner in get_args(part)]
            for part in parts:
                if isinstance(part, type) and issubclass(part, pydantic.BaseModel):
                    found |= keys(part)
        return found

    for model, full in ((MergeConfig, FUZZ["REGRESSION"]), (DataFreeConfig, FUZZ["DATA_FREE"])):
        assert keys(model) <= {key for place in FUZZ["places"](full) for key in place}


def test_a_failure_is_seen() -> None:
    class Broken(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            raise RuntimeError("Input should be a valid string")

    assert FUZZ["failure"](Broken(merge_method="linear")) == "RuntimeError: Input should be a valid string"


def test_the_script_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz_configs.py", "--examples", "3", "--step", "1000"])
    FUZZ["main"]()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["benchmark"] == "fuzz_configs" and found["places"]["tried"] == found["places"]["passed"] > 10
    assert found["values"] == found["files"] == {"tried": 3, "passed": 3}


def test_made_up_values(tmp_path: Path) -> None:
    @BRIEF
    @given(FUZZ["MISTAKES"])
    def tried(raw: Any) -> None:
        assert FUZZ["failure_both_ways"](raw, tmp_path / "merge.yaml") is None

    tried()


def test_made_up_files(tmp_path: Path) -> None:
    @BRIEF
    @given(FUZZ["FILES"])
    def tried(text: str) -> None:
        assert FUZZ["failure_of_file"](text, tmp_path / "merge.yaml") is None

    tried()
