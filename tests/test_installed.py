"""Versions of what is installed are checked by the package's own list."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import pytest

from largemerge import InstallationError
from largemerge.cli import main
from largemerge.installed import check_installed

NUMPY, TORCH = (importlib.metadata.version(name) for name in ("numpy", "torch"))


def test_what_is_installed_here_fits() -> None:
    check_installed()
    listed = importlib.metadata.requires("largemerge") or []
    assert any(re.match(r"torch[<>]", text) for text in listed), "else nothing is checked"


def test_what_does_not_fit_is_told_at_once() -> None:
    with pytest.raises(InstallationError) as caught:
        check_installed(
            [
                "torch<100,>=99",
                "numpy<1",
                "no-such-package>=2",
                "safetensors",
                'nor-this>=1; extra == "test"',
                'nor-that>=1; python_version < "3"',
            ]
        )
    torch, numpy, absent = caught.value.problems
    assert torch == (f"torch {TORCH} is installed, and largemerge needs torch >=99, <100; pip install 'torch<100,>=99'")
    assert numpy == f"numpy {NUMPY} is installed, and largemerge needs numpy <1; pip install 'numpy<1'"
    assert absent.startswith(f"no-such-package is not installed in this Python {platform.python_version()}; largemerge")


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.9.0", True),
        ("2.9.0a0+nv25.10", True),
        ("2.9.1+cpu", True),
        ("2.8.9", False),
        ("3.0.0", False),
        ("3.0rc1", False),
    ],
)
def test_builds_count_as_their_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    folder = tmp_path / "some_package-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: some-package\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    if fits:
        check_installed(["some-package>=2.9,<3"])
    else:
        with pytest.raises(InstallationError, match=re.escape(f"some-package {version} is installed")):
            check_installed(["some-package>=2.9,<3"])


def test_the_command_says_so_first(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("largemerge.installed._own_requirements", lambda: ["torch>=99"])
    with pytest.raises(SystemExit) as ended:
        main(["merge", "nowhere.yaml", "out"])
    assert ended.value.code == 2
    assert capfd.readouterr().err.startswith(f"largemerge: torch {TORCH} is installed, and largemerge needs torch >=99")
