"""Merges with a factor that only the whole model knows: all merged task vectors first, then the output.

    first    every tensor: its merged task vector, float32, to a scratch file; its sums of squares to the journal
    second   every tensor: the base's + factor · what the scratch file has, to the output

The scratch files lie in the working folder, and go with it when the merge is done.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from largemerge.arithmetic.loading import PieceLoader
from largemerge.arithmetic.method import Way
from largemerge.arithmetic.pieces import Cut
from largemerge.arithmetic.plan import DataFreePlan
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.stream import told_as_merge_error, write_piece
from largemerge.arithmetic.tasks import Task
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.writer import ShardWriter, layout_shards

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
        with told_as_merge_error(task, self._name), self._accelerator.stream():
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
