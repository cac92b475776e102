"""Task simplex unlearning: the mean of task vectors subtracted, and their spread in the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from cases import weights_in
from data_free_cases import config_of, load, write_models
from data_free_reference import check, models, task_vectors

import largemerge
from largemerge import LargemergeError
from largemerge.data_free import engine, tasks
from largemerge.data_free.methods import base as pieces_module
from largemerge.data_free.methods.base import Piece
from largemerge.data_free.methods.table import METHODS, merge_tensors
from largemerge.data_free.methods.unlearning import spread, spread_in_words, spread_sums

WEIGHTS = [1.0, 2.0, 0.5]


def expected_spread(deltas: list[torch.Tensor], weights: list[float]) -> dict[str, Any]:
    """Computes the spread of whole task vectors, densely."""
    flat = torch.stack([delta.flatten() for delta in deltas])
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    mean = shares @ flat
    far = (flat - mean).norm(dim=1)
    cosines = torch.nn.functional.normalize(flat, dim=1) @ torch.nn.functional.normalize(flat, dim=1).T
    return {
        "mean_norm": mean.norm().item(),
        "norms": flat.norm(dim=1).tolist(),
        "deviations": far.tolist(),
        "spread": math.sqrt((shares @ far.square()).item()) / mean.norm().item(),
        "cosines": [cosines[i, :i].tolist() for i in range(len(flat))],
    }


def check_spread(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        for one, other in zip(*(of if isinstance(of, list) else [of] for of in (found[name], value)), strict=True):
            assert one == pytest.approx(other, rel=tolerance, abs=1e-6), name


@pytest.mark.parametrize("shape", [(37, 24), (29,), (5, 3, 4), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weighted_mean_is_subtracted(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, tensors = models(3, shape)
    base, tensors = base.to(dtype), [tensor.to(dtype) for tensor in tensors]
    deltas = task_vectors(base, tensors)
    check(merge_tensors("task_simplex", tensors, base), base, -sum(deltas) / 3)
    mean = sum(weight * delta for weight, delta in zip(WEIGHTS, deltas, strict=True)) / sum(WEIGHTS)
    options: dict[str, Any] = {"per_model": {"weight": WEIGHTS}, "lambda": 0.7}
    check(merge_tensors("task_simplex", tensors, base, **options), base, -0.7 * mean)


def test_one_task_vector_is_negation() -> None:
    base, (one,) = models(1, (30, 20))
    negated = merge_tensors("task_arithmetic", [one], base, per_model={"weight": [-1.0]})
    assert torch.allclose(merge_tensors("task_simplex", [one], base), negated, atol=1e-6)
    assert torch.allclose(merge_tensors("task_simplex", [one] * 3, base), negated, atol=1e-6)
    assert torch.equal(merge_tensors("task_simplex", [base] * 2, base), base)


def sums_of(base: torch.Tensor, tensors: list[torch.Tensor], weights: list[float], rows: int) -> list[float]:
    """Adds up the sums of pieces of some rows."""
    pieces = [
        Piece([tensor[start : start + rows] for tensor in tensors], base[start : start + rows], {"weight": weights}, {})
        for start in range(0, len(base), rows)
    ]
    return [sum(column) for column in zip(*(spread_sums(piece) for piece in pieces), strict=True)]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [37, 5])
def test_spread(count: int, rows: int) -> None:
    base, tensors = models(count, (37, 24))
    weights = [1.0, 2.0, 0.5, 1.0, 3.0][:count]
    found = spread(sums_of(base, tensors, weights, rows))
    check_spread(found, expected_spread(task_vectors(base, tensors), weights))


def test_spread_of_equal_task_vectors_and_of_none() -> None:
    base, (one,) = models(1, (37, 24))
    same = spread(sums_of(base, [one, one], [1.0, 1.0], 10))
    assert same["spread"] <= 1e-6 and same["cosines"][1][0] == pytest.approx(1)
    assert "cosines from 1.00 to 1.00" in spread_in_words(same)
    nothing = spread(sums_of(base, [base, one, 2 * base - one], [1.0] * 3, 10))
    assert nothing["cosines"][1] == [None] and nothing["cosines"][2][1] == pytest.approx(-1, abs=1e-6)
    none = spread(sums_of(base, [base, base], [1.0] * 2, 10))
    assert none["spread"] is None and none["mean_norm"] == 0
    assert spread_in_words(none) == "there is one task vector, or they add up to 0"


def config_at(folder: Path) -> Path:
    """Writes a configuration with weights; several parts are made of it."""
    write_models(folder)
    config = config_of(folder, "task_simplex", base_model=str(folder / "model0"), parameters={"lambda": 0.5})
    for entry, weight in zip(config["models"], WEIGHTS, strict=True):
        entry["parameters"] = {"weight": weight}
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def report_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "merge_report.json").read_text())
    return found


def test_the_report_has_the_spread_of_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_ELEMENTS", 300)
    report = largemerge.merge(config_at(tmp_path), tmp_path / "out")
    load(tmp_path / "out")
    base, *others = (weights_in(tmp_path / f"model{number}") for number in range(4))
    told = report_in(tmp_path / "out")
    for name, tensor in weights_in(tmp_path / "out").items():
        deltas = task_vectors(base[name], [other[name] for other in others])
        mean = sum(weight * delta for weight, delta in zip(WEIGHTS, deltas, strict=True)) / sum(WEIGHTS)
        check(tensor, base[name], -0.5 * mean)
        check_spread(told["tensors"][name]["spread"], expected_spread(deltas, WEIGHTS))
    whole = [
        torch.cat([(other[name].double() - base[name].double()).flatten() for name in sorted(base)]) for other in others
    ]
    overall = told["spread"]
    assert overall.pop("models") == [str(tmp_path / f"model{number}") for number in (1, 2, 3)]
    assert overall.pop("num_tensors") == len(base)
    check_spread(overall, expected_spread(whole, WEIGHTS))
    assert "of the length of their mean" in str(report)


def test_a_resumed_merge_has_measured_all_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config_at(tmp_path)
    monkeypatch.setattr(engine, "PART_BYTES", 9000)
    merge_one = engine.Merger.__call__

    def fails(merger: engine.Merger, task: tasks.Task) -> None:
        if task.name == "model.layers.2.post_attention_layernorm.weight":  # one of the smallest, which come last
            raise LargemergeError("the power went out")
        merge_one(merger, task)

    monkeypatch.setattr(engine.Merger, "__call__", fails)
    with pytest.raises(LargemergeError, match="power"):
        largemerge.merge(path, tmp_path / "out")
    monkeypatch.setattr(engine.Merger, "__call__", merge_one)
    assert largemerge.merge(path, tmp_path / "out", resume=True).resumed_parts > 0
    largemerge.merge(path, tmp_path / "whole")
    resumed, whole = report_in(tmp_path / "out"), report_in(tmp_path / "whole")
    assert resumed["spread"] == whole["spread"] and resumed["tensors"] == whole["tensors"]
    assert processes.lasting(tmp_path / "out") == processes.lasting(tmp_path / "whole")


def test_ranks_measure_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config_at(tmp_path)
    command = ["merge", path, tmp_path / "out", "--quiet"]
    processes.run_ranks(command, tmp_path, 2, {processes.PART_BYTES: "9000"})
    monkeypatch.setattr(engine, "PART_BYTES", 9000)
    largemerge.merge(path, tmp_path / "alone")
    assert processes.lasting(tmp_path / "out") == processes.lasting(tmp_path / "alone")
    ranks, alone = report_in(tmp_path / "out"), report_in(tmp_path / "alone")
    assert ranks["spread"] == alone["spread"] and ranks["tensors"] == alone["tensors"]


def test_layers_of_other_models_are_not_added_to_those_of_these(tmp_path: Path) -> None:
    write_models(tmp_path)
    names = [str(tmp_path / f"model{number}") for number in range(4)]
    slices = [
        {"sources": [{"model": name, "layer_range": of} for name in (names[0], *some)]}
        for some, of in ((names[1:3], [0, 2]), (names[2:4], [2, 3]))
    ]
    config = {"merge_method": "task_simplex", "base_model": names[0], "slices": slices}
    largemerge.merge(config, tmp_path / "out")
    told = report_in(tmp_path / "out")
    assert told["spread"]["models"] == names[1:3]
    of_these = [name for name in told["tensors"] if ".layers.0." in name or ".layers.1." in name or "embed" in name]
    assert told["spread"]["num_tensors"] == len(of_these)
    assert all("spread" in tensor for tensor in told["tensors"].values())


def test_only_unlearning_measures() -> None:
    assert [name for name, row in METHODS.items() if row.measurement is not None] == ["task_simplex"]
