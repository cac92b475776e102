"""Merges that are killed and go on; merges by several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_models
import torch
import transformers as tf
import yaml
from data_free_cases import config_of, kill_and_resume, load, weighted, write_models
from transformers import LlamaForCausalLM

import largemerge
from largemerge import LargemergeError
from largemerge.data_free import engine, tasks


def long_config(folder: Path) -> Path:
    """Writes the configuration of a merge of several parts, in shards."""
    for seed in range(3):
        torch.manual_seed(seed)
        sizes = tiny_models.LLM | {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 512}
        LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(folder / f"model{seed}")
    config = config_of(folder, "ties", [1, 2], base_model=str(folder / "model0"))
    config["parameters"] = {"weight": 0.5, "density": 0.3}
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("kill_at", [6, 9, 14, 18])
def test_a_killed_merge_goes_on(tmp_path: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_resume(long_config(tmp_path), tmp_path, kill_at, 200_000, monkeypatch)
    load(tmp_path / "out")


def test_finished_parts_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = long_config(tmp_path)
    monkeypatch.setattr(engine, "PART_BYTES", 200_000)
    merge_one = engine.Merger.__call__
    done = 0

    def fails(merger: engine.Merger, task: tasks.Task) -> None:
        nonlocal done
        if task.name.startswith("model.layers.20."):
            raise LargemergeError("the power went out")
        done += 1
        merge_one(merger, task)

    monkeypatch.setattr(engine.Merger, "__call__", fails)
    with pytest.raises(LargemergeError, match="power"):
        largemerge.merge(path, tmp_path / "out")
    monkeypatch.setattr(engine.Merger, "__call__", merge_one)
    report = largemerge.merge(path, tmp_path / "out", resume=True)
    assert report.resumed_parts > 3 and report.bytes_read < 2 * report.plan.bytes_read


@pytest.mark.parametrize(("method", "size"), [("ties", 2), ("dare_ties", 3), ("linear", 4)])
def test_ranks_share_the_tensors(tmp_path: Path, method: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    config = weighted(tmp_path, method, **({} if method == "linear" else {"base_model": str(tmp_path / "model0")}))
    config["parameters"] = {} if method == "linear" else {"density": 0.5}
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    command = ["merge", path, tmp_path / "out", "--quiet", "--max-shard-size", "20KB"]
    processes.run_ranks(command, tmp_path, size, {processes.PART_BYTES: "9000"})
    monkeypatch.setattr(engine, "PART_BYTES", 9000)
    alone = largemerge.merge(path, tmp_path / "alone", max_shard_bytes=20_000)
    assert processes.lasting(tmp_path / "out") == processes.lasting(tmp_path / "alone"), "bit for bit"
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert len(report["ranks"]) == size and report["bytes_read"] == alone.bytes_read


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others(tmp_path: Path) -> None:
    path = long_config(tmp_path)
    command = ["merge", path, tmp_path / "out", "--quiet", "--max-shard-size", "1MB"]
    small = {processes.PART_BYTES: "200000", "LARGEMERGE_RANK_TIMEOUT": "3"}
    tensor = "model.layers.12.mlp.up_proj.weight"  # one of them has it
    ranks = processes.start_ranks([command] * 2, tmp_path, small, hanging={0: tensor, 1: tensor})
    assert all(processes.finish(process) != 0 for process in ranks)
    log = "".join((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    assert "hangs: for 3 s it has" in log and "--resume" in log and "Traceback" not in log
    processes.run_ranks([*command, "--resume"], tmp_path, 3, small)
    load(tmp_path / "out")


@pytest.mark.parametrize("where", ["scratch/model.safetensors", "model.safetensors"])
def test_what_was_lost_is_done_again(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a method that goes over all tensors twice: merged task vectors, or the output."""
    write_models(tmp_path)
    config = config_of(tmp_path, "opcm", base_model=str(tmp_path / "model0"))
    monkeypatch.setattr(engine, "PART_BYTES", 9000)
    write = engine.write_piece
    done = 0

    def fails(writer: engine.ShardWriter, task: tasks.Task, *rest: Any) -> None:
        nonlocal done
        if writer.folder.name == ".largemerge":
            done += 1
            if done > 8:
                raise LargemergeError("the power went out")
        write(writer, task, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "write_piece", fails)
        with pytest.raises(LargemergeError, match="power"):
            largemerge.merge(config, tmp_path / "out")
    names = [line["part"] for line in processes.journal(tmp_path / "out")]
    assert "part 0" in names and "unscaled part 0" in names, names
    file = tmp_path / "out" / ".largemerge" / where
    file.write_bytes(bytes(file.stat().st_size))
    resumed = largemerge.merge(config, tmp_path / "out", resume=True).resumed_parts
    assert resumed < len(names)
    largemerge.merge(config, tmp_path / "unbroken")
    assert processes.lasting(tmp_path / "out") == processes.lasting(tmp_path / "unbroken")
