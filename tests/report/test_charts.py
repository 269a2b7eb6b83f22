"""Every chart of the page keeps its texts inside the picture."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from lora_bench.analysis.summary import summarise
from lora_bench.records.run_folder import Run
from lora_bench.report import page
from tests.report.runs import make

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.analysis.table import Table

CHARACTER, ASCENT, DESCENT = 5.6, 9.5, 3.0
"""Size of a digit or an average letter at the 12.5 px of the style sheet."""


class Texts(HTMLParser):
    """The text elements of every SVG, with the box of each and the size of its picture."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sizes: list[tuple[float, float]] = []
        self.attributes: dict[str, str | None] | None = None
        self.boxes: list[tuple[str, tuple[float, float, float, float], tuple[float, float]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "svg" and "viewbox" in attributes:
            low_x, low_y, width, height = map(float, str(attributes["viewbox"]).split())
            assert (low_x, low_y) == (0, 0)
            self.sizes.append((width, height))
        self.attributes = attributes if tag == "text" else None

    def handle_data(self, data: str) -> None:
        if self.attributes is not None:
            x, y = float(str(self.attributes["x"])), float(str(self.attributes["y"]))
            width = CHARACTER * len(data)
            x -= {"end": width, "middle": width / 2}.get(self.attributes.get("text-anchor") or "start", 0.0)
            self.boxes.append((data, (x, y - ASCENT, x + width, y + DESCENT), self.sizes[-1]))

    def handle_endtag(self, tag: str) -> None:
        self.attributes = None


@pytest.fixture
def wide_runs(tmp_path: Path) -> Table:
    """Rows with long names, long module names, large numbers and costs, so that all kinds of chart are drawn."""
    module = "encoder.layer.{}.{}"
    names = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    for n, (adapter, mcc) in enumerate(
        (("lora", 0.5), ("dora_with_a_name_that_is_long_for_a_lane", 0.62), ("x", 0.98))
    ):
        for seed in range(2):
            make(folder := tmp_path / f"{n}-{seed}", adapter, seed, mcc, 2 ** (3 * n + 1), 10.0 ** -(n + 2))
            run = Run(folder, json.loads((folder / "run.json").read_text()))
            ranks = {module.format(i, name): 2 ** (3 * n) + i for i in range(12) for name in names}
            cost = {"steps": 50, "train_flops": 1e15 * 10**n, "train_seconds": 1e5 * 10**n, "peak_memory_bytes": 7e9}
            run.update(targets=ranks, cost=cost, params={"adapter": 123_456_789 * (n + 1), "total": 10 ** (9 + n)})
    return summarise([tmp_path])


def test_no_text_lies_outside_of_its_picture(runs: Path, wide_runs: Table) -> None:
    for table in (summarise([runs]), wide_runs):
        texts = Texts(page(table))
        assert len(texts.sizes) >= 10
        assert len(texts.boxes) > 100
        outside = [
            (text, box, size)
            for text, box, size in texts.boxes
            if box[0] < 0 or box[1] < 0 or box[2] > size[0] or box[3] > size[1]
        ]
        assert outside == []
