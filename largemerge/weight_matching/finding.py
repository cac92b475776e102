"""What in a block may change places: neurons, heads, and what is inside a head; found without a table of architectures.

Between the linears of a block (see `between.py`), some features depend on some others:

    y of gate, up ──► x of down         feature c depends on features c of both                        neurons
    y of q, k, v ──► x of o             those of a head depend on its queries, keys and values         heads

Rows of linears and the columns that depend on them make a graph. Its connected parts are what may change places as a
whole, if they are alike: neurons of an MLP, heads, groups of heads that share keys and values. How rows lie in a fused
matrix does not matter. What depends on the block's own input, or reaches its output, is the residual stream, and stays.

Inside a part, some of its rows alone make smaller parts: values and the outputs that they become, the query heads of a
group; queries and keys make none, but change places together where no rotary embedding tells them apart.

Dependencies come from gradients: with codes a_c and b_c of the columns, ∂(Σ_c b_c x_c)/∂y_r divided by
∂(Σ_c a_c x_c)/∂y_r is b_c / a_c if r reaches column c alone. Rows that reach several are changed one after the other.

Every kind of part is tried at last: rows and columns change places, and unless what lies between follows to
`_TOLERANCE`, they stay as they are, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from largemerge.model.skeleton import linears_in
from largemerge.weight_matching.between import RESULT, Between, by_sample, largest_difference, leaves_of, linear_sizes
from largemerge.weight_matching.units import BlockUnits, Family, Inner, Slot, trial_choices

_TOLERANCE = 1e-5
"""Of relative differences where nothing should differ: norms and softmaxes compute in float32, whatever they get."""
_OWN_WAY = "the model computes each in its own way (position embeddings or biases, mostly)"
_CHANGED = 1e-6  # a relative difference above it is none of rounding
_MAX_ENUMERATED = 2048  # columns of one row whose edges are all noted


def find_units(between: Between) -> BlockUnits:
    """Finds what may change places in a block, and tries it."""
    generator = torch.Generator().manual_seed(0)
    vectors = _vectors(between, generator)
    sizes = {
        slot: size
        for name, linear in linears_in(between.block).items()
        for slot, size in zip((Slot(name, "outputs"), Slot(name, "inputs")), linear_sizes(linear), strict=True)
    } | {Slot(name, "elements"): len(vector) for name, vector in vectors.items()}
    with between.parameters(vectors), torch.enable_grad():
        graph = _trace(between, generator)
        families = _families(graph)
        families = [_with_vectors(between, family, vectors, generator) for family in families]
        kept, held = _tried(between, families, sizes, vectors, generator)
    used = {slot.path for family in kept for slot in family.places}
    linears = linears_in(between.block)
    others = [
        name
        for name, parameter in between.block.named_parameters()
        if parameter.dim() > 1 and not name.startswith(tuple(f"{path}." for path in linears))
    ]
    untouched = [name for name in (*linears, *others) if name not in used]
    return BlockUnits(tuple(kept), sizes, tuple(held), tuple(untouched))


def follows(between: Between, units: BlockUnits) -> bool:
    """Whether the units of another block are units of this one, too."""
    generator = torch.Generator().manual_seed(0)
    vectors = _vectors(between, generator)
    slots = {slot.path for family in units.families for slot in family.places if slot.side != "elements"}
    if not slots <= set(between.linears):
        return False
    with between.parameters(vectors):
        return _commutes(between, units.families, units.sizes, vectors, generator)


def _vectors(between: Between, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Makes up the block's vectors: scales that are far from zero."""
    return {
        name: torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
        for name, parameter in between.vectors().items()
    }


@dataclass
class _Graph:
    """Which rows reach which columns; all by numbers that count over all linears.

    Attributes:
        row_starts: Linear → number of its first row.
        column_starts: Linear → number of its first column.
        rows: Row of every edge.
        columns: Column of every edge.
        blocked: Columns that must stay.
    """

    row_starts: dict[str, int]
    column_starts: dict[str, int]
    num_rows: int
    num_columns: int
    rows: list[np.ndarray] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)
    blocked: list[np.ndarray] = field(default_factory=list)

    def add(self, linear: str, rows: np.ndarray, consumer: str, columns: np.ndarray) -> None:
        """Adds edges."""
        self.rows.append(rows + self.row_starts[linear])
        self.columns.append(columns + self.column_starts[consumer])


def _starts(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    starts, total = {}, 0
    for name, size in sizes.items():
        starts[name] = total
        total += size
    return starts, total


def _trace(between: Between, generator: torch.Generator) -> _Graph:
    """Finds which rows reach which columns."""
    sizes = {name: linear_sizes(linear) for name, linear in between.linears.items()}
    row_starts, num_rows = _starts({name: outputs for name, (outputs, _) in sizes.items()})
    column_starts, num_columns = _starts({name: inputs for name, (_, inputs) in sizes.items()})
    graph = _Graph(row_starts, column_starts, num_rows, num_columns)
    made = between.made_up(generator, positive=True)
    outputs = {name: y.requires_grad_() for name, y in made.items()}
    reads = between.run(outputs)
    weights = {name: torch.rand(y.shape[:-1], generator=generator, dtype=torch.float64)[..., None] + 0.5
               for name, y in outputs.items()}  # fmt: skip

    def gradients(total: torch.Tensor) -> dict[str, np.ndarray]:
        """Derivatives by the rows of every linear, summed over tokens with random weights."""
        found = torch.autograd.grad(total, list(outputs.values()), retain_graph=True, allow_unused=True)
        return {
            name: (gradient * weights[name]).flatten(0, -2).sum(0).numpy()
            for name, gradient in zip(outputs, found, strict=True)
            if gradient is not None and bool((gradient != 0).any())
        }

    leaving = [leaf for leaf in leaves_of(reads[RESULT]) if leaf.requires_grad]
    exposed: dict[str, np.ndarray] = {}
    if leaving:
        codes = [torch.rand(leaf.shape, generator=generator, dtype=torch.float64) + 0.5 for leaf in leaving]
        total = torch.stack([(leaf * code).sum() for leaf, code in zip(leaving, codes, strict=True)]).sum()
        exposed = {name: gradient != 0 for name, gradient in gradients(total).items()}
    graph.blocked += _blocked(between, outputs, reads, exposed, column_starts)
    several: dict[str, dict[str, np.ndarray]] = {}  # linear → consumer → rows that reach several of its columns
    for consumer in between.linears:
        x = reads[consumer]
        if not x.requires_grad:
            continue
        for linear, found in _single(x, sizes[consumer][1], gradients, generator).items():
            inside = ~exposed.get(linear, np.zeros(sizes[linear][0], dtype=bool))
            single, many, columns = found.single & inside, found.many & inside, found.columns
            graph.add(linear, np.flatnonzero(single), consumer, columns[single])
            if many.any():
                several.setdefault(linear, {})[consumer] = np.flatnonzero(many)
    plain = {name: y.detach() for name, y in outputs.items()}
    with torch.no_grad():
        for linear, by_consumer in several.items():
            _enumerate(between, plain, linear, by_consumer, graph, generator)
    return graph


def _blocked(
    between: Between,
    outputs: Mapping[str, torch.Tensor],
    reads: Mapping[str, torch.Tensor],
    exposed: Mapping[str, np.ndarray],
    starts: Mapping[str, int],
) -> Iterator[np.ndarray]:
    """Yields the columns that depend on rows which reach the block's output: they belong to the residual stream."""
    changed = {}
    for name, y in outputs.items():
        changed[name] = y.detach().clone()  # as it was, where nothing of it reaches the output
        if name in exposed:
            rows, flat = torch.from_numpy(exposed[name]), changed[name].flatten(0, -2)
            flat[:, rows] = flat[:, rows].flip(0) * 1.5 + 0.1
            changed[name] = flat
    with torch.no_grad():
        again = between.run(changed)
    for name in between.linears:
        before = reads[name].detach()
        gap = (again[name] - before).abs().flatten(0, -2).amax(0)
        yield torch.nonzero(gap > _CHANGED * before.abs().max())[:, 0].numpy() + starts[name]


class _Found(NamedTuple):
    """Which rows reach one column, which several, and the column of the former."""

    single: np.ndarray
    many: np.ndarray
    columns: np.ndarray


Gradients = Callable[[torch.Tensor], Mapping[str, np.ndarray]]
"""Makes, of a number that was computed from the outputs of linears, its derivatives by the rows of each."""


def _single(x: torch.Tensor, num_columns: int, gradients: Gradients, generator: torch.Generator) -> dict[str, _Found]:
    """Finds rows that reach one column of a linear alone, from the ratios of gradients; and those that reach more."""
    first_C = torch.rand(num_columns, generator=generator, dtype=torch.float64) + 0.5
    orders = [torch.randperm(num_columns, generator=generator) for _ in range(3)]
    rows = torch.rand(x.shape[:-1], generator=generator, dtype=torch.float64)[..., None] + 0.5
    plain = gradients((x * rows * first_C).sum())
    coded = [gradients((x * rows * first_C * (1 + 2 * order / num_columns)).sum()) for order in orders]
    found = {}
    for linear, gradient in plain.items():
        reached = gradient != 0
        safe = np.where(reached, gradient, 1.0)
        guesses = []
        sure = reached.copy()
        for order, other in zip(orders, coded, strict=True):
            code = (other.get(linear, np.zeros_like(gradient)) / safe - 1) * num_columns / 2
            number = np.rint(code)
            sure &= (np.abs(code - number) < 0.02) & (number >= 0) & (number < num_columns)
            backwards = np.empty(num_columns, dtype=np.int64)
            backwards[order.numpy()] = np.arange(num_columns)
            guesses.append(backwards[np.clip(number, 0, num_columns - 1).astype(np.int64)])
        sure &= (guesses[0] == guesses[1]) & (guesses[0] == guesses[2])
        found[linear] = _Found(sure, reached & ~sure, guesses[0])
    return found


def _enumerate(
    between: Between,
    outputs: Mapping[str, torch.Tensor],
    linear: str,
    by_consumer: Mapping[str, np.ndarray],
    graph: _Graph,
    generator: torch.Generator,
) -> None:
    """Changes rows one after the other, several in one run, to see which columns they reach."""
    count = between.num_samples
    rows = np.unique(np.concatenate(list(by_consumer.values())))
    order = list(between.linears)
    until = max(by_consumer, key=order.index)
    batch = {name: y.flatten(0, -2).expand(count, -1, -1) for name, y in outputs.items()}
    dense: set[str] = set()
    for start in range(0, len(rows), count - 1):
        own = rows[start : start + count - 1]
        y = batch[linear].clone()
        change = torch.rand(y.shape[1], generator=generator, dtype=torch.float64) + 0.5
        for sample, row in enumerate(own, 1):
            y[sample, :, row] += change
        reads = between.run({**batch, linear: y}, num_samples=count, until=until)
        for consumer in by_consumer:
            x = by_sample(reads[consumer], count)
            if x is None:
                continue
            reached = ((x[1:] - x[:1]).abs().amax(1) > _CHANGED * x[0].abs().max()).numpy()[: len(own)]
            for sample in range(len(own)):
                columns = np.flatnonzero(reached[sample])
                if len(columns) > _MAX_ENUMERATED:
                    columns = columns if consumer not in dense else columns[:1]
                    dense.add(consumer)
                graph.add(linear, np.full(len(columns), own[sample]), consumer, columns)


def _families(graph: _Graph) -> list[Family]:
    """Puts connected parts that are alike together."""
    if not graph.rows:
        return []
    rows, columns = np.concatenate(graph.rows), np.concatenate(graph.columns)
    if not len(rows):
        return []
    total = graph.num_rows + graph.num_columns
    edges = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns + graph.num_rows)), shape=(total, total))
    _, labels = connected_components(edges, directed=False)
    blocked = set(labels[np.concatenate([*graph.blocked, np.empty(0, dtype=np.int64)]) + graph.num_rows].tolist())
    linked = np.unique(np.concatenate([rows, columns + graph.num_rows]))
    starts = [(start, Slot(name, "outputs")) for name, start in graph.row_starts.items()]
    starts += [(start + graph.num_rows, Slot(name, "inputs")) for name, start in graph.column_starts.items()]
    firsts = np.array([start for start, _ in starts])
    order = np.argsort(labels[linked], kind="stable")
    linked = linked[order]
    cuts = np.flatnonzero(np.diff(labels[linked])) + 1
    alike: dict[tuple[tuple[Slot, int], ...], list[dict[Slot, np.ndarray]]] = {}
    for nodes in np.split(linked, cuts):
        if labels[nodes[0]] in blocked:
            continue
        owner = np.searchsorted(firsts, nodes, side="right") - 1
        places = {starts[which][1]: nodes[owner == which] - firsts[which] for which in np.unique(owner)}
        alike.setdefault(tuple((slot, len(each)) for slot, each in places.items()), []).append(places)
    reached = _reached(rows, columns)
    families = []
    for kind, members in alike.items():
        members.sort(key=lambda each: int(next(iter(each.values()))[0]))
        places = {slot: torch.from_numpy(np.stack([each[slot] for each in members])) for slot, _ in kind}
        inner = _inner(places, graph, reached)
        num_columns = {slot: part.shape[1] for slot, part in places.items() if slot.side == "inputs"}
        what = (
            "neurons" if set(num_columns.values()) == {1} else "heads" if not _is_grouped(inner) else "groups of heads"
        )
        where = ", ".join(slot.path for slot in num_columns)
        if len(members) > 1 or inner:
            families.append(Family(f"{what} before {where}", places, len(members) > 1, inner))
    return families


def _is_grouped(inner: Sequence[Inner]) -> bool:
    return any(each.name == "query heads" for each in inner)


def _reached(rows: np.ndarray, columns: np.ndarray) -> dict[int, frozenset[int]]:
    """Columns that each row reaches."""
    order = np.argsort(rows, kind="stable")
    rows, columns = rows[order], columns[order]
    cuts = np.flatnonzero(np.diff(rows)) + 1
    own = zip(np.split(rows, cuts), np.split(columns, cuts), strict=True)
    return {int(of[0]): frozenset(each.tolist()) for of, each in own}


def _inner(
    places: Mapping[Slot, torch.Tensor], graph: _Graph, reached: Mapping[int, frozenset[int]]
) -> tuple[Inner, ...]:
    """Finds smaller parts inside the members of a family; none where members are not alike inside."""
    if all(part.shape[1] == 1 for slot, part in places.items() if slot.side == "inputs"):
        return ()
    inside = [_inside(places, number, graph, reached) for number in range(len(next(iter(places.values()))))]
    if any(each != inside[0] for each in inside):
        return ()
    rows: dict[tuple[Slot, int], frozenset[tuple[Slot, int]]] = inside[0]
    sizes = sorted({len(touched) for touched in rows.values()})
    found: list[Inner] = []
    taken: set[tuple[Slot, int]] = set()
    for size in sizes:
        alike = {row: touched for row, touched in rows.items() if len(touched) == size}
        parts = _parts_inside(alike)
        by_linear = [
            {row: of for row, of in alike.items() if row[0] == slot} for slot in dict.fromkeys(r for r, _ in alike)
        ]
        tries = [(alike, parts)] if parts is not None else [(own, _parts_inside(own)) for own in by_linear]
        for own, parts in tries:
            if parts is None:
                continue
            is_value = sum(part.shape[1] for slot, part in parts.items() if slot.side == "outputs") == 1
            found.append(Inner("values" if is_value else "query heads", parts))
            if is_value:
                taken |= set(own)
    scores = _scores({row: touched for row, touched in rows.items() if row not in taken})
    return (*found, scores) if scores is not None else tuple(found)


def _inside(
    places: Mapping[Slot, torch.Tensor], number: int, graph: _Graph, reached: Mapping[int, frozenset[int]]
) -> dict[tuple[Slot, int], frozenset[tuple[Slot, int]]]:
    """Which rows of a member reach which of its columns, by their positions in it."""
    columns = {
        int(column) + graph.column_starts[slot.path]: (slot, position)
        for slot, part in places.items()
        if slot.side == "inputs"
        for position, column in enumerate(part[number].tolist())
    }
    return {
        (slot, position): frozenset(columns[column] for column in reached[int(row) + graph.row_starts[slot.path]])
        for slot, part in places.items()
        if slot.side == "outputs"
        for position, row in enumerate(part[number].tolist())
    }


def _parts_inside(own: Mapping[tuple[Slot, int], frozenset[tuple[Slot, int]]]) -> dict[Slot, torch.Tensor] | None:
    """Connected parts that some rows make with the columns that they reach; `None` unless there are several, alike."""
    groups: list[tuple[set[tuple[Slot, int]], set[tuple[Slot, int]]]] = []
    for row, touched in own.items():
        joined = [group for group in groups if group[1] & touched]
        merged = ({row}.union(*(group[0] for group in joined)), set(touched).union(*(group[1] for group in joined)))
        groups = [group for group in groups if group not in joined] + [merged]
    by_slot = []
    for rows, columns in groups:
        part: dict[Slot, list[int]] = {}
        for slot, position in sorted(rows | columns):
            part.setdefault(slot, []).append(position)
        by_slot.append(part)
    kinds = {tuple((slot, len(each)) for slot, each in part.items()) for part in by_slot}
    if len(by_slot) < 2 or len(kinds) > 1:
        return None
    first = next(iter(by_slot[0]))
    by_slot.sort(key=lambda part: part[first])
    return {slot: torch.tensor([part[slot] for part in by_slot]) for slot in by_slot[0]}


def _scores(rows: Mapping[tuple[Slot, int], frozenset[tuple[Slot, int]]]) -> Inner | None:
    """Pairs the features of queries and keys: the i-th rows of all of them."""
    by_reach: dict[frozenset[tuple[Slot, int]], list[tuple[Slot, int]]] = {}
    for row, touched in rows.items():
        by_reach.setdefault(touched, []).append(row)
    if not by_reach:
        return None
    lengths = [len(each) for each in by_reach.values()]
    size = min(lengths) if len(lengths) > 1 else lengths[0] // 2
    if size < 2 or any(length % size for length in lengths):
        return None
    places: dict[Slot, list[list[int]]] = {}
    for each in by_reach.values():
        each.sort()
        for start in range(0, len(each), size):
            chunk = each[start : start + size]
            if len({slot for slot, _ in chunk}) > 1:
                return None
            places.setdefault(chunk[0][0], []).append([position for _, position in chunk])
    return Inner("queries and keys", {slot: torch.tensor(chunks).T.contiguous() for slot, chunks in places.items()})


def _with_vectors(
    between: Between, family: Family, vectors: Mapping[str, torch.Tensor], generator: torch.Generator
) -> Family:
    """Adds the elements of vectors that reach the columns of one member alone: norms of all heads, sinks."""
    if not family.is_free or not vectors:
        return family
    consumers = [slot for slot in family.places if slot.side == "inputs"]
    outputs = between.made_up(generator, positive=True)
    codes = torch.randperm(family.size, generator=generator)
    leaves = {name: vector.clone().requires_grad_() for name, vector in vectors.items()}
    with between.parameters(leaves):
        reads = between.run(outputs)
        held = {name: between.parameter(name) for name in leaves}
        totals = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
        for slot in consumers:
            x, places = reads[slot.path], family.places[slot]
            plain = torch.zeros(x.shape[-1], dtype=torch.float64)
            plain[places.flatten()] = torch.rand(places.numel(), generator=generator, dtype=torch.float64) + 0.5
            code = torch.ones(x.shape[-1], dtype=torch.float64)
            code[places.flatten()] = (1 + 2 * codes / family.size).to(torch.float64).repeat_interleave(places.shape[1])
            rows = torch.rand(x.shape[:-1], generator=generator, dtype=torch.float64)[..., None] + 0.5
            totals[0] = totals[0] + (x * rows * plain).sum()
            totals[1] = totals[1] + (x * rows * plain * code).sum()
        if not totals[0].requires_grad:
            return family
        found = [
            torch.autograd.grad(total, list(held.values()), retain_graph=True, allow_unused=True) for total in totals
        ]
    all_places = dict(family.places)
    member_of_code = torch.argsort(codes)
    for name, plain_grad, coded_grad in zip(held, *found, strict=True):
        if plain_grad is None or coded_grad is None or not bool((plain_grad != 0).any()):
            continue
        reached = plain_grad != 0
        code = (coded_grad / torch.where(reached, plain_grad, 1.0) - 1) * family.size / 2
        number = code.round()
        if bool(((code - number).abs() > 0.02)[reached].any()):
            continue  # some elements are of several members: they stay, and the trial decides
        owner = torch.where(reached, member_of_code[number.long().clamp(0, family.size - 1)], -1)
        elements = [torch.nonzero(owner == member)[:, 0] for member in range(family.size)]
        if len({len(each) for each in elements}) == 1 and len(elements[0]):
            all_places[Slot(name, "elements")] = torch.stack(elements)
    return replace(family, places=all_places)


# Trying them


def _tried(
    between: Between,
    families: Sequence[Family],
    sizes: Mapping[Slot, int],
    vectors: Mapping[str, torch.Tensor],
    generator: torch.Generator,
) -> tuple[list[Family], list[str]]:
    """Returns the families as far as what lies between follows them, and what does not."""
    kept, held = [], []
    for family in families:
        if family.is_free and not _commutes(between, [replace(family, inner=())], sizes, vectors, generator):
            held.append(f"{family.name} stay: {_OWN_WAY}")
            family = replace(family, is_free=False)
        inner = []
        for each in family.inner:
            alone = replace(family, is_free=False, inner=(each,))
            if _commutes(between, [alone], sizes, vectors, generator):
                inner.append(each)
            else:
                held.append(f"{each.name} of {family.name} stay: {_OWN_WAY}")
        if family.is_free or inner:
            kept.append(replace(family, inner=tuple(inner)))
    if not _commutes(between, kept, sizes, vectors, generator):
        held += [f"{family.name} stay: they cannot be permuted together" for family in kept]
        return [], held
    return kept, held


def _commutes(
    between: Between,
    families: Sequence[Family],
    sizes: Mapping[Slot, int],
    vectors: Mapping[str, torch.Tensor],
    generator: torch.Generator,
) -> bool:
    """Whether what lies between the linears follows choices of some families."""
    units = BlockUnits(tuple(families), sizes)
    outputs = between.made_up(generator)
    with torch.no_grad():
        before = between.run(outputs)
    for choices in zip(*(trial_choices(family, generator) for family in families), strict=True):
        indices = units.indices(choices)
        permuted = {
            name: y[..., indices[Slot(name, "outputs")]] if Slot(name, "outputs") in indices else y
            for name, y in outputs.items()
        }
        changed = {
            name: vector[indices[Slot(name, "elements")]] if Slot(name, "elements") in indices else vector
            for name, vector in vectors.items()
        }
        with torch.no_grad(), between.parameters(changed):
            after = between.run(permuted)
        expected, found = leaves_of(before[RESULT]), leaves_of(after[RESULT])
        for name in between.linears:
            index = indices.get(Slot(name, "inputs"))
            expected.append(before[name] if index is None else before[name][..., index])
            found.append(after[name])
        if not largest_difference(expected, found) <= _TOLERANCE:
            return False
    return True
