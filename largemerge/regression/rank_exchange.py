"""What the ranks of a merge exchange for one block: sums reduced to their owners, merged weights broadcast.

    every rank                 its (candidate, batch) items → its part of every group's sums
    group of ranks             ranks with parts of the same last candidate: its Gram all-reduced → some rows of the
                               right-hand side each
    owner of a linear group    the parts, reduced → solved → broadcast

Sums are reduced while others are still collected, and merged weights broadcast while others are solved. Hidden states
never leave their rank. With one rank nothing is exchanged, and every method here returns at once.
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
from largemerge.regression.averages import RunningAverages, RunningScales
from largemerge.regression.essential import Sums
from largemerge.regression.group_sums import GroupSums, RankPart
from largemerge.regression.tensor_plan import LinearGroup


@dataclass(frozen=True)
class ReadItem:
    """The tensors of one candidate for one pass over a block.

    Attributes:
        block: Name of the block.
        pass_number: Number of the pass over the block.
        candidate: Number of the candidate.
        names: Names of the tensors.
        replayed: Whether the block was finished by an earlier run.
    """

    block: str
    pass_number: int
    candidate: int
    names: tuple[str, ...]
    replayed: bool

    @property
    def key(self) -> str:
        """Key that is the same on all ranks, and unique in a merge."""
        return f"{self.block}-{self.pass_number}-{self.candidate}"


@dataclass(frozen=True)
class RankExchange:
    """What each rank reads, counts and solves.

    Attributes:
        ranks: The ranks of the merge.
        partition: Batches of every rank.
        node: Ranks that share this machine.
        collectives: Collectives between the ranks; `None` for one rank.
    """

    ranks: Ranks
    partition: Partition
    node: Node
    collectives: AsyncCollectives | None

    def is_primary(self, candidate: int) -> bool:
        """Whether this rank counts what does not depend on the candidate's rows: averages, distances."""
        return self.ranks_with_data[candidate][0] == self.ranks.rank

    def has_data(self, candidate: int) -> bool:
        """Whether this rank has some of the candidate's batches."""
        return self.ranks.rank in self.ranks_with_data[candidate]

    @cached_property
    def ranks_with_data(self) -> Sequence[Sequence[int]]:
        """The ranks that have some of each candidate's batches, in order."""
        return self.partition.ranks_with_data

    @cached_property
    def _rank_groups(self) -> Sequence[Sequence[int]]:
        return self.partition.rank_groups

    @property
    def last_candidate(self) -> int:
        """The last candidate that adds something on this rank; the first one, if none does."""
        return max(filter(self.has_data, range(len(self.ranks_with_data))), default=0)

    def part(self, candidate: int, own_tokens: int) -> RankPart:
        """What this rank counts of a candidate."""
        rank_group = self._rank_groups[candidate]
        if len(rank_group) < 2 or self.ranks.rank not in rank_group:
            return RankPart(own_tokens, self.is_primary(candidate))
        return RankPart(own_tokens, self.is_primary(candidate), rank_group.index(self.ranks.rank), len(rank_group))

    def wants(self, candidate: int) -> bool:
        """Whether this rank needs the candidate's blocks; those of the first candidate are the anchor on all ranks."""
        return candidate == 0 or self.has_data(candidate)

    def reads_from_disk(self, candidate: int) -> bool:
        """Whether this rank reads the candidate's blocks from disk, for all ranks of its machine."""
        return self.node.reader(self._wanted_by(candidate, replayed=False)) == self.ranks.rank

    def load(self, item: ReadItem, read: Callable[[], Tensors]) -> Tensors:
        """Loads a candidate's tensors from disk, or from the rank of this machine that reads them."""
        wanted_by = self._wanted_by(item.candidate, replayed=item.replayed)
        reads = self.node.reader(wanted_by) == self.ranks.rank
        with nullcontext() if reads else self.ranks.blocked():
            return self.node.load(item.key, wanted_by, read)

    def _wanted_by(self, candidate: int, *, replayed: bool) -> Sequence[int]:
        """The ranks that need a candidate's tensors."""
        return range(self.ranks.size) if candidate == 0 and not replayed else self.ranks_with_data[candidate]

    def begin_pass(self, groups: Sequence[LinearGroup], dtype: torch.dtype | None = None) -> PassExchange:
        """Chooses the owners of the groups that are solved in one pass over a block.

        Args:
            groups: The groups.
            dtype: Dtype of what is solved; default: that in which each weight is written.
        """
        costs = {group.leader: group.solve_operations for group in groups}
        dearest_first = sorted(groups, key=lambda group: -group.solve_operations)
        owners = choose_owners(costs, self.ranks.size)
        return PassExchange(self.ranks.rank, self.collectives, dearest_first, owners, dtype)

    def gather_reports(self, linears: Mapping[str, Any], bytes_read: int) -> tuple[dict[str, Any], int]:
        """Collective: gathers the reports of all linears, and the bytes that all ranks have read."""
        gathered = self.ranks.gather((dict(linears), bytes_read))
        joined = {name: report for own, _ in gathered for name, report in own.items()}
        return joined, sum(read for _, read in gathered)


@dataclass
class PassExchange:
    """What is exchanged in one pass over a block. All ranks reduce and broadcast its groups in the same order.

    Attributes:
        rank: Number of this rank.
        collectives: Collectives between the ranks; `None` for one rank.
        groups: The groups in the order in which they are reduced and solved, the dearest first: its owner solves it
            while others are still at the right-hand sides of the rest.
        owners: Leader of a group → the rank that solves it.
        dtype: Dtype of what is solved; `None` for that in which each weight is written.
    """

    rank: int
    collectives: AsyncCollectives | None
    groups: Sequence[LinearGroup]
    owners: Mapping[str, int]
    dtype: torch.dtype | None = None
    _reducing: dict[str, Future[Any]] = field(default_factory=dict)
    _all_reducing: dict[str, Future[Any]] = field(default_factory=dict)
    _broadcasting: list[Future[Any]] = field(default_factory=list)

    def owns(self, leader: str) -> bool:
        """Whether this rank solves the group."""
        return self.owners[leader] == self.rank

    def all_reduce_gram(self, leader: str, sums: Sums) -> None:
        """Collective in a group of ranks: starts to add up the present candidate's Gram over all of them."""
        if self.collectives is not None:
            self._all_reducing[leader] = self.collectives.all_reduce(sums.gram.candidate_views())

    def wait_for_gram(self, leader: str) -> None:
        """Waits for the all-reduce of a group's Gram, if one is under way."""
        if leader in self._all_reducing and self.collectives is not None:
            self.collectives.wait(self._all_reducing.pop(leader))

    def reduce_sums(self, leader: str, sums: Sums) -> None:
        """Collective: starts to reduce a group's sums to its owner, once this rank has added all that it has."""
        if self.collectives is not None:
            self._reducing[leader] = self.collectives.reduce(sums.views(), self.owners[leader])

    def reduce_averages(self, averages: RunningAverages, scales: RunningScales) -> None:
        """Collective: starts to add up the averages over all ranks; all of them get the result."""
        views = [*averages.views(), *scales.views()]
        if self.collectives is not None and views:
            self.collectives.reduce(views, 0)
            self._broadcasting.append(self.collectives.broadcast(views, 0))

    def wait_for_sums(self, leader: str) -> None:
        """Waits for the reduction of a group's sums: its owner has those of all ranks, others may free theirs."""
        if self.collectives is not None and leader in self._reducing:
            self.collectives.wait(self._reducing.pop(leader))

    def broadcast_gram(self, leader: str, sums: GroupSums) -> None:
        """Collective: starts to copy Σ G̃_i from the group's owner to rank 0, which keeps it, and to all others."""
        if self.collectives is not None:
            self._broadcasting.append(self.collectives.broadcast(sums.gram.sum_views(), self.owners[leader]))

    def broadcast(self, group: LinearGroup, anchor: Tensors, merged: Tensors) -> None:
        """Collective: starts to broadcast the weights that a group's owner has solved; other ranks make room."""
        if self.collectives is None:
            return
        for linear in group.linears if not self.owns(group.leader) else ():
            like = anchor.pop(linear.name)
            dtype = self.dtype or linear.dtype
            merged[linear.name] = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        self._broadcasting.append(
            self.collectives.broadcast([merged[linear.name] for linear in group.linears], self.owners[group.leader])
        )

    def wait_for_broadcasts(self) -> None:
        """Waits until every broadcast of this pass has finished."""
        while self._broadcasting and self.collectives is not None:
            self.collectives.wait(self._broadcasting.pop(0))
