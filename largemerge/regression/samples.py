"""The calibration data of all candidates: outlined, read, shared out among ranks.

Whether the samples fit the model, found out before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from largemerge.calibration import ForwardSignature
from largemerge.calibration.batches import Batch, CalibrationSet
from largemerge.calibration.config import CalibrationConfig
from largemerge.calibration.tokenizer import shared_tokenizers
from largemerge.checkpoint.tensor_info import Tensors
from largemerge.distributed.partition import Partition, partition_batches
from largemerge.distributed.ranks import Ranks
from largemerge.errors import CalibrationError
from largemerge.model.block_runner import BlockId, BlockRunner, OnInput, count_valid_rows
from largemerge.model.forward import resumed_at
from largemerge.model.hidden_states import HiddenStates
from largemerge.model.skeleton import Skeleton, fill_with_nan
from largemerge.model.trace import ModelTrace
from largemerge.regression.config import MergeConfig
from largemerge.regression.inputs import Inputs
from largemerge.regression.methods import Stream
from largemerge.regression.planning.ranks import batch_costs
from largemerge.regression.tensor_plan import BlockPlan
from largemerge.regression.weights import MERGED

Result = TypeVar("Result")
Read = TypeVar("Read", covariant=True)


class ReadCalibration(Protocol[Read]):
    """`outline_calibration` or `load_calibration`."""

    def __call__(
        self,
        config: CalibrationConfig,
        name: str,
        checkpoint: Path,
        signature: ForwardSignature,
        *,
        base: Path | None = None,
        trust_remote_code: bool = False,
    ) -> Read:
        """Reads one candidate's data, or says how large it is."""


def forward_signature(skeleton: Skeleton) -> ForwardSignature:
    """What calibration data must know of the model class."""
    config = skeleton.model.config
    return ForwardSignature(
        forward_arguments=skeleton.forward_arguments(),
        is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        pad_token_id=getattr(config, "pad_token_id", None),
    )


def loss_input(signature: ForwardSignature) -> str:
    """The input that loss masks belong to."""
    return "decoder_input_ids" if signature.is_encoder_decoder else "input_ids"


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
    signature = forward_signature(inputs.skeleton)
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
                    signature,
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
    shares: Partition


def share_samples(
    calibration: Sequence[CalibrationSet],
    blocks: Sequence[BlockPlan],
    trace: ModelTrace,
    loss_input: str,
    ranks: Ranks,
) -> OwnSamples:
    """Gives every rank its part, so that all have about the same to do.

    Args:
        calibration: Of all candidates, the same on every rank.
        blocks: Of the model; they say what a token costs.
        trace: Says which tokens count.
        loss_input: From `loss_tokens`.
        ranks: That share the merge.
    """
    rows = [
        [[count_valid_rows(batch, stack, loss_input) for stack in trace.stacks] for batch in data.batches]
        for data in calibration
    ]
    costs, right_hand_sides = batch_costs(blocks, [[sum(counts) for counts in batches] for batches in rows])
    shares = partition_batches(costs, ranks.size, right_hand_sides)
    own = shares.batches[ranks.rank]
    return OwnSamples(
        calibration=tuple(
            replace(data, batches=tuple(data.batches[number] for number in numbers))
            for data, numbers in zip(calibration, own, strict=True)
        ),
        row_counts=tuple(tuple(map(sum, zip(*batches, strict=True))) for batches in rows),
        own_row_counts=tuple(
            tuple(sum(batches[number][stack] for number in numbers) for stack in range(len(trace.stacks)))
            for batches, numbers in zip(rows, own, strict=True)
        ),
        shares=shares,
    )


@dataclass(frozen=True)
class SampleRunner:
    """Runs blocks on the candidates' calibration data, as far as it is this rank's.

    Attributes:
        runner: Of the model.
        samples: The data.
        hidden_states: Between blocks.
        stream: Whose hidden states: the candidates' own, or those of the merged model.
    """

    runner: BlockRunner
    samples: OwnSamples
    hidden_states: HiddenStates
    stream: Stream

    def owner(self, candidate: int) -> Hashable:
        """Whose embeddings and the like a candidate's data goes through."""
        return candidate if self.stream == "candidate" else MERGED

    def num_rows(self, candidate: int, stack: int) -> int:
        """Valid rows of a candidate's data in a stack, on all ranks together."""
        return self.samples.row_counts[candidate][stack]

    def num_own_rows(self, candidate: int, stack: int) -> int:
        """Valid rows of a candidate's data in a stack on this rank."""
        return self.samples.own_row_counts[candidate][stack]

    def run(
        self,
        block: BlockPlan,
        candidate: int,
        tensors: Tensors,
        *,
        advance: bool,
        watch: Sequence[str] = (),
        on_input: OnInput | None = None,
    ) -> Iterator[None]:
        """Runs a block on all batches of one candidate, and pauses after each.

        Args:
            block: Which one.
            candidate: Whose data.
            tensors: The block's weights, by parameter name.
            advance: Store the block's output as the next hidden states; otherwise it is run only as far as the last
                linear of `watch`.
            watch: Linears whose inputs are wanted, by path in the block, in the order in which they run.
            on_input: Sees their valid rows.
        """
        prefix, device = block.name + ".", self.runner.device
        weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        with self.runner.block(BlockId(block.stack, block.index), weights, self.owner(candidate)) as running:
            del weights
            for number, batch in enumerate(self.samples.calibration[candidate].batches):
                self.hidden_states.ahead(self.stream, candidate, number + 1)
                outputs = self.hidden_states.get(self.stream, candidate, number, device)
                output = running.run(batch, outputs, watch=watch, on_input=on_input, whole=advance)
                if advance:
                    self.hidden_states.put(self.stream, candidate, number, block.stack, output)
                del output, outputs
                yield


def check_samples(skeleton: Skeleton, trace: ModelTrace, calibration: Sequence[CalibrationSet]) -> list[str]:
    """Token ids beyond the vocabulary, sequences longer than the model's position embeddings, and the like.

    Every batch is run up to the first block, with embeddings that cost no memory.
    """
    vocabulary: int | None = getattr(skeleton.model.config.get_text_config(), "vocab_size", None)
    problems = []
    fill_with_nan(skeleton, torch.device("cpu"))
    with resumed_at(skeleton, trace.order[0], 0) as run:
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
