"""Where a checkpoint depends on its tokens' numbers: tensors with a row for every token, and keys of its config.

The tensors are found through the model's own code, not by a table of names. Numbers in `config.json` and
`generation_config.json` are changed where tokens have moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from largemerge.checkpoint.index import Checkpoint
from largemerge.errors import ArchitectureError

_ENDINGS = ("_token_id", "_token_ids", "_token_index")  # of keys whose values are numbers of tokens


def find_token_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """Finds the names on disk of the input and output embeddings, and of the latter's bias.

    Raises:
        LargemergeError: If Transformers does not know the model, or it has no token embeddings.
    """
    from largemerge.model.key_mapping import map_keys
    from largemerge.model.skeleton import build_skeleton

    model = build_skeleton(checkpoint).model
    names, first = token_parameters(model)
    if first is None:
        class_name = type(model).__name__
        raise ArchitectureError(f"{checkpoint.name}: {class_name} has no token embeddings; leave 'tokenizer' out")
    sideways = sideways_tensors(checkpoint, model)
    if sideways:
        raise ArchitectureError(
            f"{checkpoint.name}: {sideways[0]} has its tokens in the second dimension, which 'tokenizer' and "
            "'tokenizer_source' do not support; leave them out"
        )
    on_disk = map_keys(model, checkpoint).renamed
    return frozenset(on_disk[name] for name in names if name in on_disk)


def token_parameters(model: Any) -> tuple[frozenset[str], str | None]:
    """Finds the names of a model's parameters that have a row for every token, tied names included.

    Args:
        model: A Transformers model, on any device.

    Returns:
        The names, and that of the input embeddings; none and `None` where the model has no token embeddings.
    """
    inputs = outputs = None
    with contextlib.suppress(NotImplementedError):
        inputs = model.get_input_embeddings()
        outputs = model.get_output_embeddings()
    weight = getattr(inputs, "weight", None)
    if not isinstance(inputs, torch.nn.Embedding) or not isinstance(weight, torch.Tensor):
        return frozenset(), None
    found = [weight, getattr(outputs, "weight", None), getattr(outputs, "bias", None)]
    tensors = (tensor for tensor in found if isinstance(tensor, torch.Tensor))
    wanted = {id(tensor) for tensor in tensors if tensor.shape[0] == weight.shape[0]}
    named = list(model.named_parameters(remove_duplicate=False))
    first = next(name for name, tensor in named if tensor is weight)
    return frozenset(name for name, tensor in named if id(tensor) in wanted), first


def sideways_tensors(checkpoint: Checkpoint, model: Any) -> list[str]:
    """Names on disk of tensors with a column for every token, such as `final_logits_bias`."""
    num_rows = model.get_input_embeddings().weight.shape[0]
    return [name for name, info in checkpoint.tensors.items() if info.shape == (1, num_rows)]


def move_ids(
    config: dict[str, Any], before: Mapping[str, int], after: Mapping[str, int], special: Mapping[str, str]
) -> list[str]:
    """Changes all numbers of tokens in a config to those of the output.

    Args:
        config: A parsed `config.json` or `generation_config.json`; changed in place.
        before: The numbers of the tokens of the config's model.
        after: The numbers of the output's tokens.
        special: The output's special tokens by their roles, such as `pad_token`.

    Returns:
        Notes on numbers that have no token in the output.
    """
    tokens = {number: token for token, number in before.items()}
    notes: list[str] = []

    def moved(key: str, number: Any) -> Any:
        if isinstance(number, bool) or not isinstance(number, int) or number not in tokens:
            return number  # no token: a row of padding, or -1 for none
        token = tokens[number]
        if token in after:
            return after[token]
        instead = special.get(key.removesuffix("_id"))
        notes.append(f"{key} was {number} ({token!r}), which the output's vocabulary lacks; now that of {instead!r}")
        return after.get(instead) if instead is not None else None

    for part, key, value in _token_keys(config):
        if isinstance(value, list):
            part[key] = list(dict.fromkeys(number for old in value if (number := moved(key, old)) is not None))
        else:
            part[key] = moved(key, value)
    return notes


def _token_keys(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yields the keys whose values are numbers of tokens, each with the part of the config that it stands in."""
    for key, value in list(config.items()):
        if isinstance(value, dict):
            yield from _token_keys(value)
        elif key.endswith(_ENDINGS) and isinstance(value, int | list):
            yield config, key, value
