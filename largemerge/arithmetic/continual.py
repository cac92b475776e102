"""OPCM: models are merged one after the other, each orthogonally to what is merged already.

Of all models together only the merged task vector is kept, so memory does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from largemerge.arithmetic.factors import singular_vectors
from largemerge.arithmetic.method import Unscaled
from largemerge.arithmetic.pieces import Piece
from largemerge.arithmetic.singular import task_vector

_ROUNDING = 1 + 1e-12  # so that `alpha: 1` is all of them


def opcm_matrix(piece: Piece) -> Unscaled:
    """Orthogonal projection-based continual merging, before the last factor. Tang et al., arXiv 2501.09522.

        M_1 = Δ_1        M_t = M_{t-1} + P_{t-1}(Δ_t)        Δ_t = W_t - W_0, in the order of the configuration

    U S Vᵀ = M_{t-1}, `[O, I]`; P_{t-1}(Δ) = Δ - U C Vᵀ, where C is UᵀΔV on its diagonal and in its first r rows and
    columns, else 0: the directions of the r largest singular values, whose sum is at most `alpha` of all, are left out,
    and so is what lies along any singular pair. The result is W_0 + M_K · mean ‖Δ_t‖ / ‖M_K‖, norms over the whole
    model. The paper scales by such a factor after every step; since none of these changes U, V or r, the last one is
    all that remains.
    """
    return _one_after_the_other(piece, lambda delta, merged: _project_(delta, merged, piece.options["alpha"]))


def opcm_others(piece: Piece) -> Unscaled:
    """Σ Δ_t: what is no weight matrix is added up, as in the authors' program."""
    return _one_after_the_other(piece, lambda delta, merged: delta)


def _one_after_the_other(piece: Piece, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Unscaled:
    merged, squares = torch.empty(0), []
    for model in range(len(piece.tensors)):
        delta = task_vector(piece, model)
        squares.append(_square(delta))
        merged = merged.add_(change(delta, merged)) if model else delta
    return Unscaled(merged, (_square(merged), *squares))


def opcm_alone(piece: Piece) -> torch.Tensor:
    """OPCM of a model that has no other tensor than this one."""
    made = opcm_matrix(piece) if piece.origin.dim() == 2 else opcm_others(piece)
    return made.vector.mul_(opcm_factor(made.squares)).add_(piece.origin)


def opcm_factor(squares: Sequence[float]) -> float:
    """The mean norm of the task vectors over the norm of the merged one; 1 where that is 0."""
    merged, *models = (math.sqrt(square) for square in squares)
    return sum(models) / len(models) / merged if merged else 1.0


def _project_(delta_OI: torch.Tensor, merged_OI: torch.Tensor, alpha: float) -> torch.Tensor:
    """P(Δ), in the place of Δ."""
    u_OR, s_R, v_IR = singular_vectors(merged_OI)
    if len(s_R) == 0:
        return delta_OI
    count = int((s_R.cumsum(0) <= alpha * s_R.sum() * _ROUNDING).sum())
    rows_RI = u_OR.T @ delta_OI
    # Uᵀ Δ, of which what C keeps is put in its place: C Vᵀ.
    block = rows_RI[:count] @ v_IR[:, :count]
    along_R = (rows_RI * v_IR.T).sum(dim=1, keepdim=True)
    torch.mul(v_IR.T, along_R, out=rows_RI)
    torch.mm(block, v_IR[:, :count].T, out=rows_RI[:count])
    return delta_OI.sub_(u_OR @ rows_RI)


def _square(tensor: torch.Tensor) -> float:
    return tensor.square().sum(dtype=torch.float64).item()
