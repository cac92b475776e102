"""FusionBench's own data-free methods on CLIP vision towers, as a process.

    PYTHON peers/fusionbench_literature.py JOB.json OUT

PYTHON is that of an environment with `fusion-bench` and `transformers<5`. JOB.json names the base, the candidates,
their Fisher diagonals and the matrices that are none for us (`literature_methods.py` writes it). What every method has
made goes to OUT/METHOD.safetensors. FusionBench's classes do the work; of Fisher merging its function does, since the
class computes the diagonals from data.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from fusion_bench.method import ISO_C_Merge, ISO_CTS_Merge, TaskSingularVectorMerging, WUDIMerging
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.opcm.opcm_general import OPCM
from fusion_bench.modelpool import BaseModelPool
from safetensors.torch import load_file, save_file

PACKAGES = ("fusion-bench", "torch", "transformers")


def main() -> None:
    """Merges by every method, saves, reports."""
    job_file, out = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    exclude = job["exclude"]
    opcm = {"save_on_every_step": False, "evaluate_on_every_step": False, "seed": 0}
    algorithms = {
        "tsv_m": TaskSingularVectorMerging(alpha=1.0, exclude_keys=exclude),
        "iso_c": ISO_C_Merge(scaling_factor=1.0, exclude_keys=exclude),
        "iso_cts": ISO_CTS_Merge(scaling_factor=1.0, common_space_fraction=0.8, exclude_keys=exclude),
        "wudi": WUDIMerging(iter_num=job["wudi_steps"], exclude_keys=exclude),
        "opcm": OPCM(alpha=0.5, shuffle_order=False, **opcm),
    }
    out.mkdir(exist_ok=True)
    for method, algorithm in algorithms.items():
        merged = algorithm.run(_pool(job))
        _save(merged.state_dict(), out / f"{method}.safetensors")
    _save(_fisher(job), out / "fisher.safetensors")
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    (out / "peer.json").write_text(json.dumps({"versions": versions}))


def _pool(job: dict[str, Any]) -> BaseModelPool:
    loader = "transformers.CLIPVisionModel.from_pretrained"
    folders = {"_pretrained_": job["base"], **job["models"]}
    return BaseModelPool(
        {name: {"_target_": loader, "pretrained_model_name_or_path": path} for name, path in folders.items()}
    )


def _fisher(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    models = [load_file(Path(folder) / "model.safetensors") for folder in job["models"].values()]
    diagonals = [load_file(file) for file in job["fisher"].values()]
    merged: dict[str, torch.Tensor] = merging_with_fisher_weights(
        models_to_merge_param_dict={name: [model[name] for model in models] for name in models[0]},
        models_to_merge_fisher_weights_list=diagonals,
        fisher_scaling_coefficients=torch.ones(len(models)),
        normalize_fisher_weight=False,
        minimal_fisher_weight=0.0,
    )
    return merged


def _save(state: dict[str, torch.Tensor], file: Path) -> None:
    floating = {name: tensor.detach().contiguous() for name, tensor in state.items() if tensor.is_floating_point()}
    save_file(floating, file)


if __name__ == "__main__":
    main()
