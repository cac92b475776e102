"""An adapter's tensors fitted to its model: what replaces a tensor of it, what is added to which weight.

    adapter_config.json ──► config_problems: what is not supported
    names in its file ──► Fitting: whole tensors │ rows of tokens │ LoRA's factors │ tensors of another kind's layers
                                        └──────────────┴─────────────────┴──► Places.find ──► deltas by name on disk

Names are peft's: `base_model.model.<path>.lora_A.weight`, with or without the adapter's own name in them; whole tensors
at `<path>.weight`, `<path>.modules_to_save.weight` or `<path>.base_layer.weight`.
"""

from __future__ import annotations

import importlib.util
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import regex
import torch
from torch import nn

from largemerge.checkpoint.adapter_places import INPUT_EMBEDDINGS, Place, Places
from largemerge.checkpoint.adapter_targets import (
    PREFIX,
    missing_problems,
    pattern_problems,
    timed_match,
    unnamed_problems,
)
from largemerge.checkpoint.deltas import (
    Delta,
    Experts,
    LowRank,
    LowRankBias,
    PeftLayer,
    TokenRows,
    as_delta_dtype,
    peft_config,
    quiet_peft,
)
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.checkpoint.tensor_info import TensorInfo, dtype_name
from largemerge.errors import shorten

_REFUSED = (
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "kasa_config",
    "monteclora_config",
)
"""Keys of `adapter_config.json` that change what an adapter does to a weight, or to which."""
_REFUSED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of an adapter that change the model's own weights, which the adapter then does not hold."""
_KNOWN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
"""Initialisations that leave the model's weights as they are."""
_DONE_AGAIN = ("pissa", "olora")
"""Those of them that peft does again from the model's weights alone, to the same numbers."""
_KNOWN = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
        *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config"),
        *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
        *("revision", "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices"),
        *("use_dora", "use_rslora", *_REFUSED),
    )
)
"""Keys of a LoRA's `adapter_config.json`, the latest peft's included."""
_BY_LAYER = frozenset(
    (
        *("ADALORA", "ADAMSS", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3"),
        *("LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PVERA", "RANDLORA", "ROAD", "SHIRA"),
        *("TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT"),
    )
)
"""Kinds of which peft's layer, built on one module alone, has been seen to merge as it does in the whole model."""
_LORA_PART = re.compile(
    r"^(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?$"
)
_TOKENS = re.compile(r"^(?P<path>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
_LARGEST = torch.finfo(torch.float32).max
_MAX_PATTERN_SECONDS = 2.0
"""Time that all patterns of an adapter may take; those of people take a thousandth."""
_MERGE_FIRST = "merge the adapter into its model first (peft: merge_and_unload), and name the result"
_EXTRA = "pip install 'largemerge[peft]'"


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields what in an `adapter_config.json` is wrong or not supported."""
    yield from _type_problems(config)
    yield from pattern_problems(config)
    kind = config.get("peft_type")
    if kind != "LORA":
        yield from _kind_problems(kind)
        return
    yield from (
        f"{key} is {config[key]!r}, which is not supported; {_MERGE_FIRST}" for key in _REFUSED if config.get(key)
    )
    start = config.get("init_lora_weights")
    if start in _DONE_AGAIN and importlib.util.find_spec("peft") is None:
        yield f"init_lora_weights is {start!r}, which is done again by peft, and peft is not installed: {_EXTRA}"
    elif isinstance(start, str) and start.lower().startswith(_REFUSED_STARTS) and start not in _DONE_AGAIN:
        yield (
            f"init_lora_weights is {start!r}, which changes the model's own weights, too; convert it to a plain LoRA "
            "(peft: path_initial_model_for_weight_conversion), or merge it with peft first"
        )
    elif isinstance(start, str) and not start.lower().startswith((*_KNOWN_STARTS, *_REFUSED_STARTS)):
        yield f"init_lora_weights is {shorten(repr(start))}, which is not known; {_MERGE_FIRST}"
    if isinstance(config.get("bias"), str) and config["bias"] not in ("none", "all", "lora_only"):
        yield f"bias is {shorten(repr(config['bias']))}; expected 'none', 'all' or 'lora_only'"
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        found = config.get(patterns) or {}
        if not isinstance(found, Mapping):
            continue  # which its type tells
        for label, value in {key: config.get(key), **{f"{patterns}[{each!r}]": found[each] for each in found}}.items():
            if not _is_number(value):
                yield f"{label} is {shorten(repr(value))}; expected a number"
            elif not abs(value) <= _LARGEST:
                yield f"{label} is {shorten(repr(value))}; expected a finite number"
            elif key == "r" and (value <= 0 or value != int(value)):
                yield f"{label} is {shorten(repr(value))}; expected a whole number above 0"
        yield from (f"{patterns}: {problem}" for problem in filter(None, map(_pattern_problem, found)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each for each in value)


def _are_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "inference_mode", "ensure_weight_tying"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    **dict.fromkeys(
        ("base_model_name_or_path", "revision", "task_type", "peft_version", "megatron_core"),
        (lambda value: isinstance(value, str), "a text"),
    ),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (_are_texts, "a list of names")),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        (lambda value: isinstance(value, str) or _are_texts(value), "a pattern, or a list of names"),
    ),
    "rank_pattern": (lambda value: isinstance(value, dict), "numbers by pattern"),
    "alpha_pattern": (lambda value: isinstance(value, dict), "numbers by pattern"),
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false, or a name"),
    "bias": (lambda value: isinstance(value, str), "'none', 'all' or 'lora_only'"),
    **dict.fromkeys(
        ("auto_mapping", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        (lambda value: isinstance(value, dict), "keys and values"),
    ),
    "trainable_token_indices": (
        lambda value: (
            _are_token_ids(value) or (isinstance(value, dict) and all(_are_token_ids(each) for each in value.values()))
        ),
        "a list of token ids from 0 on, or one for each module",
    ),
    "layers_to_transform": (
        lambda value: type(value) is int or (isinstance(value, list) and all(type(each) is int for each in value)),
        "a layer's number, or a list of them",
    ),
    "lora_dropout": (_is_number, "a number"),
}
"""What the values of keys must be, where they are given and not null; and its words."""


def _type_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields the keys whose values are of another type than peft's, and numbers that are none."""
    for key, value in config.items():
        is_right, expected = _TYPES.get(key, (None, ""))
        if value is not None and is_right is not None and not is_right(value):
            yield f"{key} is {shorten(repr(value))}; expected {expected}"
        elif isinstance(value, float) and not math.isfinite(value) and key not in ("r", "lora_alpha"):
            yield f"{key} is {value!r}; expected a finite number"


def _pattern_problem(pattern: str) -> str | None:
    try:
        regex.compile(_whole(pattern))
    except regex.error as error:
        return f"{shorten(repr(pattern))} is no regular expression: {error}"
    return None


def _whole(pattern: str) -> str:
    """The pattern that a module's whole path must match, as peft makes it."""
    return rf"(.*\.)?({pattern})$"


def _kind_problems(kind: object) -> Iterator[str]:
    """Yields what is wrong with a kind of adapter other than LoRA."""
    if not isinstance(kind, str):
        yield f"peft_type is {kind!r}; expected the kind of the adapter, such as 'LORA'"
        return
    if importlib.util.find_spec("peft") is None:
        yield f"peft_type is {kind!r}, which is merged by peft's own arithmetic, and peft is not installed: {_EXTRA}"
        return
    with quiet_peft():
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        yield f"peft_type is {kind!r}, which this peft does not know; expected one of {', '.join(PeftType.__members__)}"
    elif not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(kind)), "merge_and_unload"):
        yield f"peft_type is {kind!r}, which adds to a model's inputs, not to its weights: it cannot be merged"
    elif kind not in _BY_LAYER:
        yield f"peft_type is {kind!r}, whose layers cannot be merged one by one; {_MERGE_FIRST}"


class Fitting:
    """Fits an adapter's tensors to its model: what is replaced, what is added to which weight.

    Args:
        own: The adapter's checkpoint.
        model: The model's checkpoint.
        places: Where the model's weights are.
    """

    def __init__(self, own: Checkpoint, model: Checkpoint, places: Places) -> None:
        self._own, self._model, self._places = own, model, places
        self.deltas: dict[str, list[Delta]] = defaultdict(list)
        self.replaced: dict[str, TensorInfo] = {}
        """Name on disk → tensor of the adapter that takes its place."""
        self.untied: dict[str, str] = {}
        """Name on disk of a tensor that was tied until now → that of the tensor which it was tied to."""
        self.saved: set[str] = set()
        """Names on disk of tensors that were tied and are the adapter's own now: nothing is added to them."""
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._lora: dict[str, dict[str, str]] = {}
        self._saved: dict[str, str] = {}
        self._plain: dict[str, str] = {}
        self._tokens: dict[str, str] = {}
        self._other: list[str] = []
        self._patterns = _Patterns(own.config)

    def fit(self) -> None:
        """Sorts all tensors, then fits each sort."""
        for key in self._own.tensors:
            self._sort(key)
        unknown = sorted(key for key, value in self._own.config.items() if value and key not in self._known_keys())
        if unknown:
            self.notes.append(
                f"{self._own.folder.name}: adapter_config.json has {', '.join(unknown)}, which is ignored"
            )
        if not self._places.by_class:
            self.notes.append(f"{self._own.folder.name} is matched {self._places.way}: the model's class is not known")
        elif self._own.config.get("fan_in_fan_out") and self._adapts_linears():
            self.notes.append(
                f"{self._own.folder.name}: adapter_config.json says fan_in_fan_out, but the model's linears are "
                "[out, in]: it is ignored, as peft ignores it"
            )
        for name, key in self._plain.items():
            self._replace(name, key)
        self._fit_saved()
        for path, key in self._tokens.items():
            self._fit_tokens(path, key)
        # Embeddings first, as peft goes through the modules in the model's order: a tied head comes last.
        try:
            for path, found in sorted(self._lora.items(), key=lambda item: "lora_embedding_A" not in item[1]):
                self._fit_lora(path, found)
        except ValueError as error:  # a pattern without an end
            self.problems.append(f"adapter_config.json: {error}")
        self._fit_with_peft()
        if not self.problems:
            self._check_whole()
        if not self.problems and not self.deltas and not self.replaced:
            self.problems.append(
                f"{self._own.folder} changes nothing of its model: {len(self._own.tensors)} tensors, such as "
                f"{shorten(next(iter(self._own.tensors)))}; expected the weights of an adapter"
            )

    def _check_whole(self) -> None:
        """Adds to the problems if the file lacks what the config says was trained, or holds more than that."""
        adapted = self._adapted()
        try:
            self.problems += unnamed_problems(self._own, self._places, adapted)
            self.problems += missing_problems(
                self._own, self._model, self._places, adapted, [*self._saved, *self._plain]
            )
        except ValueError as error:  # a pattern without an end
            self.problems.append(f"adapter_config.json: {error}")
        if self._own.config.get("trainable_token_indices") and not self._tokens:
            self.problems.append(
                f"adapter_config.json: trainable_token_indices names tokens, but {self._own.folder.name} has no "
                "trainable_tokens_delta: the file is not whole; fetch or save the adapter once more"
            )

    def _adapts_linears(self) -> bool:
        """Whether a module that the file has tensors of is a plain linear."""
        places = (self._places.find(f"{path}.weight") for path in self._adapted())
        return any(place is not None and isinstance(place.module, nn.Linear) for place in places)

    def _adapted(self) -> set[str]:
        """Paths of the modules that the file has factors of, or tensors of another kind's layers."""
        inner = [key.removeprefix(PREFIX) for key in self._other if key.startswith(PREFIX)]
        adapted = {path.replace(".base_layer", "") for path in self._lora}
        return adapted | {path for path in map(self._module_path, inner) if path is not None}

    def _known_keys(self) -> Collection[str]:
        """Keys of `adapter_config.json` that this kind of adapter may have."""
        kind = self._own.config["peft_type"]
        if kind == "LORA":
            return _KNOWN
        with quiet_peft():
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        return PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__

    def _sort(self, key: str) -> None:
        """Puts one tensor into its sort, by its name."""
        if key.startswith("base_model.") and not key.startswith(PREFIX):
            self._other.append(key)
            return
        inner = key.removeprefix(PREFIX)
        part = _LORA_PART.match(inner) if self._own.config["peft_type"] == "LORA" else None
        tokens = _TOKENS.match(inner)
        if part is not None:
            name = part["part"] + (".bias" if part["leaf"] == "bias" else "")
            self._lora.setdefault(part["path"], {})[name] = key
        elif tokens is not None:
            self._tokens[tokens["path"]] = key
        elif ".original_module." in inner:
            return  # what the module was before: the model has it
        elif ".modules_to_save." in inner:
            path, _, rest = inner.partition(".modules_to_save.")
            names = [f"{path}.{rest}", f"{path}.{rest.partition('.')[2]}"]
            name = next((each for each in names if self._places.find(each) is not None), names[0])
            self._saved.setdefault(name, key)
        else:
            name = inner.replace(".base_layer.", ".")
            if self._places.find(name) is None and self._may_be_of_layer(inner):
                self._other.append(key)
            elif self._is_saved(name):
                self._saved[name] = key  # as peft does, rather than the same under `modules_to_save`
            else:
                self._plain[name] = key

    def _may_be_of_layer(self, inner: str) -> bool:
        return self._own.config["peft_type"] != "LORA" and self._module_path(inner) is not None

    def _is_saved(self, name: str) -> bool:
        """Whether a module that holds the parameter is one of `modules_to_save`."""
        parts = name.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts))]
        saved = self._own.config.get("modules_to_save") or ()
        return any(path.endswith(target) for path in paths for target in saved)

    def _place(self, name: str, key: str) -> Place | None:
        """Finds a weight; adds to the problems if there is none."""
        place = self._places.find(name)
        if place is not None and place.pieces:
            return place
        shape = list(self._own.tensors[key].shape)
        if place is not None and not place.has_blocks:
            self.problems.append(f"{key}: {name} lies on disk in another layout, which cannot be cut; {_MERGE_FIRST}")
            return None
        if self._is_saved(name) and _LORA_PART.match(key) is None:
            task = self._own.config.get("task_type")
            self.problems.append(
                f"the adapter brings {name} {shape} of its own{f' (task_type {task})' if task else ''}, which "
                f"{self._model.folder.name} has not; {_MERGE_FIRST}, or name a model that has it"
            )
        else:
            self.problems.append(
                f"{self._own.folder.name} holds {shorten(key)} {shape}, but {self._model.folder.name} has no tensor "
                f"{shorten(name)} "
                f"(matched {self._places.way}); expected the adapter's own model"
            )
        return None

    # Tensors that replace the model's

    def _replace(self, name: str, key: str, at: str | None = None) -> None:
        place = self._place(name, key)
        if place is None:
            return
        info = self._own.tensors[key]
        if place.key is None:
            self.problems.append(f"{key} replaces {name}, which lies on disk in another layout; {_MERGE_FIRST}")
        elif not self._may_replace(info.shape, place):
            self.problems.append(f"{key} is {list(info.shape)}, and replaces {name}, which is {list(place.shape)}")
        else:
            stored = self._model.tensors[place.key].dtype
            if info.dtype.is_floating_point != stored.is_floating_point:
                self.problems.append(f"{key} is {dtype_name(info.dtype)}, and replaces {name}, {dtype_name(stored)}")
            self.replaced[at or place.key] = info

    def _may_replace(self, shape: tuple[int, ...], place: Place) -> bool:
        """Whether a tensor of a shape may take a place: one like it, or for other numbers of tokens or of labels."""
        if shape == place.shape:
            return True
        parts = [self._model.config, *(part for part in self._model.config.values() if isinstance(part, Mapping))]
        vocabulary = {part.get("vocab_size") for part in parts}
        vocabulary |= {info.shape[0] for key, info in self._model.tensors.items() if key.endswith(INPUT_EMBEDDINGS)}
        labels = self._model.config.get("id2label") or {}
        num_labels = len(labels) or self._model.config.get("num_labels", 2)  # the default is not written
        same_width = len(shape) == len(place.shape) > 0 and shape[1:] == place.shape[1:]
        return same_width and shape[0] > 0 and place.shape[0] in {*vocabulary, num_labels}

    def _fit_saved(self) -> None:
        """Replaces the tensors of `modules_to_save`; one that was tied to another is so no more."""
        tied = self._own.config.get("ensure_weight_tying")
        for name, key in self._saved.items():
            place = self._place(name, key)
            if place is None:
                continue
            if len(place.tied) < 2 or place.key is None or tied:
                self._replace(name, key)
                continue
            own_name = next((each for each in place.tied if _same_ending(each, name)), place.tied[0])
            stored = place.key if own_name == place.tied[0] else own_name
            if not place.separable or stored not in (place.key, *place.separable):
                others = ", ".join(each for each in place.tied if each != own_name)
                self.problems.append(
                    f"the adapter trains {name} on its own, which is one tensor with {others} in every model of this "
                    "kind; train both (peft: ensure_weight_tying)"
                )
                continue
            self._replace(name, key, stored)
            self.saved.add(stored)
            self.untied |= dict.fromkeys(place.separable, place.key)

    def _fit_tokens(self, path: str, key: str) -> None:
        place = self._place(f"{path}.weight", key)
        info = self._own.tensors[key]
        given = self._own.config.get("trainable_token_indices")
        if isinstance(given, Mapping):
            given = next((value for name, value in given.items() if path.endswith(name)), None)
        if place is None or not self._is_real(key):
            return
        stored = self.replaced[place.key].shape if place.key in self.replaced else place.shape
        if not given or info.shape != (len(given), *stored[1:]):
            self.problems.append(
                f"{key} is {list(info.shape)}; expected one row of {stored[-1]} for each of trainable_token_indices, "
                f"which is {given!r}"
            )
        elif place.key is None or max(given) >= stored[0]:
            self.problems.append(f"trainable_token_indices names token {max(given)}, {path} has {stored[0]} rows")
        else:
            self.deltas[place.key].append(TokenRows(key, tuple(given), stored[0]))

    # LoRA

    def _fit_lora(self, path: str, found: Mapping[str, str]) -> None:
        """Fits the factors of one module, or adds to the problems if something is wrong with them."""
        embedding = "lora_embedding_A" in found
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if not set(names) <= set(found):
            self.problems.append(f"{path}: expected {names[0]} and {names[1]}, found {sorted(found)}")
            return
        keys = [found[name] for name in names]
        parameter = self._parameter_of(path)
        if parameter is None:
            self.problems.append(
                f"{keys[0]} adapts a parameter of {path.replace('.base_layer', '')}, but target_parameters is "
                f"{self._own.config.get('target_parameters')!r} (matched {self._places.way}); expected its name"
            )
            return
        place = self._place(parameter, keys[0])
        if place is None:
            return
        if any(not self._is_real(key) for key in found.values()):
            return
        down, up = (self._own.tensors[key] for key in keys)
        if min(len(down.shape), len(up.shape)) < 2:
            self.problems.append(
                f"{keys[0]} is {list(down.shape)} and {keys[1]} is {list(up.shape)}; expected matrices, A [r, in] and "
                "B [out, r]"
            )
            return
        if self._own.config.get("init_lora_weights") in _DONE_AGAIN and len(place.shape) == 2:
            self._other.extend(found.values())
            return
        if len(down.shape) != 2 or isinstance(place.module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention):
            self._other.extend(found.values())
            return
        config = self._own.config
        pattern_name = parameter.removesuffix(".weight") if not self._is_target(parameter) else parameter
        rank, scale = _rank_and_scale(config, self._patterns, pattern_name)
        if len(place.shape) == 3:
            self._fit_experts(parameter, place, down, up, rank, scale)
            return
        transposed = embedding or self._is_transposed(place)
        if not self._fits(parameter, place, down, up, rank, transposed, embedding):
            return
        magnitude = found.get("lora_magnitude_vector")
        if not self._magnitude_fits(parameter, place, found, transposed):
            return
        if bool(config.get("lora_bias")) != ("lora_B.bias" in found) and not embedding:
            self.problems.append(f"{parameter}: lora_bias is {config.get('lora_bias')}, but found {sorted(found)}")
            return
        # Elsewhere than in a linear, peft adapts the bare parameter, and rounds what it adds.
        linear = place.module is None or isinstance(place.module, nn.Linear) or transposed
        rounded = embedding or place.fused or not linear or self._is_target(parameter)
        rounded = rounded or config.get("init_lora_weights") == "mica"
        delta = LowRank(keys[0], keys[1], scale, transposed, magnitude, embedding, rounded, inside=place.inside)
        if len(place.tied) > 1 and not embedding:
            self.notes.append(
                f"{self._own.folder.name} adds to {parameter}, which is tied to {place.key}: both change, as peft's "
                "merge_and_unload changes them"
            )
        for key, block in place.pieces.items():
            self.deltas[key].append(replace(delta, piece=block))
        if "lora_B.bias" in found:
            self._fit_bias(parameter, found["lora_B.bias"], scale)

    def _magnitude_fits(self, parameter: str, place: Place, found: Mapping[str, str], transposed: bool) -> bool:
        """Whether a magnitude is there just where DoRA says so, and fits the weight; else adds to the problems."""
        use_dora, magnitude = bool(self._own.config.get("use_dora")), found.get("lora_magnitude_vector")
        if use_dora != (magnitude is not None):
            self.problems.append(f"{parameter}: use_dora is {use_dora}, but found {sorted(found)}")
            return False
        if magnitude is None:
            return True
        shape = self._own.tensors[magnitude].shape
        num_outputs = place.shape[1] if transposed else place.shape[0]
        if place.key is None or place.fused:
            self.problems.append(
                f"{parameter}: use_dora, on a weight that lies on disk in another layout; {_MERGE_FIRST}"
            )
        elif math.prod(shape) != num_outputs:
            self.problems.append(f"{magnitude} is {list(shape)}; expected a number for each of {num_outputs} outputs")
        else:
            return True
        return False

    def _is_real(self, key: str) -> bool:
        """Whether a tensor of the adapter holds floating-point numbers; else adds to the problems."""
        dtype = self._own.tensors[key].dtype
        if not dtype.is_floating_point:
            self.problems.append(f"{key} is {dtype_name(dtype)}; expected floating-point numbers")
        return dtype.is_floating_point

    def _fits(
        self, name: str, place: Place, down: TensorInfo, up: TensorInfo, rank: int, transposed: bool, embedding: bool
    ) -> bool:
        """Whether two factors fit their weight; else adds to the problems."""
        shape = self.replaced[place.key].shape if place.key in self.replaced else place.shape
        if place.inside is not None:
            cut = place.inside
            side = list(shape)
            side[cut.axis] = cut.stop - cut.start
            shape = tuple(reversed(side)) if cut.transposed else tuple(side)
        wanted = tuple(reversed(shape)) if transposed else shape
        if len(up.shape) != 2 or (up.shape[0], down.shape[1]) != wanted:
            self.problems.append(
                f"{name} is {list(shape)}; A {list(down.shape)} and B {list(up.shape)} do not fit it"
                f"{' as [in, out]' if transposed and not embedding else ''}"
            )
        elif not down.shape[0] == up.shape[1] == rank:
            self.problems.append(
                f"{name}: A and B are of rank {down.shape[0]} and {up.shape[1]}, adapter_config.json says {rank}"
            )
        else:
            return True
        return False

    def _fit_experts(self, name: str, place: Place, down: TensorInfo, up: TensorInfo, rank: int, scale: float) -> None:
        experts, first, second = place.shape
        outputs_first = not getattr(place.module, "is_transposed", False)
        outputs, inputs = (first, second) if outputs_first else (second, first)
        if down.shape != (experts * rank, inputs) or up.shape != (outputs, experts * rank):
            self.problems.append(
                f"{name} is {list(place.shape)}; A {list(down.shape)} and B {list(up.shape)} do not fit it "
                f"at rank {rank}"
            )
            return
        for key, block in place.pieces.items():
            self.deltas[key].append(Experts(down.name, up.name, scale, experts, outputs_first, block))

    def _fit_bias(self, parameter: str, key: str, scale: float) -> None:
        place = self._place(f"{parameter.removesuffix('.weight')}.bias", key)
        if place is None or not self._is_real(key):
            return
        if place.key is None or place.shape != self._own.tensors[key].shape:
            self.problems.append(f"{key} is {list(self._own.tensors[key].shape)}; the bias is {list(place.shape)}")
        else:
            self.deltas[place.key].append(LowRankBias(key, scale))

    def _is_transposed(self, place: Place) -> bool:
        """Whether a weight is `[in, out]`: its module says so, as for peft; the config, where no class is known."""
        if place.module is None:
            return bool(self._own.config.get("fan_in_fan_out"))
        return type(place.module).__name__ == "Conv1D"

    def _is_target(self, parameter: str) -> bool:
        """Whether a parameter is one of `target_parameters`."""
        targets = self._own.config.get("target_parameters") or ()
        return any(parameter == target or parameter.endswith(f".{target}") for target in targets)

    def _parameter_of(self, path: str) -> str | None:
        """Returns the name of the parameter that the factors at a module's path adapt.

        Where several parameters of one module are adapted, peft wraps the module once for each, in their order: the
        first one's factors lie innermost, at `experts.base_layer.lora_A`.
        """
        module = path
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        targets = []
        if self._own.config.get("target_parameters"):
            targets = [f"{module}.{leaf}" for leaf in self._places.parameters_of(module)]
            targets = [each for each in targets if self._is_target(each)]
        if not targets:
            return f"{module}.weight" if module == path else None
        depth = (len(path) - len(module)) // len(".base_layer")
        return targets[-1 - depth] if depth < len(targets) else None

    # Every other kind

    def _fit_with_peft(self) -> None:
        """Fits the tensors that peft's own layers merge."""
        if not self._other:
            return
        if importlib.util.find_spec("peft") is None:
            self.problems.append(
                f"{self._other[0]} is merged by peft's own arithmetic, and peft is not installed: {_EXTRA}"
            )
            return
        layers: dict[str, dict[str, str]] = defaultdict(dict)
        shared: dict[str, str] = {}
        for key in self._other:
            if not key.startswith(PREFIX):
                shared[key] = key
                continue
            path = self._module_path(key.removeprefix(PREFIX))
            if path is None:
                self._place(f"{key.removeprefix(PREFIX).rpartition('.')[0]}.weight", key)
            else:
                layers[path][key] = key
        modules: dict[str, nn.Module] = {}
        for path in layers:
            module = self._stub(path, next(iter(layers[path])))
            if module is not None:
                modules[path] = module
        if self.problems or not modules:
            return
        try:
            config = self._resolved(modules)
            with quiet_peft():
                peft_config(config, modules)
        except Exception as error:  # peft's own, of any kind
            self.problems.append(f"adapter_config.json: {shorten(str(error) or type(error).__name__, 300)}")
            return
        by_size = [max(modules, key=lambda path: _features(modules[path])[side]) for side in (0, 1)]
        largest = (
            {path: modules[path] for path in by_size} if shared or self._own.config["peft_type"] in _SHARING else {}
        )
        checked: dict[Any, bool | None] = {}
        for path, tensors in layers.items():
            layer = PeftLayer(path, modules[path], tensors, shared, config, largest)
            self._fit_layer(layer, checked)

    def _resolved(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Returns the adapter's config with what its patterns say of these modules, as peft matches without a limit."""
        config = dict(self._own.config)
        for key in ("rank_pattern", "alpha_pattern"):
            values = config.get(key)
            if isinstance(values, Mapping) and all(map(_is_number, values.values())):
                found = {path: self._patterns.find(key, path) for path in modules}
                config[key] = {re.escape(path): value for path, value in found.items() if value is not None}
        return config

    def _fit_layer(self, layer: PeftLayer, checked: dict[Any, bool | None]) -> None:
        """Fits one of peft's layers; the like of it is built only once to see whether it can be."""
        infos = {key: self._own.tensors[name] for key, name in (*layer.tensors.items(), *layer.shared.items())}
        shape = layer.module.weight.shape
        prefix = f"{PREFIX}{layer.path}."
        like = (
            type(layer.module),
            shape,
            *sorted((key.removeprefix(prefix), info.shape) for key, info in infos.items()),
        )
        if like not in checked:
            checked[like] = self._changes_bias(layer, infos)
        changes_bias = checked[like]
        if changes_bias is None:
            return
        weight = self._places.find(f"{layer.path}.weight")
        assert weight is not None and weight.key is not None
        self.deltas[weight.key].append(layer)
        if changes_bias:
            bias = self._places.find(f"{layer.path}.bias")
            if bias is None or bias.key is None:
                self.problems.append(f"{layer.path}: no bias on disk, which the adapter changes; {_MERGE_FIRST}")
            else:
                self.deltas[bias.key].append(replace(layer, leaf="bias"))

    def _changes_bias(self, layer: PeftLayer, infos: Mapping[str, TensorInfo]) -> bool | None:
        """Merges peft's layer on a made-up weight: whether it changes the bias; `None` if it cannot be merged."""
        with CheckpointReader(self._own) as reader:
            own = {key: as_delta_dtype(reader.read(info.name)) for key, info in infos.items()}
        bias = getattr(layer.module, "bias", None)
        leaf = "weight" if bias is None else "bias"
        before = torch.ones(getattr(layer.module, leaf).shape)
        try:
            after = replace(layer, leaf=leaf).merge(before.clone(), own)
        except Exception as error:  # peft's own, of any kind
            text = " ".join(_OF_TORCH.sub("", str(error)).split()) or type(error).__name__
            self.problems.append(f"{layer.path}: peft does not merge this adapter: {text}; {_MERGE_FIRST}")
            return None
        return bias is not None and not torch.equal(before, after)

    def _module_path(self, inner: str) -> str | None:
        """Returns the module that a tensor of a layer of peft's belongs to: the longest path that has a weight."""
        parts = inner.split(".")
        paths = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        return next((path for path in paths if self._places.find(f"{path}.weight") is not None), None)

    def _stub(self, path: str, key: str) -> nn.Module | None:
        """Returns the module that peft's layer is built on; a linear where the class is not known."""
        place = self._place(f"{path}.weight", key)
        if place is None:
            return None
        if place.key is None:
            self.problems.append(f"{key}: {path} lies on disk in another layout; {_MERGE_FIRST}")
            return None
        if place.module is not None:
            return place.module
        if len(place.shape) != 2:
            self.problems.append(f"{key}: {path} is {list(place.shape)}, of a class that is not known; {_MERGE_FIRST}")
            return None
        has_bias = self._places.find(f"{path}.bias") is not None
        with torch.device("meta"):
            if self._own.config.get("fan_in_fan_out"):
                from transformers.pytorch_utils import Conv1D

                inputs, outputs = place.shape
                make: Any = Conv1D
                conv1d: nn.Module = make(outputs, inputs)
                return conv1d
            outputs, inputs = place.shape
            return nn.Linear(inputs, outputs, bias=has_bias)


_OF_TORCH = re.compile(r"Error\(s\) in loading state_dict for \w+:\s*")
_SHARING = ("VERA", "PVERA", "RANDLORA", "VBLORA")
"""Kinds that make tensors for all layers, as large as the largest needs them."""


def _features(module: nn.Module) -> tuple[int, int]:
    """The numbers of inputs and outputs of a module, or of the sides of its weight."""
    weight: Any = module.weight
    return int(weight.shape[-1]), int(weight.shape[0])


def _rank_and_scale(config: Mapping[str, Any], patterns: _Patterns, path: str) -> tuple[int, float]:
    """Returns the rank r of a module's factors, and what B A is multiplied by: alpha / r, or alpha / √r for rsLoRA."""
    own_rank, own_alpha = (patterns.find(f"{key}_pattern", path) for key in ("rank", "alpha"))
    rank = int(config["r"] if own_rank is None else own_rank)
    alpha = config["lora_alpha"] if own_alpha is None else own_alpha
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass(frozen=True)
class FactorPair:
    """The factors of one module in a LoRA's file.

    Attributes:
        down: Name of A `[r, in]` there.
        up: Name of B `[out, r]`.
        rank: r.
        scale: Factor of B A: alpha / r, or alpha / √r for rsLoRA.
        embedding: Whether they adapt embeddings, whose delta is the transpose of B A.
        magnitude: Name of m, if there is one (DoRA): one number for every output.
    """

    down: str
    up: str
    rank: int
    scale: float
    embedding: bool
    magnitude: str | None = None


def read_factors(own: Checkpoint) -> tuple[dict[str, FactorPair], list[str]]:
    """Reads which modules a LoRA's file has factors of, by names and config alone, without its model.

    Args:
        own: The adapter's checkpoint.

    Returns:
        Path of a module → its factors; and names of all tensors that are none, or none of a pair.

    Raises:
        ValueError: If a pattern of the config takes too long.
    """
    patterns = _Patterns(own.config)
    parts: dict[str, dict[str, str]] = {}
    others: list[str] = []
    for key in own.tensors:
        part = _LORA_PART.match(key.removeprefix(PREFIX))
        if part is None or part["leaf"] == "bias":
            others.append(key)
        else:
            parts.setdefault(part["path"], {})[part["part"]] = key
    found: dict[str, FactorPair] = {}
    for path, keys in parts.items():
        embedding = "lora_embedding_A" in keys
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if set(keys) - {"lora_magnitude_vector"} != set(names):
            others.extend(keys.values())
            continue
        rank, scale = _rank_and_scale(own.config, patterns, path)
        magnitude = keys.get("lora_magnitude_vector")
        found[path] = FactorPair(keys[names[0]], keys[names[1]], rank, scale, embedding, magnitude)
    return found, others


def _same_ending(first: str, second: str) -> bool:
    return first == second or first.endswith(f".{second}") or second.endswith(f".{first}")


class _Patterns:
    """Looks up `rank_pattern` and `alpha_pattern` as peft does; a pattern that takes too long is an error.

    Args:
        config: Contents of `adapter_config.json`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._seconds_left = _MAX_PATTERN_SECONDS

    def find(self, key: str, module: str) -> Any:
        """Returns the value of the first pattern that a module's path ends with; `None` if none does.

        Raises:
            ValueError: If a pattern takes too long, as one with loops in loops may.
        """
        for pattern, value in (self._config.get(key) or {}).items():
            start = time.perf_counter()
            found = timed_match(_whole(pattern), module, key, max(0.01, self._seconds_left), written=pattern)
            self._seconds_left -= time.perf_counter() - start
            if found is not None:
                return value
        return None
