"""The report page in Chromium: it asks for nothing, complains of nothing, and answers to hand and keyboard.

With `LORA_BENCH_SWEEP=DIR` the page of that folder's runs is opened too.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING

import pytest

from lora_bench.analysis.summary import summarise
from lora_bench.report import page as report
from tests.command_line import lora_bench, toy_run
from tests.report.runs import ROWS, make

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Locator, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        installed = playwright.chromium.executable_path
        executable = next(filter(None, map(shutil.which, (*NAMES, installed))), None)
        if executable is None:
            pytest.skip("no Chromium is installed here")
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


class Opened:
    """A page in a context of its own; every request, console message and exception on it is kept."""

    def __init__(self, browser: Browser, file: Path, **context: object) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page: Page = browser.new_context(**context).new_page()  # type: ignore[arg-type]
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(file.as_uri())

    def rows(self) -> list[str]:
        rows = self.page.locator(".leaderboard tbody tr:visible")
        return [" ".join(row.locator("td").all_inner_texts()[:2]) for row in rows.all()]

    def is_quiet(self) -> None:
        assert {url.split(":")[0] for url in self.requests} <= {"file", "data"}
        assert self.complaints == []


@pytest.fixture(scope="module")
def file(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report(summarise([runs])), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Browser, file: Path) -> Iterator[Opened]:
    opened_page = Opened(browser, file)
    yield opened_page
    opened_page.is_quiet()
    opened_page.page.context.close()


@pytest.fixture
def page(opened: Opened) -> Page:
    return opened.page


def test_sorting(opened: Opened, page: Page) -> None:
    best_first = opened.rows()
    head = page.locator("th[data-name=mcc]")
    for direction, rows in (("descending", best_first), ("ascending", best_first[::-1]), (None, best_first)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        assert opened.rows() == rows


@pytest.mark.parametrize(
    ("typed", "kept"),
    [("dora", 2), ("adapter.rank=8", 2), ("rank=2 dora", 1), ("mcc>0.68", 1), ("verdict=baseline", 1), ("none", 0)],
)
def test_filtering(opened: Opened, page: Page, typed: str, kept: int) -> None:
    page.get_by_label("Filter").fill(typed)
    assert len(opened.rows()) == kept
    assert page.locator(".count").inner_text() == f"{kept} of 4 experiments"
    assert page.locator("#cost use:not(.dim)[data-row]").count() == 2 * kept


def test_by_keyboard_alone(opened: Opened, page: Page) -> None:
    page.keyboard.press("Tab")
    assert focused(page).inner_text() == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.url.endswith("#content")
    best_first = opened.rows()
    walk(page, lambda: focused(page).get_attribute("id") == "filter")
    page.keyboard.type("rank=8")
    assert len(opened.rows()) == 2
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.press("Delete")
    walk(page, lambda: focused(page).inner_text().startswith("mcc"))
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert opened.rows() == best_first[::-1]
    walk(page, lambda: focused(page).inner_text() == "The numbers")
    page.keyboard.press("Enter")
    assert page.locator("details[open] table").first.is_visible()


def focused(page: Page) -> Locator:
    return page.locator(":focus")


def walk(page: Page, there: Callable[[], bool]) -> None:
    """Tab on until there, never more than fifty times."""
    for _ in range(50):
        page.keyboard.press("Tab")
        if there():
            return
    raise AssertionError("not reached by the keyboard")


def test_every_section_can_be_reached_and_has_a_name(page: Page) -> None:
    links = page.get_by_role("navigation", name="Sections").get_by_role("link")
    for link in links.all():
        assert page.get_by_role("region", name=link.inner_text(), exact=True).first.is_visible()


def test_two_other_runs(page: Page) -> None:
    summary = page.locator(".said")
    page.get_by_label("Run B").select_option("0")
    assert "two runs" in summary.inner_text()
    page.get_by_label("Run B").select_option("1")
    assert f"{ROWS} examples" in summary.inner_text()
    page.get_by_label("Run A").select_option("1")
    page.get_by_label("Run B").select_option("0")
    apart = page.locator(".disagreements tbody tr")
    assert apart.count() > 0
    for row in apart.all():
        label, a, b, right = row.locator("td").all_inner_texts()
        first_is_right = (float(a) >= 0.5) == (label == "1")
        assert first_is_right != ((float(b) >= 0.5) == (label == "1"))
        options = page.get_by_label("Run A").locator("option").all_inner_texts()
        assert right == options[1 if first_is_right else 0]


def test_light_and_dark(browser: Browser, file: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(251, 251, 249)", "rgb(19, 23, 27)"
    for scheme, expected in (("light", light), ("dark", dark)):
        opened = Opened(browser, file, color_scheme=scheme)
        assert opened.page.evaluate(background) == expected
        for theme, chosen in (("light", light), ("dark", dark), ("", expected)):
            opened.page.get_by_label("Colours").select_option(theme)
            assert opened.page.evaluate(background) == chosen
        opened.is_quiet()
        opened.page.context.close()


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_it_fits_any_width(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_prints_on_white_without_controls(page: Page) -> None:
    page.locator("#theme").select_option("dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.get_by_label("Filter").is_visible()
    assert not page.get_by_role("navigation", name="Sections").is_visible()
    assert page.locator(".leaderboard tbody tr").first.is_visible()


def test_without_script_everything_can_be_read(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, java_script_enabled=False)
    assert len(opened.page.locator(".leaderboard tbody tr:visible").all()) == 4
    assert not opened.page.locator("#filter").is_visible()
    opened.page.context.close()


def test_the_policy_stops_what_would_leave(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file)
    opened.page.evaluate("() => { new Image().src = 'https://example.org/x.png'; }")
    opened.page.evaluate(
        "() => { document.body.append(Object.assign(document.createElement('script'), {text: '1'})); }"
    )
    opened.page.wait_for_timeout(50)
    assert len([complaint for complaint in opened.complaints if "Content Security Policy" in complaint]) == 2
    opened.page.context.close()


def test_a_hostile_name_is_text(browser: Browser, tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)>\"'`${1}" + 99 * "x"
    make(tmp_path / "a", name, 0, 0.6)
    make(tmp_path / "b", "lora", 0, 0.5, rank=4)
    html = tmp_path / "report.html"
    html.write_text(report(summarise([tmp_path])), encoding="utf-8")
    opened = Opened(browser, html)
    assert name in opened.page.locator("h1").inner_text()
    assert opened.page.locator("img").count() == 0
    opened.page.get_by_label("Run A").select_option("1")
    opened.page.get_by_label("Run B").select_option("0")
    opened.page.locator("#cost use").first.hover(force=True)
    assert opened.page.locator("img").count() == 0
    opened.page.set_viewport_size({"width": 390, "height": 844})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    opened.is_quiet()
    opened.page.context.close()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep that was given, or a small one of one step on toy data."""
    if given := os.environ.get("LORA_BENCH_SWEEP"):
        return Path(given)
    folder = tmp_path_factory.mktemp("sweep")
    grid = ["adapter=lora,eva", f"hydra.sweep.dir={folder}"]
    assert lora_bench("train", "-m", *toy_run(*grid)).code == 0
    return folder


def test_the_page_of_a_real_sweep(browser: Browser, sweep: Path, tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    html.write_text(report(summarise([sweep])), encoding="utf-8")
    opened = Opened(browser, html)
    rows = opened.rows()
    assert len(rows) >= 2
    sections = [section.get_attribute("id") for section in opened.page.locator("section").all()]
    assert {"summary", "leaderboard", "cost", "calibration", "disagreements", "configuration"} <= set(sections)
    opened.page.locator("th[data-name=mcc] button").click()
    opened.page.get_by_label("Filter").fill(rows[0].split()[0])
    assert 1 <= len(opened.rows()) < len(rows)
    opened.is_quiet()
    opened.page.context.close()


def test_a_page_of_a_thousand_rows(browser: Browser, tmp_path: Path) -> None:
    make(tmp_path / "first", "lora", 0, 0.5)
    record = json.loads((tmp_path / "first" / "run.json").read_text())
    for n in range(1, 1000):
        record["config"]["optimizer"]["lr"] = n / 1000
        record["choices"]["adapter"] = ("lora", "dora", "vera")[n % 3]
        record["metrics"]["validation/mcc"] = n / 2000
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "run.json").write_text(json.dumps(record))
    began = process_time()
    table = summarise([tmp_path])
    html = report(table)
    assert process_time() - began < 10  # 1 on a free core
    assert len(html.encode()) < 5_000_000
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    opened = Opened(browser, tmp_path / "report.html")
    assert opened.page.locator(".leaderboard tbody tr").count() == 1000
    opened.page.get_by_label("Filter").fill("vera mcc>=0.4")
    assert opened.page.locator(".count").inner_text() == "67 of 1,000 experiments"
    opened.is_quiet()
    opened.page.context.close()
