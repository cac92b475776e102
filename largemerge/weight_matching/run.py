"""Matching models block by block: the weights of one block of two models at a time.

    block ──► tensors of the reference and of the model ──► a match of every family ──► journal ──► axes of the reader

What is found goes to the journal of the merge, so that a resumed one goes on with it. Ranks share the blocks.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from largemerge.checkpoint.lora import open_reader
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.writer import why_unmergeable
from largemerge.distributed.ranks import Ranks
from largemerge.errors import CheckpointError
from largemerge.log import stage
from largemerge.output import OutputFolder, PartKind
from largemerge.weight_matching.matching import GAIN, MAX_ROUNDS, Vectors, match_family, value_of
from largemerge.weight_matching.permuted import Axes
from largemerge.weight_matching.plan import AlignPlan, BlockPlan, ModelPlan
from largemerge.weight_matching.units import Choice, Family, Slot, identity_of

_PART = "alignment"


@dataclass(frozen=True)
class Matched:
    """What was found for all models.

    Attributes:
        axes: Model → what of it is permuted, by names on disk.
        report: Model → block → what was found there, as plain JSON values.
    """

    axes: Mapping[str, Axes]
    report: Mapping[str, Mapping[str, Any]]

    def to_json(self, plan: AlignPlan) -> dict[str, Any]:
        """What the report of a merge says of it."""
        return {"reference": plan.reference, "models": {name: dict(blocks) for name, blocks in self.report.items()}}


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


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def part_names(plan: AlignPlan) -> list[str]:
    """Lists what the journal calls the blocks of all models."""
    return [f"{_PART}: {name}: {block.name}" for name, model in plan.models.items() for block in model.blocks]


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
    every = [(name, block) for name, model in plan.models.items() for block in model.blocks]
    names = part_names(plan)
    missing = [number for number, part in enumerate(names) if part not in folder.entries]
    with ExitStack() as stack, ranks.busy():
        readers: dict[str, tuple[TensorReader, TensorReader]] = {}

        def match(number: int) -> dict[str, Any]:
            name, block = every[number]
            if ranks.is_first and not quiet:
                stage(f"aligning {block.name}")
            if name not in readers:
                model = plan.models[name]
                ours, theirs = model.adapters
                readers[name] = (
                    stack.enter_context(open_reader(model.model.checkpoint, ours)),
                    stack.enter_context(open_reader(model.reference.checkpoint, theirs)),
                )
            return match_block(plan.models[name], block, *readers[name])

        for start in range(0, len(missing), ranks.size):
            at_once = missing[start : start + ranks.size]
            own = at_once[ranks.rank] if ranks.rank < len(at_once) else None
            gathered = ranks.gather(match(own) if own is not None else {})
            for number, entry in zip(at_once, gathered, strict=False):
                if ranks.is_first:
                    folder.record(names[number], entry)
                folder.entries[names[number]] = entry
    axes: dict[str, dict[str, Mapping[int, torch.Tensor]]] = {name: {} for name in plan.models}
    report: dict[str, dict[str, Any]] = {name: {} for name in plan.models}
    for (name, block), part in zip(every, names, strict=True):
        entry = folder.entries[part]
        mapping = plan.models[name].model.mapping
        changed = block.axes(_choices(block, entry))
        axes[name] |= {mapping.renamed[parameter]: of for parameter, of in changed.items()}
        report[name][block.name] = entry
    return Matched(axes, report)


def match_block(plan: ModelPlan, block: BlockPlan, ours: TensorReader, theirs: TensorReader) -> dict[str, Any]:
    """Matches one block, family by family; those that share a matrix in turn, until nothing improves.

    Args:
        plan: What is permuted in the model.
        block: The block.
        ours: Reader of the model.
        theirs: Reader of the reference.

    Returns:
        What the journal and the report have of it.
    """
    work = _BlockMatch(plan, block, ours, theirs)
    rounds = work.run()
    families = {
        family.name: {
            "size": family.size,
            "moved": choice.num_moved,
            "rounds": max(rounds, inside),
            "members": _encoded(choice.members),
            "inner": {each.name: _encoded(own) for each, own in zip(family.inner, choice.inner, strict=True)},
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


def _encoded(numbers: torch.Tensor) -> str:
    """Writes whole numbers as base64 of little-endian 32-bit numbers; nothing for those that are in order."""
    if torch.equal(numbers, torch.arange(numbers.shape[-1]).expand_as(numbers)):
        return ""
    return base64.b64encode(numbers.numpy().astype("<i4").tobytes()).decode()


def _decoded(text: str, *shape: int) -> torch.Tensor:
    """Reads what `_encoded` wrote."""
    if not text:
        return torch.arange(shape[-1]).expand(shape).clone()
    numbers = np.frombuffer(base64.b64decode(text), dtype="<i4").astype(np.int64)
    return torch.from_numpy(numbers.reshape(shape))


def _choices(block: BlockPlan, entry: Mapping[str, Any]) -> list[Choice]:
    """Reads the choices of a block from its entry in the journal."""
    choices = []
    for family in block.units.families:
        own = entry["families"][family.name]
        inner = tuple(_decoded(own["inner"][each.name], family.size, each.size) for each in family.inner)
        choices.append(Choice(_decoded(own["members"], family.size), inner))
    return choices
