"""The calibration samples that a merge keeps for the next one of its sequence, in place of its sums.

    OUT/sums/samples.safetensors     N samples of all models so far, as the model's forward takes them

Of every candidate as many are kept as its weight says, N of all together, so that the file does not grow with the
sequence; of an earlier merge, some of those that it has kept. Samples that would be of no use are passed over: those
that add nothing to the statistics, and those with tokens that the output lacks. They are ready-made calibration data
(pretokenized.py): in the next merge, the merge so far is a candidate like any other, with this file for its data.

The file is laid out, written, resumed and verified like those of the weights. Samples are read where they lie, some at
a time, so that pixels take no memory of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from largemerge.calibration import CalibrationSet, ForwardSignature
from largemerge.calibration.batches import counting_tokens
from largemerge.calibration.pretokenized import LOSS_MASK
from largemerge.calibration.survey import is_made_up
from largemerge.checkpoint.tensor_info import MODULE_SEPARATOR, OutputTensor
from largemerge.regression.sequence import SAMPLES

_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids", LOSS_MASK)
"""How the names of tensors end that are padded where samples are of unlike length."""
_CHUNK_BYTES = 8 << 20
Tensors = Mapping[str, torch.Tensor]


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

    def read(self, calibration: Sequence[CalibrationSet]) -> dict[str, Iterator[torch.Tensor]]:
        """Reads the samples out of the data of all candidates: by forward argument, some samples at a time."""
        return {name: self._read_tensor(name, calibration) for name in self.shapes}

    def _read_tensor(self, name: str, calibration: Sequence[CalibrationSet]) -> Iterator[torch.Tensor]:
        layout = self.shapes[name]
        step = max(1, _CHUNK_BYTES * len(self.rows) // max(1, layout.num_bytes))
        for start in range(0, len(self.rows), step):
            part = self.rows[start : start + step]
            found = torch.full((len(part), *layout.shape[1:]), self.fill.get(name, 0), dtype=layout.dtype)
            for place, (candidate, number, row) in enumerate(part):
                own = _tensors(calibration[candidate], number)
                if name in own:
                    values = own[name][row]
                    found[place][tuple(slice(0, size) for size in values.shape)] = values
                else:  # a mask that keeps nothing out
                    found[place, : own[_tokens_under(name, own)].shape[1]] = 1
            yield found


def choose_samples(
    calibration: Sequence[CalibrationSet],
    weights: Sequence[float],
    total: int,
    signature: ForwardSignature,
    num_tokens: int | None = None,
) -> tuple[KeptSamples | None, list[str]]:
    """Chooses the samples that are kept, evenly from those of each candidate that are of use.

    Args:
        calibration: The data of all candidates, or what a plan knows of it.
        weights: c_i of all candidates.
        total: Maximum number of samples of all together.
        signature: Inputs of the model's forward.
        num_tokens: Number of tokens of the output, where ids beyond stand for tokens that it lacks.

    Returns:
        The samples; or `None`, and why they cannot be kept.
    """
    useful = [list(_useful(data, signature, num_tokens)) for data in calibration]
    lacking = [data.name for data, places in zip(calibration, useful, strict=True) if not places]
    if lacking:
        return None, [
            f"sequence.keep_samples: no sample of {', '.join(lacking)} is of use later: each has tokens that the "
            "output lacks, or adds nothing to the statistics; expected 'keep_sums', or other data"
        ]
    counts = share_out(total, weights, [len(places) for places in useful])
    rows = [
        (candidate, *places[(2 * each + 1) * len(places) // (2 * count)])
        for candidate, (places, count) in enumerate(zip(useful, counts, strict=True))
        for each in range(count)
    ]
    used = {(candidate, number): _tensors(calibration[candidate], number) for candidate, number, _ in rows}
    problems = list(_problems(calibration, used, signature))
    if problems:
        return None, [f"sequence.keep_samples: {problem}; expected 'keep_sums' in its place" for problem in problems]
    fill = {name: signature.pad_token_id or 0 for own in used.values() for name in own if name.endswith("input_ids")}
    return KeptSamples(tuple(rows), _layout(len(rows), list(used.values())), fill), []


def _useful(data: CalibrationSet, signature: ForwardSignature, num_tokens: int | None) -> Iterator[tuple[int, int]]:
    """Yields batch and row of the samples that may be kept; of data that is made up, all."""
    for number, batch in enumerate(data.batches):
        use = torch.ones(batch.num_samples, dtype=torch.bool)
        if not is_made_up(data):
            if batch.loss_mask is not None:
                use &= counting_tokens(batch, signature).flatten(1).any(1)
            for name in (name for name in batch.inputs if name.endswith("input_ids")):
                use &= (batch.inputs[name] < (num_tokens or math.inf)).flatten(1).all(1)
        yield from ((number, row) for row in use.nonzero()[:, 0].tolist())


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


def _tokens_under(mask: str, tensors: Tensors) -> str:
    """Name of the tokens, or their embeddings, that a mask belongs to; empty where there are none."""
    prefix = mask.removesuffix("attention_mask")
    if mask == LOSS_MASK:
        prefix = "decoder_" if any(name.startswith("decoder_input") for name in tensors) else ""
    return next((name for name in (f"{prefix}input_ids", f"{prefix}inputs_embeds") if name in tensors), "")


def _layout(num_samples: int, used: Sequence[Tensors]) -> dict[str, OutputTensor]:
    """Shape and dtype of all tensors, each as large as the largest sample, in a dtype that holds all values."""
    found: dict[str, list[torch.Tensor]] = {}
    for own in used:
        for name, tensor in own.items():
            found.setdefault(name, []).append(tensor)
    layout = {}
    for name, tensors in found.items():
        sizes = map(max, zip(*(tensor.shape[1:] for tensor in tensors), strict=True))
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        layout[name] = OutputTensor(dtype, (num_samples, *sizes))
    for name, tensors in found.items():
        mask = name.replace("input_ids", "attention_mask")
        if name.endswith("input_ids") and (mask in layout or len({tensor.shape[1] for tensor in tensors}) > 1):
            dtype = layout[mask].dtype if mask in layout else torch.int64
            layout[mask] = OutputTensor(dtype, layout[name].shape)
    return dict(sorted(layout.items()))


def _problems(
    calibration: Sequence[CalibrationSet], used: Mapping[tuple[int, int], Tensors], signature: ForwardSignature
) -> Iterator[str]:
    """Yields why samples cannot lie in one file: other tensors, or shapes that padding does not mend."""
    (first, _), like = next(iter(used.items()))
    told: set[tuple[int, str]] = set()
    for (candidate, _), own in used.items():
        for name in sorted({*like, *own}):
            pair = f"{calibration[first].name} and {calibration[candidate].name}"
            problem = ""
            if name not in like or name not in own:
                is_mask = name.endswith("attention_mask") or name == LOSS_MASK
                if not is_mask or not _tokens_under(name, own) or not _tokens_under(name, like):
                    problem = f"of {pair}, one has {name!r} and one has not"
            elif like[name].is_floating_point() != own[name].is_floating_point():
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
