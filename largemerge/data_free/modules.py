"""mergekit's names of a model's modules, and which stacks of layers and other tensors of a model they mean.

    text_decoder             the layers of the language model
    vision_tower             the layers of the vision model, also called vision_model
    multi_modal_projector    what lies between the two, with or without layers
    encoder, decoder         the two of a sequence-to-sequence model
    shared                   what belongs to neither
    default                  the only stack of a model; of one with several, what belongs to none

A module may also be called as its stack is in the tensors' names (`model.layers`), or by a part of that name that no
other stack has. What is found decides, not a table of architectures.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_PROJECTOR = re.compile(r"project|merger|(^|[._])mm_|connector|resampler")
_VISION = re.compile(r"vis|image|pixel")
_AUDIO = re.compile(r"audio|speech")
_MODULE_ROLES = (
    dict.fromkeys(("vision_tower", "vision_model", "vision_encoder", "visual"), "vision")
    | dict.fromkeys(("audio_tower", "audio_model", "audio_encoder"), "audio")
    | dict.fromkeys(("text_decoder", "text_model", "language_model"), "")
    | {"multi_modal_projector": "projector"}
)
_WITHOUT_LAYERS = ("default", "shared", "multi_modal_projector")


def _role(name: str) -> str:
    """Tells by its name what a stack or a tensor outside the stacks belongs to; empty where nothing tells."""
    for role, pattern in (("projector", _PROJECTOR), ("vision", _VISION), ("audio", _AUDIO)):
        if pattern.search(name.lower()):
            return role
    return ""


def stacks_of_modules(names: Collection[str], stacks: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Finds the stacks of layers that each module of a configuration means.

    Args:
        names: Names of the modules.
        stacks: Names of the stacks of layers that the model has.

    Returns:
        The stacks of every module; of one that has no layers, none. A module that means nothing here is left out.
    """
    if len(names) == 1 and len(stacks) == 1 and _may_mean(next(iter(names)), next(iter(stacks))):
        return {next(iter(names)): tuple(stacks)}
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in names if name in stacks}
    taken = set(found)
    for name in names:
        if name not in found:
            means = tuple(stack for stack in _meant(name, stacks) if stack not in taken)
            if means or name in _WITHOUT_LAYERS:
                found[name] = means
                taken.update(means)
    return found


def _may_mean(name: str, stack: str) -> bool:
    """Whether a name may be that of the only module of a model: one of mergekit's, the stack's, or a part of that."""
    known = name in _MODULE_ROLES or name in (*_WITHOUT_LAYERS, "encoder", "decoder")
    return known or f".{name}." in f".{stack}."


def _meant(name: str, stacks: Collection[str]) -> list[str]:
    """Lists the stacks that a name means which is not one of theirs."""
    if name == "default":
        return list(stacks) if len(stacks) == 1 else []
    parts = [stack for stack in stacks if f".{name}." in f".{stack}."]
    if len(parts) == 1:
        return parts
    return [stack for stack in stacks if name in _MODULE_ROLES and _role(stack) == _MODULE_ROLES[name]]


def module_of_tensor(tensor: str, modules: Mapping[str, tuple[str, ...]]) -> str | None:
    """Finds the module that a tensor outside the stacks belongs to; `None` where its name does not tell.

    Args:
        tensor: Name of the tensor.
        modules: The stacks of every module, from `stacks_of_modules`.
    """
    if len(modules) == 1:
        return next(iter(modules))
    if _role(tensor) == "projector" and "multi_modal_projector" in modules:
        return "multi_modal_projector"
    lengths = {
        module: max((_common(tensor, stack) for stack in stacks), default=0) for module, stacks in modules.items()
    }
    longest = max(lengths.values())
    nearest = [module for module, length in lengths.items() if length == longest]
    if longest and len(nearest) == 1:
        return nearest[0]
    rest = next((name for name in ("shared", "default") if name in modules), None)
    language = [module for module, stacks in modules.items() if any(not _role(stack) for stack in stacks)]
    return rest or (language[0] if len(language) == 1 and not _role(tensor) else None)


def _common(tensor: str, stack: str) -> int:
    """Counts the first parts of two names that are the same."""
    count = 0
    for mine, other in zip(tensor.split("."), stack.split("."), strict=False):
        if mine != other:
            break
        count += 1
    return count
