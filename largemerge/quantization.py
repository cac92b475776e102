"""Which tensors of the output are written quantised, and what its config.json says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from largemerge.checkpoint.quantizing import quantized_tensor
from largemerge.checkpoint.tensor_info import OutputTensor, Quantization
from largemerge.config import OutputConfig
from largemerge.dtypes import dtype_name
from largemerge.inputs import Inputs
from largemerge.model.quantizer import bitsandbytes_config, quantized_linears

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def output_quantization(config: OutputConfig) -> Quantization | None:
    """What the configuration asks for."""
    if config.quantization is None:
        return None
    double_quant = config.quantization != "int8" and config.double_quant is not False
    return Quantization(config.quantization, double_quant)


def quantize_output(
    config: OutputConfig, inputs: Inputs, output: Mapping[str, OutputTensor]
) -> tuple[dict[str, OutputTensor], list[str]]:
    """The layout of the output with the weights that Transformers would quantise laid out so.

    Args:
        config: `output` of the configuration.
        inputs: From `open_inputs`.
        output: Plain, by name on disk.

    Returns:
        The layout, and what makes it impossible.

    Raises:
        LargemergeError: If bitsandbytes is not installed or does not work here.
    """
    quantization = output_quantization(config)
    if quantization is None or not output:
        return dict(output), []
    names = inputs.reference_names
    result, problems = dict(output), []
    linears = quantized_linears(inputs.skeleton, quantization)
    for path, transposed in linears.items():
        name = names.on_disk(f"{path}.weight")
        if names.conversion_of(name) is not None:
            problems.append(
                f"output.quantization: {name} is no tensor of its own on disk, and cannot be written quantised; "
                "merge without output.quantization, and quantise with Transformers"
            )
            continue
        key = names.renamed.get(name)
        if key is None or key not in output:
            continue
        plain = output[key]
        if plain.dtype not in _DTYPES:
            problems.append(f"output.quantization: {key} is {dtype_name(plain.dtype)}; set dtype: bfloat16")
            continue
        how = Quantization(quantization.method, quantization.double_quant, transposed)
        result[key] = quantized_tensor(key, plain.dtype, plain.shape, how)
    if not any(tensor.quantization for tensor in result.values()) and not problems:
        problems.append(f"output.quantization: Transformers quantises no linear of {inputs.skeleton.class_name}")
    return result, problems


def quantization_settings(config: OutputConfig, dtype: torch.dtype) -> dict[str, Any] | None:
    """The output's `quantization_config`; `None` for a plain output."""
    quantization = output_quantization(config)
    if quantization is None:
        return None
    settings: dict[str, Any] = json.loads(json.dumps(bitsandbytes_config(quantization, dtype).to_dict()))
    return settings
