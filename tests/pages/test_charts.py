"""Charts: the same bytes for the same numbers, readable on any background, names as they stand."""

from __future__ import annotations

import io
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from largemerge.pages import charts
from largemerge.pages.charts import Chart

MANY = {f"model {m}": {f"task number {t}": (7 * m + 3 * t) % 11 / 11 + 0.05 for t in range(20)} for m in range(8)}
FEW = {"merged": {"code": 0.5, "prose": 0.25, "law": 0.75}, "expert": {"code": 0.6, "prose": 0.3, "law": 0.7}}
DRAW: dict[str, Callable[[dict[str, dict[str, float]]], Chart]] = {
    "bars": lambda values: charts.bars(values, title="Scores", unit="accuracy"),
    "radar": lambda values: charts.radar(values, title="Scores", unit="accuracy"),
    "lines": lambda values: charts.lines(
        {name: list(enumerate(own.values())) for name, own in values.items()},
        title="Scores",
        x_label="task",
        y_label="accuracy",
        x_names=list(next(iter(values.values()))),
    ),
    "heatmap": lambda values: charts.heatmap(values, title="Scores", unit="accuracy"),
    "timeline": lambda values: charts.timeline(
        {name: list(itertools.pairwise(range(len(own) + 1))) for name, own in values.items()},
        levels={name: list(enumerate(own.values())) for name, own in values.items()},
        title="Scores",
    ),
}


def texts(chart: Chart) -> list[str]:
    """What stands in a chart, its title for those who do not see it left out."""
    root = ElementTree.fromstring(chart.svg)
    return [each.text or "" for each in root.iter() if each.tag.endswith("}text")]


@pytest.mark.parametrize("kind", DRAW)
def test_the_same_numbers_give_the_same_bytes(kind: str) -> None:
    chart, again = DRAW[kind](FEW), DRAW[kind](FEW)
    assert chart.svg == again.svg == chart.svg
    assert chart.png() == again.png() == chart.png()
    assert chart.svg != DRAW[kind]({**FEW, "merged": {"code": 0.1, "prose": 0.2, "law": 0.3}}).svg
    ids = re.findall(r'<\w+ [^<>]*?id="([^"]*)"', chart.svg)
    assert len(ids) == len(set(ids)) and set(re.findall(r"#(c\w+-\w+)", chart.svg)) == set(ids)
    assert not re.search(r"\b20\d\d-\d\d-\d\d|matplotlib", chart.svg, re.IGNORECASE)


@pytest.mark.parametrize("kind", DRAW)
def test_charts_ask_nobody_and_have_no_background(kind: str) -> None:
    chart = DRAW[kind](FEW)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', chart.svg))
    assert "url(http" not in chart.svg and "<image" not in chart.svg and "<script" not in chart.svg
    assert ElementTree.fromstring(chart.svg).find("{http://www.w3.org/2000/svg}title") is not None
    picture = Image.open(io.BytesIO(chart.png()))
    assert picture.getpixel((0, 0))[3] == 0  # type: ignore[index]
    assert picture.getextrema()[3][1] == 255


@pytest.mark.parametrize("kind", DRAW)
def test_names_of_strangers_are_text(kind: str) -> None:
    hostile = ["<script>alert(1)</script>", "a$_2$ & \"b\" 'c'", "two\nlines", "中文", "\x1b[31m\u202e"]
    values = {name: {each: 1.0 + len(each) for each in hostile} for name in hostile}
    chart = DRAW[kind](values)
    shown = texts(chart)
    expected = ["<script>alert(1)</script>", "a$_2$ & \"b\" 'c'", "two\\nlines", "中文", "\\x1b[31m\\u202e"]
    for name in expected:
        assert name in shown or any(each.startswith(name[:10]) and "…" in each for each in shown), (name, shown)
    assert "<script" not in chart.svg
    assert chart.png().startswith(b"\x89PNG")


def test_colours_stand_out_from_white_and_from_black() -> None:
    for colour in (*charts.COLOURS, charts.INK, charts.RULE):
        light = charts.luminance(to_rgb(colour))
        on_white, on_black = 1.05 / (light + 0.05), (light + 0.05) / 0.05
        needed = 4.0 if colour == charts.INK else 3.0
        assert on_white >= needed and on_black >= needed, (colour, on_white, on_black)
    assert charts.luminance((1, 1, 1)) == pytest.approx(1) and charts.luminance((0, 0, 0)) == 0


def test_twenty_tasks_of_eight_models_stay_readable() -> None:
    chart = charts.bars(MANY, title="Scores")
    axes = chart.figure.axes[0]
    dpi = chart.figure.dpi
    heights = [bar.get_window_extent().height / dpi for bar in axes.patches]
    assert len(heights) == 160 and min(heights) > 0.06  # inches
    names = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(names) == 20
    assert not any(a.overlaps(b) for a, b in itertools.combinations(names, 2))
    places = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches)
    assert all(end <= begin + 1e-9 for (_, end), (begin, _) in itertools.pairwise(places))
    assert {*MANY, *MANY["model 0"]} <= set(texts(chart))


def test_bars_have_their_lengths_and_gaps_where_nothing_is_known() -> None:
    values = {"a": {"x": 1.0, "y": 2.5}, "b": {"x": math.nan, "z": -3.0}}
    chart = charts.bars(values, title="t")
    assert sorted(bar.get_width() for bar in chart.figure.axes[0].patches) == [-3.0, 1.0, 2.5]
    assert {"1", "2.5", "-3"} <= {each.strip().replace("−", "-") for each in texts(chart)}


def test_intervals_reach_from_the_lowest_to_the_highest() -> None:
    chart = charts.bars(FEW, title="t", intervals={"merged": {"code": (0.4, 0.7)}})
    spans = [segment[:, 0].tolist() for each in chart.figure.axes[0].collections for segment in each.get_segments()]  # type: ignore[attr-defined]
    assert [0.4, 0.7] in [[round(value, 6) for value in span] for span in spans]
    with_band = charts.radar(FEW, title="t", intervals={"merged": {"code": (0.4, 0.7)}})
    assert with_band.figure.axes[0].collections and not charts.radar(FEW, title="t").figure.axes[0].collections


def test_cells_that_are_nearly_alike_look_so_and_an_outlier_is_dark() -> None:
    def luminances(values: list[float], **how: bool) -> list[float]:
        chart = charts.heatmap({"row": {str(n): value for n, value in enumerate(values)}}, title="t", **how)
        return [charts.luminance(each.get_facecolor()[:3]) for each in chart.figure.axes[0].patches]

    alike = luminances([0.71, 0.72, 0.73, 0.74])
    assert max(alike) - min(alike) < 0.03
    light, *_, dark = luminances([0.02, 0.021, 0.019, 0.2])
    assert light > 0.7 and dark < 0.1
    dark, *others = luminances([0.05, 0.9, 0.95], high_is_good=True)
    assert dark < 0.1 and min(others) > 0.7
    assert len(luminances([1.0, 0.0, -1.0, math.inf, 1e6], log=True)) == 2


def test_a_logarithmic_axis_has_plain_numbers() -> None:
    chart = charts.lines({"a": [(0, 1e-7), (1, 0.0), (2, 1e-3)]}, title="t", x_label="x", y_label="y", log_y=True)
    assert not any("$" in each or "mathdefault" in each for each in texts(chart))
    assert any(each.startswith("1.0e-") for each in texts(chart))


def test_what_cannot_be_drawn_is_told() -> None:
    for kind in ("bars", "radar", "lines", "heatmap"):
        with pytest.raises(ValueError, match="Scores: no value"):
            DRAW[kind]({"a": {"x": math.nan}})
    with pytest.raises(ValueError, match="Scores: 2 categories; expected three"):
        DRAW["radar"]({"a": {"x": 1.0, "y": 2.0}})
    with pytest.raises(ValueError, match="Scores: no value for b, z; expected"):
        DRAW["radar"]({"a": {"x": 1.0, "y": 2.0, "z": 3.0}, "b": {"x": 1.0, "y": 2.0}})
    with pytest.raises(ValueError, match="t: nothing to draw"):
        charts.timeline({}, title="t")


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    matplotlib.rcParams["font.size"] = 21.5
    try:
        before = dict(matplotlib.rcParams)
        svg = DRAW["bars"](FEW).svg
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcParams["font.size"] = matplotlib.rcParamsDefault["font.size"]
    assert svg == DRAW["bars"](FEW).svg  # a program's own style does not get into it
    code = "import sys; from largemerge.pages import charts; assert 'matplotlib' not in sys.modules; "
    code += "charts.bars({'a': {'x': 1}}, title='t').svg; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_points_stand_alone_and_close_numbers_apart() -> None:
    series = {"a": [(1e-6, 0.99), (1e-3, 1.0), (1e-1, 1.01)]}
    labels = {"title": "t", "x_label": "x", "y_label": "y"}
    points = charts.lines(series, **labels, log_x=True, joined=False, from_zero=False)
    (axes,) = points.figure.axes
    (line,) = axes.lines
    assert line.get_linestyle() == "None" and line.get_markersize() > 0
    assert axes.get_xscale() == "log" and axes.get_ylim()[0] > 0.98
    (axes,) = charts.lines(series, **labels).figure.axes
    assert axes.lines[0].get_linestyle() == "-" and axes.get_xscale() == "linear" and axes.get_ylim()[0] == 0
