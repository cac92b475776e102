"""What a data-free merge did, as `merge_report.json` tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from largemerge.arithmetic.plan import DataFreePlan
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.tasks import Task
from largemerge.environment import machine, versions
from largemerge.memory import MemoryUse


@dataclass(frozen=True)
class DataFreeReport:
    """What a data-free merge did; `to_json` is what `merge_report.json` holds.

    Attributes:
        plan: That was run.
        seconds: Total, and of the preparation.
        bytes_read: In this run; tensors that are read twice count twice.
        bytes_past_cache: In this run; read and written straight from and to the disk.
        resumed_parts: How many parts an earlier run had finished.
        peaks: Measured, by rank.
    """

    plan: DataFreePlan
    seconds: Mapping[str, float]
    bytes_read: int
    bytes_past_cache: int
    resumed_parts: int
    peaks: tuple[MemoryUse, ...]

    @property
    def peak(self) -> MemoryUse:
        """That of the rank that held most."""
        return max(self.peaks, key=lambda peak: peak.host_anonymous)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        checkpoints = (self.plan.checkpoints | self.plan.companions).items()
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
            "ranks": [asdict(peak) for peak in self.peaks] if len(self.peaks) > 1 else [],
            "before": dict(self.plan.before.reports),
            "tensors": {task.name: self._described(task) for task in self.plan.layout.tasks},
        }

    def _described(self, task: Task) -> dict[str, Any]:
        described: dict[str, Any] = {"from": [f"{model}: {key}" for model, key in (*task.inputs, *task.companions)]}
        if task.copied:
            return described | {"copied": task.copied}
        matrices = METHODS[self.plan.config.merge_method].matrices
        if task.otherwise and matrices is not None:
            described |= {"merged_otherwise": f"{matrices.others_are}: {task.otherwise}"}
        if task.inputs_first:
            described |= {"stored_as": "[inputs, outputs]"}
        return described | {"each": {name: list(values) for name, values in task.each.items()}, **dict(task.options)}
