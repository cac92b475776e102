"""What a data-free merge will do, from the configuration and the checkpoints' headers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from largemerge.arithmetic.config import DataFreeConfig, load_data_free
from largemerge.arithmetic.layout import Layout, lay_out
from largemerge.arithmetic.stream import worker_bytes
from largemerge.checkpoint.adapters import Adapter, open_adapter
from largemerge.checkpoint.index import Checkpoint, open_checkpoint
from largemerge.checkpoint.locate import locate_checkpoint
from largemerge.checkpoint.tensor_info import OutputTensor
from largemerge.config import MergeConfig
from largemerge.errors import CheckpointError, LargemergeError
from largemerge.memory import memory_in_use
from largemerge.references import split_reference
from largemerge.vocabulary.build import Vocabulary, build_vocabulary
from largemerge.vocabulary.ids import move_ids
from largemerge.vocabulary.templates import choose_template
from largemerge.vocabulary.tokenizers import has_tokenizer

CPU = torch.device("cpu")
DataFreeSource = str | Path | Mapping[str, Any] | MergeConfig | DataFreeConfig
"""Never a `MergeConfig` in truth: see `is_data_free`."""


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
class DataFreePlan:
    """What a data-free merge will do.

    Attributes:
        config: Resolved.
        checkpoints: By model.
        reference: The model whose names and config the output has.
        layout: All tensors of the output.
        num_workers: That work side by side.
        vocabulary: Of the output, where embeddings are arranged by token.
        before: What other merges have made for this one.
        adapters: By model, of those that have one.
        template: The output's chat template, where it is not its tokenizer's.
    """

    config: DataFreeConfig
    checkpoints: Mapping[str, Checkpoint]
    reference: str
    layout: Layout
    num_workers: int
    vocabulary: Vocabulary | None = None
    before: Before = Before()
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    template: str | None = None

    @property
    def problems(self) -> list[str]:
        """What makes it impossible."""
        return self.layout.problems

    @property
    def output(self) -> dict[str, OutputTensor]:
        """What is written, by name."""
        return {task.name: OutputTensor(task.out_dtype, task.shape) for task in self.layout.tasks}

    @property
    def bytes_read(self) -> int:
        """From checkpoints, each tensor counted once."""
        return sum(
            self.checkpoints[model].tensors[key].num_bytes for task in self.layout.tasks for model, key in task.inputs
        ) + sum(adapter.num_bytes for adapter in self.adapters.values())

    @property
    def bytes_written(self) -> int:
        """Of all tensors of the output."""
        return sum(tensor.num_bytes for tensor in self.output.values())

    @property
    def peak_bytes(self) -> int:
        """Anonymous memory, libraries included: the process as it is, and all workers at their largest tasks."""
        largest = sorted((worker_bytes(self.config.merge_method, task) for task in self.layout.tasks), reverse=True)
        adapters = sum(adapter.kept_bytes for adapter in self.adapters.values())
        return memory_in_use(CPU).host_anonymous + sum(largest[: self.num_workers]) + adapters

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "merge_method": self.config.merge_method,
            "models": list(self.checkpoints),
            "adapters": {
                name: {"adapted": len(adapter.deltas), "replaced": list(adapter.replaced)}
                for name, adapter in self.adapters.items()
            },
            "reference": self.reference,
            "tensors": len(self.layout.tasks),
            "copied": {task.name: task.copied for task in self.layout.tasks if task.copied},
            "layers": self.layout.layers,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_bytes": self.peak_bytes,
            "num_workers": self.num_workers,
            "vocabulary": self.vocabulary.to_json() if self.vocabulary is not None else None,
            "notes": self.layout.notes,
            "problems": self.layout.problems,
        }


def plan_data_free(source: DataFreeSource, before: Before | None = None) -> DataFreePlan:
    """Plans a data-free merge from the configuration and the checkpoints' headers.

    Args:
        source: The configuration.
        before: What other merges have made for this one.

    Raises:
        LargemergeError: If the inputs cannot be opened. What merely makes the merge impossible is in the
            layout's `problems`.
    """
    assert not isinstance(source, MergeConfig)
    config = source if isinstance(source, DataFreeConfig) else load_data_free(source)
    before = before or Before()
    problems: list[str] = []
    checkpoints: dict[str, Checkpoint] = {}
    adapters: dict[str, Adapter] = {}
    for reference in config.references:
        try:
            checkpoints[reference], adapter = open_model(reference, before)
            adapters |= {reference: adapter} if adapter is not None else {}
        except LargemergeError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(*problems)
    reference = config.base_model if config.base_model is not None else config.references[0]
    vocabulary = _vocabulary(config, checkpoints, reference, before, adapters)
    layout = lay_out(config, checkpoints, reference, vocabulary)
    if vocabulary is not None:
        layout.notes.extend(vocabulary.notes)
    template = _template(config, checkpoints, adapters, layout)
    num_workers = torch.get_num_threads()
    return DataFreePlan(config, checkpoints, reference, layout, num_workers, vocabulary, before, adapters, template)


def _template(
    config: DataFreeConfig, checkpoints: Mapping[str, Checkpoint], adapters: Mapping[str, Adapter], layout: Layout
) -> str | None:
    """The chat template, where the configuration says something of it; notes and problems go to the layout."""
    if not config.chat_template:
        return None
    folders = [tokenizer_folder(checkpoint, adapters.get(name)) for name, checkpoint in checkpoints.items()]
    if config.vocabulary is None and not any(map(has_tokenizer, folders)):
        layout.problems.append("chat_template: no model has a tokenizer that could have one; leave it out")
    template, told = choose_template(config.chat_template, folders)
    layout.notes.append(f"chat template: {told}")
    return template


def open_model(reference: str, before: Before) -> tuple[Checkpoint, Adapter | None]:
    """The checkpoint of a model, or of another merge's result, with its adapter if it has one.

    Raises:
        LargemergeError: If either cannot be opened, or they do not fit together.
    """
    name, lora = split_reference(reference)
    model = before.checkpoints.get(name) or open_checkpoint(locate_checkpoint(name, name), name)
    if lora is None:
        return model, None
    return open_adapter(locate_checkpoint(lora, reference), reference, model)


def tokenizer_folder(checkpoint: Checkpoint, adapter: Adapter | None) -> Path:
    """Where the tokenizer of a model lies: beside an adapter that has brought embeddings, else beside the model."""
    if adapter is not None and adapter.embeddings and has_tokenizer(adapter.checkpoint.folder):
        return adapter.checkpoint.folder
    return checkpoint.folder


def _vocabulary(
    config: DataFreeConfig,
    checkpoints: Mapping[str, Checkpoint],
    reference: str,
    before: Before,
    adapters: Mapping[str, Adapter],
) -> Vocabulary | None:
    if config.vocabulary is None:
        return None
    from largemerge.vocabulary.embeddings import find_token_tensors

    folders = {name: tokenizer_folder(checkpoint, adapters.get(name)) for name, checkpoint in checkpoints.items()}
    tensors = find_token_tensors(checkpoints[reference])
    elsewhere = {name: checkpoint.folder for name, checkpoint in before.checkpoints.items()}
    vocabulary = build_vocabulary(config.vocabulary, folders, config.base_model, reference, tensors, elsewhere)
    moved = copy.deepcopy(dict(checkpoints[reference].config))
    vocabulary.notes += move_ids(
        moved, vocabulary.reference.ids, vocabulary.tokenizer.ids, vocabulary.tokenizer.special
    )
    return vocabulary
