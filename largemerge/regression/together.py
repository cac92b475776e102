"""What the ranks of a merge do together for one block: whose work is what, adding up, spreading what was solved.

    every rank:      its (candidate, batch) items → its part of every group's sums
    owner of group:  the parts, added up → solved → broadcast

Hidden states never leave their rank. With one rank all of this is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from largemerge.distributed import Ranks
from largemerge.node import Node
from largemerge.passes import BlockPass
from largemerge.regression.averages import RunningAverages
from largemerge.regression.sums import GroupSums
from largemerge.sharing import choose_owners
from largemerge.treatment import BlockPlan, GroupPlan
from largemerge.weights import Tensors


@dataclass(frozen=True)
class ReadItem:
    """The tensors of one candidate for one pass over a block.

    Attributes:
        block: Its name.
        number: Of the pass.
        candidate: Whose.
        names: Of the tensors.
        replayed: Whether the block was finished by an earlier run.
    """

    block: str
    number: int
    candidate: int
    names: tuple[str, ...]
    replayed: bool

    @property
    def key(self) -> str:
        """The same on all ranks, and once in a merge."""
        return f"{self.block}-{self.number}-{self.candidate}"


@dataclass(frozen=True)
class Together:
    """Who does what.

    Attributes:
        ranks: That share the merge.
        holders: By candidate: the ranks that have some of its batches, in order.
        node: Ranks that share this machine.
    """

    ranks: Ranks
    holders: Sequence[Sequence[int]]
    node: Node

    def is_home(self, candidate: int) -> bool:
        """Whether this rank counts what does not depend on the candidate's rows."""
        return self.holders[candidate][0] == self.ranks.rank

    def has_data(self, candidate: int) -> bool:
        """Whether this rank has some of the candidate's batches."""
        return self.ranks.rank in self.holders[candidate]

    def wants(self, candidate: int) -> bool:
        """Whether this rank needs the candidate's blocks; the first candidate's are the anchor of all."""
        return candidate == 0 or self.has_data(candidate)

    def reads(self, candidate: int) -> bool:
        """Whether this rank reads the candidate's blocks from disk, maybe for others on its machine."""
        return self.node.reader(self._wanted_by(candidate, replayed=False)) == self.ranks.rank

    def load(self, item: ReadItem, read: Callable[[], Tensors]) -> Tensors:
        """A candidate's tensors, from disk or from the rank of this machine that reads them."""
        wanted_by = self._wanted_by(item.candidate, replayed=item.replayed)
        reads = self.node.reader(wanted_by) == self.ranks.rank
        with nullcontext() if reads else self.ranks.waits():
            return self.node.load(item.key, wanted_by, read)

    def _wanted_by(self, candidate: int, *, replayed: bool) -> Sequence[int]:
        """The ranks that need a candidate's tensors."""
        return range(self.ranks.size) if candidate == 0 and not replayed else self.holders[candidate]

    def owners(self, groups: Sequence[GroupPlan]) -> dict[str, int]:
        """Which rank solves which group, by leader."""
        return choose_owners({group.leader: group.solve_operations for group in groups}, self.ranks.size)

    def add_up_(self, each: BlockPass, sums: dict[str, GroupSums], averages: RunningAverages) -> Tensors:
        """Collective: the sums of every group become complete at its owner, and are gone elsewhere.

        Returns:
            The averages, on all ranks.
        """
        if self.ranks.size == 1:
            return averages.finish()
        for leader, owner in self.owners(each.groups).items():
            sums[leader].visit_sums_(partial(self.ranks.add_up_, owner=owner))
            if owner != self.ranks.rank:
                del sums[leader]
        averages.visit_sums_(self.ranks.add_up_everywhere_)
        return averages.finish()

    def spread_(self, block: BlockPlan, each: BlockPass, anchor: Tensors, merged: Tensors) -> None:
        """Collective: the weights that were solved by their owners become known to all."""
        if self.ranks.size == 1:
            return
        dtypes = {plan.name: plan.dtype for plan in block.tensors}
        owners = self.owners(each.groups)
        for group in each.groups:
            for path in group.outputs:
                name = f"{block.name}.{path}.weight"
                if name not in merged:
                    merged[name] = torch.empty_like(
                        anchor.pop(name), dtype=dtypes[name], memory_format=torch.contiguous_format
                    )
                self.ranks.copy_(merged[name], owners[group.leader])

    def everybodys(self, linears: Mapping[str, Any], bytes_read: int) -> tuple[dict[str, Any], int]:
        """Collective: the reports of all linears, and the bytes that all ranks have read."""
        told = self.ranks.gather((dict(linears), bytes_read))
        joined = {name: report for own, _ in told for name, report in own.items()}
        return joined, sum(read for _, read in told)
