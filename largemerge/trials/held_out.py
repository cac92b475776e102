"""An evaluation without test data: texts of the calibration data that calibration does not draw.

Calibration draws `num_samples` rows by a seeded permutation; the task of each model takes the rows that come next in
the same permutation. Where calibration packs texts, so does the task, and takes the samples that come next in the same
stream of tokens. The loss on them is held against that of the model itself, which is the expert of its own data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from largemerge.calibration.config import CalibrationConfig
from largemerge.errors import ConfigError
from largemerge.evaluation.config import EvaluationConfig, LanguageModelTask, load_evaluation
from largemerge.regression.config import MergeConfig

_HELD_OUT = ", held out"
_TEXTS = ("text_field", "text_template", "messages_field", "target_field", "loss_mask_field")


def held_out_tasks(config: MergeConfig, num_samples: int = 64, largest: int | None = None) -> EvaluationConfig:
    """Makes the tasks: the loss of each candidate's own kind of text.

    Args:
        config: The merge.
        num_samples: Samples of each task, at most.
        largest: Most calibration samples that any trial draws; `None` where all draw those of the configuration.

    Raises:
        ConfigError: If a candidate has no such data.
    """
    problems = [
        f"{candidate.label}: has no calibration texts to hold some out of; expected an EVAL.yaml"
        for candidate in config.models
        if candidate.calibration is None or candidate.calibration.data is None
    ]
    if problems:
        raise ConfigError(*problems)
    tasks = []
    for candidate in config.models:
        assert candidate.calibration is not None
        calibration = candidate.calibration.model_copy(update={} if largest is None else {"num_samples": largest})
        tasks.append(_task(candidate.label, candidate.model, calibration, num_samples))
    return load_evaluation({"tasks": tasks, "trust_remote_code": config.trust_remote_code})


def in_words_of_calibration(problems: Sequence[str], tasks: EvaluationConfig) -> list[str]:
    """Says what a user has set, who has written no task: the samples of calibration in place of a task's `skip`.

    Args:
        problems: What is wrong, as an evaluation tells it.
        tasks: The tasks, from `held_out_tasks`.
    """
    found: list[str] = []
    for problem in problems:
        for task in tasks.tasks:
            assert isinstance(task, LanguageModelTask)
            if f"'skip: {task.skip}'" in problem and task.data in problem:
                problem = (
                    f"{task.data}: calibration draws {task.skip} samples, which uses all of the data and leaves none "
                    "to measure; expected a lower 'num_samples' of calibration, more data, or an EVAL.yaml"
                )
            elif problem.startswith(f"task {task.name!r}") and "no output embeddings" in problem:
                problem = (
                    f"{task.name.removesuffix(_HELD_OUT)}: no evaluation: calibration data is held out for language "
                    "models alone; expected an EVAL.yaml"
                )
        found.append(problem)
    return list(dict.fromkeys(found))


def _task(name: str, expert: str, calibration: CalibrationConfig, num_samples: int) -> dict[str, Any]:
    keys = (
        "data",
        "subset",
        "split",
        "only",
        "seed",
        "batch_size",
        "max_length",
        "one_per",
        "assistant_only",
        "pack",
        *_TEXTS,
    )
    settings = {key: value for key in keys if (value := getattr(calibration, key)) is not None}
    drawn = calibration.num_samples
    return {
        "name": f"{name}{_HELD_OUT}",
        "kind": "language_model",
        "expert": expert,
        "skip": drawn,
        "num_samples": num_samples,
        **settings,
    }
