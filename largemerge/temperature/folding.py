"""Finds what scales the logits of a model: tensors that, times 1/τ, make them as if the softmax had the temperature τ.

    logits = W n + b            W and b of the head, the linear that runs last                   n = x̂ ∘ γ + β
    tied to the embedding:      γ and β of the norm that runs before it, outside the blocks, and b where there is one

A head that is tied is left as it is, for its numbers are also the model's inputs. What is found here goes by the order
in which modules run, on made-up weights; that the logits are then scaled, and by 1/τ, is measured later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from largemerge.calibration.batches import Batch
from largemerge.errors import ArchitectureError
from largemerge.evaluation.models import OpenedModel
from largemerge.evaluation.running import examples_of, outline_of
from largemerge.model.fake_forward import fake_model
from largemerge.model.norms import is_norm, may_be_norms, scales_by_weight
from largemerge.model.skeleton import all_configs, is_linear

_CAP = re.compile(r"^(?!attn|attention).*(soft_?cap|soft_?capping)", re.IGNORECASE)
"""Matches settings by which logits pass through a tanh."""

_BLOCK = ""
"""Stands for any block in the order of what runs."""


@dataclass(frozen=True)
class Scaling:
    """What scales the logits.

    Attributes:
        parameters: Names of parameters that are multiplied.
        keys: Their names on disk.
        what: Words for it.
    """

    parameters: tuple[str, ...]
    keys: tuple[str, ...]
    what: str


def find_scaling(model: OpenedModel, batch: Batch, where: str) -> Scaling:
    """Finds the parameters that scale the logits.

    Args:
        model: The model.
        batch: Forward arguments of its task.
        where: The task, for messages.

    Raises:
        ArchitectureError: If there are none, or none whose product with a number would do.
    """
    _check_no_cap(model, where)
    name, skeleton = model.name, model.skeleton
    linear, norm = _last_run(model, batch, where)
    if linear is None:
        raise ArchitectureError(f"{where}: {name}: no linear runs in a {skeleton.class_name}; expected one with a head")
    tied = {*model.mapping.aliases, *model.mapping.aliases.values()}
    own = _parameters_of(skeleton.model, linear)
    if f"{linear}.weight" not in tied:
        return _scaling(model, own, f"the head, {linear}", where)
    if norm is None:
        raise ArchitectureError(
            f"{where}: {name}: {linear} is tied to the embedding, so that dividing it would change the model's inputs, "
            "and no norm runs between the blocks and it; untie the head first (tie_word_embeddings: false)"
        )
    if not scales_by_weight(skeleton.model.get_submodule(norm)):
        raise ArchitectureError(
            f"{where}: {name}: {linear} is tied to the embedding, and the norm before it, {norm}, multiplies by 1 + "
            "its weight, or the like, so that no factor of the weight divides its output; untie the head first "
            "(tie_word_embeddings: false)"
        )
    more = [each for each in own if each not in tied]
    what = f"the final norm, {norm}" + (f", and the bias of {linear}" if more else "")
    return _scaling(
        model, [*_parameters_of(skeleton.model, norm), *more], f"{what}: the head is tied to the embedding", where
    )


def _check_no_cap(model: OpenedModel, where: str) -> None:
    for path, config in all_configs(model.skeleton.model.config).items():
        for key, value in config.to_dict().items():
            if _CAP.match(key) and isinstance(value, int | float) and value:
                setting = ".".join((*path, key))
                raise ArchitectureError(
                    f"{where}: {model.name}: {setting} is {value:g}: logits pass through a tanh after the head, so "
                    "that no factor of a weight is a temperature"
                )


def _last_run(model: OpenedModel, batch: Batch, where: str) -> tuple[str | None, str | None]:
    """Paths of the linear that runs last, and of the norm that runs last between the blocks and it."""
    skeleton = model.skeleton
    stacks = tuple(f"{stack.name}." for stack in skeleton.stacks)
    norms = {path for path in may_be_norms(skeleton.model) if not path.startswith(stacks)}
    ran: list[str] = []

    def note(path: str) -> Any:
        return lambda *_: ran.append(path)

    hooks = [
        module.register_forward_hook(note(path))
        for path, module in skeleton.model.named_modules()
        if not path.startswith(stacks) and (path in norms or is_linear(module))
    ]
    hooks += [block.register_forward_hook(note(_BLOCK)) for stack in skeleton.stacks for block in stack.blocks]
    try:
        with fake_model(skeleton, outline_of([batch]), examples_of(model, [batch]), where):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    linears = [number for number, path in enumerate(ran) if path not in norms and path != _BLOCK]
    if not linears:
        return None, None
    through = max((number for number, path in enumerate(ran) if path == _BLOCK), default=-1)
    after = ran[through + 1 : linears[-1]]
    before = [path for path in after if path in norms and is_norm(skeleton.model.get_submodule(path))]
    return ran[linears[-1]], before[-1] if before else None


def _parameters_of(module: nn.Module, path: str) -> list[str]:
    """Names of the weight and the bias of a module."""
    return [f"{path}.{leaf}" for leaf, _ in module.get_submodule(path).named_parameters(recurse=False)]


def _scaling(model: OpenedModel, parameters: list[str], what: str, where: str) -> Scaling:
    keys = {name: model.mapping.keys_of(name) for name in parameters}
    if lost := [name for name, own in keys.items() if len(own) != 1]:
        raise ArchitectureError(
            f"{where}: {model.name}: {', '.join(lost)} is not one tensor of the files; expected a checkpoint with it"
        )
    return Scaling(tuple(parameters), tuple(own[0] for own in keys.values()), what)


def scale_setting(factors: Mapping[str, float], keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Writes factors of single tensors as a `scale` of `passthrough`, in which the first filter that fits holds.

    Args:
        factors: Factors by name on disk.
        keys: All tensors on disk.
    """
    alike = [key for key in keys if key not in factors and any(name in key for name in factors)]
    wanted = sorted(factors, key=len, reverse=True)
    ones = [{"filter": key, "value": 1.0} for key in sorted(alike, key=len, reverse=True)]
    return [*ones, *({"filter": key, "value": factors[key]} for key in wanted), {"value": 1.0}]
