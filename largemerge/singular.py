"""Singular vectors and polar factors of a matrix, by the eigenvalues of the smaller of its two Gram matrices.

    X = U S Vᵀ  [O, I], I ≤ O       G = XᵀX = V S² Vᵀ  [I, I]       U = X V S⁻¹       U Vᵀ = X (V S⁻¹ Vᵀ)

A wide X is transposed first. On a CPU this takes half the time of an SVD and less. The price is that S is squared: so
G and its eigenvectors are float64, which knows directions down to a millionth of the largest singular value. What is
smaller than that counts as 0: float32 weights have no more digits, and an SVD's vectors there are rounding errors.

An SVD leaves open what U and V are where singular values are 0, and so do the papers' programs, whose results there
depend on the library. Here such directions are left out of U and V, and a polar factor is 0 in them: they add nothing.

Shapes: N rows, O outputs (rows), I inputs (columns), R singular values, min(O, I) at most.
"""

from __future__ import annotations

import torch

FACTOR_DTYPE = torch.float64
"""The precision of every Gram matrix here, and of its eigenvectors."""

SMALLEST_VALUE = 1e-6
"""Of the largest singular value: smaller ones count as 0."""

_NUM_PANELS = 4
_ROWS_AT_ONCE = 1024
_FLOAT32_ERROR = 1e-5  # relative; up to there X V S⁻¹ is multiplied in float32


def lower_gram(x_NI: torch.Tensor) -> torch.Tensor:
    """Computes XᵀX `[I, I]`, float64, on and below the diagonal panels; 0 above them."""
    size = x_NI.shape[1]
    gram_II = torch.zeros(size, size, dtype=FACTOR_DTYPE, device=x_NI.device)
    width = max(1, -(-size // _NUM_PANELS))
    for rows in torch.split(x_NI, _ROWS_AT_ONCE):
        wide = rows.to(FACTOR_DTYPE)
        for start in range(0, size, width):
            stop = min(start + width, size)
            gram_II[start:, start:stop].addmm_(wide[:, start:].T, wide[:, start:stop])
    return gram_II


def gram(x_NI: torch.Tensor) -> torch.Tensor:
    """Computes XᵀX `[I, I]`, float64."""
    lower_II = lower_gram(x_NI).tril_()
    return lower_II.add_(lower_II.tril(-1).T)


def singular_vectors(
    x_OI: torch.Tensor, max_rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes U `[O, R]`, S `[R]`, V `[I, R]` of the largest singular values, largest first; float32, S float64.

    Args:
        x_OI: The matrix, float32.
        max_rank: The most singular values to return; fewer come back where the others count as 0.
    """
    if x_OI.shape[1] > x_OI.shape[0]:
        v_IR, s_R, u_OR = singular_vectors(x_OI.T, max_rank)
        return u_OR, s_R, v_IR
    s_R, v_IR = _spectrum(x_OI)
    s_R, v_IR = s_R[:max_rank], v_IR[:, :max_rank]
    return _product(x_OI, v_IR / s_R, s_R), s_R, v_IR.to(torch.float32)


def polar_factor(x_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes U Vᵀ `[O, I]`, the nearest matrix with orthonormal columns (or rows), float32; and S `[R]`, float64."""
    if x_OI.shape[1] > x_OI.shape[0]:
        factor_IO, s_R = polar_factor(x_OI.T)
        return factor_IO.T, s_R
    s_R, v_IR = _spectrum(x_OI)
    return _product(x_OI, (v_IR / s_R) @ v_IR.T, s_R), s_R


def _spectrum(x_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes S, largest first, and V, float64, without what counts as 0."""
    squares_I, vectors_II = torch.linalg.eigh(lower_gram(x_OI), UPLO="L")
    s_I = squares_I.clamp_(min=0).sqrt_().flip(0)
    count = int((s_I > SMALLEST_VALUE * s_I[:1]).sum()) if len(s_I) else 0
    return s_I[:count], vectors_II.flip(1)[:, :count]


def _product(x_OI: torch.Tensor, right: torch.Tensor, s_R: torch.Tensor) -> torch.Tensor:
    """Multiplies X by a matrix as large as S⁻¹; in float32 where the smallest singular value allows, else float64."""
    error = torch.finfo(torch.float32).eps * (s_R[:1] / s_R).square().mean().sqrt()
    if len(s_R) == 0 or error <= _FLOAT32_ERROR:
        return x_OI @ right.to(torch.float32)
    return torch.cat([rows.to(FACTOR_DTYPE).mm(right).to(torch.float32) for rows in torch.split(x_OI, _ROWS_AT_ONCE)])


def sum_of_squares(tensor: torch.Tensor) -> float:
    """Computes Σ x² in float64."""
    return tensor.square().sum(dtype=FACTOR_DTYPE).item()
