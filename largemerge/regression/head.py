"""Solves the head: the linears that run after the blocks, and the embedding that is tied to one of them.

    tied      first, from each candidate's own final features f_i, before anything has drifted:
              every candidate's blocks → f_i → G_i = f_iᵀf_i → E; the blocks then set the input side right
    untied    last, from the merged model's final features, like any other linear: β as in the blocks

    W* = W̄ + [ Σ_i (W_i − W̄) G̃_i + s·β·Σ_i α_i W_i (X'_i − X_i)ᵀX_i ] ( Σ_i G̃_i + λI )⁻¹

A head has as many rows as the vocabulary, so neither a candidate's nor the sum over them is ever held: the Gram
matrices of all candidates are kept (they are small), and rows are read, solved and written panel by panel.

Shapes: N tokens, I inputs, O rows of a panel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from largemerge.checkpoint.reader import prefetched
from largemerge.checkpoint.tensor_info import Tensors
from largemerge.errors import MergeError
from largemerge.heads import Heads
from largemerge.matmul import add_product_
from largemerge.progress import Clock, Watcher
from largemerge.regression.averages import rows_of_models
from largemerge.regression.collect import EngineSettings, SampleRunner
from largemerge.regression.gram import GRAM_DTYPE, Gram, Scratch
from largemerge.regression.gram_files import GramReader
from largemerge.regression.group_sums import alpha_of, panel_bytes, relative_ridge, solve_rows
from largemerge.regression.kept_sums import SequenceSums
from largemerge.regression.methods import RegressionMethod
from largemerge.regression.rank_exchange import RankExchange, ReadItem
from largemerge.regression.shrinkage import FoldSums, Parts, parts_in_folds
from largemerge.regression.solve import Solution, SolveRows
from largemerge.regression.tensor_plan import HEAD, BlockPlan, HeadPlan, LinearGroup, LinearPlan
from largemerge.regression.weights import MERGED, Weights

JsonObject = dict[str, Any]
Load = Callable[[ReadItem], Callable[[], Tensors]]


@dataclass
class HeadSums:
    """Gram matrices of the linears that read one tensor, of every candidate for itself.

    Attributes:
        grams: XᵀX by candidate; of an earlier merge, which has no data, nothing.
        cross_II: (X' − X)ᵀX by candidate; empty where nothing is held against the candidate's own features.
        folds: The same of every fold of the data, by candidate; empty where it is not shrunk.
        tokens: Number of rows by candidate, on all ranks.
    """

    grams: list[Gram]
    cross_II: list[torch.Tensor]
    folds: list[FoldSums]
    tokens: list[int]

    @classmethod
    def empty(
        cls,
        num_inputs: int,
        num_candidates: int,
        device: torch.device,
        scratch: Scratch,
        *,
        compares: bool,
        shrinks: bool,
    ) -> HeadSums:
        """Makes sums of nothing."""
        grams = [Gram(num_inputs, device, scratch) for _ in range(num_candidates)]
        cross = [torch.zeros(num_inputs, num_inputs, dtype=GRAM_DTYPE, device=device) for _ in grams if compares]
        folds = [FoldSums.of_inputs(num_inputs, device) for _ in grams if compares and shrinks]
        return cls(grams, cross, folds, [0] * num_candidates)

    def add(
        self,
        candidate: int,
        x_NI: torch.Tensor,
        own_NI: torch.Tensor | None = None,
        parts: Parts | None = None,
        share: float = 0.0,
    ) -> None:
        """Adds rows of a candidate's data.

        Args:
            candidate: Number of the candidate.
            x_NI: The rows.
            own_NI: The same rows in the candidate itself, where they are compared.
            parts: Folds of the rows, where what is added is shrunk.
            share: Part of the data that a row is.
        """
        self.tokens[candidate] += len(x_NI)
        self.grams[candidate].add_rows(x_NI)
        if own_NI is not None:
            x_NI = x_NI.to(GRAM_DTYPE)
            moved_NI = own_NI.to(GRAM_DTYPE, copy=True).sub_(x_NI)
            add_product_(self.cross_II[candidate], moved_NI.T, x_NI.T)
            if self.folds:
                self.folds[candidate].add(x_NI, moved_NI, {}, parts or [], share)

    def views(self) -> list[torch.Tensor]:
        """All sums, which ranks add up."""
        grams = [view for gram in self.grams for view in gram.candidate_views()]
        return [*grams, *self.cross_II, *(view for folds in self.folds for view in folds.candidate_views())]

    def alphas(self, shares: Sequence[float], *, by_norm: bool) -> list[float]:
        """α_i of all candidates, see `alpha_of`."""
        return [
            alpha_of(gram, share, tokens, by_norm=by_norm)
            for gram, share, tokens in zip(self.grams, shares, self.tokens, strict=True)
        ]

    def shrinkage(self, alphas: Sequence[float], solve: SolveRows) -> float:
        """The factor of what the candidates' own features add; 1 where it is not shrunk."""
        if not self.folds:
            return 1.0
        total = FoldSums.of_inputs(self.grams[0].num_inputs, self.grams[0].halves_II.device)
        for folds, alpha in zip(self.folds, alphas, strict=True):
            total.add_candidate_of(folds, alpha)
        (factor,) = total.factors(solve).values()
        return factor

    def total(self, alphas: Sequence[float], off_diagonal_scale: float, add_previous: Callable[[Gram], None]) -> Gram:
        """Adds up G̃_i of all candidates, and earlier sums; raises `FloatingPointError` if one is not finite."""
        total = Gram(self.grams[0].num_inputs, self.grams[0].halves_II.device)
        add_previous(total)
        for gram, alpha in zip(self.grams, alphas, strict=True):
            if not torch.isfinite(gram.candidate_diagonal()).all():
                raise FloatingPointError("activations are not finite")
            total.add_candidate_of(gram, alpha, off_diagonal_scale)
        return total


@dataclass
class HeadSolver:
    """Collects for the head and solves it, in panels of rows; attributes as in `Engine`."""

    plan: HeadPlan
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

    @property
    def _heads(self) -> Heads | None:
        return self.weights.inputs.heads

    @property
    def _method(self) -> RegressionMethod:
        return self.settings.method

    def solve_tied(self, blocks: Sequence[BlockPlan], load: Load) -> JsonObject:
        """Collective: solves the head that is tied to the embedding, from the candidates' own final features.

        Args:
            blocks: All blocks, in the order in which they run.
            load: Begins to read a candidate's block.

        Returns:
            The report of the head; on other ranks than rank 0 it is empty.
        """
        group = self.plan.tied
        assert group is not None
        sums = self._empty(group, compares=False)
        own = [index for index in range(len(self.names)) if self._has_samples(index)]
        items = [
            ReadItem(block.name, -1, index, tuple(plan.name for plan in block.tensors), replayed=True)
            for index in own
            for block in blocks
        ]
        with prefetched(load, items, ahead=self.settings.prefetch) as loaded:
            for index in own:
                with self.clock.stage("candidate_forward"):
                    self._run_candidate(blocks, index, (next(loaded)() for _ in blocks))
                    collect_own(self.plan, group, self.samples, self._heads, index, partial(sums.add, index))
                self.samples.hidden_states.forget("candidate", index)
        self._read_grams(group, sums)
        return self._solve(group, sums)

    def _has_samples(self, index: int) -> bool:
        """Whether this rank runs some samples of a candidate."""
        return self.rank_exchange.has_data(index) and not self.grams.has(index)

    def _read_grams(self, group: LinearGroup, sums: HeadSums) -> None:
        """Reads the Gram matrices that stand for candidates' data."""
        with self.clock.stage("wait_for_read"):
            for index in range(len(self.names)):
                if self.grams.has(index) and self.rank_exchange.has_data(index):
                    self.grams.read(index, HEAD, group, sums.grams[index])
                    sums.tokens[index] = self.grams.tokens(index, HEAD, group)

    def _run_candidate(self, blocks: Sequence[BlockPlan], index: int, tensors: Iterator[Tensors]) -> None:
        """Runs a candidate's own blocks on its own data."""
        for block, own in zip(blocks, tensors, strict=True):
            for _ in self.samples.run(block, index, own, "candidate", advance=True):
                self.watcher.step(HEAD, "collect", self.names[index])

    def solve_untied(self) -> JsonObject:
        """Collective: solves all other linears after the blocks, one group after the other.

        Returns:
            The report of the head; on other ranks than rank 0 it is empty.
        """
        reports: JsonObject = {}
        for group in self.plan.groups:
            sums = self._empty(group, compares=self._method.compares)
            runner, unread = self.samples.runner, _unread(self.plan, group, self._heads)
            merged = runner.end_non_block(MERGED, unread) if self._method.forwards_merged else None
            with self.clock.stage("candidate_forward"):
                for index, name in enumerate(self.names):
                    if not self._has_samples(index):
                        continue
                    both = merged is None or self._method.compares
                    own = runner.end_non_block(index, unread) if both else None
                    for number in range(len(self.samples.samples.calibration[index].batches)):
                        rows: dict[str, list[torch.Tensor]] = {"candidate": [], "merged": []}
                        for stream, non_block in (("candidate", own), ("merged", merged)):
                            if non_block is not None:
                                _run_end(self.samples, stream, index, number, non_block, group, rows[stream].append)
                        x_NI, *more = [torch.cat(rows[s]) for s in ("merged", "candidate") if rows[s]]
                        sums.add(index, x_NI, more[0] if more else None, *self._folds(group, index, number, len(x_NI)))
                        self.watcher.step(HEAD, "collect", name)
            self._read_grams(group, sums)
            reports |= self._solve(group, sums)
        return reports

    def _folds(self, group: LinearGroup, index: int, number: int, count: int) -> tuple[Parts, float]:
        """Folds of the rows of a batch, and what part of the data one of them is."""
        samples, stack = self.samples.samples, group.token_stack
        folds = samples.folds[index][number][-1 if stack is None else stack]
        total = samples.num_samples[index] if stack is None else self.samples.num_rows(index, stack)
        return parts_in_folds(folds, count), self.settings.shares[index] / total

    def _empty(self, group: LinearGroup, *, compares: bool) -> HeadSums:
        device = self.samples.runner.device
        shrinks = self._method.shrinks
        return HeadSums.empty(
            group.num_inputs, len(self.names), device, self._scratch, compares=compares, shrinks=shrinks
        )

    def _solve(self, group: LinearGroup, sums: HeadSums) -> JsonObject:
        """Collective: adds up the sums of all ranks, and solves and writes the group's linears on rank 0."""
        ranks, collectives = self.rank_exchange.ranks, self.rank_exchange.collectives
        with self.clock.stage("communicate"):
            if collectives is not None:
                collectives.wait(collectives.reduce(sums.views(), 0))
            of_ranks = ranks.gather(sums.tokens)
        sums.tokens = [sum(counts) for counts in zip(*of_ranks, strict=True)]
        sums.tokens[0] += self.sequence.tokens(HEAD, group.leader)

        def solve_and_write() -> JsonObject:
            if not ranks.is_first:
                return {}
            with self.clock.stage("solve"):
                solved = {linear.name: self._solve_linear(group, linear, sums) for linear in group.linears}
                if self.sequence.keeps:
                    self.sequence.keep(HEAD, group.leader, self._total(group, sums)[0])
                return solved

        report = ranks.agree(solve_and_write)
        self.watcher.step(HEAD, "solve")
        return report

    def _solve_linear(self, group: LinearGroup, linear: LinearPlan, sums: HeadSums) -> JsonObject:
        """Solves and writes one linear, panel by panel; returns its report."""
        method = self._method
        rows = rows_of_models(linear.name, linear.dtype, self.weights, with_base=method.anchor != "average")
        distances = _Distances(self.names)
        solution: Solution | None = None
        try:
            gram, alphas = self._total(group, sums)
            ridge = relative_ridge(gram, method.ridge, self.settings.num_merged, by_norm=method.by_norm)
            shrinkage = sums.shrinkage(alphas, partial(self._solve_alone, gram, ridge, sum(sums.tokens)))
            rows_at_once = panel_bytes(group.num_inputs) // (GRAM_DTYPE.itemsize * group.num_inputs)
            for panel in rows.panels(rows_at_once):
                tensors = [tensor.to(self.samples.runner.device, GRAM_DTYPE) for tensor in rows.read(panel)]
                solved_OI, mean_OI, solution = self._solve_panel(gram, sums, tensors, alphas, ridge, shrinkage)
                rows.write(solved_OI.to(linear.dtype), panel)
                distances.add(solved_OI, mean_OI, tensors)
        except (FloatingPointError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise MergeError(f"{linear.name}: cannot be solved: {error}{self._whose(sums, error)}") from None
        assert solution is not None
        return {
            "shape": [rows.num_rows, group.num_inputs],
            "shares_gram_with": group.leader,
            "tokens": dict(zip(self.names, sums.tokens, strict=True)),
            **solution.to_json(),
            **({"shrinkage": shrinkage} if sums.folds else {}),
            **distances.report(),
        }

    def _total(self, group: LinearGroup, sums: HeadSums) -> tuple[Gram, list[float]]:
        """Σ G̃_i of all candidates, with what was merged before, and their α_i."""
        alphas = sums.alphas(self.settings.shares, by_norm=self._method.by_norm)
        add_previous = partial(self.sequence.add_previous, HEAD, group.leader)
        return sums.total(alphas, self._method.off_diagonal_scale, add_previous), alphas

    def _whose(self, sums: HeadSums, error: Exception) -> str:
        """Says on whose data sums are not finite, and who holds NaN, as far as that can be found out."""
        finite = [bool(torch.isfinite(gram.candidate_diagonal()).all()) for gram in sums.grams]
        beyond = [name for name, is_finite in zip(self.names, finite, strict=True) if not is_finite]
        skeleton = self.samples.runner.skeleton
        names = [*skeleton.non_block_tensors(), *(name for name, _ in skeleton.model.named_parameters())]
        not_finite = isinstance(error, FloatingPointError)
        culprit = self.weights.why_not_finite(dict.fromkeys(names)) if not_finite else None
        return (f" on the data of {', '.join(beyond)}" if beyond else "") + (f": {culprit}" if culprit else "")

    def _solve_alone(self, gram: Gram, ridge: float, tokens: int, rows_OI: torch.Tensor) -> torch.Tensor:
        """Solves for rows that have no anchor."""
        solve_rows(gram, rows_OI, torch.zeros_like(rows_OI), ridge, self._method.off_diagonal_scale, tokens)
        return rows_OI

    def _solve_panel(
        self,
        gram: Gram,
        sums: HeadSums,
        tensors: Sequence[torch.Tensor],
        alphas: Sequence[float],
        ridge: float,
        shrinkage: float,
    ) -> tuple[torch.Tensor, torch.Tensor, Solution]:
        """Solves for some rows of a weight; `tensors` are those rows of all candidates, and of the base if it is read.

        Returns:
            The merged rows, the weighted average, both `[O, I]` in float32, and how they were found.
        """
        method, shares = self._method, self.settings.shares
        anchor_OI = tensors[0]
        rhs_OI, mean_OI = torch.zeros_like(anchor_OI), torch.zeros_like(anchor_OI)
        for index, (share, alpha) in enumerate(zip(shares, alphas, strict=True)):
            if index > 0:
                difference_OI = tensors[index] - anchor_OI
                sums.grams[index].add_candidate_product_(rhs_OI, difference_OI, alpha, method.off_diagonal_scale)
                mean_OI.add_(difference_OI, alpha=share)
            if sums.cross_II:
                factor = alpha * method.off_diagonal_scale * method.target * shrinkage
                add_product_(rhs_OI, tensors[index], sums.cross_II[index].T, alpha=factor)
        average_OI = anchor_OI + mean_OI
        if method.anchor != "average":
            scale = method.anchor_step(self.settings.num_merged)
            mean_OI = (tensors[-1] - anchor_OI).mul_(1 - scale).add_(mean_OI, alpha=scale)
        tokens = sum(sums.tokens)
        solution = solve_rows(gram, rhs_OI, mean_OI, ridge, method.off_diagonal_scale, tokens)
        return rhs_OI.add_(anchor_OI), average_OI, solution


def collect_own(
    plan: HeadPlan,
    group: LinearGroup,
    samples: SampleRunner,
    heads: Heads | None,
    index: int,
    add: Callable[[torch.Tensor], None],
) -> None:
    """Shows the inputs of a group after the blocks that a candidate has in its own model, once its blocks have run.

    Args:
        plan: What is solved after the blocks.
        group: One of its groups.
        samples: Runs batches.
        heads: Heads that are not merged.
        index: Number of the candidate.
        add: Called with rows `[N, I]`.
    """
    non_block = samples.runner.end_non_block(index, _unread(plan, group, heads))
    for number in range(len(samples.samples.calibration[index].batches)):
        _run_end(samples, "candidate", index, number, non_block, group, add)


def _run_end(
    samples: SampleRunner,
    stream: str,
    index: int,
    number: int,
    non_block: Any,
    group: LinearGroup,
    add: Callable[[torch.Tensor], None],
) -> None:
    """Runs one batch from the last block's output to the linears of a group."""
    runner, batch = samples.runner, samples.samples.calibration[index].batches[number]
    outputs = samples.hidden_states.get(stream, index, number, runner.device)
    runner.end(batch, outputs, non_block, watch=[group.leader], on_input=lambda _, x_NI: add(x_NI))


def _unread(plan: HeadPlan, group: LinearGroup, heads: Heads | None) -> list[str]:
    """Weights that a run to a group does not reach: its own, later ones', a tied head's, an unmerged head's."""
    later = plan.groups[plan.groups.index(group) :] if group in plan.groups else ()
    tied = () if plan.tied is None else (plan.tied,)
    others = heads.parameters if heads is not None else ()  # which not all models may have
    return [*(linear.name for each in (*later, *tied) for linear in each.linears), *sorted(others)]


@dataclass
class _Distances:
    """Relative distances of a merged weight to the candidates' and to their average, panel by panel."""

    names: Sequence[str]
    _squares: dict[str, float] = field(init=False, default_factory=dict)

    def add(self, merged_OI: torch.Tensor, average_OI: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Adds a panel."""
        found: Mapping[str, torch.Tensor] = {
            "": merged_OI,
            "average": merged_OI - average_OI,
            **{f"of {name}": merged_OI - own_OI for name, own_OI in zip(self.names, tensors, strict=False)},
        }
        for name, tensor in found.items():
            self._squares[name] = self._squares.get(name, 0.0) + tensor.square().sum().item()

    def report(self) -> JsonObject:
        """The distances, as a linear's report has them."""
        norm = math.sqrt(self._squares[""]) or 1.0
        return {
            "relative_distance_to_average": math.sqrt(self._squares["average"]) / norm,
            "relative_distance_to_candidates": {
                name: math.sqrt(self._squares[f"of {name}"]) / norm for name in self.names
            },
        }
