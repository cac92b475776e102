"""Models held against one class: which tensor of each is which parameter, whatever the files call it.

    names on disk of one model ──(its class)──► parameters ──(the output's class)──► names of the output

The output has the names and the layout on disk of one of the models, the *layout model*. Of every other model, a tensor
is read as it lies there if it is the same tensor under another name; where several together make a parameter (experts
that lie one by one, or fused), it is brought into that layout as it is read (`AlignedReader`).

A parameter that the class ties to another is one tensor, unless one of the models has trained both: then the output is
untied, and of the models that are tied both are the same tensor.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.sentence_modules import split_name
from largemerge.checkpoint.tensor_files import Rows
from largemerge.checkpoint.tensor_info import LAYER_NUMBER, TensorInfo, list_kinds
from largemerge.errors import ArchitectureError, CheckpointError, LargemergeError
from largemerge.model.classes import ClassifiedModel, choose_layout, classify, token_parameters, translate
from largemerge.model.config_differences import check_configs
from largemerge.model.key_mapping import Conversion, map_keys, prefix_on_disk
from largemerge.model.output_check import check_own_configs
from largemerge.model.skeleton import build_model
from largemerge.model.ties import declared_ties, is_tied, untie_config, untied_heads

_KEPT_GROUPS = 3  # of converted tensors, for each model


@dataclass(frozen=True)
class Relayout:
    """Tensors of a model that lie on disk otherwise than the layout model's, and are converted as they are read.

    Attributes:
        source: The model that is read.
        names: Parameter in the layout model → parameter in the source.
        layout: The model whose layout they are brought into.
    """

    source: ClassifiedModel
    names: Mapping[str, str]
    layout: ClassifiedModel

    def load(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Reads the source's parameters, and returns the tensors of the layout by their names on disk."""
        loaded = self.source.mapping.load(self.source.model, list(self.names.values()), read)
        ours = {ours: loaded[theirs] for ours, theirs in self.names.items()}
        return self.layout.mapping.store(self.layout.model, ours)

    def num_bytes(self) -> int:
        """Size on disk of what is read, in bytes."""
        keys = self.source.mapping.disk_keys(self.names.values())
        return sum(self.source.checkpoint.tensors[key].num_bytes for key in keys)


@dataclass(frozen=True)
class ModelView:
    """The tensors of one model by the names that the output has for them.

    Attributes:
        checkpoint: The model's checkpoint.
        tensors: Name in the output → tensor, whose own name is what the model's reader takes.
        relayouts: Name of a tensor that no file holds → what makes it; see `AlignedReader`.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]
    relayouts: Mapping[str, Relayout] = field(default_factory=dict)

    @property
    def converted_bytes(self) -> int:
        """Size of the largest group of tensors that is converted at once, in bytes."""
        return max((relayout.num_bytes() for relayout in self.relayouts.values()), default=0)

    @property
    def kept_bytes(self) -> int:
        """Maximum of memory that converted tensors take while the model is read, in bytes."""
        return (_KEPT_GROUPS + 2) * self.converted_bytes


@dataclass(frozen=True)
class Alignment:
    """Models under common names.

    Attributes:
        views: The models, by reference.
        layout: Reference of the model whose class, config and layout on disk the output has.
        config: The output's config, as far as names and ties decide it.
        class_name: Name of the class through which names were found; empty where they are taken as they lie on disk.
        token_tensors: Names in the output of tensors with a row for every token; `None` where no class was had.
        notes: What a user should know.
        problems: What makes a merge impossible.
        lacking: Parameters of the output's class that no model has, with their shapes, by the names that they would
            have in the output.
    """

    views: Mapping[str, ModelView]
    layout: str
    config: Mapping[str, Any]
    class_name: str
    token_tensors: frozenset[str] | None
    notes: list[str]
    problems: list[str]
    lacking: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


class _Aligner:
    """Finds the names of the output and every model's tensors for them.

    Args:
        models: The models, by reference.
        layout: The model whose class and layout on disk the output has, with the config of the output.
        first: Its reference.
        separate: For every model, parameters of its own that its class would tie.
    """

    def __init__(
        self,
        models: Mapping[str, ClassifiedModel],
        layout: ClassifiedModel,
        first: str,
        separate: Mapping[str, Mapping[str, str]],
    ) -> None:
        self._models, self._layout, self._first = models, layout, first
        self._separate = separate
        self._places = {name: translate(model.model, layout.model) for name, model in models.items()}
        self._backwards = {name: _inverse(places) for name, places in self._places.items()}
        self._owners: dict[str, str] = {}  # parameter of the output's class → the model that names it on disk
        for name in (first, *(name for name in models if name != first)):
            for parameter in models[name].parameters:
                place = self._places[name].get(parameter)
                if place is not None:
                    self._owners.setdefault(place, name)
        self.aliases = {name: target for name, target in layout.mapping.aliases.items() if target in self._owners}
        for alias in self.aliases:
            self._owners.pop(alias, None)

    def names_of(self, parameter: str) -> list[str]:
        """Names in the output of a parameter of its class."""
        owner = self._owners.get(self.aliases.get(parameter, parameter))
        if owner is None:
            return []
        own = self._own_name(owner, self.aliases.get(parameter, parameter))
        return self._models[owner].mapping.disk_keys([own]) if own is not None else []

    def lacking(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns what `Alignment.lacking` has."""
        outside = {place: self.names_of(place) for place in self._owners if not LAYER_NUMBER.search(place)}
        prefix = prefix_on_disk((place, keys[0]) for place, keys in outside.items() if len(keys) == 1)
        state = self._layout.model.state_dict()
        return {
            prefix + name: (name, tuple(tensor.shape))
            for name, tensor in state.items()
            if name not in self._owners and name not in self.aliases and not LAYER_NUMBER.search(name)
        }

    def view(self, name: str) -> ModelView:
        """Returns one model's tensors by the names of the output."""
        tensors: dict[str, TensorInfo] = {}
        relayouts: dict[str, Relayout] = {}
        classified = self._models[name]
        done: set[str] = set()
        for place, owner in self._owners.items():
            if place in done:
                continue
            own = self._own_name(name, place)
            if own is None:
                continue
            theirs = self._models[owner]
            their_name = self._own_name(owner, place)
            assert their_name is not None, "the owner has it"
            ours, other = classified.mapping.conversion_of(own), theirs.mapping.conversion_of(their_name)
            if ours is None and other is None:
                key = classified.mapping.renamed[own]
                tensors[theirs.mapping.renamed[their_name]] = _by_key(classified.checkpoint, key)
                continue
            pairs = _paired(ours, other)
            if pairs is not None:
                assert other is not None, "both are conversions"
                for output_name, key in pairs.items():
                    tensors[output_name] = _by_key(classified.checkpoint, key)
                done |= {self._places[owner][target] for target in other.targets if target in self._places[owner]}
                continue
            relayout = self._relayout(name, owner, place)
            done |= {self._places[owner][each] for each in relayout.names}
            for output_name, info in _laid_out(relayout).items():
                tensors[output_name] = info
                relayouts[output_name] = relayout
        return ModelView(classified.checkpoint, tensors, relayouts)

    def _own_name(self, name: str, place: str) -> str | None:
        """Finds a model's own parameter, or the one that it is tied to, for a parameter of the output's class."""
        classified = self._models[name]
        for own in self._backwards[name].get(place, ()):
            if own in self._separate.get(name, {}):
                return own
            canonical = classified.mapping.canonical(own)
            if canonical not in classified.mapping.missing:
                return canonical
        tied = declared_ties(self._layout.model).get(place)
        return self._own_name(name, tied) if tied is not None and is_tied(classified.model) else None

    def _relayout(self, name: str, owner: str, place: str) -> Relayout:
        """Makes what brings all parameters that lie together on either side into the owner's layout."""
        source, layout = self._models[name], self._models[owner]
        wanted, todo = dict[str, str](), [place]
        while todo:
            next_place = todo.pop()
            theirs, own = self._own_name(owner, next_place), self._own_name(name, next_place)
            if theirs is None or own is None:
                raise CheckpointError(
                    f"{name}: has only a part of what {owner} holds together with {next_place}; expected all of it"
                )
            if theirs in wanted:
                continue
            wanted[theirs] = own
            for model, which, places in (
                (layout, theirs, self._places[owner]),
                (source, own, self._places[name]),
            ):
                conversion = model.mapping.conversion_of(which)
                todo += [places[each] for each in (conversion.targets if conversion else ()) if each in places]
        return Relayout(source, wanted, layout)


def _by_key(checkpoint: Checkpoint, key: str) -> TensorInfo:
    """Returns a tensor under the name that the model's reader takes: what an adapter holds has another one there."""
    return replace(checkpoint.tensors[key], name=key)


def _inverse(places: Mapping[str, str]) -> dict[str, list[str]]:
    inverse: dict[str, list[str]] = {}
    for own, place in places.items():
        inverse.setdefault(place, []).append(own)
    return inverse


def _paired(ours: Conversion | None, other: Conversion | None) -> dict[str, str] | None:
    """Pairs the tensors on disk of two conversions that are alike: name in the output → our name; else `None`."""
    if ours is None or other is None:
        return None

    def by_pattern(conversion: Conversion) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key, pattern in conversion.sources:
            found.setdefault(pattern, []).append(key)
        return found

    mine, theirs = by_pattern(ours), by_pattern(other)
    if {pattern: len(keys) for pattern, keys in mine.items()} != {p: len(keys) for p, keys in theirs.items()}:
        return None
    return {their: my for pattern in theirs for their, my in zip(theirs[pattern], mine[pattern], strict=True)}


def _laid_out(relayout: Relayout) -> dict[str, TensorInfo]:
    """Learns names, shapes and dtypes of a relayout's tensors on the meta device."""
    tensors = relayout.source.checkpoint.tensors

    def read(key: str) -> torch.Tensor:
        return torch.empty(tensors[key].shape, dtype=tensors[key].dtype, device="meta")

    file = next(iter(tensors.values())).file
    made = relayout.load(read)
    return {name: TensorInfo(name, tuple(made[name].shape), made[name].dtype, file, None) for name in made}


class AlignedReader:
    """Reads a model's tensors, those included that are converted into another layout (see `TensorReader`).

    Args:
        inner: Reader of the model's tensors as they lie on disk.
        relayouts: Name of a tensor that no file holds → what makes it.
    """

    def __init__(self, inner: TensorReader, relayouts: Mapping[str, Relayout]) -> None:
        self.checkpoint = inner.checkpoint
        self._inner, self._relayouts = inner, relayouts
        self._lock = threading.Lock()
        self._made: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._inner.bytes_read

    @property
    def bytes_past_cache(self) -> int:
        """Bytes read so far that did not go through the system's cache."""
        return self._inner.bytes_past_cache

    def read(self, name: str, rows: Rows = None, *, again: bool = False) -> torch.Tensor:
        """Reads a tensor, or some of its rows."""
        relayout = self._relayouts.get(name)
        if relayout is None:
            return self._inner.read(name, rows, again=again)
        with self._lock:  # one group at a time: it may be large, and Transformers' conversions share the model
            if id(relayout) not in self._made:
                if len(self._made) >= _KEPT_GROUPS:
                    del self._made[next(iter(self._made))]
                self._made[id(relayout)] = relayout.load(self._inner.read)
            tensor = self._made[id(relayout)][name]
        return (tensor if rows is None else tensor[rows]).clone(memory_format=torch.contiguous_format)


def align(
    checkpoints: Mapping[str, Checkpoint],
    adapters: Mapping[str, Adapter],
    reference: str,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
    allow_crimes: bool = False,
    compares_labels: bool = True,
) -> Alignment:
    """Brings models under common names.

    Args:
        checkpoints: The models, by reference.
        adapters: The adapters of models that have one, by reference.
        reference: The model whose names, layout and config the output has, if its class has a place for all tensors.
        base: The base, if there is one: what only it has counts least.
        trust_remote_code: Allow the checkpoints' own Python code.
        allow_crimes: Merge models whose configs say that they compute otherwise.
        compares_labels: Whether labels matter: they do not where heads are kept apart.
    """
    try:
        models = classify(checkpoints, adapters, trust_remote_code=trust_remote_code)
    except ArchitectureError as error:
        return _by_name(checkpoints, reference, error, allow_crimes=allow_crimes)
    notes: list[str] = []
    problems: list[str] = []
    check_own_configs(models, adapters)  # what follows would only say the same in other words
    chosen, homeless = choose_layout(models, reference, [base] if base is not None else [])
    for name, parameters in homeless.items():
        text = f"{name} has {list_kinds(parameters, 3)}, for which {models[chosen].class_name} has no place"
        if name == base:
            notes.append(f"{text}: left out, as nothing is merged into them")
        else:
            problems.append(f"{text} (the class of {chosen}); expected models of one class")
    if chosen != reference:
        notes.append(f"names and config come from {chosen}: its class {models[chosen].class_name} has room for all")
    idle = () if compares_labels else ("id2label", "label2id")
    configs = {
        name: {key: value for key, value in model.model.config.to_dict().items() if key not in idle}
        for name, model in models.items()
    }
    found = check_configs(configs, chosen, allow_crimes=allow_crimes)
    if found[0]:
        raise CheckpointError(*problems, *found[0])  # what follows would only say the same in other words
    notes += found[1]
    separate = untied_heads(models, adapters)
    layout, problem = _untied(models[chosen], models, separate, trust_remote_code)
    if problem is not None:
        problems.append(problem)
    elif layout is not models[chosen]:
        some = ", ".join(separate)
        notes.append(f"{some}: has output embeddings of its own, so the output's are untied from the input embeddings")
    if not layout.mapping.aliases:
        tied = [name for name, model in models.items() if model.mapping.aliases]
        if tied and layout is models[chosen]:
            notes.append(
                f"{', '.join(tied)}: input and output embeddings are one tensor, which enters both of the output"
            )
    aligner = _Aligner({**models, chosen: replace(layout, mapping=models[chosen].mapping)}, layout, chosen, separate)
    views = {name: aligner.view(name) for name in models}
    _add_unknown(models, chosen, base, views, notes)
    for name, view in views.items():
        if view.relayouts:
            notes.append(f"{name}: {len(view.relayouts)} tensors are converted to the layout of {chosen}")
    return Alignment(
        views,
        chosen,
        layout.checkpoint.config,
        layout.class_name,
        frozenset(key for name in token_parameters(layout.model)[0] for key in aligner.names_of(name)),
        notes,
        problems,
        aligner.lacking(),
    )


def _untied(
    chosen: ClassifiedModel,
    models: Mapping[str, ClassifiedModel],
    separate: Mapping[str, Mapping[str, str]],
    trust_remote_code: bool,
) -> tuple[ClassifiedModel, str | None]:
    """Returns the layout model, untied where any model has trained what its class ties; and what forbids that."""
    tied = set(chosen.mapping.aliases)
    wanted = {
        place
        for name, pairs in separate.items()
        for own, place in translate(models[name].model, chosen.model).items()
        if own in pairs and place in tied
    }
    if not wanted:
        return chosen, None
    config = untie_config(chosen.checkpoint.config)
    checkpoint = replace(chosen.checkpoint, config=config)
    model = build_model(checkpoint, trust_remote_code=trust_remote_code)
    mapping = map_keys(model, checkpoint)
    still = wanted & set(mapping.aliases)
    if still:
        name = next(iter(separate))
        return chosen, (
            f"{name}: {sorted(still)[0]} has values of its own, but {chosen.class_name} always ties it; "
            "expected one tensor"
        )
    return ClassifiedModel(checkpoint, model, mapping), None


def _add_unknown(
    models: Mapping[str, ClassifiedModel],
    chosen: str,
    base: str | None,
    views: dict[str, ModelView],
    notes: list[str],
) -> None:
    """Adds tensors that a model's class does not know, by their names on disk, where the output may have them.

    That is where all models but the base have them, or where the class passes over them when it loads (layers for
    speculative decoding, mostly). Buffers that the class makes itself, and all others, are left out, and told.
    """
    layout = models[chosen]
    patterns = [re.compile(each) for each in layout.model._keys_to_ignore_on_load_unexpected or ()]
    known = {key for view in views.values() for key in view.tensors}
    merged = [set(model.checkpoint.tensors) for name, model in models.items() if name != base] or [set()]
    everywhere = set.intersection(*merged)
    told: dict[str, dict[str, list[str]]] = {}

    def tell(what: str, keys: Sequence[str], name: str) -> None:
        if keys:
            told.setdefault(what, {}).setdefault(list_kinds(keys, 3), []).append(name)

    for name, classified in models.items():
        buffers = classified.remade_buffers()
        modules = [key for key in classified.mapping.unmapped if split_name(key)[0]]  # of sentence-transformers
        rest = [key for key in classified.mapping.unmapped if key not in buffers and key not in modules]
        kept = [
            key for key in rest if key in known or key in everywhere or any(pattern.search(key) for pattern in patterns)
        ]
        added = {
            key: _by_key(classified.checkpoint, key) for key in (*kept, *modules) if key not in views[name].tensors
        }
        views[name] = replace(views[name], tensors={**views[name].tensors, **added})
        tell("left out, as the class makes them itself", buffers, name)
        tell("unknown to the model class, merged by name", [key for key in kept if key not in known], name)
        tell("left out, as no class has a use for them", [key for key in rest if key not in kept], name)
    for what, texts in told.items():
        notes += [f"{what}: {text} (in {', '.join(names)})" for text, names in texts.items()]


def _by_name(
    checkpoints: Mapping[str, Checkpoint], reference: str, error: LargemergeError, *, allow_crimes: bool
) -> Alignment:
    """Takes names as they lie on disk, where a class cannot be had."""
    config = checkpoints[reference].config
    views = {
        name: ModelView(checkpoint, {key: _by_key(checkpoint, key) for key in checkpoint.tensors})
        for name, checkpoint in checkpoints.items()
    }
    heads = {key for view in views.values() for key in view.tensors if key.endswith("lm_head.weight")}
    untied = False
    for name, view in views.items():
        embeddings = [key for key in view.tensors if key.endswith(_INPUT_EMBEDDINGS)]
        lacking = [head for head in heads if head not in view.tensors]
        if lacking and len(embeddings) == 1:
            added = {head: view.tensors[embeddings[0]] for head in lacking}
            views[name] = replace(view, tensors={**view.tensors, **added})
            untied = untied or name == reference
    notes = [f"tensors are matched by their names on disk, not through the model's class ({error.problems[0]})"]
    configs = {name: checkpoint.config for name, checkpoint in checkpoints.items()}
    problems, differences = check_configs(configs, reference, allow_crimes=allow_crimes)
    config = untie_config(config) if untied else config
    return Alignment(views, reference, config, "", None, [*notes, *differences], problems)


_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


def tensors_in_order(views: Iterable[ModelView]) -> Iterator[str]:
    """Yields the names of all models' tensors, each once."""
    yield from dict.fromkeys(name for view in views for name in view.tensors)
