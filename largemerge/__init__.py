"""largemerge: merges K fine-tuned checkpoints of one architecture into one, a block at a time.

import largemerge

report = largemerge.merge("config.yaml", "merged")
plan = largemerge.plan("config.yaml")
"""

from largemerge.config import MergeConfig, load_config
from largemerge.errors import (
    ArchitectureError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    LargemergeError,
    MergeError,
    OutputError,
)
from largemerge.merge import merge, plan
from largemerge.plan import MergePlan
from largemerge.report import MergeReport

__version__ = "0.1.0"

__all__ = [
    "ArchitectureError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "LargemergeError",
    "MergeConfig",
    "MergeError",
    "MergePlan",
    "MergeReport",
    "OutputError",
    "__version__",
    "load_config",
    "merge",
    "plan",
]
