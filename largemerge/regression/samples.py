"""The calibration data of all candidates: outlined or read, checked against the model, partitioned over ranks.

    read_all ──► every candidate's outline or data ──► check_samples ──► partition_samples ──► RankSamples

All ranks read all data, and keep their part of it. Whether the samples fit the model is found out before any weight is
read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from largemerge.calibration import ForwardSignature
from largemerge.calibration.batches import Batch, CalibrationOutline, CalibrationSet
from largemerge.calibration.config import CalibrationConfig
from largemerge.calibration.tokenizer import shared_tokenizers
from largemerge.distributed.partition import Partition, partition_batches
from largemerge.distributed.ranks import Ranks
from largemerge.errors import CalibrationError, LargemergeError
from largemerge.model.block_runner import rows_of_samples
from largemerge.model.fake_forward import placeholder_tokens
from largemerge.model.forward import resumed_at
from largemerge.model.signature import forward_signature, id_problems
from largemerge.model.skeleton import Skeleton, fill_with_nan, load_config
from largemerge.model.trace import ModelTrace
from largemerge.regression.config import MergeConfig
from largemerge.regression.gram_files import gram_fingerprint, gram_outline
from largemerge.regression.inputs import Inputs
from largemerge.regression.kept_sums import previous_fingerprint
from largemerge.regression.planning.ranks import batch_costs
from largemerge.regression.shrinkage import NUM_FOLDS, Folds
from largemerge.regression.tensor_plan import BlockPlan
from largemerge.regression.tokens import own_signature
from largemerge.text_files import first_line
from largemerge.tokenizer.tokenizers import tokenizer_folder

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
        """Reads one candidate's data, or finds out how large it is."""


def read_all(
    config: MergeConfig,
    inputs: Inputs,
    read: ReadCalibration[Result],
    nothing: Callable[[str], Result],
    transform: Callable[[Result], Result] | None = None,
) -> tuple[Result, ...]:
    """Outlines or reads the calibration data of all candidates.

    Args:
        config: The configuration, from `load_config`.
        inputs: The opened inputs, from `open_inputs`.
        read: `outline_calibration` or `load_calibration`.
        nothing: Makes what stands for the data of a candidate that has none, given its name.
        transform: Applied to each candidate's data before the next one's is read.

    Raises:
        CalibrationError: If data cannot be read, with the problems of all candidates.
    """
    signature = forward_signature(inputs.skeleton)
    base = tokenizer_folder(inputs.base, inputs.adapters.get("base")) if inputs.base is not None else None
    results: list[Result] = []
    problems: list[str] = []
    tokens = inputs.tokens
    with shared_tokenizers():
        for candidate, checkpoint in zip(config.candidates, inputs.candidates, strict=True):
            if not candidate.has_samples:
                results.append(nothing(checkpoint.name))
                continue
            assert candidate.calibration is not None
            of_candidate = signature
            if tokens is not None:
                stored = inputs.stored[checkpoint.name]
                own = load_config(stored, trust_remote_code=config.trust_remote_code)
                of_candidate = own_signature(signature, own)
            try:
                result = read(
                    candidate.calibration,
                    checkpoint.name,
                    tokenizer_folder(checkpoint, inputs.adapters.get(checkpoint.name)),
                    of_candidate,
                    base=base,
                    trust_remote_code=config.trust_remote_code,
                )
                results.append(result if transform is None else transform(result))
            except CalibrationError as error:
                problems.extend(error.problems)
    if problems:
        raise CalibrationError(*problems)
    return tuple(results)


def no_outline(config: MergeConfig, name: str) -> CalibrationOutline:
    """The outline of data that is not here: of an earlier merge nothing, else what Gram matrices were made of."""
    return gram_outline(config, name) if name in config.grams else CalibrationOutline(0, 1, {}, where=name)


def no_samples(config: MergeConfig, name: str) -> CalibrationSet:
    """The data of an earlier merge, or that Gram matrices stand for: none, and what changes with its sums."""
    in_place = gram_fingerprint(config, name) if name in config.grams else previous_fingerprint(config)
    return CalibrationSet(name, (), in_place)


@dataclass(frozen=True)
class RankSamples:
    """A rank's part of the calibration data of all candidates.

    Attributes:
        calibration: This rank's batches of every candidate; some may have none.
        row_counts: Number of valid rows by candidate and stack, on all ranks together.
        own_row_counts: Number of valid rows by candidate and stack, on this rank.
        folds: Folds of the rows of this rank's batches, by candidate, batch and stack; after the stacks come those of
            the samples themselves.
        num_samples: Number of samples by candidate, on all ranks together.
        partition: Batches of every rank.
    """

    calibration: tuple[CalibrationSet, ...]
    row_counts: tuple[tuple[int, ...], ...]
    own_row_counts: tuple[tuple[int, ...], ...]
    folds: tuple[tuple[tuple[Folds, ...], ...], ...]
    num_samples: tuple[int, ...]
    partition: Partition


def partition_samples(
    calibration: Sequence[CalibrationSet],
    blocks: Sequence[BlockPlan],
    trace: ModelTrace,
    loss_input: str,
    ranks: Ranks,
    *,
    in_groups: bool = False,
    summed: Collection[int] = (),
) -> RankSamples:
    """Keeps this rank's part of the calibration data; all ranks get about the same to do.

    Args:
        calibration: Data of all candidates, the same on every rank.
        blocks: Plans of the model's blocks, from which the cost of a token follows.
        trace: Trace of the model, from which the valid tokens follow.
        loss_input: Name of the input that loss masks belong to.
        ranks: The ranks of the merge.
        in_groups: Whether the ranks that share a candidate must know its whole Gram matrices.
        summed: Numbers of the candidates whose Gram matrices stand for their data; each is one rank's.
    """
    folds = _folds(calibration, trace, loss_input)
    rows = [
        [[sum(count for _, count in of_stack) for of_stack in of_batch[:-1]] for of_batch in of_candidate]
        for of_candidate in folds
    ]
    costs, right_hand_sides = batch_costs(blocks, [[sum(counts) for counts in batches] for batches in rows], summed)
    partition = partition_batches(costs, ranks.size, right_hand_sides, in_groups=in_groups)
    own = [() if k in summed else numbers for k, numbers in enumerate(partition.batches[ranks.rank])]
    return RankSamples(
        calibration=tuple(
            replace(data, batches=tuple(data.batches[number] for number in numbers))
            for data, numbers in zip(calibration, own, strict=True)
        ),
        row_counts=tuple(
            tuple(sum(counts[stack] for counts in batches) for stack in range(len(trace.stacks))) for batches in rows
        ),
        own_row_counts=tuple(
            tuple(sum(batches[number][stack] for number in numbers) for stack in range(len(trace.stacks)))
            for batches, numbers in zip(rows, own, strict=True)
        ),
        folds=tuple(
            tuple(of_candidate[number] for number in numbers) for of_candidate, numbers in zip(folds, own, strict=True)
        ),
        num_samples=tuple(sum(batch.num_samples for batch in data.batches) for data in calibration),
        partition=partition,
    )


def _folds(calibration: Sequence[CalibrationSet], trace: ModelTrace, loss_input: str) -> list[list[tuple[Folds, ...]]]:
    """Folds of all rows, by candidate, batch and stack, and those of the samples: a sample is in one fold.

    Fewer samples than folds are spread over them. A single one is cut into halves.
    """
    counts = [sum(batch.num_samples for batch in data.batches) for data in calibration]
    found = []
    for data, total in zip(calibration, counts, strict=True):
        first, of_candidate = 0, []
        for batch in data.batches:
            of_samples = [(first + sample) * NUM_FOLDS // total for sample in range(batch.num_samples)]
            rows = [rows_of_samples(batch, stack, loss_input) for stack in trace.stacks]
            of_batch = [list(zip(of_samples, own, strict=True)) for own in (*rows, [1] * batch.num_samples)]
            if total == 1:
                of_batch = [[(0, own // 2), (NUM_FOLDS // 2, own - own // 2)] for ((_, own),) in of_batch]
            of_candidate.append(tuple(map(tuple, of_batch)))
            first += batch.num_samples
        found.append(of_candidate)
    return found


def check_samples(
    skeleton: Skeleton, trace: ModelTrace, calibration: Sequence[CalibrationSet], *, any_ids: bool = False
) -> list[str]:
    """Finds token ids beyond the vocabulary, sequences longer than the model's position embeddings, and the like.

    Every batch is run up to the first block, with embeddings that cost no memory.

    Args:
        skeleton: The model; its parameters outside the blocks are replaced.
        trace: Trace of the model.
        calibration: Data of all candidates.
        any_ids: Whether ids have been checked already, and may stand for tokens beyond the vocabulary.

    Returns:
        Problems of all candidates; empty where all data fits.
    """
    vocabulary: int | None = getattr(skeleton.model.config.get_text_config(), "vocab_size", None)
    placeholders = placeholder_tokens(skeleton.model.config)
    problems = []
    fill_with_nan(skeleton, torch.device("cpu"))
    with resumed_at(skeleton, trace.order[0], 0) as run:
        for data in calibration:
            found = []
            if vocabulary is not None and not any_ids:
                found = list(id_problems(data, vocabulary, placeholders))
            for batch in () if found else data.batches:
                try:
                    inputs = _cast(batch, skeleton.dtype)
                    if any_ids and vocabulary is not None:
                        ids = [name for name in inputs if name.endswith("input_ids")]
                        inputs |= {name: inputs[name].clamp(max=vocabulary - 1) for name in ids}
                    run(inputs, {}, lambda *args, **kwargs: None)
                except LargemergeError:
                    raise
                except Exception as error:  # whatever a model's code raises
                    found.append(_explained(skeleton, batch, error))
                    break
            problems += [f"{data.where or f'candidate {data.name!r}'}: {problem}" for problem in found]
    return problems


def _cast(batch: Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}


def _explained(skeleton: Skeleton, batch: Batch, error: Exception) -> str:
    """Message for a batch that the model cannot be run on."""
    shapes = {name: list(tensor.shape) for name, tensor in batch.inputs.items()}
    reason = first_line(error, 160)
    limit = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((shape[1] for shape in shapes.values() if len(shape) > 1), default=0)
    is_long = isinstance(limit, int) and longest > limit
    if is_long:
        hint = f"the config allows {limit} positions: lower max_length, or give shorter samples"
    else:
        hint = f"expected inputs that {skeleton.class_name} takes, in the shapes that it takes"
    return f"the model cannot be run on a batch of shapes {shapes}; {hint} ({reason})"
