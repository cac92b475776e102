"""Reads, merges and writes: one worker for every core, each at one tensor of the output at a time.

    worker: task → its pieces: read → (survey) → read again or from memory → merge → to their place in the shard
    main:   in order, waits for all tasks of a part, forces them onto the disk, notes the part in the journal

A worker holds a tensor of all models where that is small, else a few megabytes of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from largemerge.arithmetic.layout import Task
from largemerge.arithmetic.pieces import Piece, rows_of_pieces
from largemerge.arithmetic.registry import METHODS, Way
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.writer import ShardWriter
from largemerge.errors import MergeError
from largemerge.vocabulary.rows import TokenReader

PART_BYTES = 256 << 20
"""Of the output, at least, between two lines of the journal."""
KEPT_BYTES = 96 << 20
"""Of a tensor of all models, at most, that is kept in memory between two readings."""
_PIECE_COPIES, _WIDEST = 4, 8  # a piece, its task vectors, what is made of them; in float64 or int64 at the widest


def parts(tasks: Sequence[Task]) -> list[list[Task]]:
    """Neighbouring tasks that are noted as finished together."""
    found: list[list[Task]] = [[]]
    filled = 0
    for task in tasks:
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
    with one_thread_each(), ThreadPoolExecutor(num_workers, thread_name_prefix="largemerge-merge") as pool:
        futures: list[list[Future[None]]] = [[pool.submit(work, task) for task in part] for part in unfinished]
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
    """

    def __init__(self, method: str, seed: int, readers: Mapping[str, TensorReader], writer: ShardWriter) -> None:
        self._name, self._method, self._seed = method, METHODS[method], seed
        self._readers, self._writer = readers, writer

    def __call__(self, task: Task) -> None:
        """Reads, merges and writes one tensor."""
        if task.copied:
            ((model, key),) = task.sources
            self._writer.write(task.name, self._readers[model].read(key).to(task.out_dtype))
            return
        way = self._method.way(task.options)
        load = _Loader(task, way, self._readers, self._seed)
        try:
            with torch.inference_mode():
                merge = self._method.begin(way.survey(load.pieces) if way.survey is not None else None)
                for rows, piece in zip(load.cuts, load.pieces(), strict=True):
                    merged = merge(piece).to(task.out_dtype)
                    shape = (rows.stop - rows.start, *task.shape[1:]) if task.shape else ()
                    self._writer.write(task.name, merged.reshape(shape), first_row=rows.start)
        except FloatingPointError as error:
            raise MergeError(f"{task.name}: {self._name}: {error}") from None


class _Loader:
    """The pieces of one task: kept in memory where they are read more than once and small, else read again."""

    def __init__(self, task: Task, way: Way, readers: Mapping[str, TensorReader], seed: int) -> None:
        self._task, self._readers, self._seed = task, readers, seed
        self.cuts = rows_of_pieces(task.shape, way.cut)
        rows = task.token_rows
        self._tokens = TokenReader(rows, task.inputs, readers, task.dtype) if rows is not None else None
        self._kept = self._read_all(None) if _kept_bytes(task, way) else None

    def pieces(self) -> Iterator[Piece]:
        """All of them, in order."""
        task = self._task
        num_rows = task.shape[0] if task.shape else 1
        row_elements = task.num_elements // max(1, num_rows)
        for number, rows in enumerate(self.cuts):
            tensors = self._tensors(rows)
            base = tensors.pop() if task.base is not None else None
            key = f"{self._seed} {task.name} {number}"
            yield Piece(tensors, base, task.each, task.options, rows.start * row_elements, task.num_elements, key)

    def _tensors(self, rows: slice) -> list[torch.Tensor]:
        if self._kept is not None:
            return [tensor[rows] for tensor in self._kept]
        return self._read_all(rows)

    def _read_all(self, rows: slice | None) -> list[torch.Tensor]:
        if self._tokens is not None:
            return self._tokens.read(rows or slice(0, self._task.shape[0]))
        return [self._read(*source, rows) for source in self._task.inputs]

    def _read(self, model: str, key: str, rows: slice | None) -> torch.Tensor:
        reader = self._readers[model]
        whole = not self._task.shape or rows is None or rows == slice(0, self._task.shape[0])
        tensor = reader.read(key, None if whole else rows).to(self._task.dtype)
        return tensor if tensor.dim() else tensor.view(1)


def worker_bytes(method: str, task: Task) -> int:
    """What a worker holds at most while it is at a task."""
    if task.copied:
        return task.num_elements * task.dtype.itemsize
    way = METHODS[method].way(task.options)
    num_rows = task.shape[0] if task.shape else 1
    rows = max((rows.stop - rows.start for rows in rows_of_pieces(task.shape, way.cut)), default=0)
    elements = rows * task.num_elements // max(1, num_rows)
    return _kept_bytes(task, way) + _PIECE_COPIES * elements * len(task.inputs) * _WIDEST


def _kept_bytes(task: Task, way: Way) -> int:
    """Of a task's tensors, where they are read more than once and small enough to be kept; else 0."""
    num_bytes = task.num_elements * task.dtype.itemsize * len(task.inputs)
    return num_bytes if way.survey is not None and num_bytes <= KEPT_BYTES else 0
