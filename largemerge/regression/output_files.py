"""The files beside the weights of a regression merge's output, and the check of its tokenizer.

find_files → SideFiles: what is copied from where      write_tokenizer → the tokenizer's files, where they are made anew
check_tokenizer → problems, notes: before the long work, and again on what was written
"""

from __future__ import annotations

from pathlib import Path

from largemerge.checkpoint.side_files import SideFiles, find_processor, find_side_files, find_tokenizer
from largemerge.regression.config import MergeConfig
from largemerge.regression.inputs import Inputs
from largemerge.tokenizer.compare import check_output_tokenizer
from largemerge.tokenizer.tokenizers import tokenizer_folder, write_files
from largemerge.tokenizer.vocabulary import Vocabulary


def find_files(config: MergeConfig, inputs: Inputs) -> SideFiles:
    """Finds the files that the output gets from its inputs: the base's if there is one, else the first candidate's."""
    models = [model for model in (inputs.base, *inputs.candidates) if model is not None]
    processor = find_processor(*(model.folder for model in models))
    source, own = _tokenizer_source(config, inputs), _vocabulary(inputs) is not None
    return find_side_files(inputs.reference, source, processor, models, vocabulary_files=not own)


def write_tokenizer(folder: Path, inputs: Inputs) -> None:
    """Writes the tokenizer of the output's own vocabulary, if it has one; else it is among the copied files."""
    made = _vocabulary(inputs)
    if made is not None:
        write_files(folder, made.tokenizer.files)


def check_tokenizer(config: MergeConfig, inputs: Inputs, written: Path | None = None) -> tuple[list[str], list[str]]:
    """Checks that the output's tokenizer loads, and encodes as its source does.

    Args:
        config: The configuration.
        inputs: The opened inputs.
        written: The output's folder; by default the files are copied for the moment.

    Returns:
        Problems and notes.
    """
    made = _vocabulary(inputs)
    return check_output_tokenizer(
        find_files(config, inputs),
        inputs.reference.config,
        made.tokenizer if made is not None else _tokenizer_source(config, inputs),
        trust_remote_code=config.trust_remote_code,
        write=lambda folder: write_tokenizer(folder, inputs),
        written=written,
    )


def _vocabulary(inputs: Inputs) -> Vocabulary | None:
    return inputs.tokens.vocabulary if inputs.tokens is not None else None


def _tokenizer_source(config: MergeConfig, inputs: Inputs) -> Path:
    models = {model.name: model for model in (inputs.base, *inputs.candidates) if model is not None}
    folders = {name: tokenizer_folder(model, inputs.adapters.get(name)) for name, model in models.items()}
    source = config.vocabulary.source if config.vocabulary is not None else None
    return folders[source] if source in folders else find_tokenizer(*folders.values())
