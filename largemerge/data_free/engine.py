"""Reads, merges and writes: one or two workers for every core, each at one tensor of the output at a time.

    worker: task → its pieces: read → (survey) → read again or from memory → merge → to their place in the shard
    main:   in order, waits for all tasks of a part, forces them onto the disk, notes the part in the journal

A worker holds a tensor of all models where that is small, else a few megabytes of each.

Merges with a factor that only the whole model knows: all merged task vectors first, then the output.

    first    every tensor: its merged task vector, float32, to a scratch file; its sums of squares to the journal
    second   every tensor: the base's + factor · what the scratch file has, to the output

The scratch files lie in the working folder, and go with it when the merge is done.

The long work of a data-free merge: every part that is not in the journal yet, shared among ranks and workers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from largemerge.checkpoint.direct_io import Buffers
from largemerge.checkpoint.model_source import open_reader
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.writer import Shard, ShardWriter, layout_shards
from largemerge.data_free.loader import PieceLoader, Turns, cost, others_turn
from largemerge.data_free.methods.base import Cut, Way, way_of
from largemerge.data_free.methods.table import METHODS
from largemerge.data_free.plan import DataFreePlan
from largemerge.data_free.tasks import Task
from largemerge.devices import CPU, one_thread_each
from largemerge.distributed.partition import choose_owners
from largemerge.distributed.ranks import Ranks, too_many_threads
from largemerge.errors import MergeError
from largemerge.output import OutputFolder
from largemerge.progress import RunProgress

if TYPE_CHECKING:
    from largemerge.data_free.resources import Accelerator

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
        with as_merge_error(task, self._name), self._accelerator.stream():
            merge = begin(way.survey(load.pieces) if way.survey is not None else None)
            for rows, piece in zip(load.cuts, load.pieces(), strict=True):
                write_piece(self._writer, task, rows, merge(piece), task.out_dtype)


@contextmanager
def as_merge_error(task: Task, method: str) -> Iterator[None]:
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


_FOLDER = "scratch"
Squares = dict[str, list[float]]
"""By tensor: what `Unscaled.squares` says of it."""


class Unscaler:
    """Both halves of such a merge, task by task. A context manager.

    Args:
        plan: What is merged.
        readers: By model.
        writer: Of the output.
        working: The working folder.
        max_shard_bytes: Of a scratch file.
    """

    def __init__(
        self,
        plan: DataFreePlan,
        readers: Mapping[str, TensorReader],
        writer: ShardWriter,
        working: Path,
        max_shard_bytes: int,
    ) -> None:
        scaled = METHODS[plan.config.merge_method].scaled
        assert scaled is not None, "asked only for methods with a factor"
        self._scaled, self._name, self._seed = scaled, plan.config.merge_method, plan.config.seed
        self._readers, self._writer, self._accelerator = readers, writer, plan.holding.accelerator
        (working / _FOLDER).mkdir(exist_ok=True)
        self.scratch = ShardWriter(working / _FOLDER, plan.unscaled, layout_shards(plan.unscaled, max_shard_bytes))
        self._squares: Squares = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Unscaler:
        self.scratch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.scratch.__exit__(kind, error, trace)

    def merge(self, task: Task) -> None:
        """The first half."""
        if task.copied:
            return
        way = Way(Cut.WHOLE if task.is_matrix else Cut.ELEMENTS, one_by_one=True)
        make = self._scaled.matrix if task.is_matrix else self._scaled.others
        load = PieceLoader(task, way, self._readers, self._seed, device=self._accelerator.device_of(self._name, task))
        squares = []
        with as_merge_error(task, self._name), self._accelerator.stream():
            for rows, piece in zip(load.cuts, load.pieces(), strict=True):
                made = make(piece)
                squares.append(made.squares)
                write_piece(self.scratch, task, rows, made.vector, torch.float32)
        with self._lock:
            self._squares[task.name] = [math.fsum(column) for column in zip(*squares, strict=True)]

    def take_squares(self, tasks: Iterable[Task]) -> Squares:
        """What the first half has found of some tasks."""
        with self._lock:
            return {task.name: self._squares.pop(task.name) for task in tasks if task.name in self._squares}

    def factor(self, squares: Squares) -> float:
        """From the sums of all tensors; the same in whatever order they were made."""
        return self._scaled.factor([math.fsum(column) for column in zip(*squares.values(), strict=True)])

    def rescale(self, factor: float, otherwise: Callable[[Task], None]) -> Callable[[Task], None]:
        """The second half.

        Args:
            factor: Of every merged task vector.
            otherwise: What is done with a tensor that has none.
        """

        def work(task: Task) -> None:
            if task.copied:
                otherwise(task)
                return
            as_stored = replace(task, inputs_first=False)
            load = PieceLoader(as_stored, Way(Cut.ELEMENTS, one_by_one=True), self._readers, self._seed)
            for rows, piece in zip(load.cuts, load.pieces(), strict=True):
                with torch.inference_mode():
                    scratch = self.scratch.read_rows(task.name, rows if task.shape else None)
                    write_piece(self._writer, as_stored, rows, scratch.mul_(factor).add_(piece.origin), task.out_dtype)

        return work


_FIRST, _LAST = "unscaled part", "part"  # names in the journal


def run(
    plan: DataFreePlan,
    shards: tuple[Shard, ...],
    folder: OutputFolder,
    ranks: Ranks,
    *,
    max_shard_bytes: int,
    quiet: bool,
) -> tuple[int, int]:
    """Collective: merges what is not in the journal yet.

    Returns:
        The bytes that this rank has read, and those that it has read and written past the system's cache.
    """
    passes = _Passes(plan, folder, ranks)
    if not passes.missing(_LAST):
        return 0, 0
    with ExitStack() as stack:
        stack.enter_context(ranks.busy())
        files = {**plan.checkpoints, **plan.companions}
        buffers = Buffers(plan.holding.buffer_bytes)
        readers = {
            name: stack.enter_context(open_reader(checkpoint, plan.adapters.get(name), buffers))
            for name, checkpoint in files.items()
        }
        writer = stack.enter_context(ShardWriter(folder.working, plan.output, shards))
        merge: Callable[[Task], None] = Merger(
            plan.config.merge_method,
            plan.config.seed,
            readers,
            writer,
            plan.holding.kept_bytes,
            plan.holding.accelerator,
        )
        kinds = [_LAST] if METHODS[plan.config.merge_method].scaled is None else [_FIRST, _LAST]
        num_tasks = sum(len(part) for kind in kinds for part in passes.own(kind))
        progress = stack.enter_context(RunProgress(num_tasks, num_tasks, plan.device, quiet=quiet))
        for note in (*plan.layout.notes, *too_many_threads(ranks, CPU)):
            progress.tell(f"note: {note}")
        if _FIRST in kinds:
            unscaler = Unscaler(plan, readers, writer, folder.working, max_shard_bytes)
            stack.enter_context(unscaler)
            passes.run(_FIRST, unscaler.merge, unscaler.scratch, progress, unscaler.take_squares)
            squares = [folder.entries[name]["notes"] for name in passes.names(_FIRST)]
            merge = unscaler.rescale(unscaler.factor({key: of for each in squares for key, of in each.items()}), merge)
        passes.run(_LAST, merge, writer, progress)
        past_cache = writer.bytes_past_cache + sum(reader.bytes_past_cache for reader in readers.values())
        return sum(reader.bytes_read for reader in readers.values()), past_cache


class _Passes:
    """Goes through all parts of the merge, maybe several times."""

    def __init__(self, plan: DataFreePlan, folder: OutputFolder, ranks: Ranks) -> None:
        self._plan, self._folder, self._ranks = plan, folder, ranks
        self._parts = parts(plan.layout.tasks)

    def names(self, kind: str) -> list[str]:
        """Of all parts, in the journal."""
        return [f"{kind} {number}" for number in range(len(self._parts))]

    def missing(self, kind: str) -> list[int]:
        """Numbers of the parts that are not in the journal."""
        return [number for number, name in enumerate(self.names(kind)) if name not in self._folder.entries]

    def own(self, kind: str) -> list[list[Task]]:
        """This rank's tensors of every missing part."""
        found = []
        for part in (self._parts[number] for number in self.missing(kind)):
            costs = {task.name: cost(self._plan.config.merge_method, task) for task in part}
            owners = choose_owners(costs, self._ranks.size)
            found.append([task for task in part if owners[task.name] == self._ranks.rank])
        return found

    def run(
        self,
        kind: str,
        work: Callable[[Task], None],
        writer: ShardWriter,
        progress: RunProgress,
        notes: Callable[[Sequence[Task]], dict[str, Any]] | None = None,
    ) -> None:
        """Collective: all missing parts.

        Args:
            kind: Of pass.
            work: Does one task.
            writer: What it writes with.
            progress: Is told of every task.
            notes: What the journal is to know of this rank's tasks of a finished part, by their names.
        """
        numbers, own = self.missing(kind), self.own(kind)
        names = self.names(kind)

        def step(task: Task) -> None:
            work(task)
            progress.step(task.name, self._plan.config.merge_method)

        def done(index: int) -> None:
            with self._ranks.blocked():
                writer.flush()
            # Now everybody's tensors of this part are on the disk.
            everybodys = self._ranks.gather(notes(own[index]) if notes is not None else {})
            number = numbers[index]
            entry: dict[str, Any] = {"tensors": len(self._parts[number])}
            if notes is not None:
                entry["notes"] = {name: note for each in everybodys for name, note in each.items()}
            if self._ranks.is_first:
                self._folder.record(names[number], entry)
            self._folder.entries[names[number]] = entry

        run_parts(own, step, done, num_workers=self._plan.num_workers)
