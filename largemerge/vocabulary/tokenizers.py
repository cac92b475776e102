"""Tokenizers in folders: which tokens they have, and the files that they are.

Tokens and numbers are those of what `AutoTokenizer.from_pretrained` makes of a folder: its classes may add tokens of
their own, which no file names.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largemerge.checkpoint.metadata import TEMPLATE_FOLDER, TOKENIZER_FILES
from largemerge.errors import CheckpointError

Document = dict[str, Any]
"""What lies in `tokenizer.json`."""
_OF_THE_OLD_VOCABULARY = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.

    Attributes:
        ids: By token.
        document: Its `tokenizer.json`; `None` for one that is Python code.
        special: Its special tokens by their roles, such as `pad_token`.
        files: Its files by name.
    """

    ids: Mapping[str, int]
    document: Document | None
    special: Mapping[str, str]
    files: Mapping[str, bytes]


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES if "template" not in name)


def load_tokenizer(folder: Path, name: str) -> Tokenizer:
    """Reads the tokenizer of a folder.

    Args:
        folder: A checkpoint's.
        name: What the user calls it, for messages.

    Raises:
        CheckpointError: If Transformers does not understand it.
    """
    import transformers

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what the many tokenizer classes may raise, nobody has listed
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: the tokenizer in {folder} cannot be read: {first_line}") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    special = {role: token for role, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    document = json.loads(backend.to_str()) if backend is not None else None
    return Tokenizer(dict(loaded.get_vocab()), document, special, tokenizer_files(folder))


def with_document(tokenizer: Tokenizer, document: Document, name: str) -> Tokenizer:
    """The tokenizer with another vocabulary, as it will be read from its files.

    Args:
        tokenizer: Whose settings it has.
        document: The new `tokenizer.json`.
        name: For messages.

    Raises:
        CheckpointError: If it cannot be read back with the tokens and numbers that it should have.
    """
    files = {key: content for key, content in tokenizer.files.items() if key not in _OF_THE_OLD_VOCABULARY}
    files["tokenizer.json"] = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    settings.pop("added_tokens_decoder", None)  # tokenizer.json has them, with the numbers of now
    files["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    with tempfile.TemporaryDirectory(prefix="largemerge-tokenizer-") as folder:
        write_files(Path(folder), files)
        made = load_tokenizer(Path(folder), name)
    wanted = document_ids(document)
    wrong = [token for token, number in wanted.items() if made.ids.get(token) != number]
    if wrong:
        raise CheckpointError(
            f"{name}: the tokenizer of the output is read back with other numbers for {len(wrong)} of {len(wanted)} "
            f"tokens, such as {wrong[0]!r} ({made.ids.get(wrong[0])} for {wanted[wrong[0]]}); "
            "expected a tokenizer whose tokens are numbered without gaps; take another one as the source"
        )
    return Tokenizer(made.ids, made.document, made.special, files)


def document_ids(document: Document) -> dict[str, int]:
    """All tokens of a `tokenizer.json`, added ones included, by number."""
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        ids = {str(piece): number for number, (piece, _) in enumerate(vocabulary)}
    else:
        ids = dict(vocabulary)
    return ids | {entry["content"]: entry["id"] for entry in document["added_tokens"]}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a tokenizer's files; names may have a folder in them."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder's tokenizer, by name."""
    paths = [folder / name for name in TOKENIZER_FILES] + sorted((folder / TEMPLATE_FOLDER).glob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}
