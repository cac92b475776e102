"""The plan of a merge: what it will read, write, hold and compute. `planning.py` makes it.

The plan of a merge: what it will read, write, hold and compute, from headers and configs alone.

`make_plan` opens the inputs, rehearses the model, and gives every tensor of the output its treatment. What
makes the merge impossible is collected in `problems`, all at once; `merge` runs a plan only without any.

What a planned merge will take: seconds by stage, and what each of its ranks will hold, move and compute.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from largemerge.calibration import CalibrationOutline, CalibrationSet
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.locate import existing_folder
from largemerge.checkpoint.tensor_info import OutputTensor, dtype_name
from largemerge.config_file import gib
from largemerge.devices import compute_a_little, warm_up
from largemerge.distributed.partition import samples_at_once
from largemerge.machine import memory_in_use
from largemerge.model.key_mapping import KeyMapping
from largemerge.model.trace import ModelTrace, trace_model
from largemerge.regression.config import MergeConfig
from largemerge.regression.inputs import Inputs
from largemerge.regression.planning.cost import Links, Rates, estimate_rank_seconds, estimate_seconds
from largemerge.regression.planning.placement import (
    Choice,
    Footprint,
    Limits,
    choose_placement,
    find_limits,
    footprint,
    maps_inputs,
)
from largemerge.regression.planning.ranks import RankPlan, plan_ranks, share_work
from largemerge.regression.planning.rates import Machines, measure_rates
from largemerge.regression.planning.workload import (
    BatchShapes,
    Placement,
    RankShare,
    Workload,
    batch_shapes,
    measure_workload,
    split_shapes,
)
from largemerge.regression.tensor_plan import (
    BlockPlan,
    MergeRule,
    TensorPlan,
    check_tensors,
    output_tensors,
    plan_blocks,
    plan_non_block,
    quantize_output,
    tensor_labels,
)

_MAX_RANK_ROWS = 8


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        config: Resolved.
        class_name: Of the model.
        device: That computes.
        compute_dtype: Of the forward passes.
        stacks: Name and number of blocks, in the order in which they run.
        blocks: In order.
        non_block: Tensors of no block.
        output: What is written, by name on disk.
        num_samples: Calibration samples by candidate (upper bounds before the data is read).
        quantized: By input: how many of its weights are quantised, and how.
        adapters: By input that has an adapter: how many weights it adds to, and which tensors it replaces.
        bytes_read: From checkpoints.
        placement: Where things are held, chosen to keep the limits.
        reasons: Why this placement.
        footprint: Its bytes at the peak.
        limits: That it keeps.
        notes: What a user should know.
        problems: What makes it impossible.
        seconds: By stage, estimated from a probe of this machine or from data sheets; empty if nobody asked.
        measured: Whether the rates behind the seconds were measured here.
        ranks: What every rank would do, where several were asked for.
    """

    config: MergeConfig
    class_name: str
    device: torch.device
    compute_dtype: torch.dtype
    stacks: tuple[tuple[str, int], ...]
    blocks: tuple[BlockPlan, ...]
    non_block: tuple[TensorPlan, ...]
    output: Mapping[str, OutputTensor]
    num_samples: Mapping[str, int]
    quantized: Mapping[str, Mapping[str, int]]
    adapters: Mapping[str, Mapping[str, Any]]
    bytes_read: int
    placement: Placement
    reasons: tuple[str, ...]
    footprint: Footprint
    limits: Limits
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    measured: bool = True
    ranks: tuple[RankPlan, ...] = ()

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """All tensors of the output."""
        return (*(plan for block in self.blocks for plan in block.tensors), *self.non_block)

    @property
    def bytes_written(self) -> int:
        """Of all tensors of the output."""
        return sum(tensor.num_bytes for tensor in self.output.values())

    @property
    def output_dtype(self) -> torch.dtype:
        """In which most of the output is written."""
        num_bytes: Counter[torch.dtype] = Counter()
        for tensor in self.output.values():
            if tensor.dtype.is_floating_point:
                num_bytes[tensor.dtype] += tensor.num_bytes
        return num_bytes.most_common(1)[0][0]

    def counts(self) -> dict[str, int]:
        """Tensors by treatment, and by reason where they are not solved."""
        counter = Counter(plan.rule.value + (f": {plan.reason}" if plan.reason else "") for plan in self.tensors)
        return dict(counter.most_common())

    def quantized_output(self) -> dict[str, int]:
        """How many weights are written quantised, by how they are."""
        return dict(Counter(tensor.quantization.label for tensor in self.output.values() if tensor.quantization))

    @property
    def sparing(self) -> bool:
        """Whether freed host memory is to go back to the system at once."""
        return self.footprint.sparing

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "merge_method": self.config.merge_method,
            "class": self.class_name,
            "device": str(self.device),
            "compute_dtype": dtype_name(self.compute_dtype),
            "candidates": list(self.config.names),
            "num_samples": dict(self.num_samples),
            "stacks": [{"name": name, "num_blocks": count} for name, count in self.stacks],
            "tensors": self.counts(),
            "linears": [
                {"block": block.name, "shared_input": group.leader, "linears": list(group.outputs)}
                for block in self.blocks
                for group in block.groups
            ],
            "not_solved": {
                plan.name: {"treatment": plan.rule.value, "reason": plan.reason}
                for plan in self.tensors
                if plan.rule is not MergeRule.SOLVED
            },
            "quantized": {name: dict(kinds) for name, kinds in self.quantized.items()},
            "quantized_output": self.quantized_output(),
            **({"adapters": {name: dict(told) for name, told in self.adapters.items()}} if self.adapters else {}),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "placement": {**vars(self.placement), "hidden_states": self.placement.hidden_states.value},
            "reasons": list(self.reasons),
            "peak_bytes": {
                "host": self.footprint.host,
                "device": self.footprint.device,
                "disk": self.footprint.disk,
                "parts": dict(self.footprint.parts),
            },
            "limit_bytes": {"host": self.limits.host, "device": self.limits.device},
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "seconds_are_measured": self.measured,
            "ranks": [rank.to_json() for rank in self.ranks],
            "notes": list(self.notes),
            "problems": list(self.problems),
        }

    def print(self, console: Console) -> None:
        """Shows the plan as a table."""
        table = Table(
            title=f"{self.config.merge_method} of {len(self.config.models)} × {self.class_name}", show_header=False
        )
        table.add_column()
        table.add_column(overflow="fold")
        table.add_row(
            "candidates", ", ".join(f"{name} ({self.num_samples[name]} samples)" for name in self.config.names)
        )
        table.add_row("stacks", ", ".join(f"{name} ({count} blocks)" for name, count in self.stacks))
        for group in self.blocks[0].groups if self.blocks else ():
            table.add_row("solved together", f"{', '.join(group.outputs)}: {group.num_inputs} inputs")
        table.add_row("tensors", "\n".join(f"{count} {what}" for what, count in self.counts().items()))
        for label, text in input_rows(self):
            table.add_row(label, text)
        table.add_row("disk", f"{gib(self.bytes_read)} to read, {gib(self.bytes_written)} to write")
        table.add_row("forward passes", f"{str(self.compute_dtype).removeprefix('torch.')} on {self.device}")
        table.add_row("placement", str(self.placement))
        for reason in self.reasons:
            table.add_row("", reason)
        peak = self.footprint
        parts = ", ".join(f"{name} {gib(value)}" for name, value in peak.parts.items() if value)
        table.add_row("peak memory", f"{gib(peak.host)} of {gib(self.limits.host)} on the host ({parts})")
        if peak.device:
            table.add_row("", f"{gib(peak.device)} of {gib(self.limits.device)} on {self.device}")
        if peak.disk:
            table.add_row("", f"{gib(peak.disk)} of hidden states in {self.limits.scratch or 'the output folder'}")
        if self.seconds:
            longest = sorted(self.seconds.items(), key=lambda item: -item[1])[:4]
            stages = ", ".join(f"{stage.replace('_', ' ')} {seconds:.1f} s" for stage, seconds in longest)
            source = "" if self.measured else ", by data sheets: nothing of this has been measured"
            table.add_row("time", f"about {sum(self.seconds.values()):.0f} s once it has begun ({stages}, …){source}")
        for label, text in _rank_rows(self.ranks):
            table.add_row(label, text)
        for note in self.notes:
            table.add_row("note", note)
        for problem in self.problems:
            table.add_row(Text("impossible", style="red"), problem)
        console.print(table)


def input_rows(plan: MergePlan) -> Iterator[tuple[str, str]]:
    """Rows of a table that say which inputs and outputs are quantised, and which inputs have adapters."""

    def text(kinds: Mapping[str, int]) -> str:
        return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())

    if plan.quantized:
        yield "quantised inputs", "\n".join(f"{name}: {text(kinds)}" for name, kinds in plan.quantized.items())
    if plan.quantized_output():
        yield "quantised output", text(plan.quantized_output())
    for name, told in plan.adapters.items():
        replaced = f", {len(told['replaced'])} replaced" if told["replaced"] else ""
        yield "adapter", f"{name}: {told['adapted']} weights adapted{replaced}"


def _rank_rows(ranks: Sequence[RankPlan]) -> Iterator[tuple[str, str]]:
    """One for each of a few ranks; for many, what the least and the most busy one have."""
    if len(ranks) <= _MAX_RANK_ROWS:
        for rank in ranks:
            held = gib(rank.host) + (f" + {gib(rank.device)} on a GPU" if rank.device else "")
            work = f"{rank.num_batches} batches of {rank.num_candidates} candidates, {rank.num_rows} rows"
            moved = f"{rank.operations / 1e12:.2f} TFLOP, {gib(rank.bytes_communicated)} moved"
            yield f"rank {rank.rank}", f"{work}; holds {held}; {moved}"
        return
    least, most = (choose(ranks, key=lambda rank: rank.operations) for choose in (min, max))
    host, device = max(rank.host for rank in ranks), max(rank.device for rank in ranks)
    held = gib(host) + (f" + {gib(device)} on a GPU" if device else "")
    work = f"{least.num_batches} to {most.num_batches} batches, {least.num_rows} to {most.num_rows} rows"
    operations = f"{least.operations / 1e12:.0f} to {most.operations / 1e12:.0f} TFLOP"
    yield f"{len(ranks)} ranks", f"each {work}, {operations}; hold up to {held}; {gib(most.bytes_communicated)} moved"


@dataclass(frozen=True)
class Preparation:
    """A plan together with the opened inputs that it was made from."""

    plan: MergePlan
    inputs: Inputs
    trace: ModelTrace


def make_plan(
    config: MergeConfig,
    inputs: Inputs,
    machines: Machines,
    outlines: Sequence[CalibrationOutline],
    calibration: Sequence[CalibrationSet] | None = None,
    out: Path | None = None,
) -> Preparation:
    """Plans a merge.

    Args:
        config: From `load_config`.
        inputs: From `open_inputs`.
        machines: That will compute; what is held is planned for the rank that has most to do.
        outlines: Of every candidate's calibration data.
        calibration: The data itself, once it has been read: estimates become exact.
        out: The output folder, to see whether the disk has room.

    Raises:
        ArchitectureError: If the model cannot be run block by block.
    """
    trace = trace_model(inputs.skeleton, _joint_outline(outlines))
    blocks = plan_blocks(config, inputs, trace)
    non_block = plan_non_block(config, inputs)
    tensors = (*(plan for block in blocks for plan in block.tensors), *non_block)
    shapes = batch_shapes(outlines, calibration)
    problems = check_tensors(inputs, tensors)
    output, misfits = quantize_output(config.output, inputs, output_tensors(inputs, tensors) if not problems else {})
    problems += misfits
    workload = partial(workload_of, config, inputs, trace, blocks, non_block)
    works = share_work(shapes, blocks, trace, workload, machines.num_ranks)
    limits = _limits(config, machines, out)
    choice = _choose(config, max(works, key=lambda each: each.num_rows).work, limits, machines, calibration is not None)
    problems += [*choice.problems, *_disk_problems(output, choice, limits, out)]
    if not any(plan.rule is MergeRule.SOLVED for plan in tensors):
        problems.append("nothing is left to solve: no linear of a block passes parameters.include and .exclude")
    plan = MergePlan(
        config=config,
        class_name=inputs.skeleton.class_name,
        device=machines.device,
        compute_dtype=inputs.skeleton.dtype,
        stacks=tuple((stack.name, len(stack.blocks)) for stack in (inputs.skeleton.stacks[i] for i in trace.order)),
        blocks=blocks,
        non_block=non_block,
        output=output,
        num_samples=_num_samples(inputs, shapes),
        quantized=inputs.quantized(),
        adapters={
            name: {"adapted": len(adapter.deltas), "replaced": list(adapter.replaced)}
            for name, adapter in inputs.adapters.items()
        },
        bytes_read=_bytes_read(inputs, tensors),
        placement=choice.placement,
        reasons=choice.reasons,
        footprint=choice.footprint,
        limits=limits,
        notes=(*inputs.notes, *_notes(config, inputs, tensors)),
        problems=tuple(problems),
    )
    return Preparation(plan, inputs, trace)


def workload_of(
    config: MergeConfig,
    inputs: Inputs,
    trace: ModelTrace,
    blocks: Sequence[BlockPlan],
    non_block: Sequence[TensorPlan],
    shapes: Sequence[Sequence[BatchShapes]],
    share: RankShare | None = None,
) -> Workload:
    """What some calibration batches, by candidate, make of a merge."""
    state = inputs.skeleton.model.state_dict()
    return measure_workload(
        inputs,
        trace,
        blocks,
        shapes,
        method=config.method,
        off_diagonal_scale=config.parameters.off_diagonal_scale,
        maps_inputs=maps_inputs(config.memory),
        share=share,
        non_block_bytes=sum(state[p.name].numel() * p.dtype.itemsize for p in non_block if p.name in state),
    )


def _num_samples(inputs: Inputs, shapes: Sequence[Sequence[BatchShapes]]) -> dict[str, int]:
    """By candidate."""
    return {
        checkpoint.name: sum(next(iter(batch.values()))[0] for batch in batches)
        for checkpoint, batches in zip(inputs.candidates, shapes, strict=True)
    }


def _limits(config: MergeConfig, machines: Machines, out: Path | None) -> Limits:
    if machines.cluster is not None:
        return machines.cluster.limits()
    return find_limits(config.memory, machines.device, out, machines.local_ranks)


def process_bytes(machines: Machines) -> int:
    """Anonymous host memory of a process before the work."""
    if machines.cluster is not None:
        return machines.cluster.process_bytes
    warm_up(machines.device, lambda: compute_a_little(machines.device))
    return memory_in_use(machines.device).host_anonymous


def _choose(config: MergeConfig, work: Workload, limits: Limits, machines: Machines, has_data: bool) -> Choice:
    before = max(0, process_bytes(machines) - (work.input_bytes if has_data else 0))
    eight_bit = config.memory.hidden_states_8bit
    choice = choose_placement(work, limits, machines.device, before, eight_bit=eight_bit)
    if machines.cluster is not None:  # what would help here does not help there
        problems = tuple(f"{problem.split(';')[0]}: expected GPUs with more memory" for problem in choice.problems)
        return replace(choice, problems=problems)
    if eight_bit and find_spec("bitsandbytes") is None:
        problem = "memory.hidden_states_8bit needs bitsandbytes, which is not installed: pip install bitsandbytes"
        return replace(choice, problems=(*choice.problems, problem))
    return choice


def _disk_problems(output: Mapping[str, OutputTensor], choice: Choice, limits: Limits, out: Path | None) -> list[str]:
    """The output's room, together with that of hidden states where they are on the same disk."""
    if out is None:
        return []
    free = shutil.disk_usage(existing_folder(out)).free
    bytes_written = sum(tensor.num_bytes for tensor in output.values())
    needed = bytes_written + (choice.footprint.disk if limits.scratch == out else 0)
    return [f"{out}: needs {gib(needed)} of disk, {gib(free)} are free"] if needed > free else []


def _joint_outline(outlines: Sequence[CalibrationOutline]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The forward arguments that every candidate's data has."""
    common = set(outlines[0].inputs).intersection(*(outline.inputs for outline in outlines))
    return {name: value for name, value in outlines[0].inputs.items() if name in common}


def _bytes_read(inputs: Inputs, tensors: Sequence[TensorPlan]) -> int:
    def size(checkpoint: Checkpoint, names: KeyMapping, plan: TensorPlan) -> int:
        if plan.name in inputs.reference_names.unmapped:
            return checkpoint.tensors[plan.name].num_bytes if plan.name in checkpoint.tensors else 0
        name = names.canonical(plan.name)
        keys = [] if name in names.missing else names.disk_keys([name])
        return inputs.stored_bytes(checkpoint, keys)

    total = 0
    for plan in tensors:
        if plan.rule is MergeRule.BASE and inputs.base is not None and inputs.base_names is not None:
            total += size(inputs.base, inputs.base_names, plan)
        elif plan.rule is MergeRule.COPIED:
            total += size(inputs.candidates[0], inputs.candidate_names[0], plan)
        else:
            total += sum(size(c, n, plan) for c, n in zip(inputs.candidates, inputs.candidate_names, strict=True))
    return total


def _notes(config: MergeConfig, inputs: Inputs, tensors: Sequence[TensorPlan]) -> list[str]:
    notes = []
    state = inputs.skeleton.model.state_dict()
    unwritten = [
        name for name in state if name not in {plan.name for plan in tensors} and name in inputs.reference_names.missing
    ]
    if unwritten:
        notes.append(
            f"no candidate has {len(unwritten)} tensors of the class, and neither will the output: {unwritten[:3]}"
        )
    labels = {label for plan in tensors for label in tensor_labels(inputs.reference_names, plan.name)}
    for kind in ("include", "exclude"):
        for pattern in getattr(config.parameters, kind):
            if not any(re.search(pattern, label) for label in labels):
                notes.append(f"parameters.{kind}: {pattern!r} matches no tensor")
    for checkpoint, names in zip(inputs.candidates, inputs.candidate_names, strict=True):
        extra = sorted(set(names.unmapped) - set(inputs.reference_names.unmapped))
        if extra:
            notes.append(
                f"{checkpoint.name}: {len(extra)} tensors that the model class does not know are left out: {extra[:3]}"
            )
    return notes


_MEMORY_TRIPS, _LOCAL_LATENCY = 5, 0.5e-3  # of a byte between processes of one machine: copied, and added up


def forecast(
    prepared: Preparation, outlines: Sequence[CalibrationOutline], machines: Machines, *, probe: bool
) -> MergePlan:
    """The plan, with times and ranks.

    Args:
        prepared: From `make_plan`, for the same machines.
        outlines: Of every candidate's calibration data.
        machines: That will compute.
        probe: Measure this machine for some seconds; without, only a cluster's times are told.
    """
    plan = prepared.plan
    workload = partial(workload_of, plan.config, prepared.inputs, prepared.trace, plan.blocks, plan.non_block)
    shapes = batch_shapes(outlines, None)
    whole = workload(shapes)
    in_background = plan.placement.writes_in_background(plan.device)
    timed = not plan.problems and (probe or machines.cluster is not None)
    if machines.num_ranks == 1 and machines.cluster is None:
        rates = _rates(prepared, machines, whole) if timed else None
        if rates is None:
            return plan
        return replace(plan, seconds=estimate_seconds(whole, plan.placement, rates, writes_in_background=in_background))
    batches = split_shapes(
        shapes, samples_at_once(plan.placement.samples, sum(plan.num_samples.values()), machines.num_ranks)
    )
    works = share_work(batches, plan.blocks, prepared.trace, workload, machines.num_ranks)
    held = partial(
        footprint,
        placement=plan.placement,
        device=plan.device,
        process_bytes=process_bytes(machines),
        eight_bit=plan.config.memory.hidden_states_8bit,
        limited=plan.config.memory.host is not None,
    )
    plan = replace(plan, ranks=plan_ranks(whole, works, held, plan.placement))
    if not timed:
        return plan
    rates = _rates(prepared, machines, whole)
    parts = [each.work for each in works]
    moved = max(rank.bytes_communicated for rank in plan.ranks)
    links = _links(machines, rates)
    seconds = estimate_rank_seconds(
        whole, parts, plan.placement, rates, links, moved, writes_in_background=in_background
    )
    return replace(plan, seconds=seconds, measured=machines.cluster is None)


def _rates(prepared: Preparation, machines: Machines, work: Workload) -> Rates:
    plan = prepared.plan
    if machines.cluster is not None:
        return machines.cluster.rates(plan.compute_dtype)
    return measure_rates(
        work.probe,
        prepared.inputs.candidates[0],
        plan.limits.scratch,
        plan.device,
        plan.placement.samples,
        at_once=machines.num_ranks,
    )


def _links(machines: Machines, rates: Rates) -> Links:
    if machines.cluster is not None:
        return machines.cluster.links()
    return Links(rates.memory / _MEMORY_TRIPS, _LOCAL_LATENCY, machines.num_ranks)
