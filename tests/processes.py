"""Merges in processes of their own, which can be killed at any moment.

A server imports everything once and forks a child for every command, so that starting one takes milliseconds.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers as tf
from cases import Case, files_in, load_merged, weights_in, write_case
from transformers import LlamaForCausalLM  # imported late otherwise, in every child, as is what follows

import largemerge.api
import largemerge.data_free.multi
import largemerge.regression.merge
from largemerge.cli import main
from largemerge.data_free import engine as data_free
from largemerge.data_free.tasks import Task
from largemerge.distributed import shared_memory
from largemerge.regression.collect import Collector
from largemerge.regression.planning.workload import Placement
from largemerge.regression.tensor_plan import BlockPlan

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
NUM_BLOCKS = 5
PARTS = ["outside", *(f"model.layers.{index}" for index in range(NUM_BLOCKS))]
SHARD = 20_000
CLOSE = 1e-5  # of a result to that of other ranks
HANGS_AT = "TEST_HANGS_AT"
"""Variable of a process: at this block, or tensor, it does nothing for an hour."""
PART_BYTES = "TEST_PART_BYTES"
"""Variable of a process: the size of a data-free merge's parts."""
NOTHING_SHARED = "TEST_NOTHING_SHARED"
"""Variable of a process: it has no memory in common with others."""
WRITES_BEHIND = "TEST_WRITES_BEHIND"
"""Variable of a process: blocks are written while the next one is merged, as on a GPU."""
FILE_OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def start(
    arguments: Sequence[object],
    log: Path,
    kill_at: int | None = None,
    number: signal.Signals = signal.SIGKILL,
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Starts `largemerge ARGUMENTS` in a process of its own.

    Args:
        arguments: Of the command line.
        log: File for its output.
        kill_at: Its operations on files are noted in the log; it sends itself the signal right before the n-th,
            counted from 1.
        number: The signal.
        environment: Variables of the process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes"])
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # read when the server starts
    try:
        texts = [str(argument) for argument in arguments]
        process = context.Process(target=_run, args=(texts, str(log), kill_at, number, dict(environment or {})))
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return process


def device_of_ranks(size: int) -> str:
    """Where so many ranks of this machine compute: each on a GPU of its own, or all on the CPU."""
    return "auto" if torch.cuda.device_count() >= size else "cpu"


def environment_of_ranks(size: int) -> dict[str, str]:
    """Variables with which each of them sees a GPU of its own, or none."""
    return {} if device_of_ranks(size) == "auto" else {"CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_ranks(
    arguments: Sequence[Sequence[object]],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    hanging: Mapping[int, str] | None = None,
) -> list[ForkServerProcess]:
    """Starts one process for each rank, as a launcher would, on what `device_of_ranks` says.

    Args:
        arguments: Of every rank's command line.
        folder: For their output, `rank0.log` and so on.
        environment: More variables of all ranks.
        hanging: By rank: the block at which it hangs.
    """
    hangs = {rank: {HANGS_AT: block} for rank, block in (hanging or {}).items()}
    size = str(len(arguments))
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(
            own,
            folder / f"rank{rank}.log",
            environment=common
            | environment_of_ranks(len(arguments))
            | dict(environment or {})
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            | hangs.get(rank, {}),
        )
        for rank, own in enumerate(arguments)
    ]


def run_ranks(
    arguments: Sequence[object], folder: Path, size: int, environment: Mapping[str, str] | None = None
) -> None:
    """Runs one command on some ranks and checks that all end well."""
    codes = [finish(process) for process in start_ranks([arguments] * size, folder, environment)]
    logs = "\n".join((folder / f"rank{rank}.log").read_text() for rank in range(size))
    assert codes == [0] * size, logs


def finish(process: ForkServerProcess) -> int:
    """Waits for the process; its exit code, negative if a signal ended it."""
    process.join(60)
    assert process.exitcode is not None, "still running after a minute"
    return process.exitcode


def run(arguments: Sequence[object], log: Path, kill_at: int | None = None) -> int:
    return finish(start(arguments, log, kill_at))


def wait_until(condition: Callable[[], Any], process: ForkServerProcess | None = None) -> bool:
    """Polls until the condition holds; False if the process ended before."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        if process is not None and not process.is_alive():
            return bool(condition())
        time.sleep(0.001)
    return True


def operations(log: Path) -> list[str]:
    """What a process with `kill_at` did to files, as far as it came."""
    return [line for line in log.read_text().splitlines() if line.startswith("operation ")]


def _run(
    arguments: list[str], log: str, kill_at: int | None, number: signal.Signals, environment: dict[str, str]
) -> None:
    gc.freeze()  # what the server has imported is no garbage
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if kill_at is not None:
        sys.dont_write_bytecode = True
        _signal_before_operation(kill_at, arguments[2], number)
    if PART_BYTES in environment:
        data_free.PART_BYTES = int(environment[PART_BYTES])
    if WRITES_BEHIND in environment:
        Placement.writes_in_background = lambda placement, device: placement.prefetch  # type: ignore[method-assign]
    if NOTHING_SHARED in environment:
        shared_memory.SHARED_MEMORY = Path("/nonexistent")
    if HANGS_AT in environment:
        _hang_at(environment[HANGS_AT])
    main(arguments)


def _hang_at(block: str) -> None:
    run = Collector._run

    def hang(collector: Collector, plan: BlockPlan, *rest: Any, **options: Any) -> None:
        if plan.name == block:
            time.sleep(3600)
        run(collector, plan, *rest, **options)

    Collector._run = hang  # type: ignore[method-assign]
    merge_one = data_free.Merger.__call__

    def hang_at_tensor(merger: data_free.Merger, task: Task) -> None:
        if task.name == block:
            time.sleep(3600)
        merge_one(merger, task)

    data_free.Merger.__call__ = hang_at_tensor  # type: ignore[method-assign]


def _is_temporary(event: str, args: tuple[Any, ...]) -> bool:
    """Whether an operation is on a folder for the moment, beside the merge's own."""
    path, descriptor = str(args[0]), args[-1]
    if event in ("os.mkdir", "os.remove", "os.rmdir") and not os.path.isabs(path) and descriptor >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
    return "/largemerge-" in path


def _signal_before_operation(kill_at: int, out: str, number: signal.Signals) -> None:
    done = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes or not isinstance(path, str) or not path.startswith(out):
                return
        elif event not in FILE_OPERATIONS or _is_temporary(event, args):
            return
        done += 1
        os.write(2, f"operation {done}: {event} {args[0]}\n".encode())
        if done == kill_at:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def make_long_case(folder: Path, method: str = "regmean_plusplus") -> Case:
    """A merge of about a second."""
    folder.mkdir(parents=True, exist_ok=True)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(tf.LlamaConfig(**(tiny_models.LLM | {"num_hidden_layers": NUM_BLOCKS}))))
    return write_case(folder, models, [tiny_models.inputs("text", 40, seed) for seed in range(2)], method=method)


def make_uneven_case(folder: Path, architecture: str, method: str, num_candidates: int = 3) -> Case:
    """Batches of unlike sizes, several for each candidate."""
    kind = tiny_models.ARCHITECTURES[architecture].kind
    models = [tiny_models.perturbed(architecture, seed) for seed in range(num_candidates)]
    inputs = [tiny_models.inputs(kind, 9 + 4 * seed, seed) for seed in range(num_candidates)]
    case = write_case(folder, models, inputs, method=method, batch_size=4, weights=[1.0, 2.0, 0.5][:num_candidates])
    case.write_yaml()
    return case


def merging(case: Case, out: Path, *options: object) -> list[object]:
    return ["merge", case.folder / "config.yaml", out, "--quiet", "--max-shard-size", str(SHARD), *options]


def journal(out: Path) -> list[dict[str, Any]]:
    path = out / ".largemerge" / "journal.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def parts(out: Path) -> list[str]:
    return [line["part"] for line in journal(out)]


def lasting(folder: Path) -> dict[str, bytes]:
    """The files of a merge but for the report, which has times in it."""
    return {name: content for name, content in files_in(folder).items() if name != "merge_report.json"}


def check_unbroken(case: Case, out: Path) -> None:
    assert lasting(out) == lasting(case.folder / "unbroken")
    report = json.loads((out / "merge_report.json").read_text())
    assert list(report["blocks"]) == PARTS[1:]
    load_merged(case, out)


def assert_agree(found: Path, expected: Path, tolerance: float = CLOSE) -> None:
    """The weights of two outputs are the same up to rounding."""
    left, right = weights_in(found), weights_in(expected)
    assert set(left) == set(right)
    for name, tensor in right.items():
        assert torch.linalg.vector_norm(left[name] - tensor) <= tolerance * torch.linalg.vector_norm(tensor), name


def check_two_ranks(case: Case, out: Path, device: str) -> None:
    """Two ranks merged the case into `out` on a kind of device, with the result of one process."""
    assert len(json.loads((out / "merge_report.json").read_text())["ranks"]) == 2
    largemerge.merge(case.config, case.folder / "alone", device=device)
    assert_agree(out, case.folder / "alone")
