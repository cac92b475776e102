"""The long work of a merge: everything that is written to shards.

open readers and writer → tensors outside the blocks → block after block
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from largemerge.average import merge_outside
from largemerge.calibration.hidden_states import DiskStore, HiddenStates, MemoryStore, Store
from largemerge.carriers import SHARED_BYTES
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.checkpoint.writer import Shard, ShardWriter
from largemerge.distributed import Ranks
from largemerge.estimate import Waiting
from largemerge.exchange import Exchange, open_exchange
from largemerge.merge_plan import Preparation
from largemerge.node import ALONE, Node, find_node
from largemerge.output import OutputFolder
from largemerge.passes import block_passes
from largemerge.progress import RunProgress
from largemerge.regression.activations import Activations
from largemerge.regression.clock import Clock
from largemerge.regression.collect import Settings
from largemerge.regression.engine import Engine
from largemerge.regression.together import Together
from largemerge.samples import OwnSamples, loss_tokens, model_needs
from largemerge.weights import Weights

OUTSIDE = "outside"


@dataclass
class Job:
    """The long work: everything that is written to shards."""

    preparation: Preparation
    samples: OwnSamples
    shards: tuple[Shard, ...]
    folder: OutputFolder
    ranks: Ranks
    quiet: bool
    clock: Clock
    started: float = field(init=False, default_factory=time.perf_counter)
    resumed_parts: int = field(init=False, default=0)
    bytes_read: int = field(init=False, default=0)
    hidden_bytes_on_disk: int = field(init=False, default=0)
    retries: list[str] = field(init=False, default_factory=list)
    node: Node = field(init=False, default=ALONE)
    not_shared: str = field(init=False, default="")

    def run(self) -> None:
        """Writes what is not in the journal yet."""
        plan, inputs = self.preparation.plan, self.preparation.inputs
        finished = frozenset(self.folder.entries)
        self.resumed_parts = len(finished)
        if finished == {OUTSIDE, *(block.name for block in plan.blocks)}:
            return
        # Each tensor is read once, unless a block takes several passes, or ranks share a candidate.
        past_cache = plan.placement.passes == 1 and self.ranks.size == 1
        with ExitStack() as stack:
            stack.enter_context(self.ranks.works())

            def reader(checkpoint: Checkpoint) -> CheckpointReader:
                return stack.enter_context(CheckpointReader(checkpoint, past_cache=past_cache))

            weights = Weights(
                inputs=inputs,
                readers=[reader(candidate) for candidate in inputs.candidates],
                base_reader=reader(inputs.base) if inputs.base is not None else None,
                output=plan.output,
                writer=(
                    stack.enter_context(ShardWriter(self.folder.working, plan.output, self.shards))
                    if self.ranks.is_first
                    else None
                ),
                ranks=self.ranks,
                device=plan.device,
            )
            quiet = self.quiet or not self.ranks.is_first
            progress = stack.enter_context(
                RunProgress(self._num_steps(finished), len(plan.blocks), plan.device, quiet=quiet)
            )
            for note in plan.notes:
                progress.tell(f"note: {note}")
            if OUTSIDE not in finished and self.ranks.is_first:
                self._merge_outside(weights, progress)
            hidden_states = stack.enter_context(self._hidden_states())
            if self.ranks.size > 1:
                self.node, self.not_shared = find_node(self.ranks, self._largest_block(weights), SHARED_BYTES)
                stack.callback(self.node.clean_up)
            teams = self.samples.shares.teams[1:]  # the first candidate is the anchor: it has no right-hand side
            exchange = stack.enter_context(open_exchange(self.ranks, self.node, plan.device, teams))
            self._engine(weights, hidden_states, progress, exchange).run(finished, self.folder.record)
            self.bytes_read = weights.bytes_read
            if plan.placement.hidden_states is Waiting.DISK:
                self.hidden_bytes_on_disk = hidden_states.num_bytes

    def _largest_block(self, weights: Weights) -> int:
        """Bytes on disk."""
        blocks = self.preparation.plan.blocks
        return max((weights.stored_bytes(0, [plan.name for plan in block.tensors]) for block in blocks), default=0)

    def _hidden_states(self) -> HiddenStates:
        plan = self.preparation.plan
        waiting = plan.placement.hidden_states
        store: Store
        if waiting is Waiting.DISK:
            store = DiskStore(Path(plan.config.memory.disk or self.folder.working))
        else:
            store = MemoryStore(plan.device if waiting is Waiting.DEVICE else torch.device("cpu"), plan.device)
        return HiddenStates(store, eight_bit=plan.config.memory.hidden_states_8bit)

    def _engine(
        self, weights: Weights, hidden_states: HiddenStates, progress: RunProgress, exchange: Exchange | None
    ) -> Engine:
        plan, inputs, rehearsal = self.preparation.plan, self.preparation.inputs, self.preparation.rehearsal
        parameters, placement = plan.config.parameters, plan.placement
        own_stream = plan.config.merge_method == "regmean"
        return Engine(
            settings=Settings(
                own_stream=own_stream,
                shares=plan.config.shares,
                off_diagonal_scale=parameters.off_diagonal_scale,
                ridge=parameters.ridge,
                prefetch=placement.prefetch,
                write_behind=placement.writes_behind(plan.device),
            ),
            names=plan.config.names,
            blocks=plan.blocks,
            passes={
                block.name: block_passes(
                    block,
                    rehearsal.stacks[block.stack].roles[block.index],
                    placement.passes,
                    keeps_outputs=own_stream and block is not plan.blocks[-1],
                )
                for block in plan.blocks
            },
            weights=weights,
            activations=Activations(
                skeleton=inputs.skeleton,
                rehearsal=rehearsal,
                calibration=self.samples.calibration,
                row_counts=self.samples.row_counts,
                own_row_counts=self.samples.own_row_counts,
                weights=weights,
                hidden_states=hidden_states,
                compute_dtype=plan.compute_dtype,
                device=plan.device,
                loss_tokens=loss_tokens(model_needs(inputs.skeleton)),
                retries=self.retries,
            ),
            watcher=progress,
            clock=self.clock,
            together=Together(self.ranks, self.samples.shares, self.node, exchange),
        )

    def _merge_outside(self, weights: Weights, progress: RunProgress) -> None:
        plan = self.preparation.plan
        self.clock.begin("")
        with self.clock.stage(OUTSIDE):
            merge_outside(plan.outside, weights, plan.config.shares, lambda name: progress.step(name, OUTSIDE))
            with self.ranks.waits():
                weights.own_writer.flush()
        errors = weights.quantization_errors(tensor.name for tensor in plan.outside)
        entry: dict[str, Any] = {"bytes_read": weights.bytes_read, "bytes_written": weights.own_writer.bytes_written}
        entry |= {"quantization_errors": errors} if errors else {}
        self.folder.record(OUTSIDE, entry | {"seconds": self.clock.seconds()})

    def _num_steps(self, finished: frozenset[str]) -> int:
        plan = self.preparation.plan
        batches = sum(len(data.batches) for data in self.samples.calibration)
        forwards = 0 if plan.config.merge_method == "regmean" else 1
        steps = 0 if OUTSIDE in finished else len(plan.outside)
        for block in plan.blocks:
            last = block is plan.blocks[-1]
            if block.name in finished:
                steps += 0 if last else batches
            else:
                passes = max(1, min(plan.placement.passes, len(block.groups)))
                steps += batches * (passes + (0 if last else forwards)) + len(block.groups)
        return steps
