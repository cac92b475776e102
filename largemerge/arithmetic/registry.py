"""The table of data-free methods: names, parameters and defaults are mergekit's, where it has the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from largemerge.arithmetic import averages, spheres, stock, task_vectors
from largemerge.arithmetic.pieces import Cut, Piece, Pieces, rows_of_pieces

REQUIRED = object()
"""In the place of a default: there is none."""

Merge = Callable[[Piece], torch.Tensor]
"""Merges one piece after the other, in order."""


class Base(Enum):
    """What a method wants of `base_model`."""

    NONE = "is not used: leave base_model out, or name it among the models"
    OPTIONAL = "is optional"
    REQUIRED = "is needed"
    MEMBER = "is one of the models, if there is one"


@dataclass(frozen=True)
class Way:
    """How a method goes about a tensor.

    Attributes:
        cut: Where the tensor may be cut.
        survey: Reads all pieces first; what it finds goes to `Method.begin`.
    """

    cut: Cut
    survey: Callable[[Pieces], Any] | None = None


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: For people.
        source: Paper, or where it comes from.
        way: From the parameters of all models together.
        begin: From what the survey has found, to what merges the pieces.
        base: What it wants of `base_model`.
        num_models: Fewest and most models, the base not counted.
        options: Parameters of all models together, with their defaults.
        each: Parameters of every model, with their defaults; the base needs none.
    """

    title: str
    source: str
    way: Callable[[Mapping[str, Any]], Way]
    begin: Callable[[Any], Merge]
    base: Base
    num_models: tuple[int, int] = (1, 1 << 30)
    options: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)


def _always(cut: Cut, survey: Callable[[Pieces], Any] | None = None) -> Callable[[Mapping[str, Any]], Way]:
    return lambda _: Way(cut, survey)


def _plain(merge: Merge) -> Callable[[Any], Merge]:
    return lambda _: merge


def _knowing(merge: Callable[[Piece, Any], torch.Tensor]) -> Callable[[Any], Merge]:
    return lambda found: lambda piece: merge(piece, found)


def _task_vectors(
    title: str, source: str, sparsifier: str | None, *, elects_sign: bool, normalize: bool, rescale: bool
) -> Method:
    each: dict[str, Any] = {"weight": REQUIRED, "density": 1.0}
    each |= {"gamma": 0.01} if sparsifier == "outliers" else {}
    each |= {"epsilon": 0.15} if sparsifier == "ranks" else {}
    cut = Cut.ROWS if sparsifier == "ranks" else Cut.ELEMENTS
    return Method(
        title,
        source,
        _always(cut, task_vectors.survey(sparsifier) if sparsifier is not None else None),
        task_vectors.merge_task_vectors(elects_sign),
        Base.REQUIRED,
        options={"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False},
        each=each,
    )


def _nuslerp_way(options: Mapping[str, Any]) -> Way:
    if options["nuslerp_flatten"]:
        return Way(Cut.ELEMENTS, spheres.survey_products)
    return Way(Cut.WHOLE if options["nuslerp_row_wise"] else Cut.ROWS)


def _stock_way(options: Mapping[str, Any]) -> Way:
    return Way(Cut.ROWS) if options["filter_wise"] else Way(Cut.ELEMENTS, spheres.survey_products)


METHODS: dict[str, Method] = {
    "linear": Method(
        "Linear",
        "arXiv 2203.05482",
        _always(Cut.ELEMENTS),
        _plain(averages.linear),
        Base.NONE,
        options={"normalize": True},
        each={"weight": REQUIRED},
    ),
    "passthrough": Method(
        "Passthrough", "", _always(Cut.ELEMENTS), _plain(averages.passthrough), Base.NONE, (1, 1), each={"scale": None}
    ),
    "slerp": Method(
        "SLERP",
        "Shoemake 1985",
        _always(Cut.ELEMENTS, spheres.survey_plain_products),
        _knowing(spheres.slerp),
        Base.REQUIRED,
        (1, 1),
        options={"t": REQUIRED},
    ),
    "nuslerp": Method(
        "NuSLERP",
        "mergekit",
        _nuslerp_way,
        _knowing(spheres.nuslerp),
        Base.OPTIONAL,
        (2, 2),
        options={"nuslerp_row_wise": False, "nuslerp_flatten": True},
        each={"weight": REQUIRED},
    ),
    "multislerp": Method(
        "Multi-SLERP",
        "mergekit",
        _always(Cut.ELEMENTS, spheres.survey_products),
        _knowing(spheres.multislerp),
        Base.OPTIONAL,
        options={"normalize_weights": True, "eps": 1e-8},
        each={"weight": REQUIRED},
    ),
    "karcher": Method(
        "Karcher mean",
        "Karcher 1977",
        _always(Cut.ELEMENTS, spheres.survey_plain_products),
        _knowing(spheres.karcher),
        Base.MEMBER,
        options={"max_iter": 10, "tol": 1e-5},
    ),
    "task_arithmetic": _task_vectors(
        "Task arithmetic", "arXiv 2212.04089", None, elects_sign=False, normalize=False, rescale=False
    ),
    "ties": _task_vectors("TIES", "arXiv 2306.01708", "magnitude", elects_sign=True, normalize=True, rescale=False),
    "dare_ties": _task_vectors(
        "DARE TIES", "arXiv 2311.03099", "random", elects_sign=True, normalize=False, rescale=True
    ),
    "dare_linear": _task_vectors(
        "Linear DARE", "arXiv 2311.03099", "random", elects_sign=False, normalize=False, rescale=True
    ),
    "breadcrumbs": _task_vectors(
        "Model Breadcrumbs", "arXiv 2312.06795", "outliers", elects_sign=False, normalize=False, rescale=False
    ),
    "breadcrumbs_ties": _task_vectors(
        "Model Breadcrumbs with TIES", "arXiv 2312.06795", "outliers", elects_sign=True, normalize=False, rescale=False
    ),
    "della": _task_vectors("DELLA", "arXiv 2406.11617", "ranks", elects_sign=True, normalize=True, rescale=True),
    "della_linear": _task_vectors(
        "Linear DELLA", "arXiv 2406.11617", "ranks", elects_sign=False, normalize=False, rescale=True
    ),
    "sce": Method(
        "SCE",
        "arXiv 2408.07990",
        _always(Cut.ELEMENTS, task_vectors.survey_sce),
        task_vectors.sce,
        Base.REQUIRED,
        options={"int8_mask": False, "select_topk": 1.0},
    ),
    "model_stock": Method(
        "Model Stock",
        "arXiv 2403.19522",
        _stock_way,
        _knowing(stock.model_stock),
        Base.REQUIRED,
        (2, 1 << 30),
        options={"filter_wise": False},
    ),
    "nearswap": Method(
        "NearSwap",
        "mergekit",
        _always(Cut.ELEMENTS),
        _plain(averages.nearswap),
        Base.REQUIRED,
        (1, 1),
        options={"t": REQUIRED},
    ),
    "arcee_fusion": Method(
        "Arcee Fusion",
        "mergekit",
        _always(Cut.ROWS, stock.survey_importance),
        _knowing(stock.arcee_fusion),
        Base.REQUIRED,
        (1, 1),
    ),
}


def merge_tensors(
    method: str,
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    *,
    seed: int = 0,
    name: str = "",
    each: Mapping[str, Sequence[Any]] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Merges one tensor of some models, in memory: what a whole merge does with every tensor.

    Args:
        method: A name in `METHODS`.
        tensors: Of every model but the base, all of one shape and dtype.
        base: Of the base.
        seed: Of random numbers.
        name: Of the tensor; random numbers depend on it.
        each: Parameters of every model, such as `{"weight": [0.5, 0.5]}`.
        options: Parameters of all models together.
    """
    row = METHODS[method]
    per_model = {key: [default] * len(tensors) for key, default in row.each.items()} | dict(each or {})
    together = {**row.options, **options}
    way = row.way(together)
    rows_of = [tensor if tensor.dim() else tensor.view(1) for tensor in tensors]
    base_rows = base.view(1) if base is not None and not base.dim() else base
    whole = rows_of[0]
    cuts = rows_of_pieces(whole.shape, way.cut)
    row_elements = whole[0].numel() if len(whole) else 0

    def pieces() -> Iterator[Piece]:
        for number, rows in enumerate(cuts):
            yield Piece(
                [tensor[rows] for tensor in rows_of],
                base_rows[rows] if base_rows is not None else None,
                per_model,
                together,
                rows.start * row_elements,
                whole.numel(),
                f"{seed} {name} {number}",
            )

    merge = row.begin(way.survey(pieces) if way.survey is not None else None)
    return torch.cat([merge(piece) for piece in pieces()]).view(tensors[0].shape)
