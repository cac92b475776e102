"""What is installed: found from any folder, whole, and light to import."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import largemerge
from largemerge import ConfigError, Memory

ROOT = Path(largemerge.__file__).parents[1]


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_folder_above_a_clone_does_not_hide_the_package(tmp_path: Path) -> None:
    """A folder called largemerge without `__init__.py` would be a namespace package, if nothing else were found."""
    (tmp_path / "largemerge" / "largemerge").mkdir(parents=True)
    code = "import largemerge; print(largemerge.__file__, largemerge.__version__)"
    assert run(code, tmp_path) == f"{ROOT / 'largemerge' / '__init__.py'} {largemerge.__version__}"


def test_every_folder_with_code_is_a_package() -> None:
    packages = {name.replace(".", "/") for name in setuptools.find_packages(str(ROOT), include=["largemerge*"])}
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "largemerge").rglob("*.py")}
    assert folders == packages
    assert (ROOT / "largemerge" / "py.typed").exists()


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    """What is no code is in the wheel only if `package_data` names it."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    named = settings["options.package_data"]["largemerge"].split()
    package = ROOT / "largemerge"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    others = {path for path in files if path.suffix != ".py"}
    assert others == {path for pattern in named for path in package.glob(pattern)}
    assert package / "evaluation" / "class_names" / "sun397.yaml" in others


def test_every_public_name_is_there() -> None:
    assert sorted(largemerge.__all__) == largemerge.__all__
    assert all(getattr(largemerge, name) is not None for name in largemerge.__all__)


def test_the_package_and_its_command_line_come_without_torch(tmp_path: Path) -> None:
    code = "import json, sys, largemerge, largemerge.cli; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run(code, tmp_path))
    assert not {"torch", "transformers", "pydantic", "yaml", "rich", "shtab"} & set(loaded)


def test_limits_of_memory_are_sizes() -> None:
    limits = Memory(host="4GiB", device=5, disk="scratch")
    assert (limits.host, limits.device, limits.disk) == (4 * 2**30, 5, "scratch")
    for wrong in (0, -1, 1.5, True, "much", "0GiB"):
        with pytest.raises(ConfigError) as caught:
            Memory(host=wrong, device=wrong)  # type: ignore[arg-type]
        assert [problem.partition(":")[0] for problem in caught.value.problems] == ["memory.host", "memory.device"]
    with pytest.raises(ConfigError, match=r"--node-memory 'much': expected a size"):
        largemerge.cluster(node_memory="much")
