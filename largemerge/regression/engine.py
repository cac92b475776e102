"""The regression methods, one block at a time.

For every block:

    for every candidate:   its block → run on its hidden states → Gram matrices → two sums per group
    solve every group      → the merged block → to disk
    regmean_plusplus:      the merged block → run on everybody's hidden states → the next ones

Where memory is short, the first two lines are done in several passes, each for some of the block's linears.

RegMean (arXiv 2212.09849) differs in one point: a candidate's hidden states come from its own blocks, so they
move on in the first step, and embeddings are the candidate's own. In RegMean++ (arXiv 2508.03121) they come
from the merged blocks before.

The first line is `collect.py`; the block runner says where activations come from, `group_sums.py` what is accumulated,
`solve.py` how it is solved.

Merged blocks on their way to the disk: one is written while the next one is merged.

    merge block 1 ─► merge block 2 ─► merge block 3
                └► write block 1 └► write block 2

A block is noted as finished when it is on the disk. From a GPU it comes on a stream of its own, a tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

from largemerge.checkpoint.reader import prefetched
from largemerge.checkpoint.tensor_info import Tensors
from largemerge.devices import SideStream, Transfer
from largemerge.distributed.ranks import Ranks
from largemerge.errors import MergeError
from largemerge.model.block_runner import BlockId
from largemerge.progress import Clock, Watcher
from largemerge.regression.collect import BlocksOfCandidates, Collector, Settings
from largemerge.regression.gram import float32_means_float32
from largemerge.regression.group_sums import GroupSums, weight_from_sums
from largemerge.regression.passes import BlockPass
from largemerge.regression.rank_exchange import RankExchange, ReadItem
from largemerge.regression.samples import SampleRunner
from largemerge.regression.tensor_plan import BlockPlan, LinearGroup, MergeRule
from largemerge.regression.weights import MERGED, Weights


@dataclass
class Engine:
    """Everything that the blocks have in common. Make one, then `run` it once."""

    settings: Settings
    names: tuple[str, ...]
    blocks: tuple[BlockPlan, ...]
    passes: Mapping[str, tuple[BlockPass, ...]]
    weights: Weights
    samples: SampleRunner
    watcher: Watcher
    clock: Clock
    together: RankExchange
    _collector: Collector = field(init=False)
    _bytes_read: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._collector = Collector(
            self.settings, self.names, self.weights, self.samples, self.watcher, self.clock, self.together
        )

    def run(self, finished: frozenset[str], done: Callable[[str, JsonObject], None]) -> None:
        """Merges every block that is not in `finished`; those are only run forward, to rebuild hidden states.

        Args:
            finished: Names of blocks that are on disk already.
            done: Called on the first rank with each merged block's name and report, once it is written.
        """
        transfer = Transfer(self.samples.runner.device)

        def load(item: ReadItem) -> Callable[[], Tensors]:
            read = partial(self.weights.candidate, item.candidate, item.names)
            return transfer.begin(self.together.load(item, read))

        wanted = list(self._wanted(finished))
        ahead = self.settings.prefetch
        ranks = self.together.ranks
        with (
            float32_means_float32(),
            BackgroundWriter(self.weights, self.clock, ranks, done) as output,
            prefetched(load, wanted, ahead=ahead) as loaded,
        ):
            blocks_of_candidates = (arrive() for arrive in loaded)
            for block in self.blocks:
                self.clock.begin(block.name)
                if block.name in finished:
                    self._replay(block, blocks_of_candidates)
                    continue
                output.finish_block(block.name, self._merge_block(block, blocks_of_candidates, output))

    def _wanted(self, finished: frozenset[str]) -> Iterator[ReadItem]:
        for block in self.blocks:
            if block.name not in finished:
                reads = [each.reads for each in self.passes[block.name]]
            elif self.settings.method.advances_while_collecting and not self._is_last(block):
                reads = [tuple(plan.name for plan in block.tensors)]
            else:
                reads = []
            replayed = block.name in finished
            wants = self.together.has_data if replayed else self.together.wants
            for number, names in enumerate(reads):
                for index in filter(wants, range(len(self.names))):
                    yield ReadItem(block.name, number, index, names, replayed)

    def _is_last(self, block: BlockPlan) -> bool:
        """Whether nobody reads what the block computes."""
        return block is self.blocks[-1]

    def _advances(self, block: BlockPlan, each: BlockPass) -> bool:
        """Whether a candidate's hidden states move on while its Gram matrices are built."""
        return self.settings.method.advances_while_collecting and each.last and not self._is_last(block)

    def _merge_block(
        self, block: BlockPlan, blocks_of_candidates: BlocksOfCandidates, output: BackgroundWriter
    ) -> JsonObject:
        self._bytes_read = 0
        passes = self.passes[block.name]
        # What Transformers puts together from several tensors must be taken apart from all of them at once.
        names = self.weights.inputs.reference_names
        at_once = any(names.conversion_of(names.canonical(plan.name)) for plan in block.tensors)
        if self.settings.method.forwards_merged:
            self._load_non_block(block)
        merged: Tensors = {}
        linears: JsonObject = {}
        whole = len(passes) == 1 or at_once
        quantizes = self.weights.quantizes(plan.name for plan in block.tensors)
        for each in passes:
            linears |= self._merge_pass(block, each, blocks_of_candidates, merged)
            if each.last or not at_once:
                output.write(merged, in_background=self.settings.write_in_background and whole and not quantizes)
            if not each.last and not at_once:
                merged.clear()
        if self.settings.method.forwards_merged and not self._is_last(block):
            self._forward(block, self.weights.as_written(merged) if whole else self._merged(block))
        errors = self.weights.quantization_errors(plan.name for plan in block.tensors)
        linears, bytes_read = self.together.gather_reports(linears, self._bytes_read)
        report: JsonObject = {"linears": linears, "bytes_read": bytes_read}
        return report | ({"quantization_errors": errors} if errors else {})

    def _merge_pass(
        self, block: BlockPlan, each: BlockPass, blocks_of_candidates: BlocksOfCandidates, merged: Tensors
    ) -> JsonObject:
        """Adds what one pass makes to `merged`; returns the report of its linears."""
        exchange = self.together.begin(each.groups)
        collected = self._collector.collect(
            block, each, blocks_of_candidates, exchange, advance=self._advances(block, each)
        )
        self._bytes_read += collected.bytes_read
        excluded = {plan.name: plan.dtype for plan in block.tensors if plan.rule is MergeRule.BASE}
        for name, tensor in (self.weights.base(list(excluded)) if excluded and each.averages else {}).items():
            merged[name] = tensor.to(self.samples.runner.device, excluded[name])
        linears: JsonObject = {}
        for group in exchange.groups:
            with self.clock.stage("communicate"):
                exchange.wait_for_sums(group.leader)
            with self.clock.stage("solve"):
                complete = collected.sums.pop(group.leader)
                if exchange.owns(group.leader):
                    linears |= self._solve(block, group, complete, collected.anchor, merged)
                del complete
            exchange.broadcast(group, collected.anchor, merged)
            self.watcher.step(block.name, "solve")
        with self.clock.stage("communicate"):
            exchange.wait()
        merged |= collected.averages.finish()
        return linears

    def _solve(
        self, block: BlockPlan, group: LinearGroup, sums: GroupSums, anchor: Tensors, merged: Tensors
    ) -> JsonObject:
        try:
            solution = sums.solve(self.settings.ridge)
        except FloatingPointError as error:
            raise MergeError(f"{block.name}.{group.leader}: cannot be solved: {error}") from None
        report: JsonObject = {}
        for linear in group.linears:
            merged[linear.name], report[linear.name] = weight_from_sums(
                group, linear, anchor.pop(linear.name), sums, solution, self.names
            )
        return report

    def _merged(self, block: BlockPlan) -> Tensors:
        return self.weights.merged([plan.name for plan in block.tensors])

    def _load_non_block(self, block: BlockPlan) -> None:
        """Collective: merged embeddings and the like, on every rank, whether it has data or not."""
        self.samples.runner.non_block_of(BlockId(block.stack, block.index), MERGED)

    def _forward(self, block: BlockPlan, merged: Tensors) -> None:
        """Runs the merged block on this rank's hidden states, as it will be read from disk."""
        self._load_non_block(block)
        with self.clock.stage("merged_forward"):
            for index, name in enumerate(self.names):
                for _ in self.samples.run(block, index, merged, advance=True):
                    self.watcher.step(block.name, "forward", name)

    def _replay(self, block: BlockPlan, blocks_of_candidates: BlocksOfCandidates) -> None:
        if self._is_last(block):
            return
        if self.settings.method.forwards_merged:
            self._forward(block, self._merged(block))
            return
        with self.clock.stage("candidate_forward"):
            for index, name in enumerate(self.names):
                if not self.together.has_data(index):
                    continue
                tensors = next(blocks_of_candidates)
                for _ in self.samples.run(block, index, tensors, advance=True):
                    self.watcher.step(block.name, "forward", name)


JsonObject = dict[str, Any]


class BackgroundWriter:
    """Writes blocks, at once or behind, and says which are on the disk. A context manager.

    Args:
        weights: Of the merge.
        clock: Counts the seconds that are waited for the disk.
        ranks: Of which the first writes.
        done: Called on the first rank with each block's name and report, once it is on the disk.
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
                self._settle()
        finally:
            self._pool.shutdown()

    def write(self, tensors: Tensors, *, in_background: bool) -> None:
        """Writes parameters of a block; on other ranks than the first nothing happens.

        Args:
            tensors: Of the output, on the device. Nobody may change them before the next call.
            in_background: Come back at once. They are not to be read from the disk before the next call.
        """
        self._settle()
        on_disk = self._weights.to_disk_layout(tensors)
        if not on_disk:
            return
        if in_background:
            self._writing = self._pool.submit(self._write_later, on_disk, self._stream.record())
            return
        with self._clock.stage("write"), self._ranks.blocked():
            self._num_bytes += self._weights.write(on_disk)

    def finish_block(self, block: str, report: JsonObject) -> None:
        """A block is merged; all of it has been given to `write`."""
        if not self._ranks.is_first:
            return
        self._merged = block, report | {"seconds": self._clock.seconds()}
        if self._writing is None:
            self._settle()

    def _write_later(self, on_disk: Tensors, computed: Any) -> int:
        with self._stream.wait_then_run(computed):
            return self._weights.write(on_disk)

    def _settle(self) -> None:
        """Waits until all that was given is on the disk, and says so."""
        if self._writing is not None:
            with self._clock.stage("write"), self._ranks.blocked():
                self._num_bytes += self._writing.result()
            self._writing = None
        if self._merged is not None:
            block, report = self._merged
            self._done(block, report | {"bytes_written": self._num_bytes})
            self._merged, self._num_bytes = None, 0
