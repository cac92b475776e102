"""Experts that come one after another: is a merge in sequence as good as one of all at once, and what does a step cost?

    python benchmarks/quality_sequence.py --work DIR                               # text, seed 0: half an hour
    python benchmarks/quality_sequence.py --work DIR --family images --seeds 0 1 2
    python benchmarks/quality_sequence.py --family images --quick                  # a smoke test

The experts, samples and held-out data are those of `quality.py`, and so is what counts: the share of the gap between
the average of all experts and the experts that is closed. A sequence begins with the first two experts, keeps its sums,
and adds one expert with every merge; what is told of quality is its end. Beside it stands the same with samples kept in
place of the sums, as many as one task has, of all tasks so far together; and with all samples of all tasks so far: the
merge so far is a model like any other there, that weighs as much as what is in it. A step's time and memory are those
of its process. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from measure import Measured, machine, run_measured
from quality import FAMILIES, SAMPLES
from quality_cases import Case
from quality_methods import AVERAGE, parse, write_config

GIB = 2**30
METHODS = ("regmean", "regmean_plusplus", "calibrated")


@dataclass(frozen=True)
class Step:
    """One merge of a sequence, or the merge of all at once."""

    experts: int
    """Number of experts in the output."""
    seconds: float
    peak_bytes: int
    """Anonymous memory."""
    sums_bytes: int
    """Size of the sums that lie beside the output."""


@dataclass(frozen=True)
class Row:
    """A method on one family and seed."""

    family: str
    seed: int
    method: str
    at_once: float
    """Share of the gap that is closed."""
    in_sequence: float
    kept_samples: float
    with_samples: float
    whole: Step
    steps: tuple[Step, ...]


def main() -> None:
    """Merges in both ways, measures, prints."""
    arguments = _arguments()
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    logging.disable_progress_bar()
    work: Path = arguments.work.resolve() / ("quick" if arguments.quick else "")
    rows = []
    for seed in arguments.seeds:
        folder = work / arguments.family / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        case = FAMILIES[arguments.family](folder, seed, arguments.quick)
        samples = arguments.samples or SAMPLES[arguments.family]
        rows += [_row(arguments.family, seed, method, samples, case, folder) for method in arguments.methods]
    print(_table(rows))
    print(f"machine: {', '.join(f'{name} {value}' for name, value in machine().items())}\n")
    print(json.dumps({"benchmark": "quality_sequence", "machine": machine(), "rows": [asdict(row) for row in rows]}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merges in sequence; see the top of this file.")
    default = Path(__file__).parent / "runs" / "quality"
    parser.add_argument("--family", choices=FAMILIES, default="text", help="(default: text)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="(default: 0)")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="name, or name:key=value,…")
    parser.add_argument("--samples", type=int, metavar="N", help="of each task (default: as in quality.py)")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help="folder for all files (%(default)s)")
    return parser.parse_args()


def _row(family: str, seed: int, method: str, samples: int, case: Case, folder: Path) -> Row:
    config = yaml.safe_load(write_config(parse(method, samples), case, seed))
    average = yaml.safe_load(write_config(parse(AVERAGE, samples), case, seed))
    models, outputs = config.pop("models"), [folder / f"sequence-{number}" for number in range(len(case.experts))]
    _merge(average, outputs[0], folder)
    worst = _loss(case, outputs[0])
    best = mean(case.measure(expert)[task].loss for task, expert in case.experts.items())
    whole = _step(len(models), _merge({**config, "models": models}, outputs[0], folder), outputs[0])
    at_once = _loss(case, outputs[0])
    steps = []
    _merge({**config, "models": models[:2]}, outputs[-1], folder)
    for number in range(3, len(models) + 1):
        before = _before(outputs[-1], models[: number - 1], samples, folder)
        _merge({**config, "models": [before, models[number - 1]]}, outputs[0], folder)
        shutil.rmtree(outputs[-1])
        outputs[0].rename(outputs[-1])
    with_samples = _loss(case, outputs[-1])
    losses = {}
    for kept, setting in {"samples": {"keep_samples": samples}, "sums": {"keep_sums": True}}.items():
        for number in range(2, len(models) + 1):
            new, sequence = models[number - 1 : number], {"previous": str(outputs[number - 3]), "name": "before"}
            if number == 2:
                new, sequence = models[:2], {}
            done = _merge({**config, "models": new, "sequence": {**sequence, **setting}}, outputs[number - 2], folder)
            if kept == "sums":
                steps.append(_step(number, done, outputs[number - 2]))
            print(f"{family}, seed {seed}, {method}, {kept}: {number} experts, {done.seconds:.1f} s", flush=True)
        losses[kept] = _loss(case, outputs[len(models) - 2])
        for output in outputs:
            shutil.rmtree(output, ignore_errors=True)
    shares = [(worst - loss) / (worst - best) for loss in (at_once, losses["sums"], losses["samples"], with_samples)]
    return Row(family, seed, method, *shares, whole, tuple(steps))


def _before(merged: Path, models: Sequence[Mapping[str, Any]], samples: int, folder: Path) -> dict[str, Any]:
    """The merge so far as a model like any other, with the samples of all that is in it."""
    files = [Path(model["calibration"]["data"]) for model in models]
    data = folder / f"sequence-samples{files[0].suffix}"
    if data.suffix == ".safetensors":
        parts = [load_file(file) for file in files]
        save_file({name: torch.cat([part[name][:samples] for part in parts]) for name in parts[0]}, data)
    else:
        data.write_text("".join(line + "\n" for file in files for line in file.read_text().splitlines()[:samples]))
    calibration = {"data": str(data), "num_samples": len(models) * samples}
    return {"model": str(merged), "calibration": calibration, "parameters": {"weight": float(len(models))}}


def _merge(config: Mapping[str, Any], output: Path, folder: Path) -> Measured:
    (folder / "sequence.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "largemerge", "merge", str(folder / "sequence.yaml"), str(output)]
    return run_measured([*command, "--force", "--quiet"], folder / "sequence.log")


def _step(experts: int, done: Measured, output: Path) -> Step:
    sums = sum(file.stat().st_size for file in (output / "sums").glob("*"))
    return Step(experts, done.seconds, done.peak_anonymous_bytes, sums)


def _loss(case: Case, folder: Path) -> float:
    return mean(score.loss for score in case.measure(folder).values())


def _table(rows: Sequence[Row]) -> str:
    """A Markdown table: a line for each method, means over the seeds."""
    titles = [
        "method",
        "all at once",
        "in sequence, sums kept",
        "as many samples kept as one task has",
        "with all samples",
        "cost of all at once",
        "of the steps, from two experts on",
        "sums",
    ]
    lines = [f"\n| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        first = own[0]
        steps = ", ".join(f"{step.seconds:.0f} s {step.peak_bytes / GIB:.2f} GiB" for step in first.steps)
        cells = [
            method,
            f"{mean(row.at_once for row in own):.1%}",
            f"{mean(row.in_sequence for row in own):.1%}",
            f"{mean(row.kept_samples for row in own):.1%}",
            f"{mean(row.with_samples for row in own):.1%}",
            f"{first.whole.seconds:.0f} s {first.whole.peak_bytes / GIB:.2f} GiB",
            steps,
            f"{first.steps[-1].sums_bytes / GIB:.2f} GiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
