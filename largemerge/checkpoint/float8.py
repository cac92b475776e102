"""Weights in FP8: which tensors on disk belong to one weight, and the weight's numbers.

    W[i, j] = float32(stored[i, j]) · scale[i // b₀, j // b₁]        then rounded to the dtype of the model

A scale stands for the whole tensor (b = its shape), for an output (b₁ = inputs) or for a block, 128 x 128 as a rule;
the name `weight_scale_inv`, which DeepSeek gave it, does not mean that one divides by it. Scales are found by their
names, whatever the config says: compressed-tensors, FBGEMM, ModelOpt and DeepSeek name them alike, and a copy of the
weights often has no config that tells.

A float8 tensor without a scale is taken as the numbers that it holds. Scales of activations (`input_scale`) belong to
quantised arithmetic, which a merge does not do: they are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from largemerge.checkpoint.tensor_info import Quantization, TensorInfo, dtype_name

FP8 = "fp8"
"""Name of the method in `Quantization`."""

_WEIGHT_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e8m0fnu)
_DEFAULT_BLOCK = 128
_ACTIVATIONS = (
    "input_scale",
    "input_scale_ub",
    "output_scale",
    "activation_scale",
    "input_zero_point",
    "output_zero_point",
    "q_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
    "prob_scale",
)
"""Last parts of the names of what belongs to the inputs of a product, not to its weight."""


def fold_float8(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    dtype: torch.dtype,
    name: str,
    problems: list[str],
) -> tuple[dict[str, TensorInfo], set[str]]:
    """Folds every float8 weight and its scale into one tensor.

    Args:
        tensors: All tensors of a checkpoint as they lie on disk.
        config: Contents of `config.json`.
        dtype: Dtype that weights are dequantised to.
        name: Name that the user gives the checkpoint, for messages.
        problems: Collects what is wrong.

    Returns:
        The folded weights by name, and names of tensors that are left out.
    """
    folded: dict[str, TensorInfo] = {}
    weights = {
        key: info for key, info in tensors.items() if info.dtype in _WEIGHT_DTYPES and not _is_scale(key, tensors)
    }
    for key, info in weights.items():
        scales = [scale for scale in _scale_names(key) if scale in tensors]
        if len(scales) > 1:
            problems.append(f"{name}: {key} has several scales ({', '.join(scales)}); expected one")
            continue
        parts, block = {key: info}, tuple[int, ...]()
        if scales:
            scale = tensors[scales[0]]
            if scale.dtype not in _SCALE_DTYPES:
                problems.append(
                    f"{name}: {scale.name} is {dtype_name(scale.dtype)} (MXFP8, or another format of blocks); expected "
                    "scales in floating point: take the checkpoint in 16 bits that it was made from"
                )
                continue
            found = _block(info.shape, scale.shape, _block_size(config))
            if found is None:
                problems.append(
                    f"{name}: {scale.name} is {list(scale.shape)}, which fits {key} {list(info.shape)} neither as one "
                    "scale, nor by output, nor by block (quantization_config: weight_block_size)"
                )
                continue
            parts, block = {key: info, scale.name: scale}, found
        quantization = Quantization(FP8, block=block)
        folded[key] = dataclasses.replace(info, dtype=dtype, quantization=quantization, parts=parts)
    return folded, set(_activation_scales(tensors, folded))


def dequantize_float8(
    stored: torch.Tensor,
    parts: Mapping[str, torch.Tensor],
    name: str,
    quantization: Quantization,
    dtype: torch.dtype,
    rows: slice | torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantises a weight, or some of its rows, in float32.

    Args:
        stored: The weight's rows as they are stored.
        parts: Its parts by their names on disk; of these only the scale is used, as a whole.
        name: Name of the weight on disk.
        quantization: Kind of quantisation.
        dtype: Dtype of the result.
        rows: The rows that `stored` has; `None` for all.
    """
    weight = stored.to(torch.float32)
    if not quantization.block:
        return weight.to(dtype)
    (scale,) = (part for key, part in parts.items() if key != name)
    scale = scale.to(torch.float32)
    scale = scale.reshape(*scale.shape, *[1] * (weight.dim() - scale.dim()))
    for dim, (size, block) in enumerate(zip(scale.shape, quantization.block, strict=False)):
        if size == 1:
            continue
        if dim == 0:
            numbers = torch.arange(size * block, device=scale.device)
            numbers = numbers[: weight.shape[0]] if rows is None else numbers[rows]
            scale = scale[numbers // block]
        elif block > 1:
            scale = scale.repeat_interleave(block, dim).narrow(dim, 0, weight.shape[dim])
    return weight.mul_(scale).to(dtype)


def _is_scale(key: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is another one's scale: NVFP4 stores them in float8."""
    weights = (key.removesuffix("_scale"), key.removesuffix("_scale_inv"), f"{key.rpartition('.')[0]}.weight")
    return any(key in _scale_names(weight) for weight in weights if weight in tensors)


def _scale_names(key: str) -> Iterator[str]:
    """Yields the names that the scale of a weight may have."""
    yield from (f"{key}_scale", f"{key}_scale_inv")
    module, _, leaf = key.rpartition(".")
    if leaf == "weight":
        yield from (f"{module}.scale_weight", f"{module}.scale")


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Reads the size of a block, outputs and inputs, from a config; `None` where it has none."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    settings = [part.get("quantization_config") for part in parts]
    sizes = (each.get("weight_block_size") for each in settings if isinstance(each, Mapping))
    found = next((size for size in sizes if size), None)
    if (
        isinstance(found, list | tuple)
        and len(found) == 2
        and all(isinstance(size, int) and size > 0 for size in found)
    ):
        return int(found[0]), int(found[1])
    return None


def _block(
    shape: tuple[int, ...], scale: tuple[int, ...], configured: tuple[int, int] | None
) -> tuple[int, ...] | None:
    """Finds out how many numbers share a scale along each dimension; `None` if the shapes do not fit."""
    if torch.Size(scale).numel() == 1 and len(scale) <= max(1, len(shape)):
        return shape or (1,)
    if len(scale) > len(shape):
        return None
    block = []
    by_dimension = (*[None] * (len(shape) - 2), *(configured or (None, None)))
    for size, count, wanted in zip(shape, (*scale, *[1] * (len(shape) - len(scale))), by_dimension, strict=False):
        sizes = [size] if count == 1 else [1] if count == size else [wanted] if wanted else []
        sizes += [size // count] if not sizes and count and size % count == 0 else []
        sizes += [_DEFAULT_BLOCK] if not sizes else []
        if count < 1 or -(-size // max(1, sizes[0] or 1)) != count:
            return None
        block.append(int(sizes[0] or 1))
    return tuple(block)


def _activation_scales(tensors: Mapping[str, TensorInfo], folded: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Yields the names of scales of activations, in modules that have a weight in float8, or hold one that has."""
    modules = {key.rpartition(".")[0] for key in folded}
    modules |= {module.rpartition(".")[0] for module in modules}
    for key in tensors:
        module, _, leaf = key.rpartition(".")
        if leaf in _ACTIVATIONS and module in modules:
            yield key
