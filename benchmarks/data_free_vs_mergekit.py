"""Data-free merges beside mergekit's: time, memory, and whether the tensors are the same.

    python benchmarks/data_free_vs_mergekit.py --geometry 1.1b --work DIR          # 13 GB of disk, an hour (mergekit's)
    python benchmarks/data_free_vs_mergekit.py --geometry 1.1b --methods linear ties --work DIR
    python benchmarks/data_free_vs_mergekit.py --models BASE A B C --work DIR      # real checkpoints instead
    python benchmarks/data_free_vs_mergekit.py --models BASE A B C --methods ties --stable-sort --work DIR
    python benchmarks/data_free_vs_mergekit.py --geometry tiny --no-peer --work DIR    # a smoke test

Both read the same YAML, written for every method: K = 3 models of equal weights and a base where the method has one,
without `dtype`, as most people write it, or with `--dtype float32` (written in bfloat16). Each merge is a process of
its own, ours first for every other method, and begins with no input in the system's cache. The disk's rate is that of
the same bytes moved past the system's cache by four threads that do nothing else, with fsync, after both. Agreement is
after rounding to bfloat16: the shares of elements that are the same, and that are one unit in the last place away.
mergekit gets a virtual environment of its own; with `--stable-sort` its sorts leave equal elements in their order.
Random methods are compared by their distance to the base, and by how many elements have moved. Ends with one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from environments import OWN_TORCH, make_environment
from largemerge.checkpoint.direct_io import DataFile
from largemerge.data_free.methods.base import REQUIRED, Base
from largemerge.data_free.methods.table import LITERATURE, METHODS
from measure import Measured, drop_from_cache, machine, run_measured
from synthetic_llama import GEOMETRIES, Inputs, write_inputs

PEER = "mergekit"
PEER_REQUIREMENTS = ("mergekit==0.1.5",)
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
NUM_MODELS = 3
COPY_BYTES, COPY_THREADS = 8 << 20, 4
STABLE = Path(__file__).parent / "peers" / "mergekit_stable_sort.py"
TARGETS = {
    "linear": 0.3,
    "slerp": 0.3,
    "model_stock": 0.3,
    "karcher": 0.3,
}
"""Of mergekit's time for the same method."""
TARGETS_OF_TIES = {name: 0.05 for name in ("ties", "dare_ties", "breadcrumbs", "della")}
"""Of mergekit's time for `ties`."""
PEAK_TARGET_GIB = 1.2


def main() -> None:
    """Makes, merges, compares, prints."""
    arguments = _arguments()
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    given = [Path(model).resolve() for model in arguments.models]
    models = given or synthetic_models(work / "inputs", arguments.geometry)
    python = make_environment(work / "mergekit", PEER_REQUIREMENTS, arguments.torch) if arguments.peer else None
    rows = []
    for number, method in enumerate(arguments.methods):
        config = work / f"{method}.yml"
        config.write_text(yaml.safe_dump(merge_config(method, models, arguments.dtype), sort_keys=False))
        peer = python if method in arguments.peer_methods else None
        command = None if peer is None else _peer_command(peer, stable_sort=arguments.stable_sort)
        rows.append(_measure(method, config, work, command, models, peer_first=number % 2 == 1))
        print(json.dumps(rows[-1]), flush=True)
    ties = next((row["peer_seconds"] for row in rows if row["method"] == "ties"), None)
    _print(rows, ties)
    result = {
        "rows": rows,
        "dtype": arguments.dtype,
        "stable_sort": arguments.stable_sort,
        "models": [m.name for m in models],
    }
    print(json.dumps({"benchmark": "data_free_vs_mergekit", "machine": machine(), **result}))
    if not arguments.keep and not arguments.models:
        shutil.rmtree(work / "inputs")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Data-free methods beside mergekit; see the top of this file.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny", help="of synthetic models (%(default)s)")
    parser.add_argument("--models", nargs="*", default=[], metavar="DIR", help="base and models, instead")
    both = sorted(METHODS.keys() - LITERATURE.keys())
    parser.add_argument("--methods", nargs="+", choices=both, default=both, help="(default: all that mergekit has)")
    parser.add_argument("--peer-methods", nargs="+", default=both, help="mergekit runs only for these (default: all)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="in which both compute (default: as stored)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for all files")
    parser.add_argument("--stable-sort", action="store_true", help="in mergekit, where equals come at the threshold")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="only ours")
    parser.add_argument("--torch", default=OWN_TORCH, help="requirement for mergekit's environment (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="do not delete synthetic models")
    return parser.parse_args()


def synthetic_models(folder: Path, geometry: str) -> list[Path]:
    """The first one serves as the base."""
    names = [folder / f"candidate-{index}" for index in range(NUM_MODELS + 1)]
    if not all((name / "config.json").exists() for name in names):
        write_inputs(folder, Inputs(GEOMETRIES[geometry], NUM_MODELS + 1, num_samples=1, length=8))
    return names


def merge_config(method: str, models: Sequence[Path], dtype: str | None) -> dict[str, Any]:
    """The YAML of a method: what it requires, K models or as many as it takes, the first as the base."""
    row = METHODS[method]
    based = row.base is Base.REQUIRED
    merged = models[1:][: row.num_models[1]]
    values = {"weight": 1 / len(merged), "density": 0.5}
    each = {name: values[name] for name in row.per_model if name in values}
    options = {name: 0.4 for name, default in row.shared.items() if default is REQUIRED}
    config: dict[str, Any] = {"merge_method": method}
    config |= {"base_model": str(models[0])} if based else {}
    config["models"] = [{"model": str(model)} | ({"parameters": each} if each else {}) for model in merged]
    config |= {"parameters": options} if options else {}
    return config | ({"dtype": dtype, "out_dtype": "bfloat16"} if dtype is not None else {})


def _peer_command(python: Path, *, stable_sort: bool) -> list[str]:
    return [str(python), str(STABLE)] if stable_sort else [str(python.parent / "mergekit-yaml")]


def _measure(
    method: str, config: Path, work: Path, peer: list[str] | None, models: Sequence[Path], *, peer_first: bool
) -> dict[str, Any]:
    ours, theirs = work / "ours", work / "theirs"
    own = [sys.executable, "-m", "largemerge", "merge", str(config), str(ours), "--force", "--quiet"]
    planned = [sys.executable, "-m", "largemerge", "plan", str(config), "--json"]
    plan = json.loads(subprocess.run(planned, capture_output=True, check=True, text=True).stdout)
    commands = [("ours", own)]
    if peer is not None:
        shutil.rmtree(theirs, ignore_errors=True)
        commands.append(("peer", [*peer, str(config), str(theirs), "--allow-crimes"]))
    measured: dict[str, Measured] = {}
    for name, command in reversed(commands) if peer_first else commands:
        drop_from_cache([path for model in models for path in model.glob("*.safetensors")])
        measured[name] = run_measured(command, work / f"{name}.log")
    report = json.loads((ours / "merge_report.json").read_text())
    row: dict[str, Any] = {
        "method": method,
        "seconds": measured["ours"].seconds,
        "merge_seconds": report["seconds"]["total"] - report["seconds"]["preparation"],
        "planned_seconds": plan["seconds"]["total"],
        "peak_anonymous_bytes": measured["ours"].peak_anonymous_bytes,
        "planned_peak_bytes": report["plan"]["peak_bytes"],
        "bytes_read": report["bytes_read"],
        "bytes_written": report["bytes_written"],
        "transfer_seconds": _transfer_seconds(models[-len(report["inputs"]) :], work / "copied"),
        "peer_seconds": None,
    }
    if peer is not None:
        row |= {"peer_seconds": measured["peer"].seconds, "peer_peak_bytes": measured["peer"].peak_anonymous_bytes}
        row |= _distances(ours, theirs, models[0]) if method in RANDOM else _agreement(ours, theirs)
    return row


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), path)
    return found


def load_tensor(files: dict[str, Path], name: str) -> torch.Tensor:
    """A tensor out of one of `tensor_files`."""
    with safe_open(files[name], "pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


def _agreement(ours: Path, theirs: Path) -> dict[str, Any]:
    """Shares of elements that are the same, and one unit in the last place away, in bfloat16."""
    left, right = tensor_files(ours), tensor_files(theirs)
    total = same = near = 0
    for name in left.keys() & right.keys():
        a, b = (ordered(load_tensor(files, name)) for files in (left, right))
        distance = (a - b).abs()
        total, same, near = total + a.numel(), same + int((distance == 0).sum()), near + int((distance == 1).sum())
    missing = sorted(left.keys() ^ right.keys())
    return {"same": same / total, "one_ulp": near / total, "only_in_one": missing}


def ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the bfloat16 numbers, neighbours one apart."""
    bits = tensor.to(torch.bfloat16).reshape(-1).view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _distances(ours: Path, theirs: Path, base: Path) -> dict[str, Any]:
    """‖W - W_0‖ of random methods, and the share of elements that moved."""
    origin = tensor_files(base)
    found = {}
    for label, folder in (("", ours), ("peer_", theirs)):
        files = tensor_files(folder)
        squares = moved = total = 0.0
        for name in files.keys() & origin.keys():
            change = load_tensor(files, name).float() - load_tensor(origin, name).float()
            squares += change.square().sum(dtype=torch.float64).item()
            moved, total = moved + int(change.count_nonzero()), total + change.numel()
        found |= {f"{label}distance": squares**0.5, f"{label}moved": moved / total}
    return found


def _transfer_seconds(models: Sequence[Path], target: Path) -> float:
    """Of reading models past the system's cache, and writing and syncing as much as one of them, and nothing else."""
    files = [path for model in models for path in sorted(model.glob("*.safetensors"))]
    drop_from_cache(files)
    size = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    places = list(range(0, size, COPY_BYTES))
    data = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    start = time.perf_counter()
    with DataFile(target, size=size) as out, ThreadPoolExecutor(COPY_THREADS) as pool:

        def read(path: Path) -> None:
            with DataFile(path) as file:
                length = path.stat().st_size
                for offset in range(0, length, COPY_BYTES):
                    file.read_tensor(offset, torch.uint8, (min(COPY_BYTES, length - offset),))
                    if places and offset % (len(models) * COPY_BYTES) == 0:
                        _write_some(out, places, size, data)

        list(pool.map(read, files))
        while places:
            _write_some(out, places, size, data)
        out.sync()
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def _write_some(out: DataFile, places: list[int], size: int, data: torch.Tensor) -> None:
    try:
        offset = places.pop()
    except IndexError:  # another thread was first
        return
    out.write(offset, data[: size - offset])


def _print(rows: Sequence[dict[str, Any]], ties: float | None) -> None:
    print(
        "\n| method | time | merging | planned | mergekit | ratio | target | peak, anonymous | planned "
        "| mergekit's peak | same | 1 ulp |"
    )
    print(f"|---{'|---:' * 11}|")
    for row in rows:
        method, peer = row["method"], row["peer_seconds"]
        cells = [method, *(f"{row[key]:.1f} s" for key in ("seconds", "merge_seconds", "planned_seconds"))]
        cells.append("" if peer is None else f"{peer:.1f} s")
        cells.append("" if peer is None else f"{row['seconds'] / peer:.3f}")
        target = ""
        if peer is not None and method in TARGETS:
            target = f"{TARGETS[method]} {'reached' if row['seconds'] <= TARGETS[method] * peer else 'MISSED'}"
        if ties is not None and method in TARGETS_OF_TIES:
            ratio = row["seconds"] / ties
            target = f"{ratio:.3f} of ties', {TARGETS_OF_TIES[method]} {'reached' if ratio <= 0.05 else 'MISSED'}"
        cells += [
            target,
            f"{row['peak_anonymous_bytes'] / 2**30:.2f} GiB",
            f"{row['planned_peak_bytes'] / 2**30:.2f} GiB",
        ]
        cells.append("" if peer is None else f"{row['peer_peak_bytes'] / 2**30:.2f} GiB")
        if "same" in row:
            cells += [f"{100 * row['same']:.3f} %", f"{100 * row['one_ulp']:.3f} %"]
        elif "distance" in row:
            cells += [f"distance {row['distance']:.4g} / {row['peer_distance']:.4g}"]
            cells += [f"moved {row['moved']:.4f} / {row['peer_moved']:.4f}"]
        print(f"| {' | '.join(cells)} |")
    print(f"\npeak target: {PEAK_TARGET_GIB} GiB; machine: {', '.join(f'{k} {v}' for k, v in machine().items())}")
    for row in rows:
        share = row["transfer_seconds"] / row["merge_seconds"]
        print(f"{row['method']}: {share:.0%} of the rate of bare transfers, {row['transfer_seconds']:.1f} s")
    print("(linear's target: 60%)\n")


if __name__ == "__main__":
    main()
