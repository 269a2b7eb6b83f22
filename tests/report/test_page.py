"""The report page: its numbers are the table's, and nothing in a run folder can break out of it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from lora_bench.analysis.summary import summarise
from lora_bench.compare import main
from lora_bench.errors import Code
from lora_bench.records.run_folder import Run
from lora_bench.report import page
from lora_bench.report.axes import linear, logarithmic
from lora_bench.report.tradeoffs import pareto
from tests.command_line import refuses
from tests.report.runs import HOSTILE, make

if TYPE_CHECKING:
    from pathlib import Path


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
    values = [json.loads(text) for text in re.findall(r'data-value="([^"]*)">(?:<b>)?0\.\d{4} ± ', html)]
    means = [row.stats[c.name].mean for row in table.rows for c in table.columns if c.format == "metric"]
    assert values == pytest.approx(means, rel=1e-9)


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
    record["data"]["fingerprint"] = {"validation": "two"}
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
        numbers = "".join(f'<td class="number">{number}</td>' for number in (before, after))
        assert f'<td>{condition}</td><td class="number">1</td>{numbers}<td>{change}</td>' in html


def test_every_key_that_differs_is_told(runs: Path) -> None:
    html = page(summarise([runs]))
    section = html[html.index('<section id="configuration"') : html.index('<section id="environment"')]
    differ = re.findall(r'<th scope="row">([^<]*)</th><td>(.*?)</td>', section.partition("<details>")[0])
    values_by_key = {key: re.findall(r"<code>([^<]*)</code> \((\d+)\)", values) for key, values in differ}
    assert values_by_key == {
        "adapter": [("dora", "4"), ("lora", "4")],
        "seed": [("0", "4"), ("1", "4")],
        "adapter.rank": [("8", "4"), ("2", "4")],
        "optimizer.lr": [("0.008", "4"), ("0.002", "4")],
    }


def test_curves_are_drawn_by_step_and_by_what_was_computed(tmp_path: Path) -> None:
    for name, seed, flops in (("a", 0, 50e12), ("b", 0, 10e12)):
        make(tmp_path / name, "lora" if name == "a" else "dora", seed, 0.6)
        run = Run(tmp_path / name, json.loads((tmp_path / name / "run.json").read_text()))
        run.update(cost={"steps": 50, "train_flops": flops, "prepare_flops": 5e12 if name == "b" else None})
    html = page(summarise([tmp_path]))
    section = html[html.index("Learning curves by TFLOP, mean over runs") :]
    rows = re.findall(
        r'<tr>(?:<t[hd][^>]*>)(\w+)</t[hd]><td class="number">([\d.]+)</td>', section.partition("</table>")[0]
    )
    assert [(name, float(at)) for name, at in rows if name == "lora"] == [("lora", 10.0 * i) for i in range(1, 6)]
    assert [(name, float(at)) for name, at in rows if name == "dora"] == [("dora", 5.0 + i) for i in range(1, 6)]
    make(tmp_path / "c", "dora", 1, 0.6)  # of one run it is not known
    html = page(summarise([tmp_path]))
    assert "Learning curves by step" in html
    assert "Learning curves by TFLOP" not in html


def test_rows_of_one_method_share_a_colour_and_have_dashes_of_their_own(runs: Path) -> None:
    html = page(summarise([runs]))
    section = html[html.index('<section id="curves"') : html.index('<section id="calibration"')]
    assert sorted(re.findall(r'class="line (s\d dash\d)"', section.partition("</ul>")[0])) == [
        *("s0 dash0", "s0 dash1", "s1 dash0", "s1 dash1")
    ]


def test_the_command_writes_the_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--html", str(tmp_path / "new" / "report.html")]) == 0
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out == ""
    for name in (".", "new/report.html/x", "x" * 300):
        with refuses(Code.UNWRITABLE, key="--html") as caught:
            main([str(runs), "--html", str(tmp_path / name)])
        assert caught.value.value == tmp_path / name


def test_pareto_front() -> None:
    assert pareto([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)]) == [1, 3, 0]


def test_a_cost_that_rows_visibly_share_has_no_chart(tmp_path: Path) -> None:
    for name, totals in (("alike", (22_700_000, 22_710_000)), ("unlike", (22_700_000, 30_300_000))):
        for adapter, mcc, total in (("lora", 0.6, totals[0]), ("dora", 0.5, totals[1])):
            make(folder := tmp_path / name / adapter, adapter, 0, mcc)
            Run(folder, json.loads((folder / "run.json").read_text())).update(params={"total": total})
        assert ("MCC against all parameters" in page(summarise([tmp_path / name]))) == (name == "unlike")


def test_axes() -> None:
    axis = linear([0.52, 0.58], "MCC")
    assert [words for _, words in axis.ticks] == ["0.52", "0.54", "0.56", "0.58"]
    assert 0 < axis.position(0.52) < axis.position(0.58) < 1
    axis = logarithmic([0, 1000, 1e6], "parameters", lambda value: f"{value:g}")
    assert axis.ticks[0] == (0.0, "0")
    assert axis.position(0) == 0 < axis.position(1000) < axis.position(1e6) < 1
    assert axis.position(31622.7766) == pytest.approx((axis.position(1000) + axis.position(1e6)) / 2, abs=1e-6)


# -- in words --


def verdict_of(tmp_path: Path, *rivals: tuple[str, list[float]], **settings: str) -> tuple[str, str]:
    """Heading and summary, as text, of lora with 0.5 beside rivals with an MCC for each of three seeds."""
    for adapter, values in (("lora", [0.5, 0.5, 0.5]), *rivals):
        for seed, mcc in enumerate(values):
            make(tmp_path / adapter / str(seed), adapter, seed, mcc)
    html = page(summarise([tmp_path], **settings))
    match = re.search(r"<h1>(.*?)</h1>.*?(<p class=\"lead\">.*?</p>)", html, re.DOTALL)
    assert match
    return match[1], re.sub("<[^>]*>", "", match[2])


def test_a_rival_that_is_better(tmp_path: Path) -> None:
    heading, summary = verdict_of(tmp_path, ("dora", [0.84, 0.86, 0.88]), ("vera", [0.2, 0.22, 0.24]))
    assert heading == "dora is better than lora"
    assert "dora has the highest MCC" in summary
    assert "36.0 points above the baseline lora" in summary


def test_a_baseline_that_nothing_beats(tmp_path: Path) -> None:
    heading, summary = verdict_of(tmp_path, ("dora", [0.2, 0.22, 0.24]))
    assert heading == "lora is better than all its rivals"
    assert "baseline" in summary


def test_a_difference_that_may_be_chance(tmp_path: Path) -> None:
    heading, summary = verdict_of(tmp_path, ("dora", [0.36, 0.52, 0.68]))
    assert heading == "Nothing is surely better than lora"
    assert "chance alone may explain" in summary


def test_another_baseline(tmp_path: Path) -> None:
    heading, _ = verdict_of(tmp_path, ("dora", [0.84, 0.86, 0.88]), baseline="dora")
    assert heading == "dora is better than all its rivals"


def test_one_seed_has_no_verdict(tmp_path: Path) -> None:
    make(tmp_path / "a", "lora", 0, 0.5)
    make(tmp_path / "b", "dora", 0, 0.6)
    html = page(summarise([tmp_path]))
    assert "dora leads" in html
    assert "one seed" in html
