"""The tables on the terminal, for data-free merges."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from largemerge.arithmetic.plan import DataFreePlan
from largemerge.arithmetic.report import DataFreeReport
from largemerge.arithmetic.series import SeriesPlan
from largemerge.sizes import gib


def print_plan(plan: DataFreePlan | SeriesPlan, console: Console) -> None:
    """What `largemerge plan` shows of a data-free merge, or of several."""
    if isinstance(plan, SeriesPlan):
        for label, each in plan.plans.items():
            console.print(f"{label}:")
            print_plan(each, console)
        return
    table = Table(title=f"{plan.config.merge_method} of {len(plan.checkpoints)} models", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    _add_data_free_rows(table, plan)
    on_device = f" and {gib(plan.holding.device_bytes)} on {plan.device}" if plan.holding.device_bytes else ""
    table.add_row("peak memory", f"{gib(plan.peak_bytes)} on the host{on_device}, {plan.num_workers} workers")
    if plan.seconds:
        disk, computing, total = (plan.seconds[stage] for stage in ("disk", "computing", "total"))
        table.add_row("time", f"about {total:.0f} s: disk {disk:.1f} s, computing beside it {computing:.1f} s")
    for problem in plan.problems:
        table.add_row(Text("impossible", style="red"), problem)
    console.print(table)


def print_report(report: DataFreeReport, out: str, console: Console) -> None:
    """The closing table of a data-free merge."""
    plan = report.plan
    table = Table(title=f"{plan.config.merge_method}: {len(plan.checkpoints)} models → {out}", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    _add_data_free_rows(table, plan)
    total = report.seconds["total"]
    table.add_row("time", f"{total:.1f} s, of which preparation {report.seconds['preparation']:.1f} s")
    table.add_row("peak memory", f"{gib(report.peak.host_anonymous)} anonymous (planned {gib(plan.peak_bytes)})")
    if plan.holding.device_bytes:
        planned = gib(plan.holding.device_bytes)
        table.add_row(f"on {plan.device}", f"{gib(report.peak.device)} at most (planned {planned})")
    console.print(table)


def _add_data_free_rows(table: Table, plan: DataFreePlan) -> None:
    table.add_row("models", "\n".join(plan.checkpoints))
    copied = [task for task in plan.layout.tasks if task.copied]
    counts = f"{len(plan.layout.tasks) - len(copied)} merged"
    otherwise = sum(bool(task.otherwise) for task in plan.layout.tasks)
    counts += f", {otherwise} of them otherwise (see the notes)" if otherwise else ""
    table.add_row("tensors", counts + (f", {len(copied)} copied: {copied[0].copied}" if copied else ""))
    scratch = f", {gib(plan.scratch_bytes)} beside it for the time being" if plan.scratch_bytes else ""
    table.add_row("disk", f"{gib(plan.bytes_read)} to read, {gib(plan.bytes_written)} to write" + scratch)
    for name, adapter in plan.adapters.items():
        replaced = f", {len(adapter.replaced)} replaced" if adapter.replaced else ""
        table.add_row("adapter", f"{name}: {len(adapter.deltas)} weights adapted{replaced}")
    if plan.vocabulary is not None:
        table.add_row("vocabulary", plan.vocabulary.told())
    for note in plan.layout.notes:
        table.add_row("note", note)
