"""A candidate's own tokenizer, loaded from its folder and checked before any text is read."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from largemerge.calibration.batches import ModelNeeds
from largemerge.calibration.chat import has_chat_template
from largemerge.calibration.fields import Fields, needs_target
from largemerge.config_calibration import CalibrationConfig
from largemerge.errors import CalibrationError

_LARGEST_COMPARED_BYTES = 128 << 20


@dataclass(frozen=True)
class TextReader:
    """How one candidate's texts become tokens."""

    tokenizer: Any
    max_length: int
    """Tokens of a sample at most: as configured, or as few as the tokenizer says that the model takes."""
    assistant_only: bool
    needs: ModelNeeds
    where: str
    """Candidate and data, for messages."""

    @property
    def token_arguments(self) -> list[str]:
        """The forward arguments that the tokenizer gives, one number per token; the attention mask is ours."""
        known = set(self.tokenizer.model_input_names) & self.needs.forward_arguments
        return ["input_ids", *(["token_type_ids"] if "token_type_ids" in known else [])]

    @property
    def arguments(self) -> list[str]:
        """All forward arguments that a sample's texts become."""
        masks = ["attention_mask"]
        if needs_target(self.needs):
            masks.append("decoder_attention_mask")
        given = [*self.token_arguments, *(mask for mask in masks if mask in self.needs.forward_arguments)]
        return [*given, "decoder_input_ids"] if needs_target(self.needs) else given

    @property
    def padding(self) -> dict[str, int]:
        """What fills each forward argument on the right. It is masked: any id does that the model knows."""
        choices = (self.tokenizer.pad_token_id, self.needs.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(choice for choice in choices if choice is not None and choice >= 0)
        types: int = getattr(self.tokenizer, "pad_token_type_id", 0)
        return {"input_ids": pad, "decoder_input_ids": pad, "token_type_ids": types}


def open_text_reader(
    checkpoint: Path,
    config: CalibrationConfig,
    fields: Fields,
    needs: ModelNeeds,
    where: str,
    *,
    trust_remote_code: bool,
) -> TextReader:
    """Loads the checkpoint's tokenizer and checks that it can do what is asked.

    Raises:
        CalibrationError: There is no tokenizer, or it lacks a chat template, an end-of-text token, or room.
    """
    assert config.max_length is not None
    tokenizer = _load_tokenizer(checkpoint, where, trust_remote_code)
    # Where nobody set a limit, Transformers says 10³⁰.
    limit = tokenizer.model_max_length
    max_length = min(config.max_length, int(limit)) if limit and limit > 0 else config.max_length
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
    return TextReader(tokenizer, max_length, config.assistant_only, needs, where)


@dataclass(frozen=True)
class _TokenizerFiles:
    """What a tokenizer is made from; equal for folders with the same files."""

    digests: tuple[tuple[str, str], ...]
    folder: Path = field(compare=False)


@contextmanager
def shared_tokenizers() -> Iterator[None]:
    """Candidates whose tokenizer files are the same share one tokenizer meanwhile: loading it can take seconds."""
    try:
        yield
    finally:
        _load_from.cache_clear()  # a tokenizer can take a hundred megabytes, and is not needed while models merge


@functools.lru_cache(maxsize=1)
def _load_from(files: _TokenizerFiles) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(files.folder), local_files_only=True)


def _files_of(checkpoint: Path) -> _TokenizerFiles:
    """All files of a checkpoint but its weights: a tokenizer may read any of them."""
    others = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and not _is_of_weights(path)]
    return _TokenizerFiles(tuple((path.name, _digest(path)) for path in others), checkpoint)


def _is_of_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")


def _digest(path: Path) -> str:
    state = path.stat()
    if state.st_size > _LARGEST_COMPARED_BYTES:  # no part of a tokenizer; never taken for equal in another folder
        return f"{path} {state.st_size} {state.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load_tokenizer(checkpoint: Path, where: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    missing = (
        f"{where}: no tokenizer in {checkpoint}; put the files of the model's tokenizer there (tokenizer.json, ...)"
    )
    try:
        if trust_remote_code:  # its code may read whatever it likes
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(checkpoint), trust_remote_code=True, local_files_only=True
            )
        else:
            tokenizer = _load_from(_files_of(checkpoint))
    except Exception as error:  # Transformers raises many types for files that are missing or broken
        if not any(checkpoint.glob("*token*")) and not any(checkpoint.glob("vocab.*")):
            raise CalibrationError(missing) from None
        reason = str(error).split("\n")[0]
        raise CalibrationError(
            f"{where}: the tokenizer in {checkpoint} cannot be loaded ({type(error).__name__}: {reason})"
        ) from None
    # Where config.json names the kind of model but no vocabulary lies beside it, Transformers 5 builds
    # an empty tokenizer, without a word. (Tokenizers of bytes have no vocabulary file, rightly.)
    vocabularies = {*tokenizer.vocab_files_names.values(), "tokenizer.json", "tokenizer.model", "tekken.json"}
    has_vocabulary = any((checkpoint / file).is_file() for file in vocabularies)
    if tokenizer.vocab_files_names and not has_vocabulary and not any(checkpoint.glob("tokenizer.*.json")):
        raise CalibrationError(missing)
    tokenizer.truncation_side = "right"
    return tokenizer
