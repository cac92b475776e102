"""What rank 0 does alone: it may take longer than any collective call, and its failure is that of all."""

from __future__ import annotations

import os
import subprocess
import sys

import processes
import pytest

CODE = """
import sys, time
from datetime import timedelta
from largemerge.distributed import ranks as module
from largemerge.errors import LargemergeError

module._TIMEOUT = timedelta(seconds=2)

def step():
    time.sleep(5)
    if sys.argv[1] == "fails":
        raise LargemergeError("rank 0 cannot")
    return "done by", ranks.rank

with module.start_ranks() as ranks:
    try:
        print(ranks.by_first(step), ranks.by_first(lambda: 2))
    except LargemergeError as error:
        print(type(error).__name__, *error.problems)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("ends well", ["('done by', 0) 2", "('done by', 0) 2"]),
        ("fails", ["LargemergeError rank 0: rank 0 cannot", "RankAborted"]),
    ],
)
def test_rank_0_alone_takes_its_time(how: str, told: list[str]) -> None:
    size, port = "2", str(processes.free_port())
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, how],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [out.strip() for out, _ in ended] == told, ended
