"""Methods that choose or weigh element by element: Consensus TA, Localize-and-Stitch, Fisher averaging.

    consensus_ta           W_0 + λ · m Σ Δ_i                    m: elements that enough tasks need
    localize_and_stitch    W_0 + Σ m_i Δ_i / Σ m_i              m_i: the largest elements of Δ_i
    fisher                 Σ c_i F_i W_i / Σ c_i F_i            F_i: Fisher information, from files

All of it is float32 whatever the checkpoint's dtype; Fisher's sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from largemerge.data_free.methods.base import Piece, Pieces
from largemerge.data_free.methods.exact_statistics import MagnitudeRange, apply_mask_, largest, magnitude_bits


def consensus_ta(piece: Piece) -> torch.Tensor:
    """Merges by Consensus Task Arithmetic with TALL masks: W_0 + scaling_factor · m Σ Δ_i.

        m_i = 1 where |Δ_i| > λ_i |Σ Δ_j - Δ_i|, else 0         m = 1 where Σ m_i ≥ prun_thre_k, else 0

    Wang et al., arXiv 2405.07813. λ_i is `tall_mask_lambda`: the authors choose it for every task from 0.2 … 0.6 by
    validation, FusionBench takes 0.6. `scaling_factor` they validate, too. `prun_thre_k: 2`, their default, drops what
    no task needs, or only one.
    """
    deltas = [piece.task_vector(model) for model in range(len(piece.tensors))]
    total = torch.zeros_like(deltas[0])
    for delta in deltas:
        total.add_(delta)
    votes = torch.zeros_like(total)
    for delta, limit in zip(deltas, piece.per_model["tall_mask_lambda"], strict=True):
        votes.add_(delta.abs() > (total - delta).abs_().mul_(limit))
    total.mul_(votes >= piece.shared["prun_thre_k"])
    return total.mul_(piece.shared["scaling_factor"]).add_(piece.origin)


def find_largest(pieces: Pieces) -> list[MagnitudeRange]:
    """Finds the largest elements of every model's task vector: a share of `sparsity`, at least one."""
    first = next(iter(pieces()))
    models = range(len(first.tensors))

    def deltas() -> Iterator[Iterator[torch.Tensor]]:
        return ((piece.task_vector(model) for model in models) for piece in pieces())

    return largest(deltas, first.num_elements, first.per_model["sparsity"])


def localize_and_stitch(ranges: list[MagnitudeRange]) -> Callable[[Piece], torch.Tensor]:
    """Makes the merge of Localize-and-Stitch without data: W_0 + Σ m_i Δ_i / Σ m_i, or W_0 where no mask is.

    He et al., arXiv 2408.13656. m_i is 1 for the largest |Δ_i|, a share of `sparsity` (the authors' word for what is
    kept, and their 0.05 for language models). They take these of the whole model's task vector, and leave embeddings as
    they were; here, as with `ties`, it is that share of every tensor. Of equal ones the first are kept.

    Args:
        ranges: The kept elements of every model, from `find_largest`.
    """
    maskers = [kept.masker() for kept in ranges]

    def merge(piece: Piece) -> torch.Tensor:
        total, count = None, None
        for model, mask_piece in enumerate(maskers):
            delta = piece.task_vector(model)
            mask = mask_piece(magnitude_bits(delta))
            kept = apply_mask_(delta, mask)
            total = kept if total is None else total.add_(kept)
            count = mask.neg_() if count is None else count.sub_(mask)
        assert total is not None and count is not None, "there is at least one model"
        return total.div_(count.clamp_(min=1)).add_(piece.origin)

    return merge


def fisher(piece: Piece) -> torch.Tensor:
    """Merges by Fisher-weighted averaging: Σ c_i F_i W_i / Σ c_i F_i, element by element.

    Matena and Raffel, arXiv 2111.09832. F_i is the diagonal of model i's Fisher information, read from the tensors of
    the model's `fisher`; c_i is `weight`. Where Σ c_i F_i is 0: the weighted mean Σ c_i W_i / Σ c_i. Nothing is added
    to F_i and F_i is not normalised.

    Raises:
        FloatingPointError: If an F_i is negative, infinite or no number.
    """
    weighted, total = (torch.zeros_like(piece.tensors[0], dtype=torch.float64) for _ in range(2))
    mean = torch.zeros_like(weighted)
    weights = piece.per_model["weight"]
    for tensor, diagonal, weight in zip(piece.tensors, piece.auxiliary, weights, strict=True):
        if not bool(((diagonal >= 0) & (diagonal < torch.inf)).all()):
            raise FloatingPointError(
                "a Fisher diagonal is infinite, negative or NaN; expected mean squares of gradients"
            )
        share = diagonal.to(torch.float64).mul_(weight)
        weighted.addcmul_(share, tensor.to(torch.float64))
        total.add_(share)
        mean.add_(tensor, alpha=weight / sum(weights))
    return torch.where(total == 0, mean, weighted.div_(total)).to(torch.float32)
