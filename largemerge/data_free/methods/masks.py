"""Methods that decide element by element what of the task vectors is kept: Consensus TA, Localize-and-Stitch, Fisher.

All of it is float32 whatever the checkpoint's dtype; Fisher's sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from largemerge.data_free.methods.base import Piece, Pieces
from largemerge.data_free.methods.exact_statistics import Band, keep_, largest, magnitudes
from largemerge.data_free.methods.svd import task_vector


def consensus_ta(piece: Piece) -> torch.Tensor:
    """Consensus Task Arithmetic with TALL masks: W_0 + scaling_factor · m Σ Δ_i. Wang et al., arXiv 2405.07813.

        m_i = 1 where |Δ_i| > λ_i |Σ Δ_j - Δ_i|, else 0         m = 1 where Σ m_i ≥ prun_thre_k, else 0

    λ_i is `tall_mask_lambda`: the authors choose it for every task from 0.2 … 0.6 by validation, FusionBench takes 0.6.
    `scaling_factor` they validate, too. `prun_thre_k: 2`, their default, drops what no task needs, or only one.
    """
    deltas = [task_vector(piece, model) for model in range(len(piece.tensors))]
    total = torch.zeros_like(deltas[0])
    for delta in deltas:
        total.add_(delta)
    votes = torch.zeros_like(total)
    for delta, limit in zip(deltas, piece.each["tall_mask_lambda"], strict=True):
        votes.add_(delta.abs() > (total - delta).abs_().mul_(limit))
    total.mul_(votes >= piece.options["prun_thre_k"])
    return total.mul_(piece.options["scaling_factor"]).add_(piece.origin)


def survey_largest(pieces: Pieces) -> list[Band]:
    """Which elements of every model's task vector are its largest: `sparsity` of them, at least one."""
    first = next(iter(pieces()))

    models = range(len(first.tensors))

    def deltas() -> Iterator[Iterator[torch.Tensor]]:
        return ((task_vector(piece, model) for model in models) for piece in pieces())

    return largest(deltas, first.num_elements, first.each["sparsity"])


def localize_and_stitch(bands: list[Band]) -> Callable[[Piece], torch.Tensor]:
    """Localize-and-Stitch without data: W_0 + Σ m_i Δ_i / Σ m_i, or W_0 where no mask is. He et al., arXiv 2408.13656.

    m_i is 1 for the largest |Δ_i|, a share of `sparsity` (the authors' word for what is kept, and their 0.05 for
    language models). They take these of the whole model's task vector, and leave embeddings as they were; here, as with
    `ties`, it is that share of every tensor. Of equal ones the first are kept.
    """
    keepers = [band.new() for band in bands]

    def merge(piece: Piece) -> torch.Tensor:
        total, count = None, None
        for model, keep in enumerate(keepers):
            delta = task_vector(piece, model)
            mask = keep(magnitudes(delta))
            kept = keep_(delta, mask)
            total = kept if total is None else total.add_(kept)
            count = mask.neg_() if count is None else count.sub_(mask)
        assert total is not None and count is not None, "there is at least one model"
        return total.div_(count.clamp_(min=1)).add_(piece.origin)

    return merge


def fisher(piece: Piece) -> torch.Tensor:
    """Fisher-weighted averaging: Σ c_i F_i W_i / Σ c_i F_i, element by element. Matena and Raffel, arXiv 2111.09832.

    F_i is the diagonal of model i's Fisher information, read from the tensors of the model's `fisher`; c_i is `weight`.
    Where Σ c_i F_i is 0: the weighted mean Σ c_i W_i / Σ c_i. Nothing is added to F_i and F_i is not normalised.

    Raises:
        FloatingPointError: If an F_i is negative or no number.
    """
    weighted, total = (torch.zeros_like(piece.tensors[0], dtype=torch.float64) for _ in range(2))
    mean = torch.zeros_like(weighted)
    weights = piece.each["weight"]
    for tensor, diagonal, weight in zip(piece.tensors, piece.companions, weights, strict=True):
        if not bool((diagonal >= 0).all()):
            raise FloatingPointError("a Fisher diagonal is negative or NaN; expected mean squares of gradients")
        share = diagonal.to(torch.float64).mul_(weight)
        weighted.addcmul_(share, tensor.to(torch.float64))
        total.add_(share)
        mean.add_(tensor, alpha=weight / sum(weights))
    return torch.where(total == 0, mean, weighted.div_(total)).to(torch.float32)
