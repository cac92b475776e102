"""Checkpoints and the classes that their configs name: which class has a place for the tensors of which model.

checkpoint ──► its own class, on the meta device ──► KeyMapping: names on disk ↔ parameters      ClassifiedModel
parameters of one class ──► translate ──► parameters of another: a body beside the whole, a tower beside all
all models ──► choose_layout ──► the model whose class has room for the most
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter
from largemerge.checkpoint.quantized import transposed
from largemerge.checkpoint.tensor_info import LAYER_NUMBER, TensorInfo
from largemerge.errors import CheckpointError
from largemerge.model.key_mapping import KeyMapping, map_keys
from largemerge.model.skeleton import build_model, linears_in, weight_is_transposed


@dataclass(frozen=True)
class ClassifiedModel:
    """A checkpoint and the class that its config names.

    Attributes:
        checkpoint: The checkpoint.
        model: The model of its config, on the meta device.
        mapping: How its tensors map to the model's parameters.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    mapping: KeyMapping

    @property
    def class_name(self) -> str:
        """Name of the model's class, such as `LlamaForCausalLM`."""
        return type(self.model).__name__

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters and buffers that the checkpoint holds, in the model's order."""
        made = {target for conversion in self.mapping.conversions for target in conversion.targets}
        return [name for name in self.model.state_dict() if name in self.mapping.renamed or name in made]

    def remade_buffers(self) -> list[str]:
        """Names on disk of buffers that the class makes itself, and that older files hold: `rotary_emb.inv_freq`."""
        state = self.model.state_dict()
        own = [name for name, _ in self.model.named_buffers() if name not in state]
        ends = {".".join(name.split(".")[-2:]) for name in own}
        return [key for key in self.mapping.unmapped if ".".join(key.split(".")[-2:]) in ends]


def classify(
    checkpoints: Mapping[str, Checkpoint],
    adapters: Mapping[str, Adapter] = MappingProxyType({}),
    *,
    trust_remote_code: bool = False,
) -> dict[str, ClassifiedModel]:
    """Builds the class of every checkpoint, and maps its names; checkpoints that are alike share both.

    Raises:
        LargemergeError: If a class cannot be had, or names on disk do not fit together.
    """
    models: list[tuple[Mapping[str, Any], PreTrainedModel]] = []
    mappings: dict[Any, KeyMapping] = {}
    found: dict[str, ClassifiedModel] = {}
    for name, checkpoint in checkpoints.items():
        significant = _significant(checkpoint.config)
        model = next((model for config, model in models if config == significant), None)
        if model is None:
            model = build_model(checkpoint, trust_remote_code=trust_remote_code)
            models.append((significant, model))
        checkpoint = oriented(model, checkpoint, adapters.get(name))
        layout = (id(model), tuple((key, info.shape, info.dtype) for key, info in checkpoint.tensors.items()))
        if layout not in mappings:
            mappings[layout] = map_keys(model, checkpoint)
        found[name] = ClassifiedModel(checkpoint, model, mappings[layout])
    return found


def oriented(model: PreTrainedModel, checkpoint: Checkpoint, adapter: Adapter | None) -> Checkpoint:
    """Turns a checkpoint's quantised weights to how the modules hold them (see `Quantization.transposed`).

    Args:
        model: The model, on any device.
        checkpoint: The checkpoint.
        adapter: Its adapter, if it has one.

    Raises:
        CheckpointError: If the adapter adds to one of these weights.
    """
    turned = [f"{path}.weight" for path, module in linears_in(model).items() if weight_is_transposed(module)]
    if not turned or not checkpoint.quantized():
        return checkpoint
    renamed = map_keys(model, checkpoint).renamed
    keys = {renamed[name] for name in turned if name in renamed}
    adapted = [key for key in keys if adapter is not None and key in adapter.deltas]
    if any(_may_be_turned(checkpoint.tensors[key]) for key in adapted):
        raise CheckpointError(
            f"{checkpoint.name}: its adapter adds to {sorted(adapted)[0]}, which is quantised and held as [in, out]; "
            "merge the adapter into its model first (peft: merge_and_unload)"
        )
    tensors = {
        key: transposed(info) if _may_be_turned(info) and key in keys else info
        for key, info in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def _may_be_turned(info: TensorInfo) -> bool:
    """Whether a weight is quantised as a linear's weight would be, whatever the module."""
    return info.quantization is not None and not info.quantization.keeps_rows


def _significant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what does not change a model's tensors, so that fine-tunes of one base share their class."""
    idle = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash")
    return {key: value for key, value in config.items() if key not in idle}


def translate(source: PreTrainedModel, target: PreTrainedModel) -> dict[str, str]:
    """Finds the places in one model of another's parameters: a model beside the same with a head, a tower beside all.

    Args:
        source: The model whose parameters are looked up.
        target: The model that may have a place for them. Layers count as alike, whatever their numbers.

    Returns:
        Parameter of the source → parameter of the target, for those that have a place there.
    """
    names = list(source.state_dict())
    if type(source) is type(target):
        return {name: name for name in names}
    places = {LAYER_NUMBER.sub("*", name) for name in target.state_dict()}
    prefix = f"{source.base_model_prefix}."
    body = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)} or {n: n for n in names}
    patterns = {LAYER_NUMBER.sub("*", name) for name in body.values()}
    modules = ["", *(f"{path}." for path, _ in target.named_modules() if path and path.count(".") < 3)]
    best = max(modules, key=lambda module: (sum(module + each in places for each in patterns), -len(module)))
    found: dict[str, str] = {}
    for name in names:
        inside = best + body[name] if name in body else None
        for place in (inside, name):
            if place is not None and LAYER_NUMBER.sub("*", place) in places:
                found[name] = place
                break
    return found


def choose_layout(
    models: Mapping[str, ClassifiedModel], preferred: str, optional: Collection[str] = ()
) -> tuple[str, dict[str, list[str]]]:
    """Chooses the model whose class has a place for the most parameters of all models.

    Args:
        models: The models, by reference.
        preferred: The model that is taken where others are no better.
        optional: Models whose parameters count only where all else is equal, such as a base's.

    Returns:
        The model, and for every other model the parameters that have no place there.
    """

    def homeless(target: str) -> dict[str, list[str]]:
        lost = {}
        for name, model in models.items():
            places = translate(model.model, models[target].model)
            lost[name] = [parameter for parameter in model.parameters if parameter not in places]
        return lost

    order = [preferred, *(name for name in models if name != preferred)]
    unlike: dict[type, str] = {}
    for name in order:
        unlike.setdefault(type(models[name].model), name)
    found = {name: homeless(name) for name in unlike.values()}

    def cost(target: str) -> tuple[int, int]:
        lost = found[target]
        must = sum(len(names) for name, names in lost.items() if name not in optional)
        return must, sum(map(len, lost.values()))

    chosen = min(found, key=cost)  # the first one of those that are equal
    return chosen, {name: names for name, names in found[chosen].items() if names}


def token_parameters(model: Any) -> tuple[frozenset[str], str | None]:
    """Finds the parameters with a row for every token: input and output embeddings, and the latter's bias.

    Args:
        model: A Transformers model, on any device.

    Returns:
        Their names, tied ones included, and that of the input embeddings; none and `None` where there are none.
    """
    inputs = outputs = None
    with contextlib.suppress(NotImplementedError):
        inputs = model.get_input_embeddings()
        outputs = model.get_output_embeddings()
    weight = getattr(inputs, "weight", None)
    if not isinstance(inputs, torch.nn.Embedding) or not isinstance(weight, torch.Tensor):
        return frozenset(), None
    tensors = [weight, getattr(outputs, "weight", None), getattr(outputs, "bias", None)]
    wanted = {id(each) for each in tensors if isinstance(each, torch.Tensor) and each.shape[0] == weight.shape[0]}
    named = list(model.named_parameters(remove_duplicate=False))
    first = next(name for name, each in named if each is weight)
    return frozenset(name for name, each in named if id(each) in wanted), first
