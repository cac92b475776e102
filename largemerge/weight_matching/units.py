"""Parts of a block that may change places, and choices of which goes where.

Family     neurons, heads, groups of heads: rows and columns of several linears that move together
Inner      parts inside each member of a family: values, queries and keys, query heads
Choice     which member, and which part inside it, comes to each place ──► an order of rows or columns by Slot
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch


class Slot(NamedTuple):
    """One side of a linear, or a vector of a block.

    Attributes:
        path: Path in the block: of a linear, or of a parameter.
        side: `outputs` or `inputs` of a linear; `elements` of a vector.
    """

    path: str
    side: str


class Tensor(NamedTuple):
    """A parameter, and a dimension of it that is permuted.

    Attributes:
        name: Its name in the class.
        axis: The dimension.
    """

    name: str
    axis: int


@dataclass(frozen=True)
class Inner:
    """Parts inside each member of a family, which may change places with each other.

    Attributes:
        name: What they are.
        places: Slot → positions in the member's own rows or columns, `[parts, per part]`.
    """

    name: str
    places: Mapping[Slot, torch.Tensor]

    @property
    def size(self) -> int:
        """Number of parts."""
        return len(next(iter(self.places.values())))


@dataclass(frozen=True)
class Family:
    """Parts of a block that are alike: neurons, heads, groups of heads.

    Attributes:
        name: What they are: `24 neurons`.
        places: Slot → rows, columns or elements of each member, `[members, per member]`.
        is_free: Whether members may change places with each other.
        inner: Parts inside each member that may.
    """

    name: str
    places: Mapping[Slot, torch.Tensor]
    is_free: bool = True
    inner: tuple[Inner, ...] = ()

    @property
    def size(self) -> int:
        """Number of members."""
        return len(next(iter(self.places.values())))


@dataclass(frozen=True)
class Choice:
    """Which member of a family goes where.

    Attributes:
        members: Member that comes to each place, `[N]`.
        inner: For each `Inner` of the family, part of that member that comes to each of its places, `[N, parts]`.
    """

    members: torch.Tensor
    inner: tuple[torch.Tensor, ...]

    @property
    def num_moved(self) -> int:
        """Number of members that change their place."""
        return int((self.members != torch.arange(len(self.members))).sum())

    @property
    def is_identity(self) -> bool:
        """Whether everything stays where it is."""
        same = [torch.equal(each, torch.arange(each.shape[1]).expand_as(each)) for each in self.inner]
        return self.num_moved == 0 and all(same)


@dataclass(frozen=True)
class BlockUnits:
    """All that may change places in a block.

    Attributes:
        families: The families of parts.
        sizes: Number of rows, columns or elements of every slot of theirs.
        held: What was found and must stay, and why.
        untouched: Linears that belong to no family on either side, or were not looked at.
    """

    families: tuple[Family, ...]
    sizes: Mapping[Slot, int]
    held: tuple[str, ...] = field(default=())
    untouched: tuple[str, ...] = field(default=())

    def identity(self) -> tuple[Choice, ...]:
        """The choice that leaves everything where it is."""
        return tuple(identity_of(family) for family in self.families)

    def indices(self, choices: Sequence[Choice]) -> dict[Slot, torch.Tensor]:
        """Returns, for every slot that changes, which row, column or element comes to each place."""
        found: dict[Slot, torch.Tensor] = {}
        for family, choice in zip(self.families, choices, strict=True):
            if not choice.is_identity:
                _fill(found, self.sizes, family, choice)
        return found


def indices_of(family: Family, choice: Choice, sizes: Mapping[Slot, int]) -> dict[Slot, torch.Tensor]:
    """Returns, for every slot of a family, which row, column or element comes to each place."""
    found: dict[Slot, torch.Tensor] = {}
    _fill(found, sizes, family, choice)
    return found


def identity_of(family: Family) -> Choice:
    """Makes the choice that leaves a family as it is."""
    inner = tuple(torch.arange(each.size).repeat(family.size, 1) for each in family.inner)
    return Choice(torch.arange(family.size), inner)


def _fill(found: dict[Slot, torch.Tensor], sizes: Mapping[Slot, int], family: Family, choice: Choice) -> None:
    """Writes a family's choice into the indices of its slots."""
    for slot, places_NR in family.places.items():
        inside_NR = torch.arange(places_NR.shape[1]).repeat(family.size, 1)
        for inner, parts_NP in zip(family.inner, choice.inner, strict=True):
            if slot not in inner.places:
                continue
            local_PQ = inner.places[slot]
            step_NR = torch.arange(places_NR.shape[1]).repeat(family.size, 1)
            step_NR[:, local_PQ.flatten()] = local_PQ[parts_NP].flatten(1)
            inside_NR = inside_NR.gather(1, step_NR)
        index = found.setdefault(slot, torch.arange(sizes[slot]))
        index[places_NR.flatten()] = places_NR[choice.members].gather(1, inside_NR).flatten()


def trial_choices(family: Family, generator: torch.Generator) -> tuple[Choice, ...]:
    """Makes choices that tell whether a family may be permuted, however few members or parts it has.

    Of two heads a random permutation is the identity every other time, and of parts inside them the same one in both.
    """
    stay, size = identity_of(family), family.size
    members = _cycle(size, generator) if family.is_free else stay.members
    everywhere = tuple(torch.stack([_cycle(each.size, generator) for _ in range(size)]) for each in family.inner)
    alternate = (torch.arange(size) % 2 == 0)[:, None]
    some = tuple(torch.where(alternate, own, same) for own, same in zip(everywhere, stay.inner, strict=True))
    return Choice(members, everywhere), Choice(members, some), random_choice(family, generator)


def _cycle(size: int, generator: torch.Generator) -> torch.Tensor:
    """Draws a permutation that leaves nothing where it is."""
    order, found = torch.randperm(size, generator=generator), torch.empty(size, dtype=torch.int64)
    found[order] = order.roll(1)
    return found


def random_choice(family: Family, generator: torch.Generator) -> Choice:
    """Draws a choice, different in each member."""
    members = torch.randperm(family.size, generator=generator) if family.is_free else torch.arange(family.size)
    inner = tuple(
        torch.stack([torch.randperm(each.size, generator=generator) for _ in range(family.size)])
        for each in family.inner
    )
    return Choice(members, inner)


def encoded(numbers: torch.Tensor) -> str:
    """Writes whole numbers as base64 of little-endian 32-bit numbers; nothing for those that are in order."""
    if torch.equal(numbers, torch.arange(numbers.shape[-1]).expand_as(numbers)):
        return ""
    return base64.b64encode(numbers.numpy().astype("<i4").tobytes()).decode()


def decoded(text: str, *shape: int) -> torch.Tensor:
    """Reads what `encoded` wrote."""
    if not text:
        return torch.arange(shape[-1]).expand(shape).clone()
    numbers = np.frombuffer(base64.b64decode(text), dtype="<i4").astype(np.int64)
    return torch.from_numpy(numbers.reshape(shape))
