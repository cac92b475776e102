"""Tensors on disk before they are read or written: name, shape, dtype, place, quantisation.

    TensorInfo      a tensor to read, as a file's header describes it
    OutputTensor    a tensor to write

A quantised weight lies on disk as several tensors: packed numbers, scales, …. Here it is one tensor with the shape and
dtype that it has for the model, and its `parts`. `quantized.py` knows which parts there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from largemerge.config_file import DtypeName

Tensors = dict[str, torch.Tensor]
"""Tensors by name; on the way through a merge: in the module's layout, by parameter name."""

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Dtypes by their names in safetensors headers."""
MODULE_SEPARATOR = "::"
"""Stands between the folder of a module of sentence-transformers and the name of a tensor in it."""

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""Matches a layer's number inside a tensor's name."""


def kinds_of_names(names: Iterable[str]) -> list[str]:
    """Replaces the layers' numbers in names by `*`, and returns each result once."""
    return list(dict.fromkeys(LAYER_NUMBER.sub("*", name) for name in names))


def list_kinds(names: Iterable[str], shown: int = 4) -> str:
    """Lists names for people: layers' numbers as `*`, the first few kinds."""
    kinds = kinds_of_names(names)
    return ", ".join(kinds[:shown]) + (f" and {len(kinds) - shown} more kinds" if len(kinds) > shown else "")


def torch_dtype(name: DtypeName) -> torch.dtype:
    """Returns the torch dtype of a configuration's name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name without `torch.`, such as `float32`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Quantization:
    """Kind of quantisation of a weight.

    Attributes:
        method: `nf4`, `fp4` or `int8`, as bitsandbytes means them; or `fp8`.
        double_quant: Whether the scales of 4-bit blocks are quantised too.
        transposed: Whether what lies on disk is the transpose of the parameter: Transformers quantises
            GPT-2's `Conv1D`, whose weight is `[in, out]`, as if it were a linear.
        block: Numbers that share a scale, along each dimension, in an `fp8` weight; empty where it has no scales.
    """

    method: str
    double_quant: bool = False
    transposed: bool = False
    block: tuple[int, ...] = ()

    @property
    def keeps_rows(self) -> bool:
        """Whether what lies on disk has the parameter's rows, so that these can be read alone."""
        return self.method == "fp8"

    @property
    def label(self) -> str:
        """Description for people."""
        if self.method == "fp8":
            return "fp8" if self.block else "fp8 without scales"
        return f"{self.method}, double quantised" if self.double_quant else self.method


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, as its header describes it.

    Attributes:
        name: Name on disk.
        shape: Shape for the model.
        dtype: Stored dtype; for a quantised weight, the dtype that it is dequantised to.
        file: The file that holds it.
        offset: Byte position in `file`; `None` in a pickle file.
        quantization: Kind of quantisation; `None` for a plain tensor.
        parts: Tensors on disk that make up a quantised weight, by name; the one that an adapter has for a plain
            tensor; else empty.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int | None
    quantization: Quantization | None = None
    parts: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def num_elements(self) -> int:
        """Number of elements for the model, whatever lies on disk."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size on disk, in bytes."""
        if self.parts:
            return sum(part.num_bytes for part in self.parts.values())
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: its dtype and shape for the model, and how it is to be stored.

    Attributes:
        dtype: Dtype that it is handed over in, and that a quantised weight will be dequantised to.
        shape: Shape for the model.
        quantization: Kind of quantisation; `None` for a plain tensor.
        parts: Tensors on disk that make up a quantised weight, by name; empty for a plain tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    quantization: Quantization | None = None
    parts: Mapping[str, OutputTensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size on disk, in bytes."""
        if self.parts:
            return sum(part.num_bytes for part in self.parts.values())
        return math.prod(self.shape) * self.dtype.itemsize
