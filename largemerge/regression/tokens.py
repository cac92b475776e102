"""Models whose vocabularies differ: rows of embeddings and token ids, brought to those of the output.

    tokenizers, rows ──► open_tokens ──► Tokens, or None where there is nothing to do

    Tokens.arranged    a checkpoint as if its embeddings had the output's rows; everything else goes by that
    ArrangedReader     reads a model's embeddings in the order of the output's tokens, for forward passes
    Tokens.read_rows   all models' rows in that order, for averages
    Tokens.map_ids     a candidate's token ids → the output's, in its calibration data

Three things can be the case. All vocabularies are the same, and so is the number of rows: nothing is done. All are the
same, but some models have more rows than others, which are padding (Llama 3.2: 128256 and 128320): rows are matched by
number, and the output has the base's number of them. Vocabularies differ: rows are matched by token, as the settings
`tokenizer_source` and `tokenizer` say. Without a setting such models are refused, unless all have as many rows: then
rows are averaged by number, as in data-free merges, and a note says which tokens that mixes.

A text goes through its candidate's own tokenizer, and only then are ids mapped. So a candidate's blocks see what they
would see in the candidate itself, and ids in the config (padding, images) mean the output's tokens everywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from largemerge.calibration import CalibrationSet, ForwardSignature
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.side_files import TOKENIZER_FILES, has_tokenizer, set_vocabulary_size
from largemerge.checkpoint.tensor_files import Rows as StoredRows
from largemerge.errors import CalibrationError, CheckpointError, ConfigError, LargemergeError
from largemerge.model.classes import token_parameters
from largemerge.model.key_mapping import KeyMapping
from largemerge.model.skeleton import Skeleton
from largemerge.text_files import MAX_FILE_BYTES, read_file
from largemerge.text_files import read_json as read_json_file
from largemerge.tokenizer.config import TokenizerSettings
from largemerge.tokenizer.embedding_rows import Rows, TokenReader, TokenRows, rows_by_number, rule_labels
from largemerge.tokenizer.token_ids import move_ids, sideways_tensors
from largemerge.tokenizer.tokenizers import Tokenizer, load_tokenizer
from largemerge.tokenizer.vocabulary import Vocabulary, build_vocabulary

BASE = "base"
_MAX_LISTED = 5
_VOCABULARY_FILES = tuple(name for name in TOKENIZER_FILES if "template" not in name and "config" not in name)


@dataclass
class Tokens:
    """How the rows and token ids of all models are brought to the output's.

    Attributes:
        vocabulary: The output's vocabulary, where rows are matched by token; `None` where they are matched by number.
        num_rows: Number of rows of the output's embeddings.
        parameters: Names of the parameters with a row for every token, in the module.
        input_parameter: Name of the input embeddings.
        on_disk: Model → name on disk of such a tensor → its number of rows there.
        ids: Model → its tokens and their ids.
        notes: What the user should know.
        unknown: Candidate → ids in its calibration data that are no tokens of the output, in the order of their
            stand-ins, which follow the output's last id.
    """

    vocabulary: Vocabulary | None
    num_rows: int
    parameters: frozenset[str]
    input_parameter: str
    on_disk: Mapping[str, Mapping[str, int]]
    ids: Mapping[str, Mapping[str, int]]
    notes: list[str] = field(default_factory=list)
    unknown: dict[str, list[int]] = field(default_factory=dict)
    _by_number: dict[Any, TokenRows] = field(default_factory=dict)

    def arranged(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as if its embeddings had the output's rows, with the output's token ids in its config."""
        keys = self.on_disk.get(checkpoint.name, {})
        tensors = {
            key: dataclasses.replace(info, shape=(self.num_rows, *info.shape[1:])) if key in keys else info
            for key, info in checkpoint.tensors.items()
        }
        config = copy.deepcopy(dict(checkpoint.config))
        self.adapt(checkpoint.name, config)
        return dataclasses.replace(checkpoint, tensors=tensors, config=config)

    def stored(self, checkpoint: Checkpoint, original: Checkpoint) -> Checkpoint:
        """An arranged checkpoint with its embeddings as they lie on disk."""
        keys = self.on_disk.get(checkpoint.name, {})
        return dataclasses.replace(
            checkpoint, tensors={**checkpoint.tensors, **{key: original.tensors[key] for key in keys}}
        )

    @property
    def all_notes(self) -> list[str]:
        """What the user should know, of the vocabulary and of the data."""
        return [*(self.vocabulary.notes if self.vocabulary is not None else ()), *self.notes]

    def adapt(self, model: str, config: dict[str, Any]) -> None:
        """Sets the rows of the embeddings in a model's config, and the numbers of tokens that have moved."""
        for before in set(self.on_disk.get(model, {}).values()):
            set_vocabulary_size(config, before, self.num_rows)
        if self.vocabulary is not None:
            move_ids(config, self.ids[model], self.vocabulary.tokenizer.ids, self.vocabulary.tokenizer.special)

    def rows_of(self, models: Sequence[str], keys: Mapping[str, str]) -> TokenRows:
        """The rows that a tensor is made of.

        Args:
            models: The models that have the tensor, in order.
            keys: Its name on disk in each of them.

        Raises:
            ConfigError: If the settings of single tokens ask for a row that is not there.
        """
        num_rows = {model: self.on_disk[model][keys[model]] for model in models}
        base = BASE if BASE in models else None
        if self.vocabulary is None:
            key = tuple(num_rows.items())
            if key not in self._by_number:
                self._by_number[key] = rows_by_number(num_rows, self.num_rows, base)
            return self._by_number[key]
        rows, problems = self.vocabulary.rows_for(models, num_rows, base)
        if problems:
            raise ConfigError(*problems)
        return rows

    def own_rows(self, model: str, key: str) -> Rows:
        """The row of a model's tensor for every row of the output `[rows]`; -1 where it has none."""
        rows = self.on_disk[model][key]
        numbers = np.arange(self.num_rows) if self.vocabulary is None else self.vocabulary.ids_in(model)
        return np.where(numbers < rows, numbers, -1)

    def map_ids(self, data: CalibrationSet, *, takes_unknown: bool) -> CalibrationSet:
        """Gives a candidate's calibration data the output's token ids.

        Args:
            data: The data, in the candidate's own ids.
            takes_unknown: Whether tokens that the output lacks get stand-ins, for which the candidate's own embeddings
                are read; else they are a mistake.

        Raises:
            CalibrationError: If an id is no row of the candidate, or no token of the output.
        """
        table = self._table(data.name)
        unknown: list[int] = []
        count = total = 0
        for batch in data.batches:
            for name in [name for name in batch.inputs if name.endswith("input_ids")]:
                ids = batch.inputs[name]
                if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(table)):
                    raise CalibrationError(
                        f"candidate {data.name!r}: {name} holds token ids from {int(ids.min())} to {int(ids.max())}; "
                        f"expected 0 to {len(table) - 1}, for its embeddings have {len(table)} rows"
                    )
                missing = ids[(table[ids] < 0) & not_padding(batch.inputs, name)]
                total, count = total + ids.numel(), count + missing.numel()
                unknown += [number for number in sorted(set(missing.tolist())) if number not in unknown]
        if unknown and not takes_unknown:
            raise CalibrationError(f"candidate {data.name!r}: {self._unknown_text(data.name, unknown, count, total)}")
        self.unknown[data.name] = unknown
        for place, number in enumerate(unknown):
            table[number] = self.num_rows + place
        table[table < 0] = self._padding_id()  # only padding is left of these
        if unknown:
            text = self._unknown_text(data.name, unknown, count, total).partition(";")[0]
            self.notes.append(f"{data.name}: {text}; its own embeddings of them are used")
        batches = tuple(
            dataclasses.replace(
                batch,
                inputs={name: table[x] if name.endswith("input_ids") else x for name, x in batch.inputs.items()},
            )
            for batch in data.batches
        )
        return dataclasses.replace(data, batches=batches)

    def _table(self, model: str) -> torch.Tensor:
        """The output's id for every id of a model; -1 where the output has no such token."""
        size = max(self.on_disk[model].values())
        if self.vocabulary is None:
            numbers = torch.arange(size)
            return torch.where(numbers < self.num_rows, numbers, -1)
        table = torch.full((size,), -1, dtype=torch.int64)
        for token, number in self.ids[model].items():
            if number < size:
                table[number] = self.vocabulary.tokenizer.ids.get(token, -1)
        return table

    def _padding_id(self) -> int:
        """The output's token for padding; 0 where it has none."""
        if self.vocabulary is None:
            return 0
        made = self.vocabulary.tokenizer
        return made.ids.get(made.special.get("pad_token", ""), 0)

    def _unknown_text(self, model: str, unknown: Sequence[int], count: int, total: int) -> str:
        tokens = {number: token for token, number in self.ids[model].items()}
        some = ", ".join(repr(tokens.get(number, number)) for number in unknown[:_MAX_LISTED])
        more = ", …" if len(unknown) > _MAX_LISTED else ""
        return (
            f"{count} of {total} tokens of its calibration data are not in the output's vocabulary ({some}{more}); set "
            "tokenizer_source: union, or take texts without them"
        )

    def own_embeddings(self, model: str, key: str, arranged: torch.Tensor, reader: TensorReader) -> torch.Tensor:
        """Adds a candidate's rows of tokens that the output lacks below its arranged embeddings."""
        unknown = self.unknown.get(model)
        if not unknown:
            return arranged
        return torch.cat([arranged, reader.read(key, torch.tensor(unknown)).to(arranged.dtype)])

    def fingerprint(self) -> dict[str, Any]:
        """What a merge and its continuation must have in common."""
        ids = {
            model: hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()
            for model, tokens in self.ids.items()
        }
        made = self.vocabulary.fingerprint() if self.vocabulary is not None else {"tokens": ids}
        return {
            "rows": self.num_rows,
            "rows of models": {name: dict(keys) for name, keys in self.on_disk.items()},
            **made,
        }

    def to_json(self) -> dict[str, Any]:
        """The vocabulary as plain JSON values."""
        rows = {model: max(keys.values()) for model, keys in self.on_disk.items()}
        if self.vocabulary is not None:
            return {**self.vocabulary.to_json(), "rows_of_models": rows}
        rules = [{"counts": dict(rows.counts), "tokens": {}} for rows in self._by_number.values()]
        return {"source": "padded rows", "rows": self.num_rows, "rows_of_models": rows, "rules": rules}

    def summary(self) -> str:
        """Describes the vocabulary for a table."""
        if self.vocabulary is not None:
            return self.vocabulary.summary()
        rows = ", ".join(f"{model} {max(keys.values())}" for model, keys in self.on_disk.items())
        lines = [f"one tokenizer, padded to other numbers of rows ({rows}): {self.num_rows} in the output"]
        widest = max(self._by_number.values(), key=lambda each: len(each.own), default=None)
        return "\n".join([*lines, *(rule_labels(widest) if widest is not None else ())])


def not_padding(inputs: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Where the token ids called `name` are no padding, in the shape of theirs."""
    mask = inputs.get(name.removesuffix("input_ids") + "attention_mask")
    return torch.ones_like(inputs[name], dtype=torch.bool) if mask is None else mask.bool()


class ArrangedReader:
    """Reads a model, its embeddings in the order of the output's tokens (see `TensorReader`).

    Rows of tokens that the model lacks are 0: no id of its data leads there.

    Args:
        inner: A reader of the model as it lies on disk.
        checkpoint: The arranged checkpoint.
        tokens: How rows are arranged.
    """

    def __init__(self, inner: TensorReader, checkpoint: Checkpoint, tokens: Tokens) -> None:
        self.inner, self.checkpoint, self._tokens = inner, checkpoint, tokens

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self.inner.bytes_read

    @property
    def bytes_past_cache(self) -> int:
        """Bytes read so far that did not go through the system's cache."""
        return self.inner.bytes_past_cache

    def read(self, name: str, rows: StoredRows = None, *, again: bool = False) -> torch.Tensor:
        """Reads a tensor, or some rows of it in the output's order."""
        if name not in self._tokens.on_disk.get(self.checkpoint.name, {}):
            return self.inner.read(name, rows, again=again)
        own = self._tokens.own_rows(self.checkpoint.name, name)
        own = own if rows is None else own[rows.numpy() if isinstance(rows, torch.Tensor) else rows]
        found = np.flatnonzero(own >= 0)
        wanted = own[found]
        in_order = len(wanted) > 0 and bool((np.diff(wanted) == 1).all())
        index = slice(int(wanted[0]), int(wanted[-1]) + 1) if in_order else torch.from_numpy(wanted)
        read = self.inner.read(name, index, again=again)
        if len(found) == len(own):
            return read
        tensor = torch.zeros((len(own), *read.shape[1:]), dtype=read.dtype)
        tensor[torch.from_numpy(found)] = read
        return tensor


def token_reader(
    tokens: Tokens, models: Sequence[str], keys: Mapping[str, str], readers: Mapping[str, TensorReader]
) -> TokenReader:
    """Makes a reader of all models' rows of one tensor, in the order of the output's tokens, in float32.

    Args:
        tokens: How rows are arranged.
        models: The models that have the tensor, in order.
        keys: Its name on disk in each of them.
        readers: Readers of the models; arranged or not.
    """
    plain = {name: reader.inner if isinstance(reader, ArrangedReader) else reader for name, reader in readers.items()}
    rows = tokens.rows_of(models, keys)
    return TokenReader(rows, [(model, keys[model]) for model in models], plain, torch.float32)


def own_signature(signature: ForwardSignature, config: Any) -> ForwardSignature:
    """What preparing a candidate's calibration data needs to know, in the candidate's own token ids."""
    return dataclasses.replace(
        signature,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        pad_token_id=getattr(config, "pad_token_id", None),
    )


def open_tokens(
    settings: TokenizerSettings | None,
    skeleton: Skeleton,
    models: Mapping[str, tuple[Checkpoint, KeyMapping]],
    folders: Mapping[str, Path],
    reference: str,
    *,
    excluded: frozenset[str] = frozenset(),
    from_config: bool = False,
) -> tuple[Tokens | None, list[str]]:
    """Finds out whether vocabularies differ, and how they are brought together.

    Args:
        settings: Settings of the output's vocabulary, if the user has made any.
        skeleton: The model, built from the reference's config.
        models: Candidates, in order, and the base, if there is one, under `base`.
        folders: Folder of every model's tokenizer.
        reference: Name of the model whose config the output has.
        excluded: Parameters that are taken from the base as they are.
        from_config: Whether there may be no tokenizers, since only configs are looked at.

    Returns:
        How rows are arranged, `None` where all models have the same ones; and notes.

    Raises:
        LargemergeError: If vocabularies do not fit and no setting says what to do, or a tokenizer cannot be read.
    """
    parameters, first_name = token_parameters(skeleton.model)
    asks_for_more = settings is not None and (bool(settings.tokens) or settings.pad_to_multiple_of is not None)
    if first_name is None:
        if asks_for_more:
            raise ConfigError(f"tokenizer: {skeleton.class_name} has no token embeddings; leave it out")
        return None, []
    if parameters <= excluded:
        return None, []
    found = {name: dict(_rows_on_disk(*model, parameters)) for name, model in models.items()}
    on_disk = {name: keys for name, keys in found.items() if keys}
    unlike = len({rows for keys in on_disk.values() for rows in keys.values()}) > 1
    having = {name: folder for name, folder in folders.items() if has_tokenizer(folder)}
    if not having:
        if unlike and from_config:
            return _by_number(parameters, first_name, on_disk, {}, None), [
                "embeddings have other numbers of rows; without a tokenizer, additional ones are taken for padding"
            ]
        if asks_for_more:
            raise ConfigError("tokenizer: no model has a tokenizer; put the files of each beside its weights")
        return None, []  # unlike shapes are told with all others
    if not unlike and not asks_for_more and len({_vocabulary_key(folder) for folder in having.values()}) == 1:
        return None, []
    by_model: dict[str, Tokenizer] = {}
    try:
        by_model = _load(having)
    except LargemergeError as error:
        if unlike or asks_for_more or (settings is not None and settings.source == "union"):
            raise
        return None, [f"tokenizers cannot be compared, so rows are averaged by number: {error.problems[0]}"]
    ids = {name: tokenizer.ids for name, tokenizer in by_model.items()}
    same = all(each == next(iter(ids.values())) for each in ids.values())
    if same and not asks_for_more and (settings is None or not unlike):
        wanted = max((number + 1 for number in next(iter(ids.values())).values()), default=0)
        cut = any(rows < wanted for keys in on_disk.values() for rows in keys.values())  # told with unlike shapes
        return (_by_number(parameters, first_name, on_disk, ids, having) if unlike and not cut else None), []
    if settings is None:
        return None, _without_setting(ids, unlike=unlike)
    sideways = [key for _, (checkpoint, _) in models.items() for key in sideways_tensors(checkpoint, skeleton.model)]
    if sideways:
        raise CheckpointError(
            f"{sideways[0]} has its tokens in the second dimension, which 'tokenizer' and 'tokenizer_source' do not "
            "support; leave them out"
        )
    checkpoint, mapping = models[reference]
    tensors = frozenset(key for key, _ in _rows_on_disk(checkpoint, mapping, parameters))
    vocabulary = build_vocabulary(settings, folders, BASE if BASE in models else None, reference, tensors, {})
    ids = {name: tokenizer.ids for name, tokenizer in vocabulary.by_model.items()}
    moved = copy.deepcopy(dict(checkpoint.config))
    vocabulary.notes += move_ids(
        moved, vocabulary.reference.ids, vocabulary.tokenizer.ids, vocabulary.tokenizer.special
    )
    return Tokens(vocabulary, vocabulary.num_rows, parameters, first_name, on_disk, ids), []


def _rows_on_disk(checkpoint: Checkpoint, names: KeyMapping, parameters: frozenset[str]) -> Iterator[tuple[str, int]]:
    """Yields the names on disk of a model's tensors with a row for every token, and their numbers of rows."""
    for name in parameters:
        key = names.renamed.get(name)
        if key is not None:
            yield key, checkpoint.tensors[key].shape[0]


def _by_number(
    parameters: frozenset[str],
    first_name: str,
    on_disk: Mapping[str, Mapping[str, int]],
    ids: Mapping[str, Mapping[str, int]],
    having: Mapping[str, Path] | None,
) -> Tokens:
    """Rows by number, as many as the base has, or the first model; but one for each token that has an embedding."""
    first = BASE if BASE in on_disk else next(iter(on_disk))
    most = max(max(keys.values()) for keys in on_disk.values())
    wanted = max((max(tokens.values()) + 1 for tokens in ids.values()), default=0)
    size = max(max(on_disk[first].values()), min(wanted, most))
    tokens = next(iter(ids.values()), {})
    return Tokens(None, size, parameters, first_name, on_disk, {name: ids.get(name, tokens) for name in on_disk})


def _load(folders: Mapping[str, Path]) -> dict[str, Tokenizer]:
    """Loads tokenizers, those of the same files once."""
    loaded: dict[str, Tokenizer] = {}
    found: dict[str, Tokenizer] = {}
    for name, folder in folders.items():
        key = _vocabulary_key(folder)
        found[name] = loaded[key] = loaded[key] if key in loaded else load_tokenizer(folder, name)
    return found


def _vocabulary_key(folder: Path) -> str:
    """Hashes what makes a folder's vocabulary what it is."""
    digest = hashlib.sha256()
    for name in _VOCABULARY_FILES:
        path = folder / name
        content = read_file(path, max_bytes=MAX_FILE_BYTES) if path.is_file() else b""
        digest.update(f"{name} {len(content)} ".encode() + content)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        try:
            settings = read_json_file(path)
            settings = {key: value for key, value in settings.items() if key not in ("chat_template", "name_or_path")}
        except CheckpointError:
            settings = hashlib.sha256(read_file(path)).hexdigest()
        digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def _without_setting(ids: Mapping[str, Mapping[str, int]], *, unlike: bool) -> list[str]:
    """Notes on vocabularies that differ without contradiction; raises where rows cannot be matched by number."""
    advice = "set tokenizer_source: union, base, or the name of the model whose tokenizer the output shall have"
    at: dict[int, tuple[str, str]] = {}
    clashes: list[str] = []
    count = 0
    for model, tokens in ids.items():
        for token, number in tokens.items():
            other, theirs = at.setdefault(number, (model, token))
            if theirs != token:
                count += 1
                if len(clashes) < 3:
                    clashes.append(f"{number} is {theirs!r} in {other}, {token!r} in {model}")
    if count:
        text = f"vocabularies differ: {count} rows are other tokens, such as {'; '.join(clashes)}"
        if unlike:
            raise ConfigError(f"{text}; {advice}")
        return [
            f"{text}. Rows are averaged by number all the same, as all models have as many of them. To match them by "
            f"token, {advice}"
        ]
    every = {token for tokens in ids.values() for token in tokens}
    lacking = {model: [token for token in every if token not in tokens] for model, tokens in ids.items()}
    some = {model: sorted(tokens)[0] for model, tokens in lacking.items() if tokens}
    text = ", ".join(f"{model} lacks {len(lacking[model])} tokens such as {token!r}" for model, token in some.items())
    if unlike:
        raise ConfigError(f"vocabularies differ in size: {text}; {advice}")
    return [f"vocabularies differ: {text}; rows are averaged by number. To match them by token, {advice}"]
