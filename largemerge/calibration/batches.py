"""What calibration hands on: batches of forward arguments, and a fingerprint of them.

Samples of unlike length share a batch by padding on the right, so that position i is the same
token with and without padding. They are sorted by length first: a batch of equals pads nothing.
The statistics do not depend on the order of samples, hence not on the sorting.

Calibration inputs that wait on disk: pixels and the like, which take more room than hidden states.

Floating-point inputs are written to a file that nobody sees and mapped into memory: the kernel reads what is used and
drops what is not, so they are no anonymous memory of the process.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from largemerge.checkpoint.direct_io import byte_view


@dataclass(frozen=True)
class ForwardSignature:
    """What the model class says of its inputs."""

    forward_arguments: frozenset[str]
    is_encoder_decoder: bool
    decoder_start_token_id: int | None
    pad_token_id: int | None


@dataclass(frozen=True)
class Batch:
    """B samples of one candidate, as the model's forward takes them."""

    inputs: dict[str, torch.Tensor]
    """Forward argument to tensor `[B, ...]`, contiguous, on CPU."""
    loss_mask: torch.Tensor | None
    """`[B, T]` bool: False keeps a token out of the statistics. Over the decoder's tokens where there is one."""

    @property
    def num_samples(self) -> int:
        """B."""
        return next(iter(self.inputs.values())).shape[0]


@dataclass(frozen=True)
class CalibrationSet:
    """The calibration data of one candidate."""

    name: str
    """The candidate's."""
    batches: tuple[Batch, ...]
    fingerprint: str
    """Changes whenever data, tokenizer or settings change what the model sees."""

    @property
    def num_samples(self) -> int:
        """Samples in all batches: as many as asked for, or as there are."""
        return sum(batch.num_samples for batch in self.batches)


@dataclass(frozen=True)
class CalibrationOutline:
    """What a candidate's calibration will look like, known without reading the samples."""

    num_samples: int
    """Upper bound."""
    batch_size: int
    inputs: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Forward argument to the shape of one sample, and dtype. The lengths of texts are upper bounds."""


@dataclass(frozen=True)
class Sample:
    """One sample, not yet padded."""

    row: int
    """Where it lies in its source, counted from 0."""
    sequences: dict[str, list[int]]
    """Forward argument to one number per token; nothing for a sample without text."""
    loss_mask: list[int] | None = None
    """0 or 1 per token of `input_ids`, or of `decoder_input_ids` where there is a decoder."""
    image: Any = None
    """A path, bytes, or what the dataset has for an image; opened only when its batch is made."""


def group_samples(samples: Sequence[Sample], batch_size: int) -> list[list[Sample]]:
    """Cuts samples into batches of neighbours in length, longest first, equals in their old order.

    Longest first, so that a batch that does not fit into memory fails at once.
    """

    def lengths(sample: Sample) -> tuple[int, int]:
        return len(sample.sequences.get("input_ids", ())), len(sample.sequences.get("decoder_input_ids", ()))

    ordered = sorted(samples, key=lengths, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def pad_samples(samples: Sequence[Sample], padding: Mapping[str, int]) -> Batch:
    """Puts samples into one batch, padded on the right to the longest of them.

    Args:
        samples: All with the same forward arguments.
        padding: Forward argument to its padding value; 0 where it is not named.

    Returns:
        Tensors `[B, T]` of int64, and the loss mask `[B, T]` (False in the padding) if the samples have one.
    """
    inputs = {
        name: _pad([sample.sequences[name] for sample in samples], padding.get(name, 0))
        for name in samples[0].sequences
    }
    masks = [sample.loss_mask for sample in samples if sample.loss_mask is not None]
    assert len(masks) in (0, len(samples)), "either all samples have a loss mask, or none"
    return Batch(inputs, _pad(masks, 0).bool() if masks else None)


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def split_batches(batches: Sequence[Batch], max_samples: int) -> tuple[Batch, ...]:
    """Cuts batches into smaller ones of at most `most_samples`; the padding stays as it is."""
    return tuple(
        Batch(
            {name: tensor[start : start + max_samples] for name, tensor in batch.inputs.items()},
            None if batch.loss_mask is None else batch.loss_mask[start : start + max_samples],
        )
        for batch in batches
        for start in range(0, batch.num_samples, max_samples)
    )


def fingerprint_batches(batches: Sequence[Batch]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors of all batches, in order."""
    digest = hashlib.sha256()
    for index, batch in enumerate(batches):
        tensors = dict(sorted(batch.inputs.items()))
        if batch.loss_mask is not None:
            tensors["loss_mask"] = batch.loss_mask
        for name, tensor in tensors.items():
            digest.update(f"{index} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
            digest.update(content)
    return digest.hexdigest()


def mapped_inputs(calibration: CalibrationSet, folder: Path) -> CalibrationSet:
    """The same data, its floating-point inputs mapped from a file in `folder`.

    The file has no name: it is gone when the process is, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return replace(calibration, batches=tuple(_spooled(batch, folder) for batch in calibration.batches))


def _spooled(batch: Batch, folder: Path) -> Batch:
    inputs = {name: _mapped(x, folder) if x.is_floating_point() else x for name, x in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def _mapped(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".calibration-") as stream:
        stream.write(byte_view(tensor.contiguous().reshape(-1).view(torch.uint8)))
        stream.flush()
        flat = torch.from_file(stream.name, shared=False, size=math.prod(tensor.shape), dtype=tensor.dtype)
    return flat.reshape(tensor.shape)
