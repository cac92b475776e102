"""Tasks of EleutherAI's lm-eval, by its Python API, on a model's folder as it lies there.

lm-eval loads the model itself, whole, by Transformers. What it reports is taken as it is: the metric that counts, its
standard error, and all others.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from largemerge.config_file import nearest
from largemerge.errors import ConfigError
from largemerge.evaluation.config import EvaluationConfig, HarnessTask
from largemerge.evaluation.models import ModelFiles

_HALF = 1.96
"""Standard errors to each side of a 95 % interval."""


def check_harness(tasks: Sequence[HarnessTask]) -> None:
    """Checks that lm-eval is installed, and knows the tasks.

    Raises:
        ConfigError: If it is not, or does not.
    """
    names = ", ".join(task.name for task in tasks)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"task {names}: kind lm_eval needs EleutherAI's lm-eval; pip install 'largemerge[lm-eval]'")
    manager = _manager(tasks)
    known = set(manager.all_tasks)
    problems = [
        f"task {task.name!r}: lm-eval has no task {each!r}{nearest(each, known)}; expected one of its own, or the path "
        "of a YAML file"
        for task in tasks
        for each in task.tasks
        if _name(each) not in known
    ]
    problems += [
        f"task {task.name!r}: {each} runs what a model writes, as code on this machine; expected 'run_code: true', if "
        "you want that"
        for task in tasks
        for each in task.tasks
        if not task.run_code and _name(each) in known and runs_code(manager, _name(each))
    ]
    if problems:
        raise ConfigError(*problems)


def runs_code(manager: Any, task: str) -> bool:
    """Whether a task's file, or one that it includes, says `unsafe_code: true`."""
    path = getattr(manager.task_index.get(task), "yaml_path", None)
    while path is not None and Path(path).is_file():
        text = Path(path).read_text(encoding="utf-8")
        if re.search(r"^unsafe_code:\s*[Tt]rue", text, re.MULTILINE):
            return True
        included = re.search(r"^include:\s*['\"]?([^'\"\s#]+)", text, re.MULTILINE)
        path = Path(path).parent / included[1] if included is not None else None
    return False


def _manager(tasks: Sequence[HarnessTask]) -> Any:
    """lm-eval's list of tasks, with those in the folders of the user's own files."""
    from lm_eval.tasks import TaskManager

    folders = {str(Path(name).parent) for task in tasks for name in task.tasks if Path(name).is_file()}
    return TaskManager(include_path=sorted(folders) or None)


def _name(task: str) -> str:
    """The name by which lm-eval knows a task: of a file, what stands after `task:`."""
    if not Path(task).is_file():
        return task
    found = re.search(r"^task:\s*['\"]?([^'\"\s#]+)", Path(task).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found is not None else task


def run_harness(
    task: HarnessTask, config: EvaluationConfig, files: ModelFiles, device: torch.device
) -> tuple[dict[str, float], int, float | None]:
    """Runs tasks of lm-eval.

    Returns:
        Metrics, the one that counts first, the mean over its tasks; the number of samples; and half of the interval.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    options: dict[str, Any] = {
        "pretrained": str(files.checkpoint.folder),
        "dtype": str(files.compute_dtype).removeprefix("torch."),
        "device": str(device),
        "batch_size": task.batch_size or config.batch_size,
        "trust_remote_code": files.trust_remote_code,
    }
    if files.adapter is not None:
        options["peft"] = str(files.adapter.folders[0])
    names = [_name(each) for each in task.tasks]
    if task.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # which the metric that runs code asks for, beside lm-eval itself
    results = lm_eval.simple_evaluate(
        model=HFLM(**options),
        tasks=names,
        task_manager=_manager([task]),
        num_fewshot=task.num_fewshot,
        limit=task.limit,
        confirm_run_unsafe_code=task.run_code,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    return read_results(task, names, results)


def read_results(
    task: HarnessTask, names: Sequence[str], results: Mapping[str, Any]
) -> tuple[dict[str, float], int, float | None]:
    """Reads what lm-eval reports of some of its tasks, by their names.

    Raises:
        ConfigError: If a task does not report the metric that is asked for.
    """
    values: dict[str, float] = {}
    chosen: list[float] = []
    errors: list[float] = []
    for name in names:
        reported = results["results"][name]
        numbers = {
            key.split(",")[0]: float(value)
            for key, value in reported.items()
            if isinstance(value, int | float) and not key.split(",")[0].endswith("_stderr") and key != "alias"
        }
        metric = task.metric or next(iter(numbers), "")
        if metric not in numbers:
            raise ConfigError(f"task {task.name!r}: {name} reports {sorted(numbers)}, and no {metric!r}")
        chosen.append(numbers[metric])
        error = next((v for k, v in reported.items() if k.split(",")[0] == f"{metric}_stderr"), None)
        if isinstance(error, int | float):
            errors.append(float(error))
        values |= {f"{name} {key}": value for key, value in numbers.items()}
    count = sum(int(results.get("n-samples", {}).get(name, {}).get("effective", 0)) for name in names)
    half = _HALF * sum(error**2 for error in errors) ** 0.5 / len(errors) if len(errors) == len(chosen) else None
    return {task.metric or "score": sum(chosen) / len(chosen), **values}, count, half
