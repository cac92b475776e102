"""Arguments of the public functions and options of the command line: what is none is told before anything is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import largemerge
from largemerge import ConfigError, LargemergeError
from largemerge.cli import main
from largemerge.devices import choose_device

CONFIG = {"merge_method": "linear", "models": [{"model": "o/a", "parameters": {"weight": 1}}]}

NONSENSE: list[tuple[str, Any, str]] = [
    *(("num_ranks", value, "a whole number from 1 to 4096") for value in (0, -1, 10**9, 10**400, "1", 1.0, True, None)),
    *(("probe", value, "True or False") for value in ("x", 1, None)),
    *(("strict", value, "True or False") for value in ("no", 0)),
    *(("from_config", value, "True or False") for value in (1, [])),
    *(("memory", value, "largemerge.Memory(host=…, device=…)") for value in (5, "4GiB", {}, [])),
    *(("device", value, "auto, cpu or cuda:0") for value in (5, None, [], Path("cpu"))),
    *(("cluster", value, "largemerge.cluster(num_nodes=…)") for value in (8, "h100", {})),
]
MERGE_NONSENSE: list[tuple[str, Any, str]] = [
    *(("out", value, "a folder") for value in (None, 5, "", " ", b"x", [], "a\0b", "x" * 5000, "\ud800")),
    *(("intermediate_dir", value, "a folder") for value in (5, "", "\0")),
    *(("resume", value, "True or False") for value in ("yes", 1, None)),
    *(("force", value, "True or False") for value in ("yes", 1, None)),
    *(("quiet", value, "True or False") for value in ("yes", 1)),
    *(("verify", value, "True or False") for value in ("yes", 1)),
    *((name, value, "a function") for name in ("planned", "written") for value in (5, "x")),
]


def problems_of(function: Any, *arguments: Any, **named: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **named)
    assert all(len(problem) < 400 for problem in caught.value.problems)
    return caught.value.problems


def name_of(argument: str) -> str:
    only_python = ("out", "memory", "planned", "written", "probe", "cluster", "quiet", "verify")
    return f"{argument}:" if argument in only_python else f"--{argument.replace('_', '-')}"


@pytest.mark.parametrize(("argument", "value", "expected"), NONSENSE, ids=lambda value: type(value).__name__)
def test_plan_takes_no_nonsense(argument: str, value: Any, expected: str) -> None:
    (problem,) = problems_of(largemerge.plan, CONFIG, **{argument: value})
    assert problem.startswith(f"{name_of(argument)} ") and problem.endswith(f": expected {expected}")


@pytest.mark.parametrize(("argument", "value", "expected"), MERGE_NONSENSE, ids=lambda value: type(value).__name__)
def test_merge_takes_no_nonsense(tmp_path: Path, argument: str, value: Any, expected: str) -> None:
    (problem,) = problems_of(largemerge.merge, CONFIG, **{"out": tmp_path / "out", argument: value})
    assert problem.startswith(f"{name_of(argument)} ") and problem.endswith(f": expected {expected}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        each
        for each in (*NONSENSE, *MERGE_NONSENSE)
        if each[0] in ("out", "device", "memory", "strict", "resume", "quiet")
    ],
    ids=lambda value: type(value).__name__,
)
def test_gram_takes_no_nonsense(tmp_path: Path, argument: str, value: Any, expected: str) -> None:
    (problem,) = problems_of(largemerge.gram, CONFIG, **{"out": tmp_path / "out", argument: value})
    assert problem.startswith(f"{name_of(argument)} ") and problem.endswith(f": expected {expected}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "size", [0, -1, "0", "5 apples", "1e400", math.nan, math.inf, 1.5, True, None, 10**400, b"5GB"]
)
def test_sizes_of_shards(size: Any) -> None:
    (problem,) = problems_of(largemerge.merge, CONFIG, "out", max_shard_bytes=size)
    assert problem.startswith("--max-shard-size ") and "expected a size such as 5GB" in problem


def test_all_that_is_wrong_is_told_at_once() -> None:
    problems = problems_of(
        largemerge.merge,
        {"merge_method": "linear", "models": 5, "dtype": 3},
        "",
        device=5,
        resume=True,
        force=True,
        max_shard_bytes=0,
    )
    assert [problem.partition(" ")[0] for problem in problems] == [
        "--max-shard-size",
        "--device",
        "out:",
        "--resume",
        "models:",
        "dtype:",
    ]


@pytest.mark.parametrize("config", [None, 5, True, [], b"x", object()], ids=lambda value: type(value).__name__)
def test_what_is_no_configuration(config: Any) -> None:
    for function in (largemerge.plan, largemerge.load_config):
        (problem,) = problems_of(function, config)
        assert problem.startswith("config: expected the path of a YAML file, or a mapping like it, found ")


@pytest.mark.parametrize(
    ("argument", "value", "problem"),
    [
        ("num_nodes", 0, "--num-nodes 0: expected a whole number from 1 to 4096"),
        ("num_nodes", 10**12, "--num-nodes 1000000000000: expected a whole number from 1 to 4096"),
        ("num_nodes", 4096, "--num-nodes 4096, --gpus-per-node 8: expected up to 4096 GPUs together"),
        ("gpus_per_node", "8", "--gpus-per-node '8': expected a whole number from 1 to 4096"),
        ("gpu", 5, "--gpu 5: not known; expected one of a100"),
        ("interconnect", 400, "--interconnect 400: expected a rate such as 400Gbit"),
        ("interconnect", "9" * 400 + "Gbit", "expected a rate such as 400Gbit"),
        ("disk_rate", "0.0000001B/s", "--disk-rate '0.0000001B/s': expected a rate"),
        ("node_memory", math.nan, "--node-memory nan: expected a size such as 5GB"),
        ("node_memory", None, "--node-memory None: expected a size such as 5GB"),
    ],
)
def test_machines_that_nobody_has(argument: str, value: Any, problem: str) -> None:
    (found,) = problems_of(largemerge.cluster, **{argument: value})
    assert problem in found
    assert (
        len(problems_of(largemerge.cluster, num_nodes=0, gpu="x", interconnect="x", disk_rate="x", node_memory=0)) == 5
    )


@pytest.mark.parametrize(
    "device", ["hpu", "meta", "vulkan", "gpu", "CPU", "mps", "cuda:-1", "cpu:" + "9" * 500, "", "x" * 500]
)
def test_devices_that_torch_does_not_have(device: str) -> None:
    with pytest.raises(LargemergeError, match=r"^--device .*: .*; expected auto, cpu or cuda:0$") as caught:
        choose_device(device)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("command", "options", "problem"),
    [
        ("plan", ["--num-ranks", "1000000"], "--num-ranks 1000000: expected a whole number from 1 to 4096"),
        ("plan", ["--num-nodes", "1000000000000"], "--num-nodes 1000000000000: expected a whole number from 1 to 4096"),
        ("plan", ["--memory-host=-5GB"], "--memory-host '-5GB': expected a size such as 5GB"),
        ("plan", ["--memory-device", "nan"], "--memory-device 'nan': expected a size such as 5GB"),
        ("merge", ["--max-shard-size", "1e400"], "--max-shard-size '1e400': expected a size such as 5GB"),
        ("merge", ["--max-shard-size", "0"], "--max-shard-size '0': expected a size such as 5GB"),
        ("merge", ["--limit", "0"], "--limit 0: expected a whole number from 1 on"),
        ("merge", ["--limit", "2"], "--limit: limits what --evaluate measures; expected --evaluate with it"),
        ("merge", ["--resume", "--force"], "--resume goes on with what --force would replace: expected one of them"),
    ],
)
def test_the_command_line_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, options: list[str], problem: str
) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text("merge_method: linear\nmodels: [{model: o/a, parameters: {weight: 1}}]\n")
    with pytest.raises(SystemExit) as done:
        main([command, str(path), *([str(tmp_path / "out")] if command == "merge" else []), *options])
    assert done.value.code == 2 and problem in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["merge.yaml"]


def test_limits_of_memory() -> None:
    assert largemerge.Memory(host="2KiB", device=5).host == 2048
    problems = problems_of(largemerge.Memory, host=math.nan, device="0", disk="")
    assert [problem.partition(":")[0] for problem in problems] == ["memory.host", "memory.device", "memory.disk"]
    assert problems_of(largemerge.Memory, host=np.float32(1))[0].startswith("memory.host: ")
