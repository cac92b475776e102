"""A candidate's tokenizer and chat template: loaded from its folder, and checked before any text is read.

    folder ──► open_text_reader ──► TextReader: tokenizer, length, forward arguments, padding
    messages ──► encode_conversation ──► tokens, and a mask of the assistant's

Some chat templates mark what the assistant says (`{% generation %}`); Transformers then returns the mask. For the
others it is found by prefixes: the conversation up to an assistant's turn, with the generation prompt, ends where the
turn begins; the conversation up to and with the turn ends where it ends. That holds only if these prefixes are, token
for token, the beginning of the whole, so this is checked. (Templates that drop earlier reasoning, for one, break it.)

Candidates with the same tokenizer files share one tokenizer (`shared_tokenizers`).
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from largemerge.calibration.batches import ForwardSignature
from largemerge.calibration.columns import Fields, takes_target
from largemerge.calibration.config import CalibrationConfig
from largemerge.checkpoint.side_files import auto_tokenizer
from largemerge.checkpoint.tokenizer_check import tokenizer_reason
from largemerge.errors import CalibrationError, CheckpointError
from largemerge.isolation import panics_as_errors, why_it_fails

Message = dict[str, Any]
"""A message of a conversation: `role`, and mostly `content`."""
_MAX_COMPARED_BYTES = 128 << 20
_TEMPLATE_SECONDS, _MAX_RENDERED = 10.0, 1_000_000


@dataclass(frozen=True)
class TextReader:
    """One candidate's tokenizer, and how its texts become tokens.

    Attributes:
        tokenizer: A Transformers tokenizer.
        max_length: Maximum of tokens in a sample: as configured, or fewer if the tokenizer says that the model takes
            fewer.
        assistant_only: Whether only the assistant's tokens enter the statistics.
        signature: Inputs of the model's forward.
        where: Candidate and data, for messages.
    """

    tokenizer: Any
    max_length: int
    assistant_only: bool
    signature: ForwardSignature
    where: str

    @property
    def token_arguments(self) -> list[str]:
        """Names of the forward arguments that the tokenizer makes; attention masks are added by us."""
        known = set(self.tokenizer.model_input_names) & self.signature.forward_arguments
        return ["input_ids", *(["token_type_ids"] if "token_type_ids" in known else [])]

    @property
    def arguments(self) -> list[str]:
        """Names of all forward arguments that a sample's texts become."""
        masks = ["attention_mask"]
        if takes_target(self.signature):
            masks.append("decoder_attention_mask")
        given = [*self.token_arguments, *(mask for mask in masks if mask in self.signature.forward_arguments)]
        return [*given, "decoder_input_ids"] if takes_target(self.signature) else given

    @property
    def padding(self) -> dict[str, int]:
        """Padding values by forward argument. Padding is masked, so any id will do that the model knows."""
        choices = (self.tokenizer.pad_token_id, self.signature.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(choice for choice in choices if choice is not None and choice >= 0)
        types: int = getattr(self.tokenizer, "pad_token_type_id", 0)
        return {"input_ids": pad, "decoder_input_ids": pad, "token_type_ids": types}


def open_text_reader(
    checkpoint: Path,
    config: CalibrationConfig,
    fields: Fields,
    signature: ForwardSignature,
    where: str,
    *,
    trust_remote_code: bool,
) -> TextReader:
    """Loads the checkpoint's tokenizer and checks that it can do what is asked.

    Raises:
        CalibrationError: If there is no tokenizer, or it lacks a chat template, an end-of-text token, or room.
    """
    assert config.max_length is not None
    tokenizer = _load_tokenizer(checkpoint, where, trust_remote_code)
    # Where nobody set a limit, Transformers says 10³⁰.
    limit = tokenizer.model_max_length
    max_length = int(min(config.max_length, limit)) if limit and limit > 0 else config.max_length
    problems = []
    if fields.messages is not None and not has_chat_template(tokenizer):
        problems.append(
            f"messages_field: the tokenizer in {checkpoint} has no chat template; "
            "put a chat_template.jinja there, or give plain text by 'text_field'"
        )
    if config.pack and tokenizer.eos_token_id is None:
        problems.append(f"pack: the tokenizer in {checkpoint} has no end-of-text token (eos_token); remove 'pack'")
    # Asked for fewer tokens than it adds itself, a tokenizer does not truncate at all, and says nothing.
    num_special = tokenizer.num_special_tokens_to_add() if fields.text_columns else 0
    if max_length <= num_special:
        problems.append(
            f"max_length: {max_length} leaves no room beside the {num_special} special tokens "
            f"that the tokenizer adds; expected at least {num_special + 1}"
        )
    if problems:
        raise CalibrationError(*(f"{where}: {problem}" for problem in problems))
    return TextReader(tokenizer, max_length, config.assistant_only, signature, where)


@dataclass(frozen=True)
class _TokenizerFiles:
    """Files that a tokenizer is made from; equal for folders with the same files."""

    digests: tuple[tuple[str, str], ...]
    folder: Path = field(compare=False)


@contextmanager
def shared_tokenizers() -> Iterator[None]:
    """Keeps the last tokenizer for further candidates with the same files meanwhile: loading it can take seconds."""
    try:
        yield
    finally:
        _load_from.cache_clear()  # a tokenizer can take a hundred megabytes, and is not needed while models merge


@functools.lru_cache(maxsize=1)
def _load_from(files: _TokenizerFiles) -> Any:
    return auto_tokenizer(files.folder)


def _files_of(checkpoint: Path) -> _TokenizerFiles:
    """Lists all files of a checkpoint but its weights: a tokenizer may read any of them."""
    others = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and not _is_of_weights(path)]
    return _TokenizerFiles(tuple((path.name, _digest(path)) for path in others), checkpoint)


def _is_of_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")


def _digest(path: Path) -> str:
    state = path.stat()
    if state.st_size > _MAX_COMPARED_BYTES:  # no part of a tokenizer; never taken for equal in another folder
        return f"{path} {state.st_size} {state.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load_tokenizer(checkpoint: Path, where: str, trust_remote_code: bool) -> Any:
    missing = (
        f"{where}: no tokenizer in {checkpoint}; put the files of the model's tokenizer there (tokenizer.json, ...)"
    )
    try:
        if trust_remote_code:  # its code may read whatever it likes
            tokenizer = auto_tokenizer(checkpoint, trust_remote_code=True)
        else:
            tokenizer = _load_from(_files_of(checkpoint))
    except CheckpointError as error:
        text = f"{where}: the tokenizer in {checkpoint} cannot be loaded: "
        raise CalibrationError(*(text + problem for problem in error.problems)) from None
    except Exception as error:  # Transformers raises many types for files that are missing or broken
        if not any(checkpoint.glob("*token*")) and not any(checkpoint.glob("vocab.*")):
            raise CalibrationError(missing) from None
        raise CalibrationError(
            f"{where}: the tokenizer in {checkpoint} cannot be loaded ({tokenizer_reason(error)})"
        ) from None
    # Where config.json names the kind of model but no vocabulary lies beside it, Transformers 5 builds
    # an empty tokenizer, without a word. (Tokenizers of bytes have no vocabulary file, rightly.)
    vocabularies = {*tokenizer.vocab_files_names.values(), "tokenizer.json", "tokenizer.model", "tekken.json"}
    has_vocabulary = any((checkpoint / file).is_file() for file in vocabularies)
    if tokenizer.vocab_files_names and not has_vocabulary and not any(checkpoint.glob("tokenizer.*.json")):
        raise CalibrationError(missing)
    tokenizer.truncation_side = "right"
    return tokenizer


def encode_text(tokenizer: Any, text: str | None = None, **options: Any) -> dict[str, list[int]]:
    """Tokenises a text.

    Args:
        tokenizer: A Transformers tokenizer.
        text: The text; `None` where the options have another one, such as `text_target`.
        options: Arguments of the tokenizer.

    Raises:
        CalibrationError: If the tokenizer fails at this text.
    """
    try:
        with panics_as_errors():
            encoded = tokenizer(text, verbose=False, **options)
    except Exception as error:  # what the many tokenizer classes may raise, nobody has listed
        reason = str(error).split("\n")[0]
        raise CalibrationError(f"the tokenizer cannot encode this text ({type(error).__name__}: {reason})") from None
    return dict(encoded)


def check_templates(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> None:
    """Renders conversations by the chat template in a process of its own: a template is a program, and may never end.

    Raises:
        CalibrationError: If it takes too long, or fills the memory. What it merely rejects is told for each row.
    """

    def render() -> None:
        for messages in conversations:
            try:
                text = tokenizer.apply_chat_template(list(messages), tokenize=False)
            except MemoryError:
                raise MemoryError("it fills the memory") from None
            except Exception:  # what a template rejects
                continue
            given = sum(len(str(message.get("content"))) for message in messages)
            if len(text) > _MAX_RENDERED + 100 * given:
                raise ValueError(f"it makes {len(text):,} letters of one conversation")

    why = why_it_fails(render, _TEMPLATE_SECONDS + len(conversations) / 50) if conversations else None
    if why is not None:
        raise CalibrationError(
            f"the chat template of the tokenizer cannot be used: {why}; expected one that writes a conversation "
            "in some milliseconds"
        )


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], *, assistant_only: bool
) -> tuple[dict[str, list[int]], list[int] | None]:
    """Tokenises a whole conversation, without truncation.

    Args:
        tokenizer: A tokenizer that has a chat template.
        messages: Dictionaries with `role` and mostly `content`.
        assistant_only: Whether to return the mask, too.

    Returns:
        The tokenizer's numbers for each token (`input_ids`, …); and the mask, 1 for tokens of the assistant, 0 for
        others, or `None`.

    Raises:
        CalibrationError: If the template rejects the conversation, or the assistant's tokens cannot be found.
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
        with panics_as_errors():
            encoded = tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **options
            )
    except Exception as error:  # a template is a program: it may raise anything
        reason = str(error).split("\n")[0]
        raise CalibrationError(
            f"the chat template rejects the conversation ({type(error).__name__}: {reason})"
        ) from None
    return dict(encoded)
