"""Reads, merges and writes: one or two workers for every core, each at one tensor of the output at a time.

    worker: task → its pieces: read → (survey) → read again or from memory → merge → to their place in the shard
    main:   in order, waits for all tasks of a part, forces them onto the disk, notes the part in the journal

A worker holds a tensor of all models where that is small, else a few megabytes of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, overload

import torch

from largemerge.arithmetic.method import Way, way_of
from largemerge.arithmetic.pieces import Cut, Piece, rows_of_pieces
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.tasks import Task
from largemerge.arithmetic.turns import Turns, others_turn
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.writer import ShardWriter
from largemerge.devices import CPU
from largemerge.errors import MergeError
from largemerge.vocabulary.rows import TokenReader

if TYPE_CHECKING:
    from largemerge.arithmetic.accelerator import Accelerator

PART_BYTES = 256 << 20
"""Of the output, at least, between two lines of the journal."""
KEPT_BYTES = 96 << 20
"""Of a tensor of all models, at most, that is kept in memory between two readings, where there is memory enough."""
_PIECE_COPIES, _WIDEST = 4, 8  # a piece, its task vectors, what is made of them; in float64 or int64 at the widest


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


class PieceLoader:
    """The pieces of one task, on a device: kept in memory where they are read twice and small, else read again."""

    def __init__(
        self,
        task: Task,
        way: Way,
        readers: Mapping[str, TensorReader],
        seed: int,
        kept_bytes: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self._task, self._readers, self._seed, self._way, self._device = task, readers, seed, way, device
        self.cuts = rows_of_pieces(task.shape, way.cut)
        rows = task.token_rows
        self._tokens = TokenReader(rows, task.inputs, readers, task.dtype) if rows is not None else None
        self._kept = self._read_all(None) if _kept_bytes(task, way, kept_bytes) else None
        self._subtracted: set[int] = set()  # first rows of pieces of what is kept

    def pieces(self) -> Iterator[Piece]:
        """All of them, in order."""
        task = self._task
        num_rows = task.shape[0] if task.shape else 1
        row_elements = task.num_elements // max(1, num_rows)
        for number, rows in enumerate(self.cuts):
            tensors, base = self._tensors(rows)
            companions = [self._read(source, rows, torch.float32) for source in task.companions]
            first, key = rows.start * row_elements, f"{self._seed} {task.name} {number}"
            yield Piece(tensors, base, task.each, task.options, first, task.num_elements, key, companions)

    def _tensors(self, rows: slice) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
        """Of the models, and of the base."""
        task = self._task
        if self._way.one_by_one and self._tokens is None and self._kept is None:
            later = _Later([partial(self._read, source, rows) for source in task.sources])
            return later, self._read(task.base, rows) if task.base is not None else None
        if self._kept is None:
            tensors = self._read_all(rows)
        else:
            tensors = [tensor[rows] if len(self.cuts) > 1 else tensor for tensor in self._kept]
        base = tensors.pop() if task.base is not None else None
        if self._way.less_base and base is not None and rows.start not in self._subtracted:
            for tensor in tensors:
                tensor.sub_(base)
            if self._kept is not None:
                self._subtracted.add(rows.start)
        return tensors, base

    def _read_all(self, rows: slice | None) -> list[torch.Tensor]:
        if self._tokens is not None:
            with others_turn():
                return self._tokens.read(rows or slice(0, self._task.shape[0]))
        return [self._read(source, rows) for source in self._task.inputs]

    def _read(self, source: tuple[str, str], rows: slice | None, dtype: torch.dtype | None = None) -> torch.Tensor:
        model, key = source
        whole = not self._task.shape or rows is None or rows == slice(0, self._task.shape[0])
        again = self._way.reads_again and rows is not None  # it is not kept
        with others_turn():
            tensor = self._readers[model].read(key, None if whole else rows, again=again)
        tensor = tensor.to(self._device).to(dtype or self._task.dtype)
        if self._task.inputs_first:
            return tensor.T
        return tensor if tensor.dim() else tensor.view(1)


class _Later(Sequence[torch.Tensor]):
    """Tensors that are read whenever they are asked for, and not kept."""

    def __init__(self, read: Sequence[Callable[[], torch.Tensor]]) -> None:
        self._read = read

    def __len__(self) -> int:
        return len(self._read)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        return _Later(self._read[index]) if isinstance(index, slice) else self._read[index]()


def cost(method: str, task: Task) -> int:
    """What a task costs beside others: elements, times the smaller side where matrices are factored."""
    return task.num_elements * (min(task.shape) if is_factored(method, task) else 1)


def is_factored(method: str, task: Task) -> bool:
    """Whether it is a matrix, and the method one of matrices."""
    return METHODS[method].matrices is not None and task.is_matrix


def worker_bytes(method: str, task: Task, kept_bytes: int) -> int:
    """What a worker holds at most while it is at a task; `kept_bytes` as for the `Merger`."""
    if task.copied:
        return task.num_elements * task.dtype.itemsize
    row = METHODS[method]
    if row.matrices is not None and task.is_matrix:
        rows, columns = reversed(task.shape) if task.inputs_first else task.shape
        kept = _kept_bytes(task, row.way(task.options), kept_bytes)
        return kept + 2 * task.num_elements * task.dtype.itemsize + row.matrices.work_bytes(rows, columns)
    way = Way(Cut.ELEMENTS) if task.otherwise else row.way(task.options)
    num_rows = task.shape[0] if task.shape else 1
    rows = max((rows.stop - rows.start for rows in rows_of_pieces(task.shape, way.cut)), default=0)
    elements = rows * task.num_elements // max(1, num_rows)
    num_inputs = len(task.inputs) + len(task.companions)
    return _kept_bytes(task, way, kept_bytes) + _PIECE_COPIES * elements * num_inputs * _WIDEST


def _kept_bytes(task: Task, way: Way, most: int) -> int:
    """Of a task's tensors, where they are read more than once and small enough to be kept; else 0."""
    num_bytes = task.num_elements * task.dtype.itemsize * len(task.inputs)
    return num_bytes if way.reads_again and num_bytes <= most else 0
