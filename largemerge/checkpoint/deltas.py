"""The arithmetic of adapters, for one weight at a time, as peft's `merge_and_unload` does it.

    LowRank       W + s·B·A;  W' = m · (W + s·B·A) / ‖W + s·B·A‖ with use_dora       s = alpha / r, or alpha / √r
    Experts       the same for a parameter of several experts, or one expert of it
    LowRankBias   b + s·b_B                                                           lora_bias
    TokenRows     some rows of embeddings, replaced                                   trainable_token_indices
    PeftLayer     every other kind: peft's own layer, built on the one weight

All is computed in float32 and rounded where peft rounds. LoRA: arXiv 2106.09685; rsLoRA: 2312.03732; DoRA: 2402.09353.
"""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from largemerge.checkpoint.adapter_places import Block
from largemerge.checkpoint.tensor_files import Rows

DELTA_DTYPE = torch.float32
_MIN_ROWS = 64
"""Rows of a product that are computed at least: with few, libraries take another kernel, which rounds differently."""

ReadOwn = Callable[[str], torch.Tensor]
"""Reads a tensor of the adapter's, in `DELTA_DTYPE` at least."""


def as_delta_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Returns an adapter's tensor in `DELTA_DTYPE`, or in a wider dtype of its own; whole numbers as they are."""
    if not tensor.dtype.is_floating_point:
        return tensor
    if tensor.dtype.itemsize == 1:  # float8 has no promotion
        return tensor.to(DELTA_DTYPE)
    return tensor.to(torch.promote_types(tensor.dtype, DELTA_DTYPE))


def _alike(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two factors in the wider of their dtypes."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


class Delta(Protocol):
    """What an adapter does to one tensor on disk."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the adapter's file that it takes."""

    @property
    def whole(self) -> bool:
        """Whether it needs the whole tensor, even where only some rows are wanted."""

    def renamed(self, rename: Callable[[str], str]) -> Delta:
        """Returns a copy that knows its tensors by other names."""

    def apply(self, weight: torch.Tensor, read: ReadOwn, rows: Rows) -> torch.Tensor:
        """Returns the adapted tensor, or those rows of it.

        Args:
            weight: The tensor, or its rows, in memory of its own.
            read: Reads the adapter's tensors.
            rows: The rows that `weight` holds; `None` for all.
        """


@dataclass(frozen=True)
class LowRank:
    """Adds a product of two factors to a matrix.

    Attributes:
        down: Name of A `[r, in]` in the adapter's file.
        up: Name of B `[out, r]`.
        scale: Factor s of B·A.
        transposed: Whether the matrix is `[in, out]`: GPT-2's `Conv1D`, embeddings.
        magnitude: Name of m, if there is one (DoRA): one number for every output.
        embedding: Whether the matrix is an embedding, of whose columns DoRA takes the norms.
        rounded: Whether the product is rounded to the matrix's dtype before it is added.
        piece: The block of the product that this tensor on disk takes; `None` for all of it.
        inside: The block of the tensor on disk that the product is added to; `None` for all of it.
    """

    down: str
    up: str
    scale: float
    transposed: bool = False
    magnitude: str | None = None
    embedding: bool = False
    rounded: bool = False
    piece: Block | None = None
    inside: Block | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of A, B and m in the adapter's file."""
        return (self.down, self.up, *([self.magnitude] if self.magnitude is not None else []))

    @property
    def whole(self) -> bool:
        """Whether norms are taken over rows that may not be there, or blocks cut."""
        return (self.transposed and self.magnitude is not None) or self.piece is not None or self.inside is not None

    def renamed(self, rename: Callable[[str], str]) -> LowRank:
        """Returns a copy that knows its tensors by other names."""
        magnitude = None if self.magnitude is None else rename(self.magnitude)
        return replace(self, down=rename(self.down), up=rename(self.up), magnitude=magnitude)

    def apply(self, weight: torch.Tensor, read: ReadOwn, rows: Rows) -> torch.Tensor:
        """Adds the product to a matrix, or to some rows of it (see `Delta`)."""
        down, up = _alike(read(self.down), read(self.up))
        if self.inside is not None:
            matrix = weight if self.inside.expert is None else weight[self.inside.expert]
            target = self.inside.of(matrix)
            product = (up @ down) * self.scale
            target += product.to(weight.dtype) if self.rounded else product
            return weight
        product = (
            _product_columns(up, down, rows).T if self.transposed else _product_rows(up, down, rows)
        ) * self.scale
        if self.piece is not None:
            product = self.piece.of(product)
        if self.magnitude is not None:
            return self._with_magnitude(weight, product, read(self.magnitude), rows)
        weight += product.to(weight.dtype) if self.rounded else product
        return weight

    def _with_magnitude(
        self, weight: torch.Tensor, product: torch.Tensor, magnitude: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        by_output = self.transposed
        total = weight.T + product.T if by_output else weight + product
        norm = torch.linalg.norm(total, dim=1).to(total.dtype)
        zeros = torch.nonzero(norm == 0).view(-1).tolist()
        if zeros:
            raise ValueError(
                f"use_dora divides by the length of {'column' if by_output else 'row'} {zeros[0]}, which is zero (and "
                f"{len(zeros) - 1} more); the adapter does not fit this model, or the model is broken"
            )
        magnitude = magnitude.reshape(-1)
        factor = (magnitude if rows is None or by_output else magnitude[rows]) / norm
        factor = factor.view(1, -1) if by_output else factor.view(-1, 1)
        merged: torch.Tensor = factor * (weight + product)
        return merged.to(weight.dtype)


@dataclass(frozen=True)
class Experts:
    """Adds a product of two factors to every expert of a parameter (`target_parameters`).

    Attributes:
        down: Name of A `[experts · r, in]` in the adapter's file.
        up: Name of B `[out, r · experts]`.
        scale: Factor of B·A.
        num_experts: Number of experts.
        outputs_first: Whether an expert's matrix is `[out, in]`.
        piece: The block of the parameter that the tensor on disk is; `None` for all of it.
    """

    down: str
    up: str
    scale: float
    num_experts: int
    outputs_first: bool
    piece: Block | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of A and B in the adapter's file."""
        return (self.down, self.up)

    @property
    def whole(self) -> bool:
        """Whether the tensor on disk is one expert's."""
        return self.piece is not None

    def renamed(self, rename: Callable[[str], str]) -> Experts:
        """Returns a copy that knows its tensors by other names."""
        return replace(self, down=rename(self.down), up=rename(self.up))

    def apply(self, weight: torch.Tensor, read: ReadOwn, rows: Rows) -> torch.Tensor:
        """Adds the products to all experts, to some, or to one (see `Delta`)."""
        down, up = _alike(read(self.down), read(self.up))
        down = down.reshape(self.num_experts, -1, down.shape[-1])  # [experts, r, in]
        up = up.reshape(up.shape[0], -1, self.num_experts)  # [out, r, experts]
        if self.piece is not None:
            weight += self.piece.of(self._product(up, down, int(self.piece.expert or 0), weight.dtype))
            return weight
        experts = range(self.num_experts)
        chosen = experts if rows is None else experts[rows] if isinstance(rows, slice) else rows.tolist()
        for place, expert in enumerate(chosen):  # one by one: all products at once would take much memory
            weight[place] += self._product(up, down, expert, weight.dtype)
        return weight

    def _product(self, up: torch.Tensor, down: torch.Tensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
        formula = "o r e, e r i -> e o i" if self.outputs_first else "o r e, e r i -> e i o"
        one = slice(expert, expert + 1)
        product: torch.Tensor = torch.einsum(formula, up[..., one], down[one])[0] * self.scale
        return product.to(dtype)


@dataclass(frozen=True)
class LowRankBias:
    """Adds the bias of B to a bias (`lora_bias`).

    Attributes:
        bias: Name of B's bias in the adapter's file.
        scale: Factor of it.
    """

    bias: str
    scale: float
    whole: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Name of B's bias in the adapter's file."""
        return (self.bias,)

    def renamed(self, rename: Callable[[str], str]) -> LowRankBias:
        """Returns a copy that knows its tensor by another name."""
        return replace(self, bias=rename(self.bias))

    def apply(self, weight: torch.Tensor, read: ReadOwn, rows: Rows) -> torch.Tensor:
        """Adds the bias (see `Delta`)."""
        added = read(self.bias) * self.scale
        weight += added if rows is None else added[rows]
        return weight


@dataclass(frozen=True)
class TokenRows:
    """Replaces some rows of embeddings (`trainable_token_indices`).

    Attributes:
        values: Name of the rows in the adapter's file.
        indices: Their token ids.
        num_rows: Number of rows of the embeddings.
    """

    values: str
    indices: tuple[int, ...]
    num_rows: int
    whole: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Name of the rows in the adapter's file."""
        return (self.values,)

    def renamed(self, rename: Callable[[str], str]) -> TokenRows:
        """Returns a copy that knows its tensor by another name."""
        return replace(self, values=rename(self.values))

    def apply(self, weight: torch.Tensor, read: ReadOwn, rows: Rows) -> torch.Tensor:
        """Replaces the rows (see `Delta`)."""
        place = torch.full((self.num_rows,), -1)
        place[torch.tensor(self.indices)] = torch.arange(len(self.indices))
        place = place if rows is None else place[rows]
        wanted = place >= 0
        weight[wanted] = read(self.values)[place[wanted]].to(weight.dtype)
        return weight


_building = threading.Lock()


@dataclass(frozen=True)
class PeftLayer:
    """Merges a weight with peft's own layer for it, built on this one module.

    Attributes:
        path: The module's path in the adapter's names.
        module: The module, on the meta device.
        tensors: Name in peft's state dict → name in the adapter's file, of the tensors of this layer.
        shared: The same, of the tensors that all layers share.
        config: Contents of `adapter_config.json`.
        largest: Modules with the most inputs and the most outputs of all that are adapted, by path: some kinds size
            what all layers share by these.
        leaf: Parameter of the module that is wanted: `weight` or `bias`.
    """

    path: str
    module: nn.Module
    tensors: Mapping[str, str]
    shared: Mapping[str, str]
    config: Mapping[str, Any]
    largest: Mapping[str, nn.Module] = field(default_factory=dict)
    leaf: str = "weight"
    whole: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its tensors in the adapter's file."""
        return (*self.tensors.values(), *self.shared.values())

    def renamed(self, rename: Callable[[str], str]) -> PeftLayer:
        """Returns a copy that knows its tensors by other names."""
        tensors = {key: rename(name) for key, name in self.tensors.items()}
        return replace(self, tensors=tensors, shared={key: rename(name) for key, name in self.shared.items()})

    def apply(self, weight: torch.Tensor, read: ReadOwn, rows: Rows) -> torch.Tensor:
        """Merges the layer into the weight (see `Delta`)."""
        own = {key: read(name) for key, name in (*self.tensors.items(), *self.shared.items())}
        merged = self.merge(weight, own)
        return merged.detach().to(weight.dtype)

    def merge(self, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Builds peft's layer on a weight, loads the adapter's tensors, and merges.

        Args:
            weight: The weight or the bias, whichever `leaf` says.
            own: The adapter's tensors by their names in peft's state dict.

        Raises:
            ValueError: If peft does not take these tensors, or cannot merge this kind.
        """
        module = _filled(self.module, {self.leaf: weight}, weight.dtype)
        with _building, quiet_peft(), torch.no_grad():
            others = {path: _filled(each, {}, weight.dtype) for path, each in self.largest.items() if path != self.path}
            layer, problems = build_layer({self.path: module, **others}, self.path, own, self.config)
        if problems:
            raise ValueError("; ".join(problems))
        with quiet_peft(), torch.no_grad():
            layer.merge(safe_merge=False)
            result: torch.Tensor = getattr(layer.get_base_layer(), self.leaf)
            return result.data


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keeps out of the output what peft, and bitsandbytes which it imports, say of matters that no user can change."""
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def build_layer(
    modules: Mapping[str, nn.Module], path: str, own: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """Builds peft's layers on some modules of a model that has no others, and loads the tensors of one.

    Returns:
        The layer at `path`, and problems with its tensors.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import set_peft_model_state_dict

    root = nn.Module()
    for name, module in modules.items():
        parent = root
        *above, last = name.split(".")
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)
    model: Any = PeftModel(root, peft_config(config, modules))
    result: Any = set_peft_model_state_dict(model, dict(own))
    model.eval()  # some kinds draw random numbers, or refuse, while they train
    layer: Any = model.base_model.model.get_submodule(path)
    problems = [f"peft knows no {key}" for key in result.unexpected_keys]
    wanted = set(_adapter_keys(model, path))
    problems += [f"{key} is missing" for key in sorted(wanted - set(own))]
    if not hasattr(layer, "merge"):
        problems.append(f"peft adapts no {type(layer).__name__} with this kind")
    return layer, problems


def _adapter_keys(model: Any, path: str) -> list[str]:
    """Names in peft's state dict of the tensors that a saved adapter holds for one layer."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    prefix = f"base_model.model.{path}."
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    return [key for key in saved if key.startswith(prefix) and not key.startswith(f"{prefix}base_layer.")]


def peft_config(config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Any:
    """Makes peft's configuration of an adapter for just these modules.

    Raises:
        ValueError: If peft does not know the kind, or refuses a setting.
    """
    from peft import PeftConfig

    of_kind: Any = PeftConfig
    made = of_kind.from_peft_type(**{**config, "auto_mapping": None})
    for key, value in {
        "target_modules": set(modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "trainable_token_indices": None,
        "target_parameters": None,
    }.items():
        if hasattr(made, key):
            setattr(made, key, value)
    made.inference_mode = True
    made.task_type = None
    return made


def _filled(module: nn.Module, given: Mapping[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """Copies a module from the meta device; parameters that are not given become zeros, which take no memory yet."""
    made = copy.deepcopy(module)
    for name, parameter in list(made.named_parameters(recurse=False)):
        value = given.get(name)
        if value is None:
            value = torch.zeros(parameter.shape, dtype=dtype)
        setattr(made, name, nn.Parameter(value, requires_grad=False))
    return made


def _product_rows(up: torch.Tensor, down: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Computes rows of B·A `[out, in]` to the very bits of the whole product."""
    if rows is None:
        return up @ down
    few, inner = _padded(rows, up.shape[0])
    return (up[few] @ down)[inner]


def _product_columns(up: torch.Tensor, down: torch.Tensor, columns: Rows) -> torch.Tensor:
    """Computes columns of B·A `[out, in]` to the very bits of the whole product."""
    if columns is None:
        return up @ down
    few, inner = _padded(columns, down.shape[1])
    return (up @ down[:, few])[:, inner]


def _padded(rows: slice | torch.Tensor, num_rows: int) -> tuple[slice | torch.Tensor, slice | torch.Tensor]:
    """Returns some more rows, so that there are enough, and the place of those wanted among them."""
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(num_rows)
        first = max(0, min(start, num_rows - _MIN_ROWS))
        return slice(first, max(stop, min(num_rows, first + _MIN_ROWS))), slice(start - first, stop - first)
    if num_rows <= _MIN_ROWS:
        return slice(0, num_rows), rows
    if len(rows) >= _MIN_ROWS:
        return rows, slice(0, len(rows))
    return torch.cat([rows, rows.new_zeros(_MIN_ROWS - len(rows))]), slice(0, len(rows))
