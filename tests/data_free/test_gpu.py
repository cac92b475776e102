"""Data-free merges on a GPU; most of these tests need one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from cases import weights_in
from processes import PART_BYTES, finish, start

import largemerge
from largemerge.data_free import resources
from largemerge.data_free.loader import host_bytes_beside_gpu
from largemerge.data_free.methods.table import METHODS
from largemerge.data_free.resources import Accelerator, device_bytes
from largemerge.errors import LargemergeError

OF_MATRICES = [name for name, method in METHODS.items() if method.matrix_formula is not None]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
STEPS = {"merge_method": "linear", "parameters": {"weight": 1}, "post": ["svc", {"subspace_boosting": {"beta": 0.1}}]}
SHARD = 2_000_000


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Saves three models with square, wide and tall matrices."""
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 500}
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    base.save_pretrained(tmp_path / "base")
    for seed in range(3):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.01)
        base.save_pretrained(tmp_path / f"model{seed}")
    models = [{"model": str(tmp_path / f"model{seed}")} for seed in range(3)]
    return {"merge_method": "tsv_m", "base_model": str(tmp_path / "base"), "models": models}


def pretend(monkeypatch: pytest.MonkeyPatch, max_bytes: int) -> None:
    """Makes plans believe that there is a GPU with some memory."""
    monkeypatch.setattr(resources, "open_accelerator", lambda *_: (Accelerator(GPU, max_bytes), ""))


def test_the_plan_for_a_gpu_holds_no_more_than_it_has(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = largemerge.plan(config, device="cpu", probe=False)
    assert (on_cpu.device.type, on_cpu.resources.device_bytes) == ("cpu", 0)
    pretend(monkeypatch, 1 << 40)
    ample = largemerge.plan(config, device="cpu", probe=False)
    assert ample.device == GPU and ample.num_workers == 4
    assert not any("workers at a time" in note for note in ample.notes)
    there = sorted((device_bytes("tsv_m", task) for task in ample.tasks), reverse=True)
    assert ample.resources.device_bytes == sum(there[:4]) and there[-1] == 0, "vectors stay on the CPU"
    assert ample.to_json()["device"] == "cuda" and ample.to_json()["device_bytes"] == ample.resources.device_bytes
    pretend(monkeypatch, sum(there[:2]))
    two = largemerge.plan(config, device="cpu", probe=False)
    assert (two.num_workers, two.resources.device_bytes) == (2, sum(there[:2]))
    assert any("on cuda" in note and "workers at a time: 2" in note for note in two.notes)
    pretend(monkeypatch, there[0] - 1)
    small = largemerge.plan(config, device="cpu", probe=False)
    largest = max(small.tasks, key=lambda task: device_bytes("tsv_m", task))
    assert 0 < small.resources.device_bytes < there[0] and not small.resources.accelerator.computes("tsv_m", largest)


@pytest.mark.parametrize("method", ["ties", "tsv_m"])
def test_a_device_that_is_not_there(config: dict[str, Any], method: str) -> None:
    config["merge_method"] = method
    config["parameters"] = {"weight": 0.5} if method == "ties" else {}
    with pytest.raises(LargemergeError, match=r"--device cuda:99: .*expected auto, cpu or cuda:0"):
        largemerge.plan(config, device="cuda:99")


@on_a_gpu
@pytest.mark.parametrize("method", OF_MATRICES)
def test_on_a_gpu_as_on_the_cpu(config: dict[str, Any], tmp_path: Path, method: str) -> None:
    config["merge_method"] = method
    expected = largemerge.merge(config, tmp_path / "cpu", device="cpu")
    before = torch.cuda.memory_allocated()  # by other tests
    report = largemerge.merge(config, tmp_path / "gpu")
    largemerge.merge(config, tmp_path / "again")
    assert (expected.plan.device.type, report.plan.device.type) == ("cpu", "cuda")
    assert before < report.peak.device <= before + report.plan.resources.device_bytes
    assert report.to_json()["machine"]["device_name"] and expected.peak.device == 0
    found, again = weights_in(tmp_path / "gpu"), weights_in(tmp_path / "again")
    base = weights_in(tmp_path / "base")
    for name, tensor in weights_in(tmp_path / "cpu").items():
        moved = (tensor - base[name]).norm()
        assert (found[name] - tensor).norm() <= 1e-4 * moved, name  # each is as near to the formula
        assert torch.equal(found[name], again[name]), name


def test_steps_after_any_merge_are_planned_for_a_gpu(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config |= STEPS
    pretend(monkeypatch, 1 << 40)
    plan = largemerge.plan(config, device="cpu", probe=False)
    assert plan.device == GPU and plan.num_workers == 4
    there = sorted((device_bytes("linear", task) for task in plan.tasks), reverse=True)
    assert plan.resources.device_bytes == sum(there[:4]) and there[-1] == 0, "vectors stay on the CPU"
    for task in plan.tasks:
        if task.post is not None:
            beside = host_bytes_beside_gpu("linear", task, 0)
            assert beside > host_bytes_beside_gpu("tsv_m", task, 0), "merged on the CPU"


@on_a_gpu
def test_steps_after_any_merge_on_a_gpu_as_on_the_cpu(config: dict[str, Any], tmp_path: Path) -> None:
    config |= STEPS
    largemerge.merge(config, tmp_path / "cpu", device="cpu")
    report = largemerge.merge(config, tmp_path / "gpu")
    assert report.plan.device.type == "cuda" and report.peak.device > 0
    found, base = weights_in(tmp_path / "gpu"), weights_in(tmp_path / "base")
    for name, tensor in weights_in(tmp_path / "cpu").items():
        assert (found[name] - tensor).norm() <= 1e-4 * (tensor - base[name]).norm() + 1e-9, name


@on_a_gpu
def test_what_is_too_large_for_the_gpu_is_the_cpus(config: dict[str, Any], tmp_path: Path) -> None:
    largemerge.merge(config, tmp_path / "cpu", device="cpu")
    report = largemerge.merge(config | {"memory": {"device": 1 << 20}}, tmp_path / "small")
    (note,) = (note for note in report.plan.notes if "are too little" in note)
    assert "on the CPU" in note and "model.layers.*.mlp.up_proj.weight" in note
    found = weights_in(tmp_path / "small")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights_in(tmp_path / "cpu").items())
    assert report.plan.resources.device_bytes == 0


@on_a_gpu
def test_elementwise_methods_say_that_they_stay_on_the_cpu(config: dict[str, Any]) -> None:
    config |= {"merge_method": "ties", "parameters": {"weight": 0.5}}
    plan = largemerge.plan(config, device="cuda", probe=False)
    assert plan.device.type == "cpu" and any("element by element" in note for note in plan.notes)
    assert not any("element by element" in note for note in largemerge.plan(config, probe=False).notes)


@on_a_gpu
@pytest.mark.parametrize("method", ["iso_c", "opcm"])
def test_killed_on_a_gpu_and_resumed(config: dict[str, Any], tmp_path: Path, method: str) -> None:
    path = tmp_path / "merge.yml"
    config["merge_method"] = method
    path.write_text(json.dumps(config))
    small = {PART_BYTES: "300000"}
    command = ["merge", path, tmp_path / "out", "--quiet", "--max-shard-size", SHARD]
    assert finish(start(command, tmp_path / "log", kill_at=30, environment=small)) == -9
    largemerge.merge(config, tmp_path / "unbroken")
    with pytest.raises(LargemergeError, match="device"):
        largemerge.merge(config, tmp_path / "out", resume=True, max_shard_bytes=SHARD, device="cpu")
    assert finish(start([*command, "--resume"], tmp_path / "log", environment=small)) == 0
    found = weights_in(tmp_path / "out")
    for name, tensor in weights_in(tmp_path / "unbroken").items():
        assert torch.equal(found[name], tensor), name
