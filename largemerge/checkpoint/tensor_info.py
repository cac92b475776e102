"""Dtypes by the names that configurations use. Apart from `config.py`, so that reading a file needs no torch.

What is known of a tensor on disk before it is read or written, quantised ones included.

A quantised weight lies on disk as several tensors: packed numbers, scales, …. Here it is one tensor with the
shape and dtype that it has for the model, and its `parts`. Which parts there are is known to `quantized.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from largemerge.config_file import DtypeName


def torch_dtype(name: DtypeName) -> torch.dtype:
    """The torch dtype that a configuration's name means."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


Tensors = dict[str, torch.Tensor]
"""Parameter name in the module → tensor in the module's layout."""


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
}


@dataclass(frozen=True)
class Quantization:
    """How a weight is quantised.

    Attributes:
        method: `nf4`, `fp4` or `int8`, as bitsandbytes means them.
        double_quant: Whether the scales of 4-bit blocks are quantised too.
        transposed: Whether what lies on disk is the transpose of the parameter: Transformers quantises
            GPT-2's `Conv1D`, whose weight is `[in, out]`, as if it were a linear.
    """

    method: str
    double_quant: bool = False
    transposed: bool = False

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.method}, double quantised" if self.double_quant else self.method


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, as its header describes it.

    Attributes:
        name: On disk.
        shape: Dimensions.
        dtype: As stored; of a quantised weight: what it is dequantised to.
        file: The file that holds it.
        offset: Byte position in `file`; `None` in a pickle file.
        quantization: `None` for a plain tensor.
        parts: Of a quantised weight, by their names on disk; empty for a plain tensor.
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
        """For the model, whatever lies on disk."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        if self.parts:
            return sum(part.num_bytes for part in self.parts.values())
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: its dtype and shape for the model, and how it is to be stored.

    Attributes:
        dtype: In which it is handed over; of a quantised weight: what it will be dequantised to.
        shape: Dimensions.
        quantization: `None` for a plain tensor.
        parts: Of a quantised weight, by their names on disk; empty for a plain tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    quantization: Quantization | None = None
    parts: Mapping[str, OutputTensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        if self.parts:
            return sum(part.num_bytes for part in self.parts.values())
        return math.prod(self.shape) * self.dtype.itemsize
