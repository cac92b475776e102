"""Conversations to tokens, through the checkpoint's chat template; and which of them the assistant wrote.

Some templates mark what the assistant says (`{% generation %}`); Transformers then returns the
mask. For the others it is found by prefixes: the conversation up to an assistant's turn, with the
generation prompt, ends where the turn begins; the conversation up to and with the turn ends where
it ends. That holds only if these prefixes are, token for token, the beginning of the whole, so
this is checked. (Templates that drop earlier reasoning, for one, break it.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from largemerge.errors import CalibrationError

Message = dict[str, Any]


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], *, assistant_only: bool
) -> tuple[dict[str, list[int]], list[int] | None]:
    """Tokenises a whole conversation, without truncation.

    Args:
        tokenizer: With a chat template.
        messages: Dicts with `role` and mostly `content`.
        assistant_only: Whether to return the mask too.

    Returns:
        What the tokenizer gives (`input_ids`, ...), and 1 for each token of the assistant, 0 for others.

    Raises:
        CalibrationError: The template rejects the conversation, or the assistant's tokens cannot be told.
    """
    if not assistant_only:
        return _apply(tokenizer, messages), None
    if not _marks_generation(tokenizer):
        encoded = _apply(tokenizer, messages)
        return encoded, _mask_by_prefixes(tokenizer, messages, encoded["input_ids"])
    encoded = _apply(tokenizer, messages, return_assistant_tokens_mask=True)
    mask = encoded.pop("assistant_masks")
    if not any(mask) and any(message["role"] == "assistant" for message in messages):
        # Seen: a tokenizer that drops the space with which the marked part begins gets an empty mask.
        raise CalibrationError(
            "assistant_only: the chat template marks the assistant's text by {% generation %}, yet no token "
            "of it was found; give the mask yourself by 'loss_mask_field', or drop 'assistant_only'"
        )
    return encoded, mask


def has_chat_template(tokenizer: Any) -> bool:
    """Whether there is a template to use without naming it."""
    try:
        return bool(tokenizer.get_chat_template())
    except ValueError:
        return False


def _marks_generation(tokenizer: Any) -> bool:
    # Transformers finds tokens by characters, which only the tokenizers written in Rust can.
    return tokenizer.is_fast and bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()))


def _mask_by_prefixes(tokenizer: Any, messages: Sequence[Message], ids: list[int]) -> list[int]:
    mask = [0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise CalibrationError(
                "assistant_only: the conversation begins with the assistant, so where its text begins cannot be "
                "told; begin with another turn, or use a chat template with {% generation %}"
            )
        before = _apply(tokenizer, messages[:turn], add_generation_prompt=True)["input_ids"]
        through = _apply(tokenizer, messages[: turn + 1])["input_ids"]
        for prefix in (before, through):
            if ids[: len(prefix)] != prefix:
                same = next((i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), len(ids))
                raise CalibrationError(
                    f"assistant_only: the chat template writes the conversation up to message {turn} otherwise when "
                    f"more follows (token {same} of {len(prefix)} differs), so the assistant's tokens cannot be "
                    "told; use a chat template with {% generation %}, or 'loss_mask_field'"
                )
        mask[len(before) : len(through)] = [1] * (len(through) - len(before))
    return mask


def _apply(tokenizer: Any, messages: Sequence[Message], **options: Any) -> dict[str, list[int]]:
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **options
        )
    except Exception as error:  # a template is a program: it may raise anything
        reason = str(error).split("\n")[0]
        raise CalibrationError(
            f"the chat template rejects the conversation ({type(error).__name__}: {reason})"
        ) from None
    return dict(encoded)
