"""Collects the statistics of one pass over a block: runs every candidate's block on its data, and sums its Grams.

    hidden states ─► SampleRunner.run ─► BlockRunner: the candidate's block ─► inputs of its linears ─► GroupSums
        ▲                    │
        └── output, if the ──┘
            pass makes the next hidden states

Where several ranks share the work, those that have parts of the same last candidate add up its Grams, and each
computes some rows of the right-hand sides. A group's sums are reduced to the rank that solves it as soon as this
rank's last candidate has been added, while the next group's are finished.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from largemerge.checkpoint.tensor_info import Tensors, dtype_name
from largemerge.errors import MergeError
from largemerge.model.block_runner import BlockId, BlockRunner, OnInput
from largemerge.model.hidden_states import HiddenStates
from largemerge.progress import Clock, Watcher
from largemerge.regression.averages import RunningAverages
from largemerge.regression.gram import Scratch
from largemerge.regression.group_sums import GroupSums, differences, new_sums
from largemerge.regression.methods import RegressionMethod, Stream
from largemerge.regression.passes import BlockPass
from largemerge.regression.rank_exchange import PassExchange, RankExchange
from largemerge.regression.samples import RankSamples
from largemerge.regression.tensor_plan import BlockPlan, LinearGroup
from largemerge.regression.weights import MERGED, Weights

BlocksOfCandidates = Iterator[Tensors]
"""The tensors of every pass of every block of every candidate, in the order in which they are wanted."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the method, and how reading and writing overlap with computing.

    Attributes:
        method: The method's row in the table.
        shares: c_i / Σ c, by candidate.
        off_diagonal_scale: The factor s on a Gram's off-diagonal.
        ridge: λ as a fraction of the mean diagonal.
        prefetch: Whether the next block is read while the present one computes.
        write_in_background: Whether a merged block is written while the next one is merged.
    """

    method: RegressionMethod
    shares: tuple[float, ...]
    off_diagonal_scale: float
    ridge: float
    prefetch: bool = True
    write_in_background: bool = False


@dataclass
class Collected:
    """Statistics of one pass over a block.

    Attributes:
        sums: Leader of a group → its sums, which are being reduced to their owner.
        averages: Averages of the tensors that are not solved.
        anchor: Weights of the first candidate, which the sums are anchored to, by parameter name.
        bytes_read: Bytes that this rank read from candidates.
    """

    sums: dict[str, GroupSums]
    averages: RunningAverages
    anchor: Tensors
    bytes_read: int


@dataclass
class Collector:
    """Runs all candidates through a block and accumulates their statistics; attributes as in `Engine`."""

    settings: EngineSettings
    names: tuple[str, ...]
    weights: Weights
    samples: SampleRunner
    watcher: Watcher
    clock: Clock
    rank_exchange: RankExchange
    _scratch: Scratch = field(init=False, default_factory=Scratch)

    def collect(
        self,
        block: BlockPlan,
        block_pass: BlockPass,
        blocks_of_candidates: BlocksOfCandidates,
        pass_exchange: PassExchange,
        *,
        advance: bool,
    ) -> Collected:
        """Runs all candidates through a block.

        Args:
            block: The block.
            block_pass: The groups to collect for, and what is read for them.
            blocks_of_candidates: Gives the tensors of the next candidate that this rank wants.
            pass_exchange: Exchanges sums with other ranks.
            advance: Whether the candidates' hidden states move on.
        """
        averages = RunningAverages(block.tensors if block_pass.averages else (), self.settings.shares)
        scale, device = self.settings.off_diagonal_scale, self.samples.runner.device
        sums = {group.leader: new_sums(group, scale, device, self._scratch) for group in block_pass.groups}
        bytes_read = 0
        solved = {linear.name for group in block_pass.groups for linear in group.linears}
        anchor: Tensors = {}
        for index in range(len(self.names)):
            tensors: Tensors = {}
            if self.rank_exchange.wants(index):
                with self.clock.stage("wait_for_read"):
                    tensors = next(blocks_of_candidates)
            if index == 0:
                anchor = {name: tensor for name, tensor in tensors.items() if name in solved}
            if tensors and self.rank_exchange.reads_from_disk(index):
                bytes_read += self.weights.stored_bytes(index, block_pass.tensor_names)
            if index == 0 or self.rank_exchange.is_primary(index):
                averages.add(index, tensors)
            if self.rank_exchange.has_data(index) and (block_pass.groups or advance):
                self._run(block, block_pass, index, tensors, anchor, sums, advance=advance)
                for group in pass_exchange.groups:
                    if sums[group.leader].needs_all_reduce:
                        pass_exchange.all_reduce_gram(group.leader, sums[group.leader])
            for group in pass_exchange.groups:
                with self.clock.stage("communicate"):
                    pass_exchange.wait_for_gram(group.leader)
                self._finish_candidate(block, group, index, sums[group.leader])
                if index == self.rank_exchange.last_candidate:  # reduced while the next group's are finished
                    self._skip(block, group, range(index + 1, len(self.names)), sums[group.leader])
                    pass_exchange.reduce_sums(group.leader, sums[group.leader])
            if index == self.rank_exchange.last_candidate:
                break
        pass_exchange.reduce_averages(averages)
        return Collected(sums, averages, anchor, bytes_read)

    def _run(
        self,
        block: BlockPlan,
        block_pass: BlockPass,
        index: int,
        tensors: Tensors,
        anchor: Tensors,
        sums: Mapping[str, GroupSums],
        *,
        advance: bool,
    ) -> None:
        """Runs one candidate's block on its own data and builds its Gram matrices."""
        stacks = {group.leader: block.stack_of(group) for group in block_pass.groups}
        for group in block_pass.groups:
            tokens = self.samples.num_rows(index, stacks[group.leader])
            difference = None if index == 0 else differences(group, tensors, anchor)
            sums[group.leader].start_candidate(
                self.settings.shares[index],
                tokens,
                difference,
                self.rank_exchange.part(index, self.samples.num_own_rows(index, stacks[group.leader])),
            )

        def add(path: str, x_NI: torch.Tensor) -> None:
            with self.clock.stage("gram"):
                sums[path].add_rows(x_NI)

        with self.clock.stage("candidate_forward"):
            for _ in self.samples.run(block, index, tensors, advance=advance, watch=list(stacks), on_input=add):
                self.watcher.step(block.name, "collect", self.names[index])

    def _finish_candidate(self, block: BlockPlan, group: LinearGroup, index: int, sums: GroupSums) -> None:
        """Adds one candidate to a group's sums."""
        if not self.rank_exchange.has_data(index):
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
        advice = "" if dtype == "float32" else "try compute_dtype: float32, and "
        return (
            f"{block.name}.{group.leader}: {error} for candidate {self.names[index]}, computed in {dtype}; "
            f"{advice}check that the candidate's weights, and its calibration data, are finite, and fit into {dtype}"
        )


@dataclass(frozen=True)
class SampleRunner:
    """Runs blocks on this rank's part of the candidates' calibration data.

    Attributes:
        runner: Runs a block on one batch.
        samples: This rank's batches of every candidate.
        hidden_states: The hidden states between blocks.
        stream: Whose blocks make the hidden states: the candidates' own, or the merged ones.
    """

    runner: BlockRunner
    samples: RankSamples
    hidden_states: HiddenStates
    stream: Stream

    def owner(self, candidate: int) -> Hashable:
        """Owner of the embeddings and the like that a candidate's data goes through."""
        return candidate if self.stream == "candidate" else MERGED

    def num_rows(self, candidate: int, stack: int) -> int:
        """Number of valid rows of a candidate's data in a stack, on all ranks together."""
        return self.samples.row_counts[candidate][stack]

    def num_own_rows(self, candidate: int, stack: int) -> int:
        """Number of valid rows of a candidate's data in a stack, on this rank."""
        return self.samples.own_row_counts[candidate][stack]

    def run(
        self,
        block: BlockPlan,
        candidate: int,
        tensors: Tensors,
        *,
        advance: bool,
        watch: Sequence[str] = (),
        on_input: OnInput | None = None,
    ) -> Iterator[None]:
        """Runs a block on all batches of one candidate, and pauses after each.

        Args:
            block: The block.
            candidate: Number of the candidate whose data is run.
            tensors: The block's weights, by parameter name.
            advance: Store the block's output as the next hidden states; otherwise it is run only as far as the last
                linear of `watch`.
            watch: Paths in the block of the linears whose inputs are wanted, in the order in which they run.
            on_input: Called with the valid rows of each input.
        """
        prefix, device = block.name + ".", self.runner.device
        weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        with self.runner.block(BlockId(block.stack, block.index), weights, self.owner(candidate)) as running:
            del weights
            for number, batch in enumerate(self.samples.calibration[candidate].batches):
                self.hidden_states.prefetch(self.stream, candidate, number + 1)
                outputs = self.hidden_states.get(self.stream, candidate, number, device)
                output = running.run(batch, outputs, watch=watch, on_input=on_input, whole=advance)
                if advance:
                    self.hidden_states.put(self.stream, candidate, number, block.stack, output)
                del output, outputs
                yield
