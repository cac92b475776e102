"""Rows of the table for methods of the literature that mergekit does not have.

Names of parameters and defaults are those of the papers' own programs, and FusionBench's where it has the method.

The table of data-free methods: names, parameters and defaults are mergekit's, where it has the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from largemerge.data_free.matrices import too_small, why_not_a_matrix
from largemerge.data_free.methods import averaging, covariance, masks, slerp, svd, task_arithmetic
from largemerge.data_free.methods.base import (
    REQUIRED,
    Base,
    Cut,
    Matrices,
    Merge,
    Method,
    Piece,
    Range,
    Scaled,
    Way,
    always,
    knowing,
    plain,
    rows_of_pieces,
    way_of,
)

_SINGLE, _DOUBLE = 4, 8
_NUMBER, _SHARE, _POSITIVE = Range(), Range(0, 1), Range(0, above=True)


def _factors_bytes(rows: int, columns: int) -> int:
    """Of methods with some float32 matrices of the tensor's size, and float64 ones of its smaller Gram matrix's."""
    return 6 * rows * columns * _SINGLE + 7 * min(rows, columns) ** 2 * _DOUBLE


def _wudi_bytes(rows: int, columns: int) -> int:
    """float64 matrices of the tensor's size and of its inputs' Gram matrix's."""
    return 5 * rows * columns * _DOUBLE + 4 * columns**2 * _DOUBLE


def _ace_bytes(rows: int, columns: int) -> int:
    """The same, some more of them."""
    return 7 * rows * columns * _DOUBLE + 5 * columns**2 * _DOUBLE


def _of_matrices(
    title: str,
    source: str,
    merge: Merge,
    parameters: Mapping[str, tuple[float, Range]],
    work_bytes: Callable[[int, int], int] = _factors_bytes,
    *,
    twice: bool = False,
) -> Method:
    """A row whose formula is one of matrices; what is no weight matrix gets the mean of task vectors.

    Args:
        title: For people.
        source: Paper.
        merge: Merges a whole matrix.
        parameters: Defaults and ranges. The first one scales whatever is added to the base, of others too.
        work_bytes: See `Matrices`.
        twice: See `Way`.
    """
    scale = next(iter(parameters), None)
    return Method(
        title,
        source,
        always(Cut.WHOLE, one_by_one=True, twice=twice),
        plain(merge),
        Base.REQUIRED,
        options={name: default for name, (default, _) in parameters.items()},
        ranges={name: values for name, (_, values) in parameters.items()},
        matrices=Matrices(svd.mean_of_task_vectors(scale), "mean of task vectors", work_bytes),
    )


LITERATURE: dict[str, Method] = {
    "consensus_ta": Method(
        "Consensus Task Arithmetic",
        "arXiv 2405.07813",
        always(Cut.ELEMENTS),
        plain(masks.consensus_ta),
        Base.REQUIRED,
        options={"prun_thre_k": 2, "scaling_factor": 1.0},
        each={"tall_mask_lambda": 0.6},
        ranges={"prun_thre_k": Range(0, whole=True), "scaling_factor": _NUMBER, "tall_mask_lambda": Range(0)},
    ),
    "localize_and_stitch": Method(
        "Localize-and-Stitch, dataless",
        "arXiv 2408.13656",
        always(Cut.ELEMENTS, masks.survey_largest),
        masks.localize_and_stitch,
        Base.REQUIRED,
        each={"sparsity": 0.05},
        ranges={"sparsity": _SHARE},
    ),
    "fisher": Method(
        "Fisher-weighted averaging",
        "arXiv 2111.09832",
        always(Cut.ELEMENTS),
        plain(masks.fisher),
        Base.NONE,
        each={"fisher": REQUIRED, "weight": 1.0},
        ranges={"weight": _POSITIVE},
        companion="fisher",
    ),
    "tsv_m": _of_matrices("TSV-M", "arXiv 2412.00081", svd.tsv_m, {"alpha": (1.0, _NUMBER)}),
    "iso_c": _of_matrices("Iso-C", "arXiv 2502.04959", svd.iso_c, {"scaling_factor": (1.0, _NUMBER)}),
    "iso_cts": _of_matrices(
        "Iso-CTS",
        "arXiv 2502.04959",
        svd.iso_cts,
        {"scaling_factor": (1.0, _NUMBER), "common_space_fraction": (0.8, _SHARE)},
        twice=True,
    ),
    "opcm": Method(
        "OPCM",
        "arXiv 2501.09522",
        always(Cut.WHOLE, one_by_one=True),
        plain(svd.opcm_alone),
        Base.REQUIRED,
        options={"alpha": 0.5},
        ranges={"alpha": _SHARE},
        matrices=Matrices(svd.opcm_alone, "sum of task vectors", _factors_bytes),
        scaled=Scaled(svd.opcm_matrix, svd.opcm_others, svd.opcm_factor),
    ),
    "wudi": _of_matrices("WUDI-Merging, closed form", "arXiv 2503.08099", covariance.wudi, {}, _wudi_bytes),
    "ace": _of_matrices(
        "ACE-Merging",
        "arXiv 2603.02945",
        covariance.ace,
        {
            "scaling_coefficient": (1.0, _NUMBER),
            "eps": (1e-2, _POSITIVE),
            "k_frac": (0.3, _SHARE),
            "heterogeneity": (0.3, Range(0)),
        },
        _ace_bytes,
        twice=True,
    ),
}


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
        always(cut, task_arithmetic.survey(sparsifier) if sparsifier is not None else None, less_base=True),
        task_arithmetic.merge_task_vectors(elects_sign),
        Base.REQUIRED,
        options={"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False},
        each=each,
    )


def _nuslerp_way(options: Mapping[str, Any]) -> Way:
    if options["nuslerp_flatten"]:
        return Way(Cut.ELEMENTS, slerp.survey_products)
    return Way(Cut.WHOLE if options["nuslerp_row_wise"] else Cut.ROWS)


def _stock_way(options: Mapping[str, Any]) -> Way:
    return Way(Cut.ROWS) if options["filter_wise"] else Way(Cut.ELEMENTS, slerp.survey_products)


METHODS: dict[str, Method] = {
    "linear": Method(
        "Linear",
        "arXiv 2203.05482",
        always(Cut.ELEMENTS),
        plain(averaging.linear),
        Base.NONE,
        options={"normalize": True},
        each={"weight": REQUIRED},
    ),
    "passthrough": Method(
        "Passthrough", "", always(Cut.ELEMENTS), plain(averaging.passthrough), Base.NONE, (1, 1), each={"scale": None}
    ),
    "slerp": Method(
        "SLERP",
        "Shoemake 1985",
        always(Cut.ELEMENTS, slerp.survey_plain_products),
        knowing(slerp.slerp),
        Base.REQUIRED,
        (1, 1),
        options={"t": REQUIRED},
    ),
    "nuslerp": Method(
        "NuSLERP",
        "mergekit",
        _nuslerp_way,
        knowing(slerp.nuslerp),
        Base.OPTIONAL,
        (2, 2),
        options={"nuslerp_row_wise": False, "nuslerp_flatten": True},
        each={"weight": REQUIRED},
    ),
    "multislerp": Method(
        "Multi-SLERP",
        "mergekit",
        always(Cut.ELEMENTS, slerp.survey_products),
        knowing(slerp.multislerp),
        Base.OPTIONAL,
        options={"normalize_weights": True, "eps": 1e-8},
        each={"weight": REQUIRED},
    ),
    "karcher": Method(
        "Karcher mean",
        "Karcher 1977",
        always(Cut.ELEMENTS, slerp.survey_plain_products),
        knowing(slerp.karcher),
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
        always(Cut.ELEMENTS, task_arithmetic.survey_sce, less_base=True),
        task_arithmetic.sce,
        Base.REQUIRED,
        options={"int8_mask": False, "select_topk": 1.0},
    ),
    "model_stock": Method(
        "Model Stock",
        "arXiv 2403.19522",
        _stock_way,
        knowing(averaging.model_stock),
        Base.REQUIRED,
        (2, 1 << 30),
        options={"filter_wise": False},
    ),
    "nearswap": Method(
        "NearSwap",
        "mergekit",
        always(Cut.ELEMENTS),
        plain(averaging.nearswap),
        Base.REQUIRED,
        (1, 1),
        options={"t": REQUIRED},
    ),
    "arcee_fusion": Method(
        "Arcee Fusion",
        "mergekit",
        always(Cut.ROWS, averaging.survey_importance),
        knowing(averaging.arcee_fusion),
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
