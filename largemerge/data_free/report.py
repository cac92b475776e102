"""What a data-free merge did, and what it writes beside its weights.

DataFreeReport → merge_report.json, the closing table on the terminal
config_text → config.json
write_side_files → tokenizer, processor, generation config, largemerge_config.yaml, model card
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.locate import short_name
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.side_files import (
    model_card,
)
from largemerge.checkpoint.tensor_info import torch_dtype
from largemerge.comparison import Verification
from largemerge.data_free.methods.post import POST_STEPS
from largemerge.data_free.methods.table import METHODS
from largemerge.data_free.plan import DataFreePlan, add_common_rows, describe_step
from largemerge.data_free.tasks import Task
from largemerge.errors import MergeError
from largemerge.heads import card_section, write_heads
from largemerge.machine import MemoryUse, machine, versions
from largemerge.streams import plain_text
from largemerge.units import counted, duration, gib
from largemerge.weight_matching.permuted import open_permuted
from largemerge.weight_matching.plan import card_section as aligned_section
from largemerge.weight_matching.run import rows_of


@dataclass(frozen=True)
class DataFreeReport:
    """What a data-free merge did; `to_json` is what `merge_report.json` holds.

    Attributes:
        plan: The plan that was run.
        seconds: Seconds of the `preparation`, and in `total`.
        bytes_read: Bytes read in this run; tensors that are read twice count twice.
        bytes_past_cache: Bytes read and written in this run past the system's cache.
        resumed_parts: Number of parts that an earlier run had finished.
        peaks: Measured peak memory of every rank.
        timeline: Seconds since the start, and the stage that began then.
        memory_over_time: Seconds since the start, and the most bytes on host and device from then on, of rank 0.
        out: The output folder, as the user named it.
        norms: What the steps after the merge have made of the norms of task vectors, see `engine.Norms`.
        verified: How much of every model is in the output; `None` where that was not measured.
        measured: What the method has measured of every tensor, by its name: sums, see `Measurement`.
        written: Digests of the files, and why parts were done again, once the merge is finished.
    """

    plan: DataFreePlan
    seconds: Mapping[str, float]
    bytes_read: int
    bytes_past_cache: int
    resumed_parts: int
    peaks: tuple[MemoryUse, ...]
    timeline: tuple[tuple[float, str], ...]
    memory_over_time: tuple[Sequence[float], ...]
    out: Path
    norms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    verified: Verification | None = None
    measured: Mapping[str, Sequence[float]] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What a user should know; the same as in the plan."""
        return self.plan.notes

    @property
    def peak(self) -> MemoryUse:
        """Peak memory of the rank that held most."""
        return max(self.peaks, key=lambda peak: peak.host_anonymous)

    @property
    def measured_overall(self) -> dict[str, Any]:
        """What the method has measured of the whole model, or of most tensors, where not all have the same models."""
        measurement = METHODS[self.plan.config.merge_method].measurement
        alike: dict[tuple[str, ...], list[Sequence[float]]] = {}
        for task in self.plan.tasks:
            if task.name in self.measured:
                alike.setdefault(tuple(model for model, _ in task.sources), []).append(self.measured[task.name])
        if measurement is None or not alike:
            return {}
        models, sums = max(alike.items(), key=lambda item: len(item[1]))
        total = [math.fsum(column) for column in zip(*sums, strict=True)]
        return {"models": list(models), "num_tensors": len(sums), **measurement.summary(total)}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        checkpoints = (self.plan.checkpoints | self.plan.auxiliary).items()
        measurement = METHODS[self.plan.config.merge_method].measurement
        return {
            "versions": versions(),
            "machine": machine(self.plan.device),
            "config": self.plan.config.model_dump(mode="json", exclude_defaults=True),
            "inputs": {
                name: {"folder": str(checkpoint.folder), "files": dict(checkpoint.fingerprint)}
                for name, checkpoint in checkpoints
            },
            "plan": self.plan.to_json(),
            "seconds": dict(self.seconds),
            "bytes_read": self.bytes_read,
            "bytes_written": self.plan.bytes_written,
            "bytes_past_cache": self.bytes_past_cache,
            "resumed_parts": self.resumed_parts,
            "peak_bytes": asdict(self.peak),
            "timeline": [[round(at, 3), stage, ""] for at, stage in self.timeline],
            "memory_over_time": [list(point) for point in self.memory_over_time],
            "ranks": [asdict(peak) for peak in self.peaks] if len(self.peaks) > 1 else [],
            "before": dict(self.plan.prior.reports),
            **self._aligned(),
            **({"post": post_changes(self.plan, self.norms)} if self.plan.config.post else {}),
            **({"verified": self.verified.to_json()} if self.verified is not None else {}),
            **({measurement.name: self.measured_overall} if measurement is not None else {}),
            **self.written,
            "tensors": {task.name: self._described(task) for task in self.plan.tasks},
        }

    def _aligned(self) -> dict[str, Any]:
        """What was permuted before the merge, if anything was."""
        plan = self.plan
        if plan.matching is None or plan.matched is None:
            return {}
        return {"align": plan.matched.to_json(plan.matching)}

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows the closing table on the terminal."""
        plan = self.plan
        table = Table(
            title=f"{plan.config.merge_method}: {counted(len(plan.checkpoints), 'model')} → {self.out}",
            show_header=False,
        )
        table.add_column()
        table.add_column(overflow="fold")
        add_common_rows(table, plan)
        for title, text in rows_of(self._aligned().get("align", {}), short_name):
            table.add_row(title, text)
        for text in describe_changes(self.plan, self.norms):
            table.add_row("each step", text)
        for title, text in self.verified.rows(short_name) if self.verified is not None else ():
            table.add_row(title, text)
        measurement = METHODS[plan.config.merge_method].measurement
        if measurement is not None and (overall := self.measured_overall):
            table.add_row(measurement.title, measurement.in_words(overall))
        total = self.seconds["total"]
        table.add_row("time", f"{duration(total)}, of which preparation {duration(self.seconds['preparation'])}")
        table.add_row("peak memory", f"{gib(self.peak.host_anonymous)} anonymous (planned {gib(plan.peak_bytes)})")
        if plan.resources.device_bytes:
            planned = gib(plan.resources.device_bytes)
            table.add_row(f"on {plan.device}", f"{gib(self.peak.device)} at most (planned {planned})")
        console.print(table)

    def _described(self, task: Task) -> dict[str, Any]:
        """Says what one tensor was made of, and by which parameters."""
        described: dict[str, Any] = {"from": [f"{model}: {key}" for model, key in (*task.inputs, *task.auxiliary)]}
        if task.copied:
            return described | {"copied": task.copied}
        formula = METHODS[self.plan.config.merge_method].matrix_formula
        if task.fallback_reason and formula is not None:
            described |= {"merged_otherwise": f"{formula.fallback_name}: {task.fallback_reason}"}
        if task.inputs_first:
            described |= {"stored_as": "[inputs, outputs]"}
        measurement = METHODS[self.plan.config.merge_method].measurement
        if measurement is not None and task.name in self.measured:
            described |= {measurement.name: measurement.summary(self.measured[task.name])}
        each = {name: list(values) for name, values in task.per_model.items()}
        if task.post is not None:
            described |= {"post": [{step.name: dict(step.parameters)} for step in task.post.steps]}
            described |= {"post_norms": list(self.norms.get(task.name, ()))}
        elif task.left_by_post:
            described |= {"left_by_post": task.left_by_post}
        return described | {"each": each, **dict(task.shared)}


def post_changes(plan: DataFreePlan, norms: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Says of every step after the merge how many matrices it got, and by how much it changed their norms.

    Args:
        plan: The plan of the merge.
        norms: Norms of task vectors, see `engine.Norms`.
    """
    found = []
    for number, (name, given) in enumerate(step for entry in plan.config.post for step in entry.items()):
        pairs = [(each[number], each[number + 1]) for each in norms.values()]
        ratios = [after / before for before, after in pairs if before > 0]
        changed = {"lowest": min(ratios), "median": median(ratios), "highest": max(ratios)} if ratios else {}
        found.append({"step": name, "parameters": dict(given), "matrices": len(pairs), "norms_times": changed})
    return found


def describe_changes(plan: DataFreePlan, norms: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """Yields a line on every step after the merge."""
    for change in post_changes(plan, norms):
        text = describe_step(change["step"], change["parameters"])
        if times := change["norms_times"]:
            spread = f"{times['lowest']:.3g} to {times['highest']:.3g}"
            text += f": norms of task vectors × {times['median']:.3g} in the median ({spread})"
        yield text


def _post_section(plan: DataFreePlan, norms: Mapping[str, Sequence[float]]) -> str:
    """Makes the model card's section on the steps after the merge; empty where there are none."""
    if not plan.config.post:
        return ""
    names = dict.fromkeys(name for entry in plan.config.post for name in entry)
    named = ", ".join(f"{POST_STEPS[name].title} ({POST_STEPS[name].source})" for name in names)
    left = sum(bool(task.left_by_post) for task in plan.tasks)
    rest = f"; {counted(left, 'other tensor')} stayed as merged" if left else ""
    listed = "\n".join(f"- {text}" for text in describe_changes(plan, norms))
    matrices = counted(plan.post_json()["matrices"], "weight matrix", "weight matrices")
    return f"\n## After the merge\n\n{named}, on {matrices}{rest}.\n\n{listed}\n"


def _open_whole(plan: DataFreePlan, model: Checkpoint) -> AbstractContextManager[TensorReader]:
    """Opens a reader of a model with its head, which reads features in the order that they have in the output."""
    axes = plan.matched.axes.get(model.name) if plan.matched is not None else None
    return open_permuted(model, plan.adapters.get(model.name), axes)


def config_text(plan: DataFreePlan) -> str:
    """Returns the text of the output's `config.json`."""
    return json.dumps(plan.out_config, indent=2) + "\n"


def write_side_files(
    path: Path,
    plan: DataFreePlan,
    norms: Mapping[str, Sequence[float]] = MappingProxyType({}),
    *,
    rehearsal: bool = False,
) -> None:
    """Writes everything but weights, index, `config.json` and the report into a folder.

    Args:
        path: The folder.
        plan: The plan of the merge.
        norms: What the steps after the merge have made of the norms of task vectors, once that is known.
        rehearsal: Whether this is only to see, before the long work, that all of it can be written.

    Raises:
        LargemergeError: If anything of it cannot be read, is not what it should be, or would not load.
    """
    config = plan.config
    merged = [name for name in plan.checkpoints if name not in config.beside]
    plan.files.write(path)
    problems = [] if rehearsal else plan.files.check(path)[0]  # the plan has tried it already
    if problems:
        raise MergeError(*problems)
    documents = [one.model_dump(mode="json", exclude_defaults=True) for one in (*plan.prior.configs, config)]
    text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)
    (path / "largemerge_config.yaml").write_text(text, encoding="utf-8")
    if plan.heads is not None:
        write_heads(
            path,
            plan.heads,
            lambda name: _open_whole(plan, plan.whole[name]),
            dtype=torch_dtype(config.out_dtype) if config.out_dtype is not None else None,
        )
    weights = {entry.model: entry.parameters.get("weight", 1.0) for entry in config.models}
    numbers = {name: value for name, value in weights.items() if isinstance(value, int | float)}
    card = model_card(
        method=METHODS[config.merge_method].title,
        class_name=(plan.alignment.config.get("architectures") or ["AutoModel"])[0],
        models=[
            {"name": short_name(name), "model": name, "weight": numbers.get(name, 1.0), "data": ""} for name in merged
        ],
        base=config.base_model,
        config_yaml=text,
        version=versions()["largemerge"],
        more=(card_section(plan.heads) if plan.heads is not None else "")
        + (aligned_section(plan.matching, short_name(plan.matching.reference)) if plan.matching is not None else "")
        + _post_section(plan, norms),
    )
    (path / "README.md").write_text(card, encoding="utf-8")
