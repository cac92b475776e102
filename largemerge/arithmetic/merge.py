"""A data-free merge as a list of steps.

config → headers of all models → tasks → output folder → workers → side files, index, config → report

Several ranks share the tensors of every part, and write them to their places in the same files.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from largemerge.arithmetic.plan import CPU, DataFreePlan, DataFreeSource, plan_data_free
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.report import DataFreeReport
from largemerge.arithmetic.run import run
from largemerge.checkpoint.metadata import copy_side_files, find_processor, find_tokenizer, model_card, output_config
from largemerge.checkpoint.writer import Shard, layout_shards
from largemerge.distributed import start_ranks
from largemerge.environment import versions
from largemerge.errors import LargemergeError
from largemerge.memory import MemoryWatch
from largemerge.output import OutputFolder, check_output
from largemerge.rank_output import open_for_ranks


def merge_data_free(
    source: DataFreeSource,
    out: str | Path,
    *,
    device: str,
    resume: bool,
    force: bool,
    max_shard_bytes: int,
    quiet: bool,
) -> DataFreeReport:
    """Merges without data; the arguments are those of `largemerge.merge`.

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
                plan = plan_data_free(source, ranks.local_size)
                if plan.layout.problems:
                    raise LargemergeError(*plan.layout.problems)
                opened = (*plan.checkpoints.values(), *plan.companions.values())
                folders = [checkpoint.folder for checkpoint in opened]
                if ranks.is_first:
                    check_output(out, folders, resume=resume, force=force)
                return plan, folders

            plan, folders = ranks.agree(plan_it)
            shards = layout_shards(plan.output, max_shard_bytes)
            with open_for_ranks(out, _manifest(plan, shards), folders, ranks, resume=resume, force=force) as folder:
                ranks.agree(lambda: _check_shared(folder))
                prepared = time.perf_counter() - start
                resumed = len(folder.entries)
                bytes_here = run(
                    plan, shards, folder, ranks, max_shard_bytes=max_shard_bytes, quiet=quiet or not ranks.is_first
                )
                bytes_read = sum(ranks.gather(bytes_here))
                seconds = {"preparation": round(prepared, 3), "total": round(time.perf_counter() - start, 3)}
                peaks = tuple(ranks.gather(watch.peak()))
                report = DataFreeReport(plan, seconds, bytes_read, resumed, peaks)
                if ranks.is_first:
                    folder.finish(shards, lambda path: _write_side_files(path, report), _config_text(plan))
        ranks.gather(None)  # nobody says that the merge is done before it is
    return report


def _check_shared(folder: OutputFolder) -> None:
    """Every rank writes what it has merged."""
    if not folder.working.is_dir():
        raise LargemergeError(f"{folder.path} is not there on this machine; expected a folder that all ranks share")


def _manifest(plan: DataFreePlan, shards: tuple[Shard, ...]) -> dict[str, Any]:
    """What a merge and its continuation must have in common."""
    return {
        "config": plan.config.model_dump(mode="json"),
        "inputs": {
            name: dict(checkpoint.fingerprint) for name, checkpoint in (plan.checkpoints | plan.companions).items()
        },
        "versions": versions(),
        "shards": {shard.file_name: shard.num_bytes for shard in shards},
    }


def _config_text(plan: DataFreePlan) -> str:
    """The reference's config, with the output's dtype and number of layers."""
    sizes: dict[torch.dtype, int] = {}
    for task in plan.layout.tasks:
        if task.out_dtype.is_floating_point:
            sizes[task.out_dtype] = sizes.get(task.out_dtype, 0) + task.num_elements
    dtype = max(sizes, key=lambda each: sizes[each])
    config = json.loads(output_config(plan.checkpoints[plan.reference], dtype))
    if plan.config.slices and len(plan.layout.layers) == 1:
        (layers,) = plan.layout.layers.values()
        _set_layers(config, layers)
    return json.dumps(config, indent=2) + "\n"


def _set_layers(config: dict[str, Any], layers: list[int]) -> None:
    """Writes the number of layers wherever it stands, and lists with an entry for every layer."""
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        counts = [key for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if key in part]
        for key in counts:
            before = part[key]
            for name, value in part.items():
                if isinstance(value, list) and len(value) == before and name.endswith(("layers", "_types")):
                    part[name] = [value[layer] for layer in layers]
            part[key] = len(layers)


def _write_side_files(path: Path, report: DataFreeReport) -> None:
    plan, config = report.plan, report.plan.config
    folders = {name: checkpoint.folder for name, checkpoint in plan.checkpoints.items()}
    preferred = [folders[plan.reference], *folders.values()]
    source = config.base_model if config.tokenizer_source == "base" else config.tokenizer_source
    tokenizer = folders[source] if source in folders else find_tokenizer(*preferred)
    copy_side_files(path, folders[plan.reference], tokenizer, find_processor(*preferred), with_code=False)
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    (path / "largemerge_config.yaml").write_text(text, encoding="utf-8")
    weights = {entry.model: entry.parameters.get("weight", 1.0) for entry in config.models}
    numbers = {name: value for name, value in weights.items() if isinstance(value, int | float)}
    card = model_card(
        method=METHODS[config.merge_method].title,
        class_name=(plan.checkpoints[plan.reference].config.get("architectures") or ["AutoModel"])[0],
        models=[
            {"name": Path(name).name, "model": name, "weight": numbers.get(name, 1.0), "data": ""} for name in folders
        ],
        base=config.base_model,
        config_yaml=text,
        version=versions()["largemerge"],
    )
    (path / "README.md").write_text(card, encoding="utf-8")
    (path / "merge_report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
