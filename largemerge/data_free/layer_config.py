"""Makes the config of a model whose layers were taken out, put in another order, or taken several times.

    config, layers by stack ──► number of layers, lists by layer, lists of layers, periods
                            ──► models before and after, on the meta device ──► is every layer of its source's kind?

Which keys speak of which layers is found out through the class: a number of layers is one that changes how many the
class makes. Lists with an entry for every layer, and lists that name layers, follow the layers; where a class derives
such a list from a pattern, the list is written out. What a class computes from numbers alone, such as a period and an
offset, is solved for: with the numbers of the source each layer has an answer, and numbers are looked for that give the
layers of the output the same. In the end every layer of the output's model is compared with its source; where they
differ, no config can say what the slices ask for, and the merge is refused.

Without a class, keys are followed by their names.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from largemerge.checkpoint.index import Checkpoint
from largemerge.data_free.matrices import LAYER
from largemerge.errors import LargemergeError
from largemerge.model.key_mapping import map_keys
from largemerge.model.layer_kinds import CLASS, LayerKind, layer_kinds
from largemerge.model.skeleton import all_configs, bare_checkpoint, build_model

Source = tuple[str, int]
"""A model, and the number of a layer in it."""
Path = tuple[str, ...]
"""Keys that lead to a value in a config, such as `("text_config", "num_hidden_layers")`."""
Edits = dict[Path, Any]

_DEPTH = re.compile(r"layers?$|depth$|blocks?$|^(num|n)_(\w+_)?(layers|blocks)")
_NO_DEPTH = re.compile(
    r"period|offset|interval|step|size|window|first|last|drop|norm|dim|freq|idx|index|start|end_|kv_"
)
_BY_LAYER = re.compile(
    r"layer|block|_types?$|pattern|mlp|moe|sparse|per_|_list$|attn|attention|idx|ind(ex|ic)es|hybrid|intermediate|heads$"
)
_NAMES_LAYERS = re.compile(r"idxs?$|ind(ex|exes|ices)$|_ids$|only_layers$|moe_layers$|(attn|attention)_layers$|cross_")
_NEVER = re.compile(r"token|label|^out_|feature|stage_names|lang|section|image|patch|rope|^architectures$")
_NUMBER = re.compile(r"period|offset|step|interval|pattern|freq|every|first|last|start|end|replace|layers|dense|skip")
_TAKEN = re.compile(r"intermediate_layers|deepstack|visual_indexes")
_HIDDEN_STATES = re.compile(r"^(vision_)?(feature|select)_layers?$|feature_layers?$|^out_indices$")
_PLAIN_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_HALVES = ("encoder", "decoder")
_MAX_BUILDS = 24
_SHIFT = 4  # layers by which an end of a slice is moved for an advice


@dataclass(frozen=True)
class LayerConfig:
    """The config of an output whose layers are not those of its reference.

    Attributes:
        config: Contents of `config.json`.
        problems: Why no config can say what the output is.
        notes: What a user should know.
    """

    config: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def follow_layers(
    reference: str, checkpoints: Mapping[str, Checkpoint], layers: Mapping[str, Sequence[Source]]
) -> LayerConfig:
    """Makes the config of the output.

    Args:
        reference: The model whose config the output has.
        checkpoints: The models.
        layers: For every stack of the output, by its name on disk, the layers that it is made of, in order.
    """
    config = copy.deepcopy(dict(checkpoints[reference].config))
    found = depths(checkpoints[reference])
    changed = {
        stack: list(sources)
        for stack, sources in layers.items()
        if list(sources) != [(reference, layer) for layer in range(found.get(stack, 0))]
    }
    if not changed:
        return LayerConfig(config)
    models = dict.fromkeys([reference, *(model for sources in changed.values() for model, _ in sources)])
    try:
        before = {model: _Blueprint.of(checkpoints[model]) for model in models}
        stacks = _module_stacks(before, reference, checkpoints[reference], changed)
    except Exception as error:  # a class may raise whatever it likes
        return _by_name(config, found, changed, _reason(error))
    return _Follower(reference, checkpoints, before, stacks).follow()


def depths(checkpoint: Checkpoint) -> dict[str, int]:
    """Counts the layers of every stack of a checkpoint, by the stack's name on disk."""
    numbers: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        match = LAYER.match(name)
        if match:
            numbers.setdefault(match["stack"], set()).add(int(match["number"]))
    return {stack: len(found) for stack, found in numbers.items()}


@dataclass(frozen=True)
class _Blueprint:
    """A config, and what the class makes of it.

    Attributes:
        raw: The config as it is written.
        full: The config as the class has completed it.
        aliases: Other names of keys, by path of the key that they stand for.
        kinds: Kinds of layers, by path of their list in the model.
        lists: Lists by layer that the class derives from the config, by path; written ones among them.
        checkpoint: The checkpoint, its config being `raw`.
        model: The model, on the meta device.
    """

    raw: Mapping[str, Any]
    full: Mapping[str, Any]
    aliases: Mapping[Path, tuple[Path, ...]]
    kinds: Mapping[str, list[LayerKind]]
    lists: Mapping[Path, list[Any]]
    model: Any

    @classmethod
    def of(cls, checkpoint: Checkpoint, raw: Mapping[str, Any] | None = None) -> _Blueprint:
        raw = checkpoint.config if raw is None else raw
        model = build_model(bare_checkpoint(raw, checkpoint.name))
        parts = all_configs(model.config)
        aliases: dict[Path, list[Path]] = {}
        lists: dict[Path, list[Any]] = {}
        for path, part in parts.items():
            for alias, key in (part.attribute_map or {}).items():
                aliases.setdefault((*path, key), []).append((*path, alias))
            names = [name for name in dir(type(part)) if isinstance(getattr(type(part), name, None), property)]
            for key in [*vars(part), *names]:
                value = _attribute(part, key) if _BY_LAYER.search(key) and not key.startswith("_") else None
                if isinstance(value, list | tuple):
                    where: Path = (*path, key)
                    lists[where] = list(value)
        known = {path: tuple(others) for path, others in aliases.items()}
        return cls(raw, model.config.to_dict(), known, layer_kinds(model), lists, model)

    def value(self, path: Path) -> Any:
        """Returns the value of a key as it is written, else as the class has completed it."""
        for tree in (self.raw, self.full):
            value: Any = tree
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return None

    def paths(self) -> Iterator[Path]:
        """Yields the paths of all values, parts before what lies in them."""
        seen = set()
        for tree in (self.raw, self.full):
            for path in _paths(tree, self._parts()):
                if path not in seen:
                    seen.add(path)
                    yield path

    def _parts(self) -> set[Path]:
        return set(all_configs(self.model.config))


def _attribute(part: Any, key: str) -> Any:
    """Reads an attribute; `None` where a property raises."""
    try:
        return getattr(part, key, None)
    except Exception:  # properties may raise whatever they like
        return None


def _paths(tree: Mapping[str, Any], parts: set[Path], path: Path = ()) -> Iterator[Path]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and (*path, key) in parts:
            yield from _paths(value, parts, (*path, key))
        else:
            yield *path, key


@dataclass(frozen=True)
class _Stack:
    """A stack of the output.

    Attributes:
        name: Its name on disk.
        module: Path of its list in the model.
        depth: The number of layers that the reference's class makes.
        sources: The layers that it is made of, without those that the class does not make.
        extra: How many layers beyond the class's follow at the end, such as those that predict further tokens.
    """

    name: str
    module: str
    depth: int
    sources: list[Source]
    extra: int = 0


def _module_stacks(
    before: Mapping[str, _Blueprint], reference: str, checkpoint: Checkpoint, changed: Mapping[str, list[Source]]
) -> dict[str, _Stack]:
    """Finds the list of modules that every stack on disk is."""
    kinds = before[reference].kinds
    mapping = map_keys(before[reference].model, checkpoint)
    found: dict[str, str] = {}
    pairs = [(name, key) for name, key in mapping.renamed.items()]
    pairs += [(made.targets[0], made.sources[0][0]) for made in mapping.conversions]
    for name, key in pairs:
        on_disk, in_model = LAYER.match(key), LAYER.match(name)
        if on_disk and in_model and on_disk["number"] == in_model["number"] and in_model["stack"] in kinds:
            found.setdefault(on_disk["stack"], in_model["stack"])
    missing = [stack for stack in changed if stack not in found]
    if missing:
        raise LargemergeError(f"the class has no list of layers for {', '.join(missing)}")
    stacks = {}
    for stack, sources in changed.items():
        made = {model: len(blueprint.kinds.get(found[stack], ())) for model, blueprint in before.items()}
        kept = [source for source in sources if source[1] < made[source[0]]]
        if kept != sources[: len(kept)]:
            kept = sources  # among others, a layer that the class does not make is a problem
        stacks[stack] = _Stack(stack, found[stack], made[reference], kept, len(sources) - len(kept))
    return stacks


class _Follower:
    """Looks for a config by which every layer of the output is of its source's kind.

    Args:
        reference: The model whose config the output has.
        checkpoints: The models.
        before: What the class makes of the config of every model.
        stacks: The stacks of the output that are not the reference's, by name on disk.
    """

    def __init__(
        self,
        reference: str,
        checkpoints: Mapping[str, Checkpoint],
        before: Mapping[str, _Blueprint],
        stacks: Mapping[str, _Stack],
    ) -> None:
        self.reference, self.checkpoint, self.before, self.stacks = reference, checkpoints[reference], before, stacks
        self.base = before[reference]
        self.builds = 0
        self.error = ""
        self.lost: dict[Path, str] = {}
        self.built: dict[str, _Blueprint | None] = {}

    def follow(self) -> LayerConfig:
        """Makes the config, or says why there is none."""
        problems = [*self._layers_beyond()]
        if problems:
            return LayerConfig(copy.deepcopy(dict(self.base.raw)), problems)
        edits = self._depths()
        parts = self._parts(edits)
        edits |= self._lists(parts)
        if self.lost:
            return LayerConfig(self._apply(edits), list(self.lost.values()))
        best = self._differences(edits)
        for candidate in self._alternatives(parts):
            if best is not None and not best:
                break
            differences = self._differences(edits | candidate)
            if differences is not None and (best is None or len(differences) < len(best)):
                edits, best = edits | candidate, differences
        config = self._apply(edits)
        if best is None:
            return LayerConfig(config, [f"slices: the class does not take the config of the output: {self.error}"])
        notes = self._notes(edits) if not best else []
        return LayerConfig(config, self._refusals(best, edits, parts), notes)

    # Which keys are numbers of layers

    def _layers_beyond(self) -> Iterator[str]:
        """Says so where layers that the class does not make would come to lie among others."""
        for stack in self.stacks.values():
            for model, layer in stack.sources:
                if layer >= len(self.before[model].kinds.get(stack.module, ())):
                    yield f"{stack.name}: {model} has no layer {layer} by its config"

    def _depths(self) -> Edits:
        """Finds the keys that hold the numbers of layers, and sets them."""
        edits: Edits = {}
        wanted = {stack.module: len(stack.sources) for stack in self.stacks.values()}
        for stack in self.stacks.values():
            if stack.depth == wanted[stack.module]:
                continue
            paths = [path for path in self._depth_keys(stack.depth) if not self._is_alias(path)]
            if len(paths) > 1:
                controlling = [path for path in paths if self._controls([path], stack)]
                idle = [path for path in paths if path not in controlling and path[-1] in _PLAIN_DEPTHS]
                idle = [path for path in idle if self._controls([*controlling, path], stack)]
                paths = [*controlling, *idle] if controlling else paths
            for path in paths:
                edits[path] = wanted[stack.module]
                for alias in self.base.aliases.get(path, ()):
                    if self._is_written(alias):
                        edits[alias] = wanted[stack.module]
        # What a missing key is completed with may hang on another: each is written as it was.
        for stack in self.stacks.values():
            for path in self._depth_keys(stack.depth):
                if path not in edits and not self._is_alias(path) and self.base.value(path) == stack.depth:
                    edits.setdefault(path, self.base.value(path))
        return edits

    def _depth_keys(self, depth: int) -> list[Path]:
        return [
            path
            for path in self.base.paths()
            if _DEPTH.search(path[-1]) and not _NO_DEPTH.search(path[-1])
            if type(self.base.value(path)) is int and self.base.value(path) == depth
        ]

    def _is_alias(self, path: Path) -> bool:
        return any(path in others for others in self.base.aliases.values())

    def _is_written(self, path: Path) -> bool:
        value: Any = self.base.raw
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                return False
            value = value[key]
        return True

    def _controls(self, paths: Sequence[Path], stack: _Stack) -> bool:
        """Says whether keys change the number of layers of this stack, and of no other."""
        others = {key: self.base.value(key) for key in self._depth_keys(stack.depth) if not self._is_alias(key)}
        aliases = [alias for path in paths for alias in self.base.aliases.get(path, ()) if self._is_written(alias)]
        edits = others | dict.fromkeys([*paths, *aliases], len(stack.sources))
        made = self._build(edits | self._lists({path[:-1]: [stack] for path in paths}))
        if made is None:
            return False
        lengths = {name: len(kinds) for name, kinds in made.kinds.items()}
        return lengths == {name: len(kinds) for name, kinds in self.base.kinds.items()} | {
            stack.module: len(stack.sources)
        }

    def _parts(self, edits: Edits) -> dict[Path, list[_Stack]]:
        """Finds the stacks that every part of the config speaks of."""
        parts: dict[Path, list[_Stack]] = {}
        for stack in self.stacks.values():
            paths = [path for path in edits if edits[path] == len(stack.sources)] or self._depth_keys(stack.depth)
            for path in paths:
                if self.base.value(path) == stack.depth:
                    parts.setdefault(path[:-1], [])
                    if stack not in parts[path[:-1]]:
                        parts[path[:-1]].append(stack)
            if not any(stack in here for here in parts.values()):  # a list alone says how many layers there are
                for path in self.base.paths():
                    value = self.base.value(path)
                    if _by_layer(path[-1]) and isinstance(value, list | str) and len(value) == stack.depth:
                        parts.setdefault(path[:-1], [stack])
        return parts

    # Lists

    def _lists(self, parts: Mapping[Path, list[_Stack]]) -> Edits:
        """Lets lists by layer, and lists that name layers, follow the layers."""
        edits: Edits = {}
        for path in self.base.paths():
            stack = self._stack_of(path, parts)
            if stack is not None:
                for value in self._followed(path, stack)[:1]:
                    edits[path] = value
        return edits

    def _stack_of(self, path: Path, parts: Mapping[Path, list[_Stack]]) -> _Stack | None:
        """Returns the stack that a list in a part of the config speaks of."""
        here = [stack for stack in parts.get(path[:-1], ()) if self._speaks_of(path[-1], stack)]
        if _HIDDEN_STATES.search(path[-1]) and not here:
            vision = [stack for each in parts.values() for stack in each if "vision" in stack.module]
            return vision[0] if vision else None
        return next(iter(here), None)

    def _speaks_of(self, key: str, stack: _Stack) -> bool:
        """Says whether a key may speak of this stack, where a model has an encoder and a decoder."""
        names = [name for name in self.base.kinds if any(word in name for word in _HALVES)]
        if not all(any(word in name for name in names) for word in _HALVES):
            return True
        return all(word in stack.module for word in _HALVES if word in key)

    def _followed(self, path: Path, stack: _Stack) -> list[Any]:
        """Returns what a list, or a text with a letter for every layer, may become; the likeliest first."""
        key, value, depth = path[-1], self.base.value(path), stack.depth
        if _HIDDEN_STATES.search(key):
            return self._hidden_states(path, value, stack)
        if _TAKEN.search(key) and isinstance(value, list):
            return self._taken(path, value, stack)
        if key == "stage_names" and isinstance(value, list) and len(value) == depth + 1:
            return [["stem", *(f"stage{number}" for number in range(1, len(stack.sources) + 1))]]
        if key == "out_features" and isinstance(value, list):
            return self._features(path, value, stack)
        if key == "attention_types" and isinstance(value, list):
            return self._expanded(path, stack)
        if _NEVER.search(key) or not _BY_LAYER.search(key):
            return []
        if isinstance(value, str) and len(value) == depth and "pattern" in key:
            return ["".join(self._entries(path, stack) or value)]
        if not isinstance(value, list | tuple):
            return []
        by_layer = self._entries(path, stack) if len(value) == depth else None
        named = self._named(path, stack)
        found = [by_layer, named]
        if named is not None and _NAMES_LAYERS.search(key):
            found.reverse()
        return [each for each in found if each is not None]

    def _entries(self, path: Path, stack: _Stack) -> list[Any] | None:
        values = [(self.before[model].value(path), layer) for model, layer in stack.sources]
        if any(not isinstance(value, list | tuple | str) or len(value) <= layer for value, layer in values):
            return None
        return [value[layer] for value, layer in values]

    def _named(self, path: Path, stack: _Stack) -> list[int] | None:
        """Renumbers a list that names layers; `None` if it is none."""
        value = self.base.value(path)
        numbers = all(type(number) is int for number in value)
        if not numbers or len(set(value)) != len(value) or any(not -stack.depth <= n < stack.depth for n in value):
            return None
        if not _NAMES_LAYERS.search(path[-1]) and "layer" not in path[-1]:
            return None
        found = []
        for number, (model, layer) in enumerate(stack.sources):
            names = self.before[model].value(path) or ()
            if layer in {name % stack.depth for name in names}:
                found.append(number)
        return found

    def _expanded(self, path: Path, stack: _Stack) -> list[Any]:
        """Writes GPT-Neo's `[[["global", "local"], 12]]` anew, which stands for 24 layers."""
        kinds = []
        for model, layer in stack.sources:
            value = self.before[model].value(path)
            try:
                kinds.append([kind for pattern, times in value for kind in pattern * times][layer])
            except (TypeError, ValueError, IndexError):
                return []
        return [[[kinds, 1]]]

    def _taken(self, path: Path, value: list[Any], stack: _Stack) -> list[Any]:
        """Renumbers layers whose outputs are used elsewhere: of a layer that comes twice, the last one's."""
        if any(type(number) is not int for number in value):
            return []
        states = self._hidden_states(path, [number % stack.depth + 1 for number in value], stack)
        return [[number - 1 for number in states[0]]] if states else []

    def _hidden_states(self, path: Path, value: Any, stack: _Stack) -> list[Any]:
        """Renumbers hidden states, of which 0 lies before the first layer; those counted from the end stay."""
        one = [value] if type(value) is int else value
        if not isinstance(one, list) or any(type(number) is not int for number in one):
            return []
        after = {layer + 1: number + 1 for number, (_, layer) in enumerate(stack.sources)}
        after |= {0: 0, stack.depth: len(stack.sources)}
        lost = [number - 1 for number in one if number >= 0 and number not in after]
        if lost:
            self.lost[path] = (
                f"{stack.name}: {'.'.join(path)} takes the output of layer {lost[0]}, which the slices leave out; "
                "expected slices with this layer"
            )
            return []
        moved = [number if number < 0 else after[number] for number in one]
        return [moved[0] if type(value) is int else moved]

    def _features(self, path: Path, value: list[Any], stack: _Stack) -> list[Any]:
        """Renames the stages of a backbone, one after every layer."""
        names = [re.fullmatch(r"stage(\d+)", str(name)) for name in value]
        if not all(match or name == "stem" for match, name in zip(names, value, strict=True)):
            return []
        numbers = self._hidden_states(path, [int(match[1]) if match else 0 for match in names], stack)
        return [[f"stage{number}" if number else "stem" for number in numbers[0]]] if numbers else []

    # What is computed from numbers

    def _alternatives(self, parts: Mapping[Path, list[_Stack]]) -> Iterator[Edits]:
        """Yields edits that may mend what differs: other readings of lists, then numbers that solve for the order."""
        for path in self.base.paths():
            stack = self._stack_of(path, parts)
            if stack is not None:
                yield from ({path: value} for value in self._followed(path, stack)[1:])
                value = self.base.value(path)
                if isinstance(value, list) and len(value) == stack.depth and not self._followed(path, stack):
                    entries = self._entries(path, stack)
                    yield from [{path: entries}] if entries is not None else []
        for part, stacks in parts.items():
            for stack in stacks:
                yield from self._solved(part, stack)

    def _solved(self, part: Path, stack: _Stack) -> Iterator[Edits]:
        """Yields numbers by which the layers of the output have the answers of their sources."""
        numbers = self._numbers(part, stack)
        paired = set()
        for period in numbers:
            offset = (*period[:-1], period[-1].replace("period", "offset"))
            if period[-1].endswith("period") and offset in numbers:
                paired |= {period, offset}
                for solution in self._solve_pair(period, offset, stack):
                    yield {period: solution[0], offset: solution[1]}
        for path in numbers:
            if path not in paired:
                yield from ({path: value} for value in self._solve(path, stack))
        dense = (*part, "mlp_only_layers")
        step = (*part, "decoder_sparse_step")
        if step in numbers and isinstance(self.base.value(dense), list):
            yield {step: 1, dense: self._dense(step, dense, stack)}

    def _numbers(self, part: Path, stack: _Stack) -> list[Path]:
        """Lists the numbers in a part of the config that a class may decide the kinds of layers by."""
        return [
            path
            for path in self.base.paths()
            if path[:-1] == part and type(self.base.value(path)) is int and _NUMBER.search(path[-1])
            if not _NEVER.search(path[-1]) and self._speaks_of(path[-1], stack)
            if path not in self._depth_keys(stack.depth)
        ]

    def _solve_pair(self, period: Path, offset: Path, stack: _Stack) -> Iterator[tuple[int, int]]:
        """Yields periods and offsets, first those near to the source's."""
        answers = [
            layer % self.before[model].value(period) == self.before[model].value(offset)
            for model, layer in stack.sources
        ]
        before, count = self.base.value(period), len(answers)
        found = 0
        for p in sorted(range(1, count + 2), key=lambda p: (p != before, p)):
            for o in range(p):
                if found < 2 and all((i % p == o) == answer for i, answer in enumerate(answers)):
                    found += 1
                    yield p, o

    def _solve(self, path: Path, stack: _Stack) -> list[int]:
        """Lists the values of one number that give the layers their sources' answers, under each rule in use."""
        before, count = self.base.value(path), len(stack.sources)
        found: list[int] = []
        for rule in _RULES:
            try:
                answers = [
                    rule(layer, self.before[model].value(path), len(self.before[model].kinds[stack.module]))
                    for model, layer in stack.sources
                ]
            except (TypeError, ZeroDivisionError):
                continue
            for value in sorted(range(count + 2), key=lambda value: (value != before, value)):
                if value == 0 and rule in _DIVIDING:
                    continue
                if all(rule(i, value, count) == answer for i, answer in enumerate(answers)):
                    if value != before and value not in found:
                        found.append(value)
                    break
        return found

    def _dense(self, step: Path, dense: Path, stack: _Stack) -> list[int]:
        """Numbers the layers without experts, where a class has them by a step and by a list."""
        found = []
        for number, (model, layer) in enumerate(stack.sources):
            source = self.before[model]
            if layer in (source.value(dense) or ()) or (layer + 1) % source.value(step) != 0:
                found.append(number)
        return found

    # Whether a config is right

    def _apply(self, edits: Edits) -> dict[str, Any]:
        config = copy.deepcopy(dict(self.base.raw))
        for path, value in edits.items():
            part = config
            for key in path[:-1]:
                if not isinstance(part.get(key), dict):
                    part[key] = {}
                part = part[key]
            part[path[-1]] = value
        return config

    def _build(self, edits: Edits) -> _Blueprint | None:
        """Builds the model of an edited config; `None` if the class does not take it."""
        key = repr(sorted((path, repr(value)) for path, value in edits.items()))
        if key not in self.built:
            self.builds += 1
            if self.builds > _MAX_BUILDS:
                return None
            try:
                self.built[key] = _Blueprint.of(self.checkpoint, self._apply(edits))
            except Exception as error:  # a class may raise whatever it likes
                self.error = _reason(error)
                self.built[key] = None
        return self.built[key]

    def _differences(self, edits: Edits) -> list[tuple[_Stack, int, str, Any, Any]] | None:
        """Lists where the output's layers are not of their sources' kinds: stack, layer, entry, found, expected."""
        made = self._build(edits)
        if made is None:
            return None
        found: list[tuple[_Stack, int, str, Any, Any]] = []
        for name, kinds in self.base.kinds.items():
            stack = next((stack for stack in self.stacks.values() if stack.module == name), None)
            wanted = len(kinds) if stack is None else len(stack.sources)
            if len(made.kinds.get(name, ())) != wanted:
                if stack is None:
                    stack = _Stack(name, name, len(kinds), [(self.reference, layer) for layer in range(wanted)])
                found.append((stack, -1, "number of layers", len(made.kinds.get(name, ())), wanted))
                found.extend((stack, -1, "", None, None) for _ in range(1000))  # nothing is worse
        for stack in self.stacks.values():
            for number, ((model, layer), kind) in enumerate(
                zip(stack.sources, made.kinds.get(stack.module, ()), strict=False)
            ):
                expected = self.before[model].kinds[stack.module][layer]
                found += [(stack, number, *difference) for difference in kind.differences(expected)]
        return found + self._list_differences(made)

    def _list_differences(self, made: _Blueprint) -> list[tuple[_Stack, int, str, Any, Any]]:
        """Compares the lists by layer that a class derives, which its layers may read only when they run."""
        found = []
        parts = self._parts({})
        for path, values in made.lists.items():
            stack = self._stack_of(path, parts)
            before = self.base.lists.get(path)
            if stack is None or before is None or not _by_layer(path[-1]):
                continue
            if len(before) != stack.depth or len(values) != len(stack.sources):
                continue
            for number, (model, layer) in enumerate(stack.sources):
                source = self.before[model].lists.get(path, before)
                if layer < len(source) and source[layer] != values[number]:
                    found.append((stack, number, ".".join(path), values[number], source[layer]))
        return found

    def _notes(self, edits: Edits) -> list[str]:
        made = self._build(edits)
        assert made is not None, "it has just been compared"
        notes = []
        for stack in self.stacks.values():
            if stack.extra:
                notes.append(f"{stack.name}: {stack.extra} layers at the end are beyond those that the class makes")
            followed = zip(stack.sources, made.kinds[stack.module], strict=True)
            for number, ((model, layer), kind) in enumerate(followed):
                names = kind.other_numbers(self.before[model].kinds[stack.module][layer])
                if names:
                    notes.append(
                        f"{stack.name}.{number}: the class derives {', '.join(names[:3])} from a layer's position: "
                        f"not what layer {layer} of {model} has; so for other layers"
                    )
                    break
        return notes

    def _refusals(
        self, differences: Sequence[tuple[_Stack, int, str, Any, Any]], edits: Edits, parts: Mapping[Path, list[_Stack]]
    ) -> list[str]:
        """Says which layers would be of another kind, by what, and which slices would do."""
        problems = []
        for stack in self.stacks.values():
            here = [each for each in differences if each[0].name == stack.name and each[2]]
            if not here:
                continue
            _, number, entry, found, expected = here[0]
            if number < 0:
                problems.append(
                    f"{stack.name}: {entry}: the config can say {found}, but the slices have {expected}; "
                    f"numbers of layers are in {_listed(self._depth_keys(stack.depth)) or 'no key of the config'}"
                )
                continue
            model, layer = stack.sources[number]
            which = sorted({each[1] for each in here})
            more = f" (so for layers {which[1:6]})" if len(which) > 1 else ""
            keys = [path for part, here in parts.items() if stack in here for path in self._numbers(part, stack)]
            by = (
                f"; the config gives kinds of layers by {_listed(keys)}, and no numbers give this order" if keys else ""
            )
            problems.append(
                f"{stack.name}.{number} would {_told(entry, found)}, but layer {layer} of {model}, which it is made "
                f"of, {_told(entry, expected, of_source=True)}{more}{by}{self._advice(stack, edits)}"
            )
        for stack, _, entry, found, expected in differences:
            if entry == "number of layers" and stack.name not in self.stacks:
                problems.append(f"{stack.name}: would have {found} layers, and has {expected}: one key counts both")
        return problems

    def _advice(self, stack: _Stack, edits: Edits) -> str:
        """Looks for slices near by that the config can say."""
        made = self._build({path: value for path, value in edits.items() if _DEPTH.search(path[-1])})
        positions = max([self.base.kinds[stack.module], made.kinds[stack.module] if made else []], key=len)
        runs: list[tuple[str, int, int]] = []
        for model, layer in stack.sources:
            if runs and runs[-1][0] == model and runs[-1][2] == layer:
                runs[-1] = (model, runs[-1][1], layer + 1)
            else:
                runs.append((model, layer, layer + 1))
        if len(runs) > 4:
            return ""
        fits = {
            (position, model, layer): not kind.differences(its)
            for position, kind in enumerate(positions)
            for model in {model for model, _, _ in runs}
            for layer, its in enumerate(self.before[model].kinds[stack.module])
        }
        best = min(_near(runs, 0, fits, {m: len(b.kinds[stack.module]) for m, b in self.before.items()}), default=None)
        if best is None:
            return ""
        ranges = " and ".join(f"[{start}, {stop}]" for start, stop in best[1])
        return f"; layer_range {ranges} would do"


def _near(
    runs: Sequence[tuple[str, int, int]],
    position: int,
    fits: Mapping[tuple[int, str, int], bool],
    depth: Mapping[str, int],
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yields slices near to those given that fit, with how many layers their ends were moved."""
    if not runs:
        yield 0, []
        return
    model, start, stop = runs[0]
    moves = range(-_SHIFT, _SHIFT + 1)
    for first, last in itertools.product((start + move for move in moves), (stop + move for move in moves)):
        if not 0 <= first < last <= depth[model]:
            continue
        if all(fits.get((position + layer - first, model, layer)) for layer in range(first, last)):
            for moved, rest in _near(runs[1:], position + last - first, fits, depth):
                yield moved + abs(first - start) + abs(last - stop), [(first, last), *rest]


Rule = Callable[[int, int, int], bool]
_DIVIDING: tuple[Rule, ...] = (
    lambda layer, step, _: layer % step == 0,
    lambda layer, step, _: (layer + 1) % step == 0,
    lambda layer, step, _: layer % step == 1,
)
_RULES: tuple[Rule, ...] = (
    lambda layer, first, _: layer >= first,
    lambda layer, last, _: layer > last,
    lambda layer, last, count: layer >= count - last,
    *_DIVIDING,
)
"""Rules by which classes decide from a layer's number, a number of the config and the count of layers."""


def _by_name(
    config: dict[str, Any], found: Mapping[str, int], changed: Mapping[str, list[Source]], reason: str
) -> LayerConfig:
    """Follows the layers by the names of keys, where no class can be asked."""
    notes = [f"config.json follows the layers by the names of its keys, not checked against a class ({reason})"]
    problems = []
    for stack, sources in changed.items():
        depth, layers = found.get(stack, 0), [layer for _, layer in sources]
        if len(changed) > 1 and len({len(each) for each in changed.values()}) > 1:
            words = [word for word in ("encoder", "decoder", "vision", "text") if word in stack]
        else:
            words = []
        counts = 0
        for name, part in [("", config), *((key, value) for key, value in config.items() if isinstance(value, dict))]:
            for key, value in list(part.items()):
                fits = not words or any(word in f"{name} {key}" for word in words)
                if type(value) is int and value == depth and fits and _DEPTH.search(key) and not _NO_DEPTH.search(key):
                    part[key] = len(layers)
                    counts += 1
                elif isinstance(value, list) and len(value) == depth and _by_layer(key):
                    part[key] = [value[layer] for layer in layers]
        if not counts and depth != len(layers):
            problems.append(
                f"{stack}: no key of config.json holds its number of layers, {depth}; the output's {len(layers)} "
                f"cannot be said in it ({reason})"
            )
    return LayerConfig(config, problems, notes)


def _by_layer(key: str) -> bool:
    """Says whether a list of this name has an entry for every layer, as far as a name can tell."""
    return bool(_BY_LAYER.search(key)) and not _NEVER.search(key) and not _NAMES_LAYERS.search(key)


def _told(entry: str, value: Any, *, of_source: bool = False) -> str:
    """Says what a layer is by one entry of its kind."""
    verb = ("is", "has") if of_source else ("be", "have")
    if entry.endswith("(tensor)"):
        name = entry.removesuffix(" (tensor)")
        return f"{verb[1]} no tensor {name}" if value is None else f"{verb[1]} {name} as {value}"
    if entry.endswith(CLASS):
        where = entry.removesuffix(CLASS).strip()
        if value is None:
            return f"{verb[1]} no {where}"
        return f"{verb[0]} a {value}" if not where else f"{verb[1]} a {value} as {where}"
    return f"{verb[1]} {entry} = {value!r}"


def _listed(paths: Sequence[Path]) -> str:
    names = list(dict.fromkeys(".".join(path) for path in paths))
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _reason(error: BaseException) -> str:
    if isinstance(error, LargemergeError):
        return error.problems[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}" if lines else type(error).__name__
