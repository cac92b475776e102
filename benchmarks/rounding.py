"""Where largemerge and mergekit give other numbers for the same YAML: who is right, and does mergekit repeat itself?

    python benchmarks/rounding.py --geometry 1.1b --work DIR            # 16 GB of disk, 25 minutes
    python benchmarks/rounding.py --inputs DIR --methods slerp --work DIR   # synthetic ones that lie there
    python benchmarks/rounding.py --models BASE A B C --dtype float32 --work DIR   # real checkpoints
    python benchmarks/rounding.py --geometry tiny --no-peer --work DIR  # a smoke test

The YAML of `data_free_vs_mergekit.py`, without `dtype` or with it, of models stored in bfloat16. Every method is merged
once by largemerge and twice by mergekit, with 1 and with 2 threads. The judge is the method's own formula, below: in
float64, dense, tensor by tensor, from the bfloat16 inputs, rounded once at the end; neither shares anything with it.
Numbers are the same if they are so in bfloat16. An error is ‖x - y‖ / ‖y - W_0‖ over all tensors, y the float64 result
and W_0 the base or, where there is none, the first model; that of y rounded is the least that bfloat16 allows. Nothing
is timed. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from data_free_vs_mergekit import PEER_REQUIREMENTS, load_tensor, merge_config, ordered, synthetic_models, tensor_files
from environments import make_environment
from measure import machine, run_measured
from synthetic_llama import GEOMETRIES

Config = Mapping[str, Any]
EXACT, OURS, PEER, PEER_2 = "float64", "ours", "mergekit", "mergekit_2_threads"
_EPS = 1e-8
PAIRS = ((OURS, EXACT), (PEER, EXACT), (OURS, PEER), (PEER, PEER_2))


def main() -> None:
    """Merges, judges, prints."""
    arguments = _arguments()
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    given = [Path(model).resolve() for model in arguments.models]
    models = given or synthetic_models((arguments.inputs or work / "inputs").resolve(), arguments.geometry)
    python = make_environment(work / "mergekit", PEER_REQUIREMENTS) if arguments.peer else None
    rows = []
    for method in arguments.methods:
        config = merge_config(method, models, arguments.dtype)
        rows.append({"method": method, **_judge(method, config, _merge(config, work, python))})
        print(json.dumps(rows[-1]), flush=True)
    _print(rows)
    result = {"models": [model.name for model in models], "dtype": arguments.dtype, "rows": rows}
    print(json.dumps({"benchmark": "rounding", "machine": machine(), **result}))
    if arguments.inputs is None and not given:
        shutil.rmtree(work / "inputs")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whose rounding; see the top of this file.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny", help="of synthetic models (%(default)s)")
    parser.add_argument("--inputs", type=Path, metavar="DIR", help="where they lie or go, and stay (WORK/inputs)")
    parser.add_argument("--models", nargs="*", default=[], metavar="DIR", help="base and models, instead")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="in which both compute (default: as stored)")
    parser.add_argument("--methods", nargs="+", choices=FORMULAS, default=list(FORMULAS), help="(default: all)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for all files")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="only ours")
    return parser.parse_args()


def _merge(config: Config, work: Path, python: Path | None) -> dict[str, Path]:
    """Folders of the merges, by label."""
    path = work / "merge.yml"
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    folders = {label: work / f"merged-{label}" for label in (OURS, *((PEER, PEER_2) if python is not None else ()))}
    for label, folder in folders.items():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "largemerge", "merge", str(path), str(folder), "--quiet"]
        if label != OURS and python is not None:
            threads = 2 if label == PEER_2 else 1
            command = ["env", f"OMP_NUM_THREADS={threads}", f"MKL_NUM_THREADS={threads}"]
            command += [str(python.parent / "mergekit-yaml"), str(path), str(folder), "--allow-crimes"]
        run_measured(command, work / f"{label}.log")
    return folders


def _judge(method: str, config: Config, merges: Mapping[str, Path]) -> dict[str, Any]:
    """Shares of elements that are the same and one unit in the last place away, by pair; errors, by merge."""
    based = [config["base_model"]] if "base_model" in config else []
    inputs = [tensor_files(Path(model)) for model in [*based, *(entry["model"] for entry in config["models"])]]
    outputs = {label: tensor_files(folder) for label, folder in merges.items()}
    for label, files in outputs.items():
        if files.keys() != inputs[0].keys():
            raise SystemExit(f"{merges[label]} has other tensors: {sorted(files.keys() ^ inputs[0].keys())}")
    pairs = {f"{left} = {right}": (left, right) for left, right in PAIRS if {left, right} <= {EXACT, *outputs}}
    apart, moved = {0: Counter[str](), 1: Counter[str]()}, Counter[str]()
    squares, scale, total = dict.fromkeys([EXACT, *outputs], 0.0), 0.0, 0
    for name in inputs[0]:
        tensors = [load_tensor(files, name).double() for files in inputs]
        first = tensors[0].clone()
        exact = FORMULAS[method](tensors, config)
        del tensors
        found = {EXACT: exact.to(torch.bfloat16)} | {k: load_tensor(files, name) for k, files in outputs.items()}
        for label, tensor in found.items():
            squares[label] += (tensor.double() - exact).square_().sum().item()
            moved[label] += int((tensor != first).count_nonzero())
        total, scale = total + exact.numel(), scale + (exact - first).square_().sum().item()
        del exact, first
        steps = {label: ordered(tensor) for label, tensor in found.items()}
        for pair, (left, right) in pairs.items():
            distance = (steps[left] - steps[right]).abs_()
            for units, counts in apart.items():
                counts[pair] += int((distance == units).sum())
    for folder in merges.values():
        shutil.rmtree(folder)
    return {
        "num_elements": total,
        "same": {pair: apart[0][pair] / total for pair in pairs},
        "one_ulp": {pair: apart[1][pair] / total for pair in pairs},
        "error": {label: math.sqrt(square / scale) for label, square in squares.items()},
        "moved": {label: count / total for label, count in moved.items()},
    }


def _slerp(tensors: list[torch.Tensor], config: Config) -> torch.Tensor:
    """The arc from A to B at t; the line where their cosine is beyond 0.9995."""
    return _arc(*tensors, t=config["parameters"]["t"], parallel=0.9995)


def _nuslerp(tensors: list[torch.Tensor], config: Config) -> torch.Tensor:
    """The arc from A to B at w_B / (w_A + w_B)."""
    first, second = _weights(config)
    return _arc(*tensors, t=second / (first + second), parallel=1 - 1e-15)


def _arc(a: torch.Tensor, b: torch.Tensor, *, t: float, parallel: float) -> torch.Tensor:
    cosine = _dot(a, b) / (_norm(a) * _norm(b))
    if abs(cosine) > parallel:
        return _sum([a, b], [1 - t, t])
    theta = math.acos(cosine)
    return _sum([a, b], [math.sin(share * theta) / math.sin(theta) for share in (1 - t, t)])


def _multislerp(tensors: list[torch.Tensor], config: Config) -> torch.Tensor:
    """From the mean direction m along T = Σ w_i (u_i - <u_i, m> m), as far as T is long; times Σ w_i ‖v_i‖."""
    weights = [weight / sum(_weights(config)) for weight in _weights(config)]
    radius = sum(weight * _norm(tensor) for weight, tensor in zip(weights, tensors, strict=True))
    units = [tensor.div_(_norm(tensor) + _EPS) for tensor in tensors]
    mean = _sum(units, weights)
    mean /= _norm(mean)
    tangent = _sum(units, weights) - sum(w * _dot(u, mean) for w, u in zip(weights, units, strict=True)) * mean
    length = _norm(tangent) + _EPS
    return (mean * math.cos(length)).add_(tangent, alpha=math.sin(length) / length).mul_(radius)


def _karcher(tensors: list[torch.Tensor], config: Config) -> torch.Tensor:
    """Steps along T = Σ θ_i / sin θ_i (u_i - cos θ_i m) / K, cos θ_i = <u_i, m>, until T is short; times mean ‖v_i‖."""
    share = 1 / len(tensors)
    radius = share * sum(_norm(tensor) for tensor in tensors)
    units = [tensor.div_(_norm(tensor)) for tensor in tensors]
    mean = _sum(units, [share] * len(units))
    mean /= _norm(mean)
    for _ in range(10):  # this and 1e-5 are the method's defaults
        cosines = [min(1.0, max(-1.0, _dot(unit, mean))) for unit in units]
        angles = [math.acos(cosine) for cosine in cosines]
        factors = [share * angle / math.sin(angle) if angle >= 1e-5 else 0.0 for angle in angles]
        tangent = _sum(units, factors)
        tangent.sub_(mean, alpha=sum(f * cosine for f, cosine in zip(factors, cosines, strict=True)))
        length = _norm(tangent)
        if length < 1e-5:
            break
        mean.mul_(math.cos(length)).add_(tangent, alpha=math.sin(length) / length)
        mean /= _norm(mean)
    return mean.mul_(radius)


def _model_stock(tensors: list[torch.Tensor], config: Config) -> torch.Tensor:
    """W_0 + t (mean W_i - W_0), t = K c / (1 + (K-1) c), c the mean cosine between the W_i - W_0."""
    base, *others = tensors
    offsets = [other.sub_(base) for other in others]
    norms = [_norm(offset) for offset in offsets]
    pairs = list(itertools.combinations(range(len(offsets)), 2))
    cosine = sum(_dot(offsets[i], offsets[j]) / max(norms[i] * norms[j], 1e-6) for i, j in pairs) / len(pairs)
    t = len(offsets) * cosine / (1 + (len(offsets) - 1) * cosine)
    return base + _sum(offsets, [t / len(offsets)] * len(offsets))


def _arcee_fusion(tensors: list[torch.Tensor], config: Config) -> torch.Tensor:
    """The other model's element where |Δ| times its row's divergence reaches median + 1.5 · (q3 - q1); else W_0's."""
    base, other = tensors
    p, q = other.softmax(dim=-1).add_(_EPS), base.softmax(dim=-1).add_(_EPS)
    divergence = q.div_(p).log_().neg_().mul_(p).sum(dim=-1, keepdim=True)
    del p, q
    importance = (other - base).abs_().mul_(divergence)
    ranks = [int(share * (importance.numel() - 1)) for share in (0.25, 0.5, 0.75)]
    lowest, median, highest = np.partition(importance.reshape(-1).numpy(), ranks)[ranks].tolist()
    return torch.where(importance >= median + 1.5 * (highest - lowest), other, base)


FORMULAS: dict[str, Callable[[list[torch.Tensor], Config], torch.Tensor]] = {
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
    "arcee_fusion": _arcee_fusion,
}
"""Take the base, if any, and the models, all of which they may overwrite; no tensor of the models is zero."""


def _weights(config: Config) -> list[float]:
    return [entry["parameters"]["weight"] for entry in config["models"]]


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.dot(a.reshape(-1), b.reshape(-1)).item()


def _norm(tensor: torch.Tensor) -> float:
    return math.sqrt(_dot(tensor, tensor))


def _sum(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, factor in zip(tensors, factors, strict=True):
        total.add_(tensor, alpha=factor)
    return total


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    titles = ["method", "ours = float64", "1 ulp", "mergekit = float64", "1 ulp", "ours = mergekit"]
    titles += ["mergekit, 1 thread = 2 threads", "error, least", "error, ours", "error, mergekit"]
    print(f"\n| {' | '.join(titles)} |\n|---{'|---:' * (len(titles) - 1)}|")
    for row in rows:
        cells = [row["method"]]
        for pair in (f"{left} = {right}" for left, right in PAIRS):
            shares = [row["same"].get(pair), *([row["one_ulp"].get(pair)] if EXACT in pair else [])]
            cells += ["" if share is None else f"{100 * share:.3f} %" for share in shares]
        cells += [f"{row['error'][label]:.4f}" if label in row["error"] else "" for label in (EXACT, OURS, PEER)]
        print(f"| {' | '.join(cells)} |")
    for row in (row for row in rows if row["method"] == "arcee_fusion"):
        taken = ", ".join(f"{label} {100 * share:.2f} %" for label, share in row["moved"].items())
        print(f"\narcee_fusion, elements other than the base's: {taken}")
    print(f"\n{rows[0]['num_elements']} elements; machine: {', '.join(f'{k} {v}' for k, v in machine().items())}")


if __name__ == "__main__":
    main()
