"""Pages in a real browser: from the disk, by mouse and by keyboard, by day and by night, on a phone, in print."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gradlab.report import write_diagnosis
from gradlab.trace import Trace

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")

LEFT_TO_ASK = ("file:", "data:", "blob:")
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest("svg, script")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push([ratio.toFixed(2), element.className, walker.currentNode.textContent.slice(0, 40)]);
  }
  return poor;
}"""


@dataclass
class Opened:
    """A page in the browser, what it asked for and what it complained about."""

    page: Any
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def drawn(self) -> None:
        """Wait for all charts; each is drawn when it comes near the screen."""
        for chart in self.page.locator(".chart").all():
            chart.scroll_into_view_if_needed()
            chart.locator("canvas, svg").first.wait_for(timeout=20_000)
        self.page.evaluate("scrollTo(0, 0)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as found:
        arguments = ["--no-sandbox", "--disable-background-networking"]
        browser = found.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def show(path: Path, *, width: int = 1100, scheme: str = "light") -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        begin = time.perf_counter()
        opened.page.goto(path.as_uri())
        opened.seconds = time.perf_counter() - begin
        return opened

    yield show
    for context in contexts:
        context.close()


@pytest.fixture(params=["run_page", "diagnosis"], ids=["run", "diagnosis"])
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_the_page_opens_quietly_and_asks_nobody(path: Path, show: Callable[..., Opened]) -> None:
    opened = show(path)
    opened.drawn()
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(LEFT_TO_ASK)] == []
    assert opened.page.evaluate("window.evil") is None
    # Even what a script might try is refused by the page itself.
    assert opened.page.evaluate("fetch('https://example.org').then(() => 'sent', () => 'refused')") == "refused"


def test_basics_of_access(path: Path, show: Callable[..., Opened]) -> None:
    opened = show(path)
    opened.drawn()
    page = opened.page
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.title()
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map((h) => Number(h.tagName[1]))")
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    unnamed = """[...document.querySelectorAll('svg, canvas, input, button, [role=region], [role=img]')].filter((e) =>
      !e.closest('[aria-hidden=true]') && !e.closest('[role=img][aria-label]') && !e.getAttribute('aria-label')
      && !(e.labels && e.labels.length) && !e.textContent.trim()).map((e) => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(unnamed) == []
    assert page.evaluate("[...document.querySelectorAll('[role=img]')].every((e) => e.ariaLabel.length > 10)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_by_day_and_by_night(path: Path, show: Callable[..., Opened], scheme: str) -> None:
    opened = show(path, scheme=scheme)
    opened.drawn()
    back = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(22, 24, 28)") == (scheme == "dark")
    assert opened.page.evaluate(CONTRAST) == []
    for paper in opened.page.locator(".paper").all():  # figures are drawn in black
        assert paper.evaluate("(e) => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(path: Path, show: Callable[..., Opened], scheme: str) -> None:
    opened = show(path, width=390, scheme=scheme)
    opened.drawn()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = opened.page.evaluate("[...document.querySelectorAll('canvas')].map((e) => e.getBoundingClientRect().width)")
    assert all(width <= 390 for width in wide)


def test_print_shows_all_and_needs_no_scrolling(path: Path, show: Callable[..., Opened]) -> None:
    opened = show(path, scheme="dark")
    opened.page.emulate_media(media="print")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    for chart in opened.page.locator(".chart").all():
        chart.locator("canvas, svg").first.wait_for(timeout=20_000)
    assert opened.page.evaluate(CONTRAST) == []
    assert not opened.page.locator("input[type=range]").first.is_visible()
    assert opened.page.pdf(format="A4").startswith(b"%PDF")
    assert opened.said == []


# -- sorting ----------------------------------------------------------------------------------------------------------


def column(page: Any) -> list[str]:
    return [text.split()[0] for text in page.locator(".claims tbody th").all_inner_texts()]


@pytest.mark.parametrize("keys", [False, True], ids=["mouse", "keyboard"])
def test_claims_are_sorted_by_their_headings(run_page: Path, show: Callable[..., Opened], keys: bool) -> None:
    page = show(run_page).page

    def press(name: str) -> None:
        button = page.get_by_role("button", name=name, exact=True)
        if keys:
            button.focus()
            page.keyboard.press("Enter")
        else:
            button.click()

    assert column(page) == ["C10", "C2", "C1"]
    press("claim")
    assert column(page) == ["C1", "C2", "C10"]  # as people count
    press("measured")
    assert column(page) == ["C10", "C2", "C1"]  # 9, 104, none
    press("measured")
    assert column(page) == ["C2", "C10", "C1"]  # none stays last
    assert page.locator("th[aria-sort=descending]").inner_text().strip() == "measured"
    press("verdict")
    assert column(page) == ["C10", "C2", "C1"]


# -- charts -----------------------------------------------------------------------------------------------------------


def test_the_slider_moves_by_keyboard_and_by_mouse(run_page: Path, show: Callable[..., Opened]) -> None:
    opened = show(run_page)
    opened.drawn()
    page = opened.page
    slider, said = page.locator("#r0-flow0-slider"), page.locator("#r0-flow0-said")
    before = page.locator("#r0-flow0-heat canvas").screenshot()
    assert said.inner_text().startswith("Step 4: smallest 0.12 at layers.0")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert said.inner_text().startswith("Step 3:")
    page.keyboard.press("Home")
    assert said.inner_text().startswith("Step 0:")
    assert slider.get_attribute("aria-valuetext") == said.inner_text()
    page.wait_for_timeout(200)
    assert page.locator("#r0-flow0-heat canvas").screenshot() != before  # the line is elsewhere
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert said.inner_text().startswith("Step 2:")


def test_a_heat_map_tells_a_value_under_the_mouse(run_page: Path, show: Callable[..., Opened]) -> None:
    opened = show(run_page)
    opened.drawn()
    canvas = opened.page.locator("#r0-flow0-heat canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + 60)
    tip = opened.page.locator("#vg-tooltip-element.visible")
    tip.wait_for(timeout=5000)
    assert "gradient norm" in tip.inner_text()
    assert "layers." in tip.inner_text()


@pytest.mark.parametrize("keys", [False, True], ids=["mouse", "keyboard"])
def test_curves_are_switched_off_and_on(run_page: Path, show: Callable[..., Opened], keys: bool) -> None:
    opened = show(run_page)
    opened.drawn()
    page = opened.page
    lines = page.locator("#r0-losses .mark-line path")
    box = page.locator(".switches input").first

    def press() -> None:
        if keys:
            box.focus()
            page.keyboard.press("Space")
        else:
            box.click()

    playwright.expect(lines).to_have_count(2)
    press()
    playwright.expect(lines).to_have_count(1)
    press()
    playwright.expect(lines).to_have_count(2)


def test_the_focus_is_seen(run_page: Path, show: Callable[..., Opened]) -> None:
    page = show(run_page).page
    for _ in range(6):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outline")
        assert "solid 3px" in outline
        assert page.evaluate("document.activeElement !== document.body")


def test_five_thousand_layers_open_and_stay_small(show: Callable[..., Opened], tmp_path: Path) -> None:
    layer, step = (part.ravel() for part in np.meshgrid(np.arange(5000), np.arange(200), indexing="ij"))
    names = np.array([f"encoder.layers.{k}.linear" for k in range(5000)])
    table = {"step": step, "layer": names[layer], "order": layer, "grad_norm": 10.0 ** (layer / 500 - 10)}
    path = write_diagnosis(Trace({"layers": pd.DataFrame(table)}), tmp_path / "deep.html")
    assert path.stat().st_size < 5e6
    opened = show(path)
    opened.drawn()
    assert "5000 layers in 120 bands" in opened.page.inner_text("main")
    assert opened.said == []
