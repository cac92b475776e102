"""As many workers compute at once as there are cores; the others wait for the disk, or for their turn.

More that compute would only take the cores' caches from each other.

The pieces of one tensor of all models: how they come from the disk, and what is held of them.

    span of some pieces, of all models: read → its pieces, one after the other → the next span

A tensor that is wanted twice is one span where it is small, and stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, overload

import torch

from largemerge.checkpoint.reader import TensorReader
from largemerge.data_free.methods.base import Cut, Piece, Way, rows_of_pieces
from largemerge.data_free.methods.table import METHODS
from largemerge.data_free.tasks import Task
from largemerge.devices import CPU
from largemerge.tokenizer.embedding_rows import TokenReader

if TYPE_CHECKING:
    pass

_worker = threading.local()


class Turns:
    """So many workers at once may compute."""

    def __init__(self, number: int) -> None:
        self._free = threading.Semaphore(number)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Meanwhile this thread has a turn."""
        self._free.acquire()
        _worker.turn = self._free
        try:
            yield
        finally:
            _worker.turn = None
            self._free.release()


@contextmanager
def others_turn() -> Iterator[None]:
    """Meanwhile this thread waits for the disk, and another may compute, if this one had a turn."""
    turn: threading.Semaphore | None = getattr(_worker, "turn", None)
    if turn is None:
        yield
        return
    turn.release()
    try:
        yield
    finally:
        turn.acquire()


KEPT_BYTES = 96 << 20
"""Of a tensor of all models, at most, that is kept in memory between two readings, where there is memory enough."""
_SPAN_BYTES = 8 << 20  # of one model: a disk is faster the more it is asked for at once
_SPANS_BYTES = 32 << 20  # of all models
_PIECE_COPIES, _WIDEST = 4, 8  # a piece, its task vectors, what is made of them; in float64 or int64 at the widest


class PieceLoader:
    """The pieces of one task, on a device: kept in memory where they are wanted twice and small, else read again."""

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
        self._keeps = bool(_kept_bytes(task, way, kept_bytes))
        self._spans = spans(task, self.cuts, whole=self._keeps)
        self._span, self._held = slice(0, 0), list[torch.Tensor]()
        self._subtracted: set[int] = set()  # first rows of pieces of what is held

    def pieces(self) -> Iterator[Piece]:
        """All of them, in order."""
        task = self._task
        row_elements = task.num_elements // max(1, _num_rows(task))
        for number, rows in enumerate(self.cuts):
            tensors, base = self._tensors(rows)
            companions = [self._read(source, rows, torch.float32) for source in task.companions]
            first, key = rows.start * row_elements, f"{self._seed} {task.name} {number}"
            yield Piece(tensors, base, task.each, task.options, first, task.num_elements, key, companions)

    def _tensors(self, rows: slice) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
        """Of the models, and of the base."""
        task = self._task
        if self._way.one_by_one and self._tokens is None and not self._keeps:
            later = _Later([partial(self._read, source, rows) for source in task.sources])
            return later, self._read(task.base, rows) if task.base is not None else None
        if not self._span.start <= rows.start < self._span.stop:
            self._hold(next(span for span in self._spans if span.start <= rows.start < span.stop))
        first = self._span.start
        alone = rows == self._span
        tensors = [tensor if alone else tensor[rows.start - first : rows.stop - first] for tensor in self._held]
        base = tensors.pop() if task.base is not None else None
        if self._way.less_base and base is not None and rows.start not in self._subtracted:
            for tensor in tensors:
                tensor.sub_(base)
            self._subtracted.add(rows.start)
        return tensors, base

    def _hold(self, span: slice) -> None:
        """Reads some rows of all models in the place of those that were held."""
        self._held.clear()
        self._subtracted.clear()
        if self._tokens is not None:
            with others_turn():
                self._held = self._tokens.read(span)
        else:
            self._held = [self._read(source, span) for source in self._task.inputs]
        self._span = span

    def _read(self, source: tuple[str, str], rows: slice, dtype: torch.dtype | None = None) -> torch.Tensor:
        model, key = source
        whole = not self._task.shape or rows == slice(0, self._task.shape[0])
        again = self._way.reads_again and not (whole and self._keeps)
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


def is_factored(method: str, task: Task) -> bool:
    """Whether it is a matrix, and the method one of matrices."""
    return METHODS[method].matrices is not None and task.is_matrix


def spans(task: Task, cuts: Sequence[slice], *, whole: bool) -> list[slice]:
    """Rows that are read at once: those of one piece or of some, or all of them."""
    row_bytes = task.num_elements * task.dtype.itemsize // max(1, _num_rows(task))
    most = min(_SPAN_BYTES, _SPANS_BYTES // max(1, len(task.inputs)))
    found: list[slice] = []
    for rows in cuts:
        if found and (whole or (rows.stop - found[-1].start) * row_bytes <= most):
            found[-1] = slice(found[-1].start, rows.stop)
        else:
            found.append(rows)
    return found


def worker_bytes(method: str, task: Task, kept_bytes: int) -> int:
    """What a worker holds at most while it is at a task; `kept_bytes` as for the `PieceLoader`."""
    row = METHODS[method]
    held = read_bytes(method, task, kept_bytes)
    if task.copied:
        return held
    if row.matrices is not None and task.is_matrix:
        rows, columns = reversed(task.shape) if task.inputs_first else task.shape
        kept = _kept_bytes(task, row.way(task.options), kept_bytes)
        return kept + 2 * task.num_elements * task.dtype.itemsize + row.matrices.work_bytes(rows, columns)
    way = _way(method, task)
    piece = _most_elements(task, rows_of_pieces(task.shape, way.cut)) * (len(task.inputs) + len(task.companions))
    return held + _PIECE_COPIES * piece * _WIDEST


def read_bytes(method: str, task: Task, kept_bytes: int) -> int:
    """Of it, the tensors that it reads, as many as it holds at a time."""
    tensor = task.num_elements * task.dtype.itemsize
    if task.copied:
        return tensor
    way = _way(method, task)
    kept = _kept_bytes(task, way, kept_bytes)
    if kept or is_factored(method, task):
        return kept or 2 * tensor
    span = _most_elements(task, spans(task, rows_of_pieces(task.shape, way.cut), whole=False))
    # The next one is read while the last piece of the one before is still in use.
    return min(2 * span, task.num_elements) * task.dtype.itemsize * len(task.inputs)


def _way(method: str, task: Task) -> Way:
    return Way(Cut.ELEMENTS) if task.otherwise else METHODS[method].way(task.options)


def _kept_bytes(task: Task, way: Way, most: int) -> int:
    """Of a task's tensors, where they are wanted more than once and small enough to be kept; else 0."""
    num_bytes = task.num_elements * task.dtype.itemsize * len(task.inputs)
    return num_bytes if way.reads_again and num_bytes <= most else 0


def _num_rows(task: Task) -> int:
    return task.shape[0] if task.shape else 1


def _most_elements(task: Task, parts: Sequence[slice]) -> int:
    """In the largest of some parts of a tensor's rows."""
    rows = max((part.stop - part.start for part in parts), default=0)
    return rows * task.num_elements // max(1, _num_rows(task))


def cost(method: str, task: Task) -> int:
    """What a task costs beside others: elements, times the smaller side where matrices are factored."""
    return task.num_elements * (min(task.shape) if is_factored(method, task) else 1)
