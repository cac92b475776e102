"""The inputs of a merge, opened and compared: checkpoints, model class, names on disk.

    references ──► checkpoints, adapters ──► skeleton of one model class ──► a key mapping for every checkpoint

Everything here comes from configs and headers; no weight is read.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.locate import locate_checkpoint, split_reference
from largemerge.checkpoint.lora import Adapter, open_model
from largemerge.checkpoint.quantized import model_dtype, transposed
from largemerge.checkpoint.tensor_info import torch_dtype
from largemerge.errors import CheckpointError, LargemergeError
from largemerge.model.key_mapping import KeyMapping, map_keys
from largemerge.model.skeleton import (
    Skeleton,
    build_skeleton,
    checkpoint_from_config,
    keep_computed,
    linears_in,
    weight_is_transposed,
)
from largemerge.regression.config import MergeConfig

_UNIMPORTANT_CONFIG_KEYS = frozenset(
    [
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "architectures",
        "use_cache",
        "id2label",
        "label2id",
        "finetuning_task",
        "problem_type",
        "task_specific_params",
        "_commit_hash",
        "quantization_config",
    ]
)

Layout = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
"""Name, shape and dtype of every tensor on disk."""


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a merge.

    Attributes:
        candidates: Checkpoints of the candidates, in the order of the config.
        base: Checkpoint of the base; `None` without a `base_model`.
        reference: Checkpoint that gives the output its config and names: the base if it is of the candidates' class
            and complete, else the first candidate.
        skeleton: The model without weights, built from the reference's config.
        candidate_mappings: How each candidate's tensors map to the skeleton.
        base_mapping: How the base's tensors map to the skeleton; `None` without a base.
        reference_mapping: How the reference's tensors map to the skeleton.
        notes: What a user should know though it stops nothing.
        adapters: Name of a checkpoint → its adapter, for those that have one.
    """

    candidates: tuple[Checkpoint, ...]
    base: Checkpoint | None
    reference: Checkpoint
    skeleton: Skeleton
    candidate_mappings: tuple[KeyMapping, ...]
    base_mapping: KeyMapping | None
    reference_mapping: KeyMapping
    notes: tuple[str, ...]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The candidates, and the base if there is one."""
        return (*self.candidates, *([self.base] if self.base is not None else []))

    @property
    def adapter_bytes(self) -> int:
        """Bytes that adapters keep in memory while the models are read."""
        return sum(adapter.kept_bytes for adapter in self.adapters.values())

    def stored_bytes(self, checkpoint: Checkpoint, keys: Sequence[str]) -> int:
        """Bytes on disk of some tensors of a checkpoint, given by their names there; adapters included."""
        adapter = self.adapters.get(checkpoint.name)
        added = adapter.bytes_of(keys) if adapter is not None else 0
        return sum(checkpoint.tensors[key].num_bytes for key in keys) + added

    def quantized(self) -> dict[str, dict[str, int]]:
        """Name of a checkpoint → format → number of weights in it, for checkpoints with quantised weights."""
        return {checkpoint.name: checkpoint.quantized() for checkpoint in self.checkpoints if checkpoint.quantized()}


def open_inputs(config: MergeConfig, *, from_config: bool = False) -> Inputs:
    """Locates and opens all checkpoints and maps their names.

    Args:
        config: The configuration, from `load_config`.
        from_config: Look at each checkpoint's `config.json` alone, as if its weights were what the class would save.

    Raises:
        CheckpointError: If a checkpoint cannot be opened or does not fit, with the problems of all of them.
        ArchitectureError: If the model class is unknown or has no stacks.
    """
    candidates, base, adapters = _open_all(config, from_config)
    classes = {checkpoint.name: _class_name(checkpoint) for checkpoint in candidates}
    if len(set(classes.values())) > 1:
        raise CheckpointError(f"the candidates are of different model classes: {classes}; expected one")
    notes = list(_config_differences(candidates))
    if from_config:
        notes.append("planned from each config.json alone: weights and calibration data have not been looked at")
        references = [
            *(candidate.model for candidate in config.models),
            *([config.base_model] if config.base_model else []),
        ]
        if any(split_reference(reference)[1] is not None for reference in references):
            notes.append("adapters have not been looked at: their room in memory and the time to read them come on top")
    from_base = base is not None and _class_name(base) == _class_name(candidates[0])
    if base is not None and not from_base:
        notes.append(
            f"the base is a {_class_name(base)}, the candidates are {_class_name(candidates[0])}: "
            f"config and names come from {candidates[0].name}"
        )
    skeleton = build_skeleton(
        base if base is not None and from_base else candidates[0],
        config.stacks,
        dtype=_compute_dtype(config, candidates[0]),
        trust_remote_code=config.trust_remote_code,
    )
    candidates = tuple(_oriented(skeleton, each, adapters.get(each.name)) for each in candidates)
    base = _oriented(skeleton, base, adapters.get(base.name)) if base is not None else None
    reference = base if base is not None and from_base else candidates[0]
    maps: dict[Layout, KeyMapping] = {}
    candidate_mappings = tuple(_mapping_of(skeleton, checkpoint, maps) for checkpoint in candidates)
    base_mapping = _mapping_of(skeleton, base, maps) if base is not None else None
    reference_mapping = candidate_mappings[0]
    if reference is base and base_mapping is not None:
        if set(base_mapping.missing) <= set(candidate_mappings[0].missing):
            reference_mapping = base_mapping
        else:
            notes.append(f"the base lacks {len(base_mapping.missing)} tensors: names come from {candidates[0].name}")
            reference = candidates[0]
    lacking = {name for mapping in candidate_mappings for name in mapping.missing}
    computed = keep_computed(skeleton, sorted(lacking))
    if computed:
        notes.append(f"computed by the class, for files lack them: {', '.join(computed)}")
    names = (candidate_mappings, base_mapping, reference_mapping)
    return Inputs(candidates, base, reference, skeleton, *names, tuple(notes), adapters)


def _open_all(
    config: MergeConfig, from_config: bool
) -> tuple[tuple[Checkpoint, ...], Checkpoint | None, dict[str, Adapter]]:
    """Opens candidates, base and adapters; raises with the problems of all of them."""
    problems: list[str] = []
    adapters: dict[str, Adapter] = {}

    def attempt(reference: str, name: str) -> Checkpoint | None:
        try:
            if from_config:
                folder = locate_checkpoint(split_reference(reference)[0], name, weights=False)
                return checkpoint_from_config(folder, name, trust_remote_code=config.trust_remote_code)
            checkpoint, adapter = open_model(reference, name=name)
            if adapter is not None:
                adapters[name] = adapter
            return checkpoint
        except LargemergeError as error:
            problems.extend(error.problems)
            return None

    opened = [attempt(candidate.model, candidate.label) for candidate in config.models]
    base = attempt(config.base_model, "base") if config.base_model is not None else None
    if problems:
        raise CheckpointError(*problems)
    return tuple(checkpoint for checkpoint in opened if checkpoint is not None), base, adapters


def _compute_dtype(config: MergeConfig, candidate: Checkpoint) -> torch.dtype:
    """The user's compute dtype, else that of a quantised candidate's config, else that of most weights."""
    if config.compute_dtype is not None:
        return torch_dtype(config.compute_dtype)
    if candidate.quantized():
        return model_dtype(candidate.config)
    elements: Counter[torch.dtype] = Counter()
    for tensor in candidate.tensors.values():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            elements[tensor.dtype] += tensor.num_bytes // tensor.dtype.itemsize
    return elements.most_common(1)[0][0] if elements else torch.float32


def _oriented(skeleton: Skeleton, checkpoint: Checkpoint, adapter: Adapter | None) -> Checkpoint:
    """Turns a checkpoint's quantised weights to how the modules hold them (see `Quantization.transposed`).

    Raises:
        CheckpointError: If an adapter adds to one of these weights.
    """
    turned = [f"{path}.weight" for path, module in linears_in(skeleton.model).items() if weight_is_transposed(module)]
    if not turned or not checkpoint.quantized():
        return checkpoint
    renamed = map_keys(skeleton.model, checkpoint).renamed
    keys = {renamed[name] for name in turned if name in renamed}
    adapted = [key for key in keys if adapter is not None and key in adapter.deltas]
    if any(checkpoint.tensors[key].quantization is not None for key in adapted):
        raise CheckpointError(
            f"{checkpoint.name}: its adapter adds to {sorted(adapted)[0]}, which is quantised and held as [in, out]; "
            "merge the adapter into its model first (peft: merge_and_unload)"
        )
    tensors = {
        key: transposed(info) if info.quantization is not None and key in keys else info
        for key, info in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def _mapping_of(skeleton: Skeleton, checkpoint: Checkpoint, known: dict[Layout, KeyMapping]) -> KeyMapping:
    """The checkpoint's key mapping: the same object for all that are laid out alike."""
    layout = tuple((name, info.shape, info.dtype) for name, info in checkpoint.tensors.items())
    if layout not in known:
        known[layout] = map_keys(skeleton.model, checkpoint)
    return known[layout]


def _class_name(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "unknown")]
    return str(names[0])


def _config_differences(candidates: tuple[Checkpoint, ...]) -> Iterator[str]:
    """Notes on how the candidates' configs differ from the first one's."""
    first = candidates[0]
    for other in candidates[1:]:
        for key, left, right in _differences(first.config, other.config, ""):
            yield f"configs differ: {key} is {left!r} in {first.name}, {right!r} in {other.name}"


def _differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted((left.keys() | right.keys()) - _UNIMPORTANT_CONFIG_KEYS):
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b
