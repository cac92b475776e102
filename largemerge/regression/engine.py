"""The regression methods, one block at a time.

For every block:

    for every candidate:   its block → run on its hidden states → Gram matrices → two sums per group
    solve every group      → the merged block → to disk
    regmean_plusplus:      the merged block → run on everybody's hidden states → the next ones

Where memory is short, the first two lines are done in several passes, each for some of the block's linears.

RegMean (arXiv 2212.09849) differs in one point: a candidate's hidden states come from its own blocks, so they
move on in the first step, and embeddings are the candidate's own. In RegMean++ (arXiv 2508.03121) they come
from the merged blocks before.

Where activations come from is in `activations.py`, what is accumulated in `sums.py`, how it is solved in `solve.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from largemerge.checkpoint.prefetch import prefetched
from largemerge.dtypes import dtype_name
from largemerge.errors import MergeError
from largemerge.passes import BlockPass, mean_dtype
from largemerge.regression.activations import Activations, Masks, counted_rows
from largemerge.regression.averages import RunningAverages
from largemerge.regression.clock import Clock, Watcher
from largemerge.regression.finish import differences, finish_linear
from largemerge.regression.gram import Scratch, float32_means_float32
from largemerge.regression.sums import GroupSums, new_sums
from largemerge.regression.together import ReadItem, Together
from largemerge.transfer import Transfer
from largemerge.treatment import BlockPlan, GroupPlan, Treatment
from largemerge.weights import Tensors, Weights

JsonObject = dict[str, Any]
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
    """

    own_stream: bool
    shares: tuple[float, ...]
    off_diagonal_scale: float
    ridge: float
    prefetch: bool = True


@dataclass
class Engine:
    """Everything that the blocks have in common. Make one, then `run` it once."""

    settings: Settings
    names: tuple[str, ...]
    blocks: tuple[BlockPlan, ...]
    passes: Mapping[str, tuple[BlockPass, ...]]
    weights: Weights
    activations: Activations
    watcher: Watcher
    clock: Clock
    together: Together
    _bytes_read: int = field(init=False, default=0)
    _scratch: Scratch = field(init=False, default_factory=Scratch)

    def run(self, finished: frozenset[str], done: Callable[[str, JsonObject], None]) -> None:
        """Merges every block that is not in `finished`; those are only run forward, to rebuild hidden states.

        Args:
            finished: Names of blocks that are on disk already.
            done: Called on the first rank with each merged block's name and report, once it is written.
        """
        transfer = Transfer(self.activations.device)

        def load(item: ReadItem) -> Callable[[], Tensors]:
            read = partial(self.weights.candidate, item.candidate, item.names)
            return transfer.begin(self.together.load(item, read))

        wanted = list(self._wanted(finished))
        ahead = self.settings.prefetch
        with float32_means_float32(), prefetched(load, wanted, ahead=ahead) as loaded:
            blocks_of_candidates = (arrive() for arrive in loaded)
            for block in self.blocks:
                self.clock.begin(block.name)
                if block.name in finished:
                    self._replay(block, blocks_of_candidates)
                    continue
                report = self._merge_block(block, blocks_of_candidates)
                if self.together.ranks.is_first:
                    done(block.name, report | {"seconds": self.clock.seconds()})

    def _wanted(self, finished: frozenset[str]) -> Iterator[ReadItem]:
        for block in self.blocks:
            if block.name not in finished:
                reads = [each.reads for each in self.passes[block.name]]
            elif self.settings.own_stream and not self._is_last(block):
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

    def _merge_block(self, block: BlockPlan, blocks_of_candidates: BlocksOfCandidates) -> JsonObject:
        self._bytes_read = 0
        passes = self.passes[block.name]
        # What Transformers puts together from several tensors must be taken apart from all of them at once.
        names = self.weights.inputs.reference_names
        at_once = any(names.conversion_of(names.on_disk(plan.name)) for plan in block.tensors)
        if not self.settings.own_stream:
            self.activations.set_outside(block, None)
        merged: Tensors = {}
        linears: JsonObject = {}
        bytes_written = 0
        for each in passes:
            linears |= self._merge_pass(block, each, blocks_of_candidates, merged)
            if each.last or not at_once:
                with self.clock.stage("write"):
                    bytes_written += self.weights.store(merged)
            if not each.last and not at_once:
                merged.clear()
        if not self.settings.own_stream and not self._is_last(block):
            whole = len(passes) == 1 or at_once
            self._forward(block, self.weights.as_written(merged) if whole else self._merged(block))
        errors = self.weights.quantization_errors(plan.name for plan in block.tensors)
        linears, bytes_read = self.together.everybodys(linears, self._bytes_read)
        report = {"linears": linears, "bytes_read": bytes_read, "bytes_written": bytes_written}
        return report | ({"quantization_errors": errors} if errors else {})

    def _merge_pass(
        self, block: BlockPlan, each: BlockPass, blocks_of_candidates: BlocksOfCandidates, merged: Tensors
    ) -> JsonObject:
        """Adds what one pass makes to `merged`; returns the report of its linears."""
        device = self.activations.device
        sums = {
            group.leader: new_sums(
                group.outputs,
                group.num_inputs,
                self.settings.off_diagonal_scale,
                mean_dtype(block, group),
                device,
                self._scratch,
            )
            for group in each.groups
        }
        averages = RunningAverages(block.tensors if each.averages else (), self.settings.shares)
        anchor: Tensors = {}
        for index in range(len(self.names)):
            if not self.together.wants(index):
                self._skip(block, each, index, sums)
                continue
            with self.clock.stage("wait_for_read"):
                tensors = next(blocks_of_candidates)
            if self.together.reads(index):
                self._bytes_read += self.weights.stored_bytes(index, each.reads)
            if index == 0:
                solved = {f"{block.name}.{path}.weight" for group in each.groups for path in group.outputs}
                anchor = {name: tensor for name, tensor in tensors.items() if name in solved}
            if index == 0 or self.together.is_home(index):
                averages.add(index, tensors)
            if self.together.has_data(index):
                self._collect(block, each, index, tensors, anchor, sums)
            else:
                self._skip(block, each, index, sums)
            del tensors
        with self.clock.stage("communicate"):
            merged |= self.together.add_up_(each, sums, averages)
        excluded = {plan.name: plan.dtype for plan in block.tensors if plan.treatment is Treatment.BASE}
        for name, tensor in (self.weights.base(list(excluded)) if excluded and each.averages else {}).items():
            merged[name] = tensor.to(device, excluded[name])
        linears: JsonObject = {}
        for group in each.groups:
            if group.leader in sums:
                with self.clock.stage("solve"):
                    linears |= self._solve(block, group, sums.pop(group.leader), anchor, merged)
            self.watcher.step(block.name, "solve")
        with self.clock.stage("communicate"):
            self.together.spread_(block, each, anchor, merged)
        return linears

    def _skip(self, block: BlockPlan, each: BlockPass, index: int, sums: Mapping[str, GroupSums]) -> None:
        """Counts a candidate whose data is all on other ranks."""
        for group in each.groups:
            stack = block.stack if group.rows is None else group.rows
            sums[group.leader].skip_candidate(self.activations.num_rows(index, stack))

    def _collect(
        self,
        block: BlockPlan,
        each: BlockPass,
        index: int,
        tensors: Tensors,
        anchor: Tensors,
        sums: Mapping[str, GroupSums],
    ) -> None:
        """Runs one candidate's block on its own data and adds it to the sums."""
        own = self.settings.own_stream
        keep = own and each.last and not self._is_last(block)
        if not each.groups and not keep:
            return
        stacks = {group.leader: block.stack if group.rows is None else group.rows for group in each.groups}
        for group in each.groups:
            tokens = self.activations.num_rows(index, stacks[group.leader])
            difference = None if index == 0 else differences(block, group, tensors, anchor)
            sums[group.leader].start_candidate(
                self.settings.shares[index],
                tokens,
                difference,
                own_tokens=self.activations.num_own_rows(index, stacks[group.leader]),
                at_home=self.together.is_home(index),
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
        for group in each.groups:
            with self.clock.stage("right_hand_side"):
                try:
                    sums[group.leader].finish_candidate()
                except FloatingPointError as error:
                    raise MergeError(self._not_finite(block, group, index, error)) from None

    def _not_finite(self, block: BlockPlan, group: GroupPlan, index: int, error: FloatingPointError) -> str:
        dtype = dtype_name(self.activations.compute_dtype)
        return (
            f"{block.name}.{group.leader}: {error} for candidate {self.names[index]}, computed in {dtype}; "
            "try compute_dtype: float32, and check that the candidate's weights are finite"
        )

    def _solve(
        self, block: BlockPlan, group: GroupPlan, sums: GroupSums, anchor: Tensors, merged: Tensors
    ) -> JsonObject:
        try:
            solution = sums.solve(self.settings.ridge)
        except FloatingPointError as error:
            raise MergeError(f"{block.name}.{group.leader}: cannot be solved: {error}") from None
        dtypes = {plan.name: plan.dtype for plan in block.tensors}
        report: JsonObject = {}
        for path in group.outputs:
            name = f"{block.name}.{path}.weight"
            merged[name], report[name] = finish_linear(
                group, path, anchor.pop(name), dtypes[name], sums, solution, self.names
            )
        return report

    def _merged(self, block: BlockPlan) -> Tensors:
        return self.weights.merged([plan.name for plan in block.tensors])

    def _forward(self, block: BlockPlan, merged: Tensors) -> None:
        """Runs the merged block on this rank's hidden states, as it will be read from disk."""
        self.activations.set_outside(block, None)
        with self.clock.stage("merged_forward"):
            for index, name in enumerate(self.names):
                for _ in self.activations.run(block, index, merged, outside_of=None, keep=True):
                    self.watcher.step(block.name, "forward", name)

    def _replay(self, block: BlockPlan, blocks_of_candidates: BlocksOfCandidates) -> None:
        if self._is_last(block):
            return
        if not self.settings.own_stream:
            self._forward(block, self._merged(block))
            return
        with self.clock.stage("candidate_forward"):
            for index, name in enumerate(self.names):
                if not self.together.has_data(index):
                    continue
                tensors = next(blocks_of_candidates)
                for _ in self.activations.run(block, index, tensors, outside_of=index, keep=True):
                    self.watcher.step(block.name, "forward", name)
