"""What does it cost to keep hidden states on disk, or in 8 bits?

    python benchmarks/hidden_states.py [--work DIR] [--samples N]              # 2 GB of disk, some minutes
    python benchmarks/hidden_states.py --experts benchmarks/runs/smollm2       # and 8 bits: weights and losses
    python benchmarks/hidden_states.py --quick                                 # a smoke test: the numbers mean nothing

A narrow synthetic Llama (`synthetic_llama.py`) with so many calibration tokens that its hidden states are many times
the room that a limit leaves for them. One merge holds them in memory, another is told a limit in which they do not fit;
the results must be the same bit for bit. With `--experts`, the four SmolLM2-135M experts of `smollm2_experts.py` are
merged with hidden states as they are and in 8 bits, and held-out losses compared. All merges take place on the CPU.
Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from transformers import AutoTokenizer

import largemerge
from corpora import KINDS, load_corpus
from evaluation import heldout_losses
from experts import sequences
from measure import machine, run_measured
from synthetic_llama import Geometry, Inputs, write_inputs

GIB, MIB = 2**30, 2**20
NARROW = Geometry(hidden=512, intermediate=1024, num_layers=3, num_heads=8, num_kv_heads=8, vocabulary=512)
LENGTH = 512
ROOM_BYTES = 32 * MIB
"""That the limit leaves for hidden states, if everything else stays as it is."""
MOST_RATIO = 1.3
"""Target: time with hidden states on disk over time in memory."""


def main() -> None:
    """Merges, compares, prints."""
    parser = argparse.ArgumentParser(description="Hidden states in memory, on disk, in 8 bits.")
    default = Path(__file__).parent / "runs" / "hidden-states"
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help="folder for all files (%(default)s)")
    parser.add_argument("--samples", type=int, default=800, help=f"of {LENGTH} tokens, per candidate (%(default)s)")
    parser.add_argument("--experts", type=Path, metavar="DIR", help="folder of smollm2_experts.py, for 8 bits")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    result: dict[str, Any] = {"disk": _on_disk(work, 12 if arguments.quick else arguments.samples)}
    if arguments.experts is not None:
        result["eight_bits"] = _eight_bits(arguments.experts.resolve(), work)
    print("\nmachine:", ", ".join(f"{name} {value}" for name, value in machine().items()))
    print(json.dumps({"benchmark": "hidden_states", "machine": machine(), **result}))


def _on_disk(work: Path, samples: int) -> dict[str, Any]:
    """The same merge with hidden states in memory and on disk."""
    shutil.rmtree(work, ignore_errors=True)
    config = write_inputs(work / "inputs", Inputs(NARROW, num_samples=samples, length=LENGTH, batch_size=4))
    resolved = largemerge.load_config(config)
    # A limit of any size makes a merge give freed memory back, and its plan say so.
    roomy = resolved.memory.model_copy(update={"host": 1 << 50})
    plan = largemerge.plan(resolved.model_copy(update={"memory": roomy}), device="cpu", probe=False)
    hidden = plan.footprint.parts["hidden states"]
    limit = plan.footprint.host - hidden + min(ROOM_BYTES, hidden // 2)
    memory = _merge(config, work / "memory")
    disk = _merge(config, work / "disk", "--memory-host", str(limit))
    assert disk["placement"] == "disk" and memory["placement"] == "host", (disk, memory)
    largest = _largest_difference(work / "memory", work / "disk")
    assert largest == 0, f"hidden states on disk changed the result by {largest}"
    shutil.rmtree(work)
    print(f"hidden states: {hidden / GIB:.2f} GiB, {hidden / min(ROOM_BYTES, hidden // 2):.0f} times the room for them")
    print("\n| hidden states | merge | peak, anonymous | planned | on disk |\n|---|---:|---:|---:|---:|")
    for name, row in (("in memory", memory), ("on disk", disk)):
        sizes = " | ".join(f"{row[key] / MIB:.0f} MiB" for key in ("peak_bytes", "planned_bytes", "disk_bytes"))
        print(f"| {name} | {row['seconds']:.1f} s | {sizes} |")
    ratio = disk["seconds"] / memory["seconds"]
    print(f"\non disk / in memory: {ratio:.2f} (target <= {MOST_RATIO}); limit {limit / MIB:.0f} MiB; the same bits")
    times = hidden / min(ROOM_BYTES, hidden // 2)
    return {"hidden_bytes": hidden, "limit_bytes": limit, "times_the_room": times, "memory": memory, "on_disk": disk}


def _merge(config: Path, out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "largemerge", "merge", str(config), str(out), "--force", "--quiet"]
    command += ["--device", "cpu", *options]
    out.parent.mkdir(parents=True, exist_ok=True)
    measured = run_measured(command, out.with_suffix(".log"))
    report = json.loads((out / "merge_report.json").read_text())
    return {
        "seconds": report["seconds"]["total"] - report["seconds"]["preparation"],
        "peak_bytes": max(measured.peak_anonymous_bytes, report["peak_bytes"]["host_anonymous"]),
        "planned_bytes": report["peak_bytes"]["planned_host"],
        "disk_bytes": report["peak_bytes"]["disk"],
        "placement": report["plan"]["placement"]["hidden_states"],
    }


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    return tensors


def _largest_difference(left: Path, right: Path) -> float:
    """Relative to a tensor's norm, over all tensors."""
    others = _tensors(right)
    return max(
        ((tensor.float() - others[name].float()).norm() / tensor.float().norm().clamp_min(1e-12)).item()
        for name, tensor in _tensors(left).items()
    )


def _eight_bits(experts: Path, work: Path) -> dict[str, Any]:
    """Weights and held-out losses of a real merge with hidden states in 8 bits, beside one as they are."""
    plain = experts / "configs" / "regmean_plusplus-s0.95-r1e-06.yaml"
    if not plain.exists():
        raise SystemExit(f"{experts} holds no experts; run smollm2_experts.py --work {experts} --no-merges first")
    work.mkdir(parents=True, exist_ok=True)
    configs = {"as they are": {}, "in 8 bits": {"memory": {"hidden_states_8bit": True}}}
    rows = {}
    for name, changes in configs.items():
        config = work / f"{name.replace(' ', '-')}.yaml"
        config.write_text(yaml.safe_dump(yaml.safe_load(plain.read_text()) | changes))
        out = work / name.replace(" ", "-")
        row = _merge(config, out)
        losses = heldout_losses(out, _heldout(experts), experts / "losses")
        rows[name] = row | {"losses": losses, "mean": sum(losses.values()) / len(losses)}
    outs = [work / name.replace(" ", "-") for name in configs]
    difference = _largest_difference(*outs)
    print("\n| hidden states | merge | mean held-out loss |\n|---|---:|---:|")
    for name, row in rows.items():
        print(f"| {name} | {row['seconds']:.1f} s | {row['mean']:.4f} |")
    print(f"\nlargest relative difference of a tensor: {difference:.1e}")
    return {"rows": rows, "largest_difference": difference}


def _heldout(experts: Path) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(experts / "base")
    corpora: Sequence[str] = KINDS
    return {
        kind: sequences(load_corpus(kind, experts / "packages").heldout, tokenizer, count=32, length=256)
        for kind in corpora
    }


if __name__ == "__main__":
    main()
