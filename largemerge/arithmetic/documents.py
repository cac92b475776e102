"""Several merges in one file, as mergekit-multi reads them: documents that name each other's results as models.

    name: first
    merge_method: linear
    models: …
    ---
    merge_method: ties
    base_model: first
    …

They run in the order of what they need. The last one's result is the output: the document without a name, or else the
one that no other needs. All the others go to a folder of their own, each a checkpoint like any other.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largemerge.arithmetic.config import DataFreeConfig, load_data_free
from largemerge.arithmetic.dispatch import REGRESSION_METHODS
from largemerge.config_file import nearest, read_documents
from largemerge.errors import ConfigError
from largemerge.references import split_reference


@dataclass(frozen=True)
class Document:
    """One of the merges.

    Attributes:
        label: Its name; where it has none, what messages call it.
        config: Of the merge; other documents' results stand there by their names.
        needs: Names of the documents that it is made of.
    """

    label: str
    config: DataFreeConfig
    needs: tuple[str, ...]


def load_documents(path: Path, *, keeps_all: bool) -> list[Document]:
    """Reads and checks all documents of a file.

    Args:
        path: A YAML file.
        keeps_all: Whether results that no other document needs are kept, too.

    Returns:
        In an order in which they can be made; the last one makes the output.

    Raises:
        ConfigError: With every mistake found.
    """
    raw = read_documents(path)
    names = [str(document["name"]) for document in raw if document.get("name") is not None]
    problems = list(_name_problems(raw, names))
    documents: list[Document] = []
    for number, mapping in enumerate(raw, start=1):
        label = str(mapping.get("name") or f"document {number}")
        if mapping.get("merge_method") in REGRESSION_METHODS:
            problems.append(f"{label}: merge_method: {mapping['merge_method']} goes into a file of its own")
            continue
        try:
            config = load_data_free(mapping, path.resolve().parent, names)
        except ConfigError as error:
            problems += [f"{label}: {problem}" for problem in error.problems]
            continue
        used = [model_of(reference) for reference in references_of(config)]
        documents.append(Document(label, config, tuple(dict.fromkeys(each for each in used if each in names))))
        problems += [f"{label}: {problem}" for problem in _unknown(used, names)]
    if not problems:
        problems += _order_problems(documents, keeps_all)
    if problems:
        raise ConfigError(*problems)
    return _ordered(documents)


def references_of(config: DataFreeConfig) -> list[str]:
    """All that a configuration names as models, those included that only its vocabulary needs."""
    found = list(config.references)
    if config.vocabulary is not None:
        if config.vocabulary.source not in ("union", "base"):
            found.append(config.vocabulary.source)
        found += [model for _, model in config.vocabulary.models()]
    return list(dict.fromkeys(found))


def model_of(reference: str) -> str:
    """Without adapter and revision, as a document's name stands there."""
    return split_reference(reference)[0].partition("@")[0]


def _name_problems(raw: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"name: {names.count(name)} documents are called {name!r}; expected names that differ"
    for name in dict.fromkeys(names):
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or "+" in name or "@" in name:
            yield f"name: {name!r} is no name of a folder; expected letters, digits and the like"
    unnamed = len(raw) - len(names)
    if unnamed > 1:
        yield f"name: {unnamed} documents have none; expected one at most, which makes the output"


def _unknown(used: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    for model in dict.fromkeys(used):
        if model not in names and "/" not in model and not Path(model).expanduser().exists():
            hint = nearest(model, names) or f"; documents are called {list(names)}"
            yield f"{model!r} is neither another document nor a folder nor a Hub id{hint}"


def _order_problems(documents: Sequence[Document], keeps_all: bool) -> Iterator[str]:
    try:
        tuple(graphlib.TopologicalSorter({each.label: each.needs for each in documents}).static_order())
    except graphlib.CycleError as error:
        yield f"documents need each other in a circle: {' → '.join(error.args[1])}"
        return
    ends = _ends(documents)
    unnamed = [each for each in documents if each.config.name is None]
    if not unnamed and len(ends) > 1:
        yield (
            f"{', '.join(each.label for each in ends)}: no other document needs them; expected one such document, "
            "or one without a name, which makes the output"
        )
    elif unnamed and not keeps_all:
        for each in ends:
            if each is not unnamed[0]:
                yield f"{each.label}: no other document needs it; --intermediate-dir would keep what it makes"


def _ends(documents: Sequence[Document]) -> list[Document]:
    needed = {name for each in documents for name in each.needs}
    return [each for each in documents if each.label not in needed]


def _ordered(documents: Sequence[Document]) -> list[Document]:
    last = next((each for each in documents if each.config.name is None), None) or _ends(documents)[0]
    by_label = {each.label: each for each in documents}
    order = graphlib.TopologicalSorter({each.label: each.needs for each in documents}).static_order()
    return [*(by_label[label] for label in order if label != last.label), last]
