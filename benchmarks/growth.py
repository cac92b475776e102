"""How do time and memory of a merge grow? One size after the other, around a small Llama.

    python benchmarks/growth.py --plot growth.svg                 # about 8 minutes on 2 cores, 2 GB of disk
    python benchmarks/growth.py --memory-host 1GiB --memory-disk DIR    # options of `largemerge merge`
    python benchmarks/growth.py --quick                           # a smoke test: the numbers mean nothing

Four sizes grow, each alone: candidates K, blocks, calibration tokens, width. Every merge is a process of its own;
of its repeats, the shortest time and the lowest peak count. (How much freed memory stays in the process is up to the
allocator and the timing of its threads; the highest peak is told too.) The exponent p is the least-squares fit of
log y over log x, that is, y ~ x^p. The time is that of the merge without imports and preparation, as its report has
it; the peak is the anonymous memory above that of a process that only imports. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Measured, machine, run_measured
from plots import BLUE, ORANGE, new_figure, save_svg
from synthetic_llama import Geometry, Inputs, write_inputs

MIB = 2**20
IMPORTS = "import largemerge.regression.merge, transformers.models.llama.modeling_llama"
HEAD_SIZE = 64
LENGTH = 128
"""Tokens of a sample."""


@dataclass(frozen=True)
class Case:
    """The sizes of one merge. The feed-forward is four times as wide as the hidden states."""

    candidates: int = 2
    blocks: int = 4
    tokens: int = 256
    """Per candidate, `LENGTH` to a sample."""
    width: int = 768

    def inputs(self) -> Inputs:
        """What to write for it."""
        heads = self.width // HEAD_SIZE
        geometry = Geometry(self.width, 4 * self.width, self.blocks, heads, heads, vocabulary=4096)
        samples = self.tokens // LENGTH
        # Batches stay the same while the tokens grow: only what waits for them may grow.
        return Inputs(geometry, self.candidates, samples, LENGTH, batch_size=256 // LENGTH)


@dataclass(frozen=True)
class Cost:
    """What a merge took, the best of its repeats."""

    seconds: float
    """The merge, without imports and preparation."""
    process_seconds: float
    peak_bytes: int
    """Anonymous, above the imports."""
    process_peak_bytes: int
    """Anonymous, in all."""
    highest_peak_bytes: int
    """Of all repeats."""
    planned_bytes: int
    """What the plan said of it, likewise above the imports."""


BASE = Case()
SIZES: dict[str, tuple[int, ...]] = {
    "candidates": (2, 4, 8, 16),
    "blocks": (4, 8, 16, 32),
    "tokens": (256, 1024, 4096, 16384),
    "width": (384, 768, 1152, 1536),
}
QUICK_BASE = Case(blocks=2, width=64)
QUICK_SIZES: dict[str, tuple[int, ...]] = {"candidates": (2, 3)}
AXES = {
    "candidates": "candidates K",
    "blocks": "transformer blocks",
    "tokens": "calibration tokens of a candidate",
    "width": "width of the hidden states",
}
TARGETS = {"candidates": 1.05, "blocks": 1.05}
"""The peak of the process may be so many times that of the smallest size."""


def main() -> None:
    """Measures every case once, prints, draws."""
    arguments, options = _arguments()
    base, sizes = (QUICK_BASE, QUICK_SIZES) if arguments.quick else (BASE, SIZES)
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    idle = _imports_only(work, 1 if arguments.quick else 3)
    print(f"imports only: {idle.seconds:.1f} s, {idle.peak_anonymous_bytes / MIB:.0f} MiB anonymous", flush=True)
    cases = {name: [dataclasses.replace(base, **{name: value}) for value in values] for name, values in sizes.items()}
    costs: dict[Case, Cost] = {}
    for case in dict.fromkeys(case for group in cases.values() for case in group):
        costs[case] = _measure(case, work, options, idle, 1 if arguments.quick else arguments.repeats)
        print(f"{case}: {costs[case].seconds:.1f} s, {costs[case].peak_bytes / MIB:.0f} MiB", flush=True)
    slopes = {name: _slopes(name, group, costs) for name, group in cases.items()}
    above = {name: costs[group[-1]].peak_bytes / costs[group[0]].peak_bytes for name, group in cases.items()}
    ratios = {
        name: costs[group[-1]].process_peak_bytes / costs[group[0]].process_peak_bytes for name, group in cases.items()
    }
    _print(cases, costs, slopes, ratios, above)
    if arguments.plot:
        _draw(cases, costs, slopes, arguments.plot)
    rows = [dataclasses.asdict(case) | dataclasses.asdict(cost) for case, cost in costs.items()]
    result = {
        "imports_only": dataclasses.asdict(idle),
        "rows": rows,
        "slopes": slopes,
        "peak_ratios": ratios,
        "ratios_above_imports": above,
    }
    config = {"repeats": arguments.repeats, "quick": arguments.quick, "merge_options": options, "length": LENGTH}
    print(json.dumps({"benchmark": "growth", "machine": machine(), "config": config, **result}))


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Grow sizes of a merge; see the top of this file. Unknown options go to `largemerge merge`.",
        allow_abbrev=False,
    )
    default = Path(__file__).parent / "runs" / "growth"
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help="folder for all files (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="merges of each case (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw an SVG")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    return parser.parse_known_args()


def _imports_only(work: Path, repeats: int) -> Measured:
    """The median of a few: what any merge holds before it begins."""
    runs = [run_measured([sys.executable, "-c", IMPORTS], work / "imports.log") for _ in range(repeats)]
    return sorted(runs, key=lambda run: run.peak_anonymous_bytes)[repeats // 2]


def _measure(case: Case, work: Path, options: Sequence[str], idle: Measured, repeats: int) -> Cost:
    """Makes the inputs, merges them some times, deletes all of it."""
    folder = work / "inputs"
    runs = []
    try:
        config = write_inputs(folder, case.inputs())
        for _ in range(repeats):
            runs.append(_merge(config, work / "merged", options, idle))
            shutil.rmtree(work / "merged")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(work / "merged", ignore_errors=True)
    return Cost(
        seconds=min(run.seconds for run in runs),
        process_seconds=min(run.process_seconds for run in runs),
        peak_bytes=min(run.peak_bytes for run in runs),
        process_peak_bytes=min(run.process_peak_bytes for run in runs),
        highest_peak_bytes=max(run.peak_bytes for run in runs),
        planned_bytes=max(run.planned_bytes for run in runs),
    )


def _merge(config: Path, output: Path, options: Sequence[str], idle: Measured) -> Cost:
    command = [sys.executable, "-m", "largemerge", "merge", str(config), str(output), "--quiet", *options]
    measured = run_measured(command, output.with_name("merge.log"))
    report = json.loads((output / "merge_report.json").read_text())
    seconds, planned = report["seconds"], report["peak_bytes"]["planned_host"]
    # Both poll, each may miss the top of a peak.
    peak = max(measured.peak_anonymous_bytes, report["peak_bytes"]["host_anonymous"]) - idle.peak_anonymous_bytes
    return Cost(
        seconds=seconds["total"] - seconds["preparation"],
        process_seconds=measured.seconds,
        peak_bytes=peak,
        process_peak_bytes=peak + idle.peak_anonymous_bytes,
        highest_peak_bytes=peak,
        planned_bytes=planned - idle.peak_anonymous_bytes,
    )


def _slopes(name: str, group: Sequence[Case], costs: Mapping[Case, Cost]) -> dict[str, float]:
    """Exponents of time and peak over the size that grows."""
    sizes = [getattr(case, name) for case in group]
    return {
        "seconds": log_log_slope(sizes, [costs[case].seconds for case in group]),
        "peak_bytes": log_log_slope(sizes, [costs[case].peak_bytes for case in group]),
    }


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of the power law y ~ x^p that fits best."""
    log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_x, mean_y = sum(log_x) / len(x), sum(log_y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in log_x)


def _print(
    cases: Mapping[str, Sequence[Case]],
    costs: Mapping[Case, Cost],
    slopes: Mapping[str, Mapping[str, float]],
    ratios: Mapping[str, float],
    above: Mapping[str, float],
) -> None:
    """One table for all sizes, the slopes and targets below it."""
    print("\n| what grows | size | merge | whole process | peak above imports | highest of repeats | planned |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, group in cases.items():
        for case in group:
            cost = costs[case]
            times = f"{cost.seconds:.1f} s | {cost.process_seconds:.1f} s"
            peaks = (cost.peak_bytes, cost.highest_peak_bytes, cost.planned_bytes)
            cells = " | ".join(f"{peak / MIB:.0f} MiB" for peak in peaks)
            print(f"| {AXES[name]} | {getattr(case, name)} | {times} | {cells} |")
    print()
    for name, group in cases.items():
        first, last = (getattr(group[index], name) for index in (0, -1))
        exponents = f"time ~ x^{slopes[name]['seconds']:.2f}, peak ~ x^{slopes[name]['peak_bytes']:.2f}"
        verdict = ""
        if name in TARGETS:
            verdict = f" (target {TARGETS[name]}: {'reached' if ratios[name] <= TARGETS[name] else 'MISSED'})"
        in_all = f"peak at {last} / peak at {first} = {ratios[name]:.3f}{verdict}"
        print(f"{AXES[name]}: {exponents}; {in_all}, above imports {above[name]:.3f}")
    print(f"\nmachine: {', '.join(f'{name} {value}' for name, value in machine().items())}\n")


def _draw(
    cases: Mapping[str, Sequence[Case]],
    costs: Mapping[Case, Cost],
    slopes: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """A panel for each size: time on the left axis, peak on the right one, both from zero."""
    figure, panels = new_figure(9, 6.4, 2, 2)
    for panel, (name, group) in zip(panels.flat, cases.items(), strict=False):
        sizes = [getattr(case, name) for case in group]
        other: Any = panel.twinx()
        other.spines["right"].set_visible(True)
        lines = (
            (panel, BLUE, "o", "time of the merge, s", [costs[case].seconds for case in group]),
            (other, ORANGE, "s", "peak above imports, MiB", [costs[case].peak_bytes / MIB for case in group]),
        )
        for axes, colour, marker, label, values in lines:
            axes.plot(sizes, values, color=colour, marker=marker, markersize=5, clip_on=False)
            axes.set_ylim(0, 1.15 * max(values))
            axes.set_ylabel(label, color=colour)
            axes.tick_params(axis="y", colors=colour)
        highest = [costs[case].highest_peak_bytes / MIB for case in group]
        other.vlines(sizes, lines[1][-1], highest, color=ORANGE, linewidth=1.0)
        other.set_ylim(0, 1.4 * max(highest))
        panel.set_xlim(0, 1.04 * max(sizes))
        # A label for every size that is not too near to the one before.
        gap = max(sizes) / 12
        panel.set_xticks([size for size, last in zip(sizes, [0, *sizes], strict=False) if size - last > gap])
        panel.set_xlabel(AXES[name])
        exponents = slopes[name]
        panel.set_title(f"time ~ x$^{{{exponents['seconds']:.2f}}}$, peak ~ x$^{{{exponents['peak_bytes']:.2f}}}$")
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    save_svg(figure, path)


if __name__ == "__main__":
    main()
