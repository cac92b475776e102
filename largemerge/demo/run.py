"""The demo as a list of steps.

    texts → base and experts (unless they are there) → calibration files and configs → merges
    → losses on held-out text → table and picture → what to type next

All of it lies in one folder; the models are trained once, the rest is made anew by every run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from largemerge.api import merge
from largemerge.demo.corpora import Corpus, DemoSettings, load_corpora
from largemerge.demo.measure import AVERAGE, losses_svg, losses_table, measure
from largemerge.demo.train import train_all
from largemerge.devices import one_thread_each
from largemerge.errors import OutputError
from largemerge.units import duration

METHODS = {"RegMean": "regmean", "RegMean++": "regmean_plusplus", "Calibrated": "calibrated"}
"""`merge_method` by label."""

_MARKER = "largemerge_demo.json"
_CONFIG = """\
# {label} of the demo's experts: {summary}.
# Paths are relative to this file. `largemerge demo` writes it anew.

merge_method: {method}
base_model: base

models:
{models}
calibration:                  # for each expert:
  num_samples: {num_samples:<14} # {num_tokens} tokens in all, against at most {num_inputs} inputs of a linear
  max_length: {max_length:<15} # tokens of a sample
  batch_size: 32

parameters:
{parameters}"""
_REGMEAN_PARAMETERS = """\
  off_diagonal_scale: 0.95    # near 1: that many tokens tell how inputs go together; with few, 0.1 is safer
  ridge: 1.0e-6               # only for numerical safety
"""
_PARAMETERS = {
    "regmean": _REGMEAN_PARAMETERS,
    "regmean_plusplus": _REGMEAN_PARAMETERS,
    "calibrated": """\
  target: 1                   # aim at what each expert itself computes; 0: at its weights, on what the merge computes
  drift: 1                    # pay back by how much the hidden states have drifted from the expert's
  solve: [blocks, head]       # the head, too
""",
}
_SUMMARIES = {
    "regmean": "every expert shows the inputs of its linears on its own data, all by itself",
    "regmean_plusplus": "block by block, every expert's block sees what the merged blocks before it give",
    "calibrated": "linear by linear, what each expert computes is aimed at, and drift is paid back",
}


def run_demo(out: Path, settings: DemoSettings | None = None) -> None:
    """Trains tiny experts, merges them and shows what came out. Works offline and on the CPU.

    Args:
        out: Folder for everything; new, empty, or an earlier demo's, whose models are used again.
        settings: Sizes of everything; by default those of a minute's training.

    Raises:
        OutputError: If `out` holds something else.
        LargemergeError: If this Python came without the texts to train on.
    """
    settings = settings or DemoSettings()
    console = Console()
    _check_folder(out)
    with _quiet_transformers(), one_thread_each():  # matrices are so small that threads would only slow them down
        corpora = load_corpora(settings)
        _say(console, "texts", f"{', '.join(corpora)}: from Python's standard library")
        _provide_models(out, corpora, settings, console)
        _write_inputs(out, corpora, settings)
        for label, method in METHODS.items():
            start = time.perf_counter()
            merge(_config(out, method), _merged(out, method), device="cpu", force=True, quiet=False)
            _say(console, "merged", f"{_merged(out, method)} ({label}, {duration(time.perf_counter() - start)})")
        losses = measure(
            out / "base",
            {f"{kind} expert": out / "experts" / kind for kind in corpora},
            {label: _merged(out, method) for label, method in METHODS.items()},
            corpora,
            settings,
        )
    merges = [AVERAGE, *METHODS]
    (out / "losses.svg").write_text(losses_svg(losses, merges), encoding="utf-8")
    console.print()
    console.print(losses_table(losses, merges))
    console.print(_what_next(out), highlight=False, soft_wrap=True, markup=False)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; expected a folder for the demo: choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARKER).is_file():
        raise OutputError(f"{out} holds files, but no {_MARKER} of an earlier demo: choose another --out, or empty it")
    out.mkdir(parents=True, exist_ok=True)


def _provide_models(out: Path, corpora: Mapping[str, Corpus], settings: DemoSettings, console: Console) -> None:
    marker = out / _MARKER
    # The texts belong to it: another Python has others, and what was trained on may be held out there.
    texts = hashlib.sha256(repr(sorted(corpora.items())).encode()).hexdigest()
    wanted: dict[str, Any] = {"settings": dataclasses.asdict(settings), "texts": texts, "trained": True}
    folders = [out / "base", *(out / "experts" / kind for kind in corpora)]
    complete = all((folder / "model.safetensors").is_file() for folder in folders)
    if complete and _read_marker(marker) == wanted:
        _say(console, "models", f"{out / 'experts'}: trained by an earlier run")
        return
    # Says `trained` only once all are: what an interrupted run leaves is trained anew.
    _write_marker(marker, wanted | {"trained": False})
    for folder in (out / "base", out / "experts"):
        shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    train_all(out, corpora, settings)
    _write_marker(marker, wanted)
    _say(console, "models", f"{out / 'experts'}: trained in {duration(time.perf_counter() - start)}")


def _read_marker(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_marker(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_inputs(out: Path, corpora: Mapping[str, Corpus], settings: DemoSettings) -> None:
    (out / "calibration").mkdir(exist_ok=True)
    models = ""
    for kind, corpus in corpora.items():
        lines = [json.dumps({"text": text}) + "\n" for text in corpus.calibration]
        (out / "calibration" / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")
        models += f"  - model: experts/{kind}\n    calibration: {{data: calibration/{kind}.jsonl, pack: true}}\n"
    for label, method in METHODS.items():
        text = _CONFIG.format(
            label=label,
            summary=_SUMMARIES[method],
            method=method,
            models=models,
            num_samples=settings.calibration_samples,
            num_tokens=settings.calibration_samples * settings.sequence_length,
            num_inputs=settings.hidden_size * 8 // 3,
            max_length=settings.sequence_length,
            parameters=_PARAMETERS[method],
        )
        _config(out, method).write_text(text, encoding="utf-8")


def _config(out: Path, method: str) -> Path:
    return out / f"{method}.yaml"


def _merged(out: Path, method: str) -> Path:
    return out / f"merged-{method}"


def _what_next(out: Path) -> str:
    config = shlex.quote(str(_config(out, "calibrated")))
    mine = shlex.quote(str(out / "merged-mine"))
    return f"""
The picture:   {out / "losses.svg"}
The configs:   {", ".join(str(_config(out, method)) for method in METHODS.values())}

Change one and merge again, or see what it would do:

    largemerge plan {config}
    largemerge merge {config} {mine}
"""


def _say(console: Console, what: str, text: str) -> None:
    console.print(f"{what:<8}{text}", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    logging: Any = transformers_logging
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
