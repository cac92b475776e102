"""The inputs of a data-free merge, opened from their headers: models, adapters, auxiliary tensors.

    references of the configuration → open_model → checkpoint, adapter
    auxiliary parameter, such as `fisher` → open_tensors → tensors with the models' names
    earlier merges of the same file → PriorMerges → checkpoints that are used like models

No weight is read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from largemerge.checkpoint.index import Checkpoint, open_tensors
from largemerge.checkpoint.locate import short_name
from largemerge.checkpoint.lora import Adapter, open_model
from largemerge.data_free.config import DataFreeConfig
from largemerge.data_free.methods.table import METHODS
from largemerge.errors import CheckpointError, ConfigError, LargemergeError
from largemerge.heads import BASE, NONE, Heads, check_files, find_heads
from largemerge.model.adapter_names import AdapterNames
from largemerge.tokenizer.tokenizers import tokenizer_folder
from largemerge.weight_matching.plan import AlignPlan, plan_alignment


@dataclass(frozen=True)
class PriorMerges:
    """Results of earlier merges of the same file, for a merge that needs them.

    Attributes:
        checkpoints: The results, by name.
        configs: Configurations of these merges, in order.
        reports: Contents of their `merge_report.json`, by name.
    """

    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    configs: tuple[DataFreeConfig, ...] = ()
    reports: Mapping[str, Any] = field(default_factory=dict)

    def with_result(self, config: DataFreeConfig, checkpoint: Checkpoint, report: Any) -> PriorMerges:
        """Returns a copy that also holds this merge's result."""
        name = checkpoint.name
        checkpoints, reports = {**self.checkpoints, name: checkpoint}, {**self.reports, name: report}
        return PriorMerges(checkpoints, (*self.configs, config), reports)


@dataclass(frozen=True)
class DataFreeInputs:
    """The inputs of a data-free merge, opened from their headers.

    Attributes:
        checkpoints: The models, by reference.
        adapters: The adapters of models that have one, by reference.
        auxiliary: Tensors that the method needs beside the models', by path; they have the models' names.
        reference: The model whose config and layout the output has, unless another's class has more room.
        heads: Heads that are kept beside the output, where they cannot be merged; models are called by `short_names`.
        whole: Checkpoints of the models with their heads, by short name; empty where heads are merged.
        stored: The same by reference, those without a head among them.
    """

    checkpoints: dict[str, Checkpoint]
    adapters: dict[str, Adapter]
    auxiliary: dict[str, Checkpoint]
    reference: str
    heads: Heads | None = None
    whole: dict[str, Checkpoint] = field(default_factory=dict)
    stored: dict[str, Checkpoint] = field(default_factory=dict)

    @property
    def tokenizer_folders(self) -> dict[str, Path]:
        """Folder of every model's tokenizer, if it has one, by reference."""
        return {name: tokenizer_folder(found, self.adapters.get(name)) for name, found in self.checkpoints.items()}


def open_inputs(config: DataFreeConfig, prior: PriorMerges) -> DataFreeInputs:
    """Opens all models with their adapters, and the auxiliary tensors.

    Raises:
        CheckpointError: If any of them cannot be opened; it lists the problems of all.
    """
    inputs = DataFreeInputs({}, {}, {}, config.base_model or config.references[0])
    problems: list[str] = []
    find_places = AdapterNames()
    for reference in config.references:
        try:
            inputs.checkpoints[reference], adapter = open_model(
                reference, prior.checkpoints, variant=config.variant, find_places=find_places
            )
        except LargemergeError as error:
            problems.extend(error.problems)
            continue
        if adapter is not None:
            inputs.adapters[reference] = adapter
    parameter = METHODS[config.merge_method].auxiliary_parameter
    for path in config.auxiliary_paths(parameter) if parameter is not None else ():
        try:
            inputs.auxiliary[path] = open_tensors(Path(path), f"{parameter}: {path}")
        except LargemergeError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(*problems)
    return _with_heads(config, inputs)


def plan_matching(config: DataFreeConfig, inputs: DataFreeInputs, prior: PriorMerges) -> AlignPlan | None:
    """Plans how all models are brought close to one of them, or to another; `None` where they stay as they are.

    Raises:
        LargemergeError: If that model cannot be opened, or the class of one cannot be had.
    """
    if config.aligned_to is None:
        return None
    assert config.align is not None
    # Heads that are kept apart read the residual stream, too.
    checkpoints = (inputs.stored or inputs.checkpoints) if config.align.residual_stream else inputs.checkpoints
    return plan_alignment(
        checkpoints,
        inputs.adapters,
        config.aligned_to,
        prior.checkpoints,
        residual_stream=config.align.residual_stream,
        variant=config.variant,
        trust_remote_code=config.trust_remote_code,
    )


def short_names(references: Sequence[str]) -> dict[str, str]:
    """Shortens references for the names of files, so that no two are alike."""
    short = [short_name(reference) for reference in references]
    return {
        reference: name if short.count(name) == 1 and name not in (BASE, NONE) else f"{name}-{number}"
        for number, (reference, name) in enumerate(zip(references, short, strict=True), start=1)
    }


def _with_heads(config: DataFreeConfig, inputs: DataFreeInputs) -> DataFreeInputs:
    """Takes heads that cannot be merged out of the models; see `largemerge.heads`.

    Raises:
        ConfigError: If the configuration asks for a head that is not there.
    """
    if not config.models:  # layers are stacked: the output is made of parts, each with its own place
        if config.head is not None:
            raise ConfigError("head: expected 'models'; slices and modules say themselves what the output is made of")
        return inputs
    listed = list(dict.fromkeys(entry.model for entry in config.models))
    beside_base = [each for each in listed if each != config.base_model]
    names = short_names(beside_base if len(beside_base) > 1 else listed)  # of a base and one model, both are merged
    choice = names.get(config.head, config.head) if config.head is not None else None
    candidates = [replace(inputs.checkpoints[reference], name=name) for reference, name in names.items()]
    base = replace(inputs.checkpoints[config.base_model], name=BASE) if config.base_model is not None else None
    if not candidates:
        return inputs
    try:
        heads = find_heads(
            candidates, base, choice, trust_remote_code=config.trust_remote_code, merges_with_bodies=True
        )
    except ConfigError:
        raise
    except LargemergeError:
        return inputs  # without a class nobody can tell; `alignment` says so
    if heads is None:
        return inputs
    check_files(heads)
    checkpoints = dict(inputs.checkpoints)
    by_name = {**names, **({config.base_model: BASE} if config.base_model is not None and heads.base else {})}
    for reference, name in by_name.items():
        viewed = heads.view(replace(checkpoints[reference], name=name))
        checkpoints[reference] = replace(viewed, name=checkpoints[reference].name)
    chosen = next((reference for reference, name in by_name.items() if name == heads.choice), inputs.reference)
    whole = {name: inputs.checkpoints[reference] for reference, name in (*names.items(), *by_name.items())}
    return replace(
        inputs, checkpoints=checkpoints, reference=chosen, heads=heads, whole=whole, stored=inputs.checkpoints
    )
