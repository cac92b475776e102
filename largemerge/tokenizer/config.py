"""Settings of the output's tokenizer and vocabulary: mergekit's `tokenizer` and `tokenizer_source`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from largemerge.checkpoint.locate import Reference
from largemerge.config_file import LARGEST_COUNT, Strict

UNION, BASE = "union", "base"


class ZeroSource(Strict):
    """An embedding of zeros."""

    kind: Literal["zero"]


class TokenSource(Strict):
    """The embedding that a model has of some token, named by its text or its number."""

    kind: Literal["model_token"]
    model: Reference
    token: str | None = None
    token_id: int | None = Field(None, ge=0, le=LARGEST_COUNT)

    @pydantic.model_validator(mode="after")
    def _one_of_both(self) -> TokenSource:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("expected one of 'token' and 'token_id'")
        return self


def _source_kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in ("zero", "model_token") else "model"


Source = Annotated[
    Annotated[ZeroSource, pydantic.Tag("zero")]
    | Annotated[TokenSource, pydantic.Tag("model_token")]
    | Annotated[Reference, pydantic.Tag("model")],
    pydantic.Discriminator(_source_kind),
]
"""Where a token's embedding comes from; a model's name stands for its embedding of the same token."""


class TokenSettings(Strict):
    """Where one token's embedding comes from, for models that lack it; with `force`, for all of them."""

    source: Source | None = None
    force: bool = False

    @pydantic.model_validator(mode="after")
    def _forced_to_what(self) -> TokenSettings:
        if self.force and self.source is None:
            raise ValueError("'force' needs a 'source'")
        return self


class TokenizerSettings(Strict):
    """Settings of the output's vocabulary."""

    source: Reference = UNION
    """`union`, `base`, or a model, whose tokenizer becomes the output's."""
    tokens: dict[str, TokenSettings] = Field(default_factory=dict)
    """Settings by token; tokens that the tokenizer does not have are added to it."""
    pad_to_multiple_of: int | None = Field(None, ge=1, le=1 << 20)
    """The number of rows of the embeddings is rounded up to a multiple of this."""

    def models(self) -> Iterator[tuple[str, str]]:
        """Yields the models that embeddings of single tokens are taken from, after their places in the file."""
        for token, settings in self.tokens.items():
            source = settings.source
            if isinstance(source, TokenSource):
                yield f"tokenizer.tokens.{token}.source.model", source.model
            elif isinstance(source, str):
                yield f"tokenizer.tokens.{token}.source", source
