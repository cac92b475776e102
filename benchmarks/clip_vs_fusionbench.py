"""RegMean++ of eight CLIP vision towers, by largemerge and by FusionBench, side by side on the CPU.

    python benchmarks/clip_vs_fusionbench.py --model b-32 --reference   # ViT-B/32, 32 images a task
    python benchmarks/clip_vs_fusionbench.py --model l-14               # ViT-L/14, 4 images a task: 16 GiB of memory
    python benchmarks/clip_vs_fusionbench.py --quick --reference        # a smoke test: the numbers mean nothing

Both merge the same float32 checkpoints (`synthetic_clip.py`) with the same pixels and settings, each in a whole process
of its own whose time and memory are taken (`measure.py`): imports, loading, merging, saving. FusionBench runs through
`peers/fusionbench_regmean.py` in a virtual environment that is made at the first run. The order alternates from round
to round; medians count. `--reference` also says how far the merged weights lie from a dense float64 implementation
(`float64_reference.py`, 3 minutes for ViT-B/32 on 2 cores). Ends with one line of JSON. Needs
`pip install -e .[benchmarks]` and disk: 2 GB for FusionBench's environment, 6 GB for ViT-B/32 with the reference,
15 GB for ViT-L/14.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from environments import OWN_TORCH, make_environment
from float64_reference import Difference, compare
from measure import Measured, machine, run_measured
from synthetic_clip import TINY, VIT_B_32, VIT_L_14, Geometry, make_checkpoints, make_images

HERE = Path(__file__).parent
PEER = "FusionBench"
PEER_REQUIREMENTS = ("fusion-bench==0.2.33", "transformers<5")
OFF_DIAGONAL_SCALE = 0.95
LARGEST_BATCH = 32
"""FusionBench's default. Both use it."""
TASKS = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
"""The names of the usual eight; the images are others (`synthetic_clip.py`)."""


@dataclass(frozen=True)
class Case:
    """What is merged, and what is hoped for."""

    geometry: Geometry
    num_images: int
    """Per task."""
    compute_dtypes: tuple[str, ...] = ("float32",)
    """One run of largemerge for each."""
    num_tasks: int = 8
    targets: Mapping[str, float] = field(default_factory=dict)
    """By the name of a figure: at most this."""


CASES = {
    "b-32": Case(
        VIT_B_32,
        num_images=32,
        compute_dtypes=("float32", "bfloat16"),
        targets={
            "time, float32 / FusionBench": 0.45,
            "peak RSS, float32 / FusionBench": 0.25,
            "time, bfloat16 / FusionBench": 0.30,
            "float32 from reference": 1e-4,
        },
    ),
    "l-14": Case(
        VIT_L_14,
        num_images=4,
        targets={"time, float32 / FusionBench": 0.5, "peak RSS, float32, GiB": 1.3},
    ),
}
QUICK = Case(TINY, num_images=8, compute_dtypes=("float32", "bfloat16"), num_tasks=2)


@dataclass(frozen=True)
class Run:
    """One kind of run: how to start it, and where it writes."""

    name: str
    command: Sequence[str]
    output: Path

    def merge_seconds(self) -> float:
        """What the tool itself says of its last run.

        largemerge: all but imports and preparation. FusionBench: all but imports, loading and saving the models.
        """
        if self.name == PEER:
            return float(json.loads((self.output / "peer.json").read_text())["merge_seconds"])
        seconds = json.loads((self.output / "merge_report.json").read_text())["seconds"]
        return float(seconds["total"] - seconds["preparation"])


@dataclass(frozen=True)
class Round:
    """One measured run."""

    measured: Measured
    merge_seconds: float


def main() -> None:
    """Makes, runs, compares, prints."""
    arguments = _arguments()
    name = "quick" if arguments.quick else arguments.model
    case = QUICK if arguments.quick else CASES[name]
    # For every process from here on: the CPU alone, and nothing from the network but what pip installs.
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    work: Path = arguments.work.resolve()
    python = make_environment(work / "fusionbench", PEER_REQUIREMENTS, arguments.torch) if arguments.peer else None
    job = _prepare(work / name, case)
    runs = _runs(work / name, case, job, python)
    rounds: dict[str, list[Round]] = {run.name: [] for run in runs}
    for number in range(arguments.repeats):
        for run in runs if number % 2 == 0 else reversed(runs):
            measured = run_measured(run.command, run.output.with_suffix(".log"))
            rounds[run.name].append(Round(measured, run.merge_seconds()))
            print(f"round {number + 1}, {run.name}: {measured.seconds:.1f} s", flush=True)
    differences = _differences(work / name, job, runs) if arguments.reference else {}
    _print(name, case, runs, rounds, differences)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CLIP merges beside FusionBench; see the top of this file.")
    default = HERE / "runs" / "clip"
    parser.add_argument("--model", choices=CASES, default="b-32", help="geometry of the towers (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds (%(default)s)")
    parser.add_argument("--reference", action="store_true", help="compare the weights with a float64 reference")
    parser.add_argument("--quick", action="store_true", help="two tiny towers, to see that it works")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave FusionBench out")
    parser.add_argument("--torch", default=OWN_TORCH, help="requirement of FusionBench's torch (%(default)s)")
    parser.add_argument("--work", type=Path, default=default, help="folder for everything made (%(default)s)")
    return parser.parse_args()


def _prepare(work: Path, case: Case) -> Path:
    """Makes checkpoints and images; returns the JSON file that names them."""
    tasks = list(TASKS[: case.num_tasks])
    # In a process of its own: gigabytes that the allocator would keep must be free for what is measured.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        folders = apart.submit(make_checkpoints, work / "checkpoints", case.geometry, tasks).result()
    images = make_images(work / "images", tasks, case.num_images, case.geometry.image_size)
    job = {
        "base": str(folders["base"]),
        "models": {task: str(folders[task]) for task in tasks},
        "calibration": {task: str(path) for task, path in images.items()},
        "num_images": case.num_images,
        "batch_size": min(LARGEST_BATCH, case.num_images),
        "off_diagonal_scale": OFF_DIAGONAL_SCALE,
    }
    path = work / "job.json"
    path.write_text(json.dumps(job, indent=1))
    return path


def _runs(work: Path, case: Case, job_file: Path, peer_python: Path | None) -> list[Run]:
    """One run per compute dtype, and the peer's if there is a Python for it."""
    job = json.loads(job_file.read_text())
    (work / "merged").mkdir(exist_ok=True)
    runs = []
    for dtype in case.compute_dtypes:
        path, output = work / f"{dtype}.yaml", work / "merged" / dtype
        config = {
            "merge_method": "regmean_plusplus",
            "base_model": job["base"],
            "models": [
                {"model": folder, "name": task, "calibration": {"data": job["calibration"][task]}}
                for task, folder in job["models"].items()
            ],
            "calibration": {"num_samples": job["num_images"], "batch_size": job["batch_size"]},
            "parameters": {"off_diagonal_scale": job["off_diagonal_scale"], "ridge": 0.0},
            "compute_dtype": dtype,
        }
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        command = [sys.executable, "-m", "largemerge", "merge", str(path), str(output), "--force"]
        runs.append(Run(dtype, command, output))
    if peer_python is not None:
        output = work / "merged" / "fusionbench"
        script = HERE / "peers" / "fusionbench_regmean.py"
        runs.append(Run(PEER, [str(peer_python), str(script), str(job_file), str(output)], output))
    return runs


def _differences(work: Path, job: Path, runs: Sequence[Run]) -> dict[str, Difference]:
    """How far the runs' weights lie from the reference's, and bfloat16's from float32's."""
    reference = work / "reference"
    command = [sys.executable, str(HERE / "float64_reference.py"), str(job), str(reference)]
    taken = run_measured(command, reference.with_suffix(".log"))
    print(f"reference: {taken.seconds:.1f} s", flush=True)
    outputs = {run.name: run.output for run in runs}
    differences = {f"{name} from reference": compare(output, reference) for name, output in outputs.items()}
    if "bfloat16" in outputs:
        differences["bfloat16 from float32"] = compare(outputs["bfloat16"], outputs["float32"])
    return differences | {"plain average from reference": compare(reference / "average", reference)}


def _medians(rounds: Sequence[Round]) -> dict[str, float]:
    return {
        "seconds": median(r.measured.seconds for r in rounds),
        "merge_seconds": median(r.merge_seconds for r in rounds),
        "peak_bytes": median(r.measured.peak_bytes for r in rounds),
        "peak_anonymous_bytes": median(r.measured.peak_anonymous_bytes for r in rounds),
    }


def _figures(medians: Mapping[str, Mapping[str, float]], differences: Mapping[str, Difference]) -> dict[str, float]:
    """What targets are set for."""
    figures = {}
    peer = medians.get(PEER)
    for name, found in medians.items():
        if peer is not None and name != PEER:
            figures[f"time, {name} / {PEER}"] = found["seconds"] / peer["seconds"]
            figures[f"merge alone, {name} / {PEER}"] = found["merge_seconds"] / peer["merge_seconds"]
            figures[f"peak RSS, {name} / {PEER}"] = found["peak_bytes"] / peer["peak_bytes"]
            anonymous = found["peak_anonymous_bytes"] / peer["peak_anonymous_bytes"]
            figures[f"peak anonymous, {name} / {PEER}"] = anonymous
        figures[f"peak RSS, {name}, GiB"] = found["peak_bytes"] / 2**30
    return figures | {name: difference.overall for name, difference in differences.items()}


def _print(
    name: str,
    case: Case,
    runs: Sequence[Run],
    rounds: Mapping[str, Sequence[Round]],
    differences: Mapping[str, Difference],
) -> None:
    """The tables, the machine, and the line of JSON."""
    medians = {run: _medians(taken) for run, taken in rounds.items()}
    print(f"\n| {name}, median of {len(rounds[runs[0].name])} | time | merge alone | peak RSS | of it anonymous |")
    print("|---|---:|---:|---:|---:|")
    for run, found in medians.items():
        label = run if run == PEER else f"largemerge, compute_dtype {run}"
        peaks = [f"{found[key] / 2**30:.2f} GiB" for key in ("peak_bytes", "peak_anonymous_bytes")]
        print(f"| {label} | {found['seconds']:.1f} s | {found['merge_seconds']:.1f} s | {' | '.join(peaks)} |")
    if differences:
        print("\n| solved weights, relative difference | overall | worst linear | which |\n|---|---:|---:|---|")
        for pair, difference in differences.items():
            print(f"| {pair} | {difference.overall:.1e} | {difference.worst:.1e} | {difference.worst_linear} |")
    figures = _figures(medians, differences)
    print("\n| figure | found | target |\n|---|---:|---:|")
    for figure, value in figures.items():
        target = case.targets.get(figure)
        verdict = "" if target is None else f"≤ {target:g}, {'met' if value <= target else 'missed'}"
        print(f"| {figure} | {value:.3g} | {verdict} |")
    peer = json.loads((runs[-1].output / "peer.json").read_text())["versions"] if runs[-1].name == PEER else {}
    print("\nmachine:", ", ".join(f"{key} {value}" for key, value in machine().items()))
    print("peer:", ", ".join(f"{key} {value}" for key, value in peer.items()) or "not run")
    print(f"config: {case}\n")
    result: dict[str, Any] = {"benchmark": "clip_vs_fusionbench", "model": name, "machine": machine(), "peer": peer}
    result |= {"config": dataclasses.asdict(case), "medians": medians, "figures": figures}
    result["rounds"] = {run: [dataclasses.asdict(r) for r in taken] for run, taken in rounds.items()}
    result["differences"] = {pair: dataclasses.asdict(d) for pair, d in differences.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
