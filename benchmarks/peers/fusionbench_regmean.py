"""FusionBench's RegMean++ of CLIP vision towers, as a process that can be measured.

    PYTHON peers/fusionbench_regmean.py JOB.json OUT

PYTHON is that of an environment with `fusion-bench` and `transformers<5`. JOB.json names the base, the candidates,
their pixels and the settings (`clip_vs_fusionbench.py` writes it). The merged tower goes to OUT, and what FusionBench
says of its time to OUT/peer.json.

Only what cannot work here is replaced: no zero-shot head is made (it needs CLIP's text tower, and merging does not
read it), pixels come from a file instead of through an image processor, and a table of parameter names is mended,
without which the class of release 0.2.33 cannot be made at all.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fusion_bench.method import RegMeanAlgorithmForCLIPPlusPlus, RegMeanAlgorithmPlusPlus
from fusion_bench.modelpool import BaseModelPool
from safetensors.torch import load_file
from torch.utils.data import Dataset, TensorDataset

PACKAGES = ("fusion-bench", "torch", "transformers", "lightning")
MERGING = "merging models"
"""FusionBench's own name for what its profiler times: everything but loading and saving models."""


class LocalPool(BaseModelPool):
    """Models in folders, pixels in files."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._calibration = job["calibration"]
        folders = {"_pretrained_": job["base"], **job["models"]}
        loader = "transformers.CLIPVisionModel.from_pretrained"
        super().__init__(
            {name: {"_target_": loader, "pretrained_model_name_or_path": path} for name, path in folders.items()}
        )

    def load_train_dataset(self, dataset_name: str, *args: Any, **kwargs: Any) -> Dataset[Any]:
        """Pairs of pixels and a label that nobody reads."""
        pixels = load_file(self._calibration[dataset_name])["pixel_values"]
        return TensorDataset(pixels, torch.zeros(len(pixels), dtype=torch.long))

    def load_processor(self, *args: Any, **kwargs: Any) -> None:
        """None: the pixels are ready."""


class RegMeanPlusPlus(RegMeanAlgorithmForCLIPPlusPlus):
    """Without a zero-shot head."""

    # In the release a plain dict stands here, without the parent's names, where a two-way one is read.
    _config_mapping = RegMeanAlgorithmPlusPlus._config_mapping

    def on_regmean_start(self) -> None:
        """Nothing."""


def main() -> None:
    """Merges, saves, reports."""
    job_file, out = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    torch.manual_seed(0)  # FusionBench shuffles the images
    algorithm = RegMeanPlusPlus(
        num_regmean_examples=job["num_images"],
        exclude_param_names_regex=[],
        reduce_non_diagonal_ratio=job["off_diagonal_scale"],
        weight_transpose=True,
        dataloader_kwargs={"batch_size": job["batch_size"], "num_workers": 0},
    )
    start = time.perf_counter()
    merged = algorithm.run(LocalPool(job))
    seconds = time.perf_counter() - start
    merged.save_pretrained(out)
    report = {
        "merge_seconds": sum(algorithm.profiler.recorded_durations[MERGING]),
        "run_seconds": seconds,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    (out / "peer.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
