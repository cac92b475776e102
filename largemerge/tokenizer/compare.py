"""Whether the output's tokenizer does what the chosen input's does: both are loaded, and encode the same texts.

    files of the output, config ──► a folder for the moment ──► AutoTokenizer ──► encode ─┐
    the input's folder          ──► AutoTokenizer ────────────────────────────► encode ─┴► alike, or a problem

A file that is missing seldom is an error when a tokenizer is loaded: Transformers makes one without a vocabulary then,
for which every word is unknown. So what counts is what comes out.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from largemerge.checkpoint.generation_check import generation_problems
from largemerge.checkpoint.side_files import (
    GENERATION_FILES,
    PROCESSOR_FILES,
    SideFiles,
    auto_tokenizer,
    has_tokenizer,
    is_inside,
    tokenizer_names,
)
from largemerge.checkpoint.tokenizer_check import tokenizer_reason, why_unreadable_here
from largemerge.config_file import WARNING
from largemerge.errors import CheckpointError, shorten
from largemerge.isolation import panics_as_errors
from largemerge.machine import scratch_folder
from largemerge.text_files import read_file
from largemerge.tokenizer.chat_templates import broken_templates
from largemerge.tokenizer.tokenizers import Tokenizer

TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs, 3.14 times.",
    "  Zwölf Boxkämpfer jagen Viktor — naïve façade, Ελληνικά, Привет, 你好世界, こんにちは, مرحبا",
    "def f(x: int) -> str:\n\treturn f'{x:>8}'  # two  spaces\n\n",
    "🙂👩‍👩‍👧 ™ ½ x² \u00a0end",
    "",
)
_MAX_SPECIAL, _TRIALS = 24, 8
_GENERATION_LOG = "transformers.generation.configuration_utils"


def check_output_tokenizer(
    side_files: SideFiles,
    config: Mapping[str, Any],
    expected: Path | Tokenizer,
    *,
    trust_remote_code: bool,
    write: Callable[[Path], None] | None = None,
    written: Path | None = None,
) -> tuple[list[str], list[str]]:
    """Checks that the output's tokenizer loads, and encodes as its source does.

    Args:
        side_files: Files that the output gets from its inputs.
        config: The output's config, which may decide on the tokenizer's class.
        expected: The folder that the tokenizer comes from; or the tokenizer that its files were made for.
        trust_remote_code: Allow it to be code that lies beside it.
        write: Writes files of the tokenizer that no input has, into the output's folder.
        written: The output's folder, once everything has been written; by default the files are copied for the moment.

    Returns:
        Problems and notes.
    """
    with scratch_folder("tokenizer") as made:
        folder = made / side_files.inner
        folder.mkdir(parents=True, exist_ok=True)
        if written is None:
            side_files.copy(made)
            if write is not None:
                write(folder)
        else:
            for path in (written / side_files.inner).iterdir():
                (folder / path.name).symlink_to(path.absolute())
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        problems, notes = compare_tokenizers(folder, expected, trust_remote_code=trust_remote_code)
        source = expected if isinstance(expected, Path) else None
        return [*_broken_files(folder, made, side_files), *_broken_templates(folder, source), *problems], notes


def _broken_files(folder: Path, made: Path, side_files: SideFiles) -> Iterator[str]:
    """Yields what is wrong with the files beside the tokenizer's that go into the output."""
    for name in (*GENERATION_FILES, *PROCESSOR_FILES):
        path = folder / name
        source = side_files.files.get(str(path.relative_to(made)), path)
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            yield f"{source} is not readable JSON: {tokenizer_reason(error)}; mend it, or take it away"
            continue
        if not isinstance(value, dict):
            yield f"{source}: expected keys and values, found {str(value)[:60]}; mend it, or take it away"
        elif name in GENERATION_FILES:
            found = generation_problems(value)
            yield from (f"{source}: {problem}" for problem in found)
            try:
                if not found:
                    with _silent(_GENERATION_LOG):
                        GenerationConfig.from_dict(value)
            except Exception as error:  # it checks its values in many ways
                why = tokenizer_reason(error)
                yield f"{source}: Transformers does not understand it: {why}; mend it, or take it away"


def _broken_templates(folder: Path, source: Path | None) -> Iterator[str]:
    """Yields what is wrong with the chat templates of the output, with the path where one lies as it is."""
    for name, problem in broken_templates(folder):
        where = f"the output's {name}"
        if source is not None and (source / name).is_file():
            same = read_file(source / name).strip() == read_file(folder / name).strip()
            where = str(source / name) if same else where
        yield f"{where}: {problem}; mend it, or set another chat_template"


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keeps a logger silent, whose warnings are about settings that others can have."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def compare_tokenizers(
    made: Path, expected: Path | Tokenizer, *, trust_remote_code: bool = False
) -> tuple[list[str], list[str]]:
    """Compares the output's tokenizer with the one that it should be.

    Args:
        made: Folder with the output's tokenizer and config.
        expected: The folder that its files come from; or the tokenizer that they were made for.
        trust_remote_code: Allow both to be code that lies beside them.

    Returns:
        Problems and notes. Where no class here can load the input's own tokenizer there is nothing to compare with: a
        note.
    """
    if isinstance(expected, Path):
        if not has_tokenizer(expected):
            return [], []
        outside = [name for name in tokenizer_names(expected) if not is_inside(expected / name, expected)]
        if outside:
            lacking = ", ".join(outside)
            return [
                f"the output's tokenizer would lack {lacking}, a link that leads out of {expected}; put a copy there"
            ], []
        try:
            source = auto_tokenizer(expected, trust_remote_code=trust_remote_code)
        except CheckpointError as error:  # a file that no tokenizer could be made of
            return [f"{problem}; mend it, or choose another tokenizer_source" for problem in error.problems], []
        except Exception as error:  # what the many tokenizer classes may raise, nobody has listed
            why = why_unreadable_here(expected, error, trust_remote_code=trust_remote_code)
            if why is None:
                return [
                    f"the tokenizer in {expected} cannot be loaded: {_reason(expected, error)}; mend it, or choose "
                    "another tokenizer_source"
                ], []
            return [], [
                f"{WARNING}the tokenizer in {expected} cannot be loaded ({why}): its files are copied unchecked"
            ]
        encode, vocabulary = _encoder(_without_dropout(source)), _vocabulary(source)
        special = [str(token) for token in source.all_special_tokens]
        where = str(expected)
    else:
        encode, vocabulary = _document_encoder(expected), dict(expected.ids)
        special = list(expected.special.values())
        where = "the vocabulary of the output"
    try:
        found = auto_tokenizer(made, trust_remote_code=trust_remote_code, own_links=True)
    except Exception as error:
        if not isinstance(expected, Path) and expected.document is None:
            why = why_unreadable_here(made, error, trust_remote_code=trust_remote_code)
            if why is not None:
                return [], [f"{WARNING}the output's tokenizer cannot be loaded ({why}): its files are copied unchecked"]
        return [f"the output's tokenizer cannot be loaded, though that of {where} can: {tokenizer_reason(error)}"], []
    _without_dropout(found)
    decode = _document_encoder_of(found) if not isinstance(expected, Path) else _encoder(found)
    for text in _texts(special, vocabulary):
        wanted = _try(encode, text)
        if wanted is None:
            continue  # a class that wants more than text
        got = _try(decode, text)
        if got != wanted:
            if _is_random(encode, text, wanted):
                return [], [
                    f"the tokenizer in {where} encodes a text in many ways, by chance: whether the output's does as "
                    "it is not compared"
                ]
            return [
                f"the output's tokenizer encodes {text[:40]!r} as {_short(got)}, that of {where} as {_short(wanted)}; "
                "a file of it is missing, or its config names another class"
            ], []
    if _vocabulary(found) != vocabulary:
        return [f"the output's tokenizer has other tokens than {where}: a file of it is missing"], []
    return [], []


def _reason(folder: Path, error: Exception) -> str:
    """Says why a tokenizer cannot be loaded; of files without a vocabulary Transformers says what to install."""
    has_document = (folder / "tokenizer.json").is_file()
    if not has_document and (
        "Couldn't instantiate the backend" in str(error) or "`tiktoken` is required" in str(error)
    ):
        names = shorten(", ".join(tokenizer_names(folder)), 200)
        return f"expected a vocabulary, such as tokenizer.json or a SentencePiece model, found none in {names}"
    return tokenizer_reason(error)


def _texts(special: Sequence[str], vocabulary: Mapping[str, int]) -> Iterator[str]:
    """Yields texts that exercise words, digits, accents, code, emoji, special tokens and the vocabulary's ends."""
    yield from TEXTS
    yield f"a {' b '.join(special[:_MAX_SPECIAL])} c{''.join(special[:_MAX_SPECIAL])}"
    ordered = sorted(vocabulary, key=lambda token: vocabulary[token])
    yield " ".join(ordered[-_MAX_SPECIAL:])


def _is_random(encode: Callable[[str], list[int]], text: str, first: list[int]) -> bool:
    """Whether a tokenizer samples: with BPE's dropout, or SentencePiece's sampling."""
    return any(_try(encode, text) != first for _ in range(_TRIALS))


def _without_dropout(tokenizer: Any) -> Any:
    """Switches the dropout of a tokenizer's BPE off, in place: what is left depends on the text alone."""
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "model", None)
    if getattr(model, "dropout", None):
        model.dropout = None
    return tokenizer


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text)["input_ids"])


def _document_encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Encodes by a `tokenizer.json` alone; a tokenizer that is code has none, and is compared by its vocabulary."""
    if tokenizer.document is None:
        return _encoder(None)
    from tokenizers import Tokenizer as Backend

    backend = _without_dropout(Backend.from_str(json.dumps(tokenizer.document)))
    return lambda text: list(backend.encode(text).ids)


def _document_encoder_of(tokenizer: Any) -> Callable[[str], list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _encoder(tokenizer) if backend is None else lambda text: list(backend.encode(text).ids)


def _try(encode: Callable[[str], list[int]], text: str) -> list[int] | None:
    try:
        with panics_as_errors():
            return encode(text)
    except Exception:  # as above
        return None


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    try:
        return dict(tokenizer.get_vocab())
    except Exception:  # a class of bytes has none
        return {}


def _short(ids: Sequence[int] | None) -> str:
    return "nothing" if ids is None else f"{list(ids[:8])}{' …' if len(ids) > 8 else ''}"
