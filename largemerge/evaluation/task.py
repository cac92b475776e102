"""What a task is made of: samples, what is read off a model's outputs, and the numbers that come of it.

    data ──► Samples ──► model ──► outputs ──► score: a record for each sequence ──► finish: columns, a row a sample
                                                                                     └─► metrics, intervals

A record is what one sequence adds (a sum of losses, a vector, a right answer); columns are what metrics are computed
from, and what is drawn anew for intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from largemerge.calibration.batches import Batch, ForwardSignature, Sample, group_samples, pad_samples
from largemerge.calibration.images import read_images
from largemerge.evaluation.models import ModelFiles

Record = Mapping[str, Any]
"""What one sequence adds: numbers or vectors by name."""
Columns = Mapping[str, np.ndarray]
"""Numbers by name, `[samples]` each."""
Score = Callable[[Any, Batch, Sequence[Sample]], list[Record]]
"""Reads a model's output on a batch; returns a record for each of its sequences."""
Logits = Callable[[Any, Batch, Sequence[Sample]], Iterator[tuple[torch.Tensor, torch.Tensor]]]
"""Reads a model's output on a batch; yields of each of its sequences logits `[N, V]` and the right classes `[N]`."""


@dataclass(frozen=True)
class Metric:
    """A number that says how well a model does.

    Attributes:
        name: Its name in the field, such as `accuracy`.
        compute: Computes it from columns.
        better: Whether higher or lower is better.
        is_share: Whether it is a share, shown in percent.
        undefined: Says why it cannot be computed from columns; an empty text where it can.
    """

    name: str
    compute: Callable[[Columns], float]
    better: Literal["higher", "lower"] = "higher"
    is_share: bool = True
    undefined: Callable[[Columns], str] = lambda _: ""


@dataclass(frozen=True)
class Pixels:
    """How images become pixels.

    Attributes:
        processor: The checkpoint's image processor.
        folder: Folder that relative paths start from; `None` where there is no such folder.
        signature: Inputs of the model's forward.
        image: Reads the image of a sample by its number: whole test splits do not fit into memory, least of all once
            for each model.
        change: Changes an opened image, given the number of its sample; `None` where images stay as they are.
    """

    processor: Any
    folder: Path | None
    signature: ForwardSignature
    image: Callable[[int], Any]
    change: Callable[[int, Any], Any] | None = None


@dataclass(frozen=True)
class Samples:
    """Sequences in batches: tokens are ready, images are read when a batch is made.

    Attributes:
        groups: The sequences of each batch.
        where: Task and data, for messages.
        padding: Padding values by forward argument.
        pixels: How images become pixels; `None` where there are none.
        left: Whether padding stands on the left, as for generation.
        notes: What a user should know of how they were made, such as how many texts were cut.
        lent: What another model has lent to make them; empty where the model's own files were enough.
    """

    groups: tuple[tuple[Sample, ...], ...]
    where: str
    padding: Mapping[str, int] = field(default_factory=dict)
    pixels: Pixels | None = None
    left: bool = False
    notes: tuple[str, ...] = ()
    lent: str = ""

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        batch_size: int,
        where: str,
        padding: Mapping[str, int] | None = None,
        pixels: Pixels | None = None,
        *,
        left: bool = False,
        notes: tuple[str, ...] = (),
        lent: str = "",
    ) -> Samples:
        """Groups sequences of similar length into batches, longest first."""
        groups = tuple(map(tuple, group_samples(samples, batch_size)))
        return cls(groups, where, padding or {}, pixels, left, notes, lent)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.groups)

    def batch(self, number: int) -> Batch:
        """Makes one batch; its images are read now.

        Raises:
            CalibrationError: If an image cannot be opened.
        """
        group = self.groups[number]
        batch = pad_samples(group, self.padding)
        if self.left:
            batch = replace(batch, inputs={name: _to_left(x, group, name) for name, x in batch.inputs.items()})
        if self.pixels is not None:
            pixels = self.pixels
            shown = [replace(sample, image=pixels.image(sample.row)) for sample in group]
            (more,) = read_images(
                [shown], pixels.processor, pixels.folder, pixels.signature, self.where, change=pixels.change
            )
            batch = replace(batch, inputs=batch.inputs | more)
        return batch

    def shared(self, rank: int, size: int) -> Samples:
        """The batches of one of several ranks."""
        return replace(self, groups=self.groups[rank::size])

    def batches(self) -> Iterator[Batch]:
        """Makes one batch after another."""
        return map(self.batch, range(len(self)))


def _to_left(padded: torch.Tensor, group: Sequence[Sample], name: str) -> torch.Tensor:
    """Moves padding from the right to the left."""
    return torch.stack(
        [row.roll(padded.shape[1] - len(sample.sequences[name])) for row, sample in zip(padded, group, strict=True)]
    )


@dataclass(frozen=True)
class FirstPass:
    """A pass that has to come first, such as that of class names through a text tower.

    Attributes:
        key: What its result depends on: it is done once for all models that share it.
        view: The model that is run.
        samples: Its sequences.
        score: Reads its outputs.
        finish: Makes the result of all records, by sequence number.
    """

    key: tuple[str, ...]
    view: ModelFiles
    samples: Samples
    score: Score
    finish: Callable[[Mapping[int, Record]], Any]


@dataclass(frozen=True)
class Generating:
    """How answers are written.

    Attributes:
        max_new_tokens: Tokens of an answer, at most.
        ends: Tokens at which it ends.
        pad: Token that fills up.
        is_over: Whether tokens that were written so far hold a text at which the answer ends.
    """

    max_new_tokens: int
    ends: tuple[int, ...]
    pad: int
    is_over: Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Prepared:
    """A task, ready to be run on one model.

    Attributes:
        view: The model as the task sees it.
        samples: Sequences to run.
        score: Reads an output; given the result of the first pass, where there is one.
        finish: Makes columns of all records, by sequence number.
        metrics: What is computed from columns; the first is the one that counts.
        first: The pass that has to come first.
        generating: How answers are written; `None` where nothing is.
        remark: Says what a user should know of columns; an empty text where that is nothing.
        logits: Reads the logits behind an output, for which the softmax is a likelihood; given the result of the first
            pass; `None` where a task has no such thing.
    """

    view: ModelFiles
    samples: Samples
    score: Callable[[Any], Score]
    finish: Callable[[Mapping[int, Record]], Columns]
    metrics: tuple[Metric, ...]
    first: FirstPass | None = None
    generating: Generating | None = None
    remark: Callable[[Columns], str] = lambda _: ""
    logits: Callable[[Any], Logits] | None = None


def columns_of(records: Mapping[int, Record]) -> Columns:
    """Makes columns of records that are one sample each, in the order of their numbers."""
    ordered = [records[number] for number in sorted(records)]
    return {name: np.array([record[name] for record in ordered], dtype=np.float64) for name in ordered[0]}


def mean_of(name: str) -> Callable[[Columns], float]:
    """Makes what computes the mean of a column."""
    return lambda columns: float(columns[name].mean())
