"""One merge under every launcher is the merge by one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cases import Case
from processes import ENVIRONMENT, assert_agree, make_uneven_case, merging

import largemerge

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
# With --cpu, Accelerate starts one process, unless there is MPI; with --multi_gpu it starts all, GPUs or not.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
COMPILER = os.environ.get("CXX", "c++")


def launch(launcher: Sequence[str], case: Case, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Merges in processes that the launcher, a module with its options, starts."""
    command = [sys.executable, "-m", *launcher, "largemerge", *map(str, merging(case, out))]
    variables = {"PATH": "", **ENVIRONMENT, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=240)


def check_two_ranks(case: Case, out: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((out / "merge_report.json").read_text())["ranks"]) == 2
    largemerge.merge(case.config, case.folder / "alone")
    assert_agree(out, case.folder / "alone")


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_ranks(tmp_path: Path, launcher: list[str]) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus")
    check_two_ranks(case, tmp_path / "out", launch(launcher, case, tmp_path / "out"))


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"DeepSpeed compiles on CPUs, and there is no {COMPILER}")
def test_deepspeed(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port, "--module"]
    environment = {
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja is beside python
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    done = launch(launcher, case, tmp_path / "out", **environment)
    for leftover in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        leftover.unlink()
    check_two_ranks(case, tmp_path / "out", done)


def test_a_rank_that_fails_ends_the_job(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus", num_candidates=2)
    broken = case.models[1]
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "model1")
    done = launch(TORCHRUN, case, tmp_path / "out")
    assert done.returncode != 0
    assert "largemerge: rank 1: model.layers.1" in done.stderr and "not finite" in done.stderr
    assert (tmp_path / "out" / ".largemerge" / "manifest.json").exists(), "there is something to resume"
