"""What one pass over a block collects: every candidate's block runs on its data, Grams are built, sums are added to.

Where several ranks share the work, those that have parts of the same last candidate add up its Grams, and each
computes some rows of the right-hand sides. A group's sums are on their way to the rank that solves it as soon as this
rank's last candidate is done with them, while the next group's are finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from largemerge.checkpoint.tensor_info import Tensors, dtype_name
from largemerge.errors import MergeError
from largemerge.progress import Clock, Watcher
from largemerge.regression.averages import RunningAverages
from largemerge.regression.gram import Scratch
from largemerge.regression.group_sums import GroupSums, differences, new_sums
from largemerge.regression.methods import RegressionMethod
from largemerge.regression.passes import BlockPass
from largemerge.regression.rank_exchange import PassExchange, RankExchange
from largemerge.regression.samples import SampleRunner
from largemerge.regression.tensor_plan import BlockPlan, LinearGroup
from largemerge.regression.weights import Weights

BlocksOfCandidates = Iterator[Tensors]
"""The tensors of every pass of every block of every candidate, in the order in which they are wanted."""


@dataclass(frozen=True)
class Settings:
    """The method's settings.

    Attributes:
        method: The method's row in the table.
        shares: c_i / Σ c, by candidate.
        off_diagonal_scale: s.
        ridge: λ as a fraction of the mean diagonal.
        prefetch: Read the next block while the present one computes.
        write_in_background: Write a merged block while the next one is merged.
    """

    method: RegressionMethod
    shares: tuple[float, ...]
    off_diagonal_scale: float
    ridge: float
    prefetch: bool = True
    write_in_background: bool = False


@dataclass
class Collected:
    """Of one pass over a block.

    Attributes:
        sums: By group, on their way to their owners.
        averages: Of what is not solved.
        anchor: The weights of the first candidate, which the sums are anchored to.
        bytes_read: From candidates.
    """

    sums: dict[str, GroupSums]
    averages: RunningAverages
    anchor: Tensors
    bytes_read: int


@dataclass
class Collector:
    """Everything that passes have in common."""

    settings: Settings
    names: tuple[str, ...]
    weights: Weights
    samples: SampleRunner
    watcher: Watcher
    clock: Clock
    together: RankExchange
    _scratch: Scratch = field(init=False, default_factory=Scratch)

    def collect(
        self,
        block: BlockPlan,
        each: BlockPass,
        blocks_of_candidates: BlocksOfCandidates,
        exchange: PassExchange,
        *,
        advance: bool,
    ) -> Collected:
        """Runs all candidates; with `advance` their hidden states move on."""
        averages = RunningAverages(block.tensors if each.averages else (), self.settings.shares)
        sums = {group.leader: self._new_sums(group) for group in each.groups}
        bytes_read = 0
        solved = {linear.name for group in each.groups for linear in group.linears}
        anchor: Tensors = {}
        for index in range(len(self.names)):
            tensors: Tensors = {}
            if self.together.wants(index):
                with self.clock.stage("wait_for_read"):
                    tensors = next(blocks_of_candidates)
            if index == 0:
                anchor = {name: tensor for name, tensor in tensors.items() if name in solved}
            if tensors and self.together.reads(index):
                bytes_read += self.weights.stored_bytes(index, each.reads)
            if index == 0 or self.together.is_primary(index):
                averages.add(index, tensors)
            if self.together.has_data(index) and (each.groups or advance):
                self._run(block, each, index, tensors, anchor, sums, advance=advance)
                for group in exchange.groups:
                    if sums[group.leader].shares_gram:
                        exchange.share_gram(group.leader, sums[group.leader])
            for group in exchange.groups:
                with self.clock.stage("communicate"):
                    exchange.wait_for_gram(group.leader)
                self._finish_candidate(block, group, index, sums[group.leader])
                if index == self.together.last:  # its sums travel while the next group's are finished
                    self._skip(block, group, range(index + 1, len(self.names)), sums[group.leader])
                    exchange.complete(group.leader, sums[group.leader])
            if index == self.together.last:
                break
        exchange.complete_averages(averages)
        return Collected(sums, averages, anchor, bytes_read)

    def _new_sums(self, group: LinearGroup) -> GroupSums:
        return new_sums(
            group.outputs,
            group.num_inputs,
            self.settings.off_diagonal_scale,
            group.mean_dtype,
            self.samples.runner.device,
            self._scratch,
        )

    def _run(
        self,
        block: BlockPlan,
        each: BlockPass,
        index: int,
        tensors: Tensors,
        anchor: Tensors,
        sums: Mapping[str, GroupSums],
        *,
        advance: bool,
    ) -> None:
        """Runs one candidate's block on its own data and builds its Gram matrices."""
        stacks = {group.leader: block.stack_of(group) for group in each.groups}
        for group in each.groups:
            tokens = self.samples.num_rows(index, stacks[group.leader])
            difference = None if index == 0 else differences(group, tensors, anchor)
            sums[group.leader].start_candidate(
                self.settings.shares[index],
                tokens,
                difference,
                self.together.part(index, self.samples.num_own_rows(index, stacks[group.leader])),
            )

        def add(path: str, x_NI: torch.Tensor) -> None:
            with self.clock.stage("gram"):
                sums[path].add_rows(x_NI)

        with self.clock.stage("candidate_forward"):
            for _ in self.samples.run(block, index, tensors, advance=advance, watch=list(stacks), on_input=add):
                self.watcher.step(block.name, "collect", self.names[index])

    def _finish_candidate(self, block: BlockPlan, group: LinearGroup, index: int, sums: GroupSums) -> None:
        if not self.together.has_data(index):
            self._skip(block, group, [index], sums)
            return
        with self.clock.stage("right_hand_side"):
            try:
                sums.finish_candidate()
            except FloatingPointError as error:
                raise MergeError(self._not_finite(block, group, index, error)) from None

    def _skip(self, block: BlockPlan, group: LinearGroup, candidates: Iterable[int], sums: GroupSums) -> None:
        """Counts candidates whose data is all on other ranks."""
        for index in candidates:
            sums.skip_candidate(self.samples.num_rows(index, block.stack_of(group)))

    def _not_finite(self, block: BlockPlan, group: LinearGroup, index: int, error: FloatingPointError) -> str:
        dtype = dtype_name(self.samples.runner.compute_dtype)
        return (
            f"{block.name}.{group.leader}: {error} for candidate {self.names[index]}, computed in {dtype}; "
            "try compute_dtype: float32, and check that the candidate's weights are finite"
        )
