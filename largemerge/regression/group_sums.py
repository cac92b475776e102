"""Norms of differences between matrices that are never in memory together.

When the merged weight is known, the candidates' are gone. What is kept of each is a random projection from both
sides, some kilobytes whatever the size; the norm of a difference of projections estimates the norm of the difference:

    ‖M‖²  ≈  ‖L M S‖² / S      S: random signs `[I, S]`; L: rows with random signs, summed into buckets

The relative error of a norm is about 1/√(2S), 12 %.

Shapes: O rows of all linears of a group, I columns, S columns of a sketch, B buckets of all linears.

What is accumulated for one block: two sums per Gram matrix, whatever the number of candidates.

    G = Σ_i G̃_i          G̃_i = α_i · ( s·XᵢᵀXᵢ + (1-s)·diag(XᵢᵀXᵢ) )          α_i = c_i / (Σ c · tokens_i)
    R = Σ_i E_i G̃_i      E_i = W_i - A,  A = W of the first candidate

The first candidate is the anchor A, so its term of R is zero and costs nothing. Linears that read the same
tensor share G; their R lie below one another. Everything is linear in the tokens.

E_i G̃_i is computed the cheaper way: `E G` once for a candidate (2·I²·O operations), or, where it has fewer tokens
than half the inputs, `(E Xᵀ) X` with every batch (4·N·I·O). Ranks that have parts of one candidate may add up its Gram
first, and compute some rows of `E G` each.

Shapes: N tokens, I inputs, O outputs of all linears of a group, B and S rows and columns of a sketch.

From sums to weights: the differences that go in, the merged weight and its report that come out.

Weights are taken a few rows at a time: a linear of gigabytes in float32 is never held.

Shapes: I inputs, O outputs of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from largemerge.matmul import add_product_, product
from largemerge.regression.gram import GRAM_DTYPE, PANEL, Gram, Scratch
from largemerge.regression.solve import Solution, may_need_float64, solve_anchored_
from largemerge.regression.tensor_plan import LinearGroup, LinearPlan

_COLUMNS = 32
_BUCKETS = 64


class Sketcher:
    """Projects the weights of the linears of a group.

    Args:
        outputs: Rows of each linear; they lie below one another.
        num_inputs: I.
        device: Where the weights are.
    """

    def __init__(self, outputs: Sequence[int], num_inputs: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(num_inputs)
        self._right_IS = _signs((num_inputs, _COLUMNS), generator).to(device)
        self._left_O = _signs((sum(outputs),), generator).to(device)
        own = [torch.arange(rows) % _BUCKETS + number * _BUCKETS for number, rows in enumerate(outputs)]
        self._bucket_O = torch.cat(own).to(device)
        self._num_buckets = _BUCKETS * len(outputs)

    def empty(self) -> torch.Tensor:
        """The sketch of zeros `[B, S]`."""
        return torch.zeros(self._num_buckets, _COLUMNS, device=self._right_IS.device)

    def add_(self, sketch_BS: torch.Tensor, rows: slice, part_OI: torch.Tensor) -> None:
        """Adds some rows of a matrix to its sketch."""
        part_OS = (part_OI @ self._right_IS).mul_(self._left_O[rows, None])
        sketch_BS.index_add_(0, self._bucket_O[rows], part_OS)

    def norm(self, sketch_BS: torch.Tensor, linear: int) -> float:
        """Estimated norm of the part of a matrix that belongs to linear number `linear`."""
        own_BS = sketch_BS[linear * _BUCKETS : (linear + 1) * _BUCKETS]
        return float(own_BS.norm()) / math.sqrt(_COLUMNS)


def sketch_bytes(num_linears: int) -> int:
    """Of one candidate's sketch of a group of linears."""
    return 4 * _BUCKETS * _COLUMNS * num_linears


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1


CHUNK_BYTES = 48 << 20
"""Of differences of weights that are in memory in float32 at once."""

Differences = Callable[[slice], torch.Tensor]
"""Some rows `[O, I]` of E_i, float32, of all linears of a group below one another; may be overwritten."""


@dataclass(frozen=True)
class Part:
    """What this rank counts of a candidate.

    Attributes:
        own_tokens: How many of its rows come here.
        is_primary: Whether this rank counts what does not depend on the rows.
        place: Number of this rank among those that add up the candidate's Gram and share its right-hand side.
        group_size: How many these are.
    """

    own_tokens: int
    is_primary: bool = True
    place: int = 0
    group_size: int = 1


@dataclass
class GroupSums:
    """Sums of the linears that read one tensor.

    Attributes:
        outputs: Linear → its number of outputs, in the order of the rows of R.
        gram: G, and the present candidate's XᵀX.
        rhs_OI: R; after `solve` the update X.
        mean_OI: Σ c_i E_i / Σ c_i, in the dtype of the output: it matters only where the data says nothing.
        off_diagonal_scale: s.
        tokens: By candidate.
    """

    outputs: Mapping[str, int]
    gram: Gram
    rhs_OI: torch.Tensor
    mean_OI: torch.Tensor
    sketcher: Sketcher
    off_diagonal_scale: float
    sketches_BS: list[torch.Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    _share: float = 0.0
    _differences: Differences | None = None
    _by_rows: bool = False
    _part: Part = field(default_factory=lambda: Part(0))

    def start_candidate(
        self,
        share: float,
        tokens: int,
        differences: Differences | None,
        part: Part | None = None,
    ) -> None:
        """Begins the sums of the next candidate.

        Args:
            share: c_i / Σ c.
            tokens: How many rows it has, on all ranks together.
            differences: E_i; `None` for the anchor.
            part: What of it this rank counts; everything where not given.
        """
        self.tokens.append(tokens)
        self._part = part if part is not None else Part(tokens)
        self._share = share
        self._differences = differences
        rows = tokens if self._part.group_size > 1 else self._part.own_tokens
        self._by_rows = differences is not None and multiplies_by_rows(rows, self.gram.num_inputs)

    @property
    def shares_gram(self) -> bool:
        """Whether the present candidate's Gram must be that of all of its team before `finish_candidate`."""
        return self._part.group_size > 1 and self._differences is not None and not self._by_rows

    def skip_candidate(self, tokens: int) -> None:
        """The next candidate's rows are all on other ranks."""
        self.tokens.append(tokens)
        self.sketches_BS.append(self.sketcher.empty())

    def views(self) -> list[torch.Tensor]:
        """All that is added up over candidates, after the last one."""
        sketches_KBS = torch.stack(self.sketches_BS)
        self.sketches_BS = list(sketches_KBS)
        return [*self.gram.sum_views(), self.rhs_OI, sketches_KBS, self.mean_OI]

    def add_rows(self, x_NI: torch.Tensor) -> None:
        """Adds inputs of the present candidate, one row per token."""
        self.gram.add_rows(x_NI)
        if not self._by_rows or self._differences is None:
            return
        x_NI = x_NI.to(GRAM_DTYPE)
        scale = self._share / self.tokens[-1] * self.off_diagonal_scale
        for rows in self._chunks():
            add_product_(self.rhs_OI[rows], product(self._differences(rows), x_NI), x_NI.T, alpha=scale)

    def finish_candidate(self) -> None:
        """Adds what the present candidate has contributed.

        Raises:
            FloatingPointError: If the candidate's Gram matrix is not finite.
        """
        diagonal_I = self.gram.candidate_diagonal()
        if not torch.isfinite(diagonal_I).all():
            raise FloatingPointError("activations are not finite")
        alpha = self._share / self.tokens[-1]
        sketch_BS = self.sketcher.empty()
        for rows in self._chunks(self._own_rows()) if self._differences is not None else ():
            assert self._differences is not None
            difference_OI = self._differences(rows)
            if self._by_rows:
                self.rhs_OI[rows].addcmul_(difference_OI, diagonal_I, value=alpha * (1 - self.off_diagonal_scale))
            else:
                self.gram.add_candidate_product_(self.rhs_OI[rows], difference_OI, alpha, self.off_diagonal_scale)
            if self._part.is_primary or self.shares_gram:
                self.sketcher.add_(sketch_BS, rows, difference_OI)
                self.mean_OI[rows].add_(difference_OI, alpha=self._share)
        self.sketches_BS.append(sketch_BS)
        if self.shares_gram and self._part.place > 0:
            self.gram.drop_candidate()
        else:
            self.gram.finish_candidate(alpha, self.off_diagonal_scale)
        self._differences = None

    def _own_rows(self) -> slice:
        """Of the present candidate's right-hand side."""
        total = self.rhs_OI.shape[0]
        if not self.shares_gram:
            return slice(0, total)
        place, size = self._part.place, self._part.group_size
        return slice(total * place // size, total * (place + 1) // size)

    def solve(self, ridge: float) -> Solution:
        """X for all linears of the group at once, in the place of R."""
        max_rank = sum(self.tokens) if self.off_diagonal_scale == 1 else None
        return solve_anchored_(
            self.gram,
            self.rhs_OI,
            self.mean_OI,
            ridge,
            max_rank,
            surely_well_conditioned=not may_need_float64(self.gram.num_inputs, self.off_diagonal_scale),
        )

    def distances(self, linear: str) -> tuple[list[float], float]:
        """‖W* - W_i‖ for every candidate, estimated, and ‖W* - W̄‖, exact, for one linear, after `solve`."""
        number, rows = list(self.outputs).index(linear), self.rows_of(linear)
        update_BS = self.sketcher.empty()
        squares = 0.0
        for chunk in self._chunks(rows):
            self.sketcher.add_(update_BS, chunk, self.rhs_OI[chunk])
            squares += (self.rhs_OI[chunk] - self.mean_OI[chunk]).square().sum().item()
        estimates = [self.sketcher.norm(update_BS - sketch_BS, number) for sketch_BS in self.sketches_BS]
        return estimates, math.sqrt(squares)

    def rows_of(self, linear: str) -> slice:
        """Rows of R that belong to one linear."""
        start = 0
        for name, outputs in self.outputs.items():
            if name == linear:
                return slice(start, start + outputs)
            start += outputs
        raise KeyError(linear)

    def _chunks(self, within: slice | None = None) -> Iterator[slice]:
        return row_chunks(within or slice(0, self.rhs_OI.shape[0]), self.gram.num_inputs)


def row_chunks(rows: slice, num_columns: int) -> Iterator[slice]:
    """Cuts rows into pieces of at most `CHUNK_BYTES` in float32."""
    step = max(1, CHUNK_BYTES // (GRAM_DTYPE.itemsize * num_columns))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def multiplies_by_rows(tokens: int, num_inputs: int) -> bool:
    """Whether `(E Xᵀ) X` is cheaper than `E G`."""
    return 2 * tokens < num_inputs


def new_sums(
    outputs: Mapping[str, int],
    num_inputs: int,
    off_diagonal_scale: float,
    mean_dtype: torch.dtype,
    device: torch.device,
    scratch: Scratch,
) -> GroupSums:
    """Empty sums for the linears that read one tensor of `num_inputs` features; `scratch` is shared by all groups."""
    total = sum(outputs.values())
    return GroupSums(
        outputs=dict(outputs),
        gram=Gram(num_inputs, device, scratch),
        rhs_OI=torch.zeros(total, num_inputs, dtype=GRAM_DTYPE, device=device),
        mean_OI=torch.zeros(total, num_inputs, dtype=mean_dtype, device=device),
        sketcher=Sketcher(list(outputs.values()), num_inputs, device),
        off_diagonal_scale=off_diagonal_scale,
    )


def sums_bytes(outputs: Sequence[int], num_inputs: int, mean_dtype: torch.dtype) -> int:
    """Bytes that `new_sums` holds, but for the sketches."""
    rhs = sum(outputs) * num_inputs
    gram = num_inputs**2 + num_inputs * min(PANEL, num_inputs)
    return GRAM_DTYPE.itemsize * (gram + rhs) + mean_dtype.itemsize * rhs


def differences(
    group: LinearGroup, tensors: Mapping[str, torch.Tensor], anchor: Mapping[str, torch.Tensor]
) -> Differences:
    """E = W - A of all linears of a group, below one another, any rows of it when they are asked for."""
    weights = []
    start = 0
    for linear in group.linears:
        weight_OI, anchor_OI = _oriented(tensors[linear.name], group), _oriented(anchor[linear.name], group)
        weights.append((start, start + linear.num_outputs, weight_OI, anchor_OI))
        start += linear.num_outputs

    def rows(wanted: slice) -> torch.Tensor:
        parts = []
        for first, last, weight_OI, anchor_OI in weights:
            own = slice(max(wanted.start, first) - first, min(wanted.stop, last) - first)
            if own.start < own.stop:
                parts.append(weight_OI[own].to(GRAM_DTYPE, copy=True).sub_(anchor_OI[own]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return rows


def weight_from_sums(
    group: LinearGroup,
    linear: LinearPlan,
    anchor: torch.Tensor,
    sums: GroupSums,
    solution: Solution,
    names: Sequence[str],
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The merged weight A + X in the module's layout, and what the report says of it.

    Args:
        group: Of the linear.
        linear: The linear, one of the group's.
        anchor: A, in the module's layout.
        sums: Of the group, solved.
        solution: How.
        names: Of the candidates.
    """
    rows = sums.rows_of(linear.path)
    anchor_OI = _oriented(anchor, group)
    weight_OI = torch.empty(anchor_OI.shape, dtype=linear.dtype, device=anchor.device)
    squares = 0.0
    for chunk in row_chunks(rows, group.num_inputs):
        own = slice(chunk.start - rows.start, chunk.stop - rows.start)
        exact_OI = sums.rhs_OI[chunk] + anchor_OI[own]
        squares += exact_OI.square().sum().item()
        weight_OI[own] = exact_OI.to(linear.dtype)
    norm = squares**0.5 or 1.0
    to_candidates, to_average = sums.distances(linear.path)
    report = {
        "shape": list(weight_OI.shape),
        "shares_gram_with": group.leader,
        "tokens": dict(zip(names, sums.tokens, strict=True)),
        "solver": solution.solver,
        "condition": solution.condition,
        "residual": solution.residual,
        "fallbacks": list(solution.fallbacks),
        "num_dead_features": solution.num_dead_features,
        "relative_distance_to_average": to_average / norm,
        "relative_distance_to_candidates": {
            name: distance / norm for name, distance in zip(names, to_candidates, strict=True)
        },
    }
    return _oriented(weight_OI, group).contiguous(), report


def _oriented(weight: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """`[out, in]` from the module's layout, or the other way round."""
    return weight.T if group.transposed else weight
