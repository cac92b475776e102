"""LoRA adapters of one base merged by their factors: no weight, and no ΔW, is ever made.

    ΔW_i = s_i B_i A_i      B_i `[O, r_i]`, A_i `[r_i, I]`, s_i = alpha / r, or alpha / √r for rsLoRA
    target  Σ w_i ΔW_i      of which `cat` is all, `svd` the best of a rank, and the others are something else

`knots` is the method of that name of `largemerge merge` (`data_free/methods/coordinates.py`), whose matrices here have
a rank of M at most, so that all of it but TIES itself is done on `[M, M]`.

`linear` and `ties` are those of peft's `add_weighted_adapter` (huggingface.co/docs/peft, model merging), which merges A
and B each on its own: Σ A · Σ B has products of one adapter's A with another's B, too. The error of each against the
weighted sum is measured, from factors alone:

    ‖P Q‖ = ‖R_P R_Qᵀ‖      P = [B, -w_1 s_1 B_1, …] = U R_P,  Qᵀ = [A; A_1; …]ᵀ = V R_Q

Where adapters have gains (DoRA, `dora.py`), these are merged by the same method, each row's change g_i - 1 on its own.

Shapes: O outputs, I inputs, r rank, M = Σ r_i. All sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from largemerge.data_free.methods.coordinates import Election, keep_largest_, num_kept

FACTOR_DTYPE = torch.float64
"""The precision of all sums here."""

_SMALLEST_VALUE = 1e-6
"""Of the largest singular value: smaller ones count as 0 in KnOTS, as where it merges models."""


@dataclass(frozen=True)
class Scaled:
    """The factors of one adapter for one module, and what multiplies them.

    Attributes:
        down: A `[r, I]`, float64.
        up: B `[O, r]`, float64.
        scale: s.
        weight: w.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    weight: float = 1.0

    @property
    def factor(self) -> float:
        """Factor of its B A in the weighted sum, w · s."""
        return self.weight * self.scale


Product = tuple[torch.Tensor, torch.Tensor]
"""A and B of a merged module, float64."""


def cat(parts: Sequence[Scaled], _: Mapping[str, Any]) -> Product:
    """Concatenates: A = [A_1; …; A_K], B = [w_1 s_1 B_1, …, w_K s_K B_K], so that B A = Σ w_i ΔW_i exactly."""
    down = torch.cat([part.down for part in parts])
    return down, torch.cat([part.up * part.factor for part in parts], dim=1)


def knots(parts: Sequence[Scaled], parameters: Mapping[str, Any]) -> Product:
    """Merges by KnOTS: B = U, A = lambda · TIES(UᵀΔW_1 … UᵀΔW_K). Stoica et al., arXiv 2410.19735.

        [ΔW_1 | … | ΔW_K] = U S [V_1ᵀ | … | V_Kᵀ]     UᵀΔW_i = S V_iᵀ  [R, I], R ≤ M

    TIES keeps the `density` of largest elements of every UᵀΔW_i, weighs them, and adds up those that have the sign of
    their sum, divided by Σ |w_i| over these if `normalize` is on. U comes from factors alone:

        [s_1 B_1, …, s_K B_K] = Q [R_1, …, R_K]       A_iᵀ = P_i T_i       ΔW_i = Q (R_i T_iᵀ) P_iᵀ
        U = Q W,  W the left singular vectors of [R_1 T_1ᵀ, …, R_K T_Kᵀ]  [M, M]

    Of an embedding, the inputs are tokens. Directions whose singular value is below a millionth of the largest are
    left out, and where the weighted sum is 0, nothing is added.
    """
    basis_OM, cores_MM = torch.linalg.qr(torch.cat([part.up * part.scale for part in parts], dim=1))
    cores = cores_MM.split([part.up.shape[1] for part in parts], dim=1)
    triangles = [torch.linalg.qr(part.down.T, mode="r").R for part in parts]
    inner = torch.cat([core @ triangle.T for core, triangle in zip(cores, triangles, strict=True)], dim=1)
    left_MR, values_R, _ = torch.linalg.svd(inner, full_matrices=False)
    left_MR = left_MR[:, values_R > _SMALLEST_VALUE * values_R[0]]
    election = Election()
    for part, core in zip(parts, cores, strict=True):
        coordinates_RI = (left_MR.T @ core) @ part.down
        keep_largest_(coordinates_RI, num_kept(coordinates_RI, parameters["density"]))
        election.add(coordinates_RI, part.weight)
    merged_RI = election.result(normalize=parameters["normalize"])
    return merged_RI * parameters["lambda"], basis_OM @ left_MR


def linear(parts: Sequence[Scaled], _: Mapping[str, Any]) -> Product:
    """Sums A and B each on its own: A = Σ ±√|w s| A_i, B = Σ √|w s| B_i, the sign of w s in A; not the sum of ΔW."""
    roots = [math.sqrt(abs(part.factor)) for part in parts]
    down = sum(math.copysign(root, part.factor) * part.down for root, part in zip(roots, parts, strict=True))
    up = sum(root * part.up for root, part in zip(roots, parts, strict=True))
    assert isinstance(down, torch.Tensor) and isinstance(up, torch.Tensor), "at least one part"
    return down, up


def ties(parts: Sequence[Scaled], parameters: Mapping[str, Any]) -> Product:
    """Merges A and B each by TIES (Yadav et al., arXiv 2306.01708) on its own, with the weights of `linear`.

    Of each factor the `density` largest elements are kept; the sign of their sum is elected, 0 counting as plus; those
    that agree with it are weighted, added up, and divided by their number.
    """
    roots = [math.sqrt(abs(part.factor)) for part in parts]
    signed = [math.copysign(root, part.factor) for root, part in zip(roots, parts, strict=True)]
    density = parameters["density"]
    return (
        _elect([part.down for part in parts], signed, density),
        _elect([part.up for part in parts], roots, density),
    )


def _elect(tensors: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    kept = torch.stack([_largest(tensor, density) for tensor in tensors])
    elected = torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0)
    agree = kept.sign() == elected
    weighted = kept * torch.tensor(weights, dtype=kept.dtype).view(-1, *(1 for _ in tensors[0].shape))
    return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keeps the `density` largest elements of a tensor by magnitude; the others become 0."""
    count = int(density * tensor.numel())
    kept = torch.zeros_like(tensor).view(-1)
    places = tensor.abs().reshape(-1).topk(count).indices
    kept[places] = tensor.reshape(-1)[places]
    return kept.view(tensor.shape)


def sum_of_changes(changes: Sequence[torch.Tensor], weights: Sequence[float], _: Mapping[str, Any]) -> torch.Tensor:
    """Sums changes of gains, Σ w_i (g_i - 1)."""
    return torch.stack([weight * change for weight, change in zip(weights, changes, strict=True)]).sum(dim=0)


def _ties_of_changes(
    changes: Sequence[torch.Tensor], weights: Sequence[float], parameters: Mapping[str, Any]
) -> torch.Tensor:
    """Merges changes of gains by TIES, as `ties` merges each factor."""
    return _elect(changes, weights, parameters["density"])


def _knots_of_changes(
    changes: Sequence[torch.Tensor], weights: Sequence[float], parameters: Mapping[str, Any]
) -> torch.Tensor:
    """Merges changes of gains by TIES, as `knots` merges coordinates."""
    election = Election()
    for change, weight in zip(changes, weights, strict=True):
        kept = change.clone()
        keep_largest_(kept, num_kept(kept, parameters["density"]))
        election.add(kept, weight)
    merged: torch.Tensor = election.result(normalize=parameters["normalize"]) * parameters["lambda"]
    return merged


@dataclass(frozen=True)
class FactorMethod:
    """A way to merge factors.

    Attributes:
        merge: Makes A and B of the parts of one module and the parameters, of whatever rank.
        merge_changes: Makes one of the changes of gains of DoRA, g_i - 1 `[O]`, by the weights and the parameters.
        same_ranks: Whether all adapters must have the same rank in a module.
        parameters: Parameters that it takes, with their defaults; what is merged is cut to `rank` where it takes one.
        title: What comes out, in words.
    """

    merge: Callable[[Sequence[Scaled], Mapping[str, Any]], Product]
    merge_changes: Callable[[Sequence[torch.Tensor], Sequence[float], Mapping[str, Any]], torch.Tensor]
    same_ranks: bool
    parameters: Mapping[str, Any]
    title: str


METHODS = {
    "cat": FactorMethod(cat, sum_of_changes, False, {}, "the weighted sum, exactly; its rank is the sum of ranks"),
    "svd": FactorMethod(cat, sum_of_changes, False, {"rank": None}, "the best of a rank to the weighted sum"),
    "linear": FactorMethod(linear, sum_of_changes, True, {}, "peft's linear: A and B summed on their own"),
    "ties": FactorMethod(ties, _ties_of_changes, True, {"density": 0.5}, "peft's ties: A and B merged on their own"),
    "knots": FactorMethod(
        knots,
        _knots_of_changes,
        False,
        {"rank": None, "density": 1.0, "normalize": True, "lambda": 1.0},
        "KnOTS with TIES: signs elected in the directions that all adapters share",
    ),
}


def merged_rank(method: str, ranks: Sequence[int], wanted: int | None, sides: tuple[int, int]) -> int:
    """Returns the rank of a merged module.

    Args:
        method: Name of the method.
        ranks: Ranks of the adapters in this module.
        wanted: The rank that the user asks for; `None`: the largest of the adapters' for `svd`, all of it for `knots`.
        sides: O and I.
    """
    if method == "cat":
        return sum(ranks)
    if METHODS[method].same_ranks:
        return ranks[0]
    whole = min(sum(ranks), *sides)
    return min(wanted or (max(ranks) if method == "svd" else whole), whole)


@dataclass(frozen=True)
class MergedFactors:
    """A and B of a merged module, and how much of the merge its rank keeps.

    Attributes:
        down: A `[r, I]`, float64.
        up: B `[O, r]`, float64.
        kept_square: ‖B A‖².
        square: The same before it was cut to its rank.
        squares: Squares of its singular values before, largest first; empty where the method cuts nothing.
    """

    down: torch.Tensor
    up: torch.Tensor
    kept_square: float
    square: float
    squares: tuple[float, ...] = ()


def merge_factors(method: str, parts: Sequence[Scaled], rank: int, parameters: Mapping[str, Any]) -> MergedFactors:
    """Merges the factors of one module.

    Args:
        method: Name of the method.
        parts: The adapters that have the module.
        rank: Rank of the result, as by `merged_rank`.
        parameters: All parameters of the method.
    """
    down, up = METHODS[method].merge(parts, parameters)
    if "rank" in METHODS[method].parameters:
        return best_of_rank(down, up, rank)
    square = _squared_norm(up, down)
    return MergedFactors(down, up, square, square)


def best_of_rank(down: torch.Tensor, up: torch.Tensor, rank: int) -> MergedFactors:
    """Computes the best matrix of a rank to B A, by the SVD of R_B R_Aᵀ: B = Q_B R_B, Aᵀ = Q_A R_A.

    Each factor has the square roots of the singular values; beyond the rank of B A they are 0.
    """
    left, core_B = torch.linalg.qr(up)
    right, core_A = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(core_B @ core_A.T, full_matrices=False)
    count = min(rank, len(s))
    root = s[:count].sqrt()
    cut_down, cut_up = down.new_zeros(rank, down.shape[1]), up.new_zeros(up.shape[0], rank)
    cut_down[:count] = (vh[:count] * root[:, None]) @ right.T
    cut_up[:, :count] = left @ (u[:, :count] * root)
    squares = s.square()
    kept, whole = squares[:count].sum().item(), squares.sum().item()
    return MergedFactors(cut_down, cut_up, kept, whole, tuple(squares.tolist()))


def squared_error(product: Product, parts: Sequence[Scaled]) -> tuple[float, float]:
    """Computes ‖B A - Σ w_i ΔW_i‖² and ‖Σ w_i ΔW_i‖² from factors alone."""
    down, up = cat(parts, {})
    wanted = _squared_norm(up, down)
    return _squared_norm(torch.cat([product[1], -up], dim=1), torch.cat([product[0], down])), wanted


def _squared_norm(left_OM: torch.Tensor, right_MI: torch.Tensor) -> float:
    """Computes ‖P Q‖² by the triangular factors of P and Qᵀ, whose digits a Gram matrix would halve."""
    core_P, core_Q = torch.linalg.qr(left_OM, mode="r").R, torch.linalg.qr(right_MI.T, mode="r").R
    square: float = torch.linalg.matrix_norm(core_P @ core_Q.T).item() ** 2
    return square
