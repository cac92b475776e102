"""What a family gives the quality benchmark: a base, its experts, calibration data, and a way to measure a model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Score:
    """How well a model does a task, on held-out data."""

    loss: float
    """Nats per token, image or passage."""
    accuracy: float | None = None
    """Share of right answers, where there are answers."""


@dataclass(frozen=True)
class Case:
    """The experts of one family and one seed."""

    base: Path
    experts: Mapping[str, Path]
    """By task."""
    calibration: Mapping[str, Path]
    """By task: a file of samples, enough of them for any merge, that are neither trained on nor measured on."""
    reading: Mapping[str, Any]
    """Keys of `calibration` in the YAML that say how the files are read, but for `num_samples` and `seed`."""
    measure: Callable[[Path], Mapping[str, Score]]
    """Loads a checkpoint, and scores it on every task."""
    dtype: str
    """In which base and experts are stored, and merges are."""
    heldout: str
    """Digest of what is measured on."""


MakeCase = Callable[[Path, int, bool], Case]
"""Makes what is not there yet in a folder, for a seed, tiny or in full size."""


def make_once(folder: Path, about: Mapping[str, Any], make: Callable[[Path], None]) -> None:
    """Fills a folder, unless it was filled from the very same.

    Args:
        folder: Where the result goes.
        about: All that the result depends on, in JSON's types.
        make: Writes into the folder that it is given, which becomes `folder` when it is done.
    """
    marker = folder.with_name(f"{folder.name}.json")
    if folder.is_dir() and marker.is_file() and json.loads(marker.read_text()) == about:
        return
    marker.unlink(missing_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    for stale in (folder, partial):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    partial.rename(folder)
    marker.write_text(json.dumps(about))


def digest(*parts: bytes | str | Path) -> str:
    """A hash of bytes, texts, and files; of a folder, of its configuration and weights."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = [part] if part.is_file() else sorted([part / "config.json", *part.glob("*.safetensors")])
            pieces = [path.read_bytes() for path in files]
        else:
            pieces = [part.encode() if isinstance(part, str) else part]
        for piece in pieces:
            found.update(hashlib.sha256(piece).digest())
    return found.hexdigest()[:16]
