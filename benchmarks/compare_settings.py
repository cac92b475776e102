"""`largemerge compare` of ten settings of RegMean, beside ten merges and evaluations one after another.

    python benchmarks/compare_settings.py --geometry 160m --num-samples 16 --length 256
    python benchmarks/compare_settings.py --geometry 160m --num-samples 128 --held-out 16 --length 256
    python benchmarks/compare_settings.py --geometry tiny                                   # a smoke test

Synthetic Llamas and made-up tokens, as many held out as calibrated on by default. The comparison is one process; beside
it stand, for each setting, a process that merges and one that evaluates the merge (the models themselves are evaluated
once on both sides). Both sides must find the same losses. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from measure import Measured, machine, run_measured
from synthetic_llama import GEOMETRIES, Inputs, write_inputs

SCALES, RIDGES = (0.1, 0.3, 0.5, 0.7, 0.95), (1e-6, 1e-3)
GIB = 2**30


def main() -> None:
    """Writes the models, compares, merges and evaluates, prints."""
    arguments = _arguments()
    work: Path = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    geometry = GEOMETRIES[arguments.geometry]
    inputs = Inputs(geometry, arguments.num_models, arguments.num_samples, arguments.length, "regmean")
    config = write_inputs(work, inputs)
    num_held_out = arguments.held_out or arguments.num_samples
    held_out = dataclasses.replace(inputs, num_models=0, num_samples=num_held_out, seed=1)
    evaluation = _write_evaluation(work, inputs, held_out)
    try:
        together = _compare(work, config, evaluation)
        alone = _one_by_one(work, config, evaluation)
        losses = _losses(work)
    finally:
        if arguments.keep is False:
            shutil.rmtree(work, ignore_errors=True)
    seconds = sum(measured.seconds for measured in alone)
    print("| | time | ratio | peak, anonymous |\n|---|---:|---:|---:|")
    peak = max(measured.peak_anonymous_bytes for measured in alone) / GIB
    print(f"| {len(alone)} processes, one after another | {seconds:.1f} s | 1.00 | {peak:.2f} GiB |")
    own = together.peak_anonymous_bytes / GIB
    print(f"| `largemerge compare` | {together.seconds:.1f} s | {together.seconds / seconds:.2f} | {own:.2f} GiB |")
    print(f"largest relative difference of a loss: {max(losses):.1e}")
    found: dict[str, Any] = {"compare": dataclasses.asdict(together), "alone": [dataclasses.asdict(m) for m in alone]}
    what = {"geometry": arguments.geometry, "models": arguments.num_models, "samples": arguments.num_samples}
    what["held_out"] = num_held_out
    print(json.dumps({"benchmark": "compare_settings", "machine": machine(), "work": what, **found}))


def _write_evaluation(work: Path, inputs: Inputs, held_out: Inputs) -> Path:
    """Writes held-out tokens and the tasks."""
    from safetensors.torch import save_file

    from synthetic_llama import calibration_tokens

    tasks = []
    for index in range(inputs.num_models):
        save_file({"input_ids": calibration_tokens(held_out, index)}, work / f"held-out-{index}.safetensors")
        task = {"name": f"task {index}", "kind": "language_model", "data": f"held-out-{index}.safetensors"}
        tasks.append({**task, "expert": f"./candidate-{index}"})
    path = work / "eval.yaml"
    path.write_text(yaml.safe_dump({"tasks": tasks, "resamples": 0}))
    return path


def _compare(work: Path, config: Path, evaluation: Path) -> Measured:
    command = [sys.executable, "-m", "largemerge", "compare", str(config), str(evaluation), "--out", str(work / "out")]
    command += ["--sweep", "off_diagonal_scale=" + ",".join(map(str, SCALES)), "--quiet", "--device", "cpu"]
    command += ["--sweep", "ridge=" + ",".join(map(str, RIDGES))]
    return run_measured(command, work / "compare.log")


def _one_by_one(work: Path, config: Path, evaluation: Path) -> list[Measured]:
    """Merges and evaluates every setting in processes of their own, after the models themselves."""
    raw = yaml.safe_load(config.read_text())
    base = [sys.executable, "-m", "largemerge"]
    tail = ["--quiet", "--device", "cpu"]
    models = [str(work / f"candidate-{index}") for index in range(len(raw["models"]))]
    found = [run_measured([*base, "evaluate", str(evaluation), *models, *tail], work / "log")]
    tasks = yaml.safe_load(evaluation.read_text())
    for task in tasks["tasks"]:
        del task["expert"]  # measured above
    alone = work / "eval-alone.yaml"
    alone.write_text(yaml.safe_dump(tasks))
    for scale in SCALES:
        for ridge in RIDGES:
            raw["parameters"] = {"off_diagonal_scale": scale, "ridge": ridge}
            own = work / "own.yaml"
            own.write_text(yaml.safe_dump(raw))
            merged = work / "merged"
            shutil.rmtree(merged, ignore_errors=True)
            merge = [*base, "merge", str(own), str(merged), "--no-verify", *tail]
            found.append(run_measured(merge, work / "log"))
            out = work / f"alone-{scale}-{ridge}"
            found.append(
                run_measured([*base, "evaluate", str(alone), str(merged), "--out", str(out), *tail], work / "log")
            )
    return found


def _losses(work: Path) -> list[float]:
    """Relative differences between the losses that both sides have found."""
    compared = json.loads((work / "out" / "comparison.json").read_text())
    by_trial = {trial["name"]: trial["settings"] for trial in compared["trials"]}
    differences = []
    for score in compared["evaluation"]["scores"]:
        if score["model"] not in by_trial:
            continue
        settings = by_trial[score["model"]]
        folder = work / f"alone-{settings['off_diagonal_scale']}-{settings['ridge']}"
        others = json.loads((folder / "evaluation.json").read_text())["scores"]
        other = next(each for each in others if each["task"] == score["task"])
        loss, own = other["metrics"]["loss"], score["metrics"]["loss"]
        differences.append(abs(own - loss) / loss)
    assert len(differences) == len(by_trial) * len(compared["evaluation"]["tasks"])
    return differences


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ten settings, together and alone; see the top of this file.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="160m", help="sizes of the models (%(default)s)")
    parser.add_argument("--num-models", type=int, default=2, metavar="K", help="(%(default)s)")
    parser.add_argument("--num-samples", type=int, default=16, metavar="N", help="of each model (%(default)s)")
    parser.add_argument("--held-out", type=int, metavar="N", help="of each model (default: as many)")
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a sample (%(default)s)")
    default = Path(__file__).parent / "runs" / "compare-settings"
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help="folder for all files (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave all files there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
