"""The table of data-free methods: names, parameters and defaults are mergekit's, where it has the method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from largemerge.arithmetic import averages, spheres, stock, task_vectors
from largemerge.arithmetic.literature import LITERATURE
from largemerge.arithmetic.matrices import too_small, why_not_a_matrix
from largemerge.arithmetic.method import REQUIRED, Base, Method, Way, always, knowing, plain, way_of
from largemerge.arithmetic.pieces import Cut, Piece, rows_of_pieces

__all__ = ["METHODS", "REQUIRED", "Base", "merge_tensors"]


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
        always(cut, task_vectors.survey(sparsifier) if sparsifier is not None else None, less_base=True),
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
        always(Cut.ELEMENTS),
        plain(averages.linear),
        Base.NONE,
        options={"normalize": True},
        each={"weight": REQUIRED},
    ),
    "passthrough": Method(
        "Passthrough", "", always(Cut.ELEMENTS), plain(averages.passthrough), Base.NONE, (1, 1), each={"scale": None}
    ),
    "slerp": Method(
        "SLERP",
        "Shoemake 1985",
        always(Cut.ELEMENTS, spheres.survey_plain_products),
        knowing(spheres.slerp),
        Base.REQUIRED,
        (1, 1),
        options={"t": REQUIRED},
    ),
    "nuslerp": Method(
        "NuSLERP",
        "mergekit",
        _nuslerp_way,
        knowing(spheres.nuslerp),
        Base.OPTIONAL,
        (2, 2),
        options={"nuslerp_row_wise": False, "nuslerp_flatten": True},
        each={"weight": REQUIRED},
    ),
    "multislerp": Method(
        "Multi-SLERP",
        "mergekit",
        always(Cut.ELEMENTS, spheres.survey_products),
        knowing(spheres.multislerp),
        Base.OPTIONAL,
        options={"normalize_weights": True, "eps": 1e-8},
        each={"weight": REQUIRED},
    ),
    "karcher": Method(
        "Karcher mean",
        "Karcher 1977",
        always(Cut.ELEMENTS, spheres.survey_plain_products),
        knowing(spheres.karcher),
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
        always(Cut.ELEMENTS, task_vectors.survey_sce, less_base=True),
        task_vectors.sce,
        Base.REQUIRED,
        options={"int8_mask": False, "select_topk": 1.0},
    ),
    "model_stock": Method(
        "Model Stock",
        "arXiv 2403.19522",
        _stock_way,
        knowing(stock.model_stock),
        Base.REQUIRED,
        (2, 1 << 30),
        options={"filter_wise": False},
    ),
    "nearswap": Method(
        "NearSwap",
        "mergekit",
        always(Cut.ELEMENTS),
        plain(averages.nearswap),
        Base.REQUIRED,
        (1, 1),
        options={"t": REQUIRED},
    ),
    "arcee_fusion": Method(
        "Arcee Fusion",
        "mergekit",
        always(Cut.ROWS, stock.survey_importance),
        knowing(stock.arcee_fusion),
        Base.REQUIRED,
        (1, 1),
    ),
    **LITERATURE,
}


def merge_tensors(
    method: str,
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    *,
    seed: int = 0,
    name: str = "",
    each: Mapping[str, Sequence[Any]] | None = None,
    companions: Sequence[torch.Tensor] = (),
    **options: Any,
) -> torch.Tensor:
    """Merges one tensor of some models, in memory: what a whole merge does with every tensor.

    Methods of matrices treat any two-dimensional one, whatever its name is, as `[outputs, inputs]`.

    Args:
        method: A name in `METHODS`.
        tensors: Of every model but the base, all of one shape and dtype.
        base: Of the base.
        seed: Of random numbers.
        name: Of the tensor; random numbers depend on it.
        each: Parameters of every model, such as `{"weight": [0.5, 0.5]}`.
        companions: What the method wants of every model beside its tensor, as `fisher` does.
        options: Parameters of all models together.
    """
    row = METHODS[method]
    per_model = {key: [default] * len(tensors) for key, default in row.each.items()} | dict(each or {})
    together = {**row.options, **options}
    other = bool(why_not_a_matrix("", tensors[0].shape) or too_small(tensors[0].shape, len(tensors)))
    way, begin = way_of(row, together, other=other)
    rows_of, beside = (
        [tensor if tensor.dim() else tensor.view(1) for tensor in all_] for all_ in (tensors, companions)
    )
    base_rows = base.view(1) if base is not None and not base.dim() else base
    whole = rows_of[0]
    cuts = rows_of_pieces(whole.shape, way.cut)
    row_elements = whole[0].numel() if len(whole) else 0

    def pieces() -> Iterator[Piece]:
        for number, rows in enumerate(cuts):
            origin = base_rows[rows] if base_rows is not None else None
            of_models = [tensor[rows] for tensor in rows_of]
            yield Piece(
                [tensor - origin for tensor in of_models] if way.less_base and origin is not None else of_models,
                origin,
                per_model,
                together,
                rows.start * row_elements,
                whole.numel(),
                f"{seed} {name} {number}",
                [tensor[rows] for tensor in beside],
            )

    merge = begin(way.survey(pieces) if way.survey is not None else None)
    return torch.cat([merge(piece) for piece in pieces()]).view(tensors[0].shape)
