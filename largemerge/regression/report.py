"""What a merge did: `merge_report.json`, the closing table, and the files beside the weights.

parts of the journal, of all ranks ──► MergeReport ──► print: the table on the terminal
                                                   └─► write_side_files: report, config, tokenizer, model card
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from largemerge.checkpoint.locate import short_name
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.side_files import model_card, output_config
from largemerge.checkpoint.tensor_info import torch_dtype
from largemerge.comparison import Verification
from largemerge.errors import MergeError
from largemerge.heads import card_section, write_heads
from largemerge.machine import MemoryUse, machine, versions
from largemerge.regression.config import CandidateConfig, MergeConfig
from largemerge.regression.drift import DriftOfBlocks, drift_curves, drift_section
from largemerge.regression.essential import subspace_rows
from largemerge.regression.inputs import Inputs
from largemerge.regression.kept_sums import make_record
from largemerge.regression.plan import MergePlan, PlannedMerge, input_rows
from largemerge.regression.sequence import RECORD_FILE, MergedModel, models_so_far, sequence_section
from largemerge.regression.tensor_plan import HEAD, quantization_settings
from largemerge.streams import plain_text
from largemerge.units import counted, duration, gib
from largemerge.weight_matching.permuted import open_permuted
from largemerge.weight_matching.plan import card_section as aligned_section
from largemerge.weight_matching.run import rows_of


def config_yaml(config: MergeConfig) -> str:
    """Formats the resolved configuration as YAML, without what is unset."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; `to_json` is what `merge_report.json` holds.

    Attributes:
        plan: The plan that was run.
        config: The resolved configuration.
        inputs: Folder and fingerprints of all files, by checkpoint.
        calibration: Number of samples and tokens, and fingerprint of the data that the model saw, by candidate; where
            Gram matrices stand for it, the fingerprint is theirs.
        blocks: Seconds by stage, bytes written, and a report for every linear, by block.
        non_block: Seconds and bytes of the tensors outside the blocks.
        head: Seconds, bytes, and a report for every linear of the head that was solved; empty where none was.
        seconds: Seconds in total, and of the preparation, on rank 0.
        bytes_read: Bytes read from checkpoints in this run, by all ranks.
        resumed_parts: Number of parts that an earlier run had finished.
        peak: Measured peak of memory in use.
        hidden_bytes_on_disk: Bytes that hidden states took on disk, at most.
        retries: Messages about blocks that ran out of memory and were run again in smaller parts.
        timeline: Seconds since the start, stage and block, whenever a stage began.
        memory_over_time: Seconds since the start, and the most bytes on host and device from then on, of rank 0.
        ranks: Memory held and bytes read and sent, by rank; empty where there was one rank.
        out: The output folder, as the user named it.
        aligned: What was permuted before the merge; empty where nothing was.
        verified: How much of every candidate is in the output; `None` where that was not measured.
        written: Digests of the files, and why parts were done again, once the merge is finished.
    """

    plan: MergePlan
    config: MergeConfig
    inputs: Mapping[str, Any]
    calibration: Mapping[str, Any]
    blocks: Mapping[str, Any]
    non_block: Mapping[str, Any]
    head: Mapping[str, Any]
    seconds: Mapping[str, float]
    bytes_read: int
    resumed_parts: int
    peak: MemoryUse
    hidden_bytes_on_disk: int
    retries: tuple[str, ...]
    timeline: tuple[tuple[float, str, str], ...]
    memory_over_time: tuple[Sequence[float], ...]
    ranks: tuple[Mapping[str, Any], ...]
    out: Path
    aligned: Mapping[str, Any] = field(default_factory=dict)
    verified: Verification | None = None
    written: Mapping[str, Any] = field(default_factory=dict)

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
        memory_over_time: Sequence[Sequence[float]],
        ranks: Sequence[Mapping[str, Any]],
        out: Path,
    ) -> MergeReport:
        """Makes a report; `parts` are the entries of the journal, other arguments as in the class."""
        return cls(
            plan=plan,
            config=plan.config,
            inputs={
                checkpoint.name: {"folder": str(checkpoint.folder), "files": dict(checkpoint.fingerprint)}
                for checkpoint in inputs.checkpoints
            },
            calibration=calibration,
            aligned=inputs.matched.to_json(inputs.matching) if inputs.matched and inputs.matching else {},
            blocks={block.name: parts[block.name] for block in plan.blocks},
            non_block=parts["outside"],
            head=parts.get(HEAD, {}),
            seconds={"total": round(total_seconds, 3), "preparation": round(prepared_seconds, 3)},
            bytes_read=bytes_read,
            resumed_parts=resumed_parts,
            peak=peak,
            hidden_bytes_on_disk=hidden_bytes_on_disk,
            retries=tuple(retries),
            timeline=tuple(timeline),
            memory_over_time=tuple(memory_over_time),
            ranks=tuple(ranks),
            out=out,
        )

    @property
    def linears(self) -> dict[str, Any]:
        """Reports of all solved linears, by parameter name."""
        parts = (*self._head_parts, *self.blocks.values())
        return {name: entry for part in parts for name, entry in part["linears"].items()}

    @property
    def _head_parts(self) -> tuple[Mapping[str, Any], ...]:
        return (self.head,) if self.head else ()

    @property
    def _parts(self) -> tuple[Mapping[str, Any], ...]:
        """What the output was written in."""
        return (self.non_block, *self._head_parts, *self.blocks.values())

    @property
    def _in_sequence(self) -> bool:
        return self.config.sequence is not None

    @property
    def drift(self) -> DriftOfBlocks:
        """‖h_m − h_e‖ / ‖h_e‖ of the merged hidden states after every block, by candidate and block.

        What it was before a block is what it is after the block before it. Empty for methods that do not hold the
        merged model against the candidates.
        """
        blocks = {name: part["drift"] for name, part in self.blocks.items() if part.get("drift")}
        return {each: {name: of[each] for name, of in blocks.items()} for each in self.config.names} if blocks else {}

    @property
    def quantization_errors(self) -> dict[str, float]:
        """‖written - merged‖ / ‖merged‖ of every weight that was written quantised, by parameter name."""
        return {name: error for part in self._parts for name, error in part.get("quantization_errors", {}).items()}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values, as `merge_report.json` holds it."""
        phases: Counter[str] = Counter()
        for part in self._parts:
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
            "bytes_written": sum(part["bytes_written"] for part in self._parts),
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
            "memory_over_time": [list(point) for point in self.memory_over_time],
            "ranks": list(self.ranks),
            "quantization": self._quantization(),
            "fallbacks": {name: entry["fallbacks"] for name, entry in self.linears.items() if entry["fallbacks"]},
            **({"verified": self.verified.to_json()} if self.verified is not None else {}),
            **self.written,
            **({"drift": self.drift} if self.drift else {}),
            **({"align": self.aligned} if self.aligned else {}),
            **({"sequence": [model.model_dump() for model in merged_models(self.plan)]} if self._in_sequence else {}),
            "outside": self.non_block,
            **({HEAD: self.head} if self.head else {}),
            "blocks": self.blocks,
        }

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Prints the closing table."""
        linears = self.linears
        table = Table(
            title=f"{self.config.merge_method}: {len(self.config.candidates)} models → {self.out}", show_header=False
        )
        table.add_column()
        table.add_column(overflow="fold")
        counts = ", ".join(f"{count} {what}" for what, count in self.plan.counts().items())
        table.add_row("tensors", counts)
        fallbacks = [name for name, entry in linears.items() if entry["fallbacks"]]
        solvers = Counter(entry["solver"] for entry in linears.values())
        table.add_row("solvers", ", ".join(f"{count} {solver}" for solver, count in solvers.items()))
        if fallbacks:
            table.add_row(
                "fallbacks",
                f"{counted(len(fallbacks), 'linear')} needed more than float32 Cholesky: {', '.join(fallbacks[:3])} …",
            )
        conditions = {name: entry["condition"] for name, entry in linears.items() if entry["condition"] is not None}
        if conditions:
            worst = max(conditions, key=lambda name: conditions[name])
            table.add_row("worst condition", f"{conditions[worst]:.1e} ({worst})")
        if self.config.method.merges_subspaces:
            for label, text in subspace_rows(linears):
                table.add_row(label, text)
        if linears:
            table.add_row("distance", _mean_distances(self))
        factors = [entry["shrinkage"] for entry in linears.values() if "shrinkage" in entry]
        if factors:
            mean = sum(factors) / len(factors)
            text = f"scaled by {mean:.2f} on average, {min(factors):.2f} to {max(factors):.2f}"
            table.add_row("corrections", f"{text}: as far as folds of the data agree")
        for number, (name, curve, last, most) in enumerate(drift_curves(self.drift)):
            text = f"{name} {curve} {last:.2%} after the last block, at most {most:.2%}"
            table.add_row("" if number else "drift", text)
        for label, text in input_rows(self.plan):
            table.add_row(label, text)
        if self._in_sequence:
            merged = ", ".join(f"{model.name} {model.weight:g}" for model in merged_models(self.plan))
            kept = f"; sums kept: {gib(self.plan.sums_bytes)}" if self.config.keeps_sums else "; no sums kept"
            if self.plan.num_kept_samples:
                kept = f"; {counted(self.plan.num_kept_samples, 'sample')} kept: {gib(self.plan.sums_bytes)}"
            table.add_row("in sequence", merged + kept)
        seen = (f"{name} {entry['tokens']:,}" for name, entry in self.calibration.items())
        table.add_row("tokens seen", ", ".join(seen))
        for title, text in rows_of(self.aligned):
            table.add_row(title, text)
        for title, text in self.verified.rows() if self.verified is not None else ():
            if title != "distance":  # which stands above already
                table.add_row(title, text)
        errors = self.quantization_errors
        if errors:
            mean = sum(errors.values()) / len(errors)
            table.add_row("quantisation error", f"{mean:.4f}, relative, mean over {counted(len(errors), 'linear')}")
        total = self.seconds["total"]
        table.add_row("time", f"{duration(total)}, of which preparation {duration(self.seconds['preparation'])}")
        written = sum(part["bytes_written"] for part in self._parts)
        table.add_row("disk", f"{gib(self.bytes_read)} read, {gib(written)} written")
        planned = self.plan.footprint
        peak = f"{gib(self.peak.host_anonymous)} anonymous (planned {gib(planned.host)}), "
        peak += f"{gib(self.peak.host_total)} in all"
        if self.peak.device:
            peak += f", {gib(self.peak.device)} on {self.plan.device} (planned {gib(planned.device)})"
        if self.hidden_bytes_on_disk:
            peak += f", hidden states on disk {gib(self.hidden_bytes_on_disk)}"
        table.add_row("peak memory", peak)
        if self.ranks:
            moved = max(rank["bytes_communicated"] for rank in self.ranks)
            waited = max(rank["seconds_communicating"] for rank in self.ranks)
            table.add_row(
                "ranks", f"{len(self.ranks)}; at most {gib(moved)} moved by one, {duration(waited)}, waiting included"
            )
        for retry in self.retries:
            table.add_row("retry", retry)
        for note in self.plan.notes:
            table.add_row("note", note)
        console.print(table)

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


def _mean_distances(report: MergeReport) -> str:
    entries = list(report.linears.values())
    mean = sum(entry["relative_distance_to_average"] for entry in entries) / len(entries)
    parts = [f"average {mean:.4f}"]
    for name in report.config.names:
        distance = sum(entry["relative_distance_to_candidates"][name] for entry in entries) / len(entries)
        parts.append(f"{name} {distance:.4f}")
    return "mean over linears, relative: " + ", ".join(parts)


def config_text(planned: PlannedMerge) -> str:
    """Makes the text of the output's `config.json`."""
    dtype = planned.plan.output_dtype
    settings = quantization_settings(planned.plan.config.output, dtype)
    return output_config(planned.inputs.reference.config, dtype, settings)


def merged_models(plan: MergePlan) -> list[MergedModel]:
    """All models of the sequence that a merge belongs to, its own last."""
    now = {each.label: (each.model, each.parameters.weight, plan.num_tokens[each.label]) for each in plan.config.models}
    return models_so_far(plan.config.merged_before, now)


def _open_stored(inputs: Inputs, name: str) -> AbstractContextManager[TensorReader]:
    """Opens a reader of a model with its head, which reads features in the order that they have in the output."""
    return open_permuted(inputs.stored[name], inputs.adapters.get(name), inputs.axes_of(name))


def write_side_files(
    path: Path, planned: PlannedMerge, *, rehearsal: bool = False, report: MergeReport | None = None
) -> None:
    """Writes everything but weights, index, `config.json` and the report into a folder.

    Args:
        path: The folder.
        planned: The plan, with the inputs that it was made from.
        rehearsal: Whether this is only to see, before the long work, that all of it can be written.
        report: What the merge did, once it has been done.

    Raises:
        LargemergeError: If anything of it cannot be read, is not what it should be, or would not load.
    """
    inputs, config = planned.inputs, planned.plan.config
    tokens = inputs.tokens
    planned.files.write(path)
    problems = [] if rehearsal else planned.files.check(path)[0]  # the plan has tried it already
    if problems:
        raise MergeError(*problems)
    yaml_text = config_yaml(config)
    (path / "largemerge_config.yaml").write_text(yaml_text, encoding="utf-8")
    if inputs.heads is not None:
        write_heads(
            path,
            inputs.heads,
            lambda name: _open_stored(inputs, name),
            dtype=torch_dtype(config.dtype) if config.dtype is not None else None,
            adapt=tokens.adapt if tokens is not None else lambda model, config: None,
        )
    (path / "README.md").write_text(
        model_card(
            method=config.merge_method,
            class_name=planned.plan.class_name,
            models=[
                {
                    "name": candidate.label,
                    "model": candidate.model,
                    "weight": candidate.parameters.weight,
                    "data": _data_of(config, candidate),
                }
                for candidate in config.candidates
            ],
            base=config.base_model,
            config_yaml=yaml_text,
            version=versions()["largemerge"],
            more=_card_sections(planned, report),
        ),
        encoding="utf-8",
    )
    plan = planned.plan
    if report is not None and (config.keeps_sums or plan.num_kept_samples):
        models, linears = merged_models(plan), report.linears
        record = make_record(config, plan.blocks, plan.head, models, linears, plan.num_kept_samples)
        (path / RECORD_FILE).parent.mkdir()
        (path / RECORD_FILE).write_text(record.to_text(), encoding="utf-8")


def _data_of(config: MergeConfig, candidate: CandidateConfig) -> str:
    """Name of a candidate's data, or of what stands for it."""
    if candidate.label in config.grams:
        return f"{config.grams[candidate.label].data}, as Gram matrices"
    data = candidate.calibration.data if candidate.calibration is not None else None
    return Path(data).name if data is not None else RECORD_FILE


def _card_sections(planned: PlannedMerge, report: MergeReport | None) -> str:
    """Makes the sections of the model card on drift, heads, alignment, and the sequence that the merge belongs to."""
    config, heads = planned.plan.config, planned.inputs.heads
    sections = drift_section(report.drift if report is not None else {})
    matching = planned.inputs.matching
    sections += aligned_section(matching, short_name(matching.reference)) if matching is not None else ""
    sections += card_section(heads) if heads is not None else ""
    if config.sequence is None:
        return sections
    num_before = len(config.merged_before.models) if config.merged_before is not None else 0
    models, num_samples = merged_models(planned.plan), planned.plan.num_kept_samples
    return sections + sequence_section(models, num_before, keeps_sums=config.keeps_sums, num_samples=num_samples)
