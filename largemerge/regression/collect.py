"""Collects the statistics of one pass over a block: runs every candidate's block on its data, and sums its Grams.

    hidden states ─► SampleRunner.run ─► BlockRunner: the candidate's block ─► inputs of its linears ─► GroupSums
        ▲                    │
        └── output, if the ──┘
            pass makes the next hidden states

Linear by linear, what is merged so far is run in its place; and where linears are held against the candidate's own
features, the candidate's block beside it, batch by batch:

    candidate's hidden states ─► candidate's block ─► inputs X', hidden states ─┐
    merged hidden states ──────► merged so far ─────► inputs X, hidden states ──┴─► _Pairs ─► GroupSums

Where several ranks share the work, those that have parts of the same last candidate add up its Grams, and each
computes some rows of the right-hand sides. A group's sums are reduced to the rank that solves it as soon as this
rank's last candidate has been added, while the next group's are finished.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from largemerge.checkpoint.tensor_info import Tensors, dtype_name
from largemerge.errors import MergeError
from largemerge.model.block_runner import Beside, BlockId, BlockRunner, NonBlock, OnInput
from largemerge.model.forward import Output
from largemerge.model.hidden_states import HiddenStates
from largemerge.model.inside_block import ResumePoint
from largemerge.model.norms import normalized
from largemerge.progress import Clock, Watcher
from largemerge.regression.averages import RunningAverages, RunningScales
from largemerge.regression.essential import Sums, new_essential_sums
from largemerge.regression.gram import GRAM_DTYPE, Scratch
from largemerge.regression.gram_files import GramReader
from largemerge.regression.group_sums import Features, GroupSums, differences, features_by_rows, new_sums
from largemerge.regression.kept_sums import SequenceSums
from largemerge.regression.methods import RegressionMethod, Stream
from largemerge.regression.passes import BlockPass, beside_of
from largemerge.regression.rank_exchange import PassExchange, RankExchange
from largemerge.regression.samples import RankSamples
from largemerge.regression.shrinkage import Folds, Parts, parts_in_folds
from largemerge.regression.tensor_plan import BlockPlan, LinearGroup, MergeRule, TensorPlan
from largemerge.regression.weights import MERGED, Weights

BlocksOfCandidates = Iterator[Tensors]
"""The tensors of every pass of every block of every candidate, in the order in which they are wanted."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the method, and how reading and writing overlap with computing.

    Attributes:
        method: The method's row in the table, as the user has set it.
        shares: c_i / Σ c, by candidate.
        num_merged: Number of models in the output, those that were merged before included.
        prefetch: Whether the next block is read while the present one computes.
        write_in_background: Whether a merged block is written while the next one is merged.
    """

    method: RegressionMethod
    shares: tuple[float, ...]
    num_merged: int
    prefetch: bool = True
    write_in_background: bool = False


@dataclass
class Collected:
    """Statistics of one pass over a block.

    Attributes:
        sums: Leader of a group → its sums, which are being reduced to their owner.
        averages: Averages of the tensors that are not solved.
        scales: Averages of the scales of norms, weighted by what they multiply.
        anchor: Weights that the sums are anchored to, by parameter name: of the first candidate, or of the base.
        bytes_read: Bytes that this rank read from candidates.
    """

    sums: dict[str, Sums]
    averages: RunningAverages
    scales: RunningScales
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
    sequence: SequenceSums
    grams: GramReader
    _scratch: Scratch = field(init=False, default_factory=Scratch)

    def collect(
        self,
        block: BlockPlan,
        block_pass: BlockPass,
        blocks_of_candidates: BlocksOfCandidates,
        pass_exchange: PassExchange,
        merged: Tensors,
        *,
        advance: bool,
    ) -> Collected:
        """Runs all candidates through a block.

        Args:
            block: The block.
            block_pass: The groups to collect for, and what is read for them.
            blocks_of_candidates: Gives the tensors of the next candidate that this rank wants.
            pass_exchange: Exchanges sums with other ranks.
            merged: The block's tensors that are merged already, for passes that go linear by linear.
            advance: Whether the candidates' hidden states move on.
        """
        averages = RunningAverages(_averaged(block, block_pass), self.settings.shares)
        scales = RunningScales(tuple(norm.name for norm in block_pass.norms))
        sums = {group.leader: self._new_sums(group) for group in block_pass.groups}
        for leader, own in sums.items():
            if isinstance(own, GroupSums) and pass_exchange.owns(leader):  # once, on whatever rank solves it
                with self.clock.stage("wait_for_read"):
                    self.sequence.add_previous(block.name, leader, own.gram)
        bytes_read = 0
        solved = {linear.name for group in block_pass.groups for linear in group.linears}
        anchor = self._base_of(solved) if self.settings.method.merges_subspaces else Tensors()
        for index in range(len(self.names)):
            tensors: Tensors = {}
            if self.rank_exchange.wants(index):
                with self.clock.stage("wait_for_read"):
                    tensors = next(blocks_of_candidates)
            if index == 0:
                anchor = anchor or {name: tensor for name, tensor in tensors.items() if name in solved}
                scales.start(tensors)
            if tensors and self.rank_exchange.reads_from_disk(index):
                bytes_read += self.weights.stored_bytes(index, block_pass.tensor_names)
            if index == 0 or self.rank_exchange.is_primary(index):
                averages.add(index, tensors)
            if self.rank_exchange.has_data(index) and (block_pass.groups or block_pass.norms or advance):
                self._start_candidate(block, block_pass, index, tensors, anchor, sums)
                if self.grams.has(index):
                    self._read_grams(block, block_pass, index, sums)
                else:
                    self._run(block, block_pass, index, tensors, merged, sums, scales, advance=advance)
                    self._finish_scales(block, block_pass, index, tensors, scales)
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
        pass_exchange.reduce_averages(averages, scales)
        return Collected(sums, averages, scales, anchor, bytes_read)

    def _new_sums(self, group: LinearGroup) -> Sums:
        """Makes empty sums for a group of linears."""
        method, device = self.settings.method, self.samples.runner.device
        if method.merges_subspaces:
            return new_essential_sums(group, method, len(self.names), device, self._scratch)
        return new_sums(group, method, device, self._scratch)

    def _base_of(self, names: Iterable[str]) -> Tensors:
        """Reads weights of the base, which task vectors are held against, to the device."""
        with self.clock.stage("wait_for_read"):
            found = self.weights.read_base(sorted(names))
        return {name: tensor.to(self.samples.runner.device) for name, tensor in found.items()}

    def _start_candidate(
        self,
        block: BlockPlan,
        block_pass: BlockPass,
        index: int,
        tensors: Tensors,
        anchor: Tensors,
        sums: Mapping[str, Sums],
    ) -> None:
        """Begins the sums of one candidate."""
        method = self.settings.method
        for group in block_pass.groups:
            has_rows, stack = not self.grams.has(index), block.stack_of(group)
            tokens = self._num_rows(block, group, index)
            own_tokens = self.samples.num_own_rows(index, stack) if has_rows else tokens
            features = None
            if method.compares:
                by_rows = features_by_rows(own_tokens, group.num_inputs, group.num_outputs)
                features = Features(method.target, method.drift, differences(group, tensors, None), by_rows)
            sums[group.leader].start_candidate(
                self.settings.shares[index],
                tokens,
                None if index == 0 and not method.merges_subspaces else differences(group, tensors, anchor),
                self.rank_exchange.part(index, own_tokens),
                features,
                has_rows=has_rows,
            )

    def _num_rows(self, block: BlockPlan, group: LinearGroup, index: int) -> int:
        """Number of a candidate's rows, on all ranks together, or of those that its Gram is the sum of."""
        if self.grams.has(index):
            return self.grams.tokens(index, block.name, group)
        return self.samples.num_rows(index, block.stack_of(group))

    def _read_grams(self, block: BlockPlan, block_pass: BlockPass, index: int, sums: Mapping[str, Sums]) -> None:
        """Reads the Gram matrices that stand for one candidate's data."""
        with self.clock.stage("wait_for_read"):
            for group in block_pass.groups:
                self.grams.read(index, block.name, group, sums[group.leader].gram)

    def _run(
        self,
        block: BlockPlan,
        block_pass: BlockPass,
        index: int,
        tensors: Tensors,
        merged: Tensors,
        sums: Mapping[str, Sums],
        scales: RunningScales,
        *,
        advance: bool,
    ) -> None:
        """Runs one candidate's data through a block and builds its Gram matrices, batch by batch.

        Where linears are held against the candidate's own features, or what is merged so far is run while the
        candidate's hidden states move on, every batch is run twice: through the candidate, then as the method says.
        """
        method, leaders = self.settings.method, [group.leader for group in block_pass.groups]
        beside = block_pass.beside if method.drift > 0 and block_pass.runs_merged else ()
        folds = self._folds(block, block_pass, index) if method.shrinks else {}
        paired = _Pairs(block_pass, method, sums, self.clock, folds)
        weights = merged if block_pass.runs_merged else tensors
        inside = {"start": block_pass.start, "keep": block_pass.keep}
        alone = not method.compares and not (block_pass.runs_merged and method.inputs == "candidate" and advance)
        watched = Watched(leaders, paired.add, beside)
        if block_pass.norms:
            watched = self._with_norms(block, block_pass, watched, scales)
        runs = []
        if not alone:
            own = Watched(leaders, paired.note, beside) if method.compares else Watched()
            runs.append(
                self.samples.run(
                    block,
                    index,
                    tensors,
                    "candidate",
                    advance=advance,
                    watched=own,
                    inside=Inside("candidate", **inside) if method.compares else Inside("candidate"),
                )
            )
        if leaders or block_pass.norms or alone:
            where = Inside("merged", **inside) if block_pass.runs_merged else Inside("merged")
            runs.append(
                self.samples.run(
                    block, index, weights, method.inputs, advance=advance and alone, watched=watched, inside=where
                )
            )
        with self.clock.stage("candidate_forward"):
            for _ in zip(*runs, strict=True):
                paired.end_batch()
                self.watcher.step(block.name, "collect", self.names[index])

    def _with_norms(self, block: BlockPlan, block_pass: BlockPass, watched: Watched, scales: RunningScales) -> Watched:
        """Watches the inputs of norms, too, to the end of the block, and adds the squares of what they multiply."""
        module = self.samples.runner.skeleton.stacks[block.stack].blocks[block.index]
        seen = {Beside(norm.path, "input", norm.path): norm for norm in block_pass.norms}
        norms = {beside.name: norm for beside, norm in seen.items()}

        def add(name: str, x_NI: torch.Tensor) -> None:
            if name not in norms:
                assert watched.on_input is not None
                watched.on_input(name, x_NI)
                return
            with self.clock.stage("gram"):
                scales.add_rows(norms[name].name, normalized(module.get_submodule(norms[name].path), x_NI))

        return Watched(watched.leaders, add, (*watched.beside, *seen), whole=True)

    def _finish_scales(
        self, block: BlockPlan, block_pass: BlockPass, index: int, tensors: Tensors, scales: RunningScales
    ) -> None:
        """Adds one candidate to the sums of the norms."""
        share = self.settings.shares[index]
        alphas = {
            norm.name: share / max(1, self.samples.num_rows(index, block.stack_of(norm))) for norm in block_pass.norms
        }
        try:
            scales.finish_candidate(tensors, alphas)
        except FloatingPointError as error:
            where = f"{block.name}: {error} on the data of {self.names[index]}"
            raise MergeError(self.why_not_finite(block, where)) from None

    def _folds(self, block: BlockPlan, block_pass: BlockPass, index: int) -> dict[str, _RowsInFolds]:
        """What tells the folds of a candidate's rows, by group."""
        batches = self.samples.samples.folds[index]
        stacks = {group.leader: block.stack_of(group) for group in block_pass.groups}
        return {leader: _RowsInFolds([folds[stack] for folds in batches]) for leader, stack in stacks.items()}

    def _finish_candidate(self, block: BlockPlan, group: LinearGroup, index: int, sums: Sums) -> None:
        """Adds one candidate to a group's sums."""
        if not self.rank_exchange.has_data(index):
            self._skip(block, group, [index], sums)
            return
        with self.clock.stage("right_hand_side"):
            try:
                sums.finish_candidate()
            except FloatingPointError as error:
                where = f"{block.name}.{group.leader}: {error} on the data of {self.names[index]}"
                raise MergeError(self.why_not_finite(block, where)) from None

    def _skip(self, block: BlockPlan, group: LinearGroup, candidates: Iterable[int], sums: Sums) -> None:
        """Counts candidates whose data is all on other ranks, or was in an earlier merge."""
        for index in candidates:
            before = self.sequence.tokens(block.name, group.leader) if index == 0 else 0
            sums.skip_candidate(before or self._num_rows(block, group, index))

    def why_not_finite(self, block: BlockPlan, what: str) -> str:
        """Says where NaN or infinity in a block comes from; see the function of this name."""
        return why_not_finite(self.weights, self.samples.runner, block, what)


def why_not_finite(weights: Weights, runner: BlockRunner, block: BlockPlan, what: str) -> str:
    """Says where NaN or infinity in a block comes from, after `what` was found, as far as that can be found out."""
    culprit = weights.why_not_finite([*(plan.name for plan in block.tensors), *runner.skeleton.non_block_tensors()])
    if culprit is not None:
        return f"{what}: {culprit}"
    dtype = dtype_name(runner.compute_dtype)
    advice = "" if dtype == "float32" else "try compute_dtype: float32, and "
    return (
        f"{what}, computed in {dtype}: all models hold finite numbers there; {advice}check that the weights of all "
        "models are not far too large, and that the calibration data is finite"
    )


def _averaged(block: BlockPlan, block_pass: BlockPass) -> Sequence[TensorPlan]:
    """The tensors of which a pass makes averages."""
    if not block_pass.averages:
        return ()
    solved = MergeRule.SOLVED if block_pass.starts else None
    return [replace(plan, rule=MergeRule.AVERAGED) if plan.rule is solved else plan for plan in block.tensors]


@dataclass
class _RowsInFolds:
    """Tells the folds of a candidate's rows, which come batch by batch, and a batch possibly in several parts."""

    batches: Sequence[Folds]
    _batch: int = 0
    _seen: int = 0

    def take(self, count: int) -> Parts:
        """Folds of the next rows of the present batch."""
        parts = parts_in_folds(self.batches[self._batch], count, self._seen)
        self._seen += count
        return parts

    def end_batch(self) -> None:
        """Goes on to the next batch."""
        self._batch, self._seen = self._batch + 1, 0


class _Pairs:
    """Adds the inputs of linears to their sums, beside the same rows in the candidate itself.

    Args:
        block_pass: The pass.
        method: The method.
        sums: Leader of a group → its sums.
        clock: Counts the seconds.
        folds: Leader of a group → what tells the folds of its rows, where corrections are shrunk.
    """

    def __init__(
        self,
        block_pass: BlockPass,
        method: RegressionMethod,
        sums: Mapping[str, Sums],
        clock: Clock,
        folds: Mapping[str, _RowsInFolds],
    ) -> None:
        self._groups = {group.leader: group for group in block_pass.groups}
        self._pays_back = method.drift > 0 and block_pass.runs_merged  # at once, every linear would pay back all of it
        self._method, self._sums, self._clock, self._folds = method, sums, clock, folds
        self._own: dict[str, list[torch.Tensor]] = {}
        self._seen: dict[str, list[torch.Tensor]] = {}

    def note(self, name: str, rows: torch.Tensor) -> None:
        """Keeps rows of the candidate itself until those of the other run come."""
        self._own.setdefault(name, []).append(rows)

    def add(self, name: str, x_NI: torch.Tensor) -> None:
        """Adds the inputs of a group's linears; keeps what is seen beside them until they come."""
        if name not in self._groups:
            self._seen.setdefault(name, []).append(x_NI)
            return
        with self._clock.stage("gram"):
            self._sums[name].add_rows(x_NI)
        if self._method.compares:
            with self._clock.stage("features"):
                target_NI = self._take(self._own, name, len(x_NI)) if self._method.target > 0 else None
                drift_NO = self._drift(self._groups[name], len(x_NI))
                parts = self._folds[name].take(len(x_NI)) if name in self._folds else None
                sums = self._sums[name]
                assert isinstance(sums, GroupSums), "nothing else is held against features"
                sums.add_features(x_NI, target_NI, drift_NO, parts)

    def _drift(self, group: LinearGroup, num_rows: int) -> dict[str, torch.Tensor]:
        """Drift of the hidden states to which the group's linears add their outputs, float32, by linear."""
        linears = [linear for linear in group.linears if linear.residual is not None] if self._pays_back else []
        parts: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(each.name for linear in linears for each in beside_of(linear)):
            own, seen = (self._take(rows, name, num_rows) for rows in (self._own, self._seen))
            parts[name] = own.to(GRAM_DTYPE) - seen.to(GRAM_DTYPE)
        return {
            linear.path: functools.reduce(torch.add, (parts[each.name] for each in beside_of(linear)))
            for linear in linears
        }

    def _take(self, rows: dict[str, list[torch.Tensor]], name: str, count: int) -> torch.Tensor:
        """The next `count` rows of a name: a run that was cut in parts gives them in parts."""
        known = torch.cat(rows[name]) if len(rows[name]) > 1 else rows[name][0]
        assert len(known) >= count, name
        rows[name] = [known[count:]]
        return known[:count]

    def end_batch(self) -> None:
        """Forgets the rows of a batch."""
        self._own.clear()
        self._seen.clear()
        for rows in self._folds.values():
            rows.end_batch()


@dataclass(frozen=True)
class Watched:
    """What is watched in a run of a block: leaders of groups, tensors beside, and what is called with their rows.

    The block is run to its end if it is to be `whole`.
    """

    leaders: Sequence[str] = ()
    on_input: OnInput | None = None
    beside: Sequence[Beside] = ()
    whole: bool = False


@dataclass(frozen=True)
class Inside:
    """How runs of a block are taken up, and stop, inside it.

    Attributes:
        stream: Whose weights run: of a candidate, or merged ones.
        start: Where the runs are taken up; `None` for the beginning.
        keep: Where they stop and keep what the next needs; `None` where it starts at the beginning.
    """

    stream: Stream
    start: ResumePoint | None = None
    keep: ResumePoint | None = None

    @property
    def name(self) -> str:
        """Name of the stream of hidden states that holds what was kept."""
        return f"inside {self.stream}"


@dataclass(frozen=True)
class SampleRunner:
    """Runs blocks on this rank's part of the candidates' calibration data.

    Attributes:
        runner: Runs a block on one batch.
        samples: This rank's batches of every candidate.
        hidden_states: The hidden states between blocks, and inside of one.
    """

    runner: BlockRunner
    samples: RankSamples
    hidden_states: HiddenStates
    _merged_non_block: dict[tuple[int, bool], NonBlock] = field(init=False, default_factory=dict)

    def merged_non_block(self, block: BlockPlan) -> NonBlock:
        """Collective, the first time: reads merged embeddings and the like, whether this rank has data or not."""
        key = (block.stack, block.index == 0)
        if key not in self._merged_non_block:
            self._merged_non_block.clear()
            self._merged_non_block[key] = self.runner.non_block_of(BlockId(block.stack, block.index), MERGED)
        return self._merged_non_block[key]

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
        stream: Stream,
        *,
        advance: bool,
        watched: Watched | None = None,
        inside: Inside | None = None,
        on_output: Callable[[int, Output], None] | None = None,
    ) -> Iterator[None]:
        """Runs a block on all batches of one candidate, and pauses after each; what it makes is stored afterwards.

        Args:
            block: The block.
            candidate: Number of the candidate whose data is run.
            tensors: The block's weights, by parameter name.
            stream: Whose hidden states enter the block, and whose embeddings and the like are used on the way.
            advance: Store the block's output as the next hidden states; otherwise it is run only as far as the last
                of the watched linears.
            watched: What is watched.
            inside: Where in the block the runs start and stop.
            on_output: Called with the number of the batch and the output that is stored.
        """
        prefix, device = block.name + ".", self.runner.device
        watched, where = watched or Watched(), BlockId(block.stack, block.index)
        start = inside.start if inside is not None else None
        keep = inside.keep if inside is not None and inside.keep != start and not advance else None
        weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        merged = stream == "merged"
        non_block = self.merged_non_block(block) if merged else self.runner.non_block_of(where, candidate)
        states = [stream, *([inside.name] if inside is not None and start is not None else [])]
        with self.runner.block(where, weights, non_block) as running:
            del weights
            for number, batch in enumerate(self.samples.calibration[candidate].batches):
                for name in states:
                    self.hidden_states.prefetch(name, candidate, number + 1)
                outputs = self.hidden_states.get(stream, candidate, number, device)
                resume = None
                if start is not None:
                    kept: Any = self.hidden_states.get(states[-1], candidate, number, device)[0]
                    resume = (start, kept)
                output = running.run(
                    batch,
                    outputs,
                    watch=watched.leaders,
                    on_input=watched.on_input,
                    whole=advance or watched.whole,
                    beside=watched.beside,
                    start=resume,
                    keep=keep,
                )
                del outputs, resume
                yield  # another run, which takes turns with this one, may need the same hidden states
                if advance:
                    self.hidden_states.put(stream, candidate, number, block.stack, output)
                    if on_output is not None:
                        on_output(number, output)
                elif keep is not None and inside is not None:
                    self.hidden_states.put(inside.name, candidate, number, 0, output)
                del output
