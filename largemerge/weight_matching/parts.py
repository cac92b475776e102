"""Parts of an alignment: what the journal has of them, and how ranks share them.

parts that the journal lacks ──► ranks, one each ──► gathered, recorded by the first ──► known to all
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from largemerge.distributed.ranks import Ranks
from largemerge.log import stage
from largemerge.output import OutputFolder

Entry = Mapping[str, Any]
"""What the journal has of a part."""


@dataclass(frozen=True)
class Parts:
    """The parts of an alignment.

    Attributes:
        folder: The output folder, whose journal keeps what was found.
        ranks: The ranks that share the parts.
        quiet: Do not say what is being done.
    """

    folder: OutputFolder
    ranks: Ranks
    quiet: bool

    def tell(self, text: str) -> None:
        """Says what is being done."""
        if self.ranks.is_first and not self.quiet:
            stage(text)

    def share(self, names: Sequence[str], do: Callable[[int], Entry]) -> list[Entry]:
        """Does all parts that the journal does not have yet, each on one rank. Collective.

        Args:
            names: What the journal calls the parts.
            do: Does one, by its number.

        Returns:
            What the journal has of each of them.
        """
        missing = [number for number, name in enumerate(names) if name not in self.folder.entries]
        for start in range(0, len(missing), self.ranks.size):
            at_once = missing[start : start + self.ranks.size]
            own = at_once[self.ranks.rank] if self.ranks.rank < len(at_once) else None
            gathered = self.ranks.gather(do(own) if own is not None else {})
            for number, entry in zip(at_once, gathered, strict=False):
                self._keep(names[number], entry)
        return [self.folder.entries[name] for name in names]

    def together(self, name: str, do: Callable[[], Entry]) -> Entry:
        """Does one part on all ranks, unless the journal has it. Collective.

        Args:
            name: What the journal calls it.
            do: Does it, and returns on all ranks the same; collective itself.
        """
        if name not in self.folder.entries:
            self._keep(name, do())
        return self.folder.entries[name]

    def _keep(self, name: str, entry: Entry) -> None:
        if self.ranks.is_first:
            self.folder.record(name, entry)
        self.folder.entries[name] = dict(entry)
