"""Parameters that a class ties to each other, and models that have trained both.

A class that ties its head to its embeddings has one tensor for both. A fine-tune may have a head of its own, whether
its config says so or not: the file is believed, as Transformers does when it loads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter, open_reader
from largemerge.model.classes import ClassifiedModel

_COMPARED_ROWS = 256  # of two tensors at once: those that differ mostly do so from the first row


def untied_heads(models: Mapping[str, ClassifiedModel], adapters: Mapping[str, Adapter]) -> dict[str, dict[str, str]]:
    """Finds parameters that a class ties to another, and that a checkpoint holds with values of their own.

    Args:
        models: The models, by reference.
        adapters: The adapters of models that have one.

    Returns:
        For every model, parameter → the parameter that its class would tie it to.
    """
    found: dict[str, dict[str, str]] = {}
    if not any(classified.mapping.aliases for classified in models.values()):
        return found  # nothing is tied anywhere, so nothing can be lost
    for name, classified in models.items():
        pairs = {**declared_ties(classified.model), **classified.mapping.aliases}
        renamed = classified.mapping.renamed
        for target, source in pairs.items():
            if target in renamed and source in renamed and target != source:
                keys = (renamed[target], renamed[source])
                tied = target in classified.mapping.aliases
                if not _same_values(classified.checkpoint, adapters.get(name), *keys, otherwise=tied):
                    found.setdefault(name, {})[target] = source
    return found


def is_tied(model: PreTrainedModel) -> bool:
    """Whether a model's config, or that of its text model, ties input and output embeddings."""
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "tie_word_embeddings", False) for config in configs)


def declared_ties(model: PreTrainedModel) -> dict[str, str]:
    """The class's ties, whether its config turns them on or not: parameter → the parameter that it may be tied to."""
    ties: dict[str, str] = {}
    for path, module in model.named_modules():
        declared = getattr(module, "_tied_weights_keys", None)
        if isinstance(module, PreTrainedModel) and isinstance(declared, Mapping):
            prefix = f"{path}." if path else ""
            ties |= {prefix + target: prefix + source for target, source in declared.items()}
    state = model.state_dict()
    return {target: source for target, source in ties.items() if target in state and source in state}


def _same_values(checkpoint: Checkpoint, adapter: Adapter | None, left: str, right: str, *, otherwise: bool) -> bool:
    """Compares two tensors of a checkpoint, some rows at a time; `otherwise` where they are yet to be made."""
    a, b = checkpoint.tensors[left], checkpoint.tensors[right]
    if not (a.file.exists() and b.file.exists()):
        return otherwise
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.file == b.file and a.offset is not None and a.offset == b.offset:
        return True
    with open_reader(checkpoint, adapter, past_cache=False) as reader:
        rows = a.shape[0] if a.shape else 1
        for start in range(0, rows, _COMPARED_ROWS):
            part = slice(start, min(start + _COMPARED_ROWS, rows)) if a.shape and rows > _COMPARED_ROWS else None
            if not torch.equal(reader.read(left, part), reader.read(right, part)):
                return False
    return True


def untie_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a config that ties no embeddings."""
    untied: dict[str, Any] = copy.deepcopy(dict(config))
    for part in (untied, *untied.values()):
        if isinstance(part, dict) and (part is untied or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return untied
