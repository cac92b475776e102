"""What the ranks of a merge exchange for one block: sums reduced to their owners, merged weights broadcast.

    every rank         its (candidate, batch) items → its part of every group's sums
    group of ranks     those with parts of the same last candidate: its Gram all-reduced → some right-hand sides each
    owner of a group   the parts, reduced → solved → broadcast

Sums travel while others are still collected, and merged weights while others are solved. Hidden states never leave
their rank. With one rank nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from largemerge.checkpoint.tensor_info import Tensors
from largemerge.distributed.collectives import AsyncCollectives
from largemerge.distributed.partition import Partition, choose_owners
from largemerge.distributed.ranks import Ranks
from largemerge.distributed.shared_memory import Node
from largemerge.regression.averages import RunningAverages
from largemerge.regression.group_sums import GroupSums, Part
from largemerge.regression.tensor_plan import LinearGroup


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
class RankExchange:
    """Who does what.

    Attributes:
        ranks: That share the merge.
        shares: Who has what.
        node: Ranks that share this machine.
        exchange: Between the ranks; `None` where there is one.
    """

    ranks: Ranks
    shares: Partition
    node: Node
    exchange: AsyncCollectives | None

    def is_primary(self, candidate: int) -> bool:
        """Whether this rank counts what does not depend on the candidate's rows."""
        return self.ranks_with_data[candidate][0] == self.ranks.rank

    def has_data(self, candidate: int) -> bool:
        """Whether this rank has some of the candidate's batches."""
        return self.ranks.rank in self.ranks_with_data[candidate]

    @cached_property
    def ranks_with_data(self) -> Sequence[Sequence[int]]:
        """By candidate: the ranks that have some of its batches, in order."""
        return self.shares.ranks_with_data

    def part(self, candidate: int, own_tokens: int) -> Part:
        """What this rank counts of a candidate."""
        rank_group = self._rank_groups[candidate]
        if len(rank_group) < 2 or self.ranks.rank not in rank_group:
            return Part(own_tokens, self.is_primary(candidate))
        return Part(own_tokens, self.is_primary(candidate), rank_group.index(self.ranks.rank), len(rank_group))

    @cached_property
    def _rank_groups(self) -> Sequence[Sequence[int]]:
        return self.shares.rank_groups

    @property
    def last(self) -> int:
        """The last candidate that adds something here; the first one, if none does."""
        return max(filter(self.has_data, range(len(self.ranks_with_data))), default=0)

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
        with nullcontext() if reads else self.ranks.blocked():
            return self.node.load(item.key, wanted_by, read)

    def _wanted_by(self, candidate: int, *, replayed: bool) -> Sequence[int]:
        """The ranks that need a candidate's tensors."""
        return range(self.ranks.size) if candidate == 0 and not replayed else self.ranks_with_data[candidate]

    def begin(self, groups: Sequence[LinearGroup]) -> PassExchange:
        """For one pass over a block."""
        costs = {group.leader: group.solve_operations for group in groups}
        dearest_first = sorted(groups, key=lambda group: -group.solve_operations)
        return PassExchange(self, dearest_first, choose_owners(costs, self.ranks.size))

    def gather_reports(self, linears: Mapping[str, Any], bytes_read: int) -> tuple[dict[str, Any], int]:
        """Collective: the reports of all linears, and the bytes that all ranks have read."""
        told = self.ranks.gather((dict(linears), bytes_read))
        joined = {name: report for own, _ in told for name, report in own.items()}
        return joined, sum(read for _, read in told)


@dataclass
class PassExchange:
    """What is exchanged in one pass over a block. All ranks complete its groups in the same order, and spread them so.

    Attributes:
        rank_exchange: The ranks.
        groups: In the order in which they are completed and solved, the dearest first: its owner solves it while others
            are still at the right-hand sides of the rest.
        owners: By group.
    """

    together: RankExchange
    groups: Sequence[LinearGroup]
    owners: Mapping[str, int]
    _adding: dict[str, Future[Any]] = field(default_factory=dict)
    _sharing: dict[str, Future[Any]] = field(default_factory=dict)
    _others: list[Future[Any]] = field(default_factory=list)

    def owns(self, leader: str) -> bool:
        """Whether this rank solves the group."""
        return self.owners[leader] == self.together.ranks.rank

    def share_gram(self, leader: str, sums: GroupSums) -> None:
        """Collective in a team: its present candidate's Gram becomes that of all of its ranks."""
        if self.together.exchange is not None:
            self._sharing[leader] = self.together.exchange.share(sums.gram.candidate_views())

    def wait_for_gram(self, leader: str) -> None:
        """Until it is, if it is shared."""
        if leader in self._sharing and self.together.exchange is not None:
            self.together.exchange.wait(self._sharing.pop(leader))

    def complete(self, leader: str, sums: GroupSums) -> None:
        """Collective: this rank has added all that it has to the sums of a group."""
        if self.together.exchange is not None:
            self._adding[leader] = self.together.exchange.reduce(sums.views(), self.owners[leader])

    def complete_averages(self, averages: RunningAverages) -> None:
        """Collective: as with a group's sums; all ranks get the averages."""
        exchange, views = self.together.exchange, averages.views()
        if exchange is not None and views:
            exchange.reduce(views, 0)
            self._others.append(exchange.copy(views, 0))

    def wait_for_sums(self, leader: str) -> None:
        """Until a group's sums are those of all ranks at its owner, and no longer needed elsewhere."""
        if self.together.exchange is not None:
            self.together.exchange.wait(self._adding.pop(leader))

    def broadcast(self, group: LinearGroup, anchor: Tensors, merged: Tensors) -> None:
        """Collective: the weights that a group's owner has solved are to become known to all."""
        exchange = self.together.exchange
        if exchange is None:
            return
        for linear in group.linears if not self.owns(group.leader) else ():
            like = anchor.pop(linear.name)
            merged[linear.name] = torch.empty_like(like, dtype=linear.dtype, memory_format=torch.contiguous_format)
        self._others.append(exchange.copy([merged[linear.name] for linear in group.linears], self.owners[group.leader]))

    def wait(self) -> None:
        """Until everything is everywhere."""
        while self._others and self.together.exchange is not None:
            self.together.exchange.wait(self._others.pop(0))
