"""Every error that largemerge raises for a user, in one tree.

    LargemergeError
    ├── ConfigError         the YAML, or a command-line option: all mistakes at once
    ├── CheckpointError     a candidate or base: missing, broken, or unlike the others
    ├── ArchitectureError   a model class whose blocks cannot be run one at a time
    ├── CalibrationError    calibration data: missing, unreadable, or unfit for the model
    ├── OutputError         the output folder: in the way, or not what a resume needs
    ├── MergeError          something in the data that shows only while merging
    ├── SystemFailure       the operating system refuses: no room, no permission, no memory; with path and cause
    ├── InstallationError   a package is missing, too old or too new
    └── RankAborted         this rank ends because of problems that rank 0 tells

Each says what was found, what was expected, in which file or key, and what to do. The command line
prints the message without a traceback and exits with `EXIT_CODE`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

EXIT_CODE, UNEXPECTED, INTERRUPTED = 2, 70, 130
"""Exit codes of the command: after a `LargemergeError`, after a mistake in largemerge itself, and after Ctrl-C."""

_MAX_SHOWN, _MAX_PATH = 80, 200
"""Characters of a text of strangers, and of a path, that a message shows."""
_TENSOR = re.compile(r"(?<![\w./\\-])\w+(?:\.\w+)*\.(?!(?:json|safetensors|bin|pt|py)\b)[^\W\d]\w*(?![\w./\\-])")
"""Matches the names of tensors and modules in a message, but not those of files."""
_ADVICE = {
    errno.ENOSPC: "make room there, then go on with --resume where a merge had begun",
    errno.EDQUOT: "make room there, then go on with --resume where a merge had begun",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "expected a place that this user may use",
    errno.EPERM: "expected a place that this user may use",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EMFILE: "allow this process more open files (ulimit -n)",
    errno.ENFILE: "close some programs: the system has too many open files",
    errno.EIO: "the disk or its file system fails; the system's log says more",
    errno.ENOTDIR: "a part of the path is a file; expected folders",
    errno.EISDIR: "it is a folder; expected a file",
    errno.ESTALE: "the network's file system has lost it; try again",
    errno.ENOMEM: "this machine has too little free memory",
}


def group_alike(problems: Iterable[str]) -> list[str]:
    """Makes one message of those that differ in the names of tensors alone.

    Args:
        problems: One message for each tensor.

    Returns:
        The first message of each kind, in order, which names two more tensors of that kind and counts the others.
    """
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_TENSOR.sub("*", problem), []).append(problem)
    return [_with_others(alike) for alike in kinds.values()]


def _with_others(alike: Sequence[str]) -> str:
    first = _TENSOR.findall(alike[0])
    others = []
    for each in alike[1:]:
        differing = next(
            (name for name, known in zip(_TENSOR.findall(each), first, strict=True) if name != known), None
        )
        others += [differing] if differing is not None else []
    if not others:
        return alike[0]
    more = f" and {len(others) - 2} more" if len(others) > 2 else ""
    return f"{alike[0]}; the same with {', '.join(map(shorten, others[:2]))}{more}"


def advised(problems: Sequence[str], advice: str) -> list[str]:
    """Adds what to do to the last of some problems that have one remedy."""
    return [*problems[:-1], f"{problems[-1]}; {advice}"]


class LargemergeError(Exception):
    """Base of all errors meant for a user to read.

    Args:
        *problems: One message each; several are shown as a list, all at once.
    """

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = tuple(map(printable, problems))
        super().__init__(self._text(self.problems))

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


class SystemFailure(LargemergeError):
    """The operating system refuses something; the message names path and cause."""


class InstallationError(LargemergeError):
    """A package that is needed is missing, too old or too new."""


class RankAborted(LargemergeError):
    """This rank ends because of problems that rank 0 tells; nothing more has to be said."""


_FILE_FAILURE = re.compile(r"\bfile <([^>]+)>[^<>]*: [^<>]* \((\d+)\)")
"""Matches what torch says of a file that it cannot open or map: its path, and the number of the error."""


@contextmanager
def explain_failures() -> Iterator[None]:
    """Makes errors of the operating system, and a lack of memory, errors that a user can read.

    Raises:
        SystemFailure: In their place; the message names path and cause.
    """
    try:
        yield
    except OSError as error:
        raise SystemFailure(describe(error)) from error
    except MemoryError as error:
        raise SystemFailure(_no_memory("")) from error
    except RecursionError as error:
        raise SystemFailure(
            f"something that was read is nested too deeply ({error}){_near(error.__traceback__)}; "
            "expected a file as Transformers or a text editor writes it"
        ) from error
    except RuntimeError as error:
        if "Symlink loop" in str(error):  # pathlib's, before Python 3.13
            raise SystemFailure(f"{shorten(error, _MAX_PATH)}; {_ADVICE[errno.ELOOP]}") from error
        of_file = _FILE_FAILURE.search(str(error))
        if of_file is not None:
            raise SystemFailure(describe(OSError(int(of_file[2]), os.strerror(int(of_file[2])), of_file[1]))) from error
        if "is smaller than the required mapping size" in str(error):
            raise SystemFailure(f"{shorten(error, _MAX_PATH)}: it was cut short meanwhile; put it back") from error
        if "can't allocate memory" not in str(error) and type(error).__name__ != "OutOfMemoryError":
            raise
        raise SystemFailure(_no_memory(str(error).splitlines()[0])) from error
    except ValueError as error:
        if "null " not in str(error) or "embedded" not in str(error):
            raise
        raise SystemFailure("a path holds a NUL character; expected the name of a file or folder") from error


def describe(error: OSError) -> str:
    """Describes an error of the operating system in one line: path, cause, what to do."""
    if error.errno is None:  # made by a library, which says all in its message
        return " ".join(str(error).split()) or type(error).__name__
    paths = [
        shorten(os.fsdecode(path), _MAX_PATH)
        for path in (error.filename, error.filename2)
        if isinstance(path, str | bytes)
    ]
    cause = error.strerror or os.strerror(error.errno)
    text = f"{' → '.join(paths)}: {cause}" if paths else f"{cause}{_near(error.__traceback__)}"
    return f"{text}; {_ADVICE[error.errno]}" if error.errno in _ADVICE else text


def printable(text: str, *, lines: bool = True) -> str:
    """Escapes what a terminal would obey rather than show, such as colours and marks that turn the direction.

    Args:
        text: The text.
        lines: Whether ends of lines stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else ascii(c)[1:-1] for c in text)


def shorten(text: object, length: int = _MAX_SHOWN) -> str:
    """Returns a text of strangers as a message can hold it: on one line, printable, its middle left out if long."""
    whole = str(text)
    cut = whole if len(whole) <= length else f"{whole[: length * 2 // 3]}…{whole[-length // 4 :]}"
    plain = printable(cut, lines=False)
    return plain if len(whole) <= length else f"{plain} ({len(whole):,} characters)"


def _no_memory(cause: str) -> str:
    told = f": {shorten(cause, _MAX_PATH)}" if cause else ""
    return (
        f"there is too little memory{told}; close other programs, or set limits: --memory-host, --memory-device and "
        "memory: in the configuration (largemerge plan says what a merge needs)"
    )


def _near(trace: TracebackType | None) -> str:
    """Names the path that was worked on where a system call on an open file failed, which tells none."""
    found = ""
    while trace is not None:
        values = trace.tb_frame.f_locals
        owner = vars(values["self"]) if hasattr(values.get("self"), "__dict__") else {}
        near = [value for value in (*owner.values(), *values.values()) if isinstance(value, Path)]
        found = str(near[-1]) if near else found
        trace = trace.tb_next
    return f" (at {shorten(found, _MAX_PATH)})" if found else ""
