"""What a data-free merge writes beside its weights: config, tokenizer, model card, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from largemerge.arithmetic.opening import tokenizer_folder
from largemerge.arithmetic.plan import DataFreePlan
from largemerge.arithmetic.registry import METHODS
from largemerge.arithmetic.report import DataFreeReport
from largemerge.checkpoint.adapters import Adapter
from largemerge.checkpoint.index import Checkpoint, read_json
from largemerge.checkpoint.metadata import (
    GENERATION_FILES,
    copy_side_files,
    find_processor,
    find_tokenizer,
    model_card,
    output_config,
)
from largemerge.environment import versions
from largemerge.references import short_name
from largemerge.vocabulary.build import Vocabulary
from largemerge.vocabulary.ids import move_ids, set_vocabulary_size
from largemerge.vocabulary.templates import with_template
from largemerge.vocabulary.tokenizers import tokenizer_files, write_files


def config_text(plan: DataFreePlan) -> str:
    """The reference's config, with the output's dtype, number of layers and vocabulary."""
    sizes: dict[torch.dtype, int] = {}
    for task in plan.layout.tasks:
        if task.out_dtype.is_floating_point:
            sizes[task.out_dtype] = sizes.get(task.out_dtype, 0) + task.num_elements
    dtype = max(sizes, key=lambda each: sizes[each])
    config = json.loads(output_config(plan.checkpoints[plan.reference], dtype))
    if plan.config.slices and len(plan.layout.layers) == 1:
        (layers,) = plan.layout.layers.values()
        _set_layers(config, layers)
    adapter = plan.adapters.get(plan.reference)
    if adapter is not None:
        _set_rows_of_adapter(config, plan.checkpoints[plan.reference], adapter)
    if plan.vocabulary is not None:
        tensors = plan.checkpoints[plan.reference].tensors
        _set_vocabulary(config, plan.vocabulary, {tensors[name].shape[0] for name in plan.vocabulary.tensors})
    return json.dumps(config, indent=2) + "\n"


def _set_layers(config: dict[str, Any], layers: list[int]) -> None:
    """Writes the number of layers wherever it stands, and lists with an entry for every layer."""
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        counts = [key for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if key in part]
        for key in counts:
            before = part[key]
            for name, value in part.items():
                if isinstance(value, list) and len(value) == before and name.endswith(("layers", "_types")):
                    part[name] = [value[layer] for layer in layers]
            part[key] = len(layers)


def _set_vocabulary(config: dict[str, Any], vocabulary: Vocabulary, rows_before: set[int]) -> None:
    """Writes the rows of the embeddings, and the numbers of tokens that have moved."""
    for before in rows_before:
        set_vocabulary_size(config, before, vocabulary.num_rows)
    move_ids(config, vocabulary.reference.ids, vocabulary.tokenizer.ids, vocabulary.tokenizer.special)


def _set_rows_of_adapter(config: dict[str, Any], model: Checkpoint, adapter: Adapter) -> None:
    """An adapter may have brought embeddings with more rows than the model's config says."""
    for name in adapter.embeddings:
        set_vocabulary_size(config, model.config.get("vocab_size", -1), model.tensors[name].shape[0])


def _move_generation_ids(path: Path, vocabulary: Vocabulary) -> None:
    if path.is_file():
        config = read_json(path, path.name)
        move_ids(config, vocabulary.reference.ids, vocabulary.tokenizer.ids, vocabulary.tokenizer.special)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(path: Path, plan: DataFreePlan) -> None:
    """Writes the output's tokenizer: that of its vocabulary, else a copy of the reference's, or the first there is."""
    if plan.vocabulary is not None:
        files = plan.vocabulary.tokenizer.files
    else:
        models = [plan.reference, *plan.checkpoints]
        folders = [tokenizer_folder(plan.checkpoints[name], plan.adapters.get(name)) for name in models]
        files = tokenizer_files(find_tokenizer(*folders))
    write_files(path, files if plan.template is None else with_template(files, plan.template))


def write_side_files(path: Path, report: DataFreeReport) -> None:
    """Writes everything but weights, index and `config.json` into a folder."""
    plan, config = report.plan, report.plan.config
    folders = {name: checkpoint.folder for name, checkpoint in plan.checkpoints.items()}
    preferred = [folders[plan.reference], *folders.values()]
    copy_side_files(path, folders[plan.reference], None, find_processor(*preferred), with_code=False)
    write_tokenizer(path, plan)
    if plan.vocabulary is not None:
        _move_generation_ids(path / GENERATION_FILES[0], plan.vocabulary)
    documents = [each.model_dump(mode="json", exclude_defaults=True) for each in (*plan.before.configs, config)]
    text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)
    (path / "largemerge_config.yaml").write_text(text, encoding="utf-8")
    weights = {entry.model: entry.parameters.get("weight", 1.0) for entry in config.models}
    numbers = {name: value for name, value in weights.items() if isinstance(value, int | float)}
    card = model_card(
        method=METHODS[config.merge_method].title,
        class_name=(plan.checkpoints[plan.reference].config.get("architectures") or ["AutoModel"])[0],
        models=[
            {"name": short_name(name), "model": name, "weight": numbers.get(name, 1.0), "data": ""} for name in folders
        ],
        base=config.base_model,
        config_yaml=text,
        version=versions()["largemerge"],
    )
    (path / "README.md").write_text(card, encoding="utf-8")
    (path / "merge_report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
