"""The plan of a merge: what it will read, write, hold and compute, from headers and configs alone.

`make_plan` opens the inputs, rehearses the model, and gives every tensor of the output its treatment. What
makes the merge impossible is collected in `problems`, all at once; `merge` runs a plan only without any.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from largemerge.calibration import CalibrationOutline, CalibrationSet
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.tensor_info import OutputTensor
from largemerge.cluster import Cluster
from largemerge.config import MergeConfig
from largemerge.devices import compute_a_little, warm_up
from largemerge.inputs import Inputs
from largemerge.memory import memory_in_use
from largemerge.merge_plan import MergePlan, Preparation
from largemerge.model.names import NameMap
from largemerge.model.rehearsal import Rehearsal, rehearse
from largemerge.output import existing_folder
from largemerge.placement import Choice, Limits, choose_placement, find_limits, waits_on_disk
from largemerge.quantization import quantize_output
from largemerge.rank_plan import share_work
from largemerge.sizes import gib
from largemerge.treatment import (
    BlockPlan,
    TensorPlan,
    Treatment,
    output_tensors,
    plan_blocks,
    plan_outside,
    tensor_labels,
    treatment_problems,
)
from largemerge.workload import BatchShapes, Workload, batch_shapes, measure_workload


@dataclass(frozen=True)
class Machines:
    """What a merge runs on.

    Attributes:
        device: Every rank's kind.
        num_ranks: How many share the merge.
        local_ranks: How many of them share this machine.
        cluster: Other machines than this one.
    """

    device: torch.device
    num_ranks: int = 1
    local_ranks: int = 1
    cluster: Cluster | None = None


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
    rehearsal = rehearse(inputs.skeleton, _joint_outline(outlines))
    blocks = plan_blocks(config, inputs, rehearsal)
    outside = plan_outside(config, inputs)
    tensors = (*(plan for block in blocks for plan in block.tensors), *outside)
    shapes = batch_shapes(outlines, calibration)
    problems = treatment_problems(inputs, tensors)
    output, misfits = quantize_output(config.output, inputs, output_tensors(inputs, tensors) if not problems else {})
    problems += misfits
    workload = partial(workload_of, config, inputs, rehearsal, blocks, outside)
    works = share_work(shapes, blocks, rehearsal, workload, machines.num_ranks)
    limits = _limits(config, machines, out)
    choice = _choose(config, max(works, key=lambda each: each.num_rows).work, limits, machines, calibration is not None)
    problems += [*choice.problems, *_disk_problems(output, choice, limits, out)]
    if not any(plan.treatment is Treatment.SOLVED for plan in tensors):
        problems.append("nothing is left to solve: no linear of a block passes parameters.include and .exclude")
    plan = MergePlan(
        config=config,
        class_name=inputs.skeleton.class_name,
        device=machines.device,
        compute_dtype=inputs.skeleton.dtype,
        stacks=tuple((stack.name, len(stack.blocks)) for stack in (inputs.skeleton.stacks[i] for i in rehearsal.order)),
        blocks=blocks,
        outside=outside,
        output=output,
        num_samples=_num_samples(inputs, shapes),
        quantized=inputs.quantized(),
        bytes_read=_bytes_read(inputs, tensors),
        placement=choice.placement,
        reasons=choice.reasons,
        footprint=choice.footprint,
        limits=limits,
        notes=(*inputs.notes, *_notes(config, inputs, tensors)),
        problems=tuple(problems),
    )
    return Preparation(plan, inputs, rehearsal)


def workload_of(
    config: MergeConfig,
    inputs: Inputs,
    rehearsal: Rehearsal,
    blocks: Sequence[BlockPlan],
    outside: Sequence[TensorPlan],
    shapes: Sequence[Sequence[BatchShapes]],
) -> Workload:
    """What some calibration batches, by candidate, make of a merge."""
    state = inputs.skeleton.model.state_dict()
    return measure_workload(
        inputs,
        rehearsal,
        blocks,
        shapes,
        own_stream=config.merge_method == "regmean",
        off_diagonal_scale=config.parameters.off_diagonal_scale,
        spooled=waits_on_disk(config.memory),
        outside_bytes=sum(state[p.name].numel() * p.dtype.itemsize for p in outside if p.name in state),
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
    def size(checkpoint: Checkpoint, names: NameMap, plan: TensorPlan) -> int:
        if plan.name in inputs.reference_names.unmapped:
            return checkpoint.tensors[plan.name].num_bytes if plan.name in checkpoint.tensors else 0
        name = names.on_disk(plan.name)
        keys = [] if name in names.missing else names.sources_of([name])
        return sum(checkpoint.tensors[key].num_bytes for key in keys)

    total = 0
    for plan in tensors:
        if plan.treatment is Treatment.BASE and inputs.base is not None and inputs.base_names is not None:
            total += size(inputs.base, inputs.base_names, plan)
        elif plan.treatment is Treatment.COPIED:
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
