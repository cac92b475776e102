"""The ranks of a merge: processes that share it, and the small collectives by which they agree.

torchrun, `accelerate launch` and `deepspeed` start the same command many times and tell each process its number.
Without them there is one rank, every call here returns at once, and the merge is the same code.

All ranks must call what is marked as collective, in the same order.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch

from largemerge.devices import choose_device
from largemerge.distributed.launcher import Launch, beat_limit, read_launch, start_limit, started_by_mpi
from largemerge.distributed.watchdog import GO_ON, Heartbeat, StallWatch, deadline, join_store, open_store
from largemerge.errors import LargemergeError, MergeError, RankAborted, explain_failures

Value = TypeVar("Value")

_TIMEOUT = timedelta(minutes=30)  # of one collective call: ranks wait there for the slowest
_POLL_SECONDS, _MAX_POLL_SECONDS = 0.02, 0.5
_SILENT_SECONDS = 3.0
_MAX_SHOWN = 8
_distributed: Any = torch.distributed  # much of it carries no types


@dataclass
class Ranks:
    """The ranks of one merge.

    Attributes:
        rank: Number of this process, from 0. Only rank 0 writes.
        size: Number of ranks.
        local_rank: Number of this process among the ranks of its machine, from 0.
        local_size: Number of ranks on this machine.
        num_bytes: Size of the tensors that this rank has moved in collectives so far, in bytes.
        seconds: Time that this rank has spent in collectives so far, waiting included.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    num_bytes: int = field(init=False, default=0)
    seconds: float = field(init=False, default=0.0)
    _heartbeat: Heartbeat | None = field(init=False, default=None)
    _watch: StallWatch | None = field(init=False, default=None)
    _failure_is_known: bool = field(init=False, default=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the output and shows progress."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Gathers a small value of every rank, in the order of ranks (collective)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.blocked(), self.timed():
            torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: Value) -> Value:
        """Broadcasts a small value of rank 0 (collective)."""
        if self.size == 1:
            return value
        values = [value]
        with self.blocked(), self.timed():
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def tensors_from_first(
        self, load: Callable[[], Mapping[str, torch.Tensor]], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Broadcasts tensors that only rank 0 can load (collective).

        Args:
            load: Loads them; called on rank 0 alone.
            device: Device of the result on all ranks, unless there is only one.
        """
        if self.size == 1:
            return dict(load())
        loaded = {name: tensor.to(device).contiguous() for name, tensor in load().items()} if self.is_first else {}
        layout = self.from_first([(name, tensor.shape, tensor.dtype) for name, tensor in loaded.items()])
        for name, shape, dtype in layout:
            tensor = loaded[name] if self.is_first else torch.empty(shape, dtype=dtype, device=device)
            with self.blocked(), self.timed(tensor.nbytes):
                torch.distributed.broadcast(tensor, src=0)
            loaded[name] = tensor
        return loaded

    def add_up_(self, tensor: torch.Tensor) -> None:
        """Adds up a tensor of the CPU over all ranks, in place (collective)."""
        if self.size > 1:
            with self.blocked(), self.timed(tensor.nbytes):
                torch.distributed.all_reduce(tensor)

    def agree(self, step: Callable[[], Value]) -> Value:
        """Runs `step` on every rank; if it fails on one, it fails on all (collective).

        Raises:
            LargemergeError: On rank 0, with the problems of all ranks; on the others it is a `RankAborted`.
        """
        if self.size == 1:
            return step()
        result: Value | None = None
        problems: tuple[str, ...] = ()
        try:
            with explain_failures():
                result = step()
        except LargemergeError as error:
            problems = error.problems
        gathered = self.gather(problems)
        if not any(gathered):
            return result  # type: ignore[return-value]
        self._failure_is_known = True
        if not self.is_first:
            raise RankAborted(*gathered[self.rank])
        raise LargemergeError(*join_problems(gathered))

    def by_first(self, step: Callable[[], Value]) -> Value:
        """Runs `step` on rank 0 alone, however long it takes; what it returns, or that it fails, holds for all.

        The others do not wait in a collective call, which would end them after `_TIMEOUT`. It is itself collective.

        Raises:
            LargemergeError: As `agree` does.
        """
        if self.size == 1:
            return step()
        store = _distributed.distributed_c10d._get_default_store()
        ended = self.from_first(f"largemerge-ended-{uuid.uuid4().hex}")

        def alone() -> Value | None:
            if self.is_first:
                try:
                    return step()
                finally:
                    store.set(ended, "")
            pause = _POLL_SECONDS
            with self.blocked(), self.timed():
                while not store.check([ended]):
                    time.sleep(pause)
                    pause = min(2 * pause, _MAX_POLL_SECONDS)
            return None

        return self.from_first(self.agree(alone))  # type: ignore[return-value]

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Marks a time in which this rank has work to do, so that the watchdog notices if it hangs."""
        with self._watch.busy() if self._watch is not None else nullcontext():
            yield

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Marks a time in which this rank waits for another one or for the disk, and does not hang."""
        with self._watch.blocked() if self._watch is not None else nullcontext():
            yield

    @contextmanager
    def timed(self, num_bytes: int = 0) -> Iterator[None]:
        """Counts bytes and seconds of the collectives inside, and explains a broken connection.

        Raises:
            MergeError: If another rank is gone; a `RankAborted` where rank 0 says so.
        """
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            if self._heartbeat is None:
                told = f"{_others(self.rank, self.size)} has gone before the merge began: {_reason(error)}"
                raise MergeError(f"rank {self.rank}: {told}") from error
            with self.blocked():
                why = self._heartbeat.why_gone()
            self._failure_is_known = True
            kind = MergeError if self.is_first or "rank 0" in why else RankAborted
            raise kind(f"{why}; {GO_ON}") from None
        self.seconds += time.perf_counter() - start
        self.num_bytes += num_bytes

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Runs the watchdog meanwhile: a rank that dies, hangs or fails ends all of them (collective)."""
        if self.size == 1:
            yield
            return
        limit = start_limit()
        late = f"{_others(self.rank, self.size)} has not answered within {limit:.0f} s: it was stopped, or is cut off"
        with deadline(limit, lambda: f"rank {self.rank}: {late}; {GO_ON}"):
            heartbeat = self._start_heartbeat()
        self._heartbeat = heartbeat
        try:
            yield
        except BaseException as error:
            heartbeat.stop(None if self._failure_is_known else _reason(error))
            raise
        heartbeat.stop()

    def before_end(self, clean_up: Callable[[], None]) -> None:
        """Has something called before the watchdog ends this process, which unwinds nothing."""
        if self._heartbeat is not None:
            self._heartbeat.before_end(clean_up)

    def _start_heartbeat(self) -> Heartbeat:
        """Starts the watchdog (collective)."""
        port, problem, store = 0, "", None
        try:
            store = open_store() if self.is_first else None
            port = store.port if store is not None else 0
        except (RuntimeError, ValueError) as error:
            problem = _reason(error)
        port, problem = self.from_first((port, problem))
        try:
            store = store if self.is_first or problem else join_store(port)
        except (RuntimeError, ValueError) as error:
            problem = f"{_reason(error)} (rank 0 listens at port {port} of {os.environ.get('MASTER_ADDR')})"
        problems = [(text,) if text else () for text in self.gather(problem)]
        if any(problems):
            self._failure_is_known = True
            told = [f"the watchdog cannot reach all ranks: {text}" for text in join_problems(problems)]
            raise (LargemergeError if self.is_first else RankAborted)(*told)
        self._watch = StallWatch()
        heartbeat = Heartbeat(store, self.rank, self.size, self._watch)
        self.gather(None)  # now all ranks have made their heartbeats
        heartbeat.start()
        return heartbeat


def _others(rank: int, size: int) -> str:
    """Words for the rank that is gone, as far as this one can know."""
    if size == 2:
        return f"rank {1 - rank}"
    return f"one of ranks 1 to {size - 1}" if rank == 0 else f"rank 0, or another one of {size},"


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return (str(error) or type(error).__name__).splitlines()[0]


def join_problems(problems: Sequence[tuple[str, ...]]) -> list[str]:
    """Joins the problems of all ranks; those that not all have get the numbers of their ranks."""
    ranks: dict[str, list[str]] = {}
    for rank, own in enumerate(problems):
        for problem in own:
            ranks.setdefault(problem, []).append(str(rank))
    return [
        problem if len(numbers) == len(problems) else f"rank {', '.join(numbers)}: {problem}"
        for problem, numbers in ranks.items()
    ]


@contextmanager
def start_ranks(*, on_gpus: bool = False) -> Iterator[Ranks]:
    """Joins the process group that the launcher's environment describes, and leaves it in the end.

    Args:
        on_gpus: Whether ranks exchange tensors on GPUs, where every rank of a machine has one.
    """
    if torch.distributed.is_initialized():
        launch, ours = _launch_of_group(), False
    else:
        launch, ours = read_launch(), True
        if launch.size == 1:
            yield Ranks()
            return
        _initialize(launch, on_gpus=on_gpus)
    ranks = Ranks(launch.rank, launch.size, launch.local_rank, launch.local_size)
    try:
        with ranks.watched():
            yield ranks
    finally:
        # After an error the others may wait for this rank: ending the process is what tells them.
        if ours and sys.exc_info()[0] is None:
            _leave()


@contextmanager
def stay_together() -> Iterator[None]:
    """Keeps the process group open across several merges."""
    launch = Launch() if torch.distributed.is_initialized() else read_launch()
    if launch.size > 1:
        _initialize(launch, on_gpus=False)
    yield
    if launch.size > 1:  # after an error the end of the process is what tells the others
        _leave()


def fail_together(error: LargemergeError, *, on_gpus: bool = False) -> None:
    """Tells all ranks, which are about to start, that this one has failed before (collective).

    Args:
        error: What is wrong.
        on_gpus: As for `start_ranks`.

    Raises:
        LargemergeError: On rank 0, with the problems of all ranks; on the others it is a `RankAborted`.
    """

    def fail() -> None:
        raise error

    with start_ranks(on_gpus=on_gpus) as ranks:
        ranks.agree(fail)


def _launch_of_group() -> Launch:
    """The place of this process in a group that the program which imports us has made."""
    distributed: Any = torch.distributed
    rank, size = distributed.get_rank(), distributed.get_world_size()
    try:
        launch = read_launch()
    except LargemergeError:
        launch = Launch()
    local = (launch.local_rank, launch.local_size) if (launch.rank, launch.size) == (rank, size) else (rank, size)
    return Launch(rank, size, *local)


def _initialize(launch: Launch, *, on_gpus: bool) -> None:
    """Opens the process group: by Accelerate where that has started us by MPI, which it knows, else by torch.

    DeepSpeed's own `init_distributed` would, on CPUs, compile collectives that a merge never calls (a minute, and a
    compiler), and leave their buffers in shared memory (66 MiB a rank).

    Raises:
        LargemergeError: If this rank cannot meet the others.
    """
    on_gpus = on_gpus and torch.cuda.is_available() and launch.local_size <= torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    meeting = _Meeting(launch)
    with deadline(start_limit(), meeting.why_late):
        try:
            if started_by_mpi():
                from accelerate import PartialState

                PartialState(cpu=not on_gpus, backend=backend, timeout=_TIMEOUT)
                return
            store = meeting.join()
            torch.distributed.init_process_group(
                backend, store=store, rank=launch.rank, world_size=launch.size, timeout=_TIMEOUT
            )
            store.set_timeout(_TIMEOUT)
        except (RuntimeError, ValueError, OSError) as error:
            gone = _others(launch.rank, launch.size)
            raise LargemergeError(f"rank {launch.rank}: {gone} cannot be reached: {_reason(error)}") from error


class _Meeting:
    """The ranks of a merge as they come, at the store that the launcher's environment names."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._missing = set(range(launch.size))
        self._answered = time.monotonic()
        self._host, self._port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")

    def join(self) -> Any:
        """Joins the store, on rank 0 opens it, and waits until all ranks have.

        Raises:
            LargemergeError: If the port is in use.
        """
        launch, distributed = self._launch, _distributed
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # which keeps the store itself
        keeps_store = launch.rank == 0 and not of_torchrun
        if keeps_store:
            self._check_port()
        # As `rendezvous` does, which would wait here for all ranks, without saying for which.
        store = distributed.TCPStore(
            self._host, int(self._port), launch.size, keeps_store, _TIMEOUT, wait_for_workers=False, multi_tenant=True
        )
        if of_torchrun:
            store = distributed.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set(f"largemerge-{launch.rank}", "here")
        while self._missing:
            self._missing -= {rank for rank in self._missing if store.check([f"largemerge-{rank}"])}
            self._answered = time.monotonic()
            time.sleep(_POLL_SECONDS)
        return distributed.PrefixStore("largemerge", store)

    def why_late(self) -> str:
        """Says which ranks have not come in time."""
        limit = f"within {start_limit():.0f} s"
        rank = f"rank {self._launch.rank}: "
        if self._launch.rank and time.monotonic() - self._answered > _SILENT_SECONDS:
            return f"{rank}rank 0 has not answered at {self._host}, port {self._port} {limit}: start it, or look there"
        missing = sorted(self._missing - {self._launch.rank})
        if not missing:
            return f"{rank}the process group has not come about {limit}: another rank was stopped, or is cut off"
        shown = ", ".join(map(str, missing[:_MAX_SHOWN])) + (", …" if len(missing) > _MAX_SHOWN else "")
        who = f"ranks {shown} have" if len(missing) > 1 else f"rank {shown} has"
        return (
            f"{rank}{who} not come {limit}, of {self._launch.size}; "
            "start all of them, or set LARGEMERGE_RANK_TIMEOUT to more seconds"
        )

    def _check_port(self) -> None:
        """Checks that rank 0 can listen, before torch's store tells it in many lines."""
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", int(self._port)))
                probe.listen()
        except OSError as error:
            raise LargemergeError(
                f"MASTER_PORT={self._port}: rank 0 cannot listen there: {error.strerror}; choose a free port "
                "(torchrun --standalone finds one)"
            ) from None


def _leave() -> None:
    """Leaves the process group; everything is finished, and a rank that is gone now does not matter."""
    with deadline(beat_limit(), str, code=0):
        _distributed.destroy_process_group()


def too_many_threads(ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Yields a warning if the processes of one machine compute with more threads than it has cores."""
    threads, cores = torch.get_num_threads(), _num_cores()
    if device.type == "cpu" and ranks.local_size > 1 and ranks.local_size * threads > cores:
        yield (
            f"{ranks.local_size} ranks of {threads} threads each share {cores} cores, and slow each other down: "
            f"OMP_NUM_THREADS={max(1, cores // ranks.local_size)} would give each its part"
        )


def _num_cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of_rank(device: str, ranks: Ranks, *, shared: bool = False) -> torch.device:
    """Chooses this rank's device: a GPU of its own, where there are any.

    Args:
        device: The device that the user asks for.
        ranks: The ranks of the merge.
        shared: Whether ranks may share a GPU, as those that exchange no tensors may.

    Raises:
        LargemergeError: If torch cannot use the device, or ranks would share a GPU, which their collectives (NCCL)
            refuse.
    """
    count = torch.cuda.device_count()
    any_gpu = device in ("auto", "cuda") and count > 0
    own = any_gpu and ranks.size > 1
    chosen = torch.device("cuda", ranks.local_rank % count) if own else choose_device(device)
    if chosen.type != "cuda":
        return chosen
    gpus = count if any_gpu else 1
    if not shared and ranks.local_size > gpus:
        raise LargemergeError(
            f"--device {device}: {ranks.local_size} ranks of this machine would share {gpus} GPU{'s' * (gpus > 1)}; "
            "expected one rank for each GPU, or --device cpu"
        )
    if chosen.index is not None:
        torch.cuda.set_device(chosen)
    return chosen
