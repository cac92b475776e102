"""LoRA adapters of one base merged by their factors: no weight, and no ΔW, is ever made.

    ΔW_i = s_i B_i A_i      B_i `[O, r_i]`, A_i `[r_i, I]`, s_i = alpha / r, or alpha / √r for rsLoRA
    target  Σ w_i ΔW_i      of which `cat` is all, `svd` the best of a rank, and `linear` and `ties` something else

`linear` and `ties` are those of peft's `add_weighted_adapter` (huggingface.co/docs/peft, model merging), which merges A
and B each on its own: Σ A · Σ B has products of one adapter's A with another's B, too. The error of each against the
weighted sum is measured, from factors alone:

    ‖P Q‖ = ‖R_P R_Qᵀ‖      P = [B, -w_1 s_1 B_1, …] = U R_P,  Qᵀ = [A; A_1; …]ᵀ = V R_Q

Shapes: O outputs, I inputs, r rank, M = Σ r_i. All sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FACTOR_DTYPE = torch.float64
"""The precision of all sums here."""


@dataclass(frozen=True)
class Scaled:
    """The factors of one adapter for one module, and what multiplies them.

    Attributes:
        down: A `[r, I]`, float64.
        up: B `[O, r]`, float64.
        factor: w · s.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float


Product = tuple[torch.Tensor, torch.Tensor]
"""A and B of a merged module, float64."""


def cat(parts: Sequence[Scaled], rank: int, density: float) -> Product:
    """Concatenates: A = [A_1; …; A_K], B = [w_1 s_1 B_1, …, w_K s_K B_K], so that B A = Σ w_i ΔW_i exactly."""
    down = torch.cat([part.down for part in parts])
    return down, torch.cat([part.up * part.factor for part in parts], dim=1)


def svd(parts: Sequence[Scaled], rank: int, density: float) -> Product:
    """Computes the best matrix of a rank to Σ w_i ΔW_i, by the SVD of R_B R_Aᵀ `[M, M]`: B = Q_B R_B, Aᵀ = Q_A R_A."""
    down, up = cat(parts, rank, density)
    left_OM, core_B = torch.linalg.qr(up)
    right_IM, core_A = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(core_B @ core_A.T, full_matrices=False)
    root = s[:rank].sqrt()
    return (vh[:rank] * root[:, None]) @ right_IM.T, left_OM @ (u[:, :rank] * root)


def linear(parts: Sequence[Scaled], rank: int, density: float) -> Product:
    """Sums A and B each on its own: A = Σ ±√|w s| A_i, B = Σ √|w s| B_i, the sign of w s in A; not the sum of ΔW."""
    roots = [math.sqrt(abs(part.factor)) for part in parts]
    down = sum(math.copysign(root, part.factor) * part.down for root, part in zip(roots, parts, strict=True))
    up = sum(root * part.up for root, part in zip(roots, parts, strict=True))
    assert isinstance(down, torch.Tensor) and isinstance(up, torch.Tensor), "at least one part"
    return down, up


def ties(parts: Sequence[Scaled], rank: int, density: float) -> Product:
    """Merges A and B each by TIES (Yadav et al., arXiv 2306.01708) on its own, with the weights of `linear`.

    Of each factor the `density` largest elements are kept; the sign of their sum is elected, 0 counting as plus; those
    that agree with it are weighted, added up, and divided by their number.
    """
    roots = [math.sqrt(abs(part.factor)) for part in parts]
    signed = [math.copysign(root, part.factor) for root, part in zip(roots, parts, strict=True)]
    return (
        _elect([part.down for part in parts], signed, density),
        _elect([part.up for part in parts], roots, density),
    )


def _elect(tensors: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    kept = torch.stack([_largest(tensor, density) for tensor in tensors])
    elected = torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0)
    agree = kept.sign() == elected
    weighted = kept * torch.tensor(weights, dtype=kept.dtype).view(-1, 1, 1)
    return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keeps the `density` largest elements of a tensor by magnitude; the others become 0."""
    count = int(density * tensor.numel())
    kept = torch.zeros_like(tensor).view(-1)
    places = tensor.abs().reshape(-1).topk(count).indices
    kept[places] = tensor.reshape(-1)[places]
    return kept.view(tensor.shape)


@dataclass(frozen=True)
class FactorMethod:
    """A way to merge factors.

    Attributes:
        merge: Makes A and B of the parts of one module, given the rank and density that the user asks for.
        same_ranks: Whether all adapters must have the same rank in a module.
        parameters: Those of `rank` and `density` that it takes.
        title: What comes out, in words.
    """

    merge: Callable[[Sequence[Scaled], int, float], Product]
    same_ranks: bool
    parameters: tuple[str, ...]
    title: str


METHODS = {
    "cat": FactorMethod(cat, False, (), "the weighted sum, exactly; its rank is the sum of ranks"),
    "svd": FactorMethod(svd, False, ("rank",), "the best of a rank to the weighted sum"),
    "linear": FactorMethod(linear, True, (), "peft's linear: A and B summed on their own"),
    "ties": FactorMethod(ties, True, ("density",), "peft's ties: A and B merged on their own"),
}


def merged_rank(method: str, ranks: Sequence[int], wanted: int | None, sides: tuple[int, int]) -> int:
    """Returns the rank of a merged module.

    Args:
        method: Name of the method.
        ranks: Ranks of the adapters in this module.
        wanted: The rank that the user asks for; `None`: the largest of the adapters'.
        sides: O and I.
    """
    if method == "cat":
        return sum(ranks)
    if method == "svd":
        return min(wanted or max(ranks), sum(ranks), *sides)
    return ranks[0]


def squared_error(product: Product, parts: Sequence[Scaled]) -> tuple[float, float]:
    """Computes ‖B A - Σ w_i ΔW_i‖² and ‖Σ w_i ΔW_i‖² from factors alone."""
    down, up = cat(parts, 0, 1.0)
    wanted = _squared_norm(up, down)
    return _squared_norm(torch.cat([product[1], -up], dim=1), torch.cat([product[0], down])), wanted


def _squared_norm(left_OM: torch.Tensor, right_MI: torch.Tensor) -> float:
    """Computes ‖P Q‖² by the triangular factors of P and Qᵀ, whose digits a Gram matrix would halve."""
    core_P, core_Q = torch.linalg.qr(left_OM, mode="r").R, torch.linalg.qr(right_MI.T, mode="r").R
    square: float = torch.linalg.matrix_norm(core_P @ core_Q.T).item() ** 2
    return square
