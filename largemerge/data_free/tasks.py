"""One task for every tensor of the output: what it is made of, by which parameters, and what is wrong with it.

    configuration, headers of all models → plan_tasks → OutputTasks: tasks, problems, notes

Layers are found in the tensors' names: whatever stands before a number that counts from 0 is a stack of layers
(`model.layers`). Everything that the configuration says becomes slices of these stacks. Tensors of no layer come from
the first slice if they lie before the layers (embeddings), else from the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from largemerge.checkpoint.index import Checkpoint, natural_key
from largemerge.checkpoint.sentence_modules import split_name
from largemerge.checkpoint.tensor_info import TensorInfo, dtype_name, kinds_of_names, list_kinds, torch_dtype
from largemerge.config_file import WARNING
from largemerge.data_free.config import DataFreeConfig, Levels, Module, OutputSlice, SliceSource, evaluate
from largemerge.data_free.matrices import (
    LAYER,
    stored_inputs_first,
    too_small,
    vocabulary_sizes,
    why_not_a_matrix,
)
from largemerge.data_free.methods.base import REQUIRED, Base, Range
from largemerge.data_free.methods.post import EQUAL_VALUES, POST_STEPS, Step
from largemerge.data_free.methods.table import METHODS, no_sum_of_weights
from largemerge.data_free.modules import module_of_tensor, stacks_of_modules
from largemerge.heads import Heads
from largemerge.model.alignment import ModelView, tensors_in_order
from largemerge.tokenizer.embedding_rows import TokenRows, rows_by_number
from largemerge.tokenizer.vocabulary import Vocabulary

_BEFORE_LAYERS = ("embed", "wte", "wpe", "patch", "position", "token_type", "cls_token", "class_embedding")
NOT_TRAINED = "not trained: no model has it, and the class wants it"
"""Why a tensor is copied that has no source."""
_MEAN = "linear"  # merges what the base lacks
_ADVICE = "; if these are vocabularies of unlike sizes, tokenizer_source: union brings them together"

Source = tuple[str, str]
"""A model, or a path of auxiliary tensors, and the name on disk of a tensor in it."""
Depths = Mapping[str, Mapping[str, int]]
"""The number of layers, by model and stack."""


@dataclass(frozen=True)
class PostWork:
    """What the steps after a merge do to one weight matrix, and what they look at.

    Attributes:
        steps: The steps, with their parameters for this matrix.
        origin: The base's tensor, from which task vectors are measured.
        candidates: The tensors that the merge is held against.
        inputs_first: Whether the matrix is stored `[inputs, outputs]`, so that the steps see its transpose.
    """

    steps: tuple[Step, ...]
    origin: Source
    candidates: tuple[Source, ...]
    inputs_first: bool = False

    @property
    def read_candidates(self) -> tuple[Source, ...]:
        """The candidates' tensors, where any step needs them."""
        return self.candidates if any(step.reads_candidates for step in self.steps) else ()


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
        instead: Name of the method that merges the tensor in place of the configured one, where not all models have it.
        post: What the steps after the merge do to it; `None` where there are none, or where they leave it as it is.
        left_by_post: Why steps after the merge leave the tensor as it is; empty where they do not, or it is copied.
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
    instead: str = ""
    post: PostWork | None = None
    left_by_post: str = ""

    @property
    def has_factor(self) -> bool:
        """Whether a factor of the whole model applies to the tensor, by a method that has one."""
        return not self.copied and not self.instead

    @property
    def num_elements(self) -> int:
        """Number of elements of the output's tensor."""
        return torch.Size(self.shape).numel()

    @property
    def inputs(self) -> tuple[Source, ...]:
        """The tensors of all models, the base's last."""
        return (*self.sources, *([self.base] if self.base is not None else []))

    @property
    def reads(self) -> tuple[Source, ...]:
        """The tensors of all models that are read, each once: those that are merged, and those that steps look at."""
        beside = (*self.post.read_candidates, self.post.origin) if self.post is not None else ()
        return tuple(dict.fromkeys((*self.inputs, *beside)))

    @property
    def is_matrix(self) -> bool:
        """Whether a formula of weight matrices holds for the tensor, where the method has one."""
        return not self.copied and not self.fallback_reason


@dataclass(frozen=True)
class TokenTensors:
    """Tensors with a row for every token, where no settings arrange them.

    Attributes:
        names: Their names in the output; empty where that is not known.
        padded: Number of rows of the output, where models have one tokenizer and other numbers of rows: those beyond
            the tokens are padding. `None` where all have as many, or where rows cannot be matched.
    """

    names: frozenset[str] = frozenset()
    padded: int | None = None


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
    views: Mapping[str, ModelView],
    auxiliary: Mapping[str, Checkpoint] = MappingProxyType({}),
    vocabulary: Vocabulary | None = None,
    token_rows: TokenTensors | None = None,
    heads: Heads | None = None,
    new: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> OutputTasks:
    """Plans one task for every tensor of the output.

    Args:
        config: The configuration, from `load_data_free`.
        views: All models as the configuration names them, under the names of the output.
        auxiliary: Tensors that the method needs beside the models', by the path that the configuration has.
        vocabulary: The output's vocabulary, where embeddings are arranged by token.
        token_rows: What is known of tensors with a row for every token, where they are not.
        heads: Heads that are kept apart, if there are any.
        new: Shapes of tensors that the output's class wants and no model has, by name in the output.
    """
    output = OutputTasks()
    depths = {model: _find_stacks(view.tensors) for model, view in views.items()}
    stacks: dict[str, int] = {}
    for found in depths.values():
        stacks |= {stack: max(number, stacks.get(stack, 0)) for stack, number in found.items()}
    output.problems.extend(_gaps(views, depths, stacks))
    modules = _modules_by_stack(config, depths, stacks, output.problems)
    if output.problems:
        return output
    planner = _TaskPlanner(config, views, auxiliary, output, vocabulary, token_rows or TokenTensors(), heads)
    first, last = next(iter(modules.values())), list(modules.values())[-1]
    owners = _owners(config, modules, stacks)
    for name in tensors_in_order(views.values()):
        if _stack_of(name, stacks) is None:
            before, owner = _lies_before(name), owners(name)
            module = owner or (first if before else last)
            output_slice = module.slices[0 if before else -1]
            planner.add(name, [(source, name) for source in output_slice.sources], output_slice, module, 0.0)
    for stack, module in modules.items():
        number = 0
        for output_slice in module.slices:
            sources = [source for source in output_slice.sources if stack in depths[source.model]]
            absent = [source.model for source in output_slice.sources if stack not in depths[source.model]]
            for offset in range(len(sources[0].layers) if sources else 0):
                _add_layer(planner, stack, number, sources, absent, output_slice, module, offset)
                number += 1
    dtype = max((task.out_dtype for task in output.tasks), key=lambda each: each.itemsize, default=torch.float32)
    for name, shape in new.items():
        output.tasks.append(Task(name, shape, (), None, {}, {}, dtype, dtype, NOT_TRAINED))
    if new:
        output.notes.append(f"{list_kinds(new)}: {NOT_TRAINED}; initialised as Transformers would do it")
    output.tasks.sort(key=lambda task: natural_key(task.name))
    output.problems.extend([*planner.parameter_problems(), *planner.unlike_layers()])
    output.problems.extend(_out_of_place(config, output))
    output.problems.extend(_vanished(config, views, output))
    output.notes.extend([*planner.parameter_notes(), *planner.lacking_notes()])
    output.notes.extend(_notes(config.merge_method, output.tasks))
    output.notes.extend(_post_notes(config, output.tasks))
    return output


def _vanished(config: DataFreeConfig, views: Mapping[str, ModelView], output: OutputTasks) -> Iterator[str]:
    """Yields the models of which nothing would be in the output, where nothing else is known to be wrong."""
    if output.problems:
        return
    used = {model for task in output.tasks for model, _ in task.reads}
    held_against = {model for task in output.tasks if task.post is not None for model, _ in task.post.candidates}
    for model in config.candidates:
        if model not in held_against:
            yield f"candidates: {model}: has none of the weight matrices that the steps of post change; leave it out"
    if config.post and not output.problems and all(task.post is None for task in output.tasks):
        yield "post: there is no weight matrix that its steps could change; leave it out"
    looked_at = {config.base_model, *config.beside}
    for model, view in views.items():
        if model not in used and (model not in looked_at or len(views) == 1):
            names = list_kinds(view.checkpoint.tensors)
            yield f"{model}: nothing of it would be in the output: its tensors ({names}) have no place there"


def _out_of_place(config: DataFreeConfig, output: OutputTasks) -> Iterator[str]:
    """Yields what the first model lacks, where the method changes that one."""
    models = [entry.model for entry in config.models if entry.model != config.base_model]
    if not METHODS[config.merge_method].leads or not models:
        return
    lacking: dict[str, list[str]] = {}
    for task in output.tasks:
        owners = [model for model, _ in task.inputs]
        if owners and models[0] not in owners:
            lacking.setdefault(_listed(owners), []).append(task.name)
    for others, names in lacking.items():
        yield (
            f"models: {config.merge_method} changes the first model, {models[0]}, which lacks {list_kinds(names)} of "
            f"{others}; expected the model that is to learn first, and the one that it learns from behind it"
        )


def _lies_before(name: str) -> bool:
    return any(part in name.lower() for part in _BEFORE_LAYERS)


def _add_layer(
    planner: _TaskPlanner,
    stack: str,
    number: int,
    sources: Sequence[SliceSource],
    absent: Sequence[str],
    output_slice: OutputSlice,
    module: Module,
    offset: int,
) -> None:
    """Plans the tensors of one layer of the output.

    Args:
        planner: Collects the tasks.
        stack: Name of the stack.
        number: Number of the layer in the output's stack.
        sources: The sources of the slice that have the stack.
        absent: The models of those that do not.
        output_slice: The slice that the layer belongs to.
        module: What the configuration says of the stack.
        offset: Number of the layer in the slice.
    """
    count = len(sources[0].layers)
    t = offset / (count - 1) if count > 1 else 1.0
    planner.output.layers.setdefault(stack, []).append(sources[0].layers[offset])
    prefixes = [f"{stack}.{source.layers[offset]}." for source in sources]
    rests = dict.fromkeys(
        name.removeprefix(prefix)
        for source, prefix in zip(sources, prefixes, strict=True)
        for name in planner.names_in_layer(source.model, prefix)
    )
    for rest in rests:
        keyed = [(source, prefix + rest) for source, prefix in zip(sources, prefixes, strict=True)]
        planner.add(f"{stack}.{number}.{rest}", keyed, output_slice, module, t, in_layer=True, absent=absent)


def _notes(method: str, tasks: Sequence[Task]) -> Iterator[str]:
    """Yields the names of what a method of weight matrices merges by its fallback, and of what it transposes."""
    formula = METHODS[method].matrix_formula
    reasons: dict[str, list[str]] = {}
    for task in tasks:
        if task.fallback_reason:
            reasons.setdefault(task.fallback_reason, []).append(task.name)
    for reason, names in reasons.items():
        assert formula is not None, "no other method has such tensors"
        yield f"{method}: {formula.fallback_name}, not its formula, for {', '.join(kinds_of_names(names))} ({reason})"
    turned = [task.name for task in tasks if task.inputs_first]
    if turned:
        yield f"{method}: taken as [inputs, outputs], as their biases tell: {', '.join(kinds_of_names(turned))}"


def _post_notes(config: DataFreeConfig, tasks: Sequence[Task]) -> Iterator[str]:
    """Yields what the steps after the merge leave as it is or take otherwise, and steps that change nothing."""
    steps = list(dict.fromkeys(name for entry in config.post for name in entry))
    if config.base_model in config.beside:
        yield (
            f"{config.base_model} is not merged: {config.merge_method} has no base, and the steps of post measure task "
            "vectors from it; name it among the models to merge it, too"
        )
    reasons: dict[str, list[str]] = {}
    for task in tasks:
        if task.left_by_post:
            reasons.setdefault(task.left_by_post, []).append(task.name)
    for reason, names in reasons.items():
        yield f"post: {', '.join(steps)}: as merged stay {', '.join(kinds_of_names(names))} ({reason})"
    posted = [task for task in tasks if task.post is not None]
    turned = [each.name for each in posted if each.post is not None and each.post.inputs_first > each.inputs_first]
    if turned:
        yield f"post: taken as [inputs, outputs], as their biases tell: {', '.join(kinds_of_names(turned))}"
    idle: dict[str, list[str]] = {}
    for task in posted:
        for step in task.post.steps if task.post is not None else ():
            if (why := POST_STEPS[step.name].idle(step.parameters)) is not None:
                idle.setdefault(f"{step.name}: {why}", []).append(task.name)
    for why, names in idle.items():
        which = f" ({list_kinds(names)})" if len(names) < len(posted) else ""
        yield f"{WARNING}post: {why}: changes nothing{which}"
    order = [config.merge_method, *(name for entry in config.post for name in entry)]
    for number, name in enumerate(order):
        equal = [each for each in order[:number] if each in EQUAL_VALUES]
        if name == "svc" and equal:
            yield (
                f"post: svc after {equal[-1]}, which makes singular values equal: which directions it calibrates is "
                "left to the library that factors them"
            )
    lacking: dict[str, list[str]] = {}
    for task in posted:
        for model in config.candidates:
            if task.post is not None and model not in [each for each, _ in task.post.candidates]:
                lacking.setdefault(model, []).append(task.name)
    for model, names in lacking.items():
        yield f"post: {list_kinds(names)}: not held against {model}, which lacks them, or has them in another shape"


@dataclass(frozen=True)
class _Found:
    """One model's tensor, of which the output's is made.

    Attributes:
        model: The model.
        key: Name under which parameters are looked up: the output's, but with the number of the model's own layer.
        info: The tensor, as the model's reader has it.
        parameters: Parameters of the entry that names the model.
    """

    model: str
    key: str
    info: TensorInfo
    parameters: Mapping[str, Any]


def _sources(found: Sequence[_Found]) -> tuple[Source, ...]:
    return tuple((one.model, one.info.name) for one in found)


def _listed(models: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(models))


class _TaskPlanner:
    """Makes tasks, and notes what is wrong with them.

    Args:
        config: The configuration.
        views: All models, under the names of the output.
        auxiliary: Tensors that the method needs beside the models', by path.
        output: The tasks, problems and notes, which are added to.
        vocabulary: The output's vocabulary, where embeddings are arranged by token.
        token_rows: What is known of tensors with a row for every token, where they are not.
        heads: Heads that are kept apart, if there are any.
    """

    def __init__(
        self,
        config: DataFreeConfig,
        views: Mapping[str, ModelView],
        auxiliary: Mapping[str, Checkpoint],
        output: OutputTasks,
        vocabulary: Vocabulary | None,
        token_rows: TokenTensors,
        heads: Heads | None,
    ) -> None:
        self.config, self.views, self.auxiliary, self.output = config, views, auxiliary, output
        self.vocabulary, self.token_rows = vocabulary, token_rows
        chosen = heads.chosen if heads is not None else None
        self._head = frozenset(chosen.keys.values()) if chosen is not None else frozenset()
        self._head_of = heads.choice if heads is not None else ""
        self.method = METHODS[config.merge_method]
        checkpoints = {model: view.checkpoint for model, view in views.items()}
        self._missing: set[tuple[str, str]] = set()
        self._table_sizes = frozenset[int]().union(*map(vocabulary_sizes, checkpoints.values()))
        self._inputs_first = {model: stored_inputs_first(checkpoint) for model, checkpoint in checkpoints.items()}
        self._beside = config.beside
        self._kinds = {**METHODS[_MEAN].kinds, **self.method.kinds}  # a mean has weights where the method has none
        self._nothing_merged = not (config.models or config.slices or config.modules)  # a base with its adapter
        self._layers: dict[str, dict[str, list[str]]] = {}
        self._lacking: dict[str, list[str]] = {}
        self._unlike: dict[str, list[str]] = {}
        self._num_merged = 0  # tensors that the method merges
        self._conflicts: dict[str, list[str]] = {}  # of parameters, with the tensors that have them
        self._idle: dict[str, list[str]] = {}
        self._remarks: dict[str, list[str]] = {}

    def names_in_layer(self, model: str, prefix: str) -> Sequence[str]:
        """Lists the names of a model's tensors that start with the prefix of a layer, `model.layers.3.`."""
        if model not in self._layers:
            layers: dict[str, list[str]] = {}
            for name in self.views[model].tensors:
                match = LAYER.match(name)
                if match:
                    layers.setdefault(f"{match['stack']}.{match['number']}.", []).append(name)
            self._layers[model] = layers
        return self._layers[model].get(prefix, ())

    def add(
        self,
        name: str,
        sources: Sequence[tuple[SliceSource, str]],
        output_slice: OutputSlice,
        module: Module,
        t: float,
        *,
        in_layer: bool = False,
        absent: Sequence[str] = (),
    ) -> None:
        """Plans one tensor of the output.

        Args:
            name: Name of the output's tensor.
            sources: Every model, and the name of its tensor that the output's should be made of; a base's among them.
            output_slice: The slice that it belongs to.
            module: What the configuration says of the slice's stack.
            t: Position of the tensor's layer in the slice, from 0 to 1.
            in_layer: Whether the tensor lies in a layer that all these models have, and so should be in all of them.
            absent: Models of the slice that have no such stack of layers, such as a text model without a vision tower.
        """
        everywhere = [
            _Found(source.model, key, self.views[source.model].tensors[key], source.parameters)
            for source, key in sources
            if key in self.views[source.model].tensors
        ]
        found = [one for one in everywhere if one.model not in self._beside]
        merging = [(source, key) for source, key in sources if source.model not in self._beside]
        lacking = list(dict.fromkeys(s.model for s, key in merging if key not in self.views[s.model].tensors))
        if not found:
            return
        if lacking and in_layer:
            text = f"only {_listed(one.model for one in found)} and not {_listed(lacking)}"
            self._unlike.setdefault(text, []).append(name)
            return
        lacking += [model for model in dict.fromkeys(absent) if model not in (*lacking, *self._beside)]
        base_model = output_slice.base_model or self.config.base_model
        takes_base = self.method.base in (Base.REQUIRED, Base.OPTIONAL) and base_model is not None
        base = next((one for one in found if takes_base and one.model == base_model), None)
        merged = [one for one in found if base is None or (one.model, one.key) != (base.model, base.key)]
        anchor = base or found[0]
        dtype = self._dtype(anchor.info, [one.info for one in found])
        out = torch_dtype(self.config.out_dtype) if self.config.out_dtype is not None else dtype
        if self.config.merge_method != "passthrough":
            dtype = torch.float32 if dtype is torch.float64 else dtype  # as the checkpoint's notes say
        why = self._why_copied(name, found, merged, base, bool(lacking))
        if why:
            anchor = merged[0] if merged and self.method.leads else anchor
            self._copy(name, anchor, dtype, out if anchor.info.dtype.is_floating_point else dtype, why)
            return
        levels = Levels((output_slice.parameters, module.parameters, self.config.parameters))
        if lacking and self._has_too_few(base, merged):
            self._note_lacking(name, found, lacking, "their weighted mean")
            self._check_shapes(name, found, anchor.info)
            weights = self._per_model(levels, found, t, {"weight": 1.0})
            if problem := no_sum_of_weights(weights, {"normalize": True}, "normalize"):
                self._conflicts.setdefault(problem.partition("; choose")[0], []).append(name)
            mean = Task(name, anchor.info.shape, _sources(found), None, weights, {"normalize": True}, dtype, out)
            mean = self._with_post(replace(mean, instead=_MEAN), everywhere, base_model, t)
            self.output.tasks.append(self._by_token(mean, found, base_model))
            return
        if lacking:
            self._note_lacking(name, merged, lacking, "merged from these")
        self._check_shapes(name, found, anchor.info)
        task = self._by_method(name, found, merged, base, levels, t, dtype, out)
        task = self._with_post(task, everywhere, base_model, t)
        self.output.tasks.append(self._by_token(task, [*merged, *([base] if base is not None else [])], base_model))

    def _has_too_few(self, base: _Found | None, merged: Sequence[_Found]) -> bool:
        """Whether the method cannot merge a tensor that only some models have."""
        return base is None or len(merged) < self.method.num_models[0]

    def _why_copied(
        self, name: str, found: Sequence[_Found], merged: Sequence[_Found], base: _Found | None, lacking: bool
    ) -> str:
        """Says why a tensor is taken from the base, or from the first that has it; empty if it is merged."""
        anchor = base or found[0]
        if not anchor.info.dtype.is_floating_point:
            return "not floating point"
        if 0 in anchor.info.shape and all(one.info.shape == anchor.info.shape for one in found):
            return "no elements"
        if self._nothing_merged or (base is not None and not merged and name not in self._head):
            return "only the base has it" if lacking else "nothing is merged into the base"
        if name in self._head and len(found) == 1:
            return f"of {self._head_of}, whose head the output has"
        if lacking and merged and self.method.leads:
            return f"only {_listed(one.model for one in found)} has it: the first model's own"
        if lacking and len(found) == 1 and self._has_too_few(base, merged):
            return f"only {found[0].model} has it"
        return ""

    def _by_method(
        self,
        name: str,
        found: Sequence[_Found],
        merged: Sequence[_Found],
        base: _Found | None,
        levels: Levels,
        t: float,
        dtype: torch.dtype,
        out: torch.dtype,
    ) -> Task:
        """Plans a tensor that the method merges, by its formula for matrices or the other one."""
        shape = (base or found[0]).info.shape
        self._check_number(len(merged))
        per_model = self._per_model(levels, merged, t, self.method.per_model)
        shared = self._shared(levels, name, t)
        self._check_together(name, per_model, shared)
        self._check_fits(name, per_model, shared, {dtype, out})
        reason, inputs_first = "", False
        if self.method.matrix_formula is not None:
            reason = why_not_a_matrix(name, shape, self._table_sizes) or too_small(shape, len(merged))
            inputs_first = not reason and found[0].info.name in self._inputs_first[found[0].model]
        task = Task(
            name,
            shape,
            _sources(merged),
            (base.model, base.info.name) if base is not None else None,
            per_model,
            shared,
            dtype,
            out,
            fallback_reason=reason,
            inputs_first=inputs_first,
        )
        return replace(task, auxiliary=self._auxiliary(task))

    def _with_post(self, task: Task, found: Sequence[_Found], base_model: str | None, t: float) -> Task:
        """Returns a task that is merged with the work of the steps after it, or with why they leave the tensor.

        Args:
            task: The task.
            found: The tensor of every model that has it, of those that are not merged, too.
            base_model: The base.
            t: Position of the tensor's layer in the slice, from 0 to 1.
        """
        if not self.config.post:
            return task
        wanted = self.config.candidates or [model for model, _ in task.sources if model != base_model]
        origin = next((one for one in found if one.model == base_model), None)
        alike = [one for one in found if one.model in wanted and one.info.shape == task.shape]
        lacks_base = origin is None or origin.info.shape != task.shape
        reason = why_not_a_matrix(task.name, task.shape, self._table_sizes)
        reason = reason or ("the base lacks it, or has it in another shape" if lacks_base else "")
        reason = reason or ("no candidate has it, or one in another shape" if not alike else "")
        if reason or origin is None:
            return replace(task, left_by_post=reason)
        steps = tuple(
            Step(step, {name: self._of_step(given, name, default, task.name, t) for name, default in defaults.items()})
            for entry in self.config.post
            for step, given in entry.items()
            for defaults in (POST_STEPS[step].parameters,)
        )
        inputs_first = origin.info.name in self._inputs_first[origin.model]
        work = PostWork(steps, (origin.model, origin.info.name), _sources(alike), inputs_first)
        # Steps get the merge before it is rounded.
        return replace(task, post=work, dtype=torch.promote_types(task.dtype, torch.float32))

    @staticmethod
    def _of_step(given: Mapping[str, Any], parameter: str, default: Any, name: str, t: float) -> Any:
        """Evaluates one parameter of a step for a tensor; its default where no filter fits."""
        value = evaluate(given[parameter], name, t) if parameter in given else None
        return default if value is None else value

    def _is_padded(self, name: str) -> bool:
        """Whether rows of a tensor are matched by number, those beyond the tokens being padding."""
        return self.vocabulary is None and self.token_rows.padded is not None and name in self.token_rows.names

    def _copy(self, name: str, source: _Found, dtype: torch.dtype, out: torch.dtype, why: str) -> None:
        """Plans a tensor that is taken as it is from its only source."""
        only = (source.model, source.info.name)
        task = Task(name, source.info.shape, (only,), None, {}, {}, dtype, out, why)
        self.output.tasks.append(self._by_token(task, [source], None))
        if why.startswith("only"):
            self._lacking.setdefault(f"{why}, and it is copied", []).append(name)

    def _note_lacking(self, name: str, found: Sequence[_Found], lacking: Sequence[str], how: str) -> None:
        text = f"only {_listed(one.model for one in found)} have it, not {_listed(lacking)}: {how}"
        self._lacking.setdefault(text, []).append(name)

    def lacking_notes(self) -> Iterator[str]:
        """Yields which tensors only some models have, and what was done about them."""
        for text, names in self._lacking.items():
            yield f"{list_kinds(names)}: {text}"

    def unlike_layers(self) -> Iterator[str]:
        """Yields which tensors only some models have in a layer that all of them have."""
        for text, names in self._unlike.items():
            yield (
                f"{list_kinds(names)}: {text}; expected layers with the same tensors, since no merge of these is "
                "known to be right"
            )

    def _by_token(self, task: Task, found: Sequence[_Found], base_model: str | None) -> Task:
        """Returns the task with the rows of the output's vocabulary, where its tensor has one for every token."""
        padded = self.token_rows.padded
        by_token = self.vocabulary is not None and task.name in self.vocabulary.tensors
        if not by_token and not self._is_padded(task.name):
            return task
        num_rows = {one.model: one.info.shape[0] for one in found}
        if padded is not None and len(set(num_rows.values())) > 1 and not by_token:
            by_number = rows_by_number({model: num_rows[model] for model, _ in task.inputs}, padded, base_model)
            return replace(task, shape=(padded, *task.shape[1:]), token_rows=by_number)
        if self.vocabulary is None:
            return task
        quantized = [one.info.quantization for one in found if one.info.quantization is not None]
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

    def _per_model(
        self, levels: Levels, sources: Sequence[_Found], t: float, parameters: Mapping[str, Any]
    ) -> dict[str, list[Any]]:
        """Evaluates the parameters of every source; `parameters` are their names and defaults."""
        per_model: dict[str, list[Any]] = {parameter: [] for parameter in parameters}
        for source in sources:
            for parameter, default in parameters.items():
                value = levels.value(parameter, source.key, t, source.parameters)
                if value is None and default is REQUIRED and (parameter, source.model) not in self._missing:
                    self._missing.add((parameter, source.model))  # one line a model, not one a tensor
                    self._problem(f"{parameter}: missing for {source.model}: none of its filters fits {source.key}")
                value = default if value is None else value
                self._check_range(parameter, value)
                per_model[parameter].append(value)
        return per_model

    def _shared(self, levels: Levels, name: str, t: float) -> dict[str, Any]:
        """Evaluates the parameters of all sources together."""
        shared = {}
        for parameter, default in self.method.shared.items():
            value = levels.value(parameter, name, t)
            if value is None and default is REQUIRED and (parameter, "") not in self._missing:
                self._missing.add((parameter, ""))
                self._problem(f"{parameter}: missing: none of its filters fits {name}")
            shared[parameter] = default if value is None else value
            self._check_range(parameter, shared[parameter])
        return shared

    def _check_range(self, parameter: str, value: Any) -> None:
        if value is None or value is REQUIRED:
            return
        problem = self._kinds[parameter].problem(value)
        if problem is not None:
            self._problem(f"{parameter}: {problem}")

    def _check_together(self, name: str, per_model: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> None:
        """Checks a tensor's parameters that are right one by one together, once all of them are there."""
        self._num_merged += 1
        values = {**shared, **per_model}
        for parameter, kind in self.method.kinds.items():
            of_models = values[parameter] if parameter in per_model else [values[parameter]]
            if any(value is not None and (value is REQUIRED or kind.problem(value)) for value in of_models):
                return  # told already
        for told, check in (
            (self._conflicts, self.method.conflict),
            (self._idle, self.method.idle),
            (self._remarks, self.method.note),
        ):
            if per_model and not next(iter(per_model.values())):
                continue  # nothing is merged, which is told otherwise
            if (text := check(per_model, shared)) is not None:
                told.setdefault(text, []).append(name)

    def _check_fits(
        self, name: str, per_model: Mapping[str, Sequence[Any]], shared: Mapping[str, Any], dtypes: set[torch.dtype]
    ) -> None:
        """Checks that the numbers that tensors are multiplied by are finite in the dtypes of computation and output."""
        narrow = min(dtypes, key=lambda dtype: torch.finfo(dtype).max)
        largest = torch.finfo(narrow).max
        divides = shared.get("normalize", shared.get("normalize_weights", True))
        for parameter, kind in self.method.kinds.items():
            is_factor = isinstance(kind, Range) and kind.low < 0
            if not is_factor or (parameter == "weight" and divides and "lambda" not in shared):
                continue
            values = per_model[parameter] if parameter in per_model else [shared[parameter]]
            large = [value for value in values if isinstance(value, int | float) and abs(value) > largest]
            if large:
                text = f"{parameter}: {large[0]:g} does not fit into {dtype_name(narrow)}; expected up to {largest:g}"
                self._conflicts.setdefault(text, []).append(name)

    def parameter_problems(self) -> Iterator[str]:
        """Yields which parameters do not go together, with the tensors if these are not all."""
        for text, names in self._conflicts.items():
            yield f"{text}{self._of_which(names)}"
        for text, names in self._idle.items():
            if self._is_useless(text, names):
                yield f"{text}: nothing of any model would be in the output"

    def parameter_notes(self) -> Iterator[str]:
        """Yields where parameters leave the base as it is, or count as others."""
        for text, names in self._idle.items():
            if not self._is_useless(text, names) and not text.startswith("scale"):
                yield f"{WARNING}{text}: the base as it is{self._of_which(names)}"
        for text, names in self._remarks.items():
            yield f"{WARNING}{text}{self._of_which(names)}"

    def _is_useless(self, text: str, names: Sequence[str]) -> bool:
        """Whether nothing is kept anywhere; weights and factors of 0 may be the first of a series."""
        return len(names) == self._num_merged and text.startswith(("density", "scale:", "select_topk"))

    def _of_which(self, names: Sequence[str]) -> str:
        return f" ({list_kinds(names)})" if len(names) < self._num_merged else ""

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

    def _dtype(self, anchor: TensorInfo, infos: Sequence[TensorInfo]) -> torch.dtype:
        """Chooses the dtype of the computation: the configured one, else one that holds all of the models'."""
        if len({info.dtype.is_floating_point for info in (anchor, *infos)}) > 1:
            found = ", ".join(dict.fromkeys(dtype_name(info.dtype) for info in (anchor, *infos)))
            self._problem(f"{anchor.name}: {found} in these models; expected floating point, or whole numbers, in all")
        if not anchor.dtype.is_floating_point:
            return anchor.dtype
        if self.config.dtype is not None:
            return torch_dtype(self.config.dtype)
        dtype = anchor.dtype
        for info in infos:
            dtype = torch.promote_types(dtype, info.dtype)
        if any(info.dtype != dtype for info in infos):
            computed = torch.float32 if dtype is torch.float64 else dtype
            note = (
                f"models are stored in unlike dtypes; computed in {dtype_name(computed)}, stored in {dtype_name(dtype)}"
            )
            note = note if computed is not dtype else f"{note.partition(', stored')[0]}, which holds them all"
            if note not in self.output.notes:
                self.output.notes.append(note)
        return dtype

    def _check_shapes(self, name: str, found: Sequence[_Found], anchor: TensorInfo) -> None:
        """Checks that the tensors of all models have one shape; rows that are arranged by token may differ."""
        shapes = {one.model: list(one.info.shape) for one in found}
        by_token = self.vocabulary is not None and name in self.vocabulary.tensors
        first = 1 if by_token or self._is_padded(name) else 0
        if any(list(one.info.shape[first:]) != list(anchor.shape[first:]) for one in found):
            alike_beyond = all(one.info.shape[1:] == anchor.shape[1:] for one in found)
            may_be_tokens = name in self.token_rows.names if self.token_rows.names else LAYER.match(name) is None
            # Heads have other sizes, too: those of tables of tokens stand in the configs.
            may_be_tokens = may_be_tokens and all(one.info.shape[:1] and self._is_vocabulary(one) for one in found)
            advice = _ADVICE if not first and alike_beyond and may_be_tokens else ""
            self._problem(f"{name}: shapes differ: {shapes}; expected one{advice}")

    def _is_vocabulary(self, one: _Found) -> bool:
        return one.info.shape[0] in vocabulary_sizes(self.views[one.model].checkpoint)

    def _check_number(self, num_models: int) -> None:
        """Checks the number of models, the base not counted."""
        fewest, most = self.method.num_models
        if not fewest <= num_models <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            beside = " beside the base" if self.method.base is Base.REQUIRED else ""
            self._problem(f"{self.config.merge_method} merges {wanted} models{beside}, found {num_models}")

    def _problem(self, text: str) -> None:
        if text not in self.output.problems:
            self.output.problems.append(text)


# Stacks of layers, and slices of them


def _find_stacks(names: Iterable[str]) -> dict[str, int]:
    """Finds the stacks of layers, and how many each has, in the tensors' names."""
    return {stack: len(found) for stack, found in _layers(names).items() if found == set(range(len(found)))}


def _layers(names: Iterable[str]) -> dict[str, set[int]]:
    """Finds the numbers of layers in the tensors' names, by what stands before them."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        match = LAYER.match(name)
        if match and not split_name(name)[0]:
            numbers.setdefault(match["stack"], set()).add(int(match["number"]))
    return numbers


def _gaps(views: Mapping[str, ModelView], depths: Depths, stacks: Mapping[str, int]) -> Iterator[str]:
    """Yields the models that have some layers of a stack, but not all up to their last one."""
    for model, view in views.items():
        for stack, found in _layers(view.tensors).items():
            if stack in stacks and stack not in depths[model]:
                lacking = next(number for number in range(len(found) + 1) if number not in found)
                yield (
                    f"{model}: {stack} lacks layer {lacking}, and has {len(found)} others; expected all from 0 on: "
                    "fetch the checkpoint again"
                )


def _stack_of(name: str, stacks: Mapping[str, int]) -> str | None:
    """Returns the stack that a tensor belongs to."""
    match = LAYER.match(name)
    return match["stack"] if match and match["stack"] in stacks else None


def _modules_by_stack(
    config: DataFreeConfig, depths: Depths, stacks: Mapping[str, int], problems: list[str]
) -> dict[str, Module]:
    """Expresses the whole configuration as slices of every stack; what is wrong with it is added to `problems`."""
    if config.modules:
        meant = stacks_of_modules(config.modules, stacks)
        covered = {stack for of_module in meant.values() for stack in of_module}
        if set(config.modules) - set(meant) or set(stacks) - covered:
            problems.append(f"modules: found {sorted(config.modules)}, expected one for each of {sorted(stacks)}")
            return {}
        given = {stack: config.modules[name] for name, of_module in meant.items() for stack in of_module or (name,)}
        for name, of_module in meant.items():
            if len(of_module) > 1 and config.modules[name].slices:
                problems.append(f"modules.{name}: 'slices' are for one stack of layers, found {list(of_module)}")
    elif config.slices:
        if len(stacks) != 1:
            problems.append(f"slices: the model has the stacks {sorted(stacks)}; use 'modules', one for each")
            return {}
        given = {next(iter(stacks)): Module(slices=config.slices)}
    else:
        given = {stack: Module(models=config.models) for stack in stacks or {"": 0}}
    modules = {stack: _as_slices(config, depths, stack, module) for stack, module in given.items()}
    for stack, module in modules.items():
        problems.extend(_slice_problems(depths, stack, module, is_given=bool(given[stack].slices)))
    return modules


def _owners(
    config: DataFreeConfig, modules: Mapping[str, Module], stacks: Collection[str]
) -> Callable[[str], Module | None]:
    """Makes a function from a tensor outside the stacks to the module that it belongs to; `None` where none is told."""
    if len(config.modules) < 2:
        return lambda _: None
    meant = stacks_of_modules(config.modules, stacks)

    def owner(tensor: str) -> Module | None:
        name = module_of_tensor(tensor, meant)
        return modules[(meant[name] or (name,))[0]] if name is not None else None

    return owner


def _as_slices(config: DataFreeConfig, depths: Depths, stack: str, module: Module) -> Module:
    """Turns whole models into one slice of all their layers, the base's among them."""
    if module.slices:
        return module
    sources = [(entry.model, entry.parameters) for entry in module.models]
    if config.base_model is not None and config.base_model not in [model for model, _ in sources]:
        sources.append((config.base_model, {}))
    named, beside = [model for model, _ in sources], config.beside
    sources += [(model, {}) for model in config.candidates if model in beside and model not in named]
    # A model that lacks the stack (a text model beside one with images, too) has no part in it.
    output_slice = OutputSlice(
        sources=tuple(
            SliceSource(model=model, parameters=parameters, layer_range=(0, depths[model].get(stack, 0)))
            for model, parameters in sources
        )
    )
    return module.model_copy(update={"models": (), "slices": (output_slice,)})


def _slice_problems(depths: Depths, stack: str, module: Module, *, is_given: bool) -> Iterator[str]:
    for number, output_slice in enumerate(module.slices):
        where = f"slices[{number}]"
        sources = [source for source in output_slice.sources if depths[source.model].get(stack) or source.layers]
        lengths = {source.model: len(source.layers) for source in sources}
        if len(set(lengths.values())) > 1:
            place = where if is_given else stack
            yield f"{place}: models have unlike numbers of layers: {lengths}; expected as many, or 'slices' of some"
        for source in sources:
            num_layers = depths[source.model].get(stack, 0)
            start, stop = source.layer_range
            if not 0 <= start <= stop <= num_layers or (start == stop and num_layers):
                yield f"{where}: layer_range {[start, stop]} of {source.model}: expected some of [0, {num_layers}]"
