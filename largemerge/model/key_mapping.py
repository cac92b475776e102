"""Maps names on disk to parameter names of the module, and back.

    model-00001.safetensors: tensors ──► renaming, or conversion of several ──► parameters of one block

Names on disk are not always the module's: CLIP checkpoints say `vision_model.encoder…` where today's
`CLIPVisionModel` says `encoder…`, BERT's say `LayerNorm.gamma`, Mixtral's experts lie one by one and are
fused on load. Transformers keeps these renamings and conversions; here they are applied to names first,
and to tensors only for the block at hand. There is no table of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion

from largemerge.checkpoint.index import Checkpoint
from largemerge.errors import CheckpointError

ReadTensor = Callable[[str], torch.Tensor]
"""Reads a tensor by its name on disk."""


@dataclass(frozen=True)
class Conversion:
    """Several tensors on disk that together make one or more parameters, or the other way round.

    Attributes:
        sources: Pairs of a name on disk and the converter's pattern that it matched, in the checkpoint's order.
        targets: Parameter names in the module.
        first_target: The name under which Transformers collects the sources.
        converter: Transformers' converter.
    """

    sources: tuple[tuple[str, str], ...]
    targets: tuple[str, ...]
    first_target: str
    converter: WeightConverter


@dataclass(frozen=True)
class KeyMapping:
    """How one checkpoint's tensors map to the parameters and buffers of a model.

    Attributes:
        renamed: Parameter name → name on disk, where one tensor is one parameter.
        conversions: Conversions that make all other parameters.
        unmapped: Names on disk that the model class has no use for.
        missing: Parameters for which nothing lies on disk, not even under a tied name.
        mismatched: Parameter name → its shape on disk, where that is not what the config says.
        aliases: Parameter name → the name of the parameter that it is tied to.
    """

    renamed: Mapping[str, str]
    conversions: tuple[Conversion, ...]
    unmapped: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]

    def canonical(self, name: str) -> str:
        """The name under which a parameter is loaded: its own, or that of the parameter it is tied to."""
        return self.aliases.get(name, name)

    def has(self, name: str) -> bool:
        """Whether the checkpoint has parameter `name`, or one that it is tied to, in the shape that the class wants."""
        canonical = self.canonical(name)
        return canonical not in self.missing and canonical not in self.mismatched

    def conversion_of(self, name: str) -> Conversion | None:
        """The conversion that makes parameter `name`; `None` for a plain renaming."""
        return next((conversion for conversion in self.conversions if name in conversion.targets), None)

    def disk_keys(self, names: Iterable[str]) -> list[str]:
        """All names on disk that the parameters `names` are made of."""
        sources: dict[str, None] = {}
        for name in names:
            conversion = self.conversion_of(name)
            for source in [self.renamed[name]] if conversion is None else [key for key, _ in conversion.sources]:
                sources[source] = None
        return list(sources)

    def keys_of(self, name: str) -> list[str]:
        """Names on disk that one parameter, or the one it is tied to, is made of; none if it is missing."""
        canonical = self.canonical(name)
        return [] if canonical in self.missing else self.disk_keys([canonical])

    def load(self, model: PreTrainedModel, names: Iterable[str], read: ReadTensor) -> dict[str, torch.Tensor]:
        """Reads the parameters `names`, in the module's layout."""
        loaded: dict[str, torch.Tensor] = {}
        for name in names:
            if name in loaded:
                continue
            conversion = self.conversion_of(name)
            if conversion is None:
                loaded[name] = read(self.renamed[name])
            else:
                loaded |= _convert(model, conversion, read)
        return loaded

    def store(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Brings parameters to their names and layout on disk: the inverse of `load`."""
        stored: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            conversion = self.conversion_of(name)
            if conversion is None:
                stored[self.renamed[name]] = tensor
            elif name == conversion.targets[0]:
                stored |= _revert(model, conversion, {target: tensors[target] for target in conversion.targets})
        return stored


def map_keys(model: PreTrainedModel, checkpoint: Checkpoint) -> KeyMapping:
    """Finds out how the checkpoint's tensors map to the model's parameters.

    Args:
        model: The model, on any device, the meta device included.
        checkpoint: The checkpoint, from `open_checkpoint`.

    Raises:
        CheckpointError: If two tensors on disk claim the same parameter, or several do not fit together as one.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    renamed: dict[str, str] = {}
    collected: dict[str, list[tuple[str, str]]] = {}
    unmapped: list[str] = []
    problems: list[str] = []
    for key in checkpoint.tensors:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unmapped.append(key)
        elif pattern is not None:
            collected.setdefault(name, []).append((key, pattern))
        elif name in renamed:
            problems.append(f"{checkpoint.name}: both {renamed[name]!r} and {key!r} are parameter {name!r}")
        else:
            renamed[name] = key
    conversions: list[Conversion] = []
    shapes = {name: checkpoint.tensors[key].shape for name, key in renamed.items()}
    for first, sources in collected.items():
        try:
            conversion, made = _conversion(model, checkpoint, first, sources, by_pattern[sources[0][1]])
        except RuntimeError as error:
            keys = [key for key, _ in sources]
            problems.append(f"{checkpoint.name}: {keys} do not make {first!r} together: {error}")
            continue
        conversions.append(conversion)
        shapes |= made
    found = {*renamed, *(target for conversion in conversions for target in conversion.targets)}
    aliases = _tied_aliases(model, found)
    missing = tuple(name for name in state if name not in found and name not in aliases)
    if problems:
        raise CheckpointError(*problems)
    mismatched = {name: shape for name, shape in shapes.items() if name in state and shape != tuple(state[name].shape)}
    return KeyMapping(renamed, tuple(conversions), tuple(unmapped), missing, mismatched, aliases)


def prefix_on_disk(names: Iterable[tuple[str, str]]) -> str:
    """Finds what stands before a parameter's name on disk, from the first pair of both that differs by no more."""
    return next((key.removesuffix(name) for name, key in names if key.endswith(name)), "")


def _tied_aliases(model: PreTrainedModel, found: set[str]) -> dict[str, str]:
    """Names that share a parameter with another: all but the one that is on disk and that Transformers keeps."""
    keys: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        keys.setdefault(id(tensor), []).append(name)
    targets = set(getattr(model, "all_tied_weights_keys", None) or {})
    aliases: dict[str, str] = {}
    for names in keys.values():
        kept = min(names, key=lambda name: (name not in found, name in targets))
        aliases |= {name: kept for name in names if name != kept}
    return aliases


def _conversion(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    first_target: str,
    sources: list[tuple[str, str]],
    converter: WeightConverter,
) -> tuple[Conversion, dict[str, tuple[int, ...]]]:
    """Runs the converter on the meta device to learn which parameters it makes, and their shapes."""
    conversion = Conversion(tuple(sources), (), first_target, converter)

    def read(key: str) -> torch.Tensor:
        info = checkpoint.tensors[key]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    made = {name: tuple(tensor.shape) for name, tensor in _convert(model, conversion, read).items()}
    return Conversion(tuple(sources), tuple(made), first_target, converter), made


def _convert(model: PreTrainedModel, conversion: Conversion, read: ReadTensor) -> dict[str, torch.Tensor]:
    """Reads a conversion's sources and makes its parameters of them."""
    converter = copy.deepcopy(conversion.converter)
    for key, pattern in conversion.sources:
        tensor: Any = read(key)  # Transformers takes tensors too, though its annotation says Future
        converter.add_tensor(conversion.first_target, key, pattern, tensor)
    converted: dict[str, Any] = converter.convert(conversion.first_target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _revert(
    model: PreTrainedModel, conversion: Conversion, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Makes the tensors on disk of a conversion's parameters."""
    attributes = vars(model)
    previous = attributes.get("_weight_conversions")
    attributes["_weight_conversions"] = get_model_conversion_mapping(model)
    try:
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    finally:
        attributes["_weight_conversions"] = previous
    wanted = {key for key, _ in conversion.sources}
    if set(reverted) != wanted:
        # Renamings that lose information (a dropped prefix) cannot be undone by name; by suffix they can.
        reverted = {_longest_common_suffix(name, wanted): tensor for name, tensor in reverted.items()}
    if set(reverted) != wanted:
        raise CheckpointError(f"{sorted(wanted)[:3]}: Transformers cannot bring these back to their layout on disk")
    return reverted


def _longest_common_suffix(name: str, candidates: set[str]) -> str:
    def common(other: str) -> int:
        length = 0
        while length < min(len(name), len(other)) and name[-1 - length] == other[-1 - length]:
            length += 1
        return length

    return max(sorted(candidates), key=common)
