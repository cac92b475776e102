"""Does a merge keep what four experts know? Losses, times and memory on SmolLM2-135M.

    python benchmarks/smollm2_experts.py              # 15 minutes on 2 cores before the merges; later runs: seconds
    python benchmarks/smollm2_experts.py --quick      # a smoke test: the numbers mean nothing
    python benchmarks/smollm2_experts.py --no-merges  # base, experts and their average only
    python benchmarks/smollm2_experts.py --grid       # every method x off_diagonal_scale x ridge

Makes the base and one expert per kind of text (`experts.py`, `corpora.py`), merges them with
`largemerge merge`, each merge in a process of its own whose time and memory are taken
(`measure.py`), and prints every model's held-out loss on every kind of text (`evaluation.py`).
Ends with one line of JSON. Needs `pip install -e .[benchmarks]`, pip and Debian's apt-get.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer
from transformers.utils import logging

from corpora import KINDS, Corpus, load_corpus
from evaluation import heldout_losses
from experts import Training, average, make_base, make_expert, sequences
from measure import Measured, machine, run_measured

METHODS = ("regmean", "regmean_plusplus")
SCALES_AND_RIDGES = ((0.1, 1e-6), (0.95, 1e-6), (1.0, 1e-4))
GRID = tuple(itertools.product((0.1, 0.95, 1.0), (1e-6, 1e-4)))


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    training: Training = field(default_factory=Training)
    heldout_sequences: int = 32
    """Per kind of text, each `training.length` tokens."""
    calibration_documents: int = 64
    """Written per kind of text; a merge draws `num_samples` of them."""
    num_samples: int = 16
    settings: tuple[tuple[float, float], ...] = SCALES_AND_RIDGES
    """Pairs of `off_diagonal_scale` and `ridge`, each tried with every method."""


QUICK = Sizes(Training(steps=2, batch_size=2, length=64), 4, 8, 4, settings=((0.95, 1e-6),))


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    model: str
    losses: Mapping[str, float]
    measured: Measured | None = None

    @property
    def mean(self) -> float:
        """Over the kinds of text."""
        return sum(self.losses.values()) / len(self.losses)

    def as_json(self) -> dict[str, Any]:
        """The row for the JSON line."""
        measured = dataclasses.asdict(self.measured) if self.measured else {}
        return {"model": self.model, "mean": self.mean, **self.losses, **measured}


def main() -> None:
    """Makes, merges, measures, prints."""
    arguments = _arguments()
    sizes = QUICK if arguments.quick else Sizes(settings=GRID if arguments.grid else SCALES_AND_RIDGES)
    logging.disable_progress_bar()
    work: Path = arguments.work.resolve()
    packages, base = work / "packages", work / "base"
    packages.mkdir(parents=True, exist_ok=True)
    make_base(base, packages)
    # The quick experts must not take the place of those that took minutes.
    work = work / "quick" if arguments.quick else work
    corpora = {kind: load_corpus(kind, packages) for kind in KINDS}

    experts = {kind: work / "experts" / kind for kind in KINDS}
    for kind, folder in experts.items():
        seconds = make_expert(base, folder, corpora[kind].train, sizes.training)
        print(f"expert {kind}: trained in {seconds:.0f} s", flush=True)
    average(list(experts.values()), work / "average")
    heldout = _prepare_data(work, base, corpora, sizes)
    configs = _write_configs(work, base, experts, sizes)

    models = {"base": base, **{f"expert {kind}": folder for kind, folder in experts.items()}}
    rows = [Row(name, _losses(folder, heldout, work)) for name, folder in models.items()]
    own = {kind: row.losses[kind] for kind, row in zip(KINDS, rows[1:], strict=True)}
    rows.append(Row("each expert on its own", own))
    rows.append(Row("average", _losses(work / "average", heldout, work)))
    rows += [_merge(config, heldout, work) for config in configs if arguments.merges]
    _print(rows, sizes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merge four SmolLM2-135M experts; see the top of this file.")
    default = Path(__file__).parent / "runs" / "smollm2"
    parser.add_argument("--work", type=Path, default=default, help="folder for everything made (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--grid", action="store_true", help="more settings for the merges")
    parser.add_argument("--no-merges", dest="merges", action="store_false", help="leave the merges out")
    return parser.parse_args()


def _prepare_data(work: Path, base: Path, corpora: Mapping[str, Corpus], sizes: Sizes) -> dict[str, torch.Tensor]:
    """Writes the calibration files; returns the held-out tokens per kind, `[sequences, length]`."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    length = sizes.training.length
    folder = work / "calibration"
    folder.mkdir(exist_ok=True)
    for kind, corpus in corpora.items():
        long_enough = [text for text in corpus.calibration if len(tokenizer(text).input_ids) >= length]
        if len(long_enough) < sizes.calibration_documents:
            raise SystemExit(f"{kind}: {sizes.calibration_documents} documents wanted, {len(long_enough)} found")
        lines = [json.dumps({"text": text}) + "\n" for text in long_enough[: sizes.calibration_documents]]
        (folder / f"{kind}.jsonl").write_text("".join(lines))
    return {
        kind: sequences(corpus.heldout, tokenizer, count=sizes.heldout_sequences, length=length)
        for kind, corpus in corpora.items()
    }


def _write_configs(work: Path, base: Path, experts: Mapping[str, Path], sizes: Sizes) -> list[Path]:
    """One YAML per method and setting."""
    folder = work / "configs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    calibration = {"num_samples": sizes.num_samples, "max_length": sizes.training.length, "batch_size": 4, "seed": 0}
    paths = []
    for method, (scale, ridge) in itertools.product(METHODS, sizes.settings):
        config = {
            "merge_method": method,
            "base_model": str(base),
            "models": [
                {"model": str(path), "name": kind, "calibration": {"data": str(work / "calibration" / f"{kind}.jsonl")}}
                for kind, path in experts.items()
            ],
            "calibration": calibration,
            "parameters": {"off_diagonal_scale": scale, "ridge": ridge},
        }
        paths.append(folder / f"{method}-s{scale:g}-r{ridge:g}.yaml")
        paths[-1].write_text(yaml.safe_dump(config, sort_keys=False))
    return paths


def _merge(config: Path, heldout: Mapping[str, torch.Tensor], work: Path) -> Row:
    """Runs one merge through the command line, and evaluates what it wrote."""
    output = work / "merged" / config.stem
    output.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "largemerge", "merge", str(config), str(output), "--force"]
    measured = run_measured(command, output.with_name(f"{output.name}.log"))
    print(f"{config.stem}: merged in {measured.seconds:.0f} s", flush=True)
    return Row(config.stem, _losses(output, heldout, work), measured)


def _losses(checkpoint: Path, heldout: Mapping[str, torch.Tensor], work: Path) -> dict[str, float]:
    return heldout_losses(checkpoint, heldout, work / "losses")


def _print(rows: Sequence[Row], sizes: Sizes) -> None:
    """The table, the machine, and the line of JSON."""
    columns = ["held-out loss, nats per token", *KINDS, "mean", "time", "peak RSS", "of it anonymous"]
    print("\n| " + " | ".join(columns) + " |")
    print("|---" + "|---:" * (len(columns) - 1) + "|")
    for row in rows:
        cells = [row.model, *(f"{row.losses[kind]:.3f}" for kind in KINDS), f"{row.mean:.3f}"]
        if row.measured:
            peaks = (row.measured.peak_bytes, row.measured.peak_anonymous_bytes)
            cells += [f"{row.measured.seconds:.1f} s", *(f"{size / 2**30:.2f} GiB" for size in peaks)]
        print("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
    print("\nmachine:", ", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"config: {sizes}\n")
    result = {"machine": machine(), "config": dataclasses.asdict(sizes), "rows": [row.as_json() for row in rows]}
    print(json.dumps({"benchmark": "smollm2_experts", **result}))


if __name__ == "__main__":
    main()
