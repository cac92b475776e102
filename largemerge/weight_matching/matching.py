"""The permutations that bring one block's weights closest to another's, by linear assignment.

Of the neurons of an MLP, those of model B come to the places of A where Σ_n ⟨a_n, b_π(n)⟩ is largest (weight matching,
Ainsworth et al. 2023; `weight_matching.py` of the authors' program), with a_n all numbers that belong to neuron n: its
rows with their biases, its columns, its elements of vectors:

    A[n, m] = Σ_slots ⟨a_n, b_m⟩        π = argmax Σ_n A[n, π(n)]        a linear assignment problem

Of heads, A[n, m] is the most that head m can give in the place of head n: the same sum after the best permutations
inside it (values; queries and keys; query heads of a group), each of them a linear assignment given the others, one
after the other until nothing improves, `MAX_ROUNDS` at most. As long as one is not known, the others are found from the
numbers that do not depend on it. Where parts inside depend on no other, that is the best choice of all.

Shapes: N members of a family, R rows (or columns, or elements) of a member in one slot, K numbers of each, P parts
inside a member.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from largemerge.matmul import product
from largemerge.weight_matching.units import Choice, Family, Inner, Slot, identity_of, indices_of

MAX_ROUNDS = 100
"""Rounds over the parts inside a member, at most."""
GAIN = 1e-6
"""The least relative gain for which anything is permuted: below it, differences are those of rounding in float32."""
_MEMBER_BYTES = 256 << 20  # of products of one member with others at once

Vectors = Mapping[Slot, torch.Tensor]
"""Slot → a vector of K numbers for each of its rows, columns or elements, float32."""


@dataclass(frozen=True)
class Match:
    """What was found for one family.

    Attributes:
        choice: Which member goes where.
        before: Σ ⟨a, b⟩ as the models are.
        after: The same once it is permuted.
        rounds: The most rounds that parts inside a member took.
    """

    choice: Choice
    before: float
    after: float
    rounds: int


def match_family(family: Family, reference: Vectors, model: Vectors) -> Match:
    """Finds the choice that brings a family of the model closest to the reference's.

    Args:
        family: The family.
        reference: Vectors of the reference, for each slot of the family.
        model: Vectors of the model.
    """
    same = identity_of(family)
    if not family.inner:
        values_NN = _plain_values(family, reference, model)
        before = float(np.trace(values_NN))
        members = _assign(values_NN)
        after = float(values_NN[np.arange(family.size), members].sum())
        found, rounds = Choice(torch.from_numpy(members), ()), 1
    else:
        found, before, after, rounds = _match_inside(family, reference, model)
    if not after > before + GAIN * abs(before):
        return Match(same, before, before, rounds)
    return Match(found, before, after, rounds)


def value_of(family: Family, choice: Choice, reference: Vectors, model: Vectors) -> float:
    """Computes Σ ⟨a, b⟩ of a family once a choice is made; arguments as for `match_family`."""
    total = 0.0
    indices = indices_of(family, choice, {slot: len(vectors) for slot, vectors in model.items()})
    for slot, places_NR in family.places.items():
        places = places_NR.flatten()
        ours, theirs = reference[slot][places], model[slot][indices[slot][places]]
        total += float((ours * theirs).sum(dtype=torch.float64))
    return total


def _plain_values(family: Family, reference: Vectors, model: Vectors) -> np.ndarray:
    """Computes A `[N, N]` of members that nothing is permuted in, float64."""
    total_NN = torch.zeros(family.size, family.size)
    for slot, places_NR in family.places.items():
        total_NN += product(_members(reference[slot], places_NR), _members(model[slot], places_NR)).cpu()
    return total_NN.to(torch.float64).numpy()


def _members(vectors: torch.Tensor, places_NR: torch.Tensor) -> torch.Tensor:
    """Puts the vectors of each member into one row `[N, R * K]`; of all rows in their order, nothing is copied."""
    if places_NR.shape[1] == 1 and torch.equal(places_NR[:, 0], torch.arange(len(vectors))):
        return vectors
    return vectors[places_NR.flatten().to(vectors.device)].reshape(len(places_NR), -1)


def assign(values_NN: np.ndarray, before: np.ndarray, gain: float) -> tuple[np.ndarray, float]:
    """Solves a linear assignment problem for the largest sum, unless what was found before is as good.

    Args:
        values_NN: What each member gives in each place.
        before: The member that was found for each place before.
        gain: The relative gain from which another one is taken.

    Returns:
        The member that comes to each place, and the sum with those before.
    """
    places = np.arange(len(values_NN))
    _, columns = linear_sum_assignment(values_NN, maximize=True)
    known = float(values_NN[places, before].sum())
    is_better = float(values_NN[places, columns].sum()) > known + gain * abs(known)
    return np.asarray(columns if is_better else before), known


def _assign(values_NN: np.ndarray) -> np.ndarray:
    """Solves a linear assignment problem for the largest sum; whatever is equal stays in place."""
    _, columns = linear_sum_assignment(values_NN, maximize=True)
    places = np.arange(len(values_NN))
    if values_NN[places, columns].sum() <= values_NN[places, places].sum():
        return places
    return np.asarray(columns)


def _match_inside(family: Family, reference: Vectors, model: Vectors) -> tuple[Choice, float, float, int]:
    """Finds the best permutations inside every pair of members, and with them the best pairs."""
    size = family.size
    values_NN = np.full((size, size), -np.inf)
    inside: dict[tuple[int, int], list[np.ndarray]] = {}
    before, most_rounds = 0.0, 0
    for place in range(size):
        candidates = list(range(size)) if family.is_free else [place]
        for some in _chunks(family, candidates):
            products = _products(family, reference, model, place, some)
            for number, member in enumerate(some):
                own = {slot: products[slot][number] for slot in products}
                if member == place:
                    before += sum(float(np.trace(part)) for part in own.values())
                values_NN[place, member], inside[place, member], rounds = match_inside(family.inner, own)
                most_rounds = max(most_rounds, rounds)
    members = _assign(values_NN) if family.is_free else np.arange(size)
    chosen = [inside[place, int(member)] for place, member in enumerate(members)]
    parts = tuple(torch.from_numpy(np.stack([each[k] for each in chosen])) for k in range(len(family.inner)))
    after = float(sum(values_NN[place, member] for place, member in enumerate(members)))
    return Choice(torch.from_numpy(members), parts), before, after, most_rounds


def _chunks(family: Family, members: Sequence[int]) -> list[list[int]]:
    """Cuts members into lists whose products with one member fit into memory."""
    each = sum(8 * part.shape[1] ** 2 for part in family.places.values())
    step = max(1, _MEMBER_BYTES // max(1, each))
    return [list(members[start : start + step]) for start in range(0, len(members), step)]


def _products(
    family: Family, reference: Vectors, model: Vectors, place: int, members: Sequence[int]
) -> dict[Slot, np.ndarray]:
    """Computes, of each slot, ⟨a, b⟩ of all vectors of one place with those of some members `[members, R, R]`."""
    found = {}
    for slot, places_NR in family.places.items():
        ours = reference[slot][places_NR[place].to(reference[slot].device)]
        theirs = model[slot][places_NR[list(members)].flatten().to(model[slot].device)]
        both = product(ours, theirs).cpu().to(torch.float64)
        found[slot] = both.reshape(len(ours), len(members), -1).transpose(0, 1).numpy()
    return found


def match_inside(inner: Sequence[Inner], products: Mapping[Slot, np.ndarray]) -> tuple[float, list[np.ndarray], int]:
    """Finds the best permutations inside one member, one after the other until nothing improves.

    Args:
        inner: The parts that may be permuted.
        products: Slot → ⟨a, b⟩ of all its vectors in the two members `[R, R]`, float64.

    Returns:
        Σ ⟨a, b⟩ after them, the part that comes to each place for every one of `inner`, and the number of rounds.
    """
    places = [{slot: part.numpy() for slot, part in each.places.items()} for each in inner]
    chosen = [np.arange(each.size) for each in inner]
    known = [False] * len(inner)
    best, rounds = -math.inf, 0
    while rounds < MAX_ROUNDS:
        rounds += 1
        for number, own in enumerate(places):
            values = np.zeros((inner[number].size,) * 2)
            rest = [k for k in range(len(inner)) if k != number]
            clear = [slot for slot in own if all(known[k] or slot not in places[k] for k in rest)]
            others = [(places[k], chosen[k]) for k in rest]
            for slot in clear or own:
                turned = products[slot][:, _inside(slot, len(products[slot]), others)]
                values += turned[own[slot][:, None], own[slot][None]].sum(-1)
            chosen[number] = _better(values, chosen[number], keeps=known[number])
            known[number] = True
        every = list(zip(places, chosen, strict=True))
        total = 0.0
        for slot, part in products.items():
            total += float(part[np.arange(len(part)), _inside(slot, len(part), every)].sum())
        if rounds > 1 and not total > best + 1e-12 * abs(best):
            break
        best = total
    return best, chosen, rounds


def _better(values: np.ndarray, before: np.ndarray, *, keeps: bool) -> np.ndarray:
    """Returns the best permutation; the one before if that is as good."""
    found = _assign(values)
    places = np.arange(len(values))
    if keeps and not values[places, found].sum() > values[places, before].sum():
        return before
    return found


def _inside(slot: Slot, size: int, chosen: Sequence[tuple[Mapping[Slot, np.ndarray], np.ndarray]]) -> np.ndarray:
    """Returns which row of the member comes to each place, by permutations that do not touch each other."""
    index = np.arange(size)
    for places, parts in chosen:
        if slot in places:
            step = np.arange(size)
            step[places[slot].ravel()] = places[slot][parts].ravel()
            index = index[step]
    return index
