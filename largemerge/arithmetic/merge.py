"""A data-free merge as a list of steps.

config → headers of all models → tasks → output folder → workers → side files, index, config → report

Several ranks share the tensors of every part, and write them to their places in the same files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from largemerge.arithmetic.layout import Task
from largemerge.arithmetic.plan import CPU, Before, DataFreePlan, DataFreeSource, plan_data_free
from largemerge.arithmetic.report import DataFreeReport
from largemerge.arithmetic.side_files import config_text, write_side_files
from largemerge.arithmetic.stream import Merger, parts, run_parts
from largemerge.checkpoint.adapted_reader import open_reader
from largemerge.checkpoint.writer import Shard, ShardWriter, layout_shards
from largemerge.distributed import Ranks, start_ranks, too_many_threads
from largemerge.environment import versions
from largemerge.errors import LargemergeError
from largemerge.memory import MemoryWatch
from largemerge.output import OutputFolder, check_output
from largemerge.progress import RunProgress
from largemerge.rank_output import open_for_ranks
from largemerge.sharing import choose_owners


def merge_data_free(
    source: DataFreeSource,
    out: str | Path,
    *,
    device: str,
    resume: bool,
    force: bool,
    max_shard_bytes: int,
    quiet: bool,
    before: Before | None = None,
) -> DataFreeReport:
    """Merges without data; the arguments are those of `largemerge.merge`, and what other merges have made for this one.

    Raises:
        LargemergeError: For anything wrong with config, inputs or output, before the long work.
    """
    start = time.perf_counter()
    out = Path(out)
    if torch.device("cpu" if device == "auto" else device).type != "cpu":
        raise LargemergeError(f"--device {device}: data-free methods run on the CPU, at the speed of the disk")
    with start_ranks() as ranks:
        with MemoryWatch(CPU) as watch:

            def plan_it() -> tuple[DataFreePlan, list[Path]]:
                plan = plan_data_free(source, before)
                if plan.layout.problems:
                    raise LargemergeError(*plan.layout.problems)
                folders = [checkpoint.folder for checkpoint in plan.checkpoints.values()]
                folders += [adapter.checkpoint.folder for adapter in plan.adapters.values()]
                if ranks.is_first:
                    check_output(out, folders, resume=resume, force=force)
                return plan, folders

            plan, folders = ranks.agree(plan_it)
            shards = layout_shards(plan.output, max_shard_bytes)
            with open_for_ranks(out, _manifest(plan, shards), folders, ranks, resume=resume, force=force) as folder:
                ranks.agree(lambda: _check_shared(folder))
                prepared = time.perf_counter() - start
                resumed = len(folder.entries)
                bytes_read = sum(ranks.gather(_run(plan, shards, folder, ranks, quiet or not ranks.is_first)))
                seconds = {"preparation": round(prepared, 3), "total": round(time.perf_counter() - start, 3)}
                peaks = tuple(ranks.gather(watch.peak()))
                report = DataFreeReport(plan, seconds, bytes_read, resumed, peaks)
                if ranks.is_first:
                    folder.finish(shards, lambda path: write_side_files(path, report), config_text(plan))
        ranks.gather(None)  # nobody says that the merge is done before it is
    return report


def _check_shared(folder: OutputFolder) -> None:
    """Every rank writes what it has merged."""
    if not folder.working.is_dir():
        raise LargemergeError(f"{folder.path} is not there on this machine; expected a folder that all ranks share")


def _run(plan: DataFreePlan, shards: tuple[Shard, ...], folder: OutputFolder, ranks: Ranks, quiet: bool) -> int:
    """Collective: merges what is not in the journal yet; returns the bytes that this rank has read."""
    all_parts = parts(plan.layout.tasks)
    numbers = [number for number in range(len(all_parts)) if _part_name(number) not in folder.entries]
    own = [_own(all_parts[number], ranks) for number in numbers]
    if not numbers:
        return 0
    with ExitStack() as stack:
        stack.enter_context(ranks.works())
        readers = {
            name: stack.enter_context(open_reader(checkpoint, plan.adapters.get(name)))
            for name, checkpoint in plan.checkpoints.items()
        }
        writer = stack.enter_context(ShardWriter(folder.working, plan.output, shards))
        merger = Merger(plan.config.merge_method, plan.config.seed, readers, writer)
        num_tasks = sum(map(len, own))
        progress = stack.enter_context(RunProgress(num_tasks, num_tasks, CPU, quiet=quiet))
        for note in (*plan.layout.notes, *too_many_threads(ranks, CPU)):
            progress.tell(f"note: {note}")

        def work(task: Task) -> None:
            merger(task)
            progress.step(task.name, plan.config.merge_method)

        def done(index: int) -> None:
            with ranks.waits():
                writer.flush()
            ranks.gather(None)  # now everybody's tensors of this part are on the disk
            if ranks.is_first:
                folder.record(_part_name(numbers[index]), {"tensors": len(all_parts[numbers[index]])})

        run_parts(own, work, done, num_workers=plan.num_workers)
        return sum(reader.bytes_read for reader in readers.values())


def _own(part: Sequence[Task], ranks: Ranks) -> list[Task]:
    """This rank's tensors of a part."""
    owners = choose_owners({task.name: task.num_elements for task in part}, ranks.size)
    return [task for task in part if owners[task.name] == ranks.rank]


def _part_name(number: int) -> str:
    return f"part {number}"


def _manifest(plan: DataFreePlan, shards: tuple[Shard, ...]) -> dict[str, Any]:
    """What a merge and its continuation must have in common."""
    return {
        "config": plan.config.model_dump(mode="json"),
        "inputs": {name: dict(checkpoint.fingerprint) for name, checkpoint in plan.checkpoints.items()},
        "versions": versions(),
        "shards": {shard.file_name: shard.num_bytes for shard in shards},
        **({"chat_template": plan.template} if plan.template is not None else {}),
        **({"vocabulary": plan.vocabulary.fingerprint()} if plan.vocabulary is not None else {}),
    }
