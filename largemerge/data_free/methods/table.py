"""The table of data-free methods, one row each, and `merge_tensors`, which merges one tensor by a row of it.

Names of parameters and defaults are mergekit's where it has the method. Methods of the literature that mergekit does
not have (`LITERATURE`) take them from the papers' own programs, and from FusionBench where it has the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from largemerge.data_free.matrices import too_small, why_not_a_matrix
from largemerge.data_free.methods import (
    averaging,
    coordinates,
    covariance,
    masks,
    ram,
    slerp,
    svd,
    task_arithmetic,
    unlearning,
)
from largemerge.data_free.methods.base import (
    LARGEST,
    REQUIRED,
    Access,
    Base,
    Choice,
    Cut,
    FilePath,
    Flag,
    GlobalScale,
    Kind,
    MatrixFormula,
    Measurement,
    Merge,
    Method,
    Piece,
    Range,
    fixed_access,
    rows_of_pieces,
    select_formula,
    with_first_pass,
    without_first_pass,
)

_SINGLE, _DOUBLE = 4, 8
_SMALLEST_SUM = 1e-6  # of weights that something is divided by, as a share of their magnitudes
_MAX_STEPS = 10_000
_MAX_FACTOR = 1e6  # of task vectors and the like; larger ones would leave 16 bits
_WEIGHT, _SHARE, _POSITIVE, _FLAG = Range(), Range(0, 1), Range(0, above=True), Flag()
Check = Callable[[Mapping[str, Sequence[Any]], Mapping[str, Any]], str | None]
"""Says what is wrong with the parameters of every model and the shared ones together; `None` if nothing is."""

_FACTOR, _LIMIT = Range(-_MAX_FACTOR, _MAX_FACTOR), Range(0, _MAX_FACTOR)


def _task_vector_method(
    title: str, source: str, sparsifier: str | None, *, elects_sign: bool, normalize: bool, rescale: bool
) -> Method:
    """Makes the row of a variant of task arithmetic; `sparsifier` is a `method` of `plan_sparsification`."""
    per_model: dict[str, Any] = {"weight": REQUIRED, "density": 1.0}
    per_model |= {"gamma": 0.01} if sparsifier == "outliers" else {}
    per_model |= {"epsilon": 0.15} if sparsifier == "ranks" else {}
    kinds = {"weight": _WEIGHT, "density": _SHARE, "gamma": _SHARE, "epsilon": _SHARE} | dict.fromkeys(
        ("normalize", "rescale", "int8_mask"), _FLAG
    )
    first_pass = partial(task_arithmetic.plan_sparsification, method=sparsifier) if sparsifier is not None else None
    cut = Cut.ROWS if sparsifier == "ranks" else Cut.ELEMENTS
    return Method(
        title,
        source,
        fixed_access(cut, first_pass, as_task_vectors=True),
        task_arithmetic.merge_task_vectors(elects_sign),
        Base.REQUIRED,
        shared={"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False},
        per_model=per_model,
        kinds={name: kinds.get(name, _FACTOR) for name in ("normalize", "rescale", "lambda", "int8_mask", *per_model)},
        conflict=_leaves_probabilities if sparsifier == "ranks" else _no_conflict,
        idle=_adds_nothing,
        note=_added_by_election if elects_sign else _divided_by_sum,
    )


def _no_conflict(_: Mapping[str, Sequence[Any]], __: Mapping[str, Any]) -> str | None:
    return None


def _adds_nothing(per_model: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> str | None:
    """Says why nothing is added to the base: every density, every weight or a factor is 0."""
    for name, values in per_model.items():
        if name in ("density", "weight") and not any(values):
            return f"{name}: 0 for every model"
    return next((f"{name}: 0" for name in ("lambda", "select_topk", *_FACTORS) if shared.get(name, 1) == 0), None)


_FACTORS = ("alpha", "scaling_factor", "scaling_coefficient", "scale")


def _scales_by_nothing(per_model: Mapping[str, Sequence[Any]], _: Mapping[str, Any]) -> str | None:
    """Says where tensors become 0, which switches single ones off, and would leave nothing if it were all."""
    return "scale: 0" if per_model["scale"][0] == 0 else None


def _divided_by_sum(per_model: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> str | None:
    """Says where weights add up to 0, by which mergekit does not divide, or to less, which turns their signs."""
    weights = per_model["weight"]
    if not shared["normalize"] or not any(weights):
        return None
    if _cancel_out(weights):
        return f"weight: {_listed(weights)} add up to 0: the sum is not divided by it, as in mergekit"
    if sum(weights) > 0:
        return None
    return (
        f"weight: {_listed(weights)} add up to less than 0, and 'normalize' divides by it, as in mergekit: what has a "
        "negative weight is added; normalize: false subtracts it"
    )


def _added_by_election(per_model: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> str | None:
    """Says where the sum of the weights that agree may be negative, which turns their signs, as in mergekit."""
    weights = per_model["weight"]
    if not shared["normalize"] or min(weights) >= 0:
        return None
    return (
        f"weight: {_listed(weights)}: 'normalize' divides by the sum of the weights that agree, as in mergekit: where "
        "only negative ones do, their task vectors are added; normalize: false subtracts them"
    )


def _counts_as_equal(per_model: Mapping[str, Sequence[Any]], _: Mapping[str, Any]) -> str | None:
    """Says where NuSLERP's weights add up to 0, which it takes for equal ones, as mergekit does."""
    weights = per_model["weight"]
    if abs(sum(weights)) >= slerp.SMALLEST_SUM:
        return None
    return f"weight: {_listed(weights)} add up to 0: both models count half, as in mergekit"


def _cancel_out(weights: Sequence[float]) -> bool:
    """Whether weights add up to 0, but for rounding in float32."""
    magnitudes = sum(map(abs, weights))
    return magnitudes < 1 / LARGEST or abs(sum(weights)) < _SMALLEST_SUM * magnitudes


def _listed(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)


def _leaves_probabilities(per_model: Mapping[str, Sequence[Any]], _: Mapping[str, Any]) -> str | None:
    """Says where DELLA's probabilities, density ± epsilon, leave the range from 0 to 1; 0 and 1 alone need none."""
    for density, epsilon in zip(per_model["density"], per_model["epsilon"], strict=True):
        if 0 < density < 1 and (density + epsilon >= 1 or density - epsilon <= 0):
            return f"density {density:g} ± epsilon {epsilon:g} leaves the range from 0 to 1; expected a smaller epsilon"
    return None


def no_sum_of_weights(per_model: Mapping[str, Sequence[Any]], shared: Mapping[str, Any], switch: str) -> str | None:
    """Says where the weights, which a method with this switch divides by their sum, add up to 0."""
    weights = per_model["weight"]
    if not shared[switch] and sum(map(abs, weights)) < _SMALLEST_SUM:
        return f"weight: {_listed(weights)} are so small that the output would be 0; choose others"
    if shared[switch] and _cancel_out(weights):
        return f"weight: {_listed(weights)} add up to 0, which the sum is divided by; choose others, or {switch}: false"
    return None


def _no_direction(per_model: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> str | None:
    """Says where the weighted mean direction of Multi-SLERP would be shorter than `eps`, as far as weights tell."""
    weights = per_model["weight"]
    if not shared["normalize_weights"] and sum(map(abs, weights)) < shared["eps"] and len(weights) > 1:
        return f"weight: {_listed(weights)} are together below eps, {shared['eps']:g}; choose others"
    return no_sum_of_weights(per_model, shared, "normalize_weights")


def _needs_more_tasks(per_model: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> str | None:
    """Says where more tasks are to need an element than there are."""
    count, needed = len(per_model["tall_mask_lambda"]), shared["prun_thre_k"]
    if needed <= count:
        return None
    return f"prun_thre_k: expected {count} at most, the number of models, found {needed}: no element would be merged"


def _betas_cross(_: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> str | None:
    """Says where ResMerge's smallest exponent is above its largest."""
    low, high = shared["src_beta_min"], shared["src_beta_max"]
    return f"src_beta_min: expected {high:g} at most, which is src_beta_max, found {low:g}" if low > high else None


def _nuslerp_access(shared: Mapping[str, Any]) -> Access:
    if shared["nuslerp_flatten"]:
        return Access(Cut.ELEMENTS, slerp.products_of_vectors)
    return Access(Cut.WHOLE if shared["nuslerp_row_wise"] else Cut.ROWS)


def _stock_access(shared: Mapping[str, Any]) -> Access:
    return Access(Cut.ROWS) if shared["filter_wise"] else Access(Cut.ELEMENTS, slerp.products_of_vectors)


def _factors_bytes(rows: int, columns: int) -> int:
    """Peak bytes of a formula of singular vectors: six float32 copies of the matrix, seven float64 of its Gram."""
    return 6 * rows * columns * _SINGLE + 7 * min(rows, columns) ** 2 * _DOUBLE


def _wudi_bytes(rows: int, columns: int) -> int:
    """Peak bytes of WUDI: five float64 copies of the matrix and five of its inputs' Gram."""
    return 5 * rows * columns * _DOUBLE + 5 * columns**2 * _DOUBLE


def _knots_bytes(rows: int, columns: int) -> int:
    """Peak bytes of KnOTS: ten float32 copies of the matrix and five float64 of its outputs' Gram."""
    return 10 * rows * columns * _SINGLE + 5 * rows**2 * _DOUBLE


def _ace_bytes(rows: int, columns: int) -> int:
    """Peak bytes of ACE: seven float64 copies of the matrix and five of its inputs' Gram."""
    return 7 * rows * columns * _DOUBLE + 5 * columns**2 * _DOUBLE


def _matrix_method(
    title: str,
    source: str,
    merge: Merge,
    parameters: Mapping[str, tuple[float | str, Kind]],
    work_bytes: Callable[[int, int], int] = _factors_bytes,
    *,
    scale: str | None,
    reread: bool = False,
    conflict: Check = _no_conflict,
) -> Method:
    """Makes the row of a formula for weight matrices; other tensors get the mean of task vectors.

    Args:
        title: The method's name.
        source: The paper.
        merge: Merges a whole matrix.
        parameters: Defaults and kinds of the shared parameters.
        work_bytes: Peak bytes of the formula from rows and columns, see `MatrixFormula`.
        scale: The shared parameter that scales whatever is added to the base, of tensors that are no matrices, too.
        reread: Whether the formula asks for every task vector twice, see `Access`.
        conflict: What is wrong with the parameters together, see `Method`.
    """
    return Method(
        title,
        source,
        fixed_access(Cut.WHOLE, lazy=True, reread=reread),
        without_first_pass(merge),
        Base.REQUIRED,
        shared={name: default for name, (default, _) in parameters.items()},
        kinds={name: values for name, (_, values) in parameters.items()},
        conflict=conflict,
        idle=_adds_nothing,
        matrix_formula=MatrixFormula(svd.mean_of_task_vectors(scale), "mean of task vectors", work_bytes),
    )


LITERATURE: dict[str, Method] = {
    "consensus_ta": Method(
        "Consensus Task Arithmetic",
        "arXiv 2405.07813",
        fixed_access(Cut.ELEMENTS),
        without_first_pass(masks.consensus_ta),
        Base.REQUIRED,
        shared={"prun_thre_k": 2, "scaling_factor": 1.0},
        per_model={"tall_mask_lambda": 0.6},
        kinds={"prun_thre_k": Range(0, whole=True), "scaling_factor": _FACTOR, "tall_mask_lambda": _LIMIT},
        conflict=_needs_more_tasks,
        idle=_adds_nothing,
    ),
    "localize_and_stitch": Method(
        "Localize-and-Stitch, dataless",
        "arXiv 2408.13656",
        fixed_access(Cut.ELEMENTS, masks.find_largest),
        masks.localize_and_stitch,
        Base.REQUIRED,
        per_model={"sparsity": 0.05},
        kinds={"sparsity": Range(0, 1, above=True)},
    ),
    "fisher": Method(
        "Fisher-weighted averaging",
        "arXiv 2111.09832",
        fixed_access(Cut.ELEMENTS),
        without_first_pass(masks.fisher),
        Base.NONE,
        per_model={"fisher": REQUIRED, "weight": 1.0},
        kinds={"fisher": FilePath(), "weight": _POSITIVE},
        auxiliary_parameter="fisher",
    ),
    "task_simplex": Method(
        "Task simplex unlearning, first order",
        "NeurIPS 2025",
        fixed_access(Cut.ELEMENTS),
        without_first_pass(unlearning.task_simplex),
        Base.REQUIRED,
        shared={"lambda": 1.0},
        per_model={"weight": 1.0},
        kinds={"lambda": _FACTOR, "weight": _POSITIVE},
        idle=_adds_nothing,
        measurement=Measurement(
            "spread",
            "task vectors",
            unlearning.spread_sums,
            unlearning.spread,
            unlearning.spread_in_words,
        ),
    ),
    "tsv_m": _matrix_method("TSV-M", "arXiv 2412.00081", svd.tsv_m, {"alpha": (1.0, _FACTOR)}, scale="alpha"),
    "iso_c": _matrix_method(
        "Iso-C", "arXiv 2502.04959", svd.iso_c, {"scaling_factor": (1.0, _FACTOR)}, scale="scaling_factor"
    ),
    "iso_cts": _matrix_method(
        "Iso-CTS",
        "arXiv 2502.04959",
        svd.iso_cts,
        {"scaling_factor": (1.0, _FACTOR), "common_space_fraction": (0.8, _SHARE)},
        scale="scaling_factor",
        reread=True,
    ),
    "dc_merge": _matrix_method(
        "DC-Merge",
        "arXiv 2603.06242",
        coordinates.dc_merge,
        {
            "alpha": (1.0, _FACTOR),
            "select_topk": (1e-3, Range(0, 1, above=True)),
            "smoothing": ("none", Choice(coordinates.SMOOTHING)),
            "rho": (5.0, Range(1, _MAX_FACTOR)),
        },
        scale="alpha",
    ),
    "resmerge": _matrix_method(
        "ResMerge",
        "arXiv 2606.02252",
        svd.resmerge,
        {
            "rank_topk": (1, Range(1, _MAX_STEPS, whole=True)),
            "src_beta_min": (0.7, _LIMIT),
            "src_beta_max": (1.0, _LIMIT),
            "head_ratio_budget": (0.2, _LIMIT),
        },
        scale=None,
        conflict=_betas_cross,
    ),
    "knots": Method(
        "KnOTS with TIES",
        "arXiv 2410.19735",
        fixed_access(Cut.WHOLE, lazy=True, reread=True),
        without_first_pass(coordinates.knots),
        Base.REQUIRED,
        shared={"normalize": True, "lambda": 1.0},
        per_model={"weight": 1.0, "density": 1.0},
        kinds={"normalize": _FLAG, "lambda": _FACTOR, "weight": _WEIGHT, "density": _SHARE},
        idle=_adds_nothing,
        matrix_formula=MatrixFormula(coordinates.weighted_task_vectors, "task arithmetic", _knots_bytes),
    ),
    "ip_merging": Method(
        "IP-Merging",
        "arXiv 2510.14387",
        fixed_access(Cut.WHOLE, lazy=True, reread=True),
        without_first_pass(svd.ip_merging),
        Base.REQUIRED,
        (2, 2),
        shared={"scale": 1.0, "rank": 1024, "threshold": 0.4, "temperature": 32.0},
        kinds={
            "scale": _FACTOR,
            "rank": Range(1, _MAX_FACTOR, whole=True),
            "threshold": _SHARE,
            "temperature": _LIMIT,
        },
        idle=_adds_nothing,
        matrix_formula=MatrixFormula(svd.first_model, "the first model's own", _factors_bytes),
        leads=True,
    ),
    "opcm": Method(
        "OPCM",
        "arXiv 2501.09522",
        fixed_access(Cut.WHOLE, lazy=True),
        without_first_pass(svd.opcm_alone),
        Base.REQUIRED,
        shared={"alpha": 0.5},
        kinds={"alpha": _SHARE},
        matrix_formula=MatrixFormula(svd.opcm_alone, "sum of task vectors", _factors_bytes),
        global_scale=GlobalScale(svd.opcm_matrix, svd.opcm_fallback, svd.opcm_factor),
    ),
    "wudi": _matrix_method(
        "WUDI-Merging, closed form",
        "arXiv 2503.08099, 2606.07289",
        covariance.wudi,
        {
            "exp_time": (300.0, Range(0, _MAX_FACTOR, word=covariance.UNLIMITED)),
            "truncate_rank_ratio": (0.65, Range(0, 1, above=True)),
        },
        _wudi_bytes,
        scale=None,
    ),
    "ace": _matrix_method(
        "ACE-Merging",
        "arXiv 2603.02945",
        covariance.ace,
        {
            "scaling_coefficient": (1.0, _FACTOR),
            "eps": (1e-2, Range(0, _MAX_FACTOR, above=True)),
            "k_frac": (0.3, _SHARE),
            "heterogeneity": (0.3, _LIMIT),
        },
        _ace_bytes,
        scale="scaling_coefficient",
        reread=True,
    ),
}


METHODS: dict[str, Method] = {
    "linear": Method(
        "Linear",
        "arXiv 2203.05482",
        fixed_access(Cut.ELEMENTS),
        without_first_pass(averaging.linear),
        Base.NONE,
        shared={"normalize": True},
        per_model={"weight": REQUIRED},
        kinds={"normalize": _FLAG, "weight": _WEIGHT},
        conflict=partial(no_sum_of_weights, switch="normalize"),
    ),
    "passthrough": Method(
        "Passthrough",
        "",
        fixed_access(Cut.ELEMENTS),
        without_first_pass(averaging.passthrough),
        Base.NONE,
        (1, 1),
        per_model={"scale": None},
        kinds={"scale": _FACTOR},
        idle=_scales_by_nothing,
    ),
    "slerp": Method(
        "SLERP",
        "Shoemake 1985",
        fixed_access(Cut.ELEMENTS, slerp.products_of_models),
        with_first_pass(slerp.slerp),
        Base.REQUIRED,
        (1, 1),
        shared={"t": REQUIRED},
        kinds={"t": _FACTOR},
    ),
    "nuslerp": Method(
        "NuSLERP",
        "mergekit",
        _nuslerp_access,
        with_first_pass(slerp.nuslerp),
        Base.OPTIONAL,
        (2, 2),
        shared={"nuslerp_row_wise": False, "nuslerp_flatten": True},
        per_model={"weight": REQUIRED},
        kinds={"nuslerp_row_wise": _FLAG, "nuslerp_flatten": _FLAG, "weight": _WEIGHT},
        note=_counts_as_equal,
    ),
    "multislerp": Method(
        "Multi-SLERP",
        "mergekit",
        fixed_access(Cut.ELEMENTS, slerp.products_of_vectors),
        with_first_pass(slerp.multislerp),
        Base.OPTIONAL,
        shared={"normalize_weights": True, "eps": 1e-8},
        per_model={"weight": REQUIRED},
        kinds={"normalize_weights": _FLAG, "eps": Range(0, 0.1, above=True), "weight": _WEIGHT},
        conflict=_no_direction,
    ),
    "karcher": Method(
        "Karcher mean",
        "Karcher 1977",
        fixed_access(Cut.ELEMENTS, slerp.products_of_models),
        with_first_pass(slerp.karcher),
        Base.MEMBER,
        shared={"max_iter": 10, "tol": 1e-5},
        kinds={"max_iter": Range(1, _MAX_STEPS, whole=True), "tol": Range(0, 0.1)},
    ),
    "task_arithmetic": _task_vector_method(
        "Task arithmetic", "arXiv 2212.04089", None, elects_sign=False, normalize=False, rescale=False
    ),
    "ties": _task_vector_method(
        "TIES", "arXiv 2306.01708", "magnitude", elects_sign=True, normalize=True, rescale=False
    ),
    "dare_ties": _task_vector_method(
        "DARE TIES", "arXiv 2311.03099", "random", elects_sign=True, normalize=False, rescale=True
    ),
    "dare_linear": _task_vector_method(
        "Linear DARE", "arXiv 2311.03099", "random", elects_sign=False, normalize=False, rescale=True
    ),
    "breadcrumbs": _task_vector_method(
        "Model Breadcrumbs", "arXiv 2312.06795", "outliers", elects_sign=False, normalize=False, rescale=False
    ),
    "breadcrumbs_ties": _task_vector_method(
        "Model Breadcrumbs with TIES", "arXiv 2312.06795", "outliers", elects_sign=True, normalize=False, rescale=False
    ),
    "della": _task_vector_method("DELLA", "arXiv 2406.11617", "ranks", elects_sign=True, normalize=True, rescale=True),
    "della_linear": _task_vector_method(
        "Linear DELLA", "arXiv 2406.11617", "ranks", elects_sign=False, normalize=False, rescale=True
    ),
    "sce": Method(
        "SCE",
        "arXiv 2408.07990",
        fixed_access(Cut.ELEMENTS, task_arithmetic.select_by_variance, as_task_vectors=True),
        task_arithmetic.sce,
        Base.REQUIRED,
        shared={"int8_mask": False, "select_topk": 1.0},
        kinds={"int8_mask": _FLAG, "select_topk": _SHARE},
        idle=_adds_nothing,
    ),
    "model_stock": Method(
        "Model Stock",
        "arXiv 2403.19522",
        _stock_access,
        with_first_pass(averaging.model_stock),
        Base.REQUIRED,
        (2, 1 << 30),
        shared={"filter_wise": False},
        kinds={"filter_wise": _FLAG},
    ),
    "nearswap": Method(
        "NearSwap",
        "mergekit",
        fixed_access(Cut.ELEMENTS),
        without_first_pass(averaging.nearswap),
        Base.REQUIRED,
        (1, 1),
        shared={"t": REQUIRED},
        kinds={"t": _LIMIT},
    ),
    "arcee_fusion": Method(
        "Arcee Fusion",
        "mergekit",
        fixed_access(Cut.ROWS, averaging.fusion_threshold),
        with_first_pass(averaging.arcee_fusion),
        Base.REQUIRED,
        (1, 1),
    ),
    "ram": Method(
        "Reinforced Agent Merging",
        "arXiv 2601.13572",
        fixed_access(Cut.ELEMENTS, as_task_vectors=True),
        without_first_pass(ram.ram),
        Base.REQUIRED,
        shared={"epsilon": 1e-5},
        kinds={"epsilon": _LIMIT},
    ),
    "ramplus_tl": Method(
        "Reinforced Agent Merging Plus, tensor by tensor",
        "arXiv 2601.13572",
        fixed_access(Cut.ELEMENTS, ram.rescaling_factors, as_task_vectors=True),
        with_first_pass(ram.ramplus_tl),
        Base.REQUIRED,
        shared={"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
        kinds={"r": _FACTOR, "alpha": _LIMIT, "epsilon": _LIMIT},
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
    per_model: Mapping[str, Sequence[Any]] | None = None,
    auxiliary: Sequence[torch.Tensor] = (),
    **shared: Any,
) -> torch.Tensor:
    """Merges one tensor of some models in memory, as a whole merge does with every tensor.

    Methods of weight matrices treat any two-dimensional tensor, whatever its name is, as `[outputs, inputs]`.

    Args:
        method: A name in `METHODS`.
        tensors: The tensors of every model but the base, all of one shape and dtype.
        base: The base's tensor, where the method has one.
        seed: Seed of random numbers.
        name: The tensor's name; random numbers depend on it.
        per_model: Parameters of every model, such as `{"weight": [0.5, 0.5]}`.
        auxiliary: A tensor for each of `tensors`, where the method needs one, as `fisher` does.
        shared: Parameters of all models together.
    """
    row = METHODS[method]
    of_models = {key: [default] * len(tensors) for key, default in row.per_model.items()} | dict(per_model or {})
    of_all = {**row.shared, **shared}
    falls_back = bool(why_not_a_matrix("", tensors[0].shape) or too_small(tensors[0].shape, len(tensors)))
    access, prepare = select_formula(row, of_all, falls_back=falls_back)
    whole, beside = ([tensor if tensor.dim() else tensor.view(1) for tensor in some] for some in (tensors, auxiliary))
    whole_base = base.view(1) if base is not None and not base.dim() else base
    cuts = rows_of_pieces(whole[0].shape, access.cut)

    def pieces() -> Iterator[Piece]:
        for number, rows in enumerate(cuts):
            origin = whole_base[rows] if whole_base is not None else None
            cut = [tensor[rows] for tensor in whole]
            yield Piece(
                [tensor - origin for tensor in cut] if access.as_task_vectors and origin is not None else cut,
                origin,
                of_models,
                of_all,
                num_elements=whole[0].numel(),
                key=f"{seed} {name} {number}",
                auxiliary=[tensor[rows] for tensor in beside],
            )

    merge = prepare(access.first_pass(pieces) if access.first_pass is not None else None)
    return torch.cat([merge(piece) for piece in pieces()]).view(tensors[0].shape)
