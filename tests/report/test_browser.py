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
        self.metrics = self.page.context.new_cdp_session(self.page)
        self.metrics.send("Performance.enable", {"timeDomain": "threadTicks"})
        self.page.goto(file.as_uri())

    def processor_seconds(self) -> float:
        """Return the time of the processor that the page has taken, which other programs do not change."""
        metrics = self.metrics.send("Performance.getMetrics")["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))

    def rows(self) -> list[str]:
        rows = self.page.locator(".board tbody tr:visible")
        return [" ".join(row.locator("td").all_inner_texts()[2:4]) for row in rows.all()]

    def unfold(self, *sections: str) -> None:
        """Open folded sections, all without a name, and wait until their charts are drawn."""
        self.page.evaluate(
            "names => document.querySelectorAll('details.section')"
            ".forEach(fold => { fold.open = fold.open || !names.length || names.includes(fold.id); })",
            list(sections),
        )
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('figure:has(> script.spec) .chart')]"
            ".every(box => !box.clientWidth || box.dataset.drawn)"
        )

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
    opened.unfold("settings")
    best_first = opened.rows()
    head = page.locator("th[data-name=mcc]")
    for direction, rows in (("descending", best_first), ("ascending", best_first[::-1]), (None, best_first)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        assert opened.rows() == rows


@pytest.mark.parametrize(
    ("typed", "kept"),
    [("dora", 2), ("adapter.rank=8", 2), ("rank=2 dora", 1), ("mcc>0.68", 1), ("role=recommended", 1), ("none", 0)],
)
def test_filtering(opened: Opened, page: Page, typed: str, kept: int) -> None:
    opened.unfold("settings")
    page.get_by_label("Filter").fill(typed)
    assert len(opened.rows()) == kept
    assert page.locator(".count").inner_text() == f"{kept} of 4 settings"


def test_ticked_settings_are_compared(opened: Opened, page: Page) -> None:
    opened.unfold("settings")
    boxes = page.locator(".board tbody input[type=checkbox]")
    boxes.nth(0).check()
    assert not page.locator(".ticked").is_visible()
    boxes.nth(2).check()
    names = page.locator(".numbers tbody th").all_inner_texts()
    assert len(names) == 2
    page.wait_for_selector(".intervals[data-drawn] svg")
    page.wait_for_selector(".lines[data-drawn] svg")
    assert f"{ROWS} examples" in page.locator(".pair").inner_text()
    assert page.get_by_label("Run A").locator("option:checked").text_content() == f"{names[0]}, seed 0"
    page.locator("select.metric").select_option(label="selection/MCC")
    assert page.locator(".metric-title").inner_text() == "selection/MCC"
    page.get_by_role("button", name="Clear ticks").click()
    assert not page.locator(".ticked").is_visible()


def test_by_keyboard_alone(opened: Opened, page: Page) -> None:
    page.keyboard.press("Tab")
    assert focused(page).inner_text() == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.url.endswith("#content")
    walk(page, lambda: focused(page).inner_text().startswith("All settings") and tag(page) == "SUMMARY")
    page.keyboard.press("Enter")
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
    for _ in range(2):
        walk(page, lambda: focused(page).get_attribute("type") == "checkbox")
        page.keyboard.press("Space")
    assert page.locator(".numbers tbody tr").count() == 2


def tag(page: Page) -> str:
    return str(page.evaluate("document.activeElement.tagName"))


def focused(page: Page) -> Locator:
    return page.locator(":focus")


def walk(page: Page, there: Callable[[], bool]) -> None:
    """Tab on until there, never more than fifty times."""
    for _ in range(50):
        page.keyboard.press("Tab")
        if there():
            return
    raise AssertionError("not reached by the keyboard")


def test_every_link_opens_its_section(page: Page) -> None:
    links = page.get_by_role("navigation", name="Sections").get_by_role("link")
    assert links.count() >= 10
    for link in links.all():
        link.click()
        fold = page.locator(str(link.get_attribute("href")))
        assert fold.get_attribute("open") is not None
        assert fold.get_by_role("heading", name=link.inner_text()).first.is_visible()


def test_axes_can_be_chosen(opened: Opened, page: Page) -> None:
    opened.unfold("cost")
    figure = page.locator("#cost figure")
    before = figure.locator("svg").inner_html()
    page.get_by_label("Horizontal").select_option("cost.train_seconds")
    page.get_by_label("Vertical").select_option("f1")
    page.wait_for_function("() => document.querySelector('#cost figcaption strong').textContent.includes('time')")
    assert figure.locator("strong").inner_text() == "F1 against training time (s)"
    page.wait_for_function(
        "old => document.querySelector('#cost svg') && document.querySelector('#cost svg').innerHTML !== old",
        arg=before,
    )
    assert "F1 against training time (s)" in str(figure.locator(".chart").get_attribute("aria-label"))


def test_every_mark_has_its_name_beside_the_pointer(opened: Opened, page: Page) -> None:
    opened.unfold("cost")
    page.locator("#cost .mark-symbol.role-mark path").last.hover(force=True)
    assert "MCC" in page.locator("#tip").inner_text()


def test_two_other_runs(opened: Opened, page: Page) -> None:
    opened.unfold("disagreements")
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


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_any_width(browser: Browser, file: Path, width: int) -> None:
    """Tables scroll to their last column, and no text of a chart lies outside of it or on another one."""
    opened = Opened(browser, file, viewport={"width": width, "height": 844})
    opened.unfold()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    for region in opened.page.locator(".scroll:visible").all():
        hidden = region.evaluate(
            "box => { box.scrollLeft = 1e6; const cells = box.querySelectorAll('thead th'); return cells.length &&"
            " cells[cells.length - 1].getBoundingClientRect().right > box.getBoundingClientRect().right + 1; }"
        )
        assert not hidden
    assert opened.page.evaluate(TEXTS) == []
    opened.is_quiet()
    opened.page.context.close()


TEXTS = """() => {
  const faults = [];
  for (const chart of document.querySelectorAll('.chart')) {
    if (!chart.clientWidth) continue;
    const frame = chart.getBoundingClientRect();
    const texts = [...chart.querySelectorAll('svg text')].filter(text => text.textContent.trim());
    const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
    for (const [words, box] of boxes) {
      if (box.left < frame.left - 2 || box.right > frame.right + 2) faults.push(['outside', words]);
    }
    boxes.forEach(([words, a], i) => boxes.slice(i + 1).forEach(([others, b]) => {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 2 && down > 5) faults.push(['overlap', words, others]);
    }));
  }
  return faults;
}"""


def test_labels_of_long_names_read_apart(browser: Browser, tmp_path: Path) -> None:
    long = "a_method_whose_name_is_too_long_for_a_lane_of_the_chart_number_"
    for number, seed in ((n, s) for n in range(3) for s in range(2)):
        make(tmp_path / "runs" / f"{number}-{seed}", f"{long}{number}", seed, 0.5 + 0.1 * number)
    (tmp_path / "report.html").write_text(report(summarise([tmp_path / "runs"])), encoding="utf-8")
    for width in (390, 1280):
        opened = Opened(browser, tmp_path / "report.html", viewport={"width": width, "height": 844})
        opened.unfold()
        texts = opened.page.locator(".result svg .role-axis-label text").all_text_contents()
        names = {text.replace(" ", "").removeprefix("★").removesuffix("(baseline)") for text in texts}
        assert {f"{long}{number}" for number in range(3)} <= names
        assert opened.page.evaluate(TEXTS) == []
        opened.page.context.close()


def test_it_prints_on_white_without_controls(page: Page) -> None:
    page.locator("#theme").select_option("dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.get_by_role("navigation", name="Sections").is_visible()
    assert page.locator(".methods tbody tr").first.is_visible()
    assert page.locator(".result svg").is_visible()


def test_without_script_everything_can_be_read(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, java_script_enabled=False)
    assert opened.page.locator(".methods tbody tr:visible").count() == 2
    assert opened.page.locator("h1").is_visible()
    assert opened.page.locator(".lead").is_visible()
    opened.page.locator("#settings summary").first.click()
    assert opened.page.locator(".board tbody tr:visible").count() == 4
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
    opened.unfold()
    opened.page.get_by_label("Run A").select_option("1")
    opened.page.get_by_label("Run B").select_option("0")
    opened.page.locator(".board tbody input").nth(0).check()
    opened.page.locator(".board tbody input").nth(1).check()
    opened.page.get_by_label("Horizontal").select_option("cost.train_seconds")
    opened.page.locator(".result .mark-symbol.role-mark path").first.hover(force=True)
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
    opened.unfold()
    rows = opened.rows()
    assert len(rows) >= 2
    sections = [fold.get_attribute("id") for fold in opened.page.locator("details.section").all()]
    assert {"settings", "cost", "calibration", "disagreements", "configuration"} <= set(sections)
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
    assert len(html.encode()) < 3_000_000
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    opened = Opened(browser, tmp_path / "report.html")
    opened.page.wait_for_selector(".result .chart[data-drawn]")
    assert opened.processor_seconds() < 2  # 0.8 was measured
    assert opened.page.locator(".board tbody tr").count() == 1000
    opened.unfold("settings", "cost")
    opened.page.get_by_label("Filter").fill("vera mcc>=0.4")
    assert opened.page.locator(".count").inner_text() == "67 of 1,000 settings"
    opened.is_quiet()
    opened.page.context.close()


def test_a_refreshed_page_keeps_what_the_reader_chose(browser: Browser, runs: Path, tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    html.write_text(report(summarise([runs]), refresh=600), encoding="utf-8")
    opened = Opened(browser, html)
    page = opened.page
    opened.unfold("settings", "grid")
    page.get_by_label("Filter").fill("rank=8")
    page.locator(".board tbody tr:visible input").nth(0).check()
    page.get_by_label("Colours").select_option("dark")
    page.evaluate("scrollTo({top: 300, behavior: 'instant'})")
    html.write_text(report(summarise([runs])), encoding="utf-8")
    page.reload()
    assert page.get_by_label("Filter").input_value() == "rank=8"
    assert len(opened.rows()) == 2
    assert page.locator(".board tbody input:checked").count() == 1
    assert page.get_by_label("Colours").input_value() == "dark"
    assert page.locator("#grid").get_attribute("open") is not None
    assert page.evaluate("scrollY") == 300
    opened.is_quiet()
    page.context.close()
