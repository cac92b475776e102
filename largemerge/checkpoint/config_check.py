"""Checks of a `config.json` that come before any class is made of it: types that everyone relies on, and sizes.

Classes check their own settings when they are built, each in its own way. What is checked here would be read by others
first (`architectures`, `dtype`), or keep a class busy, or its memory growing, before it says anything: a
million layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from largemerge.errors import CheckpointError
from largemerge.text_files import brief

MAX_LAYERS, MAX_LABELS, MAX_SIZE = 10_000, 2_000_000, 100_000_000
"""Largest numbers of layers, of labels, and of rows or columns that a config may ask for; no model has a tenth."""

_LAYERS = re.compile(r"^(n|num)?_?(\w+_)?(layers?|blocks|depths?)$")
_AT_LEAST_ONE = frozenset(
    (
        *("hidden_size", "d_model", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads"),
        *("num_key_value_heads", "patch_size"),
    )
)
_NOT_NEGATIVE = frozenset(("vocab_size", "intermediate_size", "d_ff", "num_labels", "head_dim"))
_FLAGS = frozenset(("output_hidden_states", "output_attentions", "return_dict", "use_cache", "is_encoder_decoder"))
_SMALL = re.compile(r"^(\w+_)?(eps|epsilon)$")
"""Matches the names of small numbers that are added to a divisor."""
_MAY_BE_INFINITE = re.compile(r"time_step|limit|mask")
"""Matches in the names of limits, which classes have without an end."""
_NAMES_A_CLASS = ("model_type", "architectures", "auto_map", "_class_name", "architecture", "pretrained_cfg")
"""Keys of which one says what a model is: those of Transformers, of diffusers, and of timm."""
_MAX_PROBLEMS, _MAX_DEPTH = 20, 100


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Checks types and sizes of a config, whatever its class.

    Args:
        config: Contents of `config.json`.
        name: What the user calls the checkpoint.

    Raises:
        CheckpointError: If values have another type than everyone expects, or sizes that no model has; it names all.
    """
    problems = [*_type_problems(config), *_value_problems(config, ())]
    if not any(config.get(key) for key in _NAMES_A_CLASS):
        found = f"only {brief(sorted(map(str, config))[:5])}" if config else "nothing in it"
        problems.append(
            f"neither model_type nor architectures nor auto_map, {found}; expected a model's config, as "
            "save_pretrained writes it"
        )
    if problems:
        raise CheckpointError(*(f"{name}: config.json: {problem}" for problem in problems[:_MAX_PROBLEMS]))


def _type_problems(config: Mapping[str, Any]) -> Iterator[str]:
    checks: tuple[tuple[Sequence[str], Callable[[Any], bool], str], ...] = (
        (("model_type",), lambda value: isinstance(value, str), "a name such as 'llama'"),
        (("architectures",), _is_names, "a list of class names such as ['LlamaForCausalLM']"),
        (("auto_map",), _is_auto_map, "names of classes such as {'AutoConfig': 'configuration_x.XConfig'}"),
        (("dtype", "torch_dtype"), _is_dtype, "the name of a dtype such as 'bfloat16'"),
        (("quantization_config",), lambda value: isinstance(value, Mapping), "keys and values"),
        (("id2label", "label2id"), lambda value: isinstance(value, Mapping), "keys and values"),
    )
    for keys, is_right, expected in checks:
        for key in keys:
            value = config.get(key)
            if value is not None and not is_right(value):
                yield f"{key}: expected {expected}, found {brief(value)}"
    for key, value in config.items():
        is_number_or_list = isinstance(value, int | float | list) and not isinstance(value, bool)
        if str(key).endswith("_config") and key != "quantization_config" and is_number_or_list:
            yield f"{key}: expected keys and values, found {brief(value)}"
    labels = config.get("id2label")
    if isinstance(labels, Mapping):
        wrong = [key for key in labels if not re.fullmatch(r"-?[0-9]{1,12}", str(key))]
        if wrong:
            yield f"id2label: expected numbers and their labels, found {brief(wrong[0])} for a number"


def _value_problems(part: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Yields what is wrong with the values of a config and of those inside it."""
    if len(path) > _MAX_DEPTH:
        yield f"{'.'.join(path[:3])}…: nested more than {_MAX_DEPTH} levels deep"
        return
    for key, value in part.items() if isinstance(part, Mapping) else enumerate(part):
        here = (*path, str(key))
        if isinstance(value, Mapping | list):
            yield from _value_problems(value, here)
        elif isinstance(value, str) and (key == "rope_theta" or (key == "factor" and "rope" in "".join(path))):
            yield f"{'.'.join(here)}: expected a number, found {brief(value)}"
        elif key in _FLAGS and not isinstance(value, bool | None):
            yield f"{'.'.join(here)}: expected true or false, found {brief(value)}"
        elif isinstance(value, float) and math.isnan(value):
            yield f"{'.'.join(here)}: expected a number, found NaN"
        elif isinstance(value, int | float) and not isinstance(value, bool):
            of_list = next((each for each in reversed(here) if not each.isdecimal()), "")
            in_rope = any("rope" in each for each in here[:-1])
            problem = _size_problem(of_list, value) if isinstance(value, int) else None
            problem = problem or _range_problem(of_list, value, in_rope)
            if problem is not None:
                yield f"{'.'.join(here)}: {problem}"


def _range_problem(key: str, value: float, in_rope: bool) -> str | None:
    """Says what is wrong with a number that a model computes with."""
    if _SMALL.match(key) and not 0 <= value <= 1:
        return f"expected a number from 0 to 1, found {value}"
    if (key == "rope_theta" or (in_rope and key == "factor")) and not 0 < value < math.inf:
        return f"expected a finite number above 0, found {value}"
    if math.isinf(value) and not _MAY_BE_INFINITE.search(key):
        return f"expected a finite number, found {value}"
    return None


def _size_problem(key: str, value: int) -> str | None:
    if abs(value) >= 1 << 63:
        return f"expected a number of 64 bits, found one of {value.bit_length()}"
    if key in _AT_LEAST_ONE and value < 1:
        return f"expected 1 or more, found {value}"
    if key in _NOT_NEGATIVE and value < 0:
        return f"expected 0 or more, found {value}"
    most = MAX_LABELS if key == "num_labels" else MAX_LAYERS if _LAYERS.match(key) else None
    if most is None and (key in _AT_LEAST_ONE or key in _NOT_NEGATIVE):
        most = MAX_SIZE
    return f"expected at most {most}, found {value}" if most is not None and value > most else None


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_auto_map(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    named = [each for entry in value.values() for each in (entry if isinstance(entry, list) else [entry])]
    return all(each is None or isinstance(each, str) for each in named)


def _is_dtype(value: Any) -> bool:
    named = list(value.values()) if isinstance(value, Mapping) else [value]
    return all(isinstance(each, str) and _names_dtype(each) for each in named)


def _names_dtype(name: str) -> bool:
    return name == "auto" or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
