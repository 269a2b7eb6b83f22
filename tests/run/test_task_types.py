"""Runs of three classes, of numbers, and of several tasks that differ in their classes: train, resume, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_bench.errors import Code
from lora_bench.evaluation.metrics import score
from lora_bench.records import predictions
from tests.command_line import lora_bench, refused

ASKED = ("model=tiny_bert", "data=files", "trainer.precision=fp32", "trainer.max_steps=6", "trainer.eval_every=3")
ASKED += ("data.selection_size=12", "optimizer.lr=1e-2", "trainer.batch_size=8", "data.text_columns=[one,other]")
COLOURS = ("red", "green", "blue")


def write_task(folder: Path, kind: str) -> str:
    """Write a task of colours or of numbers, and return the override that chooses it."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", 60), ("validation", 24)):
        lines = []
        for _ in range(rows):
            label = int(rng.integers(3))
            texts = {"one": f"what is {COLOURS[label]}", "other": f"why is {COLOURS[int(rng.integers(3))]}"}
            lines.append(json.dumps({**texts, "label": COLOURS[label] if kind == "colours" else label + 0.5}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return f"data.path={folder.resolve()}"


def train(folder: str, *overrides: str) -> dict[str, Any]:
    answer = lora_bench("train", *ASKED, *overrides, f"hydra.run.dir={folder}")
    assert answer.code == 0, answer
    return json.loads(Path(folder, "run.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("overrides", [(), ("adapter=full",), ("adapter=enhanced",), ("ensemble.members=2",)])
def test_a_run_of_three_classes_is_recorded_with_a_probability_of_each(
    in_tmp: Path, overrides: tuple[str, ...]
) -> None:
    record = train("run", write_task(Path("task"), "colours"), *overrides)
    assert record["data"]["label_names"] == ["blue", "green", "red"]
    assert sum(record["data"]["label_counts"]["validation"]) == 24
    assert record["selection"]["metric"] == "mcc"
    rows = predictions.read(Path("run"), "validation")
    assert rows.scores.shape == (24, 3)
    np.testing.assert_allclose(rows.scores.sum(1), 1, atol=1e-6)
    values = score(rows.scores, rows.labels, {})
    for name in ("accuracy", "macro_f1", "mcc", "auroc", "nll"):
        assert record["metrics"][f"validation/{name}"] == pytest.approx(values[name], abs=1e-6)
    assert [*record["per_class"]["validation"]] == ["blue", "green", "red"]
    config = json.loads(Path("run/adapter/config.json").read_text()) if overrides == ("adapter=full",) else None
    assert config is None or config["id2label"] == {"0": "blue", "1": "green", "2": "red"}


@pytest.mark.parametrize("adapter", ["lora", "enhanced", "full"])
def test_a_run_of_numbers_chooses_by_spearman_and_is_not_calibrated(in_tmp: Path, adapter: str) -> None:
    record = train("run", write_task(Path("task"), "numbers"), "data.type=regression", f"adapter={adapter}")
    assert record["selection"]["metric"] == "spearman"
    assert not {"temperature", "threshold"} & record["selection"].keys()
    assert record["data"]["label_range"]["train"][::2] == [0.5, 2.5]
    rows = predictions.read(Path("run"), "validation")
    assert rows.labels.dtype == np.float64
    assert record["metrics"]["validation/mse"] == pytest.approx(((rows.scores - rows.labels) ** 2).mean())
    assert record["metrics"]["selection/mse"] < 1.5  # the head starts at the mean label


def test_the_main_metric_chooses_and_stops(in_tmp: Path) -> None:
    path = write_task(Path("task"), "colours")
    record = train("run", path, "trainer.main_metric=macro_f1", "trainer.stop_at=0.01", "trainer.max_steps=30")
    assert record["selection"]["metric"] == "macro_f1"
    assert record["cost"]["steps"] < 30
    for metric in ("f1", "spearman"):
        error = refused("train", *ASKED, path, f"trainer.main_metric={metric}")
        assert (error.code, error.key) == (Code.CONFLICT, "trainer.main_metric")


@pytest.mark.parametrize(("steps", "noted"), [(9, True), (12, False)])
def test_a_target_that_too_few_evaluations_can_reach_is_noted(in_tmp: Path, steps: int, noted: bool) -> None:
    path = write_task(Path("task"), "colours")
    arguments = (*ASKED, path, "trainer.stop_at=1", f"trainer.max_steps={steps}", "hydra.run.dir=run")
    answer = lora_bench("train", *arguments)
    assert answer.code == 0
    assert ("trainer.eval_every" in answer.out) == noted


def test_balanced_class_weights_change_what_is_learned(in_tmp: Path) -> None:
    path = write_task(Path("task"), "colours")
    lines = Path("task/train.jsonl").read_text().splitlines()
    rare = [line for line in lines if '"red"}' not in line] + [line for line in lines if '"red"}' in line][:4]
    Path("task/train.jsonl").write_text("\n".join(rare))
    weighted, plain = train("a", path, "trainer.class_weights=balanced"), train("b", path)
    assert weighted["metrics"]["selection/nll"] != plain["metrics"]["selection/nll"]


def test_text_to_text_answers_with_the_names_of_the_classes(in_tmp: Path) -> None:
    path = write_task(Path("task"), "colours")
    train("run", path, "model=tiny_t5")
    assert predictions.read(Path("run"), "validation").scores.shape == (24, 3)
    write_task(Path("numbers"), "numbers")
    asked = ("model=tiny_t5", "data.type=regression", "data.path=numbers")
    error = refused("train", *ASKED[1:], *asked)
    assert (error.code, error.key) == (Code.CONFLICT, "model.form")
