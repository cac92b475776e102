"""Numbers as people read them: sizes, times, operations, counted things.

Reports in JSON have the plain numbers; these are for tables, progress and messages.
"""

from __future__ import annotations

import math

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def gib(num_bytes: float) -> str:
    """Formats a size in bytes with a unit that suits it: `12 bytes`, `1.5 KiB`, `20.0 MiB`, `3.25 GiB`."""
    if num_bytes < 2**10:
        return counted(round(num_bytes), "byte")
    for limit, unit, digits in ((2**20, "KiB", 1), (2**30, "MiB", 1), (2**40, "GiB", 2)):
        if num_bytes < limit:
            return f"{num_bytes / (limit / 2**10):.{digits}f} {unit}"
    return f"{num_bytes / 2**40:.2f} TiB"


def duration(seconds: float) -> str:
    """Formats a time with one or two units: `0.3 s`, `45 s`, `12 min 5 s`, `1 h 37 min`, `2 days 3 h`."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole >= _HOUR:
        whole = _MINUTE * round(whole / _MINUTE)
    if whole >= _DAY:
        whole = _HOUR * round(whole / _HOUR)
    days, hours, minutes = whole // _DAY, whole % _DAY // _HOUR, whole % _HOUR // _MINUTE
    parts = (
        (counted(days, "day"), days),
        (f"{hours} h", hours),
        (f"{minutes} min", minutes),
        (f"{whole % 60} s", whole % 60),
    )
    return " ".join([text for text, number in parts if number][:2])


def operations(count: float) -> str:
    """Formats a number of floating-point operations, three digits of it: `0 FLOP`, `12.3 GFLOP`, `521 PFLOP`."""
    power = 0
    while float(f"{count:.3g}") >= 1000 and power < len(_PREFIXES) - 1:
        count, power = count / 1000, power + 1
    return f"{float(f'{count:.3g}'):g} {_PREFIXES[power]}FLOP"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Counts things: `1 tensor`, `2 tensors`, `12,000 rows`; `plural` is for nouns that take more than an `s`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
