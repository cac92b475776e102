"""Models by reference, with LoRA adapters on top: read, checked, and added to weights as they are read.

    W + s·B·A        s = lora_alpha / r, or lora_alpha / √r with use_rslora
    W' = m · (W + s·B·A) / ‖W + s·B·A‖, row by row        with use_dora

No merged copy is ever written. B·A is computed in float32 and the sum rounded to the dtype of W, as peft's
`merge_and_unload` does. Tensors that an adapter holds as a whole (`modules_to_save`, biases, embeddings) replace the
model's. LoRA: arXiv 2106.09685; rsLoRA: 2312.03732; DoRA: 2402.09353.

    open_model:     reference ──► model's Checkpoint, adapter's headers ──► Checkpoint as the merge sees it, Adapter
    open_reader:    CheckpointReader (model) ──► AdaptedReader ──► weights with the adapter added
                    CheckpointReader (adapter) ──┘
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from largemerge.checkpoint.direct_io import Buffers
from largemerge.checkpoint.index import Checkpoint, file_fingerprint, open_checkpoint, read_json
from largemerge.checkpoint.locate import locate_checkpoint, split_reference
from largemerge.checkpoint.reader import CheckpointReader, TensorReader
from largemerge.checkpoint.side_files import set_vocabulary_size
from largemerge.checkpoint.tensor_files import Rows, open_tensor_file
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.errors import CheckpointError

DELTA_DTYPE = torch.float32
MAX_FACTORS = 16
"""Number of pairs of A and B that are kept in memory: more than there are workers, mostly."""
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_REFUSED = (
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "velora_config",
    "kasa_config",
    "monteclora_config",
)
"""Keys of `adapter_config.json` that change what an adapter does to a weight, or to which."""
_REFUSED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of an adapter that change the model's own weights, which the adapter then does not hold."""
_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$"
)


@dataclass(frozen=True)
class Delta:
    """The tensors that an adapter adds to one weight.

    Attributes:
        down: Name of A `[r, in]` in the adapter's file.
        up: Name of B `[out, r]`.
        magnitude: Name of m `[out]`, if there is one (DoRA).
        scale: Factor s of B·A.
        transposed: Whether the weight is `[in, out]`: GPT-2's `Conv1D`, embeddings.
    """

    down: str
    up: str
    magnitude: str | None
    scale: float
    transposed: bool

    @property
    def names(self) -> list[str]:
        """Names of all its tensors in the adapter's file."""
        return [self.down, self.up, *([self.magnitude] if self.magnitude is not None else [])]


@dataclass(frozen=True)
class Adapter:
    """An adapter, fitted to its model.

    Attributes:
        checkpoint: The tensors in the adapter's own file.
        deltas: Deltas by the weight's name on disk.
        replaced: Names on disk of the model's tensors that the adapter holds as a whole.
    """

    checkpoint: Checkpoint
    deltas: Mapping[str, Delta]
    replaced: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all deltas on disk, in bytes."""
        return self.bytes_of(self.deltas)

    def bytes_of(self, keys: Iterable[str]) -> int:
        """Sums the sizes on disk of the deltas of some of the model's tensors, in bytes."""
        deltas = (self.deltas[key] for key in keys if key in self.deltas)
        return sum(self.checkpoint.tensors[name].num_bytes for delta in deltas for name in delta.names)

    @property
    def kept_bytes(self) -> int:
        """Maximum of memory that A and B take while the model is read, in bytes."""
        tensors = self.checkpoint.tensors
        sizes = (sum(tensors[key].num_elements for key in delta.names) for delta in self.deltas.values())
        return sum(sorted(sizes, reverse=True)[:MAX_FACTORS]) * DELTA_DTYPE.itemsize

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Names of input embeddings that the adapter replaces: it may have brought tokens of its own."""
        return tuple(name for name in self.replaced if name.endswith(_EMBEDDINGS))


def open_adapter(folder: Path, name: str, model: Checkpoint) -> tuple[Checkpoint, Adapter]:
    """Reads an adapter's config and headers, and fits them to its model.

    Args:
        folder: The adapter's folder, with `adapter_config.json`.
        name: Name that the user gives model and adapter together.
        model: The model's checkpoint.

    Returns:
        The checkpoint as the merge sees it, in which the adapter's whole tensors replace the model's, and its config
        counts the rows of their embeddings; and the adapter.

    Raises:
        CheckpointError: If something in the adapter is not supported or does not fit; it names all of that.
    """
    config = read_json(folder / "adapter_config.json", name)
    problems = [f"{name}: adapter_config.json: {problem}" for problem in _config_problems(config)]
    file = next((folder / each for each in _FILES if (folder / each).is_file()), None)
    if file is None:
        problems.append(f"{name}: no weights in {folder}; expected {' or '.join(_FILES)}")
    if problems or file is None:
        raise CheckpointError(*problems)
    opened = open_tensor_file(file)
    tensors = opened.tensors()
    fingerprint = {each.name: file_fingerprint(each) for each in (folder / "adapter_config.json",)}
    fingerprint[file.name] = file_fingerprint(file, opened.header)
    own = Checkpoint(name, folder, config, tensors, fingerprint)
    parts, whole, problems = _match_names(own, model)
    deltas = {key: delta for key, found in parts.items() for delta in _read_delta(own, model, key, found, problems)}
    if problems:
        raise CheckpointError(*(f"{name}: {problem}" for problem in problems[:20]))
    adapter = Adapter(own, deltas, tuple(whole))
    adapted = replace(
        model,
        name=name,
        config=_with_rows(model, [whole[key] for key in adapter.embeddings]),
        tensors={key: whole.get(key, info) for key, info in model.tensors.items()},
        fingerprint={**model.fingerprint, **{f"adapter/{key}": value for key, value in fingerprint.items()}},
    )
    return adapted, adapter


def _with_rows(model: Checkpoint, embeddings: Iterable[TensorInfo]) -> Mapping[str, Any]:
    """Returns the model's config with the rows of the embeddings that an adapter brings, which may be more."""
    config: dict[str, Any] = copy.deepcopy(dict(model.config))
    for info in embeddings:
        set_vocabulary_size(config, model.config.get("vocab_size", -1), info.shape[0])
    return config


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {kind!r}; expected 'LORA'"
        return
    yield from (f"{key} is {config[key]!r}, which is not supported" for key in _REFUSED if config.get(key))
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REFUSED_STARTS):
        yield (
            f"init_lora_weights is {start!r}, which changes the model's own weights, too; convert it to a plain LoRA "
            "(peft: path_initial_model_for_weight_conversion), or merge it with peft first"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or isinstance(config.get(key), bool):
            yield f"{key} is {config.get(key)!r}; expected a number"


def _match_names(
    own: Checkpoint, model: Checkpoint
) -> tuple[dict[str, dict[str, str]], dict[str, TensorInfo], list[str]]:
    """Matches the adapter's names to the model's: parts by weight, whole tensors; and problems."""
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for key, info in own.tensors.items():
        inner = key.removeprefix("base_model.model.")
        match = _PART.match(inner)
        plain = inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        wanted = f"{match['module']}.weight" if match else plain
        target = _find_tensor(wanted, model.tensors) if match or "lora_" not in inner else None
        if target is None:
            problems.append(
                f"{own.name} holds {key}, but {model.name} has no tensor {wanted}; expected the adapter's own model, "
                "with weights that are tied or fused left alone"
            )
        elif match:
            parts.setdefault(target, {})[match["part"]] = key
        elif info.shape[1:] != model.tensors[target].shape[1:]:
            problems.append(f"{key} is {list(info.shape)}, and replaces {list(model.tensors[target].shape)}")
        else:
            whole[target] = replace(info, name=key)
    return parts, whole, problems


def _find_tensor(name: str, tensors: Iterable[str]) -> str | None:
    """Finds the tensor of that name, or the only one with another prefix, as `transformer.h.0…` and `h.0…` have."""
    known = set(tensors)
    if name in known:
        return name
    near = [each for each in known if each.endswith("." + name) or name.endswith("." + each)]
    return near[0] if len(near) == 1 else None


def _read_delta(
    own: Checkpoint, model: Checkpoint, key: str, found: Mapping[str, str], problems: list[str]
) -> Iterator[Delta]:
    """Yields the delta of one weight, or adds to the problems if something is wrong with it."""
    config = own.config
    embedding = "lora_embedding_A" in found
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if not set(names) <= set(found):
        problems.append(f"{key}: expected {names[0]} and {names[1]}, found {sorted(found)}")
        return
    down, up = (own.tensors[found[name]] for name in names)
    module = found[names[0]].removeprefix("base_model.model.").rpartition(f".{names[0]}")[0]
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    shape = model.tensors[key].shape
    wanted = tuple(reversed(shape)) if transposed else shape
    if len(down.shape) != 2 or len(up.shape) != 2 or (up.shape[0], down.shape[1]) != wanted:
        problems.append(
            f"{key} is {list(shape)}; A {list(down.shape)} and B {list(up.shape)} do not fit it"
            f"{' with fan_in_fan_out' if transposed and not embedding else ''}"
        )
    elif not down.shape[0] == up.shape[1] == rank:
        problems.append(
            f"{key}: A and B are of rank {down.shape[0]} and {up.shape[1]}, adapter_config.json says {rank}"
        )
    elif "lora_magnitude_vector" in found and transposed:
        problems.append(f"{key}: use_dora is not supported for weights that are [in, out]")
    elif bool(config.get("use_dora")) != ("lora_magnitude_vector" in found):
        problems.append(f"{key}: use_dora is {bool(config.get('use_dora'))}, but found {sorted(found)}")
    else:
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        magnitude = found.get("lora_magnitude_vector")
        yield Delta(found[names[0]], found[names[1]], magnitude, scale, transposed)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Looks up `rank_pattern` or `alpha_pattern` as peft does: the first pattern that the module's path ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


class AdaptedReader:
    """Reads a model's tensors with an adapter applied.

    Args:
        model: Reader of the model's tensors, replaced ones included.
        own: Reader of the adapter's tensors.
        adapter: The adapter.
    """

    def __init__(self, model: TensorReader, own: TensorReader, adapter: Adapter) -> None:
        self.checkpoint = model.checkpoint
        self._model, self._own, self._adapter = model, own, adapter
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, of model and adapter."""
        return self._model.bytes_read + self._own.bytes_read

    @property
    def bytes_past_cache(self) -> int:
        """Bytes read so far that did not go through the system's cache."""
        return self._model.bytes_past_cache

    def read(self, name: str, rows: Rows = None, *, again: bool = False) -> torch.Tensor:
        """Reads a tensor, or some of its rows, with its delta added (see `TensorReader`)."""
        return self._adapted(name, self._model.read(name, rows, again=again), slice(None) if rows is None else rows)

    def _adapted(self, name: str, weight: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        delta = self._adapter.deltas.get(name)
        if delta is None:
            return weight
        down, up = self._read_factors(name, delta)
        product = down[:, rows].T @ up.T if delta.transposed else up[rows] @ down
        adapted = weight.to(torch.promote_types(weight.dtype, DELTA_DTYPE)) + delta.scale * product
        if delta.magnitude is not None:
            magnitude = self._own.read(delta.magnitude).to(adapted.dtype)[rows]
            adapted *= (magnitude / adapted.norm(dim=1)).unsqueeze(1)
        return adapted.to(weight.dtype)

    def _read_factors(self, name: str, delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads A and B in float32; they are kept for other rows of the same weight."""
        with self._lock:
            found = self._factors.get(name)
        if found is None:
            found = (self._own.read(delta.down).to(DELTA_DTYPE), self._own.read(delta.up).to(DELTA_DTYPE))
            with self._lock:
                if len(self._factors) >= MAX_FACTORS:
                    del self._factors[next(iter(self._factors))]
                self._factors[name] = found
        return found


def open_model(
    reference: str,
    made: Mapping[str, Checkpoint] | None = None,
    *,
    name: str | None = None,
    variant: str | None = None,
) -> tuple[Checkpoint, Adapter | None]:
    """Opens a model and its adapter, if it has one, from their headers.

    Args:
        reference: A folder or Hub id, with `@revision` and `+adapter` if wanted.
        made: Results of other merges by the names that references may use for them.
        name: Name that the user gives it, for messages; by default the reference.
        variant: Variant of the weights, such as `fp16`.

    Returns:
        The checkpoint, with the adapter's whole tensors in it; and the adapter, or `None`.

    Raises:
        LargemergeError: If either cannot be opened, or they do not fit together.
    """
    model, lora = split_reference(reference)
    called = name or model
    if not model or lora == "":
        raise CheckpointError(
            f"{name or reference}: {reference}: expected a model and an adapter, one on each side of '+'"
        )
    checkpoint = (made or {}).get(model) or open_checkpoint(locate_checkpoint(model, called), called, variant)
    if lora is None:
        return checkpoint, None
    return open_adapter(locate_checkpoint(lora, name or reference), name or reference, checkpoint)


@contextmanager
def open_reader(
    checkpoint: Checkpoint, adapter: Adapter | None, *, past_cache: bool = True, buffers: Buffers | None = None
) -> Iterator[TensorReader]:
    """Opens a model's tensors, with its adapter if it has one.

    Args:
        checkpoint: The checkpoint that `open_model` has opened.
        adapter: Its adapter, if it has one.
        past_cache: Leave nothing in the system's cache but what is to be read again.
        buffers: Buffers for tensors; `None`: their memory is allocated.
    """
    with CheckpointReader(checkpoint, past_cache=past_cache, buffers=buffers) as reader:
        if adapter is None:
            yield reader
            return
        with CheckpointReader(adapter.checkpoint) as own:
            yield AdaptedReader(reader, own, adapter)
