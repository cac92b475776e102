"""What does a better regression cost? Time and memory of every regression method on the same work, side by side.

    python benchmarks/regression_cost.py --geometry 1.1b --num-layers 4 --num-models 4    # synthetic Llamas
    python benchmarks/regression_cost.py --config merge.yaml --repeats 3                  # a merge of your own
    python benchmarks/regression_cost.py --geometry tiny                                  # a smoke test

Each merge is a process of its own, whose time and memory are taken (`measure.py`); methods take turns, and the fastest
of the repeats is told, beside what `regmean_plusplus` takes. Settings are each method's defaults. Options that this
script does not know go to `largemerge merge`. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from largemerge.regression.methods import METHODS
from measure import Measured, machine, run_measured
from synthetic_llama import add_arguments, from_arguments, write_inputs

GIB = 2**30
BESIDE = "regmean_plusplus"
"""The method that all others are held against."""


@dataclass(frozen=True)
class Cost:
    """One merge.

    Attributes:
        measured: Time and memory of the process.
        working_seconds: Seconds once it had begun, imports and preparation left out.
        phases: Seconds by stage.
        planned_bytes: Peak of memory that the plan said.
    """

    measured: Measured
    working_seconds: float
    phases: Mapping[str, float]
    planned_bytes: int


def main() -> None:
    """Makes the inputs, merges in turns, prints."""
    arguments, options = _arguments()
    logging.disable_progress_bar()
    folder: Path = arguments.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    inputs = from_arguments(arguments)
    config = arguments.config or write_inputs(folder / "inputs", inputs)
    try:
        found: dict[str, list[Cost]] = {method: [] for method in arguments.methods}
        for number in range(arguments.repeats):
            for method in arguments.methods if number % 2 == 0 else reversed(arguments.methods):
                found[method].append(_merge(config, method, folder, options))
                print(f"{method}: {found[method][-1].measured.seconds:.1f} s", flush=True)
    finally:
        if arguments.config is None:
            shutil.rmtree(folder / "inputs", ignore_errors=True)
    best = {method: min(costs, key=lambda cost: cost.working_seconds) for method, costs in found.items()}
    _print(best)
    what = str(arguments.config) if arguments.config else dataclasses.asdict(inputs)
    rows = {method: [dataclasses.asdict(cost) for cost in costs] for method, costs in found.items()}
    print(json.dumps({"benchmark": "regression_cost", "machine": machine(), "config": what, "methods": rows}))


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Cost of regression methods, side by side; see the top of this file.", allow_abbrev=False
    )
    add_arguments(parser)
    default = Path(__file__).parent / "runs" / "regression-cost"
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help="folder for all files (%(default)s)")
    parser.add_argument("--config", type=Path, help="a configuration to merge in place of synthetic Llamas")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="(default: all)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="merges by each method (%(default)s)")
    arguments, options = parser.parse_known_args()
    if BESIDE not in arguments.methods:
        parser.error(f"--methods: {BESIDE} is what the others are held against; expected it among them")
    return arguments, options


def _merge(config: Path, method: str, folder: Path, options: Sequence[str]) -> Cost:
    """One merge by a method with its defaults."""
    settings: dict[str, Any] = yaml.safe_load(config.read_text())
    settings["merge_method"] = method
    settings.pop("parameters", None)
    own = config.with_name(f"{config.stem}-{method}.yaml")  # beside the first: paths in it are found from there
    own.write_text(yaml.safe_dump(settings, sort_keys=False))
    out = folder / "merged"
    command = [sys.executable, "-m", "largemerge", "merge", str(own), str(out), "--force", *options]
    measured = run_measured(command, folder / "merge.log")
    report = json.loads((out / "merge_report.json").read_text())
    shutil.rmtree(out)
    own.unlink()
    seconds = report["seconds"]
    return Cost(
        measured,
        seconds["total"] - seconds["preparation"],
        seconds["by_phase"],
        report["peak_bytes"]["planned_host"],
    )


def _print(best: Mapping[str, Cost]) -> None:
    """The table, as Markdown, and the machine."""
    beside = best[BESIDE]
    columns = ["", "time", "once it has begun", "ratio", "peak, anonymous", "ratio", "planned", "longest stages"]
    print(f"\n| {' | '.join(columns)} |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for method, cost in best.items():
        longest = sorted(cost.phases.items(), key=lambda item: -item[1])[:4]
        peak = cost.measured.peak_anonymous_bytes
        cells = [
            f"`{method}`",
            f"{cost.measured.seconds:.1f} s",
            f"{cost.working_seconds:.1f} s",
            f"{cost.working_seconds / beside.working_seconds:.2f}",
            f"{peak / GIB:.2f} GiB",
            f"{peak / beside.measured.peak_anonymous_bytes:.2f}",
            f"{cost.planned_bytes / GIB:.2f} GiB",
            ", ".join(f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in longest),
        ]
        print(f"| {' | '.join(cells)} |")
    print(f"\nmachine: {', '.join(f'{name} {value}' for name, value in machine().items())}\n")


if __name__ == "__main__":
    main()
