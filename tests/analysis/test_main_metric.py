"""The main metric of the runs: it chooses, sorts, tests and is named; tasks of different metrics are kept apart."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lora_bench.analysis import statistics
from lora_bench.analysis.formats import to_csv, to_json, to_latex, to_markdown
from lora_bench.analysis.summary import View, summarise
from lora_bench.compare import main
from lora_bench.errors import Code
from lora_bench.records import predictions
from lora_bench.report.page import page
from tests.analysis import test_significance as binary
from tests.analysis.runs import CLASSES, make, sweep
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.analysis.table import Table

QUALITIES = {"full": 0.6, "lora": 0.55, "vera": 0.0}


def names(table: Table) -> list[str]:
    return [column.header for column in table.columns if column.format in ("metric", "interval")]


def findings(table: Table) -> dict[str, Any]:
    return {row.keys["adapter"]: row.finding for row in table.rows if row.chosen}


@pytest.mark.parametrize(
    ("form", "metric", "columns"),
    [
        ("multiclass", "mcc", ["accuracy ↑", "macro_f1 ↑", "mcc ↑", "mcc 95 %"]),
        ("regression", "spearman", ["pearson ↑", "spearman ↑", "mse ↓", "spearman 95 %"]),
    ],
)
def test_the_default_metric_of_a_form_is_tested(tmp_path: Path, form: str, metric: str, columns: list[str]) -> None:
    table = summarise([sweep(tmp_path, form, QUALITIES)])
    assert names(table) == columns
    by_adapter = findings(table)
    assert {adapter: finding.verdict for adapter, finding in by_adapter.items()} == {
        "full": "baseline",
        "lora": by_adapter["lora"].verdict,
        "vera": "worse",
    }
    assert {finding.measure for finding in by_adapter.values()} == {metric}
    sides = [
        [predictions.read(tmp_path / f"{form}-{adapter}-{seed}", "validation") for seed in range(3)]
        for adapter in ("vera", "full")
    ]
    a, b = (np.stack([one.predicted for one in side]) for side in sides)
    test = statistics.crossed_test(sides[0][0].labels, a, b, metric)
    assert by_adapter["vera"].difference == pytest.approx(test.difference)
    assert by_adapter["vera"].p_bootstrap == [pytest.approx(2 / 10_001, rel=2)] * 3
    assert (by_adapter["vera"].p_mcnemar is None) == (form == "regression")
    for text in (to_csv(table), to_json(table), to_markdown(table), to_latex(table), page(table)):
        assert metric in text
    assert json.loads(to_json(table))[0]["tests.measure"] == metric


def test_another_main_metric_chooses_sorts_and_is_tested(tmp_path: Path) -> None:
    config = {"trainer": {"main_metric": "macro_f1"}}
    for lr, quality in ((0.1, 0.6), (0.2, 0.3)):
        for seed in range(2):
            folder = tmp_path / f"lora-{lr}-{seed}"
            make(folder, "multiclass", "lora", quality, seed, optimizer={"lr": lr}, **config)
    sweep(tmp_path, "multiclass", {"full": 0.0}, seeds=2, optimizer={"lr": 0.1}, **config)
    record = json.loads((tmp_path / "lora-0.2-0/run.json").read_text())
    assert record["selection"]["metric"] == "macro_f1"
    table = summarise([tmp_path], view=View(all_settings=True))
    assert "macro_f1 95 %" in names(table)
    assert findings(table)["lora"].measure == "macro_f1"
    lora = [row for row in table.rows if row.keys["adapter"] == "lora"]
    assert [row.keys["optimizer.lr"] for row in lora if row.chosen] == [0.1]
    assert "macro F1" in table.advice[0]
    assert any("macro F1" in note for note in table.notes)
    assert "selection macro F1" in page(table)


def test_a_measure_in_its_place(tmp_path: Path) -> None:
    sweep(tmp_path, "multiclass", {"full": 0.6, "vera": 0.0})
    table = summarise([tmp_path], measure="weighted_f1")
    assert findings(table)["vera"].measure == "weighted_f1"
    assert "weighted_f1 ↑" in names(table)
    assert "mcc 95 %" in names(table)


@pytest.mark.parametrize(("form", "measure", "choice"), [("multiclass", "f1", "macro_f1"), ("regression", "mcc", "r2")])
def test_a_measure_that_predictions_cannot_give(tmp_path: Path, form: str, measure: str, choice: str) -> None:
    sweep(tmp_path, form, {"full": 0.6, "vera": 0.0}, seeds=1)
    with refuses(Code.UNKNOWN_CHOICE, key="--measure") as caught:
        main([str(tmp_path), "--measure", measure])
    assert choice in str(caught.value.remedy)


def test_tasks_of_every_form_stand_in_one_table(tmp_path: Path) -> None:
    sweep(tmp_path / "three", "multiclass", {"full": 0.6, "vera": 0.0})
    sweep(tmp_path / "numbers", "regression", {"full": 0.6, "vera": 0.0})
    binary.sweep(tmp_path / "two", {"full": 0.6, "vera": 0.0})
    table = summarise([tmp_path])
    assert [name for name in names(table) if "95" not in name] == [
        *("accuracy ↑", "f1 ↑", "mcc ↑", "macro_f1 ↑", "pearson ↑", "spearman ↑", "mse ↓")
    ]
    assert {row.finding.measure for row in table.rows if row.finding} == {"mcc", "spearman"}
    assert sum(row.finding.verdict == "baseline" for row in table.rows if row.finding) == 3
    assert any("main metrics differ (" in note for note in table.notes)
    assert table.tests is not None
    assert [column.name for column in table.tests.columns if column.format == "text"][:2] == ["metric", "difference"]
    assert len(table.decisions) == 3
    assert [name for name in names(table) if "95" in name] == ["mcc 95 %", "spearman 95 %"]
    html = page(table)
    assert [html.count(f'<th scope="col">{name} ↑</th>') for name in ("macro_f1", "pearson")] == [
        1,
        1,
    ]  # one table each
    with refuses(Code.UNKNOWN_CHOICE, key="--measure") as caught:
        summarise([tmp_path], measure="accuracy")
    assert "--where" in str(caught.value.remedy)
    assert "mcc, accuracy" in refused_remedy([tmp_path / "three", tmp_path / "two"])


def refused_remedy(folders: list[Path]) -> str:
    """Return the remedy for a measure that only one form of task has."""
    with refuses(Code.UNKNOWN_CHOICE, key="--measure") as caught:
        summarise(folders, measure="f1")
    return str(caught.value.remedy)


def test_runs_of_one_task_with_different_main_metrics_are_not_tested_against_each_other(tmp_path: Path) -> None:
    for metric, adapter in (("mcc", "full"), ("accuracy", "lora")):
        sweep(tmp_path, "multiclass", {adapter: 0.6}, trainer={"main_metric": metric})
    table = summarise([tmp_path])
    assert not any(row.finding for row in table.rows)
    assert any("main metrics differ (" in note for note in table.notes)
    assert {decision.headline.partition(":")[0] for decision in table.decisions} == {
        "data=mnli, MCC",
        "data=mnli, accuracy",
    }


def test_by_a_key_a_setting_is_chosen_by_one_main_metric(tmp_path: Path) -> None:
    """Accuracy is higher than MCC, so it would choose the worse learning rate."""
    for metric, lr, quality in (("mcc", 0.1, 0.6), ("mcc", 0.2, 0.5), ("accuracy", 0.3, 0.0)):
        sweep(
            tmp_path / str(lr),
            "multiclass",
            {"lora": quality},
            1,
            trainer={"main_metric": metric},
            optimizer={"lr": lr},
        )
    table = summarise([tmp_path], by="adapter")
    assert {(row.measure, row.keys["optimizer.lr"]) for row in table.rows if row.chosen} == {
        ("mcc", 0.1),
        ("accuracy", 0.3),
    }


def test_costs_count_up_to_the_main_metric(tmp_path: Path) -> None:
    table = summarise([sweep(tmp_path, "regression", {"full": 0.5, "vera": 0.9})])
    assert any(note.startswith("target: selection Spearman ρ 0.") for note in table.notes)


def test_constant_predictions_are_named(tmp_path: Path) -> None:
    sweep(tmp_path, "multiclass", {"full": 0.6, "lora": 0.0})
    for seed in range(3):
        folder = tmp_path / f"multiclass-lora-{seed}"
        content = predictions.encode(list(range(len(CLASSES))), CLASSES, np.tile([0.2, 0.7, 0.1], (len(CLASSES), 1)))
        (folder / "predictions/validation.parquet").write_bytes(content)
        record = json.loads((folder / "run.json").read_text())
        record["metrics"]["validation/mcc"] = 0.0
        one_of_three = {"precision": 0.3, "recall": 1.0, "support": 450}
        others = {"precision": 0.0, "recall": 0.0, "support": 525}
        record["per_class"] = {"validation": {"entailment": others, "neutral": one_of_three, "contradiction": others}}
        (folder / "run.json").write_text(json.dumps(record))
    table = summarise([tmp_path])
    assert "the same label for all examples" in str(findings(table)["lora"].why)
    assert any("predicts label neutral for every example" in note for note in table.notes)


def test_predictions_of_another_form_are_not_tested(tmp_path: Path) -> None:
    sweep(tmp_path, "multiclass", {"full": 0.6, "lora": 0.0}, seeds=1)
    content = predictions.encode([0, 1], [0.5, 1.5], [0.1, 0.2])
    (tmp_path / "multiclass-lora-0/predictions/validation.parquet").write_bytes(content)
    assert "MCC cannot be computed" in str(findings(summarise([tmp_path]))["lora"].why)
