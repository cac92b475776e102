"""One task for every tensor of the output: what it is made of, by which parameters, and what is wrong with it.

    configuration, headers of all models → plan_tasks → OutputTasks: tasks, problems, notes

Layers are found in the tensors' names: whatever stands before a number that counts from 0 is a stack of layers
(`model.layers`). Everything that the configuration says becomes slices of these stacks. Tensors of no layer come from
the first slice if they lie before the layers (embeddings), else from the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from largemerge.checkpoint.index import Checkpoint, natural_key
from largemerge.checkpoint.sentence_modules import split_name
from largemerge.checkpoint.tensor_info import TensorInfo, dtype_name, torch_dtype
from largemerge.data_free.config import DataFreeConfig, Levels, Module, OutputSlice, SliceSource
from largemerge.data_free.matrices import (
    LAYER,
    grouped,
    stored_inputs_first,
    too_small,
    vocabulary_sizes,
    why_not_a_matrix,
)
from largemerge.data_free.methods.base import REQUIRED, Base
from largemerge.data_free.methods.table import METHODS
from largemerge.tokenizer.embedding_rows import TokenRows
from largemerge.tokenizer.vocabulary import Vocabulary

_BEFORE_LAYERS = ("embed", "wte", "wpe", "patch", "position", "token_type", "cls_token", "class_embedding")
_OUTPUT_EMBEDDINGS = "lm_head.weight"
_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_ADVICE = "; if these are vocabularies of unlike sizes, tokenizer_source: union brings them together"

Source = tuple[str, str]
"""A model, or a path of auxiliary tensors, and the name on disk of a tensor in it."""
Depths = Mapping[str, Mapping[str, int]]
"""The number of layers, by model and stack."""


@dataclass(frozen=True)
class Task:
    """How one tensor of the output comes about.

    Attributes:
        name: Name of the output's tensor on disk.
        shape: Shape of the output's tensor.
        sources: The tensors that are merged, the base's not among them.
        base: The base's tensor, where the method has one.
        per_model: Parameters of every source, by name.
        shared: Parameters of all sources together, by name.
        dtype: The dtype of the computation.
        out_dtype: The dtype of the output's tensor.
        copied: Why the tensor is taken as it is from its only source; empty where it is merged.
        fallback_reason: Why a method of weight matrices merges the tensor by its fallback; empty where the formula
            holds, and for all other methods.
        inputs_first: Whether the tensor is stored `[inputs, outputs]`, so that the formula sees its transpose.
        auxiliary: A tensor for every source, where the method needs one.
        token_rows: The rows of the inputs that make those of the output, where these are arranged by token.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    base: Source | None
    per_model: Mapping[str, Sequence[Any]]
    shared: Mapping[str, Any]
    dtype: torch.dtype
    out_dtype: torch.dtype
    copied: str = ""
    fallback_reason: str = ""
    inputs_first: bool = False
    auxiliary: tuple[Source, ...] = ()
    token_rows: TokenRows | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements of the output's tensor."""
        return torch.Size(self.shape).numel()

    @property
    def inputs(self) -> tuple[Source, ...]:
        """The tensors of all models, the base's last."""
        return (*self.sources, *([self.base] if self.base is not None else []))

    @property
    def is_matrix(self) -> bool:
        """Whether a formula of weight matrices holds for the tensor, where the method has one."""
        return not self.copied and not self.fallback_reason


@dataclass
class OutputTasks:
    """All tasks of a merge.

    Attributes:
        tasks: The tasks, in the order of the output.
        layers: The layers of its first source that a stack's layers come from, by stack.
        problems: What makes the merge impossible.
        notes: What a user should know.
    """

    tasks: list[Task] = field(default_factory=list)
    layers: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_tasks(
    config: DataFreeConfig,
    checkpoints: Mapping[str, Checkpoint],
    reference: str,
    auxiliary: Mapping[str, Checkpoint] = MappingProxyType({}),
    vocabulary: Vocabulary | None = None,
) -> OutputTasks:
    """Plans one task for every tensor of the output.

    Args:
        config: The configuration, from `load_data_free`.
        checkpoints: All models, as the configuration names them.
        reference: The model whose names the output has.
        auxiliary: Tensors that the method needs beside the models', by the path that the configuration has.
        vocabulary: The output's vocabulary, where embeddings are arranged by token.
    """
    output = OutputTasks()
    depths = {model: _find_stacks(checkpoint) for model, checkpoint in checkpoints.items()}
    stacks = depths[reference]
    modules = _modules_by_stack(config, depths, stacks, output.problems)
    if output.problems:
        return output
    planner = _TaskPlanner(config, checkpoints, auxiliary, output, vocabulary)
    outside = [name for name in checkpoints[reference].tensors if _stack_of(name, stacks) is None]
    first, last = next(iter(modules.values())), list(modules.values())[-1]
    for name in outside:
        module, output_slice = (first, first.slices[0]) if _lies_before(name) else (last, last.slices[-1])
        planner.add(name, [(source.model, name) for source in output_slice.sources], output_slice, module, 0.0)
    for stack, module in modules.items():
        number = 0
        for output_slice in module.slices:
            for offset in range(len(output_slice.sources[0].layers)):
                _add_layer(planner, stack, number, output_slice, module, offset)
                number += 1
    output.tasks.sort(key=lambda task: natural_key(task.name))
    output.notes.extend(_notes(config.merge_method, output.tasks))
    return output


def _lies_before(name: str) -> bool:
    return any(part in name.lower() for part in _BEFORE_LAYERS)


def _add_layer(
    planner: _TaskPlanner, stack: str, number: int, output_slice: OutputSlice, module: Module, offset: int
) -> None:
    """Plans the tensors of one layer of the output.

    Args:
        planner: Collects the tasks.
        stack: Name of the stack.
        number: Number of the layer in the output's stack.
        output_slice: The slice that the layer belongs to.
        module: What the configuration says of the stack.
        offset: Number of the layer in the slice.
    """
    count = len(output_slice.sources[0].layers)
    t = offset / (count - 1) if count > 1 else 1.0
    first = output_slice.sources[0]
    prefix = f"{stack}.{first.layers[offset]}."
    planner.output.layers.setdefault(stack, []).append(first.layers[offset])
    for name in planner.checkpoints[first.model].tensors:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            sources = [(source.model, f"{stack}.{source.layers[offset]}.{rest}") for source in output_slice.sources]
            planner.add(f"{stack}.{number}.{rest}", sources, output_slice, module, t)


def _notes(method: str, tasks: Sequence[Task]) -> Iterator[str]:
    """Yields the names of what a method of weight matrices merges by its fallback, and of what it transposes."""
    formula = METHODS[method].matrix_formula
    reasons: dict[str, list[str]] = {}
    for task in tasks:
        if task.fallback_reason:
            reasons.setdefault(task.fallback_reason, []).append(task.name)
    for reason, names in reasons.items():
        assert formula is not None, "no other method has such tensors"
        yield f"{method}: {formula.fallback_name}, not its formula, for {', '.join(grouped(names))} ({reason})"
    turned = [task.name for task in tasks if task.inputs_first]
    if turned:
        yield f"{method}: taken as [inputs, outputs], as their biases tell: {', '.join(grouped(turned))}"


class _TaskPlanner:
    """Makes tasks, and notes what is wrong with them.

    Args:
        config: The configuration.
        checkpoints: All models.
        auxiliary: Tensors that the method needs beside the models', by path.
        output: The tasks, problems and notes, which are added to.
        vocabulary: The output's vocabulary, where embeddings are arranged by token.
    """

    def __init__(
        self,
        config: DataFreeConfig,
        checkpoints: Mapping[str, Checkpoint],
        auxiliary: Mapping[str, Checkpoint],
        output: OutputTasks,
        vocabulary: Vocabulary | None,
    ) -> None:
        self.config, self.checkpoints, self.auxiliary, self.output = config, checkpoints, auxiliary, output
        self.vocabulary = vocabulary
        self.method = METHODS[config.merge_method]
        self._table_sizes = frozenset[int]().union(*map(vocabulary_sizes, checkpoints.values()))
        self._inputs_first = {model: stored_inputs_first(checkpoint) for model, checkpoint in checkpoints.items()}

    def add(self, name: str, sources: Sequence[Source], output_slice: OutputSlice, module: Module, t: float) -> None:
        """Plans one tensor of the output.

        Args:
            name: Name of the output's tensor.
            sources: The tensors of all models that it should be made of, a base's among them.
            output_slice: The slice that it belongs to.
            module: What the configuration says of the slice's stack.
            t: Position of the tensor's layer in the slice, from 0 to 1.
        """
        base_model = output_slice.base_model or self.config.base_model
        found = self._find(name, sources)
        if found is None:
            return
        takes_base = self.method.base in (Base.REQUIRED, Base.OPTIONAL)
        merged = [(model, key) for model, key in found if not (takes_base and model == base_model)]
        base = next(((model, key) for model, key in found if takes_base and model == base_model), None)
        infos = {model: self.checkpoints[model].tensors[key] for model, key in found}
        anchor = infos[base[0]] if base is not None else infos[found[0][0]]
        dtype = self._dtype(anchor, infos)
        if not anchor.dtype.is_floating_point:
            source = base or found[0]
            copied = "not floating point"
            self.output.tasks.append(Task(name, anchor.shape, (source,), None, {}, {}, dtype, dtype, copied))
            return
        self._check(name, infos, anchor, len(merged))
        levels = Levels(
            {source.model: source.parameters for source in output_slice.sources},
            (output_slice.parameters, module.parameters, self.config.parameters),
        )
        per_model = self._per_model(levels, merged, t)
        shared = self._shared(levels, name, t)
        out = torch_dtype(self.config.out_dtype) if self.config.out_dtype is not None else dtype
        if self.config.merge_method != "passthrough":
            dtype = torch.float32 if dtype is torch.float64 else dtype  # as the checkpoint's notes say
        reason, inputs_first = "", False
        if self.method.matrix_formula is not None:
            reason = why_not_a_matrix(name, anchor.shape, self._table_sizes) or too_small(anchor.shape, len(merged))
            model, key = found[0]
            inputs_first = not reason and key in self._inputs_first[model]
        task = Task(name, anchor.shape, tuple(merged), base, per_model, shared, dtype, out, "", reason, inputs_first)
        task = replace(task, auxiliary=self._auxiliary(task))
        self.output.tasks.append(self._by_token(task, infos, base_model))

    def _by_token(self, task: Task, infos: Mapping[str, TensorInfo], base_model: str | None) -> Task:
        """Returns the task with the rows of the output's vocabulary, where its tensor has one for every token."""
        if self.vocabulary is None or task.name not in self.vocabulary.tensors:
            return task
        num_rows = {model: infos[model].shape[0] for model, _ in task.inputs}
        quantized = [found for model in num_rows if (found := infos[model].quantization) is not None]
        if not all(quantization.keeps_rows for quantization in quantized):
            self._problem(f"{task.name}: quantised embeddings cannot be arranged by token; leave 'tokenizer' out")
        rows, problems = self.vocabulary.rows_for([model for model, _ in task.inputs], num_rows, base_model)
        for problem in problems:
            self._problem(problem)
        identity = rows.is_identity([num_rows[model] for model, _ in task.inputs])
        if task.auxiliary and not identity:
            which = self.method.auxiliary_parameter
            self._problem(f"{task.name}: {which} has no rows for tokens in another order; leave 'tokenizer' out")
        shape = (rows.num_rows, *task.shape[1:])
        return replace(task, shape=shape, token_rows=None if identity else rows)

    def _per_model(self, levels: Levels, sources: Sequence[Source], t: float) -> dict[str, list[Any]]:
        """Evaluates the parameters of every source."""
        per_model: dict[str, list[Any]] = {parameter: [] for parameter in self.method.per_model}
        for model, key in sources:
            for parameter, default in self.method.per_model.items():
                value = levels.value(parameter, key, t, model)
                if value is None and default is REQUIRED:
                    files = parameter == self.method.auxiliary_parameter
                    where = "; expected a .safetensors file, or a folder with some" if files else f" (tensor {key})"
                    self._problem(f"{parameter}: missing for {model}{where}")
                value = default if value is None else value
                self._check_range(parameter, value)
                per_model[parameter].append(value)
        return per_model

    def _shared(self, levels: Levels, name: str, t: float) -> dict[str, Any]:
        """Evaluates the parameters of all sources together."""
        shared = {}
        for parameter, default in self.method.shared.items():
            value = levels.value(parameter, name, t)
            if value is None and default is REQUIRED:
                self._problem(f"{parameter}: missing for tensor {name}")
            shared[parameter] = default if value is None else value
            self._check_range(parameter, shared[parameter])
        return shared

    def _check_range(self, parameter: str, value: Any) -> None:
        values = self.method.ranges.get(parameter)
        problem = values.problem(value) if values is not None else None
        if problem is not None:
            self._problem(f"{parameter}: {problem}")

    def _auxiliary(self, task: Task) -> tuple[Source, ...]:
        """Finds the auxiliary tensor of every source, which has the source's name, where the method needs one."""
        found = []
        wanted = task.per_model[self.method.auxiliary_parameter] if self.method.auxiliary_parameter is not None else []
        for path, (model, key) in zip(wanted, task.sources, strict=True) if wanted else ():
            if path not in self.auxiliary:
                continue  # told already: missing, or no such path
            info = self.auxiliary[path].tensors.get(key)
            if info is None:
                self._problem(f"{path} has no tensor {key}; expected one for every tensor of {model}")
            elif info.shape != task.shape:
                shape, expected = list(info.shape), list(task.shape)
                self._problem(f"{path}: {key} is {shape}; expected {expected}, as in {model}")
            elif not info.dtype.is_floating_point:
                self._problem(f"{path}: {key} is {dtype_name(info.dtype)}; expected a floating-point dtype")
            found.append((path, key))
        return tuple(found)

    def _find(self, name: str, sources: Sequence[Source]) -> list[Source] | None:
        """Finds the names on disk: for an output embedding that is tied and not stored, the input embedding's."""
        found = []
        for model, key in sources:
            tensors = self.checkpoints[model].tensors
            if key not in tensors and key.endswith(_OUTPUT_EMBEDDINGS):
                tied = [other for other in tensors if other.endswith(_INPUT_EMBEDDINGS)]
                key = tied[0] if len(tied) == 1 else key
            if key not in tensors:
                self._problem(f"{model} has no tensor {key}, which {name} is to be made of")
                return None
            found.append((model, key))
        return found

    def _dtype(self, anchor: TensorInfo, infos: Mapping[str, TensorInfo]) -> torch.dtype:
        """Chooses the dtype of the computation: the configured one, else one that holds all of the models'."""
        if not anchor.dtype.is_floating_point:
            return anchor.dtype
        if self.config.dtype is not None:
            return torch_dtype(self.config.dtype)
        dtype = anchor.dtype
        for info in infos.values():
            dtype = torch.promote_types(dtype, info.dtype)
        if any(info.dtype != dtype for info in infos.values()):
            note = f"models are stored in unlike dtypes; computed in {dtype_name(dtype)}, which holds them all"
            if note not in self.output.notes:
                self.output.notes.append(note)
        return dtype

    def _check(self, name: str, infos: Mapping[str, TensorInfo], anchor: TensorInfo, num_models: int) -> None:
        """Checks the shapes of all models' tensors, and the number of models, the base not counted."""
        shapes = {model: list(info.shape) for model, info in infos.items()}
        first = 1 if self.vocabulary is not None and name in self.vocabulary.tensors else 0
        if any(shape[first:] != list(anchor.shape[first:]) for shape in shapes.values()):
            alike_beyond = all(shape[1:] == list(anchor.shape[1:]) for shape in shapes.values())
            advice = _ADVICE if not first and alike_beyond and LAYER.match(name) is None else ""
            self._problem(f"{name}: shapes differ: {shapes}; expected one{advice}")
        fewest, most = self.method.num_models
        if not fewest <= num_models <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            beside = " beside the base" if self.method.base is Base.REQUIRED else ""
            self._problem(f"{self.config.merge_method} merges {wanted} models{beside}, found {num_models}")

    def _problem(self, text: str) -> None:
        if text not in self.output.problems:
            self.output.problems.append(text)


# Stacks of layers, and slices of them


def _find_stacks(checkpoint: Checkpoint) -> dict[str, int]:
    """Finds the stacks of layers, and how many each has, in the tensors' names."""
    numbers: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        match = LAYER.match(name)
        if match and not split_name(name)[0]:
            numbers.setdefault(match["stack"], set()).add(int(match["number"]))
    return {stack: len(found) for stack, found in numbers.items() if found == set(range(len(found)))}


def _stack_of(name: str, stacks: Mapping[str, int]) -> str | None:
    """Returns the stack that a tensor belongs to."""
    match = LAYER.match(name)
    return match["stack"] if match and match["stack"] in stacks else None


def _modules_by_stack(
    config: DataFreeConfig, depths: Depths, stacks: Mapping[str, int], problems: list[str]
) -> dict[str, Module]:
    """Expresses the whole configuration as slices of every stack; what is wrong with it is added to `problems`."""
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
    """Turns whole models into one slice of all their layers, the base's among them."""
    if module.slices:
        return module
    sources = [(entry.model, entry.parameters) for entry in module.models]
    if config.base_model is not None and config.base_model not in [model for model, _ in sources]:
        sources.append((config.base_model, {}))
    output_slice = OutputSlice(
        sources=tuple(
            SliceSource(model=model, parameters=parameters, layer_range=(0, depths[model].get(stack, 0)))
            for model, parameters in sources
        )
    )
    return module.model_copy(update={"models": (), "slices": (output_slice,)})


def _slice_problems(depths: Depths, stack: str, module: Module) -> Iterator[str]:
    for number, output_slice in enumerate(module.slices):
        where = f"slices[{number}]"
        lengths = {source.model: len(source.layers) for source in output_slice.sources}
        if len(set(lengths.values())) > 1:
            yield f"{where}: models have unlike numbers of layers here: {lengths}"
        for source in output_slice.sources:
            num_layers = depths[source.model].get(stack, 0)
            start, stop = source.layer_range
            if not 0 <= start <= stop <= num_layers or (start == stop and num_layers):
                yield f"{where}: layer_range {[start, stop]} of {source.model}: expected some of [0, {num_layers}]"
