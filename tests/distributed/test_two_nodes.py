"""One merge on two hosts is the merge by one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ENVIRONMENT, ROOT, check_two_ranks, make_uneven_case, merging, wait_until

SCRIPT = ROOT / "scripts" / "two_nodes"


def hosts(nodes: subprocess.Popen[str]) -> list[str]:
    """The network namespaces that a script has made: it ends their names with its number."""
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    return sorted(name for name in names if name.endswith(f"-{nodes.pid}"))


def start(*arguments: object) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [SCRIPT, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**ENVIRONMENT, "PATH": path}, **pipes)


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    """Tries to make one, which wants Linux, iproute2 and root."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2)")
    probe = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no network namespaces: {made.stderr.strip()}")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--deepspeed"]], ids=["torchrun", "deepspeed"])
def test_two_nodes(tmp_path: Path, options: list[str]) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus")
    nodes = start(*options, *merging(case, tmp_path / "out", "--device", "cpu")[1:])
    output, _ = nodes.communicate(timeout=120)
    assert nodes.returncode == 0, output
    check_two_ranks(case, tmp_path / "out", "cpu")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert all(rank["reads_shared_with"] == [] for rank in report["ranks"]), "hosts have no memory in common"
    assert hosts(nodes) == []


def test_a_mistake_fails_on_both(tmp_path: Path) -> None:
    nodes = start(tmp_path / "nowhere.yaml", tmp_path / "out")
    output, _ = nodes.communicate(timeout=120)
    assert nodes.returncode == 1, "as torchrun says it"
    assert "nowhere.yaml" in output
    assert hosts(nodes) == []


def test_nothing_is_left_when_it_is_stopped(tmp_path: Path) -> None:
    nodes = start(tmp_path / "nowhere.yaml", tmp_path / "out")
    wait_until(lambda: len(hosts(nodes)) == 2)
    nodes.terminate()
    nodes.communicate(timeout=60)
    assert nodes.returncode == 128 + signal.SIGTERM
    assert hosts(nodes) == []
