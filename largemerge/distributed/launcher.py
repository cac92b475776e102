"""What a launcher tells each process in its environment: its number, how many there are, and where they meet.

torchrun and DeepSpeed set `RANK`, `WORLD_SIZE` and the like. `accelerate launch` does, too, or has MPI start the
processes, which has names of its own. Nothing here imports torch, so that a mistake is told before that is loaded.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from largemerge.errors import ConfigError, shorten

_MPI = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("LOCAL_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
_OTHER_NAMES = {"LOCAL_WORLD_SIZE": ("LOCAL_SIZE",)}  # DeepSpeed's
_MAX_SIZE = 100_000
_LIMIT = "LARGEMERGE_RANK_TIMEOUT"
_DEFAULT_LIMIT, _MIN_LIMIT, _MAX_LIMIT = 30.0, 1.0, 86_400.0  # seconds
_START_FACTOR = 10  # ranks import torch and the like at unlike speeds before they meet
_MIN_START_LIMIT = 15.0
_NAME_SECONDS = 15.0  # for a host's name to have an address


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher has started.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_rank: Number of this process among those of its machine, from 0.
        local_size: Number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def read_launch() -> Launch:
    """Reads and checks what the launcher says.

    Raises:
        ConfigError: If a variable is missing, is no number, or does not fit the others; it names all of them.
    """
    problems: list[str] = []
    size = _number("WORLD_SIZE", 1, _MAX_SIZE, 1, problems)
    if problems:
        raise ConfigError(*problems)
    if size == 1:
        return Launch()
    rank = _number("RANK", 0, size - 1, None, problems)
    local_size = _number("LOCAL_WORLD_SIZE", 1, size, size, problems)
    local_rank = _number("LOCAL_RANK", 0, local_size - 1, 0, problems)
    if not started_by_mpi():
        host = os.environ.get("MASTER_ADDR")
        if not host:
            problems.append(f"MASTER_ADDR is not set, and WORLD_SIZE is {size}; {_expected('the host of rank 0')}")
        elif not _is_known(host):
            expected = _expected("the name or address of rank 0's host")
            problems.append(f"MASTER_ADDR: this machine cannot find {shorten(host)!r}; {expected}")
        _number("MASTER_PORT", 1, 65_535, None, problems)
    try:
        beat_limit()
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return Launch(rank, size, local_rank, local_size)


def _is_known(host: str) -> bool:
    """Whether a host's name has an address, which in a cluster that is starting may take some seconds to appear."""
    end = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
        except UnicodeError:
            return False
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.5)
        else:
            return True


def own_rank() -> int:
    """Number of this process, or 0 where the launcher's variables are wrong or there is one process."""
    size, rank = _digits(_value("WORLD_SIZE") or ""), _digits(_value("RANK") or "")
    return rank if size is not None and size > 1 and rank is not None else 0


def several_processes() -> bool:
    """Whether a launcher has started more than one process."""
    return (_digits(_value("WORLD_SIZE") or "") or 1) > 1


def started_by_accelerate() -> bool:
    """Whether `accelerate launch` has started this process."""
    return any(name.startswith("ACCELERATE_") for name in os.environ)


def started_by_mpi() -> bool:
    """Whether `accelerate launch` has started this process by MPI, whose names of variables are its own."""
    return started_by_accelerate() and not (os.environ.get("WORLD_SIZE") and os.environ.get("RANK"))


def beat_limit() -> float:
    """Seconds without a beat after which a rank counts as gone: `LARGEMERGE_RANK_TIMEOUT`, 30 by default.

    Raises:
        ConfigError: If the variable is no such number.
    """
    text = os.environ.get(_LIMIT) or str(_DEFAULT_LIMIT)
    seconds = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", text, re.ASCII) else 0.0
    if not _MIN_LIMIT <= seconds <= _MAX_LIMIT:
        raise ConfigError(f"{_LIMIT}={text[:40]!r}: expected seconds from {_MIN_LIMIT:.0f} to {_MAX_LIMIT:.0f}")
    return seconds


def start_limit() -> float:
    """Seconds in which all ranks must have come: five minutes, or `LARGEMERGE_RANK_TIMEOUT`, 15 at least."""
    return max(_MIN_START_LIMIT, beat_limit() * (1 if os.environ.get(_LIMIT) else _START_FACTOR))


def _number(name: str, low: int, high: int, default: int | None, problems: list[str]) -> int:
    """Reads a whole number; notes a problem where it is none, or out of its range."""
    text = _value(name)
    if text is None:
        if default is None:
            problems.append(f"{name} is not set, and there are several processes; {_expected(f'{low} to {high}')}")
        return low if default is None else default
    number = _digits(text)
    if number is None or not low <= number <= high:
        shown = next((other for other in _names(name) if os.environ.get(other)), name)
        problems.append(f"{shown}={text[:40]!r}: {_expected(f'a number from {low} to {high}')}")
        return low if default is None else default
    return number


def _expected(what: str) -> str:
    return f"expected {what}, as torchrun, accelerate launch and deepspeed set it"


def _digits(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text.strip(), re.ASCII) else None


def _value(name: str) -> str | None:
    """Value of a variable, by its other names, too; `None` where it is not set, or empty."""
    return next((value for other in _names(name) if (value := os.environ.get(other))), None)


def _names(name: str) -> Sequence[str]:
    return name, *((_MPI if started_by_accelerate() else _OTHER_NAMES).get(name, ()))
