"""Checks of a tokenizer's files that come before its library sees them, and a trial of the tokenizer made of them.

    files ──► check_tokenizer_files: JSON, types, numbers of tokens ──► AutoTokenizer ──► try_tokenizer: it encodes

The library is written in Rust, and takes what a file says: a token numbered 4·10⁹ makes a table of as many entries, a
padding of a billion is padded, and some mistakes end as panics while a text is encoded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from largemerge.errors import CheckpointError, shorten
from largemerge.isolation import why_it_fails
from largemerge.text_files import brief

MAX_GAP, MAX_PADDING = 1_000_000, 10_000_000
"""Numbers that a vocabulary may leave out, and tokens that a tokenizer may pad a text to."""

MAX_TOKEN = 10_000
"""Characters of a token; a special one of a million takes the library half a minute at each text."""

_NUMBERED = ("added_tokens.json", "vocab.json")
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json", *_NUMBERED)
_TEXTS = ("The quick brown fox, 3.14.", "  Zwölf Boxkämpfer — 你好 🙂\n\tif x: y", "", "a")
_SECONDS = 10.0
_MAX_PROBLEMS = 10


def check_tokenizer_files(folder: Path) -> None:
    """Checks the files of a tokenizer, as far as they are JSON; what classes of Transformers check is left to them.

    Raises:
        CheckpointError: If a file is broken, or numbers tokens as no vocabulary does; it names all mistakes.
    """
    problems = []
    for name in ("tokenizer.json", *_OBJECTS):
        path = folder / name
        if path.is_file():
            problems += [f"{path}: {problem}" for problem in _problems_of(name, path.read_bytes())]
    if problems:
        raise CheckpointError(*problems[:_MAX_PROBLEMS])


def try_tokenizer(tokenizer: Any, files: Sequence[Path]) -> str | None:
    """Lets a tokenizer encode some texts in a process of its own.

    Args:
        tokenizer: A Transformers tokenizer.
        files: What it was made of: a tokenizer of the same files is tried once.

    Returns:
        Why it fails, if it ends its process, never returns, or panics; `None` if it does not. A class that raises an
        ordinary error may want more than a text.
    """
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    key = digest.hexdigest()
    if key not in _TRIED:
        if len(_TRIED) > 100:
            _TRIED.clear()
        _TRIED[key] = why_it_fails(lambda: _encode_all(tokenizer), _SECONDS)
    return _TRIED[key]


_TRIED: dict[str, str | None] = {}
"""Hash of files → what came out, so that the same files of several models are tried once."""


def tokenizer_reason(error: BaseException) -> str:
    """Says in one line why a tokenizer cannot be loaded, for an error of almost any type."""
    line = shorten((str(error).strip().splitlines() or [""])[0], 200)
    unknown = re.search(r"untagged enum (\w+)", line)
    if unknown is not None:
        part = re.sub("(?:Untagged|Wrapper)+$", "", unknown[1])
        return f"tokenizer.json: its part of the kind {part} is not one that this version of `tokenizers` knows"
    if re.search(r" at line \d+ column \d+$", line):
        return f"tokenizer.json: {line}"
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _encode_all(tokenizer: Any) -> None:
    for text in _TEXTS:
        try:
            tokenizer(text)
        except Exception:  # an ordinary error is told where the tokenizer is used
            continue


@functools.lru_cache(maxsize=32)
def _problems_of(name: str, content: bytes) -> tuple[str, ...]:
    """Finds what is wrong with one file; kept, as several models often have the same files."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        return ("nested too deeply; expected the JSON of a tokenizer",)
    except ValueError as error:
        return (f"not readable as JSON: {error}",)
    if not isinstance(value, dict):
        return (f"expected keys and values, found {brief(value)}",)
    if any(len(text) > MAX_TOKEN for text in _tokens(value)):
        longest = max(_tokens(value), key=len)
        return (f"expected tokens of {MAX_TOKEN:,} characters at most, found {shorten(repr(longest))}",)
    if name == "tokenizer.json":
        return tuple(_document_problems(value))
    if name in _NUMBERED:
        return tuple(_number_problems("", value, len(value)))
    return tuple(_settings_problems(value)) if name == "tokenizer_config.json" else ()


def _tokens(value: Mapping[str, Any]) -> Iterator[str]:
    """Yields the texts of tokens that a file of a tokenizer may name, the vocabulary's, added and special ones."""
    model = value.get("model")
    inside = model if isinstance(model, Mapping) else {}
    for part in (value, inside, inside.get("vocab")):
        if isinstance(part, Mapping):
            yield from part
        elif isinstance(part, list):
            yield from (entry[0] for entry in part if isinstance(entry, list) and entry and isinstance(entry[0], str))
    special = [part[key] for part in (value, inside) for key in part if key.endswith(("_token", "special_tokens"))]
    waiting = [*special, value.get("added_tokens_decoder"), value.get("added_tokens")]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _document_problems(document: Mapping[str, Any]) -> Iterator[str]:
    model, added = document.get("model"), document.get("added_tokens", [])
    if not isinstance(model, Mapping):
        yield f"model: expected keys and values, found {brief(model)}"
        return
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, Mapping | list):
        yield f"model.vocab: expected tokens and their numbers, found {brief(vocabulary)}"
        return
    size = len(vocabulary) + (len(added) if isinstance(added, list) else 0)
    if isinstance(vocabulary, Mapping):
        yield from _number_problems("model.vocab.", vocabulary, size)
    if added is not None and not isinstance(added, list):
        yield f"added_tokens: expected a list, found {brief(added)}"
        added = None
    for place, entry in enumerate(added or ()):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            yield f"added_tokens[{place}]: expected a token with 'id' and 'content', found {brief(entry)}"
        else:
            yield from _number_problems(f"added_tokens[{place}]: ", {entry["content"]: entry.get("id")}, size)
    yield from _padding_problems(document.get("padding"))


def _number_problems(where: str, ids: Mapping[str, Any], size: int) -> Iterator[str]:
    """Yields what is wrong with the numbers of tokens, one mistake of each kind."""
    most = 2 * size + MAX_GAP
    told = set()
    for token, number in ids.items():
        if isinstance(number, bool) or not isinstance(number, int):
            kind, found = "type", f"expected a whole number, found {brief(number)}"
        elif not 0 <= number <= most:
            kind, found = "size", f"expected a number from 0 to {most} among {size} tokens, found {number}"
        else:
            continue
        if kind not in told:
            told.add(kind)
            yield f"{where}{brief(token)}: {found}"


def _padding_problems(padding: Any) -> Iterator[str]:
    if not isinstance(padding, Mapping):
        return
    strategy = padding.get("strategy")
    fixed = strategy.get("Fixed") if isinstance(strategy, Mapping) else None
    for key, value in (("strategy.Fixed", fixed), ("pad_to_multiple_of", padding.get("pad_to_multiple_of"))):
        if isinstance(value, int) and not 0 <= value <= MAX_PADDING:
            yield f"padding.{key}: expected a number from 0 to {MAX_PADDING}, found {value}"


def _settings_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    limit = settings.get("model_max_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit != limit):
        yield f"model_max_length: expected a number, found {brief(limit)}"
    template = settings.get("chat_template")
    if template is not None and not _is_template(template):
        yield f"chat_template: expected a text, or a list of names and templates, found {brief(template)}"
    names = settings.get("model_input_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        yield f"model_input_names: expected a list of names, found {brief(names)}"
    decoder = settings.get("added_tokens_decoder")
    if decoder is None:
        return
    if not isinstance(decoder, Mapping):
        yield f"added_tokens_decoder: expected numbers and tokens, found {brief(decoder)}"
        return
    for number, token in decoder.items():
        if not number.isascii() or not number.isdigit() or len(number) > 9:
            yield f"added_tokens_decoder: expected the number of a token, found {brief(number)}"
            return
        if not isinstance(token, Mapping) or not isinstance(token.get("content"), str):
            yield f"added_tokens_decoder.{number}: expected a token with 'content', found {brief(token)}"
            return


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(each, Mapping) and isinstance(each.get("name"), str) and isinstance(each.get("template"), str)
            for each in value
        )
    if isinstance(value, Mapping):
        return all(isinstance(each, str) for each in value.values())
    return isinstance(value, str)
