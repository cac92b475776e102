"""How far a correction can be trusted: folds of the data are asked for it one by one.

What is added to a right-hand side because the merged model has drifted, R = Σ_f R_f over folds f of the calibration
data, is fitted to features that differ from sample to sample. With few samples most of it is noise, which costs more
than the drift. What the folds have in common is no noise. With the inner product of the solve,

    ⟨A, B⟩ = tr A (G + λI)⁻¹ Bᵀ                energy of the correction: ⟨R, R⟩
    S = Σ_{f≠g} ⟨R_f, R_g⟩ / (1 − Σ w_f²)      energy of its signal, w_f being the share of the data in fold f

and the correction is multiplied by √(S / ⟨R, R⟩), between 0 and 1: it gets the energy that its signal has. (The factor
S / ⟨R, R⟩ of James and Stein, 1961, makes the expected error of a linear smallest, but every linear's features too
small, and what comes after amplifies that.)

Only a few random combinations of each linear's outputs are summed by fold, and solved with the factor that is there
anyway, so that this costs a fraction of the Gram matrices, in memory and time.

Shapes: N tokens, I inputs, O outputs of all linears of a group, Q combinations of them, F folds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from largemerge.matmul import add_product_, product
from largemerge.regression.gram import GRAM_DTYPE
from largemerge.regression.solve import SolveRows

NUM_FOLDS = 8
_COMBINATIONS = 16  # of the outputs of one linear

Folds = tuple[tuple[int, int], ...]
"""Numbers of folds, and how many rows of a batch belong to each, in the order of the rows."""

Parts = list[tuple[int, slice]]
"""Numbers of folds, and the rows that belong to them."""


def parts_in_folds(folds: Folds, count: int, seen: int = 0) -> Parts:
    """Cuts rows of a batch into those of one fold each.

    Args:
        folds: Folds of the batch.
        count: Number of rows; where they are a multiple of the batch's, every token has several, one after the other.
        seen: How many rows came before; a linear that runs several times sees the batch as often.

    Returns:
        Folds and slices of the `count` rows, in order.
    """
    expected = sum(number for _, number in folds)
    seen %= max(1, expected)
    several = count // expected if seen == 0 and expected and count % expected == 0 else 1
    parts: Parts = []
    start = -seen
    for fold, number in folds:
        stop = start + number * several
        rows = slice(max(start, 0), min(stop, count))
        start = stop
        if rows.start >= rows.stop:
            continue
        if parts and parts[-1][0] == fold:
            parts[-1] = fold, slice(parts[-1][1].start, rows.stop)
        else:
            parts.append((fold, rows))
    if start < count:  # rows that no token accounts for
        fold, rows = parts.pop() if parts else (folds[-1][0], slice(0, 0))
        parts.append((fold, slice(rows.start, count)))
    return parts


class FoldSums:
    """Σ over the rows of each fold of Tᵀ X, for a few combinations of a correction T of a group's linears.

    Args:
        outputs: Linear → its number of outputs.
        num_inputs: Number of inputs I.
        device: Device of the sums.
    """

    def __init__(self, outputs: Mapping[str, int], num_inputs: int, device: torch.device) -> None:
        shape = NUM_FOLDS, _COMBINATIONS * len(outputs), num_inputs
        signs_QO = combinations(outputs, num_inputs)
        self._signs_QO = {path: own_QO.to(device) for path, own_QO in signs_QO.items()}
        self._places = {
            path: slice(number * _COMBINATIONS, (number + 1) * _COMBINATIONS) for number, path in enumerate(outputs)
        }
        self._sums_FQI = torch.zeros(shape, dtype=GRAM_DTYPE, device=device)
        self._candidate_FQI = torch.zeros_like(self._sums_FQI)
        self._weights_QI = torch.zeros(shape[1:], dtype=GRAM_DTYPE, device=device)
        self._shares_F = torch.zeros(NUM_FOLDS, dtype=torch.float64, device=device)

    @classmethod
    def of_inputs(cls, num_inputs: int, device: torch.device) -> FoldSums:
        """Makes sums for a correction whose outputs are the inputs: as if all weights were the identity."""
        sums = cls({"": num_inputs}, num_inputs, device)
        sums._weights_QI.copy_(sums._signs_QO[""])
        return sums

    def start_candidate(self, weights: Callable[[slice], torch.Tensor], chunks: Callable[[], Iterator[slice]]) -> None:
        """Begins the next candidate.

        Args:
            weights: Makes rows of its weights, of all linears below one another.
            chunks: Gives the slices of rows, none of which reaches from one linear to another.
        """
        self._weights_QI.zero_()
        for rows in chunks():
            place, columns, signs_QO = self._of(rows)
            add_product_(self._weights_QI[place], signs_QO[:, columns], weights(rows).T)

    def _of(self, rows: slice) -> tuple[slice, slice, torch.Tensor]:
        """Where the combinations of a linear lie, its own numbers of `rows`, and its signs."""
        start = 0
        for path, signs_QO in self._signs_QO.items():
            if start <= rows.start < start + signs_QO.shape[1]:
                return self._places[path], slice(rows.start - start, rows.stop - start), signs_QO
            start += signs_QO.shape[1]
        raise IndexError(rows)

    def add(
        self,
        x_NI: torch.Tensor,
        moved_NI: torch.Tensor | None,
        drift_NO: Mapping[str, torch.Tensor],
        parts: Parts,
        share: float,
    ) -> None:
        """Adds rows of the present candidate.

        Args:
            x_NI: Inputs, float32.
            moved_NI: What its weights are applied to; `None` for nothing.
            drift_NO: Linear → what is added to that.
            parts: Folds of the rows.
            share: Part of the data that a row is.
        """
        wanted_QN = torch.zeros(self._weights_QI.shape[0], len(x_NI), dtype=GRAM_DTYPE, device=x_NI.device)
        if moved_NI is not None:
            add_product_(wanted_QN, self._weights_QI, moved_NI)
        for path, drift in drift_NO.items():
            wanted_QN[self._places[path]] += product(self._signs_QO[path], drift)
        for fold, rows in parts:
            add_product_(self._candidate_FQI[fold], wanted_QN[:, rows], x_NI[rows].T)
            self._shares_F[fold] += share * (rows.stop - rows.start)

    def finish_candidate(self, scale: float) -> None:
        """Adds the present candidate's sums, multiplied by `scale`."""
        self._sums_FQI.add_(self._candidate_FQI, alpha=scale)
        self._candidate_FQI.zero_()

    def add_candidate_of(self, other: FoldSums, scale: float) -> None:
        """Adds the present candidate's sums of another, multiplied by `scale`."""
        self._sums_FQI.add_(other._candidate_FQI, alpha=scale)
        self._shares_F.add_(other._shares_F)

    def candidate_views(self) -> list[torch.Tensor]:
        """The present candidate's sums, which ranks add up."""
        return [self._candidate_FQI, self._shares_F]

    def views(self) -> list[torch.Tensor]:
        """All sums over candidates, which ranks add up."""
        return [self._sums_FQI, self._shares_F]

    def factors(self, solve: SolveRows) -> dict[str, float]:
        """Finds the factor of each linear's correction, from 0 to 1.

        Args:
            solve: Solves for rows with the system of the group.
        """
        shares_F = self._shares_F / self._shares_F.sum().clamp_min(torch.finfo(torch.float64).tiny)
        between = 1 - float(shares_F.square().sum())
        solved_FQI = solve(self._sums_FQI.flatten(0, 1).clone()).view_as(self._sums_FQI)
        factors = {}
        for path, place in self._places.items():
            sums_FQI, own_FQI = self._sums_FQI[:, place].double(), solved_FQI[:, place].double()
            energy = float((sums_FQI.sum(0) * own_FQI.sum(0)).sum())
            common = energy - float((sums_FQI * own_FQI).sum())
            known = energy > 0 and between > 0
            factors[path] = math.sqrt(min(1.0, max(0.0, common / between / energy))) if known else 1.0
        return factors


def combinations(outputs: Mapping[str, int], num_inputs: int) -> dict[str, torch.Tensor]:
    """Random signs `[Q, O]` by linear, the same in every call; the outputs themselves where there are so few.

    Args:
        outputs: Linear → its number of outputs.
        num_inputs: Number of inputs I.
    """
    generator = torch.Generator().manual_seed(num_inputs)
    return {
        path: torch.eye(_COMBINATIONS, size)
        if size <= _COMBINATIONS
        else torch.randint(0, 2, (_COMBINATIONS, size), generator=generator) * 2.0 - 1
        for path, size in outputs.items()
    }


def fold_sums_bytes(num_linears: int, num_inputs: int) -> int:
    """Bytes of a group's sums by fold, and of what is held while they are solved."""
    return GRAM_DTYPE.itemsize * _COMBINATIONS * num_linears * num_inputs * (4 * NUM_FOLDS + 1)


def fold_operations(num_linears: int, num_inputs: int, rows: int) -> int:
    """Multiplications and additions of adding `rows` of a candidate."""
    return 4 * _COMBINATIONS * num_linears * num_inputs * rows
