"""Evaluation whole and block by block, beside Transformers: the same loss, time, and peak memory by number of blocks.

    python benchmarks/streamed_evaluation.py --geometry 160m --num-samples 64 --length 256 [--repeats 3]
    python benchmarks/streamed_evaluation.py --geometry tiny                                 # a smoke test

A synthetic Llama and made-up tokens: time and memory do not depend on the numbers. Every run is a process of its own
(`measure.py`), they take turns, and the fastest of the repeats is told: the model by Transformers as anyone would run
it (this file with `--plain`), by `largemerge evaluate` whole, and by it block by block, which `--memory-host`
forces; the last with half of the blocks, too. Forward passes are in float32. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from measure import Measured, machine, run_measured
from synthetic_llama import GEOMETRIES, Inputs, write_inputs

GIB = 2**30
_BY_BLOCK = "1MiB"


def main() -> None:
    """Writes the model, runs in turns, prints."""
    arguments = _arguments()
    if arguments.plain is not None:
        _plain(arguments.plain, arguments.data, arguments.batch_size)
        return
    work: Path = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    geometry = GEOMETRIES[arguments.geometry]
    blocks = {"": geometry.num_layers, ", half of the blocks": max(1, geometry.num_layers // 2)}
    for what, count in blocks.items():
        inputs = Inputs(dataclasses.replace(geometry, num_layers=count), 1, arguments.num_samples, arguments.length)
        write_inputs(work / f"model{what}", inputs)
    rows: dict[str, list[tuple[Measured, float]]] = {}
    try:
        for _ in range(arguments.repeats):
            for what in blocks:
                folder = work / f"model{what}"
                for way in ("transformers", "whole", "by block") if not what else ("by block",):
                    rows.setdefault(f"{way}{what}", []).append(_run(way, folder, arguments))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    best = {name: min(found, key=lambda each: each[0].seconds) for name, found in rows.items()}
    plain = best["transformers"]
    print("| | time | ratio | peak, anonymous | loss, relative difference |\n|---|---:|---:|---:|---:|")
    for name, (measured, loss) in best.items():
        own = "" if "half" in name else f"{abs(loss - plain[1]) / plain[1]:.1e}"
        ratio = "" if "half" in name else f"{measured.seconds / plain[0].seconds:.2f}"
        print(
            f"| {name} | {measured.seconds:.1f} s | {ratio} | {measured.peak_anonymous_bytes / GIB:.2f} GiB | {own} |"
        )
    found = {name: {**dataclasses.asdict(measured), "loss": loss} for name, (measured, loss) in best.items()}
    what = {"geometry": arguments.geometry, "samples": arguments.num_samples, "length": arguments.length}
    print(json.dumps({"benchmark": "streamed_evaluation", "machine": machine(), "model": what, "runs": found}))


def _run(way: str, folder: Path, arguments: argparse.Namespace) -> tuple[Measured, float]:
    """Runs one of the ways; returns what it took, and the loss."""
    model, data = folder / "candidate-0", folder / "candidate-0.safetensors"
    if way == "transformers":
        command = [sys.executable, __file__, "--plain", str(model), "--data", str(data)]
        measured = run_measured([*command, "--batch-size", str(arguments.batch_size)], folder / "log")
        return measured, float((folder / "log").read_text().split()[-1])
    task = {"name": "tokens", "kind": "language_model", "data": str(data)}
    settings = {"tasks": [task], "batch_size": arguments.batch_size, "compute_dtype": "float32", "resamples": 0}
    (folder / "eval.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "largemerge", "evaluate", str(folder / "eval.yaml"), str(model)]
    command += ["--out", str(folder / "out"), "--quiet", "--device", "cpu"]
    command += ["--memory-host", _BY_BLOCK] if way == "by block" else []
    measured = run_measured(command, folder / "log")
    (score,) = json.loads((folder / "out" / "evaluation.json").read_text())["scores"]
    assert score["way"] == way, f"{score['way']}, expected {way}"
    return measured, float(score["metrics"]["loss"])


@torch.inference_mode()
def _plain(folder: Path, data: Path, batch_size: int) -> None:
    """The loss of a model by Transformers, printed."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss, tokens = 0.0, 0
    for ids in load_file(data)["input_ids"].split(batch_size):
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        wanted = ids[:, 1:].flatten()
        loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        tokens += len(wanted)
    print(loss / tokens)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluation whole and block by block; see the top of this file.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="160m", help="sizes of the model (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a sample (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="(%(default)s)")
    default = Path(__file__).parent / "runs" / "streamed-evaluation"
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help="folder for all files (%(default)s)")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
