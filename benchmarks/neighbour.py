"""What a busy neighbour costs: a merge with nothing beside it, and beside a process that keeps one core busy.

    python benchmarks/neighbour.py --geometry 160m --num-samples 16 --length 256
    python benchmarks/neighbour.py --geometry tiny                                  # a smoke test

RegMean++ of two synthetic Llamas on all cores, whole processes by turns: with threads that sleep while they wait for
each other, as the `largemerge` command has them (`OMP_WAIT_POLICY=PASSIVE`), and with threads that spin for a while
first, as torch's OpenMP has them by itself. The neighbour multiplies matrices in one thread. Ends with one line of
JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from measure import Measured, machine, run_measured
from synthetic_llama import GEOMETRIES, Inputs, write_inputs

# Libgomp's own default, which a variable that is empty would not bring back.
WAITS = {"sleep": {"OMP_WAIT_POLICY": "PASSIVE"}, "spin": {"GOMP_SPINCOUNT": "300000"}}
NEIGHBOUR = "import torch; torch.set_num_threads(1); a = torch.rand(700, 700)\nwhile True: a @ a"


def main() -> None:
    """Writes the models, merges by turns, prints."""
    arguments = _arguments()
    work: Path = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    inputs = Inputs(GEOMETRIES[arguments.geometry], 2, arguments.num_samples, arguments.length, "regmean_plusplus")
    config = write_inputs(work, inputs)
    found: dict[str, dict[str, list[Measured]]] = {waits: {"alone": [], "beside": []} for waits in WAITS}
    try:
        for _ in range(arguments.repeats):
            for waits, each in found.items():
                each["alone"].append(_merge(config, work, waits))
                with _neighbour():
                    each["beside"].append(_merge(config, work, waits))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("| threads that wait | alone | beside a busy process | ratio |\n|---|---:|---:|---:|")
    for waits, each in found.items():
        alone, beside = (median(measured.seconds for measured in each[how]) for how in ("alone", "beside"))
        print(f"| {waits} | {alone:.1f} s | {beside:.1f} s | {beside / alone:.2f} |")
    runs = {
        waits: {how: [dataclasses.asdict(one) for one in every] for how, every in each.items()}
        for waits, each in found.items()
    }
    what = {"geometry": arguments.geometry, "samples": arguments.num_samples, "length": arguments.length}
    print(json.dumps({"benchmark": "neighbour", "machine": machine(), "work": what, "runs": runs}))


def _merge(config: Path, work: Path, waits: str) -> Measured:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "largemerge", "merge", str(config), str(out), "--quiet", "--device", "cpu"]
    before = {name: os.environ.pop(name, None) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    os.environ.update(WAITS[waits])
    try:
        return run_measured(command, work / "merge.log")
    finally:
        for name in WAITS[waits]:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _neighbour() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a busy neighbour costs; see the top of this file.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="160m", help="sizes of the models (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=16, metavar="N", help="of each model (%(default)s)")
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a sample (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="(%(default)s)")
    default = Path(__file__).parent / "runs" / "neighbour"
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help="folder for all files (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
