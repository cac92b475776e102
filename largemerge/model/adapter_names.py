"""Where an adapter's weights lie on disk, found through the model's class.

    adapter_config.json ──► the class that the adapter was trained on ──► names in its module ─┐
    checkpoint ──► key mapping of that class: names and layouts on disk ───────────────────────┴─► Place

The class is the one that the adapter's config names (a tower of a CLIP, a model with a head for its task), else the
checkpoint's own. A name that is none of the module's may be one of an older Transformers, or of a single expert that
the module holds fused with others: Transformers' own renamings and conversions say which. Where no class can be had,
names on disk decide (`checkpoint/adapter_places.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from largemerge.checkpoint.adapter_places import Block, Place, Places, PlacesByName, find_by_suffix, index_suffixes
from largemerge.checkpoint.index import Checkpoint
from largemerge.errors import LargemergeError
from largemerge.model.key_mapping import Conversion, KeyMapping, map_keys
from largemerge.model.skeleton import load_config

CLASSES_OF_TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
}
"""Transformers' table of classes for each `task_type` of peft."""


class AdapterNames:
    """Makes the places of checkpoints by their classes (see `FindPlaces`); each class is built once.

    Args:
        trust_remote_code: Allow a checkpoint's own Python code.
    """

    def __init__(self, *, trust_remote_code: bool = False) -> None:
        self._trust_remote_code = trust_remote_code
        self._models: dict[tuple[Path, str, str, bool], PreTrainedModel | None] = {}

    def __call__(self, model: Checkpoint, config: Mapping[str, Any]) -> Places:
        """Makes the places of one checkpoint, for an adapter with this config."""
        return _PlacesByClass(model, self._classes(model, config))

    def _classes(self, model: Checkpoint, config: Mapping[str, Any]) -> Iterator[_ClassPlaces]:
        """Yields the places of the classes that may be the adapter's, the likeliest first."""
        seen: set[str] = set()
        for name in self._names(model, config):
            if name in seen:
                continue
            seen.add(name)
            built = self._build(model, name)
            if built is None:
                continue
            try:
                mapping = map_keys(built, model)
            except LargemergeError:
                continue  # this class does not fit the file
            yield _ClassPlaces(model, built, mapping, partial(self._build, model, name, tied=False))

    def _names(self, model: Checkpoint, config: Mapping[str, Any]) -> Iterator[str]:
        given = config.get("auto_mapping")
        if isinstance(given, Mapping) and isinstance(given.get("base_model_class"), str):
            yield given["base_model_class"]
        table: Any = getattr(transformers, CLASSES_OF_TASKS.get(str(config.get("task_type")), ""), None)
        if table is not None:
            try:
                found = table.get(type(load_config(model, trust_remote_code=self._trust_remote_code)), None)
            except LargemergeError:
                found = None
            if found is not None:
                yield (found[0] if isinstance(found, tuple) else found).__name__
        yield from model.config.get("architectures") or ("",)

    def _build(self, model: Checkpoint, name: str, *, tied: bool = True) -> PreTrainedModel | None:
        """Builds a class on the meta device; `None` if it cannot be had.

        Args:
            model: The checkpoint.
            name: Name of the class; none: that of the config's type.
            tied: Tie the head to the embeddings where the config says so.
        """
        parts = [model.config, *(value for value in model.config.values() if isinstance(value, dict))]
        changed = repr([(part.get("vocab_size"), part.get("tie_word_embeddings")) for part in parts])  # by adapters
        key = (model.folder, name, changed, tied)
        if key not in self._models:
            self._models[key] = self._try_to_build(model, name, tied)
        return self._models[key]

    def _try_to_build(self, model: Checkpoint, name: str, tied: bool) -> PreTrainedModel | None:
        try:
            config: Any = load_config(model, trust_remote_code=self._trust_remote_code)
            found: Any = (
                getattr(transformers, name, None) if name else transformers.MODEL_MAPPING.get(type(config), None)
            )
            if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
                return None
            config_class: Any = found.config_class
            if not isinstance(config, config_class):
                config = config_class.from_pretrained(model.folder, local_files_only=True)  # a tower's, of the whole's
                config._attn_implementation = config._experts_implementation = None  # see `load_config`
            if not tied:
                config = type(config).from_dict(_untied(config.to_dict()))
            with init_empty_weights(include_buffers=True):
                built: PreTrainedModel = found(config)
            built.tie_weights()
        except Exception:  # whatever a class of Transformers does with a config that is not its own
            return None
        return built


class _PlacesByClass:
    """Places through classes, tried in turn for every name; then by the names on disk (see `Places`)."""

    def __init__(self, checkpoint: Checkpoint, classes: Iterator[_ClassPlaces]) -> None:
        self._checkpoint, self._coming = checkpoint, classes
        self._classes: list[_ClassPlaces] = []
        self._by_name = PlacesByName(checkpoint)
        self._found: dict[str, Place | None] = {}

    @property
    def by_class(self) -> bool:
        """Whether a class is known."""
        return next(self._all(), None) is not None

    @property
    def way(self) -> str:
        """How names are matched, in words."""
        names = ", ".join(dict.fromkeys(type(each.model).__name__ for each in self._all()))
        return f"through {names}, then by the names on disk" if names else self._by_name.way

    def find(self, name: str) -> Place | None:
        """Finds a parameter by the name that an adapter has for it (see `Places`)."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def parameters_of(self, path: str) -> list[str]:
        """Names of the parameters that a module itself holds, in its order."""
        return next((names for each in self._all() if (names := each.parameters_of(path))), [])

    def _find(self, name: str) -> Place | None:
        absent = None
        for way in ("by_parameter", "by_older_name", "by_suffix"):
            for places in self._all():
                place: Place | None = getattr(places, way)(name)
                if place is not None and place.pieces:
                    return place
                absent = absent or place
        return self._by_name.find(name) or absent

    def _all(self) -> Iterator[_ClassPlaces]:
        """Yields the classes; the next is built only when those before do not do."""
        yield from self._classes
        for places in self._coming:
            self._classes.append(places)
            yield places


class _ClassPlaces:
    """The places of one class's parameters."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        mapping: KeyMapping,
        build_untied: Callable[[], PreTrainedModel | None],
    ) -> None:
        self.model = model
        self._build_untied = build_untied
        self._checkpoint, self._mapping = checkpoint, mapping
        self._state = model.state_dict()
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._suffixes: dict[str, str | None] | None = None
        self._conversions = {target: each for each in mapping.conversions for target in each.targets}
        self._pieces: dict[str, dict[str, Block | None]] = {}
        self._inside: dict[str, dict[str, Block]] = {}
        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}

    def parameters_of(self, path: str) -> list[str]:
        """Names of the parameters that a module itself holds, in its order."""
        module = self._modules.get(path)
        return [name for name, _ in module.named_parameters(recurse=False)] if module is not None else []

    def by_parameter(self, name: str) -> Place | None:
        """Finds the parameter of that name."""
        return self._place(name) if name in self._state else None

    def by_suffix(self, name: str) -> Place | None:
        """Finds the only parameter that ends so."""
        if self._suffixes is None:
            self._suffixes = index_suffixes(self._state)
        found = find_by_suffix(name, self._suffixes)
        return self._place(found) if found is not None else None

    def by_older_name(self, name: str) -> Place | None:
        """Finds a parameter by a name that it has on disk, or had in an older Transformers."""
        prefix = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if renamed not in self._state:
            return None
        if pattern is None:
            return self._place(renamed)
        if name in self._checkpoint.tensors:
            return Place({name: None}, self._checkpoint.tensors[name].shape, fused=True, tied=(name,))
        key = self._mapping.renamed.get(renamed)
        if key is None:
            return None
        block = self._blocks_inside(name, renamed, pattern).get(name)
        if block is None:
            return None
        return Place({key: None}, self._checkpoint.tensors[key].shape[-2:], block, fused=True, tied=(renamed,))

    def _place(self, name: str) -> Place:
        """Returns the place of a parameter of the class."""
        mapping = self._mapping
        first = mapping.canonical(name)
        tied = (first, *(alias for alias, other in mapping.aliases.items() if other == first))
        module = self._modules[name.rpartition(".")[0]] if "." in name else self.model
        separable = self._separable(first, tied[1:]) if len(tied) > 1 else ()
        place = Place({}, tuple(self._state[name].shape), tied=tied, separable=separable, module=module)
        if first in mapping.missing:
            return place
        conversion = self._conversions.get(first)
        if conversion is None:
            key = mapping.renamed[first]
            return replace(place, pieces={key: None}, shape=self._checkpoint.tensors[key].shape)
        if len(conversion.targets) > 1:
            return self._part_of(conversion, first, place)
        if first not in self._pieces:
            self._pieces[first] = _blocks(self.model, conversion, first, self._checkpoint, place.shape)
        pieces = self._pieces[first]
        return replace(place, pieces=pieces, fused=True, has_blocks=bool(pieces))

    def _part_of(self, conversion: Conversion, parameter: str, place: Place) -> Place:
        """Returns the place of one of several parameters that lie in one tensor on disk, as rows of it."""
        keys = [key for key, _ in conversion.sources]
        shape = self._checkpoint.tensors[keys[0]].shape
        rows = torch.arange(shape[0])
        mapping = KeyMapping({}, (conversion,), (), (), {}, {})
        try:
            found = mapping.load(self.model, [parameter], lambda key: rows.reshape(-1, *(1 for _ in shape[1:])))
        except Exception:  # a conversion that counts on real sizes
            return replace(place, has_blocks=False)
        own = found[parameter].flatten()
        first = int(own[0]) if len(own) else 0
        in_order = len(own) == place.shape[0] and torch.equal(own, rows[first : first + len(own)])
        if len(keys) != 1 or len(shape) != 2 or not in_order:
            return replace(place, has_blocks=False)
        return replace(
            place, pieces={keys[0]: None}, inside=Block(None, 0, first, first + len(own), False), shape=shape
        )

    def _separable(self, first: str, names: Sequence[str]) -> tuple[str, ...]:
        """Those of some parameters tied to one that would be tensors of their own in an untied model."""
        untied = self._build_untied()
        parameters = dict(untied.named_parameters(remove_duplicate=False)) if untied is not None else {}
        if first not in parameters:
            return ()
        seen = {id(parameters[first])}
        found = []
        for name in names:
            if name in parameters and id(parameters[name]) not in seen:
                seen.add(id(parameters[name]))
                found.append(name)
        return tuple(found)

    def _blocks_inside(self, name: str, parameter: str, pattern: str) -> dict[str, Block]:
        """Finds which block of a fused parameter each single expert's weight is."""
        if parameter not in self._inside:
            converter = self._by_pattern[pattern]
            sources = _siblings(name, pattern, converter, self._state[parameter].shape[0])
            conversion = Conversion(tuple(sources), (parameter,), parameter, converter)
            shape = tuple(self._state[parameter].shape)
            found = _blocks(self.model, conversion, parameter, None, shape)
            self._inside[parameter] = {key: block for key, block in found.items() if block is not None}
        return self._inside[parameter]


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """Says in a config, and in those inside it, that head and embeddings are two tensors."""
    parts = {key: _untied(value) if isinstance(value, dict) else value for key, value in config.items()}
    return parts | ({"tie_word_embeddings": False} if "tie_word_embeddings" in parts else {})


def _siblings(name: str, pattern: str, converter: WeightConverter, number: int) -> list[tuple[str, str]]:
    """Names of all single weights that make a fused parameter, from the name of one, each with its pattern."""
    shape = re.escape(pattern).replace(r"\*", r"\d+")
    match = re.search(shape, name)
    if match is None:
        return []
    start, end = name[: match.start()], name[match.end() :]
    return [
        (f"{start}{each.replace('*', str(index))}{end}", each)
        for each in converter.source_patterns
        for index in range(number)
    ]


def _blocks(
    model: PreTrainedModel,
    conversion: Conversion,
    parameter: str,
    checkpoint: Checkpoint | None,
    shape: tuple[int, ...],
) -> dict[str, Block | None]:
    """Finds which block of a parameter each tensor on disk is, by converting small stand-ins that are numbered.

    Returns:
        Names on disk with their blocks; empty if they are no blocks, or the stand-ins cannot be converted.
    """
    keys = [key for key, _ in conversion.sources]
    numbers = {key: torch.tensor([[2 * index, 2 * index + 1]]) for index, key in enumerate(keys)}
    mapping = KeyMapping({}, (replace(conversion, targets=(parameter,)),), (), (), {}, {})
    try:
        small = mapping.load(model, [parameter], lambda key: numbers[key])[parameter]
    except Exception:  # a conversion that counts on real sizes
        return {}
    if small.dim() not in (2, 3) or small.numel() != 2 * len(keys) or len(shape) != small.dim():
        return {}
    experts = small if small.dim() == 3 else small.unsqueeze(0)
    found: dict[str, Block | None] = {}
    for index, key in enumerate(keys):
        (expert, first, second), (_, other, _) = (
            (experts == 2 * index).nonzero()[0].tolist(),
            (experts == 2 * index + 1).nonzero()[0].tolist(),
        )
        transposed = other != first
        counts = (experts.shape[1] // (2 if transposed else 1), experts.shape[2] // (1 if transposed else 2))
        at = (first // (2 if transposed else 1), second // (1 if transposed else 2))
        axis = 1 if counts[1] > 1 else 0
        if counts[0] > 1 and counts[1] > 1:
            return {}
        size = shape[-2:][axis] // counts[axis]
        number = expert if small.dim() == 3 else None
        block = Block(number, axis, at[axis] * size, (at[axis] + 1) * size, transposed)
        if checkpoint is not None:
            rows, columns = shape[-2:]
            cut = (size, columns) if axis == 0 else (rows, size)
            if checkpoint.tensors[key].shape != (tuple(reversed(cut)) if transposed else cut):
                return {}
        found[key] = block
    return found
