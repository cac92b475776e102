"""The ranks of a merge: processes that share it, and the small collectives by which they agree.

torchrun, `accelerate launch` and `deepspeed` start the same command many times and tell each process its number.
Without them there is one rank, every call here returns at once, and the merge is the same code.

All ranks must call what is marked as collective, in the same order.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch

from largemerge.devices import choose_device
from largemerge.distributed.watchdog import Heartbeat, StallWatch, join_store, open_store
from largemerge.errors import LargemergeError, MergeError, RankAborted

Value = TypeVar("Value")

_TIMEOUT = timedelta(minutes=30)  # of one collective call: ranks wait there for the slowest


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
        except RuntimeError:
            if self._heartbeat is None:
                raise
            with self.blocked():
                why = self._heartbeat.why_gone()
            self._failure_is_known = True
            kind = MergeError if self.is_first or "rank 0" in why else RankAborted
            raise kind(f"{why}; what is finished is safe: go on with --resume") from None
        self.seconds += time.perf_counter() - start
        self.num_bytes += num_bytes

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Runs the watchdog meanwhile: a rank that dies, hangs or fails ends all of them (collective)."""
        if self.size == 1:
            yield
            return
        store = open_store() if self.is_first else None
        port = self.from_first(store.port if store is not None else 0)
        self._watch = StallWatch()
        heartbeat = Heartbeat(store or join_store(port), self.rank, self.size, self._watch)
        self.gather(None)  # now all ranks have made their heartbeats
        heartbeat.start()
        self._heartbeat = heartbeat
        try:
            yield
        except BaseException as error:
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            heartbeat.stop(None if self._failure_is_known else first_line)
            raise
        heartbeat.stop()


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
    size = world_size()
    if size == 1 and not torch.distributed.is_initialized():
        yield Ranks()
        return
    ours = not torch.distributed.is_initialized()
    if ours:
        _initialize(on_gpus=on_gpus)
    ranks = Ranks(
        rank=torch.distributed.get_rank(),
        size=torch.distributed.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=_local_size(),
    )
    try:
        with ranks.watched():
            yield ranks
    finally:
        # After an error the others may wait for this rank: ending the process is what tells them.
        if ours and sys.exc_info()[0] is None:
            torch.distributed.destroy_process_group()


@contextmanager
def stay_together() -> Iterator[None]:
    """Keeps the process group open across several merges."""
    ours = world_size() > 1 and not torch.distributed.is_initialized()
    if ours:
        _initialize(on_gpus=False)
    yield
    if ours:  # after an error the end of the process is what tells the others
        torch.distributed.destroy_process_group()


def world_size() -> int:
    """Number of processes that the launcher has started; under Accelerate that may be MPI, with names of its own."""
    if not _started_by_accelerate():
        return int(os.environ.get("WORLD_SIZE", "1"))
    from accelerate.utils import get_cpu_distributed_information

    return int(get_cpu_distributed_information().world_size)


def _started_by_accelerate() -> bool:
    return any(name.startswith("ACCELERATE_") for name in os.environ)


def _local_size() -> int:
    """Number of processes on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def _initialize(*, on_gpus: bool) -> None:
    """Opens the process group: by Accelerate where that has started us (it knows MPI, too), else by torch.

    DeepSpeed's own `init_distributed` would, on CPUs, compile collectives that a merge never calls (a minute, and a
    compiler), and leave their buffers in shared memory (66 MiB a rank).
    """
    on_gpus = on_gpus and torch.cuda.is_available() and _local_size() <= torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    if _started_by_accelerate():
        from accelerate import PartialState

        PartialState(cpu=not on_gpus, backend=backend, timeout=_TIMEOUT)
    else:
        torch.distributed.init_process_group(backend, timeout=_TIMEOUT)


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
