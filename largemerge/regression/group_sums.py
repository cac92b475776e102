"""Gram and right-hand side of the linears that read one tensor: accumulated, solved, made into weights.

    inputs X_i of a candidate ──► Gram ────────────┐
    weights W_i - A ──► differences ──► GroupSums ─┴─► solve ──► weight_from_sums ──► merged weight, report

Two sums are held per group of linears, whatever the number of candidates (RegMean, arXiv 2212.09849):

    G = Σ_i G̃_i          G̃_i = α_i · ( s·XᵢᵀXᵢ + (1-s)·diag(XᵢᵀXᵢ) )          α_i = c_i / (Σ c · N_i)
    R = Σ_i E_i G̃_i      E_i = W_i - A,  A = W of the first candidate

N_i is the number of tokens; or the norm ‖XᵢᵀXᵢ‖_F, known when all of a candidate's rows have been added, so that what
would go to R row by row waits for it in a matrix of its own.

The first candidate is the anchor A, so its term of R is zero and costs nothing. Linears that read the same
tensor share G; their R lie below one another. Everything is linear in the tokens.

Where a linear is held against the candidate's own features (`Features`), with the inputs X'_i that it has in the
candidate itself and the drift D_i of the hidden states, R has one more term, again a small difference in the main:

    R += Σ_i α_i · s · ( β·W_i (X'_i - X_i)ᵀ + γ·D_iᵀ ) X_i

as one product by rows, or by way of (X'_i - X_i)ᵀX_i, whichever is cheaper. If this correction is to be shrunk, it is
summed beside R, and added when the system is factorised and its factor known (`shrinkage.py`).

E_i G̃_i is computed the cheaper way: `E G` once for a candidate (2·I²·O operations), or, where it has fewer tokens
than half the inputs, `(E Xᵀ) X` with every batch (4·N·I·O). Ranks that have parts of one candidate may add up its Gram
first, and compute some rows of `E G` each. Weights are taken a few rows at a time: a linear of gigabytes in float32 is
never held.

The report says how far the merged weight is from every candidate's. When it is known, the candidates' weights are
gone; what is kept of each is a sketch, a random projection from both sides of some kilobytes whatever the size. The
norm of a difference of sketches estimates the norm of the difference, with a relative error of about 1/√(2S), 12 %:

    ‖M‖²  ≈  ‖L M S‖² / S      S: random signs `[I, S]`; L: rows with random signs, summed into buckets

Shapes: N tokens, I inputs, O outputs of all linears of a group, B and S rows (buckets) and columns of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from largemerge.matmul import add_product_, product
from largemerge.regression.gram import GRAM_DTYPE, PANEL, Gram, Scratch
from largemerge.regression.methods import RegressionMethod
from largemerge.regression.shrinkage import FoldSums, Parts, fold_sums_bytes
from largemerge.regression.solve import Complete, Solution, SolveRows, may_need_float64, solve_anchored_
from largemerge.regression.tensor_plan import LinearGroup, LinearPlan

DIFFERENCE_CHUNK_BYTES = 48 << 20
"""Bytes of differences of weights that are in memory in float32 at once."""

PANEL_BYTES = 8 << 20
"""Bytes in float32 of the rows of a head that are solved at once, of each model, at the least."""

STRONG_RIDGE = 1e-3
"""Ridge from which on a system of fewer tokens than inputs is well enough conditioned to be factorised."""

_COLUMNS = 32  # S
_BUCKETS = 64  # for each linear

Differences = Callable[[slice], torch.Tensor]
"""Makes some rows `[O, I]` of E_i, float32, of all linears of a group below one another; they may be overwritten."""


@dataclass(frozen=True)
class RankPart:
    """What this rank counts of a candidate.

    Attributes:
        own_tokens: Number of the candidate's rows on this rank.
        is_primary: Whether this rank counts what does not depend on the rows.
        index: Index of this rank among those that add up the candidate's Gram and compute its right-hand side together.
        group_size: Number of these ranks.
    """

    own_tokens: int
    is_primary: bool = True
    index: int = 0
    group_size: int = 1


@dataclass(frozen=True)
class Features:
    """How a group's linears are held against a candidate's own features.

    Attributes:
        target: β, the weight of the difference of the inputs.
        drift: γ, the weight of the drift of the hidden states.
        weights: Makes rows of W_i.
        by_rows: Whether what is added is computed row by row, and not by way of a matrix of the inputs' size.
    """

    target: float
    drift: float
    weights: Differences
    by_rows: bool


@dataclass
class GroupSums:
    """Sums of the linears that read one tensor.

    Attributes:
        outputs: Linear → its number of outputs, in the order of the rows of R.
        gram: G, and the present candidate's XᵀX.
        rhs_OI: R; after `solve` the update X.
        mean_OI: Σ c_i E_i / Σ c_i, in the dtype of the output: it matters only where the data says nothing.
        sketcher: Makes sketches of the differences E_i.
        off_diagonal_scale: The factor s on a Gram's off-diagonal.
        by_norm: Whether N_i is the norm of a candidate's Gram, and not its number of tokens.
        correction_OI: The part of R that comes from the candidates' own features, if it is kept apart to be shrunk.
        folds: The same of every fold of the data, in a few combinations of the outputs.
        sketches_BS: Sketches of E_i, by candidate.
        tokens: Number of rows of each candidate, on all ranks together.
        shrinkage: Linear → the factor of its correction, once it is solved.
    """

    outputs: Mapping[str, int]
    gram: Gram
    rhs_OI: torch.Tensor
    mean_OI: torch.Tensor
    sketcher: Sketcher
    off_diagonal_scale: float
    by_norm: bool = False
    correction_OI: torch.Tensor | None = None
    folds: FoldSums | None = None
    sketches_BS: list[torch.Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    shrinkage: dict[str, float] = field(default_factory=dict)
    _share: float = 0.0
    _differences: Differences | None = None
    _by_rows: bool = False
    _features: Features | None = None
    _cross_II: torch.Tensor | None = None
    _waiting_OI: torch.Tensor | None = None
    _part: RankPart = field(default_factory=lambda: RankPart(0))

    def start_candidate(
        self,
        share: float,
        tokens: int,
        differences: Differences | None,
        part: RankPart | None = None,
        features: Features | None = None,
        *,
        has_rows: bool = True,
    ) -> None:
        """Begins the sums of the next candidate.

        Args:
            share: c_i / Σ c.
            tokens: Number of the candidate's rows, on all ranks together.
            differences: Makes rows of E_i; `None` for the anchor.
            part: What this rank counts of the candidate; default: everything.
            features: How the linears are held against the candidate's own features; default: not at all.
            has_rows: Whether rows will be added; if not, the Gram is set as a whole.
        """
        self._features = features
        self.tokens.append(tokens)
        self._part = part if part is not None else RankPart(tokens)
        self._share = share
        self._differences = differences
        rows = tokens if self._part.group_size > 1 else self._part.own_tokens
        by_rows = has_rows and not self.by_norm and multiplies_by_rows(rows, self.gram.num_inputs)
        self._by_rows = differences is not None and by_rows
        if features is not None and self.folds is not None:
            self.folds.start_candidate(features.weights, self._chunks_of_linears)

    @property
    def needs_all_reduce(self) -> bool:
        """Whether the present candidate's Gram must be all-reduced in its group of ranks before `finish_candidate`."""
        multiplied = self._differences is not None and not self._by_rows
        return self._part.group_size > 1 and (self.by_norm or multiplied)

    def skip_candidate(self, tokens: int) -> None:
        """Counts the next candidate, whose rows are all on other ranks."""
        self.tokens.append(tokens)
        self.sketches_BS.append(self.sketcher.empty())

    def views(self) -> list[torch.Tensor]:
        """All sums over candidates, after the last one, which ranks add up."""
        sketches_KBS = torch.stack(self.sketches_BS)
        self.sketches_BS = list(sketches_KBS)
        corrections = [] if self.correction_OI is None else [self.correction_OI]
        folds = [] if self.folds is None else self.folds.views()
        return [*self.gram.sum_views(), self.rhs_OI, *corrections, *folds, sketches_KBS, self.mean_OI]

    def add_rows(self, x_NI: torch.Tensor) -> None:
        """Adds inputs of the present candidate, one row per token."""
        self.gram.add_rows(x_NI)
        if not self._by_rows or self._differences is None:
            return
        x_NI = x_NI.to(GRAM_DTYPE)
        scale = self._share / self.tokens[-1] * self.off_diagonal_scale
        for rows in self._chunks():
            add_product_(self.rhs_OI[rows], product(self._differences(rows), x_NI), x_NI.T, alpha=scale)

    def add_features(
        self,
        x_NI: torch.Tensor,
        target_NI: torch.Tensor | None,
        drift_NO: Mapping[str, torch.Tensor],
        parts: Parts | None = None,
    ) -> None:
        """Adds what the candidate's own features ask for beyond the merged inputs.

        Args:
            x_NI: Inputs of the group's linears, as `add_rows` was given them.
            target_NI: The same rows in the candidate itself; `None` where β is 0.
            drift_NO: Path of a linear → drift of the hidden states to which its output is added.
            parts: Folds of the rows, where what is added is shrunk.
        """
        features = self._features
        assert features is not None
        x_NI = x_NI.to(GRAM_DTYPE)
        scale = self._share / self.tokens[-1] * self.off_diagonal_scale
        rhs_OI = self._rhs_of_features_OI
        drift_NO = {path: drift.to(GRAM_DTYPE) * features.drift for path, drift in drift_NO.items()}
        if self.by_norm and (features.by_rows or drift_NO):
            self._waiting_OI = torch.zeros_like(rhs_OI) if self._waiting_OI is None else self._waiting_OI
            rhs_OI, scale = self._waiting_OI, 1.0
        moved_NI = None
        if target_NI is not None:
            moved_NI = target_NI.to(GRAM_DTYPE, copy=True).sub_(x_NI).mul_(features.target)
        if self.folds is not None and parts is not None:
            self.folds.add(x_NI, moved_NI, drift_NO, parts, self._share / self.tokens[-1])
        if moved_NI is not None and not features.by_rows:
            if self._cross_II is None:
                self._cross_II = torch.zeros_like(self.gram.halves_II)
            add_product_(self._cross_II, moved_NI.T, x_NI.T)
            moved_NI = None
        for path in self.outputs:
            own, drift_NO_ = self.rows_of(path), drift_NO.get(path)
            for rows in self._chunks(own) if moved_NI is not None or drift_NO_ is not None else ():
                wanted_ON = None if moved_NI is None else product(features.weights(rows), moved_NI)
                if drift_NO_ is not None:
                    columns = slice(rows.start - own.start, rows.stop - own.start)
                    back_ON = drift_NO_[:, columns].T
                    wanted_ON = back_ON if wanted_ON is None else wanted_ON.add_(back_ON)
                assert wanted_ON is not None
                add_product_(rhs_OI[rows], wanted_ON, x_NI.T, alpha=scale)

    @property
    def _rhs_of_features_OI(self) -> torch.Tensor:
        """Where what the candidates' own features add is summed: apart from R, if it is shrunk."""
        return self.rhs_OI if self.correction_OI is None else self.correction_OI

    def _finish_features(self, alpha: float) -> None:
        """Adds W_i (X'_i - X_i)ᵀX_i of the present candidate, where that was summed over its rows, and what waits."""
        scale = alpha * self.off_diagonal_scale
        rhs_OI = self._rhs_of_features_OI
        if self.folds is not None:
            self.folds.finish_candidate(scale)
        if self._waiting_OI is not None:
            rhs_OI.add_(self._waiting_OI, alpha=scale)
            self._waiting_OI.zero_()
        if self._features is None or self._cross_II is None or self._features.by_rows:
            return
        for rows in self._chunks():
            add_product_(rhs_OI[rows], self._features.weights(rows), self._cross_II.T, alpha=scale)
        self._cross_II.zero_()

    def finish_candidate(self) -> None:
        """Adds the present candidate to the sums.

        Raises:
            FloatingPointError: If the candidate's Gram matrix is not finite.
        """
        diagonal_I = self.gram.candidate_diagonal()
        if not torch.isfinite(diagonal_I).all():
            raise FloatingPointError("activations are not finite")
        alpha = self._alpha()
        self._finish_features(alpha)
        sketch_BS = self.sketcher.empty()
        for rows in self._chunks(self._own_rows()) if self._differences is not None else ():
            assert self._differences is not None
            difference_OI = self._differences(rows)
            if self._by_rows:
                self.rhs_OI[rows].addcmul_(difference_OI, diagonal_I, value=alpha * (1 - self.off_diagonal_scale))
            else:
                self.gram.add_candidate_product_(self.rhs_OI[rows], difference_OI, alpha, self.off_diagonal_scale)
            if self._part.is_primary or self.needs_all_reduce:
                self.sketcher.add_(sketch_BS, rows, difference_OI)
                self.mean_OI[rows].add_(difference_OI, alpha=self._share)
        self.sketches_BS.append(sketch_BS)
        if self.needs_all_reduce and self._part.index > 0:
            self.gram.drop_candidate()
        else:
            self.gram.finish_candidate(alpha, self.off_diagonal_scale)
        self._differences = None

    def _alpha(self) -> float:
        """α_i of the present candidate, once all of its rows have been added."""
        return alpha_of(self.gram, self._share, self.tokens[-1], by_norm=self.by_norm)

    def _own_rows(self) -> slice:
        """The rows of the present candidate's right-hand side that this rank computes."""
        total = self.rhs_OI.shape[0]
        if not self.needs_all_reduce:
            return slice(0, total)
        index, size = self._part.index, self._part.group_size
        return slice(total * index // size, total * (index + 1) // size)

    def solve(self, ridge: float, num_merged: int) -> Solution:
        """Solves for X, for all linears of the group at once, in the place of R.

        Args:
            ridge: λ as the method has it.
            num_merged: Number of models that the sums are of, those that were merged before included.
        """
        ridge = relative_ridge(self.gram, ridge, num_merged, by_norm=self.by_norm)
        tokens, correct = sum(self.tokens), None if self.folds is None else self._add_correction
        return solve_rows(self.gram, self.rhs_OI, self.mean_OI, ridge, self.off_diagonal_scale, tokens, correct)

    def _add_correction(self, solve: SolveRows) -> None:
        """Adds to R what comes from the candidates' own features, as far as folds of the data agree in it."""
        assert self.folds is not None and self.correction_OI is not None
        self.shrinkage = self.folds.factors(solve)
        for path, factor in self.shrinkage.items():
            rows = self.rows_of(path)
            self.rhs_OI[rows].add_(self.correction_OI[rows], alpha=factor)
        self.correction_OI = None

    def move_mean(self, differences: Differences, scale: float) -> None:
        """Puts another anchor in the place of the weighted average W̄, before `solve`: B + scale · (W̄ - B).

        Args:
            differences: Makes rows of B - A, A being the anchor of the sums.
            scale: How far from B towards the average, and beyond.
        """
        for rows in self._chunks():
            self.mean_OI[rows] = differences(rows).mul_(1 - scale).add_(self.mean_OI[rows], alpha=scale)

    def distances(self, linear: str) -> tuple[list[float], float]:
        """Estimates ‖W* - W_i‖ for every candidate, and computes ‖W* - W̄‖, for one linear, after `solve`."""
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

    def _chunks_of_linears(self) -> Iterator[slice]:
        for path in self.outputs:
            yield from self._chunks(self.rows_of(path))

    def _chunks(self, within: slice | None = None) -> Iterator[slice]:
        return row_chunks(within or slice(0, self.rhs_OI.shape[0]), self.gram.num_inputs)


def new_sums(group: LinearGroup, method: RegressionMethod, device: torch.device, scratch: Scratch) -> GroupSums:
    """Makes empty sums for a group of linears; all groups share `scratch`."""
    shape = group.num_outputs, group.num_inputs
    return GroupSums(
        outputs=group.outputs,
        gram=Gram(group.num_inputs, device, scratch),
        rhs_OI=torch.zeros(shape, dtype=GRAM_DTYPE, device=device),
        mean_OI=torch.zeros(shape, dtype=group.mean_dtype, device=device),
        sketcher=Sketcher(list(group.outputs.values()), group.num_inputs, device),
        off_diagonal_scale=method.off_diagonal_scale,
        by_norm=method.by_norm,
        correction_OI=torch.zeros(shape, dtype=GRAM_DTYPE, device=device) if method.shrinks else None,
        folds=FoldSums(group.outputs, group.num_inputs, device) if method.shrinks else None,
    )


def alpha_of(gram: Gram, share: float, tokens: int, *, by_norm: bool) -> float:
    """α_i = c_i / (Σ c · N_i) of the candidate that a Gram holds; N_i is its norm, or the number of rows."""
    size = gram.candidate_norm() if by_norm else tokens
    return share / size if size > 0 else 0.0


def relative_ridge(gram: Gram, ridge: float, num_models: int, *, by_norm: bool) -> float:
    """λ as a fraction of G's mean diagonal; with norms it is given as one of their mean over the models, 1/K."""
    if not by_norm:
        return ridge
    diagonal = float(gram.diagonal().mean(dtype=torch.float64))
    return ridge / num_models / diagonal if diagonal > 0 else 0.0


def solve_rows(
    gram: Gram,
    rhs_OI: torch.Tensor,
    mean_OI: torch.Tensor,
    ridge: float,
    off_diagonal_scale: float,
    tokens: int,
    complete: Complete | None = None,
) -> Solution:
    """Solves for X in the place of R, by the way that fits the data; arguments as in `solve_anchored_`.

    Args:
        gram: Σ G̃_i; another call may solve for other rows with it.
        rhs_OI: R; becomes X.
        mean_OI: What the ridge pulls to.
        ridge: λ as a fraction of the mean diagonal.
        off_diagonal_scale: The factor s on a Gram's off-diagonal.
        tokens: Number of rows of all candidates.
        complete: Adds to R what needs the factor.
    """
    return solve_anchored_(
        gram,
        rhs_OI,
        mean_OI,
        ridge,
        tokens if solves_only_seen(ridge, off_diagonal_scale) else None,
        surely_well_conditioned=not may_need_float64(gram.num_inputs, off_diagonal_scale),
        complete=complete,
    )


def solves_only_seen(ridge: float, off_diagonal_scale: float) -> bool:
    """Whether directions that the data leaves out are averaged: with a strong ridge every direction is solved for."""
    return off_diagonal_scale == 1 and ridge < STRONG_RIDGE


def sums_bytes(group: LinearGroup) -> int:
    """Bytes of the sums of a group, without the sketches."""
    rhs = group.num_outputs * group.num_inputs
    gram = group.num_inputs**2 + group.num_inputs * min(PANEL, group.num_inputs)
    return GRAM_DTYPE.itemsize * (gram + rhs) + group.mean_dtype.itemsize * rhs


def correction_bytes(group: LinearGroup) -> int:
    """Bytes of a correction that is kept apart, and of its folds."""
    kept_apart = GRAM_DTYPE.itemsize * group.num_outputs * group.num_inputs
    return kept_apart + fold_sums_bytes(len(group.linears), group.num_inputs)


def differences(
    group: LinearGroup, tensors: Mapping[str, torch.Tensor], anchor: Mapping[str, torch.Tensor] | None
) -> Differences:
    """Makes rows of E = W - A, of all linears of a group below one another, when they are asked for.

    Args:
        group: The group.
        tensors: The weights W, by parameter name.
        anchor: The weights A; `None` for the rows of W as they are.
    """
    weights = []
    start = 0
    for linear in group.linears:
        weight_OI = turned(tensors[linear.name], group)
        anchor_OI = None if anchor is None else turned(anchor[linear.name], group)
        weights.append((start, start + linear.num_outputs, weight_OI, anchor_OI))
        start += linear.num_outputs

    def rows(wanted: slice) -> torch.Tensor:
        parts = []
        for first, last, weight_OI, anchor_OI in weights:
            own = slice(max(wanted.start, first) - first, min(wanted.stop, last) - first)
            if own.start < own.stop:
                part_OI = weight_OI[own].to(GRAM_DTYPE, copy=True)
                parts.append(part_OI if anchor_OI is None else part_OI.sub_(anchor_OI[own]))
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
    """Makes the merged weight A + X in the module's layout, and its report.

    Args:
        group: The group that was solved.
        linear: A linear of the group.
        anchor: A, in the module's layout.
        sums: Sums of the group, solved.
        solution: How the group was solved.
        names: Names of the candidates.
    """
    rows = sums.rows_of(linear.path)
    anchor_OI = turned(anchor, group)
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
        **solution.to_json(),
        **({"shrinkage": sums.shrinkage[linear.path]} if sums.shrinkage else {}),
        "relative_distance_to_average": to_average / norm,
        "relative_distance_to_candidates": {
            name: distance / norm for name, distance in zip(names, to_candidates, strict=True)
        },
    }
    return turned(weight_OI, group).contiguous(), report


def turned(weight: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """Turns a weight from the module's layout to `[out, in]`, or back."""
    return weight.T if group.transposed else weight


def row_chunks(rows: slice, num_columns: int) -> Iterator[slice]:
    """Cuts rows into chunks of at most `DIFFERENCE_CHUNK_BYTES` in float32."""
    step = max(1, DIFFERENCE_CHUNK_BYTES // (GRAM_DTYPE.itemsize * num_columns))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def multiplies_by_rows(tokens: int, num_inputs: int) -> bool:
    """Whether `(E Xᵀ) X` is cheaper than `E G`."""
    return 2 * tokens < num_inputs


def panel_bytes(num_inputs: int) -> int:
    """Bytes of a panel of a head: small, but large enough that factorising anew for each is little of the work."""
    return min(DIFFERENCE_CHUNK_BYTES, max(PANEL_BYTES, GRAM_DTYPE.itemsize * num_inputs**2))


def features_by_rows(tokens: int, num_inputs: int, num_outputs: int) -> bool:
    """Whether `(W (X' - X)ᵀ) X` is cheaper than `W ((X' - X)ᵀX)`: 4·N·I·O operations, or 2·N·I² + 2·I²·O."""
    return 2 * tokens * num_outputs < tokens * num_inputs + num_inputs * num_outputs


class Sketcher:
    """Makes sketches, which are random projections, of the weights of a group's linears.

    Args:
        outputs: Number of rows of each linear; they lie below one another.
        num_inputs: Number of inputs I.
        device: Device of the weights.
    """

    def __init__(self, outputs: Sequence[int], num_inputs: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(num_inputs)
        self._right_IS = _signs((num_inputs, _COLUMNS), generator).to(device)
        self._left_O = _signs((sum(outputs),), generator).to(device)
        own = [torch.arange(rows) % _BUCKETS + number * _BUCKETS for number, rows in enumerate(outputs)]
        self._bucket_O = torch.cat(own).to(device)
        self._num_buckets = _BUCKETS * len(outputs)

    def empty(self) -> torch.Tensor:
        """Makes the sketch `[B, S]` of a matrix of zeros."""
        return torch.zeros(self._num_buckets, _COLUMNS, device=self._right_IS.device)

    def add_(self, sketch_BS: torch.Tensor, rows: slice, part_OI: torch.Tensor) -> None:
        """Adds some rows of a matrix to its sketch."""
        part_OS = (part_OI @ self._right_IS).mul_(self._left_O[rows, None])
        sketch_BS.index_add_(0, self._bucket_O[rows], part_OS)

    def norm(self, sketch_BS: torch.Tensor, linear: int) -> float:
        """Estimates the norm of the part of a matrix that belongs to linear number `linear`."""
        own_BS = sketch_BS[linear * _BUCKETS : (linear + 1) * _BUCKETS]
        return float(own_BS.norm()) / math.sqrt(_COLUMNS)

    def inner(self, sketch_BS: torch.Tensor, other_BS: torch.Tensor, linear: int) -> float:
        """Estimates the inner product of the parts of two matrices that belong to linear number `linear`."""
        own = slice(linear * _BUCKETS, (linear + 1) * _BUCKETS)
        return float((sketch_BS[own] * other_BS[own]).sum(dtype=torch.float64)) / _COLUMNS


def sketch_bytes(num_linears: int) -> int:
    """Bytes of one candidate's sketch of a group of linears."""
    return 4 * _BUCKETS * _COLUMNS * num_linears


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
