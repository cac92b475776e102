"""Ctrl-C, SIGTERM and SIGHUP in real processes, from the first moments on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import Case, MakeCase
from processes import ENVIRONMENT, merging

NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}
NEVER_RETURNS = """
import ctypes
from largemerge import interrupts
interrupts.install()
interrupts.raising()
mutex = ctypes.create_string_buffer(64)  # all zero: not locked
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print("ready", flush=True)
lock(mutex)
"""
SWALLOWS = """
import sys, time
from largemerge import interrupts
interrupts.install()
interrupts.raising()

class Slow:
    def __del__(self):
        print("ready", flush=True)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            pass

try:
    del_me = Slow()
    del del_me
    time.sleep(20)
except KeyboardInterrupt as error:
    sys.exit(interrupts.exit_code(error))
"""


def default_signals() -> None:
    """Where the tests run in the background of a shell, it has them ignore Ctrl-C."""
    for number in NAMES:
        signal.signal(number, signal.SIG_DFL)


def start(*command: object, ignoring: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
        preexec_fn=(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignoring else default_signals,
    )


def catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether a process has taken over a signal; before, nothing of ours runs."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(mask >> (number - 1) & 1)


def wait_until_it_catches(process: subprocess.Popen[str], number: signal.Signals) -> None:
    while process.poll() is None and not catches(process, number):
        time.sleep(0.001)


@pytest.fixture
def case(make_case: MakeCase) -> Case:
    made = make_case(num_samples=4)
    made.write_yaml()
    return made


def check_ends(case: Case, number: signal.Signals, delay: float) -> None:
    out = case.folder / "out"
    with start("-m", "largemerge", *merging(case, out)) as process:
        wait_until_it_catches(process, signal.SIGTERM)
        time.sleep(delay)
        process.send_signal(number)
        told, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, (delay, told, errors)
    assert told == "" and errors.startswith(f"\nlargemerge: {NAMES[number]}"), errors
    assert errors.count("largemerge: ") == 1 and "Traceback" not in errors and "Exception" not in errors
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("number", "delay"), [(signal.SIGINT, 0.0), (signal.SIGINT, 0.6), (signal.SIGTERM, 0.3), (signal.SIGHUP, 0.1)]
)
def test_signals_while_torch_is_imported(case: Case, number: signal.Signals, delay: float) -> None:
    check_ends(case, number, delay)


@pytest.mark.slow
@pytest.mark.parametrize("number", NAMES)
@pytest.mark.parametrize("delay", [0.02 * 1.3**step for step in range(16)])  # from 20 ms to a second
def test_signals_at_many_moments(case: Case, number: signal.Signals, delay: float) -> None:
    check_ends(case, number, delay)


def test_what_nohup_ignores_stays_ignored() -> None:
    with start("-c", "from largemerge import interrupts; interrupts.install(); input()", ignoring=True) as process:
        process.stdin = None
        wait_until_it_catches(process, signal.SIGTERM)
        assert process.poll() is not None or not catches(process, signal.SIGHUP)
        process.kill()


def test_a_second_ctrl_c_ends_what_never_returns() -> None:
    """Nor holds the second one up that the main thread is in C and sees none of them."""
    with start("-c", NEVER_RETURNS) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.1)  # until it is in C
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None, "some seconds are left to end in order"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "interrupted again, and ended at once" in errors and "--resume" in errors and "Traceback" not in errors


def test_what_a_process_leaves_is_told_by_what_it_was_doing() -> None:
    text = "the merge in out is whole"
    with start("-c", NEVER_RETURNS.replace("mutex =", f"interrupts.is_safe({text!r})\nmutex =")) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=5)
    assert errors == f"\nlargemerge: interrupted again, and ended at once; {text}\n"


@pytest.mark.slow
def test_one_ctrl_c_ends_what_never_returns_after_some_seconds() -> None:
    with start("-c", NEVER_RETURNS) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 143 and "ended by SIGTERM" in errors


def test_a_signal_that_a_destructor_swallows_comes_again() -> None:
    """Python would print an exception in a destructor, and go on as if nothing had been."""
    with start("-c", SWALLOWS) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in errors, errors
