"""What a data-free merge will do, from the configuration and the checkpoints' headers.

How long a data-free merge takes: a probe of the disk, and of the method itself on one piece.

disk         bytes read / rate + bytes written / rate
computing    Σ cost of every tensor · seconds per cost, over the workers that compute at once; cost as in `stream.cost`
total        the longer of the two, for one goes on beside the other
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter
from largemerge.checkpoint.tensor_info import OutputTensor
from largemerge.checkpoint.throughput import read_rate, write_rate
from largemerge.config_file import gib
from largemerge.data_free.config import DataFreeConfig
from largemerge.data_free.inputs import Before, Opened, open_all
from largemerge.data_free.loader import cost, is_factored
from largemerge.data_free.methods.base import PIECE_ELEMENTS
from largemerge.data_free.methods.table import METHODS, merge_tensors
from largemerge.data_free.resources import Holding, Limits, accelerated_device, choose_holding
from largemerge.data_free.tasks import Layout, Task, lay_out
from largemerge.devices import CPU, one_thread_each
from largemerge.distributed.ranks import Ranks
from largemerge.tokenizer.chat_templates import choose_template
from largemerge.tokenizer.token_ids import move_ids
from largemerge.tokenizer.tokenizers import has_tokenizer
from largemerge.tokenizer.vocabulary import Vocabulary, build_vocabulary


@dataclass(frozen=True)
class DataFreePlan:
    """What a data-free merge will do.

    Attributes:
        config: Resolved.
        checkpoints: By model.
        companions: What the method wants beside the models, by path: tensors with the models' names.
        reference: The model whose names and config the output has.
        layout: All tensors of the output.
        holding: How much is held at once.
        vocabulary: Of the output, where embeddings are arranged by token.
        before: What other merges have made for this one.
        adapters: By model, of those that have one.
        template: The output's chat template, where it is not its tokenizer's.
        sparing: Whether freed host memory is to go back to the system at once: where the user has set a limit.
        seconds: By stage, where the machine was probed.
    """

    config: DataFreeConfig
    checkpoints: dict[str, Checkpoint]
    companions: dict[str, Checkpoint]
    reference: str
    layout: Layout
    holding: Holding
    vocabulary: Vocabulary | None
    before: Before
    adapters: Mapping[str, Adapter]
    template: str | None
    sparing: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """What makes it impossible."""
        return self.layout.problems

    @property
    def output(self) -> dict[str, OutputTensor]:
        """What is written, by name."""
        return {task.name: OutputTensor(task.out_dtype, task.shape) for task in self.layout.tasks}

    @property
    def bytes_read(self) -> int:
        """From checkpoints and what belongs to them, each tensor counted once."""
        return sum(
            files[model].tensors[key].num_bytes
            for task in self.layout.tasks
            for files, keys in ((self.checkpoints, task.inputs), (self.companions, task.companions))
            for model, key in keys
        ) + sum(adapter.num_bytes for adapter in self.adapters.values())

    @property
    def bytes_written(self) -> int:
        """Of all tensors of the output."""
        return sum(tensor.num_bytes for tensor in self.output.values())

    @property
    def scratch_bytes(self) -> int:
        """On the output's disk while the merge runs, beside the output: merged task vectors that wait for a factor."""
        return sum(tensor.num_bytes for tensor in self.unscaled.values())

    @property
    def unscaled(self) -> dict[str, OutputTensor]:
        """Merged task vectors that wait for the whole model's factor, by name."""
        if METHODS[self.config.merge_method].scaled is None:
            return {}
        tasks = [task for task in self.layout.tasks if not task.copied]
        return {task.name: OutputTensor(torch.float32, task.shape) for task in tasks}

    @property
    def num_workers(self) -> int:
        """That work side by side."""
        return self.holding.num_workers

    @property
    def device(self) -> torch.device:
        """Where matrices are computed."""
        return self.holding.accelerator.device

    @property
    def peak_bytes(self) -> int:
        """Anonymous memory, libraries included: the process as it is, and all workers at their largest tasks."""
        return self.holding.peak_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "merge_method": self.config.merge_method,
            "models": list(self.checkpoints),
            "adapters": {
                name: {"adapted": len(adapter.deltas), "replaced": list(adapter.replaced)}
                for name, adapter in self.adapters.items()
            },
            "reference": self.reference,
            "tensors": len(self.layout.tasks),
            "copied": {task.name: task.copied for task in self.layout.tasks if task.copied},
            "merged_otherwise": {task.name: task.otherwise for task in self.layout.tasks if task.otherwise},
            "scratch_bytes": self.scratch_bytes,
            "layers": self.layout.layers,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_bytes": self.peak_bytes,
            "num_workers": self.num_workers,
            "device": str(self.device),
            "device_bytes": self.holding.device_bytes,
            "kept_bytes": self.holding.kept_bytes,
            "seconds": dict(self.seconds),
            "vocabulary": self.vocabulary.to_json() if self.vocabulary is not None else None,
            "notes": self.layout.notes,
            "problems": self.layout.problems,
        }

    def print(self, console: Console) -> None:
        """Shows the plan as a table."""
        table = Table(title=f"{self.config.merge_method} of {len(self.checkpoints)} models", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        add_common_rows(table, self)
        on_device = f" and {gib(self.holding.device_bytes)} on {self.device}" if self.holding.device_bytes else ""
        table.add_row("peak memory", f"{gib(self.peak_bytes)} on the host{on_device}, {self.num_workers} workers")
        if self.seconds:
            disk, computing, total = (self.seconds[stage] for stage in ("disk", "computing", "total"))
            table.add_row("time", f"about {total:.0f} s: disk {disk:.1f} s, computing beside it {computing:.1f} s")
        for problem in self.problems:
            table.add_row(Text("impossible", style="red"), problem)
        console.print(table)


@dataclass(frozen=True)
class SeriesPlan:
    """What all merges of a file will do.

    Attributes:
        plans: By document, in the order in which they are made.
    """

    plans: dict[str, DataFreePlan]

    @property
    def problems(self) -> list[str]:
        """What makes it impossible."""
        return [f"{label}: {problem}" for label, plan in self.plans.items() for problem in plan.problems]

    @property
    def sparing(self) -> bool:
        """Whether freed host memory is to go back to the system at once."""
        return any(plan.sparing for plan in self.plans.values())

    def to_json(self) -> dict[str, Any]:
        """The plans as plain JSON values."""
        return {"documents": {label: plan.to_json() for label, plan in self.plans.items()}}

    def print(self, console: Console) -> None:
        """Shows a table for every document."""
        for label, plan in self.plans.items():
            console.print(f"{label}:")
            plan.print(console)


def add_common_rows(table: Table, plan: DataFreePlan) -> None:
    """Adds what the tables of a plan and of a report both show."""
    table.add_row("models", "\n".join(plan.checkpoints))
    copied = [task for task in plan.layout.tasks if task.copied]
    counts = f"{len(plan.layout.tasks) - len(copied)} merged"
    otherwise = sum(bool(task.otherwise) for task in plan.layout.tasks)
    counts += f", {otherwise} of them otherwise (see the notes)" if otherwise else ""
    table.add_row("tensors", counts + (f", {len(copied)} copied: {copied[0].copied}" if copied else ""))
    scratch = f", {gib(plan.scratch_bytes)} beside it for the time being" if plan.scratch_bytes else ""
    table.add_row("disk", f"{gib(plan.bytes_read)} to read, {gib(plan.bytes_written)} to write" + scratch)
    for name, adapter in plan.adapters.items():
        replaced = f", {len(adapter.replaced)} replaced" if adapter.replaced else ""
        table.add_row("adapter", f"{name}: {len(adapter.deltas)} weights adapted{replaced}")
    if plan.vocabulary is not None:
        table.add_row("vocabulary", plan.vocabulary.told())
    for note in plan.layout.notes:
        table.add_row("note", note)


def plan_data_free(
    config: DataFreeConfig,
    before: Before | None = None,
    *,
    device: str = "auto",
    ranks: Ranks | None = None,
    limits: Limits | None = None,
    probe: bool = False,
) -> DataFreePlan:
    """Plans a data-free merge from the configuration and the checkpoints' headers.

    Args:
        config: From `load_data_free`.
        before: What other merges have made for this one.
        device: Where matrices are computed, see `accelerated_device`.
        ranks: That share the merge; by default there is one.
        limits: That come before those of the configuration.
        probe: Measure this machine for a second, so that the plan says how long the merge will take.

    Raises:
        LargemergeError: If the inputs cannot be opened, or the device not be used. What merely makes the merge
            impossible is in the layout's `problems`.
    """
    before, ranks = before or Before(), ranks or Ranks()
    computes_on = accelerated_device(config.merge_method, device, ranks)
    opened = open_all(config, before)
    reference = config.base_model if config.base_model is not None else config.references[0]
    vocabulary = _vocabulary(config, opened, reference, before)
    layout = lay_out(config, opened.checkpoints, reference, opened.companions, vocabulary)
    if vocabulary is not None:
        layout.notes.extend(vocabulary.notes)
    adapter_bytes = sum(adapter.kept_bytes for adapter in opened.adapters.values())
    if device not in ("auto", "cpu") and computes_on.type == "cpu":
        layout.notes.append(f"{config.merge_method} goes element by element, at the speed of the disk: on the CPU")
    limits = (limits or Limits()).or_those_of(config.memory, ranks.local_size)
    plan = DataFreePlan(
        config=config,
        checkpoints=opened.checkpoints,
        companions=opened.companions,
        reference=reference,
        template=_template(config, opened, layout),
        layout=layout,
        holding=choose_holding(config.merge_method, layout, adapter_bytes, limits, computes_on),
        vocabulary=vocabulary,
        before=before,
        adapters=opened.adapters,
        sparing=limits.host is not None,
    )
    if not probe or plan.problems:
        return plan

    return replace(plan, seconds=estimate_seconds(plan))


def _vocabulary(config: DataFreeConfig, opened: Opened, reference: str, before: Before) -> Vocabulary | None:
    if config.vocabulary is None:
        return None
    from largemerge.tokenizer.token_ids import find_token_tensors

    found = opened.checkpoints[reference]
    elsewhere = {name: checkpoint.folder for name, checkpoint in before.checkpoints.items()}
    vocabulary = build_vocabulary(
        config.vocabulary, opened.tokenizer_folders, config.base_model, reference, find_token_tensors(found), elsewhere
    )
    moved = copy.deepcopy(dict(found.config))
    vocabulary.notes += move_ids(
        moved, vocabulary.reference.ids, vocabulary.tokenizer.ids, vocabulary.tokenizer.special
    )
    return vocabulary


def _template(config: DataFreeConfig, opened: Opened, layout: Layout) -> str | None:
    """The chat template, where the configuration says something of it; notes and problems go to the layout."""
    if not config.chat_template:
        return None
    folders = list(opened.tokenizer_folders.values())
    if config.vocabulary is None and not any(map(has_tokenizer, folders)):
        layout.problems.append("chat_template: no model has a tokenizer that could have one; leave it out")
    template, told = choose_template(config.chat_template, folders)
    layout.notes.append(f"chat template: {told}")
    return template


_MOST_SIDE = {"cpu": 384, "cuda": 4096}  # the shorter one, of a matrix that is factored for the probe
_COLUMNS = 1024


def estimate_seconds(plan: DataFreePlan) -> dict[str, float]:
    """Seconds by stage of a plan without problems, from a probe of about a second.

    Where the output will lie is not known yet: the rate of writing is that of the system's temporary files.
    """
    method = plan.config.merge_method
    workers = plan.num_workers
    read = read_rate(list(plan.checkpoints.values()), num_workers=workers, past_cache=True)
    moved = plan.bytes_written + 2 * plan.scratch_bytes
    disk = plan.bytes_read / read + moved / write_rate(None, num_workers=workers)
    computing = 0.0
    at_once = min(workers, torch.get_num_threads())
    for device, tasks in _alike(plan):
        seconds = sum(cost(method, task) for task in tasks) * _seconds_per_cost(method, tasks, device)
        computing += seconds / (at_once if device.type == "cpu" else 1)
    return {"disk": round(disk, 2), "computing": round(computing, 2), "total": round(max(disk, computing), 2)}


def _alike(plan: DataFreePlan) -> Iterator[tuple[torch.device, list[Task]]]:
    """Tasks of which one tells of the others, and where they are computed: matrices of one shape, and all the rest."""
    method, kinds = plan.config.merge_method, dict[Any, list[Task]]()
    for task in plan.layout.tasks:
        if not task.copied and task.num_elements:
            device = plan.holding.accelerator.device_of(method, task)
            kinds.setdefault((device, task.shape if is_factored(method, task) else None), []).append(task)
    yield from ((device, tasks) for (device, _), tasks in kinds.items())


def _seconds_per_cost(method: str, tasks: Sequence[Task], device: torch.device) -> float:
    """Of the largest of some tasks, cut down to a piece, or, where matrices are factored, to a smaller one."""
    task = max(tasks, key=lambda each: each.num_elements)
    if is_factored(method, task):
        rows, columns = reversed(task.shape) if task.inputs_first else task.shape
        scale = min(1.0, _MOST_SIDE[device.type] / min(rows, columns))
        shape: tuple[int, ...] = (round(rows * scale), round(columns * scale))
    elif len(task.shape) < 2 or task.otherwise:
        shape = (min(PIECE_ELEMENTS, task.num_elements),)
    else:
        columns = min(task.num_elements // task.shape[0], _COLUMNS)
        shape = (max(1, min(task.shape[0], PIECE_ELEMENTS // columns)), columns)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).to(device)
    tensors = [(base + 0.1 * torch.randn(shape, generator=generator).to(device)).to(task.dtype) for _ in task.sources]
    companions = [torch.rand(shape, generator=generator) for _ in task.companions]
    origin = base.to(task.dtype) if task.base is not None else None
    times = []
    with one_thread_each(), torch.inference_mode():
        for _ in range(2 if device.type == "cpu" else 1):
            start = time.perf_counter()
            merge_tensors(method, tensors, origin, each=task.each, companions=companions, **task.options).to(CPU)
            times.append(time.perf_counter() - start)
    return min(times) / (base.numel() * (min(shape) if is_factored(method, task) else 1))
