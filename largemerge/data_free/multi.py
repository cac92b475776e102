"""Several merges in one file, as mergekit-multi reads them: documents that name each other's results as models.

    name: first
    merge_method: linear
    models: …
    ---
    merge_method: ties
    base_model: first
    …

    load_documents → in the order of what they need → all are planned before the first begins → merged one by one

The last one's result is the output: that of the document without a name, or else of the one that no other needs. All
the others go to a folder of their own, each a checkpoint like any other. Without `--intermediate-dir`, these lie in
OUT/.largemerge and go with it. There or elsewhere, one that is finished, and was made from the same configuration and
files, is not made again.
"""

from __future__ import annotations

import graphlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from largemerge.checkpoint.index import Checkpoint, open_checkpoint
from largemerge.checkpoint.locate import split_reference
from largemerge.checkpoint.lora import open_model
from largemerge.checkpoint.room import Need, room_problems
from largemerge.checkpoint.sentence_modules import transformer_folder
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.config_file import nearest, shown
from largemerge.data_free.config import DataFreeConfig, Documents, load_data_free
from largemerge.data_free.inputs import PriorMerges
from largemerge.data_free.merge import input_folders, merge_data_free
from largemerge.data_free.plan import DataFreePlan, SeriesPlan, plan_data_free
from largemerge.data_free.report import DataFreeReport, config_text
from largemerge.distributed.ranks import Ranks, start_ranks, stay_together
from largemerge.errors import CheckpointError, ConfigError, LargemergeError, OutputError, shorten
from largemerge.integrity import find_damage
from largemerge.log import tell
from largemerge.machine import scratch_folder
from largemerge.model.adapter_names import AdapterNames
from largemerge.output import INTERMEDIATE_FOLDER, REPORT_FILE, WORKING_FOLDER, check_no_input, check_output
from largemerge.text_files import read_json


@dataclass(frozen=True)
class Document:
    """One of the merges of a file.

    Attributes:
        label: The document's name; where it has none, what messages call it.
        config: The configuration of the merge, where other documents' results stand by their names.
        needs: Names of the documents whose results it is made of.
    """

    label: str
    config: DataFreeConfig
    needs: tuple[str, ...]


def load_documents(file: Documents, *, keeps_all: bool, other_methods: Sequence[str] = ()) -> list[Document]:
    """Checks all documents of a file, and orders them.

    Args:
        file: The documents, as they were read.
        keeps_all: Whether results that no other document needs are kept, too.
        other_methods: Names of methods that are not data-free, for messages.

    Returns:
        The documents in an order in which they can be merged; the last one makes the output.

    Raises:
        ConfigError: If anything is wrong; it lists every mistake found.
    """
    raw = file.raw
    names = [str(document["name"]) for document in raw if document.get("name") is not None]
    problems = list(_name_problems(raw, names))
    documents: list[Document] = []
    for number, mapping in enumerate(raw, start=1):
        label = str(mapping.get("name") or f"document {number}")
        if mapping.get("merge_method") in other_methods:
            problems.append(f"{shorten(label)}: merge_method: {mapping['merge_method']} goes into a file of its own")
            continue
        try:
            config = load_data_free(mapping, file.path.resolve().parent, names, other_methods, strict=file.strict)
        except ConfigError as error:
            problems += [f"{shorten(label)}: {problem}" for problem in error.problems]
            continue
        used = [model_of(reference) for reference in references_of(config)]
        documents.append(Document(label, config, tuple(dict.fromkeys(model for model in used if model in names))))
        problems += [f"{shorten(label)}: {problem}" for problem in _unknown(used, names)]
    if not problems:
        problems += _order_problems(documents, keeps_all)
    if problems:
        raise ConfigError(*problems)
    return _ordered(documents)


def references_of(config: DataFreeConfig) -> list[str]:
    """Lists all models that a configuration names, those included that only its vocabulary needs."""
    found = list(config.references)
    if config.vocabulary is not None:
        if config.vocabulary.source not in ("union", "base"):
            found.append(config.vocabulary.source)
        found += [model for _, model in config.vocabulary.models()]
    if config.aligned_to is not None:
        found.append(config.aligned_to)
    return list(dict.fromkeys(found))


def model_of(reference: str) -> str:
    """Returns a reference without adapter and revision, such as the name of a document."""
    return split_reference(reference)[0].partition("@")[0]


def _name_problems(raw: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"name: {names.count(name)} documents are called {shown(name)}; expected names that differ"
    for name in dict.fromkeys(names):
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or "+" in name or "@" in name:
            yield f"name: {shown(name)} is no name of a folder; expected letters, digits and the like"
    unnamed = len(raw) - len(names)
    if unnamed > 1:
        yield f"name: {unnamed} documents have none; expected one at most, which makes the output"


def _unknown(used: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    for model in dict.fromkeys(used):
        if model not in names and "/" not in model and not Path(model).expanduser().exists():
            hint = nearest(model, names) or f"; documents are called {shown(list(names))}"
            yield f"{shown(model)} is neither another document nor a folder nor a Hub id{hint}"


def _order_problems(documents: Sequence[Document], keeps_all: bool) -> Iterator[str]:
    try:
        tuple(graphlib.TopologicalSorter({document.label: document.needs for document in documents}).static_order())
    except graphlib.CycleError as error:
        yield f"documents need each other in a circle: {' → '.join(error.args[1])}"
        return
    ends = _ends(documents)
    unnamed = [document for document in documents if document.config.name is None]
    if not unnamed and len(ends) > 1:
        yield (
            f"{', '.join(document.label for document in ends)}: no other document needs them; "
            "expected one such document, or one without a name, which makes the output"
        )
    elif unnamed and not keeps_all:
        for document in ends:
            if document is not unnamed[0]:
                yield f"{document.label}: no other document needs it; --intermediate-dir would keep what it makes"


def _ends(documents: Sequence[Document]) -> list[Document]:
    """Lists the documents that no other needs."""
    needed = {name for document in documents for name in document.needs}
    return [document for document in documents if document.label not in needed]


def _ordered(documents: Sequence[Document]) -> list[Document]:
    """Orders documents by what they need; the one that makes the output is the last."""
    last = next((document for document in documents if document.config.name is None), None) or _ends(documents)[0]
    by_label = {document.label: document for document in documents}
    order = graphlib.TopologicalSorter({document.label: document.needs for document in documents}).static_order()
    return [*(by_label[label] for label in order if label != last.label), last]


def plan_series(
    file: Documents, *, other_methods: Sequence[str] = (), probe: bool = False, **options: Any
) -> SeriesPlan:
    """Plans all merges of a file, from configurations and headers.

    Args:
        file: The documents, as they were read.
        other_methods: Names of methods that are not data-free, for messages.
        probe: Whether to measure this machine, so that the plans say how long the merges will take.
        options: Other options of `plan_data_free`.

    Raises:
        LargemergeError: If the inputs cannot be opened.
    """
    with _planned(load_documents(file, keeps_all=True, other_methods=other_methods), probe=probe, **options) as plan:
        return plan


def merge_series(
    file: Documents, out: Path, intermediate: Path | None, *, other_methods: Sequence[str] = (), **options: Any
) -> DataFreeReport:
    """Runs all merges of a file; the last one's result goes to OUT.

    Args:
        file: The documents, as they were read.
        out: The output folder.
        intermediate: Folder where the others' results go, and stay; by default they are deleted at the end.
        other_methods: Names of methods that are not data-free, for messages.
        options: Options of `merge_data_free`.

    Raises:
        LargemergeError: For anything wrong with any of them, before the first one begins.
    """
    documents = load_documents(file, keeps_all=intermediate is not None, other_methods=other_methods)
    folder = intermediate if intermediate is not None else out / WORKING_FOLDER / INTERMEDIATE_FOLDER
    resume, force = options.pop("resume"), options.pop("force")
    with stay_together():
        with start_ranks() as ranks:
            machine = {"device": options["device"], "limits": options.get("limits")}
            ranks.agree(lambda: _check(documents, out, folder, ranks, machine, resume=resume, force=force))
            is_quiet = options["quiet"] or not ranks.is_first
        prior = PriorMerges()
        for number, document in enumerate(documents, start=1):
            is_last = number == len(documents)
            target = out if is_last else folder / document.label
            if not is_quiet:
                tell(f"merge {number} of {len(documents)}: {document.label} → {target}")
            resumes = resume and (target / WORKING_FOLDER / "manifest.json").exists()
            if is_last:
                return merge_data_free(document.config, out, prior=prior, resume=resumes, force=force, **options)
            with start_ranks() as ranks:
                state = ranks.agree(partial(_state, document, target, prior, force=force and not resume))
            if state is not _Result.MADE:
                again = force or state is _Result.DAMAGED
                merge_data_free(document.config, target, prior=prior, resume=resumes, force=again, **options)
            report = read_json(target / REPORT_FILE, error=OutputError)
            prior = prior.with_result(document.config, open_checkpoint(target, document.label), report)
    raise AssertionError("there is a last document")


def _check(
    documents: list[Document],
    out: Path,
    folder: Path,
    ranks: Ranks,
    machine: Mapping[str, Any],
    *,
    resume: bool,
    force: bool,
) -> None:
    """Plans everything, and looks at the output folder, before the first merge begins."""
    with _planned(documents, ranks=ranks, **machine) as plan:
        if plan.problems:
            raise LargemergeError(*plan.problems)
        inputs = [path for each in plan.plans.values() for path in input_folders(each)]
        room = room_problems(_needs(documents, plan, out, folder, again=force and not resume))
    if not ranks.is_first:
        return
    if room:
        raise LargemergeError(*room)
    check_no_input(out, inputs, force=force)
    targets = [folder / document.label for document in documents[:-1]]
    for target in targets:
        check_no_input(target, inputs, force=force)
        if folder != out / WORKING_FOLDER / INTERMEDIATE_FOLDER:
            _check_target(target, out)
    inside = out / WORKING_FOLDER / INTERMEDIATE_FOLDER
    if inside.exists() and not (resume or force):
        raise OutputError(f"{out} holds an unfinished run; --resume goes on with it, --force starts afresh")
    check_output(out, inputs, resume=resume, force=force)
    if inside.exists() and not resume:
        shutil.rmtree(inside)
    folder.mkdir(parents=True, exist_ok=True)


def _check_target(target: Path, out: Path) -> None:
    """Refuses a folder for a result that is the output's, lies in it or holds it, or holds something else."""
    one, other = target.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise OutputError(f"{target}, the result of another document, and {out}, the output: expected folders apart")
    ours = (target / REPORT_FILE, target / WORKING_FOLDER / "manifest.json")
    if target.exists() and not any(path.is_file() for path in ours) and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} is no result of a merge; remove it, or take another --intermediate-dir")


def _needs(documents: list[Document], plan: SeriesPlan, out: Path, folder: Path, *, again: bool) -> Iterator[Need]:
    """Yields what all merges will write where; results that are there already are not written again."""
    for document in documents[:-1]:
        target = folder / document.label
        keeps = again and folder != out / WORKING_FOLDER / INTERMEDIATE_FOLDER  # to the end of the merge
        yield from plan.plans[document.label].needs(target, target / WORKING_FOLDER if keeps else target)
    yield from plan.plans[documents[-1].label].needs(out)


class _Result(Enum):
    """What there is of a document's result."""

    MISSING = "missing"
    MADE = "made"
    DAMAGED = "damaged"


def _state(document: Document, target: Path, prior: PriorMerges, *, force: bool) -> _Result:
    """Finds out whether a result is there already, made from the same configuration and files, and whole.

    Raises:
        OutputError: If something else is there.
    """
    config = target / transformer_folder(target, document.label) / "config.json"
    if force or not config.exists() or (target / WORKING_FOLDER / "manifest.json").exists():
        return _Result.MISSING
    try:
        report = read_json(target / REPORT_FILE)
        inputs = {name: described["files"] for name, described in report["inputs"].items()}
        before = [report["config"], inputs, report["plan"]["vocabulary"]]
    except (CheckpointError, KeyError, TypeError, AttributeError):
        raise OutputError(f"{target} is no result of a merge; remove it, or take another --intermediate-dir") from None
    plan = plan_data_free(document.config, prior, device="cpu")  # the device does not matter here
    vocabulary = plan.vocabulary.to_json() if plan.vocabulary is not None else None
    now = {name: dict(checkpoint.fingerprint) for name, checkpoint in plan.checkpoints.items()}
    same = json.loads(document.config.model_dump_json(exclude_defaults=True))
    if before != json.loads(json.dumps([same, now, vocabulary])):
        changed = "inputs" if before[0] == same else "configuration"
        raise OutputError(f"{target} was made from another {changed}; --force makes it again")
    damage = find_damage(target)
    if damage and WORKING_FOLDER not in target.parts:
        raise OutputError(*damage, f"{target} is not as it was written; --force makes it again")
    return _Result.DAMAGED if damage else _Result.MADE


@contextmanager
def _planned(documents: list[Document], *, probe: bool = False, **options: Any) -> Iterator[SeriesPlan]:
    """Plans one merge after the other; while the block runs, results yet to be made are folders without weights."""
    plans: dict[str, DataFreePlan] = {}
    problems: list[str] = []
    prior = PriorMerges()
    with scratch_folder("plan") as folder:
        for document in documents:
            if not set(document.needs) <= set(prior.checkpoints):
                problems += _open_problems(document)  # that what it needs cannot be planned is among them already
                continue
            try:
                probes = probe and not document.needs  # of what is yet to be made nothing can be read
                plan = plan_data_free(document.config, prior, probe=probes, **options)
            except LargemergeError as error:
                problems += [f"{document.label}: {problem}" for problem in error.problems]
                continue
            plans[document.label] = plan
            if not plan.problems:
                placeholder = _placeholder(plan, folder / document.label, document.label)
                prior = prior.with_result(document.config, placeholder, {})
        if problems:
            raise LargemergeError(*problems, *SeriesPlan(plans).problems)
        yield SeriesPlan(plans)


def _open_problems(document: Document) -> Iterator[str]:
    """Yields what is wrong with the models of a document that are no results of others."""
    for reference in document.config.references:
        if model_of(reference) not in document.needs:
            try:
                open_model(reference, find_places=AdapterNames())
            except LargemergeError as error:
                yield from (f"{document.label}: {problem}" for problem in error.problems)


def _placeholder(plan: DataFreePlan, folder: Path, name: str) -> Checkpoint:
    """Makes a checkpoint without weights like the one that a merge will write, for the plans of those that need it."""
    folder.mkdir(parents=True)
    text = config_text(plan)
    (folder / "config.json").write_text(text, encoding="utf-8")
    plan.files.write_tokenizer(folder)
    file = folder / "model.safetensors"
    tensors = {key: TensorInfo(key, tensor.shape, tensor.dtype, file, 0) for key, tensor in plan.output.items()}
    return Checkpoint(name, folder, json.loads(text), tensors, {})
