"""What happened, as `merge_report.json` tells it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from largemerge.config import MergeConfig
from largemerge.environment import machine, versions
from largemerge.inputs import Inputs
from largemerge.memory import MemoryUse
from largemerge.merge_plan import MergePlan


def config_yaml(config: MergeConfig) -> str:
    """The resolved configuration as YAML, without what is unset."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; `to_json` is what `merge_report.json` holds.

    Attributes:
        plan: That was run.
        config: Resolved.
        inputs: Fingerprints of all files, by checkpoint.
        calibration: By candidate: number of samples and fingerprint of what the model saw.
        blocks: By name: seconds by phase, bytes written, and a report for every linear.
        outside: Seconds and bytes of the tensors outside the blocks.
        seconds: Total, and of the preparation.
        bytes_read: From checkpoints, in this run.
        resumed_parts: How many parts an earlier run had finished.
        peak: Measured.
        hidden_bytes_on_disk: Most that hidden states took there.
        retries: What ran out of memory and was done again in smaller parts.
        timeline: When (seconds since the start) which stage of which block began.
        ranks: By rank: what it held, read and sent; empty where there was one. Seconds are the first rank's.
    """

    plan: MergePlan
    config: MergeConfig
    inputs: Mapping[str, Any]
    calibration: Mapping[str, Any]
    blocks: Mapping[str, Any]
    outside: Mapping[str, Any]
    seconds: Mapping[str, float]
    bytes_read: int
    resumed_parts: int
    peak: MemoryUse
    hidden_bytes_on_disk: int
    retries: tuple[str, ...]
    timeline: tuple[tuple[float, str, str], ...]
    ranks: tuple[Mapping[str, Any], ...]

    @classmethod
    def build(
        cls,
        *,
        plan: MergePlan,
        inputs: Inputs,
        calibration: Mapping[str, Any],
        parts: Mapping[str, Mapping[str, Any]],
        prepared_seconds: float,
        total_seconds: float,
        resumed_parts: int,
        peak: MemoryUse,
        bytes_read: int,
        hidden_bytes_on_disk: int,
        retries: Sequence[str],
        timeline: Sequence[tuple[float, str, str]],
        ranks: Sequence[Mapping[str, Any]],
    ) -> MergeReport:
        """Puts a report together from what the parts of a merge have to say."""
        checkpoints = [*inputs.candidates, *([inputs.base] if inputs.base is not None else [])]
        return cls(
            plan=plan,
            config=plan.config,
            inputs={
                checkpoint.name: {"folder": str(checkpoint.folder), "files": dict(checkpoint.fingerprint)}
                for checkpoint in checkpoints
            },
            calibration=calibration,
            blocks={block.name: parts[block.name] for block in plan.blocks},
            outside=parts["outside"],
            seconds={"total": round(total_seconds, 3), "preparation": round(prepared_seconds, 3)},
            bytes_read=bytes_read,
            resumed_parts=resumed_parts,
            peak=peak,
            hidden_bytes_on_disk=hidden_bytes_on_disk,
            retries=tuple(retries),
            timeline=tuple(timeline),
            ranks=tuple(ranks),
        )

    @property
    def linears(self) -> dict[str, Any]:
        """The report of every solved linear, by parameter name."""
        return {name: entry for block in self.blocks.values() for name, entry in block["linears"].items()}

    @property
    def quantization_errors(self) -> dict[str, float]:
        """‖written - merged‖ / ‖merged‖ of every weight that was written quantised, by parameter name."""
        parts = (self.outside, *self.blocks.values())
        return {name: error for part in parts for name, error in part.get("quantization_errors", {}).items()}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        phases: Counter[str] = Counter()
        for part in (*self.blocks.values(), self.outside):
            phases.update(part["seconds"])
        return {
            "versions": versions(),
            "machine": machine(self.plan.device),
            "config": self.config.model_dump(mode="json"),
            "inputs": self.inputs,
            "calibration": self.calibration,
            "plan": self.plan.to_json(),
            "seconds": {**self.seconds, "by_phase": {key: round(value, 3) for key, value in phases.items()}},
            "bytes_read": self.bytes_read,
            "bytes_written": sum(part["bytes_written"] for part in (*self.blocks.values(), self.outside)),
            "resumed_parts": self.resumed_parts,
            "peak_bytes": {
                "planned_host": self.plan.footprint.host,
                "planned_device": self.plan.footprint.device,
                "planned_disk": self.plan.footprint.disk,
                "host_anonymous": self.peak.host_anonymous,
                "host_total": self.peak.host_total,
                "device": self.peak.device,
                "disk": self.hidden_bytes_on_disk,
            },
            "retries": list(self.retries),
            "timeline": [list(entry) for entry in self.timeline],
            "ranks": list(self.ranks),
            "quantization": self._quantization(),
            "fallbacks": {name: entry["fallbacks"] for name, entry in self.linears.items() if entry["fallbacks"]},
            "outside": self.outside,
            "blocks": self.blocks,
        }

    def _quantization(self) -> dict[str, Any]:
        errors = self.quantization_errors
        mean = sum(errors.values()) / len(errors) if errors else None
        worst = max(errors, key=lambda name: errors[name]) if errors else None
        return {
            "inputs": {name: dict(kinds) for name, kinds in self.plan.quantized.items()},
            "output": self.plan.quantized_output(),
            "mean_relative_error": mean,
            "worst": worst,
            "worst_relative_error": errors[worst] if worst is not None else None,
        }
