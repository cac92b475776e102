"""Says of what kind every layer of a model is: its class, what computes in it, its tensors and their shapes.

    model on the meta device ──► lists of layers ──► for each layer, entry → value

    (class)                 JambaAttentionDecoderLayer
    self_attn (class)       JambaAttention
    self_attn.is_sliding    True
    self_attn.q_proj.weight tensor of [32, 32]

Entries are what the class itself has set: plain attributes that are a truth value, a text or a whole number, those left
out that only number the layers. So two layers of one kind compute the same function of inputs and weights, as far as
one can tell without running them. Floating-point attributes and buffers that follow a layer's position are apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_NUMBERING = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx", "block_id")
CLASS = "(class)"
"""Entry for the class of a layer, or behind the path of a module in it."""


@dataclass(frozen=True)
class LayerKind:
    """What one layer is.

    Attributes:
        entries: What must agree in layers of one kind, by path in the layer.
        numbering: Entries that only number the layers of the model, and so are compared with nothing.
        numbers: Floating-point attributes and buffers, which some classes derive from a layer's position.
    """

    entries: Mapping[str, Any]
    numbering: frozenset[str] = frozenset()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, other: LayerKind) -> list[tuple[str, Any, Any]]:
        """Lists entries that differ: path, value here, value there; `None` where one has no such entry."""
        keys = [*self.entries, *(key for key in other.entries if key not in self.entries)]
        keys = [key for key in keys if key not in self.numbering | other.numbering]
        pairs = ((key, self.entries.get(key), other.entries.get(key)) for key in keys)
        return [(key, mine, its) for key, mine, its in pairs if mine != its]

    def other_numbers(self, other: LayerKind) -> list[str]:
        """Lists the paths of floating-point attributes and buffers that differ."""
        return [key for key, value in self.numbers.items() if not _same(value, other.numbers.get(key, value))]


def layer_kinds(model: nn.Module) -> dict[str, list[LayerKind]]:
    """Describes the layers of every list of modules in a model, by the list's path.

    Lists inside a layer, such as its experts, are part of the layer.
    """
    found: dict[str, list[LayerKind]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[name] = _kinds(module)
    return found


def _kinds(layers: Sequence[nn.Module] | nn.ModuleList) -> list[LayerKind]:
    entries = [dict(_entries(layer)) for layer in layers]
    keys = {key: None for each in entries for key in each}
    numbering = frozenset(key for key in keys if _only_numbers(key, [each.get(key) for each in entries]))
    return [LayerKind(each, numbering, dict(_numbers(layer))) for each, layer in zip(entries, layers, strict=True)]


def _only_numbers(key: str, values: Sequence[Any]) -> bool:
    """Says whether an attribute, by its name or its values in all layers, is no more than the layer's number."""
    if key.rpartition(".")[2] in _NUMBERING:
        return True
    distances = {value - number if type(value) is int else None for number, value in enumerate(values)}
    return len(values) > 1 and len(distances) == 1 and None not in distances


def _entries(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        yield (f"{path} {CLASS}" if path else CLASS), type(module).__name__
        for key, value in sorted(vars(module).items()):
            if isinstance(value, bool | int | str) and not key.startswith("_") and key != "training":
                yield prefix + key, value
    for name, tensor in layer.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            yield f"{name} (tensor)", list(tensor.shape)


def _numbers(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        for key, value in vars(module).items():
            if isinstance(value, float) and not key.startswith("_"):
                yield prefix + key, value
    for name, buffer in layer.named_buffers():
        if buffer.device.type != "meta":
            yield name, buffer


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    return bool(left == right)
