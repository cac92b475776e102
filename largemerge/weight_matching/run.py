"""Matching models block by block: the weights of one block of two models at a time.

    block ──► tensors of the reference and of the model ──► a match of every family ──► journal ──► axes of the reader

What is found goes to the journal of the merge, so that a resumed one goes on with it. Ranks share the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from largemerge.checkpoint.lora import open_reader
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.writer import why_unmergeable
from largemerge.distributed.ranks import Ranks
from largemerge.errors import CheckpointError
from largemerge.output import OutputFolder, PartKind
from largemerge.units import counted
from largemerge.weight_matching.descent import Descended, axes_of, descend, inside_axes, joined_axes, round_parts
from largemerge.weight_matching.matching import GAIN, MAX_ROUNDS, Vectors, match_family, value_of
from largemerge.weight_matching.parts import Parts
from largemerge.weight_matching.permuted import Axes, PermutedReader
from largemerge.weight_matching.plan import AlignPlan, BlockPlan, ModelPlan
from largemerge.weight_matching.units import Family, Slot, encoded, identity_of

_PART = "alignment"

Readers = Callable[[str], tuple[TensorReader, TensorReader]]
"""Opens readers of a model and of its reference."""


@dataclass(frozen=True)
class Matched:
    """What was found for all models.

    Attributes:
        axes: Model → what of it is permuted, by names on disk.
        report: Model → block → what was found there, as plain JSON values.
        streams: Model → residual stream → what was found there; of models whose streams are permuted.
    """

    axes: Mapping[str, Axes]
    report: Mapping[str, Mapping[str, Any]]
    streams: Mapping[str, Mapping[str, Any]]

    def to_json(self, plan: AlignPlan) -> dict[str, Any]:
        """What the report of a merge says of it."""
        models = {name: dict(blocks) for name, blocks in self.report.items()}
        streams = {"residual_streams": {name: dict(of) for name, of in self.streams.items()}} if self.streams else {}
        return {"reference": plan.reference, "models": models, **streams}


def rows_of(aligned: Mapping[str, Any], short: Callable[[str], str] = str) -> Iterator[tuple[str, str]]:
    """Yields lines for the closing table, from the report: how alike the models were, and are."""
    for name, blocks in aligned.get("models", {}).items():
        before, after = (_mean([block[key] for block in blocks.values()]) for key in ("before", "after"))
        families = [family for block in blocks.values() for family in block["families"].values()]
        moved, total = (sum(family[key] for family in families) for key in ("moved", "size"))
        yield (
            f"aligned {short(name)}",
            f"to {short(aligned['reference'])}: {moved} of {total} neurons and heads change places; cosine of the "
            f"weights {before:.4f} before, {after:.4f} after",
        )
        for stream, found in aligned.get("residual_streams", {}).get(name, {}).items():
            yield (
                f"residual stream of {short(name)}",
                f"{stream}: {found['moved']} of {found['size']} features change places; cosine of its weights "
                f"{found['before']:.4f} before, {found['after']:.4f} after, {counted(found['rounds'], 'round')}",
            )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def part_names(plan: AlignPlan) -> list[str]:
    """Lists what the journal may call what is found for all models."""
    names: list[str] = []
    for name, model in plan.models.items():
        blocks = [block.name for block in model.blocks]
        prefix = f"{_PART}: {name}"
        names += round_parts(prefix, blocks) if model.streams else [f"{prefix}: {block}" for block in blocks]
    return names


def journal_kind(plan: AlignPlan, working: Path) -> PartKind:
    """The kind of these parts, which have no tensors in any file."""
    return PartKind(part_names(plan), working, (), {})


def match_models(plan: AlignPlan, folder: OutputFolder, ranks: Ranks, *, quiet: bool) -> Matched:
    """Matches all blocks of all models that the journal does not have yet. Collective.

    Args:
        plan: What is permuted.
        folder: The output folder, whose journal keeps what was found.
        ranks: The ranks that share the blocks.
        quiet: Do not say which block is being matched.

    Raises:
        CheckpointError: If a tensor holds NaN or infinity.
    """
    parts = Parts(folder, ranks, quiet)
    with ExitStack() as stack, ranks.busy():
        opened: dict[str, tuple[TensorReader, TensorReader]] = {}

        def readers(name: str) -> tuple[TensorReader, TensorReader]:
            if name not in opened:
                model = plan.models[name]
                ours, theirs = model.adapters
                opened[name] = (
                    stack.enter_context(open_reader(model.model.checkpoint, ours)),
                    stack.enter_context(open_reader(model.reference.checkpoint, theirs)),
                )
            return opened[name]

        found = _match_blocks(plan, parts, readers)
        for name, model in plan.models.items():
            if model.streams:
                found[name] = _descend(name, model, parts, partial(readers, name))
    axes = {
        name: joined_axes(inside_axes(model, found[name].blocks), axes_of(model, found[name].orders))
        for name, model in plan.models.items()
    }
    report = {name: dict(found[name].blocks) for name in plan.models}
    streams = {name: dict(found[name].streams) for name, model in plan.models.items() if model.streams}
    return Matched(axes, report, streams)


def _match_blocks(plan: AlignPlan, parts: Parts, readers: Readers) -> dict[str, Descended]:
    """Matches the blocks of all models whose streams stay, which the ranks share."""
    every = [(name, block) for name, model in plan.models.items() if not model.streams for block in model.blocks]

    def match(number: int) -> dict[str, Any]:
        name, block = every[number]
        parts.tell(f"aligning {block.name}")
        return match_block(plan.models[name], block, *readers(name))

    entries = parts.share([f"{_PART}: {name}: {block.name}" for name, block in every], match)
    found = {name: Descended({}, {}, {}) for name in plan.models}
    for (name, block), entry in zip(every, entries, strict=True):
        blocks = {**found[name].blocks, block.name: entry}
        found[name] = replace(found[name], blocks=blocks)
    return found


def _descend(
    name: str, model: ModelPlan, parts: Parts, readers: Callable[[], tuple[TensorReader, TensorReader]]
) -> Descended:
    """Matches the streams and the blocks of one model in turn, whose blocks the ranks share in each round."""

    def match_blocks(part: str, told: str, fixed: Axes) -> dict[str, Any]:
        def match(number: int) -> dict[str, Any]:
            block = model.blocks[number]
            parts.tell(f"aligning {block.name}{told}")
            return match_block(model, block, *readers(), fixed)

        entries = parts.share([f"{part}: {block.name}" for block in model.blocks], match)
        return {block.name: entry for block, entry in zip(model.blocks, entries, strict=True)}

    return descend(f"{_PART}: {name}", model, parts, readers, match_blocks)


def match_block(
    plan: ModelPlan, block: BlockPlan, ours: TensorReader, theirs: TensorReader, fixed: Axes = MappingProxyType({})
) -> dict[str, Any]:
    """Matches one block, family by family; those that share a matrix in turn, until nothing improves.

    Args:
        plan: What is permuted in the model.
        block: The block.
        ours: Reader of the model.
        theirs: Reader of the reference.
        fixed: What of the model is permuted as well: its residual streams.

    Returns:
        What the journal and the report have of it.
    """
    work = _BlockMatch(plan, block, PermutedReader(ours, fixed) if fixed else ours, theirs)
    rounds = work.run()
    families = {
        family.name: {
            "size": family.size,
            "moved": choice.num_moved,
            "rounds": max(rounds, inside),
            "members": encoded(choice.members),
            "inner": {each.name: encoded(own) for each, own in zip(family.inner, choice.inner, strict=True)},
        }
        for family, choice, inside in zip(block.units.families, work.choices, work.rounds, strict=True)
    }
    norm = math.sqrt(sum(work.ours_squares) * sum(work.theirs_squares)) or 1.0
    return {"before": sum(work.before) / norm, "after": sum(work.after) / norm, "families": families}


class _BlockMatch:
    """Coordinate descent over the families of a block.

    A matrix may belong to two families: its rows to one, its columns to another. What is found for one then depends on
    the other, and they are matched in turn. The first time, when the other is not known, the numbers of every row of
    such a matrix are sorted: so they are the same in whatever order its columns are.

    Attributes:
        choices: What is found for every family.
        before: Σ ⟨a, b⟩ of every family as the models are.
        after: The same once all are permuted.
        rounds: The most rounds that parts inside a member took.
        ours_squares: Σ b² of every family.
        theirs_squares: Σ a² of every family.
    """

    def __init__(self, plan: ModelPlan, block: BlockPlan, ours: TensorReader, theirs: TensorReader) -> None:
        self._plan, self._block, self._ours, self._theirs = plan, block, ours, theirs
        count = len(block.units.families)
        self.choices = list(block.units.identity())
        self.rounds = [1] * count
        self.before, self.after, self.ours_squares, self.theirs_squares = ([0.0] * count for _ in range(4))
        touched = [
            {(each.name, each.axis) for slot in family.places for each in block.tensors[slot]}
            for family in block.units.families
        ]
        self._joined = list[frozenset[str]]()
        for number, own in enumerate(touched):
            others = {each for k, of in enumerate(touched) if k != number for each in of}
            self._joined.append(frozenset(name for name, axis in own if (name, 1 - axis) in others))

    def run(self) -> int:
        """Matches all families; returns the number of rounds over them."""
        numbers = range(len(self.choices))
        for number in numbers:
            self._match(number, first=True)
        joined = [number for number in numbers if self._joined[number]]
        rounds = 1
        while joined and rounds < MAX_ROUNDS:
            rounds += 1
            if not any([self._match(number) for number in joined]):
                break
        if joined and not sum(self.after) > sum(self.before) + GAIN * abs(sum(self.before)):
            for number in joined:
                self.choices[number], self.after[number] = identity_of(self._family(number)), self.before[number]
        return rounds

    def _family(self, number: int) -> Family:
        return self._block.units.families[number]

    def _match(self, number: int, *, first: bool = False) -> bool:
        """Matches one family, given all others; returns whether that has improved it."""
        family, joined = self._family(number), self._joined[number]
        if first:
            mine, other = self._vectors(family, self._ours, {}), self._vectors(family, self._theirs, {})
            self.ours_squares[number], self.theirs_squares[number] = _square(family, mine), _square(family, other)
            if joined:
                self.before[number] = value_of(family, identity_of(family), other, mine)
                mine = self._vectors(family, self._ours, {}, joined)
                other = self._vectors(family, self._theirs, {}, joined)
        else:
            others = list(self.choices)
            others[number] = identity_of(family)
            mine = self._vectors(family, self._ours, self._block.axes(others))
            other = self._vectors(family, self._theirs, {})
        found = match_family(family, other, mine)
        self.rounds[number] = max(self.rounds[number], found.rounds)
        if first:
            self.choices[number], self.after[number] = found.choice, found.after  # taken again where it was sorted
            if not joined:
                self.before[number] = found.before
            return True
        self.after[number] = value_of(family, self.choices[number], other, mine)
        if not found.after > self.after[number] + GAIN * abs(self.after[number]):
            return False
        self.choices[number], self.after[number] = found.choice, found.after
        return True

    def _vectors(
        self,
        family: Family,
        reader: TensorReader,
        axes: Mapping[str, Mapping[int, torch.Tensor]],
        in_order: Collection[str] = (),
    ) -> Vectors:
        """Reads what belongs to every slot of a family, a row for each of its places, float32.

        Args:
            family: The family.
            reader: Reader of one of the two models.
            axes: What of the model is in other places.
            in_order: Parameters whose numbers are sorted, for each place.
        """
        tensors: dict[str, torch.Tensor] = {}

        def load(name: str) -> torch.Tensor:
            if name not in tensors:
                own = reader is self._ours
                key = (self._plan.model if own else self._plan.reference).mapping.renamed[
                    name if own else self._plan.names[name]
                ]
                tensor = reader.read(key)
                problem = why_unmergeable(reader.checkpoint.name, key, tensor)
                if problem is not None:
                    raise CheckpointError(problem)
                for axis, index in axes.get(name, {}).items():
                    tensor = tensor.index_select(axis, index)
                tensors[name] = tensor.to(torch.float32)
            return tensors[name]

        found: dict[Slot, torch.Tensor] = {}
        for slot in family.places:
            size = self._block.units.sizes[slot]
            parts = []
            for each in self._block.tensors[slot]:
                part = load(each.name).movedim(each.axis, 0).reshape(size, -1)
                parts.append(part.sort(dim=1).values if each.name in in_order else part)
            found[slot] = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return found


def _square(family: Family, vectors: Vectors) -> float:
    """Computes Σ x² of all that belongs to a family."""
    return math.fsum(
        float(vectors[slot][places_NR.flatten()].square().sum(dtype=torch.float64))
        for slot, places_NR in family.places.items()
    )
