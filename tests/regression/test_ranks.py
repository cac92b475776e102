"""One merge by several processes is the merge by one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import processes
import psutil
import pytest
import tiny_models
import torch
from cases import load_merged, weights_in, write_case
from processes import (
    NOTHING_SHARED,
    assert_agree,
    device_of_ranks,
    environment_of_ranks,
    finish,
    make_uneven_case,
    merging,
    run_ranks,
    start_ranks,
)
from safetensors.torch import load_file, save_file

import largemerge
from largemerge.distributed.shared_memory import SHARED_MEMORY


@pytest.mark.parametrize(
    ("architecture", "method", "size"),
    [
        ("llama", "regmean_plusplus", 2),
        ("llama", "regmean", 3),
        ("t5", "regmean_plusplus", 2),
        pytest.param("bert", "regmean", 2, marks=pytest.mark.slow),
        pytest.param("gpt2", "regmean_plusplus", 4, marks=pytest.mark.slow),
        pytest.param("clip_vision", "regmean_plusplus", 2, marks=pytest.mark.slow),
        ("mixtral", "regmean_plusplus", 2),
    ],
)
def test_ranks_agree_with_one(tmp_path: Path, architecture: str, method: str, size: int) -> None:
    case = make_uneven_case(tmp_path, architecture, method)
    before = set(SHARED_MEMORY.glob("largemerge-*"))  # a rank that another test has killed may leave some
    alone = largemerge.merge(case.config, tmp_path / "alone", device=device_of_ranks(size))
    run_ranks(merging(case, tmp_path / "out"), tmp_path, size)
    assert_agree(tmp_path / "out", tmp_path / "alone")
    load_merged(case, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    linears = {name: entry for block in report["blocks"].values() for name, entry in block["linears"].items()}
    assert set(linears) == set(alone.linears)
    for name, entry in alone.linears.items():
        assert linears[name]["tokens"] == entry["tokens"], name
        for key, distance in entry["relative_distance_to_candidates"].items():
            assert linears[name]["relative_distance_to_candidates"][key] == pytest.approx(distance, rel=1e-3, abs=1e-5)
    assert len(report["ranks"]) == size
    assert all(rank["bytes_communicated"] > 0 for rank in report["ranks"])
    assert sum(rank["bytes_read"] for rank in report["ranks"]) == report["bytes_read"]
    blocks = {name: entry["bytes_read"] for name, entry in report["blocks"].items()}
    assert blocks == {name: entry["bytes_read"] for name, entry in alone.blocks.items()}, "each is read once"
    assert all(rank["reads_shared_with"] == list(range(size)) for rank in report["ranks"])
    left = set(SHARED_MEMORY.glob("largemerge-*")) - before
    assert not [path for path in left if not psutil.pid_exists(int(path.name.split("-")[1]))], "nothing may be left"


def test_the_plan_says_what_ranks_move_and_hold(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus", num_candidates=2)
    device = device_of_ranks(4)
    plan = largemerge.plan(case.config, device=device, probe=False, num_ranks=4)
    assert [rank.rank for rank in plan.ranks] == [0, 1, 2, 3]
    first, *_, last = plan.ranks
    assert last.bytes_communicated > first.bytes_communicated, "the second candidate's ranks add up its Grams first"
    alone = largemerge.plan(case.config, device=device, probe=False)
    assert alone.ranks == () and alone.to_json()["ranks"] == []
    run_ranks(merging(case, tmp_path / "out"), tmp_path, 4)
    largemerge.merge(case.config, tmp_path / "alone", device=device)
    assert_agree(tmp_path / "out", tmp_path / "alone")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    for planned, measured in zip(plan.ranks, report["ranks"], strict=True):
        assert planned.bytes_communicated == pytest.approx(measured["bytes_communicated"], rel=0.02)
    tokens = next(iter(report["blocks"].values()))["linears"].values()
    assert sum(rank.num_rows for rank in plan.ranks) >= sum(next(iter(tokens))["tokens"].values())
    assert all(rank.operations < sum(other.operations for other in plan.ranks) for rank in plan.ranks)


def test_ranks_that_share_no_memory(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus")
    case.write_yaml()
    largemerge.merge(case.config, tmp_path / "alone", device=device_of_ranks(3))
    run_ranks(merging(case, tmp_path / "out"), tmp_path, 3, {NOTHING_SHARED: "1"})
    assert_agree(tmp_path / "out", tmp_path / "alone")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert all(rank["reads_shared_with"] == [] for rank in report["ranks"])


def test_more_ranks_than_batches(tmp_path: Path) -> None:
    models = [tiny_models.perturbed("llama", seed) for seed in range(2)]
    case = write_case(tmp_path, models, [tiny_models.inputs("text", 6, seed) for seed in range(2)])
    case.write_yaml()
    largemerge.merge(case.config, tmp_path / "alone", device=device_of_ranks(4))
    run_ranks(merging(case, tmp_path / "out"), tmp_path, 4)
    assert_agree(tmp_path / "out", tmp_path / "alone")


def test_the_same_ranks_give_the_same_bits(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus")
    for name in ("one", "two"):
        run_ranks(merging(case, tmp_path / name), tmp_path, 3)
    one, two = weights_in(tmp_path / "one"), weights_in(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["regmean_plusplus", "regmean"])
def test_killed_ranks_are_resumed_by_others(tmp_path: Path, method: str) -> None:
    case = processes.make_long_case(tmp_path, method)
    case.write_yaml()
    alike = environment_of_ranks(3)
    run_ranks(merging(case, tmp_path / "unbroken"), tmp_path, 2, alike)
    for size in (2, 3):
        out = tmp_path / f"out{size}"
        ranks = start_ranks([merging(case, out)] * 2, tmp_path, alike)
        assert processes.wait_until(lambda out=out: len(processes.parts(out)) >= 3, ranks[0])
        for process in ranks:
            process.kill()
            process.join(60)
        assert 3 <= len(processes.parts(out)) < len(processes.PARTS)
        run_ranks(merging(case, out, "--resume"), tmp_path, size, alike)
        assert_agree(out, tmp_path / "unbroken")
    unbroken, resumed = weights_in(tmp_path / "unbroken"), weights_in(tmp_path / "out2")
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_ranks_with_different_configs_are_told_so(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus")
    case.config["parameters"]["ridge"] = 0.5
    other = case.write_yaml("other.yaml")
    command = merging(case, tmp_path / "out")
    ranks = start_ranks([command, [command[0], other, *command[2:]]], tmp_path)
    assert [finish(process) for process in ranks] == [2, 2]
    log = (tmp_path / "rank0.log").read_text()
    assert "rank 1: config → parameters → ridge was" in log and "expected the same" in log
    assert (tmp_path / "rank1.log").read_text() == "", "rank 0 alone prints it"
    assert not (tmp_path / "out").exists()


def test_a_mistake_that_all_have_is_told_once(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus")
    case.config["models"][1]["model"] = str(tmp_path / "nowhere")
    case.write_yaml()
    ranks = start_ranks([merging(case, tmp_path / "out")] * 2, tmp_path)
    assert [finish(process) for process in ranks] == [2, 2]
    assert (tmp_path / "rank0.log").read_text().count("does not exist") == 1
    assert (tmp_path / "rank1.log").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gone", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)]
)
def test_a_rank_that_is_gone_ends_the_others(tmp_path: Path, gone: int, number: signal.Signals) -> None:
    case = processes.make_long_case(tmp_path)
    case.write_yaml()
    ranks = start_ranks([merging(case, tmp_path / "out")] * 2, tmp_path, environment={"LARGEMERGE_RANK_TIMEOUT": "2"})
    assert processes.wait_until(lambda: len(processes.parts(tmp_path / "out")) >= 2, ranks[0])
    assert ranks[gone].pid is not None
    os.kill(ranks[gone].pid, number)
    assert finish(ranks[1 - gone]) == 2
    ranks[gone].kill()
    log = (tmp_path / f"rank{1 - gone}.log").read_text()
    assert f"rank {gone} " in log and "--resume" in log and "Traceback" not in log, log
    run_ranks(merging(case, tmp_path / "out", "--resume"), tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["regmean_plusplus", "linear"])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_is_gone_at_any_moment_ends_the_others(
    tmp_path: Path, gone: int, number: signal.Signals, method: str
) -> None:
    """From the start, where it has not come yet, to the end; the others never wait longer than the limits say."""
    case = processes.make_long_case(tmp_path)
    if method == "linear":
        models = [{"model": model["model"], "parameters": {"weight": 1}} for model in case.config["models"]]
        case.config = {"merge_method": "linear", "models": models}
    case.write_yaml()
    for moment in (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0):
        out = tmp_path / f"out{moment}"
        limit = {"LARGEMERGE_RANK_TIMEOUT": "2"}
        ranks = start_ranks([merging(case, out)] * 2, tmp_path, limit)
        time.sleep(moment)
        assert ranks[gone].pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.kill(ranks[gone].pid, number)
        start = time.monotonic()
        code = finish(ranks[1 - gone])
        seconds = time.monotonic() - start
        ranks[gone].kill()
        ranks[gone].join(60)
        log = tmp_path / f"rank{1 - gone}.log"
        told = log.read_text()
        if code == 0:
            assert (out / "config.json").exists(), told
            continue
        names_it = f"rank {gone} " in told or "another rank was stopped" in told  # before they have met
        assert (code, "Traceback" in told) == (2, False) and names_it, (moment, told)
        assert seconds < 22, (moment, told)  # 15 s to meet, the limit, and some to end
        log.unlink()
        if out.exists() and not (out / "config.json").exists():
            run_ranks(merging(case, out, "--resume"), tmp_path, 2)


def test_what_is_told_is_told_once(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus", num_candidates=2)
    arguments = merging(case, tmp_path / "out", "--json")
    arguments.remove("--quiet")
    run_ranks(arguments, tmp_path, 2)
    first, second = ((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    assert first.count('"resumed_parts": 0') == 1 and second == ""
    arguments.remove("--json")
    run_ranks([*arguments, "--force"], tmp_path, 2)
    first, second = ((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    assert first.count("21 solved") == 1 and second == ""
    for log in tmp_path.glob("*.log"):
        log.unlink()
    ranks = start_ranks([["merge", tmp_path / "nowhere.yaml", tmp_path / "other"]] * 2, tmp_path)
    assert [finish(process) for process in ranks] == [2, 2]
    first, second = ((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    assert first.count("no such configuration file") == 1 and "rank" not in first.partition(":")[0] and second == ""


def test_a_mistake_of_one_rank_is_told_by_the_first(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus", num_candidates=2)
    command = merging(case, tmp_path / "out")
    ranks = start_ranks([command, [command[0], tmp_path / "nowhere.yaml", *command[2:]]], tmp_path)
    assert [finish(process) for process in ranks] == [2, 2]
    first, second = ((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    assert first.startswith("largemerge: rank 1: ") and "no such configuration file" in first and second == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_rank_that_hangs_ends_the_others(tmp_path: Path, hanging: int) -> None:
    case = processes.make_long_case(tmp_path)
    case.write_yaml()
    command = merging(case, tmp_path / "out")
    limit = {"LARGEMERGE_RANK_TIMEOUT": "2"}
    ranks = start_ranks([command] * 2, tmp_path, limit, hanging={hanging: "model.layers.3"})
    assert all(finish(process) not in (None, 0) for process in ranks)
    assert "hangs: for 2 s it has" in (tmp_path / f"rank{hanging}.log").read_text()
    logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)]
    assert f"rank {hanging} " in logs[0] and "processes.hang, line" in logs[0] and "Traceback" not in logs[0]
    assert "model.layers.2" in processes.parts(tmp_path / "out") and "--resume" in logs[0]
    run_ranks(merging(case, tmp_path / "out", "--resume"), tmp_path, 2)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, broken: int) -> None:
    case = processes.make_long_case(tmp_path)
    case.write_yaml()
    path = next(Path(case.config["models"][broken]["model"]).glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.3.mlp.up_proj" in name)
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, path, {"format": "pt"})
    ranks = start_ranks([merging(case, tmp_path / "out")] * 2, tmp_path, {"LARGEMERGE_RANK_TIMEOUT": "5"})
    codes = [finish(process) for process in ranks]
    logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)]
    assert all(code > 0 for code in codes), (codes, logs)
    assert "model.layers.3" in logs[0] and "not finite" in logs[0] and "Traceback" not in "".join(logs), logs
    assert "model.layers.2" in processes.parts(tmp_path / "out")
    left = list(SHARED_MEMORY.glob(f"largemerge-{ranks[0].pid}-*"))
    assert not left, "nothing may be left in shared memory"
