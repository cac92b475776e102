"""Standard output and standard error that lack characters, are no longer read, are full, or closed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import Case, MakeCase, exit_code, write_pair
from processes import ENVIRONMENT

from largemerge.streams import SafeStream, plain_text


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = write_pair(tmp_path_factory.mktemp("streams"))
    made.config["models"][0]["name"] = "Übung → ²"
    made.write_yaml()
    return made


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_encoding_lacks_is_replaced(case: Case, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert exit_code("plan", case.folder / "config.yaml", "--no-probe") == 0
    assert exit_code("plan", "no-sœch-\udcff.yaml") == 2
    shown, told = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    assert "bung" in shown and "21 solved" in shown and "?" in shown
    assert told.startswith("largemerge: 'no-s") and "no such configuration file" in told


def test_a_pipe_that_nobody_reads_is_no_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert exit_code("plan", case.folder / "config.yaml", "--no-probe") == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", pipe)
            assert exit_code("merge", case.folder / "config.yaml", case.folder / "piped") == 0
        assert (case.folder / "piped" / "config.json").exists()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # else closing it would fail


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_disk_under_standard_output_is_told(
    case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code("plan", case.folder / "config.yaml", "--no-probe", *options) == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert capfd.readouterr().err.startswith("largemerge: standard output: No space left on device")


def test_a_report_that_cannot_be_printed_is_in_the_output(
    case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code("merge", case.folder / "config.yaml", case.folder / "full", "--json", "--quiet") == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert "the work is finished, and its report is in" in capfd.readouterr().err
    assert (case.folder / "full" / "merge_report.json").exists()


def closed(number: int, arguments: list[object]) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "largemerge", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, check=False, preexec_fn=lambda: os.close(number), env=os.environ | ENVIRONMENT
    )


def test_closed_streams() -> None:
    """A file opened later must not come in their place, and get what is printed."""
    arguments = ["plan", "merge.yaml", "--log-file", "/"]  # wrong before anything is imported
    done = closed(1, arguments)
    assert (done.returncode, done.stderr) == (
        2,
        b"largemerge: --log-file /: Is a directory; it is a folder; expected a file\n",
    )
    done = closed(2, arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_merge_without_one_of_the_streams(make_case: MakeCase, number: int) -> None:
    case = make_case(num_samples=4)
    done = closed(number, ["merge", case.write_yaml(), case.folder / "out"])
    assert done.returncode == 0 and (done.stdout == b"" or number == 1), done
    done = closed(number, ["plan", case.folder / "config.yaml"])
    assert done.returncode == (2 if number == 1 else 0)
    assert number != 1 or b"standard output: it is closed" in done.stderr


def test_lines_begin_with_the_rank(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        stream = SafeStream(file, needed=False, prefix="[rank 3] ")
        for text in ("one\ntw", "o\n", "", "three"):
            stream.write(text)
    assert (tmp_path / "out").read_text() == "[rank 3] one\n[rank 3] two\n[rank 3] three"
    assert stream.isatty() is False
    stream.write("lost")  # the file is closed
    stream.flush()


def test_what_is_shown_is_plain_text_too() -> None:
    text = plain_text(lambda console: console.print("[bold]a :smile:", "b", style="red"))
    assert text == "[bold]a :smile: b"
