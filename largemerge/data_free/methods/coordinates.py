"""Methods that elect signs not among weights, but among coordinates in a space of all task vectors: KnOTS, DC-Merge.

    Δ_i = W_i - W_0 ≈ U C_i Vᵀ          U, V the same for all models          W_0 + U · TIES(C_1 … C_K) · Vᵀ

Weights of models that were trained apart have no common meaning one by one, so that signs which agree there say little.
In directions that all models share they have one. KnOTS turns the outputs (V = 1), DC-Merge outputs and inputs.

TIES in one pass over the models, whatever their number: sums of what is positive and of what is negative are kept, each
with the sum of its weights, and in the end the larger one is taken. A direction's sign is of no importance: what comes
out is the same with -u. So where the two sums are equal, nothing is added.

Shapes: O outputs (rows), I inputs (columns), R directions, K models.
"""

from __future__ import annotations

import torch

from largemerge.data_free.methods.base import Piece
from largemerge.singular import (
    FACTOR_DTYPE,
    SMALLEST_VALUE,
    lower_gram,
    polar_factor,
    singular_vectors,
)

SMOOTHING = ("none", "avg", "linear")
"""What DC-Merge may do to singular values."""

_SMALLEST_DIVISOR = 1e-8  # sum of weights below which nothing is divided


def knots(piece: Piece) -> torch.Tensor:
    """Merges by KnOTS: W_0 + lambda · U · TIES(UᵀΔ_1 … UᵀΔ_K). Stoica et al., arXiv 2410.19735.

        [Δ_1 | … | Δ_K] = U S [V_1ᵀ | … | V_Kᵀ]     C_i = S V_iᵀ = UᵀΔ_i  [R, I]

    TIES keeps the `density` of largest elements of every C_i, weighs them, and adds up those that have the sign of
    their sum, divided by Σ |w_i| over these if `normalize` is on: a negative weight subtracts. U are the eigenvectors
    of Σ Δ_i Δ_iᵀ, of all eigenvalues that do not count as 0.

    The paper merges adapters, whose task vectors have a few directions each; of full task vectors U turns all outputs.
    Its program keeps the largest elements of the whole model, has one weight for all, and merges nothing but weight
    matrices, whose biases are one more column.
    """
    outputs, models = piece.origin.shape[0], range(len(piece.tensors))
    gram_OO = piece.origin.new_zeros(outputs, outputs, dtype=FACTOR_DTYPE)
    for model in models:
        gram_OO += lower_gram(piece.task_vector(model).T)
    squares_O, vectors_OO = torch.linalg.eigh(gram_OO, UPLO="L")
    del gram_OO
    left_OR = vectors_OO[:, squares_O > SMALLEST_VALUE**2 * squares_O[-1]].to(torch.float32)
    del vectors_OO
    election = Election()
    for model in models:
        coordinates_RI = left_OR.T @ piece.task_vector(model)
        keep_largest_(coordinates_RI, num_kept(coordinates_RI, piece.per_model["density"][model]))
        election.add(coordinates_RI, piece.per_model["weight"][model])
        del coordinates_RI
    merged_RI = election.result(normalize=piece.shared["normalize"])
    del election
    merged_OI: torch.Tensor = left_OR @ merged_RI
    return merged_OI.mul_(piece.shared["lambda"]).add_(piece.origin)


def weighted_task_vectors(piece: Piece) -> torch.Tensor:
    """Computes W_0 + lambda · Σ w_i Δ_i, divided by Σ |w_i| if `normalize` is on: of tensors that are no matrices."""
    total = torch.zeros(piece.origin.shape, dtype=torch.float32, device=piece.origin.device)
    weights = piece.per_model["weight"]
    for model, weight in enumerate(weights):
        total.add_(piece.task_vector(model), alpha=weight)
    divisor = sum(map(abs, weights)) if piece.shared["normalize"] else 1.0
    divisor = divisor if divisor >= _SMALLEST_DIVISOR else 1.0
    return total.mul_(piece.shared["lambda"] / divisor).add_(piece.origin)


def dc_merge(piece: Piece) -> torch.Tensor:
    """Merges by directional consistency, DC-Merge: W_0 + alpha · Ũ (B ⊙ TIES(M_1 … M_K)) Ṽᵀ. arXiv 2603.06242.

    Of every task vector the R // K largest singular values and their vectors, U_i S_i V_iᵀ; then, as in TSV-M, Ũ and Ṽ,
    the nearest matrices with orthonormal columns to [U_1 … U_K] and [V_1 … V_K], and

        M_i = Ũᵀ U_i S_i V_iᵀ Ṽ  [R, R]

    of which the share of `select_topk` of largest elements is kept, and those that have the sign of their sum are
    averaged. B is 1 in the K blocks on the diagonal, where directions of one model meet, else 0.

    `smoothing` changes the S_i before: `avg` makes them all equal, `linear` lets them fall in a straight line, the
    largest `rho` times the smallest (or as much as it was, if that is less); their sum stays. The authors smooth
    adapters, and not what was fine-tuned as a whole. Numbers are those of their program.
    """
    rank = min(piece.origin.shape) // len(piece.tensors)
    found = [singular_vectors(piece.task_vector(model), rank) for model in range(len(piece.tensors))]
    left_OR, right_IR = (polar_factor(torch.cat([of[side] for of in found], dim=1))[0] for side in (0, 2))
    election, blocks, size = Election(), list[slice](), left_OR.shape[1]
    for own_left, values, own_right in found:
        smoothed = _smoothed(values, piece.shared["smoothing"], piece.shared["rho"]).to(torch.float32)
        inner_RR = (left_OR.T @ (own_left * smoothed)) @ (own_right.T @ right_IR)
        keep_largest_(inner_RR, max(1, int(piece.shared["select_topk"] * inner_RR.numel())))
        election.add(inner_RR)
        start = blocks[-1].stop if blocks else 0
        blocks.append(slice(start, start + len(values)))
    assert blocks[-1].stop == size, "every direction is some model's"
    del found
    merged_RR = election.result(normalize=True)
    turned = torch.cat([left_OR[:, block] @ merged_RR[block, block] for block in blocks], dim=1)
    return (turned @ right_IR.T).mul_(piece.shared["alpha"]).add_(piece.origin)


def _smoothed(values_R: torch.Tensor, smoothing: str, rho: float) -> torch.Tensor:
    """Spreads singular values, largest first, more evenly; their sum stays. See `dc_merge`."""
    if smoothing == "none" or len(values_R) == 0:
        return values_R
    ratio = 1.0 if smoothing == "avg" else min(rho, (values_R[0] / values_R[-1]).item())
    line_R = torch.linspace(ratio, 1.0, len(values_R), dtype=values_R.dtype, device=values_R.device)
    return line_R * (values_R.sum() / line_R.sum())


# TIES on whole matrices, on any device


class Election:
    """Adds up matrices, of every element those that have the sign of the weighted sum."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []  # of what is positive, of what is negative
        self._weights: list[torch.Tensor] = []  # of the models that these are of, without their signs

    def add(self, matrix: torch.Tensor, weight: float = 1.0) -> None:
        """Adds weight · matrix, which is changed in place."""
        if not self._sums:
            self._sums, self._weights = ([torch.zeros_like(matrix) for _ in range(2)] for _ in range(2))
        if weight != 1:
            matrix.mul_(weight)
        self._weights[0].add_(matrix > 0, alpha=abs(weight))
        self._weights[1].add_(matrix < 0, alpha=abs(weight))
        self._sums[0].add_(matrix.clamp(min=0))
        self._sums[1].add_(matrix.clamp_(max=0))

    def result(self, *, normalize: bool) -> torch.Tensor:
        """Returns the sums, divided by the sums of the weights' magnitudes if asked for; may be called once.

        Where no model agrees, nothing is divided; where the sum of all elements is 0, the result is.
        """
        positive, negative = self._sums
        total = positive + negative
        if normalize:
            for part, weights in zip(self._sums, self._weights, strict=True):
                part.div_(weights.add_(weights == 0))
        return positive.mul_(total > 0).add_(negative.mul_(total < 0))


def keep_largest_(matrix: torch.Tensor, count: int) -> None:
    """Sets all elements but some of the largest magnitudes to 0, in place; of equal ones all are kept."""
    if count >= matrix.numel():
        return
    if count <= 0:
        matrix.zero_()
        return
    smallest = matrix.abs().view(-1).kthvalue(matrix.numel() - count + 1).values
    matrix.mul_(matrix.abs() >= smallest)


def num_kept(matrix: torch.Tensor, density: float) -> int:
    """Counts the elements of a matrix that a density keeps: at least one, unless it is 0."""
    return max(1, int(density * matrix.numel())) if density > 0 else 0
