"""Whether an adapter's file holds what its config says was trained: all of it, and nothing else.

    target_modules, layers_to_transform, exclude_modules ──► Targets ─┬─► missing_problems
    modules in the file, and those beside them in the model ──────────┴─► unnamed_problems

peft writes tensors for every module that it adapts. So a module that matches, and is of the same layers as those in
the file, has its own there; else the file is not whole, and what was trained would be lost. A module in the file that
the config does not name is one that peft leaves alone. Where either is not certain (parts of a model that the adapter's
own class may not have, experts that lie fused) nothing is said.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import regex
from torch import nn

from largemerge.checkpoint.adapter_places import Place, Places
from largemerge.checkpoint.index import Checkpoint, natural_key
from largemerge.errors import shorten

_MAX_SECONDS_EACH, _MAX_SECONDS = 0.5, 5.0
"""Time that a pattern may take for one module, which is an error, and all may take, after which nothing is said."""
ALL_LINEAR = "all-linear"
_NOT_PATTERNS = (ALL_LINEAR, "dummy-target-modules")
_LAYER = re.compile(r"^(?P<stack>.*?\.)(?P<number>[0-9]+)\.(?P<rest>.+)$")
_HEADS = ("lm_head", "embed_out")
PREFIX = "base_model.model."
"""Stands before the path of a module in peft's files."""
HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that peft saves as a whole for a `task_type`, whatever `modules_to_save` says."""
_FETCH = "fetch or save the adapter once more"


def pattern_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields the settings that peft uses as regular expressions and that are none, or go with no others."""
    targets = config.get("target_modules")
    if isinstance(targets, str) and config.get("layers_to_transform") not in (None, []):
        yield (
            f"target_modules is the pattern {shorten(repr(targets))}, and layers_to_transform is "
            f"{shorten(repr(config['layers_to_transform']))}, which peft takes with a list of names only; write a "
            "list, or the layers into the pattern"
        )
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(key)
        is_list = isinstance(value, list)
        if key in ("target_modules", "exclude_modules") and is_list:
            continue  # ends of names
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, str) or each.lower() in _NOT_PATTERNS:
                continue
            try:
                regex.compile(each)
            except regex.error as error:
                yield f"{key}: {shorten(repr(each))} is no regular expression: {error}"


def timed_match(
    pattern: str, module: str, key: str, seconds: float, *, whole: bool = False, written: str | None = None
) -> Any:
    """Matches a regular expression of an adapter's settings with the beginning of a module's path, or all of it.

    Args:
        pattern: The regular expression.
        module: The module's path.
        key: Setting that it stands in, for messages.
        seconds: Time that it may take.
        whole: Whether all of the path must match.
        written: What stands in the settings, for messages, where `pattern` was made of it.

    Returns:
        The match; `None` if there is none.

    Raises:
        ValueError: If it takes too long, as loops in loops may.
    """
    match: Any = regex.fullmatch if whole else regex.match
    try:
        return match(pattern, module, timeout=seconds)
    except TimeoutError:
        raise ValueError(
            f"{key}: {shorten(repr(written if written is not None else pattern))} takes too long to match "
            f"{shorten(module)}; write the modules' names, or a pattern without loops in loops"
        ) from None


class Targets:
    """Matches modules against an adapter's settings, as peft does.

    Args:
        config: Contents of `adapter_config.json`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._seconds_left = _MAX_SECONDS
        value = config.get("target_modules")
        self.names: tuple[str, ...] = tuple(value) if isinstance(value, list) else ()
        self.pattern: str | None = value if isinstance(value, str) and value else None
        self.all_linear = self.pattern is not None and self.pattern.lower() == ALL_LINEAR
        if self.pattern is not None and self.pattern.lower() in _NOT_PATTERNS:
            self.pattern = None

    @property
    def is_out_of_time(self) -> bool:
        """Whether all patterns together have taken too long to say more."""
        return self._seconds_left < 0

    def matches(self, path: str, *, is_linear: bool = False) -> bool:
        """Whether peft would adapt a module at a path.

        Raises:
            ValueError: If a pattern takes too long.
        """
        return not self.is_out_of_time and self.left_out_by(path, is_linear=is_linear) is None

    def left_out_by(self, path: str, *, is_linear: bool = False) -> str | None:
        """Returns the setting by which peft would not adapt a module at a path; `None` if it would adapt it.

        Raises:
            ValueError: If a pattern takes too long.
        """
        if self._is_excluded(path):
            return "exclude_modules"
        if self._is_saved(path):
            return "modules_to_save"
        if self.all_linear:
            return None if is_linear else "target_modules"
        if self.pattern is not None:
            return None if self._match(self.pattern, path, "target_modules") else "target_modules"
        if path in self.names:
            return None
        if not any(path.endswith(f".{name}") for name in self.names):
            return "target_modules"
        return None if self._is_layer_wanted(path) else "layers_to_transform"

    def _is_excluded(self, path: str) -> bool:
        excluded = self._config.get("exclude_modules") or ()
        if isinstance(excluded, str):
            return self._match(excluded, path, "exclude_modules")
        return path in excluded or any(path.endswith(f".{name}") for name in excluded)

    def _is_saved(self, path: str) -> bool:
        saved = self._config.get("modules_to_save") or ()
        return any(self._match(rf"(.*\.)?({name})(\..*)?", path, "modules_to_save") for name in saved)

    def _is_layer_wanted(self, path: str) -> bool:
        wanted = self._config.get("layers_to_transform")
        if wanted is None or wanted == []:
            return True
        patterns = self._config.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = self._search(rf"(?:^|.*?\.){pattern}\.(?P<idx>[0-9]+)\.", path, "layers_pattern")
            if found is not None:
                return int(found["idx"]) in (wanted if isinstance(wanted, list) else [wanted])
        return False

    def _match(self, pattern: str, path: str, key: str) -> bool:
        return self._search(pattern, path, key, whole=True) is not None

    def _search(self, pattern: str, path: str, key: str, *, whole: bool = False) -> Any:
        start = time.perf_counter()
        try:
            return timed_match(pattern, path, key, _MAX_SECONDS_EACH, whole=whole)
        finally:
            self._seconds_left -= time.perf_counter() - start


def missing_problems(
    own: Checkpoint, model: Checkpoint, places: Places, adapted: Collection[str], saved: Collection[str]
) -> Iterator[str]:
    """Yields what an adapter's config names and its file lacks.

    Args:
        own: The adapter's checkpoint.
        model: The model's checkpoint.
        places: Where the model's weights are.
        adapted: Paths of the modules that the file has factors of.
        saved: Names of the tensors that the file has as a whole.

    Raises:
        ValueError: If a pattern takes too long.
    """
    targets = Targets(own.config)
    if not adapted and own.config.get("peft_type") == "LORA" and (targets.names or targets.pattern):
        yield (
            f"adapter_config.json: target_modules is {shorten(repr(own.config['target_modules']))}, but "
            f"{own.folder.name} has no lora_A and lora_B of any module: the file is not whole; {_FETCH}"
        )
    modules = sorted(_modules_beside(model, places, adapted, targets), key=natural_key)
    if modules:
        yield (
            f"adapter_config.json: target_modules names {_some(modules)} of the model, but {own.folder.name} has no "
            f"tensors for {'them' if len(modules) > 1 else 'it'}: the file is not whole; {_FETCH}"
        )
    yield from _saved_problems(own, model, places, saved)


def unnamed_problems(own: Checkpoint, places: Places, adapted: Collection[str]) -> Iterator[str]:
    """Yields what an adapter's file has, and its config does not name: peft would not adapt it.

    Args:
        own: The adapter's checkpoint.
        places: Where the model's weights are.
        adapted: Paths of the modules that the file has tensors of.

    Raises:
        ValueError: If a pattern takes too long.
    """
    config = own.config
    yield from _unnamed_saved_problems(own)
    if config.get("target_modules") is None and not config.get("target_parameters"):
        return  # peft has names of its own for many models
    targets = Targets(config)
    unnamed: dict[str, list[str]] = {}
    for path in sorted(adapted, key=natural_key):
        setting = _left_out_by(targets, config, places, path)
        if targets.is_out_of_time:
            return
        if setting is not None:
            unnamed.setdefault(setting, []).append(path)
    for setting, paths in unnamed.items():
        found = f"adapter_config.json: {setting} is {shorten(repr(config.get(setting)))}, which"
        if setting == "target_modules" and len(paths) == len(adapted):
            yield (
                f"{found} matches none of the {len(adapted)} modules in the adapter's file, such as "
                f"{shorten(paths[0])}; expected the adapter's own config"
            )
            continue
        yield (
            f"{found} {'does not name' if setting == 'target_modules' else 'leaves out'} {_some(paths)}, but "
            f"{own.folder.name} has tensors for {'them' if len(paths) > 1 else 'it'}: the file and its config are not "
            f"of one adapter; {_FETCH}, or correct {setting}"
        )


def _unnamed_saved_problems(own: Checkpoint) -> Iterator[str]:
    """Yields the modules that the file has as a whole, under the name that says so, and the config does not name."""
    config = own.config
    named = config.get("modules_to_save") or ()
    if config.get("ensure_weight_tying") or config.get("task_type") in HEADS_OF_TASKS:
        return  # peft adds names of its own
    wrapped = (key.partition(".modules_to_save.") for key in own.tensors)
    paths = dict.fromkeys(path.removeprefix(PREFIX) for path, sign, _ in wrapped if sign)
    unnamed = [path for path in paths if not any(path.endswith(name) for name in named)]
    if unnamed:
        yield (
            f"adapter_config.json: modules_to_save is {shorten(repr(config.get('modules_to_save')))}, which does not "
            f"name {_some(unnamed)}, but {own.folder.name} has {'them' if len(unnamed) > 1 else 'it'} as a whole: the "
            f"file and its config are not of one adapter; {_FETCH}, or correct modules_to_save"
        )


def _left_out_by(targets: Targets, config: Mapping[str, Any], places: Places, path: str) -> str | None:
    """Returns the setting by which peft would leave a module in the file alone; `None` if it would not, or may not."""
    place = places.find(f"{path}.weight")
    parameters = {f"{path}.weight", *(f"{path}.{leaf}" for leaf in places.parameters_of(path))}
    for target in config.get("target_parameters") or ():
        of_class_unknown = len(parameters) < 2 and f".{path}".endswith(f".{target.rpartition('.')[0]}")
        if of_class_unknown or any(f".{name}".endswith(f".{target}") for name in parameters):
            return None
    names = [path]
    parent = path.rpartition(".")[0]
    if parent and places.find(f"{parent}.in_proj_weight") is not None:
        names.append(parent)  # an attention of torch's, whose projections are adapted with it
    if place is not None:
        is_one = len(place.tied) < 2 or config.get("ensure_weight_tying")
        tied = [name.rpartition(".")[0] for name in place.tied]
        names += [name for name in tied if is_one or f".{name}".endswith(f".{path}")]
    is_linear = place is None or place.module is None or _is_linear(place.module)
    is_linear = is_linear and path.rpartition(".")[2] not in _HEADS
    settings = [targets.left_out_by(name, is_linear=is_linear) for name in names]
    if None in settings:
        return None
    is_uncertain = place is None or place.fused or any(name.endswith(f".{path}") for name in targets.names)
    return None if is_uncertain and settings[0] == "target_modules" else settings[0]


def _modules_beside(model: Checkpoint, places: Places, adapted: Collection[str], targets: Targets) -> Iterator[str]:
    """Yields the modules that peft would have adapted in the stacks of layers that the file has some of; and a head."""
    stacks = {found["stack"] for path in adapted if (found := _LAYER.match(path)) is not None}
    numbers: dict[str, set[str]] = {}
    rests: dict[str, None] = {}
    for name in model.tensors:
        found = _LAYER.match(name)
        if found is not None and name.endswith(".weight") and "experts." not in found["rest"]:
            numbers.setdefault(found["stack"], set()).add(found["number"])
            rests[found["rest"].removesuffix(".weight")] = None
    for path in adapted:
        found = _LAYER.match(path)
        if found is not None and "experts." not in found["rest"]:
            rests[found["rest"]] = None
    counted = sorted(set().union(*numbers.values()), key=int) if numbers else []
    for stack in stacks:
        own_numbers = sorted(numbers.get(stack, counted), key=int)
        for path in (f"{stack}{number}.{rest}" for number in own_numbers for rest in rests):
            if path not in adapted and _is_missed(path, places, targets):
                yield path
    for head in _HEADS:
        is_named = head in targets.names and f"{head}.weight" in model.tensors and not stacks.isdisjoint(numbers)
        if is_named and head not in adapted and _is_missed(head, places, targets):
            yield head


def _is_missed(path: str, places: Places, targets: Targets) -> bool:
    """Whether a module is one that peft adapts, and whose tensors it writes."""
    if not targets.matches(path, is_linear=True):
        return False
    place = places.find(f"{path}.weight")
    return place is not None and _is_plain(place, path) and (not targets.all_linear or place.module is not None)


def _is_plain(place: Place, path: str) -> bool:
    """Whether a weight is a linear's of its own, under the very path."""
    if not place.pieces or place.fused or len(place.tied) > 1 or len(place.shape) != 2:
        return False
    if place.module is None:
        return True
    return _is_linear(place.module) and f".{place.tied[0]}".endswith(f".{path}.weight")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _saved_problems(own: Checkpoint, model: Checkpoint, places: Places, saved: Collection[str]) -> Iterator[str]:
    """Yields the modules to save of which the file has no tensor, or not those of all layers."""
    named = own.config.get("modules_to_save") or ()
    paths = {name.rpartition(".")[0] for name in saved}
    held = [name for name in named if any(_is_in(name, path) for path in paths)]
    missing: list[str] = []
    for name in named:
        if name in held:
            continue
        stored = {key.rpartition(".")[0] for key in model.tensors if _is_in(name, key.rpartition(".")[0])}
        is_there = any(
            place is not None and place.pieces and len(place.tied) < 2
            for place in (places.find(f"{path}.weight") for path in sorted(stored)[:50])
        )
        if is_there or not held:
            missing.append(name)
    if missing:
        yield (
            f"adapter_config.json: modules_to_save names {_some(missing)}, but {own.folder.name} has no tensor of "
            f"{'them' if len(missing) > 1 else 'it'}: the file is not whole; {_FETCH}"
        )
    lacking = sorted(
        path for path in _layers_beside(paths, model) if path not in paths and any(path.endswith(name) for name in held)
    )
    if lacking:
        yield (
            f"adapter_config.json: modules_to_save names {_some(lacking)} of the model, but {own.folder.name} has no "
            f"tensors for {'them' if len(lacking) > 1 else 'it'}: the file is not whole; {_FETCH}"
        )


def _layers_beside(paths: Collection[str], model: Checkpoint) -> Iterator[str]:
    """Yields the paths on disk that differ from some of the file's in a layer's number alone."""
    kinds = {(found["stack"], found["rest"]) for path in paths if (found := _LAYER.match(path)) is not None}
    for key in model.tensors:
        path = key.rpartition(".")[0]
        found = _LAYER.match(path)
        if found is not None and (found["stack"], found["rest"]) in kinds:
            yield path


def _is_in(name: str, path: str) -> bool:
    """Whether a path is that of a module to save, or leads through one."""
    return f".{name}." in f".{path}." or path.endswith(name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shorten, names[:3])) + more
