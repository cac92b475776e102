"""The long work of a data-free merge: every part that is not in the journal yet, shared among ranks and workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from largemerge.arithmetic.plan import DataFreePlan
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.rescale import Unscaler
from largemerge.arithmetic.stream import Merger, cost, parts, run_parts
from largemerge.arithmetic.tasks import Task
from largemerge.checkpoint.adapted_reader import open_reader
from largemerge.checkpoint.buffers import Buffers
from largemerge.checkpoint.writer import Shard, ShardWriter
from largemerge.devices import CPU
from largemerge.distributed import Ranks, too_many_threads
from largemerge.output import OutputFolder
from largemerge.progress import RunProgress
from largemerge.sharing import choose_owners

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
        stack.enter_context(ranks.works())
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
            with self._ranks.waits():
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
