"""What a folder of Gram matrices says of itself: whose they are, of which data, and how they were made.

    FOLDER/grams.json               a `GramRecord`
    FOLDER/sums/*.safetensors       the matrices XᵀX of one candidate, a file for every block (gram_files.py)

`largemerge gram` writes such folders, and `calibration: {grams: FOLDER}` reads them in place of data. RegMean's sums
depend on nothing but the candidate and its data, so they are good for every merge of that candidate by RegMean, with
whatever other models, weights, ridge, anchor and scales. They are of no use for any other model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from largemerge.checkpoint.digests import digest_of
from largemerge.config_file import Strict, explain, to_json
from largemerge.errors import ConfigError
from largemerge.text_files import leads_out, read_json

GRAMS_FILE = "grams.json"
"""The record, which is written last: a folder without it is not whole."""
_EXPECTED = "expected a folder that 'largemerge gram' has written"

FileName = Annotated[str, Field(min_length=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""A digest by XXH3, 128 bits."""


class ModelFile(Strict):
    """A file of the candidate: what tells it from any other."""

    bytes: int = Field(ge=0)
    xxh3_128: Digest


class SumsFile(Strict):
    """A file of Gram matrices, with digests as in the report of a merge."""

    bytes: int = Field(ge=0)
    header: Digest
    tensors: dict[str, Digest] = Field(min_length=1)


class GramGroup(Strict):
    """The Gram matrix of the linears that read one tensor."""

    inputs: int = Field(ge=1)
    tokens: int = Field(ge=0)
    """Number of rows that it is the sum of."""
    linears: tuple[str, ...] = Field(min_length=1)
    """Paths of the linears, in the block, or in the model for those of the head."""


class InputShape(Strict):
    """A forward argument of the data: shape of one sample, at most, and dtype."""

    shape: tuple[Annotated[int, Field(ge=0)], ...]
    dtype: str


class GramRecord(Strict):
    """What `grams.json` holds."""

    versions: dict[str, str]
    """Versions of Python and of the packages that wrote it."""
    model: str
    """The candidate as the configuration had it; of a local folder the last part."""
    class_name: str
    model_files: dict[FileName, ModelFile] = Field(min_length=1)
    """Files of config, weights and adapters."""
    data: str
    """Name of the data."""
    data_sha256: str
    """Hash of all batches as the model has seen them."""
    num_samples: int = Field(ge=1)
    inputs: dict[str, InputShape] = Field(min_length=1)
    """The data's forward arguments, from which a merge learns what the model is run on."""
    examples: dict[str, list[Any]] = Field(default_factory=dict)
    """Integers of the first samples where pixels or sounds stand beside text, the text's own tokens left out."""
    compute_dtype: str
    """Dtype of the forward passes."""
    gram_dtype: Literal["float32"]
    groups: dict[Annotated[str, Field(pattern=r"^[^/]+$")], dict[str, GramGroup]] = Field(min_length=1)
    """Block, or `head` → first linear of a group → its Gram matrix."""
    sums: dict[FileName, SumsFile] = Field(min_length=1)
    check: str = ""
    """Digest of all the rest."""

    @property
    def tokens(self) -> int:
        """Number of tokens that count, in the stack that has most."""
        return max(group.tokens for groups in self.groups.values() for group in groups.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the files of sums."""
        return sum(file.bytes for file in self.sums.values())

    def to_text(self) -> str:
        """Formats the record, with its digest, as the text of its file."""
        whole = self.model_copy(update={"check": self._digest()})
        return json.dumps(whole.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def _digest(self) -> str:
        text = json.dumps(self.model_dump(mode="json", exclude={"check"}), sort_keys=True)
        return digest_of(text.encode())

    @property
    def is_as_written(self) -> bool:
        """Whether nothing of it has changed since it was written."""
        return self.check == self._digest()


def read_record(folder: Path, key: str) -> GramRecord:
    """Reads what a folder of Gram matrices says of itself.

    Args:
        folder: The folder.
        key: Key of the configuration that names it, for messages.

    Raises:
        ConfigError: If there is no such folder, or no whole one, or its record is broken.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"{key}: {folder} is no folder here; {_EXPECTED}")
    path = folder / GRAMS_FILE
    if not os.path.isfile(path):
        inside = sorted(str(each.parent.name) for each in folder.glob(f"*/{GRAMS_FILE}"))
        if inside:
            raise ConfigError(
                f"{key}: {folder} holds those of several models; expected the folder of one: {inside[:5]}"
            )
        raise ConfigError(f"{key}: {folder} has no {GRAMS_FILE}; {_EXPECTED}, to its end")
    raw: dict[str, Any] = read_json(path, error=ConfigError)
    try:
        record = GramRecord.model_validate_json(to_json(raw))
    except pydantic.ValidationError as error:
        raise ConfigError(*(f"{key}: {path}: {problem}" for problem in explain(error, GramRecord))) from None
    if not record.is_as_written or any(map(leads_out, record.sums)):
        raise ConfigError(f"{key}: {path} is not as it was written; get the folder again, or make it anew")
    return record
