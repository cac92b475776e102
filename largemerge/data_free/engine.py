"""The long work of a data-free merge: every part that is not in the journal yet, shared among ranks and workers.

One or two workers for every core read, merge and write, each at one tensor of the output at a time:

    worker: task → its pieces: read → (first pass) → read again or from memory → merge → to their place in the shard
    main:   in order, waits for all tasks of a part, forces them onto the disk, notes the part in the journal

A worker holds a tensor of all models where that is small, else a few megabytes of each.

A method with a factor that only the whole model knows goes over all tensors twice (`TwoPassMerge`):

    first    every tensor: its merged task vector, float32, to a scratch file; its sums of squares to the journal
    second   every tensor: the base's + factor · what the scratch file has, to the output

The scratch files lie in the working folder, and go with it when the merge is done.

Steps after the merge (`AfterMerge`) get every weight matrix as a whole, before it is rounded and written:

    worker: merged pieces → the whole matrix → minus the base → steps, each with the candidates at hand → plus the base

The norms of its task vector before and after every step go to the journal, so that a resumed merge reports them, too.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch

from largemerge.checkpoint.direct_io import Buffers
from largemerge.checkpoint.index import Checkpoint, shared_folders
from largemerge.checkpoint.lora import Adapter, open_reader
from largemerge.checkpoint.reader import CheckpointReader, TensorReader
from largemerge.checkpoint.tensor_info import dtype_name
from largemerge.checkpoint.writer import (
    NotFiniteError,
    Shard,
    ShardWriter,
    largest_magnitude,
    layout_shards,
    stored_sizes,
    why_unmergeable,
)
from largemerge.comparison import ComparedTensor, Comparison, Verification
from largemerge.data_free.loader import ComputeSlots, PieceLoader, cost, is_factored, merges_by_formula, release_slot
from largemerge.data_free.matrices import LAYER
from largemerge.data_free.methods.base import Access, Cut, select_formula
from largemerge.data_free.methods.post import apply_steps
from largemerge.data_free.methods.table import METHODS
from largemerge.data_free.plan import DataFreePlan, initial_values
from largemerge.data_free.resources import Accelerator
from largemerge.data_free.tasks import Task
from largemerge.devices import CPU, one_thread_each
from largemerge.distributed.partition import choose_owners
from largemerge.distributed.ranks import Ranks, too_many_threads
from largemerge.errors import MergeError
from largemerge.machine import return_freed_memory
from largemerge.model.alignment import AlignedReader
from largemerge.output import OutputFolder, PartKind
from largemerge.progress import RunProgress
from largemerge.weight_matching.permuted import PermutedReader
from largemerge.weight_matching.run import journal_kind

PART_BYTES = 256 << 20
"""The least bytes of the output between two lines of the journal."""

_SMALL_ELEMENTS = 128 << 10  # that are merged in less time than the calls for it take
_LARGE_ELEMENTS = 1 << 20  # of a tensor after which memory is looked at
_FEW_TASKS = 64  # of smaller tensors, after which it is looked at, too
_SCRATCH_FOLDER = "scratch"
_DELTAS, _OUTPUT = "unscaled part", "part"  # kinds of passes over all parts, as the journal calls them
_DIGESTS = {_DELTAS: "scratch_digests", _OUTPUT: "digests"}  # and the digests of what they write

Sums = dict[str, list[float]]
"""Numbers that add up over the pieces of a tensor, and over tensors, by its name."""
Norms = dict[str, list[float]]
"""Norms of a matrix's merged task vector, before the steps after the merge and after every one of them, by its name."""

_AFTER = "after: "  # stands before a tensor's name where the journal notes its norms, and not what was measured


class TensorSums:
    """Keeps sums of tensors until the part that they belong to is finished; workers share it."""

    def __init__(self) -> None:
        self._sums: Sums = {}
        self._lock = threading.Lock()

    def put(self, name: str, of_pieces: Sequence[Sequence[float]]) -> None:
        """Keeps the sums of a tensor, from those of its pieces."""
        with self._lock:
            self._sums[name] = [math.fsum(column) for column in zip(*of_pieces, strict=True)]

    def take(self, tasks: Iterable[Task]) -> Sums:
        """Returns the sums of some tasks, and forgets them."""
        with self._lock:
            return {task.name: self._sums.pop(task.name) for task in tasks if task.name in self._sums}


def split_into_parts(tasks: Sequence[Task]) -> list[list[Task]]:
    """Groups tasks that are noted as finished together; large ones first, so that none is left to the end."""
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
    is_small: Callable[[Task], bool],
) -> None:
    """Does all tasks of some parts, with several workers.

    Args:
        unfinished: The tasks of each part.
        work: Does one task.
        done: Called with the number of each part, in order, when all of its tasks are done.
        num_workers: The number of workers.
        is_small: Whether a task is little but calls of Python. These are done one at a time: two would pass Python's
            lock back and forth at every call, and take longer than one after the other.
    """
    slots, turn, stopped = ComputeSlots(torch.get_num_threads()), threading.Lock(), threading.Event()

    def with_slot(task: Task) -> None:
        with slots.acquire():
            work(task)

    def in_turn(tasks: Sequence[Task]) -> None:
        with turn, slots.acquire():
            for task in tasks:
                if stopped.is_set():
                    return
                work(task)

    with one_thread_each(), ThreadPoolExecutor(num_workers, thread_name_prefix="largemerge-merge") as pool:
        futures: list[list[Future[None]]] = []
        for part in unfinished:
            small = [task for task in part if is_small(task)]
            futures.append([pool.submit(with_slot, task) for task in part if not is_small(task)])
            futures[-1] += [pool.submit(in_turn, small)] if small else []
        try:
            for number, of_part in enumerate(futures):
                for future in of_part:
                    future.result()
                done(number)
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


class Merger:
    """Merges single tasks, by methods that need no factor of the whole model.

    Args:
        method: Name of the method in the table.
        seed: Seed of random numbers.
        readers: A reader for every model, and for every path of auxiliary tensors.
        writer: Writer of the output.
        kept_bytes: The most bytes of all models' tensors that are kept between two passes.
        accelerator: The GPU that weight matrices are merged on, if there is one.
        after: The steps after the merge.
        new: Tensors that no model has, by name in the output.
    """

    def __init__(
        self,
        method: str,
        seed: int,
        readers: Mapping[str, TensorReader],
        writer: ShardWriter,
        kept_bytes: int,
        accelerator: Accelerator,
        after: AfterMerge,
        new: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self._name, self._seed = method, seed
        self._readers, self._writer, self._kept_bytes = readers, writer, kept_bytes
        self._accelerator, self._after, self._new = accelerator, after, new
        self._measurement, self.measured = METHODS[method].measurement, TensorSums()

    def __call__(self, task: Task) -> None:
        """Reads, merges and writes one tensor."""
        with as_merge_error(task, self._name, self._readers):
            if task.copied:
                self._copy(task)
                return
            method = METHODS[task.instead or self._name]
            access, prepare = select_formula(method, task.shared, falls_back=bool(task.fallback_reason))
            device = self._accelerator.device_of(self._name, task) if merges_by_formula(self._name, task) else CPU
            factored = merges_by_formula(self._name, task) or task.post is not None
            checked = factored or method.chooses_elements
            load = PieceLoader(task, access, self._readers, self._seed, self._kept_bytes, device, checked=checked)
            with self._accelerator.stream():
                merge = prepare(access.first_pass(load.pieces) if access.first_pass is not None else None)
                measure = self._measurement.sums if self._measurement is not None and not task.instead else None
                sums = []

                def merged() -> Iterator[torch.Tensor]:
                    for piece in load.pieces():
                        if measure is not None:
                            sums.append(measure(piece))
                        yield merge(piece)

                if task.post is not None:
                    self._after.finish(task, merged())
                else:
                    for rows, tensor in zip(load.cuts, merged(), strict=True):
                        write_piece(self._writer, task, rows, tensor, task.out_dtype)
                if sums:
                    self.measured.put(task.name, sums)

    def _copy(self, task: Task) -> None:
        """Writes a tensor as one model has it, or one that no model has."""
        with release_slot(task.num_elements):
            if not task.sources:
                self._writer.write(task.name, self._new[task.name].to(task.out_dtype))
                return
            ((model, key),) = task.sources
            self._writer.write(task.name, self._readers[model].read(key).to(task.out_dtype))


@contextmanager
def as_merge_error(task: Task, method: str, readers: Mapping[str, TensorReader]) -> Iterator[None]:
    """Runs the arithmetic of one task without autograd, and names the tensor in what goes wrong.

    Raises:
        MergeError: If the method raises a `FloatingPointError`, the result is not finite, or a GPU has no memory left.
    """
    try:
        with torch.inference_mode():
            yield
    except NotFiniteError as error:
        raise MergeError(f"{task.name}: {method}: {error}: {_why_not_finite(task, readers)}") from None
    except FloatingPointError as error:
        raise MergeError(f"{task.name}: {method}: {error}") from None
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        first_line = str(error).splitlines()[0]
        raise MergeError(f"{task.name}: {method}: {first_line}: {_why_not_finite(task, readers)}") from None
    except torch.OutOfMemoryError as error:
        raise MergeError(
            f"{task.name}: {method}: {str(error).splitlines()[0]} What is finished is safe: go on with --resume when "
            "the GPU is free, or with a lower --memory-device, which lets fewer work side by side"
        ) from None


def _why_not_finite(task: Task, readers: Mapping[str, TensorReader]) -> str:
    """Finds out where NaN or infinity in a merged tensor comes from: a model, the dtype, or the parameters."""
    largest, where = 0.0, ""
    for model, key in dict.fromkeys((*task.inputs, *task.auxiliary)):
        tensor = readers[model].read(key)
        if (found := why_unmergeable(model, key, tensor)) is not None:
            return found
        if (own := largest_magnitude(tensor)) > largest:
            largest, where = own, f"{model}'s {key}"
    wider = "float32" if largest > torch.finfo(torch.bfloat16).max else "bfloat16 or float32"
    for key, dtype in (("dtype", task.dtype), ("out_dtype", task.out_dtype)):
        if largest > torch.finfo(dtype).max:
            return f"{where} goes up to {largest:.3g}, more than {dtype_name(dtype)} holds; set {key}: {wider}"
    given = {name: list(values) for name, values in task.per_model.items()} | dict(task.shared)
    listed = ", ".join(f"{name} {value}" for name, value in given.items()) or "none"
    narrow = min((task.dtype, task.out_dtype), key=lambda dtype: torch.finfo(dtype).max)
    is_widest = torch.finfo(narrow).max >= torch.finfo(torch.bfloat16).max
    or_wider = "" if is_widest else f", or set a dtype that holds more than {dtype_name(narrow)} does"
    return (
        f"all models hold finite numbers there, up to {largest:.3g}; what is computed of them overflows: look at the "
        f"parameters ({listed}){or_wider}"
    )


def write_piece(writer: ShardWriter, task: Task, rows: slice, merged: torch.Tensor, dtype: torch.dtype) -> None:
    """Writes rows of a tensor as it is stored, from a piece as the method sees it."""
    merged = (merged.T if task.inputs_first else merged).to(dtype).to(CPU)
    shape = (rows.stop - rows.start, *task.shape[1:]) if task.shape else ()
    with release_slot(merged.numel()):
        writer.write(task.name, merged.reshape(shape), first_row=rows.start)


class AfterMerge:
    """Runs the steps after the merge on single weight matrices, and writes them.

    Args:
        method: Name of the method in the table.
        readers: A reader for every model.
        writer: Writer of the output.
        accelerator: The GPU that weight matrices are merged on, if there is one.
    """

    def __init__(
        self, method: str, readers: Mapping[str, TensorReader], writer: ShardWriter, accelerator: Accelerator
    ) -> None:
        self._name, self._readers, self._writer, self._accelerator = method, readers, writer, accelerator
        self.norms = TensorSums()

    def finish(self, task: Task, pieces: Iterable[torch.Tensor]) -> None:
        """Puts the merged pieces of a matrix together, changes it by the steps, and writes it.

        Args:
            task: The task, with steps.
            pieces: Its merged pieces, in order; the transposed matrix as a whole where the task has its inputs first.
        """
        assert task.post is not None, "asked only for tasks with steps"
        work, device = task.post, self._accelerator.device_of(self._name, task)
        merged = self._whole(task, pieces).to(device)
        merged = merged.T if work.inputs_first and not task.inputs_first else merged
        origin = self._read(task, work.origin, device)

        def candidates() -> Iterator[torch.Tensor]:
            yield from (self._read(task, source, device).sub_(origin) for source in work.candidates)

        delta, norms = apply_steps(merged.sub_(origin), work.steps, candidates)
        as_seen = replace(task, inputs_first=work.inputs_first)
        write_piece(self._writer, as_seen, slice(0, task.shape[0]), delta.add_(origin), task.out_dtype)
        self.norms.put(task.name, [norms])

    @staticmethod
    def _whole(task: Task, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
        """Returns the merged matrix as the method sees it, float32, in memory of its own."""
        shape = torch.Size(reversed(task.shape) if task.inputs_first else task.shape)
        found, row = None, 0
        for piece in pieces:
            if piece.shape == shape and piece.dtype is torch.float32:
                return piece  # methods of matrices make a new one
            found = torch.empty(shape) if found is None else found
            found[row : row + len(piece)] = piece
            row += len(piece)
        assert found is not None and row == shape[0], "all pieces make a matrix"
        return found

    def _read(self, task: Task, source: tuple[str, str], device: torch.device) -> torch.Tensor:
        """Reads a whole matrix, `[outputs, inputs]`, float32, in memory of its own."""
        assert task.post is not None
        model, key = source
        with release_slot(task.num_elements):
            tensor = self._readers[model].read(key, again=True)
        problem = why_unmergeable(model, key, tensor)
        if problem is not None:
            raise FloatingPointError(problem)
        tensor = tensor.to(device).to(torch.float32)
        return tensor.T if task.post.inputs_first else tensor


class TwoPassMerge:
    """Both passes of a merge with a factor of the whole model, task by task. A context manager.

    Args:
        plan: The plan of the merge.
        readers: A reader for every model.
        writer: Writer of the output.
        working: The working folder.
        max_shard_bytes: The most bytes of a scratch file, unless one tensor is larger.
    """

    def __init__(
        self,
        plan: DataFreePlan,
        readers: Mapping[str, TensorReader],
        writer: ShardWriter,
        working: Path,
        max_shard_bytes: int,
    ) -> None:
        global_scale = METHODS[plan.config.merge_method].global_scale
        assert global_scale is not None, "asked only for methods with a factor"
        self._global_scale, self._name, self._seed = global_scale, plan.config.merge_method, plan.config.seed
        self._readers, self._writer, self._accelerator = readers, writer, plan.resources.accelerator
        (working / _SCRATCH_FOLDER).mkdir(exist_ok=True)
        deltas = plan.unscaled_deltas
        self.scratch = ShardWriter(working / _SCRATCH_FOLDER, deltas, layout_shards(deltas, max_shard_bytes))
        self.squares = TensorSums()

    def __enter__(self) -> TwoPassMerge:
        self.scratch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.scratch.__exit__(kind, error, trace)

    def merge_deltas(self, task: Task) -> None:
        """Merges the task vectors of one task, to the scratch file: the first pass."""
        if not task.has_factor:
            return
        access = Access(Cut.WHOLE if task.is_matrix else Cut.ELEMENTS, lazy=True)
        make = self._global_scale.matrix if task.is_matrix else self._global_scale.fallback
        device = self._accelerator.device_of(self._name, task)
        load = PieceLoader(task, access, self._readers, self._seed, device=device)
        squares = []
        with as_merge_error(task, self._name, self._readers), self._accelerator.stream():
            for rows, piece in zip(load.cuts, load.pieces(), strict=True):
                made = make(piece)
                squares.append(made.squares)
                write_piece(self.scratch, task, rows, made.vector, torch.float32)
        self.squares.put(task.name, squares)

    def factor(self, squares: Sums) -> float:
        """Computes the factor from the squares of all tensors; the same in whatever order they were made."""
        return self._global_scale.factor([math.fsum(column) for column in zip(*squares.values(), strict=True)])

    def scale_by(self, factor: float, copy: Callable[[Task], None], after: AfterMerge) -> Callable[[Task], None]:
        """Makes the second pass: a function that writes the output of one task.

        Args:
            factor: Factor of every merged task vector.
            copy: Does a task without one, whose tensor is copied, or merged by another method.
            after: The steps after the merge.
        """

        def work(task: Task) -> None:
            if not task.has_factor:
                copy(task)
                return
            as_stored = replace(task, inputs_first=False)
            load = PieceLoader(as_stored, Access(Cut.ELEMENTS, lazy=True), self._readers, self._seed)

            def scaled() -> Iterator[torch.Tensor]:
                for rows, piece in zip(load.cuts, load.pieces(), strict=True):
                    delta = self.scratch.read(task.name, rows if task.shape else None)
                    yield delta.view_as(piece.origin).mul_(factor).add_(piece.origin)

            with as_merge_error(task, self._name, self._readers), self._accelerator.stream():
                if task.post is not None:
                    after.finish(as_stored, scaled())
                    return
                for rows, merged in zip(load.cuts, scaled(), strict=True):
                    write_piece(self._writer, as_stored, rows, merged, task.out_dtype)

        return work


def run(
    plan: DataFreePlan,
    shards: tuple[Shard, ...],
    folder: OutputFolder,
    ranks: Ranks,
    *,
    max_shard_bytes: int,
    quiet: bool,
) -> tuple[int, int]:
    """Merges what is not in the journal yet. Collective.

    Returns:
        The bytes that this rank has read, and those that it has read and written past the system's cache.
    """
    parts = _PartRunner(plan, folder, ranks)
    if not parts.missing(_OUTPUT):
        return 0, 0
    method = plan.config.merge_method
    with ExitStack() as stack:
        stack.enter_context(ranks.busy())
        buffers = Buffers(plan.resources.buffer_bytes)
        readers = stack.enter_context(open_readers(plan, buffers))
        writer = stack.enter_context(ShardWriter(folder.working, plan.output, shards))
        kept_bytes, accelerator = plan.resources.kept_bytes, plan.resources.accelerator
        trusted, any_new = plan.config.trust_remote_code, any(not task.sources for task in plan.tasks)
        new = initial_values(plan.alignment, trust_remote_code=trusted) if any_new else {}
        after = AfterMerge(method, readers, writer, accelerator)
        merger = Merger(method, plan.config.seed, readers, writer, kept_bytes, accelerator, after, new)
        merge: Callable[[Task], None] = merger
        kinds = [_OUTPUT] if METHODS[method].global_scale is None else [_DELTAS, _OUTPUT]
        num_tasks = sum(len(part) for kind in kinds for part in parts.own(kind))
        progress = stack.enter_context(RunProgress(num_tasks, num_tasks, plan.device, quiet=quiet))
        for note in (*plan.notes, *folder.redone, *too_many_threads(ranks, CPU)):
            progress.tell(f"note: {note}")
        if _DELTAS in kinds:
            two_pass = TwoPassMerge(plan, readers, writer, folder.working, max_shard_bytes)
            stack.enter_context(two_pass)
            parts.run(_DELTAS, two_pass.merge_deltas, two_pass.scratch, progress, two_pass.squares.take)
            merge = two_pass.scale_by(two_pass.factor(parts.noted(_DELTAS)), merge, after)

        def notes(tasks: Sequence[Task]) -> Sums:
            norms = {f"{_AFTER}{name}": of for name, of in after.norms.take(tasks).items()}
            return {**merger.measured.take(tasks), **norms}

        has_notes = bool(plan.config.post) or METHODS[method].measurement is not None
        parts.run(_OUTPUT, merge, writer, progress, notes if has_notes else None)
        past_cache = writer.bytes_past_cache + sum(reader.bytes_past_cache for reader in readers.values())
        return sum(reader.bytes_read for reader in readers.values()), past_cache


def measured_sums(plan: DataFreePlan, folder: OutputFolder, ranks: Ranks) -> tuple[Sums, Norms]:
    """Collects what the journal has noted of every tensor, in earlier runs, too, once all parts are finished.

    Returns:
        What the method has measured, and what the steps after the merge have made of the norms of task vectors.
    """
    noted = _PartRunner(plan, folder, ranks).noted(_OUTPUT)
    norms = {task.name: noted.pop(f"{_AFTER}{task.name}", []) for task in plan.tasks if task.post is not None}
    return noted, norms


@contextmanager
def open_readers(plan: DataFreePlan, buffers: Buffers | None = None) -> Iterator[dict[str, TensorReader]]:
    """Opens a reader for every model, and for every path of auxiliary tensors."""
    shared = shared_folders(plan.checkpoints.values())  # what one has read, the system's cache keeps for the others

    def opened(checkpoint: Checkpoint, adapter: Adapter | None) -> AbstractContextManager[TensorReader]:
        past_cache = checkpoint.folder.resolve() not in shared
        return open_reader(checkpoint, adapter, past_cache=past_cache, buffers=buffers)

    with ExitStack() as stack:
        readers: dict[str, TensorReader] = {
            name: stack.enter_context(opened(checkpoint, plan.adapters.get(name)))
            for name, checkpoint in {**plan.checkpoints, **plan.auxiliary}.items()
        }
        for name, axes in (plan.matched.axes if plan.matched is not None else {}).items():
            readers[name] = PermutedReader(readers[name], axes)
        for name, view in plan.alignment.views.items():
            if view.relayouts:
                readers[name] = AlignedReader(readers[name], view.relayouts)
        yield readers


def verify_merge(plan: DataFreePlan, shards: tuple[Shard, ...], folder: OutputFolder) -> Verification:
    """Measures how much of every model is in the finished tensors, from a sample of their rows."""
    start = time.perf_counter()
    comparison = Comparison()
    with open_readers(plan) as readers, CheckpointReader(folder.written(shards, {})) as output:
        for task in plan.tasks:
            if task.copied or task.token_rows is not None:
                continue
            match = LAYER.match(task.name)
            stored = [plan.alignment.views[model].checkpoint.tensors.get(key) for model, key in task.inputs]
            comparison.add(
                ComparedTensor(
                    block=f"{match['stack']}.{match['number']}" if match else "outside",
                    shape=task.shape,
                    output=partial(output.read, task.name),
                    candidates={model: partial(readers[model].read, key) for model, key in task.sources},
                    base=partial(readers[task.base[0]].read, task.base[1]) if task.base is not None else None,
                    by_rows=all(info is not None and info.quantization is None for info in stored),
                )
            )
    return comparison.finish(time.perf_counter() - start)


def part_kinds(plan: DataFreePlan, shards: tuple[Shard, ...], working: Path, max_shard_bytes: int) -> list[PartKind]:
    """Lists the kinds of parts that the journal may have, with their files."""
    numbers = range(len(split_into_parts(plan.tasks)))
    kinds = [PartKind(_names(_OUTPUT, numbers), working, shards, stored_sizes(plan.output))]
    if METHODS[plan.config.merge_method].global_scale is not None:
        deltas = plan.unscaled_deltas
        scratch = layout_shards(deltas, max_shard_bytes)
        names, sizes = _names(_DELTAS, numbers), stored_sizes(deltas)
        kinds.append(PartKind(names, working / _SCRATCH_FOLDER, scratch, sizes, _DIGESTS[_DELTAS]))
    if plan.matching is not None:
        kinds.append(journal_kind(plan.matching, working))
    return kinds


def _names(kind: str, numbers: Iterable[int]) -> list[str]:
    """Lists the names that a kind of pass over parts has in the journal."""
    return [f"{kind} {number}" for number in numbers]


class _PartRunner:
    """Runs passes over all parts of the output, and notes finished parts in the journal, by kind of pass."""

    def __init__(self, plan: DataFreePlan, folder: OutputFolder, ranks: Ranks) -> None:
        self._plan, self._folder, self._ranks = plan, folder, ranks
        self._parts = split_into_parts(plan.tasks)

    def journal_names(self, kind: str) -> list[str]:
        """Lists the names that a kind of pass over every part has in the journal."""
        return _names(kind, range(len(self._parts)))

    def noted(self, kind: str) -> Sums:
        """Collects what the journal has noted of all tensors in a kind of pass."""
        sums: Sums = {}
        for name in self.journal_names(kind):
            sums |= self._folder.entries[name].get("notes", {})
        return sums

    def missing(self, kind: str) -> list[int]:
        """Lists the numbers of the parts that are not in the journal."""
        return [number for number, name in enumerate(self.journal_names(kind)) if name not in self._folder.entries]

    def own(self, kind: str) -> list[list[Task]]:
        """Lists this rank's tasks of every missing part; parts are balanced by cost."""
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
        """Does all missing parts. Collective.

        Args:
            kind: The kind of pass.
            work: Does one task.
            writer: Writer that `work` uses, flushed after every part.
            progress: Counts the tasks.
            notes: Function from this rank's tasks of a finished part to what the journal notes of them, by their names.
        """
        numbers, own = self.missing(kind), self.own(kind)
        names = self.journal_names(kind)

        done_tasks = itertools.count()

        def step(task: Task) -> None:
            work(task)
            if task.num_elements >= _LARGE_ELEMENTS or next(done_tasks) % _FEW_TASKS == 0:
                return_freed_memory(above=self._plan.resources.peak_bytes)
            progress.step(task.name, self._plan.config.merge_method)

        def done(index: int) -> None:
            with self._ranks.blocked():
                writer.flush()
            # Once this is gathered, every rank's tensors of this part are on the disk.
            digests = writer.take_digests(task.name for task in own[index] if task.name in writer.tensors)
            gathered = self._ranks.gather((notes(own[index]) if notes is not None else {}, digests))
            number = numbers[index]
            entry: dict[str, Any] = {"tensors": len(self._parts[number])}
            if notes is not None:
                entry["notes"] = {name: note for of_rank, _ in gathered for name, note in of_rank.items()}
            entry[_DIGESTS[kind]] = {name: digest for _, of_rank in gathered for name, digest in of_rank.items()}
            if self._ranks.is_first:
                self._folder.record(names[number], entry)
            self._folder.entries[names[number]] = entry

        def is_small(task: Task) -> bool:
            return task.num_elements < _SMALL_ELEMENTS and not is_factored(self._plan.config.merge_method, task)

        run_parts(own, step, done, num_workers=self._plan.num_workers, is_small=is_small)
