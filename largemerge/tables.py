"""The tables on the terminal: what a merge would do, and what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from largemerge.merge_plan import MergePlan
from largemerge.rank_plan import RankPlan
from largemerge.report import MergeReport
from largemerge.sizes import gib

_MOST_RANK_ROWS = 8


def print_report(report: MergeReport, out: str, console: Console) -> None:
    """The closing table."""
    linears = report.linears
    table = Table(title=f"{report.config.merge_method}: {len(report.config.models)} models → {out}", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    counts = ", ".join(f"{count} {what}" for what, count in report.plan.counts().items())
    table.add_row("tensors", counts)
    fallbacks = [name for name, entry in linears.items() if entry["fallbacks"]]
    solvers = Counter(entry["solver"] for entry in linears.values())
    table.add_row("solvers", ", ".join(f"{count} {solver}" for solver, count in solvers.items()))
    if fallbacks:
        table.add_row(
            "fallbacks", f"{len(fallbacks)} linears needed more than float32 Cholesky: {', '.join(fallbacks[:3])} …"
        )
    if linears:
        worst = max(linears, key=lambda name: linears[name]["condition"])
        table.add_row("worst condition", f"{linears[worst]['condition']:.1e} ({worst})")
        table.add_row("distance", _mean_distances(report))
    for label, text in _quantization_rows(report.plan):
        table.add_row(label, text)
    errors = report.quantization_errors
    if errors:
        mean = sum(errors.values()) / len(errors)
        table.add_row("quantisation error", f"{mean:.4f}, relative, mean over {len(errors)} linears")
    total = report.seconds["total"]
    table.add_row("time", f"{total:.1f} s, of which preparation {report.seconds['preparation']:.1f} s")
    written = sum(part["bytes_written"] for part in (*report.blocks.values(), report.outside))
    table.add_row("disk", f"{gib(report.bytes_read)} read, {gib(written)} written")
    planned = report.plan.footprint
    peak = f"{gib(report.peak.host_anonymous)} anonymous (planned {gib(planned.host)}), "
    peak += f"{gib(report.peak.host_total)} in all"
    if report.peak.device:
        peak += f", {gib(report.peak.device)} on {report.plan.device} (planned {gib(planned.device)})"
    if report.hidden_bytes_on_disk:
        peak += f", hidden states on disk {gib(report.hidden_bytes_on_disk)}"
    table.add_row("peak memory", peak)
    if report.ranks:
        moved = max(rank["bytes_communicated"] for rank in report.ranks)
        waited = max(rank["seconds_communicating"] for rank in report.ranks)
        table.add_row(
            "ranks", f"{len(report.ranks)}; at most {gib(moved)} moved by one, {waited:.1f} s, waiting included"
        )
    for retry in report.retries:
        table.add_row("retry", retry)
    for note in report.plan.notes:
        table.add_row("note", note)
    console.print(table)


def _quantization_rows(plan: MergePlan) -> Iterator[tuple[str, str]]:
    def text(kinds: Mapping[str, int]) -> str:
        return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())

    if plan.quantized:
        yield "quantised inputs", "\n".join(f"{name}: {text(kinds)}" for name, kinds in plan.quantized.items())
    if plan.quantized_output():
        yield "quantised output", text(plan.quantized_output())


def _mean_distances(report: MergeReport) -> str:
    entries = list(report.linears.values())
    mean = sum(entry["relative_distance_to_average"] for entry in entries) / len(entries)
    parts = [f"average {mean:.4f}"]
    for name in report.config.names:
        distance = sum(entry["relative_distance_to_candidates"][name] for entry in entries) / len(entries)
        parts.append(f"{name} {distance:.4f}")
    return "mean over linears, relative: " + ", ".join(parts)


def _rank_rows(ranks: Sequence[RankPlan]) -> Iterator[tuple[str, str]]:
    """One for each of a few ranks; for many, what the least and the most busy one have."""
    if len(ranks) <= _MOST_RANK_ROWS:
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


def print_plan(plan: MergePlan, console: Console) -> None:
    """What `largemerge plan` shows."""
    table = Table(
        title=f"{plan.config.merge_method} of {len(plan.config.models)} × {plan.class_name}", show_header=False
    )
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("candidates", ", ".join(f"{name} ({plan.num_samples[name]} samples)" for name in plan.config.names))
    table.add_row("stacks", ", ".join(f"{name} ({count} blocks)" for name, count in plan.stacks))
    for group in plan.blocks[0].groups if plan.blocks else ():
        table.add_row("solved together", f"{', '.join(group.outputs)}: {group.num_inputs} inputs")
    table.add_row("tensors", "\n".join(f"{count} {what}" for what, count in plan.counts().items()))
    for label, text in _quantization_rows(plan):
        table.add_row(label, text)
    table.add_row("disk", f"{gib(plan.bytes_read)} to read, {gib(plan.bytes_written)} to write")
    table.add_row("forward passes", f"{str(plan.compute_dtype).removeprefix('torch.')} on {plan.device}")
    table.add_row("placement", str(plan.placement))
    for reason in plan.reasons:
        table.add_row("", reason)
    peak = plan.footprint
    parts = ", ".join(f"{name} {gib(value)}" for name, value in peak.parts.items() if value)
    table.add_row("peak memory", f"{gib(peak.host)} of {gib(plan.limits.host)} on the host ({parts})")
    if peak.device:
        table.add_row("", f"{gib(peak.device)} of {gib(plan.limits.device)} on {plan.device}")
    if peak.disk:
        table.add_row("", f"{gib(peak.disk)} of hidden states in {plan.limits.scratch or 'the output folder'}")
    if plan.seconds:
        longest = sorted(plan.seconds.items(), key=lambda item: -item[1])[:4]
        stages = ", ".join(f"{stage.replace('_', ' ')} {seconds:.1f} s" for stage, seconds in longest)
        source = "" if plan.measured else ", by data sheets: nothing of this has been measured"
        table.add_row("time", f"about {sum(plan.seconds.values()):.0f} s once it has begun ({stages}, …){source}")
    for label, text in _rank_rows(plan.ranks):
        table.add_row(label, text)
    for note in plan.notes:
        table.add_row("note", note)
    for problem in plan.problems:
        table.add_row(Text("impossible", style="red"), problem)
    console.print(table)
