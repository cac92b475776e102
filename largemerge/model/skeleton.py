"""A model's code without its weights: built on the meta device from the config, its block stacks found.

    config.json ──► build_skeleton ──► Skeleton: the model, its stacks
                └─► checkpoint_from_config ──► Checkpoint without files, for plans of models that are elsewhere

A block is given weights only while it runs. What lies outside the stacks is given weights only where the forward pass
really reads them (see `trace.py`). Buffers are real from the start: non-persistent ones, such as rotary frequencies,
exist nowhere else.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from largemerge.checkpoint.config_check import check_config
from largemerge.checkpoint.index import Checkpoint, read_json
from largemerge.checkpoint.quantized import model_dtype
from largemerge.checkpoint.sentence_modules import transformer_folder
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.errors import ArchitectureError, CheckpointError, shorten
from largemerge.machine import scratch_folder

_KERNEL_KEY = re.compile("_?(attn|attention|experts)_implementation(_internal|_autoset)?|_?kernel_config|use_kernels")
_MORE_PARAMETERS, _MOST_PARAMETERS, _MOST_ELEMENTS = 2_000, 200_000, 1 << 31
"""Bounds of what a class is let make of a config: parameters beyond four for each tensor on disk, parameters where no
tensors are known, and elements of a table that is computed."""
_CODE_HINT = " It ships its own code: set trust_remote_code: true if you trust it."

_NO_SAMPLES = frozenset(
    (
        *("self", "kwargs", "cache", "use_cache", "past_key_value", "past_key_values", "cache_params"),
        *("cache_position", "mems", "use_mems", "encoder_outputs"),
        *("head_mask", "decoder_head_mask", "cross_attn_head_mask"),
        *("output_attentions", "output_hidden_states", "return_dict", "return_loss", "interpolate_pos_encoding"),
        *("logits_to_keep", "num_logits_to_keep", "num_items_in_batch", "rope_deltas"),
    )
)
"""Arguments of forwards that hold no samples though their annotation, if there is one, may name tensors."""


@dataclass(frozen=True)
class Stack:
    """A list of blocks, such as `model.layers`.

    Attributes:
        name: Module path of the list.
        blocks: The modules of the list, in order.
    """

    name: str
    blocks: tuple[nn.Module, ...]

    def block_name(self, index: int) -> str:
        """Module path of block `index`."""
        return f"{self.name}.{index}"


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device and its stacks.

    Attributes:
        model: The model in evaluation mode, parameters on the meta device, buffers real.
        stacks: The block stacks in the order of the module tree; `ModelTrace.order` has the order of execution.
        aliases: First name → all names of a tied parameter.
        dtype: Dtype in which parameters and buffers were made.
    """

    model: PreTrainedModel
    stacks: tuple[Stack, ...]
    aliases: Mapping[str, tuple[str, ...]]
    dtype: torch.dtype

    @property
    def class_name(self) -> str:
        """Name of the model's class, such as `LlamaForCausalLM`."""
        return type(self.model).__name__

    def forward_arguments(self) -> frozenset[str]:
        """Names of the arguments of the model's forward that hold samples: no caches, no switches."""
        parameters = inspect.signature(self.model.forward).parameters.items()
        return frozenset(name for name, argument in parameters if _holds_samples(name, argument))

    def block_tensors(self, stack: Stack, index: int) -> list[str]:
        """Names of the parameters and persistent buffers of one block, in the module's order."""
        prefix = stack.block_name(index) + "."
        return [prefix + name for name in stack.blocks[index].state_dict()]

    def non_block_tensors(self) -> list[str]:
        """Names of the parameters and persistent buffers of no block, tied ones once."""
        return list(self._outside)

    def non_block_parameters(self) -> list[str]:
        """Names of the parameters among them."""
        return [name for name, is_parameter in self._outside.items() if is_parameter]

    @cached_property
    def _outside(self) -> dict[str, bool]:
        """Tensors of no block: name → whether it is a parameter."""
        prefixes = tuple(stack.name + "." for stack in self.stacks)
        parameters = {name for name, _ in self.model.named_parameters()}
        seen: set[int] = set()
        found = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if not name.startswith(prefixes) and id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = name in parameters
        return found


def _holds_samples(name: str, argument: inspect.Parameter) -> bool:
    """Whether an argument of a forward is a tensor with a row for every sample, by its name and its annotation."""
    if argument.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) or name in _NO_SAMPLES:
        return False
    return argument.annotation is inspect.Parameter.empty or "Tensor" in str(argument.annotation)


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Makes a checkpoint's config as Transformers understands it.

    Kernels and ways to compute attention or experts that the config names are left out: some are code of strangers.

    Raises:
        ArchitectureError: If Transformers does not know the kind of model.
        CheckpointError: If Transformers knows it, and does not understand the config.
    """
    methods = [key for key in checkpoint.config if callable(getattr(PreTrainedConfig, key, None))]
    if methods:
        raise CheckpointError(
            *(f"{checkpoint.name}: config.json: {shorten(key)}: no setting of a model; remove it" for key in methods)
        )
    try:
        with _config_folder(checkpoint) as folder:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # a config may hold anything, and nobody has listed what its class then raises
        if checkpoint.config.get("auto_map") and not trust_remote_code:
            raise ArchitectureError(
                f"{checkpoint.name}: config.json: Transformers does not know its class.{_CODE_HINT}"
            ) from None
        if checkpoint.config.get("model_type") not in transformers.CONFIG_MAPPING:
            raise ArchitectureError(f"{checkpoint.name}: config.json: {_cause(error, checkpoint.config)}") from None
        raise CheckpointError(f"{checkpoint.name}: config.json: {_cause(error, checkpoint.config)}") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the skeleton computes with weights that have been dequantised
    return config


@contextmanager
def _config_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yields a folder whose config.json is the checkpoint's config, which may have been changed since it was read."""
    stored = checkpoint.folder / "config.json"
    obeyed = _without_kernels(checkpoint.config)
    if stored.is_file() and read_json(stored, checkpoint.name) == obeyed:
        yield checkpoint.folder
        return
    with scratch_folder("config") as folder:
        for file in checkpoint.folder.glob("*.py") if checkpoint.config.get("auto_map") else ():
            shutil.copyfile(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(obeyed), encoding="utf-8")
        yield folder


def _without_kernels(part: Any) -> Any:
    """Leaves out of a config, and of those inside it, by which code attention and experts are to be computed."""
    if isinstance(part, Mapping):
        return {key: _without_kernels(value) for key, value in part.items() if not _KERNEL_KEY.fullmatch(str(key))}
    return [_without_kernels(value) for value in part] if isinstance(part, list) else part


def build_skeleton(
    checkpoint: Checkpoint,
    stacks: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Skeleton:
    """Builds the model of a checkpoint on the meta device and finds its stacks.

    Args:
        checkpoint: The checkpoint, from `open_checkpoint`.
        stacks: Module paths of the stacks, when those found are wrong.
        dtype: Dtype of the forward passes; buffers that follow the default dtype are made in it.
        trust_remote_code: Allow the checkpoint's own Python code.

    Raises:
        CheckpointError: If the config is not understood.
        ArchitectureError: If the model class is unknown or has no block stacks.
    """
    model = build_model(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    found = _named_stacks(model, stacks) if stacks else find_stacks(model)
    return Skeleton(model, found, _aliases(model), dtype)


def build_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Builds the model of a checkpoint on the meta device, tied as its config says; buffers are real.

    Args:
        checkpoint: The checkpoint, from `open_checkpoint`.
        dtype: Default dtype while it is built; buffers that follow it are made in it.
        trust_remote_code: Allow the checkpoint's own Python code.

    Raises:
        CheckpointError: If the config is not understood, or the class cannot be built from it.
        ArchitectureError: If the model class is unknown, or needs what is not installed.
    """
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    model_class = find_model_class(config, checkpoint, trust_remote_code)
    most = 4 * len(checkpoint.tensors) + _MORE_PARAMETERS if checkpoint.tensors else _MOST_PARAMETERS
    try:
        for part in all_configs(config).values():
            if hasattr(part, "use_cache"):
                part.use_cache = False  # a cache handed to a block would be filled again by every extra run of it
        with _default_dtype(dtype), _bounded(most), init_empty_weights(include_buffers=False):
            model = model_class(config)
        model.tie_weights()
        model.train(False)
        model.requires_grad_(False)
    except _TooLarge as error:
        raise CheckpointError(f"{checkpoint.name}: config.json: {model_class.__name__} {error}") from None
    except Exception as error:  # what a class raises for a config that it cannot be built from, nobody has listed
        cause = _cause(error, checkpoint.config)
        text = f"{checkpoint.name}: {model_class.__name__} cannot be built from config.json: {cause}"
        if isinstance(error, ImportError | NotImplementedError) or "meta" in str(error):
            raise ArchitectureError(text) from None  # the config may be right
        raise CheckpointError(text) from None
    return model


class _TooLarge(Exception):
    """A class makes more of a config than any weights could fill."""


class _BoundedTables(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to compute tables beyond `_MOST_ELEMENTS`; what is merely allocated is never filled.

    Random numbers for weights on the meta device are not asked for: nothing would be drawn, but torch takes half of the
    time of building a model to find that out.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = str(func).split(".")[1]
        if kind in ("normal_", "uniform_") and args[0].is_meta:
            return args[0]
        if kind in ("ones", "zeros", "full", "arange", "linspace", "eye", "randn", "rand"):
            sizes = args[0] if args and isinstance(args[0], list) else [each for each in args if isinstance(each, int)]
            if kind in ("arange", "linspace"):
                sizes = [max([abs(each) for each in args if isinstance(each, int | float)], default=0)]
            if math.prod(sizes) > _MOST_ELEMENTS:
                raise _TooLarge(f"would compute a table of {list(sizes)} elements; expected {_MOST_ELEMENTS} at most")
        return func(*args, **(kwargs or {}))


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """Ends the building of a class that registers more parameters, or computes larger tables, than is reasonable."""
    count = 0

    def registered(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise _TooLarge(
                f"would have more than {most} parameters, far more than there are tensors in its files; "
                "expected numbers of layers and experts that fit the weights"
            )

    handle = register_module_parameter_registration_hook(registered)
    try:
        with _BoundedTables():  # type: ignore[no-untyped-call]
            yield
    finally:
        handle.remove()


def bare_checkpoint(config: Mapping[str, Any], name: str, code: Path | None = None) -> Checkpoint:
    """Makes a checkpoint that consists of a config alone, for `load_config` and `build_model`.

    Args:
        config: Contents of its `config.json`.
        name: Its name, for messages.
        code: Folder with the Python code that the config refers to.
    """
    return Checkpoint(name, code or Path(os.devnull), config, {}, {})


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def find_model_class(
    config: PreTrainedConfig, checkpoint: Checkpoint, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """Finds the class that a checkpoint's config names.

    Args:
        config: The config, from `load_config`.
        checkpoint: The checkpoint, for messages and for its own code.
        trust_remote_code: Allow the checkpoint's own Python code.

    Raises:
        ArchitectureError: If there is no such class, or none is named.
        CheckpointError: If what is named is no model.
    """
    names = config.architectures or []
    found: Any
    auto_map: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    if trust_remote_code and auto_map and names:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = next((value for value in auto_map.values() if value.endswith(f".{names[0]}")), None)
        if reference is not None:
            try:
                found = get_class_from_dynamic_module(reference, str(checkpoint.folder))
            except Exception as error:  # it runs code of strangers
                text = f"{checkpoint.name}: {reference}, which config.json names, cannot be loaded: {_cause(error)}"
                raise ArchitectureError(text) from None
            return cast(type[PreTrainedModel], found)
    found = getattr(transformers, names[0], None) if names else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        if not _belongs_to(config, found):
            wanted: Any = found.config_class
            raise CheckpointError(
                f"{checkpoint.name}: config.json: model_type {config.model_type!r} and architectures {names[0]!r} "
                f"contradict each other; {names[0]} is of {wanted.model_type!r}: mend the wrong one"
            )
        return found
    if found is not None and not names[0].startswith("Auto"):
        raise CheckpointError(
            f"{checkpoint.name}: config.json: architectures: expected a class such as 'LlamaForCausalLM', "
            f"found {names[0]!r}, which is no model"
        )
    if names:
        hint = _CODE_HINT if auto_map else ""
        raise ArchitectureError(
            f"{checkpoint.name}: Transformers {transformers.__version__} has no model class {names[0]!r}.{hint}"
        )
    mapping: Any = transformers.MODEL_MAPPING
    if type(config) in mapping:
        return cast(type[PreTrainedModel], mapping[type(config)])
    raise ArchitectureError(
        f"{checkpoint.name}: config.json names no 'architectures'; expected a class such as 'LlamaForCausalLM'"
    )


def _belongs_to(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> bool:
    """Whether a config is that of a class, of a part of it, of a model that it is a part of, or listed for it."""
    wanted: Any = model_class.config_class
    if wanted is None or isinstance(config, wanted) or issubclass(wanted, type(config)):
        return True
    parts = {*type(config).sub_configs.values(), *wanted.sub_configs.values()}
    kinds = {str(config.model_type).partition("_")[0], str(wanted.model_type).partition("_")[0]}
    if wanted in parts or type(config) in parts or len(kinds) == 1:
        return True
    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    listed = [table.get(config.model_type, ()) for table in tables if isinstance(table, Mapping)]
    return any(model_class.__name__ in ((each,) if isinstance(each, str) else each) for each in listed)


def all_configs(config: PreTrainedConfig, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], PreTrainedConfig]:
    """Collects a config and those inside it, such as that of a text model, by the keys that lead to them."""
    found = {path: config}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= all_configs(value, (*path, key))
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies its input with a matrix: `nn.Linear` or GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D)


def linears_in(module: nn.Module) -> dict[str, nn.Module]:
    """The linears inside a module, by path in it."""
    return {name: child for name, child in module.named_modules() if is_linear(child)}


def weight_is_transposed(linear: nn.Module) -> bool:
    """Whether the weight lies `[in, out]`, as in GPT-2's `Conv1D`."""
    return isinstance(linear, Conv1D)


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of like modules that all hold linears.

    Modules of several classes are alike where the classes' names end alike: Mllama's `MllamaSelfAttentionDecoderLayer`
    and `MllamaCrossAttentionDecoderLayer`.
    """
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and (len({type(child) for child in module}) == 1 or len({_last_word(child) for child in module}) == 1)
        and not isinstance(module[0], nn.ModuleList)  # which nobody calls
        and not is_linear(module[0])
        and all(linears_in(child) for child in module)
    )


def _last_word(module: nn.Module) -> str:
    """The last word of a class's name: `Layer` of `LlamaDecoderLayer`."""
    name = type(module).__name__
    words: list[str] = re.findall("[A-Z][a-z0-9]*", name)
    return words[-1] if words else name


def find_stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """Finds the outermost lists of like modules that hold linears."""
    found: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(stack.name + ".") for stack in found)
        if not inside and _is_stack(module):
            found.append(Stack(name, tuple(module.children())))
    if not found:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise ArchitectureError(
            f"{type(model).__name__}: no stack of like blocks with linears found "
            f"(lists of modules: {lists or 'none'}); name the stacks in the config, e.g. stacks: [model.layers]"
        )
    return tuple(found)


def _named_stacks(model: PreTrainedModel, names: Sequence[str]) -> tuple[Stack, ...]:
    modules = dict(model.named_modules())
    problems = []
    found = []
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            lists = [key for key, value in modules.items() if isinstance(value, nn.ModuleList)]
            problems.append(f"stacks: {name!r} is no list of modules in {type(model).__name__}; lists are {lists}")
        else:
            found.append(Stack(name, tuple(module.children())))
    if problems:
        raise ArchitectureError(*problems)
    return tuple(found)


_FIELD = re.compile(r"Field '(\w+)' (?:expected (.+?), got \w+ \(value: (.+)\)$|with value (.+?) doesn't match)")
_KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "dict": "an object"}


def _cause(error: BaseException, config: Any = None) -> str:
    """The cause of an error in one line, with the key of the config that it comes from, where that can be told."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    field = next((match for line in lines if (match := _FIELD.search(line)) is not None), None)
    if field is not None:
        key, kind, value, other = field.groups()
        expected = f"expected {_KINDS.get(kind, kind)}" if kind is not None else "expected a value of another type"
        return f"{key}: {expected}, found {(value or other)[:80]}"
    if isinstance(error, KeyError) and error.args and (keys := list(_keys_of(config, error.args[0]))):
        return f"{keys[0]}: {error.args[0]!r} is not known to Transformers {transformers.__version__}"
    if isinstance(error, ZeroDivisionError):
        listed = ", ".join(list(_keys_of(config, 0))[:5])
        return f"a size that something is divided by is 0{f' (one of {listed})' if listed else ''}; expected 1 or more"
    if len(lines) > 1 and lines[0].endswith(":"):
        return _VALIDATION.sub("", " ".join(lines[:2]))
    told = lines[0] if lines else ""
    if "Padding_idx must be within" in told:
        found = next((value for key, value in _items_of(config) if key.endswith("pad_token_id") and value), None)
        return f"pad_token_id: expected a token's number below vocab_size, found {found}"
    if isinstance(error, TypeError | AttributeError | AssertionError | IndexError):  # of the class's own code
        reason = f"{type(error).__name__}: {shorten(told, 120)}".removesuffix(": ")
        return f"a value has a type or size that the class cannot work with ({reason})"
    return told if isinstance(error, ValueError | OSError) and told else f"{type(error).__name__}: {told}".strip(": ")


_VALIDATION = re.compile(r"^Class validation error for validator '\w+': \w+: ")
"""Matches what a class of Transformers puts before its own word on a config."""


def _keys_of(config: Any, value: Any) -> Iterator[str]:
    """Yields the keys of a config, and of those inside it, that have a value."""
    return (key for key, inner in _items_of(config) if type(inner) is type(value) and inner == value)


def _items_of(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the keys of a config and their values, those inside it with their whole path."""
    for key, inner in config.items() if isinstance(config, Mapping) else ():
        if isinstance(inner, Mapping):
            yield from _items_of(inner, f"{path}{key}.")
        else:
            yield f"{path}{key}", inner


def assign_tensors(skeleton: Skeleton, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts tensors in the place of parameters or buffers, under all their tied names, on whatever device they are."""
    for name, tensor in tensors.items():
        parameter = nn.Parameter(tensor, requires_grad=False)
        for alias in skeleton.aliases.get(name, (name,)):
            path, _, leaf = alias.rpartition(".")
            module = skeleton.model.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = parameter
            else:
                module._buffers[leaf] = tensor


def fill_with_nan(skeleton: Skeleton, device: torch.device, but: Collection[str] = ()) -> None:
    """Gives every parameter outside the stacks one NaN for all its elements, so that reading one by mistake shows.

    Args:
        skeleton: The model whose parameters are replaced.
        device: Device of the NaNs.
        but: Names of parameters that are left alone.
    """
    nan = torch.full((), float("nan"), dtype=skeleton.dtype, device=device)
    names = [name for name in skeleton.non_block_parameters() if name not in but]
    # As large as they are now: an embedding may have more rows than the class made, for tokens that the output lacks.
    assign_tensors(skeleton, {name: nan.expand(skeleton.model.get_parameter(name).shape) for name in names})


def _aliases(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """First name → all names of every tied parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: tuple(group) for group in names.values() if len(group) > 1}


def checkpoint_from_config(folder: Path, name: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Makes the checkpoint that the class would save, tied tensors once, in the config's dtype (default: bfloat16).

    Args:
        folder: Folder with a `config.json`; weights are not needed.
        name: What the user calls the checkpoint.
        trust_remote_code: Allow the checkpoint's own Python code.

    Raises:
        LargemergeError: If there is no config, or Transformers does not understand it.
    """
    folder = folder / transformer_folder(folder, name)
    config = read_json(folder / "config.json", name)
    check_config(config, name)
    bare = Checkpoint(name, folder, config, {}, {})
    dtype = model_dtype(config)
    skeleton = build_skeleton(bare, dtype=dtype, trust_remote_code=trust_remote_code)
    again = {alias for aliases in skeleton.aliases.values() for alias in aliases[1:]}
    tensors = {
        key: TensorInfo(key, tuple(tensor.shape), dtype, folder / "config.json", None)
        for key, tensor in skeleton.model.state_dict().items()
        if key not in again
    }
    return Checkpoint(name, folder, config, tensors, {})


def keep_computed(skeleton: Skeleton, names: Collection[str]) -> tuple[str, ...]:
    """Lets the class compute tables that files lack: they become buffers that no checkpoint has.

    MarianMT's and Pegasus' sinusoidal position embeddings are parameters, but `save_pretrained` leaves them out, and
    the class computes them again when it is built. A parameter is such a table if the class initialises it twice to
    the same values, whatever was there before and whatever the seed, and these are not one value, as those of a bias.

    Args:
        skeleton: The model; changed in place.
        names: Parameters that files lack.

    Returns:
        Those of the names that are computed now.
    """
    computed = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = skeleton.model.get_submodule(path)
        if leaf not in module._parameters or name in skeleton.aliases:
            continue
        first, second = (_initialized(skeleton, path, leaf, value) for value in (1.5, 2.5))
        if (
            first is not None
            and second is not None
            and torch.equal(first, second)
            and bool((first != first.flatten()[0]).any())
        ):
            del module._parameters[leaf]
            module.register_buffer(leaf, first, persistent=False)
            computed.append(name)
    return tuple(computed)


def _initialized(skeleton: Skeleton, path: str, leaf: str, before: float) -> torch.Tensor | None:
    """What the class makes of a parameter that held `before` everywhere; `None` if the class fails without others."""
    module = skeleton.model.get_submodule(path)
    ancestors = [path.rsplit(".", n)[0] for n in range(path.count(".") + 1)]
    models = [model for name in ancestors if isinstance(model := skeleton.model.get_submodule(name), PreTrainedModel)]
    owner: Any = (models or [skeleton.model])[0]
    parameters = dict(module._parameters)
    try:
        for name, parameter in parameters.items():
            if parameter is not None:
                full = torch.full(parameter.shape, before, dtype=skeleton.dtype)
                module._parameters[name] = nn.Parameter(full, requires_grad=False)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int(before * 2))
            owner._init_weights(module)
        made = module._parameters[leaf]
        return None if made is None else made.detach()
    except Exception:  # whatever an initialisation may raise: then it is no table that the class computes alone
        return None
    finally:
        module._parameters.update(parameters)
