"""Rows of CSV files, checked before another library reads them.

    file ──► csv_header_problem: its columns ──► check_csv_rows: as many cells in every line ──► `datasets`

The library fills lines with too few cells, and shifts all columns where every line has one too many.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from largemerge.errors import shorten
from largemerge.text_files import os_reason
from largemerge.units import counted


def csv_header_problem(path: Path) -> str | None:
    """Says what is wrong with the header of a CSV file, of which no more is read; `None` if nothing is."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file), [])
    except UnicodeDecodeError as error:
        return f"not readable as UTF-8 text: {error}"
    except (OSError, csv.Error) as error:
        return f"no header of columns can be read: {os_reason(error)}"
    return names_twice([name for name in names if name])


def check_csv_rows(path: Path, most: int | None = None) -> str | None:
    """Says which line of a CSV file has too few or too many cells; entirely blank lines are none."""
    status = path.stat()
    return _count_cells(path, status.st_size, status.st_mtime_ns, most)


@functools.lru_cache(maxsize=64)
def _count_cells(path: Path, num_bytes: int, modified_ns: int, most: int | None) -> str | None:
    """Counts the cells of all lines; what came out is kept as long as the file's size and time stay the same."""
    quotes = length = 0

    def counted_quotes(lines: Iterable[str]) -> Iterator[str]:
        nonlocal quotes, length
        for line in lines:
            quotes, length = quotes + line.count('"'), length + len(line)
            yield line

    try:
        with path.open(encoding="utf-8-sig", newline="") as file, long_cells():
            rows = csv.reader(counted_quotes(file))
            columns = next((row for row in rows if _has_cells(row)), [])
            line, before = rows.line_num + 1, quotes
            for row in rows:
                if len(row) != len(columns) and _has_cells(row):
                    if (quotes - before) % 2 and next(rows, None) is None:
                        return None  # a quote that is never closed has taken all the rest; their reader tells where
                    return (
                        f"line {line} has {counted(len(row), 'cell')}, expected {len(columns)} as in the header; put "
                        "cells that have commas in double quotes, and a comma also before and behind empty cells"
                    )
                if most is not None and length > most:
                    return None
                line, before = rows.line_num + 1, quotes
    except (OSError, UnicodeDecodeError, csv.Error):
        return None  # their reader tells
    return None


def _has_cells(row: Sequence[str]) -> bool:
    return len(row) > 1 or any(cell.strip() for cell in row)


@contextlib.contextmanager
def long_cells() -> Iterator[None]:
    """Lets Python's reader of CSV take cells of any length; its limit is one of the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def names_twice(names: Sequence[str]) -> str | None:
    """Says which names of columns stand twice; `None` if none does."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    return f"the columns {[shorten(name) for name in twice[:3]]} stand twice; expected a name once" if twice else None
