"""Rows of the input embedding, weighted by how often each candidate's data has their tokens.

    E(t) = ( κ · Ē(t) + Σ_i n_i(t) · E_i(t) ) / ( κ + Σ_i n_i(t) )       n_i(t) = K · N · c_i / Σ c · f_i(t)

An embedding is a linear whose input is zero but for a one in the place of the token: its Gram matrix is diagonal, the
numbers of times that tokens occur, and its regression is this mean, with κ for a ridge. Ē is the average; a token that
no data has keeps it. f_i(t) is the token's share of candidate i's data, and N the mean number of tokens of a
candidate's data, so that who has more of it counts no more than c_i says.

    calibration data ──► count_tokens ──► TokenCounts ──► average_by_token, row by row, disk to disk
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from largemerge.calibration import CalibrationSet
from largemerge.model.skeleton import Skeleton
from largemerge.regression.averages import AVERAGE_CHUNK_BYTES, rows_of_models
from largemerge.regression.config import MergeConfig
from largemerge.regression.gram import GRAM_DTYPE
from largemerge.regression.tensor_plan import HeadPlan, TensorPlan
from largemerge.regression.tokens import not_padding
from largemerge.regression.weights import Weights


@dataclass(frozen=True)
class TokenCounts:
    """How often tokens occur.

    Attributes:
        tokens: Tokens that occur at all, as ids of the output, in order `[T]`.
        counts_KT: n_i(t), by candidate `[K, T]`.
    """

    tokens: torch.Tensor
    counts_KT: torch.Tensor

    def of_rows(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that are some rows of an embedding, by their place among these, and their counts `[K, T]`."""
        first, last = torch.searchsorted(self.tokens, torch.tensor([rows.start, rows.stop])).tolist()
        return self.tokens[first:last] - rows.start, self.counts_KT[:, first:last]


def count_tokens(
    calibration: Sequence[CalibrationSet], shares: Sequence[float], num_rows: int, arguments: Collection[str]
) -> TokenCounts:
    """Counts the tokens of all candidates' data, padding left out.

    Args:
        calibration: The data of all candidates, in ids of the output.
        shares: c_i / Σ c, by candidate.
        num_rows: Number of rows of the embedding; ids beyond stand for tokens that the output lacks.
        arguments: Forward arguments whose tokens are looked up in it.
    """
    counts_KV = torch.zeros(len(calibration), num_rows, dtype=torch.float64)
    for data, counts_V in zip(calibration, counts_KV, strict=True):
        for batch in data.batches:
            for name in (name for name in batch.inputs if name in arguments):
                ids = batch.inputs[name][not_padding(batch.inputs, name)]
                counts_V += torch.bincount(ids[ids < num_rows], minlength=num_rows)
    totals_K = counts_KV.sum(1)
    scales_K = torch.tensor(shares, dtype=torch.float64) * totals_K.sum() / totals_K.clamp(min=1)
    counts_KV *= scales_K[:, None]
    tokens = counts_KV.sum(0).nonzero()[:, 0]
    return TokenCounts(tokens, counts_KV[:, tokens].to(GRAM_DTYPE))


def arguments_of(skeleton: Skeleton, name: str) -> tuple[str, ...]:
    """Lists the forward arguments whose tokens are looked up in an input embedding: a decoder may have its own."""
    decoder = any("decoder" in alias.split(".")[:-1] for alias in skeleton.aliases.get(name, (name,)))
    return ("input_ids", "decoder_input_ids") if decoder else ("input_ids",)


def embedding_notes(config: MergeConfig, skeleton: Skeleton, embedding: TensorPlan | None) -> Iterator[str]:
    """Yields a note where a decoder has an embedding of its own, which is averaged."""
    encodes_too = skeleton.model.config.is_encoder_decoder
    if embedding is not None and encodes_too and len(arguments_of(skeleton, embedding.name)) == 1:
        yield (
            f"solve: embeddings: {embedding.name} is averaged by its tokens; the decoder's own embedding is averaged "
            "plainly"
        )


def average_by_token(
    plan: TensorPlan, weights: Weights, shares: Sequence[float], counts: TokenCounts, prior: float
) -> None:
    """Writes an embedding whose rows are averaged by how often their tokens occur; called on rank 0 alone.

    Args:
        plan: Plan of the embedding.
        weights: Reads candidates, writes the output.
        shares: c_i / Σ c, by candidate.
        counts: n_i(t).
        prior: κ, the number of tokens that the average counts for.
    """
    rows = rows_of_models(plan.name, plan.dtype, weights, with_base=False)
    num_columns = weights.inputs.skeleton.model.get_parameter(plan.name).shape[1]
    for panel in rows.panels(AVERAGE_CHUNK_BYTES // (GRAM_DTYPE.itemsize * num_columns)):
        first_RD, *others = (tensor.to("cpu", GRAM_DTYPE) for tensor in rows.read(panel))
        places_T, counts_KT = counts.of_rows(panel)
        factors_KT = counts_KT / (counts_KT.sum(0) + prior)
        average_RD = torch.zeros_like(first_RD)
        counted_TD = torch.zeros(len(places_T), num_columns, dtype=GRAM_DTYPE)
        for share, factors_T, own_RD in zip(shares[1:], factors_KT[1:], others, strict=True):
            difference_RD = own_RD - first_RD  # so that identical candidates give themselves back
            average_RD.add_(difference_RD, alpha=share)
            counted_TD.addcmul_(factors_T[:, None], difference_RD[places_T])
        kept_T = 1 - factors_KT.sum(0)
        average_RD[places_T] = average_RD[places_T].mul_(kept_T[:, None]).add_(counted_TD)
        rows.write(average_RD.add_(first_RD).to(plan.dtype), panel)


def embedding_problems(config: MergeConfig, head: HeadPlan, embedding: TensorPlan | None) -> Iterator[str]:
    """Yields what keeps the input embedding from being averaged by its tokens, where the user wants that.

    Args:
        config: The configuration.
        head: The plan of the head.
        embedding: The plan of the embedding; `None` where the model has none, or not all candidates.
    """
    if not config.method.counts_tokens:
        return
    if embedding is None:
        yield (
            "parameters.solve: embeddings: expected a model with one embedding of tokens (get_input_embeddings of its "
            "class), which all candidates have, and which include and exclude leave; found none"
        )
    if head.tied is not None:
        yield (
            "parameters.solve: names 'head' and 'embeddings', which are one matrix here (they are tied); expected one "
            "of them"
        )
    without = [each.label for each in config.candidates if not each.has_samples]
    if without:
        yield (
            f"parameters.solve: embeddings: counts the tokens of every model's data, which {', '.join(without)} "
            "has not here; expected 'solve' without it, or 'data' for every model"
        )
