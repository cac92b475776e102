"""DoRA adapters merged into one, exactly: the mean of the models that they make is one DoRA adapter more.

peft's `merge_and_unload` makes of a weight W `[O, I]` and a DoRA (Liu et al., arXiv 2402.09353)

    W_i = diag(g_i) (W + s_i B_i A_i)       g_i = m_i / ‖rows of W + s_i B_i A_i‖   [O], the gain; 1 for a plain LoRA

where a row is an output's: a column of what GPT-2's `Conv1D` and embeddings hold. So the weighted sum of the changes is

    W + Σ w_i (W_i - W) = diag(ḡ) W + V       ḡ = 1 + Σ w_i (g_i - 1),   V = Σ w_i s_i diag(g_i) B_i A_i   [O, I]
                        = diag(ḡ) (W + B* A*)         B* A* = diag(ḡ)^-1 V,   m* = ḡ · ‖rows of W + B* A*‖

which peft reads as a DoRA with B*, A* and m*. V is a sum of low-rank products, as of plain adapters whose B are
diag(g_i) B_i, and is merged by the same methods; a rank cuts V, which stands in the merged weight as it is. All that is
wanted of the base is each row's length, and W Q, Q an orthonormal basis of all A: its weights are read one after the
other.

Shapes: O outputs, I inputs, r rank, M = Σ r_i. All sums are float64.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from largemerge.adapter_tools.factor_methods import (
    FACTOR_DTYPE,
    METHODS,
    MergedFactors,
    Scaled,
    cat,
    merge_factors,
    sum_of_changes,
)
from largemerge.checkpoint.adapter_places import Place, Places
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.locate import absolute_reference
from largemerge.checkpoint.lora import Adapter, open_model
from largemerge.errors import CheckpointError, MergeError, group_alike
from largemerge.model.adapter_names import AdapterNames
from largemerge.model.skeleton import is_linear, weight_is_transposed

MAGNITUDE_DTYPE = torch.float32
"""The precision of magnitudes that are written, at least: each multiplies a whole row of the weight."""

_ELEMENTS_AT_ONCE = 1 << 23
_LARGEST_RATIO = 1e6
"""Times the longest row: rows of B* A* beyond it would leave nothing of W in float32."""
_NEGLIGIBLE = 1e-12
"""Of the longest row: shorter ones of V are rounding."""
PLAUSIBLE_GAINS = (0.5, 2.0)
"""Between which the median of an adapter's gains is on its own base, as m began as ‖rows of W‖."""
_ROUNDED = 1e-7
"""Of a length: what rounding to float32 may change."""
_INSTEAD = "merge the models instead: largemerge merge, with model+adapter"


# The base


@dataclass(frozen=True)
class BaseWeight:
    """A weight of the base that adapters change.

    Attributes:
        key: Its name on disk.
        transposed: Whether it lies `[I, O]`.
    """

    key: str
    transposed: bool


@dataclass(frozen=True)
class Base:
    """The model that DoRA adapters are of.

    Attributes:
        name: Reference of it.
        checkpoint: Its checkpoint.
        adapter: Its own adapters, if it has any.
        weights: Weights by path of the module.
        notes: What a user should know of it.
    """

    name: str
    checkpoint: Checkpoint
    adapter: Adapter | None
    weights: Mapping[str, BaseWeight] = field(default_factory=dict)
    notes: Sequence[str] = ()


class AdaptedModule(Protocol):
    """What is wanted of a module of the merged adapter."""

    @property
    def path(self) -> str:
        """Its path."""

    @property
    def outputs(self) -> int:
        """O."""

    @property
    def inputs(self) -> int:
        """I."""

    @property
    def embedding(self) -> bool:
        """Whether it is an embedding."""


def base_reference(given: str | None, configs: Mapping[str, Mapping[str, Any]], folders: Sequence[Path]) -> str:
    """Finds which base is meant.

    Args:
        given: `base_model` of the configuration.
        configs: Name of an adapter → contents of its `adapter_config.json`, which may name a base.
        folders: Folders that relative paths may start from.

    Raises:
        CheckpointError: If none is named, or several.
    """
    if given is not None:
        return given
    found = {}
    for name, config in configs.items():
        if base := config.get("base_model_name_or_path"):
            reference, revision = absolute_reference(base, folders), config.get("revision")
            found[name] = f"{reference}@{revision}" if revision and not os.path.isdir(reference) else reference
    if not found:
        raise CheckpointError(
            f"{', '.join(configs)}: use_dora divides by the lengths of rows of the base's weights, and no adapter "
            "names its base (base_model_name_or_path); expected base_model: the folder or Hub id of their base"
        )
    if len(set(found.values())) > 1:
        told = ", ".join(f"{base} by {name}" for name, base in found.items())
        raise CheckpointError(
            f"use_dora divides by the lengths of rows of the base's weights, and the adapters name different bases "
            f"({told}); expected base_model: the one that all are of"
        )
    return next(iter(found.values()))


def open_base(reference: str, given: bool) -> Base:
    """Opens the base of DoRA adapters, from its headers.

    Args:
        reference: A folder or Hub id, with adapters of its own if wanted.
        given: Whether the configuration names it, rather than the adapters.

    Raises:
        CheckpointError: If it cannot be opened; it says where it is named.
    """
    try:
        checkpoint, adapter = open_model(reference, find_places=AdapterNames())
    except CheckpointError as error:
        where = "base_model" if given else "base_model_name_or_path in adapter_config.json"
        advice = "" if given else "; use_dora needs its weights: expected base_model: the folder or Hub id of the base"
        raise CheckpointError(*(f"{where}: {problem}{advice}" for problem in error.problems)) from None
    notes = [*checkpoint.notes, *(adapter.notes if adapter is not None else ())]
    kinds = checkpoint.quantized()
    if kinds:
        notes.append(f"the base is quantised ({', '.join(kinds)}): rows are as long as in its dequantised weights")
    return Base(reference, checkpoint, adapter, notes=tuple(notes))


def fit_base(base: Base, modules: Sequence[AdaptedModule], config: Mapping[str, Any]) -> Base:
    """Finds the weights of modules in their base.

    Args:
        base: The base.
        modules: Modules of the merged adapter.
        config: Contents of an `adapter_config.json`, which says for what class.

    Raises:
        CheckpointError: If the base lacks one, or has it in another shape or layout; it names all.
    """
    places = AdapterNames()(base.checkpoint, config)
    weights: dict[str, BaseWeight] = {}
    problems: list[str] = []
    for module in modules:
        place = places.find(f"{module.path}.weight")
        problem = _place_problem(module, place, places, base, config)
        if problem is not None or place is None or place.key is None:
            problems.append(problem or f"{module.path}: no weight of it in {base.name}")
            continue
        weights[module.path] = BaseWeight(place.key, _is_transposed(module, place, base, config))
    by_key: dict[str, list[str]] = {}
    for path, weight in weights.items():
        by_key.setdefault(weight.key, []).append(path)
    problems += [
        f"{' and '.join(paths)} are one tensor in {base.name} ({key}), which each would bring to lengths of its own; "
        f"{_INSTEAD}"
        for key, paths in by_key.items()
        if len(paths) > 1
    ]
    if problems:
        raise CheckpointError(*group_alike(problems)[:20])
    notes = list(base.notes)
    if not places.by_class:
        notes.append(f"{base.name}: weights are found {places.way}, as its class is not known")
    return Base(base.name, base.checkpoint, base.adapter, weights, tuple(notes))


def _is_transposed(module: AdaptedModule, place: Place, base: Base, config: Mapping[str, Any]) -> bool:
    """Whether a weight lies `[I, O]`: its module says so, as for peft; the config, where no class is known."""
    if module.embedding:
        return True
    quantization = base.checkpoint.tensors[str(place.key)].quantization
    if quantization is not None and not quantization.keeps_rows:
        return False  # bitsandbytes quantises a `Conv1D` as a linear
    return bool(config.get("fan_in_fan_out")) if place.module is None else weight_is_transposed(place.module)


def _place_problem(
    module: AdaptedModule, place: Place | None, places: Places, base: Base, config: Mapping[str, Any]
) -> str | None:
    """Says why rows of a module's weight cannot be measured; `None` if they can."""
    name = f"{module.path}.weight"
    if place is None or not place.pieces:
        return f"{base.name} has no tensor {name} (matched {places.way}); expected the base of the adapters"
    if place.key is None or place.fused:
        return f"{base.name} has {name} in another layout, whose rows cannot be measured; {_INSTEAD}"
    kind = place.module
    if kind is not None and not module.embedding and not is_linear(kind):
        return f"{module.path} is a {type(kind).__name__} in {base.name}, for which peft has no DoRA; {_INSTEAD}"
    own = (module.outputs, module.inputs)
    wanted = tuple(reversed(own)) if _is_transposed(module, place, base, config) else own
    if place.shape != wanted:
        return (
            f"{name} is {list(place.shape)} in {base.name}, and the factors are of {list(wanted)}; expected the base "
            "of the adapters"
        )
    return None


# The arithmetic


@dataclass(frozen=True)
class DoraPart:
    """One adapter for one module.

    Attributes:
        factors: Its factors, and what multiplies them.
        magnitude: m `[O]`, float64; `None` for a plain LoRA.
        name: Name of the adapter, for messages.
    """

    factors: Scaled
    magnitude: torch.Tensor | None
    name: str


@dataclass(frozen=True)
class DoraMerge:
    """A merged module.

    Attributes:
        tensors: A* `[r, I]`, B* `[O, r]` and m* `[O]`, as they are written.
        merged: V before it was divided, and how much of it its rank keeps.
        gains: The smallest and the largest of ḡ.
        medians: Name of a DoRA → median of its g.
        error: ‖as written - Σ w_i ΔW_i‖².
        wanted: ‖Σ w_i ΔW_i‖², ΔW_i = W_i - W.
    """

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    merged: MergedFactors
    gains: tuple[float, float]
    medians: Mapping[str, float]
    error: float
    wanted: float


@dataclass(frozen=True)
class MeasuredRows:
    """The rows of a weight: what they are in some directions, and how long.

    Attributes:
        basis: Q `[I, M]`, orthonormal.
        inside: W Q `[O, M]`.
        squares: ‖rows of W‖² `[O]`.
    """

    basis: torch.Tensor
    inside: torch.Tensor
    squares: torch.Tensor

    def squared_lengths(self, gain_O: torch.Tensor | float, factors: Scaled) -> torch.Tensor:
        """Computes ‖rows of diag(g) W + s B A‖² `[O]`, where A lies in the basis.

        It is g² (‖W‖² - ‖W Q‖²) + ‖g W Q + s B (A Q)‖², so that nothing `[O, I]` is made.
        """
        gain = torch.as_tensor(gain_O, dtype=FACTOR_DTYPE).expand(len(self.squares))[:, None]
        outside = (self.squares - self.inside.square().sum(dim=1)).clamp(min=0)
        within = gain * self.inside + (factors.scale * factors.up) @ (factors.down @ self.basis)
        return gain.view(-1).square() * outside + within.square().sum(dim=1)

    def extended(self, down: torch.Tensor, weight_OI: torch.Tensor) -> MeasuredRows:
        """Adds the directions of another A `[r, I]`; those that rounding to float32 has made are not measured."""
        count = self.basis.shape[1]
        rest = down - (down @ self.basis) @ self.basis.T
        added = torch.linalg.qr(torch.cat([self.basis, rest.T], dim=1)).Q[:, count:]
        if (rest.norm(dim=1) > _ROUNDED * down.norm(dim=1)).any():
            inside = torch.cat([piece @ added for piece in _pieces(weight_OI)])
        else:
            inside = self.inside.new_zeros(len(self.inside), added.shape[1])
        basis = torch.cat([self.basis, added], dim=1)
        return MeasuredRows(basis, torch.cat([self.inside, inside], dim=1), self.squares)


def measure_rows(weight_OI: torch.Tensor, down: torch.Tensor) -> MeasuredRows:
    """Measures the rows of W in the directions of A `[M, I]`."""
    basis = torch.linalg.qr(down.T).Q
    found = [(piece @ basis, piece.square().sum(dim=1)) for piece in _pieces(weight_OI)]
    inside, squares = zip(*found, strict=True)
    return MeasuredRows(basis, torch.cat(inside), torch.cat(squares))


def _pieces(weight_OI: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields rows of a weight in float64, some at a time."""
    step = max(1, _ELEMENTS_AT_ONCE // weight_OI.shape[1])
    for start in range(0, len(weight_OI), step):
        yield weight_OI[start : start + step].to(FACTOR_DTYPE)


def merge_dora(
    method: str,
    weight_OI: torch.Tensor,
    parts: Sequence[DoraPart],
    rank: int,
    parameters: Mapping[str, Any],
    dtype: torch.dtype,
) -> DoraMerge:
    """Merges one module of DoRA adapters, and of plain ones.

    Args:
        method: Name of the method.
        weight_OI: The base's weight, in its own dtype.
        parts: The adapters that have the module.
        rank: Rank of the result.
        parameters: All parameters of the method.
        dtype: Dtype of the factors.

    Raises:
        MergeError: If a row of an adapter or of the result is zeros, by whose length DoRA divides; or if so little is
            left of a row of W that no magnitude brings it back.
    """
    rows = measure_rows(weight_OI, torch.cat([part.factors.down for part in parts]))
    gains = [_gain(rows, part) for part in parts]
    weights = [part.factors.weight for part in parts]
    scaled = [
        Scaled(part.factors.down, part.factors.up * gain[:, None], part.factors.scale, part.factors.weight)
        for part, gain in zip(parts, gains, strict=True)
    ]
    changes = [gain - 1 for gain in gains]
    gain_O = 1 + METHODS[method].merge_changes(changes, weights, parameters)
    merged = merge_factors(method, scaled, rank, parameters)
    down, up = (each.to(dtype).contiguous() for each in (merged.down, _divided(merged, gain_O, rows)))
    written = Scaled(down.to(FACTOR_DTYPE), up.to(FACTOR_DTYPE), 1.0)
    rows = rows.extended(written.down, weight_OI)
    lengths_O = _lengths(rows, written, "the merged adapter")
    magnitude = (gain_O * lengths_O).to(torch.promote_types(dtype, MAGNITUDE_DTYPE))
    written_O = magnitude / lengths_O
    total_down, total_up = cat(scaled, {})
    sum_O = 1 + sum_of_changes(changes, weights, {})
    difference = Scaled(
        torch.cat([written.down, total_down]), torch.cat([written.up * written_O[:, None], -total_up], dim=1), 1.0
    )
    return DoraMerge(
        (down, up, magnitude),
        merged,
        (gain_O.min().item(), gain_O.max().item()),
        {
            part.name: gain.median().item()
            for part, gain in zip(parts, gains, strict=True)
            if part.magnitude is not None
        },
        rows.squared_lengths(written_O - sum_O, difference).sum().item(),
        rows.squared_lengths(sum_O - 1, Scaled(total_down, total_up, 1.0)).sum().item(),
    )


def _gain(rows: MeasuredRows, part: DoraPart) -> torch.Tensor:
    """Computes g `[O]` of one adapter."""
    if part.magnitude is None:
        return torch.ones_like(rows.squares)
    return part.magnitude / _lengths(rows, part.factors, part.name)


def _lengths(rows: MeasuredRows, factors: Scaled, name: str) -> torch.Tensor:
    """Computes ‖rows of W + s B A‖ `[O]`.

    Raises:
        MergeError: If one is 0, or as good as that in float32.
    """
    lengths_O = rows.squared_lengths(1.0, factors).sqrt()
    added_O = rows.squared_lengths(0.0, factors).sqrt()
    zeros = torch.nonzero(lengths_O <= _ROUNDED * (rows.squares.sqrt() + added_O)).view(-1).tolist()
    if zeros:
        raise MergeError(
            f"row {zeros[0]} (and {len(zeros) - 1} more) of base and {name} together is zeros, by whose length DoRA "
            f"divides; expected the base of the adapters, or {_INSTEAD}"
        )
    return lengths_O


def _divided(merged: MergedFactors, gain_O: torch.Tensor, rows: MeasuredRows) -> torch.Tensor:
    """Divides B of V by the gains; rows of V that are zeros stay so, whatever their gain.

    Raises:
        MergeError: If a row of V is so much longer than what is left of the base's that float32 would lose that.
    """
    core = torch.linalg.qr(merged.down.T, mode="r").R
    own_O = torch.linalg.vector_norm(merged.up @ core.T, dim=1)  # rows of V
    longest = max(own_O.max().item(), rows.squares.max().sqrt().item())
    beyond = own_O > gain_O.abs() * _LARGEST_RATIO * longest
    lost = torch.nonzero(beyond & (own_O > _NEGLIGIBLE * longest)).view(-1).tolist()
    if lost:
        raise MergeError(
            f"with these weights, nothing of the base's row {lost[0]} (and {len(lost) - 1} more) is left, to which "
            f"DoRA adds before it brings it to a length: the gains add up to {gain_O[lost[0]].item():.2g}; expected "
            f"other weights, or {_INSTEAD}"
        )
    divisor = torch.where(beyond | (gain_O == 0), torch.inf, gain_O)
    return merged.up / divisor[:, None]
