"""Token numbers in `config.json` and `generation_config.json`, where tokens have moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ENDINGS = ("_token_id", "_token_ids", "_token_index")


def move_ids(
    config: dict[str, Any], before: Mapping[str, int], after: Mapping[str, int], special: Mapping[str, str]
) -> list[str]:
    """Changes all numbers of tokens to those of the output.

    Args:
        config: A parsed `config.json` or `generation_config.json`; changed in place.
        before: The numbers of its model's tokens.
        after: Those of the output's.
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
            part[key] = list(dict.fromkeys(number for each in value if (number := moved(key, each)) is not None))
        else:
            part[key] = moved(key, value)
    return notes


def set_vocabulary_size(config: dict[str, Any], before: int, after: int) -> None:
    """Writes how many rows the embeddings have, wherever it stands."""
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if part.get("vocab_size") == before:
            part["vocab_size"] = after


def _token_keys(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for key, value in list(config.items()):
        if isinstance(value, dict):
            yield from _token_keys(value)
        elif key.endswith(_ENDINGS) and isinstance(value, int | list):
            yield config, key, value
