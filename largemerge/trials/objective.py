"""What trials are compared by: the mean share of the experts' scores, or the mean score itself.

With an expert for every task, a trial's objective is the mean over T tasks of `score / expert's score` (of the
expert's loss over the trial's, where less is better); more is better. Without, it is the mean score, which needs tasks
of one metric. It is chosen before the first model is measured, and never changes after: what has no such number has
none, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from largemerge.errors import ConfigError, LargemergeError
from largemerge.evaluation.config import EvaluationConfig
from largemerge.evaluation.prepare import Job, headline_metric
from largemerge.evaluation.results import EvaluatedTask, Evaluation


@dataclass(frozen=True)
class Objective:
    """What trials are compared by.

    Attributes:
        name: What it is called in tables.
        higher_is_better: Whether more of it is better.
        of_experts: Whether it is the mean share of the experts' scores.
    """

    name: str
    higher_is_better: bool
    of_experts: bool

    def check_experts(self, measured: Evaluation) -> None:
        """Refuses experts of whose scores there are no shares, before the first trial is merged.

        Raises:
            LargemergeError: If an expert failed, or has a score of zero or below; with all of them.
        """
        problems = [
            problem for task in measured.tasks if self.of_experts for problem in _expert_problems(measured, task)
        ]
        if problems:
            raise LargemergeError(*problems)

    def of(self, evaluation: Evaluation, trial: str) -> tuple[float | None, str]:
        """Computes the objective of a trial.

        Args:
            evaluation: Scores of the trial beside those of the experts.
            trial: Its name.

        Returns:
            The objective, or `None`; then why there is none, else an empty text.
        """
        values: list[float] = []
        lacking: list[str] = []
        for task in evaluation.tasks:
            score = evaluation.score(trial, task.name)
            if score is None or score.value is None:
                lacking.append(f"failed in {task.name}")
                continue
            value = score.normalized if self.of_experts else score.value
            if value is None or not math.isfinite(value):
                lacking.append(f"has no share of the expert's score in {task.name}")
            else:
                values.append(value)
        if lacking:
            return None, f"cannot be compared: {', '.join(lacking)}"
        return sum(values) / len(values), ""


def choose_objective(tasks: EvaluationConfig, jobs: Sequence[Job]) -> Objective:
    """Chooses what trials are compared by, from the tasks alone.

    Args:
        tasks: The evaluation.
        jobs: Its tasks, prepared.

    Raises:
        ConfigError: If tasks have no common scale.
    """
    if all(task.expert is not None for task in tasks.tasks):
        return Objective("of the experts", higher_is_better=True, of_experts=True)
    metrics = {job.task.name: (headline_metric(job), _better(job)) for job in jobs}
    unmeasured = [task.name for task in tasks.tasks if task.name not in metrics]
    if unmeasured:
        raise ConfigError(
            f"tasks: {', '.join(unmeasured)}: no model has the head that it names, so that it is not known how trials "
            "compare in it; expected 'expert' with the model whose head it is"
        )
    if len(set(metrics.values())) > 1:
        names = ", ".join(f"{task.name} ({metrics[task.name][0]})" for task in tasks.tasks if task.expert is None)
        raise ConfigError(
            f"tasks: {names} have no common scale, by which trials could be compared; expected 'expert' for each task, "
            "so that scores are shares of the experts'"
        )
    ((metric, better),) = set(metrics.values())
    return Objective(metric, better == "higher", of_experts=False)


def _better(job: Job) -> str:
    return job.prepared.metrics[0].better if job.prepared is not None else "higher"


def _expert_problems(measured: Evaluation, task: EvaluatedTask) -> Iterator[str]:
    """Yields why there are no shares of the score of a task's expert."""
    score = measured.score(task.expert or "", task.name)
    begin = f"task {task.name!r}: its expert {task.expert}"
    end = "; trials cannot be compared by shares of its score: expected another 'expert'"
    if score is None or score.value is None:
        yield f"{begin} failed{f' ({score.error})' if score is not None and score.error else ''}{end}"
    elif score.value <= 0:
        found = f"reaches {score.value:.4g} in {task.metric}, of which there are no shares"
        yield f"{begin} {found}{end}, none for any task, or more samples"
