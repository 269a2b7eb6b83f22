"""The page's tables of savings and of published figures: the numbers of the runs, worked out by hand."""

from __future__ import annotations

import re
from html import unescape
from typing import TYPE_CHECKING

import pytest

from lora_bench.analysis.published import add_published_results, derived_mcc, load_published
from lora_bench.analysis.summary import summarise
from lora_bench.compare import main
from lora_bench.report import page
from tests.analysis.test_savings import make

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.analysis.table import Table


def section(table: Table, name: str) -> list[list[str]]:
    """The cells, headers first, of the table in a section of the page."""
    html = page(table)
    inside = html[html.index(f'<details id="{name}"') :].partition("</details>")[0]
    return [
        [unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", inside, re.DOTALL)
    ]


def test_savings_by_cause(tmp_path: Path) -> None:
    """Full: 100 steps of 3 GFLOP and 2 s. LoRA: 100 of 1.1 GFLOP and 0.5 s, the lower half of the layers kept."""
    cost = {"train_tokens": 1000, "train_padding_tokens": 200}
    make(tmp_path / "f", "full", 0, [0.6], 3e9, cost=cost | {"train_seconds": 200.0})
    kept = {"train_padding_tokens": 0, "prefix_fill_flops": 2e10, "train_seconds": 50.0}
    make(tmp_path / "l", "lora", 0, [0.6], 1.1e9, first=3, cost=cost | kept)
    header, row = section(summarise([tmp_path]), "savings")
    assert dict(zip(header, row, strict=True)) == {
        "adapter": "lora",
        "no weight gradients": "+33%",  # 1 / 3
        "fewer layers": "+17%",  # 1 / 3 · 1 / 2
        "cached prefix": "+10%",  # 1 / 3 · 1 / 2 - 0.2 / 3
        "less padding": "+9%",  # 1.1 / 3 · (1 / 0.8 - 1)
        "the adapter itself": "−6%",  # what is left
        "FLOPs saved": "+63%",  # 1 - 1.1 / 3
        "rate": "+12%",  # 0.75 - 0.63
        "time saved": "+75%",
    }


def test_there_is_no_such_section_without_full_fine_tuning_or_published_figures(tmp_path: Path) -> None:
    make(tmp_path / "l", "lora", 0, [0.6], 1.1e9)
    html = page(summarise([tmp_path]))
    assert 'id="savings"' not in html
    assert 'id="published"' not in html


def test_published_figures_beside_ours(tmp_path: Path) -> None:
    content = load_published()
    of_dev = {
        "fingerprint": "dev",
        "source": "hub",
        "rows": {"validation": 40_430},
        "positives": {"validation": 14_885},
    }
    make(tmp_path / "runs/l", "lora", 0, [0.6], 1.1e9, data=of_dev)
    header, *rows = section(add_published_results(summarise([tmp_path / "runs"])), "published")
    assert header == ["published", "accuracy", "f1", "mcc", "source"]
    figures = [figure for figure in content["results"] if figure["split"] == "dev"]
    assert [row[0] for row in rows] == [f"{figure['model']}, {figure['method']}" for figure in figures]
    for figure, row in zip(figures, rows, strict=True):
        assert row[1] == f"{figure['accuracy']:.2f}"
        assert row[4] == figure["source"]
        if "f1" in figure:
            mcc = derived_mcc(figure, content["examples"], content["positives"])
            assert float(row[3]) == pytest.approx(mcc, abs=0.0006)
    assert main([str(tmp_path / "runs"), "--anchors", "--html", str(tmp_path / "page.html")]) == 0
    assert 'id="published"' in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_rounds_to_nothing_has_no_sign_and_alone_no_column(tmp_path: Path) -> None:
    """DoRA makes 0.2 % more padding than full fine-tuning, LoRA 25 % less."""
    make(tmp_path / "f", "full", 0, [0.6], 3e9, cost={"train_tokens": 1000, "train_padding_tokens": 200})
    make(tmp_path / "l", "lora", 0, [0.6], 2e9, cost={"train_tokens": 1000, "train_padding_tokens": 0})
    make(tmp_path / "d", "dora", 0, [0.6], 2e9, cost={"train_tokens": 1000, "train_padding_tokens": 202})
    header, *rows = section(summarise([tmp_path]), "savings")
    assert "fewer steps" not in header
    padding = {row[0]: row[header.index("less padding")] for row in rows}
    assert padding == {"lora": "+17%", "dora": "+0%"}  # 2 / 3 · (1 / 0.8 - 1)
