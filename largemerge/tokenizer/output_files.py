"""The files beside an output's weights, alike for both kinds of merges.

    models, adapters, vocabulary ──► find_output_files ──► OutputFiles ─┬─► write: copies, tokenizer, moved numbers
                                                                        └─► check: the tokenizer loads and encodes

They are found once, for a plan, and written twice: for a rehearsal before the work, and at its end.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largemerge.checkpoint.index import Checkpoint, read_json
from largemerge.checkpoint.lora import Adapter
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
from largemerge.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class OutputFiles:
    """What an output has beside its weights.

    Attributes:
        copied: What is copied from where; a vocabulary of its own is not among it.
        config: Config of the reference, which decides on the class of the tokenizer.
        tokenizer_source: Folder of the tokenizer, where the output has no vocabulary of its own.
        vocabulary: The output's own vocabulary, if it has one.
        template: The output's chat template, where it is not its tokenizer's.
        trust_remote_code: Whether the tokenizer may be code that lies beside it.
    """

    copied: SideFiles
    config: Mapping[str, Any]
    tokenizer_source: Path
    vocabulary: Vocabulary | None
    template: str | None
    trust_remote_code: bool

    def write(self, out: Path) -> None:
        """Writes all of it into the output's folder.

        Raises:
            CheckpointError: If a file of the inputs is not what it should be.
        """
        self.copied.copy(out)
        self.write_tokenizer(out / self.copied.inner)
        self._move_generation_ids(out / self.copied.inner)

    def write_tokenizer(self, folder: Path) -> None:
        """Writes the output's tokenizer alone, with its template."""
        own = self.vocabulary
        files = own.tokenizer.files if own is not None else tokenizer_files(self.tokenizer_source)
        write_files(folder, files if self.template is None else with_template(files, self.template))

    def check(self, written: Path | None = None) -> tuple[list[str], list[str]]:
        """Checks that the output's tokenizer loads, and encodes as its source does.

        Args:
            written: The output's folder; by default the files are written for the moment.

        Returns:
            Problems and notes.
        """
        return check_output_tokenizer(
            self.copied,
            self.config,
            self.vocabulary.tokenizer if self.vocabulary is not None else self.tokenizer_source,
            trust_remote_code=self.trust_remote_code,
            write=self._write_made,
            written=written,
        )

    def _write_made(self, folder: Path) -> None:
        self.write_tokenizer(folder)
        with contextlib.suppress(CheckpointError):  # which the check of what has been written tells
            self._move_generation_ids(folder)

    def _move_generation_ids(self, folder: Path) -> None:
        """Sets the numbers of tokens that have moved in a folder's `generation_config.json`, if there is one."""
        path, own = folder / GENERATION_FILES[0], self.vocabulary
        if own is not None and path.is_file():
            config = read_json(path, path.name)
            move_ids(config, own.reference.ids, own.tokenizer.ids, own.tokenizer.special)
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def find_output_files(
    reference: Checkpoint,
    models: Sequence[Checkpoint],
    adapters: Mapping[str, Adapter],
    *,
    tokenizer_of: str | None = None,
    vocabulary: Vocabulary | None = None,
    template: str | None = None,
    trust_remote_code: bool = False,
) -> OutputFiles:
    """Finds what an output gets beside its weights.

    Args:
        reference: The checkpoint of the output's config.
        models: All models, in the order in which tokenizer and processor are looked for.
        adapters: Adapters by their models' names: one that brings embeddings may bring their tokenizer.
        tokenizer_of: Name of the model whose tokenizer it is; by default the first that has one.
        vocabulary: The output's own vocabulary, if it has one.
        template: The output's chat template, where it is not its tokenizer's.
        trust_remote_code: Allow the tokenizer to be code that lies beside it.

    Raises:
        CheckpointError: If such a file is not what it should be; it names all.
    """
    folders = {model.name: tokenizer_folder(model, adapters.get(model.name)) for model in models}
    source = folders[tokenizer_of] if tokenizer_of in folders else find_tokenizer(*folders.values())
    processor = find_processor(*(model.folder for model in models))
    copied = find_side_files(reference, source, processor, models, vocabulary_files=vocabulary is None)
    return OutputFiles(copied, reference.config, source, vocabulary, template, trust_remote_code)
