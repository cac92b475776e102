"""Loads the pieces of one tensor of all models, in turns with other workers.

    span: rows of some pieces, of all models → read → its pieces, one after the other → the next span

A disk is faster the more it is asked for at once, so a span is larger than a piece. A tensor that is read twice is one
span where it is small, and stays in memory; a large one is read again.

As many workers compute at once as there are cores (`ComputeSlots`): more would only take the cores' caches from each
other. The others wait for the disk, or for a slot.

The same rules say what a worker needs: `worker_bytes` and `read_bytes` of memory, `cost` of time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import overload

import torch

from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.writer import NotFiniteError, not_finite
from largemerge.data_free.methods.base import Access, Cut, Piece, rows_of_pieces
from largemerge.data_free.methods.post import post_bytes
from largemerge.data_free.methods.table import METHODS
from largemerge.data_free.tasks import Task
from largemerge.devices import CPU
from largemerge.tokenizer.embedding_rows import TokenReader

KEPT_BYTES = 96 << 20
"""The most bytes of a tensor of all models that are kept in memory between two passes, where there is memory enough."""
_SPAN_BYTES = 8 << 20  # of one model
_SPANS_BYTES = 32 << 20  # of all models
_PIECE_COPIES = 4  # of a piece while it is merged: itself, its task vectors, what is made of them
_FEW_ELEMENTS = 64 << 10  # that are read or written sooner than another thread takes over
_MAX_ITEM_BYTES = 8  # of an element in such a copy: float64 or int64 at the most

_worker = threading.local()  # the slot that this thread has


class ComputeSlots:
    """Limits how many workers compute at once.

    Args:
        number: The number of slots.
    """

    def __init__(self, number: int) -> None:
        self._free = threading.Semaphore(number)

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """Holds a slot for this thread while the block runs."""
        self._free.acquire()
        _worker.slot = self._free
        try:
            yield
        finally:
            _worker.slot = None
            self._free.release()


@contextmanager
def release_slot(num_elements: int) -> Iterator[None]:
    """Gives this thread's slot, if it has one, to others while the block waits for the disk; not for a few elements."""
    slot: threading.Semaphore | None = getattr(_worker, "slot", None)
    if slot is None or num_elements < _FEW_ELEMENTS:
        yield
        return
    slot.release()
    try:
        yield
    finally:
        slot.acquire()


class PieceLoader:
    """Loads the pieces of one task to a device; small tensors that are read twice are kept in memory.

    Args:
        task: The tensor of the output.
        access: The method's way to read the tensor.
        readers: A reader for every model, and for every path of auxiliary tensors.
        seed: Seed of random numbers.
        kept_bytes: The most bytes of all models' tensors that are kept between two passes.
        device: Device of the pieces.
        checked: Whether NaN and infinity are looked for in what is read, since the method might leave them out.
    """

    def __init__(
        self,
        task: Task,
        access: Access,
        readers: Mapping[str, TensorReader],
        seed: int,
        kept_bytes: int = 0,
        device: torch.device = CPU,
        *,
        checked: bool = False,
    ) -> None:
        self._task, self._readers, self._seed, self._access, self._device = task, readers, seed, access, device
        self._checked = checked
        self.cuts = rows_of_pieces(task.shape, access.cut)
        rows = task.token_rows
        self._tokens = TokenReader(rows, task.inputs, readers, task.dtype) if rows is not None else None
        self._keeps = bool(_kept_bytes(task, access, kept_bytes))
        self._spans = spans(task, self.cuts, whole=self._keeps)
        self._span, self._held = slice(0, 0), list[torch.Tensor]()
        self._subtracted: set[int] = set()  # first rows of the pieces in the span that are task vectors already

    def pieces(self) -> Iterator[Piece]:
        """Yields all pieces, in order; may be called again."""
        task = self._task
        for number, rows in enumerate(self.cuts):
            tensors, base = self._tensors(rows)
            auxiliary = [self._read(source, rows, torch.float32) for source in task.auxiliary]
            key = f"{self._seed} {task.name} {number}"
            yield Piece(tensors, base, task.per_model, task.shared, task.num_elements, key, auxiliary)

    def _tensors(self, rows: slice) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
        """Returns some rows of the models, and of the base."""
        task = self._task
        if self._access.lazy and self._tokens is None and not self._keeps:
            lazy = _LazyTensors([partial(self._read, source, rows) for source in task.sources])
            return lazy, self._read(task.base, rows) if task.base is not None else None
        if not self._span.start <= rows.start < self._span.stop:
            self._hold(next(span for span in self._spans if span.start <= rows.start < span.stop))
        first = self._span.start
        alone = rows == self._span
        tensors = [tensor if alone else tensor[rows.start - first : rows.stop - first] for tensor in self._held]
        base = tensors.pop() if task.base is not None else None
        if self._access.as_task_vectors and base is not None and rows.start not in self._subtracted:
            for tensor in tensors:
                tensor.sub_(base)
            self._subtracted.add(rows.start)
        return tensors, base

    def _hold(self, span: slice) -> None:
        """Reads a span of all models in the place of the last one."""
        self._held.clear()
        self._subtracted.clear()
        if self._tokens is not None:
            with release_slot(self._task.num_elements):
                self._held = self._tokens.read(span)
        else:
            self._held = [self._read(source, span) for source in self._task.inputs]
        self._span = span

    def _read(self, source: tuple[str, str], rows: slice, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Reads rows of one tensor as the method sees them, on the device; in the task's dtype by default."""
        model, key = source
        whole = not self._task.shape or rows == slice(0, self._task.shape[0])
        again = self._access.reads_twice and not (whole and self._keeps)
        again = again or (self._task.post is not None and source in self._task.post.read_candidates)
        with release_slot(self._task.num_elements):
            tensor = self._readers[model].read(key, None if whole else rows, again=again)
        found = not_finite(tensor) if self._checked else None
        if found is not None:
            raise NotFiniteError(self._task.name, f"{found} in what is merged")
        tensor = tensor.to(self._device).to(dtype or self._task.dtype)
        if self._task.inputs_first:
            return tensor.T
        return tensor if tensor.dim() else tensor.view(1)


class _LazyTensors(Sequence[torch.Tensor]):
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
        return _LazyTensors(self._read[index]) if isinstance(index, slice) else self._read[index]()


def merges_by_formula(method: str, task: Task) -> bool:
    """Whether a task is merged by a formula of weight matrices, which factors it."""
    return METHODS[task.instead or method].matrix_formula is not None and task.is_matrix


def is_factored(method: str, task: Task) -> bool:
    """Whether a task's matrix is factored, by the method or by steps after the merge."""
    return merges_by_formula(method, task) or task.post is not None


def spans(task: Task, cuts: Sequence[slice], *, whole: bool) -> list[slice]:
    """Groups the rows of pieces into those that are read at once: of one piece, of some, or of all (`whole`)."""
    row_bytes = task.num_elements * task.dtype.itemsize // max(1, _num_rows(task))
    max_bytes = min(_SPAN_BYTES, _SPANS_BYTES // max(1, len(task.inputs)))
    found: list[slice] = []
    for rows in cuts:
        if found and (whole or (rows.stop - found[-1].start) * row_bytes <= max_bytes):
            found[-1] = slice(found[-1].start, rows.stop)
        else:
            found.append(rows)
    return found


def worker_bytes(method: str, task: Task, kept_bytes: int) -> int:
    """Computes the peak bytes of a worker while it merges a task; `kept_bytes` as for the `PieceLoader`."""
    if task.post is None:
        return _merging_bytes(method, task, kept_bytes)
    rows, columns = task.shape
    merged = task.num_elements * torch.float32.itemsize
    kept = _kept_bytes(task, _access(method, task), kept_bytes)
    steps = kept + 2 * task.num_elements * _MAX_ITEM_BYTES + post_bytes(rows, columns)
    return merged + max(_merging_bytes(method, task, kept_bytes), steps)


def host_bytes_beside_gpu(method: str, task: Task, kept_bytes: int) -> int:
    """Computes the peak bytes of a worker's tensors on the host while a GPU factors a task's matrix."""
    moved = 2 * task.num_elements * max(task.dtype.itemsize, task.out_dtype.itemsize)
    if task.post is None or merges_by_formula(method, task):
        return moved
    return task.num_elements * torch.float32.itemsize + max(moved, _merging_bytes(method, task, kept_bytes))


def _merging_bytes(method: str, task: Task, kept_bytes: int) -> int:
    """Computes the peak bytes of a worker while it merges a task, before any steps after that."""
    row = METHODS[task.instead or method]
    held = _merging_read_bytes(method, task, kept_bytes)
    if task.copied:
        return held
    if merges_by_formula(method, task):
        assert row.matrix_formula is not None
        rows, columns = reversed(task.shape) if task.inputs_first else task.shape
        kept = _kept_bytes(task, row.access(task.shared), kept_bytes)
        return kept + 2 * task.num_elements * task.dtype.itemsize + row.matrix_formula.work_bytes(rows, columns)
    access = _access(method, task)
    piece = _max_elements(task, rows_of_pieces(task.shape, access.cut)) * (len(task.inputs) + len(task.auxiliary))
    return held + _PIECE_COPIES * piece * _MAX_ITEM_BYTES


def read_bytes(method: str, task: Task, kept_bytes: int) -> int:
    """Computes the part of `worker_bytes` that tensors are read into."""
    merging = _merging_read_bytes(method, task, kept_bytes)
    return merging if task.post is None else max(merging, 2 * task.num_elements * task.dtype.itemsize)


def _merging_read_bytes(method: str, task: Task, kept_bytes: int) -> int:
    """Computes the part of `_merging_bytes` that tensors are read into."""
    tensor = task.num_elements * task.dtype.itemsize
    if task.copied:
        return tensor
    access = _access(method, task)
    kept = _kept_bytes(task, access, kept_bytes)
    if kept or merges_by_formula(method, task):
        return kept or 2 * tensor
    span = _max_elements(task, spans(task, rows_of_pieces(task.shape, access.cut), whole=False))
    # The next one is read while the last piece of the one before is still in use.
    return min(2 * span, task.num_elements) * task.dtype.itemsize * len(task.inputs)


def _access(method: str, task: Task) -> Access:
    """Returns how a task's tensors are read; a fallback may cut anywhere."""
    return Access(Cut.ELEMENTS) if task.fallback_reason else METHODS[task.instead or method].access(task.shared)


def _kept_bytes(task: Task, access: Access, max_bytes: int) -> int:
    """Computes the bytes of a task's tensors where they are read twice and small enough to be kept; else 0."""
    num_bytes = task.num_elements * task.dtype.itemsize * len(task.inputs)
    return num_bytes if access.reads_twice and num_bytes <= max_bytes else 0


def _num_rows(task: Task) -> int:
    return task.shape[0] if task.shape else 1


def _max_elements(task: Task, parts: Sequence[slice]) -> int:
    """Counts the elements of the largest of some parts of a tensor's rows."""
    rows = max((part.stop - part.start for part in parts), default=0)
    return rows * task.num_elements // max(1, _num_rows(task))


def cost(method: str, task: Task) -> int:
    """Computes a task's cost relative to others: elements, times the smaller side where a matrix is factored."""
    return task.num_elements * (min(task.shape) if is_factored(method, task) else 1)
