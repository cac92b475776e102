"""From the configuration and the checkpoints' headers to a list of tasks: one for every tensor of the output.

Layers are found in the tensors' names: whatever stands before a number that counts from 0 is a stack (`model.layers`).
Tensors of no layer come from the first slice if they lie before the layers (embeddings), else from the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from largemerge.arithmetic.config import DataFreeConfig, Module, OutputSlice, SliceSource
from largemerge.arithmetic.matrices import LAYER, grouped
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.tasks import Layout, Task, TaskPlanner
from largemerge.checkpoint.index import Checkpoint, natural_key

_BEFORE = ("embed", "wte", "wpe", "patch", "position", "token_type", "cls_token", "class_embedding")

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


def lay_out(
    config: DataFreeConfig,
    checkpoints: Mapping[str, Checkpoint],
    reference: str,
    companions: Mapping[str, Checkpoint] = MappingProxyType({}),
) -> Layout:
    """Finds all tasks.

    Args:
        config: From `load_data_free`.
        checkpoints: By model, as the configuration names them.
        reference: The model whose names the output has.
        companions: Tensors that the method wants beside the models', by the path that the configuration has.
    """
    layout = Layout()
    depths = {model: find_stacks(checkpoint) for model, checkpoint in checkpoints.items()}
    stacks = depths[reference]
    modules = _modules(config, depths, stacks, layout)
    if layout.problems:
        return layout
    planner = TaskPlanner(config, checkpoints, companions, layout)
    outside = [name for name in checkpoints[reference].tensors if _stack_of(name, stacks) is None]
    first, last = next(iter(modules.values())), list(modules.values())[-1]
    for name in outside:
        module, piece = (first, first.slices[0]) if _lies_before(name) else (last, last.slices[-1])
        planner.add(name, [(source.model, name) for source in piece.sources], piece, module, 0.0)
    for stack, module in modules.items():
        number = 0
        for piece in module.slices:
            for offset in range(len(piece.sources[0].layers)):
                _add_layer(planner, stack, number, piece, module, offset)
                number += 1
    layout.tasks.sort(key=lambda task: natural_key(task.name))
    layout.notes.extend(_notes(config.merge_method, layout.tasks))
    return layout


def _notes(method: str, tasks: Sequence[Task]) -> Iterator[str]:
    """What a method of matrices merges in another way, and what it transposes, by name."""
    matrices = METHODS[method].matrices
    reasons: dict[str, list[str]] = {}
    for task in tasks:
        if task.otherwise:
            reasons.setdefault(task.otherwise, []).append(task.name)
    for reason, names in reasons.items():
        assert matrices is not None, "no other method has such tensors"
        yield f"{method}: {matrices.others_are}, not its formula, for {', '.join(grouped(names))} ({reason})"
    turned = [task.name for task in tasks if task.inputs_first]
    if turned:
        yield f"{method}: taken as [inputs, outputs], as their biases tell: {', '.join(grouped(turned))}"


def _add_layer(planner: TaskPlanner, stack: str, number: int, piece: OutputSlice, module: Module, offset: int) -> None:
    count = len(piece.sources[0].layers)
    t = offset / (count - 1) if count > 1 else 1.0
    first = piece.sources[0]
    prefix = f"{stack}.{first.layers[offset]}."
    planner.layout.layers.setdefault(stack, []).append(first.layers[offset])
    for name in planner.checkpoints[first.model].tensors:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            keyed = [(source.model, f"{stack}.{source.layers[offset]}.{rest}") for source in piece.sources]
            planner.add(f"{stack}.{number}.{rest}", keyed, piece, module, t)


def _modules(config: DataFreeConfig, depths: Depths, stacks: Mapping[str, int], layout: Layout) -> dict[str, Module]:
    """By stack, everything as slices."""
    if config.modules:
        given = dict(config.modules)
        if len(given) == 1 and len(stacks) == 1:
            given = {next(iter(stacks)): next(iter(given.values()))}
        unknown = sorted(set(given) - set(stacks))
        if unknown or set(stacks) - set(given):
            layout.problems.append(f"modules: found {sorted(given)}, expected one for each of {sorted(stacks)}")
            return {}
    elif config.slices:
        if len(stacks) != 1:
            layout.problems.append(f"slices: the model has the stacks {sorted(stacks)}; use 'modules', one for each")
            return {}
        given = {next(iter(stacks)): Module(slices=config.slices)}
    else:
        given = {stack: Module(models=config.models) for stack in stacks or {"": 0}}
    modules = {stack: _as_slices(config, depths, stack, module) for stack, module in given.items()}
    for stack, module in modules.items():
        layout.problems.extend(_slice_problems(depths, stack, module))
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


def _stack_of(name: str, stacks: Mapping[str, int]) -> str | None:
    match = LAYER.match(name)
    return match["stack"] if match and match["stack"] in stacks else None


def _lies_before(name: str) -> bool:
    return any(part in name.lower() for part in _BEFORE)
