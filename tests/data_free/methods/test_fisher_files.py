"""Fisher diagonals that lie in files; ranges of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from cases import weights_in
from safetensors.torch import save_file

import largemerge
from largemerge import ConfigError, LargemergeError
from largemerge.cli import main

Weights = dict[str, torch.Tensor]


def write_models(folder: Path) -> list[Weights]:
    """Saves two models and their diagonals: a file, and a folder of two files."""
    found = []
    for seed in (1, 2):
        tiny_models.perturbed("llama", seed).save_pretrained(folder / f"model{seed}")
        generator = torch.Generator().manual_seed(seed)
        weights = weights_in(folder / f"model{seed}")
        found.append({name: torch.rand(tensor.shape, generator=generator) for name, tensor in weights.items()})
    save_file(found[0], folder / "fisher1.safetensors")
    (folder / "fisher2").mkdir()
    names = sorted(found[1])
    save_file({name: found[1][name] for name in names[::2]}, folder / "fisher2" / "a.safetensors")
    save_file({name: found[1][name] for name in names[1::2]}, folder / "fisher2" / "b.safetensors")
    return found


def write_config(folder: Path, **changes: Any) -> Path:
    values = {"fisher": "fisher1.safetensors", "weight": 2.0}
    first = {"model": "model1", "parameters": values | changes}
    second = {"model": "model2", "parameters": {"fisher": "./fisher2"}}
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump({"merge_method": "fisher", "models": [first, second]}))
    return path


def test_diagonals_in_a_file_and_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagonals = write_models(tmp_path)
    path = write_config(tmp_path)
    monkeypatch.chdir("/")
    report = largemerge.merge(path, tmp_path / "out").to_json()
    models = [weights_in(tmp_path / f"model{seed}") for seed in (1, 2)]
    for name, tensor in weights_in(tmp_path / "out").items():
        shares = [2 * diagonals[0][name].double(), diagonals[1][name].double()]
        expected = (shares[0] * models[0][name] + shares[1] * models[1][name]) / (shares[0] + shares[1])
        assert (tensor - expected).norm() <= 1e-6 * expected.norm(), name
    assert report["bytes_read"] == report["plan"]["bytes_read"] == 4 * report["bytes_written"]
    assert set(report["inputs"]) == {
        *(str(tmp_path / name) for name in ("model1", "model2", "fisher1.safetensors", "fisher2")),
    }
    assert set(report["inputs"][str(tmp_path / "fisher2")]["files"]) == {"a.safetensors", "b.safetensors"}


def test_changed_diagonals_are_not_resumed_with(tmp_path: Path) -> None:
    diagonals = write_models(tmp_path)
    path = write_config(tmp_path)
    (tmp_path / "fisher2" / "b.safetensors").unlink()
    save_file({name: -tensor for name, tensor in diagonals[1].items()}, tmp_path / "fisher2" / "a.safetensors")
    with pytest.raises(LargemergeError, match="negative or NaN"):
        largemerge.merge(path, tmp_path / "out")
    save_file(diagonals[1], tmp_path / "fisher2" / "a.safetensors")
    with pytest.raises(LargemergeError, match="cannot be resumed"):
        largemerge.merge(path, tmp_path / "out", resume=True)


def test_mistakes_in_the_files_are_told_all_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diagonals = write_models(tmp_path)
    norm, head, up = "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
    broken = {name: tensor for name, tensor in diagonals[0].items() if name != norm}
    broken[head] = broken[head][:-1].clone()
    broken[up] = broken[up].to(torch.int32)
    save_file(broken, tmp_path / "fisher1.safetensors")
    with pytest.raises(SystemExit) as done:
        main(["merge", str(write_config(tmp_path)), str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert done.value.code == 2 and "3 problems" in told and not (tmp_path / "out").exists()
    flat = " ".join(told.split())
    assert f"has no tensor {norm}" in flat and f"{head} is [63, 16]; expected [64, 16]" in flat
    assert f"{up} is int32; expected a floating-point dtype" in flat


def test_missing_files_and_parameters(tmp_path: Path) -> None:
    write_models(tmp_path)
    with pytest.raises(LargemergeError, match=r"nothing there; expected a .safetensors file, or a folder"):
        largemerge.plan(write_config(tmp_path, fisher="elsewhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LargemergeError, match=r"no .safetensors file in it"):
        largemerge.plan(write_config(tmp_path, fisher="empty"))
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    with pytest.raises(LargemergeError, match="not a safetensors file"):
        largemerge.plan(write_config(tmp_path, fisher="short.safetensors"))
    weights = weights_in(tmp_path / "model1")
    save_file({"lm_head.weight": weights["lm_head.weight"]}, tmp_path / "fisher2" / "c.safetensors")
    with pytest.raises(LargemergeError, match=r"lm_head.weight in several files"):
        largemerge.plan(write_config(tmp_path))
    (tmp_path / "fisher2" / "c.safetensors").unlink()
    with pytest.raises(ConfigError) as error:
        largemerge.plan(write_config(tmp_path, fisher=None))
    place = f"models[0].parameters.fisher: missing for {tmp_path / 'model1'}"
    assert error.value.problems == (f"{place}; expected a .safetensors file, or a folder with some",)
    with pytest.raises(ConfigError) as error:
        largemerge.plan(write_config(tmp_path, weight=0))
    assert error.value.problems == ("models[0].parameters.weight: expected a number above 0, found 0",)


@pytest.mark.parametrize(
    ("method", "parameters", "problem"),
    [
        ("opcm", {"alpha": 1.5}, "alpha: expected a number from 0 to 1, found 1.5"),
        (
            "iso_cts",
            {"common_space_fraction": -1},
            "common_space_fraction: expected a number from 0 to 1, found -1",
        ),
        ("iso_c", {"scaling_factor": "much"}, "scaling_factor: expected a number from -1e+06 to 1e+06, found 'much'"),
        ("tsv_m", {"alpha": True}, "alpha: expected a number from -1e+06 to 1e+06, found True"),
        ("consensus_ta", {"prun_thre_k": 1.5}, "prun_thre_k: expected a whole number from 0, found 1.5"),
        ("ace", {"eps": 0}, "eps: expected a number above 0 and up to 1e+06, found 0"),
        ("localize_and_stitch", {"sparsity": 5}, "sparsity: expected a number above 0 and up to 1, found 5"),
    ],
)
def test_ranges(tmp_path: Path, method: str, parameters: dict[str, Any], problem: str) -> None:
    write_models(tmp_path)
    models = [str(tmp_path / f"model{seed}") for seed in (1, 2)]
    config = {"merge_method": method, "base_model": models[0], "models": [{"model": models[1]}]}
    with pytest.raises(ConfigError) as error:
        largemerge.plan(config | {"parameters": parameters})
    assert error.value.problems == (f"parameters.{problem}",)
    with pytest.raises(LargemergeError):
        largemerge.merge(config | {"parameters": parameters}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(LargemergeError, match="needs one"):
        largemerge.plan({"merge_method": method, "models": [{"model": models[1]}]})
