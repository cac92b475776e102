"""Places of neurons and heads: held against all permutations, one after the other, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from largemerge.weight_matching.between import Between
from largemerge.weight_matching.finding import find_units
from largemerge.weight_matching.matching import Vectors, match_family
from largemerge.weight_matching.units import BlockUnits, Choice, Family, Inner, Slot, identity_of

Q, K, V, OUT = (Slot(name, side) for name, side in zip("qkvo", ["outputs"] * 3 + ["inputs"], strict=True))


def heads(num_heads: int, width: int, *, free: bool = True) -> Family:
    """Heads whose values, and whose queries and keys, may be permuted inside."""
    places = {slot: torch.arange(num_heads * width).view(num_heads, width) for slot in (Q, K, V, OUT)}
    each = torch.arange(width)[:, None]
    inner = (Inner("values", {V: each, OUT: each}), Inner("queries and keys", {Q: each, K: each}))
    return Family("heads", places, free, inner)


def groups(num_groups: int, per_group: int, width: int) -> Family:
    """Groups of query heads with common keys and values."""
    queries = torch.arange(num_groups * per_group * width).view(num_groups, -1)
    shared = torch.arange(num_groups * width).view(num_groups, width)
    by_value = torch.arange(per_group * width).view(per_group, width)
    inner = (
        Inner("values", {V: torch.arange(width)[:, None], OUT: by_value.T}),
        Inner("query heads", {Q: by_value, OUT: by_value}),
    )
    return Family("groups", {Q: queries, K: shared, V: shared, OUT: queries}, True, inner)


def vectors(family: Family, seed: int) -> dict[Slot, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {slot: torch.randn(places.numel(), 5, generator=generator) for slot, places in family.places.items()}


def sizes(family: Family) -> dict[Slot, int]:
    return {slot: places.numel() for slot, places in family.places.items()}


def value(family: Family, choice: Choice, reference: Vectors, model: Vectors) -> float:
    """Σ ⟨a, b⟩ once the model is permuted, float64."""
    indices = BlockUnits((family,), sizes(family)).indices([choice])
    total = 0.0
    for slot, own in model.items():
        total += float((reference[slot].double() * own.double()[indices.get(slot, slice(None))]).sum())
    return total


def every_choice(family: Family) -> Iterator[Choice]:
    members = itertools.permutations(range(family.size)) if family.is_free else [tuple(range(family.size))]
    own = [list(itertools.permutations(range(each.size))) for each in family.inner]
    inside = [list(itertools.product(each, repeat=family.size)) for each in own]
    for order in members:
        for parts in itertools.product(*inside):
            yield Choice(torch.tensor(order), tuple(torch.tensor(each) for each in parts))


@pytest.mark.parametrize("free", [True, False])
def test_heads_come_to_the_best_of_all_places(free: bool) -> None:
    family = heads(2, 3 if free else 2, free=free)
    ours, theirs = vectors(family, 0), vectors(family, 100)
    found = match_family(family, ours, theirs)
    best = max(value(family, choice, ours, theirs) for choice in every_choice(family))
    assert found.after == pytest.approx(best, rel=1e-5)
    assert value(family, found.choice, ours, theirs) == pytest.approx(best, rel=1e-5)
    assert found.before == pytest.approx(value(family, identity_of(family), ours, theirs), rel=1e-5)


def test_neurons_come_to_the_best_of_all_places() -> None:
    places = {Slot("up", "outputs"): torch.arange(5)[:, None], Slot("down", "inputs"): torch.arange(5)[:, None]}
    family = Family("neurons", places | {Slot("gate_up", "outputs"): torch.arange(10).view(2, 5).T})
    for seed in range(5):
        ours, theirs = vectors(family, seed), vectors(family, 100 + seed)
        best = max(value(family, choice, ours, theirs) for choice in every_choice(family))
        assert match_family(family, ours, theirs).after == pytest.approx(best, rel=1e-5)
        same = match_family(family, ours, ours)
        assert same.choice.is_identity and same.before == same.after


def test_what_is_permuted_is_found_where_parts_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(3)
    family = groups(3, 4, 6)
    for seed in range(3):
        ours = vectors(family, seed)
        members = torch.randperm(3, generator=generator)
        drawn = [[torch.randperm(each.size, generator=generator) for _ in range(3)] for each in family.inner]
        parts = [torch.stack(each) for each in drawn]
        indices = BlockUnits((family,), sizes(family)).indices([Choice(members, tuple(parts))])
        found = match_family(family, {slot: own[indices[slot]] for slot, own in ours.items()}, ours)
        assert torch.equal(found.choice.members, members)
        for expected, own in zip(parts, found.choice.inner, strict=True):
            assert torch.equal(expected, own)
    noisy = {slot: own + 3 * torch.randn(own.shape, generator=generator) for slot, own in ours.items()}
    found = match_family(family, ours, noisy)
    assert (
        found.after == pytest.approx(value(family, found.choice, ours, noisy), rel=1e-5) and found.after >= found.before
    )


class Scaled(nn.Module):
    """An MLP with a scale for each neuron, one for groups of neurons, and a mixture that leaves the last four alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale, self.shared = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.up(x)) * self.scale
        return x + self.down(torch.cat([y[..., :8], y[..., 8:].cumsum(-1)], -1)) * self.shared


def test_vectors_move_with_their_neurons_and_what_is_told_apart_stays() -> None:
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    block = Scaled().double()
    units = find_units(Between(block, ((x,), {}), ((x.expand(8, 4, 6),), {}), 8))
    (family,) = units.families
    assert family.size == 8 and not family.inner
    assert set(family.places) == {Slot("up", "outputs"), Slot("down", "inputs"), Slot("scale", "elements")}
    assert all(np.array_equal(places[:, 0], np.arange(8)) for places in family.places.values())
    plain = block(x)
    order = torch.randperm(8)
    for slot, index in units.indices([Choice(order, ())]).items():
        parameter = block.get_parameter(slot.path if slot.side == "elements" else f"{slot.path}.weight")
        parameter.data = parameter.data.index_select(int(slot.side == "inputs"), index)
        if slot.path == "up":
            block.up.bias.data = block.up.bias.data[index]
    assert torch.allclose(block(x), plain, atol=1e-12)
