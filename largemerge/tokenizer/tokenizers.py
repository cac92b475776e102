"""Tokenizers in folders: read as Transformers reads them, extended, and united to one with the tokens of several.

Tokens and numbers are those of what `AutoTokenizer.from_pretrained` makes of a folder: its classes may add tokens of
their own, which no file names.

A union is the first one's `tokenizer.json` with what it lacks of the others. Tokens of the first keep their numbers;
new ones follow, in the order of the models and of their numbers there. What is part of another's vocabulary becomes
part of this one's, with the merges (BPE) or scores (Unigram) that lead to it, so that text is still cut by the
tokenizer's own rules. mergekit makes them *added tokens*, which are cut out of any text in which their letters stand,
words included ("ing", "er"), before the tokenizer sees it. Added tokens stay added ones. The first one's merges come
before the others', so that its texts are cut as before, or into fewer tokens; some tokens of the others may then never
come out of a text, where the first one's merges lead another way.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter
from largemerge.checkpoint.side_files import auto_tokenizer, has_tokenizer, is_inside, tokenizer_names
from largemerge.checkpoint.tokenizer_check import tokenizer_reason
from largemerge.errors import CheckpointError
from largemerge.machine import scratch_folder
from largemerge.text_files import MAX_FILE_BYTES, parse_json, read_file

Document = dict[str, Any]
"""The contents of a `tokenizer.json`."""

_PLACEHOLDER_PENALTY = 10.0  # below the lowest score of a Unigram vocabulary: never chosen over another piece
_KEPT_FILES = ("tokenizer_config.json", "special_tokens_map.json", "normalizer.json")
"""Files, beside templates, that say nothing of the vocabulary."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as data: its tokens and its files.

    Attributes:
        ids: The number of every token.
        document: The contents of its `tokenizer.json`; `None` for a tokenizer that is Python code.
        special: Special tokens by their roles, such as `pad_token`.
        files: Contents of its files, by name.
    """

    ids: Mapping[str, int]
    document: Document | None
    special: Mapping[str, str]
    files: Mapping[str, bytes]


def tokenizer_folder(checkpoint: Checkpoint, adapter: Adapter | None) -> Path:
    """Returns the folder of a model's tokenizer: an adapter's that has brought embeddings, else the model's."""
    if adapter is not None and adapter.brought is not None and has_tokenizer(adapter.brought):
        return adapter.brought
    return checkpoint.folder


def load_tokenizer(folder: Path, name: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """Reads the tokenizer of a folder.

    Args:
        folder: Folder of the tokenizer, such as a checkpoint's.
        name: What the user calls it, for messages.
        trust_remote_code: Allow it to be code that lies in the folder.

    Raises:
        CheckpointError: If Transformers does not understand the tokenizer.
    """
    try:
        loaded = auto_tokenizer(folder, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise CheckpointError(*(f"{name}: {problem}" for problem in error.problems)) from None
    except Exception as error:  # what the many tokenizer classes may raise, nobody has listed
        reason = tokenizer_reason(error)
        raise CheckpointError(f"{name}: the tokenizer in {folder} cannot be read: {reason}") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    special = {role: token for role, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    document = json.loads(backend.to_str()) if backend is not None else None
    return Tokenizer(dict(loaded.get_vocab()), document, special, tokenizer_files(folder))


def with_document(tokenizer: Tokenizer, document: Document, name: str) -> Tokenizer:
    """Replaces the vocabulary of a tokenizer, and returns what will be read from the new files.

    Args:
        tokenizer: The tokenizer whose other settings are kept.
        document: The contents of the new `tokenizer.json`.
        name: What the new tokenizer is called in messages.

    Raises:
        CheckpointError: If it cannot be read back with the tokens and numbers that it should have.
    """
    files = {key: content for key, content in tokenizer.files.items() if key in _KEPT_FILES or "template" in key}
    files["tokenizer.json"] = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    settings = parse_json(files.get("tokenizer_config.json", b"{}").decode("utf-8-sig"))
    settings.pop("added_tokens_decoder", None)  # tokenizer.json has them, with the numbers of now
    files["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    with scratch_folder("tokenizer") as folder:
        write_files(folder, files)
        made = load_tokenizer(folder, name)
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
    """Reads the numbers of all tokens of a `tokenizer.json`, added ones included."""
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        ids = {str(piece): number for number, (piece, _) in enumerate(vocabulary)}
    else:
        ids = dict(vocabulary)
    return ids | {entry["content"]: entry["id"] for entry in document["added_tokens"]}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a tokenizer's files; names may have a folder in them."""
    for name, content in files.items():
        if not (folder / name).parent.is_dir():
            (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Reads the files of a folder's tokenizer, by name; those that links outside the folder lead to are left out."""
    names = [name for name in tokenizer_names(folder) if is_inside(folder / name, folder)]
    return {name: read_file(folder / name, max_bytes=MAX_FILE_BYTES) for name in names}


def join_documents(first: Document, others: Mapping[str, Document]) -> tuple[Document, list[str], list[str]]:
    """Extends a copy of the first `tokenizer.json` by the tokens that it lacks of the others.

    Args:
        first: The document to extend.
        others: The other documents, by the names of their models.

    Returns:
        The extended document (equal to `first` if it has all tokens), problems, notes.
    """
    made = copy.deepcopy(first)
    problems: list[str] = []
    notes: list[str] = []
    for name, other in others.items():
        regular = _regular_tokens(other)
        known = document_ids(made)
        new = [token for token in regular if token not in known]
        kind, other_kind = first["model"]["type"], other["model"]["type"]
        if new and kind != other_kind:
            problems.append(
                f"the tokenizer of {name} is {other_kind}, that of the base {kind}, and {len(new)} tokens "
                f"such as {new[0]!r} are new; tokenizers of unlike kinds have no union: use tokenizer_source: base, "
                "or a model"
            )
            continue
        if new:
            _extend(made, new, other)
            unlike = [part for part in ("normalizer", "pre_tokenizer") if first.get(part) != other.get(part)]
            if unlike:
                notes.append(
                    f"the tokenizer of {name} has another {' and '.join(unlike)} than the base's, which the output "
                    "has: tokens that only it has may never come out of a text"
                )
        notes += _add_added_tokens(made, name, other)
    return made, problems, notes


def add_plain_tokens(document: Document, tokens: Iterable[str]) -> Document:
    """Adds tokens to a copy of a document, as `add_tokens` of a tokenizer would; known ones are left alone."""
    made = copy.deepcopy(document)
    known = document_ids(made)
    for token in tokens:
        if token not in known:
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
            known[token] = max(known.values(), default=-1) + 1
            made["added_tokens"].append({"id": known[token], "content": token, **flags})
    return made


def _regular_tokens(document: Document) -> list[str]:
    """Lists all tokens that are no added ones, by number."""
    added = {entry["content"] for entry in document["added_tokens"]}
    ids = document_ids(document)
    return sorted((token for token in ids if token not in added), key=lambda token: ids[token])


def _add_added_tokens(made: Document, name: str, other: Document) -> Iterator[str]:
    """Adds what is missing of another tokenizer's added tokens, in place; yields notes."""
    known = document_ids(made)
    present = {entry["content"]: entry for entry in made["added_tokens"]}
    unlike = []
    next_number = max(known.values(), default=-1) + 1
    for entry in sorted(other["added_tokens"], key=lambda entry: int(entry["id"])):
        token = entry["content"]
        if token not in present:
            # Where it is a regular token here, it keeps its number and is added now: as special as it is there.
            if token not in known:
                known[token] = next_number
                next_number += 1
            present[token] = {**entry, "id": known[token]}
            made["added_tokens"].append(present[token])
        elif {**entry, "id": 0} != {**present[token], "id": 0}:
            unlike.append(token)
    if unlike:
        yield f"added with other settings by {name}, the first ones hold: {', '.join(map(repr, unlike[:5]))}"


def _extend(made: Document, new: Sequence[str], other: Document) -> None:
    """Makes new tokens of another tokenizer part of the vocabulary, in place, with the merges or scores they need."""
    model = made["model"]
    _include_added_tokens(made)
    start = max(document_ids(made).values(), default=-1) + 1
    if model["type"] == "Unigram":
        scores = dict(map(tuple, other["model"]["vocab"]))
        model["vocab"] += [[token, scores[token]] for token in new]
        return
    model["vocab"] |= {token: start + place for place, token in enumerate(new)}
    if model["type"] == "BPE":
        wanted, known = set(new), {_pair(merge) for merge in model["merges"]}
        strings = bool(model["merges"]) and isinstance(model["merges"][0], str)
        for left, right in map(_pair, other["model"]["merges"]):
            # Only merges that make a new token: others would cut the first one's texts in other ways.
            if left + right in wanted and (left, right) not in known and {left, right} <= model["vocab"].keys():
                model["merges"].append(f"{left} {right}" if strings else [left, right])


def _include_added_tokens(made: Document) -> None:
    """Makes added tokens entries of the vocabulary, too, in place.

    When a tokenizer is read, added tokens that are no entries are numbered behind the vocabulary, whatever their `id`
    says: they would move once it grows.
    """
    model = made["model"]
    entries = sorted(made["added_tokens"], key=lambda entry: int(entry["id"]))
    if model["type"] == "Unigram":
        lowest = min((score for _, score in model["vocab"]), default=0.0) - _PLACEHOLDER_PENALTY
        for entry in entries:
            if entry["id"] == len(model["vocab"]):
                model["vocab"].append([entry["content"], lowest])
    else:
        for entry in entries:
            model["vocab"].setdefault(entry["content"], entry["id"])


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Splits a merge of BPE, which is a text or a pair, depending on the version of the file."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
