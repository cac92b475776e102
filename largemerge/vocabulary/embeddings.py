"""Which tensors have a row for every token: found through the model's own code, not by a table of names."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from largemerge.checkpoint.index import Checkpoint
from largemerge.errors import ArchitectureError


def find_token_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """Names on disk of the input and output embeddings, and of the latter's bias.

    Raises:
        LargemergeError: If Transformers does not know the model, or it has no token embeddings.
    """
    from largemerge.model.names import map_names
    from largemerge.model.skeleton import build_skeleton

    model: Any = build_skeleton(checkpoint).model
    inputs = outputs = None
    with contextlib.suppress(NotImplementedError):
        inputs = model.get_input_embeddings()
        outputs = model.get_output_embeddings()
    weight = getattr(inputs, "weight", None)
    if not isinstance(inputs, torch.nn.Embedding) or not isinstance(weight, torch.Tensor):
        class_name = type(model).__name__
        raise ArchitectureError(f"{checkpoint.name}: {class_name} has no token embeddings; leave 'tokenizer' out")
    sideways = [name for name, info in checkpoint.tensors.items() if info.shape == (1, weight.shape[0])]
    if sideways:
        raise ArchitectureError(
            f"{checkpoint.name}: {sideways[0]} has its tokens in the second dimension, which 'tokenizer' and "
            "'tokenizer_source' do not support; leave them out"
        )
    found = [weight, getattr(outputs, "weight", None), getattr(outputs, "bias", None)]
    wanted = {id(each) for each in found if isinstance(each, torch.Tensor) and each.shape[0] == weight.shape[0]}
    on_disk = map_names(model, checkpoint).renamed
    names = (name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in wanted)
    return frozenset(on_disk[name] for name in names if name in on_disk)
