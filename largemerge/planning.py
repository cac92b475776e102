"""The plan of a merge: what it will read, write, hold and compute, from headers and configs alone.

`make_plan` opens the inputs, rehearses the model, and gives every tensor of the output its treatment. What
makes the merge impossible is collected in `problems`, all at once; `merge` runs a plan only without any.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from largemerge.calibration import CalibrationOutline, CalibrationSet
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.tensor_info import OutputTensor
from largemerge.config import MergeConfig
from largemerge.errors import LargemergeError
from largemerge.inputs import Inputs
from largemerge.memory import memory_in_use
from largemerge.merge_plan import MergePlan, Preparation
from largemerge.model.names import NameMap
from largemerge.model.rehearsal import Rehearsal, rehearse
from largemerge.output import existing_folder
from largemerge.placement import Choice, Limits, choose_placement, find_limits, waits_on_disk
from largemerge.probe import measure_rates
from largemerge.quantization import quantize_output
from largemerge.rank_plan import plan_ranks
from largemerge.sizes import gib
from largemerge.timing import estimate_seconds
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
from largemerge.workload import BatchShapes, Workload, batch_shapes, measure_workload, split_shapes


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        LargemergeError: If torch knows no such device, or cannot use it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise LargemergeError(f"--device {device}: {first_line}; expected auto, cpu or cuda:0") from None
    return chosen


def make_plan(
    config: MergeConfig,
    inputs: Inputs,
    device: torch.device,
    outlines: Sequence[CalibrationOutline],
    calibration: Sequence[CalibrationSet] | None = None,
    out: Path | None = None,
    *,
    probe: bool = False,
) -> Preparation:
    """Plans a merge.

    Args:
        config: From `load_config`.
        inputs: From `open_inputs`.
        device: That will compute.
        outlines: Of every candidate's calibration data.
        calibration: The data itself, once it has been read: estimates become exact.
        out: The output folder, to see whether the disk has room.
        probe: Measure this machine for some seconds, to say how long the merge will take.

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
    notes = [*inputs.notes, *_notes(config, inputs, tensors)]
    work = _workload(config, inputs, rehearsal, blocks, outside, shapes)
    limits = find_limits(config.memory, device, out)
    choice = _choose(config, work, limits, device, calibration is not None)
    problems += [*choice.problems, *_disk_problems(output, choice, limits, out)]
    seconds = _seconds(work, inputs, device, choice, limits) if probe and not problems else {}
    if not any(plan.treatment is Treatment.SOLVED for plan in tensors):
        problems.append("nothing is left to solve: no linear of a block passes parameters.include and .exclude")
    plan = MergePlan(
        config=config,
        class_name=inputs.skeleton.class_name,
        device=device,
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
        seconds=seconds,
        notes=tuple(notes),
        problems=tuple(problems),
    )
    return Preparation(plan, inputs, rehearsal)


def plan_for_ranks(prepared: Preparation, outlines: Sequence[CalibrationOutline], num_ranks: int) -> MergePlan:
    """The plan, and what each of several ranks would hold, move and compute."""
    plan = prepared.plan
    ranks = plan_ranks(
        split_shapes(batch_shapes(outlines, None), plan.placement.samples),
        prepared.rehearsal,
        partial(_workload, plan.config, prepared.inputs, prepared.rehearsal, plan.blocks, plan.outside),
        plan.placement,
        plan.device,
        num_ranks,
        eight_bit=plan.config.memory.hidden_states_8bit,
        limited=plan.config.memory.host is not None,
    )
    return replace(plan, ranks=ranks)


def _seconds(work: Workload, inputs: Inputs, device: torch.device, choice: Choice, limits: Limits) -> dict[str, float]:
    """By stage, from a probe of this machine."""
    rates = measure_rates(work, inputs.candidates[0], limits.scratch, device, choice.placement.samples)
    return estimate_seconds(work, choice.placement, rates)


def _workload(
    config: MergeConfig,
    inputs: Inputs,
    rehearsal: Rehearsal,
    blocks: Sequence[BlockPlan],
    outside: Sequence[TensorPlan],
    shapes: Sequence[Sequence[BatchShapes]],
) -> Workload:
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


def _choose(config: MergeConfig, work: Workload, limits: Limits, device: torch.device, has_data: bool) -> Choice:
    before = memory_in_use(device).host_anonymous - (work.input_bytes if has_data else 0)
    choice = choose_placement(work, limits, device, max(0, before), eight_bit=config.memory.hidden_states_8bit)
    if config.memory.hidden_states_8bit and find_spec("bitsandbytes") is None:
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
