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


def find_token_tensors(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> frozenset[str]:
    """Finds the names on disk of the input and output embeddings, and of the latter's bias.

    Args:
        checkpoint: The checkpoint.
        trust_remote_code: Allow its class to be code that lies beside it.

    Raises:
        LargemergeError: If Transformers does not know the model, or it has no token embeddings.
    """
    from largemerge.model.key_mapping import map_keys
    from largemerge.model.skeleton import build_skeleton

    model: Any = build_skeleton(checkpoint, trust_remote_code=trust_remote_code).model
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
    tensors = (tensor for tensor in found if isinstance(tensor, torch.Tensor))
    wanted = {id(tensor) for tensor in tensors if tensor.shape[0] == weight.shape[0]}
    on_disk = map_keys(model, checkpoint).renamed
    names = (name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in wanted)
    return frozenset(on_disk[name] for name in names if name in on_disk)


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
