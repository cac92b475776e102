"""Reads, merges and writes: one or two workers for every core, each at one tensor of the output at a time.

    worker: task → its pieces: read → (survey) → read again or from memory → merge → to their place in the shard
    main:   in order, waits for all tasks of a part, forces them onto the disk, notes the part in the journal

A worker holds a tensor of all models where that is small, else a few megabytes of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from largemerge.arithmetic.loading import PieceLoader, is_factored
from largemerge.arithmetic.method import way_of
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.tasks import Task
from largemerge.arithmetic.turns import Turns, others_turn
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.writer import ShardWriter
from largemerge.devices import CPU
from largemerge.errors import MergeError

if TYPE_CHECKING:
    from largemerge.arithmetic.accelerator import Accelerator

PART_BYTES = 256 << 20
"""Of the output, at least, between two lines of the journal."""


def parts(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks that are noted as finished together, the largest first: at the end no worker is at a large one alone."""
    found: list[list[Task]] = [[]]
    filled = 0
    for task in sorted(tasks, key=lambda task: -task.num_elements):
        if filled >= PART_BYTES:
            found.append([])
            filled = 0
        found[-1].append(task)
        filled += task.num_elements * task.out_dtype.itemsize
    return [part for part in found if part]


def run_parts(
    unfinished: Sequence[Sequence[Task]],
    work: Callable[[Task], None],
    done: Callable[[int], None],
    *,
    num_workers: int,
) -> None:
    """Does all tasks; `done` is called with the number of each part, in order, when all of its tasks are done."""
    turns = Turns(torch.get_num_threads())

    def in_turn(task: Task) -> None:
        with turns.taken():
            work(task)

    with one_thread_each(), ThreadPoolExecutor(num_workers, thread_name_prefix="largemerge-merge") as pool:
        futures: list[list[Future[None]]] = [[pool.submit(in_turn, task) for task in part] for part in unfinished]
        try:
            for number, part in enumerate(futures):
                for future in part:
                    future.result()
                done(number)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Meanwhile every worker computes alone: pieces are small, and there are workers enough."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Merger:
    """Merges single tasks.

    Args:
        method: Name in the table.
        seed: Of random methods.
        readers: By model.
        writer: Of the output.
        kept_bytes: Of a tensor of all models, at most, that is kept in memory.
        accelerator: What computes matrices.
    """

    def __init__(
        self,
        method: str,
        seed: int,
        readers: Mapping[str, TensorReader],
        writer: ShardWriter,
        kept_bytes: int,
        accelerator: Accelerator,
    ) -> None:
        self._name, self._method, self._seed = method, METHODS[method], seed
        self._readers, self._writer, self._kept_bytes = readers, writer, kept_bytes
        self._accelerator = accelerator

    def __call__(self, task: Task) -> None:
        """Reads, merges and writes one tensor."""
        if task.copied:
            ((model, key),) = task.sources
            with others_turn():
                self._writer.write(task.name, self._readers[model].read(key).to(task.out_dtype))
            return
        way, begin = way_of(self._method, task.options, other=bool(task.otherwise))
        device = self._accelerator.device_of(self._name, task)
        load = PieceLoader(task, way, self._readers, self._seed, self._kept_bytes, device)
        with told_as_merge_error(task, self._name), self._accelerator.stream():
            merge = begin(way.survey(load.pieces) if way.survey is not None else None)
            for rows, piece in zip(load.cuts, load.pieces(), strict=True):
                write_piece(self._writer, task, rows, merge(piece), task.out_dtype)


@contextmanager
def told_as_merge_error(task: Task, method: str) -> Iterator[None]:
    """For the arithmetic of one task.

    Raises:
        MergeError: With the tensor's name, for a `FloatingPointError`, or where a GPU has no memory left.
    """
    try:
        with torch.inference_mode():
            yield
    except FloatingPointError as error:
        raise MergeError(f"{task.name}: {method}: {error}") from None
    except torch.OutOfMemoryError as error:
        raise MergeError(
            f"{task.name}: {method}: {str(error).splitlines()[0]} What is finished is safe: go on with --resume when "
            "the GPU is free, or with a lower --memory-device, which lets fewer work side by side"
        ) from None


def write_piece(writer: ShardWriter, task: Task, rows: slice, merged: torch.Tensor, dtype: torch.dtype) -> None:
    """Writes rows of a tensor as it is stored, from a piece as the method sees it."""
    merged = (merged.T if task.inputs_first else merged).to(dtype).to(CPU)
    shape = (rows.stop - rows.start, *task.shape[1:]) if task.shape else ()
    with others_turn():
        writer.write(task.name, merged.reshape(shape), first_row=rows.start)


def cost(method: str, task: Task) -> int:
    """What a task costs beside others: elements, times the smaller side where matrices are factored."""
    return task.num_elements * (min(task.shape) if is_factored(method, task) else 1)
