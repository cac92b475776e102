"""The plan of a merge: what it will read, write, hold and compute. `planning.py` makes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from largemerge.checkpoint.tensor_info import OutputTensor
from largemerge.config import MergeConfig
from largemerge.dtypes import dtype_name
from largemerge.estimate import Footprint, Placement
from largemerge.inputs import Inputs
from largemerge.model.rehearsal import Rehearsal
from largemerge.placement import Limits
from largemerge.rank_plan import RankPlan
from largemerge.treatment import (
    BlockPlan,
    TensorPlan,
    Treatment,
)


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
        outside: Tensors of no block.
        output: What is written, by name on disk.
        num_samples: Calibration samples by candidate (upper bounds before the data is read).
        quantized: By input: how many of its weights are quantised, and how.
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
    outside: tuple[TensorPlan, ...]
    output: Mapping[str, OutputTensor]
    num_samples: Mapping[str, int]
    quantized: Mapping[str, Mapping[str, int]]
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
        return (*(plan for block in self.blocks for plan in block.tensors), *self.outside)

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
        counter = Counter(plan.treatment.value + (f": {plan.reason}" if plan.reason else "") for plan in self.tensors)
        return dict(counter.most_common())

    def quantized_output(self) -> dict[str, int]:
        """How many weights are written quantised, by how they are."""
        return dict(Counter(tensor.quantization.label for tensor in self.output.values() if tensor.quantization))

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
                plan.name: {"treatment": plan.treatment.value, "reason": plan.reason}
                for plan in self.tensors
                if plan.treatment is not Treatment.SOLVED
            },
            "quantized": {name: dict(kinds) for name, kinds in self.quantized.items()},
            "quantized_output": self.quantized_output(),
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


@dataclass(frozen=True)
class Preparation:
    """A plan together with the opened inputs that it was made from."""

    plan: MergePlan
    inputs: Inputs
    rehearsal: Rehearsal
