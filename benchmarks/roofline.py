"""How near is a merge to what the machine allows? Its wall time beside the floor of its mandatory work.

    python benchmarks/roofline.py CONFIG OUT [--force]                  # merges, then measures the floor
    python benchmarks/roofline.py CONFIG --report OUT/merge_report.json # of a merge that has just been run

The floor is the sum of the products and solves that the merge cannot do without (`floor.py`), each timed alone at its
own shape and dtype on this machine right now (`kernel_times.py`), and of the bytes that it reads and writes at the
rate of the disk, measured with the same files (dropped from the page cache before the merge and before the
measurement; with `--report` read as they are) and with a scratch file, fsynced. Nothing in it overlaps. CPU only.

Prints a table by phase, the dearest kernels, how much of the CPUs others took meanwhile (with more than a few percent
the ratios mean little), and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import largemerge
from floor import Kernel, Work, mandatory_work
from kernel_times import operations, time_kernel
from largemerge.checkpoint.tensor_info import dtype_name
from measure import drop_from_cache, machine, run_measured

MOST_RATIO = 1.3
"""Target for the whole merge."""
PHASES_OF_ROW = {
    "collect": ("candidate_forward", "gram"),
    "right_hand_side": ("right_hand_side",),
    "solve": ("solve",),
    "forward": ("merged_forward",),
    "disk": ("wait_for_read", "write", "outside"),
}
"""Row of the table → phases of the report. `gram` is told once more apart."""
INSIDE_OTHERS = {"gram": "collect"}
MOST_BYTES_READ = 4 * 2**30
MOST_BYTES_WRITTEN = 2**30
CHUNK_BYTES = 16 * 2**20
NUM_KERNELS_SHOWN = 14


@dataclass(frozen=True)
class Row:
    """One phase."""

    phase: str
    floor_seconds: float
    measured_seconds: float

    @property
    def ratio(self) -> float | None:
        """Measured to floor, where there is a floor."""
        return self.measured_seconds / self.floor_seconds if self.floor_seconds > 0 else None


@dataclass(frozen=True)
class Disk:
    """What it does right now, in bytes per second."""

    read_rate: float
    write_rate: float
    cold: bool
    """Whether the files were dropped from the page cache first."""


class Others:
    """How much of the CPUs other processes take from now on; this one and its finished children do not count."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def share(self) -> float:
        """Of all CPU time since the start."""
        busy, own, wall = (now - then for now, then in zip(self._seconds(), self._start, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    def _seconds(self) -> tuple[float, float, float]:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.perf_counter()


def main() -> None:
    """Merges unless that has been done, measures the floor, prints."""
    arguments = _arguments()
    plan = largemerge.plan(arguments.config, device="cpu")
    if plan.problems:
        raise SystemExit("\n".join(plan.problems))
    files = [path for model in plan.config.models for path in sorted(Path(model.model).glob("*.safetensors"))]
    process_seconds = others_in_merge = None
    others = Others()
    if arguments.report is None:
        drop_from_cache(files)
        process_seconds = _merge(arguments.config, arguments.out, force=arguments.force)
        others_in_merge, others = others.share(), Others()
        arguments.report = arguments.out / "merge_report.json"
    report = json.loads(arguments.report.read_text())
    if report["resumed_parts"]:
        raise SystemExit(f"{arguments.report}: of a resumed merge, whose time is not that of a whole one")
    work = mandatory_work(plan, report)
    times = {kernel: time_kernel(kernel) for kernel in {kernel for _, kernel in work}}
    disk = _measure_disk(files, arguments.report.resolve().parent.parent, cold=process_seconds is not None)
    others_in_floor = others.share()
    disk_seconds = plan.bytes_read / disk.read_rate + plan.bytes_written / disk.write_rate
    rows = _rows(work, times, disk_seconds, report["seconds"])
    _print_rows(rows)
    _print_kernels(work, times)
    total = next(row for row in rows if row.phase == "total")
    print(f"\ndisk: {disk.read_rate / 2**20:.0f} MiB/s read, {disk.write_rate / 2**20:.0f} MiB/s written")
    print(f"whole merge: {total.ratio:.2f} times its floor (target <= {MOST_RATIO})")
    computing = total.measured_seconds / (total.floor_seconds - disk_seconds)
    print(f"beside the products and solves alone (reading runs beside them): {computing:.2f}")
    if process_seconds is not None:
        print(f"whole process, imports included: {process_seconds:.1f} s")
    shares = {"merge": others_in_merge, "floor": others_in_floor}
    told = (f"{share:.0%} during the {name}" for name, share in shares.items() if share is not None)
    print(f"CPUs taken by others: {', '.join(told)}")
    print("machine:", ", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"config: {_config(plan)}\n")
    result = {"machine": machine(), "config": _config(plan), "ratio": total.ratio, "target": MOST_RATIO}
    result["ratio_without_disk"] = computing
    result |= {"process_seconds": process_seconds, "cpus_taken_by_others": shares, "disk": asdict(disk)}
    result |= {"rows": [asdict(row) | {"ratio": row.ratio} for row in rows], "kernels": _kernels_json(work, times)}
    print(json.dumps({"benchmark": "roofline", **result}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A merge's time beside its floor; see the top of this file.")
    parser.add_argument("config", type=Path, help="a merge configuration")
    parser.add_argument("out", type=Path, nargs="?", help="folder for the merge")
    parser.add_argument("--report", type=Path, help="merge_report.json of a merge of this configuration just run")
    parser.add_argument("--force", action="store_true", help="replace what is in OUT")
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.report is None):
        parser.error("give either OUT or --report")
    return arguments


def _merge(config: Path, out: Path, *, force: bool) -> float:
    """Seconds of the process that merges."""
    command = [sys.executable, "-m", "largemerge", "merge", str(config), str(out), "--device", "cpu", "--quiet"]
    log = out.resolve().with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    return run_measured([*command, *(["--force"] if force else [])], log).seconds


def _config(plan: largemerge.MergePlan) -> dict[str, Any]:
    return {
        "merge_method": plan.config.merge_method,
        "class": plan.class_name,
        "blocks": len(plan.blocks),
        "candidates": len(plan.config.models),
        "compute_dtype": dtype_name(plan.compute_dtype),
    }


def _measure_disk(files: Sequence[Path], folder: Path, *, cold: bool) -> Disk:
    """Reads the candidates' files, and writes a scratch file beside the output."""
    if cold:
        drop_from_cache(files)
    buffer = bytearray(CHUNK_BYTES)
    done = 0
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while done < MOST_BYTES_READ and (count := file.readinto(buffer)):
                done += count
    read_rate = done / (time.perf_counter() - start)
    size = min(sum(path.stat().st_size for path in files), MOST_BYTES_WRITTEN)
    scratch = folder / "roofline.scratch"
    buffer[:] = os.urandom(CHUNK_BYTES)
    try:
        start = time.perf_counter()
        with scratch.open("wb", buffering=0) as file:
            for _ in range(max(1, size // CHUNK_BYTES)):
                file.write(buffer)
            os.fsync(file.fileno())
        write_rate = max(1, size // CHUNK_BYTES) * CHUNK_BYTES / (time.perf_counter() - start)
    finally:
        scratch.unlink(missing_ok=True)
    return Disk(read_rate, write_rate, cold)


def _rows(
    work: Work, times: Mapping[Kernel, Mapping[str, float]], disk_seconds: float, seconds: Mapping[str, Any]
) -> list[Row]:
    """The table; phases of the report that it does not know get a row without a floor."""
    floors: dict[str, float] = defaultdict(float)
    for (phase, kernel), count in work.items():
        floors[phase] += count * min(times[kernel].values())
    floors["disk"] = disk_seconds
    for inner, outer in INSIDE_OTHERS.items():
        floors[outer] += floors[inner]
    phases: Mapping[str, float] = seconds["by_phase"]
    rows = [Row("preparation", 0.0, seconds["preparation"])]
    rows += [
        Row(name, floors[name], sum(phases.get(phase, 0.0) for phase in told)) for name, told in PHASES_OF_ROW.items()
    ]
    known = {phase for told in PHASES_OF_ROW.values() for phase in told} | set(INSIDE_OTHERS)
    rows += [Row(phase, 0.0, value) for phase, value in phases.items() if phase not in known]
    rows.append(Row("elsewhere", 0.0, seconds["total"] - sum(row.measured_seconds for row in rows)))
    rows.append(Row("total", sum(row.floor_seconds for row in rows), seconds["total"]))
    rows += [
        Row(f"{inner}, in {outer}", floors[inner], phases.get(inner, 0.0)) for inner, outer in INSIDE_OTHERS.items()
    ]
    return rows


def _print_rows(rows: Sequence[Row]) -> None:
    print("| phase | floor | measured | ratio |")
    print("|---|---:|---:|---:|")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        floor = f"{row.floor_seconds:.2f} s" if row.floor_seconds else ""
        print(f"| {row.phase} | {floor} | {row.measured_seconds:.2f} s | {ratio} |")


def _kernels_json(work: Work, times: Mapping[Kernel, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Dearest first."""
    told = [
        {
            "phase": phase,
            "kind": kernel.kind,
            "shape": list(kernel.shape),
            "dtype": dtype_name(kernel.dtype),
            "count": count,
            "seconds": count * min(times[kernel].values()),
            "gflops": operations(kernel) / min(times[kernel].values()) / 1e9,
            "ways_ms": {way: value * 1e3 for way, value in times[kernel].items()},
        }
        for (phase, kernel), count in work.items()
    ]
    return sorted(told, key=lambda entry: -float(entry["seconds"]))


def _print_kernels(work: Work, times: Mapping[Kernel, Mapping[str, float]]) -> None:
    print("\n| phase | kernel | shape | dtype | count | seconds | GFLOP/s | ms, way by way |")
    print("|---|---|---|---|---:|---:|---:|---|")
    for entry in _kernels_json(work, times)[:NUM_KERNELS_SHOWN]:
        ways = ", ".join(f"{name} {value:.2f}" for name, value in entry["ways_ms"].items())
        shape = " x ".join(map(str, entry["shape"]))
        cells = [entry["phase"], entry["kind"], shape, entry["dtype"], str(entry["count"])]
        print("| " + " | ".join([*cells, f"{entry['seconds']:.2f}", f"{entry['gflops']:.0f}", ways]) + " |")


if __name__ == "__main__":
    main()
