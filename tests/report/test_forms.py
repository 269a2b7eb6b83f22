"""The page of tasks with three and more classes, and of regressions."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sklearn.metrics import f1_score

from lora_bench.analysis.summary import summarise
from lora_bench.records import predictions
from lora_bench.records.run_folder import Run
from lora_bench.report import page
from lora_bench.report.blocks import group_blocks
from lora_bench.report.calibration import calibration
from lora_bench.report.confusions import CLASSES, class_names, confusions
from lora_bench.report.content import DataTable, Figure, Grid, Widget
from lora_bench.report.disagreements import disagreements
from lora_bench.report.scatter import POINTS, scatter
from tests.analysis.runs import NAMES, N, sweep
from tests.report.test_page import Outline

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.report.blocks import Block
    from lora_bench.report.content import Content


def block_of(folder: Path) -> Block:
    (block,) = group_blocks(summarise([folder]))
    return block


def figures(contents: list[Content]) -> list[Figure]:
    return [figure for content in contents if isinstance(content, Grid) for figure in content.figures]


@pytest.mark.parametrize(
    ("form", "present", "absent"),
    [
        ("multiclass", {"calibration", "confusions", "disagreements", "curves", "tests"}, {"scatter"}),
        ("regression", {"scatter", "curves", "tests"}, {"calibration", "confusions", "disagreements"}),
    ],
)
def test_sections_of_a_form(tmp_path: Path, form: str, present: set[str], absent: set[str]) -> None:
    html = page(summarise([sweep(tmp_path, form, {"full": 0.6, "vera": 0.0})]))
    assert ("McNemar" in html) == (form == "multiclass")
    sections = set(Outline(html).sections)
    assert present <= sections
    assert not absent & sections


def test_confusions_are_those_of_the_runs(tmp_path: Path) -> None:
    sweep(tmp_path, "multiclass", {"full": 0.6, "vera": 0.0}, seeds=2)
    contents = confusions(block_of(tmp_path))
    figure = next(figure for figure in figures(contents) if figure.title == "full")
    assert figure.numbers is not None
    runs = [predictions.read(tmp_path / f"multiclass-full-{seed}", "validation") for seed in range(2)]
    expected = [
        [sum(int(((run.labels == i) & (run.predicted == j)).sum()) for run in runs) for j in range(3)] for i in range(3)
    ]
    assert [row[1:] for row in figure.numbers.rows] == expected
    assert [row[0] for row in figure.numbers.rows] == NAMES
    (table,) = [content for content in contents if isinstance(content, DataTable)]
    labels = np.concatenate([run.labels for run in runs])
    f1 = f1_score(labels, np.concatenate([run.predicted for run in runs]), average=None)
    column = table.header.index("full")
    assert {row[0]: row[column] for row in table.rows} == pytest.approx(dict(zip(NAMES, f1, strict=True)))


def test_of_many_classes_the_most_confused_are_drawn(tmp_path: Path) -> None:
    k = 77
    labels = np.arange(770) % k
    predicted = np.where(labels < 10, (labels + 1) % 10, labels)
    run = Run.claim(tmp_path / "run", choices={"data": "banking77"}, config={"seed": 0}, overrides=[])
    run.write_predictions("validation", np.arange(770), labels, np.eye(k)[predicted])
    metrics = {"validation/mcc": 0.8, "selection/mcc": 0.8, "validation/macro_f1": 0.8}
    run.update(metrics=metrics, data={"label_names": [f"intent {i}" for i in range(k)]}, selection={"metric": "mcc"})
    run.finish("done")
    contents = confusions(block_of(tmp_path))
    (figure,) = figures(contents)
    assert figure.numbers is not None
    drawn = [row[0] for row in figure.numbers.rows]
    assert len(drawn) == CLASSES
    assert drawn[:10] == [f"intent {i}" for i in range(10)]
    assert "20 of 77 classes" in figure.caption
    page(summarise([tmp_path]))


def test_names_of_classes_are_unique_and_short() -> None:
    assert class_names(None, 3) == ["0", "1", "2"]
    assert class_names(["a", "b"], 3) == ["0", "1", "2"]
    names = class_names(["x" * 40 + "1", "x" * 40 + "2", "\x1b[31m"], 3)
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 24
    assert names[2].isprintable()


def test_calibration_of_more_classes_is_about_the_predicted_one(tmp_path: Path) -> None:
    sweep(tmp_path, "multiclass", {"full": 0.6}, seeds=1)
    (figure,) = figures(calibration(block_of(tmp_path)))
    run = predictions.read(tmp_path / "multiclass-full-0", "validation")
    confidence = run.scores.max(axis=1)
    assert figure.numbers is not None
    assert figure.numbers.header == ["confidence", "predictions", "mean confidence", "share of correct predictions"]
    last = figure.numbers.rows[-1]
    chosen = confidence >= 0.9
    assert last[1:] == [
        int(chosen.sum()),
        pytest.approx(confidence[chosen].mean()),
        pytest.approx(run.correct[chosen].mean()),
    ]


def test_disagreements_have_the_names_of_classes(tmp_path: Path) -> None:
    sweep(tmp_path, "multiclass", {"full": 0.6, "vera": 0.0}, seeds=1)
    (widget,) = disagreements(block_of(tmp_path))
    assert isinstance(widget, Widget)
    table, data = widget.values["table"], widget.values["data"]
    assert table.header[2] == "prediction of full, seed 0"
    assert {row[1] for row in table.rows} <= set(NAMES)
    for _, label, first, second, right in table.rows:
        answers = [re.sub(r" [\d.]+$", "", answer) for answer in (first, second)]
        assert [answer == label for answer in answers].index(True) == ["full, seed 0", "vera, seed 0"].index(right)
    assert set(data["answers"][0][0].split()[:1]) <= set(NAMES)
    json.dumps(data)


def test_a_scatter_has_a_point_per_example_and_tenths_of_the_labels(tmp_path: Path) -> None:
    sweep(tmp_path, "regression", {"full": 0.6}, seeds=2)
    (figure,) = figures(scatter(block_of(tmp_path)))
    assert figure.numbers is not None
    assert sum(int(str(row[1])) for row in figure.numbers.rows) == N
    assert f"{POINTS} of {N:,} examples" in figure.caption
    run = predictions.read(tmp_path / "regression-full-0", "validation")
    assert f"{run.value('spearman'):.4f}" in figure.caption
