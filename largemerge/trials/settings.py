"""Settings that are tried, as a user writes them: values to sweep, ranges to search.

    --sweep KEY=V,V             ──► read_sweeps ──► values by setting
    --search KEY=LOW:HIGH[:log] ──► read_ranges ──► Range by setting

What is wrong is noted, and the rest is read, so that all mistakes can be told at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from largemerge.config_file import read_flow, shown
from largemerge.errors import ConfigError

_SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)?")
_OPENING = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


@dataclass(frozen=True)
class Range:
    """Numbers that a search may try, both ends included.

    Attributes:
        low: The lowest.
        high: The highest.
        log: Whether orders of magnitude count alike, so that 1e-6 to 1e-5 is looked at as much as 1e-2 to 1e-1.
    """

    low: float
    high: float
    log: bool = False

    def problem(self) -> str | None:
        """Says what is wrong with the range; `None` if nothing is."""
        for end in (self.low, self.high):
            if isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
                return f"expected two numbers, found {shown(end)}"
        if not isinstance(self.log, bool):
            return f"expected true or false for log, found {shown(self.log)}"
        if self.low >= self.high:
            return f"{self.low:g} is not below {self.high:g}; expected the lower end first"
        if self.log and self.low <= 0:
            return f"a logarithmic range begins above 0, found {self.low:g}"
        return None

    def whole(self) -> Range | None:
        """The same range of whole numbers; `None` where an end is none."""
        if self.low != int(self.low) or self.high != int(self.high):
            return None
        return Range(int(self.low), int(self.high), self.log)

    def real(self) -> Range:
        """The same range of numbers in floating point."""
        return Range(float(self.low), float(self.high), self.log)


def read_ranges(source: Mapping[str, Any] | Sequence[str], problems: list[str]) -> dict[str, Range]:
    """Reads what is searched.

    Args:
        source: By setting a `Range`, `(low, high)` or `(low, high, "log")`; or texts, `KEY=LOW:HIGH` or
            `KEY=LOW:HIGH:log`.
        problems: Gets what is wrong; such a setting is left out.
    """
    found: dict[str, Range] = {}
    for key, said in _by_setting(source, "--search", "ridge=1e-6:1e-1:log", "its range", problems):
        where = f"--search {shown(f'{key}={said}') if isinstance(said, str) else key}"
        limits = _range(said)
        if limits is None:
            example = "0.1:1 or 1e-6:1e-1:log" if isinstance(said, str) else "(0.1, 1) or Range(1e-6, 1e-1, log=True)"
            problems.append(f"{where}: expected the lower and the upper end, such as {example}")
        elif (problem := limits.problem()) is not None:
            problems.append(f"{where}: {problem}")
        else:
            found[key] = limits
    return found


def _range(said: Any) -> Range | None:
    """Reads one range; `None` where it is none."""
    if isinstance(said, Range):
        return said
    parts = said.split(":") if isinstance(said, str) else said
    if not isinstance(parts, list | tuple) or len(parts) not in (2, 3) or list(parts[2:]) not in ([], ["log"]):
        return None
    try:
        low, high = (_number(part) if isinstance(part, str) else part for part in parts[:2])
    except ValueError:
        return None
    return Range(low, high, len(parts) > 2)


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def read_sweeps(source: Mapping[str, Sequence[Any]] | Sequence[str], problems: list[str]) -> dict[str, list[Any]]:
    """Reads what is swept.

    Args:
        source: Values by setting, or texts of the command line, `KEY=V,V`.
        problems: Gets what is wrong; such a setting is left out.
    """
    found: dict[str, list[Any]] = {}
    for key, values in _by_setting(source, "--sweep", "ridge=1e-4,1e-2", "its values", problems):
        try:
            found[key] = _values(key, values)
        except ConfigError as error:
            problems += error.problems
    return found


def _by_setting(
    source: Mapping[str, Any] | Sequence[str], option: str, example: str, what: str, problems: list[str]
) -> Iterator[tuple[str, Any]]:
    """Yields settings and what is said of each; notes texts without a setting, and settings that stand twice."""
    if isinstance(source, Mapping):
        yield from source.items()
        return
    if not isinstance(source, Sequence):
        problems.append(f"{option.removeprefix('--')}: expected a mapping of settings, found {shown(source)}")
        return
    seen: set[str] = set()
    for text in [source] if isinstance(source, str) else map(str, source):
        key, equals, said = (part.strip() for part in text.partition("="))
        if not equals or not _SETTING.fullmatch(key) or not said:
            problems.append(f"{option} {shown(text)}: expected a setting and {what}, such as {example}")
        elif key in seen:
            problems.append(f"{option} {key}: stands twice; expected {what} in one")
        else:
            seen.add(key)
            yield key, said


def _values(key: str, values: Any) -> list[Any]:
    """The values of one setting.

    Raises:
        ConfigError: If there are none, one is empty or no YAML, or one stands twice.
    """
    if isinstance(values, str):
        values = _in_yaml(values, f"--sweep {shown(f'{key}={values}')}")
    if not isinstance(values, Sequence) or not values:
        raise ConfigError(f"--sweep {key}: expected a list of values, found {shown(values)}")
    if len(set(map(text_of, values))) < len(values):
        raise ConfigError(f"--sweep {key}: a value stands twice")
    return list(values)


def _in_yaml(text: str, where: str) -> list[Any]:
    """Reads values with commas between, as YAML reads `[a, b]`: commas in brackets and quotes divide nothing.

    Raises:
        ConfigError: If a value is empty, or the text is no YAML.
    """
    parts: list[str] = []
    try:
        parts = _parts(text)
        if all(parts):
            return [_value(part) for part in parts]
    except yaml.YAMLError:
        raise ConfigError(
            f"{where}: expected values such as 0.1, true or ['a', 'b'], with commas between, and single quotes "
            "around a text with brackets, commas or the like, such as a regular expression"
        ) from None
    raise ConfigError(f"{where}: a value is empty; expected one on each side of every comma")


def _parts(text: str) -> list[str]:
    """Divides a text at the commas that stand in no brackets and no quotes.

    Raises:
        yaml.YAMLError: If it is no YAML, or closes a bracket that it has not opened.
    """
    cuts, depth = [0], 0
    for token in yaml.scan(f"[{text}]", Loader=yaml.SafeLoader):
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth == 0 and isinstance(token, _CLOSING) and token.start_mark.index <= len(text):
            raise yaml.YAMLError("a bracket is closed that was not opened")
        if depth == 1 and isinstance(token, yaml.FlowEntryToken):
            cuts.append(token.start_mark.index)
    places = zip(cuts, [*cuts[1:], len(text) + 1], strict=True)
    return [f"[{text}]"[start + 1 : end].strip() for start, end in places]


def _value(text: str) -> Any:
    """A value as YAML, and a number in quotes as a number."""
    (value,) = read_flow(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def text_of(value: Any) -> str:
    """A value in the name of a trial; other values have other names."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value or value != value else repr(value)
