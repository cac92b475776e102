"""What the checks of a data-free merge cost: the model's class, the output's keys, the cosines at the end.

    python benchmarks/checks.py --geometry 1.1b --work DIR     # 13 GB of disk, some minutes
    python benchmarks/checks.py --geometry tiny --work DIR     # a smoke test

What is done with every tensor on its way to the disk (NaN and infinity, digests) is counted as processor time of its
threads, in a process more, against all processor time from the start of the merge.

Whole processes by turns, with the check at the end and with `--no-verify`, all inputs out of the system's cache. The
preparation is what comes before the long work: headers, the class on the meta device, names, tokenizers, and an output
without numbers that Transformers loads. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data_free_vs_mergekit import merge_config, synthetic_models
from measure import drop_from_cache, machine, run_measured
from synthetic_llama import GEOMETRIES


def main() -> None:
    """Measures every method and prints a table."""
    arguments = _arguments()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if arguments.counted is not None:
        print(json.dumps(_count(*arguments.counted)))
        return
    models = synthetic_models(work / "inputs", arguments.geometry)
    rows = [_measure(method, models, work, arguments.repeats) for method in arguments.methods]
    print("| method | with the check | without | ratio | the check alone | preparation | NaN | digests |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| `{row['method']}` | {row['seconds']:.2f} s | {row['plain_seconds']:.2f} s | {row['ratio']:.3f} "
            f"| {row['check_seconds']:.2f} s | {row['preparation_seconds']:.2f} s "
            f"| {row['finite_share']:.1%} | {row['digest_share']:.1%} |"
        )
    shutil.rmtree(work / "inputs")
    print(json.dumps({"benchmark": "checks", "geometry": arguments.geometry, "rows": rows, "machine": machine()}))


def _measure(method: str, models: list[Path], work: Path, repeats: int) -> dict[str, Any]:
    config, out = work / f"{method}.yaml", work / "out"
    config.write_text(yaml.safe_dump(merge_config(method, models, None)), encoding="utf-8")
    seconds: dict[str, list[float]] = {"": [], "--no-verify": []}
    checks, preparations = [], []
    for turn in range(2 * repeats):
        option = ("", "--no-verify")[(turn + turn // 2) % 2]
        drop_from_cache([path for model in models for path in model.glob("*.safetensors")])
        command = [sys.executable, "-m", "largemerge", "merge", str(config), str(out), "--force", "--quiet"]
        seconds[option].append(run_measured([*command, *([option] if option else [])], work / "log").seconds)
        report = json.loads((out / "merge_report.json").read_text())
        preparations.append(report["seconds"]["preparation"])
        checks += [report["verified"]["seconds"]] if not option else []
        shutil.rmtree(out)
    count = [sys.executable, str(Path(__file__)), "--work", str(work), "--counted", str(config), str(out)]
    counted = subprocess.run(count, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    shutil.rmtree(out)
    checked, plain = (statistics.median(each) for each in seconds.values())
    return {
        "method": method,
        "seconds": checked,
        "plain_seconds": plain,
        "ratio": checked / plain,
        "check_seconds": statistics.median(checks),
        "preparation_seconds": statistics.median(preparations),
        **json.loads(counted),
    }


def _count(config: str, out: str) -> dict[str, float]:
    """Merges in this process, and counts the processor time of what is done with every tensor that is written."""
    import largemerge
    from largemerge.checkpoint import digests, writer

    seconds = {"finite": 0.0, "digest": 0.0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments)
            finally:
                seconds[name] += time.thread_time() - start

        return counted

    writer.not_finite = counting("finite", writer.not_finite)
    digests.TensorDigests.add = counting("digest", digests.TensorDigests.add)  # type: ignore[method-assign]
    start = time.process_time()
    largemerge.merge(config, out, force=True)
    total = time.process_time() - start
    return {f"{name}_share": each / total for name, each in seconds.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="1.1b", help="sizes of the models (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=["linear", "ties"], help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind (%(default)s)")
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs and outputs")
    parser.add_argument("--counted", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
