"""Heads of models that share a body: found, kept apart where they differ, one of them chosen for the output.

    cls1 = body + classifier [2, 768]  ─┐   find_heads ──► Heads ──► view: what of a checkpoint enters the merge
    cls2 = body + classifier [3, 768]  ─┤                        ├─► write_heads: OUT/heads/cls1.safetensors, …
    base = body + language model's head ┘                        └─► model_card, to_json, summary

A head is what a model's class has beside its body: the parameters outside `base_model`, or, where the class has no such
attribute, outside the only model among its children. No table says so. The output embeddings of language models are a
matter of vocabularies, not of heads, as long as all models are of one class.

Heads are merged with the rest where all models have the same class, the same shapes and the same labels in the same
order. Otherwise no average of them would mean anything: each is written beside the model, and `head` says which one
goes into it (`base`, a model's name, or `none` for the bare body).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.side_files import HEADS_FOLDER
from largemerge.checkpoint.writer import not_finite
from largemerge.errors import CheckpointError, ConfigError, LargemergeError, MergeError
from largemerge.model.key_mapping import map_keys
from largemerge.model.skeleton import build_model

NONE, BASE = "none", "base"
"""Values of `head` that are no model's name: the bare body, and the head of the base."""
_BODY_CLASS = re.compile(r"(?<!Head)(?<!Heads)(Model|Encoder)$")
_LABEL_KEYS = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task")


@dataclass(frozen=True)
class Head:
    """The head of one model, and what its class says of the body below it.

    Attributes:
        model: Name of the model.
        class_name: Name of the model's class.
        body_class: Name of the body's class.
        body_path: Path of the body in the model; "" for a model that is a bare body.
        body_names: Names of the body's parameters and persistent buffers, in the body.
        names: Names of the head's parameters and persistent buffers, in the model.
        keys: Names on disk of those that have a tensor of their own.
        shapes: Their shapes on disk.
        is_language_model: Whether the class has output embeddings.
        labels: Labels in order.
        problem_type: What the config says of the labels (`regression`, …), if anything.
        config: The model's `config.json`, with as many labels as the head has.
        body_config: `config.json` of the bare body.
    """

    model: str
    class_name: str
    body_class: str
    body_path: str
    body_names: frozenset[str]
    names: frozenset[str]
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    is_language_model: bool
    labels: tuple[str, ...]
    problem_type: str | None
    config: Mapping[str, Any]
    body_config: Mapping[str, Any]

    def own_name(self, name: str) -> str:
        """Name in the model of a parameter of the body."""
        return f"{self.body_path}.{name}" if self.body_path else name


@dataclass(frozen=True)
class Heads:
    """Heads that are kept apart.

    Attributes:
        choice: What the output has: `none`, `base`, or the name of the model whose head it is.
        reason: Why the heads are not merged.
        models: Heads of the models that are merged, by name.
        base: Head of the base; `None` where there is none, or its body is of another class.
        class_name: Class of the output.
        kept: Model → parameter of its class → name on disk, of what is written beside the output: the head, and what
            else of the model the output's class has no place for.
    """

    choice: str
    reason: str
    models: Mapping[str, Head]
    base: Head | None
    class_name: str
    kept: Mapping[str, Mapping[str, str]]

    @property
    def chosen(self) -> Head | None:
        """The head that the output has; `None` for a bare body."""
        return self.base if self.choice == BASE else self.models.get(self.choice)

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the output's parameters that are its head's."""
        return self.chosen.names if self.chosen is not None else frozenset()

    @property
    def kept_heads(self) -> dict[str, Head]:
        """Heads that are written beside the output, by model: those of bare bodies have nothing to be written."""
        return {name: head for name, head in self.models.items() if self.kept.get(name)}

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        """What of a model enters the merge: all but its head, unless that is the output's.

        Its config is that of the bare body where the output is one.
        """
        head = self.base if checkpoint.name == BASE else self.models.get(checkpoint.name)
        if head is None:
            return checkpoint
        if head is self.chosen:
            return dataclasses.replace(checkpoint, config=head.config)
        left_out = {*head.keys.values(), *self.kept.get(checkpoint.name, {}).values()}
        tensors = {key: info for key, info in checkpoint.tensors.items() if key not in left_out}
        config = head.body_config if self.choice == NONE else checkpoint.config
        return dataclasses.replace(checkpoint, tensors=tensors, config=config)

    def lacks(self, model: str, name: str) -> bool:
        """Whether the class of a model has no parameter `name` of the output, which is one of the body's."""
        path = self.chosen.body_path if self.chosen is not None else ""
        in_body = name.removeprefix(f"{path}.") if path else name
        head = self.base if model == BASE else self.models.get(model)
        return head is None or in_body not in head.body_names

    def to_json(self) -> dict[str, Any]:
        """The heads as plain JSON values."""
        return {
            "in_the_model": self.choice,
            "class": self.class_name,
            "reason": self.reason,
            "beside_it": {
                name: {
                    "file": str(head_file(name)),
                    "class": head.class_name,
                    "labels": list(head.labels),
                    "tensors": sorted(self.kept[name]),
                }
                for name, head in self.kept_heads.items()
            },
        }

    def summary(self) -> str:
        """Describes the heads for a table."""
        chosen = "none" if self.choice == NONE else f"that of {self.choice}"
        files = ", ".join(str(head_file(name)) for name in self.kept_heads)
        return f"not merged: {self.reason}\nin the model: {chosen} ({self.class_name})\nbeside it: {files}"


def head_file(model: str) -> Path:
    """Path in the output of the file with a model's head."""
    return Path(HEADS_FOLDER) / (re.sub(r"[^\w.+-]", "_", model) + ".safetensors")


def find_heads(
    candidates: Sequence[Checkpoint],
    base: Checkpoint | None,
    choice: str | None,
    *,
    excluded: Callable[[str], bool] = lambda name: False,
    trust_remote_code: bool = False,
    merges_with_bodies: bool = False,
) -> Heads | None:
    """Finds heads that cannot be merged, and chooses the output's.

    Without a choice the output has the base's head, where all heads have the shapes of the base's, or where the user
    has excluded the heads from the merge and the base has them; the only head there is, where all other models are bare
    bodies; else it is the bare body.

    Args:
        candidates: The models that are merged; their names are unique, and none is `base` or `none`.
        base: The base; it is called `base`.
        choice: The setting `head`.
        excluded: Says of a name on disk whether the user wants the base's tensor.
        trust_remote_code: Allow checkpoints to run code of their own.
        merges_with_bodies: Whether heads of one kind are merged though some models are bare bodies.

    Returns:
        The heads; `None` where there are none, or all are merged, or the models have different bodies.

    Raises:
        ConfigError: If the choice is impossible.
        LargemergeError: If a model's class cannot be had.
    """
    if choice is None and _alike(candidates):
        return None
    first = _read_head(candidates[0], trust_remote_code)
    one_class = len({str(checkpoint.config.get("architectures")) for checkpoint in candidates}) == 1
    if choice is None and one_class and (first.is_language_model or not first.names):
        return None
    found = [first, *(_read_head(checkpoint, trust_remote_code) for checkpoint in candidates[1:])]
    if len({head.body_class for head in found}) > 1:
        return None
    with_head = [head for head in found if head.names]
    only_bodies_differ = len(with_head) < len(found) and _why_apart(with_head) is None
    if choice is None and merges_with_bodies and only_bodies_differ:
        in_all = with_head[0].body_names if with_head else frozenset[str]()
        if all(head.body_names <= in_all for head in found):
            return None  # else a body has parts, such as a pooler, that the class with a head has not
    reason = _why_apart(found)
    models = {head.model: head for head in found}
    if choice is not None and not any(head.names for head in found):
        raise ConfigError(f"head: {choice}: {found[0].class_name} has no head beside its body; remove 'head'")
    if choice is not None and reason is None and all(head.is_language_model for head in found):
        raise ConfigError(
            f"head: {choice}: the heads of {found[0].class_name} are output embeddings, which are merged; remove 'head'"
        )
    if reason is None and choice is None:
        return None
    own_base = _head_of_base(base, found[0].body_class, trust_remote_code)
    if choice is None and only_bodies_differ and len(with_head) == 1:
        choice = with_head[0].model
    choice = choice or _default_choice(found, own_base, excluded)
    if choice == BASE and (own_base is None or not own_base.keys):
        what = "its body is of another class" if own_base is None else f"{own_base.class_name} has none"
        raise ConfigError(
            f"head: base: the base has no head for this body: {what}; expected none, or one of {[*models]}"
        )
    if choice not in (NONE, BASE, *models):
        raise ConfigError(f"head: {choice!r}: expected none, base, or one of {[*models]}")
    heads = Heads(choice, reason or f"head is {choice}", models, own_base, found[0].body_class, {})
    of_output = dataclasses.replace(candidates[0], config=found[0].body_config)
    if heads.chosen is not None:
        every = [*candidates, *([base] if base is not None else [])]
        of_output = next(each for each in every if each.name == heads.chosen.model)
        of_output = dataclasses.replace(of_output, config=heads.chosen.config)
    model = build_model(of_output, trust_remote_code=trust_remote_code)
    path, body = find_body(model)
    in_output, class_name = frozenset(body.state_dict()), type(model).__name__
    _check_bodies(found, candidates, model, path)
    kept = {head.model: _kept_keys(head, found, candidates, in_output) for head in found}
    return dataclasses.replace(heads, class_name=class_name, kept=kept)


def _check_bodies(found: Sequence[Head], candidates: Sequence[Checkpoint], model: PreTrainedModel, path: str) -> None:
    """Raises where a candidate's body goes by names that the output's class does not read."""
    problems = []
    for head, checkpoint in zip(found, candidates, strict=True):
        missing = set(map_keys(model, checkpoint).missing)
        names = {f"{path}.{name}" if path else name for name in head.body_names}
        if names and names <= missing:
            problems.append(
                f"{head.model}: a {head.class_name} keeps its body under {head.body_path!r}, where a "
                f"{type(model).__name__}, as the output would be, does not look for it; merge models of one class"
            )
    if problems:
        raise CheckpointError(*problems)


def _alike(candidates: Sequence[Checkpoint]) -> bool:
    """Whether classes, labels and the shapes of all tensors are the same everywhere, so that no head can differ."""

    def key(checkpoint: Checkpoint) -> tuple[Any, ...]:
        config = checkpoint.config
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        labels = {int(number): label for number, label in (config.get("id2label") or {}).items()}
        return config.get("architectures"), labels, config.get("num_labels"), config.get("problem_type"), shapes

    first = key(candidates[0])
    return all(key(checkpoint) == first for checkpoint in candidates[1:])


def find_body(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """Finds the body of a model, by path and module: "" and the model itself where it is a bare body."""
    body = model.base_model
    if body is not model and isinstance(body, PreTrainedModel):
        return next(name for name, module in model.named_modules() if module is body), body
    if _BODY_CLASS.search(type(model).__name__):
        return "", model  # a bare body that has another model inside, as OPT's and Swin's have
    inner = [(name, child) for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(inner) == 1 and any(isinstance(module, nn.ModuleList) for module in inner[0][1].modules()):
        return inner[0]
    return "", model


def _read_head(checkpoint: Checkpoint, trust_remote_code: bool) -> Head:
    """Finds the head of a model through its class."""
    model = build_model(checkpoint, trust_remote_code=trust_remote_code)
    config = _fitted_config(model, checkpoint)
    if config is not checkpoint.config:
        checkpoint = dataclasses.replace(checkpoint, config=config)
        model = build_model(checkpoint, trust_remote_code=trust_remote_code)
    path, body = find_body(model)
    names = _outside(model, body)
    mapping = map_keys(model, checkpoint)
    keys = {name: mapping.renamed[name] for name in mapping.renamed if name in names}
    labels: Mapping[int, str] = getattr(model.config, "id2label", None) or {}
    return Head(
        model=checkpoint.name,
        class_name=type(model).__name__,
        body_class=type(body).__name__,
        body_path=path,
        body_names=frozenset(body.state_dict()),
        names=names,
        keys=keys,
        shapes={name: tuple(checkpoint.tensors[key].shape) for name, key in keys.items()},
        is_language_model=_has_output_embeddings(model),
        labels=tuple(label for _, label in sorted(labels.items())),
        problem_type=getattr(model.config, "problem_type", None),
        config=config,
        body_config=_body_config(checkpoint.config, model, body),
    )


def _has_output_embeddings(model: Any) -> bool:
    """Whether a model is a language model, whose head says tokens."""
    with contextlib.suppress(NotImplementedError):
        return model.get_output_embeddings() is not None
    return False


def _outside(model: PreTrainedModel, body: PreTrainedModel) -> frozenset[str]:
    """Names of the parameters and persistent buffers outside the body, without those that are tied to it."""
    inside = {id(tensor) for tensor in body.state_dict(keep_vars=True).values()}
    return frozenset(name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in inside)


def _fitted_config(model: PreTrainedModel, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The model's config; with other labels where the head has another number of them, as an adapter's may."""
    _, body = find_body(model)
    mismatched = map_keys(model, checkpoint).mismatched
    sizes = {shape[0] for name, shape in mismatched.items() if name in _outside(model, body) and shape}
    if len(sizes) != 1:
        return checkpoint.config
    labels = {number: f"LABEL_{number}" for number in range(sizes.pop())}
    config = {key: value for key, value in checkpoint.config.items() if key != "num_labels"}
    return config | {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}


def _body_config(config: Mapping[str, Any], model: PreTrainedModel, body: PreTrainedModel) -> dict[str, Any]:
    """`config.json` of the bare body: the model's without labels, or that of the part that the body is."""
    if type(body.config) is type(model.config):
        made = {key: copy.deepcopy(value) for key, value in config.items() if key not in _LABEL_KEYS}
    else:
        made = json.loads(body.config.to_json_string())
        made |= {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    return made | {"architectures": [type(body).__name__]}


def _why_apart(heads: Sequence[Head]) -> str | None:
    """Says why heads cannot be averaged; `None` if they can."""
    if not heads:
        return None
    first = heads[0]
    for other in heads[1:]:
        if other.class_name != first.class_name:
            return f"{first.model} is a {first.class_name}, {other.model} a {other.class_name}"
        if first.is_language_model or not first.names:
            continue
        for name in sorted(first.shapes.keys() | other.shapes.keys()):
            left, right = first.shapes.get(name), other.shapes.get(name)
            if left != right:
                sizes = [list(shape) if shape is not None else "missing" for shape in (left, right)]
                return f"{name} is {sizes[0]} in {first.model}, {sizes[1]} in {other.model}"
        if other.labels != first.labels:
            return (
                f"the labels of {first.model} are {_some(first.labels)}, those of {other.model} {_some(other.labels)}"
            )
        if other.problem_type != first.problem_type and None not in (other.problem_type, first.problem_type):
            return f"problem_type is {first.problem_type} in {first.model}, {other.problem_type} in {other.model}"
    return None


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (", …" if len(labels) > 4 else "")


def _head_of_base(base: Checkpoint | None, body_class: str, trust_remote_code: bool) -> Head | None:
    """The head of the base; `None` if its class is unknown or has another body."""
    if base is None:
        return None
    try:
        head = _read_head(base, trust_remote_code)
    except LargemergeError:
        return None
    return head if head.body_class == body_class else None


def _default_choice(heads: Sequence[Head], base: Head | None, excluded: Callable[[str], bool]) -> str:
    """`base`, where that is what the user must mean; else `none`."""
    if base is None or not base.keys or {head.class_name for head in heads} != {base.class_name}:
        return NONE
    same_shapes = all(head.shapes == base.shapes for head in heads)
    return BASE if same_shapes or all(map(excluded, base.keys.values())) else NONE


def _kept_keys(
    head: Head, heads: Sequence[Head], candidates: Sequence[Checkpoint], in_output: frozenset[str]
) -> dict[str, str]:
    """What is written beside the output: a head, and parameters of its body that the output's has no place for."""
    left = {head.own_name(name) for name in head.body_names - in_output}
    if not left:
        return dict(head.keys)
    checkpoint = next(each for each in candidates if each.name == head.model)
    renamed = map_keys(build_model(dataclasses.replace(checkpoint, config=head.config)), checkpoint).renamed
    return {**head.keys, **{name: renamed[name] for name in sorted(left) if name in renamed}}


def default_labels_note(model: PreTrainedModel, labels: Sequence[str], names: Sequence[str]) -> str | None:
    """A note for heads that are merged though nobody has named their labels; `None` if there is nothing to say."""
    if _has_output_embeddings(model):
        return None
    _, body = find_body(model)
    made_up = [f"LABEL_{number}" for number in range(len(labels))]
    if not _outside(model, body) or len(labels) < 2 or list(labels) != made_up:
        return None
    return (
        f"the heads of {', '.join(names)} are merged: all have the labels {_some(labels)}, names that Transformers "
        "makes up. If they mean other things in other models, set head: none, or the name of one of them"
    )


def initial_tensors(model: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Makes parameters that no model has as the class initialises them, the same ones each time.

    Args:
        model: A Transformers model, on the meta device.
        names: Names of the parameters.
    """
    made: dict[str, torch.Tensor] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model._init_weights(module)
        made |= {f"{path}.{leaf}": value.detach() for leaf, value in module.state_dict().items()}
    return {name: made[name] for name in names}


def write_heads(
    out: Path,
    heads: Heads,
    readers: Callable[[str], contextlib.AbstractContextManager[TensorReader]],
    *,
    dtype: torch.dtype | None = None,
    adapt: Callable[[str, dict[str, Any]], None] = lambda model, config: None,
) -> None:
    """Writes every model's head to `out/heads/`; may be repeated.

    Args:
        out: The output folder.
        heads: The heads.
        readers: Opens a reader of a model by its name.
        dtype: Dtype of floating-point tensors; `None` for the stored one.
        adapt: Called with a model's name and its config, to change that to what the output's body needs, such as its
            number of tokens.

    Raises:
        MergeError: If a head holds NaN or infinity.
    """
    (out / HEADS_FOLDER).mkdir(exist_ok=True)
    for name, head in heads.kept_heads.items():
        tensors: dict[str, torch.Tensor] = {}
        with readers(name) as reader:
            for parameter, key in heads.kept[name].items():
                tensor = reader.read(key)
                wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                tensors[parameter] = tensor.to(wanted).contiguous()
                if (found := not_finite(tensors[parameter])) is not None:
                    raise MergeError(
                        f"{name} holds {found} in {key}, a tensor of its head; fetch or save that checkpoint again, or "
                        "leave it out"
                    )
        config = copy.deepcopy(dict(head.config))
        for key in ("_name_or_path", "quantization_config", "transformers_weights"):
            config.pop(key, None)
        config["architectures"] = [head.class_name]
        adapt(name, config)
        metadata = {
            "format": "pt",
            "model": name,
            "class": head.class_name,
            "labels": json.dumps(list(head.labels), ensure_ascii=False),
            "problem_type": head.problem_type or "",
            "config": json.dumps(config, ensure_ascii=False),
        }
        (out / head_file(name)).write_bytes(_file_of(tensors, metadata))


def _file_of(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """Makes the bytes of a safetensors file, the same ones each time: the library writes metadata in any order."""
    made = save(tensors, metadata)
    end = 8 + int.from_bytes(made[:8], "little")
    header = json.loads(made[8:end]) | {"__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + made[end:]


def check_files(heads: Heads) -> None:
    """Raises where two models' heads would be written to one file.

    Raises:
        CheckpointError: With the names of the models.
    """
    names = list(heads.models)
    files = [str(head_file(name)).casefold() for name in names]
    twice = [name for name, file in zip(names, files, strict=True) if files.count(file) > 1]
    if twice:
        raise CheckpointError(f"the heads of {twice} would be written to one file; give each model another 'name'")


def card_section(heads: Heads) -> str:
    """Makes the part of a model card that says what heads there are, and how to load the model with one of them."""
    chosen = "The model itself has none" if heads.choice == NONE else f"The model itself has that of {heads.choice}"
    return f"""
## Heads

The heads of the models were not merged: {heads.reason}. {chosen}. Each lies beside it:

| file | class | labels |
|---|---|---|
{chr(10).join(_card_rows(heads))}

To load the merged body with one of them:

```python
import json

import transformers
from safetensors import safe_open

folder, name = "path/to/this/folder", "{next(iter(heads.kept_heads))}"
with safe_open(f"{{folder}}/{HEADS_FOLDER}/{{name}}.safetensors", "pt") as file:
    about, head = file.metadata(), {{key: file.get_tensor(key) for key in file.keys()}}
config = transformers.AutoConfig.for_model(**json.loads(about["config"]))
model_class = getattr(transformers, about["class"])
model = model_class.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
model.load_state_dict(head, strict=False)
```
"""


def _card_rows(heads: Heads) -> Iterator[str]:
    for name, head in heads.kept_heads.items():
        yield f"| `{head_file(name)}` | `{head.class_name}` | {_some(head.labels).replace('|', ' ')} |"
