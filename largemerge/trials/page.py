"""A comparison as one HTML page: the trials, the best first, what each setting does, the scores of all models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from largemerge.checkpoint.writer import write_atomically
from largemerge.evaluation.page import evaluation_sections
from largemerge.pages.charts import lines
from largemerge.pages.page import ChartPart, NotePart, Page, Section, TablePart
from largemerge.text_files import json_text
from largemerge.trials.results import CompareReport
from largemerge.units import counted, duration


def comparison_page(report: CompareReport) -> str:
    """Makes the page of a comparison."""
    best = report.best
    summary = f"{counted(len(report.trials), 'trial')} in {duration(report.seconds)}."
    summary += f" The best is {best.name}, with {report.objective} {best.objective:.4f}." if best is not None else ""
    return Page("Comparison", summary, tuple(_sections(report))).html()


def write_comparison(report: CompareReport, folder: Path) -> None:
    """Writes `comparison.json`, `.csv` and `.html`, and `best.yaml`, into a folder."""
    write_atomically(folder / "comparison.json", json_text(report.to_json(), indent=2) + "\n")
    write_atomically(folder / "comparison.csv", report.csv())
    write_atomically(folder / "comparison.html", comparison_page(report))
    if report.best_config:
        write_atomically(folder / "best.yaml", report.best_config)


def _sections(report: CompareReport) -> Iterator[Section]:
    columns, rows = report.rows()
    direction = "More" if report.higher_is_better else "Less"
    notes = [NotePart("Failed", problem) for problem in report.problems]
    notes += [NotePart("Note", note) for note in report.notes]
    heads = [column.replace("\n", ", ") for column in columns]
    yield Section("Trials", f"The best first. {direction} is better.", (TablePart(heads, rows), *notes))
    charts = [part for key in report.searched for part in _points(report, key)]
    if charts:
        ranges = ", ".join(f"{key} from {each.low:g} to {each.high:g}" for key, each in report.searched.items())
        how = "optuna proposes each trial from what those before have come to."
        yield Section("Search", f"{ranges}. {how}", (*_progress(report), *charts))
    charts = [part for key in _numbers(report) for part in _curves(report, key)]
    if charts:
        yield Section("Settings", "What each setting does, all others as they were in the same trial.", tuple(charts))
    yield from evaluation_sections(report.evaluation)


def _numbers(report: CompareReport) -> list[str]:
    """Settings that are swept, are numbers, and have more than one value."""
    keys = dict.fromkeys(key for trial in report.trials for key in trial.settings if key not in report.searched)
    found = []
    for key in keys:
        values = [trial.settings[key] for trial in report.trials if key in trial.settings]
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            continue
        if len(set(values)) > 1:
            found.append(key)
    return found


def _curves(report: CompareReport, key: str) -> Iterator[ChartPart]:
    """Yields the chart of one setting: a line for every method and all other settings."""
    series: dict[str, list[tuple[float, float]]] = {}
    for trial in report.trials:
        if key in trial.settings and trial.objective is not None:
            others = [f"{name}={value}" for name, value in trial.settings.items() if name != key]
            place = " ".join([trial.method, *others])
            series.setdefault(place, []).append((float(trial.settings[key]), trial.objective))
    series = {name: sorted(points) for name, points in series.items() if len(points) > 1}
    if series:
        chart = lines(series, title=key, x_label=key, y_label=report.objective)
        yield ChartPart(chart, f"{report.objective} by {key}.")


def _progress(report: CompareReport) -> Iterator[ChartPart]:
    """Yields the chart of the objective, trial after trial."""
    found = [
        (float(number), trial.objective)
        for number, trial in enumerate(report.trials, 1)
        if trial.objective is not None and any(key in report.searched for key in trial.settings)
    ]
    if found:
        best = itertools.accumulate((y for _, y in found), max if report.higher_is_better else min)
        series = {"the best so far": list(zip((x for x, _ in found), best, strict=True))}
        yield ChartPart(
            lines(series, title="the best so far", x_label="trial", y_label=report.objective, from_zero=False),
            f"{report.objective} of the best trial so far.",
        )


def _points(report: CompareReport, key: str) -> Iterator[ChartPart]:
    """Yields the chart of one setting that was searched: a point for every trial, whatever its other settings."""
    series: dict[str, list[tuple[float, float]]] = {}
    for trial in report.trials:
        if key in trial.settings and trial.objective is not None:
            others = [f"{name}={value}" for name, value in trial.settings.items() if name not in report.searched]
            point = (float(trial.settings[key]), trial.objective)
            series.setdefault(" ".join([trial.method, *others]), []).append(point)
    if series:
        log = report.searched[key].log
        name = report.objective
        chart = lines(series, title=key, x_label=key, y_label=name, log_x=log, joined=False, from_zero=False)
        yield ChartPart(chart, f"{report.objective} by {key}, a point for every trial.")
