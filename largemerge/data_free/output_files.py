"""The files beside the weights of a data-free merge's output, and the check of them.

find_files → SideFiles: what is copied from where      write_tokenizer → the tokenizer's files
check_tokenizer → problems, notes: before the long work, and again on what was written
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from largemerge.checkpoint.index import read_json
from largemerge.checkpoint.side_files import (
    GENERATION_FILES,
    SideFiles,
    find_processor,
    find_side_files,
    find_tokenizer,
)
from largemerge.errors import CheckpointError
from largemerge.tokenizer.chat_templates import with_template
from largemerge.tokenizer.compare import check_output_tokenizer
from largemerge.tokenizer.token_ids import move_ids
from largemerge.tokenizer.tokenizers import tokenizer_files, tokenizer_folder, write_files

if TYPE_CHECKING:
    from largemerge.data_free.plan import DataFreePlan


def find_files(plan: DataFreePlan) -> SideFiles:
    """Finds the files that the output gets from its inputs; those of a vocabulary of its own are not among them."""
    reference, checkpoints = plan.checkpoints[plan.reference], list(plan.checkpoints.values())
    processor = find_processor(reference.folder, *(checkpoint.folder for checkpoint in checkpoints))
    source, own = tokenizer_source(plan), plan.vocabulary is not None
    return find_side_files(reference, source, processor, checkpoints, vocabulary_files=not own)


def write_tokenizer(folder: Path, plan: DataFreePlan) -> None:
    """Writes the output's tokenizer: its vocabulary's, else a copy of the reference's, else of the first there is."""
    files = plan.vocabulary.tokenizer.files if plan.vocabulary is not None else tokenizer_files(tokenizer_source(plan))
    write_files(folder, files if plan.template is None else with_template(files, plan.template))


def move_generation_ids(folder: Path, plan: DataFreePlan) -> None:
    """Sets the numbers of tokens that have moved in a folder's `generation_config.json`, if there is one."""
    path, vocabulary = folder / GENERATION_FILES[0], plan.vocabulary
    if vocabulary is not None and path.is_file():
        config = read_json(path, path.name)
        move_ids(config, vocabulary.reference.ids, vocabulary.tokenizer.ids, vocabulary.tokenizer.special)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_made(folder: Path, plan: DataFreePlan) -> None:
    write_tokenizer(folder, plan)
    with contextlib.suppress(CheckpointError):  # which the check of what has been written tells
        move_generation_ids(folder, plan)


def check_tokenizer(plan: DataFreePlan, written: Path | None = None) -> tuple[list[str], list[str]]:
    """Checks that the output's tokenizer loads, and encodes as its source does.

    Args:
        plan: The plan.
        written: The output's folder; by default the files are written for the moment.

    Returns:
        Problems and notes.
    """
    return check_output_tokenizer(
        find_files(plan),
        plan.checkpoints[plan.reference].config,
        plan.vocabulary.tokenizer if plan.vocabulary is not None else tokenizer_source(plan),
        trust_remote_code=plan.config.trust_remote_code,
        write=lambda folder: _write_made(folder, plan),
        written=written,
    )


def tokenizer_source(plan: DataFreePlan) -> Path:
    """Returns the folder of the output's tokenizer: the reference's if it has one, else the first that has."""
    models = [plan.reference, *plan.checkpoints]
    return find_tokenizer(*(tokenizer_folder(plan.checkpoints[name], plan.adapters.get(name)) for name in models))
