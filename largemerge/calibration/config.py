"""Settings of calibration data: the part of the YAML that says where it lies and how it is read."""

from __future__ import annotations

import string
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from largemerge.config_file import LARGEST_COUNT, LARGEST_SEED, Strict


def template_columns(template: str) -> list[str]:
    r"""Lists the columns that a text template names: `["query", "response"]` for `"{query}\n{response}"`.

    Raises:
        ValueError: If it names none, or asks for more than a column.
    """
    fields = [
        (field, spec, conversion)
        for _, field, spec, conversion in string.Formatter().parse(template)
        if field is not None
    ]
    if not fields or any(not field.isidentifier() or spec or conversion for field, spec, conversion in fields):
        raise ValueError(f"{template!r} is no template; expected columns in braces, such as '{{query}} {{response}}'")
    return list(dict.fromkeys(field for field, _, _ in fields))


def _check_template(template: str) -> str:
    template_columns(template)
    return template


Template = Annotated[str, pydantic.AfterValidator(_check_template)]
"""A text with names of columns in braces."""


class CalibrationDefaults(Strict):
    """Defaults of all candidates: how calibration samples are drawn and batched."""

    num_samples: int = Field(256, ge=1, le=LARGEST_COUNT)
    """Samples of each candidate; published methods stop gaining at 256."""
    max_length: int = Field(2048, ge=1, le=LARGEST_COUNT)
    """Tokens at which a text sample is truncated."""
    batch_size: int = Field(8, ge=1, le=LARGEST_COUNT)
    """Samples in one forward pass; the result does not depend on it."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Seed that draws the samples where the data has more than `num_samples`."""


class CalibrationConfig(Strict):
    """Calibration data of one candidate, or what stands for it. Unset numbers come from the defaults of all."""

    data: str | None = Field(None, min_length=1)
    """A .safetensors, .jsonl, .json, .csv, .parquet or .txt file, a folder of images, or a Hub dataset id."""
    grams: str | None = Field(None, min_length=1)
    """In place of data: a folder with the Gram matrices that `largemerge gram` has made of it."""
    num_samples: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    max_length: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    batch_size: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    subset: str | None = None
    """Configuration name of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset."""
    only: dict[str, str | int | bool] | None = Field(None, min_length=1)
    """Rows that are drawn from: those whose columns have these values, of labels numbers or names; default: all."""
    text_field: str | None = None
    """Column with the text; default: `text` where there is one."""
    text_template: Template | None = None
    """Template of the text, from several columns: `"### Question:\\n{query}\\n### Answer:\\n{response}"`."""
    messages_field: str | None = None
    """Column with chat messages, put through the tokenizer's chat template."""
    target_field: str | None = None
    """Column with the decoder's text, for encoder-decoder models."""
    image_field: str | None = None
    """Column with images; default: `image` where there is one."""
    loss_mask_field: str | None = None
    """Column with 0/1 per token (as many as the text has tokens): 0 keeps a token out of the statistics."""
    assistant_only: bool = False
    """Only the assistant's tokens enter the statistics; needs `messages_field`."""
    one_per: Literal["document", "line"] = "document"
    """Part of a .txt file that is one sample: a document (blank lines separate them) or a line."""
    pack: bool = False
    """Join the texts, separated by the end-of-text token, and cut them into samples of `max_length` tokens."""

    @property
    def others_set(self) -> list[str]:
        """Keys beside `grams` that are set to anything else than their default."""
        fields = type(self).model_fields
        return [key for key in fields if key != "grams" and getattr(self, key) != fields[key].default]

    def with_defaults(self, defaults: CalibrationDefaults) -> CalibrationConfig:
        """Returns a copy with every unset number taken from `defaults`."""
        unset = {name: value for name, value in defaults if getattr(self, name) is None}
        return self.model_copy(update=unset)
