"""Tells weight matrices, and which way round they are stored, from names, shapes and config alone.

A weight matrix is what a linear multiplies its inputs by. Embeddings and the output head are tables of the vocabulary's
size: no method of matrices treats them, since an SVD of 128,000 x 4,096 would take longer than all else together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from largemerge.checkpoint.index import Checkpoint

LAYER = re.compile(r"^(?P<stack>[^\d]*?[^\d.]+)\.(?P<number>\d+)\.(?P<rest>.+)$")
"""Matches the name of a layer's tensor: `stack`, the layer's `number` in it, and the `rest`."""

_TABLES = re.compile(r"embed|(^|\.)(wte|wpe|lm_head|relative_attention_bias)\.")
_EXCLUDED = "text_projection"  # CLIP's, which the authors of TSV-M, Iso-C and ACE leave out
_VOCABULARY_KEYS = ("vocab_size", "n_vocab")


def vocabulary_sizes(checkpoint: Checkpoint) -> frozenset[int]:
    """Collects the vocabulary sizes of the model and its parts from its config."""
    parts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, Mapping))]
    sizes = (part.get(key) for part in parts for key in _VOCABULARY_KEYS)
    return frozenset(size for size in sizes if isinstance(size, int))


def why_not_a_matrix(name: str, shape: Sequence[int], vocabulary: frozenset[int] = frozenset()) -> str:
    """Says why a tensor is not taken for a linear's weight; empty if it is."""
    if len(shape) != 2:
        return {0: "a number", 1: "a vector"}.get(len(shape), f"{len(shape)} dimensions")
    if name and not name.endswith("weight"):
        return "no weight"
    if _TABLES.search(name):
        return "an embedding or output head"
    if LAYER.match(name) is None and vocabulary & set(shape):
        return "as large as the vocabulary"
    return "a projection that the papers leave out" if _EXCLUDED in name else ""


def too_small(shape: Sequence[int], num_models: int) -> str:
    """Says why a matrix has no room for a direction of every model; empty if it has."""
    return "fewer rows or columns than models" if min(shape) < num_models else ""


def stored_inputs_first(checkpoint: Checkpoint) -> frozenset[str]:
    """Finds the matrices that are stored `[inputs, outputs]` (GPT-2's `Conv1D`): their bias is as long as a row.

    A square matrix's bias says nothing; it lies as all other matrices with a bias in its stack of layers do.
    Without a bias a matrix counts as `[outputs, inputs]`, as `torch.nn.Linear` has it.
    """
    by_stack: dict[str, dict[str, bool | None]] = {}
    for name, info in checkpoint.tensors.items():
        bias = checkpoint.tensors.get(name.removesuffix("weight") + "bias")
        if not name.endswith("weight") or len(info.shape) != 2 or bias is None or len(bias.shape) != 1:
            continue
        rows, columns = info.shape
        match = LAYER.match(name)
        by_bias = None if rows == columns else bias.shape[0] == columns
        by_stack.setdefault(match["stack"] if match else "", {})[name] = by_bias
    found: set[str] = set()
    for names in by_stack.values():
        by_biases = {by_bias for by_bias in names.values() if by_bias is not None}
        found |= {name for name, by_bias in names.items() if by_bias or (by_bias is None and by_biases == {True})}
    return frozenset(found)
