"""Every error that largemerge raises for a user, in one tree.

    LargemergeError
    ├── ConfigError         the YAML, or a command-line option: all mistakes at once
    ├── CheckpointError     a candidate or base: missing, broken, or unlike the others
    ├── ArchitectureError   a model class whose blocks cannot be run one at a time
    ├── CalibrationError    calibration data: missing, unreadable, or unfit for the model
    ├── OutputError         the output folder: in the way, or not what a resume needs
    ├── MergeError          something in the data that shows only while merging
    └── RankAborted         this rank ends because of problems that rank 0 tells

Each says what was found, what was expected, in which file or key, and what to do. The command line
prints the message without a traceback and exits with `EXIT_CODE`.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_CODE, INTERRUPTED = 2, 130
"""Exit codes of the command: after a `LargemergeError`, and after Ctrl-C."""


class LargemergeError(Exception):
    """Base of all errors meant for a user to read.

    Args:
        *problems: One message each; several are shown as a list, all at once.
    """

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = problems
        super().__init__(self._text(problems))

    @staticmethod
    def _text(problems: Sequence[str]) -> str:
        if len(problems) == 1:
            return problems[0]
        return "\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)])


class ConfigError(LargemergeError):
    """A mistake in the configuration."""


class CheckpointError(LargemergeError):
    """A checkpoint is missing, broken, or does not match the others."""


class ArchitectureError(LargemergeError):
    """A model class cannot be run block by block."""


class CalibrationError(LargemergeError):
    """Calibration data cannot be read or does not fit the model."""


class OutputError(LargemergeError):
    """The output folder is in the way, or cannot be resumed."""


class MergeError(LargemergeError):
    """Something in the data that shows only while merging."""


class RankAborted(LargemergeError):
    """This rank ends because of problems that rank 0 tells; nothing more has to be said."""
