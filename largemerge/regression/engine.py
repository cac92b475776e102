"""Merges a model block after block, by any regression method.

For every block:

    every candidate's block → run on its hidden states → Gram matrices → two sums per group      collect.py
    every group's sums → solved → the merged block → written in the background                   group_sums.py, here
    the merged block → run on all hidden states → the next ones (RegMean++)                      collect.py

The first two steps are done in several passes, each for some of the block's linears, where memory is short, and where
a method goes linear by linear: then the runs of a pass go on where those of the pass before have stopped (passes.py).

Methods differ in whose hidden states enter a block. In RegMean (arXiv 2212.09849) they come from the candidate's own
blocks, so they move on in the first step, and embeddings are the candidate's own. In RegMean++ (arXiv 2508.03121) they
come from the merged blocks before, so the third step makes them. Methods that hold the merged model against the
candidates keep both, and know by how much they differ (drift.py).

One block is written while the next one is merged:

    merge block 1 ─► merge block 2 ─► merge block 3
                └► write block 1 └► write block 2

A block is noted as finished when it is on the disk. From a GPU it is copied on a stream of its own, a tensor at a time.
"""

from __future__ import annotations

import math
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
from largemerge.progress import Clock, Watcher
from largemerge.regression.collect import BlocksOfCandidates, Collector, EngineSettings, Inside, SampleRunner
from largemerge.regression.drift import Drift, relative
from largemerge.regression.essential import EssentialSums, Sums, moved_weight
from largemerge.regression.gram import GRAM_DTYPE, float32_means_float32
from largemerge.regression.gram_files import GramReader
from largemerge.regression.group_sums import GroupSums, differences, turned, weight_from_sums
from largemerge.regression.head import HeadSolver
from largemerge.regression.kept_sums import SequenceSums
from largemerge.regression.passes import BlockPass
from largemerge.regression.rank_exchange import PassExchange, RankExchange, ReadItem
from largemerge.regression.tensor_plan import HEAD, BlockPlan, HeadPlan, LinearGroup, MergeRule
from largemerge.regression.weights import Weights

JsonObject = dict[str, Any]


@dataclass
class Engine:
    """Merges all blocks of a model; `run` it once.

    Attributes:
        settings: Settings of the method and of reading and writing.
        names: Names of the candidates.
        blocks: The blocks in the order in which they run.
        passes: Name of a block → its passes.
        head: What is solved outside the blocks.
        weights: Reads candidates, writes the output.
        samples: Runs blocks on this rank's calibration data.
        watcher: Notified of every step.
        clock: Counts seconds by stage.
        rank_exchange: Says what this rank does, and exchanges with the others.
        sequence: Reads the sums of an earlier merge, and keeps those of this one, where it is asked for.
        grams: Reads the Gram matrices that stand for candidates' data.
    """

    settings: EngineSettings
    names: tuple[str, ...]
    blocks: tuple[BlockPlan, ...]
    passes: Mapping[str, tuple[BlockPass, ...]]
    head: HeadPlan
    weights: Weights
    samples: SampleRunner
    watcher: Watcher
    clock: Clock
    rank_exchange: RankExchange
    sequence: SequenceSums = field(default_factory=SequenceSums)
    grams: GramReader = field(default_factory=GramReader)
    _collector: Collector = field(init=False)
    _bytes_read: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._collector = Collector(
            self.settings,
            self.names,
            self.weights,
            self.samples,
            self.watcher,
            self.clock,
            self.rank_exchange,
            self.sequence,
            self.grams,
        )

    def run(self, finished: frozenset[str], done: Callable[[str, JsonObject], None]) -> None:
        """Merges every block that is not in `finished`; those are only run forward, to rebuild hidden states.

        Args:
            finished: Names of the blocks, and of the head, that are on disk already.
            done: Called on rank 0 with the name and report of each merged block, and of the head, once it is written.
        """
        transfer = Transfer(self.samples.runner.device)
        ranks = self.rank_exchange.ranks

        def load(item: ReadItem) -> Callable[[], Tensors]:
            read = partial(self.weights.read_candidate, item.candidate, item.names)
            return transfer.begin(read() if ranks.size == 1 else self.rank_exchange.load(item, read))

        items = list(self._read_items(finished))
        solves_head = bool(self.head) and HEAD not in finished
        report: JsonObject = {}
        if solves_head and self.head.tied is not None:
            self.clock.begin(HEAD)
            with float32_means_float32():
                report = self._head_solver().solve_tied(self.blocks, load)
            self._flush()  # the first block reads the embedding
            if not self.head.groups:
                self._finish_head(report, done)
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
        if solves_head and self.head.groups:
            self.clock.begin(HEAD)
            with float32_means_float32():
                report |= self._head_solver().solve_untied()
            self._finish_head(report, done)

    def _head_solver(self) -> HeadSolver:
        return HeadSolver(
            self.head,
            self.settings,
            self.names,
            self.weights,
            self.samples,
            self.watcher,
            self.clock,
            self.rank_exchange,
            self.sequence,
            self.grams,
        )

    def _flush(self) -> None:
        """Brings what was written to the disk, on rank 0."""
        if self.weights.writer is not None:
            with self.clock.stage("write"), self.rank_exchange.ranks.blocked():
                self.weights.writer.flush()

    def _finish_head(self, report: JsonObject, done: Callable[[str, JsonObject], None]) -> None:
        """Says that the head is on the disk, on rank 0."""
        self._flush()
        if self.weights.writer is not None:
            errors = self.weights.quantization_errors(self.head.names)
            entry: JsonObject = {"linears": report, "bytes_read": 0, "bytes_written": self._head_bytes()}
            entry |= {"quantization_errors": errors} if errors else {}
            entry |= self._finish_sums(HEAD)
            done(HEAD, entry | {"seconds": self.clock.seconds()})

    def _head_bytes(self) -> int:
        """Bytes of the head in the output."""
        mapping = self.weights.inputs.reference_mapping
        keys = mapping.disk_keys([mapping.canonical(name) for name in self.head.names])
        return sum(self.weights.output[key].num_bytes for key in keys)

    def _read_items(self, finished: frozenset[str]) -> Iterator[ReadItem]:
        """What this rank reads of candidates, in the order in which it is used."""
        for block in self.blocks:
            if block.name not in finished:
                reads = [block_pass.tensor_names for block_pass in self.passes[block.name]]
            elif self.settings.method.follows_candidates and self._is_read(block):
                reads = [tuple(plan.name for plan in block.tensors)]
            else:
                reads = []
            replayed = block.name in finished
            wants = self._has_samples if replayed else self.rank_exchange.wants
            for pass_number, names in enumerate(reads):
                for index in filter(wants, range(len(self.names))):
                    yield ReadItem(block.name, pass_number, index, names, replayed)

    def _has_samples(self, index: int) -> bool:
        """Whether this rank runs blocks on some samples of a candidate."""
        return self.rank_exchange.has_data(index) and not self.grams.has(index)

    def _is_read(self, block: BlockPlan) -> bool:
        """Whether anything reads the block's output: a later block, the head, or the report of the drift."""
        return self.settings.method.reads_end or block is not self.blocks[-1]

    def _advances(self, block: BlockPlan, block_pass: BlockPass) -> bool:
        """Whether a pass also makes the candidates' next hidden states."""
        return self.settings.method.follows_candidates and block_pass.last and self._is_read(block)

    def _merge_block(
        self, block: BlockPlan, blocks_of_candidates: BlocksOfCandidates, output: BackgroundWriter
    ) -> JsonObject:
        """Merges one block and runs it forward; returns its report."""
        self._bytes_read = 0
        passes = self.passes[block.name]
        runs_merged = passes[-1].runs_merged
        solved = [linear.name for group in block.groups for linear in group.linears]
        quantizes = self.weights.quantizes(plan.name for plan in block.tensors)
        # What Transformers puts together from several tensors must be taken apart from all of them at once.
        mapping = self.weights.inputs.reference_mapping
        at_once = any(mapping.conversion_of(mapping.canonical(plan.name)) for plan in block.tensors)
        at_once = at_once or (runs_merged and not quantizes)  # all of it is held until the block has run
        if self.settings.method.forwards_merged:
            self.samples.merged_non_block(block)
        merged: Tensors = {}
        started: Tensors = {}
        linears: JsonObject = {}
        whole = len(passes) == 1 or at_once
        for block_pass in passes:
            made: Tensors = {}
            linears |= self._merge_pass(block, block_pass, blocks_of_candidates, merged | started, made)
            started = {name: made.pop(name) for name in solved} if block_pass.starts else {}
            merged |= made
            if block_pass.last or not at_once:
                written = merged if at_once else made
                output.write(written, in_background=self.settings.write_in_background and whole and not quantizes)
            if runs_merged and not at_once:
                merged |= self.weights.as_written(made)
            elif not block_pass.last and not at_once:
                merged.clear()
        drift: JsonObject = {}
        if self.settings.method.forwards_merged and self._is_read(block):
            if whole:
                merged = self.weights.as_written(merged)
            elif not runs_merged:
                merged = self._read_merged(block)
            drift = self._forward(block, merged, passes[-1])
        errors = self.weights.quantization_errors(plan.name for plan in block.tensors)
        linears, bytes_read = self.rank_exchange.gather_reports(linears, self._bytes_read)
        report: JsonObject = {"linears": linears, "bytes_read": bytes_read}
        report |= {"drift": drift} if drift else {}
        report |= self._finish_sums(block.name)
        return report | ({"quantization_errors": errors} if errors else {})

    def _merge_pass(
        self,
        block: BlockPlan,
        block_pass: BlockPass,
        blocks_of_candidates: BlocksOfCandidates,
        merged: Tensors,
        made: Tensors,
    ) -> JsonObject:
        """Adds the tensors that one pass makes to `made`, given those `merged` before; returns its linears' report."""
        scales_layers = self.settings.method.scales_layers
        pass_exchange = self.rank_exchange.begin_pass(block_pass.groups, GRAM_DTYPE if scales_layers else None)
        collected = self._collector.collect(
            block, block_pass, blocks_of_candidates, pass_exchange, merged, advance=self._advances(block, block_pass)
        )
        self._bytes_read += collected.bytes_read
        if block_pass.averages:
            made |= self._from_base(block)
        if self.sequence.keeps:
            self._keep_sums(block, pass_exchange, collected.sums)
        linears: JsonObject = {}
        for group in pass_exchange.groups:
            with self.clock.stage("communicate"):
                pass_exchange.wait_for_sums(group.leader)
            with self.clock.stage("solve"):
                sums = collected.sums.pop(group.leader)
                if pass_exchange.owns(group.leader):
                    linears |= self._solve(block, group, sums, collected.anchor, made)
                del sums
            pass_exchange.broadcast(group, collected.anchor, made)
            self.watcher.step(block.name, "solve")
        with self.clock.stage("communicate"):
            pass_exchange.wait_for_broadcasts()
        averages = collected.averages.finish()
        made |= averages | collected.scales.finish(averages)
        return linears

    def _keep_sums(self, block: BlockPlan, pass_exchange: PassExchange, sums: Mapping[str, Sums]) -> None:
        """Writes Σ G̃_i of all groups of a pass on rank 0, before any of them is solved in its place."""
        of_groups = {leader: own for leader, own in sums.items() if isinstance(own, GroupSums)}
        with self.clock.stage("communicate"):
            for group in pass_exchange.groups:
                pass_exchange.wait_for_sums(group.leader)
                pass_exchange.broadcast_gram(group.leader, of_groups[group.leader])
            pass_exchange.wait_for_broadcasts()
        with self.clock.stage("write"), self.rank_exchange.ranks.blocked():
            for group in pass_exchange.groups:
                self.sequence.keep(block.name, group.leader, of_groups[group.leader].gram)

    def _finish_sums(self, part: str) -> JsonObject:
        """Brings the sums of a part to the disk; returns what the journal notes of them."""
        with self.clock.stage("write"), self.rank_exchange.ranks.blocked():
            return self.sequence.finish(part)

    def _from_base(self, block: BlockPlan) -> Tensors:
        """The tensors of a block that the user excluded, in the dtype of the output."""
        excluded = {plan.name: plan.dtype for plan in block.tensors if plan.rule is MergeRule.BASE}
        tensors = self.weights.read_base(list(excluded)) if excluded else {}
        return {name: tensor.to(self.samples.runner.device, excluded[name]) for name, tensor in tensors.items()}

    def _solve(self, block: BlockPlan, group: LinearGroup, sums: Sums, anchor: Tensors, made: Tensors) -> JsonObject:
        """Adds the weights of a group to `made`, in the place of their anchors; returns the report of its linears."""
        try:
            if isinstance(sums, EssentialSums):
                return self._merge_subspaces(group, sums, anchor, made)
            return self._solve_sums(group, sums, anchor, made)
        except FloatingPointError as error:
            raise MergeError(self._collector.why_not_finite(block, f"{block.name}.{group.leader}: {error}")) from None
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise MergeError(f"{block.name}.{group.leader}: cannot be solved: {error}") from None

    def _merge_subspaces(self, group: LinearGroup, sums: EssentialSums, anchor: Tensors, made: Tensors) -> JsonObject:
        """Adds merged weights; merged task vectors, float32, where they will be scaled when those of all layers are."""
        method, report = self.settings.method, JsonObject()
        for linear in group.linears:
            base = anchor.pop(linear.name)
            found = sums.merged(linear.path, method.scale, group.leader, self.names, self.settings.shares)
            delta = turned(found.delta_OI, group).contiguous()
            if method.scales_layers:
                made[linear.name], report[linear.name] = delta, found.report
            else:
                made[linear.name], report[linear.name] = moved_weight(base, delta, 1.0, linear.dtype, found.report)
        return report

    def _solve_sums(self, group: LinearGroup, sums: GroupSums, anchor: Tensors, made: Tensors) -> JsonObject:
        """Adds weights that solve the group's system."""
        self._pull_to_anchor(group, sums, anchor)
        solution = sums.solve(self.settings.method.ridge, self.settings.num_merged)
        report: JsonObject = {}
        for linear in group.linears:
            made[linear.name], report[linear.name] = weight_from_sums(
                group, linear, anchor.pop(linear.name), sums, solution, self.names
            )
        return report

    def _pull_to_anchor(self, group: LinearGroup, sums: GroupSums, first: Tensors) -> None:
        """Puts the method's anchor in the place of the average, which the ridge pulls to."""
        method = self.settings.method
        if method.anchor == "average":
            return
        base = self.weights.read_base([linear.name for linear in group.linears])
        base = {name: tensor.to(self.samples.runner.device) for name, tensor in base.items()}
        sums.move_mean(differences(group, base, first), method.anchor_step(self.settings.num_merged))

    def _read_merged(self, block: BlockPlan) -> Tensors:
        return self.weights.read_merged([plan.name for plan in block.tensors])

    def _forward(self, block: BlockPlan, merged: Tensors, last_pass: BlockPass | None = None) -> JsonObject:
        """Runs the merged block, as it would be read from disk, on this rank's hidden states.

        Args:
            block: The block.
            merged: Its tensors.
            last_pass: The pass after which the runs are taken up; `None` to run all of the block.

        Returns:
            By candidate, by how much the merged hidden states have drifted from the candidate's own; empty where those
            are not known. Collective in that case.
        """
        self.samples.merged_non_block(block)
        start = last_pass.keep if last_pass is not None and last_pass.runs_merged else None
        compares = self.settings.method.compares and last_pass is not None
        drifts = [Drift(self.samples, block, index) for index in range(len(self.names))] if compares else []
        with self.clock.stage("merged_forward"):
            for index, name in enumerate(self.names):
                inside, on_output = Inside("merged", start), drifts[index].add if drifts else None
                runs = self.samples.run(
                    block, index, merged, "merged", advance=True, inside=inside, on_output=on_output
                )
                for _ in runs:
                    self.watcher.step(block.name, "forward", name)
        if not compares:
            return {}
        parts = self.rank_exchange.ranks.gather([drift.squares for drift in drifts])
        found = {name: relative(of_ranks) for name, *of_ranks in zip(self.names, *parts, strict=True)}
        beyond = [name for name, drift in found.items() if drift is not None and not math.isfinite(drift)]
        if beyond:
            what = f"{block.name}: hidden states after it are not finite on the data of {', '.join(beyond)}"
            raise MergeError(self._collector.why_not_finite(block, what))
        return found

    def _replay(self, block: BlockPlan, blocks_of_candidates: BlocksOfCandidates) -> None:
        """Runs a block that an earlier run has finished, to rebuild hidden states."""
        if not self._is_read(block):
            return
        if self.settings.method.follows_candidates:
            with self.clock.stage("candidate_forward"):
                for index, name in enumerate(self.names):
                    if not self._has_samples(index):
                        continue
                    tensors = next(blocks_of_candidates)
                    for _ in self.samples.run(block, index, tensors, "candidate", advance=True):
                        self.watcher.step(block.name, "forward", name)
        if self.settings.method.forwards_merged:
            self._forward(block, self._read_merged(block))


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
