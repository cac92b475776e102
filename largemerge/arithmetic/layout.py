"""From the configuration and the checkpoints' headers to a list of tasks: one for every tensor of the output.

Layers are found in the tensors' names: whatever stands before a number that counts from 0 is a stack (`model.layers`).
Tensors of no layer come from the first slice if they lie before the layers (embeddings), else from the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from largemerge.arithmetic.config import DataFreeConfig, Module, OutputSlice
from largemerge.arithmetic.matrices import grouped
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.stacks import find_stacks, modules_by_stack, stack_of
from largemerge.arithmetic.tasks import Layout, Task, TaskPlanner
from largemerge.checkpoint.index import Checkpoint, natural_key
from largemerge.vocabulary.build import Vocabulary

_BEFORE = ("embed", "wte", "wpe", "patch", "position", "token_type", "cls_token", "class_embedding")


def lay_out(
    config: DataFreeConfig,
    checkpoints: Mapping[str, Checkpoint],
    reference: str,
    companions: Mapping[str, Checkpoint] = MappingProxyType({}),
    vocabulary: Vocabulary | None = None,
) -> Layout:
    """Finds all tasks.

    Args:
        config: From `load_data_free`.
        checkpoints: By model, as the configuration names them.
        reference: The model whose names the output has.
        companions: Tensors that the method wants beside the models', by the path that the configuration has.
        vocabulary: Of the output, where embeddings are arranged by token.
    """
    layout = Layout()
    depths = {model: find_stacks(checkpoint) for model, checkpoint in checkpoints.items()}
    stacks = depths[reference]
    modules = modules_by_stack(config, depths, stacks, layout.problems)
    if layout.problems:
        return layout
    planner = TaskPlanner(config, checkpoints, companions, layout, vocabulary)
    outside = [name for name in checkpoints[reference].tensors if stack_of(name, stacks) is None]
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


def _lies_before(name: str) -> bool:
    return any(part in name.lower() for part in _BEFORE)
