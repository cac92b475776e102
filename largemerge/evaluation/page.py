"""An evaluation as one HTML page, without outside requests: the table, bars, a radar, what each task is.

The sections are for other pages, too, such as that of a merge.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from largemerge.checkpoint.writer import write_atomically
from largemerge.evaluation.results import EvaluatedTask, Evaluation, Score, number_text
from largemerge.pages.charts import bars, radar
from largemerge.pages.page import Cell, ChartPart, NotePart, Page, Section, TablePart
from largemerge.text_files import json_text
from largemerge.units import counted, duration

_FILES = ("evaluation.json", "evaluation.csv", "evaluation.html")
_FEWEST_SPOKES = 3
_MOST_EXPERTS = 3
_EACH_EXPERT = "each expert at its own task"


def evaluation_page(evaluation: Evaluation) -> str:
    """Makes the page of an evaluation."""
    tasks, models = counted(len(evaluation.tasks), "task"), counted(len(evaluation.models), "model")
    summary = f"{models} in {tasks}, measured in {duration(evaluation.seconds)}."
    return Page("Evaluation", summary, tuple(evaluation_sections(evaluation))).html()


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes `evaluation.json`, `.csv` and `.html` into a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = (json_text(evaluation.to_json(), indent=2) + "\n", evaluation.csv(), evaluation_page(evaluation))
    for name, text in zip(_FILES, texts, strict=True):
        write_atomically(folder / name, text)


def written_before(folder: Path) -> list[str]:
    """Lists what lies in a folder under the names of the files that `write_evaluation` writes."""
    return [name for name in _FILES if os.path.lexists(folder / name)]


def evaluation_sections(evaluation: Evaluation) -> Iterator[Section]:
    """Yields the sections of an evaluation: scores, pictures, tasks."""
    problems = [NotePart("Failed", problem) for problem in evaluation.problems]
    notes = [NotePart("Note", note) for note in evaluation.notes]
    yield Section("Scores", _explained(evaluation), (_scores(evaluation), *problems, *notes))
    yield from _pictures(evaluation)
    yield Section("Tasks", "What was measured, on how many samples, and how.", (_tasks(evaluation),))


def _scores(evaluation: Evaluation) -> TablePart:
    """The table of scores; tasks are its rows where there are more tasks than models."""
    columns, rows = evaluation.rows()
    heads = [column.replace("\n", ", ") for column in columns]
    if len(evaluation.tasks) <= len(evaluation.models):
        return TablePart(heads, rows)
    turned = [[head, *(row[number] for row in rows)] for number, head in enumerate(heads) if number]
    return TablePart(["task", *(row[0] for row in rows)], turned)


def _explained(evaluation: Evaluation) -> str:
    parts = []
    if any(score.interval for score in evaluation.scores):
        confidence = float(evaluation.settings.get("confidence", 0.95))
        parts.append(f"After ± stands half of the {confidence:.0%} bootstrap interval.")
    lower = [task.name for task in evaluation.tasks if task.better == "lower"]
    if lower:
        parts.append(f"Less is better in {', '.join(lower)}.")
    if any(score.normalized is not None for score in evaluation.scores):
        parts.append("At the end stands the mean share of what each task's own expert reaches.")
    if evaluation.published:
        parts.append("Rows with (published) are what others have measured, and are cited by the evaluation.")
    return " ".join(parts)


def _pictures(evaluation: Evaluation) -> Iterator[Section]:
    """Yields charts: of shares of the experts' scores where there are experts, else of metrics that have one scale."""
    shown = _shown(evaluation)
    normalized = {
        label: {
            task.name: 100 * score.normalized
            for task in evaluation.tasks
            if (score := _score(evaluation, name(task), task)) is not None and score.normalized is not None
        }
        for label, name in shown.items()
    }
    normalized = {name: values for name, values in normalized.items() if values}
    if normalized:
        parts = [
            ChartPart(
                bars(normalized, title="Share of the expert's score", unit="%"), "100 % is the task's own expert."
            )
        ]
        if len(evaluation.tasks) >= _FEWEST_SPOKES:
            whole = {name: values for name, values in normalized.items() if len(values) == len(evaluation.tasks)}
            if whole:
                chart = radar(whole, title="Share of the expert's score", unit="%")
                parts.append(ChartPart(chart, "The same as a shape: dents are tasks that a model has lost."))
        yield Section("Beside the experts", "", tuple(parts))
    for metric in dict.fromkeys(task.metric for task in evaluation.tasks):
        tasks = [task for task in evaluation.tasks if task.metric == metric]
        values, intervals = _values(evaluation, tasks)
        if values:
            unit = "%" if tasks[0].is_share else ""
            direction = "more is better" if tasks[0].better == "higher" else "less is better"
            chart = bars(values, title=f"{metric}, {direction}", unit=unit, intervals=intervals)
            yield Section(metric.capitalize(), "", (ChartPart(chart, "Whiskers are bootstrap intervals."),))


def _shown(evaluation: Evaluation) -> dict[str, Callable[[EvaluatedTask], str | None]]:
    """What pictures show: every model, or where many of them are experts, each of these at its own task alone."""
    experts = {task.expert for task in evaluation.tasks if task.expert is not None}
    others = [model.name for model in evaluation.models if model.name not in experts]
    names = others if others and len(experts) > _MOST_EXPERTS else [model.name for model in evaluation.models]
    shown: dict[str, Callable[[EvaluatedTask], str | None]] = {name: partial(_always, name) for name in names}
    if len(names) < len(evaluation.models):
        shown = {_EACH_EXPERT: lambda task: task.expert, **shown}
    return shown


def _always(name: str, task: EvaluatedTask) -> str:
    """The same model, whatever the task."""
    return name


def _score(evaluation: Evaluation, model: str | None, task: EvaluatedTask) -> Score | None:
    """The score of a model; `None` where a task has no expert, or where the model was not measured there."""
    return evaluation.score(model, task.name) if model is not None else None


def _values(
    evaluation: Evaluation, tasks: list[EvaluatedTask]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, tuple[float, float]]]]:
    values: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for label, name in _shown(evaluation).items():
        for task in tasks:
            score = _score(evaluation, name(task), task)
            if score is None or score.value is None:
                continue
            factor = 100 if task.is_share else 1
            values.setdefault(label, {})[task.name] = factor * score.value
            if score.interval is not None:
                low, high = score.interval
                intervals.setdefault(label, {})[task.name] = factor * low, factor * high
    return values, intervals


def _tasks(evaluation: Evaluation) -> TablePart:
    rows: list[list[Cell]] = []
    for task in evaluation.tasks:
        own = [score for score in evaluation.scores if score.task == task.name]
        samples = max((score.num_samples for score in own), default=0)
        ways = ", ".join(dict.fromkeys(score.way for score in own if score.way))
        seconds = sum(score.seconds for score in own)
        others = sorted({name for score in own for name in list(score.metrics)[1:]})
        best = [
            f"{name} " + " / ".join(number_text(score.metrics[name], task) for score in own if name in score.metrics)
            for name in others[:3]
        ]
        row: list[Cell] = [
            task.name,
            task.kind,
            task.metric,
            task.expert or "",
            samples,
            duration(seconds),
            ways,
            "; ".join(best),
        ]
        rows.append(row)
    columns = ["task", "kind", "metric", "expert", "samples", "time", "models were run", "other metrics, by model"]
    return TablePart(columns, rows)
