"""Rows of the table for methods of the literature that mergekit does not have.

Names of parameters and defaults are those of the papers' own programs, and FusionBench's where it has the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from largemerge.arithmetic import continual, covariance, masks, singular
from largemerge.arithmetic.method import REQUIRED, Base, Matrices, Merge, Method, Range, Scaled, always, plain
from largemerge.arithmetic.pieces import Cut

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
        matrices=Matrices(singular.mean_of_task_vectors(scale), "mean of task vectors", work_bytes),
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
    "tsv_m": _of_matrices("TSV-M", "arXiv 2412.00081", singular.tsv_m, {"alpha": (1.0, _NUMBER)}),
    "iso_c": _of_matrices("Iso-C", "arXiv 2502.04959", singular.iso_c, {"scaling_factor": (1.0, _NUMBER)}),
    "iso_cts": _of_matrices(
        "Iso-CTS",
        "arXiv 2502.04959",
        singular.iso_cts,
        {"scaling_factor": (1.0, _NUMBER), "common_space_fraction": (0.8, _SHARE)},
        twice=True,
    ),
    "opcm": Method(
        "OPCM",
        "arXiv 2501.09522",
        always(Cut.WHOLE, one_by_one=True),
        plain(continual.opcm_alone),
        Base.REQUIRED,
        options={"alpha": 0.5},
        ranges={"alpha": _SHARE},
        matrices=Matrices(continual.opcm_alone, "sum of task vectors", _factors_bytes),
        scaled=Scaled(continual.opcm_matrix, continual.opcm_others, continual.opcm_factor),
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
