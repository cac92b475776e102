"""Weighted averages of all tensors that are not solved.

    Σ c_i W_i / Σ c_i  =  W_1 + Σ_i (c_i / Σ c) (W_i - W_1)

The second form gives identical candidates back as they are.

    outside the blocks   disk → some rows of all candidates → average → disk      merge_non_block
    in a block           one candidate's block after another → float32 sums       RunningAverages

Outside the blocks an embedding of gigabytes passes through buffers of some megabytes. In a block the candidates'
tensors are read for their forward passes anyway, so the averages are made along the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from largemerge.checkpoint.reader import TensorReader
from largemerge.heads import initial_tensors
from largemerge.regression.gram import GRAM_DTYPE
from largemerge.regression.tensor_plan import MergeRule, TensorPlan
from largemerge.regression.tokens import Tokens, token_reader
from largemerge.regression.weights import Weights

AVERAGE_CHUNK_BYTES = 8 << 20
"""Bytes of a stored tensor that are averaged at once; a few times as much is held in float32."""


def merge_non_block(
    plans: Sequence[TensorPlan],
    weights: Weights,
    shares: Sequence[float],
    step: Callable[[str], None],
    others: Mapping[str, Callable[[TensorPlan], None]] = MappingProxyType({}),
) -> None:
    """Writes every tensor of no block: averaged, copied, taken from the base or from one candidate.

    Called on rank 0 alone.

    Args:
        plans: Plans of the tensors.
        weights: Reads candidates and base, writes the output.
        shares: c_i / Σ c, by candidate.
        step: Called with a tensor's name when it is written.
        others: Name of a tensor that is made in another way → what writes it.
    """
    for plan in plans:
        if plan.name in others:
            others[plan.name](plan)
        elif plan.name in weights.inputs.reference_mapping.unmapped:
            _merge_unmapped(plan, weights, shares)
        else:
            _merge_mapped(plan, weights, shares)
        step(plan.name)


def _merge_unmapped(plan: TensorPlan, weights: Weights, shares: Sequence[float]) -> None:
    """Writes a tensor that the model class has no use for, found by its name on disk."""
    if plan.rule is MergeRule.AVERAGED:
        _average_rows([(reader, plan.name) for reader in weights.readers], shares, plan, plan.name, weights)
        return
    reference = weights.inputs.reference
    reader = next(reader for reader in weights.all_readers if reader.checkpoint is reference)
    weights.own_writer.write(plan.name, reader.read(plan.name).to(plan.dtype))


def _merge_mapped(plan: TensorPlan, weights: Weights, shares: Sequence[float]) -> None:
    """Writes a parameter of the module: row by row where it is one tensor everywhere, else as a whole."""
    inputs = weights.inputs
    if plan.rule is MergeRule.NEW:
        made = initial_tensors(inputs.skeleton.model, [plan.name])
        weights.store({name: tensor.to(plan.dtype) for name, tensor in made.items()})
        return
    sources = list(zip(weights.readers, inputs.candidate_mappings, strict=True))
    numbers: Sequence[int] = range(len(sources))
    if plan.sources is not None:
        numbers, sources = plan.sources, [sources[number] for number in plan.sources]
        total = sum(shares[number] for number in numbers)
        shares = [shares[number] / total for number in numbers]
    if plan.rule is MergeRule.BASE:
        assert weights.base_reader is not None and inputs.base_mapping is not None
        sources = [(weights.base_reader, inputs.base_mapping)]
    elif plan.rule is MergeRule.COPIED:
        sources = sources[:1]
    out = inputs.reference_mapping
    if inputs.tokens is not None and plan.name in inputs.tokens.parameters:
        _average_tokens(plan, list(numbers), shares, weights, inputs.tokens)
        return
    plain = all(names.canonical(plan.name) in names.renamed for names in (out, *(names for _, names in sources)))
    if plain:
        keyed = [(reader, names.renamed[names.canonical(plan.name)]) for reader, names in sources]
        _average_rows(keyed, shares, plan, out.renamed[out.canonical(plan.name)], weights)
    elif plan.rule is MergeRule.BASE:
        weights.store({plan.name: weights.read_base([plan.name])[plan.name].to(plan.dtype)})
    else:
        loaded = [weights.read_candidate(index, [plan.name])[plan.name] for index in list(numbers)[: len(sources)]]
        weights.store({plan.name: weighted_average(loaded, shares, plan.dtype)})


@dataclass(frozen=True)
class RowsOfModels:
    """Rows of one tensor of all candidates, and of the base if it is wanted, on the way from disk to disk.

    Attributes:
        num_rows: Number of rows of the output.
        by_rows: Whether some rows can be read and written for themselves.
        read: Reads the rows of a slice, of one model after the other.
        write: Writes merged rows.
    """

    num_rows: int
    by_rows: bool
    read: Callable[[slice], list[torch.Tensor]]
    write: Callable[[torch.Tensor, slice], None]

    def panels(self, rows_at_once: int) -> Iterator[slice]:
        """Yields panels of at most so many rows; one of all where they are read and written as a whole only."""
        step = max(1, rows_at_once) if self.by_rows else self.num_rows
        for start in range(0, self.num_rows, step):
            yield slice(start, min(start + step, self.num_rows))


def rows_of_models(name: str, dtype: torch.dtype, weights: Weights, *, with_base: bool) -> RowsOfModels:
    """Prepares to merge a matrix outside the blocks row by row; called on rank 0 alone.

    Args:
        name: Parameter name of the matrix; all candidates have it.
        dtype: Dtype in which it is written.
        weights: Reads candidates and base, writes the output.
        with_base: Whether the base's rows come after those of the candidates.
    """
    inputs, writer = weights.inputs, weights.own_writer
    out = inputs.reference_mapping
    key = out.renamed.get(out.canonical(name))
    mappings = [*inputs.candidate_mappings, *([inputs.base_mapping] if with_base and inputs.base_mapping else [])]
    readers = [*weights.readers, *([weights.base_reader] if with_base and weights.base_reader is not None else [])]
    num_rows = inputs.skeleton.model.get_parameter(name).shape[0]
    keys = [mapping.renamed.get(mapping.canonical(name)) for mapping in mappings]
    if inputs.tokens is not None and name in inputs.tokens.parameters and key is not None:
        by_model = inputs.token_keys(name)
        tokens = token_reader(
            inputs.tokens, list(by_model), by_model, {r.checkpoint.name: r for r in weights.all_readers}
        )
        places = [list(by_model).index(reader.checkpoint.name) for reader in readers]

        def read_tokens(rows: slice) -> list[torch.Tensor]:
            found = list(tokens.read(rows))
            return [found[place] for place in places]

        return RowsOfModels(
            num_rows, True, read_tokens, lambda tensor, rows: writer.write(key, tensor, first_row=rows.start)
        )
    plain = key is not None and all(keys)
    infos = [reader.checkpoint.tensors[own] for reader, own in zip(readers, keys, strict=True) if own] if plain else []
    if (
        plain
        and key is not None
        and not any([weights.output[key].quantization, *(info.quantization for info in infos)])
    ):
        return RowsOfModels(
            num_rows,
            True,
            lambda rows: [reader.read(own, rows) for reader, own in zip(readers, keys, strict=True) if own],
            lambda tensor, rows: writer.write(key, tensor, first_row=rows.start),
        )

    def read_whole(_: slice) -> list[torch.Tensor]:
        whole = [weights.read_candidate(index, [name])[name] for index in range(len(weights.readers))]
        return whole + ([weights.read_base([name])[name]] if with_base else [])

    return RowsOfModels(num_rows, False, read_whole, lambda tensor, _: weights.store({name: tensor.to(dtype)}))


def _average_tokens(
    plan: TensorPlan, numbers: Sequence[int], shares: Sequence[float], weights: Weights, tokens: Tokens
) -> None:
    """Averages a tensor with a row for every token, rows in the order of the output's tokens."""
    inputs, name = weights.inputs, plan.name
    keys = inputs.token_keys(name)
    models = list(keys)
    readers = {reader.checkpoint.name: reader for reader in weights.all_readers}
    reader = token_reader(tokens, models, keys, readers)
    wanted = ["base"] if plan.rule is MergeRule.BASE else [inputs.names[number] for number in numbers]
    places = [models.index(model) for model in wanted]
    out_key = inputs.reference_mapping.renamed[inputs.reference_mapping.canonical(name)]
    layout = weights.output[out_key]
    step = max(1, AVERAGE_CHUNK_BYTES * layout.shape[0] // max(1, layout.num_bytes))
    for start in range(0, layout.shape[0], step):
        rows = reader.read(slice(start, min(start + step, layout.shape[0])))
        merged = weighted_average((rows[place] for place in places), shares, plan.dtype)
        weights.own_writer.write(out_key, merged, first_row=start)


def _average_rows(
    sources: Sequence[tuple[TensorReader, str]],
    shares: Sequence[float],
    plan: TensorPlan,
    out_key: str,
    weights: Weights,
) -> None:
    """Averages one tensor from disk to disk, some rows at a time; `sources` are readers and names on disk."""
    reader, key = sources[0]
    info = reader.checkpoint.tensors[key]
    stored = [source.checkpoint.tensors[name].quantization for source, name in sources]
    quantized = any([*stored, weights.output[out_key].quantization])  # these go as a whole only
    num_rows = info.shape[0] if len(info.shape) > 1 else 1
    step = max(1, AVERAGE_CHUNK_BYTES * num_rows // max(1, info.num_bytes))
    if step >= num_rows or quantized:
        whole = (source.read(name) for source, name in sources)
        weights.own_writer.write(out_key, weighted_average(whole, shares, plan.dtype))
        return
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        chunks = (source.read(name, rows) for source, name in sources)
        weights.own_writer.write(out_key, weighted_average(chunks, shares, plan.dtype), first_row=start)


def weighted_average(tensors: Iterable[torch.Tensor], shares: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Averages tensors in float32 by their c_i / Σ c, taking them one by one; a single one comes back as it is."""
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


@dataclass
class RunningScales:
    """Averages of the scales of norms, weighted element by element by the squares of what they multiply.

        minimise over t   Σ_i α_i ‖ x̂_i ∘ t − x̂_i ∘ w_i ‖²        α_i = c_i / (Σ c · N_i)

        t_j  =  w_1j + Σ_i α_i s_ij (w_ij − w_1j) / Σ_i α_i s_ij        s_ij = Σ_n x̂_inj²

    x̂_i are the normalised inputs on candidate i's data (LOT Merging, arXiv 2505.23859). The sums are linear in the
    rows, so that ranks add up their parts. An element that no data has anything to say of, s = 0, is averaged.

    Attributes:
        names: Parameter names of the scales.
    """

    names: tuple[str, ...]
    _squares: dict[str, torch.Tensor] = field(default_factory=dict)
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)
    _moved: dict[str, torch.Tensor] = field(default_factory=dict)
    _anchors: dict[str, torch.Tensor] = field(default_factory=dict)

    def start(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Begins with the first candidate's scales, which all ranks have."""
        for name in self.names:
            self._anchors[name] = tensors[name].to(torch.float64)
            for sums in (self._squares, self._weights, self._moved):
                sums[name] = torch.zeros_like(self._anchors[name])

    def add_rows(self, name: str, normalized_NI: torch.Tensor) -> None:
        """Adds normalised inputs x̂ of the present candidate, one row per token."""
        self._squares[name].add_(normalized_NI.square().sum(0, dtype=torch.float64))

    def finish_candidate(self, tensors: Mapping[str, torch.Tensor], alphas: Mapping[str, float]) -> None:
        """Adds the present candidate to the sums.

        Args:
            tensors: The candidate's scales.
            alphas: Name of a scale → α_i, with the number of rows of all ranks.

        Raises:
            FloatingPointError: If what was read is not finite.
        """
        for name, squares_I in self._squares.items():
            if not torch.isfinite(squares_I).all():
                raise FloatingPointError(f"what {name} multiplies is not finite")
            self._weights[name].add_(squares_I, alpha=alphas[name])
            self._moved[name].add_(squares_I * (tensors[name] - self._anchors[name]), alpha=alphas[name])
            squares_I.zero_()

    def views(self) -> list[torch.Tensor]:
        """The sums over candidates, which ranks add up."""
        return [*self._weights.values(), *self._moved.values()]

    def finish(self, averages: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the scales by parameter name, in the dtypes of their plain `averages`."""
        found = {}
        for name in self.names:
            weights_I = self._weights[name]
            seen_I = weights_I > 0
            moved_I = self._anchors[name] + self._moved[name] / torch.where(seen_I, weights_I, 1.0)
            found[name] = torch.where(seen_I, moved_I.to(averages[name].dtype), averages[name])
        return found


class RunningAverages:
    """Averages of a block's tensors, to which candidates are added one after another; one float32 sum per tensor.

    Args:
        plans: Tensors of a block; those that are neither averaged nor copied are passed over.
        shares: c_i / Σ c, by candidate.
    """

    def __init__(self, plans: Sequence[TensorPlan], shares: Sequence[float]) -> None:
        self._plans = [plan for plan in plans if plan.rule in (MergeRule.AVERAGED, MergeRule.COPIED)]
        self._shares = shares
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
                self._sums[plan.name].add_(difference, alpha=self._shares[index])

    def views(self) -> list[torch.Tensor]:
        """The sums over candidates, which ranks add up."""
        return list(self._sums.values())

    def finish(self) -> dict[str, torch.Tensor]:
        """Returns the averages, and the copies, in the dtypes of the output, by parameter name."""
        return {
            plan.name: (
                self._sums[plan.name].add_(self._anchors[plan.name])
                if plan.rule is MergeRule.AVERAGED
                else self._anchors[plan.name]
            ).to(plan.dtype)
            for plan in self._plans
        }
