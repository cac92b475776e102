"""Folders of sentence-transformers: a transformer, and modules after it that may have weights of their own.

    modules.json: [{"path": "", "type": "….Transformer"}, {"path": "1_Pooling", …}, {"path": "2_Dense", …}]

    today           config.json, model.safetensors, 1_Pooling/config.json, 2_Dense/model.safetensors
    until 2021      0_Transformer/config.json, 0_Transformer/pytorch_model.bin, 1_Pooling/config.json, …

A module's tensors are tensors of the checkpoint like others, under the names `2_Dense::linear.weight`: they are merged,
written (to `2_Dense/model.safetensors`), resumed, planned and reported like them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from largemerge.checkpoint.tensor_files import open_tensor_file
from largemerge.checkpoint.tensor_info import MODULE_SEPARATOR, TensorInfo
from largemerge.checkpoint.weight_files import WEIGHT_FILES
from largemerge.errors import CheckpointError, shorten
from largemerge.text_files import inner_path_problem, read_json

if TYPE_CHECKING:
    from largemerge.checkpoint.index import Checkpoint

MODULES_FILE = "modules.json"


def read_modules(root: Path, name: str) -> list[Mapping[str, Any]]:
    """Reads the modules of a folder, in order; none where it is no sentence-transformers' folder.

    Raises:
        CheckpointError: If `modules.json` is broken, or leads out of the folder.
    """
    path = root / MODULES_FILE
    if not os.path.lexists(path):
        return []
    modules: list[Mapping[str, Any]] = read_json(path, name, expected=list)
    if not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{name}: {path} holds no list of modules")
    # It comes from strangers: it must not lead out of the checkpoint's folder.
    found = [(module.get("path"), inner_path_problem(module.get("path"))) for module in modules]
    problems = [
        f"{name}: {path} names the folder {shorten(repr(inner))}, which {problem}; expected one inside its own"
        for inner, problem in found
        if problem is not None
    ]
    if problems:
        raise CheckpointError(*problems[:20])
    return modules


def transformer_folder(root: Path, name: str) -> str:
    """Finds the folder of the transformer inside a checkpoint's: "" where it is the checkpoint's own.

    Raises:
        CheckpointError: If `modules.json` is broken, or none of its modules has a config.
    """
    if os.path.lexists(root / "config.json"):
        return ""
    modules = read_modules(root, name)
    found = next((each["path"] for each in modules if (root / each["path"] / "config.json").is_file()), None)
    if not modules or found is None:
        return ""
    first = next(iter(modules))
    if found != first["path"] or not str(first.get("type", "")).endswith(("Transformer", "CLIPModel")):
        raise CheckpointError(
            f"{name}: the first module in {root / MODULES_FILE} is {first.get('type')} in {first['path']!r}; "
            "expected a transformer with config.json"
        )
    return str(PurePosixPath(found))


def module_weight_files(root: Path, transformer: str, name: str) -> dict[str, Path]:
    """Finds the files with weights of the modules beside the transformer, by their folders inside `root`.

    Raises:
        CheckpointError: If a module has weights in a format that cannot be read.
    """
    found: dict[str, Path] = {}
    for module in read_modules(root, name):
        start = root / module["path"]
        if os.path.lexists(start) and not start.is_dir():
            raise CheckpointError(f"{name}: {start} is named in {MODULES_FILE}; expected a folder, or nothing")
        if PurePosixPath(module["path"]) in (PurePosixPath(), PurePosixPath(transformer)) or not start.is_dir():
            continue
        for folder in (start, *sorted(path for path in start.rglob("*") if path.is_dir())):
            file = next((folder / each for each in WEIGHT_FILES if os.path.lexists(folder / each)), None)
            if file is not None:
                found[folder.relative_to(root).as_posix()] = file
                continue
            others = [path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".h5", ".pt")]
            if others:
                raise CheckpointError(
                    f"{name}: module {module['path']} has weights in {', '.join(sorted(others))}; expected "
                    f"{' or '.join(WEIGHT_FILES)}"
                )
    return found


def read_module_tensors(files: Mapping[str, Path]) -> tuple[dict[str, TensorInfo], dict[str, bytes | None]]:
    """Lists the tensors of modules, by the names that they have here; and the headers of their files, by folder.

    Raises:
        CheckpointError: If a file is broken.
    """
    tensors: dict[str, TensorInfo] = {}
    headers: dict[str, bytes | None] = {}
    for folder, file in files.items():
        opened = open_tensor_file(file)
        tensors |= {f"{folder}{MODULE_SEPARATOR}{key}": info for key, info in opened.tensors().items()}
        headers[folder] = opened.header
    return tensors, headers


def split_name(name: str) -> tuple[str, str]:
    """Splits a tensor's name into the folder of its module, "" for the transformer, and its name there."""
    folder, _, inner = name.rpartition(MODULE_SEPARATOR)
    return folder, inner


def modules_of(names: Iterable[str]) -> list[str]:
    """Lists the folders of the modules that some tensors belong to, the transformer's not among them."""
    return list(dict.fromkeys(folder for folder, _ in map(split_name, names) if folder))


def module_problems(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Finds tensors of modules that only some checkpoints have, or that have other shapes in some."""
    all_of_them = list(checkpoints)
    names = dict.fromkeys(key for each in all_of_them for key in each.tensors if MODULE_SEPARATOR in key)
    problems = []
    for name in names:
        folder, inner = split_name(name)
        shapes = {each.name: each.tensors[name].shape if name in each.tensors else None for each in all_of_them}
        lacking = [model for model, shape in shapes.items() if shape is None]
        if lacking:
            having = next(model for model, shape in shapes.items() if shape is not None)
            problems.append(
                f"module {folder}: {', '.join(lacking)} has no {inner}, which {having} has; expected the same modules "
                f"everywhere: put the folder {folder} (and {MODULES_FILE}) there, or merge the transformers alone"
            )
        elif len(set(shapes.values())) > 1:
            found = {model: list(shape) for model, shape in shapes.items() if shape is not None}
            problems.append(f"module {folder}: the shapes of {inner} differ: {found}; expected one")
    return problems[:20]


def module_notes(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Says which modules with weights are merged beside the transformer."""
    modules = modules_of(key for each in checkpoints for key in each.tensors)
    return [f"modules of sentence-transformers that are merged, too: {', '.join(modules)}"] if modules else []


def without_modules(checkpoint: Checkpoint) -> Checkpoint:
    """A copy of a checkpoint that has the transformer's tensors alone."""
    tensors = {key: info for key, info in checkpoint.tensors.items() if MODULE_SEPARATOR not in key}
    return dataclasses.replace(checkpoint, tensors=tensors)
