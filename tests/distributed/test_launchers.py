"""One merge under every launcher is the merge by one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cases import Case
from processes import (
    ENVIRONMENT,
    check_two_ranks,
    device_of_ranks,
    environment_of_ranks,
    finish,
    free_port,
    make_uneven_case,
    merging,
    start,
)

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
# With --cpu, Accelerate starts one process, unless there is MPI; with --multi_gpu it starts all, GPUs or not.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
DEEPSPEED = ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port()), "--module"]


def launch(launcher: Sequence[str], case: Case, out: Path) -> subprocess.CompletedProcess[str]:
    """Merges in processes that the launcher, a module with its options, starts."""
    # DeepSpeed's launcher tells its processes itself which GPUs they see.
    arguments = merging(case, out, "--device", device_of_ranks(2))
    command = [sys.executable, "-m", *launcher, "largemerge", *map(str, arguments)]
    variables = {"PATH": "", "DS_ACCELERATOR": "cpu", **ENVIRONMENT, **environment_of_ranks(2)}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE, DEEPSPEED], ids=["torchrun", "accelerate", "deepspeed"])
def test_two_ranks(tmp_path: Path, launcher: list[str]) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus")
    done = launch(launcher, case, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    check_two_ranks(case, tmp_path / "out", device_of_ranks(2))


def test_accelerate_with_mpi(tmp_path: Path) -> None:
    """MPI need not be there: these are the variables that its processes get."""
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus")
    common = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"CUDA_VISIBLE_DEVICES": ""}
    ranks = []
    for rank in ("0", "1"):
        mpi = {"PMI_RANK": rank, "PMI_SIZE": "2", "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": "2"}
        log = tmp_path / f"rank{rank}.log"
        ranks.append(start(merging(case, tmp_path / "out"), log, environment={**common, **mpi}))
    assert [finish(process) for process in ranks] == [0, 0]
    check_two_ranks(case, tmp_path / "out", "cpu")


def test_a_rank_that_fails_ends_the_job(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus", num_candidates=2)
    broken = case.models[1]
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "model1")
    done = launch(TORCHRUN, case, tmp_path / "out")
    assert done.returncode != 0
    # Rank 1 says so itself, unless rank 0, which it has told, ends the job before.
    told = ("[rank 1] largemerge: model.layers.1", "rank 1 has failed: model.layers.1")
    assert any(text in done.stderr for text in told) and "not finite" in done.stderr, done.stderr
    assert (tmp_path / "out" / ".largemerge" / "manifest.json").exists(), "there is something to resume"
