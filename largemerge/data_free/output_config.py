"""The config of a data-free merge's output, and whether the output loads by it.

    the reference's config ──► dtype ──► layers ──► vocabulary ──► config.json
    config.json, names and shapes of all tensors ──► Transformers on the meta device ──► problems, notes

All of this is known before a weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from largemerge.checkpoint.sentence_modules import split_name
from largemerge.checkpoint.side_files import output_config, set_vocabulary_size
from largemerge.checkpoint.tensor_info import OutputTensor
from largemerge.data_free.layer_config import Source, depths, follow_layers
from largemerge.data_free.matrices import LAYER
from largemerge.data_free.tasks import OutputTasks, Task
from largemerge.model.alignment import Alignment
from largemerge.model.output_check import check_loads
from largemerge.tokenizer.token_ids import move_ids
from largemerge.tokenizer.vocabulary import Vocabulary


def make_output_config(
    alignment: Alignment, output: OutputTasks, vocabulary: Vocabulary | None, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Makes the contents of `config.json`: the reference's, with the output's dtype, layers and vocabulary.

    What it cannot say, and tensors that would be missing or unexpected when the output is loaded by it, are added to
    the problems and notes of `output`.

    Args:
        alignment: The models under the names of the output.
        output: The output's tasks, without problems so far.
        vocabulary: The output's vocabulary, where embeddings are arranged by token.
        trust_remote_code: Allow the checkpoints' own Python code.
    """
    reference = alignment.layout
    checkpoints = {name: view.checkpoint for name, view in alignment.views.items()}
    like = checkpoints[reference]
    checkpoints[reference] = replace(like, config=alignment.config)
    layers = _layer_sources(reference, output.tasks)
    followed = follow_layers(reference, checkpoints, layers)
    output.problems.extend(followed.problems)
    output.notes.extend(followed.notes)
    config: dict[str, Any] = json.loads(output_config(followed.config, _dtype(output.tasks)))
    if vocabulary is not None:
        tensors_before = alignment.views[reference].tensors
        for before in {tensors_before[name].shape[0] for name in vocabulary.tensors if name in tensors_before}:
            set_vocabulary_size(config, before, vocabulary.num_rows)
        move_ids(config, vocabulary.reference.ids, vocabulary.tokenizer.ids, vocabulary.tokenizer.special)
    if not output.problems:
        tensors = {
            task.name: OutputTensor(task.out_dtype, task.shape) for task in output.tasks if not split_name(task.name)[0]
        }
        stacks = depths(like)
        restacked = any(
            [layer for _, layer in each] != list(range(stacks.get(stack, 0))) for stack, each in layers.items()
        )
        findings = check_loads(config, tensors, like, restacked=restacked, trust_remote_code=trust_remote_code)
        output.problems.extend(findings.problems)
        output.notes.extend(findings.notes)
    return config


def _dtype(tasks: Iterable[Task]) -> torch.dtype:
    """Returns the floating-point dtype that most of the output is written in."""
    sizes: dict[torch.dtype, int] = {}
    for task in tasks:
        if task.out_dtype.is_floating_point:
            sizes[task.out_dtype] = sizes.get(task.out_dtype, 0) + task.num_elements
    return max(sizes, key=lambda dtype: sizes[dtype])


def _layer_sources(reference: str, tasks: Iterable[Task]) -> dict[str, list[Source]]:
    """Lists the layers that the output's layers are made of, by stack: the reference's where it is among them."""
    found: dict[str, dict[int, Source]] = {}
    for task in tasks:
        match = LAYER.match(task.name)
        if match is None or int(match["number"]) in found.get(match["stack"], {}):
            continue
        for model, key in sorted(task.inputs, key=lambda source: source[0] != reference):
            layer = LAYER.match(key)
            if layer is not None:
                found.setdefault(match["stack"], {})[int(match["number"])] = (model, int(layer["number"]))
                break
    return {
        stack: [sources[number] for number in sorted(sources)]
        for stack, sources in found.items()
        if set(sources) == set(range(len(sources)))
    }
