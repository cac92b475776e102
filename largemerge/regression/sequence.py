"""Merges in sequence: what a merge has gone through, noted beside its sums, so that experts can be added later.

    first merge    A, B, C with data   ──► OUT, OUT/sums/*.safetensors, OUT/sums/sequence.json
    later merge    OUT, D with data    ──► the merge of A, B, C, D; memory and time do not grow with what was before

Of the regression's two sums, the earlier merge W_m and its Gram matrices say all that is needed of the earlier models:

    G = C/(C + Σ c) · G_m + Σ_i G̃_i         C    sum of the weights of all models merged before
    R = Σ_i (W_i − W_m) G̃_i                 G_m  their Σ G̃_i, as the earlier merge has kept it

So W_m is a candidate like any other, the first one, to which the sums are anchored. It needs no data: on what the
earlier models have seen, it is held to itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from largemerge.config_file import Strict, explain, to_json
from largemerge.errors import ConfigError
from largemerge.regression.methods import Granularity, Normalization, RegressionMethod, Stream
from largemerge.text_files import read_json

SUMS_FOLDER = "sums"
"""Folder in the output for what the next merge of a sequence needs."""
RECORD_FILE = f"{SUMS_FOLDER}/sequence.json"
SAMPLES = f"{SUMS_FOLDER}/samples"
SAMPLES_FILE = f"{SAMPLES}.safetensors"
"""Calibration samples that stand in place of the sums."""
_CHOICES = ("inputs", "granularity", "normalization", "off_diagonal_scale")
"""Settings of the method that decide what the Gram matrices are."""


class MergedModel(Strict):
    """A model that was merged at some step of the sequence."""

    name: str
    model: str
    """Its reference, as the configuration of its merge had it."""
    weight: float = Field(gt=0, allow_inf_nan=False)
    tokens: int = Field(ge=0)
    """Number of tokens of its calibration data that counted, in the stack that had most."""


class KeptGroup(Strict):
    """The Gram matrix of the linears that read one tensor."""

    inputs: int = Field(ge=1)
    tokens: int = Field(ge=0)
    """Number of rows of all models merged so far."""
    linears: tuple[str, ...] = Field(min_length=1)
    """Paths of the linears that were solved; those that were not are no regression of these rows."""


class SequenceRecord(Strict):
    """What `sums/sequence.json` holds: what was merged so far, and how its sums were made."""

    largemerge: str
    """Version that wrote it."""
    merge_method: str
    inputs: Stream
    granularity: Granularity
    normalization: Normalization
    off_diagonal_scale: float = Field(ge=0, le=1)
    models: tuple[MergedModel, ...] = Field(min_length=1)
    """All models merged so far, in order."""
    samples: int = Field(0, ge=0)
    """Number of calibration samples of all models that are kept in place of the sums; 0 where there are sums."""
    groups: dict[Annotated[str, Field(pattern=r"^[^/]+$")], dict[str, KeptGroup]]
    """Block, or `head` → first linear of a group → its Gram matrix."""

    @property
    def weight(self) -> float:
        """C, the sum of the weights of all models merged so far."""
        return math.fsum(model.weight for model in self.models)

    @property
    def tokens(self) -> int:
        """Number of tokens of all models merged so far."""
        return sum(model.tokens for model in self.models)

    def mistakes(self, merge_method: str, method: RegressionMethod, folder: Path) -> Iterator[str]:
        """Yields settings of a method whose Gram matrices cannot be added to those of the record, each after its key.

        Args:
            merge_method: Name of the method.
            method: The method, as the user has set it.
            folder: Folder of the merge that the record is about.
        """
        for name in _CHOICES if not self.samples else ():
            before, now = getattr(self, name), getattr(method, name)
            if before != now:
                yield (
                    f"parameters.{name}: {now!r} for {merge_method}, but the sums in {folder / SUMS_FOLDER} were made "
                    f"with {before!r}, by {self.merge_method}; expected the same in all merges of a sequence"
                )

    def to_text(self) -> str:
        """Formats the record as the text of its file."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_record(folder: Path) -> SequenceRecord:
    """Reads what an earlier merge says of itself and of those before it.

    Args:
        folder: Folder of the earlier merge.

    Raises:
        ConfigError: If there is no such folder, no sums, or a broken record.
    """
    expected = "expected the output of a merge with 'sequence: {keep_sums: true}', or 'keep_samples'"
    if not os.path.isdir(folder):
        raise ConfigError(f"sequence.previous: {folder} is no folder here; {expected}")
    path = folder / RECORD_FILE
    if not os.path.isfile(path):
        raise ConfigError(f"sequence.previous: {folder} has no sums ({RECORD_FILE} is not there); {expected}")
    raw: dict[str, Any] = read_json(path, error=ConfigError)
    try:
        return SequenceRecord.model_validate_json(to_json(raw))
    except pydantic.ValidationError as error:
        problems = explain(error, SequenceRecord)
        raise ConfigError(*(f"sequence.previous: {path}: {problem}" for problem in problems)) from None


def models_so_far(record: SequenceRecord | None, models: Mapping[str, tuple[str, float, int]]) -> list[MergedModel]:
    """Lists all models of a sequence.

    Args:
        record: Those merged before; `None` if there are none.
        models: Name → reference, weight and number of tokens of those that are merged now.
    """
    now = [MergedModel(name=name, model=m, weight=weight, tokens=n) for name, (m, weight, n) in models.items()]
    return [*(record.models if record is not None else ()), *now]


def sequence_section(models: Sequence[MergedModel], num_before: int, *, keeps_sums: bool, num_samples: int) -> str:
    """Makes the part of a model card that says what a sequence has merged, `num_before` models in earlier merges."""
    rows = [
        f"| {number} | {model.name} | `{Path(model.model).name}` | {model.weight:g} | {model.tokens:,} | "
        f"{'before' if number <= num_before else 'in this merge'} |"
        for number, model in enumerate(models, start=1)
    ]
    what = f"Samples of the calibration data ({num_samples} in all)" if num_samples else "The sums"
    data = "the rest of their data" if num_samples else "their data"
    kept = f"""{what} of all these models lie in `{SUMS_FOLDER}/`: more can be added without them and {data}, with
`sequence: {{previous: path/to/this/folder}}`."""
    return f"""
## Merged in sequence

{kept if keeps_sums or num_samples else "The sums of these models were not kept, so that this merge ends the sequence."}

| | name | model | weight | tokens | merged |
|---:|---|---|---:|---:|---|
{chr(10).join(rows)}
"""
