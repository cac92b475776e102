"""Charts of numbers by name, for pages, model cards and documentation: bars, radar, lines, heat maps, a time line.

    numbers by name ──► bars, radar, lines, heatmap, timeline ──► Chart ──► .svg: text that a browser sets in its fonts
                                                                        └─► .png()

A chart is drawn by Matplotlib without a window and without a background, in colours and greys that can be read on
white and on black, and that do not look alike to those who see few colours (after Okabe and Ito, "Color Universal
Design", 2008; marks and strokes differ as well). The same numbers give the same bytes. Names may be a stranger's: they
are set as they stand, never as formulas.

Matplotlib is imported when a chart is drawn, which takes half a second.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from largemerge.errors import shorten
from largemerge.units import gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

COLOURS = ("#3a86c8", "#d55e00", "#009e73", "#c2619b", "#b07d12", "#7a6fd0", "#1f97a8", "#858585")
"""Colours of series: each stands out from white and from black by 3:1 or more."""
INK, RULE = "#7a7a7a", "#8c8c8c"
"""Greys of text and of lines."""

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STROKES = ("-", "--", "-.", ":")
_WIDTH = 7.2  # inches
_MAX_LABEL = 36
_MAX_NUMBERED_BARS, _MAX_NUMBERED_CELLS = 48, 480
_GROUP = re.compile(r'<g id="[^"]*"')
_ID, _REFERENCE = re.compile(r'<\w+ id="([^"]*)"'), re.compile(r'(?<=id=")[^"]*(?=")|(?<=#)\w+(?=[")])')
_Values = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Chart:
    """A chart that has been drawn.

    Attributes:
        title: What it shows, for those who do not see it; the chart itself does not repeat it.
        figure: Matplotlib's figure.
    """

    title: str
    figure: Figure

    @property
    def svg(self) -> str:
        """The chart as an SVG file, whose text is text."""
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with _style(self.title):
            self.figure.savefig(stream, format="svg", transparent=True, metadata={"Title": self.title, **nothing})
        text = stream.getvalue()
        text = _numbered(_GROUP.sub("<g", text[text.index("<svg") :]), self.title)
        return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"

    def png(self, dots_per_inch: int = 144) -> bytes:
        """Returns the chart as a PNG file."""
        stream = io.BytesIO()
        with _style(self.title):
            self.figure.savefig(stream, format="png", transparent=True, dpi=dots_per_inch, metadata={"Software": None})
        return stream.getvalue()


def bars(
    values: _Values,
    *,
    title: str,
    unit: str = "",
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Chart:
    """Draws bars that lie, one group for each category; what is missing or not finite leaves a gap.

    Args:
        values: Series (such as a model) → category (such as a task) → value.
        title: What the chart shows.
        unit: Unit of the values.
        intervals: Lowest and highest value, such as those of a confidence interval, by the same names.

    Raises:
        ValueError: If there is no value.
    """
    series, categories = _names(values, title)
    with _style(title):
        thickness = 0.17 if len(series) == 1 else max(0.085, 0.15 - 0.008 * len(series))
        step = thickness * len(series) + 0.12
        figure, axes = _figure(1.0 + step * len(categories))
        for number, name in enumerate(series):
            known = [(row, value) for row, each in enumerate(categories) if _known(value := values[name].get(each))]
            places = [row * step + (number - (len(series) - 1) / 2) * thickness for row, _ in known]
            lengths = [value for _, value in known]
            colour = COLOURS[number % len(COLOURS)]
            drawn = axes.barh(places, lengths, height=0.88 * thickness, color=colour, label=_label(name))
            if number >= len(COLOURS):
                for patch in drawn:
                    patch.set(hatch="////", edgecolor=RULE)
            ranges = [_interval(intervals, name, categories[row], value) for row, value in known]
            if any(ranges):
                ends = list(map(_or_nothing, ranges, lengths))
                around = [[value - low for value, (low, _) in zip(lengths, ends, strict=True)]]
                around += [[high - value for value, (_, high) in zip(lengths, ends, strict=True)]]
                axes.errorbar(lengths, places, xerr=around, fmt="none", ecolor=INK, elinewidth=0.9, capsize=1.5)
            if len(series) * len(categories) <= _MAX_NUMBERED_BARS and not any(ranges):
                axes.bar_label(
                    drawn,
                    [f" {value:,.0f}" if value == int(value) else f" {_number(value)}" for value in lengths],
                    color=INK,
                    fontsize=8,
                )
        axes.set_yticks([row * step for row in range(len(categories))], [_label(name) for name in categories])
        axes.set_ylim((len(categories) - 0.5) * step, -0.5 * step)
        axes.margins(x=0.12)
        axes.set_xlabel(unit)
        axes.tick_params(axis="y", length=0)
        _clean(axes, grid="x")
        axes.spines["left"].set_visible(False)
        _legend(figure, axes, len(series))
    return _drawn(title, figure)


def radar(
    values: _Values,
    *,
    title: str,
    unit: str = "",
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Chart:
    """Draws a closed line for each series, with a spoke for each category; for shapes, not for reading numbers.

    Args:
        values: Series (such as a model) → category (such as a task) → value; all on one scale.
        title: What the chart shows.
        unit: Unit of the values.
        intervals: Lowest and highest value, drawn as a band.

    Raises:
        ValueError: If there are fewer than three categories, or a value is missing or not finite.
    """
    series, categories = _names(values, title)
    gaps = [f"{name}, {each}" for name in series for each in categories if not _known(values[name].get(each))]
    if len(categories) < 3 or gaps:
        found = f"no value for {'; '.join(gaps[:3])}" if gaps else f"{len(categories)} categories"
        raise ValueError(f"{title}: {found}; expected three categories or more, and a value of each series for each")
    with _style(title):
        figure, axes = _figure(5.6, projection="polar")
        angles = [2 * math.pi * number / len(categories) for number in range(len(categories) + 1)]
        axes.set_theta_offset(math.pi / 2)  # type: ignore[attr-defined]
        axes.set_theta_direction(-1)  # type: ignore[attr-defined]
        for number, name in enumerate(series):
            around = [values[name][each] for each in (*categories, categories[0])]
            colour, mark, stroke = _look(number)
            axes.plot(angles, around, stroke, marker=mark, markersize=3.5, color=colour, label=_label(name))
            ranges = [_interval(intervals, name, each, values[name][each]) for each in (*categories, categories[0])]
            if any(ranges):
                low, high = zip(*map(_or_nothing, ranges, around), strict=True)
                axes.fill_between(angles, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xticks(angles[:-1], [_label(each, 18) for each in categories])
        axes.tick_params(axis="x", pad=10)
        axes.grid(color=RULE, alpha=0.35, linewidth=0.6)
        axes.spines["polar"].set_visible(False)
        if unit:
            figure.supxlabel(unit, fontsize=9, color=INK)
        _legend(figure, axes, len(series))
    return _drawn(title, figure)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    joined: bool = True,
    from_zero: bool = True,
    x_names: Sequence[str] = (),
) -> Chart:
    """Draws a line for each series; it breaks where a value is not finite.

    Args:
        series: Points (x, y) by name, from left to right.
        title: What the chart shows.
        x_label: Name and unit of x.
        y_label: Name and unit of y.
        log_x: Whether x, all above 0, is on a logarithmic scale.
        log_y: Whether y is on a logarithmic scale, which leaves out what is not above 0.
        joined: Whether points are joined by lines, or stand alone.
        from_zero: Whether y begins at 0 where nothing is below it, and not where the values do.
        x_names: Names for x = 0, 1, 2, …, in place of numbers.

    Raises:
        ValueError: If there is no point to draw.
    """
    seen = {
        name: [(x, y if _known(y) and (y > 0 or not log_y) else math.nan) for x, y in points]
        for name, points in series.items()
    }
    if not any(_known(y) for points in seen.values() for _, y in points):
        raise ValueError(f"{title}: no value to draw")
    with _style(title):
        figure, axes = _figure(3.4)
        for number, (name, points) in enumerate(seen.items()):
            colour, mark, stroke = _look(number)
            many = len(points) > 40
            x, y = [x for x, _ in points], [y for _, y in points]
            size = 0 if many and joined else 4
            stroke = stroke if joined else "none"
            axes.plot(
                x, y, linestyle=stroke, marker=mark, markersize=size, linewidth=1.6, color=colour, label=_label(name)
            )
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(_plain_numbers())
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_plain_numbers())
        elif from_zero and min(y for points in seen.values() for _, y in points if _known(y)) >= 0:
            axes.set_ylim(bottom=0)
        if x_names:
            step = -(-len(x_names) // 16)
            axes.set_xticks(range(0, len(x_names), step), [_label(name, 18) for name in x_names[::step]])
            if max(map(len, x_names)) > 3:
                axes.tick_params(axis="x", rotation=45)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _clean(axes, grid="y")
        _legend(figure, axes, len(seen))
    return _drawn(title, figure)


def heatmap(values: _Values, *, title: str, unit: str = "", log: bool = False, high_is_good: bool = False) -> Chart:
    """Draws a cell for each row and column, dark where one should look; what is missing leaves a hole.

    Args:
        values: Row → column → value.
        title: What the chart shows.
        unit: Unit of the values.
        log: Whether colours follow the logarithm; what is not above 0 leaves a hole.
        high_is_good: Whether low values are those to look at.

    Raises:
        ValueError: If there is no value.
    """
    rows, columns = _names(values, title)
    cells = {
        (row, column): value
        for row, name in enumerate(rows)
        for column, each in enumerate(columns)
        if _known(value := values[name].get(each)) and (value > 0 or not log)
    }
    if not cells:
        raise ValueError(f"{title}: no value to draw")
    with _style(title):
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.patches import Rectangle

        figure, axes = _figure(1.25 + 0.2 * len(rows))
        norm = LogNorm(*_log_range(cells.values())) if log else Normalize(*_range(cells.values(), high_is_good))
        colours = ScalarMappable(norm, "YlOrRd_r" if high_is_good else "YlOrRd")
        numbered = len(rows) * len(columns) <= _MAX_NUMBERED_CELLS and len(columns) <= 14
        for (row, column), value in cells.items():
            colour = colours.cmap(norm(value))
            axes.add_patch(Rectangle((column - 0.48, row - 0.45), 0.96, 0.9, facecolor=colour, linewidth=0))
            if numbered:
                ink = "black" if luminance(colour[:3]) > 0.22 else "white"
                size = 8 if len(columns) <= 9 else 6.5
                axes.text(column, row, _number(value), color=ink, ha="center", va="center", fontsize=size)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [_label(name) for name in rows])
        axes.set_xticks(range(len(columns)), [_label(name, 24) for name in columns])
        axes.xaxis.tick_top()
        if len(columns) * max(min(len(name), 24) for name in columns) > 80:
            axes.tick_params(axis="x", rotation=35)
            for label in axes.get_xticklabels():
                label.set(ha="left", rotation_mode="anchor")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(unit)
        if not numbered:
            bar = figure.colorbar(colours, ax=axes, fraction=0.03, pad=0.02, format=_plain_numbers())
            bar.outline.set_visible(False)
    return _drawn(title, figure)


def _range(values: Collection[float], high_is_good: bool) -> tuple[float, float]:
    """Ends of a scale of colours that starts at zero, and on which values that are nearly alike look so."""
    low, high = min(0.0, *values), max(0.0, *values)
    beyond = high if high_is_good else max(high, 2 * statistics.median(values))
    return low, beyond if beyond > low else low + 1.0


def _log_range(values: Collection[float]) -> tuple[float, float]:
    """Ends of a logarithmic scale of colours, over two powers of ten or more."""
    return min(values), max(*values, 100 * min(values))


def timeline(
    spans: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    levels: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    limits: Mapping[str, float] | None = None,
) -> Chart:
    """Draws what ran when, a row for each stage, below the memory that was held.

    Args:
        spans: Stage → seconds of its begins and ends.
        title: What the chart shows.
        levels: Kind of memory → points (seconds, bytes).
        limits: Bytes that were planned, by name, drawn as level lines.

    Raises:
        ValueError: If there are neither spans nor levels.
    """
    levels, limits = levels or {}, limits or {}
    if not spans and not levels:
        raise ValueError(f"{title}: nothing to draw")
    with _style(title):
        from matplotlib.figure import Figure

        heights = ([2.2] if levels else []) + ([0.3 + 0.19 * len(spans)] if spans else [])
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.9), layout="constrained")
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        if levels:
            _draw_levels(panels[0], levels, limits)
            _legend(figure, panels[0], len(levels) + len(limits))
        if spans:
            axes = panels[-1]
            for row, own in enumerate(spans.values()):
                colour = COLOURS[row % len(COLOURS)]
                axes.broken_barh([(a, b - a) for a, b in own], (row - 0.36, 0.72), color=colour, linewidth=0)
            axes.set_yticks(range(len(spans)), [_label(name) for name in spans])
            axes.set_ylim(len(spans) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            _clean(axes, grid="x")
        panels[-1].set_xlim(left=0)
        panels[-1].set_xlabel("seconds since the start")
    return _drawn(title, figure)


def _draw_levels(axes: Axes, levels: Mapping[str, Sequence[tuple[float, float]]], limits: Mapping[str, float]) -> None:
    most = max([*(y for points in levels.values() for _, y in points), *limits.values()], default=0)
    unit, size = next(
        (u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1)) if most >= s or s == 1
    )
    for number, (name, points) in enumerate(levels.items()):
        colour, _, stroke = _look(number)
        x, y = [x for x, _ in points], [y / size for _, y in points]
        axes.plot(x, y, stroke, color=colour, linewidth=1.6, label=_label(name))
        axes.fill_between(x, y, color=colour, alpha=0.12, linewidth=0)
    for number, (name, level) in enumerate(limits.items()):
        label = f"{_label(name)}: {gib(level)}"
        axes.axhline(level / size, linestyle=(0, (4, 3)), color=COLOURS[1 - number % 2], linewidth=1.1, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    _clean(axes, grid="y")


# What all charts have in common


@contextmanager
def _style(title: str) -> Iterator[None]:
    """Sets parameters of Matplotlib while a chart is drawn or written: all of them, whatever a program has set."""
    import matplotlib

    parameters: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "xtick.color": INK,
        "ytick.color": INK,
        "hatch.linewidth": 0.6,
    }
    # Without the backend, whose setting would import pyplot.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context(defaults | parameters), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a browser has other fonts
        yield


def _drawn(title: str, figure: Figure) -> Chart:
    """Lays a figure out once, so that writing it again, or in another format, moves nothing."""
    with _style(title):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return Chart(title, figure)


def _numbered(svg: str, title: str) -> str:
    """Numbers what is referred to, after the title: so it is the same again, and another one in the next chart.

    Matplotlib names some of it by where it lay in memory.
    """
    start = f"c{zlib.crc32(title.encode()):08x}"
    names = {name: f"{start}-{number}" for number, name in enumerate(dict.fromkeys(_ID.findall(svg)))}
    return _REFERENCE.sub(lambda match: names.get(match[0], match[0]), svg)


def _figure(height: float, **how: Any) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot(**how)


def _clean(axes: Axes, *, grid: str) -> None:
    """Takes away the frame, and adds lines that cross one axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=RULE, alpha=0.3, linewidth=0.6)  # type: ignore[arg-type]


def _legend(figure: Figure, axes: Axes, num_series: int) -> None:
    if num_series > 1:
        handles, labels = axes.get_legend_handles_labels()
        longest = max(map(len, labels))
        columns = max(1, min(4, 84 // (longest + 6), len(labels)))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5)


def _names(values: _Values, title: str) -> tuple[list[str], list[str]]:
    """Names of series, and of all categories in the order in which they are met."""
    categories = list(dict.fromkeys(each for own in values.values() for each in own))
    if not any(_known(value) for own in values.values() for value in own.values()):
        raise ValueError(f"{title}: no value to draw")
    return list(values), categories


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _interval(
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None, series: str, category: str, value: float
) -> tuple[float, float] | None:
    """The interval around a value, which lies inside of it; `None` where none is known."""
    found = (intervals or {}).get(series, {}).get(category)
    return (min(found[0], value), max(found[1], value)) if found is not None and all(map(_known, found)) else None


def _or_nothing(interval: tuple[float, float] | None, value: float) -> tuple[float, float]:
    return interval or (value, value)


def _look(number: int) -> tuple[str, str, str]:
    """Colour, mark and stroke of a series; no two of the first 32 have the same three."""
    turn = number // len(COLOURS)
    return COLOURS[number % len(COLOURS)], _MARKS[number % len(_MARKS)], _STROKES[turn % len(_STROKES)]


def _label(name: str, length: int = _MAX_LABEL) -> str:
    """A name as a chart can hold it: on one line, its middle left out if it is long."""
    plain = shorten(name, max(length, len(name)))
    return plain if len(plain) <= length else f"{plain[: length * 2 // 3 - 1]}…{plain[-(length // 3) :]}"


def _number(value: float) -> str:
    """Formats a value in three digits, without an exponent where it can do without."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return re.sub(r"e\+?(-?)0*(\d)", r"e\1\2", f"{value:.1e}")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _plain_numbers() -> FuncFormatter:
    """Labels of a logarithmic axis, which are formulas otherwise."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: _number(value))


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of a colour, as the Web Content Accessibility Guidelines 2.2 define it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
