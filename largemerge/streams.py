"""Standard output and standard error as a command can rely on: no character, pipe or closed terminal ends a merge.

What the encoding lacks is replaced. Standard error may go away at any time (a closed terminal, `2>&1 | head`): what is
told then is lost, and the merge goes on. Standard output is what the user asks for: a pipe that nobody reads any more
is left alone, everything else that goes wrong there is an error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

_STANDARD = (0, 1, 2)


class SafeStream(io.TextIOBase):
    """A stream that outlives what it writes to, and whose lines begin with the rank where there are several.

    Args:
        stream: The stream; `None` where it was closed before the process began.
        needed: Whether what goes wrong is an error, unless a pipe is no longer read.
        prefix: Text before each line.
    """

    def __init__(self, stream: TextIO | None, *, needed: bool, prefix: str = "") -> None:
        self._stream, self._needed, self._prefix, self._begins = stream, needed, prefix, True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the wrapped stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Writes a text, with the prefix before each line."""
        with self._safely() as stream:
            if stream is not None:
                stream.write(self._with_prefix(self._encodable(text)))
        return len(text)

    def flush(self) -> None:
        """Flushes the wrapped stream."""
        if self._stream is not None:
            with self._safely() as stream:
                if stream is not None:
                    stream.flush()

    def fileno(self) -> int:
        """File descriptor of the wrapped stream."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Whether the wrapped stream is a terminal of rank 0, which alone draws there."""
        try:
            return not self._prefix and self._stream is not None and self._stream.isatty()
        except ValueError:  # it has been closed
            return False

    def writable(self) -> bool:
        """Always True."""
        return True

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self.encoding)
        except (UnicodeError, LookupError):
            return text.encode(self.encoding, "replace").decode(self.encoding, "replace")
        return text

    def _with_prefix(self, text: str) -> str:
        if not self._prefix:
            return text
        lines = []
        for line in text.splitlines(keepends=True):
            lines.append(self._prefix + line if self._begins else line)
            self._begins = line.endswith("\n")
        return "".join(lines)

    @contextlib.contextmanager
    def _safely(self) -> Iterator[TextIO | None]:
        """Gives the stream up where it fails."""
        if self._stream is None and self._needed:
            raise OSError(errno.EBADF, "it is closed", "standard output")
        try:
            yield self._stream
        except (OSError, ValueError) as error:  # a ValueError where it has been closed meanwhile
            self._stream = None
            unread = isinstance(error, BrokenPipeError)
            needed, self._needed = self._needed, False
            if needed and not unread:
                number = error.errno if isinstance(error, OSError) and error.errno else errno.EBADF
                raise OSError(number, os.strerror(number), "standard output") from None


@contextlib.contextmanager
def safe_streams(rank: int, *, own_process: bool) -> Iterator[None]:
    """Makes standard output and standard error safe while the block runs.

    Args:
        rank: Number of this process: lines of others than the first begin with it.
        own_process: Whether the whole process is the command's, so that file descriptors may be opened.
    """
    if own_process:
        _occupy_closed()
    out = SafeStream(sys.stdout, needed=True)
    err = SafeStream(sys.stderr, needed=False, prefix=f"[rank {rank}] " if rank else "")
    with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, err)):
        yield


@contextlib.contextmanager
def output_kept(*, own_process: bool) -> Iterator[None]:
    """Keeps standard output for what comes after the block: what is printed inside goes to standard error.

    Libraries print there what they like, some from C.
    """
    sys.stdout.flush()
    saved = os.dup(1) if own_process else None
    try:
        if saved is not None:
            os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def _occupy_closed() -> None:
    """Opens what stands for a closed standard stream: a shard would be opened in its place, and get its messages."""
    for number in _STANDARD:
        try:
            os.fstat(number)
        except OSError:
            mode = os.O_RDONLY if number != 2 else os.O_WRONLY  # so that writing to standard output fails
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


def leave(code: int) -> None:
    """Leaves the process at once, with what has been printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def plain_text(show: Callable[[Console], None]) -> str:
    """Returns what is shown on a console as plain text, without colours.

    Args:
        show: Shows it.
    """
    from rich.console import Console

    text = io.StringIO()
    show(Console(file=text, markup=False, emoji=False, color_system=None, force_terminal=False, force_jupyter=False))
    return text.getvalue().rstrip("\n")
