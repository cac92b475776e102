"""The files beside the weights of a checkpoint: config, tokenizer, processor, model card.

They are copied from the models that a merge takes them from; only `config.json` and the model card are written anew.
The tokenizer of a folder is loaded here, too, for all who need it.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from largemerge.checkpoint.tensor_info import dtype_name

GENERATION_FILES = ("generation_config.json",)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
SENTENCE_ENCODER_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
TEMPLATE_FOLDER = "additional_chat_templates"
HEADS_FOLDER = "heads"
"""Folder of the heads that are kept beside a merged body."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


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
    for key in ("_name_or_path", "transformers_weights"):  # where the reference's weights lie says nothing of ours
        config.pop(key, None)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return json.dumps(config, indent=2) + "\n"


def set_vocabulary_size(config: dict[str, Any], before: int, after: int) -> None:
    """Changes the number of rows of the embeddings from `before` to `after`, wherever it stands in a config."""
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if part.get("vocab_size") == before:
            part["vocab_size"] = after


def copy_side_files(
    out: Path, config_source: Path, tokenizer_source: Path | None, processor_source: Path, *, with_code: bool
) -> list[str]:
    """Copies generation config, tokenizer and processor files, as far as they are there.

    Args:
        out: The output folder.
        config_source: Folder of the generation config, of a sentence encoder's files, and of Python code.
        tokenizer_source: Folder of the tokenizer; `None` to copy none.
        processor_source: Folder of the image processor.
        with_code: Copy Python files, too.

    Returns:
        Names of the copied files and folders.
    """
    copied = []
    wanted = [
        (config_source, GENERATION_FILES),
        (config_source, SENTENCE_ENCODER_FILES),
        (processor_source, PROCESSOR_FILES),
    ]
    if tokenizer_source is not None:
        wanted.append((tokenizer_source, TOKENIZER_FILES))
    if with_code:
        wanted.append((config_source, tuple(path.name for path in sorted(config_source.glob("*.py")))))
    for source, names in wanted:
        for name in names:
            if (source / name).is_file():
                shutil.copyfile(source / name, out / name)
                copied.append(name)
    folders = [tokenizer_source / TEMPLATE_FOLDER] if tokenizer_source is not None else []
    if (config_source / SENTENCE_ENCODER_FILES[0]).is_file():
        folders += sorted(config_source.glob("[0-9]_*"))  # what comes after the transformer, such as 1_Pooling
    for folder in folders:
        if folder.is_dir():
            shutil.copytree(folder, out / folder.name, dirs_exist_ok=True)
            copied.append(folder.name)
    return copied


def auto_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer in a folder, as Transformers makes it of the files there; the Hub is not asked.

    Args:
        folder: Folder of the tokenizer, such as a checkpoint's.
        trust_remote_code: Allow it to be code that lies in the folder.

    Raises:
        Exception: Of almost any type: nobody has listed what the many tokenizer classes may raise.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)


def find_processor(*folders: Path) -> Path:
    """Finds the first folder that has image processor files; the first of all if none has."""
    return _first_with(folders, PROCESSOR_FILES)


def find_tokenizer(*folders: Path) -> Path:
    """Finds the first folder that has tokenizer files; the first of all if none has."""
    return _first_with(folders, TOKENIZER_FILES)


def _first_with(folders: tuple[Path, ...], names: tuple[str, ...]) -> Path:
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), folders[0])


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
each model, is in `merge_report.json`.

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
