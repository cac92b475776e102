"""Averages of the tensors outside the blocks, straight from disk to disk, a few rows at a time.

    Σ c_i W_i / Σ c_i  =  W_1 + Σ_i (c_i / Σ c) (W_i - W_1)

The second form gives identical candidates back as they are. An embedding of gigabytes passes through
buffers of some megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from largemerge.checkpoint.reader import CheckpointReader
from largemerge.checkpoint.writer import ShardWriter
from largemerge.inputs import Inputs
from largemerge.model.names import NameMap
from largemerge.treatment import TensorPlan, Treatment

CHUNK_BYTES = 32 << 20


def merge_outside(
    plans: Sequence[TensorPlan],
    inputs: Inputs,
    weights: Sequence[float],
    readers: Sequence[CheckpointReader],
    base_reader: CheckpointReader | None,
    writer: ShardWriter,
    step: Callable[[str], None],
) -> None:
    """Writes every tensor of no block: averaged, copied, or taken from the base.

    Args:
        plans: One for each tensor.
        inputs: The opened checkpoints.
        weights: c_i / Σ c.
        readers: Of the candidates.
        base_reader: Of the base, if there is one.
        writer: Of the output.
        step: Called with a tensor's name when it is written.
    """
    for plan in plans:
        unknown = plan.name in inputs.reference_names.unmapped
        sources: list[tuple[CheckpointReader, NameMap]]
        if plan.treatment is Treatment.BASE:
            assert base_reader is not None and inputs.base_names is not None
            sources = [(base_reader, inputs.base_names)]
        else:
            sources = list(zip(readers, inputs.candidate_names, strict=True))
        if unknown:
            _merge_unknown(plan, inputs, weights, sources, writer)
        else:
            _merge_known(plan, inputs, weights, sources, writer)
        step(plan.name)


def _merge_unknown(
    plan: TensorPlan,
    inputs: Inputs,
    weights: Sequence[float],
    sources: Sequence[tuple[CheckpointReader, NameMap]],
    writer: ShardWriter,
) -> None:
    """A tensor that the model class has no use for: found by its name on disk."""
    holders = [reader for reader, _ in sources if plan.name in reader.checkpoint.tensors]
    if plan.treatment is Treatment.AVERAGED:
        _stream([(reader, plan.name) for reader in holders], weights, plan.dtype, plan.name, writer)
        return
    with CheckpointReader(inputs.reference) as reference:
        writer.write(plan.name, (holders[0] if holders else reference).read(plan.name).to(plan.dtype))


def _merge_known(
    plan: TensorPlan,
    inputs: Inputs,
    weights: Sequence[float],
    sources: Sequence[tuple[CheckpointReader, NameMap]],
    writer: ShardWriter,
) -> None:
    out_names = inputs.reference_names
    names = [name_map.on_disk(plan.name) for _, name_map in sources]
    plain = all(name in name_map.renamed for name, (_, name_map) in zip(names, sources, strict=True))
    out_name = out_names.on_disk(plan.name)
    if plan.treatment is not Treatment.AVERAGED:
        sources, names = sources[:1], names[:1]
    if plain and out_name in out_names.renamed:
        keys = [name_map.renamed[name] for name, (_, name_map) in zip(names, sources, strict=True)]
        readers = [(reader, key) for key, (reader, _) in zip(keys, sources, strict=True)]
        _stream(readers, weights, plan.dtype, out_names.renamed[out_name], writer)
        return
    model = inputs.skeleton.model
    loaded = [
        name_map.load(model, [name], reader.read)[name]
        for name, (reader, name_map) in zip(names, sources, strict=True)
    ]
    merged = weighted_average(loaded, weights, plan.dtype)
    for key, tensor in out_names.store(model, {out_name: merged}).items():
        writer.write(key, tensor)


def _stream(
    sources: Sequence[tuple[CheckpointReader, str]],
    weights: Sequence[float],
    dtype: torch.dtype,
    out_key: str,
    writer: ShardWriter,
) -> None:
    reader, key = sources[0]
    info = reader.checkpoint.tensors[key]
    if len(info.shape) < 2 or info.num_bytes <= CHUNK_BYTES:
        writer.write(out_key, weighted_average([source.read(name) for source, name in sources], weights, dtype))
        return
    num_rows = info.shape[0]
    step = max(1, CHUNK_BYTES * num_rows // info.num_bytes)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        chunk = weighted_average([source.read(name, rows) for source, name in sources], weights, dtype)
        writer.write(out_key, chunk, first_row=start)


def weighted_average(tensors: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Σ c_i W_i / Σ c_i in float32, given c_i / Σ c; one tensor comes back as it is."""
    if len(tensors) == 1 or not tensors[0].is_floating_point():
        return tensors[0].to(dtype)
    anchor = tensors[0].to(torch.float32)
    total = torch.zeros_like(anchor)
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.to(torch.float32).sub_(anchor), alpha=weight)
    return total.add_(anchor).to(dtype)
