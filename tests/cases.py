"""A case: candidates and calibration files on disk, the same in memory, and a configuration that merges them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import largemerge
from largemerge.cli import main


@dataclass
class Case:
    """Candidates on disk, and the same in memory.

    Attributes:
        config: For `largemerge.merge`.
        models: The candidates.
        inputs: Their calibration tensors.
        folder: Where everything lies.
    """

    config: dict[str, Any]
    models: list[PreTrainedModel]
    inputs: list[dict[str, torch.Tensor]]
    folder: Path

    @property
    def weights(self) -> list[float]:
        return [model["parameters"]["weight"] for model in self.config["models"]]

    def write_yaml(self, name: str = "config.yaml") -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(self.config))
        return path


MakeCase = Callable[..., Case]

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja")
"""Files of a tokenizer, as far as a merge is concerned."""


def write_case(
    folder: Path,
    models: list[PreTrainedModel],
    inputs: list[dict[str, torch.Tensor]],
    /,
    *,
    method: str = "regmean_plusplus",
    batch_size: int | None = None,
    weights: list[float] | None = None,
    **parameters: Any,
) -> Case:
    """Writes candidates and their calibration data into a folder; more keywords go under `parameters`.

    Batches are two of each candidate's samples, unlike each other, unless a test says how large they are.
    """
    batch_size = batch_size or max(len(next(iter(tensors.values()))) for tensors in inputs) // 2 + 1
    entries = []
    for index, (model, tensors) in enumerate(zip(models, inputs, strict=True)):
        model.save_pretrained(folder / f"model{index}")
        save_file(tensors, folder / f"data{index}.safetensors")
        entries.append(
            {
                "model": str(folder / f"model{index}"),
                "calibration": {"data": str(folder / f"data{index}.safetensors")},
                "parameters": {"weight": weights[index] if weights else 1.0},
            }
        )
    config = {
        "merge_method": method,
        "models": entries,
        "calibration": {"batch_size": batch_size},
        "parameters": parameters,
    }
    return Case(config, models, inputs, folder)


def with_base(case: Case, architecture: str) -> PreTrainedModel:
    """Writes a base beside a case's models, and names it."""
    base = tiny_models.build(architecture, seed=7)
    base.save_pretrained(case.folder / "pretrained")
    case.config["base_model"] = str(case.folder / "pretrained")
    return base


def auto_device() -> str:
    """Where merges compute that are not told.

    No constant: it opens the GPU, which is of no use any more to processes that fork from this one.
    """
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_merged(case: Case, out: Path) -> PreTrainedModel:
    """The merge in `out`, on the CPU; there must be a weight for every parameter, and no other."""
    model, info = type(case.models[0]).from_pretrained(out, output_loading_info=True, device_map="cpu")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def merge_and_load(case: Case, name: str = "merged", **options: Any) -> PreTrainedModel:
    largemerge.merge(case.config, case.folder / name, **options)
    return load_merged(case, case.folder / name)


def assert_close(merged: PreTrainedModel, expected: PreTrainedModel, tolerance: float = 1e-4) -> None:
    """Every tensor agrees within a relative error."""
    found = merged.state_dict()
    for name, tensor in expected.state_dict().items():
        error = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by their names on disk."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def files_in(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if not path.is_dir()}


def rewrite_weights(folder: Path, rewrite: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replaces the tensors in `model.safetensors`, as another program might have saved them."""
    path = folder / "model.safetensors"
    save_file(rewrite(load_file(path)), path, metadata={"format": "pt"})


def write_pair(folder: Path) -> Case:
    """A case of two tiny Llamas with a few samples each."""
    models = [tiny_models.perturbed("llama", seed) for seed in range(2)]
    return write_case(folder, models, [tiny_models.inputs("text", 4, seed) for seed in range(2)])


def exit_code(*arguments: object) -> int:
    """Runs the command in this process, and returns the code that it exits with."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def touch(folder: Path, *names: str) -> None:
    """Files whose content says where they come from."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        origin = f"{folder.name} {name}"
        document: dict[str, Any] = {"origin": origin}
        if name == "tokenizer.json":  # of a kind that no library here knows: it is copied as it is
            model = {"type": "OfTheFuture", "vocab": {"a": 0}, "origin": origin}
            document = {"added_tokens": [], "model": model}
        (folder / name).write_text(json.dumps(document) if name.endswith(".json") else origin)


def origins(out: Path, *names: str) -> list[str]:
    return [origin(out / name).split()[0] if (out / name).exists() else "" for name in names]


def origin(file: Path) -> str:
    """What `touch` has written."""
    if file.suffix != ".json":
        return file.read_text()
    document = json.loads(file.read_text())
    return str(document.get("model", document)["origin"])


def names_in(folder: Path) -> set[str]:
    return set(files_in(folder))


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "merge_report.json").read_text())
    return report


def average(case: Case, name: str) -> torch.Tensor:
    tensors = [model.state_dict()[name].double() for model in case.models]
    shares = [weight / sum(case.weights) for weight in case.weights]
    return sum(share * tensor for share, tensor in zip(shares, tensors, strict=True))
