"""Plans for machines that are not here, and from configs alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from cases import write_case

import largemerge
from largemerge.cli import main
from largemerge.errors import LargemergeError
from largemerge.regression.planning.cost import disk_seconds
from largemerge.regression.planning.rates import GPUS, Cluster, find_gpu, parse_rate
from largemerge.regression.planning.workload import OffloadTo

GEOMETRIES = Path(__file__).parents[3] / "configs"
CLUSTER = Cluster(2, 4, GPUS["h100"], interconnect=50e9, disk=2e9, host_memory=2**40)
LENGTH = 24


def bare_case(folder: Path, architecture: str = "llama") -> dict[str, Any]:
    """Three folders with a `config.json` and nothing else; data that does not exist."""
    models = []
    for seed in range(3):
        model = tiny_models.perturbed(architecture, seed).to(torch.float32)
        model.config.dtype = torch.float32
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / f"bare{seed}")
        calibration = {"data": str(folder / "nowhere.jsonl")}
        models.append({"model": str(folder / f"bare{seed}"), "name": f"model{seed}", "calibration": calibration})
    numbers = {"num_samples": 14, "max_length": LENGTH, "batch_size": 7}
    return {"merge_method": "regmean_plusplus", "models": models, "calibration": numbers}


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "t5", "mixtral"])
def test_a_config_says_what_the_checkpoint_would(tmp_path: Path, architecture: str) -> None:
    config = bare_case(tmp_path, architecture)
    plan = largemerge.plan(config, from_config=True)
    assert not plan.problems and any("config.json alone" in note for note in plan.notes)
    models = [tiny_models.perturbed(architecture, seed) for seed in range(3)]
    kind = tiny_models.ARCHITECTURES[architecture].kind
    case = write_case(tmp_path, models, [tiny_models.inputs(kind, 14, seed) for seed in range(3)])
    real = largemerge.plan(case.config, probe=False)
    assert (plan.bytes_read, plan.bytes_written) == (real.bytes_read, real.bytes_written)
    assert {tensor.name: tensor.rule for tensor in plan.tensors} == {t.name: t.rule for t in real.tensors}


def test_a_folder_without_weights_is_no_checkpoint_otherwise(tmp_path: Path) -> None:
    config = bare_case(tmp_path)
    with pytest.raises(LargemergeError, match="no weights in"):
        largemerge.plan(config)
    with pytest.raises(LargemergeError, match="no weights in"):
        largemerge.merge(config, tmp_path / "out")


def test_images_need_more_than_a_config(tmp_path: Path) -> None:
    with pytest.raises(LargemergeError, match="only models of text"):
        largemerge.plan(bare_case(tmp_path, "clip_vision"), from_config=True)


def test_more_and_faster_machines_take_less_time(tmp_path: Path) -> None:
    config = bare_case(tmp_path)

    def seconds(cluster: Cluster) -> dict[str, float]:
        plan = largemerge.plan(config, cluster=cluster, from_config=True)
        assert not plan.problems and not plan.measured and len(plan.ranks) == cluster.num_ranks
        return dict(plan.seconds)

    few, many = seconds(replace(CLUSTER, num_nodes=1)), seconds(CLUSTER)
    assert many["gram"] < few["gram"] and few["communicate"] > 0
    slow = seconds(replace(CLUSTER, interconnect=1e6))
    assert slow["communicate"] > 10 * many["communicate"] and slow["gram"] == many["gram"]
    assert seconds(replace(CLUSTER, disk=1e6))["read"] > many["read"]
    assert seconds(replace(CLUSTER, gpu=GPUS["b200"]))["right_hand_side"] < many["right_hand_side"]
    one = seconds(Cluster(1, 1, GPUS["h100"], interconnect=50e9, disk=2e9, host_memory=2**40))
    assert one["communicate"] < few["communicate"]


def test_communication_is_bytes_over_the_slowest_link(tmp_path: Path) -> None:
    config = bare_case(tmp_path)
    crawl = replace(CLUSTER, interconnect=1e3)
    plan = largemerge.plan(config, cluster=crawl, from_config=True)
    most = max(rank.bytes_communicated for rank in plan.ranks)
    assert plan.seconds["communicate"] == pytest.approx(most / 800, rel=0.01)
    within = largemerge.plan(config, cluster=replace(crawl, num_nodes=1), from_config=True)
    assert within.seconds["communicate"] < plan.seconds["communicate"] / 1000, "the interconnect is not used"


def test_a_gpu_writes_while_it_computes() -> None:
    assert disk_seconds(10.0, 5.0, 100.0, ahead=True, in_background=False) == {"read": 1.0, "write": 5.0}
    assert disk_seconds(10.0, 5.0, 100.0, ahead=False, in_background=False) == {"read": 10.0, "write": 5.0}
    hidden = disk_seconds(10.0, 5.0, 100.0, ahead=True, in_background=True)
    assert hidden == pytest.approx({"read": 1.0, "write": 0.5}), "a tenth"
    slow = disk_seconds(10.0, 5.0, 3.0, ahead=True, in_background=True)
    assert slow == pytest.approx({"read": 8.0, "write": 4.0}), "all but what computing hides"
    assert disk_seconds(0.0, 0.0, 0.0, ahead=True, in_background=True) == {"read": 0.0, "write": 0.0}


def test_hidden_states_leave_a_gpu_that_is_too_small(tmp_path: Path) -> None:
    config = bare_case(tmp_path)
    config["calibration"] |= {"num_samples": 4000}
    roomy = largemerge.plan(config, cluster=CLUSTER, from_config=True)
    assert roomy.placement.hidden_states is OffloadTo.DEVICE
    tight = replace(CLUSTER, gpu=replace(GPUS["h100"], memory=int(roomy.ranks[0].device / 0.92 * 0.8)))
    plan = largemerge.plan(config, cluster=tight, from_config=True)
    assert plan.placement != roomy.placement and not plan.problems
    none = replace(CLUSTER, gpu=replace(GPUS["h100"], memory=1000))
    problems = largemerge.plan(config, cluster=none, from_config=True).problems
    assert len(problems) == 1 and "expected GPUs with more memory" in problems[0]


def test_large_geometries_are_planned_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(GEOMETRIES / "llama-3.1-70b-three-experts.yaml")
    arguments = ["plan", config, "--from-config", "--num-nodes", "2", "--gpus-per-node", "4", "--json"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--interconnect", "400Gbit"])
    assert done.value.code == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["ranks"]) == 8 and not plan["seconds_are_measured"]
    assert plan["bytes_written"] == pytest.approx(70.55e9 * 2, rel=0.001), "70.55 billion parameters in bfloat16"
    assert plan["bytes_read"] == 3 * plan["bytes_written"]
    assert all(20 < rank["device"] / 2**30 < 70 for rank in plan["ranks"])
    assert 60 < sum(plan["seconds"].values()) < 3600


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gpu", "h9000"], "--gpu h9000: not known; expected one of a100"),
        (["--interconnect", "fast"], "expected a rate such as 400Gbit"),
        (["--disk-rate", "0GB/s"], "--disk-rate '0GB/s'"),
        (["--num-nodes", "0"], "--num-nodes 0: expected a whole number from 1 to 4096"),
        (["--num-nodes", "2", "--num-ranks", "4"], "--num-ranks is for this machine"),
    ],
)
def test_wrong_machines_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(json.dumps(bare_case(tmp_path)))
    with pytest.raises(SystemExit) as done:
        main(["plan", str(path), "--from-config", *arguments])
    assert done.value.code == 2 and text in capsys.readouterr().err


def test_rates_and_names() -> None:
    assert parse_rate("400Gbit", "x") == parse_rate("400 Gbps", "x") == 50e9
    assert parse_rate("2GB/s", "x") == 2e9 and parse_rate("1.5TB", "x") == 1.5e12
    assert find_gpu("H100") is GPUS["h100"]
    rates = CLUSTER.rates(torch.bfloat16), CLUSTER.rates(torch.float32)
    assert rates[0].linear > 5 * rates[1].linear and rates[0].product == rates[1].product
