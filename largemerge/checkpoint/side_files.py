"""The files beside the weights of a checkpoint: config, tokenizer, processor, code, model card.

    reference, folders of tokenizer and processor ──► find_side_files ──► SideFiles: what is copied from where, notes

Only `config.json` and the model card are written anew. The tables of names are here, for all who need them: what is
read, fetched from the Hub, copied, and removed where a merge replaces another. Nothing is copied through a link that
leads out of its checkpoint. The tokenizer of a folder is loaded here, too.
"""

from __future__ import annotations

import ast
import copy
import fnmatch
import functools
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from largemerge.checkpoint.index import Checkpoint, is_linked_config, own_folders
from largemerge.checkpoint.quantized import SETTINGS_KEYS
from largemerge.checkpoint.sentence_modules import MODULES_FILE, read_modules
from largemerge.checkpoint.tensor_info import dtype_name
from largemerge.checkpoint.tokenizer_check import TEMPLATE_FOLDER, check_tokenizer_files, try_tokenizer
from largemerge.checkpoint.weight_files import SETTING, is_loaded_weights
from largemerge.errors import CheckpointError
from largemerge.isolation import panics_as_errors
from largemerge.text_files import (
    MAX_FILE_BYTES,
    MAX_TEXT_BYTES,
    file_problem,
    leads_out,
    parse_json,
    read_file,
    read_json,
    read_text,
)

GENERATION_FILES = ("generation_config.json",)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.*.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "target_vocab.json",
    "normalizer.json",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "byte_maps.json",
    "entity_vocab.json",
    "word_pronunciation.json",
    "word_shape.json",
    "prophetnet.tokenizer",
    "*.tokenizer",
    "chat_template.jinja",
    "chat_template.json",
)
"""Names of a tokenizer's files: those that classes of Transformers ask for, and patterns for those of custom code."""
HEADS_FOLDER = "heads"
"""Folder of the heads that are kept beside a merged body."""
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "speaker_embeddings_path.json",
    "alphabet.json",
)
SENTENCE_FILES = (MODULES_FILE, "config_sentence_transformers.json", "router_config.json", "sentence_*_config.json")
"""Files of sentence-transformers; the last ones lie beside the transformer's config."""

_TOKENIZER_FOLDERS = (TEMPLATE_FOLDER, "*tokenizer")  # InstructBLIP, RAG: a tokenizer more
_PROCESSOR_FOLDERS = ("*processor", "speaker_embeddings", "language_model")  # Bark, Wav2Vec2 with a language model
_CODE_FOLDER = "custom_generate"
_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.onnx", "*.pt", "*.pth", "*.ckpt", "*.index.json", ".*")
_MAX_PARSED_BYTES = 4 << 20
_CODE_KEYS = ("auto_map", "custom_pipelines")


@dataclass(frozen=True)
class SideFiles:
    """Files that the output gets from its inputs.

    Attributes:
        files: Where each file comes from, by its path in the output's folder.
        inner: Folder of the transformer inside the output's: "" but for sentence-transformers' old layout.
        notes: What a user should know: code of unlike candidates, links that are not followed.
    """

    files: Mapping[str, Path]
    inner: str
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(source.stat().st_size for source in self.files.values() if source.is_file())

    def copy(self, out: Path) -> None:
        """Copies all files."""
        for name, source in self.files.items():
            if not (out / name).parent.is_dir():
                (out / name).parent.mkdir(parents=True)
            shutil.copyfile(source, out / name)


def output_config(
    reference: Mapping[str, Any], dtype: torch.dtype, quantization: Mapping[str, Any] | None = None
) -> str:
    """Makes the text of the output's `config.json`: the reference's, with the output's dtype and quantisation."""
    config: dict[str, Any] = copy.deepcopy(dict(reference))
    name = dtype_name(dtype)
    for part in (config, *config.values()):
        if isinstance(part, dict):
            part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = name
    for key in ("_name_or_path", SETTING):  # where the reference's weights lie says nothing of ours
        config.pop(key, None)
    for part in (config, *config.values()):
        if isinstance(part, dict):
            for key in SETTINGS_KEYS:
                part.pop(key, None)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return json.dumps(config, indent=2) + "\n"


def set_vocabulary_size(config: dict[str, Any], before: int, after: int) -> None:
    """Changes the number of rows of the embeddings from `before` to `after`, wherever it stands in a config."""
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if part.get("vocab_size") == before:
            part["vocab_size"] = after


def find_side_files(
    reference: Checkpoint,
    tokenizer: Path,
    processor: Path,
    checkpoints: Sequence[Checkpoint] = (),
    *,
    vocabulary_files: bool = True,
) -> SideFiles:
    """Finds what the output gets: generation config, tokenizer, processor, code, modules of sentence-transformers.

    Args:
        reference: The checkpoint of the output's config.
        tokenizer: Folder of the tokenizer.
        processor: Folder of the processor.
        checkpoints: All checkpoints that are merged; where they have other code or modules, a note says so.
        vocabulary_files: Copy the tokenizer's files; else its code alone, where the files are made anew.

    Raises:
        CheckpointError: If `modules.json` of one of them is broken, or what lies in the place of a file is none (a
            named pipe, a folder, a link that leads nowhere), or is no JSON where it should be; it names all.
    """
    notes: list[str] = []
    everywhere = list(dict.fromkeys(each.name for each in (reference, *checkpoints)))
    by_name = {each.name: each for each in (*checkpoints, reference)}
    others = [by_name[name] for name in everywhere]
    sentence = next((each for each in others if (each.root / MODULES_FILE).is_file()), None)
    inner = sentence.inner if sentence is not None else reference.inner
    found: dict[str, Path] = {}

    problems: list[str] = []

    def add(folder: Path, names: Iterable[str], target: str = "") -> None:
        for name in names:
            problem = side_file_problem(folder / name)
            if problem is not None:
                problems.append(problem)
            elif not is_inside(folder / name, folder):
                notes.append(
                    f"{folder / name} is a link that leads out of its checkpoint: not copied; put a copy there"
                )
            else:
                found[str(PurePosixPath(target, name))] = folder / name

    add(tokenizer, tokenizer_names(tokenizer) if vocabulary_files else [], inner)
    add(processor, [*_matching(processor, PROCESSOR_FILES), *_in_folders(processor, _PROCESSOR_FOLDERS)], inner)
    add(reference.folder, _matching(reference.folder, GENERATION_FILES), inner)
    if problems:
        raise CheckpointError(*dict.fromkeys(problems))
    add(tokenizer, _code_files(tokenizer, ("tokenizer_config.json",), notes), inner)
    add(processor, _code_files(processor, PROCESSOR_FILES, notes), inner)
    code = _code_files(reference.folder, ("config.json",), notes)
    add(reference.folder, [*code, *_in_folders(reference.folder, (_CODE_FOLDER,))], inner)
    notes += _differences("custom code", reference, code, {each.name: each.folder for each in others})
    if sentence is not None:
        at_root, beside = _sentence_files(sentence, notes)
        add(sentence.root, at_root)
        add(sentence.folder, beside, inner)
        if sentence.name != reference.name:
            notes.append(f"files of sentence-transformers ({MODULES_FILE}, …) come from {sentence.name}")
        folders = {each.name: each.root for each in others if (each.root / MODULES_FILE).is_file()}
        notes += _differences("modules", sentence, at_root, folders)
    if problems:
        raise CheckpointError(*dict.fromkeys(problems))
    return SideFiles(found, inner, tuple(dict.fromkeys(notes)))


def side_file_problem(path: Path) -> str | None:
    """Says why what lies in the place of a side file cannot be copied; `None` if it can."""
    is_json = path.suffix == ".json"
    problem = file_problem(path, MAX_TEXT_BYTES if is_json else MAX_FILE_BYTES)
    if problem is not None:
        return f"{path} {problem}"
    status = path.stat()
    return _json_problem(path, status.st_size, status.st_mtime_ns) if is_json else None


@functools.lru_cache(maxsize=256)
def _json_problem(path: Path, num_bytes: int, modified_ns: int) -> str | None:
    """Says why a file is no JSON; a large one is a vocabulary, which is looked at where it is read."""
    if num_bytes > _MAX_PARSED_BYTES:
        return None
    try:
        read_json(path, expected=object)
    except CheckpointError as error:
        return str(error)
    return None


def tokenizer_names(folder: Path) -> list[str]:
    """Lists the files of a folder's tokenizer by name, those in folders inside it included."""
    return [*_matching(folder, TOKENIZER_FILES), *_in_folders(folder, _TOKENIZER_FOLDERS)]


def remove_checkpoint(folder: Path, kept: Collection[Path]) -> None:
    """Removes a checkpoint: first what makes it one, then its weights, then the files beside them.

    What the report of an earlier merge lists, and what Transformers would load by its name. Anything else in the folder
    is somebody's: other weights (`optimizer.bin`, `lora.safetensors`), notes, data.

    Args:
        folder: The folder.
        kept: Files that stay.
    """
    configs, others = loaded_files(folder)
    listed = [folder / name for name in _listed_files(folder)]
    real = folder.resolve()
    removed = dict.fromkeys([*configs, *listed, *others])
    for path in removed:
        place = path.parent.resolve()
        if path not in kept and real in (place, *place.parents) and not path.is_dir():
            path.unlink(missing_ok=True)
    places = {place for path in removed for place in path.parents if folder in place.parents}
    for place in sorted(places, reverse=True):
        if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
            place.rmdir()


def loaded_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Lists what Transformers, peft or sentence-transformers would load from a folder by its name.

    Returns:
        What makes it a checkpoint, its configs; and all else.
    """
    try:
        modules = [folder / module["path"] for module in read_modules(folder, folder.name) if module["path"]]
    except CheckpointError:
        modules = []
    modules = [module for module in modules if is_inside(module, folder)]
    configs = [config for place in (folder, *modules) if (config := place / "config.json").is_file()]
    found = [path for place in (folder, *modules) for path in _loaded_weights(place)]
    found += [path for module in modules for path in _files_below(module)]
    names = _matching(folder, (*GENERATION_FILES, *PROCESSOR_FILES, *SENTENCE_FILES, _ADAPTER_CONFIG))
    names += [name for name in tokenizer_names(folder) if _is_loaded_by_name(name)]
    return configs, [*found, *(folder / name for name in names)]


def strangers(folder: Path, ours: Collection[str]) -> list[str]:
    """Lists what would be loaded from a merge's folder though the merge has not written it.

    Args:
        folder: The output folder.
        ours: Paths in the folder of what the merge has written, or will write.
    """
    configs, others = loaded_files(folder)
    names = dict.fromkeys(path.relative_to(folder).as_posix() for path in (*configs, *others) if path.is_file())
    return [name for name in names if name not in ours]


_UNCLEAR = ("*.model", "*.spm", "*.tiktoken", "*.tokenizer")
_CLEAR = ("tokenizer.model*", "spiece.model", "sentencepiece*.model", "spm*.model", "source.spm", "target.spm")


def _is_loaded_by_name(name: str) -> bool:
    """Whether a class of Transformers looks for a tokenizer's file by this name; custom code may have any."""
    clear = any(fnmatch.fnmatchcase(name, pattern) for pattern in _CLEAR)
    return clear or not any(fnmatch.fnmatchcase(name, pattern) for pattern in _UNCLEAR)


def _listed_files(folder: Path) -> list[str]:
    """Lists the files that an earlier merge has written to a folder, as its report says."""
    try:
        digests = read_json(folder / "merge_report.json")["digests"]
        names = [name for kind in ("weights", "files") for name in digests[kind] if isinstance(name, str)]
    except (CheckpointError, KeyError, TypeError):
        return []
    return [name for name in names if not leads_out(name)]


def _loaded_weights(folder: Path) -> list[Path]:
    """Lists the files of weights that Transformers or peft would load from a folder, and their indexes."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_file() or path.is_symlink()]
    indexed: set[str] = set()
    for name in names:
        if name.endswith(".json") and ".index." in name:
            try:
                indexed.update(read_json(folder / name)["weight_map"].values())
            except (CheckpointError, KeyError, TypeError, AttributeError):
                continue
    return [folder / name for name in names if name in indexed or is_loaded_weights(name)]


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a checkpoint's folder, links followed.

    The Hub's cache links to its blobs, which count as inside. So does the folder of another checkpoint whose
    `config.json` is linked, as people link all files of a model into a folder of its own.
    """
    try:
        roots, real = [*own_folders(folder)], path.resolve()
        config = (folder / "config.json").resolve()
    except (OSError, RuntimeError):  # a link that leads in a circle
        return False
    if config.name == "config.json" and config.parent not in roots and is_linked_config(folder / "config.json"):
        roots.append(config.parent)
    return any(root in real.parents for root in roots)


def check_inside(path: Path, folder: Path) -> None:
    """Makes sure that a file whose content may come to lie in the output is the checkpoint's own.

    Raises:
        CheckpointError: If it is a link that leads out of the folder (see `is_inside`).
    """
    if not is_inside(path, folder):
        raise CheckpointError(f"{path} is a link that leads out of its checkpoint; put a copy there")


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Lists what lies in a folder under a name that matches a pattern; folders only where it is the very name."""
    wanted = tuple(patterns)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    matching = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]
    return [name for name in matching if name in wanted or not os.path.isdir(folder / name)]


def _in_folders(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Lists all files but weights in the folders inside a folder that match a pattern, by their paths in it."""
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    wanted = [path for path in inside if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)]
    return [str(file.relative_to(folder)) for path in wanted for file in _files_below(path)]


def _files_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
        if not path.is_dir() and not hidden and not any(fnmatch.fnmatchcase(path.name, each) for each in _WEIGHTS):
            yield path


def _sentence_files(sentence: Checkpoint, notes: list[str]) -> tuple[list[str], list[str]]:
    """Lists files of sentence-transformers: those in its own folder, and those beside the transformer's config."""
    root, modules = sentence.root, read_modules(sentence.root, sentence.name)
    at_root = _matching(root, SENTENCE_FILES if not sentence.inner else SENTENCE_FILES[:-1])
    for module in modules:
        if module["path"] not in ("", sentence.inner):
            at_root += [str(file.relative_to(root)) for file in _files_below(root / module["path"])]
    kinds = [str(module.get("type")) for module in modules]
    of_others = ("sentence_transformers.", "torch.", "transformers.")
    own = [kind.rpartition(".")[0] for kind in kinds if "--" not in kind and not kind.startswith(of_others)]
    at_root += _with_imports(root, [f"{module.replace('.', '/')}.py" for module in own if module], notes)
    return at_root, _matching(sentence.folder, SENTENCE_FILES[-1:]) if sentence.inner else []


def _code_files(folder: Path, configs: Sequence[str], notes: list[str]) -> list[str]:
    """Lists the Python files that some configs of a folder name, and all that these import of the same folder."""
    modules: list[str] = []
    for name in configs:
        if not os.path.lexists(folder / name) or not is_inside(folder / name, folder):
            continue
        config = read_json(folder / name, expected=object)
        if not isinstance(config, dict):
            continue
        for key in _CODE_KEYS:
            modules += _module_names(config.get(key))
    return _with_imports(folder, [f"{module.replace('.', '/')}.py" for module in modules], notes)


def _module_names(value: Any) -> Iterator[str]:
    """Yields the modules that a config's `auto_map` names; code of another repository (`owner/name--…`) is not here."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(inner, str) or key != "type":
                yield from _module_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _module_names(inner)
    elif isinstance(value, str) and "--" not in value and all(part.isidentifier() for part in value.split(".")):
        module, _, name = value.rpartition(".")
        if module and name:
            yield module


def _with_imports(folder: Path, files: Sequence[str], notes: list[str]) -> list[str]:
    """Lists Python files with all that they import from the same folder, as far as it is there."""
    found: list[str] = []
    waiting = list(dict.fromkeys(files))
    for name in waiting:  # grows on the way
        if not os.path.isfile(folder / name):
            if name in files:
                notes.append(f"{folder} names its code {name}, which is not there: the output will name it, too")
            continue
        found.append(name)
        waiting += [each for each in _imported(folder, name) if each not in waiting]
    return found


def _imported(folder: Path, name: str) -> Iterator[str]:
    """Yields the files of a folder that one of its files imports, and those that make their folders packages."""
    try:
        tree = ast.parse(read_text(folder / name))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    package = PurePosixPath(name).parent
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        start = package
        for _ in range(node.level - 1):
            start = start.parent
        module = start.joinpath(*(node.module or "").split(".")) if node.module else start
        for path in (module, *(module / alias.name for alias in node.names)):
            for file in (f"{path}.py", str(path / "__init__.py")):
                if os.path.isfile(folder / file):
                    yield file
        for parent in module.parents:
            if parent != PurePosixPath(".") and os.path.isfile(folder / parent / "__init__.py"):
                yield str(parent / "__init__.py")


def _differences(what: str, chosen: Checkpoint, names: Iterable[str], folders: Mapping[str, Path]) -> Iterator[str]:
    """Yields a note where other checkpoints have other contents in files that are taken from one of them."""
    for name in names:
        taken = folders[chosen.name] / name
        unlike = [
            model
            for model, folder in folders.items()
            if model != chosen.name and os.path.isfile(folder / name) and _content(folder / name) != _content(taken)
        ]
        if unlike:
            yield f"{what}: {name} of {chosen.name} is taken; {', '.join(unlike)} has another one"


def _content(path: Path) -> Any:
    """Reads a file for a comparison; which version of a library wrote a JSON file makes no difference."""
    raw = read_file(path)
    try:
        value = parse_json(raw.decode("utf-8-sig")) if path.suffix == ".json" else raw
    except ValueError:
        return raw
    return {key: inner for key, inner in value.items() if key != "__version__"} if isinstance(value, dict) else value


def auto_tokenizer(folder: Path, *, trust_remote_code: bool = False, own_links: bool = False) -> Any:
    """Loads the tokenizer in a folder, as Transformers makes it of the files there; the Hub is not asked.

    Args:
        folder: Folder of the tokenizer, such as a checkpoint's.
        trust_remote_code: Allow it to be code that lies in the folder.
        own_links: Whether links in it are ours, and may lead out.

    Raises:
        CheckpointError: If one of its files is broken or no file, a link leads out, or the tokenizer made of the files
            ends its process when it is used.
        Exception: Of almost any type: nobody has listed what the many tokenizer classes may raise.
    """
    check_side_files(folder, ("config.json", *TOKENIZER_FILES))
    check_tokenizer_files(folder)
    from transformers import AutoTokenizer

    for name in tokenizer_names(folder) if not own_links else ():
        check_inside(folder / name, folder)
    with panics_as_errors():
        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    why = try_tokenizer(loaded, [folder / name for name in tokenizer_names(folder)])
    if why is not None:
        document = folder / "tokenizer.json"
        where = document if document.is_file() else f"the tokenizer in {folder}"
        raise CheckpointError(f"{where} cannot encode a text: {why}")
    return loaded


def check_side_files(folder: Path, patterns: Iterable[str]) -> None:
    """Makes sure that what matches a pattern in a folder can be read, before another library tries.

    Raises:
        CheckpointError: If there is a named pipe, a folder, or a link that leads nowhere; it names all.
    """
    paths = [folder / name for name in _matching(folder, patterns)]
    problems = [
        f"{path} {problem}"
        for path in paths
        if (problem := file_problem(path, MAX_TEXT_BYTES if path.suffix == ".json" else MAX_FILE_BYTES)) is not None
    ]
    if problems:
        raise CheckpointError(*problems)


def find_processor(*folders: Path) -> Path:
    """Finds the first folder that has image processor files; the first of all if none has."""
    return _first_with(folders, PROCESSOR_FILES)


def find_tokenizer(*folders: Path) -> Path:
    """Finds the first folder that has tokenizer files; the first of all if none has."""
    return next((folder for folder in folders if has_tokenizer(folder)), folders[0])


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer, more than templates."""
    return bool(_matching(folder, [name for name in TOKENIZER_FILES if "template" not in name]))


def _first_with(folders: tuple[Path, ...], names: tuple[str, ...]) -> Path:
    return next((folder for folder in folders if _matching(folder, names)), folders[0])


def model_card(
    *,
    method: str,
    class_name: str,
    models: list[dict[str, Any]],
    base: str | None,
    config_yaml: str,
    version: str,
    more: str = "",
) -> str:
    """Makes the text of the output's `README.md`.

    Args:
        method: Name of the merging method.
        class_name: Transformers class that loads the output.
        models: Fields `name`, `model`, `weight` and `data` of each model.
        base: The base model, if there is one.
        config_yaml: The resolved configuration.
        version: Version of largemerge.
        more: Sections that come before the configuration.
    """
    sources = [str(model["model"]) for model in models] + ([base] if base else [])
    sources = [source.partition("@")[0] for source in sources if not source.startswith(("/", "."))]
    hub_ids = [source for source in sources if source.count("/") == 1]
    listed = "".join(f"\n- {source}" for source in dict.fromkeys(hub_ids))
    front = f"base_model:{listed}\n" if hub_ids else ""
    rows = "\n".join(f"| {m['name']} | `{Path(m['model']).name}` | {m['weight']:g} | `{m['data']}` |" for m in models)
    return f"""---
library_name: transformers
tags:
- merge
- largemerge
{front}---

# A merge of {len(models)} models

Made with largemerge {version} by the method `{method}`. How each tensor came about, and how far it lies from
each model, is in `merge_report.json`; `largemerge report .` in this folder makes a page of it.

| name | model | weight | calibration data |
|---|---|---|---|
{rows}

## How to load it

```python
from transformers import {class_name}

model = {class_name}.from_pretrained("path/to/this/folder")
```
{more}
## Configuration

```yaml
{config_yaml.rstrip()}
```
"""
