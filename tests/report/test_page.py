"""The report page: its numbers are the table's, nothing in a run folder can break out of it, and Chromium likes it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lora_bench.compare import main, summarise
from lora_bench.errors import UserError
from lora_bench.record import Run
from lora_bench.report import page
from lora_bench.report.axes import linear, logarithmic
from lora_bench.report.tradeoffs import pareto
from tests.report.browser import CHROMIUM, Browser

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOSTILE = "<script>alert(1)</script>\"'\x1b[31m</style>\u202e"
ROWS = 80


def make(folder: Path, adapter: str, seed: int, mcc: float, rank: int = 8, lr: float = 1e-3) -> None:
    """A finished run with a curve, predictions, ranks and a later evaluation."""
    config = {"seed": seed, "adapter": {"rank": rank}, "optimizer": {"lr": lr}}
    overrides = [f"adapter={adapter}", f"adapter.rank={rank}", f"optimizer.lr={lr}"]
    run = Run.claim(
        folder, choices={"model": "bert", "adapter": adapter, "data": "qqp"}, config=config, overrides=overrides
    )
    random = np.random.default_rng([seed, rank])
    labels = np.arange(ROWS) % 2
    scores = np.clip(labels * 0.4 + 0.3 + random.normal(0, 0.6 - mcc / 2, ROWS), 0, 1)
    run.write_predictions("validation", np.arange(ROWS), labels, scores)
    for step in range(10, 60, 10):
        run.log({"step": step, "split": "selection", "metrics": {"mcc": mcc * step / 50}})
    metrics = {"validation/accuracy": 0.9, "validation/f1": 0.8, "validation/mcc": mcc, "selection/mcc": mcc}
    run.update(metrics={**metrics, "validation/ece": 0.05}, data={"fingerprint": "one", "rows": {"train": 100}})
    run.update(params={"adapter": 1000 * rank, "head": 10}, cost={"train_seconds": 10.0 + rank})
    run.update(targets={f"layer.{n}.query": n + rank for n in range(3)}, environment={"commit": "abc", "device": "cpu"})
    run.write_evaluation("paws", {"metrics": {"validation/mcc": mcc - 0.25}})
    run.finish("done")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("runs")
    for n, (adapter, rank, seed) in enumerate([(a, r, s) for a in ("lora", "dora") for r in (2, 8) for s in (0, 1)]):
        make(
            top / str(n), adapter, seed, 0.5 + 0.1 * (adapter == "dora") + 0.01 * rank + 0.01 * seed, rank, 1e-3 * rank
        )
    choices = {"model": "bert", "adapter": HOSTILE, "data": "qqp"}
    Run.claim(top / "bad", choices=choices, config={"seed": 0}, overrides=[HOSTILE]).finish("failed", HOSTILE)
    return top


class Outline(HTMLParser):
    """Ids of the sections, and every tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for attributes in self.all("section")]


def test_every_section_that_has_data(runs: Path) -> None:
    outline = Outline(page(summarise([runs])))
    figures = ["cost", "rank", "rate", "curves", "calibration", "allocation", "robustness", "disagreements"]
    assert outline.sections == [
        *("summary", "leaderboard", *figures, "configuration", "environment", "missing", "folders")
    ]


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    run = Run.claim(tmp_path / "a", choices={"model": "bert", "adapter": "lora"}, config={"seed": 0}, overrides=[])
    run.update(metrics={"validation/mcc": 0.5})
    run.finish("done")
    html = page(summarise([tmp_path]))
    assert Outline(html).sections == ["summary", "leaderboard", "configuration", "environment", "missing", "folders"]
    assert "from one seed" in html


def test_no_finished_run(tmp_path: Path) -> None:
    Run.claim(tmp_path / "a", choices={}, config={}, overrides=[]).finish("failed", "no room")
    html = page(summarise([tmp_path]))
    assert Outline(html).sections == ["missing"]
    assert "No finished run yet" in html
    assert "no room" in html


def test_the_numbers_are_those_of_the_table(runs: Path) -> None:
    table = summarise([runs])
    html = page(table)
    shown = [json.loads(found) for found in re.findall(r'data-value="([^"]*)">(?:<b>)?0\.\d{4} ± ', html)]
    means = [row.stats[c.name].mean for row in table.rows for c in table.columns if c.kind == "metric"]
    assert shown == pytest.approx(means, rel=1e-9)


def test_names_cannot_break_out(runs: Path, tmp_path: Path) -> None:
    make(tmp_path / "a", HOSTILE, 0, 0.6)
    make(tmp_path / "b", "lora", 0, 0.5)
    for top in (runs, tmp_path):
        html = page(summarise([top]))
        assert "<script>alert" not in html
        assert "\x1b" not in html
        assert "\u202e" not in html
        assert html.count("</style>") == 1
        assert "alert(1)" in html  # it is there, as text


def test_pictures_have_words_and_tables_have_headers(runs: Path) -> None:
    outline = Outline(page(summarise([runs])))
    pictures = [svg for svg in outline.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(pictures) >= 10
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in pictures)
    assert all(th.get("scope") in ("col", "row") for th in outline.all("th"))
    assert len(outline.all("caption")) == len(outline.all("table"))
    assert not [attributes for _, attributes in outline.tags if "style" in attributes]


def test_runs_on_different_data_are_apart(tmp_path: Path) -> None:
    make(tmp_path / "a", "lora", 0, 0.6)
    make(tmp_path / "b", "dora", 0, 0.9)
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    record["data"]["fingerprint"] = "two"
    (tmp_path / "b" / "run.json").write_text(json.dumps(record))
    html = page(summarise([tmp_path]))
    assert "Runs on different data" in html
    assert "points above" not in html


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    make(tmp_path / "a", "lora", 0, 0.6)
    make(tmp_path / "b", "dora", 0, 0.5)
    for name in ("a", "b"):
        (tmp_path / name / "predictions" / "validation.parquet").write_bytes(b"no parquet")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1\nnull\n[1]\n{"step": "x", "metrics": []}\n')
        (tmp_path / name / "evaluations" / "paws.json").write_text("{")
    found = Outline(page(summarise([tmp_path]))).sections
    assert not {"curves", "calibration", "robustness", "disagreements"} & set(found)


def test_the_command_writes_the_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--html", str(tmp_path / "new" / "report.html")]) == 0
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="is a folder"):
        main([str(runs), "--html", str(tmp_path)])


def test_pareto_front() -> None:
    assert pareto([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)]) == [1, 3, 0]


def test_axes() -> None:
    axis = linear([0.52, 0.58], "MCC")
    assert [words for _, words in axis.ticks] == ["0.52", "0.54", "0.56", "0.58"]
    assert 0 < axis.at(0.52) < axis.at(0.58) < 1
    axis = logarithmic([0, 1000, 1e6], "parameters", lambda value: f"{value:g}")
    assert axis.ticks[0] == (0.0, "0")
    assert axis.at(0) == 0 < axis.at(1000) < axis.at(1e6) < 1
    assert axis.at(31622.7766) == pytest.approx((axis.at(1000) + axis.at(1e6)) / 2, abs=1e-6)


# -- in Chromium --


@pytest.fixture(scope="module")
def browser(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here")
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(page(summarise([runs])), encoding="utf-8")
    made = Browser(folder / "profile")
    made.open(f"file://{folder}/report.html")
    yield made
    made.close()


def rows(browser: Browser) -> list[str]:
    shown = "[...document.querySelectorAll('.leaderboard tbody tr')].filter(r => !r.hidden)"
    found: list[str] = browser.run(f"{shown}.map(r => r.cells[0].textContent + ' ' + r.cells[1].textContent)")
    return found


def test_no_request_leaves_and_nothing_is_complained_of(browser: Browser) -> None:
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
    assert browser.complaints == []


def test_sorting(browser: Browser) -> None:
    best_first = rows(browser)
    head = "document.querySelector('th[data-name=\"mcc\"]')"
    browser.run(f"{head}.querySelector('button').click()")
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "descending"
    browser.run(f"{head}.querySelector('button').click()")
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "ascending"
    assert rows(browser) == best_first[::-1]
    browser.run(f"{head}.querySelector('button').click()")
    assert browser.run(f"{head}.getAttribute('aria-sort')") is None
    assert rows(browser) == best_first


@pytest.mark.parametrize(
    ("typed", "kept"), [("dora", 2), ("adapter.rank=8", 2), ("rank=2 dora", 1), ("mcc>0.68", 1), ("none", 0)]
)
def test_filtering(browser: Browser, typed: str, kept: int) -> None:
    browser.run(
        f"(() => {{ const f = document.getElementById('filter'); f.value = {json.dumps(typed)};"
        "f.dispatchEvent(new Event('input')); })()"
    )
    found = rows(browser)
    assert len(found) == kept
    assert browser.run("document.querySelector('.count').textContent") == f"{len(found)} of 4 experiments"


def test_two_other_runs(browser: Browser) -> None:
    browser.run(
        "(() => { const b = document.querySelector('.run-b'); b.value = '0';b.dispatchEvent(new Event('change')); })()"
    )
    assert browser.run("document.querySelector('.said').textContent") == "Choose two runs that differ."
    browser.run(
        "(() => { const b = document.querySelector('.run-b'); b.value = '1';b.dispatchEvent(new Event('change')); })()"
    )
    assert browser.run("document.querySelector('.said').textContent").startswith(f"Of {ROWS} examples, ")
    assert browser.complaints == []


def test_it_fits_a_phone(browser: Browser) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= 390


def test_the_policy_stops_what_would_leave(browser: Browser) -> None:
    browser.run("(() => { new Image().src = 'https://example.org/x.png'; })()")
    browser.run("1")
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)
