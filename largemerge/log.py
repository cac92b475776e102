"""What a run tells: lines on standard error, and everything with times in a log file.

    tell     one line for the user, and for the log
    stage    what is being done now, while there is no progress to show yet
    LOGGER   all of it, with details at debug level, which only a log file and `--verbose` show

Ranks other than the first write into files of their own, `FILE.rank1` and so on: lines of several machines would get
mixed up in one file of a shared disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from largemerge.errors import ConfigError, describe

LOGGER = logging.getLogger("largemerge")
STAGES = logging.getLogger("largemerge.stage")
"""Gets a record for every stage; a display is a handler of this logger."""
_FIRST_LINE = "# log of largemerge, times in UTC\n"
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(message)s"


def tell(text: str) -> None:
    """Tells a line on standard error, and in the log; with the name of the command before it."""
    LOGGER.info(text)
    print(f"largemerge: {text}", file=sys.stderr, flush=True)


def stage(text: str) -> None:
    """Says what is being done from now on, until the next stage or the first progress; empty for nothing."""
    STAGES.info(text)


def _says_something(record: logging.LogRecord) -> bool:
    """Whether a record has a text; that of a stage that only ends has none."""
    return bool(record.getMessage())


class _LogFile(logging.StreamHandler[TextIO]):
    """A handler that tells once that the log cannot be written, and leaves the merge alone."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Gives the log up."""
        error = sys.exc_info()[1]
        self.setLevel(logging.CRITICAL + 1)
        print(f"largemerge: warning: the log ends here: {error}", file=sys.stderr)


@contextlib.contextmanager
def writing_log(path: Path | None, rank: int) -> Iterator[None]:
    """Writes all records into a file while the block runs.

    Args:
        path: The file, which is appended to; `None` for no file.
        rank: Number of this process; others than the first write into `FILE.rankN`.

    Raises:
        ConfigError: If the file cannot be written, or holds something else.
    """
    if path is None:
        yield
        return
    own = path.with_name(f"{path.name}.rank{rank}") if rank else path
    with _open(own) as stream:
        handler = _LogFile(stream)
        formatter = logging.Formatter(_FORMAT, "%Y-%m-%d %H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        handler.addFilter(_says_something)
        level = LOGGER.level
        LOGGER.setLevel(logging.DEBUG)
        LOGGER.addHandler(handler)
        warnings = logging.getLogger("py.warnings")
        warnings.addHandler(handler)
        try:
            yield
        finally:
            LOGGER.removeHandler(handler)
            warnings.removeHandler(handler)
            LOGGER.setLevel(level)
            with contextlib.suppress(OSError):
                handler.flush()


@contextlib.contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    """Opens a log to append to it; never a file that is no log, and never a pipe that nobody reads."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError) as error:
        told = describe(error) if isinstance(error, OSError) else f"{str(path)!r}: {error}"
        raise ConfigError(f"--log-file {told}") from None
    with os.fdopen(descriptor, "r+b", buffering=0) as raw:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            start = os.pread(descriptor, len(_FIRST_LINE), 0)
            if start and start != _FIRST_LINE.encode():
                raise ConfigError(f"--log-file {path}: holds something else; expected a new file, or a log to add to")
            if not start:
                raw.write(_FIRST_LINE.encode())
        elif not stat.S_ISCHR(os.fstat(descriptor).st_mode):
            raise ConfigError(f"--log-file {path}: is neither a file nor a terminal; expected a new file")
        stream = open(descriptor, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 (closed below)
        try:
            yield stream
        finally:
            with contextlib.suppress(OSError):  # what a full disk has not taken is lost
                stream.close()


@contextlib.contextmanager
def verbose_lines(*, shown: bool) -> Iterator[None]:
    """Shows records of all levels on standard error while the block runs."""
    if not shown:
        yield
        return
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))
    level = LOGGER.level
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)


class _ToStandardError(logging.Handler):
    """Shows records on standard error as it is now; what the user is told there anyway is left out."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a record."""
        if _says_something(record) and (record.name != LOGGER.name or record.levelno == logging.DEBUG):
            print(self.format(record), file=sys.stderr)
