"""The calibration data of all candidates: outlined, read, shared out among ranks.

Whether the samples fit the model, found out before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from largemerge.calibration import ModelNeeds
from largemerge.calibration.batches import Batch, CalibrationSet
from largemerge.calibration.config import CalibrationConfig
from largemerge.calibration.tokenizer import shared_tokenizers
from largemerge.distributed.partition import Shares, share_out
from largemerge.distributed.ranks import Ranks
from largemerge.errors import CalibrationError
from largemerge.model.block_runner import count_rows
from largemerge.model.forward import resumed_at
from largemerge.model.skeleton import Skeleton, poison_outside
from largemerge.model.trace import Rehearsal
from largemerge.regression.config import MergeConfig
from largemerge.regression.inputs import Inputs
from largemerge.regression.planning.cost import batch_costs
from largemerge.regression.tensor_plan import BlockPlan

Result = TypeVar("Result")
Read = TypeVar("Read", covariant=True)


class ReadCalibration(Protocol[Read]):
    """`outline_calibration` or `load_calibration`."""

    def __call__(
        self,
        config: CalibrationConfig,
        name: str,
        checkpoint: Path,
        needs: ModelNeeds,
        *,
        base: Path | None = None,
        trust_remote_code: bool = False,
    ) -> Read:
        """Reads one candidate's data, or says how large it is."""


def model_needs(skeleton: Skeleton) -> ModelNeeds:
    """What calibration data must know of the model class."""
    config = skeleton.model.config
    return ModelNeeds(
        forward_arguments=skeleton.forward_arguments(),
        is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        pad_token_id=getattr(config, "pad_token_id", None),
    )


def loss_tokens(needs: ModelNeeds) -> str:
    """The input that loss masks belong to."""
    return "decoder_input_ids" if needs.is_encoder_decoder else "input_ids"


def for_every_candidate(
    config: MergeConfig,
    inputs: Inputs,
    read: ReadCalibration[Result],
    keep: Callable[[Result], Result] | None = None,
) -> tuple[Result, ...]:
    """Outlines or reads the calibration data of all candidates.

    Args:
        config: From `load_config`.
        inputs: From `open_inputs`.
        read: `outline_calibration` or `load_calibration`.
        keep: What to do with each candidate's before the next one's is read.

    Raises:
        CalibrationError: With the problems of all candidates.
    """
    needs = model_needs(inputs.skeleton)
    base = inputs.base.folder if inputs.base is not None else None
    results: list[Result] = []
    problems: list[str] = []
    with shared_tokenizers():
        for candidate, checkpoint in zip(config.models, inputs.candidates, strict=True):
            assert candidate.calibration is not None
            try:
                result = read(
                    candidate.calibration,
                    checkpoint.name,
                    checkpoint.folder,
                    needs,
                    base=base,
                    trust_remote_code=config.trust_remote_code,
                )
                results.append(result if keep is None else keep(result))
            except CalibrationError as error:
                problems.extend(error.problems)
    if problems:
        raise CalibrationError(*problems)
    return tuple(results)


@dataclass(frozen=True)
class OwnSamples:
    """A rank's part of everybody's calibration data.

    Attributes:
        calibration: By candidate; some may be without batches.
        row_counts: By candidate and stack: rows that count, on all ranks together.
        own_row_counts: Those of them that this rank has.
        shares: Who has what.
    """

    calibration: tuple[CalibrationSet, ...]
    row_counts: tuple[tuple[int, ...], ...]
    own_row_counts: tuple[tuple[int, ...], ...]
    shares: Shares


def share_samples(
    calibration: Sequence[CalibrationSet],
    blocks: Sequence[BlockPlan],
    rehearsal: Rehearsal,
    counted_input: str,
    ranks: Ranks,
) -> OwnSamples:
    """Gives every rank its part, so that all have about the same to do.

    Args:
        calibration: Of all candidates, the same on every rank.
        blocks: Of the model; they say what a token costs.
        rehearsal: Says which tokens count.
        counted_input: From `loss_tokens`.
        ranks: That share the merge.
    """
    rows = [
        [[count_rows(batch, stack, counted_input) for stack in rehearsal.stacks] for batch in data.batches]
        for data in calibration
    ]
    costs, right_hand_sides = batch_costs(blocks, [[sum(counts) for counts in batches] for batches in rows])
    shares = share_out(costs, ranks.size, right_hand_sides)
    own = shares.batches[ranks.rank]
    return OwnSamples(
        calibration=tuple(
            replace(data, batches=tuple(data.batches[number] for number in numbers))
            for data, numbers in zip(calibration, own, strict=True)
        ),
        row_counts=tuple(tuple(map(sum, zip(*batches, strict=True))) for batches in rows),
        own_row_counts=tuple(
            tuple(sum(batches[number][stack] for number in numbers) for stack in range(len(rehearsal.stacks)))
            for batches, numbers in zip(rows, own, strict=True)
        ),
        shares=shares,
    )


def sample_problems(skeleton: Skeleton, rehearsal: Rehearsal, calibration: Sequence[CalibrationSet]) -> list[str]:
    """Token ids beyond the vocabulary, sequences longer than the model's position embeddings, and the like.

    Every batch is run up to the first block, with embeddings that cost no memory.
    """
    vocabulary: int | None = getattr(skeleton.model.config.get_text_config(), "vocab_size", None)
    problems = []
    poison_outside(skeleton, torch.device("cpu"))
    with resumed_at(skeleton, rehearsal.order[0], 0) as run:
        for data in calibration:
            found = list(_id_problems(data, vocabulary)) if vocabulary is not None else []
            for batch in () if found else data.batches:
                try:
                    run(_cast(batch, skeleton.dtype), {}, lambda *args, **kwargs: None)
                except (IndexError, RuntimeError, ValueError) as error:
                    found.append(_explained(skeleton, batch, error))
                    break
            problems += [f"candidate {data.name!r}: {problem}" for problem in found]
    return problems


def _id_problems(data: CalibrationSet, vocabulary: int) -> Iterator[str]:
    names = sorted({name for batch in data.batches for name in batch.inputs if name.endswith("input_ids")})
    for name in names:
        ids = [batch.inputs[name] for batch in data.batches if batch.inputs[name].numel()]
        lowest, highest = min(int(each.min()) for each in ids), max(int(each.max()) for each in ids)
        if lowest < 0 or highest >= vocabulary:
            yield (
                f"{name} holds token ids from {lowest} to {highest}; expected 0 to {vocabulary - 1}, "
                f"for the model's vocab_size is {vocabulary}. Is it another model's tokenizer?"
            )


def _cast(batch: Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}


def _explained(skeleton: Skeleton, batch: Batch, error: Exception) -> str:
    shapes = {name: list(tensor.shape) for name, tensor in batch.inputs.items()}
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    limit = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    hint = f"; the config allows {limit} positions: lower max_length" if limit is not None else ""
    return f"the model cannot be run on a batch of shapes {shapes}: {reason}{hint}"
