"""The configuration of an evaluation, EVAL.yaml: tasks, each with its data, as strict, typed models.

    tasks:
      - {name: german, kind: language_model, data: german.jsonl, text_field: text, expert: ./expert-german}
      - {name: digits, kind: image_classification, data: ./digits, label_field: label}

Data is named as for calibration, and drawn and tokenised by the same code. Every mistake in a file is reported at once,
an unknown key with the nearest right one. `load_evaluation` is the way in; paths come out absolute.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from largemerge.calibration.config import CalibrationConfig, Template
from largemerge.checkpoint.locate import Reference, absolute_reference
from largemerge.config_file import (
    LARGEST_COUNT,
    LARGEST_SEED,
    DtypeName,
    Regex,
    Size,
    Strict,
    Truth,
    check_source,
    explain,
    grouped,
    nearest,
    read_known,
    read_yaml,
    shown,
    to_json,
    without_helpers,
)
from largemerge.errors import ConfigError

_TEST = re.compile(r"(?<![a-z])test(?![a-z])", re.IGNORECASE)
"""Matches names of files and folders that `datasets` takes for a test split."""


class TaskData(Strict):
    """What every task has that reads data: where it lies, and how many samples of it are taken."""

    name: str = Field(min_length=1)
    """Unique name of the task."""
    data: str = Field(min_length=1)
    """A .jsonl, .json, .csv, .parquet or .txt file, a folder of images or data files, or a Hub dataset id."""
    subset: str | None = None
    """Configuration name of a Hub dataset."""
    split: str | None = Field(None, min_length=1)
    """Split of a dataset, or a folder of this name in one of images; default: `test` of a dataset, all of a file."""
    only: dict[str, str | int | bool] | None = Field(None, min_length=1)
    """Rows that are drawn from: those whose columns have these values; default: all."""
    num_samples: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    """Samples that are drawn; default: all there are."""
    skip: int = Field(0, ge=0, le=LARGEST_COUNT)
    """Samples that are passed over, in the order in which calibration with the same `seed` draws them: with its
    `num_samples` here, a task sees none of its samples."""
    batch_size: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    expert: Reference | None = None
    """The model that was tuned for this task: what scores are held against."""

    def calibration(self, defaults: EvaluationConfig, **fields: Any) -> CalibrationConfig:
        """Returns the settings that the readers of calibration data understand.

        Args:
            defaults: The evaluation, whose numbers stand for those that the task does not set.
            fields: Names of columns, and what else is said of texts.
        """
        inside = _folder_of_split(self.data, self.split)
        data, split = (self.data, self.split or _default_split(self.data)) if inside is None else (inside, "train")
        return CalibrationConfig(
            data=data,
            subset=self.subset,
            split=split,
            only=self.only,
            num_samples=min(LARGEST_COUNT, self.skip + (self.num_samples or defaults.num_samples or LARGEST_COUNT)),
            batch_size=self.batch_size or defaults.batch_size,
            max_length=fields.pop("max_length", None) or defaults.max_length,
            seed=defaults.seed if self.seed is None else self.seed,
            **fields,
        )


def _folder_of_split(data: str, split: str | None) -> str | None:
    """The folder that is a split of a folder of images, whatever lies beside it, for here it is named.

    Returns:
        The folder; `None` where no split is named, or there is no such folder.
    """
    from largemerge.calibration.folders import SPLITS, is_image_folder

    folder = Path(data)
    if split not in SPLITS or not is_image_folder(folder) or not is_image_folder(folder / split):
        return None
    return str(folder / split)


def _default_split(data: str) -> str:
    """The split that is measured where none is named: `test` where there is one, all of a file or of a folder else."""
    from largemerge.calibration.folders import is_image_folder, visible_under

    path = Path(data)
    if path.is_file() or (path.is_dir() and is_image_folder(path)):
        return "train"
    if path.is_dir():
        names = (part for file in visible_under(path) for part in file.relative_to(path).parts)
        return "test" if any(_TEST.search(name) for name in names) else "train"
    return "test"


class LanguageModelTask(TaskData):
    """Loss, perplexity and accuracy of the next token, over the tokens that count."""

    kind: Literal["language_model"]
    max_length: int | None = Field(None, ge=2, le=LARGEST_COUNT)
    text_field: str | None = None
    text_template: Template | None = None
    messages_field: str | None = None
    target_field: str | None = None
    loss_mask_field: str | None = None
    assistant_only: bool = False
    one_per: Literal["document", "line"] = "document"
    pack: bool = False


class MultipleChoiceTask(TaskData):
    """The answer that a language model finds likeliest, out of several."""

    kind: Literal["multiple_choice"]
    max_length: int | None = Field(None, ge=2, le=LARGEST_COUNT)
    prompt: Template
    """Template of what stands before the answer, from columns: `"Question: {question}\\nAnswer:"`."""
    choices_field: str | None = None
    """Column with the list of answers."""
    choices: tuple[str, ...] | None = Field(None, min_length=2)
    """The answers, where they are the same for all samples."""
    answer_field: str = "answer"
    """Column with the right answer: its number from 0, its letter (A, B, …), or its text."""
    separator: str = " "
    """Text between prompt and answer."""


class GenerationTask(TaskData):
    """The answer that a language model writes, held against the right one."""

    kind: Literal["generation"]
    max_length: int | None = Field(None, ge=2, le=LARGEST_COUNT)
    prompt: Template | None = None
    """Template of the prompt, from columns."""
    messages_field: str | None = None
    """Column with chat messages that end where the assistant is to answer."""
    answer_field: str = "answer"
    """Column with the right answer, or a list of right ones."""
    max_new_tokens: int = Field(64, ge=1, le=LARGEST_COUNT)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts at which the answer ends."""
    extract: Regex | None = None
    """Regex whose first group, or whole match, is the answer, in what is written and in the data; the last match."""
    ignore_case: bool = False


class Corruption(Strict):
    """How clean images are corrupted; see `corruption.py`."""

    kind: Literal[
        "contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "spatter"
    ]
    severity: int = Field(5, ge=1, le=5)
    """From 1, hardly to be seen, to 5."""


def _named_corruption(value: object) -> object:
    """A corruption that is given by its kind alone."""
    return {"kind": value} if isinstance(value, str) else value


CorruptionKey = Annotated[Corruption | None, pydantic.BeforeValidator(_named_corruption)]
"""A corruption, by its kind or with its severity."""


class ImageClassificationTask(TaskData):
    """The label that a model's own head gives to an image."""

    kind: Literal["image_classification"]
    image_field: str | None = None
    corruption: CorruptionKey = None
    """Corruption of the images, which are clean in the data."""
    label_field: str = "label"
    """Column with the label: a number, or a name of the model's; images in folders have those of their folders."""
    head: str | None = Field(None, min_length=1)
    """File of a head that a merge has kept apart, or the name of one in the `heads` of the model's folder."""


class ZeroShotTask(TaskData):
    """Images classified by the texts that name their classes, with a CLIP model."""

    kind: Literal["zero_shot"]
    image_field: str | None = None
    corruption: CorruptionKey = None
    """Corruption of the images, which are clean in the data."""
    label_field: str = "label"
    classes: str = Field(min_length=1)
    """Class names and templates: the name of a packaged file, such as `mnist`, or a YAML file of your own."""
    templates: tuple[str, ...] | None = Field(None, min_length=1)
    """Templates in the place of the file's, with `{}` for the class name."""
    text_model: Reference | None = None
    """The CLIP model with the text tower and both projections, for models that are a vision tower alone."""


class TextClassificationTask(TaskData):
    """The label that a model's head gives to a text, or to a pair of texts."""

    kind: Literal["text_classification"]
    max_length: int | None = Field(None, ge=2, le=LARGEST_COUNT)
    text_field: str | None = None
    pair_field: str | None = None
    """Column with the second text of a pair."""
    label_field: str = "label"
    head: str | None = Field(None, min_length=1)
    """File of a head that a merge has kept apart, or the name of one in the `heads` of the model's folder."""
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman"] = "accuracy"
    """`f1` is the macro average; `pearson` and `spearman` are for a head with one output."""


Pooling = Literal["auto", "mean", "cls", "last"]
"""How a sentence's vector is made of those of its tokens; `auto`: as the folder's `modules.json` says."""


class RetrievalTask(TaskData):
    """For every query, its own passage among all passages, by the cosine of their vectors."""

    kind: Literal["retrieval"]
    max_length: int | None = Field(None, ge=2, le=LARGEST_COUNT)
    query_field: str = "query"
    passage_field: str = "passage"
    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Pooling = "auto"


class SimilarityTask(TaskData):
    """How well the cosine of two sentences agrees with people's scores."""

    kind: Literal["similarity"]
    max_length: int | None = Field(None, ge=2, le=LARGEST_COUNT)
    first_field: str = "sentence1"
    second_field: str = "sentence2"
    score_field: str = "score"
    pooling: Pooling = "auto"


class HarnessTask(Strict):
    """Tasks of EleutherAI's lm-eval, by its Python API."""

    kind: Literal["lm_eval"]
    name: str = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of its tasks, or paths of YAML files of your own."""
    metric: str | None = None
    """The metric that counts; default: the first that each task reports."""
    num_fewshot: int | None = Field(None, ge=0)
    limit: int | None = Field(None, ge=1)
    """Samples of each task, at most."""
    batch_size: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    run_code: Truth = False
    """Allow tasks that run what a model writes on this machine, such as HumanEval and MBPP."""
    expert: Reference | None = None


Task = Annotated[
    LanguageModelTask
    | MultipleChoiceTask
    | GenerationTask
    | ImageClassificationTask
    | ZeroShotTask
    | TextClassificationTask
    | RetrievalTask
    | SimilarityTask
    | HarnessTask,
    Field(discriminator="kind"),
]
"""A task of any kind."""

KINDS: Mapping[str, type[Strict]] = {
    "language_model": LanguageModelTask,
    "multiple_choice": MultipleChoiceTask,
    "generation": GenerationTask,
    "image_classification": ImageClassificationTask,
    "zero_shot": ZeroShotTask,
    "text_classification": TextClassificationTask,
    "retrieval": RetrievalTask,
    "similarity": SimilarityTask,
    "lm_eval": HarnessTask,
}
"""The kinds of tasks, by name."""


class EvaluationMemory(Strict):
    """How much an evaluation may hold; a model that does not fit is run block by block."""

    device: Size | None = None
    """Maximum memory on the accelerator; default: what is free."""
    host: Size | None = None
    """Maximum anonymous memory of the process, libraries included; default: what is free."""
    disk: str | None = Field(None, min_length=1)
    """Folder for hidden states that do not fit into memory; default: the system's for temporary files."""


class EvaluationConfig(Strict):
    """An evaluation: what is measured, on how much data, with how much memory."""

    tasks: tuple[Task, ...] = Field(min_length=1)
    base: Reference | None = None
    """The model that all were tuned from: what was there before, and may have been forgotten."""
    num_samples: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    """Samples of each task; default: all there are."""
    max_length: int = Field(2048, ge=2, le=LARGEST_COUNT)
    """Tokens at which texts are truncated."""
    batch_size: int = Field(8, ge=1, le=LARGEST_COUNT)
    """Samples in one forward pass."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Seed that draws samples, and resamples them for intervals."""
    confidence: float = Field(0.95, ge=0.5, lt=1)
    """Of the bootstrap intervals."""
    resamples: int = Field(1000, ge=0, le=100_000)
    """Bootstrap resamples; 0 for no intervals."""
    compute_dtype: DtypeName | None = None
    """Dtype of the forward passes; default: that of most of a model's weights."""
    published: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """Averages over all tasks that others have published, by whose they are, as they are printed (percent, where tasks
    are measured in shares): shown below those that are found."""
    memory: EvaluationMemory = EvaluationMemory()
    trust_remote_code: Truth = False
    """Allow models and tokenizers to be code that they ship."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(task.name for task in self.tasks)

    def with_limits(
        self, samples: int | None, *, host: object = None, device: object = None, disk: str | Path | None = None
    ) -> EvaluationConfig:
        """A copy with other limits; `None` leaves what is configured.

        Args:
            samples: Samples of each task, at most.
            host: Maximum of anonymous memory of the process, in bytes.
            device: Maximum of memory on the accelerator, in bytes.
            disk: Folder for hidden states that do not fit into memory.
        """
        memory = {"host": host, "device": device, "disk": str(disk) if disk is not None else None}
        changed = {name: value for name, value in memory.items() if value is not None}
        config = self.model_copy(update={"memory": self.memory.model_copy(update=changed)})
        if samples is None:
            return config
        return config.model_copy(update={"tasks": tuple(_at_most(task, samples, self) for task in self.tasks)})


def _at_most(task: Any, samples: int, config: EvaluationConfig) -> Any:
    """A copy of a task with a limit of samples."""
    if isinstance(task, HarnessTask):
        return task.model_copy(update={"limit": min(samples, task.limit or samples)})
    return task.model_copy(update={"num_samples": min(samples, task.num_samples or config.num_samples or samples)})


def load_evaluation(source: str | Path | Mapping[str, Any] | EvaluationConfig) -> EvaluationConfig:
    """Reads and checks an evaluation.

    Args:
        source: The path of a YAML file, or a mapping like it; relative paths are looked up beside the file first, then
            in the working directory.

    Raises:
        ConfigError: If there are mistakes; it names all of them.
    """
    if isinstance(source, EvaluationConfig):
        return source
    check_source(source)
    raw: Mapping[str, Any] = source if isinstance(source, Mapping) else read_yaml(Path(source), "'tasks'")
    raw = without_helpers(raw, EvaluationConfig.model_fields)
    problems = [*_top_problems(raw), *_task_problems(raw.get("tasks")), *_alike_names(raw.get("tasks"))]
    config, unread = read_known(EvaluationConfig, raw)
    problems += _misfits(config) if config is not None else [] if problems else unread
    if config is None or problems:
        raise ConfigError(*grouped(problems))
    beside = [] if isinstance(source, Mapping) else [Path(source).resolve().parent]
    return _absolute(config, [*beside, Path.cwd()])


def _top_problems(raw: Mapping[str, Any]) -> list[str]:
    """Lists what is wrong with the keys of the evaluation itself."""
    placeholder = {"name": "task", "kind": "lm_eval", "tasks": ["task"]}
    tasks = raw.get("tasks")
    known = [placeholder] if isinstance(tasks, list | tuple) and tasks else tasks
    try:
        EvaluationConfig.model_validate_json(to_json({**raw, **({"tasks": known} if "tasks" in raw else {})}))
    except pydantic.ValidationError as error:
        return explain(error, EvaluationConfig)
    return []


def _task_problems(tasks: object) -> Iterator[str]:
    """Yields what is wrong with each task, by its number."""
    for index, task in enumerate(tasks if isinstance(tasks, list | tuple) else ()):
        if not isinstance(task, Mapping):
            yield f"tasks[{index}]: expected keys such as 'name', 'kind' and 'data', found {shown(task)}"
            continue
        kind = task.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            found = "none" if kind is None else shown(kind)
            hint = nearest(kind, KINDS) if isinstance(kind, str) else ""
            yield f"tasks[{index}].kind: expected one of {', '.join(KINDS)}, found {found}{hint}"
            continue
        try:
            KINDS[kind].model_validate_json(to_json(task))
        except pydantic.ValidationError as error:
            yield from (f"tasks[{index}].{problem}" for problem in explain(error, KINDS[kind]))


def _alike_names(tasks: object) -> Iterator[str]:
    """Yields names that several tasks have."""
    names = [
        task.get("name") for task in (tasks if isinstance(tasks, list | tuple) else ()) if isinstance(task, Mapping)
    ]
    for name, count in Counter(name for name in names if isinstance(name, str)).items():
        if count > 1:
            yield f"tasks: {count} are called {name!r}; expected names of their own"


def _misfits(config: EvaluationConfig) -> Iterator[str]:
    """Yields settings that do not fit together."""
    for task in config.tasks:
        if isinstance(task, MultipleChoiceTask) and (task.choices is None) == (task.choices_field is None):
            yield f"task {task.name!r}: expected either 'choices' or 'choices_field'"
        length = getattr(task, "max_length", None) or config.max_length
        if isinstance(task, GenerationTask) and task.max_new_tokens >= length:
            yield (
                f"task {task.name!r}: max_new_tokens is {task.max_new_tokens}, which leaves nothing of max_length "
                f"({length}) for the prompt; expected fewer, or a larger max_length"
            )
        if isinstance(task, GenerationTask) and (task.prompt is None) == (task.messages_field is None):
            yield f"task {task.name!r}: expected either 'prompt' or 'messages_field'"


def _absolute(config: EvaluationConfig, folders: Sequence[Path]) -> EvaluationConfig:
    """A copy with every local path absolute, each found in the first folder that has it."""

    def path(text: str) -> str:
        inside = (folder / os.path.expanduser(text) for folder in folders)
        return next((str(each) for each in inside if os.path.lexists(each)), text)

    def file(name: str) -> str:
        """The path of a file; what is a folder, or is not there, is a name: a model's folder may be called so, too."""
        return path(name) if os.path.isfile(path(name)) else name

    def with_paths(part: Any, keys: Sequence[str], references: Sequence[str] = ()) -> Any:
        found: dict[str, Any] = {key: path(text) for key in keys if (text := getattr(part, key, None)) is not None}
        found |= {key: file(text) for key in ("head", "classes") if (text := getattr(part, key, None)) is not None}
        found |= {
            key: absolute_reference(text, folders)
            for key in references
            if (text := getattr(part, key, None)) is not None
        }
        if isinstance(part, HarnessTask):
            found["tasks"] = tuple(map(file, part.tasks))
        return part.model_copy(update=found)

    tasks = tuple(with_paths(each, ("data",), ("expert", "text_model")) for each in config.tasks)
    memory = with_paths(config.memory, ("disk",))
    whole: EvaluationConfig = with_paths(config.model_copy(update={"tasks": tasks, "memory": memory}), (), ("base",))
    return whole
