"""Failures of the operating system are errors with path and cause, from the command line and from Python."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import Case, MakeCase

import largemerge
from largemerge import SystemFailure
from largemerge.cli import main
from largemerge.errors import explain_failures


def below_a_file(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "file" / "inner").mkdir()


def long_name(folder: Path) -> None:
    (folder / ("x" * 5000)).exists()


def circle_of_links(folder: Path) -> None:
    (folder / "link").symlink_to("link")
    (folder / "link").read_bytes()


def circle_resolved(folder: Path) -> None:
    (folder / "link").symlink_to("link")
    (folder / "link").resolve(strict=True)


def nul(folder: Path) -> None:
    (folder / "a\0b").mkdir()


def full_disk(folder: Path) -> None:
    path = Path("/dev/full")
    with path.open("wb", buffering=0) as stream:
        os.write(stream.fileno(), b"1")  # tells no path


def too_many_open(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        (folder / "file").open("w")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def two_paths(folder: Path) -> None:
    (folder / "a").rename(folder / "nowhere" / "b")


def a_librarys_own(folder: Path) -> None:
    raise OSError("Can't load the model.\nIt is not there.")


def no_memory(folder: Path) -> None:
    bytearray(2**62)


def no_memory_for_a_tensor(folder: Path) -> None:
    import torch

    torch.empty(2**60)


def mapped_and_not_there(folder: Path) -> None:
    import torch

    torch.from_file(str(folder / "x"), shared=False, size=4)


def mapped_and_cut_short(folder: Path) -> None:
    import torch

    (folder / "x").write_bytes(b"abc")
    torch.from_file(str(folder / "x"), shared=False, size=4000)


def nested(folder: Path) -> None:
    nested(folder)


@pytest.mark.parametrize(
    ("fail", "mentions"),
    [
        (below_a_file, ["/file/inner: Not a directory; a part of the path is a file"]),
        (long_name, ["xx…xx", ": File name too long; choose a shorter name"]),
        (circle_of_links, ["/link: Too many levels of symbolic links"]),
        (circle_resolved, ["link"]),
        (nul, ["a path holds a NUL character"]),
        (full_disk, ["No space left on device (at /dev/full); make room there", "--resume"]),
        (too_many_open, ["/file: Too many open files; allow this process more open files (ulimit -n)"]),
        (two_paths, ["/a → ", "/nowhere/b: No such file or directory"]),
        (a_librarys_own, ["Can't load the model. It is not there."]),
        (no_memory, ["there is too little memory; close other programs, or set limits: --memory-host"]),
        (no_memory_for_a_tensor, ["there is too little memory: ", "--memory-host"]),
        (mapped_and_not_there, ["/x: No such file or directory"]),
        (mapped_and_cut_short, ["/x> size <3> is smaller", "it was cut short meanwhile"]),
        (nested, ["nested too deeply (maximum recursion depth exceeded"]),
    ],
)
def test_failures_name_path_and_cause(tmp_path: Path, fail: Callable[[Path], None], mentions: list[str]) -> None:
    with pytest.raises(SystemFailure) as caught, explain_failures():
        fail(tmp_path)
    assert all(text in str(caught.value) for text in mentions), str(caught.value)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("null"), RuntimeError("broken"), TypeError("x")])
def test_other_errors_are_left_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explain_failures():
        raise error
    assert caught.value is error


@pytest.fixture
def case(make_case: MakeCase) -> Case:
    made = make_case(num_samples=4)
    made.write_yaml()
    return made


@pytest.mark.parametrize("where", ["below a file", "a long name", "a circle of links"])
def test_an_output_folder_that_cannot_be(case: Case, capfd: pytest.CaptureFixture[str], where: str) -> None:
    out = case.folder / "file" / "out"
    if where == "below a file":
        (case.folder / "file").touch()
    elif where == "a long name":
        out = case.folder / ("x" * 5000)
    else:
        out = case.folder / "link"
        out.symlink_to(out)
    before = sorted(os.listdir(case.folder))
    with pytest.raises(largemerge.LargemergeError) as from_python:
        largemerge.merge(case.config, out)
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(case.folder / "config.yaml"), str(out)])
    told = capfd.readouterr().err
    assert ended.value.code == 2 and told == f"largemerge: {from_python.value}\n" and len(told) < 700, told
    assert sorted(os.listdir(case.folder)) == before


def test_a_configuration_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("x" * 5000, "."):
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(tmp_path / name)])
        told = capfd.readouterr().err
        assert ended.value.code == 2 and told.startswith("largemerge: ") and told.count("\n") == 1, told
