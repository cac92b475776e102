"""The tensors on disk of a model's residual streams, and those of the reference that they are compared with.

    Stream: parameters of the class, a dimension of each ──► names on disk, experts that lie one by one among them

What a stream needs and the files have, but the class has not, may belong to it: then it stays, and the reason is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from largemerge.model.classes import ClassifiedModel
from largemerge.model.key_mapping import Conversion
from largemerge.units import counted
from largemerge.weight_matching.streams import Stream
from largemerge.weight_matching.units import Tensor

_FEW = 4  # rows of a dimension that is not the stream's, where a conversion is tried


@dataclass(frozen=True)
class StreamTensor:
    """A tensor on disk that has a residual stream as a dimension.

    Attributes:
        key: Its name on disk.
        axis: The dimension.
        other: The name on disk of the reference's tensor that it is compared with; `None` where there is none like it.
    """

    key: str
    axis: int
    other: str | None


@dataclass(frozen=True)
class StreamPlan:
    """A residual stream of a model.

    Attributes:
        name: The stacks whose blocks it goes through.
        size: Number of its features.
        tensors: All that is permuted with it.
    """

    name: str
    size: int
    tensors: tuple[StreamTensor, ...]

    @property
    def compared(self) -> list[StreamTensor]:
        """The tensors that the reference has, too."""
        return [tensor for tensor in self.tensors if tensor.other is not None]


def plan_streams(
    model: ClassifiedModel, reference: ClassifiedModel, names: Mapping[str, str], streams: Sequence[Stream]
) -> tuple[list[StreamPlan], list[str]]:
    """Finds the tensors of a model's streams.

    Args:
        model: The model.
        reference: The model that it is brought close to.
        names: Parameter of the model → parameter of the reference.
        streams: The streams of its class.

    Returns:
        The streams that may be permuted, and notes; of those that stay, why.
    """
    found, notes = list[StreamPlan](), list[str]()
    for stream in streams:
        where = f"the residual stream of {stream.name}"
        tensors, problem = _tensors_of(model, reference, names, stream)
        if problem is not None:
            notes.append(f"{where} stays: {problem}")
            continue
        found.append(StreamPlan(stream.name, stream.size, tuple(tensors)))
        notes.append(f"{where}: permuted are {stream.size} features, in {counted(len(tensors), 'tensor')}")
        alone = [tensor.key for tensor in tensors if tensor.other is None]
        if alone:
            first, more = alone[0], f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            notes.append(f"{where}: {first}{more} of other shapes, or not in the reference, are not compared")
        if stream.results:
            notes.append(f"{where}: {', '.join(stream.results)}, which the model returns, too, comes in the new order")
    return found, notes


def _tensors_of(
    model: ClassifiedModel, reference: ClassifiedModel, names: Mapping[str, str], stream: Stream
) -> tuple[list[StreamTensor], str | None]:
    """Finds the tensors of one stream; or says why it stays."""
    on_disk, idle = model.checkpoint.tensors, set(model.remade_buffers())
    for key in model.mapping.unmapped:
        if key not in idle and on_disk[key].dtype.is_floating_point and stream.size in on_disk[key].shape:
            return [], f"{key} may belong to it, and the class does not know it"
    aliases: dict[str, list[str]] = {}
    for name, canonical in model.mapping.aliases.items():
        aliases.setdefault(canonical, []).append(name)
    found: dict[tuple[str, int], StreamTensor] = {}
    for place in stream.places:
        canonical = model.mapping.canonical(place.name)
        for name in dict.fromkeys([place.name, canonical, *aliases.get(canonical, [])]):
            conversion = model.mapping.conversion_of(name)
            if conversion is not None:
                own = _converted(model, conversion, Tensor(name, place.axis), stream.size)
            else:
                own = {model.mapping.renamed[name]: place.axis} if name in model.mapping.renamed else {}
            if own is None:
                return [], f"{name} is made of several tensors, in which it was not found"
            for key, axis in own.items():
                shape = on_disk[key].shape
                if axis >= len(shape) or shape[axis] != stream.size:
                    return [], f"{key} is {list(shape)}; expected {stream.size} in dimension {axis}"
                if (key, axis) not in found or found[key, axis].other is None:
                    found[key, axis] = StreamTensor(key, axis, _like(model, reference, names, name, key))
    if not any(tensor.other is not None for tensor in found.values()):
        return [], "the reference has nothing of it"
    return list(found.values()), None


def _like(
    model: ClassifiedModel, reference: ClassifiedModel, names: Mapping[str, str], name: str, key: str
) -> str | None:
    """The name on disk of the reference's tensor in the place of a model's, if it has the same shape."""
    tensors = reference.checkpoint.tensors
    if model.mapping.conversion_of(name) is not None:
        other = key if key in tensors else None
    else:
        other = reference.mapping.renamed.get(names.get(name, name))
    if other is None or tensors[other].shape != model.checkpoint.tensors[key].shape:
        return None
    return other


def _converted(model: ClassifiedModel, conversion: Conversion, place: Tensor, size: int) -> dict[str, int] | None:
    """Finds the dimension of each of a conversion's tensors that is one of a parameter, by trying it with few rows.

    Returns:
        Name on disk → dimension; `None` if it was not found.
    """
    shapes = {key: model.checkpoint.tensors[key].shape for key, _ in conversion.sources}
    depth = model.model.state_dict()[place.name].dim() - place.axis  # counted from the end, where experts are stacked
    axes = {key: len(shape) - depth for key, shape in shapes.items()}
    if any(axis < 0 or shapes[key][axis] != size for key, axis in axes.items()):
        return None

    def read(key: str) -> torch.Tensor:
        few = [size if axis == axes[key] else min(_FEW, own) for axis, own in enumerate(shapes[key])]
        numbers = torch.arange(size, dtype=torch.float64).reshape([-1] + [1] * (len(few) - axes[key] - 1))
        return numbers.expand(few).clone()

    mapping = model.mapping
    try:
        made = mapping.load(model.model, [place.name], read)[place.name]
    except Exception:  # whatever a converter raises
        return None
    made = made.movedim(place.axis, -1)
    expected = torch.arange(size, dtype=made.dtype).expand(made.shape)
    return axes if made.shape[-1] == size and torch.equal(made, expected) else None
