"""Stacks of layers, found in tensors' names; and everything that the configuration says as slices of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from largemerge.arithmetic.config import DataFreeConfig, Module, OutputSlice, SliceSource
from largemerge.arithmetic.matrices import LAYER
from largemerge.checkpoint.index import Checkpoint

Depths = Mapping[str, Mapping[str, int]]
"""By model and stack: how many layers there are."""


def find_stacks(checkpoint: Checkpoint) -> dict[str, int]:
    """Stacks of layers and how many each has, from the tensors' names."""
    numbers: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        match = LAYER.match(name)
        if match:
            numbers.setdefault(match["stack"], set()).add(int(match["number"]))
    return {stack: len(found) for stack, found in numbers.items() if found == set(range(len(found)))}


def layer_of(name: str) -> re.Match[str] | None:
    """Stack, number and rest of a tensor's name, if it looks like one of a layer's."""
    return LAYER.match(name)


def stack_of(name: str, stacks: Mapping[str, int]) -> str | None:
    """The stack that a tensor belongs to."""
    match = LAYER.match(name)
    return match["stack"] if match and match["stack"] in stacks else None


def modules_by_stack(
    config: DataFreeConfig, depths: Depths, stacks: Mapping[str, int], problems: list[str]
) -> dict[str, Module]:
    """By stack, everything as slices; what is wrong is added to `problems`."""
    if config.modules:
        given = dict(config.modules)
        if len(given) == 1 and len(stacks) == 1:
            given = {next(iter(stacks)): next(iter(given.values()))}
        unknown = sorted(set(given) - set(stacks))
        if unknown or set(stacks) - set(given):
            problems.append(f"modules: found {sorted(given)}, expected one for each of {sorted(stacks)}")
            return {}
    elif config.slices:
        if len(stacks) != 1:
            problems.append(f"slices: the model has the stacks {sorted(stacks)}; use 'modules', one for each")
            return {}
        given = {next(iter(stacks)): Module(slices=config.slices)}
    else:
        given = {stack: Module(models=config.models) for stack in stacks or {"": 0}}
    modules = {stack: _as_slices(config, depths, stack, module) for stack, module in given.items()}
    for stack, module in modules.items():
        problems.extend(_slice_problems(depths, stack, module))
    return modules


def _as_slices(config: DataFreeConfig, depths: Depths, stack: str, module: Module) -> Module:
    if module.slices:
        return module
    sources = [(entry.model, entry.parameters) for entry in module.models]
    if config.base_model is not None and config.base_model not in [model for model, _ in sources]:
        sources.append((config.base_model, {}))
    piece = OutputSlice(
        sources=tuple(
            SliceSource(model=model, parameters=parameters, layer_range=(0, depths[model].get(stack, 0)))
            for model, parameters in sources
        )
    )
    return module.model_copy(update={"models": (), "slices": (piece,)})


def _slice_problems(depths: Depths, stack: str, module: Module) -> Iterator[str]:
    for number, piece in enumerate(module.slices):
        where = f"slices[{number}]"
        lengths = {source.model: len(source.layers) for source in piece.sources}
        if len(set(lengths.values())) > 1:
            yield f"{where}: models have unlike numbers of layers here: {lengths}"
        for source in piece.sources:
            num_layers = depths[source.model].get(stack, 0)
            start, stop = source.layer_range
            if not 0 <= start <= stop <= num_layers or (start == stop and num_layers):
                yield f"{where}: layer_range {[start, stop]} of {source.model}: expected some of [0, {num_layers}]"
