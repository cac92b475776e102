"""Checks that a checkpoint loads: with no missing, no unexpected and no mismatched key.

    config.json + names and shapes ──► from_pretrained on the meta device ──► LoadingVerdict
    verdict of the output, verdict of the input that it takes after ──► problems, notes

Transformers itself loads here, tensors without numbers into a model without numbers; so tied weights, renamings,
conversions, buffers and patterns of keys that a class ignores all count as they will. Many checkpoints of the Hub lack
a pooler, or hold buffers of years ago: what the reference input has in this way is a note, anything beyond a problem.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import CRITICAL
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils import logging

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter
from largemerge.checkpoint.tensor_info import LAYER_NUMBER
from largemerge.errors import CheckpointError, LargemergeError
from largemerge.model.classes import ClassifiedModel
from largemerge.model.skeleton import bare_checkpoint, find_model_class, load_config

_NAMES_SHOWN = 4
_MANY_TENSORS = 1500
"""From here on, layers that are like others are not loaded."""


class SizedTensor(Protocol):
    """A tensor on disk, read or to be written, a quantised one as the model sees it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape for the model."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype for the model."""
        ...


@dataclass(frozen=True)
class LoadingVerdict:
    """What Transformers would say of a checkpoint that it loads.

    Attributes:
        class_name: The class that loads it.
        missing: Names of the model's tensors for which the checkpoint has nothing: they would be random.
        unexpected: Names in the checkpoint that the class does not know: they would be dropped.
        mismatched: Name → shape in the checkpoint and shape in the model, where these differ.
        error: Why the checkpoint could not be loaded at all; empty if it could.
        body: What names of the class's body begin with, such as `model.`; empty where the class has no heads.
        not_checked: Why nothing could be found out, such as a class that Transformers does not have; empty if it could.
    """

    class_name: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    error: str = ""
    body: str = ""
    not_checked: str = ""

    @property
    def is_clean(self) -> bool:
        """Whether the checkpoint loads with nothing to be said."""
        return not (self.missing or self.unexpected or self.mismatched or self.error or self.not_checked)


@dataclass(frozen=True)
class Findings:
    """What is to be said of an output.

    Attributes:
        problems: Why it would not load as a whole.
        notes: What a user should know.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def try_loading(
    config: Mapping[str, Any],
    tensors: Mapping[str, SizedTensor],
    *,
    code: Path | None = None,
    trust_remote_code: bool = False,
) -> LoadingVerdict:
    """Lets Transformers load a checkpoint on the meta device.

    Args:
        config: Contents of its `config.json`.
        tensors: Its tensors by name on disk, quantised ones as the model sees them.
        code: Folder with the Python code that the config refers to.
        trust_remote_code: Allow that code.
    """
    with _quiet():
        try:
            bare = bare_checkpoint(config, "config", code)
            loaded = load_config(bare, trust_remote_code=trust_remote_code)
            model_class: Any = find_model_class(loaded, bare, trust_remote_code)
        except LargemergeError as error:
            return LoadingVerdict(not_checked=error.problems[0].removeprefix("config: "))
        except Exception as error:  # configs raise whatever they like
            return LoadingVerdict(not_checked=_first_line(error))
        like = _like_others(tensors) if len(tensors) >= _MANY_TENSORS else {}
        if like and (model := _loaded_as_others(model_class, loaded, tensors, like)) is not None:
            return LoadingVerdict(model_class.__name__, body=_body_of(model))
        try:
            model, info = _load(model_class, loaded, tensors)
        except Exception as error:  # so do models
            return LoadingVerdict(model_class.__name__, error=_first_line(error))
    mismatched = {name: (tuple(found), tuple(wanted)) for name, found, wanted in sorted(info["mismatched_keys"])}
    missing, unexpected = tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"]))
    told = "\n".join(info["error_msgs"])
    return LoadingVerdict(model_class.__name__, missing, unexpected, mismatched, told, _body_of(model))


def _body_of(model: Any) -> str:
    """What names of the body begin with; empty where the class has no heads."""
    prefix = f"{model.base_model_prefix}."
    return prefix if any(name.startswith(prefix) for name, _ in model.named_parameters()) else ""


def _load(model_class: Any, config: Any, tensors: Mapping[str, SizedTensor]) -> tuple[Any, dict[str, Any]]:
    """Loads on the meta device; returns the model, and what Transformers says of the loading."""
    state = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in tensors.items()}
    model, info = model_class.from_pretrained(
        None,
        config=copy.deepcopy(config),
        state_dict=state,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return model, info


# Thousands of tensors, most of them in layers that are like others


def _layers(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups what is in layers, such as `model.layers.3`, by these; and by the names in them."""
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        found = _FIRST_LAYER.match(name)
        if found is not None:
            layers.setdefault(found[0], {})[name[found.end() :]] = (tuple(tensor.shape), tensor.dtype)
    return layers


def _stack_and_number(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(".")
    return stack, int(number)


def _like_others(tensors: Mapping[str, SizedTensor]) -> dict[str, str]:
    """Finds layers of the same names, shapes and dtypes as another one of their stack.

    Returns:
        Layer → the one that stands for it. The first and the last of every kind stand for themselves.
    """
    kinds: dict[tuple[str, frozenset[Any]], list[str]] = {}
    for layer, members in _layers(tensors).items():
        kinds.setdefault((_stack_and_number(layer)[0], frozenset(members.items())), []).append(layer)
    alike = (sorted(layers, key=_stack_and_number) for layers in kinds.values())
    return {layer: first for first, *between in alike for layer in between[:-1]}


def _loaded_as_others(
    model_class: Any, config: Any, tensors: Mapping[str, SizedTensor], like: Mapping[str, str]
) -> Any | None:
    """Loads a checkpoint without layers that are like others, and says whether there is nothing to be said of all.

    Transformers takes a quarter of a millisecond for a tensor, and more for one of an expert.

    Args:
        model_class: The class.
        config: Its config.
        tensors: The tensors.
        like: Layers to leave out, and those that stand for them.

    Returns:
        The model, if all of it is loaded but as many layers of these numbers, and if these are in the class like those
        that stand for them. `None` if it is not known: the whole of it has to be loaded, then.
    """
    sample = {
        name: tensor
        for name, tensor in tensors.items()
        if (found := _FIRST_LAYER.match(name)) is None or found[0] not in like
    }
    try:
        model, info = _load(model_class, config, sample)
    except Exception:  # told when the whole is loaded
        return None
    if info["unexpected_keys"] or info["mismatched_keys"] or info["error_msgs"]:
        return None
    missing, layers = set(info["missing_keys"]), _layers(model.state_dict())
    absent = [layer for layer, members in layers.items() if all(f"{layer}{name}" in missing for name in members)]
    numbers = {_stack_and_number(layer)[1]: _stack_and_number(other)[1] for layer, other in like.items()}
    for layer in absent:
        stack, number = _stack_and_number(layer)
        other = f"{stack}.{numbers.get(number)}"
        if other in absent or layers.get(other) != layers[layer]:
            return None
    left_out = sorted(_stack_and_number(layer)[1] for layer in like)
    if sorted(_stack_and_number(layer)[1] for layer in absent) != left_out:
        return None
    return model if sum(len(layers[layer]) for layer in absent) == len(missing) else None


def check_loads(
    config: Mapping[str, Any],
    tensors: Mapping[str, SizedTensor],
    reference: Checkpoint,
    *,
    restacked: bool = False,
    trust_remote_code: bool = False,
) -> Findings:
    """Says what is wrong with an output that does not load as a whole, as far as its reference input does.

    Args:
        config: Contents of the output's `config.json`.
        tensors: The output's tensors by name on disk.
        reference: The input whose config and names the output has.
        restacked: Whether the output has layers in another order, so that what concerns a layer of the reference may
            concern any layer of the output.
        trust_remote_code: Allow the reference's own Python code.
    """
    options: dict[str, Any] = {"code": reference.folder, "trust_remote_code": trust_remote_code}
    verdict = try_loading(config, tensors, **options)
    if verdict.is_clean:
        return Findings()
    before = try_loading(reference.config, reference.tensors, **options)
    if before.not_checked or (verdict.error and before.error):
        why = before.not_checked or f"{before.class_name} does not load {reference.name} either: {before.error}"
        return Findings(notes=(f"not checked: whether the output loads without missing or unexpected keys ({why})",))
    if verdict.not_checked or verdict.error:
        return Findings((f"the output could not be loaded: {verdict.not_checked or verdict.error}",))
    problems: list[str] = []
    notes: list[str] = []
    cut = _missing_of_layers(verdict.missing, tensors)
    if cut:
        problems.append(
            f"{reference.name}: its files lack {_count(cut)} of layers that its config.json counts: {_some(cut)}; they "
            "would be random; fetch the checkpoint again, or mend the number of layers in its config.json"
        )
    needed = [name for name in verdict.missing if name not in cut and _is_needed(name, verdict.body)]
    needed = [name for name in needed if _is_known(before.missing, restacked)(name)]
    if needed:
        problems.append(
            f"{reference.name}: its files lack {_count(needed)} that {verdict.class_name} needs, and that would be "
            f"random: {_some(needed)}; fetch the checkpoint again"
        )
    for texts, found, known in (
        (_MISSING, verdict.missing, before.missing),
        (_UNEXPECTED, verdict.unexpected, before.unexpected),
    ):
        told = _is_known(known, restacked)
        new = [name for name in found if not told(name)]
        old = [name for name in found if told(name) and name not in (*cut, *needed)]
        if new:
            problems.append(texts[0].format(class_name=verdict.class_name, count=_count(new), names=_some(new)))
        if old:
            reason = texts[1].format(class_name=verdict.class_name, count=_count(old), names=_some(old))
            notes.append(f"as in {reference.name}, {reason}")
    for name, (shape, wanted) in list(verdict.mismatched.items())[:_NAMES_SHOWN]:
        problems.append(f"{name}: the output would hold {list(shape)}; by its config {list(wanted)} is expected")
    return Findings(tuple(problems), tuple(notes))


def check_own_configs(models: Mapping[str, ClassifiedModel], adapters: Mapping[str, Adapter]) -> None:
    """Checks that every model is as its own config says, whatever the others are.

    A head that no model has is no mistake: a note tells it.

    Args:
        models: The models, by the names that the user has for them.
        adapters: Their adapters: what these replace may have shapes of its own.

    Raises:
        CheckpointError: If tensors are missing, too many, or of another shape; it names all.
    """
    nobodys = set.intersection(*(set(model.mapping.missing) for model in models.values())) if models else set()
    problems: list[str] = []
    for name, model in models.items():
        replaced = adapters[name].replaced if name in adapters else ()
        problems += _own_problems(name, model, replaced, nobodys)
    if problems:
        raise CheckpointError(*problems)


def _own_problems(
    name: str, classified: ClassifiedModel, replaced: Collection[str], nobodys: Collection[str]
) -> Iterator[str]:
    model, mapping = classified.model, classified.mapping
    ignored = _patterns(model._keys_to_ignore_on_load_missing)
    missing = [key for key in mapping.missing if not any(pattern.search(key) for pattern in ignored)]
    cut = _missing_of_layers(missing, classified.checkpoint.tensors)
    if cut:
        yield (
            f"{name}: its files lack {_count(cut)} of layers that its config.json counts: {_some(cut)}; fetch the "
            "checkpoint again, or mend the number of layers in its config.json"
        )
    prefix = f"{model.base_model_prefix}."
    body = prefix if any(key.startswith(prefix) for key, _ in model.named_parameters()) else ""
    head = _output_embeddings(model)
    needed = [key for key in missing if _is_needed(key, body) or (key == head and key not in nobodys)]
    needed = [key for key in needed if key not in cut]
    if needed:
        strange = list(mapping.unmapped)
        there = f" (there are {_count(strange)} of other names: {_some(strange)})" if strange else ""
        yield (
            f"{name}: its files lack {_count(needed)} that {type(model).__name__} needs, the class in its config.json: "
            f"{_some(needed)}{there}; fetch the checkpoint again"
        )
    beyond = _beyond_the_layers(mapping.unmapped, model)
    if beyond:
        yield (
            f"{name}: its files hold {_count(beyond)} of more layers than its config.json counts: {_some(beyond)}; "
            "they would be dropped: mend the number of layers in its config.json, or fetch the checkpoint again"
        )
    state = model.state_dict()
    unlike = {key: shape for key, shape in mapping.mismatched.items() if mapping.renamed.get(key) not in replaced}
    for key, shape in list(unlike.items())[:_NAMES_SHOWN]:
        yield (
            f"{name}: {key} is {list(shape)} in its files, and {list(state[key].shape)} by its config.json; fetch both "
            "again, or mend config.json"
        )


def _output_embeddings(model: Any) -> str:
    """Finds the name of the weight of the output embeddings; empty where a class has none."""
    try:
        weight = getattr(model.get_output_embeddings(), "weight", None)
    except NotImplementedError:
        return ""
    return next((key for key, each in model.named_parameters(remove_duplicate=False) if each is weight), "")


def _beyond_the_layers(unmapped: Iterable[str], model: Any) -> list[str]:
    """Lists names of layers that the class does not have, though it has others of the stack, and does not ignore."""
    ignored = _patterns(model._keys_to_ignore_on_load_unexpected)
    layers = {number[0] for key in model.state_dict() if (number := _FIRST_LAYER.match(key)) is not None}
    stacks = {layer.rpartition(".")[0] for layer in layers}
    found = []
    for key in unmapped:
        layer = _FIRST_LAYER.match(key)
        if layer is None or layer[0] in layers or any(pattern.search(key) for pattern in ignored):
            continue
        if layer[0].rpartition(".")[0] in stacks:
            found.append(key)
    return found


def _patterns(keys: Iterable[str] | None) -> list[re.Pattern[str]]:
    return [re.compile(key) for key in keys or ()]


_FIRST_LAYER = re.compile(r".*?\.\d+(?=\.)")
"""Matches a name as far as the number of its first layer."""


def _missing_of_layers(missing: Collection[str], tensors: Collection[str]) -> list[str]:
    """Lists what is missing of layers of which the files hold nothing, though they hold other layers of the stack."""

    def layer_of(name: str) -> str:
        number = LAYER_NUMBER.search(name)
        return name[: number.end()] if number is not None else ""

    layers = {layer_of(name) for name in tensors}
    stacks = {layer.rpartition(".")[0] for layer in layers}
    return [name for name in missing if (layer := layer_of(name)) not in layers and layer.rpartition(".")[0] in stacks]


def _is_needed(name: str, body: str) -> bool:
    """Whether nothing explains that a tensor of the body is missing: many checkpoints lack poolers, or old buffers."""
    return name.startswith(body) and not any(word in name for word in _OFTEN_MISSING)


_OFTEN_MISSING = ("pool", "mask", "position_ids", "inv_freq", "rotary", "parametrizations", "relative_", "head.")
_MISSING = (
    "the output would lack {count} that {class_name} needs by its config, and that would be random: {names}",
    "the output lacks {count} that {class_name} has, and that are random when it is loaded: {names}",
)
_UNEXPECTED = (
    "the output would hold {count} that {class_name} has no place for by its config, and drops: {names}",
    "the output holds {count} that {class_name} has no place for, and drops when it is loaded: {names}",
)


def _is_known(known: Collection[str], restacked: bool) -> Callable[[str], bool]:
    """Makes what says whether a name is among those of the reference, whatever the layer if `restacked`."""
    names = set(known)
    if not restacked:
        return names.__contains__
    patterns = {LAYER_NUMBER.sub("*", name, count=1) for name in names}
    return lambda name: LAYER_NUMBER.sub("*", name, count=1) in patterns


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Transformers from telling what is told here."""
    progress: Any = logging  # its functions have no types
    level, bars = logging.get_verbosity(), progress.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    progress.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            progress.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
