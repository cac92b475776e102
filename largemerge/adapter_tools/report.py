"""What an extracted adapter keeps of the difference of two models, by rank, and what it does not hold.

    s_1 ≥ s_2 ≥ …  singular values of Δ        kept at rank k:  Σ_{i≤k} s_i² / ‖Δ‖²

of every matrix, and of all together. The same adapter cut to rank k keeps just that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from largemerge.checkpoint.tensor_info import LAYER_NUMBER
from largemerge.machine import MemoryUse, versions
from largemerge.streams import plain_text
from largemerge.units import counted, duration, gib

_MAX_ROWS, _MAX_RANKS = 24, 5  # that the table shows; the report has all


@dataclass(frozen=True)
class LeftOut:
    """Something that differs and that the adapter does not hold.

    Attributes:
        reason: Why.
        relative_norm: ‖Δ‖ / ‖W_0‖; `None` where the base has no such tensor.
        square: ‖Δ‖²; 0 where the two tensors cannot be subtracted.
    """

    reason: str
    relative_norm: float | None
    square: float


@dataclass(frozen=True)
class MatrixReport:
    """What became of one matrix.

    Attributes:
        name: Name of the weight.
        outputs: Number of outputs.
        inputs: Number of inputs.
        rank: Rank of its factors.
        own_rank: Number of singular values of the difference that are not 0, where these are fewer; else `None`.
        square: ‖Δ‖².
        relative_norm: ‖Δ‖ / ‖W_0‖; `None` where W_0 is 0.
        kept: Rank k → share of ‖Δ‖² that the k largest singular values keep.
        relative_error: ‖Δ - B A‖ / ‖Δ‖ of the factors as written.
    """

    name: str
    outputs: int
    inputs: int
    rank: int
    own_rank: int | None
    square: float
    relative_norm: float | None
    kept: Mapping[int, float]
    relative_error: float

    def kept_at(self, rank: int) -> float:
        """Share of ‖Δ‖² that is kept at a rank, which may be above that of the matrix."""
        return self.kept[max(own for own in self.kept if own <= rank)]


@dataclass(frozen=True)
class ExtractReport:
    """What `largemerge extract-lora` has written.

    Attributes:
        out: The output folder.
        fine_tuned: Reference of the fine-tuned model.
        base: Reference of the base.
        rank: Rank of the adapter.
        matrices: The matrices that were decomposed.
        held: Parameters that differ and are in the adapter as a whole, with ‖Δ‖ / ‖W_0‖.
        held_square: Σ ‖Δ‖² of these.
        left_out: What differs and is not in the adapter, by name.
        notes: What a user should know; warnings begin with `warning: `.
        num_bytes: Bytes of the adapter's file.
        bytes_read: Bytes that were read.
        resumed_parts: Number of parts that an earlier run had finished.
        redone_parts: Why parts that an earlier run had finished were done again.
        seconds: Seconds in total.
        peak: Measured peak of memory in use.
    """

    out: Path
    fine_tuned: str
    base: str
    rank: int
    matrices: Sequence[MatrixReport]
    held: Mapping[str, float | None]
    held_square: float
    left_out: Mapping[str, LeftOut]
    notes: Sequence[str]
    num_bytes: int
    bytes_read: int
    resumed_parts: int
    redone_parts: Sequence[str]
    seconds: float
    peak: MemoryUse

    @property
    def is_whole(self) -> bool:
        """Whether everything that differs is in the adapter, as far as its rank goes."""
        return not self.left_out and not any(note.startswith("warning: ") for note in self.notes)

    @property
    def kept(self) -> dict[int, float]:
        """Rank → share of ‖Δ‖² of all matrices together."""
        return {rank: _kept(self.matrices, rank) for rank in ranks_shown(self.rank)}

    @property
    def kept_of_all(self) -> float:
        """Share of ‖Δ‖² of everything that differs and can be subtracted, left out or not, that the adapter keeps."""
        kept = math.fsum(each.square * each.kept_at(self.rank) for each in self.matrices) + self.held_square
        squares = [each.square for each in self.matrices] + [each.square for each in self.left_out.values()]
        return kept / (math.fsum(squares) + self.held_square)

    @property
    def relative_error(self) -> float:
        """‖Δ - B A‖ / ‖Δ‖ of all matrices together, as written."""
        errors = math.fsum(each.relative_error**2 * each.square for each in self.matrices)
        return math.sqrt(errors / math.fsum(each.square for each in self.matrices))

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "versions": versions(),
            "fine_tuned": self.fine_tuned,
            "base": self.base,
            "rank": self.rank,
            "is_whole": self.is_whole,
            "kept": {str(rank): kept for rank, kept in self.kept.items()},
            "kept_of_all": self.kept_of_all,
            "relative_error": self.relative_error,
            "matrices": {
                each.name: {
                    "shape": [each.outputs, each.inputs],
                    "rank": each.rank,
                    "own_rank": each.own_rank,
                    "norm": math.sqrt(each.square),
                    "relative_norm": each.relative_norm,
                    "kept": {str(rank): kept for rank, kept in each.kept.items()},
                    "relative_error": each.relative_error,
                }
                for each in self.matrices
            },
            "saved_whole": {name: {"relative_norm": norm} for name, norm in self.held.items()},
            "left_out": {
                name: {"reason": each.reason, "relative_norm": each.relative_norm}
                for name, each in self.left_out.items()
            },
            "notes": list(self.notes),
            "num_bytes": self.num_bytes,
            "bytes_read": self.bytes_read,
            "resumed_parts": self.resumed_parts,
            "redone_parts": list(self.redone_parts),
            "seconds": round(self.seconds, 3),
            "peak_bytes": {"host_anonymous": self.peak.host_anonymous, "device": self.peak.device},
        }

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows what is kept by rank, and what the adapter does not hold."""
        ranks = ranks_shown(self.rank)
        ranks = [ranks[0], *ranks[1:][-(_MAX_RANKS - 1) :]]
        table = Table(title=f"‖Δ‖² kept by rank, {counted(len(self.matrices), 'matrix', 'matrices')} → {self.out}")
        table.add_column("linear", overflow="fold")
        for title in ("", "‖Δ‖/‖W‖", *map(str, ranks)):
            table.add_column(title, justify="right", no_wrap=True)
        kinds: dict[str, list[MatrixReport]] = {}
        for each in self.matrices:
            kinds.setdefault(LAYER_NUMBER.sub("*", each.name).removesuffix(".weight"), []).append(each)
        short = {kind: ".".join(kind.split(".")[-2:]) for kind in kinds}
        for kind, alike in list(kinds.items())[:_MAX_ROWS]:
            name = short[kind] if list(short.values()).count(short[kind]) == 1 else kind
            table.add_row(name, str(len(alike)), _norms(alike), *(_percent(_kept(alike, rank)) for rank in ranks))
        if len(kinds) > _MAX_ROWS:
            table.add_row(f"and {len(kinds) - _MAX_ROWS} more kinds, which the report has")
        shares = (_percent(self.kept[rank]) for rank in ranks)
        table.add_row("all of these", str(len(self.matrices)), "", *shares, style="bold")
        console.print(table)
        closing = Table(show_header=False)
        closing.add_column()
        closing.add_column(overflow="fold")
        closing.add_row("kept", f"{self.kept_of_all:.2%} of ‖Δ‖² of everything that differs")
        closing.add_row("error", f"‖Δ - BA‖ / ‖Δ‖ = {self.relative_error:.2g} over these matrices, as written")
        if self.held:
            closing.add_row("as a whole", f"{counted(len(self.held), 'tensor')} that no LoRA holds")
        if self.left_out:
            closing.add_row("not held", f"{counted(len(self.left_out), 'tensor')} that differ, see the warnings")
        closing.add_row("disk", f"{gib(self.bytes_read)} read, {gib(self.num_bytes)} written")
        closing.add_row("time", duration(self.seconds))
        closing.add_row("peak memory", f"{gib(self.peak.host_anonymous)} anonymous")
        for note in (*self.notes, *self.redone_parts):
            closing.add_row("note", note)
        console.print(closing)


def ranks_shown(rank: int) -> list[int]:
    """The powers of two below a rank, and the rank."""
    return [*(1 << power for power in range((rank - 1).bit_length())), rank]


def _kept(matrices: Sequence[MatrixReport], rank: int) -> float:
    kept = math.fsum(each.square * each.kept_at(rank) for each in matrices)
    return kept / math.fsum(each.square for each in matrices)


def _percent(share: float) -> str:
    return "100%" if share >= 0.9995 else f"{share:.1%}"


def _norms(matrices: Sequence[MatrixReport]) -> str:
    norms = [each.relative_norm for each in matrices if each.relative_norm is not None]
    if not norms:
        return "–"
    least, most = f"{min(norms):.2g}", f"{max(norms):.2g}"
    return least if least == most else f"{least}–{most}"


def model_card(report: ExtractReport, base: str | None) -> str:
    """Writes the adapter's model card: what it was extracted from, what it keeps, and what it does not hold."""
    head = [
        "---",
        "library_name: peft",
        *([f"base_model: {base!r}"] if base else []),
        "tags: [lora, largemerge]",
        "---",
    ]
    kept = ", ".join(f"{share:.1%} at rank {rank}" for rank, share in report.kept.items())
    lines = [
        *head,
        "",
        "# LoRA extracted from a fine-tuned model",
        "",
        f"The difference of `{report.fine_tuned}` and `{report.base}`, cut to rank {report.rank} by "
        "`largemerge extract-lora`.",
        "",
        f"Of ‖Δ‖² of the {counted(len(report.matrices), 'matrix', 'matrices')} it keeps {kept}; of everything that "
        f"differs, {report.kept_of_all:.2%}.",
    ]
    warnings = [note.removeprefix("warning: ") for note in report.notes if note.startswith("warning: ")]
    if warnings:
        lines += ["", "It is not all of the difference:", "", *(f"- {each}" for each in warnings)]
    return "\n".join(lines) + "\n"
