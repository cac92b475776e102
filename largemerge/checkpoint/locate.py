"""References to models, as a user writes them, and the local folders that they mean.

    ./model      owner/name      owner/name@revision      ./model+./adapter      ./model+./first+./second      ./adapter
    {model: {path: owner/name, revision: main}, lora: {path: ./adapter}}

A reference names a folder or a Hub id, with a revision if wanted, and adapters on top if wanted. mergekit's mappings
(second line) become texts, `model@revision+adapter@revision`, as soon as a configuration is read. An adapter's folder
alone means the model that its `adapter_config.json` names, with this adapter.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from largemerge.checkpoint.sentence_modules import transformer_folder
from largemerge.checkpoint.side_files import TOKENIZER_FILES
from largemerge.config_file import nearest, shown
from largemerge.errors import CheckpointError
from largemerge.text_files import file_problem, read_json

_PICKLES = ["*.bin"]
_MODULE_PICKLES = ["[0-9]*_*/pytorch_model.bin"]  # of sentence-transformers' modules
_TOKENIZERS = sorted({f"*{name[name.rfind('.') :]}" for name in TOKENIZER_FILES})  # in folders inside, too
_CODE_PATTERNS = ["*.json", "*.py", "*.jinja", *_TOKENIZERS]
_PATTERNS = ["*.safetensors", *_MODULE_PICKLES, *_CODE_PATTERNS]
_IGNORED = ["onnx/*", "openvino/*", "original/*", "consolidated*", "checkpoint-*/*", "runs/*"]
"""The same weights for other programs, and what was left over from training."""
_MAX_LENGTH, _MAX_PLUS_SIGNS = 4096, 64
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")


def locate_checkpoint(reference: str, name: str, *, weights: bool = True) -> Path:
    """Finds the local folder of a checkpoint; fetches it from the Hub (or its cache) if it is no folder.

    Args:
        reference: A folder, or a Hub id, with `@revision` if wanted.
        name: Name that the user gives it, for messages.
        weights: Fetch the weights, too, not only the config.

    Raises:
        CheckpointError: If there is no such folder and the Hub does not have it or cannot be reached.
    """
    folder = Path(os.path.expanduser(reference))
    if os.path.isdir(folder):
        return folder
    if os.path.lexists(folder):
        found = file_problem(folder) or "is a file"
        raise CheckpointError(
            f"{name}: {reference} {found.partition(', expected')[0]}; expected a checkpoint folder or a Hub id"
        )
    repository, _, revision = reference.partition("@")
    if reference.startswith((".", "/", "~")) or repository.count("/") != 1:
        beside = (
            [path.name for path in folder.parent.iterdir() if path.is_dir()] if os.path.isdir(folder.parent) else []
        )
        hint = nearest(folder.name, beside)
        raise CheckpointError(
            f"{name}: {reference} does not exist; expected a checkpoint folder or a Hub id (owner/name){hint}"
        )
    return _from_hub(repository, revision or None, name, weights)


def _from_hub(repository: str, revision: str | None, name: str, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Told so, as 1.x looks a commit up on the Hub that it has, offline or not.
    offline = constants.HF_HUB_OFFLINE
    fetch = partial(
        snapshot_download, repository, revision=revision, local_files_only=offline, ignore_patterns=_IGNORED
    )
    try:
        if not weights:
            return Path(fetch(allow_patterns=_CODE_PATTERNS))
        folder = Path(fetch(allow_patterns=_PATTERNS))
        if not list((folder / transformer_folder(folder, name)).glob("*.safetensors")):
            folder = Path(fetch(allow_patterns=[*_PATTERNS, *_PICKLES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if offline and isinstance(error, LocalEntryNotFoundError):
            cause = "it is not in the Hub's cache on this machine, and HF_HUB_OFFLINE forbids to ask; fetch it first"
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}: {repository}{at} is neither a folder here nor to be had from the Hub: {cause}"
        ) from None
    return folder


def _reference(value: object) -> object:
    """Makes one text of mergekit's mapping."""
    if not isinstance(value, Mapping):
        return value
    if "model" not in value:
        return _path(value)
    if value.get("override_architecture") is not None:
        raise ValueError("'override_architecture' is not supported: names and shapes come from the files")
    unknown = set(value) - {"model", "lora", "override_architecture"}
    if unknown:
        raise ValueError(f"expected 'model' and maybe 'lora', found {shown(sorted(value))}")
    adapter = value.get("lora")
    return _path(value["model"]) + (f"+{_path(adapter)}" if adapter is not None else "")


def _path(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, Mapping) or set(value) - {"path", "revision"} or not isinstance(value.get("path"), str):
        raise ValueError(f"expected a path, or path and revision, found {shown(value)}")
    return str(value["path"]) + (f"@{value['revision']}" if value.get("revision") else "")


def _check_length(reference: str) -> str:
    """Returns the reference; raises where no file system, and no Hub, could have it."""
    if len(reference) > _MAX_LENGTH or reference.count("+") > _MAX_PLUS_SIGNS:
        raise ValueError(
            f"expected a path of up to {_MAX_LENGTH} characters and {_MAX_PLUS_SIGNS} adapters, found "
            f"{len(reference)} characters and {reference.count('+')} plus signs: {shown(reference)}"
        )
    if not reference.strip():
        raise ValueError(f"expected a folder or a Hub id, found {shown(reference)}")
    return reference


Reference = Annotated[
    str, Field(min_length=1), pydantic.BeforeValidator(_reference), pydantic.AfterValidator(_check_length)
]
"""A folder, or a Hub id, with `@revision` if wanted, and `+adapter` if wanted."""


def split_reference(reference: str) -> tuple[str, str | None]:
    """Splits a reference into model and adapters; a plus sign may also be part of a folder's name."""
    if "+" not in reference or os.path.exists(os.path.expanduser(reference)):
        return reference, None
    splits = list(_splits(reference))
    model, adapter = next((each for each in splits if os.path.isdir(os.path.expanduser(each[0]))), splits[0])
    return model, adapter


def split_adapters(adapters: str, folders: Sequence[Path] = (Path(),)) -> list[str]:
    """Splits what stands behind a model into adapters, in order; a plus sign may also be part of a folder's name.

    Args:
        adapters: The text behind the model's plus sign.
        folders: Folders that relative paths may start from.
    """
    if "+" not in adapters or _absolute_path(adapters, folders) is not None:
        return [adapters]
    splits = list(_splits(adapters))
    first, rest = next((each for each in splits if _absolute_path(each[0], folders) is not None), splits[0])
    return [first, *split_adapters(rest, folders)]


def base_of_adapter(folder: Path) -> str | None:
    """Returns what an adapter's config says its model is (maybe nothing: `""`); `None` for a folder of a model.

    Raises:
        CheckpointError: If the adapter's config cannot be read.
    """
    config = folder / "adapter_config.json"
    has_weights = any(next(folder.glob(pattern), None) is not None for pattern in _WEIGHTS)
    if has_weights or not os.path.lexists(config):
        return None
    base = read_json(config).get("base_model_name_or_path")
    return base if isinstance(base, str) else ""


def absolute_reference(
    reference: str, folders: Sequence[Path], names: Collection[str] = (), unversioned: list[str] | None = None
) -> str:
    """Makes paths absolute, and puts the model before an adapter that is named alone.

    Args:
        reference: A model, with an adapter if it has one.
        folders: Folders that relative paths may start from; what lies in none of them is left as it is.
        names: Names of other merges' results, which are no paths.
        unversioned: If given, `folder@revision` means the folder, which has no revisions, and is added to this list.
    """
    if reference in names:
        return reference
    named = next(((model, adapter) for model, adapter in _splits(reference) if model in names), None)
    if named is not None:
        return f"{named[0]}+{_absolute_adapters(named[1], folders, unversioned)}"
    whole = _absolute_path(reference, folders, unversioned)
    if whole is not None or "+" not in reference:
        return _with_base(whole, folders) if whole is not None else reference
    splits = [(_absolute_path(model, folders, unversioned), adapter) for model, adapter in _splits(reference)]
    found = next(((model, adapter) for model, adapter in splits if model is not None), None)
    model, adapter = found or next(_splits(reference))
    return f"{_with_base(model, folders) if found else model}+{_absolute_adapters(adapter, folders, unversioned)}"


def short_name(reference: str) -> str:
    """Shortens a reference for tables, to the last part of every path."""
    model, adapters = split_reference(reference)
    return "+".join(Path(part).name for part in [model, *(split_adapters(adapters) if adapters is not None else [])])


def _splits(reference: str) -> Iterator[tuple[str, str]]:
    """Yields every way to split a reference at a plus sign."""
    for place, letter in enumerate(reference):
        if letter == "+":
            yield reference[:place], reference[place + 1 :]


def _absolute_adapters(adapters: str, folders: Sequence[Path], unversioned: list[str] | None) -> str:
    return "+".join(_absolute_path(each, folders, unversioned) or each for each in split_adapters(adapters, folders))


def _with_base(path: str, folders: Sequence[Path]) -> str:
    """Puts the model before the folder of an adapter; any other folder is left as it is."""
    base = base_of_adapter(Path(path))
    found = _absolute_path(base, folders) if base else None
    return path if found is None or found == path else f"{found}+{path}"


def _absolute_path(path: str, folders: Sequence[Path], unversioned: list[str] | None = None) -> str | None:
    for folder in folders:
        found = folder / os.path.expanduser(path)
        if path and os.path.isdir(found):
            return str(found.resolve())
    without, at, _ = path.rpartition("@")
    whole = _absolute_path(without, folders) if at and unversioned is not None else None
    if whole is not None and unversioned is not None and path not in unversioned:
        unversioned.append(path)
    return whole


def existing_folder(path: Path) -> Path:
    """Returns `path`, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())
