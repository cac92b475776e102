"""Sections of a merge's page: each from the facts, or none where they have nothing to show.

What a method cannot know is said in the section's place: drift is known only where the merged model is held against the
candidates' own hidden states.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from largemerge.evaluation.page import evaluation_sections
from largemerge.evaluation.results import Evaluation
from largemerge.merge_page.facts import HEAD, OUTSIDE, Facts, Linear, as_json, stands_out, words
from largemerge.merge_page.findings import CONDITION_FACTOR, FACTOR, findings
from largemerge.pages import charts
from largemerge.pages.page import Cell, ChartPart, Mark, NotePart, Part, Section, TablePart, TextPart
from largemerge.units import counted, duration, gib

_MAX_COLUMNS, _MAX_WORST, _MAX_STAGES = 14, 12, 10
_MAX_GAP = 1 / 500  # of the whole time; spans of a stage that are nearer are drawn as one
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def at_a_glance(facts: Facts) -> Section:
    """Shows what stands out, and the numbers of the whole merge."""
    report = facts.report
    rows: list[tuple[str, Cell]] = [
        ("method", facts.method),
        ("models", ", ".join(facts.candidates.values()) or "unknown"),
        ("blocks", len(facts.blocks)),
        ("tensors", _tensor_counts(facts)),
        ("time", duration(report.seconds.total) if report.seconds.total is not None else None),
    ]
    rows += [(f"peak memory, {name}", gib(measured)) for name, _, measured in facts.memory if measured]
    for name, number in (("read", report.bytes_read), ("written", report.bytes_written)):
        rows.append((name, gib(number) if number is not None else None))
    notes: list[Part] = list(findings(facts))
    if not any(note.kind == "bad" for note in notes if isinstance(note, NotePart)):
        notes.insert(0, NotePart("Nothing stands out.", "No block and no candidate is far from the others."))
    if facts.missing:
        notes.append(NotePart("Not in this report:", "; ".join(facts.missing) + "."))
    return Section("At a glance", parts=[*notes, TablePart(("", ""), rows)])


def drift(facts: Facts) -> Section:
    """Shows how far the merged model's hidden states are from each candidate's own, block by block."""
    title = "Drift of the hidden states"
    known = {name: own for name, own in facts.drift.items() if any(value is not None for value in own.values())}
    if not known:
        why = (
            f"{facts.method} does not hold the merged model against the candidates' own hidden states"
            if facts.by_regression
            else "a merge without data runs no model"
        )
        return Section(title, f"Not known: {why}. The methods that know it are calibrated and featcal.")
    blocks = list(dict.fromkeys(block for own in known.values() for block in own))
    place = {block: number for number, block in enumerate(blocks)}
    series = {
        name: [(place[block], value) for block, value in own.items() if value is not None]
        for name, own in known.items()
    }
    chart = charts.lines(
        series,
        title="Drift of the merged hidden states from each candidate's own, after each block",
        x_label="block",
        y_label="‖h − hᵢ‖ / ‖hᵢ‖",
        x_names=_plain(blocks),
    )
    rows, marks = [], _marks({name: own[-1][1] for name, own in series.items()}, column=1)
    for name, own in series.items():
        most = max(own, key=lambda point: point[1])
        rows.append((name, f"{own[-1][1]:.1%}", f"{most[1]:.1%}", blocks[int(most[0])]))
    text = (
        "The one number that says how well a merge went: on each model's own calibration data, ‖h − hᵢ‖ / ‖hᵢ‖ after "
        "each block. At 0 the merged model does what the model does; at 1 it is as far away as if its hidden states "
        "were zero."
    )
    table = TablePart(("candidate", "after the last block", "at most", "after block"), rows, highlights=marks)
    caption = "Each line is a candidate, blocks go from the first to the last. A step is a block that does harm."
    return Section(title, text, [ChartPart(chart, caption), table])


def block_table(facts: Facts) -> Section | None:
    """Shows a row for each block: what is known of it, with what stands out."""
    conditions = facts.of_linears(lambda each: each.condition)
    mean_distance = {block: statistics.fmean(own.values()) for block, own in facts.distances.items()}
    times = {block: sum(own.values()) for block, own in facts.seconds.items()}
    columns: list[tuple[str, Mapping[str, float], Callable[[float], str], float | None]] = [
        ("drift after it", facts.mean_drift, lambda value: f"{value:.1%}", None),
        ("drift grows by", facts.drift_growth, lambda value: f"{100 * value:.1f}", 2 * FACTOR),
        ("distance", mean_distance, lambda value: f"{value:.1%}", FACTOR),
        ("worst condition", conditions, lambda value: f"{value:.1e}", CONDITION_FACTOR),
        (
            "largest residual",
            facts.of_linears(lambda each: each.residual),
            lambda value: f"{value:.1e}",
            CONDITION_FACTOR,
        ),
        ("fallbacks", facts.of_linears(lambda each: float(len(each.fallbacks))), lambda value: f"{value:.0f}", 0.0),
        ("time", times, lambda value: duration(value) if value >= 1 else f"{value:.2g} s", FACTOR),
    ]
    columns = [column for column in columns if column[1]]
    lowest = {block: min(own.values()) for block, own in facts.cosines.items()}
    names = [*facts.blocks.values(), HEAD, OUTSIDE]
    names = [name for name in names if lowest.get(name) is not None or any(name in own for _, own, _, _ in columns)]
    if not names or not columns:
        return None
    marks: dict[tuple[int, int], Mark] = {}
    for number, (_, own, _, factor) in enumerate(columns, 1):
        compared = facts.later_growth if own is facts.drift_growth else facts.in_blocks(own)
        found = stands_out(compared, factor=factor) if factor else None
        if found is not None:
            marks[names.index(found), number] = "bad"
        if factor == 0.0:
            marks |= {(row, number): "bad" for row, name in enumerate(names) if own.get(name)}
    rows = [
        (
            name,
            *(form(own[name]) if name in own else None for _, own, form, _ in columns),
            *([f"{lowest[name]:.2f}" if name in lowest else None] if lowest else []),
        )
        for name in names
    ]
    titles = ("block", *(title for title, _, _, _ in columns), *(["lowest cosine"] if lowest else []))
    text = (
        f"Highlighted: fallbacks, and the largest of a column if it is more than {FACTOR:g} times the median; "
        f"{2 * FACTOR:g} times for the growth of the drift, which is in points and without the first block of a stack; "
        f"{CONDITION_FACTOR:g} times for conditions and residuals."
    )
    return Section("Block by block", text, [TablePart(titles, rows, highlights=marks)])


def movement(facts: Facts) -> Section | None:
    """Shows how far each block moved from each candidate, and how much of its task vector is left."""
    parts: list[Part] = []
    if facts.in_blocks(facts.distances):
        what = (
            "mean over the solved linears of a block, relative to the merged weight"
            if facts.distances_are_of_linears
            else "measured on a sample of rows of each tensor, relative to the candidate's weights"
        )
        title = "Distance of the merged weights from each candidate, by block"
        chart = charts.heatmap(_percent(facts.in_blocks(facts.distances)), title=title, unit="distance in %")
        parts.append(ChartPart(chart, f"How far each block is from each candidate: {what}. Dark is far."))
    if facts.in_blocks(facts.cosines):
        title = "Cosine of each candidate's task vector and the merge's, by block"
        chart = charts.heatmap(facts.in_blocks(facts.cosines), title=title, unit="cosine", high_is_good=True)
        caption = (
            "How much of what fine-tuning changed points the way that the merge went: 1 for the candidate itself, "
            "about 1/√K for one of K unrelated ones in their average, 0 for what is lost. Dark is lost."
        )
        parts.append(ChartPart(chart, caption))
    return Section("How far each block moved", parts=parts) if parts else None


def solves(facts: Facts) -> Section | None:
    """Shows condition, residual, shrinkage and fallbacks of least-squares problems, or how subspaces were merged."""
    if not facts.linears:
        return None
    if all(each.directions for _, each in facts.linears.values()):
        return _subspaces(facts)
    parts: list[Part] = []
    by_kind = _by_kind(facts)
    if any(own for own in by_kind.values()):
        chart = charts.heatmap(by_kind, title="Condition of the Gram matrices, by block", unit="condition", log=True)
        caption = "The worst condition of each Gram matrix that was factorised. Linears with one input share one."
        parts.append(ChartPart(chart, caption))
    shrunk = facts.of_linears(lambda each: each.shrinkage)
    rows = [_linear_row(name, each, with_shrinkage=bool(shrunk)) for name, each in _worst(facts)]
    columns = ("linear", "condition", "residual", "solver", "fallbacks", "tokens", "inputs", "dead inputs")
    marks: dict[tuple[int, int], Mark] = {(number, 4): "bad" for number, row in enumerate(rows) if row[4]}
    caption = "Linears with fallbacks, and those of the worst condition."
    parts.append(TablePart((*columns, *(["shrinkage"] if shrunk else [])), rows, caption, marks))
    solvers = Counter(words(each.solver) for _, each in facts.linears.values() if each.solver)
    text = f"Solved: {', '.join(f'{count:,} by {name}' for name, count in solvers.items())}." if solvers else ""
    return Section("Least-squares problems", text, parts)


def data(facts: Facts) -> Section | None:
    """Shows samples and tokens of each candidate."""
    calibration = facts.report.calibration
    if not calibration:
        return None
    weights = {str(each.get("name") or each.get("model")): each for each in facts.report.config.get("models") or ()}
    rows: list[tuple[Cell, ...]] = []
    for name, each in calibration.items():
        seen = [linear.tokens[name] for _, linear in facts.linears.values() if name in linear.tokens]
        weight = (weights.get(name, {}).get("parameters") or {}).get("weight")
        fewest = int(min(seen)) if seen else None
        shown_weight = weight if isinstance(weight, int | float) else None
        rows.append((facts.candidates[name], shown_weight, each.num_samples, each.tokens, fewest))
    columns = ("candidate", "weight", "samples", "tokens", "fewest tokens of a linear")
    parts: list[Part] = [TablePart(columns, rows)]
    tokens = {facts.candidates[name]: float(each.tokens) for name, each in calibration.items() if each.tokens}
    if len(tokens) > 1:
        chart = charts.bars({"tokens": tokens}, title="Tokens of each candidate", unit="tokens")
        parts.insert(0, ChartPart(chart, "Tokens of calibration data that the model saw, by candidate."))
    return Section("Calibration data", parts=parts)


def time_and_memory(facts: Facts) -> Section:
    """Shows memory and stages over time, seconds by block, and the plan beside what was measured."""
    report, parts = facts.report, list[Part]()
    spans = _spans(facts)
    levels = {"host, anonymous": [(at, float(host)) for at, host, _ in report.memory_over_time]}
    if any(device for _, _, device in report.memory_over_time):
        levels["device"] = [(at, float(device)) for at, _, device in report.memory_over_time]
    levels = {name: points for name, points in levels.items() if points}
    if spans or levels:
        limits = {
            f"planned, {name}": float(planned) for name, planned, measured in facts.memory if planned and measured
        }
        limits = limits if levels else {}
        chart = charts.timeline(spans, levels=levels, limits=limits, title="Memory and stages over time")
        caption = "Memory of the process (of the first rank, where there are several), and what it was doing."
        parts.append(ChartPart(chart, caption))
    if facts.seconds:
        title = "Seconds of each block, by stage"
        chart = charts.heatmap(_largest_stages(facts.seconds), title=title, unit="seconds")
        parts.append(ChartPart(chart, "Seconds that each block took, by stage. Dark is long."))
    elif report.seconds.by_phase:
        chart = charts.bars({"": report.seconds.by_phase}, title="Seconds of each stage", unit="seconds")
        parts.append(ChartPart(chart, "Seconds of each stage."))
    parts.append(_plan_and_measured(facts))
    if report.ranks:
        columns = list(dict.fromkeys(key for rank in report.ranks for key in rank))
        rows = [
            (f"rank {number}", *(_cell(key, rank.get(key)) for key in columns))
            for number, rank in enumerate(report.ranks)
        ]
        parts.append(TablePart(("", *map(words, columns)), rows, "Each rank of the merge."))
    return Section("Time and memory", parts=parts)


def tensors(facts: Facts) -> Section | None:
    """Shows which tensors came about in another way than most, and why."""
    plan, found = facts.report.plan, Counter[tuple[str, str]]()
    for each in (plan.get("not_solved") or {}).values():
        if isinstance(each, dict):
            found[str(each.get("treatment", "")), str(each.get("reason", ""))] += 1
    for tensor in (facts.report.tensors or {}).values():
        for how, why in (("copied", tensor.copied), ("merged otherwise", tensor.merged_otherwise)):
            if why:
                found[how, why] += 1
    if not found:
        return None
    rows = [(how, count, why) for (how, why), count in found.most_common(40)]
    return Section(
        "Tensors that are not solved or merged as the others", parts=[TablePart(("", "tensors", "why"), rows)]
    )


def notes(facts: Facts) -> Section | None:
    """Shows the notes of the plan."""
    found = [note for note in facts.notes if not note.startswith("warning")]
    return Section("Notes of the plan", parts=[NotePart("", note) for note in found]) if found else None


def evaluation(facts: Facts) -> tuple[Section, ...]:
    """Shows the results of an evaluation, as its own page does; what another program has written, as it stands."""
    if not facts.evaluation:
        return ()
    try:
        return tuple(evaluation_sections(Evaluation.from_json(facts.evaluation)))
    except (KeyError, TypeError, ValueError, AttributeError):
        return (_other_evaluation(facts),)


def _other_evaluation(facts: Facts) -> Section:
    """Scores by model and task as bars, as far as they are found, and the rest as it stands."""
    parts: list[Part] = []
    for name, scores in _scores_in(facts.evaluation, "scores"):
        tasks = list(dict.fromkeys(task for own in scores.values() for task in own))
        title = f"{name}, by task and model"
        chart = charts.bars(scores, title=title)
        rows = [(model, *(own.get(task) for task in tasks)) for model, own in scores.items()]
        parts += [ChartPart(chart, f"{title}."), TablePart(("", *tasks), rows)]
    plain = [(words(key), value) for key, value in facts.evaluation.items() if isinstance(value, str | int | float)]
    if plain:
        parts.append(TablePart(("", ""), plain))
    parts.append(TextPart(as_json(facts.evaluation), "All that the evaluation says"))
    return Section("Evaluation", "From evaluation.json in the folder.", parts)


def origin(facts: Facts) -> Section:
    """Shows what the merge was made of and on, and its configuration."""
    report = facts.report
    models = [
        (facts.candidates.get(name, name.rsplit("/", 1)[-1]), _folder(each)) for name, each in report.inputs.items()
    ]
    here = [(words(name), _cell(name, value)) for name, value in report.machine.items()]
    here += [(name, str(value)) for name, value in report.versions.items()]
    parts: list[Part] = [TablePart(("model", "folder"), models)] if models else []
    parts += [TablePart(("", ""), here)] if here else []
    parts.append(TextPart(as_json(report.config), "The whole configuration"))
    if report.before:
        text = f"The last of {counted(len(report.before) + 1, 'merge')} of one file: {', '.join(report.before)}."
        parts.insert(0, NotePart("Before it:", text))
    return Section("What it was made of", parts=parts)


def _tensor_counts(facts: Facts) -> str:
    if facts.report.tensors is not None:
        copied = sum(bool(each.copied) for each in facts.report.tensors.values())
        return f"{len(facts.report.tensors) - copied:,} merged" + (f", {copied:,} copied" if copied else "")
    counts = facts.report.plan.get("tensors")
    return ", ".join(f"{n:,} {what}" for what, n in counts.items()) if isinstance(counts, dict) else "unknown"


def _marks(values: Mapping[str, float], *, column: int) -> dict[tuple[int, int], Mark]:
    """Highlights the row of the value that stands out, if there is one."""
    found = stands_out(values, factor=FACTOR)
    return {(list(values).index(found), column): "bad"} if found is not None else {}


def _percent(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {row: {name: 100 * value for name, value in own.items()} for row, own in values.items()}


def _plain(blocks: Sequence[str]) -> list[str]:
    """Numbers of blocks where all are of one stack, else their names."""
    stacks = {block.rpartition(".")[0] for block in blocks}
    return [block.rpartition(".")[2] for block in blocks] if len(stacks) == 1 else list(blocks)


def _by_kind(facts: Facts) -> dict[str, dict[str, float]]:
    """The worst condition by block and by what shares a Gram; numbers, such as those of experts, count as one kind."""
    found: dict[str, dict[str, float]] = {}
    leaders = {each.shares_gram_with for _, each in facts.linears.values()}
    joins = len(leaders) > _MAX_COLUMNS
    for block, each in facts.linears.values():
        if each.condition is not None and block != HEAD:
            kind = _NUMBER.sub("*", each.shares_gram_with) if joins else each.shares_gram_with
            own = found.setdefault(block, {})
            own[kind] = max(each.condition, own.get(kind, 0.0))
    return found


def _worst(facts: Facts) -> list[tuple[str, Linear]]:
    def order(item: tuple[str, Linear]) -> tuple[bool, float]:
        return not item[1].fallbacks, -(item[1].condition if item[1].condition is not None else float("inf"))

    return sorted(((name, each) for name, (_, each) in facts.linears.items()), key=order)[:_MAX_WORST]


def _linear_row(name: str, each: Linear, *, with_shrinkage: bool) -> tuple[Cell, ...]:
    numbers: list[Cell] = [f"{value:.1e}" if value is not None else None for value in (each.condition, each.residual)]
    tokens = int(sum(each.tokens.values())) if each.tokens else None
    inputs = each.shape[1] if len(each.shape) == 2 else None
    row = (name, *numbers, words(each.solver), "; ".join(each.fallbacks), tokens, inputs, each.num_dead_features)
    return (*row, each.shrinkage) if with_shrinkage else row


def _subspaces(facts: Facts) -> Section:
    """Shows the scales of layers, and the linears with the fewest directions and the largest scales."""
    parts: list[Part] = []
    scales: dict[str, dict[str, float]] = {}
    for name, (block, each) in facts.linears.items():
        if each.layer_scale is not None:
            path = _NUMBER.sub("*", name.removesuffix(".weight").partition(f"{block}.")[2])
            own = scales.setdefault(block, {})
            own[path] = max(each.layer_scale, own.get(path, 0.0))
    if any(scale not in (0, 1) for own in scales.values() for scale in own.values()):
        chart = charts.heatmap(scales, title="Scale of the merged task vectors, by block", unit="scale", log=True)
        caption = "The square of each norm over the mean of its kind of layer. Where there are several, the largest."
        parts.append(ChartPart(chart, caption))

    def order(item: tuple[str, Linear]) -> tuple[float, float]:
        fewest = min(item[1].directions.values()) / max(1, item[1].directions_wanted)
        return fewest, -(item[1].layer_scale or 0.0)

    columns = ("linear", "scale", "norm of the merged task vector", "directions of each", "fewest found", "tokens")
    linears = sorted(((name, each) for name, (_, each) in facts.linears.items()), key=order)[:_MAX_WORST]
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            *(
                f"{value:.3g}" if value is not None else None
                for value in (each.layer_scale, each.merged_task_vector_norm)
            ),
            each.directions_wanted,
            min(each.directions.values()),
            int(sum(each.tokens.values())) if each.tokens else None,
        )
        for name, each in linears
    ]
    parts.append(TablePart(columns, rows, "Linears with the fewest directions, and with the largest scales."))
    return Section("Essential subspaces", "", parts)


def _spans(facts: Facts) -> dict[str, list[tuple[float, float]]]:
    """Begins and ends of each stage, those of the longest stages; near ones are joined."""
    report = facts.report
    end = report.seconds.total or (report.timeline[-1][0] if report.timeline else 0.0)
    points = [(at, words(stage)) for at, stage, _ in report.timeline]
    if not points:
        return {}
    if points[0][0] > 0:
        points.insert(0, (0.0, "preparation"))
    ends = [*(at for at, _ in points[1:]), max(end, points[-1][0])]
    found: dict[str, list[tuple[float, float]]] = {}
    for (at, stage), until in zip(points, ends, strict=True):
        own = found.setdefault(stage, [])
        if own and at - own[-1][1] <= end * _MAX_GAP:
            own[-1] = (own[-1][0], until)
        else:
            own.append((at, until))
    longest = sorted(found, key=lambda stage: -sum(b - a for a, b in found[stage]))[:_MAX_STAGES]
    return {stage: own for stage, own in found.items() if stage in longest}


def _largest_stages(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Seconds by block of the stages that take longest; the others go together."""
    total: Counter[str] = Counter()
    for own in seconds.values():
        total.update(own)
    kept = [stage for stage, _ in total.most_common(_MAX_STAGES)]
    rest = {block: sum(value for stage, value in own.items() if stage not in kept) for block, own in seconds.items()}
    return {
        block: {stage: own[stage] for stage in kept if stage in own}
        | ({"others": rest[block]} if any(rest.values()) else {})
        for block, own in seconds.items()
    }


def _plan_and_measured(facts: Facts) -> TablePart:
    rows: list[tuple[Cell, ...]] = []
    marks: dict[tuple[int, int], Mark] = {}
    for name, planned, measured in facts.memory:
        if planned or measured:
            if planned and measured > planned:
                marks[len(rows), 2] = "bad"
            rows.append((f"peak memory, {name}", gib(planned), gib(measured), _share(planned, measured)))
    for name, key, found in (
        ("read", "bytes_read", facts.report.bytes_read),
        ("written", "bytes_written", facts.report.bytes_written),
    ):
        forecast = facts.report.plan.get(key)
        if isinstance(forecast, int) and found is not None:
            rows.append((name, gib(forecast), gib(found), _share(forecast, found)))
    estimate, seconds = facts.report.plan.get("seconds"), facts.report.seconds.total
    total = estimate.get("total") if isinstance(estimate, dict) else None
    if seconds is not None:
        expected = total if isinstance(total, int | float) else None
        told = duration(expected) if expected is not None else "not estimated: largemerge plan does"
        rows.append(("time", told, duration(seconds), _share(expected, seconds)))
    return TablePart(("", "planned", "measured", "of the plan"), rows, "The plan beside what was measured.", marks)


def _share(planned: float | None, measured: float) -> str | None:
    return f"{measured / planned:.0%}" if planned else None


def _cell(key: str, value: object) -> Cell:
    """A value of a report as a cell: bytes and seconds with their units."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        is_bytes = "bytes" in key or key in ("host_anonymous", "host_total", "device")
        return gib(value) if is_bytes else duration(value) if "seconds" in key else value
    return None if value is None else str(value)


def _folder(entry: object) -> str:
    return str(entry.get("folder", "")) if isinstance(entry, dict) else ""


def _scores_in(value: object, name: str) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Yields all numbers by model and task in what strangers have written, wherever they are, with their names."""
    if not isinstance(value, Mapping) or not value:
        return
    if all(isinstance(own, Mapping) and own and all(map(_is_score, own.values())) for own in value.values()):
        scores = {model: {task: float(each) for task, each in own.items()} for model, own in value.items()}
        if any(map(math.isfinite, (each for own in scores.values() for each in own.values()))):
            yield name, scores
        return
    for key, inside in value.items():
        yield from _scores_in(inside, words(key))


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
