"""One merge by several processes of one thread each, beside one process of one thread.

    python benchmarks/ranks.py CONFIG --work DIR [--ranks 1 2 4] [--repeats 2] [--ceiling]

Every merge is started by torchrun, the one of a single rank too, and takes place on the CPU. Preparation (imports,
reading calibration data, planning) is left out, as every rank does it alike: times are from the first tensor that is
read to the report. The order is reversed every other round; the shortest time counts. The merged weights are compared
with those of a single rank. With --ceiling, as many whole merges of one rank as there would be ranks run side by side:
n merges in the time t(n) are n t(1) / t(n) times as fast as one after the other, which is as much as n processes that
share cores, caches and memory could gain if they had nothing to tell each other. Beside each time stands what
`largemerge plan --num-ranks` expects. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from float64_reference import compare
from measure import machine, run_measured


def main() -> None:
    """Merges, compares, prints."""
    arguments = _arguments()
    sizes: list[int] = sorted({1, *arguments.ranks})
    arguments.work.mkdir(parents=True, exist_ok=True)
    reports: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    beside: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(arguments.repeats):
        for size in sizes if number % 2 == 0 else reversed(sizes):
            reports[size].append(_merge(arguments.config, arguments.work / f"ranks-{size}", size))
            print(f"round {number + 1}, {size} ranks: {_seconds(reports[size][-1]):.1f} s", flush=True)
            if arguments.ceiling and size > 1:
                beside[size].append(_side_by_side(arguments.config, arguments.work, size))
                print(f"round {number + 1}, {size} merges side by side: {beside[size][-1]:.1f} s", flush=True)
    alone = arguments.work / "ranks-1"
    best = {size: min(reports[size], key=_seconds) for size in sizes}
    rows = [
        _row(size, best[size], _seconds(best[1]), alone, arguments.work / f"ranks-{size}")
        | {"planned_seconds": _planned(arguments.config, size)}
        | {"ceiling": size * _seconds(best[1]) / min(beside[size]) if beside[size] else None}
        for size in sizes
    ]
    _print(rows)
    print("\nmachine:", ", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"config: {arguments.config.name}, one thread per rank, best of {arguments.repeats}\n")
    print(json.dumps({"benchmark": "ranks", "machine": machine(), "config": arguments.config.name, "rows": rows}))
    if not arguments.keep:
        for size in sizes:
            shutil.rmtree(arguments.work / f"ranks-{size}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One merge by several ranks; see the top of this file.")
    parser.add_argument("config", type=Path, help="a merge configuration")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the merges")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--repeats", type=int, default=2, help="merges for each (%(default)s)")
    parser.add_argument("--ceiling", action="store_true", help="also run whole merges side by side")
    parser.add_argument("--keep", action="store_true", help="do not delete the merges")
    return parser.parse_args()


def _merge(config: Path, out: Path, size: int) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    os.environ["OMP_NUM_THREADS"] = "1"
    merge = ["-m", "largemerge", "merge", str(config), str(out), "--force", "--quiet", "--device", "cpu"]
    run_measured([*launcher, *merge], out.with_suffix(".log"))
    report: dict[str, Any] = json.loads((out / "merge_report.json").read_text())
    return report


def _planned(config: Path, size: int) -> float:
    """Seconds that the plan says."""
    command = [sys.executable, "-m", "largemerge", "plan", str(config), "--device", "cpu", "--json"]
    done = subprocess.run([*command, "--num-ranks", str(size)], capture_output=True, check=True, text=True)
    seconds: dict[str, float] = json.loads(done.stdout)["seconds"]
    return sum(seconds.values())


def _side_by_side(config: Path, work: Path, count: int) -> float:
    """Seconds of the slowest of some merges that have nothing to do with each other."""
    outs = [work / f"beside-{number}" for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        reports = list(pool.map(lambda out: _merge(config, out, 1), outs))
    for out in outs:
        shutil.rmtree(out)
    return max(map(_seconds, reports))


def _seconds(report: dict[str, Any]) -> float:
    seconds: float = report["seconds"]["total"] - report["seconds"]["preparation"]
    return seconds


def _row(size: int, report: dict[str, Any], alone_seconds: float, alone: Path, out: Path) -> dict[str, Any]:
    ranks = report["ranks"] or [{"host_anonymous": report["peak_bytes"]["host_anonymous"]}]
    return {
        "ranks": size,
        "seconds": _seconds(report),
        "speed_up": alone_seconds / _seconds(report),
        "peak_anonymous_bytes": max(rank["host_anonymous"] for rank in ranks),
        "bytes_communicated": max(rank.get("bytes_communicated", 0) for rank in ranks),
        "seconds_communicating": max(rank.get("seconds_communicating", 0.0) for rank in ranks),
        "bytes_read": report["bytes_read"],
        "by_phase": report["seconds"]["by_phase"],
        "difference": compare(out, alone).overall,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    titles = [
        "ranks",
        "merge",
        "planned",
        "speed-up",
        "ceiling",
        "a rank's peak, anonymous",
        "moved by a rank",
        "under way",
        "computing waited",
    ]
    print(f"\n| {' | '.join([*titles, 'difference'])} |\n{'|---:' * (len(titles) + 1)}|")
    for row in rows:
        print(
            f"| {row['ranks']} | {row['seconds']:.1f} s | {row['planned_seconds']:.1f} s | {row['speed_up']:.2f} "
            f"| {_text(row['ceiling'])} "
            f"| {row['peak_anonymous_bytes'] / 2**30:.2f} GiB | {row['bytes_communicated'] / 1e9:.2f} GB "
            f"| {row['seconds_communicating']:.1f} s | {row['by_phase'].get('communicate', 0.0):.1f} s "
            f"| {row['difference']:.1e} |"
        )


def _text(ceiling: float | None) -> str:
    return "" if ceiling is None else f"{ceiling:.2f}"


if __name__ == "__main__":
    main()
