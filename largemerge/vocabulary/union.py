"""One tokenizer with the tokens of several: `tokenizer.json` of the first, with what it lacks of the others.

Tokens of the first keep their numbers; new ones follow, in the order of the models and of their numbers there. What is
part of another's vocabulary becomes part of this one's, with the merges (BPE) or scores (Unigram) that lead to it, so
that text is still cut by the tokenizer's own rules. mergekit makes them *added tokens*, which are cut out of any text
in which their letters stand, words included ("ing", "er"), before the tokenizer sees it. Added tokens stay added ones.
The first one's merges come before the others', so that its texts are cut as before, or into fewer tokens; some tokens
of the others may then never come out of a text, where the first one's merges lead another way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence

from largemerge.vocabulary.tokenizers import Document, document_ids

_PLACEHOLDER_PENALTY = 10.0  # below the lowest score of a Unigram vocabulary: never chosen over another piece


def join_documents(first: Document, others: Mapping[str, Document]) -> tuple[Document, list[str], list[str]]:
    """The first one's `tokenizer.json`, extended.

    Args:
        first: It is left as it is.
        others: By the names of their models.

    Returns:
        The document (equal to `first` if it has all tokens), problems, notes.
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
    """With tokens that the user names, as `add_tokens` of a tokenizer would add them; known ones are left alone."""
    made = copy.deepcopy(document)
    known = document_ids(made)
    for token in tokens:
        if token not in known:
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
            known[token] = max(known.values(), default=-1) + 1
            made["added_tokens"].append({"id": known[token], "content": token, **flags})
    return made


def _regular_tokens(document: Document) -> list[str]:
    """All that are not added, by number."""
    added = {entry["content"] for entry in document["added_tokens"]}
    ids = document_ids(document)
    return sorted((token for token in ids if token not in added), key=lambda token: ids[token])


def _add_added_tokens(made: Document, name: str, other: Document) -> Iterator[str]:
    """Adds what is missing of another's added tokens; yields notes."""
    known = document_ids(made)
    present = {entry["content"]: entry for entry in made["added_tokens"]}
    unlike = []
    next_number = max(known.values(), default=-1) + 1
    for entry in sorted(other["added_tokens"], key=lambda each: int(each["id"])):
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
    """Makes tokens part of the vocabulary."""
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
    """Added tokens become entries of the vocabulary, too.

    When a tokenizer is read, those that are none are numbered behind the vocabulary, whatever their `id` says: they
    would move once it grows.
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
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
