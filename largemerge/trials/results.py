"""What a comparison found: every trial with its scores, and which is the best."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from largemerge.evaluation.results import Evaluation, Score, number_text
from largemerge.streams import plain_text
from largemerge.trials.settings import Range
from largemerge.units import duration

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TrialResult:
    """What one trial came to.

    Attributes:
        name: Its name, that of its model in the evaluation, too.
        method: The method.
        settings: What was set, by name.
        objective: The number that trials are compared by; `None` where the trial failed, or has none.
        merge_seconds: Seconds of the merge.
        evaluate_seconds: Seconds of the evaluation.
        error: Why it failed, or cannot be compared; empty otherwise.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    objective: float | None
    merge_seconds: float
    evaluate_seconds: float
    error: str = ""


@dataclass(frozen=True)
class CompareReport:
    """Trials, their scores beside those of the models that were merged, and the best.

    Attributes:
        trials: All trials, in order.
        evaluation: Scores of base, candidates, experts and all trials.
        objective: What trials are compared by, in words.
        higher_is_better: Whether more of it is better.
        best_config: The best trial's configuration, as a YAML file; empty where all have failed.
        shared_seconds: Seconds of what was done once for several trials, such as collecting Gram matrices.
        seconds: Seconds in all.
        searched: Ranges that were searched, by setting.
        notes: What a user should know.
    """

    trials: tuple[TrialResult, ...]
    evaluation: Evaluation
    objective: str
    higher_is_better: bool
    best_config: str
    shared_seconds: float
    seconds: float
    searched: Mapping[str, Range] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> TrialResult | None:
        """The best trial; the first of those that tie."""
        return best_of(self.trials, self.higher_is_better)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why trials, or tasks, failed."""
        failed = tuple(f"{trial.name}: {trial.error}" for trial in self.trials if trial.error)
        return (*failed, *self.evaluation.problems)

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        best = self.best
        return {
            "objective": self.objective,
            "higher_is_better": self.higher_is_better,
            "best": best.name if best is not None else None,
            "searched": {key: vars(limits) for key, limits in self.searched.items()},
            "trials": [vars(trial) for trial in self.trials],
            "shared_seconds": round(self.shared_seconds, 3),
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            "evaluation": self.evaluation.to_json(),
        }

    def _scores(self, trial: TrialResult) -> list[Score | None]:
        """What a trial reached in every task; `None` where it failed before that."""
        found = {score.task: score for score in self.evaluation.scores if score.model == trial.name}
        return [found.get(task.name) for task in self.evaluation.tasks]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The table of trials, the best first: columns and rows."""
        tasks = self.evaluation.tasks
        columns = ["trial", self.objective, *(f"{task.name}\n{task.metric}" for task in tasks), "merge", "evaluation"]
        sign = -1 if self.higher_is_better else 1
        ordered = sorted(self.trials, key=lambda trial: (trial.objective is None, sign * (trial.objective or 0.0)))
        rows = []
        for trial in ordered:
            scores = self._scores(trial)
            cells = [
                number_text(score.value, task) if score is not None and score.value is not None else "failed"
                for score, task in zip(scores, tasks, strict=True)
            ]
            objective = f"{trial.objective:.4f}" if trial.objective is not None else "failed"
            times = [duration(trial.merge_seconds), duration(trial.evaluate_seconds)]
            rows.append([trial.name, objective, *cells, *times])
        return columns, rows

    def csv(self) -> str:
        """The trials as CSV, a row for each."""
        settings = list(dict.fromkeys(key for trial in self.trials for key in trial.settings))
        tasks = self.evaluation.tasks
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ["trial", "method", *settings, "objective", *(f"{task.name} {task.metric}" for task in tasks)]
        writer.writerow([*head, "merge_seconds", "evaluate_seconds", "error"])
        for trial in self.trials:
            scores = self._scores(trial)
            values = ["" if score is None or score.value is None else score.value for score in scores]
            own = [trial.settings.get(key, "") for key in settings]
            objective = "" if trial.objective is None else trial.objective
            times = [round(trial.merge_seconds, 3), round(trial.evaluate_seconds, 3)]
            writer.writerow([trial.name, trial.method, *own, objective, *values, *times, trial.error])
        return text.getvalue()

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows the models, then the trials, the best first."""
        from rich.table import Table

        models = [model for model in self.evaluation.models if model.role != "merge"]
        if models:
            from dataclasses import replace

            replace(self.evaluation, models=tuple(models), notes=()).print(console)
        columns, rows = self.rows()
        direction = "more" if self.higher_is_better else "less"
        table = Table(title="Trials", caption=f"{direction} is better; {duration(self.seconds)} in all")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        best = self.best
        for row in rows:
            table.add_row(*row, style="green" if best is not None and row[0] == best.name else None)
        console.print(table)
        for problem in self.problems:
            console.print(f"failed: {problem}", highlight=False, soft_wrap=True)
        for note in self.notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)

    def _repr_html_(self) -> str:
        """The table of trials as HTML, for notebooks."""
        from html import escape

        columns, rows = self.rows()
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def best_of(trials: Sequence[TrialResult], higher_is_better: bool) -> TrialResult | None:
    """Returns the best of some trials, the first of those that tie; `None` where none has an objective."""
    done = [trial for trial in trials if trial.objective is not None]
    sign = 1 if higher_is_better else -1
    return max(done, key=lambda trial: sign * (trial.objective or 0.0)) if done else None
