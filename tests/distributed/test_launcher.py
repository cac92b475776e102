"""What a launcher says: mistakes are told at once, and before anything is imported."""

from __future__ import annotations

import pytest

from largemerge import ConfigError
from largemerge.cli import main
from largemerge.distributed import launcher
from largemerge.distributed.launcher import (
    Launch,
    beat_limit,
    own_rank,
    read_launch,
    several_processes,
    start_limit,
    started_by_mpi,
)

TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TWO, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "LARGEMERGE_RANK_TIMEOUT", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_launch() == Launch(0, 1, 0, 1)
    monkeypatch.setenv("RANK", "7")  # of something else
    monkeypatch.setenv("LARGEMERGE_RANK_TIMEOUT", "soon")
    assert read_launch() == Launch(0, 1, 0, 1) and own_rank() == 0 and not several_processes()


def test_ranks_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == Launch(1, 2, 1, 2) and own_rank() == 1 and several_processes()
    monkeypatch.setenv("LOCAL_SIZE", "1")  # DeepSpeed's name
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert read_launch() == Launch(1, 2, 0, 1)


def test_a_host_that_nobody_knows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_NAME_SECONDS", 0.1)
    for name, value in (TWO | {"MASTER_ADDR": "nowhere.invalid"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR: this machine cannot find 'nowhere\.invalid'; expected"):
        read_launch()


def test_a_host_whose_name_is_given_an_address_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([OSError("not yet"), OSError("not yet"), []])

    def look_up(host: str, port: None) -> object:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(launcher.socket, "getaddrinfo", look_up)
    for name, value in (TWO | {"MASTER_ADDR": "rank0.cluster"}).items():
        monkeypatch.setenv(name, value)
    assert read_launch() == Launch(1, 2, 1, 2)


def test_ranks_of_mpi_under_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "2")
    monkeypatch.setenv("PMI_SIZE", "4")
    assert read_launch() == Launch(0, 1, 0, 1), "MPI alone starts processes that know nothing of each other"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert read_launch() == Launch(2, 4, 0, 4) and own_rank() == 2 and started_by_mpi()


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"WORLD_SIZE": "abc"}, ["WORLD_SIZE='abc': expected a number from 1 to 100000"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE='0'"]),
        ({"WORLD_SIZE": "-2"}, ["WORLD_SIZE='-2'"]),
        ({"WORLD_SIZE": "2.0"}, ["WORLD_SIZE='2.0'"]),
        ({"WORLD_SIZE": "²"}, ["WORLD_SIZE='²'"]),
        ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE='999"]),
        ({"WORLD_SIZE": "1000000"}, ["WORLD_SIZE='1000000'"]),
        ({"RANK": "7"}, ["RANK='7': expected a number from 0 to 1"]),
        ({"RANK": "2"}, ["RANK='2'"]),
        ({"RANK": "-1"}, ["RANK='-1'"]),
        ({"RANK": ""}, ["RANK is not set"]),
        ({"LOCAL_RANK": "two"}, ["LOCAL_RANK='two'"]),
        ({"LOCAL_WORLD_SIZE": "3"}, ["LOCAL_WORLD_SIZE='3': expected a number from 1 to 2"]),
        ({"MASTER_ADDR": ""}, ["MASTER_ADDR is not set"]),
        ({"MASTER_PORT": ""}, ["MASTER_PORT is not set"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
        ({"MASTER_PORT": "65536"}, ["MASTER_PORT='65536': expected a number from 1 to 65535"]),
        ({"LARGEMERGE_RANK_TIMEOUT": "soon"}, ["LARGEMERGE_RANK_TIMEOUT='soon': expected seconds from 1"]),
        ({"LARGEMERGE_RANK_TIMEOUT": "nan"}, ["LARGEMERGE_RANK_TIMEOUT='nan'"]),
        ({"LARGEMERGE_RANK_TIMEOUT": "1e9"}, ["LARGEMERGE_RANK_TIMEOUT='1e9'"]),
        ({"LARGEMERGE_RANK_TIMEOUT": "0"}, ["LARGEMERGE_RANK_TIMEOUT='0'"]),
        ({"RANK": "x", "MASTER_ADDR": "", "LOCAL_RANK": "y"}, ["RANK='x'", "MASTER_ADDR is", "LOCAL_RANK='y'"]),
    ],
)
def test_mistakes_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    changes: dict[str, str],
    mentions: list[str],
) -> None:
    for name, value in (TWO | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        read_launch()
    assert len(caught.value.problems) == len(mentions)
    assert all(text in str(caught.value) for text in mentions), str(caught.value)
    with pytest.raises(SystemExit) as ended:
        main(["merge", "config.yaml", "out"])
    told = capfd.readouterr().err
    assert ended.value.code == 2 and all(text in told for text in mentions) and "Traceback" not in told


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (beat_limit(), start_limit()) == (30.0, 300.0)
    for text, beat, start in (("60", 60.0, 60.0), ("2.5", 2.5, 15.0)):
        monkeypatch.setenv("LARGEMERGE_RANK_TIMEOUT", text)
        assert (beat_limit(), start_limit()) == (beat, start)
