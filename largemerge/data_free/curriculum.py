"""A curriculum: experts merged one after another, the least capable first, each step a merge of its own.

    M₁ = the first expert          M_t = step(M_{t−1}, W_t; w_t)          the output is M_K

After Curriculum Model Merging (He et al., NeurIPS 2025), which orders experts by what they can do and merges them "in a
moderate and continual manner"; its formulas and program are not public. What is ours: that a step is any method that
weighs two models, M_{t−1} by 1 − w_t and W_t by w_t, and that w_t is 0.5 unless the file says otherwise.

A curriculum becomes a file of several merges, which name each other's results: whatever holds for these (`multi.py`)
holds here, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from largemerge.checkpoint.locate import Reference, absolute_reference
from largemerge.config_file import Strict, explain, nearest, plain_values, shown, to_json, without_helpers
from largemerge.data_free.config import CURRICULUM, DataFreeConfig
from largemerge.errors import CheckpointError, ConfigError
from largemerge.text_files import read_json

_OF_THE_WHOLE = ("merge_method", "name", "models", "parameters")
_OF_THE_LAST = ("out_dtype", "chat_template", "post", "candidates")
_SLERP = "slerp"


class _Entry(Strict):
    """An expert."""

    class Parameters(Strict):
        """What the curriculum has to know of an expert."""

        score: float | None = Field(None, allow_inf_nan=False)
        weight: float | None = Field(None, ge=0, le=1)

    model: Reference
    parameters: Parameters = Parameters()


class _Parameters(Strict):
    """What the curriculum has to know of all; parameters of the step lie beside it."""

    step: str = "linear"
    order: Literal["ascending", "descending"] | None = None
    scores: str | None = None
    weight: float = Field(0.5, ge=0, le=1)


class _Curriculum(Strict):
    """The keys that are a curriculum's own."""

    models: tuple[_Entry, ...] = Field(min_length=2)
    parameters: _Parameters = _Parameters()


def expand_curricula(documents: Sequence[Mapping[str, Any]], folder: Path | None) -> list[Mapping[str, Any]]:
    """Puts the merges that a curriculum consists of in its place; other documents stay as they are.

    Args:
        documents: The documents of a file.
        folder: Folder in which relative paths are looked up first; `None` for the working directory alone.

    Raises:
        ConfigError: If anything is wrong with the keys that are a curriculum's own; it lists every mistake found.
    """
    made: list[Mapping[str, Any]] = []
    problems: list[str] = []
    for number, document in enumerate(documents, start=1):
        try:
            made += expand(document, folder) if document.get("merge_method") == CURRICULUM else [document]
        except ConfigError as error:
            label = f"{document.get('name') or f'document {number}'}: " if len(documents) > 1 else ""
            problems += [f"{label}{problem}" for problem in error.problems]
    if problems:
        raise ConfigError(*problems)
    return made


def expand(raw: Mapping[str, Any], folder: Path | None) -> list[dict[str, Any]]:
    """Makes the merges that a curriculum consists of.

    Args:
        raw: The document, with `merge_method: curriculum`.
        folder: Folder in which relative paths are looked up first; `None` for the working directory alone.

    Returns:
        K − 1 documents for K experts, each but the first with the result before it as a model. The last one has the
        name of the curriculum, if that has one.

    Raises:
        ConfigError: If anything is wrong with the keys that are a curriculum's own; the rest is checked as the
            documents are.
    """
    raw = plain_values(without_helpers(raw, DataFreeConfig.model_fields))
    raw = {key: value for key, value in raw.items() if value is not None}
    given = raw.get("parameters") or {}
    problems = [
        f"{key}: a curriculum is made of whole models; expected 'models'" for key in ("slices", "modules") if key in raw
    ]
    if not isinstance(given, Mapping):
        raise ConfigError(*problems, f"parameters: expected parameters by name, found {shown(given)}")
    own = {key: value for key, value in given.items() if key in _Parameters.model_fields}
    try:
        curriculum = _Curriculum.model_validate_json(to_json({"models": raw.get("models", []), "parameters": own}))
    except pydantic.ValidationError as error:
        raise ConfigError(*(problems or _explained(error))) from None
    problems += _step_problems(curriculum, raw)
    entries = _in_order(curriculum, folder, problems)
    if not problems and entries[0].parameters.weight is not None:
        problems.append(f"weight: {entries[0].model} comes first, and has none; leave it out")
    if problems:
        raise ConfigError(*problems)
    return _documents(raw, curriculum, entries)


def _explained(error: pydantic.ValidationError) -> Iterator[str]:
    """Explains mistakes; parameters of the steps, which are the same for all experts, are shown their place."""
    for problem in explain(error, _Curriculum):
        hint = "; a parameter of the steps belongs under the 'parameters' of all" if "unknown key" in problem else ""
        yield f"{problem}{hint if problem.startswith('models[') and '.parameters.' in problem else ''}"


def _step_problems(curriculum: _Curriculum, raw: Mapping[str, Any]) -> list[str]:
    """Lists what is wrong with the method of the steps and with the models that it cannot have."""
    from largemerge.data_free.methods.base import Base
    from largemerge.data_free.methods.table import METHODS

    steps = sorted(name for name, row in METHODS.items() if "weight" in row.per_model and not row.auxiliary_parameter)
    steps.append(_SLERP)
    step, base = curriculum.parameters.step, raw.get("base_model")
    if step not in steps:
        hint = nearest(step, steps) or f"; expected one of {', '.join(steps)}"
        return [f"parameters.step: {shown(step)} is no method that weighs two models{hint}"]
    problems = []
    if base is not None and base in [entry.model for entry in curriculum.models]:
        problems.append(f"models: {base} is the base; expected experts alone")
    if step == _SLERP and base is not None:
        problems.append("base_model: a step of slerp goes from the merge so far to the next expert; leave it out")
    if step == _SLERP and raw.get("post"):
        problems.append(
            "post: a step of slerp begins at the merge so far, from which task vectors would be measured; expected "
            "another step, or a passthrough of the finished merge with 'post'"
        )
    elif step != _SLERP and base is None and METHODS[step].base is Base.REQUIRED:
        problems.append(f"base_model: {step} needs one")
    elif step != _SLERP and base is not None and METHODS[step].base is Base.NONE and not raw.get("post"):
        problems.append(f"base_model: {step} has none, so that it does nothing; leave it out, or choose another step")
    vocabulary = next((key for key in ("tokenizer_source", "tokenizer") if key in raw), None)
    if raw.get("post") and vocabulary is not None and len(curriculum.models) > 2:
        problems.append(
            f"post: holds the last merge against all experts, which cannot go with '{vocabulary}'; expected one of both"
        )
    known = {*_Parameters.model_fields, *METHODS[step].shared, *METHODS[step].per_model}
    for name in raw.get("parameters") or {}:
        if name not in known and (hint := nearest(str(name), _Parameters.model_fields)):
            problems.append(f"parameters.{name}: unknown parameter{hint}")
    return problems


def _in_order(curriculum: _Curriculum, folder: Path | None, problems: list[str]) -> list[_Entry]:
    """Orders the experts by their scores, or leaves them as they stand where there is neither score nor order."""
    entries, parameters = list(curriculum.models), curriculum.parameters
    scores = [entry.parameters.score for entry in entries]
    lacking = [entry.model for entry, score in zip(entries, scores, strict=True) if score is None]
    if parameters.scores is not None:
        if len(lacking) < len(entries):
            problems.append("parameters.scores: expected it, or a score for every model, found both")
            return entries
        scores = _measured_scores(entries, Path(parameters.scores).expanduser(), folder, problems)
    elif not lacking:
        pass
    elif len(lacking) < len(entries):
        problems.append(f"score: missing for {', '.join(lacking)}; expected one for every model, or for none")
    elif parameters.order is not None:
        problems.append(f"parameters.order: {parameters.order} needs scores, which no model has")
    if problems or any(score is None for score in scores):
        return entries
    falling = parameters.order == "descending"
    ranked = sorted(range(len(entries)), key=lambda number: scores[number] or 0.0, reverse=falling)
    return [entries[number] for number in ranked]


def _measured_scores(entries: list[_Entry], path: Path, folder: Path | None, problems: list[str]) -> list[float | None]:
    """Reads the average score of every expert from what `largemerge evaluate --out` has written."""
    places = [place / path for place in ([folder] if folder is not None else []) + [Path.cwd()]]
    file = next((place for place in places if place.exists()), places[0])
    file = file / "evaluation.json" if file.is_dir() else file
    try:
        found = read_json(file, error=CheckpointError)
        is_better = -1.0 if found["tasks"][0]["better"] == "lower" else 1.0
        by_model = {}
        for model in found["models"]:
            average, mean = model["average"], model["mean"]
            # An average of shares of the experts is better when it is higher, whatever the metric.
            score = average if average is not None and average != mean else None if mean is None else is_better * mean
            by_model[absolute_reference(model["reference"], [Path.cwd()], set(), [])] = score
            by_model.setdefault(model["name"], score)
    except CheckpointError as error:
        problems += [f"parameters.scores: {problem}" for problem in error.problems]
        return [None] * len(entries)
    except (KeyError, TypeError, IndexError, AttributeError):
        problems.append(f"parameters.scores: {file} is no evaluation.json of `largemerge evaluate --out`")
        return [None] * len(entries)
    folders = [*([folder] if folder is not None else []), Path.cwd()]
    scores = []
    for entry in entries:
        reference = absolute_reference(entry.model, folders, set(), [])
        score = by_model.get(reference, by_model.get(entry.model))
        if score is None:
            problems.append(f"parameters.scores: {file} has no average score of {entry.model}; found {shown(by_model)}")
        scores.append(score)
    return scores


def _documents(raw: Mapping[str, Any], curriculum: _Curriculum, entries: list[_Entry]) -> list[dict[str, Any]]:
    """Writes the steps, each of the result before it and the next expert."""
    from largemerge.data_free.methods.base import Base
    from largemerge.data_free.methods.table import METHODS

    step, parameters = curriculum.parameters.step, curriculum.parameters
    shared = {key: value for key, value in raw.items() if key not in _OF_THE_WHOLE}
    needs_base = step != _SLERP and METHODS[step].base is not Base.NONE
    more = {key: value for key, value in (raw.get("parameters") or {}).items() if key not in _Parameters.model_fields}
    name = raw.get("name")
    so_far, documents = entries[0].model, []
    for number, entry in enumerate(entries[1:], start=1):
        is_last = number == len(entries) - 1
        weight = parameters.weight if entry.parameters.weight is None else entry.parameters.weight
        document = {key: value for key, value in shared.items() if is_last or key not in _OF_THE_LAST}
        document["merge_method"] = step
        after = is_last and bool(document.get("post"))
        if after and len(entries) > 2:
            document.setdefault("candidates", [entry.model for entry in entries])
        if not (needs_base or after):
            document.pop("base_model", None)  # what 'post' alone measures from is not merged
        if step == _SLERP:
            document |= {"base_model": so_far, "models": [{"model": entry.model}]}
            document["parameters"] = {**more, "t": weight}
        else:
            weights = ((so_far, 1 - weight), (entry.model, weight))
            document["models"] = [{"model": model, "parameters": {"weight": share}} for model, share in weights]
            document["parameters"] = more
        label = name if is_last else f"{name or CURRICULUM}-step-{number}"
        document |= {"name": label} if label is not None else {}
        documents.append(document)
        so_far = str(label)
    return documents
