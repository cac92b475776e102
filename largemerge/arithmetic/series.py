"""Merges that need each other's results: all are planned before the first begins, then made one after the other.

Without `--intermediate-dir`, intermediate results lie in OUT/.largemerge and go with it. There or elsewhere, one that
is finished, and was made from the same configuration and files, is not made again.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from largemerge.arithmetic.documents import Document, load_documents, model_of
from largemerge.arithmetic.merge import merge_data_free
from largemerge.arithmetic.opening import Before, open_model
from largemerge.arithmetic.plan import DataFreePlan, plan_data_free
from largemerge.arithmetic.report import DataFreeReport
from largemerge.arithmetic.side_files import config_text, write_tokenizer
from largemerge.checkpoint.index import Checkpoint, open_checkpoint
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.distributed import Ranks, start_ranks, stay_together
from largemerge.errors import LargemergeError, OutputError
from largemerge.output import INTERMEDIATE_FOLDER, WORKING_FOLDER, check_output


@dataclass(frozen=True)
class SeriesPlan:
    """What all merges of a file will do.

    Attributes:
        plans: By document, in the order in which they are made.
    """

    plans: dict[str, DataFreePlan]

    @property
    def problems(self) -> list[str]:
        """What makes it impossible."""
        return [f"{label}: {problem}" for label, plan in self.plans.items() for problem in plan.problems]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"documents": {label: plan.to_json() for label, plan in self.plans.items()}}


def plan_series(path: Path, *, keeps_all: bool = True, probe: bool = False, **options: Any) -> SeriesPlan:
    """Plans all merges of a file, from configurations and headers; options are those of a single one's plan.

    Raises:
        LargemergeError: If the inputs cannot be opened.
    """
    with _planned(load_documents(path, keeps_all=keeps_all), probe=probe, **options) as plan:
        return plan


def merge_series(path: Path, out: Path, intermediate: Path | None, **options: Any) -> DataFreeReport:
    """Makes all merges of a file; the last one's result goes to OUT.

    Args:
        path: A YAML file of several documents.
        out: The output folder.
        intermediate: Where the others' results go, and stay.
        options: Of `merge_data_free`.

    Raises:
        LargemergeError: For anything wrong with any of them, before the first one begins.
    """
    documents = load_documents(path, keeps_all=intermediate is not None)
    folder = intermediate if intermediate is not None else out / WORKING_FOLDER / INTERMEDIATE_FOLDER
    resume, force = options.pop("resume"), options.pop("force")
    with stay_together():
        with start_ranks() as ranks:
            where = {"device": options["device"], "limits": options.get("limits")}
            ranks.agree(lambda: _check(documents, out, folder, ranks, where, resume=resume, force=force))
            is_quiet = options["quiet"] or not ranks.is_first
        before = Before()
        for number, document in enumerate(documents, start=1):
            is_last = number == len(documents)
            target = out if is_last else folder / document.label
            if not is_quiet:
                print(f"largemerge: merge {number} of {len(documents)}: {document.label} → {target}", file=sys.stderr)
            goes_on = resume and (target / WORKING_FOLDER / "manifest.json").exists()
            if is_last:
                return merge_data_free(document.config, out, before=before, resume=goes_on, force=force, **options)
            with start_ranks() as ranks:
                made = ranks.agree(partial(_is_made, document, target, before, force=force and not resume))
            if not made:
                merge_data_free(document.config, target, before=before, resume=goes_on, force=force, **options)
            told = json.loads((target / "merge_report.json").read_text(encoding="utf-8"))
            before = before.with_result(document.config, open_checkpoint(target, document.label), told)
    raise AssertionError("there is a last document")


def _check(
    documents: list[Document],
    out: Path,
    folder: Path,
    ranks: Ranks,
    where: Mapping[str, Any],
    *,
    resume: bool,
    force: bool,
) -> None:
    """Plans everything, and looks at the output folder, before the first merge begins."""
    with _planned(documents, ranks=ranks, **where) as plan:
        if plan.problems:
            raise LargemergeError(*plan.problems)
    if not ranks.is_first:
        return
    inside = out / WORKING_FOLDER / INTERMEDIATE_FOLDER
    if inside.exists() and not (resume or force):
        raise OutputError(f"{out} holds an unfinished merge; --resume goes on with it, --force starts afresh")
    if inside.exists() and not resume:
        shutil.rmtree(inside)
    check_output(out, [], resume=resume and (out / WORKING_FOLDER / "manifest.json").exists(), force=force)
    folder.mkdir(parents=True, exist_ok=True)


def _is_made(document: Document, target: Path, before: Before, *, force: bool) -> bool:
    """Whether the result is there already, from the same configuration and files."""
    if force or not (target / "config.json").exists() or (target / WORKING_FOLDER / "manifest.json").exists():
        return False
    try:
        told = json.loads((target / "merge_report.json").read_text(encoding="utf-8"))
        inputs = {name: described["files"] for name, described in told["inputs"].items()}
    except (OSError, ValueError, KeyError):
        raise OutputError(f"{target} is no result of a merge; remove it, or take another --intermediate-dir") from None
    plan = plan_data_free(document.config, before, device="cpu")  # whose device does not matter here
    vocabulary = plan.vocabulary.to_json() if plan.vocabulary is not None else None
    same_config = told["config"] == json.loads(document.config.model_dump_json(exclude_defaults=True))
    now = {name: dict(checkpoint.fingerprint) for name, checkpoint in plan.checkpoints.items()}
    if not same_config or [inputs, told["plan"]["vocabulary"]] != json.loads(json.dumps([now, vocabulary])):
        changed = "inputs" if same_config else "configuration"
        raise OutputError(f"{target} was made from another {changed}; --force makes it again")
    return True


@contextmanager
def _planned(documents: list[Document], *, probe: bool = False, **options: Any) -> Iterator[SeriesPlan]:
    """Plans one after the other; what is yet to be made stands there as a folder without weights, meanwhile."""
    plans: dict[str, DataFreePlan] = {}
    problems: list[str] = []
    before = Before()
    with tempfile.TemporaryDirectory(prefix="largemerge-plan-") as folder:
        for document in documents:
            if not set(document.needs) <= set(before.checkpoints):
                problems += _open_problems(document)  # what it needs cannot be planned, which is told
                continue
            try:
                probes = probe and not document.needs  # of what is yet to be made nothing can be read
                plan = plan_data_free(document.config, before, probe=probes, **options)
            except LargemergeError as error:
                problems += [f"{document.label}: {problem}" for problem in error.problems]
                continue
            plans[document.label] = plan
            if not plan.problems:
                made = _promised(plan, Path(folder) / document.label, document.label)
                before = before.with_result(document.config, made, {})
        if problems:
            raise LargemergeError(*problems, *SeriesPlan(plans).problems)
        yield SeriesPlan(plans)


def _open_problems(document: Document) -> Iterator[str]:
    """What is wrong with its own models."""
    for reference in document.config.references:
        if model_of(reference) not in document.needs:
            try:
                open_model(reference, Before())
            except LargemergeError as error:
                yield from (f"{document.label}: {problem}" for problem in error.problems)


def _promised(plan: DataFreePlan, folder: Path, name: str) -> Checkpoint:
    """The checkpoint that a merge will make, for the plans of those that need it."""
    folder.mkdir(parents=True)
    text = config_text(plan)
    (folder / "config.json").write_text(text, encoding="utf-8")
    write_tokenizer(folder, plan)
    file = folder / "model.safetensors"
    tensors = {key: TensorInfo(key, made.shape, made.dtype, file, 0) for key, made in plan.output.items()}
    return Checkpoint(name, folder, json.loads(text), tensors, {})
