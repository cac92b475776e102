"""Finished merges whose pages are looked at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_merges import merge_each


@pytest.fixture(scope="session")
def merges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output folders by method; only to be read."""
    return merge_each(tmp_path_factory.mktemp)


@pytest.fixture
def changed(merges: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies the report of a merge into a folder of its own, after a function has changed it."""

    def copy(method: str, change: Callable[[dict[str, Any]], object]) -> Path:
        out = tmp_path / method
        out.mkdir(exist_ok=True)
        report = json.loads((merges[method] / "merge_report.json").read_text())
        change(report)
        (out / "merge_report.json").write_text(json.dumps(report))
        return out

    return copy


@pytest.fixture
def whole(merges: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies the whole folder of a merge."""

    def copy(method: str) -> Path:
        return Path(shutil.copytree(merges[method], tmp_path / f"whole-{method}"))

    return copy
