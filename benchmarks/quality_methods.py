"""The methods that the quality benchmark compares, the settings of each, and the YAML that a merge is started from.

A method is written `name`, or `name:key=value,key=value` with other settings than those below, so that one method can
have several rows. Parameters that each model has (`weight`, `density`, …) are the same for all of them. Steps after a
merge without data are its setting `post`: `"tsv_m:post=[{svc: {alpha: 1}}, rescale]"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from largemerge.data_free.methods.base import Base
from largemerge.data_free.methods.table import METHODS as DATA_FREE
from largemerge.regression.methods import METHODS as REGRESSION
from quality_cases import Case

AVERAGE = "linear"
"""What all others are held against."""
NOT_FOR_MANY = ("passthrough", "slerp", "nuslerp", "nearswap", "arcee_fusion", "ip_merging")
"""They merge one model into a base, or two."""
NEEDS_MORE = ("fisher",)
"""It needs a file for each model."""
UNLEARNS = ("task_simplex",)
"""It takes away what experts know."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # Task vectors that are summed: 1/K would be the average, 1 is too much. 0.4 is the usual choice for some tasks.
    "task_arithmetic": {"weight": 0.4},
    "dare_linear": {"weight": 0.4, "density": 0.5},
    "dare_ties": {"weight": 0.4, "density": 0.5},
    "della_linear": {"weight": 0.4, "density": 0.5},
    "breadcrumbs": {"weight": 0.4, "density": 0.9},
    "breadcrumbs_ties": {"weight": 0.4, "density": 0.9},
    # Those that divide by the sum of weights. TIES keeps a fifth, as published.
    "linear": {"weight": 1.0},
    "multislerp": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.2},
    "knots": {"weight": 1.0, "density": 0.2},
    "della": {"weight": 1.0, "density": 0.5},
    "sce": {"select_topk": 0.1},
}
"""Where the default is none, or not what the authors use."""


_COMMA = re.compile(r",(?![^\[]*\])")
"""Between settings, and not in a list."""


@dataclass(frozen=True)
class Merge:
    """A method, its settings, and how many samples of each task it sees."""

    method: str
    parameters: tuple[tuple[str, str], ...] = ()
    """Names and values, as they are written."""
    samples: int | None = None
    """None without data."""

    @property
    def label(self) -> str:
        """As it is written on the command line, and `name` alone with the settings above."""
        changed = ",".join(f"{key}={value}" for key, value in self.parameters)
        return f"{self.method}:{changed}" if changed else self.method

    @property
    def engine(self) -> str:
        """The subpackage that does it."""
        return "regression" if self.method in REGRESSION else "data_free"


def parse(written: str, samples: int) -> Merge:
    """Reads a method as it is written on the command line.

    Args:
        written: `name`, or `name:key=value,…`.
        samples: Of each task, for a method that looks at data.

    Raises:
        SystemExit: The method is not known.
    """
    name, _, settings = written.partition(":")
    if name not in DATA_FREE and name not in REGRESSION:
        raise SystemExit(f"{name}: expected one of {', '.join(sorted({*DATA_FREE, *REGRESSION}))}")
    pairs = (setting.partition("=") for setting in _COMMA.split(settings) if setting)
    return Merge(name, tuple((key, value) for key, _, value in pairs), samples if name in REGRESSION else None)


def all_methods() -> list[str]:
    """Every method that merges any number of models from nothing but their weights, and samples; the average first."""
    without_data = [name for name in DATA_FREE if name not in (*NOT_FOR_MANY, *NEEDS_MORE, *UNLEARNS)]
    return [*without_data, *REGRESSION]


def write_config(merge: Merge, case: Case, seed: int) -> str:
    """The YAML of a merge of all experts of a case."""
    config: dict[str, Any] = {"merge_method": merge.method}
    changed = {key: yaml.safe_load(value) for key, value in merge.parameters}
    parameters = {**SETTINGS.get(merge.method, {}), **changed}
    if merge.samples is None:
        row, steps = DATA_FREE[merge.method], parameters.pop("post", None)
        # A mean of models on the sphere takes the base for one of them. Steps after any merge measure from it.
        takes_base = row.base in (Base.REQUIRED, Base.OPTIONAL) or steps
        config |= {"base_model": str(case.base)} if takes_base else {}
        config |= {"post": steps} if steps else {}
        config |= {"dtype": "float32", "out_dtype": case.dtype, "seed": seed}
        each = {key: parameters.pop(key) for key in list(parameters) if key in row.per_model}
        own = {"parameters": each} if each else {}
        config["models"] = [{"model": str(folder), **own} for folder in case.experts.values()]
    else:
        config |= {"base_model": str(case.base), "compute_dtype": "float32"}
        config["models"] = [
            {"model": str(folder), "name": task, "calibration": {"data": str(case.calibration[task])}}
            for task, folder in case.experts.items()
        ]
        config["calibration"] = {**case.reading, "num_samples": merge.samples, "seed": seed}
    config |= {"parameters": parameters} if parameters else {}
    return yaml.safe_dump(config, sort_keys=False)
