"""The report page: its numbers are the table's, and nothing in a run folder can break out of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings

from lora_bench.analysis.summary import View, summarise
from lora_bench.compare import main
from lora_bench.errors import Code
from lora_bench.records.run_folder import Run
from lora_bench.report import page
from tests.analysis.test_decision import grids
from tests.analysis.test_decision import make as make_graded
from tests.command_line import refuses
from tests.report.runs import HOSTILE, make

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.analysis.table import Table


class Outline(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @property
    def sections(self) -> list[str | None]:
        return [
            attributes["id"] for name, attributes in self.tags if name in ("section", "details") and "id" in attributes
        ]


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub("<[^>]*>", "", html))).strip()


def first_spec(html: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" class="spec">(.*?)</script>', html)
    assert match
    spec: dict[str, Any] = json.loads(match[1])
    return spec


def section(html: str, name: str) -> str:
    """The HTML of a folded section."""
    return html[html.index(f'<details id="{name}"') :].partition('<details id="')[2]


# -- what it holds --


def test_every_section_that_has_data(runs: Path) -> None:
    assert Outline(page(summarise([runs]))).sections == [
        *("result-0", "settings", "grid", "cost", "curves", "tests", "calibration", "allocation", "robustness"),
        *("disagreements", "configuration", "environment", "missing", "folders"),
    ]


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    run = Run.claim(tmp_path / "a", choices={"model": "bert", "adapter": "lora"}, config={"seed": 0}, overrides=[])
    run.update(metrics={"validation/mcc": 0.5})
    run.finish("done")
    html = page(summarise([tmp_path]))
    assert Outline(html).sections == ["result-0", "settings", "configuration", "environment", "missing", "folders"]


def test_no_finished_run(tmp_path: Path) -> None:
    Run.claim(tmp_path / "a", choices={}, config={}, overrides=[]).finish("failed", "no room")
    html = page(summarise([tmp_path]))
    assert Outline(html).sections == ["missing"]
    assert "No finished run yet" in html
    assert "no room" in html


# -- it says one thing --


def check_one_finding(table: Table, html: str) -> None:
    """Assert that title, heading, advice, chart and table say what the decision says."""
    (decision,) = table.decisions
    for tag in ("h1", "title"):
        match = re.search(rf"<{tag}>(.*?)</{tag}>", html)
        assert match
        assert unescape(match[1]).removesuffix(" · lora-bench").replace("−", "-") == decision.headline
    advice = [text_of(text).replace("−", "-") for text in re.findall(r'<p class="(?:lead|next)">(.*?)</p>', html)]
    assert advice == decision.sentences
    marked = re.findall(r'<tr class="marked"><th scope="row">(.*?)</tr>', html.partition("</section>")[0])
    assert len(marked) == (decision.recommended is not None)
    cells = re.findall(r'<th scope="row">(.*?)</th>', html.partition("</section>")[0])
    assert len(cells) == len(table.rows)
    if 'class="spec"' not in html.partition("</section>")[0]:
        assert len(table.rows) == 1
        return
    spec = first_spec(html)
    recommended = [value for value in spec["data"]["values"] if value["recommended"]]
    if decision.recommended is not None:
        (winner,) = recommended
        assert text_of(marked[0]).startswith(
            (table.rows[0].keys and str(next(iter(table.rows[0].keys.values())))) or ""
        )
        assert winner["label"].strip().startswith("★")
        check_chart(table, [value["value"] for value in spec["data"]["values"]])


def check_chart(table: Table, drawn: list[float]) -> None:
    """Assert that the chart has the numbers of the table: differences in points, or else the means."""
    tested = [row.finding for row in table.rows if row.finding and row.finding.difference is not None]
    if tested:
        expected = [
            0.0 if row.finding.difference is None else 100 * row.finding.difference
            for row in table.rows
            if row.finding and (row.finding.difference is not None or row.finding.verdict == "baseline")
        ]
    else:
        expected = [row.stats["mcc"].mean for row in table.rows]
    assert drawn == pytest.approx(expected, abs=1e-3)


@settings(max_examples=12, deadline=None, suppress_health_check=[*HealthCheck])
@given(runs=grids())
def test_headline_advice_chart_and_table_name_the_same_winner(
    tmp_path_factory: pytest.TempPathFactory, runs: list[dict[str, Any]]
) -> None:
    top = tmp_path_factory.mktemp("grid")
    try:
        for i, run in enumerate(runs):
            make_graded(top / str(i), **run)
        table = summarise([top])
        check_one_finding(table, page(table))
    finally:
        shutil.rmtree(top)


def test_the_numbers_are_those_of_the_table(runs: Path) -> None:
    table = summarise([runs])
    html = page(table)
    match = re.search(r'<script type="application/json" class="data">(.*?)</script>', section(html, "settings"))
    assert match
    data = json.loads(match[1])
    for i, column in enumerate(data["columns"]):
        if column["metric"] and column["name"] != "selection/mcc":
            means = [row.stats[column["name"]].mean for row in table.settings]
            assert [row["values"][i] for row in data["rows"]] == pytest.approx(means, rel=1e-9)


def test_another_measure_is_that_of_the_page(runs: Path) -> None:
    html = page(summarise([runs], measure="accuracy"))
    assert "Difference of accuracy from" in html
    assert first_spec(html)["layer"][1]["encoding"]["x"]["axis"]["title"] == "points of accuracy"


def test_rows_are_those_of_the_view(runs: Path) -> None:
    table = summarise([runs], view=View(all_settings=True, top=3))
    html = page(table)
    assert html.partition("</section>")[0].count('<th scope="row">') == 3
    assert section(html, "settings").count('data-row="') == 4


def test_runs_on_different_data_are_apart(tmp_path: Path) -> None:
    for name, adapter, fingerprint in (("a", "lora", "one"), ("b", "dora", "two"), ("c", "vera", "two")):
        make(tmp_path / name, adapter, 0, 0.6)
        record = json.loads((tmp_path / name / "run.json").read_text())
        record["data"]["fingerprint"] = {"validation": fingerprint}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    table = summarise([tmp_path])
    html = page(table)
    assert "<h1>Results on 2 data sets</h1>" in html
    assert Outline(html).sections[:2] == ["result-0", "result-1"]
    headings = [unescape(heading) for heading in re.findall(r'<h2 id="h-result-\d">(.*?)</h2>', html)]
    assert headings == [decision.headline for decision in table.decisions]


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    make(tmp_path / "a", "lora", 0, 0.6)
    make(tmp_path / "b", "dora", 0, 0.5)
    for name in ("a", "b"):
        (tmp_path / name / "predictions" / "validation.parquet").write_bytes(b"no parquet")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1\nnull\n[1]\n{"step": "x", "metrics": []}\n')
        (tmp_path / name / "evaluations" / "paws.json").write_text("{")
        (tmp_path / name / "evaluations" / "qqp.json").write_text('{"metrics": {"validation/mcc": "high"}, "data": []}')
    sections = Outline(page(summarise([tmp_path]))).sections
    assert not {"curves", "calibration", "robustness", "disagreements"} & set(sections)


def test_scores_fall_from_those_of_the_same_data(tmp_path: Path) -> None:
    """Perturbed texts are compared with their own data unperturbed, other data with the reported split."""
    make(tmp_path / "a", "lora", 0, 0.6)
    html = page(summarise([tmp_path]))
    for condition, before, after, change in (
        ("paws", "0.6000", "0.3500", "−0.2500"),
        ("typo", "0.6000", "0.5500", "−0.0500"),
        ("paws: typo", "0.3500", "0.2500", "−0.1000"),
    ):
        numbers = "".join(f'<td class="number">{number}</td>' for number in ("1", before, after, change))
        assert f"<td>{condition}</td>{numbers}" in html


def test_every_key_that_differs_is_told(runs: Path) -> None:
    text = section(page(summarise([runs])), "configuration").partition("<details>")[0]
    differ = re.findall(r'<th scope="row"><code>([^<]*)</code></th><td>(.*?)</td>', text)
    values_by_key = {key: re.findall(r"<code>([^<]*)</code> \((\d+)\)", values) for key, values in differ}
    assert values_by_key == {
        "adapter": [("dora", "4"), ("lora", "4")],
        "seed": [("0", "4"), ("1", "4")],
        "adapter.rank": [("8", "4"), ("2", "4")],
        "optimizer.lr": [("0.008", "4"), ("0.002", "4")],
    }


# -- it is safe --


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
        names = [json.loads(text) for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html)]
        assert len(names) >= 5


def test_the_policy_allows_the_scripts_of_the_page_and_nothing_else(runs: Path) -> None:
    html = page(summarise([runs]))
    (policy,) = [tag["content"] for tag in Outline(html).all("meta") if tag.get("http-equiv")]
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    assert "http" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    hashed = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (*scripts, style)]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in hashed[:-1]]
    assert rules["style-src"] == f"'sha256-{hashed[-1]}'"


def test_nothing_is_linked_and_no_element_has_a_style(runs: Path) -> None:
    outline = Outline(page(summarise([runs])))
    assert not [attributes for _, attributes in outline.tags if "style" in attributes or "src" in attributes]
    assert all((tag["href"] or "").startswith(("#", "data:,")) for name in ("a", "link") for tag in outline.all(name))


def test_charts_have_words_and_numbers_and_tables_have_headers(runs: Path) -> None:
    html = page(summarise([runs]))
    outline = Outline(html)
    pictures = [tag for tag in outline.all("div") if tag.get("role") == "img"]
    assert len(pictures) >= 9
    assert all(len(picture["aria-label"] or "") > 20 for picture in pictures)
    assert all(th.get("scope") in ("col", "row") for th in outline.all("th"))
    assert len(outline.all("caption")) == len(outline.all("table"))


def test_numbers_have_one_minus_sign(runs: Path, tmp_path: Path) -> None:
    make(tmp_path / "a", "lora", 0, -0.2)
    make(tmp_path / "b", "lora", 1, -0.3)
    for top in (runs, tmp_path):
        html = page(summarise([top]))
        body = re.sub(r"<script.*?</script>|<style.*?</style>|<code>.*?</code>", "", html, flags=re.DOTALL)
        assert not re.findall(r"(?:^|[\s(>])-\.?\d", text_of(body))
        assert "−0.2" in html


# -- the command --


def test_the_command_writes_the_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--html", str(tmp_path / "new" / "report.html")]) == 0
    html = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    assert len(html.encode()) < 1_500_000
    assert "data-refresh" not in html.partition("<head>")[0]
    assert capsys.readouterr().out == ""
    for name in (".", "new/report.html/x", "x" * 300):
        with refuses(Code.UNWRITABLE, key="--html") as caught:
            main([str(runs), "--html", str(tmp_path / name)])
        assert caught.value.value == tmp_path / name


def test_the_page_of_another_measure(runs: Path, tmp_path: Path) -> None:
    assert main([str(runs), "--measure", "accuracy", "--html", str(tmp_path / "report.html")]) == 0
    assert "Difference of accuracy from" in (tmp_path / "report.html").read_text(encoding="utf-8")
