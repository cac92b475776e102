"""Everything that a data-free merge reads, opened: models, their adapters, and what belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from largemerge.checkpoint.index import Checkpoint, open_tensors
from largemerge.checkpoint.lora import Adapter
from largemerge.checkpoint.model_source import open_model
from largemerge.data_free.config import DataFreeConfig
from largemerge.data_free.methods.table import METHODS
from largemerge.errors import CheckpointError, LargemergeError
from largemerge.tokenizer.tokenizers import has_tokenizer


@dataclass(frozen=True)
class Before:
    """What other merges of the same file have made, for one that needs it.

    Attributes:
        checkpoints: Results, by name.
        configs: Of these merges, in order.
        reports: As `merge_report.json` has them, by name.
    """

    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    configs: tuple[DataFreeConfig, ...] = ()
    reports: Mapping[str, Any] = field(default_factory=dict)

    def with_result(self, config: DataFreeConfig, checkpoint: Checkpoint, report: Any) -> Before:
        """With one more."""
        name = checkpoint.name
        checkpoints, reports = {**self.checkpoints, name: checkpoint}, {**self.reports, name: report}
        return Before(checkpoints, (*self.configs, config), reports)


@dataclass(frozen=True)
class Opened:
    """From headers alone.

    Attributes:
        checkpoints: By model.
        adapters: By model, of those that have one.
        companions: What the method wants beside the models, by path: tensors with the models' names.
    """

    checkpoints: dict[str, Checkpoint]
    adapters: dict[str, Adapter]
    companions: dict[str, Checkpoint]

    @property
    def tokenizer_folders(self) -> dict[str, Path]:
        """By model: where its tokenizer lies, if it has one."""
        return {name: tokenizer_folder(found, self.adapters.get(name)) for name, found in self.checkpoints.items()}


def open_all(config: DataFreeConfig, before: Before) -> Opened:
    """Opens all models, and what belongs to them.

    Raises:
        CheckpointError: With the problems of all of them.
    """
    opened = Opened({}, {}, {})
    problems: list[str] = []
    for reference in config.references:
        try:
            opened.checkpoints[reference], adapter = open_model(reference, before.checkpoints)
        except LargemergeError as error:
            problems.extend(error.problems)
            continue
        if adapter is not None:
            opened.adapters[reference] = adapter
    parameter = METHODS[config.merge_method].companion
    for path in config.companions(parameter) if parameter is not None else ():
        try:
            opened.companions[path] = open_tensors(Path(path), f"{parameter}: {path}")
        except LargemergeError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(*problems)
    return opened


def tokenizer_folder(checkpoint: Checkpoint, adapter: Adapter | None) -> Path:
    """Where the tokenizer of a model lies: beside an adapter that has brought embeddings, else beside the model."""
    if adapter is not None and adapter.embeddings and has_tokenizer(adapter.checkpoint.folder):
        return adapter.checkpoint.folder
    return checkpoint.folder
