"""Averages of the tensors outside the blocks, straight from disk to disk, a few rows at a time.

    Σ c_i W_i / Σ c_i  =  W_1 + Σ_i (c_i / Σ c) (W_i - W_1)

The second form gives identical candidates back as they are. An embedding of gigabytes passes through
buffers of some megabytes.

Running averages of the tensors of a block that are not solved.

    Σ c_i W_i / Σ c_i  =  W_1 + Σ_i (c_i / Σ c) (W_i - W_1)

The second form gives identical candidates back as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from largemerge.checkpoint.reader import TensorReader
from largemerge.regression.gram import GRAM_DTYPE
from largemerge.regression.tensor_plan import MergeRule, TensorPlan
from largemerge.regression.weights import Weights

CHUNK_BYTES = 8 << 20
"""Of a tensor as it is stored; a few times as much is held in float32, whatever the number of candidates."""


def merge_non_block(
    plans: Sequence[TensorPlan], weights: Weights, shares: Sequence[float], step: Callable[[str], None]
) -> None:
    """Writes every tensor of no block: averaged, copied, or taken from the base. Only the first rank does so.

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
    if plan.rule is MergeRule.AVERAGED:
        _stream([(reader, plan.name) for reader in weights.readers], shares, plan, plan.name, weights)
        return
    reference = weights.inputs.reference
    readers = [*weights.readers, *([weights.base_reader] if weights.base_reader is not None else [])]
    reader = next(reader for reader in readers if reader.checkpoint is reference)
    weights.own_writer.write(plan.name, reader.read(plan.name).to(plan.dtype))


def _merge_known(plan: TensorPlan, weights: Weights, shares: Sequence[float]) -> None:
    inputs = weights.inputs
    sources = list(zip(weights.readers, inputs.candidate_names, strict=True))
    if plan.rule is MergeRule.BASE:
        assert weights.base_reader is not None and inputs.base_names is not None
        sources = [(weights.base_reader, inputs.base_names)]
    elif plan.rule is MergeRule.COPIED:
        sources = sources[:1]
    out = inputs.reference_names
    plain = all(names.canonical(plan.name) in names.renamed for names in (out, *(names for _, names in sources)))
    if plain:
        keyed = [(reader, names.renamed[names.canonical(plan.name)]) for reader, names in sources]
        _stream(keyed, shares, plan, out.renamed[out.canonical(plan.name)], weights)
    elif plan.rule is MergeRule.BASE:
        weights.store({plan.name: weights.base([plan.name])[plan.name].to(plan.dtype)})
    else:
        loaded = [weights.candidate(index, [plan.name])[plan.name] for index in range(len(sources))]
        weights.store({plan.name: weighted_average(loaded, shares, plan.dtype)})


def _stream(
    sources: Sequence[tuple[TensorReader, str]],
    shares: Sequence[float],
    plan: TensorPlan,
    out_key: str,
    weights: Weights,
) -> None:
    reader, key = sources[0]
    info = reader.checkpoint.tensors[key]
    stored = [source.checkpoint.tensors[name].quantization for source, name in sources]
    quantized = any([*stored, weights.output[out_key].quantization])  # these go as a whole only
    num_rows = info.shape[0] if len(info.shape) > 1 else 1
    step = max(1, CHUNK_BYTES * num_rows // max(1, info.num_bytes))
    if step >= num_rows or quantized:
        whole = (source.read(name) for source, name in sources)
        weights.own_writer.write(out_key, weighted_average(whole, shares, plan.dtype))
        return
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        chunks = (source.read(name, rows) for source, name in sources)
        weights.own_writer.write(out_key, weighted_average(chunks, shares, plan.dtype), first_row=start)


def weighted_average(tensors: Iterable[torch.Tensor], shares: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Σ c_i W_i / Σ c_i in float32, given c_i / Σ c; one tensor comes back as it is. Tensors are taken one by one."""
    remaining = iter(tensors)
    first = next(remaining)
    if not first.is_floating_point():
        return first.to(dtype)
    anchor = first.to(torch.float32)
    total: torch.Tensor | None = None
    for tensor, share in zip(remaining, shares[1:], strict=False):
        total = torch.zeros_like(anchor) if total is None else total
        total.add_(tensor.to(torch.float32, copy=True).sub_(anchor), alpha=share)
        del tensor
    return first.to(dtype) if total is None else total.add_(anchor).to(dtype)


class RunningAverages:
    """Takes candidates one after another; holds one float32 sum per tensor.

    Args:
        plans: Tensors of a block; those that are neither averaged nor copied are passed over.
        weights: c_i / Σ c.
    """

    def __init__(self, plans: Sequence[TensorPlan], weights: Sequence[float]) -> None:
        self._plans = [plan for plan in plans if plan.rule in (MergeRule.AVERAGED, MergeRule.COPIED)]
        self._weights = weights
        self._anchors: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Adds candidate `index`; the first one is the anchor."""
        for plan in self._plans:
            tensor = tensors[plan.name]
            if index == 0:
                self._anchors[plan.name] = tensor
                if plan.rule is MergeRule.AVERAGED:
                    self._sums[plan.name] = torch.zeros_like(tensor, dtype=GRAM_DTYPE)
            elif plan.rule is MergeRule.AVERAGED:
                difference = tensor.to(GRAM_DTYPE) - self._anchors[plan.name].to(GRAM_DTYPE)
                self._sums[plan.name].add_(difference, alpha=self._weights[index])

    def views(self) -> list[torch.Tensor]:
        """All that is added up over candidates."""
        return list(self._sums.values())

    def finish(self) -> dict[str, torch.Tensor]:
        """The averages, and the copies, in the dtypes of the output."""
        return {
            plan.name: (
                self._sums[plan.name].add_(self._anchors[plan.name])
                if plan.rule is MergeRule.AVERAGED
                else self._anchors[plan.name]
            ).to(plan.dtype)
            for plan in self._plans
        }
