"""Dtypes by the names that configurations use. Apart from `config.py`, so that reading a file needs no torch."""

from __future__ import annotations

import torch

from largemerge.config import DtypeName


def torch_dtype(name: DtypeName) -> torch.dtype:
    """The torch dtype that a configuration's name means."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
