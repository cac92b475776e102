"""A data-free merge as a list of steps.

    config → headers of all models → tasks → output folder → workers → side files, index, config → report

Several ranks share the tensors of every part, and write them to their places in the same files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from largemerge.checkpoint.room import room_problems
from largemerge.checkpoint.writer import Shard, layout_shards
from largemerge.data_free.config import DataFreeConfig
from largemerge.data_free.engine import measured_sums, part_kinds, run, verify_merge
from largemerge.data_free.inputs import PriorMerges
from largemerge.data_free.plan import DataFreePlan, plan_data_free
from largemerge.data_free.report import DataFreeReport, config_text, write_side_files
from largemerge.data_free.resources import MemoryBudget
from largemerge.devices import CPU
from largemerge.distributed.ranks import Ranks, start_ranks
from largemerge.errors import LargemergeError
from largemerge.machine import MemoryWatch, versions
from largemerge.output import OutputFolder, check_output, drop_damaged, open_for_ranks, rehearse
from largemerge.progress import stage
from largemerge.weight_matching.run import match_models


def merge_data_free(
    config: DataFreeConfig,
    out: Path,
    *,
    device: str,
    resume: bool,
    force: bool,
    max_shard_bytes: int,
    quiet: bool,
    verify: bool = True,
    prior: PriorMerges | None = None,
    limits: MemoryBudget | None = None,
    planned: Callable[[DataFreePlan], None] | None = None,
) -> DataFreeReport:
    """Merges models without data into one checkpoint.

    Args:
        config: The configuration, from `load_data_free`.
        out: The output folder.
        device: Device that weight matrices are merged on: `auto`, `cpu`, `cuda:0`, ….
        resume: Whether to go on with an interrupted merge.
        force: Whether to replace what is in `out`, once the merge is finished.
        max_shard_bytes: Size of a shard in bytes, unless one tensor is larger.
        quiet: Whether to show no progress.
        verify: Whether to measure, at the end, how much of every model is in the output.
        prior: Results of earlier merges of the same file.
        limits: Limits of memory that come before those of the configuration.
        planned: Called with the plan before the long work.

    Raises:
        LargemergeError: For anything wrong with config, inputs or output, before the long work.
    """
    start = time.perf_counter()
    with start_ranks() as ranks:
        with MemoryWatch(CPU) as memory:

            def plan_and_check() -> DataFreePlan:
                plan = plan_data_free(config, prior, device=device, ranks=ranks, limits=limits)
                _check(plan, out, ranks, resume=resume, force=force)
                return plan

            plan = ranks.agree(plan_and_check)
            memory.follow(plan.device)
            if planned is not None:
                planned(plan)
            side_files = plan.files.copied
            shards, folders = layout_shards(plan.output, max_shard_bytes, side_files.inner), input_folders(plan)
            adapters = [adapter.checkpoint for adapter in plan.adapters.values()]
            opened = [*plan.checkpoints.values(), *plan.auxiliary.values(), *adapters, *plan.aligned_to.values()]
            write = partial(write_side_files, plan=plan)
            watch = ranks.agree(lambda: rehearse(opened, side_files, write, ranks))
            manifest = _manifest(plan, shards) | {"side files": watch.digests}
            stage("opening the output folder")
            with open_for_ranks(out, manifest, folders, ranks, resume=resume, force=force) as folder:
                ranks.agree(lambda: _check_shared(folder))
                drop_damaged(folder, ranks, part_kinds(plan, shards, folder.working, max_shard_bytes))
                prepared = time.perf_counter() - start
                resumed = len(folder.entries)
                if plan.matching is not None:
                    plan = replace(plan, matched=match_models(plan.matching, folder, ranks, quiet=quiet))
                    write = partial(write_side_files, plan=plan)
                moved_here = run(
                    plan, shards, folder, ranks, max_shard_bytes=max_shard_bytes, quiet=quiet or not ranks.is_first
                )
                bytes_read, past_cache = (sum(of_all) for of_all in zip(*ranks.gather(moved_here), strict=True))
                stage("measuring what of every model is in the output, and finishing it")
                merged = time.perf_counter() - start
                measured, norms = measured_sums(plan, folder, ranks)
                verified = verify_merge(plan, shards, folder) if verify and ranks.is_first else None
                seconds = {"preparation": round(prepared, 3), "total": round(time.perf_counter() - start, 3)}
                peaks = tuple(ranks.gather(memory.peak()))
                report = DataFreeReport(
                    plan=plan,
                    seconds=seconds,
                    bytes_read=bytes_read,
                    bytes_past_cache=past_cache,
                    resumed_parts=resumed,
                    peaks=peaks,
                    timeline=((prepared, "merge"), (merged, "verify_and_finish")),
                    memory_over_time=tuple(memory.over_time(start)),
                    out=out,
                    norms=norms,
                    verified=verified,
                    measured=measured,
                )
                written: dict[str, Any] = {}
                if ranks.is_first:
                    watch.check()
                    text = config_text(plan)
                    finish = partial(write, norms=norms)
                    written = folder.finish(shards, finish, text, report.to_json(), side_files.inner)
        written = ranks.from_first(written)  # nobody says that the merge is done before it is
    return replace(report, written=written)


def _check(plan: DataFreePlan, out: Path, ranks: Ranks, *, resume: bool, force: bool) -> None:
    """Checks that the merge is possible, and on the first rank, that the output folder may be written."""
    room = room_problems(plan.needs(out)) if ranks.is_first and not plan.problems else []
    if plan.problems or room:
        raise LargemergeError(*plan.problems, *room)
    if ranks.is_first:
        check_output(out, input_folders(plan), resume=resume, force=force)


def input_folders(plan: DataFreePlan) -> list[Path]:
    """Lists the folders that are read, and files that lie elsewhere, which the output must not be."""
    folders = [checkpoint.root for checkpoint in plan.checkpoints.values()]
    folders += [Path(path).expanduser() for path in plan.auxiliary]
    folders += [folder for adapter in plan.adapters.values() for folder in adapter.folders]
    folders += [plan.files.tokenizer_source, *plan.files.copied.files.values()]
    folders += [checkpoint.root for checkpoint in plan.aligned_to.values()]
    if plan.config.vocabulary is not None and Path(plan.config.vocabulary.source).expanduser().is_dir():
        folders.append(Path(plan.config.vocabulary.source).expanduser())
    return list(dict.fromkeys(folders))


def _check_shared(folder: OutputFolder) -> None:
    """Checks that this rank, which writes what it has merged, sees the output folder."""
    if not folder.working.is_dir():
        raise LargemergeError(f"{folder.path} is not there on this machine; expected a folder that all ranks share")


def _manifest(plan: DataFreePlan, shards: tuple[Shard, ...]) -> dict[str, Any]:
    """Collects what a merge and its continuation must have in common."""
    return {
        "config": plan.config.model_dump(mode="json", exclude={"memory"}),  # memory changes no bit
        "inputs": {
            name: dict(checkpoint.fingerprint)
            for name, checkpoint in (plan.checkpoints | plan.auxiliary | plan.aligned_to).items()
        },
        "versions": versions(),
        "shards": {shard.file_name: shard.num_bytes for shard in shards},
        **({"device": plan.device.type} if plan.device.type != "cpu" else {}),
        **({"chat_template": plan.files.template} if plan.files.template is not None else {}),
        **({"vocabulary": plan.vocabulary.fingerprint()} if plan.vocabulary is not None else {}),
    }
