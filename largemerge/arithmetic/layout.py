"""From the configuration and the checkpoints' headers to a list of tasks: one for every tensor of the output.

Layers are found in the tensors' names: whatever stands before a number that counts from 0 is a stack (`model.layers`).
Tensors of no layer come from the first slice if they lie before the layers (embeddings), else from the last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from largemerge.arithmetic.config import DataFreeConfig, Module, OutputSlice
from largemerge.arithmetic.registry import METHODS, REQUIRED, Base
from largemerge.arithmetic.settings import Levels
from largemerge.arithmetic.stacks import find_stacks, layer_of, modules_by_stack, stack_of
from largemerge.checkpoint.index import Checkpoint, natural_key
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.dtypes import dtype_name, torch_dtype
from largemerge.vocabulary.build import Vocabulary
from largemerge.vocabulary.rules import TokenRows

_BEFORE = ("embed", "wte", "wpe", "patch", "position", "token_type", "cls_token", "class_embedding")
_OUTPUT_EMBEDDINGS, _INPUT_EMBEDDINGS = (
    "lm_head.weight",
    ("embed_tokens.weight", "wte.weight", "word_embeddings.weight"),
)

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
    token_rows: TokenRows | None = None

    @property
    def num_elements(self) -> int:
        """Of the tensor."""
        return torch.Size(self.shape).numel()

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """All that is read."""
        return (*self.sources, *([self.base] if self.base is not None else []))


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


def lay_out(
    config: DataFreeConfig,
    checkpoints: Mapping[str, Checkpoint],
    reference: str,
    vocabulary: Vocabulary | None = None,
) -> Layout:
    """Finds all tasks.

    Args:
        config: From `load_data_free`.
        checkpoints: By model, as the configuration names them.
        reference: The model whose names the output has.
        vocabulary: Of the output, where embeddings are arranged by token.
    """
    layout = Layout()
    depths = {model: find_stacks(checkpoint) for model, checkpoint in checkpoints.items()}
    stacks = depths[reference]
    modules = modules_by_stack(config, depths, stacks, layout.problems)
    if layout.problems:
        return layout
    planner = _Planner(config, checkpoints, layout, vocabulary)
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
    return layout


def _add_layer(planner: _Planner, stack: str, number: int, piece: OutputSlice, module: Module, offset: int) -> None:
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


class _Planner:
    """Makes tasks, and notes what is wrong with them."""

    def __init__(
        self,
        config: DataFreeConfig,
        checkpoints: Mapping[str, Checkpoint],
        layout: Layout,
        vocabulary: Vocabulary | None,
    ) -> None:
        self.config, self.checkpoints, self.layout, self.vocabulary = config, checkpoints, layout, vocabulary
        self.method = METHODS[config.merge_method]

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
        each: dict[str, list[Any]] = {parameter: [] for parameter in self.method.each}
        for model, key in sources:
            for parameter, default in self.method.each.items():
                value = levels.value(parameter, key, t, model)
                if value is None and default is REQUIRED:
                    self._problem(f"{parameter}: missing for {model} (tensor {key})")
                each[parameter].append(default if value is None else value)
        options = {}
        for parameter, default in self.method.options.items():
            value = levels.value(parameter, name, t)
            if value is None and default is REQUIRED:
                self._problem(f"{parameter}: missing for tensor {name}")
            options[parameter] = default if value is None else value
        out = torch_dtype(self.config.out_dtype) if self.config.out_dtype is not None else dtype
        task = Task(name, anchor.shape, tuple(sources), base, each, options, dtype, out)
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
        shape = (rows.num_rows, *task.shape[1:])
        return replace(task, shape=shape, token_rows=None if plain else rows)

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
            advice = _ADVICE if not first and alike_beyond and layer_of(name) is None else ""
            self._problem(f"{name}: shapes differ: {shapes}; expected one{advice}")
        fewest, most = self.method.num_models
        if not fewest <= len(sources) <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            beside = " beside the base" if self.method.base is Base.REQUIRED else ""
            self._problem(f"{self.config.merge_method} merges {wanted} models{beside}, found {len(sources)}")

    def _problem(self, text: str) -> None:
        if text not in self.layout.problems:
            self.layout.problems.append(text)


def _lies_before(name: str) -> bool:
    return any(part in name.lower() for part in _BEFORE)
