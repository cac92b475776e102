"""Which block or candidate of a merge stands out: the sentences at the top of its page.

What is far from all others is told as such: more than so many times the median of three or more. Where nothing is, the
sentence says so, and names the largest all the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping

from largemerge.merge_page.facts import Facts, listed, stands_out
from largemerge.pages.page import NotePart
from largemerge.units import counted, gib

FACTOR, CONDITION_FACTOR = 1.5, 10.0
"""How many times the median a value must be to stand out; conditions differ by powers of ten."""
_FEW_TOKENS = 0.5  # of the median over the candidates
_TOLERATED = 1.05  # of planned memory


def findings(facts: Facts) -> list[NotePart]:
    """Makes the sentences: of drift, candidates, blocks, solves, data, memory, and what went otherwise than planned."""
    found = [*_drift(facts), *_candidates(facts), *_solves(facts), *_data(facts), *_memory(facts), *_unplanned(facts)]
    return sorted(found, key=lambda note: note.kind != "bad")


def _drift(facts: Facts) -> Iterator[NotePart]:
    last = {}
    for name, own in facts.drift.items():
        known = [value for value in own.values() if value is not None]
        if len(known) < len(own):
            blocks = [block for block, value in own.items() if value is None]
            yield NotePart("Drift", f"of {name} is not known after {listed(blocks)}.")
        if known:
            last[name] = known[-1]
    if not last:
        return
    most, least = max(last, key=lambda name: last[name]), min(last, key=lambda name: last[name])
    text = f"After the last block, the merged hidden states are farthest from those of {most}: by {last[most]:.1%}"
    text += f"; nearest to those of {least}: {last[least]:.1%}." if least != most else "."
    outlier = stands_out(last, factor=FACTOR)
    yield NotePart("Drift", text, "bad" if outlier or last[most] >= 1 else "plain")
    growth = facts.drift_growth
    if len(growth) > 1:
        steepest = max(growth, key=lambda block: growth[block])
        usual = statistics.median(growth.values())
        outlier = stands_out(facts.later_growth, factor=2 * FACTOR)
        text = f"It grows most in {steepest}: by {_points(growth[steepest])} (median of all blocks {_points(usual)})"
        if outlier and outlier != steepest:
            text += f", and after the first block in {outlier}: by {_points(growth[outlier])}"
        yield NotePart("Drift by block", text + ".", "bad" if outlier else "plain")


def _candidates(facts: Facts) -> Iterator[NotePart]:
    means = _means(facts.in_blocks(facts.distances))
    if means:
        far, near = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
        text = f"The merged weights are farthest from {far}: {means[far]:.1%} of their size"
        text += f"; nearest to {near}: {means[near]:.1%}." if near != far else "."
        yield NotePart("Candidates", text, "bad" if stands_out(means, factor=FACTOR) else "plain")
        by_block = {block: statistics.fmean(own.values()) for block, own in facts.in_blocks(facts.distances).items()}
        most = max(by_block, key=lambda block: by_block[block])
        text = f"The block that moved farthest from all candidates is {most}: {by_block[most]:.1%}"
        text += f" (median {statistics.median(by_block.values()):.1%})."
        yield NotePart("Blocks", text, "bad" if stands_out(by_block, factor=FACTOR) else "plain")
    kept = _means(facts.in_blocks(facts.cosines))
    if kept:
        low, high = min(kept, key=lambda name: kept[name]), max(kept, key=lambda name: kept[name])
        text = f"Of {low}'s task vector the least is left: cosine {kept[low]:.2f}"
        text += f"; of {high}'s the most: {kept[high]:.2f}." if low != high else "."
        few = kept[low] <= 0 or (len(kept) > 2 and kept[low] * FACTOR < statistics.median(kept.values()))
        yield NotePart("Task vectors", text, "bad" if few else "plain")


def _solves(facts: Facts) -> Iterator[NotePart]:
    linears = {name: each for name, (_, each) in facts.linears.items()}
    dead = [name for name, each in linears.items() if each.num_dead_features]
    if dead:
        text = f"Inputs that no token reached are in {counted(len(dead), 'linear')}: {listed(dead)}."
        yield NotePart("Dead features", text)
    few = [name for name, each in linears.items() if min(each.directions.values(), default=0) < each.directions_wanted]
    if few:
        text = "Data or task vectors have fewer directions than the method takes"
        yield NotePart("Directions", f"{text} in {counted(len(few), 'linear')}: {listed(few)}.")
    linears = {name: each for name, each in linears.items() if not each.directions}
    if not linears:
        return
    otherwise = [name for name, each in linears.items() if each.fallbacks]
    conditions = {name: each.condition for name, each in linears.items() if each.condition is not None}
    unknown = [name for name, each in linears.items() if each.condition is None or each.residual is None]
    if otherwise:
        text = f"{counted(len(otherwise), 'linear')} of {len(linears):,} needed more than float32 Cholesky: "
        yield NotePart("Fallbacks", text + listed(otherwise) + ".", "bad")
    else:
        text = f"All {counted(len(linears), 'linear')} were solved by the first solver that was tried"
        if conditions:
            worst = max(conditions, key=lambda name: conditions[name])
            text += f"; the worst condition is {conditions[worst]:.1e}, of {worst}"
        yield NotePart("Solves", text + ".", "good")
    if unknown:
        text = f"Condition or residual is not finite in {counted(len(unknown), 'linear')}: {listed(unknown)}."
        yield NotePart("Solves", text, "bad")


def _data(facts: Facts) -> Iterator[NotePart]:
    tokens = {facts.candidates[name]: each.tokens for name, each in facts.report.calibration.items() if each.tokens}
    if tokens:
        middle = statistics.median(tokens.values())
        few = [f"{name} ({number:,})" for name, number in tokens.items() if number < _FEW_TOKENS * middle]
        if few:
            text = f"Less than half of the median of {middle:,.0f} tokens was there for {listed(few)}."
            yield NotePart("Few tokens", text, "bad")
    short = [
        name
        for name, (_, each) in facts.linears.items()
        if each.tokens and len(each.shape) == 2 and sum(each.tokens.values()) < each.shape[1]
    ]
    if short:
        text = f"{counted(len(short), 'linear')} saw fewer tokens than they have inputs: {listed(short)}."
        yield NotePart("Few tokens", text)
    unseen = [
        f"{name} ({facts.candidates.get(each, each)})"
        for name, (_, linear) in facts.linears.items()
        for each, number in linear.tokens.items()
        if not number
    ]
    if unseen:
        text = f"No token of a candidate reached {counted(len(unseen), 'linear')}: {listed(unseen)}."
        yield NotePart("Few tokens", text, "bad")


def _memory(facts: Facts) -> Iterator[NotePart]:
    for name, planned, measured in facts.memory:
        if planned and measured > planned:
            text = f"The peak on the {name} was {gib(measured)}, above the {gib(planned)} that were planned."
            yield NotePart("Memory", text, "bad" if measured > _TOLERATED * planned else "plain")


def _unplanned(facts: Facts) -> Iterator[NotePart]:
    for retry in facts.report.retries:
        yield NotePart("Retry", retry, "bad")
    for redone in facts.report.redone_parts:
        yield NotePart("Done again", redone, "bad")
    if facts.report.resumed_parts:
        text = f"{counted(facts.report.resumed_parts, 'part')} had been finished by an earlier run; times, memory and "
        yield NotePart("Resumed", text + "bytes read are those of the last run.")
    tensors = facts.report.tensors or {}
    otherwise = [name for name, each in tensors.items() if each.merged_otherwise]
    if otherwise:
        text = f"{counted(len(otherwise), 'tensor')} of {len(tensors):,} were merged by another method: "
        yield NotePart("Otherwise", f"{text}{listed(otherwise)}: {tensors[otherwise[0]].merged_otherwise}.")
    warnings = [note for note in facts.notes if note.startswith("warning")]
    for note in warnings:
        yield NotePart("Warning", note.partition(":")[2].strip(), "bad")


def _means(by_block: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the blocks, by candidate."""
    names = dict.fromkeys(name for own in by_block.values() for name in own)
    return {name: statistics.fmean(own[name] for own in by_block.values() if name in own) for name in names}


def _points(share: float) -> str:
    return f"{100 * share:.1f} points" if math.isfinite(share) else "an unknown share"
