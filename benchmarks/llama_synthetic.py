"""What does it cost to merge Llamas of a real size? Time and memory of one merge, and whether it is whole.

    python benchmarks/llama_synthetic.py --geometry 1.1b --num-models 3                       # 9 GB of disk
    python benchmarks/llama_synthetic.py --geometry 7b --num-models 2 --memory-host 2.5GiB    # 41 GB of disk
    python benchmarks/llama_synthetic.py --geometry tiny                                      # a smoke test

Makes the checkpoints (`synthetic_llama.py`), runs `largemerge merge` on them in a process of its own whose time
and memory are taken (`measure.py`), checks what came out (`verification.py`), and deletes everything unless `--keep`
is given. Options that this script does not know go to `largemerge merge`. The weights are random: this measures
cost, not quality. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from transformers.utils import logging

from largemerge.checkpoint.locate import existing_folder
from measure import machine, run_measured
from synthetic_llama import Geometry, Inputs, add_arguments, from_arguments, write_inputs
from verification import verify

GIB = 2**30
SPARE_BYTES = 1 << 30
TARGETS_GIB = {("1.1b", 3): 2.0, ("7b", 2): 4.0}
"""Anonymous memory at the peak, by geometry and number of candidates."""


def main() -> None:
    """Makes, merges, checks, prints, deletes."""
    arguments, merge_options = _arguments()
    inputs = from_arguments(arguments)
    logging.disable_progress_bar()
    folder = arguments.work.resolve() / f"llama-{arguments.geometry}-{inputs.geometry.num_layers}-k{inputs.num_models}"
    settings = json.dumps(dataclasses.asdict(inputs))
    made = folder / "settings.json"
    reused = made.exists() and made.read_text() == settings
    if folder.exists() and not reused:
        shutil.rmtree(folder)
    _check_disk(folder, inputs, reused=reused)
    try:
        start = time.perf_counter()
        config = folder / "merge.yaml" if reused else write_inputs(folder, inputs)
        made.write_text(settings)
        print(f"inputs {'were there' if reused else f'made in {time.perf_counter() - start:.0f} s'}", flush=True)
        result = _merge(config, folder / "merged", inputs, merge_options)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    target = arguments.target_gib or TARGETS_GIB.get((arguments.geometry, inputs.num_models))
    _print(inputs, merge_options, result, target)


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Merge synthetic Llamas; see the top of this file. Unknown options go to `largemerge merge`.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    default = Path(__file__).parent / "runs" / "llama"
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help="folder for all files (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="delete nothing; the next run uses the inputs again")
    parser.add_argument("--target-gib", type=float, help="anonymous memory to stay below (known for 1.1b and 7b)")
    return parser.parse_known_args()


def _check_disk(folder: Path, inputs: Inputs, *, reused: bool) -> None:
    """Ends the program if the disk has no room for candidates and merge."""
    inputs_bytes = 0 if reused else inputs.num_bytes
    needed = inputs_bytes + inputs.geometry.num_bytes + SPARE_BYTES
    free = shutil.disk_usage(existing_folder(folder)).free + (_size(folder / "merged") if reused else 0)
    if needed > free:
        raise SystemExit(
            f"{folder}: {inputs.num_models} candidates and their merge take {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; choose another --work, or fewer --num-layers"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _merge(config: Path, output: Path, inputs: Inputs, options: Sequence[str]) -> dict[str, Any]:
    """One merge: measured, checked, and what its own report says."""
    command = [sys.executable, "-m", "largemerge", "merge", str(config), str(output), "--force", *options]
    planned_seconds = _planned_seconds(config, options)
    measured = run_measured(command, output.with_name("merge.log"))
    print(f"merged in {measured.seconds:.0f} s", flush=True)
    report = json.loads((output / "merge_report.json").read_text())
    candidates = [config.parent / f"candidate-{index}" for index in range(inputs.num_models)]
    checked = verify(output, inputs.geometry, candidates)
    num_bytes = report["bytes_read"] + report["bytes_written"]
    return {
        **dataclasses.asdict(measured),
        "merge_seconds": report["seconds"],
        "bytes_read": report["bytes_read"],
        "bytes_written": report["bytes_written"],
        "gb_per_second": num_bytes / 1e9 / measured.seconds,
        "planned_peak_bytes": report["peak_bytes"]["planned_host"],
        "placement": report["plan"]["placement"],
        "planned_parts": report["plan"]["peak_bytes"]["parts"],
        "reported_peak_bytes": report["peak_bytes"],
        "planned_seconds": planned_seconds,
        "num_fallbacks": len(report["fallbacks"]),
        "checked": checked,
    }


def _planned_seconds(config: Path, options: Sequence[str]) -> float:
    """What `largemerge plan` says that the merge will take once it has begun, from its probe of this machine."""
    limits = [option for option in options if not option.startswith("--max-shard-size")]
    command = [sys.executable, "-m", "largemerge", "plan", str(config), "--json", *limits]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return sum(json.loads(done.stdout)["seconds"].values())


def whole_model_bytes(geometry: Geometry, num_models: int) -> dict[str, int]:
    """What implementations hold that do not go block by block: K + 1 whole models, and float32 Gram matrices.

    Args:
        geometry: Of the models.
        num_models: K.

    Returns:
        Bytes by what is held; one Gram matrix for every linear, as published code has it.
    """
    grams = sum(4 * shape[1] ** 2 for shape in geometry.block(0).values() if len(shape) == 2)
    models = (num_models + 1) * geometry.num_bytes
    return {
        f"{num_models} candidates and the merged model": models,
        "the same and the Grams of one block of one candidate": models + grams,
        "the same and the Grams of one whole candidate": models + grams * geometry.num_layers,
        f"the same and the Grams of {num_models} whole candidates": models + grams * geometry.num_layers * num_models,
    }


def _print(inputs: Inputs, options: Sequence[str], result: dict[str, Any], target: float | None) -> None:
    """What a person wants to know, then the line of JSON."""
    geometry = inputs.geometry
    anonymous = result["peak_anonymous_bytes"]
    planned = result["planned_peak_bytes"]
    print(f"\n{inputs}")
    print(f"checked: {result['checked']}")
    print(f"time: {result['seconds']:.1f} s, whole process; fallbacks of the solver: {result['num_fallbacks']}")
    phases = result["merge_seconds"]["by_phase"]
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in sorted(phases.items(), key=lambda item: -item[1]))
    print(f"phases: {spent}")
    working = result["merge_seconds"]["total"] - result["merge_seconds"]["preparation"]
    print(f"planned: {result['planned_seconds']:.1f} s once it has begun; it took {working:.1f} s")
    print(f"placement: {result['placement']}")
    read, written = result["bytes_read"] / 1e9, result["bytes_written"] / 1e9
    print(f"disk: {read:.2f} GB read, {written:.2f} GB written, {result['gb_per_second']:.2f} GB/s")
    print(f"peak: {anonymous / GIB:.2f} GiB anonymous, {result['peak_bytes'] / GIB:.2f} GiB with mapped pages")
    on_device = result["reported_peak_bytes"]["device"]
    if on_device:
        planned_there = result["reported_peak_bytes"]["planned_device"]
        print(f"on the GPU: {on_device / GIB:.2f} GiB, planned {planned_there / GIB:.2f} GiB")
    print(f"planned peak: {planned / GIB:.2f} GiB, {planned / anonymous:.2f} of the measured one")
    if target is not None:
        reached = "reached" if anonymous <= target * GIB else "MISSED"
        print(f"target: at most {target:g} GiB anonymous, {reached}")
    whole = whole_model_bytes(geometry, inputs.num_models)
    total = psutil.virtual_memory().total
    print(f"\nwithout going block by block, on this machine of {total / GIB:.1f} GiB:")
    for what, num_bytes in whole.items():
        fits = "fits" if num_bytes < total else "does not fit"
        print(f"  {num_bytes / GIB:7.1f} GiB  {what}: {fits}")
    print(f"\nmachine: {', '.join(f'{name} {value}' for name, value in machine().items())}\n")
    config = {**dataclasses.asdict(inputs), "merge_options": list(options)}
    extra = {"parameters": geometry.num_bytes // 2, "target_gib": target, "whole_model_bytes": whole}
    print(json.dumps({"benchmark": "llama_synthetic", "machine": machine(), "config": config, **result, **extra}))


if __name__ == "__main__":
    main()
