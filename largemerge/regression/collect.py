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
from largemerge.model.block_runner import Activations, Masks, counted_rows
from largemerge.progress import Clock, Watcher
from largemerge.regression.averages import RunningAverages
from largemerge.regression.gram import Scratch
from largemerge.regression.group_sums import GroupSums, differences, new_sums
from largemerge.regression.passes import BlockPass, mean_dtype
from largemerge.regression.rank_exchange import PassExchange, Together
from largemerge.regression.tensor_plan import BlockPlan, GroupPlan
from largemerge.regression.weights import Weights

BlocksOfCandidates = Iterator[Tensors]
"""The tensors of every pass of every block of every candidate, in the order in which they are wanted."""


@dataclass(frozen=True)
class Settings:
    """The method's settings.

    Attributes:
        own_stream: RegMean: hidden states come from a candidate's own blocks.
        shares: c_i / Σ c, by candidate.
        off_diagonal_scale: s.
        ridge: λ as a fraction of the mean diagonal.
        prefetch: Read the next block while the present one computes.
        write_behind: Write a merged block while the next one is merged.
    """

    own_stream: bool
    shares: tuple[float, ...]
    off_diagonal_scale: float
    ridge: float
    prefetch: bool = True
    write_behind: bool = False


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
    activations: Activations
    watcher: Watcher
    clock: Clock
    together: Together
    _scratch: Scratch = field(init=False, default_factory=Scratch)

    def collect(
        self,
        block: BlockPlan,
        each: BlockPass,
        blocks_of_candidates: BlocksOfCandidates,
        exchange: PassExchange,
        *,
        keep: bool,
    ) -> Collected:
        """Runs all candidates; with `keep` their hidden states move on."""
        averages = RunningAverages(block.tensors if each.averages else (), self.settings.shares)
        sums = {group.leader: self._new_sums(block, group) for group in each.groups}
        bytes_read = 0
        solved = {f"{block.name}.{path}.weight" for group in each.groups for path in group.outputs}
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
            if index == 0 or self.together.is_home(index):
                averages.add(index, tensors)
            if self.together.has_data(index) and (each.groups or keep):
                self._run(block, each, index, tensors, anchor, sums, keep=keep)
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

    def _new_sums(self, block: BlockPlan, group: GroupPlan) -> GroupSums:
        return new_sums(
            group.outputs,
            group.num_inputs,
            self.settings.off_diagonal_scale,
            mean_dtype(block, group),
            self.activations.device,
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
        keep: bool,
    ) -> None:
        """Runs one candidate's block on its own data and builds its Gram matrices."""
        own = self.settings.own_stream
        stacks = {group.leader: block.stack_of(group) for group in each.groups}
        for group in each.groups:
            tokens = self.activations.num_rows(index, stacks[group.leader])
            difference = None if index == 0 else differences(block, group, tensors, anchor)
            sums[group.leader].start_candidate(
                self.settings.shares[index],
                tokens,
                difference,
                self.together.part(index, self.activations.num_own_rows(index, stacks[group.leader])),
            )

        def add(path: str, x: torch.Tensor, masks: Masks) -> None:
            with self.clock.stage("gram"):
                sums[path].add_rows(counted_rows(x, masks[stacks[path]] if rows[path] is not None else None))

        rows = {group.leader: group.rows for group in each.groups}
        with self.clock.stage("candidate_forward"):
            for _ in self.activations.run(
                block, index, tensors, outside_of=index if own else None, keep=keep, watch=list(rows), visit=add
            ):
                self.watcher.step(block.name, "collect", self.names[index])

    def _finish_candidate(self, block: BlockPlan, group: GroupPlan, index: int, sums: GroupSums) -> None:
        if not self.together.has_data(index):
            self._skip(block, group, [index], sums)
            return
        with self.clock.stage("right_hand_side"):
            try:
                sums.finish_candidate()
            except FloatingPointError as error:
                raise MergeError(self._not_finite(block, group, index, error)) from None

    def _skip(self, block: BlockPlan, group: GroupPlan, candidates: Iterable[int], sums: GroupSums) -> None:
        """Counts candidates whose data is all on other ranks."""
        for index in candidates:
            sums.skip_candidate(self.activations.num_rows(index, block.stack_of(group)))

    def _not_finite(self, block: BlockPlan, group: GroupPlan, index: int, error: FloatingPointError) -> str:
        dtype = dtype_name(self.activations.compute_dtype)
        return (
            f"{block.name}.{group.leader}: {error} for candidate {self.names[index]}, computed in {dtype}; "
            "try compute_dtype: float32, and check that the candidate's weights are finite"
        )
