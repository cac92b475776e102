"""Stacks of layers, found in tensors' names; and everything that the configuration says as slices of them.

One task for every tensor of the output: what it is made of, by which parameters, and what is wrong with it.

From the configuration and the checkpoints' headers to a list of tasks: one for every tensor of the output.

Layers are found in the tensors' names: whatever stands before a number that counts from 0 is a stack (`model.layers`).
Tensors of no layer come from the first slice if they lie before the layers (embeddings), else from the last one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from largemerge.checkpoint.index import Checkpoint, natural_key
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


_OUTPUT_EMBEDDINGS = "lm_head.weight"
_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_ADVICE = "; if these are vocabularies of unlike sizes, tokenizer_source: union brings them together"


@dataclass(frozen=True)
class Task:
    """How one tensor of the output comes about.

    Attributes:
        name: On disk, of the output.
        shape: Dimensions.
        sources: Model and name on disk of every tensor, the base's not among them.
        base: Of the base, where the method has one.
        each: Parameters of every source, by name.
        options: Parameters of all together.
        dtype: In which it is computed.
        out_dtype: In which it is written.
        copied: Why it is taken as it is from its only source; empty where it is merged.
        otherwise: Why a method of matrices merges it as it merges everything else; empty where its formula holds.
        inputs_first: It is `[inputs, outputs]`, and the formula sees its transpose.
        companions: Folder and name of what belongs to every source, where the method wants that.
        token_rows: Which rows of its inputs it is made of, where it has one for every token and they lie otherwise.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, str], ...]
    base: tuple[str, str] | None
    each: Mapping[str, Sequence[Any]]
    options: Mapping[str, Any]
    dtype: torch.dtype
    out_dtype: torch.dtype
    copied: str = ""
    otherwise: str = ""
    inputs_first: bool = False
    companions: tuple[tuple[str, str], ...] = ()
    token_rows: TokenRows | None = None

    @property
    def num_elements(self) -> int:
        """Of the tensor."""
        return torch.Size(self.shape).numel()

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """All that is read."""
        return (*self.sources, *([self.base] if self.base is not None else []))

    @property
    def is_matrix(self) -> bool:
        """Whether a formula of matrices holds for it, where the method has one."""
        return not self.copied and not self.otherwise


@dataclass
class Layout:
    """All tasks of a merge.

    Attributes:
        tasks: In the order of the output.
        layers: By stack: which layers of its first source the output's layers are.
        problems: What makes the merge impossible.
        notes: What a user should know.
    """

    tasks: list[Task] = field(default_factory=list)
    layers: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class TaskPlanner:
    """Makes tasks, and notes what is wrong with them."""

    def __init__(
        self,
        config: DataFreeConfig,
        checkpoints: Mapping[str, Checkpoint],
        companions: Mapping[str, Checkpoint],
        layout: Layout,
        vocabulary: Vocabulary | None,
    ) -> None:
        self.config, self.checkpoints, self.companions, self.layout = config, checkpoints, companions, layout
        self.vocabulary = vocabulary
        self.method = METHODS[config.merge_method]
        self._table_sizes = frozenset[int]().union(*map(vocabulary_sizes, checkpoints.values()))
        self._inputs_first = {model: stored_inputs_first(checkpoint) for model, checkpoint in checkpoints.items()}

    def add(self, name: str, keyed: Sequence[tuple[str, str]], piece: OutputSlice, module: Module, t: float) -> None:
        """Plans one tensor of the output."""
        base_model = piece.base_model or self.config.base_model
        found = self._find(name, keyed)
        if found is None:
            return
        takes_base = self.method.base in (Base.REQUIRED, Base.OPTIONAL)
        sources = [(model, key) for model, key in found if not (takes_base and model == base_model)]
        base = next(((model, key) for model, key in found if takes_base and model == base_model), None)
        infos = {model: self.checkpoints[model].tensors[key] for model, key in found}
        anchor = infos[base[0]] if base is not None else infos[found[0][0]]
        dtype = self._dtype(anchor, infos)
        if not anchor.dtype.is_floating_point:
            source = base or found[0]
            copied = "not floating point"
            self.layout.tasks.append(Task(name, anchor.shape, (source,), None, {}, {}, dtype, dtype, copied))
            return
        self._check(name, infos, anchor, sources)
        levels = Levels(
            {source.model: source.parameters for source in piece.sources},
            (piece.parameters, module.parameters, self.config.parameters),
        )
        each = self._each(levels, sources, t)
        options = self._options(levels, name, t)
        out = torch_dtype(self.config.out_dtype) if self.config.out_dtype is not None else dtype
        otherwise, inputs_first = "", False
        if self.method.matrices is not None:
            otherwise = why_not_a_matrix(name, anchor.shape, self._table_sizes) or too_small(anchor.shape, len(sources))
            model, key = found[0]
            inputs_first = not otherwise and key in self._inputs_first[model]
        task = Task(name, anchor.shape, tuple(sources), base, each, options, dtype, out, "", otherwise, inputs_first)
        task = replace(task, companions=self._companions(task))
        self.layout.tasks.append(self._by_token(task, infos, base_model))

    def _by_token(self, task: Task, infos: Mapping[str, TensorInfo], base_model: str | None) -> Task:
        """The task, with the rows of the output's vocabulary where it has one for every token."""
        if self.vocabulary is None or task.name not in self.vocabulary.tensors:
            return task
        num_rows = {model: infos[model].shape[0] for model, _ in task.inputs}
        if any(infos[model].quantization is not None for model in num_rows):
            self._problem(f"{task.name}: quantised embeddings cannot be arranged by token; leave 'tokenizer' out")
        rows, problems = self.vocabulary.rows_for([model for model, _ in task.inputs], num_rows, base_model)
        for problem in problems:
            self._problem(problem)
        plain = rows.is_plain([num_rows[model] for model, _ in task.inputs])
        if task.companions and not plain:
            which = self.method.companion
            self._problem(f"{task.name}: {which} has no rows for tokens in another order; leave 'tokenizer' out")
        shape = (rows.num_rows, *task.shape[1:])
        return replace(task, shape=shape, token_rows=None if plain else rows)

    def _each(self, levels: Levels, sources: Sequence[tuple[str, str]], t: float) -> dict[str, list[Any]]:
        """Parameters of every source."""
        each: dict[str, list[Any]] = {parameter: [] for parameter in self.method.each}
        for model, key in sources:
            for parameter, default in self.method.each.items():
                value = levels.value(parameter, key, t, model)
                if value is None and default is REQUIRED:
                    files = parameter == self.method.companion
                    where = "; expected a .safetensors file, or a folder with some" if files else f" (tensor {key})"
                    self._problem(f"{parameter}: missing for {model}{where}")
                value = default if value is None else value
                self._check_range(parameter, value)
                each[parameter].append(value)
        return each

    def _options(self, levels: Levels, name: str, t: float) -> dict[str, Any]:
        """Parameters of all together."""
        options = {}
        for parameter, default in self.method.options.items():
            value = levels.value(parameter, name, t)
            if value is None and default is REQUIRED:
                self._problem(f"{parameter}: missing for tensor {name}")
            options[parameter] = default if value is None else value
            self._check_range(parameter, options[parameter])
        return options

    def _check_range(self, parameter: str, value: Any) -> None:
        values = self.method.ranges.get(parameter)
        problem = values.problem(value) if values is not None else None
        if problem is not None:
            self._problem(f"{parameter}: {problem}")

    def _companions(self, task: Task) -> tuple[tuple[str, str], ...]:
        """Of every source the tensor of the same name, where the method wants one."""
        found = []
        wanted = task.each[self.method.companion] if self.method.companion is not None else []
        for path, (model, key) in zip(wanted, task.sources, strict=True) if wanted else ():
            if path not in self.companions:
                continue  # told already: missing, or no such path
            info = self.companions[path].tensors.get(key)
            if info is None:
                self._problem(f"{path} has no tensor {key}; expected one for every tensor of {model}")
            elif info.shape != task.shape:
                shape, expected = list(info.shape), list(task.shape)
                self._problem(f"{path}: {key} is {shape}; expected {expected}, as in {model}")
            elif not info.dtype.is_floating_point:
                self._problem(f"{path}: {key} is {dtype_name(info.dtype)}; expected a floating-point dtype")
            found.append((path, key))
        return tuple(found)

    def _find(self, name: str, keyed: Sequence[tuple[str, str]]) -> list[tuple[str, str]] | None:
        """The names on disk; of tied output embeddings, those of the input."""
        found = []
        for model, key in keyed:
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
        if not anchor.dtype.is_floating_point:
            return anchor.dtype
        if self.config.dtype is not None:
            return torch_dtype(self.config.dtype)
        dtype = anchor.dtype
        for info in infos.values():
            dtype = torch.promote_types(dtype, info.dtype)
        if any(info.dtype != dtype for info in infos.values()):
            note = f"models are stored in unlike dtypes; computed in {dtype_name(dtype)}, which holds them all"
            if note not in self.layout.notes:
                self.layout.notes.append(note)
        return dtype

    def _check(
        self,
        name: str,
        infos: Mapping[str, TensorInfo],
        anchor: TensorInfo,
        sources: Sequence[tuple[str, str]],
    ) -> None:
        shapes = {model: list(info.shape) for model, info in infos.items()}
        first = 1 if self.vocabulary is not None and name in self.vocabulary.tensors else 0
        if any(shape[first:] != list(anchor.shape[first:]) for shape in shapes.values()):
            alike_beyond = all(shape[1:] == list(anchor.shape[1:]) for shape in shapes.values())
            advice = _ADVICE if not first and alike_beyond and LAYER.match(name) is None else ""
            self._problem(f"{name}: shapes differ: {shapes}; expected one{advice}")
        fewest, most = self.method.num_models
        if not fewest <= len(sources) <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            beside = " beside the base" if self.method.base is Base.REQUIRED else ""
            self._problem(f"{self.config.merge_method} merges {wanted} models{beside}, found {len(sources)}")

    def _problem(self, text: str) -> None:
        if text not in self.layout.problems:
            self.layout.problems.append(text)


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
