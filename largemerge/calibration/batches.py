"""Batches of calibration samples, as a model's forward takes them, and a fingerprint of them.

    samples ──► group_samples ──► pad_samples ──► Batch ──► split_batches, where memory is short
                                                        └─► mmap_inputs, where pixels shall not take memory

Samples of unlike length share a batch by padding on the right, so that position i is the same token with and without
padding. They are sorted by length first: a batch of equals pads nothing. The statistics do not depend on the order of
samples, hence not on the sorting.

Pixels and the like take more room than hidden states. `mmap_inputs` writes them to a file without a name and maps it:
the kernel reads what is used and drops what is not, so they are not anonymous memory of the process.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from largemerge.checkpoint.direct_io import byte_view


@dataclass(frozen=True)
class ForwardSignature:
    """Inputs of a model's forward, as its class and config say.

    Attributes:
        forward_arguments: Names of all arguments.
        is_encoder_decoder: Whether a decoder reads tokens of its own.
        decoder_start_token_id: Token that the decoder begins with, if the config names one.
        pad_token_id: Token for padding, if the config names one.
        token_shape: What the dimensions of `input_ids` are.
        id_limits: Number of rows of the embedding that an argument's numbers stand for, by argument: `position_ids`
            and `token_type_ids`, where the model has such embeddings.
    """

    forward_arguments: frozenset[str]
    is_encoder_decoder: bool
    decoder_start_token_id: int | None
    pad_token_id: int | None
    token_shape: tuple[str, ...] = ("samples", "tokens")
    id_limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """B samples of one candidate, as the model's forward takes them.

    Attributes:
        inputs: Tensors `[B, ...]` by forward argument, contiguous, on the CPU.
        loss_mask: Bools `[B, T]` over the tokens, those of the decoder where there is one; False keeps a token out of
            the statistics. `None` if all count.
    """

    inputs: dict[str, torch.Tensor]
    loss_mask: torch.Tensor | None

    @property
    def num_samples(self) -> int:
        """Number of samples B."""
        return next(iter(self.inputs.values())).shape[0]


@dataclass(frozen=True)
class CalibrationSet:
    """The calibration data of one candidate.

    Attributes:
        name: Name of the candidate.
        batches: All batches.
        fingerprint: A hash that changes whenever data, tokenizer or settings change what the model sees; empty where
            the batches have shapes alone.
        estimated: What a plan takes to be so, in words, where not all samples have been read; else empty.
        where: Candidate and data, for messages.
        notes: What the user should know of the data though it stops nothing.
    """

    name: str
    batches: tuple[Batch, ...]
    fingerprint: str
    estimated: str = ""
    where: str = ""
    notes: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Number of samples in all batches: as many as asked for, or as there are."""
        return sum(batch.num_samples for batch in self.batches)


@dataclass(frozen=True)
class CalibrationOutline:
    """Upper bounds of a candidate's calibration data, known without reading samples.

    Attributes:
        num_samples: Maximum of samples.
        batch_size: Samples in a batch.
        inputs: Shape of one sample and dtype, by forward argument; lengths of texts are upper bounds.
        examples: Integers of the first samples, by forward argument, where pixels or sounds stand beside them: the
            places of image tokens cannot be made up.
        where: Candidate and data, for messages.
    """

    num_samples: int
    batch_size: int
    inputs: dict[str, tuple[tuple[int, ...], torch.dtype]]
    examples: dict[str, torch.Tensor] = field(default_factory=dict)
    where: str = ""

    @property
    def floating_bytes(self) -> int:
        """Bytes of all inputs in floating point, at most."""
        shapes = ((shape, dtype) for shape, dtype in self.inputs.values() if dtype.is_floating_point)
        return self.num_samples * sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


@dataclass(frozen=True)
class Sample:
    """One sample, not yet padded.

    Attributes:
        row: Its row in the source, from 0.
        sequences: Numbers for each token, by forward argument; empty for a sample without text.
        loss_mask: 0 or 1 for each token of `input_ids`, or of `decoder_input_ids` where there is a decoder.
        image: A path, bytes, or a dataset's dictionary of both; opened only when its batch is made.
        num_cut: Tokens that are left out because the text is too long; of packed texts, those after the last sample.
    """

    row: int
    sequences: dict[str, list[int]]
    loss_mask: list[int] | None = None
    image: Any = None
    num_cut: int = 0


def counting_tokens(batch: Batch, signature: ForwardSignature) -> torch.Tensor:
    """Finds the tokens that a loss mask lets count and that are no padding.

    Args:
        batch: A batch with a loss mask.
        signature: Inputs of the model's forward: the loss mask belongs to the decoder's tokens where there is one.

    Returns:
        Mask `[B, T]`, true for tokens that count.
    """
    assert batch.loss_mask is not None
    attention = batch.inputs.get("decoder_attention_mask" if signature.is_encoder_decoder else "attention_mask")
    return batch.loss_mask if attention is None else batch.loss_mask & (attention != 0)


def group_samples(samples: Sequence[Sample], batch_size: int) -> list[list[Sample]]:
    """Groups samples of similar length into batches, longest first, equals in their old order.

    Longest first, so that a batch that does not fit into memory fails at once.
    """

    def lengths(sample: Sample) -> tuple[int, int]:
        return len(sample.sequences.get("input_ids", ())), len(sample.sequences.get("decoder_input_ids", ()))

    ordered = sorted(samples, key=lengths, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def pad_samples(samples: Sequence[Sample], padding: Mapping[str, int]) -> Batch:
    """Puts samples into one batch, padded on the right to the longest of them.

    Args:
        samples: Samples that all have the same forward arguments.
        padding: Padding values by forward argument; 0 for those that are not named.

    Returns:
        A batch with tensors `[B, T]` of int64, and a loss mask `[B, T]` (False in the padding) if the samples have one.
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
    """Splits batches into smaller ones of at most `max_samples`; the padding stays as it is."""
    return tuple(
        Batch(
            {name: tensor[start : start + max_samples] for name, tensor in batch.inputs.items()},
            None if batch.loss_mask is None else batch.loss_mask[start : start + max_samples],
        )
        for batch in batches
        for start in range(0, batch.num_samples, max_samples)
    )


def fingerprint_batches(batches: Sequence[Batch]) -> str:
    """Hashes names, dtypes, shapes and bytes of all tensors of all batches, in order, by SHA-256."""
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


def mmap_inputs(calibration: CalibrationSet, folder: Path) -> CalibrationSet:
    """Moves floating-point inputs into mapped files in `folder`.

    The files have no names: they are gone when the process is, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def mapped(batch: Batch) -> Batch:
        inputs = {name: _mmap(x, folder) if x.is_floating_point() else x for name, x in batch.inputs.items()}
        return replace(batch, inputs=inputs)

    return replace(calibration, batches=tuple(map(mapped, calibration.batches)))


def _mmap(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    with tempfile.TemporaryFile(dir=folder, prefix=".calibration-") as stream:
        stream.write(byte_view(tensor.contiguous().reshape(-1).view(torch.uint8)))
        stream.flush()
        # It has no name from the start, so that even a kill right now leaves nothing; Linux names it by its number.
        name = f"/proc/self/fd/{stream.fileno()}"
        flat = torch.from_file(name, shared=False, size=math.prod(tensor.shape), dtype=tensor.dtype)
    return flat.reshape(tensor.shape)
