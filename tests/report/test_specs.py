"""Charts: their labels are whole and unique, and their numbers are those of the runs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.summary import summarise
from lora_bench.records.run_folder import Run
from lora_bench.report import page
from lora_bench.report.allocation import short_names
from lora_bench.report.blocks import group_blocks
from lora_bench.report.content import Figure, Grid
from lora_bench.report.curves import curves
from lora_bench.report.document import use_minus
from lora_bench.report.heat_map import heat_maps
from lora_bench.report.specs import LINE_WIDTH, labels, wrap
from lora_bench.report.tradeoffs import pareto
from tests.report.runs import make

if TYPE_CHECKING:
    from pathlib import Path


def strings(node: Any) -> list[tuple[str, str]]:
    """Return the keys and texts of a specification without its data."""
    if isinstance(node, dict):
        pairs = [(key, value) for key, value in node.items() if isinstance(value, str)]
        return pairs + [pair for key, value in node.items() if key != "values" for pair in strings(value)]
    return [pair for item in node for pair in strings(item)] if isinstance(node, list) else []


def test_no_name_gets_into_an_expression_or_a_field(tmp_path: Path) -> None:
    hostile = "datum['x'] + alert(1)"
    for number, (adapter, rank) in enumerate(((hostile, 2), (hostile, 8), ("a.b[c]", 2))):
        make(tmp_path / str(number), adapter, 0, 0.5, rank)
    html = page(summarise([tmp_path]))
    specs = re.findall(r'<script type="application/json" class="spec">(.*?)</script>', html)
    assert len(specs) >= 6
    for text in specs:
        for key, value in strings(json.loads(text)):
            if key in ("field", "test", "filter", "expr", "calculate", "as"):
                assert re.fullmatch(r"[a-z_]+|datum\.[a-z]+( > 0\.6)?|isValid\(datum\.low\)", value), (key, value)


def test_labels_are_wrapped_whole_and_of_equal_height() -> None:
    names = ["x" * 70, "enhanced with several words and a_name.that=is long", "lora"]
    padded, height = labels(names, [[name] for name in names])
    assert len(set(padded.values())) == 3
    for name, label in padded.items():
        lines = label.split("\n")
        assert len(lines) == height
        assert all(len(line) <= LINE_WIDTH for line in lines)
        assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert wrap("adapter.rank=8") == ["adapter.rank=8"]


def test_the_heat_map_has_the_selection_scores_and_marks_the_chosen_cell(tmp_path: Path) -> None:
    scores = {(2, 1e-3): 0.5, (8, 1e-3): 0.62, (2, 1e-2): 0.58, (8, 1e-2): 0.4}
    for number, ((rank, lr), mcc) in enumerate(scores.items()):
        make(folder := tmp_path / str(number), "lora", 0, mcc, rank, lr)
        run = Run(folder, json.loads((folder / "run.json").read_text()))
        run.update(metrics={**run.record["metrics"], "selection/mcc": 0.9 - mcc})
    (block,) = group_blocks(summarise([tmp_path]))
    _, grid = heat_maps(block)
    assert isinstance(grid, Grid)
    (figure,) = grid.figures
    values = figure.spec["data"]["values"]
    drawn = {(int(value["row"]), float(value["column"])): float(value["text"]) for value in values}
    assert drawn == {cell: round(0.9 - mcc, 3) for cell, mcc in scores.items()}
    assert [(value["row"], value["column"]) for value in values if value["chosen"]] == [("8", "0.01")]
    assert figure.caption == "chosen: rank 8, learning rate 0.01"


def test_curves_are_drawn_by_step_and_by_what_was_computed(tmp_path: Path) -> None:
    for name, seed, flops in (("a", 0, 50e12), ("b", 0, 10e12)):
        make(tmp_path / name, "lora" if name == "a" else "dora", seed, 0.6)
        run = Run(tmp_path / name, json.loads((tmp_path / name / "run.json").read_text()))
        run.update(cost={"steps": 50, "train_flops": flops, "prepare_flops": 5e12 if name == "b" else None})
    (block,) = group_blocks(summarise([tmp_path]))
    _, by_flops = curves(block)
    assert isinstance(by_flops, Figure)
    values = by_flops.spec["data"]["values"]
    assert [value["x"] / 1e12 for value in values if value["series"] == "lora"] == [10.0 * i for i in range(1, 6)]
    assert [value["x"] / 1e12 for value in values if value["series"] == "dora"] == [5.0 + i for i in range(1, 6)]
    make(tmp_path / "c", "dora", 1, 0.6)  # of one run it is not known
    (block,) = group_blocks(summarise([tmp_path]))
    assert [figure.title for figure in curves(block) if isinstance(figure, Figure)] == ["Learning curves by step"]


def test_a_cost_that_rows_visibly_share_is_no_axis_at_first(tmp_path: Path) -> None:
    for name, totals in (("alike", (22_700_000, 22_710_000)), ("unlike", (22_700_000, 30_300_000))):
        for adapter, mcc, total in (("lora", 0.6, totals[0]), ("dora", 0.5, totals[1])):
            make(folder := tmp_path / name / adapter, adapter, 0, mcc)
            Run(folder, json.loads((folder / "run.json").read_text())).update(params={"total": total})
        assert ("MCC against all parameters" in page(summarise([tmp_path / name]))) == (name == "unlike")


def test_pareto_front() -> None:
    assert pareto([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)]) == [1, 3, 0]


def test_short_names_are_unique() -> None:
    modules = ["attention.self.query", "attention.output.dense", "output.dense", "x"]
    assert short_names(modules) == ["query", "attention.output.dense", "output.dense", "x"]


def test_hyphens_in_front_of_numbers_are_minus_signs() -> None:
    assert use_minus("-0.5 to -.2 (-3)") == "−0.5 to −.2 (−3)"
    assert use_minus("lr=1e-05 a-1 x=-1 2026-05-01") == "lr=1e-05 a-1 x=-1 2026-05-01"
