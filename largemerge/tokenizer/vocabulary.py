"""The output's vocabulary: its tokenizer, and which rows of every model's embeddings its tokens get.

`build_vocabulary` reads the models' tokenizers and makes the output's, by the settings: a union, or one of them. Then
`Vocabulary.rows_for` says of one tensor's models which of their rows the output's are made of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from largemerge.checkpoint.locate import locate_checkpoint
from largemerge.checkpoint.sentence_modules import transformer_folder
from largemerge.checkpoint.side_files import has_tokenizer, tokenizer_names
from largemerge.config_file import nearest
from largemerge.errors import ConfigError, LargemergeError
from largemerge.text_files import MAX_FILE_BYTES, read_file
from largemerge.tokenizer.config import BASE, UNION, TokenizerSettings, TokenSource
from largemerge.tokenizer.embedding_rows import Rows, TokenRows, choose_rows, rule_labels
from largemerge.tokenizer.tokenizers import (
    Tokenizer,
    add_plain_tokens,
    join_documents,
    load_tokenizer,
    with_document,
)


@dataclass
class Vocabulary:
    """The output's vocabulary: tokenizer, size, and the rows of its embeddings.

    Attributes:
        tokenizer: The output's tokenizer.
        settings: Settings of the configuration.
        reference: The tokenizer of the model whose config the output has.
        by_model: The tokenizer of every model.
        num_rows: Number of rows of the output's embeddings.
        tensors: Names on disk of tensors with a row for every token.
        notes: What a user should know.
        rows: What `rows_for` has found, by its arguments.
    """

    tokenizer: Tokenizer
    settings: TokenizerSettings
    reference: Tokenizer
    by_model: Mapping[str, Tokenizer]
    num_rows: int
    tensors: frozenset[str]
    notes: list[str]
    rows: dict[Any, TokenRows] = field(default_factory=dict)
    _model_ids: dict[str, Rows] = field(default_factory=dict)

    def rows_for(
        self, models: Sequence[str], num_rows: Mapping[str, int], base: str | None
    ) -> tuple[TokenRows, list[str]]:
        """Chooses the rows that a tensor is made of, and says what is wrong with the settings of single tokens.

        Args:
            models: The models whose tensors are merged, in order.
            num_rows: Number of rows of every model's tensor.
            base: The base, if there is one.
        """
        key = (tuple(models), tuple(num_rows[model] for model in models), base)
        if key in self.rows:
            return self.rows[key], []
        model_ids = {model: self.ids_in(model) for model in models}
        tokens = {}
        for token, settings in self.settings.tokens.items():
            other = self.by_model.get(settings.source.model) if isinstance(settings.source, TokenSource) else None
            tokens[token] = (settings, other.ids if other is not None else None)
        self.rows[key], problems, unused = choose_rows(self.tokenizer.ids, model_ids, num_rows, base, tokens)
        for token in unused:
            note = f"tokenizer.tokens.{token}: all models have it and keep their own; force: true would replace it"
            self.notes += [note] if note not in self.notes else []
        return self.rows[key], problems

    def ids_in(self, model: str) -> Rows:
        """Returns the number that the token of every row of the output has in a model; -1 for none."""
        if model not in self._model_ids:
            numbers = np.full(self.num_rows, -1, dtype=np.int64)
            theirs = self.by_model[model].ids
            for token, number in self.tokenizer.ids.items():
                numbers[number] = theirs.get(token, -1)
            self._model_ids[model] = numbers
        return self._model_ids[model]

    def fingerprint(self) -> dict[str, Any]:
        """Hashes what a merge and its continuation must have in common: files and tokens."""
        files = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.tokenizer.files.items())}
        ids = {
            model: hashlib.sha256(json.dumps(sorted(tokenizer.ids.items())).encode()).hexdigest()
            for model, tokenizer in self.by_model.items()
        }
        return {"files": files, "tokens": ids}

    def to_json(self) -> dict[str, Any]:
        """The vocabulary as plain JSON values."""
        return {
            "source": self.settings.source,
            "tokens": len(self.tokenizer.ids),
            "rows": self.num_rows,
            "fingerprint": self.fingerprint(),
            "embeddings": sorted(self.tensors),
            "rules": [
                {"counts": dict(rows.counts), "tokens": {name: list(some) for name, some in rows.listed.items()}}
                for rows in self._unlike_rows()
            ],
        }

    def summary(self) -> str:
        """Describes the vocabulary for a table: its size, and how many tokens each rule has made."""
        text = f"{len(self.tokenizer.ids)} tokens, {self.num_rows} rows ({self.settings.source})"
        return "\n".join([text, *(line for rows in self._unlike_rows() for line in rule_labels(rows))])

    def _unlike_rows(self) -> list[TokenRows]:
        """Lists rows that differ in their rules; input and output embeddings mostly have the same ones."""
        unlike: list[TokenRows] = []
        for rows in self.rows.values():
            if all(rows.counts != other.counts or rows.listed != other.listed for other in unlike):
                unlike.append(rows)
        return unlike


def build_vocabulary(
    settings: TokenizerSettings,
    folders: Mapping[str, Path],
    base: str | None,
    reference: str,
    tensors: frozenset[str],
    elsewhere: Mapping[str, Path],
    *,
    trust_remote_code: bool = False,
) -> Vocabulary:
    """Reads all tokenizers and makes the output's.

    Args:
        settings: Settings of the configuration.
        folders: Folder of every model's tokenizer, in the order of the models.
        base: The base, if there is one.
        reference: The model whose config the output has.
        tensors: Names on disk of tensors with a row for every token.
        elsewhere: Folders of models that are not merged here, by name; others are located.
        trust_remote_code: Allow tokenizers to be code that lies beside them.

    Raises:
        LargemergeError: If anything is wrong; it lists all of it.
    """
    problems = [
        f"{place}: {model} is not among the models of this merge: {list(folders)}"
        for place, model in settings.models()
        if model not in folders
    ]
    notes: list[str] = []
    first = base if base is not None else next(iter(folders))
    by_model = _load_all(folders, first, problems, notes, trust_remote_code)
    source = settings.source
    outside: Tokenizer | None = None
    if source not in (UNION, BASE, *folders):
        try:
            folder = elsewhere.get(source) or locate_checkpoint(source, source, weights=False)
            folder = folder / transformer_folder(folder, source)
            outside = load_tokenizer(folder, source, trust_remote_code=trust_remote_code)
        except LargemergeError as error:
            hint = nearest(source, [UNION, BASE])
            problems.extend(f"tokenizer source: {problem}{hint}" for problem in error.problems)
    if problems:
        raise LargemergeError(*problems)
    if source == UNION:
        tokenizer = _union(by_model, first, notes)
    else:
        tokenizer = outside or by_model[first if source == BASE else source]
    tokenizer = _with_user_tokens(tokenizer, settings)
    size = max(tokenizer.ids.values()) + 1
    multiple = settings.pad_to_multiple_of or 1
    num_rows = -(-size // multiple) * multiple
    return Vocabulary(tokenizer, settings, by_model[reference], by_model, num_rows, tensors, notes)


def _load_all(
    folders: Mapping[str, Path], first: str, problems: list[str], notes: list[str], trust_remote_code: bool
) -> dict[str, Tokenizer]:
    """Loads the tokenizer of every model; models with the same files share one."""
    by_model: dict[str, Tokenizer] = {}
    loaded: dict[str, Tokenizer] = {}
    for model in dict.fromkeys([first, *folders]):
        folder = folders[model]
        if not has_tokenizer(folder):
            if model == first:
                problems.append(f"{model}: no tokenizer in {folder}, which the output's is made from; put one there")
                return {}
            notes.append(f"{model} has no tokenizer; its tokens are taken to be those of {first}")
            by_model[model] = by_model[first]
            continue
        key = _files_key(folder)
        try:
            if key not in loaded:
                loaded[key] = load_tokenizer(folder, model, trust_remote_code=trust_remote_code)
            by_model[model] = loaded[key]
        except LargemergeError as error:
            problems.extend(error.problems)
            if model == first:
                return {}
    return {model: by_model[model] for model in folders if model in by_model}


def compare_by_number(
    folders: Mapping[str, Path], *, always: bool, trust_remote_code: bool = False
) -> tuple[int, str | None]:
    """Compares tokenizers by their tokens' numbers, for models whose rows are merged by number.

    Args:
        folders: Folder of every model's tokenizer; those without one are passed over.
        always: Load the tokenizer even if all models have the same files.
        trust_remote_code: Allow tokenizers to be code of their own.

    Returns:
        The number of rows that the tokens need, 0 where no tokenizer was loaded; and what differs, in words, `None`
        where the same number is the same token everywhere.
    """
    keys = {model: _files_key(folder, with_config=False) for model, folder in folders.items() if has_tokenizer(folder)}
    if not always and len(set(keys.values())) < 2:
        return 0, None
    loaded: dict[str, Mapping[str, int]] = {}
    by_model: dict[str, Mapping[str, int]] = {}
    for model, key in keys.items():
        folder = folders[model]
        if key not in loaded:
            try:
                loaded[key] = load_tokenizer(folder, model, trust_remote_code=trust_remote_code).ids
            except LargemergeError:
                return 0, None  # which is told where the tokenizer is copied
        by_model[model] = loaded[key]
    tokens: dict[int, tuple[str, str]] = {}
    clashes = []
    for model, ids in by_model.items() if len(loaded) > 1 else ():
        for token, number in ids.items():
            other, theirs = tokens.setdefault(number, (model, token))
            if theirs != token:
                clashes.append(f"{number} is {theirs!r} in {other}, {token!r} in {model}")
    needed = max((number + 1 for ids in loaded.values() for number in ids.values()), default=0)
    if not clashes:
        return needed, None
    return needed, f"{len(clashes)} numbers are other tokens, such as {clashes[0]}"


def _files_key(folder: Path, *, with_config: bool = True) -> str:
    """Hashes the files that make a folder's tokenizer what it is; the config may decide on its class."""
    digest = hashlib.sha256()
    for name in (*tokenizer_names(folder), *(["config.json"] if with_config else [])):
        path = folder / name
        content = read_file(path, max_bytes=MAX_FILE_BYTES) if path.is_file() else b""
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _union(by_model: Mapping[str, Tokenizer], first: str, notes: list[str]) -> Tokenizer:
    """Unites the tokenizers of all models; the first one's tokens keep their numbers."""
    base = by_model[first]
    others = {
        model: tokenizer
        for model, tokenizer in by_model.items()
        if tokenizer is not base and any(token not in base.ids for token in tokenizer.ids)
    }
    if not others:
        return base
    code = [model for model in (first, *others) if by_model[model].document is None]
    if code:
        raise ConfigError(
            *(f"tokenizer source: union: the tokenizer of {model} has no tokenizer.json" for model in code)
        )
    assert base.document is not None
    documents = {model: tokenizer.document for model, tokenizer in others.items() if tokenizer.document is not None}
    document, problems, more = join_documents(base.document, documents)
    if problems:
        raise ConfigError(*problems)
    notes += more
    return with_document(base, document, "union")


def _with_user_tokens(tokenizer: Tokenizer, settings: TokenizerSettings) -> Tokenizer:
    """Adds the tokens that have settings and that the tokenizer lacks."""
    new = [token for token in settings.tokens if token not in tokenizer.ids]
    if not new:
        return tokenizer
    if tokenizer.document is None:
        raise ConfigError(f"tokenizer.tokens: {new[0]!r} cannot be added to a tokenizer without tokenizer.json")
    return with_document(tokenizer, add_plain_tokens(tokenizer.document, new), "tokenizer.tokens")
