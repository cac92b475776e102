"""What a data-free merge will do, from the configuration and the checkpoints' headers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from largemerge.arithmetic.accelerator import accelerated_device
from largemerge.arithmetic.config import DataFreeConfig, load_data_free
from largemerge.arithmetic.holding import Holding, Limits, choose_holding
from largemerge.arithmetic.layout import lay_out
from largemerge.arithmetic.opening import Before, Opened, open_all
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.tasks import Layout
from largemerge.checkpoint.adapters import Adapter
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.tensor_info import OutputTensor
from largemerge.config import MergeConfig
from largemerge.distributed import Ranks
from largemerge.vocabulary.build import Vocabulary, build_vocabulary
from largemerge.vocabulary.ids import move_ids
from largemerge.vocabulary.templates import choose_template
from largemerge.vocabulary.tokenizers import has_tokenizer

DataFreeSource = str | Path | Mapping[str, Any] | MergeConfig | DataFreeConfig
"""Never a `MergeConfig` in truth: see `is_data_free`."""


@dataclass(frozen=True)
class DataFreePlan:
    """What a data-free merge will do.

    Attributes:
        config: Resolved.
        checkpoints: By model.
        companions: What the method wants beside the models, by path: tensors with the models' names.
        reference: The model whose names and config the output has.
        layout: All tensors of the output.
        holding: How much is held at once.
        vocabulary: Of the output, where embeddings are arranged by token.
        before: What other merges have made for this one.
        adapters: By model, of those that have one.
        template: The output's chat template, where it is not its tokenizer's.
        seconds: By stage, where the machine was probed.
    """

    config: DataFreeConfig
    checkpoints: dict[str, Checkpoint]
    companions: dict[str, Checkpoint]
    reference: str
    layout: Layout
    holding: Holding
    vocabulary: Vocabulary | None
    before: Before
    adapters: Mapping[str, Adapter]
    template: str | None
    seconds: Mapping[str, float] = field(default_factory=dict)

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
        """From checkpoints and what belongs to them, each tensor counted once."""
        return sum(
            files[model].tensors[key].num_bytes
            for task in self.layout.tasks
            for files, keys in ((self.checkpoints, task.inputs), (self.companions, task.companions))
            for model, key in keys
        ) + sum(adapter.num_bytes for adapter in self.adapters.values())

    @property
    def bytes_written(self) -> int:
        """Of all tensors of the output."""
        return sum(tensor.num_bytes for tensor in self.output.values())

    @property
    def scratch_bytes(self) -> int:
        """On the output's disk while the merge runs, beside the output: merged task vectors that wait for a factor."""
        return sum(tensor.num_bytes for tensor in self.unscaled.values())

    @property
    def unscaled(self) -> dict[str, OutputTensor]:
        """Merged task vectors that wait for the whole model's factor, by name."""
        if METHODS[self.config.merge_method].scaled is None:
            return {}
        tasks = [task for task in self.layout.tasks if not task.copied]
        return {task.name: OutputTensor(torch.float32, task.shape) for task in tasks}

    @property
    def num_workers(self) -> int:
        """That work side by side."""
        return self.holding.num_workers

    @property
    def device(self) -> torch.device:
        """Where matrices are computed."""
        return self.holding.accelerator.device

    @property
    def peak_bytes(self) -> int:
        """Anonymous memory, libraries included: the process as it is, and all workers at their largest tasks."""
        return self.holding.peak_bytes

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
            "merged_otherwise": {task.name: task.otherwise for task in self.layout.tasks if task.otherwise},
            "scratch_bytes": self.scratch_bytes,
            "layers": self.layout.layers,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_bytes": self.peak_bytes,
            "num_workers": self.num_workers,
            "device": str(self.device),
            "device_bytes": self.holding.device_bytes,
            "kept_bytes": self.holding.kept_bytes,
            "seconds": dict(self.seconds),
            "vocabulary": self.vocabulary.to_json() if self.vocabulary is not None else None,
            "notes": self.layout.notes,
            "problems": self.layout.problems,
        }


def plan_data_free(
    source: DataFreeSource,
    before: Before | None = None,
    *,
    device: str = "auto",
    ranks: Ranks | None = None,
    limits: Limits | None = None,
    probe: bool = False,
) -> DataFreePlan:
    """Plans a data-free merge from the configuration and the checkpoints' headers.

    Args:
        source: The configuration.
        before: What other merges have made for this one.
        device: Where matrices are computed, see `accelerated_device`.
        ranks: That share the merge; by default there is one.
        limits: That come before those of the configuration.
        probe: Measure this machine for a second, so that the plan says how long the merge will take.

    Raises:
        LargemergeError: If the inputs cannot be opened, or the device not be used. What merely makes the merge
            impossible is in the layout's `problems`.
    """
    assert not isinstance(source, MergeConfig)
    config = source if isinstance(source, DataFreeConfig) else load_data_free(source)
    before, ranks = before or Before(), ranks or Ranks()
    computes_on = accelerated_device(config.merge_method, device, ranks)
    opened = open_all(config, before)
    reference = config.base_model if config.base_model is not None else config.references[0]
    vocabulary = _vocabulary(config, opened, reference, before)
    layout = lay_out(config, opened.checkpoints, reference, opened.companions, vocabulary)
    if vocabulary is not None:
        layout.notes.extend(vocabulary.notes)
    adapter_bytes = sum(adapter.kept_bytes for adapter in opened.adapters.values())
    if device not in ("auto", "cpu") and computes_on.type == "cpu":
        layout.notes.append(f"{config.merge_method} goes element by element, at the speed of the disk: on the CPU")
    limits = (limits or Limits()).or_those_of(config.memory, ranks.local_size)
    plan = DataFreePlan(
        config=config,
        checkpoints=opened.checkpoints,
        companions=opened.companions,
        reference=reference,
        template=_template(config, opened, layout),
        layout=layout,
        holding=choose_holding(config.merge_method, layout, adapter_bytes, limits, computes_on),
        vocabulary=vocabulary,
        before=before,
        adapters=opened.adapters,
    )
    if not probe or plan.problems:
        return plan
    from largemerge.arithmetic.forecast import estimate_seconds

    return replace(plan, seconds=estimate_seconds(plan))


def _vocabulary(config: DataFreeConfig, opened: Opened, reference: str, before: Before) -> Vocabulary | None:
    if config.vocabulary is None:
        return None
    from largemerge.vocabulary.embeddings import find_token_tensors

    found = opened.checkpoints[reference]
    elsewhere = {name: checkpoint.folder for name, checkpoint in before.checkpoints.items()}
    vocabulary = build_vocabulary(
        config.vocabulary, opened.tokenizer_folders, config.base_model, reference, find_token_tensors(found), elsewhere
    )
    moved = copy.deepcopy(dict(found.config))
    vocabulary.notes += move_ids(
        moved, vocabulary.reference.ids, vocabulary.tokenizer.ids, vocabulary.tokenizer.special
    )
    return vocabulary


def _template(config: DataFreeConfig, opened: Opened, layout: Layout) -> str | None:
    """The chat template, where the configuration says something of it; notes and problems go to the layout."""
    if not config.chat_template:
        return None
    folders = list(opened.tokenizer_folders.values())
    if config.vocabulary is None and not any(map(has_tokenizer, folders)):
        layout.problems.append("chat_template: no model has a tokenizer that could have one; leave it out")
    template, told = choose_template(config.chat_template, folders)
    layout.notes.append(f"chat template: {told}")
    return template
