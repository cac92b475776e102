"""What a data-free merge will do, and how long it takes.

    configuration, headers → inputs, vocabulary, tasks, resources → DataFreePlan

Time comes from a probe of the disk, and of the method itself on one piece:

    disk         bytes read / rate + bytes written / rate
    computing    Σ cost of every tensor · seconds per cost, over the workers at once; cost as in `loader.cost`
    total        the longer of the two, for one goes on beside the other
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter
from largemerge.checkpoint.reader import read_rate
from largemerge.checkpoint.room import BYTES_OF_REPORT, Need
from largemerge.checkpoint.sentence_modules import module_notes, module_problems
from largemerge.checkpoint.side_files import has_tokenizer
from largemerge.checkpoint.tensor_info import OutputTensor
from largemerge.checkpoint.writer import write_rate
from largemerge.config_file import strict_problems
from largemerge.data_free.config import DataFreeConfig, filters_of
from largemerge.data_free.inputs import DataFreeInputs, PriorMerges, open_inputs, plan_matching
from largemerge.data_free.loader import cost, is_factored, merges_by_formula
from largemerge.data_free.methods.base import PIECE_ELEMENTS
from largemerge.data_free.methods.post import POST_STEPS, apply_steps
from largemerge.data_free.methods.table import METHODS, merge_tensors
from largemerge.data_free.output_config import make_output_config
from largemerge.data_free.resources import (
    PROCESS_BYTES,
    MemoryBudget,
    Resources,
    accelerated_device,
    choose_resources,
)
from largemerge.data_free.tasks import OutputTasks, Task, TokenTensors, plan_tasks
from largemerge.devices import CPU, one_thread_each
from largemerge.distributed.ranks import Ranks
from largemerge.errors import CheckpointError
from largemerge.heads import NONE, Heads, initial_tensors
from largemerge.machine import baseline_bytes
from largemerge.model.alignment import Alignment, align
from largemerge.model.skeleton import build_model
from largemerge.output import WORKING_FOLDER
from largemerge.progress import stage
from largemerge.streams import plain_text
from largemerge.tokenizer.chat_templates import choose_template
from largemerge.tokenizer.output_files import OutputFiles, find_output_files
from largemerge.tokenizer.token_ids import find_token_tensors, move_ids
from largemerge.tokenizer.vocabulary import Vocabulary, build_vocabulary, compare_by_number
from largemerge.units import counted, duration, gib
from largemerge.weight_matching.plan import AlignPlan
from largemerge.weight_matching.run import Matched

_MAX_SIDE = {"cpu": 384, "cuda": 4096}  # the shorter side of a matrix that is factored for the probe
_PROBE_COLUMNS = 1024  # at most, of any other tensor


@dataclass(frozen=True)
class DataFreePlan:
    """What a data-free merge will do.

    Attributes:
        config: The configuration, checked, with absolute paths.
        checkpoints: All models, by reference.
        auxiliary: Tensors that the method needs beside the models', by path; they have the models' names.
        alignment: The models under the names of the output, and the output's class.
        tasks: A task for every tensor of the output, in its order.
        layers: The layers of its first source that a stack's layers come from, by stack.
        out_config: Contents of the output's `config.json`; empty where there are problems with its tensors.
        resources: Workers and memory.
        vocabulary: The output's vocabulary, where embeddings are arranged by token.
        prior: Results of earlier merges of the same file.
        adapters: Adapters of models that have one, by reference.
        files: What the output has beside its weights.
        notes: What a user should know.
        problems: What makes the merge impossible.
        heads: Heads that are kept beside the output; `None` where there are none, or all are merged.
        whole: Checkpoints with their heads, by the names that `heads` has for them.
        sparing: Whether freed host memory goes back to the system at once: where the user has set a limit, or adapters
            are kept for a while between larger tensors.
        seconds: Expected seconds of `disk`, `computing` and `total`, where the machine was probed.
        matching: How models are brought close to one of them before the merge, if they are.
        matched: What was found of that, once it is.
    """

    config: DataFreeConfig
    checkpoints: dict[str, Checkpoint]
    auxiliary: dict[str, Checkpoint]
    alignment: Alignment
    tasks: list[Task]
    layers: dict[str, list[int]]
    out_config: dict[str, Any]
    resources: Resources
    vocabulary: Vocabulary | None
    prior: PriorMerges
    adapters: Mapping[str, Adapter]
    files: OutputFiles
    notes: list[str]
    problems: list[str]
    heads: Heads | None = None
    whole: Mapping[str, Checkpoint] = field(default_factory=dict)
    sparing: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    matching: AlignPlan | None = None
    matched: Matched | None = None

    @property
    def reference(self) -> str:
        """The model whose config, side files and layout on disk the output has."""
        return self.alignment.layout

    @property
    def output(self) -> dict[str, OutputTensor]:
        """The tensors of the output, by name."""
        return {task.name: OutputTensor(task.out_dtype, task.shape) for task in self.tasks}

    @property
    def bytes_read(self) -> int:
        """Bytes read from models, adapters and auxiliary tensors, each tensor counted once."""
        views = self.alignment.views
        wanted = dict.fromkeys(source for task in self.tasks for source in task.reads)
        plain = sum(
            self.checkpoints[model].tensors[key].num_bytes for model, key in wanted if key not in views[model].relayouts
        )
        converted = {
            id(views[m].relayouts[key]): views[m].relayouts[key] for m, key in wanted if key in views[m].relayouts
        }
        beside = sum(self.auxiliary[path].tensors[key].num_bytes for task in self.tasks for path, key in task.auxiliary)
        adapted = sum(adapter.num_bytes for adapter in self.adapters.values())
        return plain + sum(each.num_bytes() for each in converted.values()) + beside + adapted

    @property
    def bytes_written(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(tensor.num_bytes for tensor in self.output.values())

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch files beside the output while the merge runs: merged task vectors that wait for a factor."""
        return sum(tensor.num_bytes for tensor in self.unscaled_deltas.values())

    @property
    def unscaled_deltas(self) -> dict[str, OutputTensor]:
        """Merged task vectors that wait for the whole model's factor, by name; see `GlobalScale`."""
        if METHODS[self.config.merge_method].global_scale is None:
            return {}
        tasks = [task for task in self.tasks if task.has_factor]
        return {task.name: OutputTensor(torch.float32, task.shape) for task in tasks}

    def needs(self, out: Path, reuses: Path | None = None) -> list[Need]:
        """Lists what the merge will write where.

        Args:
            out: The output folder.
            reuses: Folder whose files are part of it already; by default the working folder in `out`.
        """
        beside = self.files.copied.num_bytes + len(self.tasks) * BYTES_OF_REPORT
        reuses = out / WORKING_FOLDER if reuses is None else reuses
        needs = [Need(out, self.bytes_written + beside, "the output", reuses)]
        return needs + ([Need(out, self.scratch_bytes, "scratch files")] if self.scratch_bytes else [])

    @property
    def num_workers(self) -> int:
        """How many workers merge side by side."""
        return self.resources.num_workers

    @property
    def device(self) -> torch.device:
        """The device that weight matrices are merged on."""
        return self.resources.accelerator.device

    @property
    def aligned_to(self) -> dict[str, Checkpoint]:
        """The model that the others are brought close to, where it is not one of the merge."""
        return self.matching.read_besides(self.checkpoints) if self.matching is not None else {}

    @property
    def peak_bytes(self) -> int:
        """Peak anonymous memory: the process as it is, libraries included, and all workers at their largest tasks."""
        if self.matching is None:
            return self.resources.peak_bytes
        return max(self.resources.peak_bytes, baseline_bytes(CPU, PROCESS_BYTES) + self.matching.peak_bytes)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "merge_method": self.config.merge_method,
            "models": list(self.checkpoints),
            "adapters": {
                name: {"adapted": len(adapter.deltas), "replaced": list(adapter.replaced)}
                for name, adapter in self.adapters.items()
            },
            "reference": self.reference,
            "class": self.alignment.class_name or None,
            **({"heads": self.heads.to_json()} if self.heads is not None else {}),
            "tensors": len(self.tasks),
            "copied": {task.name: task.copied for task in self.tasks if task.copied},
            "merged_otherwise": {task.name: task.fallback_reason for task in self.tasks if task.fallback_reason},
            **({"post": self.post_json()} if self.config.post else {}),
            "scratch_bytes": self.scratch_bytes,
            "layers": self.layers,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_bytes": self.peak_bytes,
            "num_workers": self.num_workers,
            "device": str(self.device),
            "device_bytes": self.resources.device_bytes,
            "kept_bytes": self.resources.kept_bytes,
            "seconds": dict(self.seconds),
            "vocabulary": self.vocabulary.to_json() if self.vocabulary is not None else None,
            "notes": self.notes,
            "problems": self.problems,
        }

    def post_json(self) -> dict[str, Any]:
        """The steps after the merge as plain JSON values: what they are, and which tensors they leave as they are."""
        return {
            "steps": [{name: dict(parameters)} for entry in self.config.post for name, parameters in entry.items()],
            "matrices": sum(task.post is not None for task in self.tasks),
            "left": {task.name: task.left_by_post for task in self.tasks if task.left_by_post},
        }

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows the plan as a table."""
        table = Table(
            title=f"{self.config.merge_method} of {counted(len(self.checkpoints), 'model')}", show_header=False
        )
        table.add_column()
        table.add_column(overflow="fold")
        add_common_rows(table, self)
        on_device = f" and {gib(self.resources.device_bytes)} on {self.device}" if self.resources.device_bytes else ""
        table.add_row(
            "peak memory", f"{gib(self.peak_bytes)} on the host{on_device}, {counted(self.num_workers, 'worker')}"
        )
        if self.seconds:
            disk, computing, total = (duration(self.seconds[stage]) for stage in ("disk", "computing", "total"))
            table.add_row("time", f"about {total}: disk {disk}, computing beside it {computing}")
        for problem in self.problems:
            table.add_row(Text("impossible", style="red"), problem)
        console.print(table)


@dataclass(frozen=True)
class SeriesPlan:
    """What all merges of a file will do.

    Attributes:
        plans: The plan of every document, in the order in which they are run.
    """

    plans: dict[str, DataFreePlan]

    @property
    def problems(self) -> list[str]:
        """What makes the merges impossible, with the documents' names."""
        return [f"{label}: {problem}" for label, plan in self.plans.items() for problem in plan.problems]

    @property
    def notes(self) -> list[str]:
        """What a user should know of any of the merges."""
        return [note for plan in self.plans.values() for note in plan.notes]

    @property
    def sparing(self) -> bool:
        """Whether freed host memory goes back to the system at once."""
        return any(plan.sparing for plan in self.plans.values())

    def to_json(self) -> dict[str, Any]:
        """The plans as plain JSON values."""
        return {"documents": {label: plan.to_json() for label, plan in self.plans.items()}}

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows a table for every document."""
        for label, plan in self.plans.items():
            console.print(f"{label}:")
            plan.print(console)


def add_common_rows(table: Table, plan: DataFreePlan) -> None:
    """Adds what the tables of a plan and of a report both show."""
    table.add_row("models", "\n".join(plan.checkpoints))
    table.add_row("model class", plan.alignment.class_name or "none: tensors are matched by their names on disk")
    if plan.heads is not None:
        table.add_row("heads", plan.heads.summary())
    copied = [task for task in plan.tasks if task.copied]
    counts = f"{len(plan.tasks) - len(copied)} merged"
    by_fallback = sum(bool(task.fallback_reason) for task in plan.tasks)
    counts += f", {by_fallback} of them otherwise (see the notes)" if by_fallback else ""
    table.add_row("tensors", counts + (f", {len(copied)} copied: {copied[0].copied}" if copied else ""))
    if plan.config.post:
        posted = plan.post_json()
        steps = "; ".join(describe_step(name, given) for entry in plan.config.post for name, given in entry.items())
        left = f", {len(posted['left'])} other tensors stay as merged (see the notes)" if posted["left"] else ""
        table.add_row("after the merge", f"{steps}: {counted(posted['matrices'], 'matrix', 'matrices')}{left}")
    scratch = f", {gib(plan.scratch_bytes)} beside it for the time being" if plan.scratch_bytes else ""
    table.add_row("disk", f"{gib(plan.bytes_read)} to read, {gib(plan.bytes_written)} to write" + scratch)
    for name, adapter in plan.adapters.items():
        replaced = f", {len(adapter.replaced)} replaced" if adapter.replaced else ""
        table.add_row("adapter", f"{name}: {counted(len(adapter.deltas), 'weight')} adapted{replaced}")
    if plan.vocabulary is not None:
        table.add_row("vocabulary", plan.vocabulary.summary())
    for note in plan.notes:
        table.add_row("note", note)


def describe_step(name: str, given: Mapping[str, Any]) -> str:
    """Describes a step after the merge by its name, and its parameters as the file has them, else by default."""
    values = {**POST_STEPS[name].parameters, **given}
    texts = [f"{key} {plain_value(value)}" for key, value in values.items() if value is not None]
    return f"{name} ({', '.join(texts)})" if texts else name


def plain_value(value: Any) -> str:
    """Writes a parameter's value in a line: a number, a truth value, or a list of some with filters."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, int | float) else json.dumps(value)


def plan_data_free(
    config: DataFreeConfig,
    prior: PriorMerges | None = None,
    *,
    device: str = "auto",
    ranks: Ranks | None = None,
    limits: MemoryBudget | None = None,
    probe: bool = False,
) -> DataFreePlan:
    """Plans a data-free merge from the configuration and the checkpoints' headers.

    Args:
        config: The configuration, from `load_data_free`.
        prior: Results of earlier merges of the same file.
        device: Device that weight matrices are merged on, see `accelerated_device`.
        ranks: The ranks that share the merge; by default there is one.
        limits: Limits of memory that come before those of the configuration.
        probe: Whether to measure this machine for a second, so that the plan says how long the merge will take.

    Raises:
        LargemergeError: If the inputs cannot be opened, or the device not be used. What merely makes the merge
            impossible is in the plan's `problems`.
    """
    prior, ranks = prior or PriorMerges(), ranks or Ranks()
    method = config.merge_method
    computes_on = accelerated_device(method, device, ranks, has_steps=bool(config.post))
    stage("reading the headers of all models")
    inputs = open_inputs(config, prior)
    stage("finding neurons and heads that may change places" if config.align is not None else "")
    matching = plan_matching(config, inputs, prior)
    stage("matching tensors through the model's class")
    alignment = align(
        inputs.checkpoints,
        inputs.adapters,
        inputs.reference,
        base=config.base_model,
        trust_remote_code=config.trust_remote_code,
        allow_crimes=config.allow_crimes,
        compares_labels=inputs.heads is None,
    )
    vocabulary = _vocabulary(config, inputs, alignment, prior)
    inputs = replace(inputs, checkpoints=_as_modules_hold(inputs.checkpoints, alignment))
    token_rows, rows_notes = _token_rows(config, inputs, alignment)
    bare = inputs.heads is not None and inputs.heads.choice == NONE
    new = {name: shape for name, (_, shape) in alignment.lacking.items()} if bare else {}
    output = plan_tasks(config, alignment.views, inputs.auxiliary, vocabulary, token_rows, inputs.heads, new)
    output.notes.extend(rows_notes)
    output.notes[:0], output.problems[:0] = alignment.notes, alignment.problems
    if vocabulary is not None:
        output.notes.extend(vocabulary.notes)
    output.notes.extend(dict.fromkeys(note for adapter in inputs.adapters.values() for note in adapter.notes))
    adapter_bytes = sum(adapter.kept_bytes for adapter in inputs.adapters.values())
    adapter_bytes += sum(view.kept_bytes for view in alignment.views.values())
    if matching is not None:
        output.notes.extend(matching.notes)
        output.problems.extend(matching.problems)
        adapter_bytes += torch.get_num_threads() * matching.largest_bytes  # copies of tensors as they are read
    if device not in ("auto", "cpu") and computes_on.type == "cpu":
        output.notes.append(f"{method} goes element by element, at the speed of the disk: on the CPU")
    limits = (limits or MemoryBudget()).with_defaults(config.memory, ranks.local_size)
    template = _template(config, inputs, output)
    trusted = config.trust_remote_code
    out_config = {} if output.problems else make_output_config(alignment, output, vocabulary, trust_remote_code=trusted)
    files = _output_files(config, inputs, alignment, vocabulary, template, output.problems)
    plan = DataFreePlan(
        config=config,
        checkpoints=inputs.checkpoints,
        auxiliary=inputs.auxiliary,
        alignment=alignment,
        tasks=output.tasks,
        layers=output.layers,
        out_config=out_config,
        resources=choose_resources(method, output, adapter_bytes, limits, computes_on),
        vocabulary=vocabulary,
        prior=prior,
        adapters=inputs.adapters,
        files=files,
        notes=[*config.notes, *output.notes, *_idle_filters(config, output)],
        problems=output.problems,
        heads=inputs.heads,
        whole=inputs.whole,
        sparing=limits.host is not None or bool(inputs.adapters),
        matching=matching,
    )
    _check_memory(plan, limits)
    _check_folders(plan, ranks)
    if config.strict:
        plan.problems.extend(strict_problems(plan.notes))
    stage("measuring this machine" if probe else "")
    return replace(plan, seconds=estimate_seconds(plan)) if probe and not plan.problems else plan


def _check_memory(plan: DataFreePlan, limits: MemoryBudget) -> None:
    """Adds to a plan's problems if one block of two models does not fit into memory while they are matched."""
    if (
        plan.matching is not None
        and limits.host is not None
        and plan.peak_bytes > max(limits.host, plan.resources.peak_bytes)
    ):
        plan.problems.append(
            f"memory.host: {gib(limits.host)} is too little: align needs {gib(plan.peak_bytes)} for one block of two "
            "models; expected that much"
        )


def _check_folders(plan: DataFreePlan, ranks: Ranks) -> None:
    """Adds to a plan what there is to say of its inputs' folders: how they were read, what is copied, the tokenizer."""
    checkpoints = list(plan.checkpoints.values())
    plan.notes.extend(dict.fromkeys(note for checkpoint in checkpoints for note in checkpoint.notes))
    plan.notes.extend([*module_notes(checkpoints), *plan.files.copied.notes])
    plan.problems.extend(module_problems(checkpoints))
    source = plan.files.tokenizer_source
    if plan.vocabulary is None and has_tokenizer(source) and source != plan.checkpoints[plan.reference].folder:
        plan.notes.append(f"the tokenizer comes from {source}")
    if ranks.is_first and not plan.problems:
        stage("checking the tokenizer")
        problems, notes = plan.files.check()
        plan.problems.extend(problems)
        plan.notes.extend(notes)


def _output_files(
    config: DataFreeConfig,
    inputs: DataFreeInputs,
    alignment: Alignment,
    vocabulary: Vocabulary | None,
    template: str | None,
    problems: Sequence[str],
) -> OutputFiles:
    """Finds what the output has beside its weights; what is wrong there is told with all other problems."""
    reference = inputs.checkpoints[alignment.layout]
    others = [checkpoint for name, checkpoint in inputs.checkpoints.items() if name != alignment.layout]
    try:
        return find_output_files(
            reference,
            [reference, *others],
            inputs.adapters,
            vocabulary=vocabulary,
            template=template,
            trust_remote_code=config.trust_remote_code,
        )
    except CheckpointError as error:
        raise CheckpointError(*problems, *error.problems) from None


def _idle_filters(config: DataFreeConfig, output: OutputTasks) -> Iterator[str]:
    """Yields the filters that fit no tensor."""
    names = {name for task in output.tasks for name in (task.name, *(key for _, key in task.inputs))}
    for place, pattern in filters_of(config) if names else ():
        if not any(pattern in name for name in names):
            yield f"{place}: the filter {pattern!r} is part of no tensor's name"


def _vocabulary(
    config: DataFreeConfig, inputs: DataFreeInputs, alignment: Alignment, prior: PriorMerges
) -> Vocabulary | None:
    """Builds the output's vocabulary, where the configuration arranges embeddings by token."""
    if config.vocabulary is None:
        return None
    tensors = find_token_tensors(alignment, inputs.checkpoints[alignment.layout])
    elsewhere = {name: checkpoint.folder for name, checkpoint in prior.checkpoints.items()}
    vocabulary = build_vocabulary(
        config.vocabulary,
        inputs.tokenizer_folders,
        config.base_model,
        alignment.layout,
        tensors,
        elsewhere,
        trust_remote_code=config.trust_remote_code,
    )
    moved = copy.deepcopy(dict(alignment.config))
    vocabulary.notes += move_ids(
        moved, vocabulary.reference.ids, vocabulary.tokenizer.ids, vocabulary.tokenizer.special
    )
    return vocabulary


def _as_modules_hold(checkpoints: Mapping[str, Checkpoint], alignment: Alignment) -> dict[str, Checkpoint]:
    """Returns the models with quantised weights as the modules hold them: GPT-2's lie on disk as linears would."""
    return {
        name: replace(checkpoint, tensors=alignment.views[name].checkpoint.tensors)
        for name, checkpoint in checkpoints.items()
    }


def initial_values(alignment: Alignment, *, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """Makes tensors that no model has as the output's class initialises them, the same ones each time."""
    checkpoint = replace(alignment.views[alignment.layout].checkpoint, config=alignment.config)
    model = build_model(checkpoint, trust_remote_code=trust_remote_code)
    made = initial_tensors(model, [parameter for parameter, _ in alignment.lacking.values()])
    return {name: made[parameter] for name, (parameter, _) in alignment.lacking.items()}


def _token_rows(config: DataFreeConfig, inputs: DataFreeInputs, alignment: Alignment) -> tuple[TokenTensors, list[str]]:
    """Finds out whether rows of embeddings can be matched by number, where no settings arrange them by token."""
    names = alignment.token_tensors or frozenset()
    if config.vocabulary is not None or not names:
        return TokenTensors(names), []
    sizes = {view.tensors[name].shape[0] for view in alignment.views.values() for name in names if name in view.tensors}
    trusted = config.trust_remote_code
    needed, clash = compare_by_number(inputs.tokenizer_folders, always=len(sizes) > 1, trust_remote_code=trusted)
    advice = "tokenizer_source: union merges them by token"
    if clash is not None:
        return TokenTensors(names), [f"vocabularies differ: {clash}; rows of embeddings are merged by number; {advice}"]
    rows = max(
        (info.shape[0] for name, info in alignment.views[alignment.layout].tensors.items() if name in names), default=0
    )
    if len(sizes) == 1 or not 0 < needed <= min(rows, *sizes):  # of a token without a row nothing is known
        return TokenTensors(names), []
    found = ", ".join(map(str, sorted(sizes)))
    note = f"one tokenizer, but {found} rows: those beyond its tokens are padding; the output has {rows}"
    return TokenTensors(names, rows), [note]


def _template(config: DataFreeConfig, inputs: DataFreeInputs, output: OutputTasks) -> str | None:
    """Chooses the chat template, where the configuration has one; notes and problems go to `output`."""
    if not config.chat_template:
        return None
    folders = list(inputs.tokenizer_folders.values())
    if config.vocabulary is None and not any(map(has_tokenizer, folders)):
        output.problems.append("chat_template: no model has a tokenizer that could have one; leave it out")
    template, origin = choose_template(config.chat_template, folders)
    output.notes.append(f"chat template: {origin}")
    return template


def estimate_seconds(plan: DataFreePlan) -> dict[str, float]:
    """Estimates the seconds of every stage of a plan without problems, from a probe of about a second.

    Where the output will lie is not known yet: the rate of writing is that of the system's temporary files.
    """
    method = plan.config.merge_method
    workers = plan.num_workers
    read = read_rate(list(plan.checkpoints.values()), num_workers=workers, past_cache=True)
    moved = plan.bytes_written + 2 * plan.scratch_bytes  # scratch files are written and read
    disk = plan.bytes_read / read + moved / write_rate(None, num_workers=workers)
    computing = 0.0
    at_once = min(workers, torch.get_num_threads())
    for device, tasks in _alike(plan):
        seconds = sum(cost(method, task) for task in tasks) * _seconds_per_cost(method, tasks, device)
        computing += seconds / (at_once if device.type == "cpu" else 1)
    return {"disk": round(disk, 2), "computing": round(computing, 2), "total": round(max(disk, computing), 2)}


def _alike(plan: DataFreePlan) -> Iterator[tuple[torch.device, list[Task]]]:
    """Yields tasks of like speed, with their device: weight matrices of one shape, and all the rest."""
    method, kinds = plan.config.merge_method, dict[Any, list[Task]]()
    for task in plan.tasks:
        if not task.copied and not task.instead and task.num_elements:
            device = plan.resources.accelerator.device_of(method, task)
            kinds.setdefault((device, task.shape if is_factored(method, task) else None), []).append(task)
    yield from ((device, tasks) for (device, _), tasks in kinds.items())


def _seconds_per_cost(method: str, tasks: Sequence[Task], device: torch.device) -> float:
    """Measures the largest of some tasks, cut down to a piece, or, where it is factored, to a smaller matrix."""
    task = max(tasks, key=lambda task: task.num_elements)
    if is_factored(method, task):
        rows, columns = reversed(task.shape) if task.inputs_first else task.shape
        scale = min(1.0, _MAX_SIDE[device.type] / min(rows, columns))
        shape: tuple[int, ...] = (round(rows * scale), round(columns * scale))
    elif len(task.shape) < 2 or task.fallback_reason:
        shape = (min(PIECE_ELEMENTS, task.num_elements),)
    else:
        columns = min(task.num_elements // task.shape[0], _PROBE_COLUMNS)
        shape = (max(1, min(task.shape[0], PIECE_ELEMENTS // columns)), columns)
    generator = torch.Generator().manual_seed(0)
    merges_on = device if merges_by_formula(method, task) else CPU
    base = torch.randn(shape, generator=generator).to(merges_on)
    tensors = [
        (base + 0.1 * torch.randn(shape, generator=generator).to(merges_on)).to(task.dtype) for _ in task.sources
    ]
    auxiliary = [torch.rand(shape, generator=generator) for _ in task.auxiliary]
    origin = base.to(task.dtype) if task.base is not None else None
    times = []
    with one_thread_each(), torch.inference_mode():
        for _ in range(2 if device.type == "cpu" else 1):
            start = time.perf_counter()
            options = {"per_model": task.per_model, "auxiliary": auxiliary, **task.shared}
            merged = merge_tensors(method, tensors, origin, **options)
            if task.post is not None:
                deltas = [(tensor - base).to(device).float() for tensor in tensors]
                held = [deltas[number % len(deltas)] for number in range(len(task.post.candidates))]
                merged, _ = apply_steps((merged - base).to(device).float(), task.post.steps, partial(iter, held))
            merged.to(CPU)
            times.append(time.perf_counter() - start)
    return min(times) / (base.numel() * (min(shape) if is_factored(method, task) else 1))
