"""Merges a model block after block, by any regression method.

For every block:

    every candidate's block → run on its hidden states → Gram matrices → two sums per group      collect.py
    every group's sums → solved → the merged block → written in the background                   group_sums.py, here
    the merged block → run on all hidden states → the next ones (RegMean++)                      collect.py

Where memory is short, the first two steps are done in several passes, each for some of the block's linears.

RegMean (arXiv 2212.09849) and RegMean++ (arXiv 2508.03121) differ in whose hidden states enter a block. In RegMean
they come from the candidate's own blocks, so they move on in the first step, and embeddings are the candidate's own.
In RegMean++ they come from the merged blocks before, so the third step makes them.

One block is written while the next one is merged:

    merge block 1 ─► merge block 2 ─► merge block 3
                └► write block 1 └► write block 2

A block is noted as finished when it is on the disk. From a GPU it is copied on a stream of its own, a tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch

from largemerge.checkpoint.reader import prefetched
from largemerge.checkpoint.tensor_info import Tensors
from largemerge.devices import SideStream, Transfer
from largemerge.distributed.ranks import Ranks
from largemerge.errors import MergeError
from largemerge.model.block_runner import BlockId
from largemerge.progress import Clock, Watcher
from largemerge.regression.collect import BlocksOfCandidates, Collector, EngineSettings, SampleRunner
from largemerge.regression.gram import float32_means_float32
from largemerge.regression.group_sums import GroupSums, weight_from_sums
from largemerge.regression.passes import BlockPass
from largemerge.regression.rank_exchange import RankExchange, ReadItem
from largemerge.regression.tensor_plan import BlockPlan, LinearGroup, MergeRule
from largemerge.regression.weights import MERGED, Weights

JsonObject = dict[str, Any]


@dataclass
class Engine:
    """Merges all blocks of a model; `run` it once.

    Attributes:
        settings: Settings of the method and of reading and writing.
        names: Names of the candidates.
        blocks: The blocks in the order in which they run.
        passes: Name of a block → its passes.
        weights: Reads candidates, writes the output.
        samples: Runs blocks on this rank's calibration data.
        watcher: Notified of every step.
        clock: Counts seconds by stage.
        rank_exchange: Says what this rank does, and exchanges with the others.
    """

    settings: EngineSettings
    names: tuple[str, ...]
    blocks: tuple[BlockPlan, ...]
    passes: Mapping[str, tuple[BlockPass, ...]]
    weights: Weights
    samples: SampleRunner
    watcher: Watcher
    clock: Clock
    rank_exchange: RankExchange
    _collector: Collector = field(init=False)
    _bytes_read: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._collector = Collector(
            self.settings, self.names, self.weights, self.samples, self.watcher, self.clock, self.rank_exchange
        )

    def run(self, finished: frozenset[str], done: Callable[[str, JsonObject], None]) -> None:
        """Merges every block that is not in `finished`; those are only run forward, to rebuild hidden states.

        Args:
            finished: Names of the blocks that are on disk already.
            done: Called on rank 0 with each merged block's name and report, once it is written.
        """
        transfer = Transfer(self.samples.runner.device)
        ranks = self.rank_exchange.ranks

        def load(item: ReadItem) -> Callable[[], Tensors]:
            read = partial(self.weights.read_candidate, item.candidate, item.names)
            return transfer.begin(read() if ranks.size == 1 else self.rank_exchange.load(item, read))

        items = list(self._read_items(finished))
        with (
            float32_means_float32(),
            BackgroundWriter(self.weights, self.clock, ranks, done) as output,
            prefetched(load, items, ahead=self.settings.prefetch) as loaded,
        ):
            blocks_of_candidates = (arrive() for arrive in loaded)
            for block in self.blocks:
                self.clock.begin(block.name)
                if block.name in finished:
                    self._replay(block, blocks_of_candidates)
                    continue
                output.finish_block(block.name, self._merge_block(block, blocks_of_candidates, output))

    def _read_items(self, finished: frozenset[str]) -> Iterator[ReadItem]:
        """What this rank reads of candidates, in the order in which it is used."""
        for block in self.blocks:
            if block.name not in finished:
                reads = [block_pass.tensor_names for block_pass in self.passes[block.name]]
            elif self.settings.method.advances_while_collecting and not self._is_last(block):
                reads = [tuple(plan.name for plan in block.tensors)]
            else:
                reads = []
            replayed = block.name in finished
            wants = self.rank_exchange.has_data if replayed else self.rank_exchange.wants
            for pass_number, names in enumerate(reads):
                for index in filter(wants, range(len(self.names))):
                    yield ReadItem(block.name, pass_number, index, names, replayed)

    def _is_last(self, block: BlockPlan) -> bool:
        """Whether the block is the last to run, so that nobody reads its output."""
        return block is self.blocks[-1]

    def _advances(self, block: BlockPlan, block_pass: BlockPass) -> bool:
        """Whether a pass also makes the candidates' next hidden states."""
        return self.settings.method.advances_while_collecting and block_pass.last and not self._is_last(block)

    def _merge_block(
        self, block: BlockPlan, blocks_of_candidates: BlocksOfCandidates, output: BackgroundWriter
    ) -> JsonObject:
        """Merges one block and runs it forward; returns its report."""
        self._bytes_read = 0
        passes = self.passes[block.name]
        # What Transformers puts together from several tensors must be taken apart from all of them at once.
        mapping = self.weights.inputs.reference_mapping
        at_once = any(mapping.conversion_of(mapping.canonical(plan.name)) for plan in block.tensors)
        if self.settings.method.forwards_merged:
            self._load_non_block(block)
        merged: Tensors = {}
        linears: JsonObject = {}
        whole = len(passes) == 1 or at_once
        quantizes = self.weights.quantizes(plan.name for plan in block.tensors)
        for block_pass in passes:
            linears |= self._merge_pass(block, block_pass, blocks_of_candidates, merged)
            if block_pass.last or not at_once:
                output.write(merged, in_background=self.settings.write_in_background and whole and not quantizes)
            if not block_pass.last and not at_once:
                merged.clear()
        if self.settings.method.forwards_merged and not self._is_last(block):
            self._forward(block, self.weights.as_written(merged) if whole else self._read_merged(block))
        errors = self.weights.quantization_errors(plan.name for plan in block.tensors)
        linears, bytes_read = self.rank_exchange.gather_reports(linears, self._bytes_read)
        report: JsonObject = {"linears": linears, "bytes_read": bytes_read}
        return report | ({"quantization_errors": errors} if errors else {})

    def _merge_pass(
        self, block: BlockPlan, block_pass: BlockPass, blocks_of_candidates: BlocksOfCandidates, merged: Tensors
    ) -> JsonObject:
        """Adds the tensors that one pass makes to `merged`; returns the report of its linears."""
        pass_exchange = self.rank_exchange.begin_pass(block_pass.groups)
        collected = self._collector.collect(
            block, block_pass, blocks_of_candidates, pass_exchange, advance=self._advances(block, block_pass)
        )
        self._bytes_read += collected.bytes_read
        if block_pass.averages:
            merged |= self._from_base(block)
        linears: JsonObject = {}
        for group in pass_exchange.groups:
            with self.clock.stage("communicate"):
                pass_exchange.wait_for_sums(group.leader)
            with self.clock.stage("solve"):
                sums = collected.sums.pop(group.leader)
                if pass_exchange.owns(group.leader):
                    linears |= self._solve(block, group, sums, collected.anchor, merged)
                del sums
            pass_exchange.broadcast(group, collected.anchor, merged)
            self.watcher.step(block.name, "solve")
        with self.clock.stage("communicate"):
            pass_exchange.wait_for_broadcasts()
        merged |= collected.averages.finish()
        return linears

    def _from_base(self, block: BlockPlan) -> Tensors:
        """The tensors of a block that the user excluded, in the dtype of the output."""
        excluded = {plan.name: plan.dtype for plan in block.tensors if plan.rule is MergeRule.BASE}
        tensors = self.weights.read_base(list(excluded)) if excluded else {}
        return {name: tensor.to(self.samples.runner.device, excluded[name]) for name, tensor in tensors.items()}

    def _solve(
        self, block: BlockPlan, group: LinearGroup, sums: GroupSums, anchor: Tensors, merged: Tensors
    ) -> JsonObject:
        """Adds the weights of a group to `merged`, in the place of their anchors; returns the report of its linears."""
        try:
            solution = sums.solve(self.settings.ridge)
        except FloatingPointError as error:
            raise MergeError(
                f"{block.name}.{group.leader}: cannot be solved: {error}; check that the candidates' weights, and "
                "their calibration data, are finite, and fit into float32"
            ) from None
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise MergeError(f"{block.name}.{group.leader}: cannot be solved: {error}") from None
        report: JsonObject = {}
        for linear in group.linears:
            merged[linear.name], report[linear.name] = weight_from_sums(
                group, linear, anchor.pop(linear.name), sums, solution, self.names
            )
        return report

    def _read_merged(self, block: BlockPlan) -> Tensors:
        return self.weights.read_merged([plan.name for plan in block.tensors])

    def _load_non_block(self, block: BlockPlan) -> None:
        """Collective: reads merged embeddings and the like, on every rank, whether it has data or not."""
        self.samples.runner.non_block_of(BlockId(block.stack, block.index), MERGED)

    def _forward(self, block: BlockPlan, merged: Tensors) -> None:
        """Runs the merged block, as it would be read from disk, on this rank's hidden states."""
        self._load_non_block(block)
        with self.clock.stage("merged_forward"):
            for index, name in enumerate(self.names):
                for _ in self.samples.run(block, index, merged, advance=True):
                    self.watcher.step(block.name, "forward", name)

    def _replay(self, block: BlockPlan, blocks_of_candidates: BlocksOfCandidates) -> None:
        """Runs a block that an earlier run has finished, to rebuild hidden states."""
        if self._is_last(block):
            return
        if self.settings.method.forwards_merged:
            self._forward(block, self._read_merged(block))
            return
        with self.clock.stage("candidate_forward"):
            for index, name in enumerate(self.names):
                if not self.rank_exchange.has_data(index):
                    continue
                tensors = next(blocks_of_candidates)
                for _ in self.samples.run(block, index, tensors, advance=True):
                    self.watcher.step(block.name, "forward", name)


class BackgroundWriter:
    """Writes blocks, at once or in the background, and says which are on the disk. A context manager.

    Args:
        weights: The weights of the merge; they have a writer on rank 0 only.
        clock: Counts the seconds of waiting for the disk.
        ranks: The ranks of the merge; they are told that this one waits for the disk.
        done: Called on rank 0 with each block's name and report, once it is on the disk.
    """

    def __init__(self, weights: Weights, clock: Clock, ranks: Ranks, done: Callable[[str, JsonObject], None]) -> None:
        self._weights, self._clock, self._ranks, self._done = weights, clock, ranks, done
        self._stream = SideStream(weights.device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="largemerge-write")
        self._writing: Future[int] | None = None
        self._merged: tuple[str, JsonObject] | None = None
        self._num_bytes = 0

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait_for_disk()
        finally:
            self._pool.shutdown()

    def write(self, tensors: Tensors, *, in_background: bool) -> None:
        """Writes parameters of a block; on other ranks than rank 0 nothing happens.

        Args:
            tensors: Parameters of the output, on the device. Nobody may change them before the next call.
            in_background: Return at once. They are not to be read from the disk before the next call.
        """
        self._wait_for_disk()
        on_disk = self._weights.to_disk_layout(tensors)
        if not on_disk:
            return
        if in_background:
            self._writing = self._pool.submit(self._write_later, on_disk, self._stream.record())
            return
        with self._clock.stage("write"), self._ranks.blocked():
            self._num_bytes += self._weights.write(on_disk)

    def finish_block(self, block: str, report: JsonObject) -> None:
        """Takes the report of a block that was merged, after all of it has been given to `write`."""
        if self._weights.writer is None:
            return
        self._merged = block, report | {"seconds": self._clock.seconds()}
        if self._writing is None:
            self._wait_for_disk()

    def _write_later(self, on_disk: Tensors, computed: Any) -> int:
        """Writes tensors in the background thread, after the event `computed`; returns the bytes."""
        with self._stream.wait_then_run(computed):
            return self._weights.write(on_disk)

    def _wait_for_disk(self) -> None:
        """Waits until all that was given is on the disk, and calls `done`."""
        if self._writing is not None:
            with self._clock.stage("write"), self._ranks.blocked():
                self._num_bytes += self._writing.result()
            self._writing = None
        if self._merged is not None:
            block, report = self._merged
            self._done(block, report | {"bytes_written": self._num_bytes})
            self._merged, self._num_bytes = None, 0
