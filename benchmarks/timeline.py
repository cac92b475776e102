"""What does a merge hold, and when? Its memory over time, with the stage that it is in behind the curve.

    python benchmarks/timeline.py merge.yaml OUT --plot timeline.svg    # options of `largemerge merge` last

Runs `largemerge merge CONFIG OUT` and reads its memory from outside every 20 ms: what it allocated (anonymous), and
all that is resident, mapped files included. Stages come from the `timeline` of `merge_report.json`: when each of
them began. OUT is kept. Ends with one line of JSON. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import machine
from plots import BLUE, GREY, INK, new_figure, save_svg

GIB = 2**30
POLL_SECONDS = 0.02
COLOURS = {
    "imports": "#e4e7eb",
    "preparation": "#cbd2d9",
    "outside": "#d9c8e8",
    "collect": "#cfe3f7",
    "solve": "#fbd9b5",
    "write": "#f6b8b8",
    "forward": "#c9ecd2",
}
OTHER_COLOUR = "#f1ecd0"
STAGES = {
    "wait_for_read": "collect",
    "candidate_forward": "collect",
    "right_hand_side": "collect",
    "merged_forward": "forward",
}
"""Stages of the report that are drawn as one."""


@dataclass(frozen=True)
class Sample:
    """One look from outside."""

    seconds: float
    """Since the process was started."""
    anonymous_bytes: int
    resident_bytes: int


@dataclass(frozen=True)
class Run:
    """A merge that has been watched."""

    samples: list[Sample]
    seconds: float
    """Wall time of the process."""
    working_at: float
    """When the working folder's manifest appeared: the end of the preparation."""


@dataclass(frozen=True)
class Band:
    """A stretch of time in one stage; seconds since `merge()` was called."""

    start: float
    end: float
    stage: str
    block: str | None


def main() -> None:
    """Runs, draws, prints."""
    parser = argparse.ArgumentParser(
        description="Memory of a merge over time; see the top of this file. Unknown options go to `largemerge merge`.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file for `largemerge merge`")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the merged checkpoint")
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE", help="the SVG to draw")
    arguments, options = parser.parse_known_args()
    command = [sys.executable, "-m", "largemerge", "merge", str(arguments.config), str(arguments.out), *options]
    run = watch(command, arguments.out, arguments.plot.with_suffix(".log"))
    report = json.loads((arguments.out / "merge_report.json").read_text())
    bands = stages(report)
    # The report counts from the call of `merge`, the samples from the start of Python.
    offset = max(0.0, run.working_at - report["seconds"]["preparation"])
    bands = [Band(0.0, offset, "imports", None), *(_later(band, offset) for band in bands)]
    draw(run, bands, report, arguments.plot)
    _print(run, bands, report, options)


def watch(command: Sequence[str], out: Path, log: Path) -> Run:
    """Runs a merge and looks at its memory until it ends; ends the program if it fails."""
    if (out / "config.json").exists() or (out / ".largemerge").exists():
        raise SystemExit(f"{out} holds a merge already; choose a new folder")
    log.parent.mkdir(parents=True, exist_ok=True)
    manifest = out / ".largemerge" / "manifest.json"
    samples: list[Sample] = []
    working_at = None
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        while process.poll() is None:
            seconds = time.perf_counter() - start
            samples += _look(process.pid, seconds)
            if working_at is None and manifest.exists():
                working_at = seconds
            time.sleep(POLL_SECONDS)
    if process.returncode != 0:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    log.unlink()
    return Run(samples, time.perf_counter() - start, working_at or 0.0)


def _look(pid: int, seconds: float) -> list[Sample]:
    """What /proc says now; nothing once the process is gone."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return []
    page = os.sysconf("SC_PAGE_SIZE")
    # Of the resident pages, those that no file stands behind: what /proc/PID/status calls RssAnon.
    return [Sample(seconds, (resident - shared) * page, resident * page)] if resident else []


def stages(report: dict[str, Any]) -> list[Band]:
    """The stages of a merge, in seconds since it was called.

    Args:
        report: `merge_report.json`, whose `timeline` says when each stage began.
    """
    timeline = [(0.0, "preparation", ""), *report["timeline"]]
    starts = [entry[0] for entry in timeline]
    ends = [*starts[1:], max(report["seconds"]["total"], starts[-1])]
    return [
        Band(start, end, STAGES.get(stage, stage), block)
        for (start, stage, block), end in zip(timeline, ends, strict=True)
    ]


def _later(band: Band, seconds: float) -> Band:
    return Band(band.start + seconds, band.end + seconds, band.stage, band.block)


def draw(run: Run, bands: Sequence[Band], report: dict[str, Any], path: Path) -> None:
    """The two curves, the bands behind them, the plan as a dashed line."""
    figure, axes = new_figure(11, 4.6)
    named = set()
    for band in bands:
        if band.end > band.start:
            label = band.stage if band.stage not in named else None
            named.add(band.stage)
            colour = COLOURS.get(band.stage, OTHER_COLOUR)
            axes.axvspan(band.start, band.end, color=colour, linewidth=0, label=label)
    times = [sample.seconds for sample in run.samples]
    resident = [sample.resident_bytes / GIB for sample in run.samples]
    anonymous = [sample.anonymous_bytes / GIB for sample in run.samples]
    axes.plot(times, resident, color=GREY, linewidth=1.0, label="resident, mapped files included")
    axes.plot(times, anonymous, color=BLUE, linewidth=1.4, label="anonymous")
    planned = report["peak_bytes"]["planned_host"] / GIB
    axes.axhline(planned, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=f"planned peak, {planned:.2f} GiB")
    axes.set_xlim(0, run.seconds)
    axes.set_ylim(0, 1.1 * max(planned, *resident))
    axes.set_xlabel("seconds since the start of the process")
    axes.set_ylabel("memory of the process, GiB")
    config = report["config"]
    blocks = f"{len(report['blocks'])} blocks" if len(report["blocks"]) > 1 else "1 block"
    axes.set_title(f"{config['merge_method']} of {len(config['models'])} models, {blocks}", loc="left")
    figure.legend(loc="outside right upper")
    save_svg(figure, path)


def _print(run: Run, bands: Sequence[Band], report: dict[str, Any], options: Sequence[str]) -> None:
    """Seconds and peak by stage, then the line of JSON."""
    seconds: dict[str, float] = defaultdict(float)
    peaks: dict[str, int] = defaultdict(int)
    for band in bands:
        seconds[band.stage] += band.end - band.start
        inside = [s.anonymous_bytes for s in run.samples if band.start <= s.seconds < band.end]
        peaks[band.stage] = max([peaks[band.stage], *inside])
    print("\n| stage | time | peak, anonymous |\n|---|---:|---:|")
    for stage, spent in seconds.items():
        print(f"| {stage} | {spent:.1f} s | {peaks[stage] / GIB:.2f} GiB |")
    peak = max(sample.anonymous_bytes for sample in run.samples)
    planned = report["peak_bytes"]["planned_host"]
    between = run.seconds - bands[-1].end
    print(f"\nwhole process: {run.seconds:.1f} s, of which {between:.1f} s in no stage")
    print(f"peak: {peak / GIB:.2f} GiB anonymous, planned {planned / GIB:.2f} GiB")
    print(f"machine: {', '.join(f'{name} {value}' for name, value in machine().items())}\n")
    sizes = ("class", "compute_dtype", "num_samples", "stacks")
    result = {
        "benchmark": "timeline",
        "machine": machine(),
        "config": {"merge_options": list(options)} | {key: report["plan"][key] for key in ("merge_method", *sizes)},
        "seconds": run.seconds,
        "seconds_by_stage": seconds,
        "seconds_in_no_stage": between,
        "peak_anonymous_bytes": peak,
        "peak_anonymous_bytes_by_stage": peaks,
        "peak_bytes": max(sample.resident_bytes for sample in run.samples),
        "planned_peak_bytes": planned,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
