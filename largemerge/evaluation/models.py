"""Models to evaluate: opened from configs and headers, seen as whole models, with another head, or as one tower.

    reference ──► open_model ──► ModelFiles ──► with_head: a head that a merge has kept apart
                                           └──► as_tower: a part of a CLIP model
                                           └──► OpenedModel: its class on the meta device, and where each weight lies

No weight is read here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter, open_model
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.side_files import HEADS_FOLDER, find_processor, find_tokenizer
from largemerge.checkpoint.tensor_files import SafetensorsFile
from largemerge.checkpoint.tensor_info import TensorInfo, Tensors, list_kinds
from largemerge.errors import CheckpointError
from largemerge.heads import head_file
from largemerge.model.adapter_names import AdapterNames
from largemerge.model.classes import classify, oriented
from largemerge.model.key_mapping import KeyMapping, map_keys
from largemerge.model.output_check import check_own_configs
from largemerge.model.skeleton import Skeleton, build_skeleton, keep_computed, load_config
from largemerge.tokenizer.tokenizers import tokenizer_folder


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, opened from their headers.

    Attributes:
        name: Name that is shown.
        checkpoint: Config and tensors as they lie on disk.
        adapter: Its adapters; `None` if it has none.
        compute_dtype: Dtype of the forward passes.
        trust_remote_code: Whether its own Python code may be run.
        fallbacks: Folders whose tokenizer or image processor is used where its own has none, such as the base's; by the
            names of their models.
    """

    name: str
    checkpoint: Checkpoint
    adapter: Adapter | None
    compute_dtype: torch.dtype
    trust_remote_code: bool
    fallbacks: Mapping[str, Path] = field(default_factory=dict)

    @property
    def text_folder(self) -> Path:
        """Folder of its tokenizer."""
        return find_tokenizer(tokenizer_folder(self.checkpoint, self.adapter), *self.fallbacks.values())

    @property
    def image_folder(self) -> Path:
        """Folder of its image processor."""
        return find_processor(self.checkpoint.folder, *self.fallbacks.values())

    @property
    def text_lender(self) -> str | None:
        """Name of the model whose tokenizer is used; `None` where it is its own."""
        return self._lender(self.text_folder, tokenizer_folder(self.checkpoint, self.adapter))

    @property
    def image_lender(self) -> str | None:
        """Name of the model whose image processor is used; `None` where it is its own."""
        return self._lender(self.image_folder, self.checkpoint.folder)

    def _lender(self, folder: Path, own: Path) -> str | None:
        if folder == own:
            return None
        return next(name for name, each in self.fallbacks.items() if each == folder)


def open_files(
    reference: str, name: str, *, compute_dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> ModelFiles:
    """Opens a model and its adapters, and checks that nothing of it is missing.

    Args:
        reference: A folder or Hub id, with revision and adapters if wanted.
        name: Name that is shown.
        compute_dtype: Dtype of the forward passes; default: that of most weights.
        trust_remote_code: Allow its own Python code.

    Raises:
        LargemergeError: If it cannot be opened, or is not whole.
    """
    places = AdapterNames(trust_remote_code=trust_remote_code)
    checkpoint, adapter = open_model(reference, name=name, find_places=places)
    adapters = {name: adapter} if adapter is not None else {}
    check_own_configs(classify({name: checkpoint}, adapters, trust_remote_code=trust_remote_code), adapters)
    return ModelFiles(name, checkpoint, adapter, compute_dtype or checkpoint.main_dtype(), trust_remote_code)


def with_head(files: ModelFiles, head: str) -> ModelFiles:
    """Puts a head that a merge has kept apart on a body; see docs/heads.md.

    Args:
        files: The body, or a model with another head.
        head: Path of the head's file, or its name in the `heads` of the model's folder.

    Raises:
        CheckpointError: If there is no such head, or the file is none.
    """
    path = Path(head)
    if not path.is_file():
        path = files.checkpoint.root / head_file(head)
    if not path.is_file():
        folder = files.checkpoint.root / HEADS_FOLDER
        known = sorted(each.stem for each in folder.glob("*.safetensors")) if folder.is_dir() else []
        there = f"{folder} holds {', '.join(known)}" if known else "no merge has kept heads there"
        raise CheckpointError(
            f"{files.name}: no head {head!r}: it is not the path of a file, and {files.checkpoint.root} has no "
            f"{head_file(head)} ({there}); expected the path of a head's file, or a merge that has kept this head"
        )
    tensors = SafetensorsFile(path).tensors()
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        config = json.loads(metadata["config"])
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{path}: no head that a merge has kept; expected 'config' in the file's header"
        ) from None
    return _changed(files, config, tensors)


def as_body(files: ModelFiles, class_name: str) -> ModelFiles:
    """Sees a model as its bare body, as `AutoModel` would load it; its head is left out.

    Args:
        files: The model.
        class_name: Name of its class.

    Raises:
        CheckpointError: If it is an encoder-decoder.
    """
    config = load_config(files.checkpoint, trust_remote_code=files.trust_remote_code)
    mapping: Any = transformers.MODEL_MAPPING
    body = mapping[type(config)].__name__ if type(config) in mapping else class_name
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{files.name}: a {class_name} is an encoder-decoder; expected an encoder, such as a BertModel"
        )
    if body == class_name:
        return files
    return _changed(files, {**files.checkpoint.config, "architectures": [body]}, {})


def as_tower(
    files: ModelFiles, class_name: str, part: str, projection: str | None, lender: ModelFiles | None = None
) -> ModelFiles:
    """Sees one tower of a CLIP model as a model of its own.

    Args:
        files: The whole model, or the tower.
        class_name: Class of the tower, such as `CLIPVisionModelWithProjection`.
        part: Key of the tower's config in that of the whole model, such as `vision_config`.
        projection: Name of the projection's weight; `None` where the class has none.
        lender: The model that lends the projection, where `files` are a tower without it.

    Raises:
        CheckpointError: If there is no projection anywhere.
    """
    whole = files.checkpoint.config
    config = dict(whole.get(part, whole))
    if part in whole and "projection_dim" in whole:
        config["projection_dim"] = whole["projection_dim"]
    config["architectures"] = [class_name]
    borrowed: dict[str, TensorInfo] = {}
    if projection is not None and not any(key.endswith(projection) for key in files.checkpoint.tensors):
        lent = (
            next((info for key, info in lender.checkpoint.tensors.items() if key.endswith(projection)), None)
            if lender is not None
            else None
        )
        if lent is None:
            raise CheckpointError(
                f"{files.name}: has no {projection}, which brings images and texts together; expected 'text_model', "
                "the CLIP model that it was tuned from"
            )
        borrowed[projection] = lent
        config["projection_dim"] = lent.shape[0]
    prefix = part.removesuffix("_config")
    own = {
        key: info
        for key, info in files.checkpoint.tensors.items()
        if part not in whole or key.startswith(f"{prefix}_model.") or key == projection
    }
    changed = dataclasses.replace(files, checkpoint=dataclasses.replace(files.checkpoint, tensors=own))
    return _changed(changed, config, borrowed)


def _changed(files: ModelFiles, config: Mapping[str, Any], borrowed: Mapping[str, TensorInfo]) -> ModelFiles:
    checkpoint = dataclasses.replace(files.checkpoint, config=config, tensors={**files.checkpoint.tensors, **borrowed})
    return dataclasses.replace(files, checkpoint=checkpoint)


@dataclass(frozen=True)
class OpenedModel:
    """A model without weights, and where they lie.

    Attributes:
        files: Its files.
        checkpoint: The checkpoint as the modules hold its weights.
        skeleton: Its class on the meta device.
        mapping: How its tensors map to the class's parameters.
        lacking: Parameters outside the blocks that no file has, such as a pooler that nobody trained. They are NaN, so
            that a result which needs them is not finite.
        factors: Factors of parameters, by their own names, in their stored dtype; as if the files held them so.
    """

    files: ModelFiles
    checkpoint: Checkpoint
    skeleton: Skeleton
    mapping: KeyMapping
    lacking: frozenset[str]
    factors: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, files: ModelFiles) -> OpenedModel:
        """Builds the class of a model, and finds where each of its weights lies.

        Raises:
            LargemergeError: If the class cannot be had, or the files lack what it needs.
        """
        skeleton = build_skeleton(
            files.checkpoint, dtype=files.compute_dtype, trust_remote_code=files.trust_remote_code
        )
        checkpoint = oriented(skeleton.model, files.checkpoint, files.adapter)
        mapping = map_keys(skeleton.model, checkpoint)
        computed = keep_computed(skeleton, sorted(mapping.missing))
        lacking = frozenset(name for name in mapping.missing if name not in computed)
        in_blocks = [name for name in lacking if name.startswith(tuple(f"{stack.name}." for stack in skeleton.stacks))]
        problems = (
            [f"{files.name}: no {list_kinds(in_blocks)}, which a {skeleton.class_name} needs"] if in_blocks else []
        )
        problems += [
            f"{files.name}: {name} is {list(shape)} in the file; a {skeleton.class_name} needs "
            f"{list(skeleton.model.state_dict()[name].shape)}"
            for name, shape in mapping.mismatched.items()
        ]
        if problems:
            raise CheckpointError(*problems)
        return cls(files, checkpoint, skeleton, mapping, lacking)

    @property
    def name(self) -> str:
        """Name that is shown."""
        return self.files.name

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all weights in the dtype of the forward passes."""
        state = self.skeleton.model.state_dict()
        size = self.files.compute_dtype.itemsize
        return sum(
            tensor.numel() * (size if tensor.is_floating_point() else tensor.dtype.itemsize)
            for name, tensor in state.items()
            if name not in self.mapping.aliases
        )

    def load(self, names: Sequence[str], reader: TensorReader) -> Tensors:
        """Reads parameters by the names that the module has for them, tied ones included; on the CPU, as stored."""
        canonical = {name: self.mapping.canonical(name) for name in names}
        stored = dict.fromkeys(own for own in canonical.values() if own not in self.lacking)
        loaded = self.mapping.load(self.skeleton.model, list(stored), reader.read)
        loaded |= {own: loaded[own] * self.factors[own] for own in stored if own in self.factors}
        lacking = [own for own in canonical.values() if own in self.lacking]
        if lacking:
            shapes = self.skeleton.model.state_dict()
            nan = torch.full((), float("nan"), dtype=self.files.compute_dtype)
            loaded |= {name: nan.expand(shapes[name].shape) for name in lacking}
        return {name: loaded[own] for name, own in canonical.items()}
