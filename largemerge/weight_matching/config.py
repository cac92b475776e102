"""Settings of `align`: how the models of a merge are brought close to each other before it."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from largemerge.checkpoint.locate import Reference
from largemerge.config_file import Strict, shown


class AlignSettings(Strict):
    """Which model the others are brought close to."""

    reference: Reference | None = None
    """A model; default: the base, else the first one of the merge."""
    residual_stream: bool = False
    """Whether the features between blocks are permuted, too, where the models permit it."""


def _read_align(value: object) -> Any:
    """Returns settings; `weights` stands for those by default."""
    if value == "weights":
        return {}
    if isinstance(value, dict | AlignSettings):
        return value
    raise ValueError(f"expected 'weights', or a mapping such as {{reference: ./model}}, found {shown(value)}")


Align = Annotated[AlignSettings, pydantic.BeforeValidator(_read_align)]
"""The key `align` of a configuration."""
