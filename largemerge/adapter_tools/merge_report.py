"""What `largemerge merge-adapters` says of the adapter that it has written: table, JSON, model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from largemerge.adapter_tools.factor_methods import METHODS
from largemerge.machine import versions
from largemerge.streams import plain_text
from largemerge.units import counted, duration, gib


@dataclass(frozen=True)
class AdapterMergeReport:
    """What `largemerge merge-adapters` has written.

    Attributes:
        out: The output folder.
        method: Name of the method.
        weights: Weight of every adapter, by reference.
        parameters: All parameters of the method, but for its rank.
        base: The model whose rows were measured, if an adapter is a DoRA.
        rank: Rank of the result.
        kept: Share of ‖ΔW‖² of the merge that this rank keeps; of DoRA, of its low-rank part.
        kept_by_rank: Rank → the same share, where the method cuts to a rank.
        ranks: Path of a module → its rank.
        gains: Path of a module → the smallest and the largest factor of the base's rows in the merged weight (DoRA).
        errors: Path of a module → ‖ΔW - Σ w ΔW_i‖ / ‖Σ w ΔW_i‖, as written; `None` where the sum is zero.
        relative_error: The same, of all modules together.
        notes: What a user should know; warnings begin with `warning: `.
        num_bytes: Bytes of the adapter's file.
        seconds: Seconds in total.
    """

    out: Path
    method: str
    weights: Mapping[str, float]
    parameters: Mapping[str, Any]
    base: str | None
    rank: int
    kept: float
    kept_by_rank: Mapping[int, float]
    ranks: Mapping[str, int]
    gains: Mapping[str, tuple[float, float]]
    errors: Mapping[str, float | None]
    relative_error: float
    notes: Sequence[str]
    num_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "versions": versions(),
            "merge_method": self.method,
            "weights": dict(self.weights),
            "parameters": dict(self.parameters),
            "use_dora": self.base is not None,
            "base": self.base,
            "rank": self.rank,
            "kept": self.kept,
            "kept_by_rank": {str(rank): kept for rank, kept in self.kept_by_rank.items()},
            "relative_error": self.relative_error,
            "modules": {path: self._module(path) for path in self.errors},
            "notes": list(self.notes),
            "num_bytes": self.num_bytes,
            "seconds": round(self.seconds, 3),
        }

    def _module(self, path: str) -> dict[str, Any]:
        gains = {"gains": list(self.gains[path])} if path in self.gains else {}
        return {"rank": self.ranks[path], "relative_error": self.errors[path], **gains}

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows the report as a table."""
        title = f"{self.method}: {counted(len(self.weights), 'adapter')} → {self.out}"
        table = Table(title=title, show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        table.add_row(
            "result", f"{METHODS[self.method].title}; rank {self.rank}, {counted(len(self.errors), 'module')}"
        )
        if "rank" in METHODS[self.method].parameters:
            part = "‖ΔW‖² of the merge" if self.base is None else "‖diag(g) ΔW‖² of the merge's low-rank part"
            table.add_row("kept", f"{self.kept:.2%} of {part}, by its rank")
        if self.gains:
            least, most = min(low for low, _ in self.gains.values()), max(high for _, high in self.gains.values())
            table.add_row("gains", f"{least:.4g} to {most:.4g}, of the base's rows (DoRA)")
        table.add_row("error", f"{self.relative_error:.2g} of ‖Σ w ΔW‖, against the weighted sum, as written")
        table.add_row("disk", f"{gib(self.num_bytes)} written")
        table.add_row("time", duration(self.seconds))
        for note in self.notes:
            table.add_row("note", note)
        console.print(table)


def model_card(report: AdapterMergeReport, base: str | None) -> str:
    """Writes the adapter's model card: how it was merged, and of what.

    Args:
        report: What has been written.
        base: Its base, as `adapter_config.json` names it.
    """
    names = [f"base_model: {base!r}"] if base else []
    lines = ["---", "library_name: peft", *names, "tags: [lora, largemerge]", "---", "", "# Merged LoRA adapters", ""]
    lines += [f"By `largemerge merge-adapters`, `{report.method}`: {METHODS[report.method].title}.", ""]
    for name, weight in report.weights.items():
        lines.append(f"- {weight:g} · `{Path(name).name if Path(name).exists() else name}`")
    return "\n".join([*lines, "", *(f"- {note}" for note in report.notes)]).rstrip() + "\n"
