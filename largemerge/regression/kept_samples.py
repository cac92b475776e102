"""The calibration samples that a merge keeps for the next one of its sequence, in place of its sums.

    OUT/sums/samples.safetensors     N samples of all models so far, as the model's forward takes them

Of every candidate as many are kept as its weight says, N of all together, so that the file does not grow with the
sequence; of an earlier merge, some of those that it has kept. They are ready-made calibration data (pretokenized.py):
in the next merge, the merge so far is a candidate like any other, with this file for its data.

The file is laid out, written, resumed and verified like those of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from largemerge.calibration import CalibrationSet, ForwardSignature
from largemerge.calibration.pretokenized import LOSS_MASK
from largemerge.checkpoint.tensor_info import MODULE_SEPARATOR, OutputTensor
from largemerge.regression.sequence import SAMPLES

_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids", LOSS_MASK)
"""How the names of tensors end that are padded where samples are of unlike length."""


@dataclass(frozen=True)
class KeptSamples:
    """Samples that are kept, and how they lie on disk.

    Attributes:
        rows: Candidate, batch and row of every sample.
        shapes: Shape and dtype of the tensors, by forward argument.
        fill: What tensors are padded with, by forward argument; 0 for those that are not named.
    """

    rows: tuple[tuple[int, int, int], ...]
    shapes: Mapping[str, OutputTensor]
    fill: Mapping[str, int]

    @property
    def tensors(self) -> dict[str, OutputTensor]:
        """Name of a tensor, with the file that it lies in → its layout on disk."""
        return {f"{SAMPLES}{MODULE_SEPARATOR}{name}": tensor for name, tensor in self.shapes.items()}

    def gather(self, calibration: Sequence[CalibrationSet]) -> dict[str, torch.Tensor]:
        """Copies the samples out of the data of all candidates, by forward argument."""
        found = {
            name: torch.full(tensor.shape, self.fill.get(name, 0), dtype=tensor.dtype)
            for name, tensor in self.shapes.items()
        }
        for place, (candidate, number, row) in enumerate(self.rows):
            own = _tensors(calibration[candidate], number)
            for name, tensor in found.items():
                if name in own:
                    values = own[name][row]
                    tensor[place][tuple(slice(0, size) for size in values.shape)] = values
                else:  # a mask that says nothing: all of the sample counts
                    tokens = own[name.replace("attention_mask", "input_ids") if name != LOSS_MASK else _tokens_of(own)]
                    tensor[place, : tokens.shape[1]] = 1
        return found


def choose_samples(
    calibration: Sequence[CalibrationSet], weights: Sequence[float], total: int, signature: ForwardSignature
) -> tuple[KeptSamples | None, list[str]]:
    """Chooses the samples that are kept, evenly from each candidate's, by their shapes alone.

    Args:
        calibration: The data of all candidates.
        weights: c_i of all candidates.
        total: Maximum number of samples of all together.
        signature: Inputs of the model's forward.

    Returns:
        The samples; or `None`, and why they cannot lie in one file.
    """
    counts = share_out(total, weights, [data.num_samples for data in calibration])
    rows: list[tuple[int, int, int]] = []
    for index, (data, count) in enumerate(zip(calibration, counts, strict=True)):
        places = [(index, number, row) for number, b in enumerate(data.batches) for row in range(b.num_samples)]
        rows += [places[(2 * each + 1) * len(places) // (2 * count)] for each in range(count)]
    used = {(candidate, number): _tensors(calibration[candidate], number) for candidate, number, _ in rows}
    problems = list(_problems(calibration, used, signature))
    if problems:
        return None, [f"sequence.keep_samples: {problem}; expected 'keep_sums' in its place" for problem in problems]
    names = {name: tensor for own in used.values() for name, tensor in own.items()}
    lengths = {name: {own[name].shape[1:] for own in used.values() if name in own} for name in names}
    masks = {
        name.replace("input_ids", "attention_mask"): names[name]
        for name in names
        if name.endswith("input_ids") and len(lengths[name]) > 1
    }
    shapes = {
        name: OutputTensor(
            tensor.dtype, (len(rows), *map(max, zip(*lengths.get(name, {tensor.shape[1:]}), strict=True)))
        )
        for name, tensor in {**masks, **names}.items()
    }
    for mask in masks:
        tokens = shapes[mask.replace("attention_mask", "input_ids")]
        shapes[mask] = OutputTensor(shapes[mask].dtype, tokens.shape)
    fill = {name: signature.pad_token_id or 0 for name in shapes if name.endswith("input_ids")}
    return KeptSamples(tuple(rows), dict(sorted(shapes.items())), fill), []


def share_out(total: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """Shares out a number of samples by weight, at least one to each, and to none more than it has."""
    counts = [1 if number else 0 for number in available]
    for _ in range(min(total, sum(available)) - sum(counts)):
        lacking = [i for i, (count, number) in enumerate(zip(counts, available, strict=True)) if count < number]
        counts[min(lacking, key=lambda i: (counts[i] + 1) / weights[i])] += 1
    return counts


def _tensors(data: CalibrationSet, number: int) -> dict[str, torch.Tensor]:
    """Tensors of a batch, the loss mask among them, as they lie in a file."""
    batch = data.batches[number]
    mask = {} if batch.loss_mask is None else {LOSS_MASK: batch.loss_mask.to(torch.int64)}
    return {**batch.inputs, **mask}


def _tokens_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Name of the tokens that a loss mask belongs to."""
    return "decoder_input_ids" if "decoder_input_ids" in tensors else "input_ids"


def _problems(
    calibration: Sequence[CalibrationSet],
    used: Mapping[tuple[int, int], Mapping[str, torch.Tensor]],
    signature: ForwardSignature,
) -> Iterator[str]:
    """Yields why samples cannot lie in one file: other tensors, dtypes, or shapes that padding does not mend."""
    (first, _), like = next(iter(used.items()))
    told: set[tuple[int, str]] = set()
    for (candidate, _), own in used.items():
        for name in sorted({*like, *own}):
            pair = f"{calibration[first].name} and {calibration[candidate].name}"
            problem = ""
            if name not in like or name not in own:
                if not name.endswith("attention_mask") and name != LOSS_MASK:
                    problem = f"of {pair}, one has {name!r} and one has not"
            elif like[name].dtype != own[name].dtype:
                problem = f"{name!r} of {pair} are {like[name].dtype} and {own[name].dtype}"
            elif like[name].shape[1:] != own[name].shape[1:]:
                mask = name.replace("input_ids", "attention_mask")
                if not name.endswith(_PER_TOKEN) or own[name].dim() != 2:
                    shapes = f"{list(like[name].shape[1:])} and {list(own[name].shape[1:])}"
                    problem = f"samples of {pair} have {name!r} of unlike shapes, {shapes}"
                elif name.endswith("input_ids") and mask not in signature.forward_arguments:
                    problem = f"samples of {pair} are of unlike length, and the model takes no {mask!r}"
            if problem and (candidate, name) not in told:
                told.add((candidate, name))
                yield problem
