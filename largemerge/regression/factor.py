"""Cholesky factors in place, in panels, so that nearly all of the work is large matrix products.

    A = L Lᵀ          the lower half of A becomes L; what lies above the diagonal panels is left alone
    X A = B           B becomes X, two sweeps over panels of columns

Beside the matrix itself little is held: a library's Cholesky and its solve need the matrix, the factor, and the
right-hand side twice.

Shapes: I rows of the system, O right-hand sides (one per row of B), P columns of a panel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from largemerge.regression.gram import panels
from largemerge.regression.product import add_product_, product

_ROWS = 2048  # of right-hand sides that are worked at once
_BLOCK = 1024  # columns that are brought up to date together: several panels


@dataclass(frozen=True)
class Factor:
    """L, below the diagonal panels and in them, and the inverses of its diagonal panels."""

    lower_II: torch.Tensor
    inverses_PP: tuple[torch.Tensor, ...]


def cholesky_(system_II: torch.Tensor) -> Factor | int:
    """Factorises a symmetric matrix in its own place.

    Args:
        system_II: Only its lower half is read; it is overwritten up to and including the diagonal panels.

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
