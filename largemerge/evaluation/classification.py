"""Tasks that choose among classes: images or texts by a model's own head, images by texts that name the classes.

Zero-shot (CLIP, arXiv 2103.00020, section 3.1.4): every class name is put into every template; the texts' embeddings
are normalised, averaged over the templates, and normalised again. An image is of the class whose prototype is nearest
by cosine. So the paper of RegMean++ (arXiv 2508.03121) evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from largemerge.calibration.batches import Batch, ForwardSignature, Sample
from largemerge.calibration.images import load_image_processor
from largemerge.errors import CalibrationError, ConfigError
from largemerge.evaluation.config import (
    EvaluationConfig,
    ImageClassificationTask,
    TextClassificationTask,
    ZeroShotTask,
)
from largemerge.evaluation.corruption import corrupted
from largemerge.evaluation.metrics import ACCURACY, F1, MATTHEWS, correlation
from largemerge.evaluation.models import ModelFiles, OpenedModel, as_tower
from largemerge.evaluation.prompts import Prompts, load_prompts
from largemerge.evaluation.table import (
    Table,
    label_numbers,
    numbers_of,
    open_table,
    open_texts,
    text_sample,
    text_samples,
)
from largemerge.evaluation.task import (
    FirstPass,
    Logits,
    Pixels,
    Prepared,
    Record,
    Samples,
    Score,
    columns_of,
)
from largemerge.model.signature import forward_signature
from largemerge.model.skeleton import Skeleton


@dataclass(frozen=True)
class Shared:
    """What many models have in common in one task, made once: with 20 tasks and 22 models there are 440 pairs.

    Attributes:
        open_view: Opens a model as a task sees it, each once.
        tables: Rows of image data, by the name of their task.
        firsts: Passes that come first, by what their results depend on.
    """

    open_view: Callable[[ModelFiles], OpenedModel]
    tables: dict[str, Table] = field(default_factory=dict)
    firsts: dict[tuple[str, ...], FirstPass] = field(default_factory=dict)

    def signature(self, view: ModelFiles) -> ForwardSignature:
        """Inputs of a model's forward."""
        return forward_signature(self.open_view(view).skeleton)


def image_classification(
    task: ImageClassificationTask, config: EvaluationConfig, files: ModelFiles, skeleton: Skeleton, shared: Shared
) -> Prepared:
    """Prepares images for a model with a head of its own.

    Raises:
        LargemergeError: If the data cannot be read, or labels are none of the model's.
    """
    table = _images(task, config, shared)
    classes = _labels_of(skeleton, files, table)
    samples = _image_samples(task, table, files, forward_signature(skeleton))
    labels = label_numbers(table, task.label_field, classes, f"{files.name}'s labels")
    return Prepared(
        view=files,
        samples=samples,
        score=lambda _: _by_logits(labels),
        finish=columns_of,
        metrics=(ACCURACY,),
        logits=lambda _: _logits_of(labels, lambda output: output.logits),
    )


def _labels_of(skeleton: Skeleton, files: ModelFiles, table: Table) -> list[str]:
    """Names of the labels of a classifier, in order.

    Raises:
        ConfigError: If the model is none.
    """
    if "Classification" not in skeleton.class_name:
        raise ConfigError(
            f"{table.where}: {files.name} is a {skeleton.class_name}, which has no labels; expected a classifier, or "
            "'head' with the head that a merge has kept apart"
        )
    config: Any = skeleton.model.config
    return [str(config.id2label.get(number, number)) for number in range(int(config.num_labels))]


def _images(task: ImageClassificationTask | ZeroShotTask, config: EvaluationConfig, shared: Shared) -> Table:
    if task.name not in shared.tables:
        named = [("image_field", task.image_field or "image"), ("label_field", task.label_field)]
        shared.tables[task.name] = open_table(task, config, named, later=("image_field",))
    return shared.tables[task.name]


def _image_samples(
    task: ImageClassificationTask | ZeroShotTask, table: Table, files: ModelFiles, signature: ForwardSignature
) -> Samples:
    if "pixel_values" not in signature.forward_arguments:
        takes = sorted(signature.forward_arguments)
        raise CalibrationError(f"{table.where}: {files.name} takes no images but {takes}")
    processor = load_image_processor(files.image_folder, table.where, trust_remote_code=files.trust_remote_code)
    column = task.image_field or "image"
    images = table.source.select((column,))
    samples = [Sample(number, {}) for number in range(len(table.rows))]
    assert table.settings.batch_size is not None
    pixels = Pixels(
        processor,
        table.source.folder,
        signature,
        lambda number: images[table.numbers[number]][column],
        _corrupter(task, table),
    )
    lent = f"no image processor; that of {files.image_lender} is used" if files.image_lender is not None else ""
    return Samples.of(samples, table.settings.batch_size, table.where, pixels=pixels, lent=lent)


def _corrupter(task: ImageClassificationTask | ZeroShotTask, table: Table) -> Callable[[int, Any], Any] | None:
    """What corrupts the image of a sample; `None` where images stay as they are."""
    corruption, seed = task.corruption, table.settings.seed
    if corruption is None:
        return None
    assert seed is not None
    return lambda number, image: corrupted(image, corruption, seed, table.numbers[number])


def _by_logits(labels: Sequence[float], *, one_output: bool = False) -> Score:
    """Reads the class that a head gives, or the number where it has one output."""

    def score(output: Any, batch: Batch, samples: Sequence[Sample]) -> list[Record]:
        logits_NC = output.logits.float()
        found_N = logits_NC[:, 0] if one_output else logits_NC.argmax(dim=-1)
        return _records(samples, labels, found_N, finite=bool(logits_NC.isfinite().all()))

    return score


def _logits_of(labels: Sequence[float], read: Callable[[Any], torch.Tensor]) -> Logits:
    """Reads one row of logits for each sample, and its label."""

    def logits(output: Any, batch: Batch, samples: Sequence[Sample]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for row, sample in zip(read(output).float(), samples, strict=True):
            yield row[None], torch.tensor([int(labels[sample.row])], device=row.device)

    return logits


def _records(
    samples: Sequence[Sample], labels: Sequence[float], found_N: torch.Tensor, *, finite: bool
) -> list[Record]:
    """Holds what a model has found against labels; nothing is found where its outputs are not finite."""
    records: list[Record] = []
    for sample, value in zip(samples, found_N.tolist(), strict=True):
        label, predicted = labels[sample.row], value if finite else float("nan")
        records.append({"label": label, "predicted": predicted, "correct": float(predicted == label)})
    return records


def text_classification(
    task: TextClassificationTask, config: EvaluationConfig, files: ModelFiles, skeleton: Skeleton
) -> Prepared:
    """Prepares texts, or pairs of texts, for a model with a head.

    Raises:
        LargemergeError: If the data cannot be read, or labels are none of the model's.
    """
    first = task.text_field or "text"
    named = [("text_field", first), ("label_field", task.label_field)]
    named += [("pair_field", task.pair_field)] if task.pair_field is not None else []
    table = open_table(task, config, named, texts=("text_field", "pair_field"), max_length=task.max_length)
    reader = open_texts(files, table, forward_signature(skeleton))
    classes = _labels_of(skeleton, files, table)
    one_output = len(classes) == 1
    if one_output != (task.metric in ("pearson", "spearman")):
        raise ConfigError(
            f"{table.where}: metric {task.metric!r} does not fit {files.name}, whose head has {len(classes)} "
            f"{'output' if one_output else 'outputs'}; expected "
            + ("pearson or spearman" if one_output else "accuracy, f1 or matthews")
        )
    labels: Sequence[float]
    if one_output:
        labels = numbers_of(table, task.label_field)
    else:
        labels = label_numbers(table, task.label_field, classes, f"{files.name}'s labels")
    texts = table.column(first, str, "a text")
    pairs = table.column(task.pair_field, str, "a text") if task.pair_field is not None else [None] * len(texts)
    samples = [
        text_sample(number, text, reader, pair=pair)
        for number, (text, pair) in enumerate(zip(texts, pairs, strict=True))
    ]
    are_pairs = task.pair_field is not None
    metric = {
        "accuracy": ACCURACY,
        "f1": F1,
        "matthews": MATTHEWS,
        "pearson": correlation("pearson", "predicted", "label"),
        "spearman": correlation("spearman", "predicted", "label"),
    }[task.metric]
    return Prepared(
        view=files,
        samples=text_samples(
            samples,
            files,
            reader,
            table.settings,
            what="pairs of texts" if are_pairs else "texts",
            kept="the ends of the longer texts are left out" if are_pairs else "their ends are left out",
            more_notes=table.notes,
        ),
        score=lambda _: _by_logits(labels, one_output=one_output),
        finish=columns_of,
        metrics=(metric,) if metric is ACCURACY or one_output else (metric, ACCURACY),
        logits=None if one_output else lambda _: _logits_of(labels, lambda output: output.logits),
    )


_TOWERS: Mapping[str, tuple[str, str, str | None, str | None]] = {
    "clip": (
        "CLIPVisionModelWithProjection",
        "CLIPTextModelWithProjection",
        "visual_projection.weight",
        "text_projection.weight",
    ),
    "siglip": ("SiglipVisionModel", "SiglipTextModel", None, None),
}
"""By family: classes of both towers, and names of their projections."""


def _family(files: ModelFiles, where: str) -> tuple[str, str, str | None, str | None]:
    kind = str(files.checkpoint.config.get("model_type", ""))
    for prefix, towers in _TOWERS.items():
        if kind in (prefix, f"{prefix}_vision_model", f"{prefix}_text_model"):
            return towers
    raise CalibrationError(
        f"{where}: {files.name} is of the kind {kind!r}; zero-shot classification knows {', '.join(_TOWERS)}"
    )


def zero_shot(
    task: ZeroShotTask, config: EvaluationConfig, files: ModelFiles, lender: ModelFiles | None, shared: Shared
) -> Prepared:
    """Prepares images, and the texts that name their classes.

    Args:
        task: The task.
        config: The evaluation.
        files: The model: a CLIP model, or its vision tower.
        lender: The model of `text_model`; `None` where the model has a text tower of its own.
        shared: What the models before have left.

    Raises:
        LargemergeError: If the data cannot be read, labels are none of the classes, or there is no text tower.
    """
    table = _images(task, config, shared)
    try:
        prompts = load_prompts(task.classes, task.templates)
    except ConfigError as error:
        raise ConfigError(*(f"task {task.name!r}: classes: {problem}" for problem in error.problems)) from None
    labels = label_numbers(table, task.label_field, prompts.class_names, f"the classes of {task.classes!r}")
    vision_class, text_class, visual, textual = _family(files, table.where)
    texts = lender or files
    if "text_config" not in texts.checkpoint.config:
        raise CalibrationError(
            f"{table.where}: {texts.name} has no text tower; expected 'text_model', the CLIP model that it was "
            "tuned from"
        )
    view = as_tower(files, vision_class, "vision_config", visual, lender)
    text_view = as_tower(texts, text_class, "text_config", textual)
    samples = _image_samples(task, table, view, shared.signature(view))
    first = _prototypes(prompts, text_view, table, shared)

    def cosines(output: Any, prototypes_CD: torch.Tensor) -> torch.Tensor:
        images_ND = _embeds(output, "image_embeds").float()
        return images_ND @ prototypes_CD.to(images_ND.device).T

    def score_with(prototypes_CD: torch.Tensor) -> Score:
        def score(output: Any, batch: Batch, group: Sequence[Sample]) -> list[Record]:
            similar_NC = cosines(output, prototypes_CD)
            return _records(group, labels, similar_NC.argmax(dim=1), finite=bool(similar_NC.isfinite().all()))

        return score

    return Prepared(
        view=view,
        samples=samples,
        score=score_with,
        finish=columns_of,
        metrics=(ACCURACY,),
        first=first,
        logits=lambda prototypes: _logits_of(labels, lambda output: cosines(output, prototypes)),
    )


def _embeds(output: Any, name: str) -> torch.Tensor:
    """The embedding of an image or text, normalised: `image_embeds`, or where there is no projection the pooled one."""
    found: torch.Tensor | None = getattr(output, name, None)
    return torch.nn.functional.normalize(output.pooler_output if found is None else found, dim=-1)


def _prototypes(prompts: Prompts, view: ModelFiles, table: Table, shared: Shared) -> FirstPass:
    """Prepares the pass that makes a prototype for every class."""
    names, templates = prompts.class_names, prompts.templates
    key = (str(view.checkpoint.folder), str(view.compute_dtype), *names, "templates", *templates)
    if key in shared.firsts:
        return shared.firsts[key]
    signature = shared.signature(view)
    reader = open_texts(view, table, signature)
    texts = [text for own in prompts.texts() for text in own]
    tower = _text_length(view)
    length = min(reader.max_length, tower)
    samples = [text_sample(number, text, reader, max_length=length) for number, text in enumerate(texts)]

    def score(output: Any, batch: Batch, group: Sequence[Sample]) -> list[Record]:
        return [{"vector": vector.cpu()} for vector in _embeds(output, "text_embeds").float()]

    def finish(records: Mapping[int, Record]) -> torch.Tensor:
        vectors_TD = torch.stack([records[number]["vector"] for number in range(len(texts))])
        means_CD = vectors_TD.reshape(len(names), len(templates), -1).mean(dim=1)
        return torch.nn.functional.normalize(means_CD, dim=-1)

    assert table.settings.batch_size is not None
    batches = text_samples(
        samples,
        view,
        reader,
        table.settings.model_copy(update={"batch_size": 8 * table.settings.batch_size}),
        what="texts that name classes",
        limit=f"the {tower:,} tokens that the text tower takes" if tower < reader.max_length else "",
    )
    shared.firsts[key] = FirstPass(key=key, view=view, samples=batches, score=score, finish=finish)
    return shared.firsts[key]


def _text_length(view: ModelFiles) -> int:
    """Most tokens that a text tower takes."""
    return int(view.checkpoint.config.get("max_position_embeddings", 77))
