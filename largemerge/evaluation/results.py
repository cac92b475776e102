"""What an evaluation found: typed, printed as a table, written as JSON, CSV, pictures and a page.

Scores are shown as they are, and beside those of the task's own expert: `normalized` is the share of the expert's
score that a model reaches (of the expert's loss over the model's, where less is better). `forgetting` is by how much a
model is worse than the base, never below zero; `closed` how far it has come from the base to the expert. Averages that
others have published, where the evaluation cites some, stand below the averages that were found.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from largemerge.config_file import nearest
from largemerge.errors import LargemergeError
from largemerge.streams import plain_text
from largemerge.units import duration

if TYPE_CHECKING:
    from rich.console import Console

Role = Literal["base", "candidate", "expert", "merge", "model"]
"""What a model is in an evaluation."""
_EXPERTS = "each task's expert"


@dataclass(frozen=True)
class Score:
    """What one model reaches in one task.

    Attributes:
        task: Name of the task.
        model: Name of the model.
        metrics: Values by metric; the first is the one that counts. Empty where the task failed.
        interval: Bootstrap interval of the first metric; `None` where there is none.
        num_samples: Samples that were scored.
        seconds: Seconds that the task took with this model.
        way: Whether the model was run whole or block by block.
        error: Why the task failed with this model; empty if it did not.
        normalized: Share of the score of the task's expert; `None` without one.
        forgetting: By how much the base is better; `None` without a base.
        closed: How far the way from the base to the expert has been gone; `None` without either.
    """

    task: str
    model: str
    metrics: Mapping[str, float]
    interval: tuple[float, float] | None = None
    num_samples: int = 0
    seconds: float = 0.0
    way: str = ""
    error: str = ""
    normalized: float | None = None
    forgetting: float | None = None
    closed: float | None = None

    @property
    def value(self) -> float | None:
        """The metric that counts; `None` where the task failed."""
        return next(iter(self.metrics.values()), None)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of an evaluation.

    Attributes:
        name: Name that is shown.
        reference: Where it lies.
        role: What it is.
    """

    name: str
    reference: str
    role: Role


@dataclass(frozen=True)
class EvaluatedTask:
    """A task of an evaluation.

    Attributes:
        name: Its name.
        kind: Its kind.
        metric: The metric that counts.
        better: Whether higher or lower is better.
        is_share: Whether the metric is a share, shown in percent.
        expert: Name of the model that was tuned for it; `None` if none was named.
    """

    name: str
    kind: str
    metric: str
    better: Literal["higher", "lower"]
    is_share: bool
    expert: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of models in tasks.

    Attributes:
        tasks: The tasks, in order.
        models: The models, in order.
        scores: What each model reached in each task that it was measured in.
        settings: The evaluation as it was configured.
        versions: Versions of libraries.
        machine: The machine.
        seconds: Seconds in all.
        notes: What a user should know.
    """

    tasks: tuple[EvaluatedTask, ...]
    models: tuple[EvaluatedModel, ...]
    scores: tuple[Score, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Why tasks failed; empty if none did."""
        return tuple(f"task {score.task!r}, {score.model}: {score.error}" for score in self.scores if score.error)

    def score(self, model: str, task: str) -> Score | None:
        """What a model reached in a task; `None` if it was not measured there.

        Raises:
            LargemergeError: If there is no such model, or no such task.
        """
        _check_known("model", model, [each.name for each in self.models])
        _check_known("task", task, [each.name for each in self.tasks])
        return self._found(model, task)

    def _found(self, model: str | None, task: str) -> Score | None:
        return next((each for each in self.scores if (each.model, each.task) == (model, task)), None)

    def average(self, model: str) -> float | None:
        """Mean normalised score of a model over all tasks; where there are no experts, of the scores themselves.

        Returns:
            The mean; `None` where the model lacks a task, or tasks have no common scale.

        Raises:
            LargemergeError: If there is no such model.
        """
        _check_known("model", model, [each.name for each in self.models])
        if not any(task.expert is not None for task in self.tasks):
            return self.mean(model)
        scores = [self.score(model, task.name) for task in self.tasks]
        shares = [each.normalized for each in scores if each is not None and each.normalized is not None]
        return sum(shares) / len(shares) if len(shares) == len(self.tasks) else None

    def mean(self, model: str | None) -> float | None:
        """Mean score of a model over all tasks, or of each task's own expert where `model` is `None`.

        Returns:
            The mean; `None` where a score is missing, or tasks have no common scale.

        Raises:
            LargemergeError: If there is no such model.
        """
        if model is not None:
            _check_known("model", model, [each.name for each in self.models])
        scores = [self._found(model or task.expert, task.name) for task in self.tasks]
        values = [each.value if each is not None else None for each in scores]
        if len({(task.metric, task.better) for task in self.tasks}) > 1 or any(value is None for value in values):
            return None
        return sum(value or 0.0 for value in values) / len(values)

    @property
    def published(self) -> dict[str, float]:
        """Averages that others have published, by whose they are, on the scale of the metric."""
        scale = 100 if self.tasks[0].is_share else 1
        return {name: float(value) / scale for name, value in self.settings.get("published", {}).items()}

    def to_json(self) -> dict[str, Any]:
        """The evaluation as plain JSON values."""
        return {
            "tasks": [vars(task) for task in self.tasks],
            "models": [
                {**vars(model), "average": self.average(model.name), "mean": self.mean(model.name)}
                for model in self.models
            ],
            "published": self.published,
            "scores": [
                {**vars(score), "metrics": dict(score.metrics), "interval": list(score.interval or ()) or None}
                for score in self.scores
            ],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Evaluation:
        """Makes an evaluation of what `to_json` has returned."""
        return cls(
            tasks=tuple(EvaluatedTask(**task) for task in raw["tasks"]),
            models=tuple(
                EvaluatedModel(**{key: value for key, value in model.items() if key not in ("average", "mean")})
                for model in raw["models"]
            ),
            scores=tuple(
                Score(**{**score, "interval": tuple(score["interval"]) if score["interval"] else None})
                for score in raw["scores"]
            ),
            settings=raw["settings"],
            versions=raw["versions"],
            machine=raw["machine"],
            seconds=raw["seconds"],
            notes=tuple(raw["notes"]),
        )

    def csv(self) -> str:
        """The scores as CSV, a row for each model, task and metric."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = (
            "model",
            "role",
            "task",
            "metric",
            "value",
            "low",
            "high",
            "samples",
            "normalized",
            "forgetting",
            "closed",
        )
        writer.writerow((*head, "seconds", "error"))
        roles = {model.name: model.role for model in self.models}
        for score in self.scores:
            for number, (metric, value) in enumerate(score.metrics.items() or (("", math.nan),)):
                low, high = score.interval if score.interval is not None and number == 0 else ("", "")
                first = (score.normalized, score.forgetting, score.closed) if number == 0 else (None, None, None)
                more = ["" if each is None else each for each in first]
                shown = "" if math.isnan(value) else value
                row = [score.model, roles[score.model], score.task, metric, shown, low, high, score.num_samples]
                writer.writerow([*row, *more, round(score.seconds, 3), score.error])
        for name, role, mean in self._means():
            writer.writerow([name, role, "", f"mean {self.tasks[0].metric}", mean, *[""] * 8])
        return text.getvalue()

    def _means(self) -> Iterator[tuple[str, str, float]]:
        """Yields mean scores where some are published: of models, of the tasks' own experts, and the published ones."""
        if not self.published:
            return
        found = [(model.name, str(model.role), self.mean(model.name)) for model in self.models]
        for name, role, mean in [*found, (_EXPERTS, "experts", self.mean(None))]:
            if mean is not None:
                yield name, role, mean
        for name, mean in self.published.items():
            yield name, "published", mean

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The table: its columns, and a row for each model; below them, averages that others have published."""
        has_average = any(self.average(model.name) is not None for model in self.models)
        normalized = any(score.normalized is not None for score in self.scores)
        columns = ["model", *(f"{task.name}\n{task.metric}{' %' if task.is_share else ''}" for task in self.tasks)]
        means = {(name, role): self._shown_mean(mean) for name, role, mean in self._means()}
        columns += ["mean %" if self.tasks[0].is_share else "mean"] if means else []
        has_average = has_average and (normalized or not means)  # else it is the mean
        columns += ["of the experts' %" if normalized else "average"] if has_average else []
        rows = []
        for model in self.models:
            name = model.name if model.role in ("candidate", "model") else f"{model.name} ({model.role})"
            cells = [self._cell(model.name, task) for task in self.tasks]
            average = self.average(model.name)
            last = [means.get((model.name, model.role), "")] if means else []
            last += [self._shown_average(average, normalized)] if has_average else []
            rows.append([name, *cells, *last])
        for (name, role), mean in means.items():
            if role in ("experts", "published"):
                cells = [self._cell(task.expert, task) if role == "experts" else "" for task in self.tasks]
                own = name if role == "experts" else f"{name} (published)"
                rows.append([own, *cells, mean, *[""] * has_average])
        return columns, rows

    def _shown_mean(self, mean: float) -> str:
        return f"{100 * mean:.1f}" if self.tasks[0].is_share else f"{mean:.3f}"

    def _shown_average(self, average: float | None, normalized: bool) -> str:
        if average is None:
            return ""
        return f"{100 * average:.1f}" if normalized or self.tasks[0].is_share else f"{average:.3f}"

    def _cell(self, model: str | None, task: EvaluatedTask) -> str:
        score = self._found(model, task.name)
        if score is None:
            return ""
        if score.value is None:
            return "failed"
        shown = number_text(score.value, task)
        if score.interval is not None:
            low, high = score.interval
            shown += f" ±{number_text((high - low) / 2, task)}"
        return shown

    def __str__(self) -> str:
        """The table as plain text, as the command prints it."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows the scores as a table."""
        from rich.table import Table

        columns, rows = self.rows()
        best = self._best()
        table = Table(title="Evaluation", caption=self._caption())
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row, model in itertools.zip_longest(rows, self.models):
            style = "green" if model is not None and model.role == "merge" else "dim" if model is None else None
            marked = [
                f"{cell} ←"
                if model is not None
                and 0 < number <= len(self.tasks)
                and model.name in best[self.tasks[number - 1].name]
                else cell
                for number, cell in enumerate(row)
            ]
            table.add_row(*marked, style=style)
        console.print(table)
        for problem in self.problems:
            console.print(f"failed: {problem}", highlight=False, soft_wrap=True)
        for note in self.notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)

    def _best(self) -> dict[str, set[str]]:
        """Names of the best models but a task's own expert, by task: all that are shown alike, none where all are."""
        shown = {model.name for model in self.models}
        found: dict[str, set[str]] = {}
        for task in self.tasks:
            values = {
                score.model: score.value
                for score in self.scores
                if score.task == task.name and score.value is not None and score.model in shown - {task.expert}
            }
            best = (max if task.better == "higher" else min)(values.values(), default=0.0)
            names = {name for name, value in values.items() if number_text(value, task) == number_text(best, task)}
            found[task.name] = names if len(names) < len(values) else set()
        return found

    def _caption(self) -> str:
        confidence = self.settings.get("confidence", 0.95)
        lower = [task.name for task in self.tasks if task.better == "lower"]
        parts = [f"± half of the {confidence:.0%} bootstrap interval"] if any(s.interval for s in self.scores) else []
        parts += [f"less is better in {', '.join(lower)}"] if lower else []
        parts += ["← the best that is not the task's expert"] if any(self._best().values()) else []
        parts += ["published: as others have measured it"] if self.published else []
        return "; ".join([*parts, duration(self.seconds)])

    def _repr_html_(self) -> str:
        """The table as HTML, for notebooks."""
        from html import escape

        columns, rows = self.rows()
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        failed = "".join(f"<p>failed: {escape(problem)}</p>" for problem in self.problems)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{failed}"


def _check_known(what: str, name: str, known: Sequence[str]) -> None:
    """Refuses names that nothing in an evaluation has.

    Raises:
        LargemergeError: If the name is none of those that are known.
    """
    if name not in known:
        raise LargemergeError(f"no {what} {name!r}; the {what}s are {', '.join(known)}{nearest(name, known)}")


def number_text(value: float, task: EvaluatedTask) -> str:
    """Formats a value of a task's metric."""
    return f"{100 * value:.1f}" if task.is_share else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def held_against(scores: Sequence[Score], tasks: Sequence[EvaluatedTask], base: str | None) -> Iterator[Score]:
    """Yields scores with what they are beside those of the experts and the base."""
    from dataclasses import replace

    values = {(score.model, score.task): score.value for score in scores}
    by_name = {task.name: task for task in tasks}
    for score in scores:
        task = by_name[score.task]
        value = score.value
        expert = values.get((task.expert, task.name)) if task.expert is not None else None
        before = values.get((base, task.name)) if base is not None else None
        if value is None:
            yield score
            continue
        sign = 1.0 if task.better == "higher" else -1.0
        normalized = _ratio(value, expert) if sign > 0 else _ratio(expert, value)
        forgetting = max(0.0, sign * (before - value)) if before is not None else None
        closed = None
        if before is not None and expert is not None and expert != before:
            closed = (value - before) / (expert - before) + 0.0  # no negative zero
        yield replace(score, normalized=normalized, forgetting=forgetting, closed=closed)


def _ratio(value: float | None, of: float | None) -> float | None:
    """A share; `None` where the whole is not above zero, or the part below, of which it would say nothing."""
    return value / of if value is not None and of is not None and of > 0 and value >= 0 else None
