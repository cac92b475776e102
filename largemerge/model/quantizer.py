"""Which linears Transformers quantises, asked of Transformers itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from largemerge.checkpoint.quantized import bitsandbytes
from largemerge.checkpoint.tensor_info import Quantization
from largemerge.errors import LargemergeError
from largemerge.model.skeleton import Skeleton


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """The settings with which Transformers loads such a checkpoint; 4-bit weights are multiplied in `dtype`."""
    config_class: Any = BitsAndBytesConfig  # has no annotations
    if quantization.method == "int8":
        return config_class(load_in_8bit=True)
    return config_class(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.method,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def quantized_linears(skeleton: Skeleton, quantization: Quantization) -> dict[str, bool]:
    """Lets Transformers replace the linears of a copy of the model, as it does before it loads quantised weights.

    Args:
        skeleton: Left as it is.
        quantization: To be tried.

    Returns:
        Module path → whether the module holds its weight `[in, out]`, for every linear that was replaced.

    Raises:
        LargemergeError: If bitsandbytes is not installed or does not work here.
    """
    package: Any = bitsandbytes("output.quantization")
    quantizer: Any = AutoHfQuantizer.from_config(bitsandbytes_config(quantization, skeleton.dtype), pre_quantized=True)
    try:
        quantizer.validate_environment(device_map=None)
    except (ImportError, RuntimeError, ValueError) as error:
        raise LargemergeError(f"output.quantization: {str(error).splitlines()[0]}") from None
    model = copy.deepcopy(skeleton.model)
    before: dict[str, nn.Module] = dict(model.named_modules())
    quantizer.preprocess_model(model=model, device_map=None)
    replaced = (package.nn.Linear4bit, package.nn.Linear8bitLt)
    return {
        path: isinstance(before.get(path), Conv1D)
        for path, module in model.named_modules()
        if isinstance(module, replaced)
    }
