"""largemerge: merges K fine-tuned checkpoints of one architecture into one, a block at a time.

    import largemerge

    report = largemerge.merge("config.yaml", "merged")
    plan = largemerge.plan("config.yaml")

Names are imported when they are first used, so that importing the package costs nothing: the command takes over the
signals at once, and says what is wrong with a configuration before torch is loaded.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # that of `typing`, whose import would take longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from largemerge.adapter_tools.merge_report import AdapterMergeReport
    from largemerge.adapter_tools.report import ExtractReport
    from largemerge.api import (
        Memory,
        align,
        cluster,
        evaluate,
        extract_lora,
        fit_temperature,
        gram,
        merge,
        merge_adapters,
        plan,
        report,
        verify,
    )
    from largemerge.data_free.plan import DataFreePlan
    from largemerge.data_free.report import DataFreeReport
    from largemerge.errors import (
        ArchitectureError,
        CalibrationError,
        CheckpointError,
        ConfigError,
        InstallationError,
        LargemergeError,
        MergeError,
        OutputError,
        SystemFailure,
    )
    from largemerge.evaluation.results import Evaluation
    from largemerge.regression.config import MergeConfig, load_config
    from largemerge.regression.gram_run import GramReport
    from largemerge.regression.plan import MergePlan
    from largemerge.regression.report import MergeReport
    from largemerge.temperature.run import TemperatureReport
    from largemerge.trials.results import CompareReport
    from largemerge.trials.run import compare
    from largemerge.trials.settings import Range

__version__ = "0.1.0"

__all__ = [
    "AdapterMergeReport",
    "ArchitectureError",
    "CalibrationError",
    "CheckpointError",
    "CompareReport",
    "ConfigError",
    "DataFreePlan",
    "DataFreeReport",
    "Evaluation",
    "ExtractReport",
    "GramReport",
    "InstallationError",
    "LargemergeError",
    "Memory",
    "MergeConfig",
    "MergeError",
    "MergePlan",
    "MergeReport",
    "OutputError",
    "Range",
    "SystemFailure",
    "TemperatureReport",
    "__version__",
    "align",
    "cluster",
    "compare",
    "evaluate",
    "extract_lora",
    "fit_temperature",
    "gram",
    "load_config",
    "merge",
    "merge_adapters",
    "plan",
    "report",
    "verify",
]

_ERRORS = "largemerge.errors"
_LAZY = {
    "AdapterMergeReport": "largemerge.adapter_tools.merge_report",
    "ArchitectureError": _ERRORS,
    "CalibrationError": _ERRORS,
    "CheckpointError": _ERRORS,
    "CompareReport": "largemerge.trials.results",
    "ConfigError": _ERRORS,
    "DataFreePlan": "largemerge.data_free.plan",
    "DataFreeReport": "largemerge.data_free.report",
    "Evaluation": "largemerge.evaluation.results",
    "ExtractReport": "largemerge.adapter_tools.report",
    "GramReport": "largemerge.regression.gram_run",
    "InstallationError": _ERRORS,
    "LargemergeError": _ERRORS,
    "Memory": "largemerge.api",
    "MergeConfig": "largemerge.regression.config",
    "MergeError": _ERRORS,
    "MergePlan": "largemerge.regression.plan",
    "MergeReport": "largemerge.regression.report",
    "OutputError": _ERRORS,
    "Range": "largemerge.trials.settings",
    "TemperatureReport": "largemerge.temperature.run",
    "SystemFailure": _ERRORS,
    "align": "largemerge.api",
    "cluster": "largemerge.api",
    "compare": "largemerge.trials.run",
    "evaluate": "largemerge.api",
    "extract_lora": "largemerge.api",
    "fit_temperature": "largemerge.api",
    "gram": "largemerge.api",
    "load_config": "largemerge.regression.config",
    "merge": "largemerge.api",
    "merge_adapters": "largemerge.api",
    "plan": "largemerge.api",
    "report": "largemerge.api",
    "verify": "largemerge.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'largemerge' has no attribute {name!r}")
    if _LAZY[name] != _ERRORS:
        from largemerge.installed import check_installed

        check_installed()
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
