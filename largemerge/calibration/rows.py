"""Which rows of a stack's hidden states enter the statistics, and how many there are."""

from __future__ import annotations

import torch

from largemerge.calibration.batches import Batch
from largemerge.model.rehearsal import StackRehearsal


def row_mask(batch: Batch, stack: StackRehearsal, loss_tokens: str) -> torch.Tensor | None:
    """The tokens of a batch that count in one stack.

    Args:
        batch: Forward arguments and loss mask.
        stack: Says whose tokens the rows are.
        loss_tokens: The input that the loss mask belongs to, `input_ids` or `decoder_input_ids`.

    Returns:
        bool `[B, T]`; `None` where all count.
    """
    if stack.tokens is None:
        return None
    mask = None
    attention = batch.inputs.get(stack.tokens.replace("input_ids", "attention_mask"))
    if attention is not None and attention.dim() == 2:
        mask = attention != 0
    if batch.loss_mask is not None and stack.tokens == loss_tokens:
        mask = batch.loss_mask if mask is None else mask & batch.loss_mask
    return None if mask is None or bool(mask.all()) else mask


def count_rows(batch: Batch, stack: StackRehearsal, loss_tokens: str) -> int:
    """How many rows of a batch count in one stack."""
    mask = row_mask(batch, stack, loss_tokens)
    if mask is not None:
        return int(mask.sum())
    if stack.tokens is not None:
        return batch.inputs[stack.tokens].numel()
    return next(iter(batch.inputs.values())).shape[0] * stack.num_tokens
