"""The contents of a checkpoint folder, read from headers alone: its config, its files, every tensor in them.

    folder ──► config.json
           ├─► model.safetensors, or the files that an index names ──► headers ──► tensors, quantised ones folded
           └─► modules of sentence-transformers, if there are any  ──► headers ──► their tensors

A file is known by size, modification time and a hash of its header, so that a resumed merge notices if it has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from largemerge.checkpoint.config_check import check_config
from largemerge.checkpoint.quantized import fold_quantized, model_dtype, quantization_method, quantization_notes
from largemerge.checkpoint.sentence_modules import module_weight_files, read_module_tensors, transformer_folder
from largemerge.checkpoint.tensor_files import PickleFile, SafetensorsFile, open_tensor_file
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.checkpoint.weight_files import (
    WEIGHT_FILES,
    advice,
    find_weight_file,
    is_index,
    variant_name,
    without_prefix,
)
from largemerge.errors import CheckpointError, group_alike, shorten
from largemerge.text_files import file_problem, inner_path_problem
from largemerge.text_files import read_json as read_json_file

_MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its config and where each tensor lies.

    Attributes:
        name: Name that the user gives it.
        folder: Folder that it lies in, with `config.json`; of sentence-transformers' old layout, the transformer's.
        config: Contents of `config.json`.
        tensors: Tensors by name on disk, in natural order; a quantised weight is one tensor, with its parts.
        fingerprint: Size, modification time and sha256 of the header (or of a small text file), by file.
        inner: Path of `folder` in what the user named: "" as a rule, `0_Transformer` in sentence-transformers' old
            layout.
        notes: What a user should know of how it was read.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    fingerprint: Mapping[str, Mapping[str, Any]]
    inner: str = ""
    notes: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """The folder that the user named: that of the checkpoint, or the one that holds it beside other modules."""
        return self.folder.parents[len(Path(self.inner).parts) - 1] if self.inner else self.folder

    @property
    def files(self) -> frozenset[Path]:
        """The files that config and tensors lie in."""
        stored = (part for info in self.tensors.values() for part in (info.parts or {"": info}).values())
        return frozenset({self.folder / "config.json", *(info.file for info in stored)})

    @property
    def num_bytes(self) -> int:
        """Size of all tensors on disk, in bytes."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def quantized(self) -> dict[str, int]:
        """Counts quantised weights by the kind of quantisation: `{"nf4, double quantised": 210}`."""
        return dict(Counter(info.quantization.label for info in self.tensors.values() if info.quantization))

    def main_dtype(self) -> torch.dtype:
        """Finds the dtype of most weights; of a quantised model, that of its config."""
        if self.quantized():
            return model_dtype(self.config)
        elements: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
                elements[tensor.dtype] += tensor.num_bytes // tensor.dtype.itemsize
        return elements.most_common(1)[0][0] if elements else torch.float32


def open_checkpoint(folder: Path, name: str, variant: str | None = None) -> Checkpoint:
    """Reads a checkpoint's config and headers.

    Args:
        folder: A local folder with `config.json` and weights; or sentence-transformers' old layout, which has them in a
            folder of their own.
        name: Name that the user gives it, for messages.
        variant: Variant of the weights, such as `fp16`; where there is none, the plain weights are read.

    Raises:
        CheckpointError: If files are missing or broken; it names all of them.
    """
    root, inner = folder, transformer_folder(folder, name)
    folder = root / inner
    config = read_json(folder / "config.json", name)
    linked = (folder / "config.json").is_symlink()
    if (
        linked
        and own_folders(folder).isdisjoint((folder / "config.json").resolve().parents)
        and not is_linked_config(folder / "config.json")
    ):
        raise CheckpointError(
            f"{name}: {folder / 'config.json'} is a link to {os.readlink(folder / 'config.json')}, which is no model's "
            "config: it has neither 'model_type' nor 'architectures'"
        )
    check_config(config, name)
    quantization_method(config, name)
    files, notes = _weight_files(folder, config, name, variant)
    fingerprint: dict[str, dict[str, Any]] = {"config.json": file_fingerprint(folder / "config.json")}
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    for file, wanted in files.items():
        try:
            opened = open_tensor_file(file)
            found = opened.tensors()
        except CheckpointError as error:
            problems.extend(f"{name}: {problem}" for problem in error.problems)
            continue
        missing = sorted(set(wanted) - set(found))
        if missing:
            problems.append(f"{name}: the index says that {file.name} holds {_some(missing)}, but it does not")
        if isinstance(opened, PickleFile) and opened.wrapper:
            left_out = f"; {', '.join(opened.left_out[:5])} beside it left out" if opened.left_out else ""
            notes.append(f"{name}: the weights in {file.name} lie under {opened.wrapper!r}{left_out}")
        tensors |= {key: info for key, info in found.items() if not wanted or key in wanted}
        fingerprint[file.name] = file_fingerprint(file, opened.header)
    if problems:
        raise CheckpointError(*group_alike(problems)[:_MAX_PROBLEMS])
    if not tensors:
        raise CheckpointError(
            f"{name}: no tensor in {', '.join(file.name for file in files)}; expected a model's weights"
        )
    stored = dict(sorted(tensors.items(), key=lambda item: natural_key(item[0])))
    folded = fold_quantized(stored, config, name, read_bytes)
    notes += quantization_notes(stored, folded, name)
    doubles = sum(info.dtype is torch.float64 for info in folded.values())
    notes += [f"{name}: {doubles} tensors are float64; merges compute in float32, at least"] if doubles else []
    named, renamed = without_prefix(folded, config, name)
    modules = module_weight_files(root, inner, name)
    module_tensors, headers = read_module_tensors(modules)
    fingerprint |= {
        f"{module}/{modules[module].name}": file_fingerprint(modules[module], headers[module]) for module in modules
    }
    return Checkpoint(name, folder, config, {**named, **module_tensors}, fingerprint, inner, tuple([*notes, *renamed]))


def open_tensors(path: Path, name: str) -> Checkpoint:
    """Reads the headers of a safetensors file, or of all in a folder, without a model's config.

    Args:
        path: The file or folder.
        name: Name that the user gives it, for messages.

    Raises:
        CheckpointError: If there are none, one is broken, or two hold a tensor of the same name.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not path.exists():
        found = "no .safetensors file in it" if path.exists() else "nothing there"
        raise CheckpointError(f"{name}: {found}; expected a .safetensors file, or a folder with some")
    tensors: dict[str, TensorInfo] = {}
    fingerprint: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for file in files:
        try:
            opened = SafetensorsFile(file)
            found_here = opened.tensors()
        except CheckpointError as error:
            problems.extend(f"{name}: {problem}" for problem in error.problems)
            continue
        twice = sorted(set(found_here) & set(tensors))
        if twice:
            problems.append(f"{name}: {_some(twice)} in several files; expected each tensor once")
        tensors |= found_here
        fingerprint[file.name] = file_fingerprint(file, opened.header)
    if problems:
        raise CheckpointError(*group_alike(problems)[:_MAX_PROBLEMS])
    return Checkpoint(name, path if path.is_dir() else path.parent, {}, tensors, fingerprint)


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        name: Name of the checkpoint, for messages.

    Raises:
        CheckpointError: If there is no such file, or it holds something else.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"{name}: {path} does not exist; expected a checkpoint folder.{advice(path.parent)}")
    value: dict[str, Any] = read_json_file(path, name)
    return value


def own_folders(folder: Path) -> frozenset[Path]:
    """The folders whose files are a checkpoint's own, links followed: its own one, and the blobs of the Hub's cache."""
    snapshots = next((parent for parent in folder.absolute().parents if parent.name == "snapshots"), None)
    blobs = [snapshots.parent.resolve() / "blobs"] if snapshots is not None else []
    return frozenset([folder.resolve(), *blobs])


def is_linked_config(path: Path) -> bool:
    """Whether a path is a link to a model's config, rather than to any JSON of the user's."""
    if not path.is_symlink():
        return False
    try:
        return not {"model_type", "architectures"}.isdisjoint(read_json_file(path))
    except CheckpointError:
        return False


def shared_folders(checkpoints: Iterable[Checkpoint]) -> frozenset[Path]:
    """Finds the folders that several checkpoints lie in, such as the base of several adapters."""
    counts = Counter(checkpoint.folder.resolve() for checkpoint in checkpoints)
    return frozenset(folder for folder, count in counts.items() if count > 1)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Makes a key by which `layers.2` is sorted before `layers.10`."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _weight_files(
    folder: Path, config: Mapping[str, Any], name: str, variant: str | None
) -> tuple[dict[Path, frozenset[str]], list[str]]:
    """Lists the files with weights, and the tensors that the index wants of each (none named: all); and notes."""
    notes = []
    found = find_weight_file(folder, config, variant)
    if found is None and variant is not None:
        found = find_weight_file(folder, config, None)
        if found is not None:
            notes.append(f"{name}: no variant {variant!r} in {folder}; read {found}")
    if found is None:
        files = [variant_name(each, variant) for weights in WEIGHT_FILES for each in (weights, f"{weights}.index.json")]
        expected = ", ".join(f"{plain} or {index}" for plain, index in zip(files[::2], files[1::2], strict=True))
        present = sorted(path.name for path in folder.iterdir())[:10]
        raise CheckpointError(f"{name}: no weights in {folder}; expected {expected}; found {present}.{advice(folder)}")
    if not is_index(found):
        return {folder / found: frozenset()}, notes
    weight_map = read_json(folder / found, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{name}: {folder / found} has no 'weight_map'")
    return _checked_weight_map(weight_map, folder / found, name), notes


def _checked_weight_map(weight_map: dict[str, Any], index_path: Path, name: str) -> dict[Path, frozenset[str]]:
    problems = []
    by_name: dict[str, set[str]] = {}  # a few files for very many tensors
    for tensor_name, file_name in weight_map.items():
        if isinstance(file_name, str) and file_name in by_name:
            by_name[file_name].add(tensor_name)
        # A weight map comes from strangers: it must not lead out of the checkpoint's folder.
        elif inner_path_problem(file_name, name_only=True) is None:
            by_name[file_name] = {tensor_name}
        else:
            problems.append(
                f"{name}: {index_path} maps {shorten(tensor_name)!r} to {shorten(repr(file_name))}; expected a plain "
                "file name"
            )
    by_file = {index_path.parent / file_name: names for file_name, names in by_name.items()}
    for file in by_file:
        found = file_problem(file)
        if found is not None:
            missing = found == "does not exist"
            problems.append(f"{name}: {file} is named in {index_path.name} but {'missing' if missing else found}")
    if problems:
        raise CheckpointError(*group_alike(problems)[:_MAX_PROBLEMS])
    return {file: frozenset(names) for file, names in sorted(by_file.items())}


def read_bytes(info: TensorInfo) -> bytes:
    """Reads the bytes of a small tensor."""
    file = open_tensor_file(info.file)
    try:
        return bytes(file.read(info).reshape(-1).view(torch.uint8).tolist())
    finally:
        file.close()


def file_fingerprint(file: Path, header: bytes | None = None) -> dict[str, Any]:
    """Returns size, modification time, and the sha256 of a header, or of the whole file where it is small."""
    status = file.stat()
    if header is None and status.st_size < 1_000_000:
        header = file.read_bytes()
    digest = hashlib.sha256(header).hexdigest() if header is not None else None
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns, "header_sha256": digest}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shorten, names[:3])) + more
