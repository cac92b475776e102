"""A page of text, tables and charts as one HTML file that asks nobody for anything.

    Page ── sections ── parts: TablePart, ChartPart, NotePart, TextPart ──► Page.html()

Styles and charts are in the file; there is no script. The page follows the reader's light or dark colours, and on a
narrow screen tables and charts scroll inside of it. Names may be a stranger's: everything but the charts, which escape
their own text, is escaped by Jinja.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from largemerge.errors import printable
from largemerge.pages.charts import INK, Chart

Cell = str | float | int | None
"""What a cell of a table may hold; `None`: nothing is known."""
Mark = Literal["good", "bad"]
"""How a cell is highlighted."""

_INK = re.compile(rf"(fill|stroke): {INK}")
_NUMBER = re.compile(r"[-+−–]?[\d,.]+(e[-+]?\d+)?( ?(%|‰|×|s|ms|bytes?|[KMGT]iB|(min|h|days?)( \d+ (s|min|h))?))?")


@dataclass(frozen=True)
class TablePart:
    """A table, whose first column names the rows.

    Attributes:
        columns: Titles of the columns.
        rows: Cells of each row, as many as there are columns.
        caption: A sentence above it.
        highlights: Mark of a cell, by number of row and column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    highlights: Mapping[tuple[int, int], Mark] = field(default_factory=dict)

    @property
    def numbers(self) -> frozenset[int]:
        """Columns that hold numbers alone, which are set to the right."""
        found = {
            number
            for number in range(1, len(self.columns))
            if any(row[number] not in (None, "") for row in self.rows)
            and all(_is_number(row[number]) for row in self.rows)
        }
        return frozenset(found)


@dataclass(frozen=True)
class ChartPart:
    """A chart, and what it says in words.

    Attributes:
        chart: The chart.
        caption: Sentences below it.
    """

    chart: Chart
    caption: str


@dataclass(frozen=True)
class NotePart:
    """A sentence that stands out.

    Attributes:
        title: One or two words.
        text: The sentence.
        kind: Whether it is good, bad, or neither.
    """

    title: str
    text: str
    kind: Literal["good", "bad", "plain"] = "plain"


@dataclass(frozen=True)
class TextPart:
    """A text as it stands, such as a configuration, folded away.

    Attributes:
        text: The text.
        caption: What unfolds it.
    """

    text: str
    caption: str


Part = TablePart | ChartPart | NotePart | TextPart


@dataclass(frozen=True)
class Section:
    """A part of a page with a title.

    Attributes:
        title: The title.
        text: Sentences below it; each line is a paragraph.
        parts: Tables, charts and notes, from top to bottom.
    """

    title: str
    text: str = ""
    parts: Sequence[Part] = ()


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Its title.
        summary: Sentences below the title; each line is a paragraph.
        sections: What it holds, from top to bottom.
        footer: The last sentence.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    footer: str = "Made by largemerge. This file needs nothing beside it."

    def html(self) -> str:
        """Renders the page as the text of an HTML file; the same page gives the same text."""
        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
        )
        template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
        return template.render(page=self, kinds=_kinds, shown=shown, svg=_inline) + "\n"


def shown(cell: Cell) -> str:
    """Formats a cell: numbers in four digits, counts in full, nothing as a dash."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"


def _is_number(cell: Cell) -> bool:
    return cell in (None, "", "–") or isinstance(cell, int | float) or bool(_NUMBER.fullmatch(cell))


def _printable(value: object) -> object:
    """Escapes characters that no browser shows, such as those that turn the direction of a line."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def _kinds(parts: Sequence[Part]) -> Iterator[tuple[str, Part]]:
    """Yields each part after its kind, as the template asks for it."""
    names: dict[type, str] = {TablePart: "table", ChartPart: "chart", NotePart: "note", TextPart: "text"}
    for part in parts:
        yield names[type(part)], part


def _inline(chart: Chart) -> Markup:
    """Makes an SVG part of a page: it takes the page's colour of text, and says what it is."""
    start, rest = chart.svg.split(">", 1)
    start = f'{start} role="img" aria-label="{escape(printable(chart.title))}"'
    rest = _INK.sub(r"\1: var(--soft)", rest)
    return Markup(f"{start}>{rest}")  # Matplotlib has escaped its text
