"""Does a merge keep what its experts know? Every method, three families of models, three seeds, on real data.

    python benchmarks/quality.py --work DIR                                   # hours on 2 cores; later runs: seconds
    python benchmarks/quality.py --family images --seeds 0                    # some minutes
    python benchmarks/quality.py --methods ties regmean_plusplus:ridge=1e-4   # these alone, with other settings
    python benchmarks/quality.py --methods regmean_plusplus --samples 1 4 16 64 256 --plot quality.svg
    python benchmarks/quality.py --family text --seeds 2 --retime             # times and peaks again: all is quiet now
    python benchmarks/quality.py --family images --quick                      # a smoke test: the numbers mean nothing

    text      SmolLM2-135M-Instruct, tuned on Python, German, French, and C headers     (`quality_text.py`)
    images    a small vision transformer, tuned on digits seen in four ways             (`quality_images.py`)
    encoder   MiniLM, tuned to find the passage that follows, in German, French, C headers (`quality_encoder.py`)

Every merge runs through the command line, in a process of its own whose time is taken, and is measured on data that
neither training nor calibration has seen. What counts is how much of what plain averaging loses a method gains back:

    share = (loss of the average − loss of the merge) / (loss of the average − loss of each expert at its own task)

Losses are means over the tasks before the share is taken; the table has the mean of the shares over the seeds, and the
lowest and highest. Above 100 % a merge is better than the experts; below 0 it is worse than their average. Results are
kept under a hash of the checkpoints, samples, settings and held-out data, and of the sources of the half of largemerge
that merges. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from transformers.utils import logging

import largemerge
import quality_encoder
import quality_images
import quality_text
from measure import machine, run_measured
from plots import BLUE, GREY, INK, ORANGE, new_figure, save_svg
from quality_cases import Case, MakeCase, Score, digest
from quality_methods import AVERAGE, REGRESSION, Merge, all_methods, parse, write_config

FAMILIES: Mapping[str, MakeCase] = {
    "text": quality_text.make_case,
    "images": quality_images.make_case,
    "encoder": quality_encoder.make_case,
}
SAMPLES = {"text": 16, "images": 256, "encoder": 1024}
"""Of each task, the default: some 4,096 tokens; of passages, whose meaning is one mean, eight times as many."""
QUICK_METHODS = (AVERAGE, "ties", "regmean_plusplus")


@dataclass(frozen=True)
class Result:
    """A model of one family and seed: what it scores, and what its merge took."""

    scores: Mapping[str, Score]
    seconds: float | None = None
    peak_bytes: int | None = None
    """Anonymous memory at its largest."""

    @property
    def loss(self) -> float:
        """Mean over the tasks."""
        return mean(score.loss for score in self.scores.values())

    @property
    def accuracy(self) -> float | None:
        """Mean over the tasks, where there are answers."""
        found = [score.accuracy for score in self.scores.values() if score.accuracy is not None]
        return mean(found) if found else None


@dataclass(frozen=True)
class Seed:
    """All results of one family and one seed."""

    base: Result
    experts: Result
    """Each expert at its own task."""
    merges: Mapping[Merge, Result]

    @property
    def average(self) -> Result:
        """What all methods are held against."""
        return self.merges[Merge(AVERAGE)]

    def share(self, result: Result, task: str | None = None) -> float:
        """How much of the average's loss against the experts is gained back, of all tasks together or of one."""

        def loss(of: Result) -> float:
            return of.loss if task is None else of.scores[task].loss

        return (loss(self.average) - loss(result)) / (loss(self.average) - loss(self.experts))


def main() -> None:
    """Makes, merges, measures, prints."""
    arguments = _arguments()
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    logging.disable_progress_bar()
    methods = arguments.methods or (QUICK_METHODS if arguments.quick else all_methods())
    work: Path = arguments.work.resolve() / ("quick" if arguments.quick else "")
    found: dict[str, dict[int, Seed]] = {}
    for family in arguments.family:
        found[family] = {}
        merges = _merges(methods, arguments.samples or [SAMPLES[family]])
        for seed in arguments.seeds:
            folder = work / family / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            case = FAMILIES[family](folder, seed, arguments.quick)
            found[family][seed] = _seed(f"{family}, seed {seed}", case, merges, folder, seed, arguments.retime)
    for family, seeds in found.items():
        print(table(family, seeds))
    if arguments.plot:
        _draw(found, arguments.plot)
    print(f"machine: {', '.join(f'{name} {value}' for name, value in machine().items())}\n")
    rows = [row for family, seeds in found.items() for row in _rows(family, seeds)]
    config = {"seeds": arguments.seeds, "samples": arguments.samples, "quick": arguments.quick}
    print(json.dumps({"benchmark": "quality", "machine": machine(), "config": config, "rows": rows}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What merges keep; see the top of this file.")
    default = Path(__file__).parent / "runs" / "quality"
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=[*FAMILIES], help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="name, or name:key=value,… (default: all)")
    samples = "of each task (default: some 4,096 tokens)"
    parser.add_argument("--samples", nargs="+", type=int, metavar="N", help=samples)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw an SVG")
    parser.add_argument("--retime", action="store_true", help="merge again what has been measured, for time and peak")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help="folder for all files (%(default)s)")
    return parser.parse_args()


def _merges(methods: Sequence[str], samples: Sequence[int]) -> list[Merge]:
    """What to do, the average first; those that look at data once for each number of samples."""
    parsed = [parse(method, count) for method in methods for count in samples]
    return list(dict.fromkeys([Merge(AVERAGE), *parsed]))


def _seed(title: str, case: Case, merges: Sequence[Merge], folder: Path, seed: int, retime: bool) -> Seed:
    """Measures base and experts, merges and measures all the rest."""
    kept = folder / "results"
    kept.mkdir(exist_ok=True)
    base = _measured(case, case.base, kept)
    each = {task: _measured(case, expert, kept) for task, expert in case.experts.items()}
    experts = Result({task: result.scores[task] for task, result in each.items()})
    print(f"{title}: base {base.loss:.3f}, each expert at its own task {experts.loss:.3f}", flush=True)
    results = {}
    for merge in merges:
        results[merge] = _merged(case, merge, folder, seed, retime=retime)
        print(f"{title}: {_label(merge)} {results[merge].loss:.3f}, {results[merge].seconds:.1f} s", flush=True)
    return Seed(base, experts, results)


def _measured(case: Case, checkpoint: Path, kept: Path) -> Result:
    """What a checkpoint scores, from the folder of results if it is there."""
    file = kept / f"{digest(checkpoint, case.heldout)}.json"
    if not file.is_file():
        scores = case.measure(checkpoint)
        file.write_text(json.dumps({task: dataclasses.asdict(score) for task, score in scores.items()}))
    return Result({task: Score(**score) for task, score in json.loads(file.read_text()).items()})


def _merged(case: Case, merge: Merge, folder: Path, seed: int, *, retime: bool) -> Result:
    """Merges through the command line and measures, unless the very same was done before. The model is deleted."""
    written = write_config(merge, case, seed)
    file = folder / "results" / f"{_digest(case, merge, written, folder)}.json"
    known = json.loads(file.read_text()) if file.is_file() else None
    if known is None or retime:
        config, output = folder / "merge.yaml", folder / "merged"
        config.write_text(written)
        command = [sys.executable, "-m", "largemerge", "merge", str(config), str(output), "--force", "--quiet"]
        took = run_measured(command, folder / "merge.log")
        if known is None:
            scores = _measured(case, output, folder / "results").scores
            of_tasks = {task: dataclasses.asdict(score) for task, score in scores.items()}
            known = {"merge": _label(merge), "scores": of_tasks}
        shutil.rmtree(output)
        known |= {"seconds": took.seconds, "peak_bytes": took.peak_anonymous_bytes}
        file.write_text(json.dumps(known))
    scores = {task: Score(**score) for task, score in known["scores"].items()}
    return Result(scores, known["seconds"], known["peak_bytes"])


def _digest(case: Case, merge: Merge, written: str, folder: Path) -> str:
    """Of all that the result of a merge depends on, wherever it lies."""
    sources = sorted((Path(largemerge.__file__).parent / merge.engine).rglob("*.py"))
    samples = case.calibration.values() if merge.samples is not None else ()
    checkpoints = (case.base, *case.experts.values())
    return digest(written.replace(str(folder), ""), case.heldout, *checkpoints, *samples, *sources)


def _label(merge: Merge) -> str:
    return merge.label if merge.samples is None else f"{merge.label}, {merge.samples} samples"


def table(family: str, seeds: Mapping[int, Seed]) -> str:
    """A Markdown table: a line for each model, means over the seeds, the best merge first."""
    every = list(seeds.values())
    tasks = list(every[0].experts.scores)
    answers = every[0].base.accuracy is not None
    titles = [f"{family}, held-out loss", *tasks, "mean", "share of the gap", "lowest to highest"]
    titles += [*(f"share {task}" for task in tasks), *(["accuracy"] if answers else []), "time", "peak"]

    def line(name: str, results: Sequence[Result]) -> str:
        cells = [name, *(f"{mean(one.scores[task].loss for one in results):.3f}" for task in tasks)]
        cells.append(f"{mean(one.loss for one in results):.3f}")
        shares = [seed.share(one) for seed, one in zip(every, results, strict=True)]
        cells += [f"{mean(shares):.1%}", f"{min(shares):.1%} to {max(shares):.1%}" if len(shares) > 1 else ""]
        for task in tasks:
            cells.append(f"{mean(seed.share(one, task) for seed, one in zip(every, results, strict=True)):.0%}")
        cells += [f"{mean(one.accuracy or 0.0 for one in results):.1%}"] if answers else []
        seconds = [one.seconds for one in results if one.seconds is not None]
        peaks = [one.peak_bytes for one in results if one.peak_bytes is not None]
        cells += [f"{mean(seconds):.1f} s" if seconds else "", f"{mean(peaks) / 2**30:.2f} GiB" if peaks else ""]
        return f"| {' | '.join(cells)} |"

    lines = [f"\n| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    lines.append(line("base", [seed.base for seed in every]))
    lines.append(line("each expert at its own task", [seed.experts for seed in every]))
    of_merges = {merge: [seed.merges[merge] for seed in every] for merge in every[0].merges}
    shares = {
        merge: mean(seed.share(one) for seed, one in zip(every, results, strict=True))
        for merge, results in of_merges.items()
    }
    lines += [line(_label(merge), of_merges[merge]) for merge in sorted(of_merges, key=lambda merge: -shares[merge])]
    return "\n".join([*lines, ""])


def _rows(family: str, seeds: Mapping[int, Seed]) -> list[dict[str, Any]]:
    """What the table is made of, for the line of JSON."""
    rows = []
    for number, seed in seeds.items():
        named = [("base", None, seed.base), ("experts", None, seed.experts)]
        named += [(merge.label, merge.samples, result) for merge, result in seed.merges.items()]
        for name, samples, result in named:
            scores = {task: dataclasses.asdict(score) for task, score in result.scores.items()}
            about = {"family": family, "seed": number, "model": name, "samples": samples}
            about |= {"seconds": result.seconds, "peak_bytes": result.peak_bytes}
            rows.append({**about, "loss": result.loss, "share": seed.share(result), "tasks": scores})
    return rows


def _draw(found: Mapping[str, Mapping[int, Seed]], path: Path) -> None:
    """A panel for each family: the share of every method, or, for several numbers of samples, how it grows."""
    of_families = [list(next(iter(seeds.values())).merges) for seeds in found.values()]
    curve = any(len({merge.samples for merge in merges} - {None}) > 1 for merges in of_families)
    height = 3.2 if curve else 1.0 + 0.22 * len(of_families[0])
    figure, panels = new_figure(3.4 * len(found) + 1.2, height, 1, len(found))
    for panel, (family, seeds) in zip([panels] if len(found) == 1 else panels, found.items(), strict=True):
        (_draw_curve if curve else _draw_bars)(panel, list(seeds.values()), first=family == next(iter(found)))
        panel.set_title(family)
    save_svg(figure, path)


def _shares(seeds: Sequence[Seed], merge: Merge) -> list[float]:
    return [100 * seed.share(seed.merges[merge]) for seed in seeds]


def _draw_bars(panel: Any, seeds: Sequence[Seed], *, first: bool) -> None:
    """Means, and a line from the lowest to the highest seed; what is below -100 % is cut."""
    merges = list(seeds[0].merges)
    places = range(len(merges), 0, -1)
    for place, merge in zip(places, merges, strict=True):
        shares = [max(-100.0, share) for share in _shares(seeds, merge)]
        panel.barh(place, mean(shares), height=0.7, color=BLUE if merge.method in REGRESSION else GREY)
        panel.hlines(place, min(shares), max(shares), color=INK, linewidth=1.0)
    panel.axvline(0, color=INK, linewidth=0.8)
    panel.axvline(100, color=ORANGE, linewidth=0.8)
    panel.set_xlim(-105, 110)
    panel.set_yticks(list(places), [merge.label for merge in merges] if first else [""] * len(merges))
    panel.set_xlabel("gap between average and experts closed, %")


def _draw_curve(panel: Any, seeds: Sequence[Seed], *, first: bool) -> None:
    """A line for every method that looks at data."""
    labels = dict.fromkeys(merge.label for merge in seeds[0].merges if merge.samples is not None)
    for number, label in enumerate(labels):
        merges = sorted(
            (merge for merge in seeds[0].merges if merge.label == label), key=lambda merge: merge.samples or 0
        )
        shares = [_shares(seeds, merge) for merge in merges]
        counts = [merge.samples for merge in merges]
        colour = (BLUE, ORANGE, INK, GREY)[number % 4]
        panel.plot(counts, [mean(some) for some in shares], color=colour, marker="os^D"[number % 4], label=label)
        panel.vlines(
            counts, [min(some) for some in shares], [max(some) for some in shares], color=colour, linewidth=1.0
        )
    panel.axhline(100, color=GREY, linewidth=0.8)
    panel.set_xscale("log", base=2)
    numbers = sorted({merge.samples for merge in seeds[0].merges if merge.samples is not None})
    panel.set_xticks(numbers, list(map(str, numbers)))
    panel.set_xlabel("samples of each task")
    if first:
        panel.set_ylabel("gap closed, %")
        panel.legend()


if __name__ == "__main__":
    main()
