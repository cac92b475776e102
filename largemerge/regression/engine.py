"""The regression methods, one block at a time.

For every block:

    for every candidate:   its block → run on its hidden states → Gram matrices → two sums per group
    solve every group      → the merged block → to disk
    regmean_plusplus:      the merged block → run on everybody's hidden states → the next ones

RegMean (arXiv 2212.09849) differs in one point: a candidate's hidden states come from its own blocks, so they
move on in the first step, and embeddings are the candidate's own. In RegMean++ (arXiv 2508.03121) they come
from the merged blocks before.

Where activations come from is here; what is accumulated is in `sums.py`; how it is solved is in `solve.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from largemerge.calibration.batches import CalibrationSet
from largemerge.calibration.hidden_states import HiddenStates
from largemerge.calibration.rows import count_rows, row_mask
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.errors import MergeError
from largemerge.inputs import Inputs
from largemerge.model.block import block_weights, run_until, watched_linears
from largemerge.model.forward import Output, resumed_at
from largemerge.model.names import NameMap
from largemerge.model.rehearsal import Rehearsal
from largemerge.model.skeleton import assign_tensors
from largemerge.regression.gram import GRAM_DTYPE
from largemerge.regression.solve import Solution
from largemerge.regression.sums import GroupSums, new_sums
from largemerge.treatment import BlockPlan, GroupPlan, TensorPlan, Treatment

Tensors = dict[str, torch.Tensor]
JsonObject = dict[str, Any]


class BlockSink(Protocol):
    """Where merged blocks go, and come back from."""

    def store(self, tensors: Tensors) -> int:
        """Writes parameters by name; returns the bytes."""

    def load(self, names: list[str]) -> Tensors:
        """Reads back parameters, rounded as they were written."""


class Watcher(Protocol):
    """Is told how far the work is."""

    def step(self, block: str, stage: str, candidate: str | None = None) -> None:
        """One batch, solve or block has been done."""


@dataclass(frozen=True)
class Settings:
    """What the engine needs of the configuration.

    Attributes:
        own_stream: RegMean: hidden states come from a candidate's own blocks.
        weights: c_i / Σ c.
        off_diagonal_scale: s.
        ridge: λ as a fraction of the mean diagonal.
        compute_dtype: Of the forward passes.
        device: That computes.
        store_device: Where hidden states wait.
    """

    own_stream: bool
    weights: tuple[float, ...]
    off_diagonal_scale: float
    ridge: float
    compute_dtype: torch.dtype
    device: torch.device
    store_device: torch.device


@dataclass
class Engine:
    """Everything that the blocks have in common. Make one, then `run` it once."""

    settings: Settings
    inputs: Inputs
    rehearsal: Rehearsal
    blocks: tuple[BlockPlan, ...]
    calibration: tuple[CalibrationSet, ...]
    readers: tuple[CheckpointReader, ...]
    base_reader: CheckpointReader | None
    sink: BlockSink
    watcher: Watcher
    loss_tokens: str
    hidden_states: HiddenStates = field(init=False)
    seconds: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.hidden_states = HiddenStates(self.settings.store_device)
        self._poison_outside()

    def run(self, finished: frozenset[str], done: Callable[[str, JsonObject], None]) -> None:
        """Merges every block that is not in `finished`, which are only run forward.

        Args:
            finished: Names of blocks that are on disk already.
            done: Called with each merged block's name and report, once it is written.
        """
        work = [(block, index) for block in self.blocks for index in range(len(self.readers)) if self._reads(block, finished)]
        with prefetched(lambda item: self._candidate_block(*item), work) as candidates:
            for block in self.blocks:
                last = block is self.blocks[-1]
                self.seconds = {}
                if block.name in finished:
                    if not last:
                        self._replay(block, candidates)
                    continue
                report = self._merge_block(block, candidates, last=last)
                done(block.name, report | {"seconds": {key: round(value, 4) for key, value in self.seconds.items()}})

    def _reads(self, block: BlockPlan, finished: frozenset[str]) -> bool:
        """Whether candidates' weights of the block are needed."""
        if block.name not in finished:
            return True
        return self.settings.own_stream and block is not self.blocks[-1]

    def _candidate_block(self, block: BlockPlan, index: int) -> Tensors:
        names = self.inputs.candidate_names[index]
        return self._load(block, names, self.readers[index])

    def _load(self, block: BlockPlan, names: NameMap, reader: CheckpointReader) -> Tensors:
        """All tensors of a block, on the CPU, as stored; those excluded may come from the base."""
        tensors: Tensors = {}
        for plan in block.tensors:
            name = names.on_disk(plan.name)
            if name in names.missing or name in names.mismatched:
                tensors[plan.name] = self._base_tensor(plan)
        wanted = {names.on_disk(plan.name): plan.name for plan in block.tensors if plan.name not in tensors}
        loaded = names.load(self.inputs.skeleton.model, list(wanted), reader.read)
        return tensors | {wanted[name]: tensor for name, tensor in loaded.items() if name in wanted}

    def _base_tensor(self, plan: TensorPlan) -> torch.Tensor:
        assert self.base_reader is not None and self.inputs.base_names is not None, plan.name
        name = self.inputs.base_names.on_disk(plan.name)
        return self.inputs.base_names.load(self.inputs.skeleton.model, [name], self.base_reader.read)[name]

    def _merge_block(self, block: BlockPlan, candidates: Iterator[Tensors], *, last: bool) -> JsonObject:
        sums = {
            group.leader: new_sums(group.outputs, group.num_inputs, self.settings.device) for group in block.groups
        }
        averages = _Averages(self.settings.weights, block)
        anchor: Tensors = {}
        for index in range(len(self.readers)):
            with self._timed("wait_for_read"):
                tensors = _moved(next(candidates), self.settings.device)
            if index == 0:
                anchor = {plan.name: tensors[plan.name] for plan in block.tensors if plan.treatment is Treatment.SOLVED}
            averages.add(index, tensors)
            self._collect(block, index, tensors, sums, keep_output=self.settings.own_stream and not last)
            self._finish_candidate(block, index, tensors, anchor, sums)
        merged = averages.finish()
        for plan in block.tensors:
            if plan.treatment is Treatment.BASE:
                merged[plan.name] = self._base_tensor(plan).to(self.settings.device, plan.dtype)
        linears: JsonObject = {}
        for group in block.groups:
            linears |= self._solve(block, group, sums.pop(group.leader), anchor, merged)
        with self._timed("write"):
            num_bytes = self.sink.store(merged)
        if not self.settings.own_stream and not last:
            self._forward(block, merged)
        return {"linears": linears, "bytes_written": num_bytes}

    def _collect(
        self, block: BlockPlan, index: int, tensors: Tensors, sums: Mapping[str, GroupSums], *, keep_output: bool
    ) -> None:
        """Runs one candidate's block on its own data and adds up the Gram matrices."""
        for group in sums.values():
            group.start_candidate()
        module = self.inputs.skeleton.stacks[block.stack].blocks[block.index]
        leaders = [group.leader for group in block.groups]
        rows = {group.leader: group.rows for group in block.groups}
        masks: dict[int, torch.Tensor | None] = {}

        def add(path: str, x: torch.Tensor) -> None:
            with self._timed("gram"):
                whose = rows[path]
                sums[path].add_rows(_counted_rows(x, None if whose is None else masks.get(whose)))

        self._set_outside(block, index if self.settings.own_stream else None)
        until = None if keep_output or not leaders else leaders[-1]
        if not leaders and not keep_output:
            return
        name = self.inputs.candidates[index].name
        with self._timed("collect"), block_weights(module, self._for_forward(block, tensors)), watched_linears(
            module, leaders, add
        ):
            for batch, masks_of_batch in enumerate(self._masks(index)):
                masks.clear()
                masks.update(masks_of_batch)
                self._run_batch(block, index, batch, until, keep=keep_output)
                self.watcher.step(block.name, "collect", name)

    def _masks(self, index: int) -> Iterator[dict[int, torch.Tensor | None]]:
        for batch in self.calibration[index].batches:
            masks = [row_mask(batch, stack, self.loss_tokens) for stack in self.rehearsal.stacks]
            yield {
                stack: None if mask is None else mask.to(self.settings.device) for stack, mask in enumerate(masks)
            }

    def _run_batch(self, block: BlockPlan, index: int, batch: int, until: str | None, *, keep: bool) -> None:
        settings = self.settings
        module = self.inputs.skeleton.stacks[block.stack].blocks[block.index]
        caught: list[Output] = []

        def visit(*args: Any, **kwargs: Any) -> None:
            caught.append(run_until(module, until, args, kwargs))

        inputs = {
            name: tensor.to(settings.device, settings.compute_dtype if tensor.is_floating_point() else None)
            for name, tensor in self.calibration[index].batches[batch].inputs.items()
        }
        with resumed_at(self.inputs.skeleton, block.stack, block.index) as run:
            run(inputs, self.hidden_states.get(index, batch, settings.device), visit)
        if keep:
            self.hidden_states.put(index, batch, block.stack, caught[0])

    def _finish_candidate(
        self, block: BlockPlan, index: int, tensors: Tensors, anchor: Tensors, sums: Mapping[str, GroupSums]
    ) -> None:
        settings = self.settings
        for group in block.groups:
            group_sums = sums[group.leader]
            tokens = self.tokens(index, block.stack if group.rows is None else group.rows)
            with self._timed("differences"):
                try:
                    group_sums.finish_gram(settings.weights[index], tokens, settings.off_diagonal_scale)
                except FloatingPointError as error:
                    raise MergeError(self._not_finite(block, group, index, error)) from None
                if index == 0:
                    group_sums.add_anchor()
                else:
                    group_sums.add_differences(
                        _differences(block, group, tensors, anchor), settings.weights[index]
                    )

    def _not_finite(self, block: BlockPlan, group: GroupPlan, index: int, error: FloatingPointError) -> str:
        return (
            f"{block.name}.{group.leader}: {error} for candidate {self.inputs.candidates[index].name} in "
            f"{str(self.settings.compute_dtype).removeprefix('torch.')}; try compute_dtype: float32, "
            "and check that the candidate's weights are finite"
        )

    def tokens(self, index: int, stack: int) -> int:
        """Rows of a candidate that count in a stack."""
        return sum(
            count_rows(batch, self.rehearsal.stacks[stack], self.loss_tokens)
            for batch in self.calibration[index].batches
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
            update_OI = solution.update_OI[sums.rows_of(path)]
            weight_OI = _oriented(anchor[name], group).to(GRAM_DTYPE) + update_OI
            merged[name] = _oriented(weight_OI, group).to(dtypes[name]).contiguous()
            report[name] = self._linear_report(group, path, sums, solution, weight_OI)
        self.watcher.step(block.name, "solve")
        return report

    def _linear_report(
        self, group: GroupPlan, path: str, sums: GroupSums, solution: Solution, weight_OI: torch.Tensor
    ) -> JsonObject:
        distances, from_average = sums.distances(solution.update_OI, path)
        norm = weight_OI.norm().item() or 1.0
        names = [checkpoint.name for checkpoint in self.inputs.candidates]
        return {
            "shape": list(weight_OI.shape),
            "shares_gram_with": group.leader,
            "tokens": dict(zip(names, sums.tokens, strict=True)),
            "solver": solution.solver,
            "ridge": solution.ridge,
            "condition": solution.condition,
            "residual": solution.residual,
            "fallbacks": list(solution.fallbacks),
            "num_dead_features": solution.num_dead_features,
            "relative_distance_to_average": from_average / norm,
            "relative_distance_to_candidates": {
                name: distance / norm for name, distance in zip(names, distances, strict=True)
            },
        }

    def _forward(self, block: BlockPlan, merged: Tensors) -> None:
        """Runs the merged block on everybody's hidden states, as it will be read from disk."""
        module = self.inputs.skeleton.stacks[block.stack].blocks[block.index]
        self._set_outside(block, None)
        with self._timed("forward"), block_weights(module, self._for_forward(block, merged)):
            for index in range(len(self.readers)):
                for batch in range(len(self.calibration[index].batches)):
                    self._run_batch(block, index, batch, None, keep=True)
                    self.watcher.step(block.name, "forward", self.inputs.candidates[index].name)

    def _replay(self, block: BlockPlan, candidates: Iterator[Tensors]) -> None:
        """Runs a finished block forward, to rebuild the hidden states of an interrupted merge."""
        if not self.settings.own_stream:
            names = [plan.name for plan in block.tensors]
            self._forward(block, _moved(self.sink.load(names), self.settings.device))
            return
        module = self.inputs.skeleton.stacks[block.stack].blocks[block.index]
        for index in range(len(self.readers)):
            tensors = _moved(next(candidates), self.settings.device)
            self._set_outside(block, index)
            with block_weights(module, self._for_forward(block, tensors)):
                for batch in range(len(self.calibration[index].batches)):
                    self._run_batch(block, index, batch, None, keep=True)
                    self.watcher.step(block.name, "forward", self.inputs.candidates[index].name)

    def _for_forward(self, block: BlockPlan, tensors: Tensors) -> Tensors:
        """A block's tensors by path in the block, in the forward's dtype."""
        prefix = block.name + "."
        return {
            name.removeprefix(prefix): tensor.to(self.settings.compute_dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }

    def _poison_outside(self) -> None:
        """Gives every parameter outside the stacks one NaN for all its elements: what is not loaded is not needed."""
        model = self.inputs.skeleton.model
        for name in self.inputs.skeleton.outside_tensors():
            tensor = model.state_dict(keep_vars=True)[name]
            if isinstance(tensor, torch.nn.Parameter):
                poison = torch.full((), float("nan"), dtype=self.settings.compute_dtype, device=self.settings.device)
                assign_tensors(self.inputs.skeleton, {name: poison.expand(tensor.shape)})
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(self.settings.device)

    def _set_outside(self, block: BlockPlan, index: int | None) -> None:
        """Loads what outside the stacks matters on the way to a block: of candidate `index`, or the merged."""
        stack = self.rehearsal.stacks[block.stack]
        wanted = sorted(stack.first if block.index == 0 else stack.later)
        state = (block.stack, block.index == 0, index)
        if getattr(self, "_outside_state", None) == state:
            return
        self._poison_outside()
        self._outside_state = state
        buffers = [
            name
            for name in self.inputs.skeleton.outside_tensors()
            if name not in dict(self.inputs.skeleton.model.named_parameters())
        ]
        names = [*wanted, *buffers]
        if index is None:
            loaded = self.sink.load(names)
        else:
            loaded = self._load_outside(names, index)
        for name, tensor in _moved(loaded, self.settings.device).items():
            value = tensor.to(self.settings.compute_dtype) if tensor.is_floating_point() else tensor
            assign_tensors(self.inputs.skeleton, {name: value})

    def _load_outside(self, names: list[str], index: int) -> Tensors:
        name_map = self.inputs.candidate_names[index]
        present = [name for name in names if name_map.on_disk(name) not in name_map.missing]
        loaded = name_map.load(
            self.inputs.skeleton.model, [name_map.on_disk(name) for name in present], self.readers[index].read
        )
        return {name: loaded[name_map.on_disk(name)] for name in present}

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


class _Averages:
    """Running averages of the tensors of a block that are not solved; the first candidate is the anchor."""

    def __init__(self, weights: tuple[float, ...], block: BlockPlan) -> None:
        self._weights = weights
        self._plans = [plan for plan in block.tensors if plan.treatment in (Treatment.AVERAGED, Treatment.COPIED)]
        self._anchors: Tensors = {}
        self._sums: Tensors = {}

    def add(self, index: int, tensors: Tensors) -> None:
        for plan in self._plans:
            tensor = tensors[plan.name]
            if index == 0:
                self._anchors[plan.name] = tensor
            elif plan.treatment is Treatment.AVERAGED:
                difference = tensor.to(GRAM_DTYPE) - self._anchors[plan.name].to(GRAM_DTYPE)
                total = self._sums.get(plan.name)
                self._sums[plan.name] = (
                    difference * self._weights[index]
                    if total is None
                    else total.add_(difference, alpha=self._weights[index])
                )

    def finish(self) -> Tensors:
        merged = {}
        for plan in self._plans:
            anchor = self._anchors[plan.name]
            total = self._sums.get(plan.name)
            merged[plan.name] = (anchor if total is None else anchor.to(GRAM_DTYPE) + total).to(plan.dtype)
        return merged


def _differences(
    block: BlockPlan, group: GroupPlan, tensors: Tensors, anchor: Tensors
) -> Iterator[tuple[str, torch.Tensor]]:
    for path in group.outputs:
        name = f"{block.name}.{path}.weight"
        yield path, _oriented(tensors[name].to(GRAM_DTYPE) - anchor[name].to(GRAM_DTYPE), group)


def _oriented(weight: torch.Tensor, group: GroupPlan) -> torch.Tensor:
    """`[out, in]` from the module's layout, or the other way round."""
    return weight.T if group.transposed else weight


def _counted_rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Rows `[N, in]` of a linear's input that count; the others may be anything, NaN included."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if mask is None else flat[mask.reshape(-1)]


def _moved(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@contextmanager
def prefetched(
    load: Callable[[Any], Tensors], items: list[Any]
) -> Iterator[Iterator[Tensors]]:
    """Yields an iterator over loaded items, one read ahead by a thread while the present one is in use."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="largemerge-read") as pool:

        def loaded() -> Iterator[Tensors]:
            ahead: Future[Tensors] | None = None
            for position, item in enumerate(items):
                present = ahead or pool.submit(load, item)
                tensors = present.result()
                ahead = pool.submit(load, items[position + 1]) if position + 1 < len(items) else None
                del present
                yield tensors
                del tensors

        yield loaded()
