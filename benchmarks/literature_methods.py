"""The data-free methods of the literature: time, memory, the cost of their SVDs, agreement with FusionBench.

    python benchmarks/literature_methods.py --geometry 1.1b --num-layers 4 --work DIR    # 4 GB of disk, half an hour
    python benchmarks/literature_methods.py --geometry 1.1b --methods iso_c fisher --no-peer --work DIR
    python benchmarks/literature_methods.py --no-peer --work DIR                          # a smoke test

Times are those of K = 3 models of equal sizes and a base, merged by the command line in a process of its own that
begins with no input in the system's cache, `plan` and imports included. Of methods that need singular vectors, the
work of the merge (its time without preparation) is set beside the bare decompositions (`bare_factors.py`), measured in
the same run with as many workers. Agreement is ‖ours - FusionBench's‖ / ‖FusionBench's - base‖ over all tensors of
small CLIP vision towers in float32, FusionBench's classes in an environment of their own. Two tensors are treated in
another way there, and left out: the position embeddings, which are no matrix here, by FusionBench's own `exclude_keys`;
of OPCM, the class embedding, which FusionBench takes from the first model, since no leaf module holds it. Of WUDI,
FusionBench's Adam is compared with our minimum by the loss that both lower, too. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from bare_factors import WAYS, bare_seconds
from environments import OWN_TORCH, make_environment
from largemerge.data_free.methods.base import Base
from largemerge.data_free.methods.table import LITERATURE
from measure import drop_from_cache, machine, run_measured
from synthetic_clip import Geometry, make_checkpoints
from synthetic_llama import GEOMETRIES, Inputs, write_inputs

HERE = Path(__file__).parent
PEER_REQUIREMENTS = ("fusion-bench==0.2.33", "transformers<5")
NUM_MODELS = 3
FACTORED = ("tsv_m", "iso_c", "iso_cts", "opcm")
SMALL_TOWER = Geometry(256, 1024, 3, 4, patch_size=32)
PEER_METHODS = ("tsv_m", "iso_c", "iso_cts", "opcm", "wudi", "fisher")
CLASS_EMBEDDING = "vision_model.embeddings.class_embedding"
POSITIONS = "vision_model.embeddings.position_embedding.weight"
WUDI_STEPS = 400
"""FusionBench's default."""


def main() -> None:
    """Makes, merges, compares, prints."""
    arguments = _arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    geometry = GEOMETRIES[arguments.geometry]
    geometry = dataclasses.replace(geometry, num_layers=arguments.num_layers or geometry.num_layers)
    models = _synthetic(work / "inputs", Inputs(geometry, NUM_MODELS + 1, num_samples=1, length=8))
    rows = []
    for method in arguments.methods:
        row = _measure(method, models, work, arguments.device)
        if method in FACTORED and arguments.device == "cpu":
            ways = [way for way in WAYS if way != "lapack" or arguments.lapack]
            row["bare_seconds"] = {way: bare_seconds(method, way, geometry, NUM_MODELS) for way in ways}
        rows.append(row)
        print(json.dumps(row), flush=True)
    agreement = _agreement(work, arguments.torch) if arguments.peer else {}
    _print(rows, agreement)
    result = {"geometry": arguments.geometry, "num_layers": geometry.num_layers, "rows": rows, "agreement": agreement}
    result["workers"] = torch.get_num_threads()
    print(json.dumps({"benchmark": "literature_methods", "machine": machine(), **result}))
    if not arguments.keep:
        shutil.rmtree(work / "inputs")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Data-free methods of the literature; see the top of this file.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny", help="of synthetic models (%(default)s)")
    parser.add_argument("--num-layers", type=int, help="fewer blocks than the geometry has")
    parser.add_argument("--methods", nargs="*", choices=LITERATURE, default=sorted(LITERATURE), help="(default: all)")
    parser.add_argument("--device", default="cpu", help="where matrices are merged: auto, cpu, cuda:0, … (%(default)s)")
    parser.add_argument("--lapack", action="store_true", help="measure LAPACK's SVDs, too")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for all files")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without FusionBench")
    parser.add_argument("--torch", default=OWN_TORCH, help="requirement for FusionBench's environment (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="do not delete synthetic models")
    return parser.parse_args()


def _synthetic(folder: Path, inputs: Inputs) -> list[Path]:
    """The first one serves as the base."""
    names = [folder / f"candidate-{index}" for index in range(inputs.num_models)]
    marker = folder / "made.json"
    wanted = json.dumps(dataclasses.asdict(inputs))
    if not marker.is_file() or marker.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        write_inputs(folder, inputs)
        marker.write_text(wanted)
    return names


def _config(method: str, models: Sequence[Path], fisher: Sequence[Path]) -> dict[str, Any]:
    config: dict[str, Any] = {"merge_method": method}
    config |= {"base_model": str(models[0])} if LITERATURE[method].base is Base.REQUIRED else {}
    config["models"] = [{"model": str(model)} for model in models[1:]]
    for entry, path in zip(config["models"], fisher, strict=False):
        entry["parameters"] = {"fisher": str(path)}
    if method == "wudi":  # the minimum, which FusionBench's steps lead to
        config["parameters"] = {"exp_time": "unlimited", "truncate_rank_ratio": 1}
    return config


def _diagonals(models: Sequence[Path], folder: Path) -> list[Path]:
    """Squares of the weights, in the place of Fisher diagonals."""
    found = []
    for model in models:
        target = folder / model.name
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(model.glob("*.safetensors")):
            save_file({name: tensor.square() for name, tensor in load_file(file).items()}, target / file.name)
        found.append(target)
    return found


def _merge(config: dict[str, Any], work: Path, out: Path, device: str = "cpu") -> list[str]:
    path = work / f"{config['merge_method']}.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return [sys.executable, "-m", "largemerge", "merge", str(path), str(out), "--device", device, "--force", "--quiet"]


def _measure(method: str, models: Sequence[Path], work: Path, device: str) -> dict[str, Any]:
    out, squares = work / "merged", work / "fisher"
    fisher = _diagonals(models[1:], squares) if method == "fisher" else []
    drop_from_cache([path for model in (*models, *fisher) for path in model.glob("*.safetensors")])
    command = _merge(_config(method, models, fisher), work, out, device)
    options = ["--device", device, "--json"]
    planned = subprocess.run([*command[:3], "plan", command[4], *options], capture_output=True, check=True, text=True)
    measured = run_measured(command, work / "ours.log")
    report = json.loads((out / "merge_report.json").read_text())
    shutil.rmtree(out)
    shutil.rmtree(squares, ignore_errors=True)
    return {
        "method": method,
        "seconds": measured.seconds,
        "merge_seconds": report["seconds"]["total"] - report["seconds"]["preparation"],
        "peak_anonymous_bytes": measured.peak_anonymous_bytes,
        "planned_peak_bytes": report["plan"]["peak_bytes"],
        "planned_seconds": json.loads(planned.stdout)["seconds"]["total"],
        "peak_device_bytes": report["peak_bytes"]["device"],
        "planned_device_bytes": report["plan"]["device_bytes"],
        "bytes_read": report["bytes_read"],
        "bytes_written": report["bytes_written"],
        "scratch_bytes": report["plan"]["scratch_bytes"],
    }


def _agreement(work: Path, torch_requirement: str) -> dict[str, Any]:
    """By method: how far our merge of small CLIP towers is from FusionBench's."""
    python = make_environment(work / "fusionbench", PEER_REQUIREMENTS, torch_requirement)
    base, *models = make_checkpoints(
        work / "towers", SMALL_TOWER, [f"task{number}" for number in range(NUM_MODELS)]
    ).values()
    fisher = {model.name: work / "towers" / f"{model.name}.fisher.safetensors" for model in models}
    for seed, file in enumerate(fisher.values()):
        generator = torch.Generator().manual_seed(seed)
        state = load_file(base / "model.safetensors")
        save_file({name: torch.rand(tensor.shape, generator=generator) for name, tensor in state.items()}, file)
    job = {
        "base": str(base),
        "models": {model.name: str(model) for model in models},
        "fisher": {name: str(file) for name, file in fisher.items()},
        "exclude": [POSITIONS],
        "wudi_steps": WUDI_STEPS,
    }
    (work / "job.json").write_text(json.dumps(job))
    script = HERE / "peers" / "fusionbench_literature.py"
    with (work / "peer.log").open("w") as log:
        command = [str(python), str(script), str(work / "job.json"), str(work / "theirs")]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    found: dict[str, Any] = {}
    for method in PEER_METHODS:
        config = _config(method, [base, *models], list(fisher.values()) if method == "fisher" else [])
        with (work / "ours.log").open("w") as log:
            command = _merge(config, work, work / "merged")
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        ours = load_file(work / "merged" / "model.safetensors")
        theirs = load_file(work / "theirs" / f"{method}.safetensors")
        found[method] = _distance(base, ours, theirs, CLASS_EMBEDDING if method == "opcm" else None)
        if method == "wudi":
            found[method] |= _wudi_losses(base, models, ours, theirs)
    return found | {"versions": json.loads((work / "theirs" / "peer.json").read_text())["versions"]}


def _distance(
    base: Path, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], without: str | None
) -> dict[str, Any]:
    """‖ours - theirs‖ / ‖theirs - base‖, over all tensors but one, and of the worst one."""
    origin = load_file(base / "model.safetensors")
    assert set(ours) == set(origin) and set(origin) <= set(theirs)
    squares = {
        name: (
            (ours[name].double() - theirs[name].double()).square().sum().item(),
            (theirs[name].double() - tensor.double()).square().sum().item(),
        )
        for name, tensor in origin.items()
        if name != without
    }
    worst = max(squares, key=lambda name: squares[name][0] / (squares[name][1] or 1.0))
    total = [sum(column) for column in zip(*squares.values(), strict=True)]
    return {
        "overall": (total[0] / total[1]) ** 0.5,
        "worst": (squares[worst][0] / (squares[worst][1] or 1.0)) ** 0.5,
        "worst_tensor": worst,
    }


def _wudi_losses(
    base: Path, models: Sequence[Path], ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> dict[str, float]:
    """The loss of the paper, summed over all weight matrices: of the sum of task vectors, of Adam's, of the minimum."""
    origin = load_file(base / "model.safetensors")
    states = [load_file(model / "model.safetensors") for model in models]
    losses = dict.fromkeys(("loss_of_the_start", "loss_of_theirs", "loss_of_ours"), 0.0)
    for name, tensor in origin.items():
        if tensor.dim() != 2 or name == POSITIONS:
            continue
        deltas = [state[name].double() - tensor.double() for state in states]
        ends = [sum(deltas), theirs[name].double() - tensor.double(), ours[name].double() - tensor.double()]
        for key, merged in zip(losses, ends, strict=True):
            products = [((merged - delta) @ delta.T).square().sum() / delta.square().sum() for delta in deltas]
            losses[key] += sum(products).item()
    return losses


def _print(rows: Sequence[dict[str, Any]], agreement: dict[str, Any]) -> None:
    columns = ["method", "time", "merging", "planned", "peak, anonymous", "planned", "peak on the GPU", "planned"]
    columns += ["/ values", "/ both", "/ LAPACK's SVDs"]
    print(f"\n| {' | '.join(columns)} |\n|---{'|---:' * (len(columns) - 1)}|")
    for row in rows:
        bare = row.get("bare_seconds", {})
        cells = [f"`{row['method']}`", f"{row['seconds']:.1f} s", f"{row['merge_seconds']:.1f} s"]
        cells.append(f"{row['planned_seconds']:.1f} s")
        cells += [f"{row[key] / 2**30:.2f} GiB" for key in ("peak_anonymous_bytes", "planned_peak_bytes")]
        cells += [f"{row[key] / 2**30:.2f} GiB" for key in ("peak_device_bytes", "planned_device_bytes")]
        cells += [f"{row['merge_seconds'] / bare[way]:.2f}" if way in bare else "" for way in WAYS]
        print(f"| {' | '.join(cells)} |")
    if agreement:
        print("\n| method | from FusionBench's, all tensors | the worst tensor |")
        print("|---|---:|---:|")
        for method in PEER_METHODS:
            print(f"| `{method}` | {agreement[method]['overall']:.1e} | {agreement[method]['worst']:.1e} |")
        print(f"\nWUDI's loss: {', '.join(f'{k} {v:.4g}' for k, v in agreement['wudi'].items() if 'loss' in k)}")
    print(f"\nmachine: {', '.join(f'{key} {value}' for key, value in machine().items())}")


if __name__ == "__main__":
    main()
