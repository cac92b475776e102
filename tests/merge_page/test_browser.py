"""Pages in a real browser: nothing is asked of anybody, and all of it can be read on a phone, by day and by night."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_merges import HOSTILE

import largemerge

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NARROW, WIDE = {"width": 390, "height": 844}, {"width": 1280, "height": 900}

OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(each => {
    const scrolls = each.closest('.scroll');
    return (!scrolls || scrolls === each) && each.getBoundingClientRect().right > innerWidth + 0.5;
}).map(each => each.outerHTML.slice(0, 80))"""

CONTRASTS = """() => {
    const light = text => {
        const [r, g, b] = text.match(/[\\d.]+/g).map(Number)
            .map(part => part / 255).map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = each => {
        for (; each; each = each.parentElement) {
            const colour = getComputedStyle(each).backgroundColor;
            if (colour !== 'rgba(0, 0, 0, 0)') return colour;
        }
        return 'rgb(255, 255, 255)';
    };
    return [...document.querySelectorAll('h1, h2, p, th, td, a, summary, figcaption')].map(each => {
        const [a, b] = [light(getComputedStyle(each).color), light(behind(each))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), each.outerHTML.slice(0, 80)];
    }).sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, of the system, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser on the PATH: {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(merges: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of every merge."""
    folder = tmp_path_factory.mktemp("pages")
    return {name: largemerge.report(out, output=folder / f"{name}.html") for name, out in merges.items()}


def opened(browser: Any, path: Path, size: dict[str, int], scheme: str = "light") -> tuple[Any, list[str]]:
    """A page in a window of its own, and what it asks for and complains about, the file itself left out."""
    page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    told: list[str] = []
    page.on("request", lambda request: told.append(request.url) if request.url != path.as_uri() else None)
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
    page.route("http*://**", lambda route: route.abort())
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    return page, told


def test_a_page_that_asks_somebody_is_noticed(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text('<img src="http://example.invalid/x.png"><script>alert("!")</script>')
    _, told = opened(browser, tmp_path / "page.html", NARROW)
    assert "http://example.invalid/x.png" in told and "!" in told


@pytest.mark.parametrize("method", ["calibrated", "regmean_plusplus", "ties"])
@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_a_page_asks_nobody_and_fits(browser: Any, pages: dict[str, Path], method: str, size: dict[str, int]) -> None:
    page, told = opened(browser, pages[method], size)
    assert told == []
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    assert page.evaluate(OVERFLOWING) == []
    text = page.inner_text("body")
    assert text.startswith(f"{method}: 3 models → out") and HOSTILE in text
    for title in ("At a glance", "Block by block", "How far each block moved", "Time and memory", "layers.2"):
        assert title in text
    charts = page.locator("svg[role=img]")
    assert charts.count() >= 3
    for number in range(charts.count()):
        box = charts.nth(number).bounding_box()
        assert box["width"] >= 500 and box["height"] >= 60
    sizes = page.evaluate("[...document.querySelectorAll('svg text')].map(each => each.getBoundingClientRect().height)")
    assert len(sizes) > 30 and min(sizes) >= 6
    page.get_by_text("The whole configuration").click()
    assert '"merge_method"' in page.inner_text("pre")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_can_be_read_by_day_and_by_night(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    page, _ = opened(browser, pages["calibrated"], WIDE, scheme)
    contrast, where = page.evaluate(CONTRASTS)
    assert contrast >= 4.5, where
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    parts = [int(part) for part in background[4:-1].split(",")]
    assert (min(parts) > 230) if scheme == "light" else (max(parts) < 40)
    ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert ink == page.evaluate("getComputedStyle(document.querySelector('figcaption')).color")
