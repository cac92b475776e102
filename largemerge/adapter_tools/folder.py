"""The folder of an adapter that is written: checked before the work, filled part by part, finished at once.

The rules are those of a merge (`output.py`): nothing is overwritten that was not to be, a run that was broken off is
resumed from its journal, and what makes the folder an adapter, `adapter_config.json`, comes last.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from largemerge.adapter_tools.peft_files import CONFIG_FILE, WEIGHTS_FILE
from largemerge.checkpoint.room import Need, room_problems
from largemerge.checkpoint.side_files import strangers
from largemerge.checkpoint.writer import Shard, ShardWriter
from largemerge.errors import OutputError
from largemerge.log import LOGGER
from largemerge.output import WORKING_FOLDER, OutputFolder, check_output

CARD_FILE = "README.md"
REPORT_FILES = ("extract_report.json", "merge_adapters_report.json")


def check_out(out: Path, inputs: list[Path], *, resume: bool, force: bool) -> None:
    """Refuses an output folder that is in the way, before the long work.

    Raises:
        OutputError: If it is, or holds what peft or Transformers would load and no adapter is made of.
    """
    if (out / "config.json").exists():
        raise OutputError(f"{out} holds a checkpoint, and --force would not replace it; choose another folder")
    check_output(out, inputs, resume=resume, force=force)
    if force and out.is_dir():
        others = [name for name in strangers(out, [CONFIG_FILE, WEIGHTS_FILE]) if not name.startswith("adapter_model")]
        if others:
            raise OutputError(
                f"{out} holds {', '.join(others[:5])}, which would be loaded with the adapter, and which --force would "
                "not replace; choose another folder"
            )


def check_room(out: Path, shard: Shard) -> None:
    """Checks that the disk has room for the adapter.

    Raises:
        OutputError: If it has not.
    """
    problems = room_problems([Need(out, shard.num_bytes, "the adapter", reuses=out / WORKING_FOLDER)])
    if problems:
        raise OutputError(*problems)


def finish_part(
    part: str, names: Collection[str], measured: Mapping[str, Any], folder: OutputFolder, writer: ShardWriter
) -> None:
    """Brings tensors that were written to the disk, and notes them in the journal with what was measured."""
    writer.flush()
    folder.record(part, {"digests": writer.take_digests(names), **measured})


def tell(console: Console, text: str) -> None:
    """Shows a line, and adds it to the log."""
    LOGGER.debug("%s", text)
    console.print(text, highlight=False, soft_wrap=True)


def remove_earlier(out: Path, kept: Collection[Path]) -> None:
    """Removes an adapter that lies in a folder: what makes it one first."""
    names = (CONFIG_FILE, *REPORT_FILES)
    for path in (*(out / name for name in names), *sorted(out.glob("adapter_model*"))):
        if path not in kept and path.is_file():
            path.unlink()
