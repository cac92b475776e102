"""The memory and workers of a data-free merge, and how long it is expected to take."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from cases import weights_in

import largemerge
from largemerge.cli import main
from largemerge.data_free import loader, resources
from largemerge.data_free.methods import base
from largemerge.errors import LargemergeError
from largemerge.machine import memory_in_use


@pytest.fixture(autouse=True)
def four_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(resources, "_SMALL_BYTES", 0)  # no more of them than threads
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Saves three models with matrices of some megabytes; only to be read."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 2000}
    for seed in range(3):
        torch.manual_seed(seed)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=4))
        model.save_pretrained(folder / f"model{seed}")
    return [str(folder / f"model{seed}") for seed in range(3)]


@pytest.fixture
def config(models: list[str]) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": models[0],
        "models": [{"model": model} for model in models[1:]],
        "parameters": {"weight": 0.5, "density": 0.4},
    }


def test_less_memory_less_at_once_the_same_bits(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = memory_in_use(torch.device("cpu")).host_anonymous  # later it would be more, or less
    monkeypatch.setattr(resources, "baseline_bytes", lambda *_: before)
    monkeypatch.setattr(base, "PIECE_ELEMENTS", 8_000)
    monkeypatch.setattr(loader, "_SPAN_BYTES", 64_000)
    free = largemerge.merge(config, tmp_path / "free")
    assert free.plan.num_workers == 4 and free.plan.resources.kept_bytes == loader.KEPT_BYTES
    assert not any("workers at a time" in note for note in free.plan.notes)
    least = sorted((loader.worker_bytes("ties", task, 0) for task in free.plan.tasks), reverse=True)
    for fewer, limit in ((0, free.plan.peak_bytes - 1), (2, before + int(1.125 * sum(least[:2])))):
        out = tmp_path / f"limited-{fewer}"
        limited = largemerge.merge(config | {"memory": {"host": limit}}, out)
        assert limited.plan.peak_bytes <= limit
        assert (limited.plan.num_workers, limited.plan.resources.kept_bytes) <= (4 - fewer, loader.KEPT_BYTES)
        assert limited.plan.resources != free.plan.resources
        assert any("workers at a time" in note for note in limited.plan.notes)
        merged, expected = weights_in(out), weights_in(tmp_path / "free")
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert limited.plan.resources.kept_bytes == 0 and limited.bytes_read > free.bytes_read, "read twice, not kept"


def test_more_workers_than_cores_only_where_they_take_little(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "_SMALL_BYTES", 2 << 30)
    ample = largemerge.merge(config, tmp_path / "ample")
    assert ample.plan.num_workers == 8
    monkeypatch.setattr(resources, "_SMALL_BYTES", 0)
    few = largemerge.merge(config, tmp_path / "few")
    assert few.plan.num_workers == 4 and not few.plan.notes
    factored = config | {"merge_method": "tsv_m", "parameters": {}}
    assert largemerge.plan(factored, device="cpu", probe=False).num_workers == 4
    merged, expected = weights_in(tmp_path / "few"), weights_in(tmp_path / "ample")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_many_cores_hold_no_more(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(16)
    least = largemerge.plan(config, probe=False)
    assert least.num_workers == 4 and not least.notes
    one = max(loader.worker_bytes("ties", task, loader.KEPT_BYTES) for task in least.tasks)
    monkeypatch.setattr(resources, "_SMALL_BYTES", least.peak_bytes + 2 * one)
    plan = largemerge.plan(config, probe=False)
    assert 6 <= plan.num_workers < 16 and plan.peak_bytes <= resources._SMALL_BYTES and not plan.notes


def test_too_little_is_refused_and_says_what_would_do(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as done:
        main(["merge", str(path), str(tmp_path / "out"), "--memory-host", "1MiB", "--quiet"])
    error = capsys.readouterr().err
    assert done.value.code == 2 and "memory.host: " in error and "is too little: ties needs" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(LargemergeError, match=r"memory.disk: unknown key"):
        largemerge.plan(config | {"memory": {"disk": "scratch"}})


def test_a_limit_may_change_on_the_way(config: dict[str, Any], tmp_path: Path) -> None:
    plan = largemerge.plan(config, probe=False)
    out = tmp_path / "out"
    largemerge.merge(config, out)
    report = largemerge.merge(config | {"memory": {"host": plan.peak_bytes * 2}}, out, force=True)
    assert report.plan.num_workers == 4


@pytest.mark.parametrize("method", ["ties", "iso_c", "opcm"])
def test_the_plan_says_how_long(config: dict[str, Any], method: str, capsys: pytest.CaptureFixture[str]) -> None:
    config["merge_method"] = method
    if method != "ties":
        config["parameters"] = {}
    plan = largemerge.plan(config)
    assert set(plan.seconds) == {"disk", "computing", "total"} and min(plan.seconds.values()) > 0
    assert plan.seconds["total"] == max(plan.seconds["disk"], plan.seconds["computing"])
    assert plan.to_json()["seconds"] == plan.seconds
    assert largemerge.plan(config, probe=False).seconds == {}


HOLES = """
import torch
from largemerge.machine import _anonymous_bytes, return_freed_memory, reuse_freed_memory

reuse_freed_memory(sparingly=False)
kept, freed = [], []
for _ in range(100):
    freed.append(torch.ones(500_000))
    kept.append(torch.ones(2_000))
freed.clear()
before = _anonymous_bytes(0)
return_freed_memory(above=before + (1 << 20))
untouched = _anonymous_bytes(0)
return_freed_memory(above=before - (1 << 20))
print(before - untouched, untouched - _anonymous_bytes(0))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep freed memory in their own ways")
def test_freed_memory_goes_back_where_a_merge_holds_more_than_its_plan() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    within, above = map(int, done.stdout.split()[-2:])
    assert within < 1 << 20 and above > 150 << 20, (within, above)
