"""Where a checkpoint depends on its tokens' numbers: tensors with a row for every token, and keys of its config.

The tensors are found through the model's own code, not by a table of names. Numbers in `config.json` and
`generation_config.json` are changed where tokens have moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from largemerge.checkpoint.index import Checkpoint
from largemerge.errors import ArchitectureError
from largemerge.model.alignment import Alignment

_ENDINGS = ("_token_id", "_token_ids", "_token_index")  # of keys whose values are numbers of tokens


def find_token_tensors(alignment: Alignment, reference: Checkpoint) -> frozenset[str]:
    """Finds the output's names of the input and output embeddings, and of the latter's bias.

    Args:
        alignment: The models under the names of the output.
        reference: The model whose class the output has.

    Raises:
        ArchitectureError: If Transformers does not know the model, or it has no token embeddings.
    """
    if not alignment.class_name:
        raise ArchitectureError(f"'tokenizer' and 'tokenizer_source' need the model's class: {alignment.notes[0]}")
    if not alignment.token_tensors:
        raise ArchitectureError(
            f"{reference.name}: {alignment.class_name} has no token embeddings; leave 'tokenizer' out"
        )
    tensors = alignment.views[alignment.layout].tensors
    rows = {tensors[name].shape[0] for name in alignment.token_tensors if name in tensors}
    sideways = [
        name for name, info in tensors.items() if len(info.shape) == 2 and info.shape[0] == 1 and info.shape[1] in rows
    ]
    if sideways:
        raise ArchitectureError(
            f"{reference.name}: {sideways[0]} has its tokens in the second dimension, which 'tokenizer' and "
            "'tokenizer_source' do not support; leave them out"
        )
    return alignment.token_tensors


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
