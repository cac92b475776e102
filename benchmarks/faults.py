"""Merges whose calls to the system fail, one by one, and merges that are killed at any moment.

    python benchmarks/faults.py calls --work DIR                  # some hundred calls of every kind of merge
    python benchmarks/faults.py kills --work DIR --count 1000     # SIGKILL, resume, SIGKILL, …, compare

`calls` counts what a tiny merge asks of the system on its output and inputs (open, write, fsync, rename, …) and lets
one call after the other fail with ENOSPC, EIO, EACCES and the like, by a shim that the C compiler makes of
`fault_shim.c`. A try passes if the command ends with 0 and the right result, or with 2 and a message without a
traceback, and if then `--resume` without the fault gives the right result. Inputs must be as they were.

`kills` sends SIGKILL at a random moment, resumes, and kills again; in the end all files are those of an unbroken run.

Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from largemerge.cli import main as largemerge_command
from measure import machine

SHIM = "LARGEMERGE_FAULT_SHIM"
_ON_OUTPUT = {
    "open": ("EACCES", "ENOSPC", "EMFILE"),
    "write": ("ENOSPC", "EIO"),
    "read": ("EIO",),
    "fsync": ("EIO",),
    "ftruncate": ("ENOSPC",),
    "fallocate": ("ENOSPC",),
    "rename": ("ENOSPC", "EROFS"),
    "mkdir": ("ENOSPC", "EACCES"),
    "unlink": ("EACCES",),
    "rmdir": ("EACCES",),
}
_ON_INPUTS = {"open": ("EACCES", "EIO"), "read": ("EIO",)}
_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """A merge that is tried.

    Attributes:
        name: Its name.
        config: Path of its configuration.
        inputs: Folder of its inputs.
    """

    name: str
    config: Path
    inputs: Path

    def command(self, out: Path, *more: str) -> list[str]:
        """Returns the arguments of the command."""
        return ["merge", str(self.config), str(out), "--quiet", "--max-shard-size", "20KB", *more]


def main() -> None:
    """Runs one of the two."""
    arguments = _arguments()
    if arguments.what == "calls" and SHIM not in os.environ:
        _start_with_shim(arguments.work)
    work: Path = arguments.work.resolve()
    shutil.rmtree(work / "tries", ignore_errors=True)
    (work / "tries").mkdir(parents=True)
    cases = [case for case in make_cases(work) if not arguments.cases or case.name in arguments.cases]
    generator = random.Random(arguments.seed)
    run = try_calls if arguments.what == "calls" else try_kills
    failures, tried = [], 0
    for case in cases:
        reference = files_of(_reference(case, work))
        before = files_of(case.inputs)
        for problem in run(case, reference, work / "tries", arguments.count // len(cases), generator):
            tried += 1
            if problem:
                failures.append(f"{case.name}: {problem}")
                print(failures[-1], flush=True)
        if files_of(case.inputs) != before:
            failures.append(f"{case.name}: its inputs have changed")
    print(f"{tried} tried, {tried - len(failures)} passed")
    found = {"benchmark": f"faults {arguments.what}", "tried": tried, "passed": tried - len(failures)}
    print(json.dumps({**found, "failures": failures[:50], "machine": machine()}))
    sys.exit(1 if failures else 0)


def _start_with_shim(work: Path) -> None:
    """Starts this script again, with the shim before the C library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        sys.exit("faults.py calls needs a C compiler, cc or gcc")
    work.mkdir(parents=True, exist_ok=True)
    shim = work.resolve() / "fault_shim.so"
    source = Path(__file__).with_name("fault_shim.c")
    subprocess.run([compiler, "-O1", "-w", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(shim), SHIM: str(shim), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def make_cases(work: Path) -> list[Case]:
    """Writes tiny models, data and one configuration of each kind of merge."""
    inputs = work / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    for seed in range(3):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=3)
        LlamaForCausalLM(config).save_pretrained(inputs / f"model{seed}")
        save_file({"input_ids": torch.randint(0, 99, (6, 12))}, inputs / f"data{seed}.safetensors")
    models = [{"model": str(inputs / f"model{seed}")} for seed in range(3)]
    data = [{**each, "calibration": {"data": f"{inputs}/data{seed}.safetensors"}} for seed, each in enumerate(models)]
    weighted = {"parameters": {"weight": 0.5}}
    series = [
        {"name": "first", "merge_method": "linear", "models": models[:2], **weighted},
        {"merge_method": "linear", "models": [{"model": "first"}, models[2]], **weighted},
    ]
    base = {"base_model": models[0]["model"]}
    documents: dict[str, list[dict[str, Any]]] = {
        "regmean_plusplus": [{"merge_method": "regmean_plusplus", "models": data}],
        "ties": [{"merge_method": "ties", "models": models[1:], **base, "parameters": {"weight": 0.5, "density": 0.5}}],
        "opcm": [{"merge_method": "opcm", "models": models[1:], **base}],
        "series": series,
    }
    cases = []
    for name, written in documents.items():
        path = inputs / f"{name}.yaml"
        path.write_text(yaml.safe_dump_all(written), encoding="utf-8")
        cases.append(Case(name, path, inputs))
    return cases


def _reference(case: Case, work: Path) -> Path:
    """Makes the result of an unbroken run."""
    out = work / "tries" / f"{case.name}-unbroken"
    code, text = finish(start(case.command(out), work / "log"), work / "log")
    if code:
        sys.exit(f"{case.name} does not run at all: {text}")
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    """Reads all files below a folder, but for reports, which have times in them."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.endswith("merge_report.json")}


def try_calls(
    case: Case, reference: dict[str, bytes], tries: Path, count: int, generator: random.Random
) -> Iterator[str]:
    """Lets one call after the other fail; yields what went wrong in each try, or an empty text."""
    log = tries.parent / "log"
    faults: list[tuple[Path, str, str, int]] = []
    for below, kinds in ((tries / case.name, _ON_OUTPUT), (case.inputs, _ON_INPUTS)):
        for call, codes in kinds.items():
            shutil.rmtree(tries / case.name, ignore_errors=True)
            counted = tries.parent / "counted"
            finish(start(case.command(tries / case.name), log, (below, call, 0, 0), counted), log)
            calls = int(counted.read_text())
            faults += [(below, call, code, number) for code in codes for number in range(1, calls + 1)]
    chosen = faults if len(faults) <= count else generator.sample(faults, count)
    for below, call, code, number in chosen:
        out = tries / case.name
        shutil.rmtree(out, ignore_errors=True)
        fault = (below, call, number, getattr(errno, code))
        ended, text = finish(start(case.command(out), log, fault), log)
        problem = _verdict(case, out, ended, text, reference, log)
        where = "inputs" if below == case.inputs else "output"
        yield f"{call} number {number} on the {where} fails with {code}: {problem}" if problem else ""


def _verdict(case: Case, out: Path, code: int | None, text: str, reference: dict[str, bytes], log: Path) -> str:
    """Says what is wrong with how a run ended; nothing if it is as it should be."""
    if code is None:
        return "hangs"
    if code not in (0, 2) or "Traceback" in text or (code == 2 and "largemerge: " not in text):
        return f"ends with {code}: {text.strip()[-700:]}"
    if code == 2:
        told = text
        code, text = finish(start(case.command(out, "--resume"), log), log)
        finished = code == 2 and "holds a finished merge" in text
        if code != 0 and not finished:
            return f"told {told.strip()[-300:]!r}, but cannot be resumed: {text.strip()[-500:]}"
    return "" if files_of(out) == reference else f"another result ({_differences(files_of(out), reference)})"


def _differences(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return ", ".join(names[:5])


def try_kills(
    case: Case, reference: dict[str, bytes], tries: Path, count: int, generator: random.Random
) -> Iterator[str]:
    """Kills at random moments until there have been `count`; yields what went wrong after each, or an empty text."""
    log, done = tries.parent / "log", 0
    begun = time.monotonic()
    finish(start(case.command(tries / "warm"), log), log)
    seconds = time.monotonic() - begun
    while done < count:
        out = tries / case.name
        shutil.rmtree(out, ignore_errors=True)
        kills, moments = 0, []
        while True:
            process = start(case.command(out, "--resume"), log)
            moments.append(generator.uniform(0, 1.1 * seconds))
            time.sleep(moments[-1])
            os.kill(process, signal.SIGKILL)
            code, text = finish(process, log)
            if code != -signal.SIGKILL:
                break
            kills += 1
            if kills == 3:
                code, text = finish(start(case.command(out, "--resume"), log), log)
                break
        finished = code == 2 and "holds a finished merge" in text
        problem = "" if code == 0 or finished else f"ends with {code}: {text.strip()[-500:]}"
        if not problem and files_of(out) != reference:
            problem = f"another result ({_differences(files_of(out), reference)})"
        told = f"killed after {', '.join(f'{moment:.3f}' for moment in moments)} s: {problem}" if problem else ""
        for number in range(kills):
            yield told if number == 0 else ""
        done += max(kills, 1)


def start(
    command: Sequence[str], log: Path, fault: tuple[Path, str, int, int] | None = None, counted: Path | None = None
) -> int:
    """Starts a command in a process forked from this one, where all is imported already; returns its number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        shim = ctypes.CDLL(os.environ[SHIM]) if fault is not None else None
        if shim is not None and fault is not None:
            below, call, number, error = fault
            shim.fault_arm(os.fsencode(below), call.encode(), number, error)
        try:
            largemerge_command(command)
        except SystemExit as ended:
            code = int(ended.code or 0)
        if shim is not None and counted is not None:
            counted.write_text(str(shim.fault_seen()), encoding="ascii")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(process: int, log: Path) -> tuple[int | None, str]:
    """Waits for a process; returns its exit code (negative for a signal, `None` if it hung) and what it printed."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None, log.read_text(errors="replace")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("calls", "kills"))
    parser.add_argument("--work", type=Path, required=True, help="folder for models and tries")
    parser.add_argument("--count", type=int, default=1000, help="at most so many tries, over all kinds of merge")
    parser.add_argument("--cases", nargs="*", default=[], help="kinds of merge (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
