"""Text: the four SmolLM2-135M experts of `smollm2_experts.py`, and their losses in nats per token.

Another seed is another order of the training texts and another draw of the calibration samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from corpora import KINDS, Corpus, load_corpus
from evaluation import heldout_losses
from experts import Training, make_base, make_expert, sequences
from quality_cases import Case, Score, digest

HELDOUT_SEQUENCES, QUICK_SEQUENCES = 32, 4
CALIBRATION_PER_FILE = 8
CALIBRATION_DOCUMENTS = 256


def make_case(work: Path, seed: int, quick: bool) -> Case:
    """Trains the experts, minutes each, unless they are there; base and packages are the same for all seeds."""
    training = Training(steps=2, batch_size=2, length=64, seed=seed) if quick else Training(seed=seed)
    packages, base = work.parent / "packages", work.parent / "base"
    packages.mkdir(exist_ok=True)
    make_base(base, packages)
    corpora = {kind: load_corpus(kind, packages, CALIBRATION_PER_FILE) for kind in KINDS}
    experts = {kind: work / "experts" / kind for kind in KINDS}
    for kind, folder in experts.items():
        make_expert(base, folder, corpora[kind].train, training)
    tokenizer = AutoTokenizer.from_pretrained(base)
    heldout = {
        kind: sequences(
            corpus.heldout,
            tokenizer,
            count=QUICK_SEQUENCES if quick else HELDOUT_SEQUENCES,
            length=training.length,
        )
        for kind, corpus in corpora.items()
    }

    def measure(checkpoint: Path) -> Mapping[str, Score]:
        losses = heldout_losses(checkpoint, heldout, work / "losses")
        return {kind: Score(loss) for kind, loss in losses.items()}

    return Case(
        base,
        experts,
        _write_calibration(work / "calibration", tokenizer, corpora, training.length),
        {"max_length": training.length, "batch_size": 4},
        measure,
        dtype="bfloat16",
        heldout=digest(*(tokens.numpy().tobytes() for tokens in heldout.values())),
    )


def _write_calibration(
    folder: Path, tokenizer: PreTrainedTokenizerBase, corpora: Mapping[str, Corpus], length: int
) -> dict[str, Path]:
    """A file for each kind, of documents that have as many tokens."""
    folder.mkdir(exist_ok=True)
    files = {kind: folder / f"{kind}.jsonl" for kind in corpora}
    for kind, corpus in corpora.items():
        long_enough = [text for text in corpus.calibration if len(tokenizer(text).input_ids) >= length]
        lines = [json.dumps({"text": text}) + "\n" for text in long_enough[:CALIBRATION_DOCUMENTS]]
        files[kind].write_text("".join(lines))
    return files
