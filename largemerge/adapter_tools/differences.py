"""Two checkpoints held against each other: which parameters differ, and by how much.

    fine-tuned ──(its class)──► parameters ◄──(translated)──(its own class)── base        Pair
    Pair ──► both tensors, one pair at a time ──► ‖Δ‖², ‖W_0‖²                            Difference

Names are those of the fine-tuned model's class, in which a user loads the base to put the adapter on it: a classifier
that was made of a bare encoder has a head there that the base lacks. A tensor that either model ties to another is
compared once for every pair of tensors that stands behind the names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter, open_model, open_reader
from largemerge.checkpoint.reader import CheckpointReader, TensorReader
from largemerge.checkpoint.tensor_info import dtype_name, list_kinds
from largemerge.errors import CheckpointError, LargemergeError
from largemerge.model.adapter_names import AdapterNames
from largemerge.model.classes import ClassifiedModel, classify, translate
from largemerge.model.config_differences import compare_configs
from largemerge.model.skeleton import all_configs, is_linear, weight_is_transposed
from largemerge.model.ties import untied_heads

FINE_TUNED, BASE = "fine-tuned", "base"
"""What the two models are called in messages."""


@dataclass(frozen=True)
class Pair:
    """A parameter of the fine-tuned model, and what the base has for it.

    Attributes:
        name: Its name in the fine-tuned model's class.
        aliases: Other names of the class that are the same tensor in both models.
        source: The parameter of the fine-tuned model that is loaded for it.
        base_source: The parameter of the base that is loaded for it; `None` if the base has none.
        shape: Its shape in the fine-tuned model.
        base_shape: Its shape in the base; `None` if the base has none.
        tied: Whether the base has one tensor for this name and for others.
    """

    name: str
    aliases: tuple[str, ...]
    source: str
    base_source: str | None
    shape: tuple[int, ...]
    base_shape: tuple[int, ...] | None
    tied: bool

    @property
    def module(self) -> str:
        """Path of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Its name in that module."""
        return self.name.rpartition(".")[2]

    @property
    def num_elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Difference:
    """How a parameter of the fine-tuned model differs from the base's.

    Attributes:
        square: ‖Δ‖², or ‖W‖² of the fine-tuned tensor where the base has none that could be taken from it.
        base_square: ‖W_0‖²; 0 where the base has none.
    """

    square: float
    base_square: float

    @property
    def relative_norm(self) -> float | None:
        """‖Δ‖ / ‖W_0‖; `None` where the base has no such tensor, or zeros."""
        return math.sqrt(self.square / self.base_square) if self.base_square else None


class ModelPair:
    """A fine-tuned model and its base, from their headers.

    Args:
        models: The two models with their classes, as `FINE_TUNED` and `BASE`.
        adapters: The adapters of those that have one.

    Attributes:
        pairs: All parameters of the fine-tuned model, in its order.
        notes: What a user should know; warnings begin with `warning: `.
    """

    def __init__(self, models: Mapping[str, ClassifiedModel], adapters: Mapping[str, Adapter]) -> None:
        self.fine_tuned, self.base = models[FINE_TUNED], models[BASE]
        self.adapters = adapters
        self.notes: list[str] = []
        self.pairs = tuple(_paired(self.fine_tuned, self.base, untied_heads(models, adapters), self.notes))

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Modules of the fine-tuned model's class by path, under all their names; without numbers."""
        return dict(self.fine_tuned.model.named_modules(remove_duplicate=False))

    def is_linear(self, path: str) -> bool:
        """Whether a module multiplies with a matrix."""
        return is_linear(self.modules[path])

    def is_transposed(self, path: str) -> bool:
        """Whether a linear's weight lies `[in, out]`."""
        return weight_is_transposed(self.modules[path])

    @contextmanager
    def reading(self) -> Iterator[PairReader]:
        """Opens the files of both models."""
        with (
            open_reader(self.fine_tuned.checkpoint, self.adapters.get(FINE_TUNED)) as ours,
            open_reader(self.base.checkpoint, self.adapters.get(BASE)) as theirs,
        ):
            yield PairReader(self, ours, theirs)


class PairReader:
    """Reads both tensors of a pair.

    Args:
        models: The models.
        ours: Reader of the fine-tuned model.
        theirs: Reader of the base.
    """

    def __init__(self, models: ModelPair, ours: TensorReader, theirs: TensorReader) -> None:
        self._models, self._ours, self._theirs = models, ours, theirs

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._ours.bytes_read + self._theirs.bytes_read

    def fine_tuned(self, source: str) -> torch.Tensor:
        """Reads a parameter of the fine-tuned model, as its class holds it, in its stored dtype."""
        return _load(self._models.fine_tuned, source, self._ours)

    def base(self, source: str) -> torch.Tensor:
        """Reads a parameter of the base, as its class holds it, in its stored dtype."""
        return _load(self._models.base, source, self._theirs)

    def delta(self, pair: Pair) -> torch.Tensor:
        """Computes Δ = W - W_0 of a pair of one shape, float32; in float64 before where either is float64."""
        assert pair.base_source is not None and pair.shape == pair.base_shape, pair
        return _minus_(self.fine_tuned(pair.source), self.base(pair.base_source)).to(torch.float32)

    def compare(self, pair: Pair) -> Difference:
        """Measures how the two tensors of a pair differ.

        Raises:
            CheckpointError: If one of them holds NaN or infinity.
        """
        ours = self.fine_tuned(pair.source)
        theirs = self.base(pair.base_source) if pair.base_source is not None else None
        square = _square(ours, FINE_TUNED, pair.name)
        base_square = _square(theirs, BASE, pair.name) if theirs is not None else 0.0
        if theirs is None or ours.shape != theirs.shape:
            return Difference(square, base_square)
        return Difference(_square(_minus_(ours, theirs), FINE_TUNED, pair.name), base_square)


def open_pair(fine_tuned: str, base: str, *, trust_remote_code: bool = False) -> ModelPair:
    """Opens a fine-tuned model and its base from their headers.

    Args:
        fine_tuned: Reference of the fine-tuned model: a folder or Hub id, with `+adapter` if wanted.
        base: Reference of the base.
        trust_remote_code: Allow the checkpoints' own Python code.

    Raises:
        LargemergeError: If one of them cannot be opened, or they are of different kinds.
    """
    checkpoints: dict[str, Checkpoint] = {}
    adapters: dict[str, Adapter] = {}
    problems: list[str] = []
    find_places = AdapterNames(trust_remote_code=trust_remote_code)
    for name, reference in ((FINE_TUNED, fine_tuned), (BASE, base)):
        try:
            checkpoints[name], adapter = open_model(reference, find_places=find_places)
        except LargemergeError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        if adapter is not None:
            adapters[name] = adapter
    if problems:
        raise CheckpointError(*problems)
    models = classify(checkpoints, adapters, trust_remote_code=trust_remote_code)
    _check_kinds(models, {FINE_TUNED: fine_tuned, BASE: base})
    opened = ModelPair(models, adapters)
    opened.notes += [note for name in checkpoints for note in checkpoints[name].notes]
    opened.notes += [note for adapter in adapters.values() for note in adapter.notes]
    opened.notes += _config_notes(models)
    quantized = models[BASE].checkpoint.quantized()
    if quantized:
        kinds = ", ".join(quantized)
        opened.notes.append(f"the base is quantised ({kinds}): differences are to its dequantised weights")
    return opened


def _check_kinds(models: Mapping[str, ClassifiedModel], references: Mapping[str, str]) -> None:
    """Refuses models neither of which is of the other's kind, or a part of it."""
    kinds = {
        name: {str(part.model_type) for part in all_configs(each.model.config).values() if part.model_type}
        for name, each in models.items()
    }
    own = {name: str(each.model.config.model_type) for name, each in models.items()}
    if own[FINE_TUNED] not in kinds[BASE] and own[BASE] not in kinds[FINE_TUNED]:
        raise CheckpointError(
            f"{references[FINE_TUNED]} is a {own[FINE_TUNED]!r} model, and {references[BASE]} a {own[BASE]!r} model; "
            "expected a fine-tuned model and the base that it was tuned from"
        )


def _config_notes(models: Mapping[str, ClassifiedModel]) -> list[str]:
    """Says by which settings the fine-tuned model computes otherwise: an adapter holds weights alone."""
    idle = ("id2label", "label2id")
    configs = {
        name: {key: value for key, value in each.model.config.to_dict().items() if key not in idle}
        for name, each in models.items()
    }
    found = compare_configs(configs, BASE)
    told = [*found.crimes, *(note.partition("; the output takes")[0] for note in found.notes)]
    return [f"warning: {each}; an adapter does not change the base's config" for each in told]


def _paired(
    fine_tuned: ClassifiedModel,
    base: ClassifiedModel,
    separate: Mapping[str, Mapping[str, str]],
    notes: list[str],
) -> Iterator[Pair]:
    """Yields the parameters of the fine-tuned model with what the base has for them."""
    places = translate(base.model, fine_tuned.model)
    theirs: dict[str, str] = {}
    for own, place in places.items():
        source = own if own in separate.get(BASE, {}) else base.mapping.canonical(own)
        if source not in base.mapping.missing:
            theirs.setdefault(place, source)
    homeless = [name for name in base.parameters if name not in places]
    if homeless:
        notes.append(
            f"of the base, {list_kinds(homeless)} has no place in the fine-tuned model's class "
            f"({fine_tuned.class_name}): left alone"
        )
    groups: dict[tuple[str, str | None], list[str]] = {}
    behind: dict[str, set[str]] = {}
    lacking = []
    for name in fine_tuned.model.state_dict():
        ours = name if name in separate.get(FINE_TUNED, {}) else fine_tuned.mapping.canonical(name)
        if ours in fine_tuned.mapping.missing:
            lacking.append(name)
            continue
        other = theirs.get(name)
        groups.setdefault((ours, other), []).append(name)
        if other is not None:
            behind.setdefault(other, set()).add(name)
    if lacking:
        notes.append(f"the fine-tuned model's files lack {list_kinds(lacking)}: left as in the base")
    unknown = [key for key in fine_tuned.mapping.unmapped if key not in fine_tuned.remade_buffers()]
    unknown = _that_differ(fine_tuned.checkpoint, base.checkpoint, unknown) if unknown else []
    if unknown:
        notes.append(
            f"warning: of the fine-tuned model, {list_kinds(unknown)} has no place in its class "
            f"({fine_tuned.class_name}): the adapter does not hold it"
        )
    for (ours, other), names in groups.items():
        yield Pair(
            name=names[0],
            aliases=tuple(names[1:]),
            source=ours,
            base_source=other,
            shape=_shape(fine_tuned, ours),
            base_shape=_shape(base, other) if other is not None else None,
            tied=other is not None and len(behind[other]) > 1,
        )


def _that_differ(fine_tuned: Checkpoint, base: Checkpoint, keys: Sequence[str]) -> list[str]:
    """Returns the names of tensors that the base's files do not hold in the same way."""
    with CheckpointReader(fine_tuned) as ours, CheckpointReader(base) as theirs:

        def is_same(key: str) -> bool:
            if key not in base.tensors or base.tensors[key].shape != fine_tuned.tensors[key].shape:
                return False
            tensor = ours.read(key)
            return torch.equal(tensor, theirs.read(key).to(tensor.dtype))

        return [key for key in keys if not is_same(key)]


def _shape(model: ClassifiedModel, source: str) -> tuple[int, ...]:
    key = model.mapping.renamed.get(source)
    if key is not None:
        return model.checkpoint.tensors[key].shape
    return tuple(model.mapping.mismatched.get(source, model.model.state_dict()[source].shape))


def stored_dtype(model: ClassifiedModel, source: str) -> torch.dtype:
    """Returns the dtype that a parameter is read in."""
    return model.checkpoint.tensors[model.mapping.disk_keys([source])[0]].dtype


def _load(model: ClassifiedModel, source: str, reader: TensorReader) -> torch.Tensor:
    return model.mapping.load(model.model, [source], reader.read)[source]


def _minus_(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Computes W - W_0, float64 where either is, else float32; W may be changed in place."""
    wide = torch.float64 if torch.float64 in (ours.dtype, theirs.dtype) else torch.float32
    return ours.to(wide).sub_(theirs.to(wide))


def square_of(tensor: torch.Tensor) -> float:
    """Computes Σ x² in float64, in which the squares of the smallest numbers of float32 are not 0."""
    numbers = tensor if tensor.is_floating_point() else tensor.to(torch.float64)
    norm: float = torch.linalg.vector_norm(numbers, dtype=torch.float64).item()
    return norm**2


def _square(tensor: torch.Tensor, model: str, name: str) -> float:
    """Computes Σ x² of a tensor that a file holds.

    Raises:
        CheckpointError: If it is not finite.
    """
    square = square_of(tensor)
    if not math.isfinite(square):
        raise CheckpointError(
            f"{name} of the {model} model holds NaN or infinity (as {dtype_name(tensor.dtype)}); save it once more"
        )
    return square


Progress = Callable[[str], None]
"""Is called with the name of what was just done."""


def compare_all(reader: PairReader, pairs: Sequence[Pair], progress: Progress) -> dict[str, Difference]:
    """Measures all pairs, one after the other; those that are the same are left out.

    Args:
        reader: Reader of both models.
        pairs: The pairs.
        progress: Called after each.

    Returns:
        Name of the parameter → its difference.

    Raises:
        CheckpointError: If some hold NaN or infinity; it names all.
    """
    found: dict[str, Difference] = {}
    problems: list[str] = []
    for pair in pairs:
        try:
            difference = reader.compare(pair)
        except CheckpointError as error:
            problems += error.problems
            continue
        if difference.square or pair.base_shape != pair.shape:
            found[pair.name] = difference
        progress(pair.name)
    if problems:
        raise CheckpointError(*problems)
    return found
