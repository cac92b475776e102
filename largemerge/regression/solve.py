"""Solves for a merged weight, anchored near the average; Cholesky factors in place.

    minimise over W   Σ_i tr[(W - W_i) G̃_i (W - W_i)ᵀ] + λ ‖W - W̄‖²        W̄ = Σ c_i W_i / Σ c_i

With an anchor A (any weight near the others), E_i = W_i - A and G = Σ G̃_i, the minimum is

    W* = A + X        X (G + λI) = R        R = Σ_i E_i G̃_i + λ Ē        λ = ridge · mean(diag G)

Rounding errors scale with the differences E_i, not with the weights, and where the data says nothing X is Ē:
the average, not zero. The system is scaled to a unit diagonal first; features that never fire (a zero on the
diagonal) get the average exactly. Everything happens in place: X takes R's memory, the factor half of G's.

Tried in turn: Cholesky in float32; Cholesky in float64, where the factorisation fails, the system is ill
conditioned, or the residual is poor; eigenvalues in float64. The last solves only in directions that stand out of
the rounding noise of a float32 Gram matrix, and takes the average in all others; it comes first where there are
fewer tokens than inputs, so that no factorisation can be trusted. Each step away from the first is reported.

    A = L Lᵀ          the lower half of A becomes L; what lies above the diagonal panels is left alone
    X A = B           B becomes X, two sweeps over panels of columns

Beside the matrix itself little is held: a library's Cholesky and its solve need the matrix, the factor, and the
right-hand side twice.

Shapes: I inputs of a linear, O outputs (of all linears that share the Gram, one after another; one right-hand side per
row), P columns of a panel, V probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from largemerge.matmul import add_product_, product
from largemerge.regression.gram import GRAM_DTYPE, Gram, panels

SolveRows = Callable[[torch.Tensor], torch.Tensor]
"""Solves X (G + λI) = B for rows B `[N, I]`, in their place."""

Complete = Callable[[SolveRows], None]
"""Completes R, called once when the system is factorised; it may solve for other rows with the same factor."""

_MAX_CONDITION = {torch.float32: 1e6, torch.float64: 1e8}  # of a factorisation that is taken
_MAX_RESIDUAL = {torch.float32: 1e-5, torch.float64: 1e-8}
_NOISE = 8 * torch.finfo(torch.float32).eps  # in the eigenvalues of a float32 Gram, as a fraction of the largest
_NUM_PROBES = 4
_NUM_ITERATIONS = 4
_CHUNK_ELEMENTS = 1 << 21  # elements of right-hand sides in float64 at once
_ROWS = 2048  # right-hand sides that are solved at once
_BLOCK = 1024  # columns that are updated together: several panels


@dataclass(frozen=True)
class Solution:
    """How the update of a weight was found.

    Attributes:
        solver: `cholesky_float32`, `cholesky_float64` or `eigenvalues_float64`.
        condition: Estimated condition of the system scaled to a unit diagonal, from a few power iterations; for
            eigenvalues the condition of the part that is solved.
        residual: Estimate of ‖B - XA‖ / ‖B‖, from random combinations of the right-hand sides.
        fallbacks: Why each earlier attempt was not accurate enough.
        num_dead_features: Number of inputs that never fired in any candidate's data.
    """

    solver: str
    condition: float
    residual: float
    fallbacks: tuple[str, ...]
    num_dead_features: int

    def to_json(self) -> dict[str, Any]:
        """How it was found, as plain JSON values."""
        return asdict(self) | {"fallbacks": list(self.fallbacks)}


class _InaccurateError(Exception):
    """Raised when a factorisation is not accurate enough."""


@dataclass(frozen=True)
class _System:
    """The system X (G + λI) = R, which several attempts may solve.

    Attributes:
        gram: Σ G̃_i, from which the matrix can be made anew.
        rhs_OI: R, which becomes X.
        mean_OI: Ē, the weighted average of the E_i.
        shift_I: What is added to the diagonal of G: λ, or 1 where that leaves a zero.
        complete: Adds to R what needs the factor.
    """

    gram: Gram
    rhs_OI: torch.Tensor
    mean_OI: torch.Tensor
    shift_I: torch.Tensor
    complete: Complete | None

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Makes G + λI `[I, I]`: in float32 in the memory of the sums, in float64 as a copy."""
        matrix_II = self.gram.full_sum().to(dtype)
        matrix_II.diagonal().add_(self.shift_I)
        return matrix_II

    def product(self, rows_VI: torch.Tensor) -> torch.Tensor:
        """Multiplies rows `[V, I]` by G + λI, even after the matrix was overwritten by its factor."""
        return self.gram.sum_product(rows_VI).addcmul_(rows_VI, self.shift_I.to(rows_VI.dtype))


def solve_anchored_(
    gram: Gram,
    rhs_OI: torch.Tensor,
    mean_OI: torch.Tensor,
    ridge: float,
    max_rank: int | None = None,
    *,
    surely_well_conditioned: bool = False,
    complete: Complete | None = None,
) -> Solution:
    """Solves X (G + λI) = R + λĒ for X, in the place of R.

    Args:
        gram: Σ G̃_i; overwritten.
        rhs_OI: R, the sum of E_i G̃_i, float32; becomes X.
        mean_OI: Ē, the weighted average of the E_i, in any floating dtype.
        ridge: λ as a fraction of the mean diagonal of G.
        max_rank: Upper bound of the rank of G, if one is known.
        surely_well_conditioned: Whether float32 is known to suffice, so that a rough estimate of the condition will do.
        complete: Adds to R what needs the factor: called once, with a function that solves for other rows.

    Raises:
        FloatingPointError: If G or R is not finite.
    """
    diagonal_I = gram.diagonal()
    if not torch.isfinite(diagonal_I).all() or not torch.isfinite(_signs(rhs_OI.shape[0], rhs_OI) @ rhs_OI).all():
        raise FloatingPointError("sums are not finite")
    dead_I = diagonal_I == 0
    shift = ridge * diagonal_I.mean(dtype=torch.float64).item()
    rhs_OI.add_(mean_OI, alpha=shift)
    if shift == 0:
        rhs_OI[:, dead_I] = mean_OI[:, dead_I].to(GRAM_DTYPE)
    shift_I = torch.where(dead_I, shift or 1.0, shift).to(GRAM_DTYPE)
    system = _System(gram, rhs_OI, mean_OI, shift_I, complete)
    iterations = 1 if surely_well_conditioned else _NUM_ITERATIONS
    fallbacks: list[str] = []
    attempts: list[tuple[str, Callable[[], tuple[float, float]]]] = [
        ("cholesky_float32", lambda: _by_cholesky(system, torch.float32, iterations)),
        ("cholesky_float64", lambda: _by_cholesky(system, torch.float64, iterations)),
        ("eigenvalues_float64", lambda: _by_eigenvalues(system)),
    ]
    if max_rank is not None and max_rank < gram.num_inputs:
        fallbacks.append(
            f"{max_rank} tokens for {gram.num_inputs} inputs: directions that they leave out keep the anchor"
        )
        attempts = attempts[2:]
    for name, attempt in attempts:
        try:
            condition, residual = attempt()
        except _InaccurateError as error:
            fallbacks.append(f"{name}: {error}")
            continue
        return Solution(name, condition, residual, tuple(fallbacks), int(dead_I.sum()))
    raise AssertionError("eigenvalues always give a solution")


def may_need_float64(num_inputs: int, off_diagonal_scale: float) -> bool:
    """Whether Cholesky in float32 may be too inaccurate.

    With s < 1 a system scaled to a unit diagonal has eigenvalues from 1 - s to s·I + 1 - s.
    """
    smallest = 1 - off_diagonal_scale
    return off_diagonal_scale * num_inputs + smallest > smallest * _MAX_CONDITION[torch.float32]


def solve_operations(num_inputs: int, num_outputs: int) -> int:
    """Multiplications and additions of a factorisation and two triangular solves: I³/3 + 2·I²·O."""
    return num_inputs**3 // 3 + 2 * num_inputs**2 * num_outputs


def _by_cholesky(system: _System, dtype: torch.dtype, iterations: int) -> tuple[float, float]:
    """Solves Y (D A D) = R D, where D gives A = G + λI a unit diagonal; X = Y D. Returns condition and residual."""
    matrix_II = system.matrix(dtype)
    scale_I = matrix_II.diagonal().rsqrt()
    for columns in panels(matrix_II.shape[0]):
        matrix_II[columns.start :, columns].mul_(scale_I[columns.start :, None]).mul_(scale_I[columns])
    factor = cholesky_(matrix_II)
    if isinstance(factor, int):
        raise _InaccurateError(f"not positive definite at row {factor}")
    condition = estimate_condition(lambda rows_VI: system.product(rows_VI * scale_I).mul_(scale_I), factor, iterations)
    if not condition <= _MAX_CONDITION[dtype]:
        raise _InaccurateError(f"condition {condition:.1e}")
    # Some random combinations of the right-hand sides first: R is overwritten once the factor is known to be accurate.
    some_VI = (_signs(system.rhs_OI.shape[0], system.rhs_OI) @ system.rhs_OI).to(dtype)
    residual = _residual(system, solve_(some_VI * scale_I, factor).mul_(scale_I), some_VI)
    if not residual <= _MAX_RESIDUAL[dtype]:
        raise _InaccurateError(f"residual {residual:.1e}")

    def solve_rows(rhs_OI: torch.Tensor) -> torch.Tensor:
        for rows in [slice(None)] if dtype is GRAM_DTYPE else _row_chunks(rhs_OI):
            chunk_OI = rhs_OI[rows].to(dtype)  # in float32 R itself
            solve_(chunk_OI.mul_(scale_I), factor).mul_(scale_I)
            if dtype is not GRAM_DTYPE:
                rhs_OI[rows] = chunk_OI.to(GRAM_DTYPE)
        return rhs_OI

    if system.complete is not None:
        system.complete(solve_rows)
    solve_rows(system.rhs_OI)
    return condition, residual


def _by_eigenvalues(system: _System) -> tuple[float, float]:
    """Solves in the directions whose eigenvalues stand out of the noise; X is the average in all others.

    The system is not scaled here: what is orthogonal to the data must stay so. Returns condition and residual.
    """
    matrix_II = system.matrix(torch.float64)
    values_I, vectors_II = torch.linalg.eigh(matrix_II)
    kept = values_I > _NOISE * values_I[-1]
    values_K, vectors_IK = values_I[kept], vectors_II[:, kept]

    def solve_rows(rhs_OI: torch.Tensor) -> torch.Tensor:
        return rhs_OI.copy_((rhs_OI.double() @ vectors_IK / values_K) @ vectors_IK.T)

    if system.complete is not None:
        system.complete(solve_rows)
    squares = left_squares = 0.0
    for rows in _row_chunks(system.rhs_OI):
        rhs_OI, mean_OI = system.rhs_OI[rows].double(), system.mean_OI[rows].double()
        update_OI = mean_OI + ((rhs_OI - mean_OI @ matrix_II) @ vectors_IK / values_K) @ vectors_IK.T
        squares += (rhs_OI @ vectors_IK).square().sum().item()
        left_squares += ((rhs_OI - update_OI @ matrix_II) @ vectors_IK).square().sum().item()
        system.rhs_OI[rows] = update_OI.to(GRAM_DTYPE)
    condition = (values_K[-1] / values_K[0]).item()
    return condition, math.sqrt(left_squares / squares) if squares > 0 else 0.0


def estimate_condition(
    product: Callable[[torch.Tensor], torch.Tensor], factor: Factor, iterations: int = _NUM_ITERATIONS
) -> float:
    """Estimates largest over smallest eigenvalue, by power iterations with the matrix and with its inverse.

    Args:
        product: Multiplies rows `[V, I]` by the matrix.
        factor: Cholesky factor of the matrix.
        iterations: Number of iterations; the estimate grows with them, up to the true value.
    """
    largest_VI = smallest_VI = _signs(factor.lower_II.shape[0], factor.lower_II)
    for _ in range(iterations):
        largest_VI = torch.nn.functional.normalize(product(largest_VI), dim=1)
        smallest_VI = torch.nn.functional.normalize(solve_(smallest_VI.clone(), factor), dim=1)
    largest = (largest_VI * product(largest_VI)).sum(1).max().item()
    smallest = 1 / (smallest_VI * solve_(smallest_VI.clone(), factor)).sum(1).max().item()
    return largest / smallest if smallest > 0 else float("inf")


def _residual(system: _System, solved_VI: torch.Tensor, rhs_VI: torch.Tensor) -> float:
    """‖B - XA‖ / ‖B‖ of some combinations of the right-hand sides, as an estimate for all of them."""
    norm = rhs_VI.norm().item()
    return (rhs_VI - system.product(solved_VI)).norm().item() / norm if norm > 0 else 0.0


def _signs(length: int, like: torch.Tensor) -> torch.Tensor:
    """Makes random signs `[V, length]`, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 2, (_NUM_PROBES, length), generator=generator) * 2 - 1).to(like)


def _row_chunks(rhs_OI: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // rhs_OI.shape[1])
    for start in range(0, rhs_OI.shape[0], step):
        yield slice(start, start + step)


@dataclass(frozen=True)
class Factor:
    """A Cholesky factor L.

    Attributes:
        lower_II: L in its lower half, diagonal panels included.
        inverses_PP: Inverses of the diagonal panels.
    """

    lower_II: torch.Tensor
    inverses_PP: tuple[torch.Tensor, ...]


def cholesky_(system_II: torch.Tensor) -> Factor | int:
    """Factorises a symmetric matrix in its own place.

    Args:
        system_II: The matrix; only its lower half is read, and overwritten up to and including the diagonal panels.

    Returns:
        The factor; or, where A is not positive definite, the number of the row (from 1) where that shows.
    """
    inverses = []
    for columns in panels(system_II.shape[0]):
        start, stop = columns.start, columns.stop
        block = start // _BLOCK * _BLOCK
        if start == block and block:
            left_IB = system_II[block:, :block].contiguous()  # once for all panels of the block
        if block:
            add_product_(
                system_II[start:, columns], left_IB[start - block :], left_IB[start - block : stop - block], alpha=-1
            )
        if start > block:
            add_product_(
                system_II[start:, columns], system_II[start:, block:start], system_II[columns, block:start], alpha=-1
            )
        block_PP, info = torch.linalg.cholesky_ex(system_II[columns, columns])
        if int(info) > 0:
            row: int = start + int(info)
            return row
        inverse_PP = torch.linalg.solve_triangular(block_PP, torch.eye(stop - start).to(block_PP), upper=False)
        system_II[columns, columns] = block_PP
        if stop < system_II.shape[0]:
            system_II[stop:, columns] = product(system_II[stop:, columns], inverse_PP)
        inverses.append(inverse_PP)
    return Factor(system_II, tuple(inverses))


def solve_(rhs_OI: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Solves X (L Lᵀ) = B in the place of B."""
    for start in range(0, rhs_OI.shape[0], _ROWS):
        _solve_rows_(rhs_OI[start : start + _ROWS], factor)
    return rhs_OI


def _solve_rows_(rhs_OI: torch.Tensor, factor: Factor) -> None:
    lower_II, size = factor.lower_II, factor.lower_II.shape[0]
    steps = list(zip(panels(size), factor.inverses_PP, strict=True))
    for columns, inverse_PP in steps:  # Y Lᵀ = B
        start, block = columns.start, columns.start // _BLOCK * _BLOCK
        whole = slice(block, min(block + _BLOCK, size))
        if start == block and block:
            add_product_(rhs_OI[:, whole], rhs_OI[:, :block], lower_II[whole, :block], alpha=-1)
        target_OP = rhs_OI[:, columns]
        if start > block:
            add_product_(target_OP, rhs_OI[:, block:start], lower_II[columns, block:start], alpha=-1)
        target_OP.copy_(product(target_OP, inverse_PP))
    for columns, inverse_PP in reversed(steps):  # X L = Y
        stop, block = columns.stop, columns.start // _BLOCK * _BLOCK
        whole = slice(block, min(block + _BLOCK, size))
        if stop == whole.stop and stop < size:
            add_product_(rhs_OI[:, whole], rhs_OI[:, stop:], lower_II[stop:, whole].T, alpha=-1)
        target_OP = rhs_OI[:, columns]
        if stop < whole.stop:
            add_product_(target_OP, rhs_OI[:, stop : whole.stop], lower_II[stop : whole.stop, columns].T, alpha=-1)
        target_OP.copy_(product(target_OP, inverse_PP.T))
