"""Models by reference, with adapters on top: read, checked, and added to weights as they are read.

    open_model:     reference ──► model's Checkpoint ──► each adapter's headers ──► Checkpoint as the merge sees it
                                                                                └──► Adapter
    open_reader:    CheckpointReader (model) ──► AdaptedReader ──► weights with the adapters added
                    CheckpointReader (adapters) ──┘

No merged copy is ever written. `adapter_fit.py` fits an adapter to its model, `deltas.py` has the arithmetic.
Tensors that an adapter holds as a whole (`modules_to_save`, biases, embeddings) replace the model's.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from largemerge.checkpoint.adapter_fit import Fitting, config_problems
from largemerge.checkpoint.adapter_places import INPUT_EMBEDDINGS, FindPlaces, places_by_name
from largemerge.checkpoint.deltas import (
    DELTA_DTYPE,
    Delta,
    as_delta_dtype,
)
from largemerge.checkpoint.direct_io import Buffers
from largemerge.checkpoint.index import Checkpoint, file_fingerprint, open_checkpoint, read_json
from largemerge.checkpoint.locate import base_of_adapter, locate_checkpoint, split_adapters, split_reference
from largemerge.checkpoint.reader import CheckpointReader, TensorReader
from largemerge.checkpoint.side_files import set_vocabulary_size
from largemerge.checkpoint.tensor_files import Rows, open_tensor_file
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.checkpoint.writer import not_finite
from largemerge.errors import CheckpointError, group_alike

MAX_FACTORS = 32
"""Number of the adapter's tensors that are kept in memory: more than there are workers, mostly."""
MAX_WHOLE = 8
"""Number of weights that are kept adapted, where a delta needs all of a weight and only rows are wanted."""
_MAX_PROBLEMS = 5
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Adapter:
    """One adapter or several, fitted to their model.

    Attributes:
        checkpoint: The tensors in the adapters' own files; config and folder are the last one's.
        deltas: What is done to weights, in order, by their names on disk.
        replaced: Names on disk of the model's tensors that the adapters hold as a whole.
        folders: The adapters' folders, in order.
        notes: What a user should know though it stops nothing.
        brought: The folder of the last adapter that has brought input embeddings, if one has.
    """

    checkpoint: Checkpoint
    deltas: Mapping[str, tuple[Delta, ...]]
    replaced: tuple[str, ...]
    folders: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    brought: Path | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size of all deltas on disk, in bytes."""
        return self.bytes_of(self.deltas)

    def bytes_of(self, keys: Iterable[str]) -> int:
        """Sums the sizes on disk of the deltas of some of the model's tensors, in bytes."""
        tensors = self.checkpoint.tensors
        names = {name for key in keys for delta in self.deltas.get(key, ()) for name in delta.names}
        return sum(tensors[name].num_bytes for name in names)

    @property
    def kept_bytes(self) -> int:
        """Maximum of memory that the adapters' tensors take while the model is read, in bytes."""
        tensors = self.checkpoint.tensors
        used = {name for deltas in self.deltas.values() for delta in deltas for name in delta.names}
        sizes = sorted((tensors[name].num_elements for name in used), reverse=True)
        whole = (key for key, deltas in self.deltas.items() if any(delta.whole for delta in deltas))
        weights = sorted((math.prod(self.shapes[key]) for key in whole), reverse=True)
        return (sum(sizes[:MAX_FACTORS]) + sum(weights[:MAX_WHOLE])) * DELTA_DTYPE.itemsize

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Names of input embeddings that an adapter replaces: it may have brought tokens of its own."""
        return tuple(name for name in self.replaced if name.endswith(INPUT_EMBEDDINGS))


def open_adapter(
    folder: Path,
    name: str,
    model: Checkpoint,
    find_places: FindPlaces = places_by_name,
    below: Adapter | None = None,
) -> tuple[Checkpoint, Adapter]:
    """Reads an adapter's config and headers, and fits them to its model.

    Args:
        folder: The adapter's folder, with `adapter_config.json`.
        name: Name that the user gives model and adapter together.
        model: The model's checkpoint, with the adapters below in it.
        find_places: Makes the places of the model's weights.
        below: The adapters below this one, if there are any.

    Returns:
        The checkpoint as the merge sees it, in which the adapter's whole tensors replace the model's, and its config
        counts the rows of their embeddings; and all adapters.

    Raises:
        CheckpointError: If something in the adapter is not supported or does not fit; it names all of that.
    """
    own = open_own(folder, name)
    fitting = Fitting(own, model, find_places(model, own.config))
    fitting.fit()
    if fitting.problems:
        problems = group_alike(fitting.problems)
        shown = problems[:_MAX_PROBLEMS]
        if len(problems) > len(shown):
            made_for = own.config.get("base_model_name_or_path")
            told = f"; the adapter was made for {made_for!r}" if isinstance(made_for, str) and made_for else ""
            shown.append(f"and {len(problems) - len(shown)} more{told}")
        raise CheckpointError(*(f"{name}: {problem}" for problem in shown))
    check_finite(own)
    return _put_together(own, model, fitting, below)


def check_finite(own: Checkpoint) -> None:
    """Checks all numbers of an adapter, which are few, before the long work.

    Raises:
        CheckpointError: If some are NaN or infinite; it names the tensors.
    """
    problems = []
    with CheckpointReader(own) as reader:
        for key in own.tensors:
            found = not_finite(reader.read(key))
            if found is not None:
                problems.append(
                    f"{own.name}: {key} in the adapter holds numbers that are not finite ({found}); train or save the "
                    "adapter once more"
                )
    if problems:
        raise CheckpointError(*group_alike(problems)[:_MAX_PROBLEMS])


def open_own(folder: Path, name: str) -> Checkpoint:
    """Reads an adapter's config and headers, without its model.

    Raises:
        CheckpointError: If there is no adapter, its config has mistakes or is not supported, or its file is broken.
    """
    if not os.path.lexists(folder / "adapter_config.json"):
        what = "a model's" if (folder / "config.json").exists() else "no adapter's"
        raise CheckpointError(f"{name}: {folder} is {what} folder; expected an adapter, with adapter_config.json")
    config = read_json(folder / "adapter_config.json", name)
    problems = [f"{name}: adapter_config.json: {problem}" for problem in config_problems(config)]
    file = next((folder / each for each in _FILES if os.path.lexists(folder / each)), None)
    if file is None:
        problems.append(f"{name}: no weights in {folder}; expected {' or '.join(_FILES)}")
    if problems or file is None:
        raise CheckpointError(*problems)
    opened = open_tensor_file(file)
    tensors = opened.tensors()
    if not tensors:
        raise CheckpointError(f"{name}: {file} holds no tensors; expected those of an adapter, saved once more")
    fingerprint = {each.name: file_fingerprint(each) for each in (folder / "adapter_config.json",)}
    fingerprint[file.name] = file_fingerprint(file, opened.header)
    return Checkpoint(name, folder, config, tensors, fingerprint)


def _put_together(
    own: Checkpoint, model: Checkpoint, fitting: Fitting, below: Adapter | None
) -> tuple[Checkpoint, Adapter]:
    """Puts an adapter on top of a model and the adapters below."""
    number = len(below.folders) if below is not None else 0
    deltas: dict[str, tuple[Delta, ...]] = dict(below.deltas) if below is not None else {}
    tensors = dict(model.tensors)
    for key, source in fitting.untied.items():
        tensors[key] = _stored_elsewhere(key, model.tensors[source], model.tensors[source].dtype)
        if source in deltas:
            deltas[key] = deltas[source]
    for key, info in fitting.replaced.items():
        dtype = tensors[key].dtype
        tensors[key] = _stored_elsewhere(key, info, dtype)
        deltas.pop(key, None)
    for key, added in fitting.deltas.items():
        shared = [other for other, source in fitting.untied.items() if source == key and other not in fitting.replaced]
        for each in (key, *shared):
            if each in fitting.saved:
                continue
            deltas[each] = (*deltas.get(each, ()), *(delta.renamed(partial(_number, number)) for delta in added))
    config = _with_rows(model, [tensors[key] for key in fitting.replaced if key.endswith(INPUT_EMBEDDINGS)])
    if fitting.untied:
        _untie(config)
    own_tensors = {**(below.checkpoint.tensors if below is not None else {})}
    own_tensors |= {_number(number, key): info for key, info in own.tensors.items()}
    replaced = dict.fromkeys([*(below.replaced if below is not None else ()), *fitting.replaced, *fitting.untied])
    brings = any(key.endswith(INPUT_EMBEDDINGS) for key in fitting.replaced)
    adapter = Adapter(
        checkpoint=replace(own, tensors=own_tensors),
        deltas=deltas,
        replaced=tuple(replaced),
        folders=(*(below.folders if below is not None else ()), own.folder),
        notes=(*(below.notes if below is not None else ()), *fitting.notes),
        brought=own.folder if brings else below.brought if below is not None else None,
        shapes={key: tensors[key].shape for key in deltas},
    )
    prefix = "adapter/" if number == 0 else f"adapter {number + 1}/"
    adapted = replace(
        model,
        name=own.name,
        config=config,
        tensors=tensors,
        fingerprint={**model.fingerprint, **{f"{prefix}{key}": value for key, value in own.fingerprint.items()}},
    )
    return adapted, adapter


def _stored_elsewhere(key: str, info: TensorInfo, dtype: torch.dtype) -> TensorInfo:
    """A tensor that another one on disk stands for, in its own dtype."""
    if info.quantization is not None or (info.name == key and info.dtype == dtype):
        return info
    stored = next(iter(info.parts.values())) if info.parts else info
    return TensorInfo(key, info.shape, dtype, stored.file, stored.offset, parts={stored.name: stored})


def _number(number: int, name: str) -> str:
    """The name of a tensor of one adapter among those of all."""
    return name if number == 0 else f"{number}/{name}"


def _with_rows(model: Checkpoint, embeddings: Iterable[TensorInfo]) -> dict[str, Any]:
    """Returns the model's config with the rows of the embeddings that an adapter brings, which may be more."""
    config: dict[str, Any] = copy.deepcopy(dict(model.config))
    for info in embeddings:
        set_vocabulary_size(config, model.config.get("vocab_size", -1), info.shape[0])
    return config


def _untie(config: dict[str, Any]) -> None:
    """Says in a config that head and embeddings are two tensors."""
    config["tie_word_embeddings"] = False
    for part in config.values():
        if isinstance(part, dict) and part.get("tie_word_embeddings"):
            part["tie_word_embeddings"] = False


class AdaptedReader:
    """Reads a model's tensors with its adapters applied.

    Args:
        model: Reader of the model's tensors, replaced ones included.
        own: Reader of the adapters' tensors.
        adapter: The adapters.
    """

    def __init__(self, model: TensorReader, own: TensorReader, adapter: Adapter) -> None:
        self.checkpoint = model.checkpoint
        self._model, self._own, self._adapter = model, own, adapter
        self._factors: dict[str, torch.Tensor] = {}
        self._whole: dict[str, torch.Tensor] = {}
        self._turns: dict[tuple[str, str], threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, of model and adapters."""
        return self._model.bytes_read + self._own.bytes_read

    @property
    def bytes_past_cache(self) -> int:
        """Bytes read so far that did not go through the system's cache."""
        return self._model.bytes_past_cache

    def read(self, name: str, rows: Rows = None, *, again: bool = False) -> torch.Tensor:
        """Reads a tensor, or some of its rows, with its deltas added (see `TensorReader`)."""
        deltas = self._adapter.deltas.get(name, ())
        if rows is None or not any(delta.whole for delta in deltas):
            return self._apply(name, deltas, self._model.read(name, rows, again=again), rows)
        with self._turn("whole", name):
            with self._lock:
                whole = self._whole.get(name)
            if whole is None:
                whole = self._apply(name, deltas, self._model.read(name, again=again), None)
                _keep(self._whole, name, whole, MAX_WHOLE, self._lock)
        if isinstance(rows, slice) and rows.stop == whole.shape[0]:
            with self._lock:
                self._whole.pop(name, None)  # rows are read in order: these were the last
        return whole[rows].clone()

    def _apply(self, name: str, deltas: tuple[Delta, ...], weight: torch.Tensor, rows: Rows) -> torch.Tensor:
        for delta in deltas:
            try:
                weight = delta.apply(weight, self._read_own, rows)
            except ValueError as error:
                raise CheckpointError(f"{self.checkpoint.name}: {name}: {error}") from None
        return weight

    def _read_own(self, name: str) -> torch.Tensor:
        """Reads a tensor of the adapter's in float32; it is kept for other rows of the same weight."""
        with self._turn("factor", name):
            with self._lock:
                found = self._factors.get(name)
            if found is None:
                found = as_delta_dtype(self._own.read(name))
                if not_finite(found) is not None:
                    raise CheckpointError(
                        f"{self.checkpoint.name}: {name} in the adapter holds numbers that are not finite (NaN or "
                        "infinity); train or save the adapter once more"
                    )
                _keep(self._factors, name, found, MAX_FACTORS, self._lock)
        return found

    def _turn(self, kind: str, name: str) -> threading.Lock:
        """Returns the lock of what is kept of one tensor, so that two threads do not read it both."""
        with self._lock:
            return self._turns.setdefault((kind, name), threading.Lock())


def _keep(kept: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, limit: int, lock: threading.Lock) -> None:
    """Keeps a tensor in the place of the one kept longest, if there are too many."""
    with lock:
        if len(kept) >= limit and name not in kept:
            del kept[next(iter(kept))]
        kept[name] = tensor


def open_model(
    reference: str,
    made: Mapping[str, Checkpoint] | None = None,
    *,
    name: str | None = None,
    variant: str | None = None,
    find_places: FindPlaces = places_by_name,
) -> tuple[Checkpoint, Adapter | None]:
    """Opens a model and its adapters, if it has any, from their headers.

    Args:
        reference: A folder or Hub id, with `@revision` and `+adapter` if wanted, or the folder of an adapter alone.
        made: Results of other merges by the names that references may use for them.
        name: Name that the user gives it, for messages; by default the reference.
        variant: Variant of the weights, such as `fp16`.
        find_places: Makes the places of a model's weights, for its adapters.

    Returns:
        The checkpoint, with the adapters' whole tensors in it; and the adapters, or `None`.

    Raises:
        LargemergeError: If one cannot be opened, or they do not fit together.
    """
    model, lora = split_reference(reference)
    called = name or model
    folders = [] if lora is None else split_adapters(lora)
    if not all(part.strip() for part in (model, *folders)):
        label = reference if called == model else f"{called}: {reference}"
        raise CheckpointError(
            f"{label}: nothing stands {_empty_part([model, *folders])}; expected a model and adapters, with one '+' "
            "between each and the next: model+adapter"
        )
    checkpoint = (made or {}).get(model)
    if checkpoint is None:
        folder = locate_checkpoint(model, called)
        base = base_of_adapter(folder)
        if base is not None:
            folders.insert(0, str(folder))
            folder = _locate_base(base, folder, called)
        checkpoint = open_checkpoint(folder, called, variant)
    adapter: Adapter | None = None
    for each in folders:
        where = locate_checkpoint(each, name or reference)
        checkpoint, adapter = open_adapter(where, name or reference, checkpoint, find_places, adapter)
    return checkpoint, adapter


def _empty_part(parts: Sequence[str]) -> str:
    """Says where a part of a reference is empty."""
    place = next(index for index, part in enumerate(parts) if not part.strip())
    return (
        "before the first '+'" if place == 0 else "after the last '+'" if place == len(parts) - 1 else "between two '+'"
    )


def _locate_base(base: str, adapter: Path, name: str) -> Path:
    """Finds the model that an adapter's config names."""
    problem = f"{name}: {adapter} is an adapter; its base_model_name_or_path is {base!r}"
    if not base:
        raise CheckpointError(f"{problem}; write its model before it: model+{adapter.name}")
    try:
        return locate_checkpoint(base, name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{problem}, which is neither here nor on the Hub ({error.problems[0].removeprefix(f'{name}: ')}); write "
            f"the model's own folder before the adapter: path/to/model+{adapter}"
        ) from None


@contextmanager
def open_reader(
    checkpoint: Checkpoint, adapter: Adapter | None, *, past_cache: bool = True, buffers: Buffers | None = None
) -> Iterator[TensorReader]:
    """Opens a model's tensors, with its adapters if it has any.

    Args:
        checkpoint: The checkpoint that `open_model` has opened.
        adapter: Its adapters, if it has any.
        past_cache: Leave nothing in the system's cache but what is to be read again.
        buffers: Buffers for tensors; `None`: their memory is allocated.
    """
    with CheckpointReader(checkpoint, past_cache=past_cache, buffers=buffers) as reader:
        if adapter is None:
            yield reader
            return
        with CheckpointReader(adapter.checkpoint) as own:
            yield AdaptedReader(reader, own, adapter)
