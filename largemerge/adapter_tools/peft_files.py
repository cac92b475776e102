"""What peft calls the parts of an adapter: names of tensors, target modules, modules to save, `adapter_config.json`.

    base_model.model.<path>.lora_A.weight            A [r, in]
    base_model.model.<path>.lora_B.weight            B [out, r]             W = W_0 + lora_alpha / r · B A
    base_model.model.<path>.lora_magnitude_vector    m [out]                DoRA: its rows are brought to these lengths
    base_model.model.<path>.<rest>                   a tensor of a module to save
    base_model.model.<path>[.base_layer].bias        a bias, where `bias` is `all`

peft adapts every module whose path is in `target_modules` or ends with one of them after a dot, and saves every module
whose path ends with one of `modules_to_save`, with or without a dot before it (`peft.utils.other`, `_set_trainable`).
So short names are written only where they mean just the modules that are meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import transformers

from largemerge.checkpoint.adapter_targets import HEADS_OF_TASKS, PREFIX, Targets
from largemerge.model.adapter_names import CLASSES_OF_TASKS

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def factor_names(path: str) -> tuple[str, str]:
    """Names of A and B of a module."""
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def magnitude_name(path: str) -> str:
    """Name of the magnitudes of a module, of which DoRA has one for every output."""
    return f"{PREFIX}{path}.lora_magnitude_vector"


def whole_name(parameter: str) -> str:
    """Name of a tensor of a module to save."""
    return PREFIX + parameter


def bias_name(path: str, *, adapted: bool) -> str:
    """Name of the bias of a linear, which lies in peft's layer where the linear is adapted."""
    return f"{PREFIX}{path}{'.base_layer' if adapted else ''}.bias"


def task_type(model: Any) -> str | None:
    """Finds peft's name for the task of a model's class; `None` where any forward will do, as of a bare body."""
    for task, name in CLASSES_OF_TASKS.items():
        if task == "FEATURE_EXTRACTION":
            continue
        found = getattr(transformers, name).get(type(model.config), None)
        if type(model) in (found if isinstance(found, tuple) else (found,)):
            return task
    return None


def needs_head(task: str | None) -> bool:
    """Whether peft expects the head of a model in the file of every adapter for this task."""
    return task in HEADS_OF_TASKS


def head_of(path: str, task: str | None) -> str | None:
    """Returns the path of the task's head that a module is, or lies in; `None` if it does not."""
    parts = path.split(".")
    heads = HEADS_OF_TASKS.get(task or "", ())
    return next((".".join(parts[: end + 1]) for end, part in enumerate(parts) if part in heads), None)


def target_names(paths: Collection[str], modules: Iterable[str]) -> list[str] | str:
    """Names just these modules for `target_modules`: by their last names, else by their paths, else by a pattern.

    Args:
        paths: Paths of the modules that are adapted.
        modules: Paths of all modules of the class.
    """
    everything = list(modules)
    short = sorted({path.rpartition(".")[2] for path in paths})
    for names in (short, sorted(paths)):
        targets = Targets({"target_modules": names})
        if {path for path in everything if path and targets.matches(path)} == set(paths):
            return names
    return "|".join(re.escape(path) for path in sorted(paths))


def rank_pattern(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Returns the ranks that are not the adapter's own, by pattern: a last name where all modules of it have that rank.

    Args:
        ranks: Path of a module → its rank.
        rank: Rank of the adapter.
    """
    by_name: dict[str, set[int]] = {}
    for path, own in ranks.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(own)
    found: dict[str, int] = {}
    for path, own in ranks.items():
        name = path.rpartition(".")[2]
        if own != rank:
            found[name if len(by_name[name]) == 1 else re.escape(path)] = own
    return found


def names_to_save(paths: Collection[str], modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names modules for `modules_to_save`, and lists all that peft will take for them.

    Args:
        paths: Paths of the modules that are to be saved.
        modules: Paths of all modules of the class.

    Returns:
        The names; and the paths of the outermost modules whose tensors the file must have. A module that no name means
        alone, since one inside it ends in all of its path (`embeddings.patch_embeddings`), is in neither.
    """
    everything = [path for path in modules if path]
    outermost = [path for path in paths if not any(_is_below(path, other) for other in paths)]
    names: list[str] = []
    for path in outermost:
        short = path.rpartition(".")[2]
        alike = {each for each in everything if each.endswith(short)}
        name = short if alike <= set(outermost) else path
        if any(_is_below(each, path) for each in everything if each.endswith(name)):
            continue  # peft would take the module, and one inside it, for two
        if name not in names:
            names.append(name)
    taken = [path for path in everything if any(path.endswith(name) for name in names)]
    return names, [path for path in taken if not any(_is_below(path, other) for other in taken)]


def _is_below(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


def adapter_config(
    *,
    base: str | None,
    revision: str | None,
    task: str | None,
    rank: int,
    ranks: Mapping[str, int],
    targets: Sequence[str] | str,
    transposed: bool,
    saved: Sequence[str],
    biases: bool,
    ties: bool,
    dora: bool = False,
) -> dict[str, Any]:
    """Makes the contents of `adapter_config.json`; every scale is 1, so that the factors are what is added.

    Args:
        base: Folder or Hub id of the base; `None` where it is none of its own.
        revision: Its revision on the Hub.
        task: peft's name for the task of the class.
        rank: Rank of the adapter.
        ranks: Path of a module → its own rank.
        targets: `target_modules`.
        transposed: Whether linears among them hold their weights as `[in, out]`.
        saved: `modules_to_save`.
        biases: Whether the file holds biases.
        ties: Whether saved modules that are tied in the model stay tied.
        dora: Whether the file holds magnitudes.
    """
    pattern = rank_pattern(ranks, rank)
    tying = {"ensure_weight_tying": True} if ties else {}  # which older versions of peft do not know
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": transposed,
        "bias": "all" if biases else "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": dora,
        "init_lora_weights": True,
        **tying,
    }
