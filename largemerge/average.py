"""Averages of the tensors outside the blocks, straight from disk to disk, a few rows at a time.

    Σ c_i W_i / Σ c_i  =  W_1 + Σ_i (c_i / Σ c) (W_i - W_1)

The second form gives identical candidates back as they are. An embedding of gigabytes passes through
buffers of some megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from largemerge.checkpoint.reader import CheckpointReader
from largemerge.treatment import TensorPlan, Treatment
from largemerge.weights import Weights

CHUNK_BYTES = 32 << 20


def merge_outside(
    plans: Sequence[TensorPlan], weights: Weights, shares: Sequence[float], step: Callable[[str], None]
) -> None:
    """Writes every tensor of no block: averaged, copied, or taken from the base.

    Args:
        plans: One for each tensor.
        weights: Where they come from and go to.
        shares: c_i / Σ c.
        step: Called with a tensor's name when it is written.
    """
    for plan in plans:
        if plan.name in weights.inputs.reference_names.unmapped:
            _merge_unknown(plan, weights, shares)
        else:
            _merge_known(plan, weights, shares)
        step(plan.name)


def _merge_unknown(plan: TensorPlan, weights: Weights, shares: Sequence[float]) -> None:
    """A tensor that the model class has no use for: found by its name on disk."""
    if plan.treatment is Treatment.AVERAGED:
        _stream([(reader, plan.name) for reader in weights.readers], shares, plan, plan.name, weights)
        return
    reference = weights.inputs.reference
    readers = [*weights.readers, *([weights.base_reader] if weights.base_reader is not None else [])]
    reader = next(reader for reader in readers if reader.checkpoint is reference)
    weights.writer.write(plan.name, reader.read(plan.name).to(plan.dtype))


def _merge_known(plan: TensorPlan, weights: Weights, shares: Sequence[float]) -> None:
    inputs = weights.inputs
    sources = list(zip(weights.readers, inputs.candidate_names, strict=True))
    if plan.treatment is Treatment.BASE:
        assert weights.base_reader is not None and inputs.base_names is not None
        sources = [(weights.base_reader, inputs.base_names)]
    elif plan.treatment is Treatment.COPIED:
        sources = sources[:1]
    out = inputs.reference_names
    plain = all(names.on_disk(plan.name) in names.renamed for names in (out, *(names for _, names in sources)))
    if plain:
        keyed = [(reader, names.renamed[names.on_disk(plan.name)]) for reader, names in sources]
        _stream(keyed, shares, plan, out.renamed[out.on_disk(plan.name)], weights)
    elif plan.treatment is Treatment.BASE:
        weights.store({plan.name: weights.base([plan.name])[plan.name].to(plan.dtype)})
    else:
        loaded = [weights.candidate(index, [plan.name])[plan.name] for index in range(len(sources))]
        weights.store({plan.name: weighted_average(loaded, shares, plan.dtype)})


def _stream(
    sources: Sequence[tuple[CheckpointReader, str]],
    shares: Sequence[float],
    plan: TensorPlan,
    out_key: str,
    weights: Weights,
) -> None:
    reader, key = sources[0]
    info = reader.checkpoint.tensors[key]
    stored = [source.checkpoint.tensors[name].quantization for source, name in sources]
    quantized = any([*stored, weights.writer.tensors[out_key].quantization])  # these go as a whole only
    if len(info.shape) < 2 or info.num_bytes <= CHUNK_BYTES or quantized:
        whole = [source.read(name) for source, name in sources]
        weights.writer.write(out_key, weighted_average(whole, shares, plan.dtype))
        return
    num_rows = info.shape[0]
    step = max(1, CHUNK_BYTES * num_rows // info.num_bytes)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        chunk = weighted_average([source.read(name, rows) for source, name in sources], shares, plan.dtype)
        weights.writer.write(out_key, chunk, first_row=start)


def weighted_average(tensors: Sequence[torch.Tensor], shares: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Σ c_i W_i / Σ c_i in float32, given c_i / Σ c; one tensor comes back as it is."""
    if len(tensors) == 1 or not tensors[0].is_floating_point():
        return tensors[0].to(dtype)
    anchor = tensors[0].to(torch.float32)
    total = torch.zeros_like(anchor)
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total.add_(tensor.to(torch.float32) - anchor, alpha=share)
    return total.add_(anchor).to(dtype)
