"""The demo's texts, of three kinds that come with every Python, and the sizes of all it makes.

    code     modules of the standard library
    prose    the language reference that `help()` shows (`pydoc_data.topics`), without examples
    names    Unicode's names of characters (`unicodedata`)

A *source* is a module, a run of paragraphs or a run of neighbouring characters. Whole sources go to
training, calibration or held-out text, so no model has seen another piece of what it is measured on;
no paragraph of prose is used twice, though topics quote each other.
"""

from __future__ import annotations

import random
import re
import sys
import sysconfig
import tokenize
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from largemerge.errors import LargemergeError

_DOCUMENT_CHARS = 500
_MAX_DOCUMENTS_OF_A_SOURCE = 8
_NAMES_IN_A_SOURCE = 20
_PARAGRAPHS_IN_A_SOURCE = 12
_MIN_PARAGRAPH_CHARS = 60

Source = list[str]
"""Lines or paragraphs; documents are cut between them."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of texts, model, training and calibration; after a change the models are trained anew.

    With the defaults the training takes about a minute on one CPU core.
    """

    seed: int = 0
    """Seed of the split of the texts, of the initial weights and of the order of training."""
    train_chars: int = 300_000
    """Characters of training text of each kind; prose has fewer, at least half."""
    calibration_chars: int = 32_000
    """Characters of calibration text of each kind, for the merges."""
    held_out_chars: int = 24_000
    """Characters of text of each kind that no model is trained or calibrated on."""
    vocabulary_size: int = 2048
    """Tokens of the tokenizer, which is trained on all training texts."""
    hidden_size: int = 96
    """Width of the model; a multiple of 32."""
    num_layers: int = 4
    """Number of blocks."""
    sequence_length: int = 64
    """Tokens of a training, calibration or held-out sample."""
    batch_size: int = 8
    """Samples of a training step."""
    base_steps: int = 600
    """Training steps on all kinds."""
    expert_steps: int = 150
    """Further training steps of each expert, on its own kind."""
    learning_rate: float = 6e-3
    """Peak learning rate, of base and experts."""
    calibration_samples: int = 128
    """Calibration samples of each kind."""


@dataclass(frozen=True)
class Corpus:
    """Texts of one kind: documents of about 500 characters."""

    train: tuple[str, ...]
    calibration: tuple[str, ...]
    held_out: tuple[str, ...]


def load_corpora(settings: DemoSettings) -> dict[str, Corpus]:
    """Reads the texts of all kinds; the same Python gives the same texts.

    Args:
        settings: Sizes and seed.

    Returns:
        The texts by the name of their kind.

    Raises:
        LargemergeError: If this Python came without its sources, or with too few of them.
    """
    kinds = {"code": _code, "prose": _prose, "names": _names}
    return {name: _split(name, list(sources()), settings) for name, sources in kinds.items()}


def _code() -> Iterator[Source]:
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.glob("[a-z]*.py")):
        try:
            with tokenize.open(path) as stream:
                yield stream.read().splitlines()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue


def _prose() -> Iterator[Source]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    seen: set[str] = set()
    paragraphs: Source = []
    for name in sorted(topics):
        for raw in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(raw.split())
            is_example = re.search(r"^ {6}|::=|\*{4}|={4}", raw, re.MULTILINE)
            if (
                len(text) >= _MIN_PARAGRAPH_CHARS
                and (text[0].isalpha() or text[0] in '"*')
                and not is_example
                and text not in seen
            ):
                seen.add(text)
                paragraphs.append(text)
    yield from _runs(paragraphs, _PARAGRAPHS_IN_A_SOURCE)


def _names() -> Iterator[Source]:
    names = (unicodedata.name(chr(code), "") for code in range(sys.maxunicode + 1))
    # Tens of thousands are made by rule (CJK UNIFIED IDEOGRAPH-4E0A, HANGUL SYLLABLE GAG): nothing to learn.
    by_rule = re.compile(r"HANGUL SYLLABLE|.*(\d|-[0-9A-F]{4,5})$")
    yield from _runs([name for name in names if name and not by_rule.match(name)], _NAMES_IN_A_SOURCE)


def _runs(lines: Source, length: int) -> Iterator[Source]:
    for start in range(0, len(lines), length):
        yield lines[start : start + length]


def _split(name: str, sources: list[Source], settings: DemoSettings) -> Corpus:
    generator = random.Random(settings.seed)
    generator.shuffle(sources)
    excerpts = (_excerpt(source, generator) for source in sources)
    held_out = _take(excerpts, settings.held_out_chars)
    calibration = _take(excerpts, settings.calibration_chars)
    train = _take(excerpts, settings.train_chars)
    # There is less prose than of the rest; what there is will do.
    if sum(map(len, train)) < settings.train_chars / 2:
        raise LargemergeError(
            f"demo: this Python's standard library ({sysconfig.get_path('stdlib')}) has too little {name} "
            "to train on; expected its .py files and pydoc_data.topics. "
            "Run the demo with a complete Python (on Debian: apt install libpython3-stdlib)"
        )
    return Corpus(train, calibration, held_out)


def _take(excerpts: Iterator[list[str]], num_chars: int) -> tuple[str, ...]:
    documents: list[str] = []
    while sum(map(len, documents)) < num_chars and (excerpt := next(excerpts, None)) is not None:
        documents += excerpt
    return tuple(documents)


def _excerpt(source: Source, generator: random.Random) -> list[str]:
    documents = list(_documents(source))
    start = generator.randrange(max(1, len(documents) - _MAX_DOCUMENTS_OF_A_SOURCE + 1))
    return documents[start : start + _MAX_DOCUMENTS_OF_A_SOURCE]


def _documents(source: Source) -> Iterator[str]:
    lines: list[str] = []
    for line in source:
        lines.append(line)
        if sum(map(len, lines)) >= _DOCUMENT_CHARS:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)
