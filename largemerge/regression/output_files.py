"""The files beside the weights of a regression merge's output, and the check of its tokenizer.

find_files → SideFiles: what is copied from where
check_tokenizer → problems, notes: before the long work, and again on what was written
"""

from __future__ import annotations

from pathlib import Path

from largemerge.checkpoint.side_files import SideFiles, find_processor, find_side_files, find_tokenizer
from largemerge.regression.config import MergeConfig
from largemerge.regression.inputs import Inputs
from largemerge.tokenizer.compare import check_output_tokenizer
from largemerge.tokenizer.tokenizers import tokenizer_folder


def find_files(config: MergeConfig, inputs: Inputs) -> SideFiles:
    """Finds the files that the output gets from its inputs: the base's if there is one, else the first candidate's."""
    models = [model for model in (inputs.base, *inputs.candidates) if model is not None]
    processor = find_processor(*(model.folder for model in models))
    return find_side_files(inputs.reference, _tokenizer_source(config, inputs), processor, models)


def check_tokenizer(config: MergeConfig, inputs: Inputs, written: Path | None = None) -> tuple[list[str], list[str]]:
    """Checks that the output's tokenizer loads, and encodes as its source does.

    Args:
        config: The configuration.
        inputs: The opened inputs.
        written: The output's folder; by default the files are copied for the moment.

    Returns:
        Problems and notes.
    """
    return check_output_tokenizer(
        find_files(config, inputs),
        inputs.reference.config,
        _tokenizer_source(config, inputs),
        trust_remote_code=config.trust_remote_code,
        written=written,
    )


def _tokenizer_source(config: MergeConfig, inputs: Inputs) -> Path:
    models = {model.name: model for model in (inputs.base, *inputs.candidates) if model is not None}
    folders = {name: tokenizer_folder(model, inputs.adapters.get(name)) for name, model in models.items()}
    source = config.tokenizer_source
    return find_tokenizer(*folders.values()) if source is None else folders[source]
