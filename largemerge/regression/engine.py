"""The regression methods, one block at a time.

For every block:

    for every candidate:   its block → run on its hidden states → Gram matrices → two sums per group
    solve every group      → the merged block → to disk
    regmean_plusplus:      the merged block → run on everybody's hidden states → the next ones

RegMean (arXiv 2212.09849) differs in one point: a candidate's hidden states come from its own blocks, so they
move on in the first step, and embeddings are the candidate's own. In RegMean++ (arXiv 2508.03121) they come
from the merged blocks before.

Where activations come from is in `activations.py`, what is accumulated in `sums.py`, how it is solved in `solve.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from largemerge.checkpoint.prefetch import prefetched
from largemerge.dtypes import dtype_name
from largemerge.errors import MergeError
from largemerge.regression.activations import Activations, Masks, counted_rows
from largemerge.regression.averages import RunningAverages
from largemerge.regression.gram import GRAM_DTYPE
from largemerge.regression.solve import Solution
from largemerge.regression.sums import GroupSums, new_sums
from largemerge.treatment import BlockPlan, GroupPlan, Treatment
from largemerge.weights import Tensors, Weights

JsonObject = dict[str, Any]


class Watcher(Protocol):
    """Is told how far the work is."""

    def step(self, block: str, stage: str, candidate: str | None = None) -> None:
        """One batch or one solve has been done."""


@dataclass(frozen=True)
class Settings:
    """The method's settings.

    Attributes:
        own_stream: RegMean: hidden states come from a candidate's own blocks.
        shares: c_i / Σ c, by candidate.
        off_diagonal_scale: s.
        ridge: λ as a fraction of the mean diagonal.
    """

    own_stream: bool
    shares: tuple[float, ...]
    off_diagonal_scale: float
    ridge: float


@dataclass
class Engine:
    """Everything that the blocks have in common. Make one, then `run` it once."""

    settings: Settings
    names: tuple[str, ...]
    blocks: tuple[BlockPlan, ...]
    weights: Weights
    activations: Activations
    watcher: Watcher
    _seconds: dict[str, float] = field(init=False, default_factory=dict)

    def run(self, finished: frozenset[str], done: Callable[[str, JsonObject], None]) -> None:
        """Merges every block that is not in `finished`; those are only run forward, to rebuild hidden states.

        Args:
            finished: Names of blocks that are on disk already.
            done: Called with each merged block's name and report, once it is written.
        """
        candidates = range(len(self.names))
        wanted = [
            (index, block) for block in self.blocks if self._needs_candidates(block, finished) for index in candidates
        ]
        with prefetched(lambda item: self.weights.block(*item), wanted) as blocks_of_candidates:
            for block in self.blocks:
                if block.name in finished:
                    self._replay(block, blocks_of_candidates)
                    continue
                self._seconds = {}
                report = self._merge_block(block, blocks_of_candidates)
                seconds = {phase: round(value, 4) for phase, value in self._seconds.items()}
                done(block.name, report | {"seconds": seconds})

    def _is_last(self, block: BlockPlan) -> bool:
        """Whether nobody reads what the block computes."""
        return block is self.blocks[-1]

    def _needs_candidates(self, block: BlockPlan, finished: frozenset[str]) -> bool:
        if block.name not in finished:
            return True
        return self.settings.own_stream and not self._is_last(block)

    def _merge_block(self, block: BlockPlan, blocks_of_candidates: Iterator[Tensors]) -> JsonObject:
        device = self.activations.device
        sums = {group.leader: new_sums(group.outputs, group.num_inputs, device) for group in block.groups}
        averages = RunningAverages(block.tensors, self.settings.shares)
        anchor: Tensors = {}
        bytes_read = 0
        for index in range(len(self.names)):
            with self._timed("wait_for_read"):
                tensors = {name: tensor.to(device) for name, tensor in next(blocks_of_candidates).items()}
            bytes_read += self.weights.stored_bytes(index, block)
            if index == 0:
                anchor = {plan.name: tensors[plan.name] for plan in block.tensors if plan.treatment is Treatment.SOLVED}
            averages.add(index, tensors)
            self._collect(block, index, tensors, sums)
            self._finish_candidate(block, index, tensors, anchor, sums)
            del tensors
        merged = averages.finish()
        excluded = {plan.name: plan.dtype for plan in block.tensors if plan.treatment is Treatment.BASE}
        for name, tensor in (self.weights.base(list(excluded)) if excluded else {}).items():
            merged[name] = tensor.to(device, excluded[name])
        linears: JsonObject = {}
        for group in block.groups:
            linears |= self._solve(block, group, sums.pop(group.leader), anchor, merged)
        with self._timed("write"):
            num_bytes = self.weights.store(merged)
        if not self.settings.own_stream:
            self._forward(block, self.weights.as_written(merged))
        errors = self.weights.quantization_errors(merged)
        report = {"linears": linears, "bytes_read": bytes_read, "bytes_written": num_bytes}
        return report | ({"quantization_errors": errors} if errors else {})

    def _collect(self, block: BlockPlan, index: int, tensors: Tensors, sums: Mapping[str, GroupSums]) -> None:
        """Runs one candidate's block on its own data and adds up the Gram matrices."""
        keep = self.settings.own_stream and not self._is_last(block)
        rows = {group.leader: group.rows for group in block.groups}
        for group in sums.values():
            group.start_candidate()
        if not rows and not keep:
            return

        def add(path: str, x: torch.Tensor, masks: Masks) -> None:
            with self._timed("gram"):
                stack = rows[path]
                sums[path].add_rows(counted_rows(x, None if stack is None else masks[stack]))

        with self._timed("forward_and_gram"):
            for _ in self.activations.run(
                block,
                index,
                tensors,
                outside_of=index if self.settings.own_stream else None,
                keep=keep,
                watch=list(rows),
                visit=add,
            ):
                self.watcher.step(block.name, "collect", self.names[index])

    def _finish_candidate(
        self, block: BlockPlan, index: int, tensors: Tensors, anchor: Tensors, sums: Mapping[str, GroupSums]
    ) -> None:
        share = self.settings.shares[index]
        for group in block.groups:
            group_sums = sums[group.leader]
            tokens = self.activations.num_rows(index, block.stack if group.rows is None else group.rows)
            with self._timed("right_hand_side"):
                try:
                    group_sums.finish_gram(share, tokens, self.settings.off_diagonal_scale)
                except FloatingPointError as error:
                    raise MergeError(self._not_finite(block, group, index, error)) from None
                if index == 0:
                    group_sums.add_anchor()
                else:
                    group_sums.add_differences(_differences(block, group, tensors, anchor), share)

    def _not_finite(self, block: BlockPlan, group: GroupPlan, index: int, error: FloatingPointError) -> str:
        dtype = dtype_name(self.activations.compute_dtype)
        return (
            f"{block.name}.{group.leader}: {error} for candidate {self.names[index]}, computed in {dtype}; "
            "try compute_dtype: float32, and check that the candidate's weights are finite"
        )

    def _solve(
        self, block: BlockPlan, group: GroupPlan, sums: GroupSums, anchor: Tensors, merged: Tensors
    ) -> JsonObject:
        with self._timed("solve"):
            try:
                solution = sums.solve(self.settings.ridge)
            except FloatingPointError as error:
                raise MergeError(f"{block.name}.{group.leader}: cannot be solved: {error}") from None
        dtypes = {plan.name: plan.dtype for plan in block.tensors}
        report: JsonObject = {}
        for path in group.outputs:
            name = f"{block.name}.{path}.weight"
            weight_OI = _oriented(anchor.pop(name), group).to(GRAM_DTYPE) + solution.update_OI[sums.rows_of(path)]
            merged[name] = _oriented(weight_OI, group).to(dtypes[name]).contiguous()
            report[name] = self._linear_report(group, path, sums, solution, weight_OI)
        self.watcher.step(block.name, "solve")
        return report

    def _linear_report(
        self, group: GroupPlan, path: str, sums: GroupSums, solution: Solution, weight_OI: torch.Tensor
    ) -> JsonObject:
        distances, from_average = sums.distances(solution.update_OI, path)
        norm = weight_OI.norm().item() or 1.0
        to_candidates = [distance / norm for distance in distances]
        return {
            "shape": list(weight_OI.shape),
            "shares_gram_with": group.leader,
            "tokens": dict(zip(self.names, sums.tokens, strict=True)),
            "solver": solution.solver,
            "condition": solution.condition,
            "residual": solution.residual,
            "fallbacks": list(solution.fallbacks),
            "num_dead_features": solution.num_dead_features,
            "relative_distance_to_average": from_average / norm,
            "relative_distance_to_candidates": dict(zip(self.names, to_candidates, strict=True)),
        }

    def _forward(self, block: BlockPlan, merged: Tensors) -> None:
        """Runs the merged block on everybody's hidden states, as it will be read from disk."""
        if self._is_last(block):
            return
        with self._timed("forward"):
            for index, name in enumerate(self.names):
                for _ in self.activations.run(block, index, merged, outside_of=None, keep=True):
                    self.watcher.step(block.name, "forward", name)

    def _replay(self, block: BlockPlan, blocks_of_candidates: Iterator[Tensors]) -> None:
        if self._is_last(block):
            return
        if not self.settings.own_stream:
            self._forward(block, self.weights.merged([plan.name for plan in block.tensors]))
            return
        for index, name in enumerate(self.names):
            tensors = next(blocks_of_candidates)
            for _ in self.activations.run(block, index, tensors, outside_of=index, keep=True):
                self.watcher.step(block.name, "forward", name)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start


def _differences(
    block: BlockPlan, group: GroupPlan, tensors: Tensors, anchor: Tensors
) -> Iterator[tuple[str, torch.Tensor]]:
    for path in group.outputs:
        name = f"{block.name}.{path}.weight"
        yield path, _oriented(tensors[name].to(GRAM_DTYPE) - anchor[name].to(GRAM_DTYPE), group)


def _oriented(weight: torch.Tensor, group: GroupPlan) -> torch.Tensor:
    """`[out, in]` from the module's layout, or the other way round."""
    return weight.T if group.transposed else weight
