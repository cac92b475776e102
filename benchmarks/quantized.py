"""What does quantisation cost a merge? Bytes, time, memory and losses with int8 and NF4, in and out.

    python benchmarks/quantized.py [--work DIR]    # the experts of smollm2_experts.py, which must be there
    python benchmarks/quantized.py --quick         # tiny models, made on the spot: the numbers mean nothing

Takes the four SmolLM2-135M experts, lets Transformers and bitsandbytes make int8 and NF4 copies of them, and
merges bf16, int8 and NF4 candidates, and bf16 candidates with int8 and NF4 output, all by the default method.
Each merge runs in a process of its own (`measure.py`); held-out losses as in `smollm2_experts.py`, for every
checkpoint the weights as they are stored, computed in the same way (`evaluation.py`). Everything it makes lies in
`DIR/quantized/`. Ends with one line of JSON. Needs `pip install -e '.[benchmarks,bitsandbytes]'`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from corpora import KINDS, load_corpus
from evaluation import heldout_losses
from experts import sequences
from largemerge.checkpoint.index import open_checkpoint
from largemerge.checkpoint.reader import CheckpointReader
from measure import Measured, machine, run_measured

COPIES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
}
MERGES = (("bf16", None), ("int8", None), ("nf4", None), ("bf16", "int8"), ("bf16", "nf4"))
"""Format of the candidates, and of the output (None: plain)."""
SAMPLES, LENGTH, HELDOUT = 16, 256, 32


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    model: str
    losses: Mapping[str, float]
    read_bytes: int | None = None
    written_bytes: int | None = None
    measured: Measured | None = None
    quantization_error: float | None = None

    @property
    def mean(self) -> float:
        """Over the kinds of text."""
        return sum(self.losses.values()) / len(self.losses)

    def as_json(self) -> dict[str, Any]:
        """The row for the JSON line."""
        measured = dataclasses.asdict(self.measured) if self.measured else {}
        plain = {key: value for key, value in vars(self).items() if key not in ("losses", "measured")}
        return {**plain, "mean": self.mean, **self.losses, **measured}


@dataclass(frozen=True)
class Setting:
    """Where the experts and their data are."""

    folder: Path
    experts: Mapping[str, Path]
    data: Mapping[str, Path]
    heldout: Mapping[str, torch.Tensor]


def main() -> None:
    """Quantises, merges, measures, prints."""
    arguments = _arguments()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        setting = _tiny(Path(scratch)) if arguments.quick else _smollm2(arguments.work.resolve())
        candidates = {"bf16": setting.experts} | {name: _copies(setting, name) for name in COPIES}
        rows = []
        for name, folders in candidates.items():
            own = {kind: _losses(folder, setting, kind)[kind] for kind, folder in folders.items()}
            rows.append(Row(f"{name} experts, each on its own", own))
        for kind_in, kind_out in MERGES[2:] if arguments.quick else MERGES:
            rows.append(_merge(setting, candidates[kind_in], kind_in, kind_out))
        _print(rows, tuple(setting.experts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merge quantised SmolLM2-135M experts; see the top of this file.")
    default = Path(__file__).parent / "runs" / "smollm2"
    parser.add_argument("--work", type=Path, default=default, help="folder of smollm2_experts.py (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    return parser.parse_args()


def _smollm2(work: Path) -> Setting:
    experts = {kind: work / "experts" / kind for kind in KINDS}
    missing = [str(folder) for folder in experts.values() if not (folder / "config.json").is_file()]
    if missing:
        raise SystemExit(f"run smollm2_experts.py --work {work} first; missing: {', '.join(missing)}")
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    heldout = {
        kind: sequences(load_corpus(kind, work / "packages").heldout, tokenizer, count=HELDOUT, length=LENGTH)
        for kind in KINDS
    }
    data = {kind: work / "calibration" / f"{kind}.jsonl" for kind in KINDS}
    return Setting(work / "quantized", experts, data, heldout)


def _tiny(folder: Path) -> Setting:
    """Random Llamas and random tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    experts, data, heldout = {}, {}, {}
    for kind in KINDS:
        experts[kind], data[kind] = folder / "experts" / kind, folder / f"{kind}.safetensors"
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(experts[kind])
        save_file({"input_ids": torch.randint(3, 256, (8, 32))}, data[kind])
        heldout[kind] = torch.randint(3, 256, (4, 32))
    return Setting(folder / "quantized", experts, data, heldout)


def _copies(setting: Setting, name: str) -> dict[str, Path]:
    """Quantised copies of all experts, unless they are there."""
    copies = {}
    for kind, expert in setting.experts.items():
        copies[kind] = setting.folder / name / kind
        if (copies[kind] / "config.json").is_file():
            continue
        partial = copies[kind].with_name(f"{kind}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        settings = BitsAndBytesConfig(**COPIES[name])
        AutoModelForCausalLM.from_pretrained(expert, quantization_config=settings).save_pretrained(partial)
        for file in expert.glob("*token*"):
            shutil.copyfile(file, partial / file.name)
        partial.rename(copies[kind])
    return copies


def _merge(setting: Setting, candidates: Mapping[str, Path], kind_in: str, kind_out: str | None) -> Row:
    """Runs one merge through the command line, and evaluates what it wrote."""
    name = f"{kind_in} to {kind_out or 'bf16'}"
    output = setting.folder / "merged" / name.replace(" ", "-")
    config: dict[str, Any] = {
        "merge_method": "regmean_plusplus",
        "models": [
            {"model": str(folder), "name": kind, "calibration": {"data": str(setting.data[kind])}}
            for kind, folder in candidates.items()
        ],
        "calibration": {"num_samples": SAMPLES, "max_length": LENGTH, "batch_size": 4, "seed": 0},
    }
    if kind_out is not None:
        config["output"] = {"quantization": kind_out}
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f"{output.name}.yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "largemerge", "merge", str(path), str(output), "--force"]
    measured = run_measured(command, output.with_name(f"{output.name}.log"))
    print(f"{name}: merged in {measured.seconds:.0f} s", flush=True)
    report = json.loads((output / "merge_report.json").read_text())
    error = report["quantization"]["mean_relative_error"]
    return Row(
        f"merge, {name}", _losses(output, setting), report["bytes_read"], report["bytes_written"], measured, error
    )


def _losses(checkpoint: Path, setting: Setting, *kinds: str) -> dict[str, float]:
    """On all kinds of text, or some. Quantised weights are dequantised first: all run through the same kernels."""
    heldout = {kind: tokens for kind, tokens in setting.heldout.items() if not kinds or kind in kinds}
    if not open_checkpoint(checkpoint, checkpoint.name).quantized():
        return heldout_losses(checkpoint, heldout, setting.folder / "losses")
    with tempfile.TemporaryDirectory(dir=setting.folder) as scratch:
        plain = Path(scratch)
        with CheckpointReader(open_checkpoint(checkpoint, checkpoint.name)) as reader:
            tensors = {name: reader.read(name) for name in reader.checkpoint.tensors}
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((checkpoint / "config.json").read_text())
        del config["quantization_config"]
        (plain / "config.json").write_text(json.dumps(config))
        return heldout_losses(plain, heldout, setting.folder / "losses")


def _print(rows: Sequence[Row], kinds: Sequence[str]) -> None:
    """The table, the machine, and the line of JSON."""
    columns = ["held-out loss, nats per token", *kinds, "mean", "read", "written", "time", "peak RSS", "anonymous"]
    columns.append("error of quantisation")
    print("\n| " + " | ".join(columns) + " |")
    print("|---" + "|---:" * (len(columns) - 1) + "|")
    for row in rows:
        cells = [row.model, *(f"{row.losses[kind]:.3f}" for kind in kinds), f"{row.mean:.3f}"]
        if row.measured and row.read_bytes is not None and row.written_bytes is not None:
            cells += [f"{size / 2**20:.0f} MiB" for size in (row.read_bytes, row.written_bytes)]
            cells += [f"{row.measured.seconds:.1f} s"]
            peaks = (row.measured.peak_bytes, row.measured.peak_anonymous_bytes)
            cells += [f"{size / 2**30:.2f} GiB" for size in peaks]
            cells += [f"{row.quantization_error:.4f}" if row.quantization_error is not None else ""]
        print("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
    where = machine() | {"bitsandbytes": bitsandbytes.__version__}
    print("\nmachine:", ", ".join(f"{name} {value}" for name, value in where.items()), "\n")
    print(json.dumps({"benchmark": "quantized", "machine": where, "rows": [row.as_json() for row in rows]}))


if __name__ == "__main__":
    main()
