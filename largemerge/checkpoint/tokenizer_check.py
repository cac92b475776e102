"""Checks of a tokenizer's files that come before its library sees them, and a trial of the tokenizer made of them.

    files ──► check_tokenizer_files: JSON, types, numbers of tokens ──► AutoTokenizer ──► try_tokenizer: it encodes

The library is written in Rust, and takes what a file says: a token numbered 4·10⁹ makes a table of as many entries, a
padding of a billion is padded, and some mistakes end as panics while a text is encoded. What it refuses is a mistake in
the files, but for the few cases in which this machine lacks what would read them (`why_unreadable_here`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from largemerge.errors import CheckpointError, shorten
from largemerge.isolation import PANIC, why_it_fails
from largemerge.text_files import brief, read_text

MAX_GAP, MAX_PADDING = 1_000_000, 10_000_000
"""Numbers that a vocabulary may leave out, and tokens that a tokenizer may pad a text to."""

MAX_TOKEN = 10_000
"""Characters of a token; a special one of a million takes the library half a minute at each text."""

TEMPLATE_FOLDER = "additional_chat_templates"
_NUMBERED = ("added_tokens.json", "vocab.json")
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json", *_NUMBERED)
_TEXTS = ("The quick brown fox, 3.14.", "  Zwölf Boxkämpfer — 你好 🙂\n\tif x: y", "", "a")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PARTS: Mapping[str, str] = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
"""Parts of a `tokenizer.json`, and the key under which a sequence of them lists others."""
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
    table = folder / "vocab.txt"
    if table.is_file() and not table.stat().st_size and not (folder / "tokenizer.json").is_file():
        problems.append(f"{table}: expected a token on every line, found none")
    for path in (folder / "chat_template.jinja", *sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))):
        if path.is_file():
            try:
                read_text(path)
            except CheckpointError as error:
                problems += error.problems
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
        why = why_it_fails(lambda: _encode_all(tokenizer), _SECONDS)
        if why is not None and why.startswith(PANIC):
            why = (
                f"the library `tokenizers` panics ({why.removeprefix(PANIC).strip(': ')}); expected a normalizer that "
                "replaces no empty text, and a post_processor whose special tokens are all listed"
            )
        _TRIED[key] = why
    return _TRIED[key]


_TRIED: dict[str, str | None] = {}
"""Hash of files → what came out, so that the same files of several models are tried once."""


def tokenizer_reason(error: BaseException) -> str:
    """Says in one line why a tokenizer cannot be loaded, for an error of almost any type."""
    line = shorten((str(error).strip().splitlines() or [""])[0], 200)
    unknown = re.search(r"untagged enum (\w+)", line)
    if unknown is not None:
        part = re.sub("^Py|(?:Untagged|Wrapper)+$", "", unknown[1])
        return f"tokenizer.json: its part of the kind {part} is not one that this version of `tokenizers` knows"
    line = line.replace("Oniguruma error:", "a regular expression is wrong:")
    if isinstance(error, KeyError) and error.args:
        return f"tokenizer.json, or another of its files, lacks the key {brief(error.args[0])}"
    if re.search(r" at line \d+ column \d+$", line):
        return f"tokenizer.json: {line}"
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def why_unreadable_here(folder: Path, error: BaseException, *, trust_remote_code: bool = False) -> str | None:
    """Says why a tokenizer that cannot be loaded may be right all the same: what would read it is not here.

    Args:
        folder: Folder of the tokenizer.
        error: What `AutoTokenizer` has raised.
        trust_remote_code: Whether code beside the tokenizer may be run.

    Returns:
        The reason: a kind of part that this version of `tokenizers` does not know, a class that Transformers does not
        have, a package that is missing, code that is not trusted, a format of mistral-common; `None` if there is none,
        so that the files are wrong.
    """
    settings, config = _object(folder / "tokenizer_config.json"), _object(folder / "config.json")
    has_document = (folder / "tokenizer.json").is_file()
    if not trust_remote_code and "trust_remote_code" in str(error):
        return "it is code, which runs with trust_remote_code: true alone"
    if has_document and "untagged enum" in str(error):
        unknown = list(_unknown_parts(_object(folder / "tokenizer.json")))
        if unknown:
            return f"tokenizer.json: this version of `tokenizers` does not know {', '.join(dict.fromkeys(unknown))}"
    package = _missing_package(folder, error)
    if package is not None:
        return f"it needs {package}, which is not installed"
    if has_document:
        return None  # which is read without a class of its own
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if isinstance(name, str) and not _has_class(name):
        return f"this version of Transformers does not have the class {shorten(name)}"
    kind = config.get("model_type")
    if name is None and not (isinstance(kind, str) and _knows_model(kind)):
        return f"this version of Transformers does not know the model_type {brief(kind)}"
    return tokenizer_reason(error) if (folder / "tekken.json").is_file() else None


def _object(path: Path) -> Mapping[str, Any]:
    """Reads keys and values from a file that has been checked; none where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, Mapping) else {}


def _unknown_parts(document: Mapping[str, Any]) -> Iterator[str]:
    """Yields the types that a `tokenizer.json` names and the library here does not have."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    modules = {
        "normalizer": normalizers,
        "pre_tokenizer": pre_tokenizers,
        "post_processor": processors,
        "decoder": decoders,
        "model": models,
    }
    for key, module in modules.items():
        for where, part in _parts(key, document.get(key), _PARTS.get(key, "")):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and not hasattr(module, kind):
                yield f"the {key} {kind!r}" if where == key else f"the {key} {kind!r} ({where})"


def _parts(where: str, part: Any, inside: str) -> Iterator[tuple[str, Any]]:
    """Yields a part of a `tokenizer.json` and those that it lists, with their places."""
    waiting = [(where, part)]
    while waiting:
        place, each = waiting.pop()
        yield place, each
        listed = each.get(inside) if isinstance(each, Mapping) else None
        if isinstance(listed, list):
            waiting += [(f"{place}.{inside}[{number}]", entry) for number, entry in enumerate(listed)]


_PACKAGES = re.compile(
    r"(?:pip install|requires the|need to install|need to have) `?([A-Za-z][\w.-]*)(?: or (\w+) installed)?"
)
_IMPORT_NAMES = {"protobuf": "google.protobuf"}


def _missing_package(folder: Path, error: BaseException) -> str | None:
    """Names the package without which a tokenizer cannot be loaded, as far as an error says so."""
    chain: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in chain:
        chain.append(now)
        now = now.__cause__ or now.__context__
    for each in chain:
        named = [name for found in _PACKAGES.findall(str(each)) for name in found]
        if isinstance(each, ImportError) and each.name:
            named = [each.name]
        for name in filter(None, named):
            root = name.split(".")[0]
            if root == "tiktoken" and not _has_tiktoken_table(folder):
                continue  # which Transformers tries where a SentencePiece model is broken
            if root == "sentencepiece" and not [*folder.glob("*.model*"), *folder.glob("*.spm")]:
                continue  # nor would it help where there is no vocabulary at all
            if not _is_installed(_IMPORT_NAMES.get(name, name)):
                return str(name)
    return None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name.replace("-", "_")) is not None
    except (ImportError, ValueError):
        return False


def _has_tiktoken_table(folder: Path) -> bool:
    """Whether a file of a folder is tiktoken's: lines of a token in base64 and its number."""
    for path in sorted({*folder.glob("*.model*"), *folder.glob("*.tiktoken")}):
        with path.open("rb") as file:
            if re.match(rb"[A-Za-z0-9+/]+=* \d+\s*$", file.readline(MAX_TOKEN)):
                return True
    return False


def _has_class(name: str) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    try:
        return tokenizer_class_from_name(name) is not None
    except Exception:  # a class that is here, and cannot be imported
        return True


def _knows_model(kind: str) -> bool:
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


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
        return tuple(_vocabulary_problems(name, value))
    if name == "special_tokens_map.json":
        return tuple(_special_problems(value))
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


def _vocabulary_problems(name: str, value: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with `added_tokens.json` or `vocab.json`, which may hold a vocabulary for each language."""
    if name == "vocab.json" and not value:
        yield "expected tokens and their numbers, found none"
    if name == "vocab.json" and value and all(isinstance(each, Mapping) for each in value.values()):
        for language, ids in value.items():
            yield from _number_problems(f"{language}.", ids, len(ids))
    else:
        yield from _number_problems("", value, len(value))


def _document_problems(document: Mapping[str, Any]) -> Iterator[str]:
    model, added = document.get("model"), document.get("added_tokens", [])
    if not isinstance(model, Mapping):
        yield f"model: expected keys and values, found {brief(model)}"
        return
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, Mapping | list):
        yield f"model.vocab: expected tokens and their numbers, found {brief(vocabulary)}"
        return
    if not vocabulary:
        yield "model.vocab: expected tokens and their numbers, found none"
        return
    for key, inside in _PARTS.items():
        for where, part in _parts(key, document.get(key), inside):
            yield from _part_problems(where, part, is_listed=where != key)
    yield from _model_problems(model, vocabulary)
    size = len(vocabulary) + (len(added) if isinstance(added, list) else 0)
    if isinstance(vocabulary, Mapping):
        yield from _number_problems("model.vocab.", vocabulary, size)
        yield from _twice_problems(vocabulary)
    if added is not None and not isinstance(added, list):
        yield f"added_tokens: expected a list, found {brief(added)}"
        added = None
    for place, entry in enumerate(added or ()):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            yield f"added_tokens[{place}]: expected a token with 'id' and 'content', found {brief(entry)}"
        else:
            yield from _number_problems(f"added_tokens[{place}]: ", {entry["content"]: entry.get("id")}, size)
    yield from _post_processor_problems(document.get("post_processor"), vocabulary, added or ())
    yield from _padding_problems(document.get("padding"))
    yield from _truncation_problems(document.get("truncation"))


def _part_problems(where: str, part: Any, *, is_listed: bool) -> Iterator[str]:
    """Yields what is wrong with a part, whatever its kind: old files have parts without a type."""
    if part is None and not is_listed:
        return
    if not isinstance(part, Mapping):
        yield f"{where}: expected keys and values with a 'type', found {brief(part)}"
    elif not isinstance(part.get("type", ""), str):
        yield f"{where}.type: expected a name, found {brief(part['type'])}"


def _model_problems(model: Mapping[str, Any], vocabulary: Collection[Any]) -> Iterator[str]:
    if not isinstance(model.get("type", ""), str):
        yield f"model.type: expected a name, found {brief(model['type'])}"
    dropout = model.get("dropout")
    if dropout is not None and (isinstance(dropout, bool) or not isinstance(dropout, int | float)):
        yield f"model.dropout: expected a number from 0 to 1, found {brief(dropout)}"
    elif dropout is not None and not 0 <= dropout <= 1:
        yield f"model.dropout: expected a number from 0 to 1, found {dropout}"
    merges = model.get("merges")
    if merges is None or not isinstance(vocabulary, Mapping):
        return
    if not isinstance(merges, list):
        yield f"model.merges: expected a list of pairs of tokens, found {brief(merges)}"
        return
    for place, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            yield f"model.merges[{place}]: expected a pair of tokens, found {brief(merge)}"
            return
        if pair[0] not in vocabulary or pair[1] not in vocabulary:
            lacking = pair[1] if pair[0] in vocabulary else pair[0]
            yield f"model.merges[{place}]: expected tokens of model.vocab, found {brief(lacking)}"
            return


def _post_processor_problems(
    processor: Any, vocabulary: Mapping[str, Any] | Sequence[Any], added: Sequence[Any]
) -> Iterator[str]:
    """Yields the special tokens of a post-processor whose numbers are beyond the vocabulary."""
    numbers = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else [len(vocabulary) - 1]
    numbers += [entry.get("id") for entry in added if isinstance(entry, Mapping)]
    most = max((number for number in numbers if isinstance(number, int)), default=0)
    for where, part in _parts("post_processor", processor, _PARTS["post_processor"]):
        if not isinstance(part, Mapping):
            continue
        ids = [(key, each) for key in ("sep", "cls") if isinstance(part.get(key), list) for each in part[key][1:2]]
        listed = part.get("special_tokens")
        for token, entry in listed.items() if isinstance(listed, Mapping) else ():
            found = entry.get("ids") if isinstance(entry, Mapping) else None
            ids += [(f"special_tokens.{token}", each) for each in (found if isinstance(found, list) else ())]
        for key, each in ids:
            if isinstance(each, int) and each > most:
                yield f"{where}.{key}: expected a number of the vocabulary, {most} at most, found {each}"


def _twice_problems(ids: Mapping[str, Any]) -> Iterator[str]:
    """Yields the first number that two tokens of a vocabulary have."""
    numbers = [number for number in ids.values() if isinstance(number, int)]
    if len(set(numbers)) == len(numbers):
        return
    known: dict[int, str] = {}
    for token, number in ids.items():
        if isinstance(number, int) and known.setdefault(number, token) != token:
            yield (
                f"model.vocab: expected a number of its own for every token, found {number} for {brief(known[number])} "
                f"and {brief(token)}"
            )
            return


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


def _truncation_problems(truncation: Any) -> Iterator[str]:
    if not isinstance(truncation, Mapping):
        return
    stride, most = truncation.get("stride"), truncation.get("max_length")
    if isinstance(stride, int) and isinstance(most, int) and stride and stride >= most:
        yield f"truncation.stride: expected less than max_length ({most}), found {stride}"


def _special_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with special tokens, by role or in lists."""
    for role in _ROLES:
        if settings.get(role) is not None and not _is_token(settings[role]):
            yield f"{role}: expected a text, or a token with 'content', found {brief(settings[role])}"
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key)
        tokens = list(value.values()) if isinstance(value, Mapping) else value
        if value is not None and not (isinstance(tokens, list) and all(map(_is_token, tokens))):
            yield f"{key}: expected a list of tokens, or names and tokens, found {brief(value)}"


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("content"), str))


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
    yield from _special_problems(settings)
    for key in ("padding_side", "truncation_side"):
        if settings.get(key) not in (None, "left", "right"):
            yield f"{key}: expected 'left' or 'right', found {brief(settings[key])}"
    name, split = settings.get("tokenizer_class"), settings.get("split_special_tokens")
    if name is not None and not isinstance(name, str):
        yield f"tokenizer_class: expected the name of a class, found {brief(name)}"
    if split is not None and not isinstance(split, bool):
        yield f"split_special_tokens: expected true or false, found {brief(split)}"
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
