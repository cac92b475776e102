"""The output folder of a merge that ranks share: all must want the same thing, the first one opens it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from largemerge.distributed import Ranks
from largemerge.errors import LargemergeError
from largemerge.output import OutputFolder, changes, open_output

_MOST_PROBLEMS = 20


@contextmanager
def open_for_ranks(
    out: Path, manifest: Mapping[str, Any], inputs: list[Path], ranks: Ranks, *, resume: bool, force: bool
) -> Iterator[OutputFolder]:
    """Collective: the output folder, the first rank's own; for the others, what is finished in it.

    Raises:
        LargemergeError: If manifests differ between ranks; an `OutputError` as `open_output` does.
    """
    first = ranks.from_first(manifest)

    def check() -> None:
        unlike = changes(first, manifest)
        problems = [f"{change} here; expected the same config, files and versions everywhere" for change in unlike]
        if problems:
            raise LargemergeError(*problems[:_MOST_PROBLEMS])

    ranks.agree(check)
    with ExitStack() as stack:

        def open_it() -> OutputFolder:
            if not ranks.is_first:
                return OutputFolder(out, replaces=False)
            return stack.enter_context(open_output(out, manifest, inputs, resume=resume, force=force))

        folder = ranks.agree(open_it)
        folder.entries = ranks.from_first(folder.entries)
        yield folder
