"""Quantised weights: the tensors on disk that make up one weight, read and written.

By bitsandbytes, read and written:

    int8       X.weight        int8 [out, in]            W = weight · SCB / 127, row by row
               X.SCB           float32 [out]
               X.weight_format uint8 [], 0: by rows      (older files may lack it)
    nf4, fp4   X.weight        two numbers a byte, in blocks of 64 as a rule
               X.weight.absmax                           a scale for each block
               X.weight.quant_map                        the values of the 16 numbers
               X.weight.quant_state.bitsandbytes__nf4    JSON as bytes: the weight's shape, dtype, block size
               X.weight.nested_absmax, .nested_quant_map where the scales are quantised too ("double")

In 8-bit floating point, whoever wrote it, read only (`float8.py`):

    fp8        X.weight        float8 [out, in]          W = weight · scale, in float32
               X.weight_scale, X.weight_scale_inv, …     one number, one for each output, or one for each block

    reading:   headers ──► fold_quantized ──► one TensorInfo with parts ──► dequantize ──► weight
    writing:   shape ──► quantized_tensor ──► one OutputTensor with parts; weight ──► quantize ──► parts

The layout of the first kind is that of Transformers' `save_pretrained`, the arithmetic bitsandbytes' own, which is
imported only when such a weight is met. Methods: LLM.int8() (arXiv 2208.07339), NF4 and double quantisation (QLoRA,
arXiv 2305.14314). All other formats are refused by name, as their config or their tensors tell.

A shard's header is written before its first tensor is known, so the sizes of all parts must follow from the shape
alone; bitsandbytes computes them on the meta device. Only the quantisation state varies with the numbers: as JSON it
holds the mean of the scales (`nested_offset`), 3 to 23 characters. It gets room for the longest, filled up with
spaces, which every JSON reader skips.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from largemerge.checkpoint.float8 import FP8, dequantize_float8, fold_float8
from largemerge.checkpoint.tensor_info import OutputTensor, Quantization, TensorInfo, dtype_name
from largemerge.errors import CheckpointError, MergeError, group_alike
from largemerge.text_files import parse_json

ReadBytes = Callable[[TensorInfo], bytes]
"""Reads one small tensor."""

BLOCK_SIZE = 64
"""Number of elements that share a scale in 4 bits: bitsandbytes' default, which Transformers leaves, too."""
STATE = ".quant_state.bitsandbytes__"
SCALES = ".SCB"
FORMAT = ".weight_format"
_PLAIN_PARTS = ("absmax", "quant_map")
_NESTED_PARTS = ("nested_absmax", "nested_quant_map")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LONGEST_OFFSET = -1.1754943508222875e-38  # 23 characters
_MAX_PROBLEMS = 20
_MAX_STATE_BYTES = 1 << 16
SETTINGS_KEYS = ("quantization_config", "compression_config")
"""Keys of a config that describe how its weights are quantised: Transformers', and one of older compressed-tensors."""
_MAYBE_FP8 = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark", "quanto")
_EXPECTED = (
    "expected bitsandbytes (int8, nf4, fp4), FP8, or plain weights; take the checkpoint in 16 bits that it was made "
    "from, or load it with Transformers, dequantise() it, and save it"
)
_FOREIGN = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors, packed integers or NVFP4",
    ".weight_zero_point": "compressed-tensors, with zero points",
    ".weight_global_scale": "NVFP4",
    ".weight_scale_2": "NVFP4 of ModelOpt",
    ".bitmask": "compressed-tensors, sparse",
    ".weight._data": "Quanto",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    "_blocks": "MXFP4",
}
"""Formats that are refused, by the end of a tensor's name."""


def bitsandbytes(what_for: str) -> Any:
    """Imports bitsandbytes.

    Args:
        what_for: Beginning of the message: what needs it.

    Raises:
        CheckpointError: If it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise CheckpointError(
            f"{what_for} needs bitsandbytes, which cannot be imported ({error}); pip install 'largemerge[bitsandbytes]'"
        ) from None


def quantization_settings(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Finds what a config says of quantisation: the key and its settings; `None` where it says nothing."""
    parts = [("", config), *((f"{key}.", part) for key, part in config.items() if isinstance(part, Mapping))]
    found = ((f"{where}{key}", part.get(key)) for where, part in parts for key in SETTINGS_KEYS)
    return next(((key, settings) for key, settings in found if settings), None)


def quantization_method(config: Mapping[str, Any], name: str) -> str | None:
    """Returns `bitsandbytes` or `fp8` for a quantised checkpoint, `None` for a plain one.

    A checkpoint of `fp8` may turn out to be quantised otherwise, since a config does not always tell: `fold_quantized`
    looks at its tensors.

    Raises:
        CheckpointError: If the checkpoint is quantised in a way that cannot be read.
    """
    found = quantization_settings(config)
    if found is None:
        return None
    key, settings = found
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method is None and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        method = "bitsandbytes"  # files of 2023 do not name it
    if method is None and key.endswith("compression_config"):
        method = "compressed-tensors"
    if method == "bitsandbytes":
        return "bitsandbytes"
    if method in _MAYBE_FP8:
        return FP8
    raise CheckpointError(f"{name}: quantized ({method or 'unknown method'}); {_EXPECTED}")


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Finds the dtype that a quantised model computes in: its config's, else bitsandbytes', else bfloat16."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    named = [part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
    settings = config.get("quantization_config")
    named.append(settings.get("bnb_4bit_compute_dtype") if isinstance(settings, Mapping) else None)
    return next((_DTYPES[name] for name in named if name in _DTYPES), torch.bfloat16)


def fold_quantized(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], name: str, read: ReadBytes
) -> dict[str, TensorInfo]:
    """Folds the parts of every quantised weight into one tensor.

    Args:
        tensors: All tensors of a checkpoint as they lie on disk.
        config: Contents of `config.json`.
        name: Name that the user gives the checkpoint, for messages.
        read: Reads a quantisation state, some hundred bytes that hold a weight's shape.

    Returns:
        The tensors as the model sees them: logical shapes, floating-point dtypes.

    Raises:
        CheckpointError: If parts are missing or broken; it names all of them.
    """
    method = quantization_method(config, name)
    foreign = _foreign_format(tensors, name)
    if foreign is not None:
        raise CheckpointError(foreign)
    problems: list[str] = []
    folded, scales = fold_float8(tensors, config, model_dtype(config), name, problems)
    of_bitsandbytes = False
    for key, info in tensors.items():
        try:
            if STATE in key:
                weight = _fold_4bit(key, tensors, _state(info, read))
            elif key.endswith(SCALES) and f"{key.removesuffix(SCALES)}.weight" in tensors:
                weight = _fold_int8(key.removesuffix(SCALES), tensors, model_dtype(config), read)
            else:
                continue
            folded[weight.name] = weight
            of_bitsandbytes = True
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            problems.append(f"{name}: {key}: {_reason(error)}")
    used = {part for weight in folded.values() for part in weight.parts} | scales
    left = [key for key in tensors if key not in used]
    if not problems and method is not None:
        problems += [f"{name}: {key}: {_orphan(tensors[key])}" for key in left if _orphan(tensors[key])]
    if not problems:
        problems += [f"{name}: {key}: {_no_weight(tensors[key])}" for key in left if _no_weight(tensors[key])]
    if not problems and method == FP8 and not any(map(_is_float8, folded.values())):
        where, _ = quantization_settings(config) or ("", None)
        problems.append(
            f"{name}: quantized, as {where} in config.json says, but no tensor is float8; {_EXPECTED}; where the "
            "weights are plain, remove the key"
        )
    if problems:
        raise CheckpointError(*group_alike(problems)[:_MAX_PROBLEMS])
    if of_bitsandbytes:
        bitsandbytes(f"{name}: a checkpoint with quantised weights")
    return {key: folded.get(key, info) for key, info in tensors.items() if key in folded or key not in used}


def quantization_notes(stored: Mapping[str, TensorInfo], folded: Mapping[str, TensorInfo], name: str) -> Iterator[str]:
    """Yields what a user should know of weights in FP8, from a checkpoint's tensors before and after folding."""
    weights = list(filter(_is_float8, folded.values()))
    scaled = [info for info in weights if info.quantization is not None and info.quantization.block]
    if scaled:
        used = {part for info in folded.values() for part in info.parts}
        left_out = [key for key in stored if key not in folded and key not in used]
        more = f"; {len(left_out)} scales of activations, such as {left_out[0]}, are left out" if left_out else ""
        dtype = dtype_name(scaled[0].dtype)
        yield f"{name}: {len(scaled)} weights in FP8 are dequantised by their scales to {dtype}{more}"
    if len(scaled) < len(weights):
        plain = next(info for info in weights if info.quantization is not None and not info.quantization.block)
        count, dtype = len(weights) - len(scaled), dtype_name(plain.dtype)
        yield f"{name}: {count} float8 tensors without scales, such as {plain.name}, are read as they are, to {dtype}"


def _is_float8(info: TensorInfo) -> bool:
    return info.quantization is not None and info.quantization.method == FP8


def _foreign_format(tensors: Mapping[str, TensorInfo], name: str) -> str | None:
    """Says in which format that cannot be read a checkpoint is quantised, from its tensors; `None` if in none."""
    for key in tensors:
        for end, format_name in _FOREIGN.items():
            partner = f"{key.removesuffix(end)}_scales"  # what else may be called blocks
            if key.endswith(end) and (end != "_blocks" or partner in tensors):
                return f"{name}: quantized ({format_name}, as {key} tells); {_EXPECTED}"
    return None


def _no_weight(info: TensorInfo) -> str:
    """Says why a tensor is no plain weight though it is called one; "" if nothing speaks against it."""
    if info.name.endswith("weight") and info.shape and not info.dtype.is_floating_point:
        return (
            f"a weight in {dtype_name(info.dtype)}: quantised in a way that neither config nor names tell; {_EXPECTED}"
        )
    if info.dtype.is_floating_point and info.dtype.itemsize == 1:
        return f"scales in {dtype_name(info.dtype)} without their weight in float8; {_EXPECTED}"
    if info.name.endswith((".weight_scale", "_scale_inv", ".scale_weight")):
        return f"a scale without a weight in float8; {_EXPECTED}"
    return ""


def _fold_4bit(key: str, tensors: Mapping[str, TensorInfo], state: Mapping[str, Any]) -> TensorInfo:
    weight, _, kind = key.partition(STATE)
    nested = "nested_offset" in state
    names = [weight, *(f"{weight}.{part}" for part in (*_PLAIN_PARTS, *(_NESTED_PARTS if nested else ())))]
    parts = _parts([*names, key], tensors)
    if kind not in ("nf4", "fp4") or state["quant_type"] != kind:
        raise ValueError(f"quantised as {state['quant_type']!r}; expected nf4 or fp4, as the tensor's name says")
    shape = tuple(int(size) for size in state["shape"])
    elements, blocksize = math.prod(shape), int(state["blocksize"])
    sizes = {weight: (elements + 1) // 2, f"{weight}.absmax": -(-elements // blocksize)}
    found = {weight: parts[weight].num_bytes, f"{weight}.absmax": parts[f"{weight}.absmax"].num_elements}
    for part, expected in sizes.items():
        # Packed numbers may be stored as another dtype, and padded to a multiple of its size.
        if not expected <= found[part] <= expected + 7 * (part == weight):
            raise ValueError(f"{list(shape)} in blocks of {blocksize} needs {expected} in {part}, found {found[part]}")
    if state["dtype"] not in _DTYPES:
        raise ValueError(f"dequantises to {state['dtype']!r}; expected one of {list(_DTYPES)}")
    quantization = Quantization(kind, double_quant=nested)
    return dataclasses.replace(
        parts[weight], shape=shape, dtype=_DTYPES[state["dtype"]], quantization=quantization, parts=parts
    )


def _fold_int8(module: str, tensors: Mapping[str, TensorInfo], dtype: torch.dtype, read: ReadBytes) -> TensorInfo:
    weight, scales, layout = f"{module}.weight", f"{module}{SCALES}", f"{module}{FORMAT}"
    parts = _parts([weight, scales, *([layout] if layout in tensors else [])], tensors)
    info = parts[weight]
    if info.dtype != torch.int8:
        raise ValueError(f"{weight} is {info.dtype}, expected int8")
    if parts[scales].num_elements != info.shape[0]:
        raise ValueError(f"{parts[scales].num_elements} scales for the {info.shape[0]} rows of {weight}")
    if layout in parts and any(read(parts[layout])):
        raise ValueError(f"{layout} is not 0 (by rows): load and save it again with a bitsandbytes of today")
    return dataclasses.replace(info, dtype=dtype, quantization=Quantization("int8"), parts=parts)


def _state(info: TensorInfo, read: ReadBytes) -> Mapping[str, Any]:
    """Reads the quantisation state of a 4-bit weight, which is a small JSON."""
    if info.num_bytes > _MAX_STATE_BYTES:
        raise ValueError(f"the quantisation state has {info.num_bytes:,} bytes; fetch the checkpoint again")
    state = parse_json(read(info).decode("utf-8"))
    if not isinstance(state, dict) or not isinstance(state["shape"], list):
        raise ValueError("the quantisation state is no object with a shape; fetch the checkpoint again")
    sizes = [*state["shape"], state["blocksize"]]
    if not all(type(size) is int and 0 < size < 1 << 40 for size in sizes):
        raise ValueError(f"shape and blocksize are {sizes}; expected whole numbers above 0")
    return state


def _parts(names: list[str], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"the quantised weight lacks {', '.join(missing)}; fetch the checkpoint again")
    return {name: tensors[name] for name in names}


def _orphan(info: TensorInfo) -> str:
    """Says why a tensor that is part of no quantised weight should be; "" if it need not."""
    if info.dtype == torch.int8 and info.name.endswith(".weight"):
        return f"an int8 weight without its scales ({info.name.removesuffix('.weight')}{SCALES})"
    if info.name.endswith(tuple(f".weight.{part}" for part in (*_PLAIN_PARTS, *_NESTED_PARTS))):
        return f"part of a 4-bit weight whose quantisation state (…{STATE}nf4 or fp4) is missing"
    if info.name.endswith(SCALES):
        return f"scales without their weight ({info.name.removesuffix(SCALES)}.weight)"
    return ""


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the quantisation state has no {error}"
    if isinstance(error, (UnicodeDecodeError, json.JSONDecodeError)):
        return "the quantisation state is not JSON; fetch the checkpoint again"
    return str(error)


def transposed(info: TensorInfo) -> TensorInfo:
    """Describes the same quantised weight for a module that holds its transpose."""
    assert info.quantization is not None and len(info.shape) == 2, info.name
    quantization = dataclasses.replace(info.quantization, transposed=not info.quantization.transposed)
    return dataclasses.replace(info, shape=info.shape[::-1], quantization=quantization)


def dequantize(
    name: str, parts: Mapping[str, torch.Tensor], quantization: Quantization, dtype: torch.dtype
) -> torch.Tensor:
    """Dequantises a weight, on the device of its parts.

    Args:
        name: Name of the weight on disk.
        parts: Its parts by their names on disk.
        quantization: Kind of quantisation.
        dtype: Dtype of the result.
    """
    if quantization.method == FP8:
        return dequantize_float8(parts[name], parts, name, quantization, dtype)
    functional = bitsandbytes(f"{name}: a quantised weight").functional
    if quantization.method == "int8":
        scales = parts[name.removesuffix(".weight") + SCALES]
        weight: torch.Tensor = functional.int8_vectorwise_dequant(parts[name], scales.reshape(-1)).to(dtype)
    else:
        described = {key.removeprefix(f"{name}."): part for key, part in parts.items() if key != name}
        state = functional.QuantState.from_dict(described, device=parts[name].device)
        shape, elements = state.shape, math.prod(state.shape)
        # In one row: where rows are no whole blocks, the CPU kernel of bitsandbytes 0.50 takes wrong scales.
        state.shape = torch.Size((1, elements))
        packed = parts[name].reshape(-1).view(torch.uint8)[: (elements + 1) // 2].reshape(-1, 1)
        weight = functional.dequantize_4bit(packed, state).reshape(shape).to(dtype)
    return weight.T.contiguous() if quantization.transposed else weight


def quantized_tensor(name: str, dtype: torch.dtype, shape: tuple[int, ...], quantization: Quantization) -> OutputTensor:
    """Lays out a quantised weight.

    Args:
        name: Name on disk, ending with `.weight`.
        dtype: Dtype that it is handed over in and will be dequantised to.
        shape: Shape in the module.
        quantization: Kind of quantisation.
    """
    out_in = shape[::-1] if quantization.transposed else shape
    if quantization.method == "int8":
        module = name.removesuffix(".weight")
        parts = {
            name: OutputTensor(torch.int8, out_in),
            module + SCALES: OutputTensor(torch.float32, out_in[:1]),
            module + FORMAT: OutputTensor(torch.uint8, ()),
        }
    else:
        _pack_4bit(torch.zeros(BLOCK_SIZE), name, quantization)  # it keeps tables: none may come to lie on meta
        dry = _pack_4bit(torch.empty(out_in, dtype=dtype, device="meta"), name, quantization)
        parts = {key: OutputTensor(part.dtype, tuple(part.shape)) for key, part in dry.items()}
    return OutputTensor(dtype, shape, quantization, parts)


def quantize(name: str, tensor: torch.Tensor, expected: OutputTensor) -> dict[str, torch.Tensor]:
    """Quantises a weight, on its device.

    Args:
        name: Name on disk.
        tensor: The weight in the module's layout.
        expected: Layout that `quantized_tensor` has made.

    Returns:
        Its parts by their names on disk.

    Raises:
        MergeError: If the weight, or its scale, is not finite.
    """
    quantization = expected.quantization
    assert quantization is not None and tensor.shape == expected.shape, (name, tensor.shape)
    out_in = (tensor.T if quantization.transposed else tensor).contiguous()
    if quantization.method == "int8":
        parts = _pack_int8(out_in, name)
        scales = parts[name.removesuffix(".weight") + SCALES]
    else:
        parts = _pack_4bit(out_in, name, quantization)
        scales = parts[f"{name}.nested_absmax" if quantization.double_quant else f"{name}.absmax"]
    if not torch.isfinite(scales).all():
        raise MergeError(f"{name}: cannot be quantised to {quantization.method}: it holds numbers that are not finite")
    state = f"{name}{STATE}{quantization.method}"
    if state in parts:
        room = expected.parts[state].shape[0] - parts[state].shape[0]
        parts[state] = F.pad(parts[state], (0, room), value=ord(" "))
    return parts


def _pack_int8(weight_OI: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    # The parameter class quantises when it is moved from the CPU to a device; it rounds to float16 first.
    package = bitsandbytes("output.quantization")
    packed = package.nn.Int8Params(weight_OI.cpu(), requires_grad=False, has_fp16_weights=False).to(weight_OI.device)
    module = name.removesuffix(".weight")
    row_format = torch.zeros((), dtype=torch.uint8)
    return {name: packed.data, module + SCALES: packed.SCB, module + FORMAT: row_format}


def _pack_4bit(weight_OI: torch.Tensor, name: str, quantization: Quantization) -> dict[str, torch.Tensor]:
    functional = bitsandbytes("output.quantization").functional
    packed, state = functional.quantize_4bit(
        weight_OI,
        blocksize=BLOCK_SIZE,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.method,
    )
    if weight_OI.is_meta and quantization.double_quant:
        state.offset = torch.tensor(_LONGEST_OFFSET)
    described: dict[str, Any] = state.as_dict(packed=True)
    return {name: packed, **{f"{name}.{key}": part for key, part in described.items()}}
