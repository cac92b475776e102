"""The files with weights in a checkpoint's folder: which are read, and what to do where there are others only.

    model.safetensors              model.safetensors.index.json           as Transformers looks for them, in this order;
    pytorch_model.bin              pytorch_model.bin.index.json           or the file that config.json names
    model.fp16.safetensors         model.safetensors.index.fp16.json      with `variant: fp16`

Names are mended where training programs put something before all of them (`module.`, `_orig_mod.`, `model.`): no model
of Transformers has such names, and the output is to load.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.errors import CheckpointError, shorten
from largemerge.text_files import file_problem, inner_path_problem

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SETTING = "transformers_weights"
"""Key of `config.json` that names another file of weights."""

_PREFIXES = {
    "module.": "DistributedDataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "_forward_module.": "Lightning",
    "_fsdp_wrapped_module.": "FSDP",
}
_VARIANT = re.compile(
    r"^(?:model|pytorch_model)(?:\.(?:safetensors|bin)\.index)?\.(?P<variant>[A-Za-z0-9_-]+)\.(?:safetensors|bin|json)$"
)
_SHARD = re.compile(r"^(?:model|pytorch_model)[.\w-]*-\d+-of-\d+\.(?:safetensors|bin)$")


def variant_name(file_name: str, variant: str | None) -> str:
    """Returns the name of a file's variant, as Transformers names it: `model.fp16.safetensors`."""
    if variant is None:
        return file_name
    path, _, ending = file_name.rpartition(".")
    return f"{path}.{variant}.{ending}"


def is_loaded_weights(file_name: str) -> bool:
    """Whether Transformers or peft look for weights, or the index of some, by a file's name."""
    of_adapters = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    names = (*WEIGHT_FILES, *(f"{name}.index.json" for name in WEIGHT_FILES), *of_adapters)
    return file_name in names or bool(_VARIANT.match(file_name) or _SHARD.match(file_name))


def is_index(file_name: str) -> bool:
    """Whether a file's name is that of an index of weights."""
    return file_name.endswith(".json")


def find_weight_file(folder: Path, config: Mapping[str, Any], variant: str | None) -> str | None:
    """Finds the name of the file with weights, or of their index, in Transformers' order; `None` if there is none.

    Args:
        folder: The checkpoint's folder.
        config: Contents of `config.json`.
        variant: Variant of the weights, such as `fp16`.

    Raises:
        CheckpointError: If the config names a file that is not there.
    """
    named = config.get(SETTING)
    if variant is None and named is not None:
        problem = inner_path_problem(named)
        if problem is None:
            problem = file_problem(folder / named)
        if problem is not None:
            raise CheckpointError(
                f"{folder / 'config.json'}: {SETTING} is {shorten(repr(named))}, which {problem}; expected the name of "
                "the file with the weights"
            )
        return str(named)
    names = (variant_name(each, variant) for file in WEIGHT_FILES for each in (file, f"{file}.index.json"))
    # What lies there may be no file: this is told where it is opened, rather than another one taken.
    return next((name for name in names if os.path.lexists(folder / name)), None)


def without_prefix(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], name: str
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Takes away what a training program has put before all names, and says so."""
    notes = []
    made = dict(tensors)
    while made:
        found = next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in made)), None)
        by = _PREFIXES[found] if found is not None else "Lightning"
        found = "model." if found is None and _held_by_model(made, config) else found
        if found is None:
            break
        made = {key.removeprefix(found): info for key, info in made.items()}
        notes.append(f"{name}: names of all tensors begin with {found!r}, which {by} puts there; read without it")
    return made, notes


def _held_by_model(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> bool:
    """Whether all names are those of a model that is the attribute `model` of another one."""
    inside = tuple(f"model.{part}." for part in ("model", "lm_head", str(config.get("model_type"))))
    return all(key.startswith("model.") for key in tensors) and any(key.startswith(inside) for key in tensors)


def advice(folder: Path) -> str:
    """Says what a folder without weights that can be read has instead, and what to do; "" where nothing is known."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []

    def first(*endings: str) -> str | None:
        return next((name for name in names if name.endswith(endings)), None)

    if "adapter_config.json" in names:
        return " This is an adapter (LoRA), not a model: name it behind its model, as model+adapter."
    if "model_index.json" in names:
        parts = [name for name in names if (folder / name / "config.json").is_file()]
        return (
            f" This is a pipeline of Diffusers; its models lie in folders inside it: name one ({', '.join(parts[:5])})."
        )
    if find_weight_file(folder, {}, None) is not None:
        return ""
    variants = sorted(
        {match["variant"] for name in names if (match := _VARIANT.match(name)) and match["variant"] != "index"}
    )
    if variants:
        return f" There are weights of the variant {' and '.join(variants)}: set variant: {variants[0]}."
    if any(_SHARD.match(name) for name in names):
        return " There are shards, but not their index: fetch the file whose name ends with .index.json, too."
    if gguf := first(".gguf"):
        return (
            f" {gguf} is GGUF: make a checkpoint of it (transformers: AutoModelForCausalLM.from_pretrained(folder, "
            f"gguf_file={gguf!r}).save_pretrained(...)), or take the one that it was made from."
        )
    if any(name.startswith("consolidated") for name in names):
        return (
            " consolidated.* is Meta's or Mistral's own layout: take the copy of the model for Transformers, or "
            "convert it (transformers: models/llama/convert_llama_weights_to_hf.py, convert_mistral_weights_to_hf.py)."
        )
    if "zero_to_fp32.py" in names or any(name.startswith("global_step") for name in names):
        return " This is DeepSpeed's: run python zero_to_fp32.py . . --safe_serialization in the folder."
    if any(name.startswith("pytorch_model_fsdp") or name == "__0_0.distcp" for name in names):
        return " This is FSDP's: run accelerate merge-weights on the folder with the .distcp files."
    if diffusers := first("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        return f" {diffusers} is a model of Diffusers; expected one of Transformers."
    if other := first(".h5", ".msgpack"):
        kind, how = ("TensorFlow", "from_tf=True") if other.endswith(".h5") else ("Flax", "from_flax=True")
        return (
            f" {other} is {kind}'s: convert it with Transformers 4, which reads it: "
            f"AutoModel.from_pretrained(folder, {how}).save_pretrained(...)."
        )
    if single := first(".safetensors"):
        return f" Transformers reads no {single}: if it holds the weights, rename it to model.safetensors."
    if single := first(".ckpt", ".pt", ".pth", ".bin"):
        if single in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
            return ""
        return f" Transformers reads no {single}: if it holds the weights, rename it to pytorch_model.bin."
    if other := first(".onnx", ".ot", ".mlmodel", ".tflite", ".pte", ".engine"):
        return f" {other} cannot be read: take the checkpoint that it was made from."
    return ""
