"""Pages: everything in one file, everything escaped, headers for those who listen."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from largemerge.pages import charts
from largemerge.pages.page import ChartPart, NotePart, Page, Section, TablePart, TextPart, shown

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}'
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Reads a page: its elements, its text, and elements that are not closed in turn."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.problems, self._open = "", list[str](), list[str]()
        self.feed(html)
        self.close()
        self.problems += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> Page:
    chart = charts.bars({HOSTILE: {HOSTILE: 1.0, "two": 2.0}, "b": {"two": 1.0}}, title=HOSTILE)
    other = charts.lines({HOSTILE: [(0, 1), (1, 2)]}, title="Other", x_label=HOSTILE, y_label="y")
    table = TablePart(
        (HOSTILE, "count", "share"), [(HOSTILE, 12_345, None), ("x", 2, 0.123456)], HOSTILE, {(0, 1): "bad"}
    )
    parts = [
        NotePart(HOSTILE, HOSTILE, "bad"),
        table,
        ChartPart(chart, HOSTILE),
        ChartPart(other, "Other."),
        TextPart(f"a: 1\n\n\nb: {HOSTILE}", HOSTILE),
    ]
    return Page(
        HOSTILE, f"{HOSTILE}\nA second paragraph.", [Section(HOSTILE, HOSTILE, parts), Section("b"), Section("c")]
    )


def test_names_of_strangers_are_text_everywhere(page: Page) -> None:
    html = page.html()
    read = Reader(html)
    assert read.problems == []
    assert not {"script", "img", "iframe", "object", "link"} & {tag for tag, _ in read.elements}
    assert not any(name.startswith("on") for _, attributes in read.elements for name in attributes)
    assert read.text.count(HOSTILE) >= 13 and "49" not in read.text
    assert html == page.html()


def test_a_page_asks_nobody(page: Page) -> None:
    targets = [
        value or ""
        for _, of in Reader(page.html()).elements
        for key, value in of.items()
        if key in ("src", "href", "xlink:href")
    ]
    assert targets and all(target.startswith("#") for target in targets)
    style = re.search(r"<style>(.*?)</style>", page.html(), re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    assert "default-src 'none'" in page.html()


def test_a_page_can_be_read_by_those_who_listen(page: Page) -> None:
    read = Reader(page.html())
    by_tag = Counter(tag for tag, _ in read.elements)
    assert by_tag["main"] == by_tag["h1"] == by_tag["title"] - 2 == 1  # two charts have titles, too
    assert dict(read.elements)["html"] == {"lang": "en"}
    assert ("meta", {"charset": "utf-8"}) in read.elements
    assert all(of.get("scope") in ("col", "row") for tag, of in read.elements if tag == "th")
    labels = [of["aria-label"] for tag, of in read.elements if tag == "svg" and of.get("role") == "img"]
    assert labels == [HOSTILE, "Other"]
    ids = [of["id"] for _, of in read.elements if "id" in of]
    assert len(ids) == len(set(ids))
    linked = {(of.get("href") or "")[1:] for tag, of in read.elements if tag == "a"}
    assert linked == {"part-1", "part-2", "part-3"} <= set(ids)


def test_cells_are_formatted_and_highlighted(page: Page) -> None:
    html = page.html()
    assert '<td class="number bad">12,345</td>' in html and '<td class="number">0.1235</td>' in html
    assert '<td class="number">–</td>' in html
    assert [shown(each) for each in (None, "a", 1234, 0.5, 1e-9)] == ["–", "a", "1,234", "0.5", "1e-09"]
    mixed = TablePart(
        ("", "a", "b", "c"),
        [("x", "1.5 GiB", "12 s", "word"), ("y", "2 bytes", None, "3"), ("z", "1", "12 min 5 s", "")],
    )
    assert mixed.numbers == {1, 2}


def test_texts_stay_as_they_are(page: Page) -> None:
    assert f"a: 1\n\n\nb: {HOSTILE}" in Reader(page.html()).text
    turned = Page("\u202egnp.exe", "", [])
    assert "\u202e" not in turned.html() and "\\u202egnp.exe" in turned.html()
