"""The plan of a merge: what it will read, write, hold and compute, from headers, configs and calibration data.

    inputs ──► trace of the model ──► a rule for every tensor ──► workload ──► placement ──► MergePlan      make_plan
    MergePlan ──► seconds by stage, and what each rank will hold, move and compute                         forecast

What makes the merge impossible is collected in `problems`, all at once; `merge` runs a plan only without any.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from largemerge.calibration.config import CalibrationDefaults
from largemerge.calibration.survey import held_bytes, is_made_up
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.locate import existing_folder
from largemerge.checkpoint.room import BYTES_OF_REPORT, Need, room_problems
from largemerge.checkpoint.sentence_modules import split_name
from largemerge.checkpoint.tensor_info import LAYER_NUMBER, OutputTensor, dtype_name, list_kinds
from largemerge.config_file import WARNING, matches, strict_problems
from largemerge.devices import compute_a_little, warm_up
from largemerge.distributed.partition import samples_at_once
from largemerge.errors import CalibrationError, CheckpointError
from largemerge.heads import Heads
from largemerge.machine import baseline_bytes
from largemerge.model.block_runner import count_valid_rows
from largemerge.model.key_mapping import KeyMapping
from largemerge.model.output_check import Findings, check_loads
from largemerge.model.signature import forward_signature, loss_input
from largemerge.model.skeleton import linears_in
from largemerge.model.trace import ModelTrace, trace_model
from largemerge.output import WORKING_FOLDER
from largemerge.progress import stage
from largemerge.regression.config import MergeConfig
from largemerge.regression.embeddings import embedding_notes, embedding_problems
from largemerge.regression.essential import num_directions
from largemerge.regression.gram_files import from_grams, gram_bytes, gram_notes, gram_problems
from largemerge.regression.inputs import Inputs
from largemerge.regression.kept_samples import KeptSamples, choose_samples
from largemerge.regression.kept_sums import kept_tensors, previous_bytes, previous_problems, sequence_notes
from largemerge.regression.layer_scales import unscaled_part, unscaled_tensors
from largemerge.regression.passes import goes_by_linear
from largemerge.regression.planning.cost import Links, Rates, estimate_rank_seconds, estimate_seconds
from largemerge.regression.planning.counting import batch_shapes, measure_workload, split_shapes, stack_rows
from largemerge.regression.planning.placement import (
    Choice,
    Footprint,
    Limits,
    choose_placement,
    find_limits,
    footprint,
)
from largemerge.regression.planning.ranks import RankPlan, partition_work, plan_ranks
from largemerge.regression.planning.rates import Machines, measure_rates
from largemerge.regression.planning.workload import BatchShapes, Placement, Workload
from largemerge.regression.tensor_plan import (
    BlockPlan,
    HeadPlan,
    MergeRule,
    TensorPlan,
    check_anchor,
    check_tensors,
    output_tensors,
    plan_blocks,
    plan_embedding,
    plan_head,
    plan_non_block,
    quantize_output,
    tensor_labels,
)
from largemerge.regression.tokens import Tokens
from largemerge.streams import plain_text
from largemerge.tokenizer.output_files import OutputFiles, find_output_files
from largemerge.units import counted, duration, gib, operations

PROCESS_BYTES, TABLES_BYTES = 304 << 20, 64 << 20
"""Anonymous memory of a process, at the least, that has imported what a regression merge needs, and `datasets`."""
_MAX_RANK_ROWS = 8  # in the table of a plan
_MEMORY_TRIPS, _LOCAL_LATENCY = 5, 0.5e-3  # of a byte between processes of one machine: copied, and added up


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        config: The resolved configuration.
        class_name: Name of the model's class.
        device: The device that computes.
        compute_dtype: Dtype of the forward passes.
        stacks: Name and number of blocks of each stack, in the order in which they run.
        blocks: Plans of the blocks in the order in which they run.
        non_block: Plans of the tensors of no block.
        head: What of these is solved.
        output: Tensors of the output, by name on disk.
        kept_sums: Sums that are kept beside them, by group of linears, or samples in their place, by forward argument.
        unscaled: Merged task vectors and the other tensors of the blocks, by parameter name, that wait on the disk for
            the scales of all layers; none where nothing waits.
        kept_samples: Which samples these are; `None` for none.
        num_samples: Number of calibration samples by candidate.
        num_tokens: Number of tokens, or patches, of these samples that count, by candidate; of an earlier merge, and of
            Gram matrices in place of data, those that the sums are of.
        quantized: Number of quantised weights by input and format.
        adapters: For each input with an adapter, the number of weights it adds to and the tensors it replaces.
        heads: Heads that are not merged; `None` where all are.
        tokens: How rows of embeddings are brought to the output's; `None` where all models have the same ones.
        bytes_read: Bytes read from checkpoints, and from sums: of an earlier merge, or in place of data.
        placement: Where things are held, chosen to keep the limits.
        reasons: Why this placement was chosen.
        footprint: What is held at the peak.
        limits: The limits that the placement keeps.
        notes: What a user should know.
        problems: What makes the merge impossible.
        seconds: Seconds by stage, from measured rates or data sheets; empty if no forecast was asked for.
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
    head: HeadPlan
    embedding: TensorPlan | None
    output: Mapping[str, OutputTensor]
    kept_sums: Mapping[str, OutputTensor]
    unscaled: Mapping[str, OutputTensor]
    kept_samples: KeptSamples | None
    num_samples: Mapping[str, int]
    num_tokens: Mapping[str, int]
    quantized: Mapping[str, Mapping[str, int]]
    adapters: Mapping[str, Mapping[str, Any]]
    heads: Heads | None
    tokens: Tokens | None
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
        """Bytes of all tensors of the output, and of the sums that are kept."""
        return sum(tensor.num_bytes for tensor in self.output.values()) + self.sums_bytes

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums that are kept."""
        return sum(tensor.num_bytes for tensor in self.kept_sums.values())

    @property
    def scratch_bytes(self) -> int:
        """Bytes of what waits on the disk for the scales of all layers; the output comes on top."""
        return sum(tensor.num_bytes for tensor in self.unscaled.values())

    @property
    def first_steps(self) -> list[str]:
        """Names that the journal has for the first steps of the blocks, where they take two; empty where one."""
        return [unscaled_part(block.name) for block in self.blocks] if self.unscaled else []

    @property
    def num_kept_samples(self) -> int:
        """Number of samples that are kept for a later merge."""
        return len(self.kept_samples.rows) if self.kept_samples is not None else 0

    @property
    def output_dtype(self) -> torch.dtype:
        """The floating-point dtype in which most bytes of the output are written."""
        num_bytes: Counter[torch.dtype] = Counter()
        for tensor in self.output.values():
            if tensor.dtype.is_floating_point:
                num_bytes[tensor.dtype] += tensor.num_bytes
        return num_bytes.most_common(1)[0][0]

    def counts(self) -> dict[str, int]:
        """Number of tensors by rule, and by reason where they are not solved."""
        counter = Counter(plan.rule.value + (f": {plan.reason}" if plan.reason else "") for plan in self.tensors)
        return dict(counter.most_common())

    def quantized_output(self) -> dict[str, int]:
        """Number of weights that are written quantised, by format."""
        return dict(Counter(tensor.quantization.label for tensor in self.output.values() if tensor.quantization))

    @property
    def sparing(self) -> bool:
        """Whether freed host memory goes back to the system at once."""
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
            "num_tokens": dict(self.num_tokens),
            **({"from_grams": list(self.config.grams)} if self.config.grams else {}),
            "stacks": [{"name": name, "num_blocks": count} for name, count in self.stacks],
            "tensors": self.counts(),
            "linears": [
                {"block": block.name, "shared_input": group.leader, "linears": list(group.outputs)}
                for block in self.blocks
                for group in block.groups
            ],
            **({"head": self.head.to_json()} if self.head else {}),
            "not_solved": {
                plan.name: {"treatment": plan.rule.value, "reason": plan.reason}
                for plan in self.tensors
                if plan.rule is not MergeRule.SOLVED
            },
            "quantized": {name: dict(kinds) for name, kinds in self.quantized.items()},
            "quantized_output": self.quantized_output(),
            **({"adapters": {name: dict(summary) for name, summary in self.adapters.items()}} if self.adapters else {}),
            **({"heads": self.heads.to_json()} if self.heads is not None else {}),
            **({"vocabulary": self.tokens.to_json()} if self.tokens is not None else {}),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            **({"sums_bytes": self.sums_bytes} if self.config.sequence is not None else {}),
            **({"scratch_bytes": self.scratch_bytes} if self.unscaled else {}),
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

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Prints the plan as a table."""
        table = Table(
            title=f"{self.config.merge_method} of {len(self.config.names)} × {self.class_name}", show_header=False
        )
        table.add_column()
        table.add_column(overflow="fold")
        for name in self.config.names:
            samples, tokens = counted(self.num_samples[name], "sample"), counted(self.num_tokens[name], "token")
            record = self.config.grams.get(name)
            of_data = f"{counted(record.num_samples, 'sample')} of {record.data}" if record is not None else samples
            kept = "; Gram matrices stand for them" if record is not None else ""
            table.add_row("candidate", f"{name}: {of_data}, {tokens}{kept}")
        if self.config.merged_before is not None:
            merged = ", ".join(f"{model.name} {model.weight:g}" for model in self.config.merged_before.models)
            what = "its sums stand" if self.config.sums_before is not None else "some samples, which it has kept, stand"
            table.add_row("in sequence", f"{self.config.names[0]} has {merged} in it; {what} for their data")
        table.add_row("stacks", ", ".join(f"{name} ({counted(count, 'block')})" for name, count in self.stacks))
        for group in self.blocks[0].groups if self.blocks else ():
            table.add_row("solved together", f"{', '.join(group.outputs)}: {counted(group.num_inputs, 'input')}")
        table.add_row("tensors", "\n".join(f"{count} {what}" for what, count in self.counts().items()))
        for label, text in input_rows(self):
            table.add_row(label, text)
        what = "sums" if self.config.keeps_sums else counted(self.config.keeps_samples, "sample")
        kept = f", of which {gib(self.sums_bytes)} of {what} for a later merge" if self.kept_sums else ""
        kept += f"; {gib(self.scratch_bytes)} in between, of merged task vectors" if self.unscaled else ""
        table.add_row("disk", f"{gib(self.bytes_read)} to read, {gib(self.bytes_written)} to write{kept}")
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
            stages = ", ".join(f"{stage.replace('_', ' ')} {duration(seconds)}" for stage, seconds in longest)
            source = "" if self.measured else ", by data sheets: nothing of this has been measured"
            total = duration(sum(self.seconds.values()))
            table.add_row("time", f"about {total} once it has begun ({stages}, …){source}")
        for label, text in _rank_rows(self.ranks):
            table.add_row(label, text)
        for note in self.notes:
            table.add_row("note", note)
        for problem in self.problems:
            table.add_row(Text("impossible", style="red"), problem)
        console.print(table)


def input_rows(plan: MergePlan) -> Iterator[tuple[str, str]]:
    """Rows of a table on quantised inputs and outputs, adapters, heads, vocabulary: label and text."""

    def text(kinds: Mapping[str, int]) -> str:
        return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())

    if plan.quantized:
        yield "quantised inputs", "\n".join(f"{name}: {text(kinds)}" for name, kinds in plan.quantized.items())
    if plan.quantized_output():
        yield "quantised output", text(plan.quantized_output())
    for name, summary in plan.adapters.items():
        replaced = f", {len(summary['replaced'])} replaced" if summary["replaced"] else ""
        yield "adapter", f"{name}: {counted(summary['adapted'], 'weight')} adapted{replaced}"
    if plan.heads is not None:
        yield "heads", plan.heads.summary()
    if plan.tokens is not None:
        yield "vocabulary", plan.tokens.summary()


def _rank_rows(ranks: Sequence[RankPlan]) -> Iterator[tuple[str, str]]:
    """Rows of a table, one for each of a few ranks; for many ranks, one with the least and the most that one does."""
    if len(ranks) <= _MAX_RANK_ROWS:
        for rank in ranks:
            held = gib(rank.host) + (f" + {gib(rank.device)} on a GPU" if rank.device else "")
            batches, rows = counted(rank.num_batches, "batch", "batches"), counted(rank.num_rows, "row")
            work = f"{batches} of {counted(rank.num_candidates, 'candidate')}, {rows}"
            moved = f"{operations(rank.operations)}, {gib(rank.bytes_communicated)} moved"
            yield f"rank {rank.rank}", f"{work}; holds {held}; {moved}"
        return
    least_busy, busiest = (choose(ranks, key=lambda rank: rank.operations) for choose in (min, max))
    host, device = max(rank.host for rank in ranks), max(rank.device for rank in ranks)
    held = gib(host) + (f" + {gib(device)} on a GPU" if device else "")
    batches = f"{least_busy.num_batches} to {counted(busiest.num_batches, 'batch', 'batches')}"
    rows = f"{least_busy.num_rows:,} to {counted(busiest.num_rows, 'row')}"
    work = f"{operations(least_busy.operations)} to {operations(busiest.operations)}"
    yield (
        f"{len(ranks)} ranks",
        f"each {batches}, {rows}, {work}; hold up to {held}; {gib(busiest.bytes_communicated)} moved",
    )


@dataclass(frozen=True)
class PlannedMerge:
    """A plan, with the inputs and the trace that it was made from.

    Attributes:
        plan: The plan.
        inputs: The opened inputs.
        trace: Trace of the model.
        process_bytes: Anonymous memory of the process before the work.
        files: What the output has beside its weights.
    """

    plan: MergePlan
    inputs: Inputs
    trace: ModelTrace
    process_bytes: int
    files: OutputFiles


def make_plan(
    config: MergeConfig,
    inputs: Inputs,
    machines: Machines,
    outlines: Sequence[CalibrationOutline],
    calibration: Sequence[CalibrationSet] | None = None,
    out: Path | None = None,
    *,
    writes_model: bool = True,
) -> PlannedMerge:
    """Plans a merge.

    Args:
        config: The configuration, from `load_config`.
        inputs: The opened inputs, from `open_inputs`.
        machines: Machines that will compute; memory is planned for the rank that has most to do.
        outlines: Outlines of every candidate's calibration data.
        calibration: The data itself, or what is known of it; `None` where only the outlines are.
        out: The output folder, to see whether the disk has room.
        writes_model: Whether it must have room for the merged model.

    Raises:
        ArchitectureError: If the model cannot be run block by block.
    """
    stage("planning: following the hidden states through the model")
    with_data = outlines[-len(config.models) :]  # an earlier merge has none
    outline = _joint_outline(with_data)
    inside = config.method.granularity == "linear"
    first = next((each for each in with_data if each.examples), with_data[0])
    norms = config.method.solves_norms
    trace = trace_model(inputs.skeleton, outline, first.examples, first.where, inside=inside, norms=norms)
    blocks = plan_blocks(config, inputs, trace)
    head, non_block = plan_head(config, inputs, trace, plan_non_block(config, inputs, trace))
    embedding, non_block = plan_embedding(config, inputs, non_block)
    tensors = (*(plan for block in blocks for plan in block.tensors), *non_block)
    shapes = batch_shapes(outlines, calibration)
    problems = check_tensors(inputs, tensors) + check_anchor(config, inputs, tensors)
    problems += [*previous_problems(config, blocks, head), *gram_problems(config, blocks, head)]
    problems += embedding_problems(config, head, embedding)
    kept_samples, misfits = None, list[str]()
    if config.keeps_samples and calibration is not None:
        signature = forward_signature(inputs.skeleton)
        num_tokens = inputs.tokens.num_rows if inputs.tokens is not None else None
        kept_samples, misfits = choose_samples(calibration, config.weights, config.keeps_samples, signature, num_tokens)
        problems += misfits
    kept_sums = kept_tensors(blocks, head) if config.keeps_sums else {}
    kept_sums |= kept_samples.tensors if kept_samples is not None else {}
    scales_layers, state = config.method.scales_layers, inputs.skeleton.model.state_dict()
    unscaled = unscaled_tensors(blocks, state) if scales_layers and not problems else {}
    output, misfits = quantize_output(config.output, inputs, output_tensors(inputs, tensors) if not problems else {})
    problems += misfits
    findings = _check_loads(config, inputs, output) if not problems else Findings()
    problems += findings.problems
    workload = partial(measure_workload, config, inputs, trace, blocks, non_block, head)
    in_groups, summed = config.method.needs_whole_grams, from_grams(config)
    works = partition_work(shapes, blocks, trace, workload, machines.num_ranks, in_groups=in_groups, summed=summed)
    limits = _limits(config, machines, out)
    largest = max(works, key=lambda rank_work: rank_work.num_rows).work
    process_bytes = measure_process_bytes(machines, largest, calibration)
    choice = _choose_placement(config, largest, limits, machines, process_bytes)
    problems += choice.problems
    disk = Path(config.memory.disk) if config.memory.disk is not None and machines.cluster is None else None
    if disk is not None and not existing_folder(disk).is_dir():
        problems.append(f"memory.disk: {existing_folder(disk)} is no folder; expected a folder, or nothing there yet")
    files = _output_files(config, inputs, problems)
    file_notes = list(files.copied.notes)
    if not problems:
        stage("checking the tokenizer")
        problems, checked = files.check()
        file_notes += checked
        problems += (
            []
            if out is None or not writes_model
            else room_problems(_needs({**output, **kept_sums}, unscaled, choice, limits, out, files.copied.num_bytes))
        )
    if not any(plan.rule is MergeRule.SOLVED for plan in tensors):
        problems.append(_nothing_to_solve(inputs, tensors))
    num_samples = _num_samples(inputs, shapes)
    tokens_of = _num_tokens(config, inputs, trace, shapes, calibration)
    plan = MergePlan(
        config=config,
        class_name=inputs.skeleton.class_name,
        device=machines.device,
        compute_dtype=inputs.skeleton.dtype,
        stacks=tuple((stack.name, len(stack.blocks)) for stack in (inputs.skeleton.stacks[i] for i in trace.order)),
        blocks=blocks,
        non_block=non_block,
        head=head,
        embedding=embedding,
        output=output,
        kept_sums=kept_sums,
        unscaled=unscaled,
        kept_samples=kept_samples,
        num_samples=num_samples,
        num_tokens=tokens_of,
        quantized=inputs.quantized(),
        adapters=_adapter_summaries(inputs),
        heads=inputs.heads,
        tokens=inputs.tokens,
        bytes_read=_bytes_read(config, inputs, tensors) + previous_bytes(config) + gram_bytes(config, blocks, head),
        placement=choice.placement,
        reasons=choice.reasons,
        footprint=choice.footprint,
        limits=limits,
        notes=(
            *inputs.notes,
            *(inputs.tokens.all_notes if inputs.tokens else ()),
            *_unreached(inputs, trace),
            *_unused_masks(inputs, trace, outline),
            *_method_notes(config, inputs, trace, blocks, head),
            *embedding_notes(config, inputs.skeleton, embedding),
            *sequence_notes(config, blocks, head),
            *gram_notes(config, inputs.skeleton.dtype),
            *_notes(config, inputs, tensors),
            *shortfalls(config, num_samples),
            *(_few_directions if config.method.merges_subspaces else _too_little_data)(tokens_of, blocks),
            *(data.estimated for data in calibration or () if data.estimated),
            *(note for data in calibration or () for note in data.notes),
            *file_notes,
            *findings.notes,
        ),
        problems=tuple(problems),
    )
    if config.strict:
        plan = replace(plan, problems=(*plan.problems, *strict_problems(plan.notes)))
    return PlannedMerge(plan, inputs, trace, process_bytes, files)


def _output_files(config: MergeConfig, inputs: Inputs, problems: Sequence[str]) -> OutputFiles:
    """Finds what the output has beside its weights; what is wrong there is told with all other problems."""
    vocabulary = inputs.tokens.vocabulary if inputs.tokens is not None else None
    try:
        return find_output_files(
            inputs.reference,
            [*([inputs.base] if inputs.base is not None else []), *inputs.candidates],
            inputs.adapters,
            tokenizer_of=config.vocabulary.source if config.vocabulary is not None else None,
            vocabulary=vocabulary,
            trust_remote_code=config.trust_remote_code,
        )
    except CheckpointError as error:
        raise CheckpointError(*problems, *error.problems) from None


def _check_loads(config: MergeConfig, inputs: Inputs, output: Mapping[str, OutputTensor]) -> Findings:
    """Says what would be missing or unexpected when the output is loaded by the reference's config."""
    reference = inputs.reference
    own = {name: tensor for name, tensor in output.items() if not split_name(name)[0]}
    return check_loads(reference.config, own, reference, trust_remote_code=config.trust_remote_code)


def _num_samples(inputs: Inputs, shapes: Sequence[Sequence[BatchShapes]]) -> dict[str, int]:
    """Number of calibration samples, by candidate."""
    return {
        checkpoint.name: sum(next(iter(batch.values()))[0] for batch in batches)
        for checkpoint, batches in zip(inputs.candidates, shapes, strict=True)
    }


def _adapter_summaries(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """The number of weights that each adapter adds to, and the tensors that it replaces."""
    return {
        name: {"adapted": len(adapter.deltas), "replaced": list(adapter.replaced)}
        for name, adapter in inputs.adapters.items()
    }


def _limits(config: MergeConfig, machines: Machines, out: Path | None) -> Limits:
    """How much a rank may hold, on this machine or in a cluster."""
    if machines.cluster is not None:
        return machines.cluster.limits()
    return find_limits(config.memory, machines.device, out, machines.local_ranks)


def measure_process_bytes(machines: Machines, work: Workload, calibration: Sequence[CalibrationSet] | None) -> int:
    """Anonymous host memory of a process before the work, libraries of the device included, in bytes.

    Calibration inputs that it holds already are left out: the plan counts them on their own.
    """
    if machines.cluster is not None:
        return machines.cluster.process_bytes
    warm_up(machines.device, lambda: compute_a_little(machines.device))
    held = min(work.input_bytes, sum(map(held_bytes, calibration or ())))
    return baseline_bytes(machines.device, PROCESS_BYTES + (TABLES_BYTES if "datasets" in sys.modules else 0), held)


def _choose_placement(
    config: MergeConfig, work: Workload, limits: Limits, machines: Machines, process_bytes: int
) -> Choice:
    eight_bit = config.memory.hidden_states_8bit
    choice = choose_placement(work, limits, machines.device, process_bytes, eight_bit=eight_bit)
    if machines.cluster is not None:  # what would help here does not help there
        problems = tuple(f"{problem.split(';')[0]}: expected GPUs with more memory" for problem in choice.problems)
        return replace(choice, problems=problems)
    if eight_bit and find_spec("bitsandbytes") is None:
        problem = "memory.hidden_states_8bit needs bitsandbytes, which is not installed: pip install bitsandbytes"
        return replace(choice, problems=(*choice.problems, problem))
    return choice


def _needs(
    output: Mapping[str, OutputTensor],
    unscaled: Mapping[str, OutputTensor],
    choice: Choice,
    limits: Limits,
    out: Path,
    side_bytes: int,
) -> Iterator[Need]:
    """Yields what the merge will write where: the output, and what waits on a disk, hidden states among it."""
    bytes_written = sum(tensor.num_bytes for tensor in output.values())
    yield Need(
        out, bytes_written + side_bytes + len(output) * BYTES_OF_REPORT, "the output", reuses=out / WORKING_FOLDER
    )
    scratch_bytes = sum(tensor.num_bytes for tensor in unscaled.values())
    yield Need(out, scratch_bytes, "merged task vectors", reuses=out / WORKING_FOLDER)
    if choice.footprint.disk:
        yield Need(limits.scratch or out, choice.footprint.disk, "hidden states")


def _num_tokens(
    config: MergeConfig,
    inputs: Inputs,
    trace: ModelTrace,
    shapes: Sequence[Sequence[BatchShapes]],
    calibration: Sequence[CalibrationSet] | None,
) -> dict[str, int]:
    """Number of tokens that count, by candidate, in the stack that has most; of outlines, with the padding."""
    masked = loss_input(forward_signature(inputs.skeleton))
    rows = [list(of_candidate.values()) for of_candidate in stack_rows(trace, shapes)]
    for number, data in enumerate(calibration or ()):
        if not is_made_up(data):
            counts = ([count_valid_rows(batch, stack, masked) for stack in trace.stacks] for batch in data.batches)
            rows[number] = [sum(of_stack) for of_stack in zip(*counts, strict=True)]
    counted_rows = [max(own, default=0) for own in rows]
    if config.sums_before is not None:
        counted_rows[0] = config.sums_before.tokens
    for number in from_grams(config):
        counted_rows[number] = config.grams[config.names[number]].tokens
    return {candidate.name: count for candidate, count in zip(inputs.candidates, counted_rows, strict=True)}


def _too_little_data(num_tokens: Mapping[str, int], blocks: Sequence[BlockPlan]) -> Iterator[str]:
    """Notes that all data together says less than what the widest linears have inputs for."""
    total = sum(num_tokens.values())
    widest = max((group.num_inputs for block in blocks for group in block.groups), default=0)
    if total < widest:
        yield (
            f"{total:,} tokens of calibration data in all, fewer than the {widest:,} inputs of the widest linear: what "
            "they do not say is left to the anchor, and a merge by so few may be worse than the average; more samples "
            "keep more of each model"
        )


def _few_directions(num_tokens: Mapping[str, int], blocks: Sequence[BlockPlan]) -> Iterator[str]:
    """Notes on models whose data has fewer tokens than the method takes directions of their largest task vectors."""
    groups = [group for block in blocks for group in block.groups]
    wanted = [
        min(num_directions(linear.num_outputs, len(num_tokens)), group.num_inputs)
        for group in groups
        for linear in group.linears
    ]
    few = {name: count for name, count in num_tokens.items() if count < max(wanted, default=0)}
    if few:
        counts = ", ".join(f"{name} {count:,}" for name, count in few.items())
        yield (
            f"fewer tokens of calibration data than directions that would be merged of each model, {max(wanted):,} in "
            f"the widest linear: {counts}; there are no more directions than tokens, and more samples give more"
        )


def shortfalls(config: MergeConfig, num_samples: Mapping[str, int]) -> Iterator[str]:
    """Notes on data that has fewer samples than asked for: warnings, unless nobody has asked for that many."""
    default = CalibrationDefaults().num_samples
    for candidate in config.models:
        if candidate.grams is not None:
            continue
        assert candidate.calibration is not None and candidate.calibration.num_samples is not None
        wanted, found = candidate.calibration.num_samples, num_samples[candidate.label]
        if found < wanted:
            is_default = wanted == default and "num_samples" not in config.calibration.model_fields_set
            yield (
                f"{'' if is_default else WARNING}{candidate.label}: its data {candidate.calibration.data} gives "
                f"{counted(found, 'sample')}, fewer than {'the default of ' if is_default else ''}"
                f"num_samples: {wanted}"
            )


def _nothing_to_solve(inputs: Inputs, tensors: Sequence[TensorPlan]) -> str:
    """Says so, and why the weights of linears are not solved."""
    linears = {f"{path}.weight" for path in linears_in(inputs.skeleton.model)}
    reasons = Counter(plan.reason for plan in tensors if plan.name in linears)
    found = "; ".join(f"{reason} ({counted(count, 'linear')})" for reason, count in reasons.most_common())
    return (
        "nothing is left to solve: no linear of a block passes parameters.include and .exclude, or can be solved: "
        f"{found}; change the patterns, or use a method that needs no data"
    )


def _unreached(inputs: Inputs, trace: ModelTrace) -> Iterator[str]:
    """Notes on blocks that the calibration data does not reach, such as the vision tower where all is text."""
    for stack, traced in zip(inputs.skeleton.stacks, trace.stacks, strict=True):
        unreached = [str(index) for index, runs in enumerate(traced.runs) if runs == 0]
        if unreached:
            some = f"block{'s' if len(unreached) > 1 else ''} {', '.join(unreached)}"
            which = some if any(traced.runs) else f"all {counted(len(unreached), 'block')}"
            yield (
                f"the calibration data does not reach {which} of {stack.name}: their tensors are averaged; give data "
                "that does (pixels, sounds, ready-made tensors) to have their linears solved"
            )


def _unused_masks(inputs: Inputs, trace: ModelTrace, outline: Collection[str]) -> Iterator[str]:
    """Notes on masks of pixels or sounds, whose rows cannot be told from padding."""
    masks = [
        name for name in outline if name.endswith("mask") and name.replace("attention_mask", "input_ids") not in outline
    ]
    stacks = [inputs.skeleton.stacks[number].name for number in trace.order if trace.stacks[number].token_input is None]
    if masks and stacks:
        yield (
            f"{', '.join(masks)}: the model reads it, but padded pixels or sounds count like all others in the "
            f"statistics of {', '.join(stacks)}"
        )


def _method_notes(
    config: MergeConfig, inputs: Inputs, trace: ModelTrace, blocks: Sequence[BlockPlan], head: HeadPlan
) -> Iterator[str]:
    """Notes on what the method asks for, and this model has not."""
    method = config.method
    solved = [block for block in blocks if block.groups]
    at_once = [block.name for block in solved if not goes_by_linear(method, block, trace)]
    if method.granularity == "linear" and at_once:
        yield (
            f"granularity: the linears of {_some(at_once)} run more than once in a forward pass, so that they are "
            "solved at once, on inputs from the candidates' weights; drift is not paid back there"
        )
    if method.drift > 0:
        unpaid = [
            block
            for block in solved
            if block.name not in at_once
            and not any(linear.residual is not None for group in block.groups for linear in group.linears)
        ]
        left_out = [block.name for block in unpaid if trace.stacks[block.stack].residuals[block.index]]
        if left_out:
            yield (
                f"drift: in {_some(left_out)} the linears whose output is added to the hidden states are not solved "
                "(include, exclude), so that their drift is not paid back"
            )
        without = [block.name for block in unpaid if block.name not in left_out]
        if without:
            yield (
                f"drift: in {_some(without)} no linear's output is added to the hidden states as it is (it is "
                "normalised, scaled or reordered first), so that their drift is not paid back"
            )
    if method.solves_head and not head:
        given = config.parameters.include or config.parameters.exclude
        patterns = ", and that include and exclude leave (a tied head has the embedding's name)" if given else ""
        yield (
            f"solve: head: {inputs.skeleton.class_name} has no linear after the blocks that all candidates have, whose "
            f"inputs are known by token{patterns}, so that nothing is solved there"
        )


def _some(names: Sequence[str], most: int = 3) -> str:
    """Lists some names, and how many there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _joint_outline(outlines: Sequence[CalibrationOutline]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the forward arguments that every candidate's data has.

    Raises:
        CalibrationError: If pixels or sounds are given for some candidates only, or in other shapes: the number of
            rows that an image makes must be the same for all.
    """
    common = set(outlines[0].inputs).intersection(*(outline.inputs for outline in outlines))
    floating = [
        {name: list(shape) for name, (shape, dtype) in outline.inputs.items() if dtype.is_floating_point}
        for outline in outlines
    ]
    other = next((number for number, own in enumerate(floating) if own != floating[0]), None)
    if other is not None:
        first, second = (f"{outlines[number].where} has {floating[number] or 'tokens alone'}" for number in (0, other))
        raise CalibrationError(
            f"the candidates' calibration data differs beside the tokens (shapes of one sample): {first}; {second}; "
            "expected the same for all candidates"
        )
    return {name: value for name, value in outlines[0].inputs.items() if name in common}


def _bytes_read(config: MergeConfig, inputs: Inputs, tensors: Sequence[TensorPlan]) -> int:
    """Bytes that making the tensors reads from checkpoints, of the base where the method needs it."""
    by_base = int(config.method.anchor != "average") + int(config.method.scales_layers)  # how often it is read

    def size(checkpoint: Checkpoint, names: KeyMapping, plan: TensorPlan) -> int:
        if plan.name in inputs.reference_mapping.unmapped:
            return checkpoint.tensors[plan.name].num_bytes if plan.name in checkpoint.tensors else 0
        return inputs.stored_bytes(checkpoint, names.keys_of(plan.name))

    total = 0
    for plan in tensors:
        if plan.rule is MergeRule.BASE and inputs.base is not None and inputs.base_mapping is not None:
            total += size(inputs.base, inputs.base_mapping, plan)
        elif plan.rule is MergeRule.NEW:
            continue
        elif plan.sources is not None:
            total += sum(size(inputs.candidates[i], inputs.candidate_mappings[i], plan) for i in plan.sources)
        elif plan.rule is MergeRule.COPIED:
            total += size(inputs.candidates[0], inputs.candidate_mappings[0], plan)
        else:
            total += sum(size(c, n, plan) for c, n in zip(inputs.candidates, inputs.candidate_mappings, strict=True))
        if by_base and plan.rule is MergeRule.SOLVED and inputs.base is not None and inputs.base_mapping is not None:
            total += by_base * size(inputs.base, inputs.base_mapping, plan)
    return total


def _check_whole(inputs: Inputs, unwritten: Sequence[str]) -> None:
    """Makes sure that the blocks, and what comes into them, can be computed.

    Raises:
        CheckpointError: If neither candidates nor base have weights of layers, or the input embeddings.
    """
    try:
        embeddings = inputs.skeleton.model.get_input_embeddings()
    except NotImplementedError:  # a class without any
        embeddings = None
    entry = {id(parameter) for parameter in embeddings.parameters()} if embeddings is not None else set()
    weights = dict(inputs.skeleton.model.named_parameters())
    needed = [
        name for name in unwritten if name in weights and (LAYER_NUMBER.search(name) or id(weights[name]) in entry)
    ]
    if needed:
        raise CheckpointError(
            f"no model has {list_kinds(needed)}, which the class needs to compute; expected whole checkpoints: fetch "
            "them again"
        )


def _notes(config: MergeConfig, inputs: Inputs, tensors: Sequence[TensorPlan]) -> list[str]:
    """Notes on tensors that are left out, and on patterns that match none."""
    notes = []
    state = inputs.skeleton.model.state_dict()
    unwritten = [
        name
        for name in state
        if name not in {plan.name for plan in tensors} and name in inputs.reference_mapping.missing
    ]
    _check_whole(inputs, unwritten)
    if unwritten:
        notes.append(
            f"no candidate has {counted(len(unwritten), 'tensor')} of the class, and neither will the output: "
            f"{unwritten[:3]}"
        )
    labels = {label for plan in tensors for label in tensor_labels(inputs.reference_mapping, plan.name)}
    if inputs.heads is not None:
        labels |= {key for kept in inputs.heads.kept.values() for key in kept.values()}
    for kind in ("include", "exclude"):
        for pattern in getattr(config.parameters, kind):
            if not any(matches(pattern, label, f"parameters.{kind}") for label in labels):
                notes.append(f"parameters.{kind}: {pattern!r} matches no tensor")
    for checkpoint, names in zip(inputs.candidates, inputs.candidate_mappings, strict=True):
        written = inputs.reference_mapping.unmapped if inputs.heads is None else ()
        extra = sorted(set(names.unmapped) - set(written))
        if extra:
            notes.append(
                f"{checkpoint.name}: {counted(len(extra), 'tensor')} that the model class does not know "
                f"{'is' if len(extra) == 1 else 'are'} left out: {extra[:3]}"
            )
    return notes


def forecast(
    planned: PlannedMerge,
    outlines: Sequence[CalibrationOutline],
    calibration: Sequence[CalibrationSet] | None,
    machines: Machines,
    *,
    probe: bool,
) -> MergePlan:
    """Adds times and ranks to a plan.

    Args:
        planned: A plan from `make_plan`, for the same machines.
        outlines: Outlines of every candidate's calibration data.
        calibration: The data itself, or what is known of it; `None` where only the outlines are.
        machines: Machines that will compute.
        probe: Whether this machine is measured for some seconds; otherwise only a cluster's times are estimated.
    """
    plan = planned.plan
    workload = partial(
        measure_workload, plan.config, planned.inputs, planned.trace, plan.blocks, plan.non_block, plan.head
    )
    shapes = batch_shapes(outlines, calibration)
    whole = workload(shapes)
    in_background = plan.placement.writes_in_background(plan.device)
    timed = not plan.problems and (probe or machines.cluster is not None)
    if machines.num_ranks == 1 and machines.cluster is None:
        rates = _rates(planned, machines, whole) if timed else None
        if rates is None:
            return plan
        return replace(plan, seconds=estimate_seconds(whole, plan.placement, rates, writes_in_background=in_background))
    batches = split_shapes(
        shapes, samples_at_once(plan.placement.samples, sum(plan.num_samples.values()), machines.num_ranks)
    )
    works = partition_work(
        batches,
        plan.blocks,
        planned.trace,
        workload,
        machines.num_ranks,
        in_groups=plan.config.method.needs_whole_grams,
        summed=from_grams(plan.config),
    )
    held = partial(
        footprint,
        placement=plan.placement,
        device=plan.device,
        process_bytes=planned.process_bytes,
        eight_bit=plan.config.memory.hidden_states_8bit,
        limited=plan.config.memory.host is not None,
    )
    plan = replace(plan, ranks=plan_ranks(whole, works, held, plan.placement))
    if not timed:
        return plan
    rates = _rates(planned, machines, whole)
    parts = [rank_work.work for rank_work in works]
    moved = max(rank.bytes_communicated for rank in plan.ranks)
    links = _links(machines, rates)
    seconds = estimate_rank_seconds(
        whole, parts, plan.placement, rates, links, moved, writes_in_background=in_background
    )
    return replace(plan, seconds=seconds, measured=machines.cluster is None)


def _rates(planned: PlannedMerge, machines: Machines, work: Workload) -> Rates:
    """Rates of one rank: a cluster's, or measured here."""
    plan = planned.plan
    if machines.cluster is not None:
        return machines.cluster.rates(plan.compute_dtype)
    return measure_rates(
        work.probe,
        planned.inputs.candidates[0],
        plan.limits.scratch,
        plan.device,
        plan.placement.samples,
        at_once=machines.num_ranks,
    )


def _links(machines: Machines, rates: Rates) -> Links:
    """Connections between the ranks of a cluster, or of this machine."""
    if machines.cluster is not None:
        return machines.cluster.links()
    return Links(rates.memory / _MEMORY_TRIPS, _LOCAL_LATENCY, machines.num_ranks)
