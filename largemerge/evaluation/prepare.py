"""Prepares an evaluation: models opened, tasks' data read, and both held against each other, before any weight is read.

    EVAL.yaml, models ──► files opened ──► every task prepared for every model ──► classes opened ──► Jobs

Whatever is wrong with models, data and tasks is told here, for all of them at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from largemerge.calibration.batches import CalibrationSet, ForwardSignature
from largemerge.checkpoint.side_files import HEADS_FOLDER
from largemerge.checkpoint.tensor_info import torch_dtype
from largemerge.config_file import shown
from largemerge.errors import ConfigError, LargemergeError
from largemerge.evaluation.classification import Shared, image_classification, text_classification, zero_shot
from largemerge.evaluation.config import (
    EvaluationConfig,
    GenerationTask,
    HarnessTask,
    ImageClassificationTask,
    LanguageModelTask,
    MultipleChoiceTask,
    RetrievalTask,
    SimilarityTask,
    Task,
    TextClassificationTask,
    ZeroShotTask,
)
from largemerge.evaluation.corruption import check_corruptions, with_corruption
from largemerge.evaluation.embeddings import retrieval, similarity
from largemerge.evaluation.harness import check_harness
from largemerge.evaluation.language import generation, language_model, multiple_choice
from largemerge.evaluation.models import ModelFiles, OpenedModel, as_body, open_files, with_head
from largemerge.evaluation.results import EvaluatedModel
from largemerge.evaluation.task import Prepared, Samples
from largemerge.heads import head_file
from largemerge.model.fake_forward import placeholder_tokens
from largemerge.model.signature import forward_signature, id_problems
from largemerge.progress import stage


def name_models(models: str | Path | Sequence[str | Path] | Mapping[str, str | Path]) -> list[EvaluatedModel]:
    """Names models by the last part of what they are called, with as much before it as tells them apart.

    Args:
        models: Folders or Hub ids, or one; or those by names.

    Raises:
        ConfigError: If there is none, or one stands twice, or is no folder or Hub id.
    """
    if isinstance(models, str | Path):
        models = [models]
    if not isinstance(models, Mapping | Iterable):
        raise ConfigError(f"models: expected folders or Hub ids, found {shown(models)}")
    if not isinstance(models, Mapping):
        models = list(models)
    given = models.values() if isinstance(models, Mapping) else models
    wrong = [each for each in given if not isinstance(each, str | Path) or not str(each)]
    if wrong:
        raise ConfigError(*(f"models: expected a folder or Hub id, found {shown(each)}" for each in wrong))
    if isinstance(models, Mapping):
        return [EvaluatedModel(name, str(reference), "model") for name, reference in models.items()]
    references = [str(model).rstrip("/") or str(model) for model in models]
    twice = [place for place, count in Counter(map(_place, references)).items() if count > 1]
    if twice:
        raise ConfigError(*(f"{place}: stands twice among the models; expected it once" for place in twice))
    if not references:
        raise ConfigError("no models; expected folders or Hub ids")
    parts = [reference.split("/") for reference in references]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return [EvaluatedModel(name, reference, "model") for name, reference in zip(names, references, strict=True)]


@dataclass(frozen=True)
class Job:
    """One task with one model.

    Attributes:
        model: The model.
        task: The task.
        files: The model's files.
        prepared: The task, ready to be run; `None` for tasks of lm-eval, which loads the model itself.
        opened: The class of the model as the task sees it; `None` likewise.
        first: The class of the model of the pass that has to come first, if there is one.
    """

    model: EvaluatedModel
    task: Task
    files: ModelFiles
    prepared: Prepared | None
    opened: OpenedModel | None
    first: OpenedModel | None = None


@dataclass(frozen=True)
class Preparation:
    """What is to be run.

    Attributes:
        jobs: Every task with every model that it is measured with.
        notes: What a user should know.
    """

    jobs: tuple[Job, ...]
    notes: tuple[str, ...]


def prepare(config: EvaluationConfig, models: Sequence[EvaluatedModel]) -> Preparation:
    """Opens all models, and prepares all tasks for them.

    Args:
        config: The evaluation.
        models: The models that were named; the base, and experts that are not among them, are added.

    Raises:
        LargemergeError: If models, data and tasks do not fit together, with all problems.
    """
    stage("reading the headers of all models")
    wanted = _with_others(config, models)
    problems: list[str] = []
    files: dict[str, ModelFiles] = {}
    lenders: dict[str, ModelFiles] = {}
    dtype = torch_dtype(config.compute_dtype) if config.compute_dtype is not None else None
    options: dict[str, Any] = {"compute_dtype": dtype, "trust_remote_code": config.trust_remote_code}

    def attempt(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except LargemergeError as error:
            problems.extend(error.problems)
            return None

    for model, _ in wanted:
        opened = attempt(open_files, model.reference, model.name, **options)
        if opened is not None:
            files[model.name] = opened
    for task in config.tasks:
        reference = getattr(task, "text_model", None)
        if reference is not None and reference not in lenders:
            found = attempt(open_files, reference, reference, **options)
            if found is not None:
                lenders[reference] = found
    if any(isinstance(task, HarnessTask) for task in config.tasks):
        attempt(check_harness, [task for task in config.tasks if isinstance(task, HarnessTask)])
    if with_corruption(config.tasks):
        attempt(check_corruptions, config.tasks)
    stage("reading the data of all tasks")
    base = next((files.get(model.name) for model, _ in wanted if model.role == "base"), None)
    jobs: list[Job] = []
    notes: list[str] = []
    opened_views: dict[str, OpenedModel] = {}
    shared = Shared(lambda view: _opened(view, opened_views))
    for model, tasks in wanted:
        if model.name not in files:
            continue  # what is wrong with it is told with all else
        own = files[model.name]
        own = replace(own, fallbacks={} if base is None else {base.name: base.checkpoint.folder})
        for task in tasks:
            if (lacking := _without_the_head(task, own, model)) is not None:
                if expert_among(task, [each for each, _ in wanted]) is not model:
                    notes.append(f"task {task.name!r}: {model.name} {lacking}; it is not measured there")
                    continue
                if _is_classifier(own):
                    task = task.model_copy(update={"head": None})
            job = attempt(_job, config, model, task, own, lenders, shared)
            jobs += [job] if job is not None else []
    metrics = sorted({headline_metric(job) for job in jobs})
    if config.published and len(metrics) > 1:
        problems.append(
            f"published: averages need tasks of one metric, found {', '.join(metrics)}; leave out 'published', or give "
            "tasks of one metric a file of their own"
        )
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return Preparation(tuple(jobs), (*notes, *_notes_of(jobs)))


def _notes_of(jobs: Sequence[Job]) -> list[str]:
    """Gathers what is to be known of samples; what holds for several models is said once."""
    measured = Counter(job.task.name for job in jobs)
    lent: dict[str, list[str]] = {}
    cut: dict[tuple[str, str], list[str]] = {}
    for job in jobs:
        if job.prepared is None:
            continue
        first = job.prepared.first
        for samples in (job.prepared.samples, *([first.samples] if first is not None else [])):
            if samples.lent and job.model.name not in lent.setdefault(samples.lent, []):
                lent[samples.lent].append(job.model.name)
            for note in samples.notes:
                cut.setdefault((job.task.name, note), []).append(job.model.name)
    notes = [f"{', '.join(names)}: {note}" for note, names in lent.items()]
    for (task, note), names in cut.items():
        whose = f", {', '.join(names)}" if len(names) < measured[task] else ""
        notes.append(f"task {task!r}{whose}: {note}")
    return notes


def _without_the_head(task: Task, files: ModelFiles, model: EvaluatedModel) -> str | None:
    """Says what a model has in place of a kept head that a task names.

    Returns:
        What it has; `None` where the model has the head, any model can be given it, or it is a merge that was named to
        be measured, of which the head is expected.
    """
    head = getattr(task, "head", None)
    if head is None or Path(head).is_file() or (files.checkpoint.root / head_file(head)).is_file():
        return None
    if (files.checkpoint.root / HEADS_FOLDER).is_dir() and model.role not in ("base", "candidate", "expert"):
        return None
    return "has a head of its own, not the one that is named" if _is_classifier(files) else f"has no head {head!r}"


def _is_classifier(files: ModelFiles) -> bool:
    return any("Classification" in name for name in files.checkpoint.config.get("architectures") or ())


def headline_metric(job: Job) -> str:
    """Name of the metric that counts in a task."""
    if job.prepared is not None:
        return job.prepared.metrics[0].name
    assert isinstance(job.task, HarnessTask)
    return job.task.metric or "score"


def _with_others(
    config: EvaluationConfig, models: Sequence[EvaluatedModel]
) -> list[tuple[EvaluatedModel, tuple[Task, ...]]]:
    """All models with their tasks: those that were named, the base, and experts, each with its own tasks alone."""
    known = {_place(model.reference): model for model in models}
    wanted = [(model, config.tasks) for model in models]
    if config.base is not None:
        found = known.get(_place(config.base))
        if found is None:
            base = EvaluatedModel(_free_name("base", known.values()), config.base, "base")
            known[_place(config.base)] = base
            wanted.insert(0, (base, config.tasks))
        else:
            wanted = [(replace(model, role="base") if model is found else model, tasks) for model, tasks in wanted]
            known = {_place(model.reference): model for model, _ in wanted}
    experts: dict[str, list[Task]] = {}
    for task in config.tasks:
        if task.expert is not None and expert_among(task, list(known.values())) is None:
            experts.setdefault(task.expert, []).append(task)
    for reference, tasks in experts.items():
        name = _free_name(reference.rstrip("/").rsplit("/", 1)[-1], known.values())
        known[_place(reference)] = expert = EvaluatedModel(name, reference, "expert")
        wanted.append((expert, tuple(tasks)))
    return wanted


def expert_among(task: Task, models: Sequence[EvaluatedModel]) -> EvaluatedModel | None:
    """The model that a task names as its expert, by its place or its name."""
    if task.expert is None:
        return None
    by_place = next((model for model in models if _place(model.reference) == _place(str(task.expert))), None)
    return by_place or next((model for model in models if model.name == task.expert), None)


def _place(reference: str) -> str:
    return str(Path(reference).resolve()) if Path(reference).is_dir() else reference


def _free_name(name: str, models: Any) -> str:
    taken = {model.name for model in models}
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(each for each in numbered if each not in taken)


def _job(
    config: EvaluationConfig,
    model: EvaluatedModel,
    task: Task,
    files: ModelFiles,
    lenders: Mapping[str, ModelFiles],
    shared: Shared,
) -> Job:
    """Prepares one task for one model."""
    if isinstance(task, HarnessTask):
        return Job(model, task, files, None, None)
    head = getattr(task, "head", None)
    if head is not None:
        files = with_head(files, head)
    text_model = getattr(task, "text_model", None)
    lender = lenders.get(text_model or "")
    if text_model is not None and lender is None:
        raise ConfigError(f"task {task.name!r}: its text_model cannot be opened")
    if lender is not None:
        files = replace(files, fallbacks={**files.fallbacks, lender.name: lender.checkpoint.folder})
    prepared = _prepared(config, task, files, lender, shared)
    view = shared.open_view(prepared.view)
    _check_ids(view, prepared.samples)
    _check_lengths(view, prepared)
    first = shared.open_view(prepared.first.view) if prepared.first is not None else None
    if first is not None and prepared.first is not None:
        _check_ids(first, prepared.first.samples)
    return Job(model, task, files, prepared, view, first)


def _prepared(
    config: EvaluationConfig, task: Task, files: ModelFiles, lender: ModelFiles | None, shared: Shared
) -> Prepared:
    if isinstance(task, ZeroShotTask):
        return zero_shot(task, config, files, lender, shared)
    skeleton = shared.open_view(files).skeleton  # built once for all tasks
    signature = forward_signature(skeleton)
    if isinstance(task, LanguageModelTask | MultipleChoiceTask | GenerationTask):
        _check_writes(task, files, skeleton.model, signature)
    match task:
        case LanguageModelTask():
            return language_model(task, config, files, signature)
        case MultipleChoiceTask():
            return multiple_choice(task, config, files, signature)
        case GenerationTask():
            return generation(task, config, files, signature)
        case ImageClassificationTask():
            return image_classification(task, config, files, skeleton, shared)
        case TextClassificationTask():
            return text_classification(task, config, files, skeleton)
        case RetrievalTask():
            return retrieval(task, config, as_body(files, skeleton.class_name), signature)
        case SimilarityTask():
            return similarity(task, config, as_body(files, skeleton.class_name), signature)
    raise AssertionError(f"{task.name}: a task of an unknown kind")


def _check_writes(task: Task, files: ModelFiles, model: Any, signature: ForwardSignature) -> None:
    """Refuses models that predict no next token."""
    where = f"task {task.name!r}: {files.name}"
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise ConfigError(f"{where} is a {name}, which has no output embeddings; expected a language model")
    if "MaskedLM" in name or "PreTraining" in name:
        raise ConfigError(f"{where} is a {name}, which predicts masked tokens, not the next one")
    if signature.is_encoder_decoder and not isinstance(task, LanguageModelTask):
        raise ConfigError(f"{where} is an encoder-decoder; expected a decoder for tasks of kind {task.kind}")


def _opened(view: ModelFiles, known: dict[str, OpenedModel]) -> OpenedModel:
    key = view_key(view)
    if key not in known:
        known[key] = OpenedModel.of(view)
    return known[key]


def view_key(view: ModelFiles) -> str:
    """Equal for tasks that see a model alike."""
    checkpoint = view.checkpoint
    adapter = view.adapter.checkpoint.folder if view.adapter is not None else ""
    files = sorted(str(path) for path in checkpoint.files)
    return json.dumps([str(checkpoint.folder), str(adapter), checkpoint.config, files, str(view.compute_dtype)])


def _check_lengths(view: OpenedModel, prepared: Prepared) -> None:
    """Refuses texts that are longer than a model has positions, where these are learned."""
    limit = forward_signature(view.skeleton).id_limits.get("position_ids")
    sequences = [sample.sequences for group in prepared.samples.groups for sample in group]
    names = ("input_ids", "decoder_input_ids")
    longest = max((len(own[name]) for own in sequences for name in names if name in own), default=0)
    written = prepared.generating.max_new_tokens if prepared.generating is not None else 0
    if limit is not None and longest + written > limit:
        more = f" and {written} to be written" if written else ""
        raise ConfigError(
            f"{prepared.samples.where}: texts of up to {longest} tokens{more}, and {view.name} has {limit} positions; "
            f"expected 'max_length: {limit}' or less"
        )


def _check_ids(view: OpenedModel, samples: Samples) -> None:
    """Refuses token ids beyond the model's vocabulary."""
    config: Any = view.skeleton.model.config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        return
    tokens = replace(samples, pixels=None)
    if samples.groups and samples.groups[0][0].sequences:
        data = CalibrationSet("", tuple(tokens.batches()), "")
        problems = [f"{samples.where}: {each}" for each in id_problems(data, vocabulary, placeholder_tokens(config))]
        if problems:
            raise ConfigError(*problems)
