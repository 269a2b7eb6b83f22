"""The log of a run's evaluations: whole lines are read, whatever else is in the file."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench.records.metrics_log import TAIL_BYTES, last_line, lines_up_to, read_lines, selection_curve

if TYPE_CHECKING:
    from pathlib import Path


def line(step: Any, mcc: Any, split: str = "selection") -> dict[str, Any]:
    return {"step": step, "split": split, "metrics": {"mcc": mcc}}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log whose last line is being written."""
    lines = [line(5, 0.25), line(5, 0.5, "selection/qqp"), line(10, 0.75), line(10, 0.1, "test"), line(15, 0.5)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(content)}\n" for content in lines) + '[1]\n{"step": 20, "sp')
    return path


def test_whole_lines_are_read(log: Path) -> None:
    assert [(content["step"], content["split"]) for content in read_lines(log)] == [
        (5, "selection"),
        (5, "selection/qqp"),
        (10, "selection"),
        (10, "test"),
        (15, "selection"),
    ]


def test_lines_up_to_a_step_are_those_of_the_selection_split(log: Path) -> None:
    assert [content["split"] for content in lines_up_to(log, 10)] == ["selection", "selection/qqp", "selection"]
    assert lines_up_to(log, 4) == []


def test_the_last_whole_line(log: Path) -> None:
    assert last_line(log) == line(15, 0.5)
    with log.open("w") as file:
        file.write(" " * TAIL_BYTES + "\n" + json.dumps(line(1, 0.5)))
    assert last_line(log) == line(1, 0.5)
    log.write_text("")
    assert last_line(log) is None


def test_a_curve_has_the_newest_value_of_each_step(log: Path) -> None:
    assert selection_curve(log, "mcc") == [(5, 0.25), (10, 0.75), (15, 0.5)]
    assert selection_curve(log, "f1") == []
    lines = [line(10, 0.9), line(12, "high"), line("x", 0.5), {"step": 3, "split": "selection", "metrics": []}]
    log.write_text("".join(f"{json.dumps(content)}\n" for content in [line(10, 0.75), line(2, 0.5), *lines]))
    assert selection_curve(log, "mcc") == [(2, 0.5), (10, 0.9)]


def test_a_curve_without_evaluations_whose_state_may_not_be_chosen(log: Path) -> None:
    lines = [line(5, 0.9) | {"may_choose": False}, line(10, 0.75)]
    log.write_text("".join(f"{json.dumps(content)}\n" for content in lines))
    assert selection_curve(log, "mcc") == [(5, 0.9), (10, 0.75)]
    assert selection_curve(log, "mcc", may_choose=True) == [(10, 0.75)]


def test_a_log_that_is_absent_or_no_file(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    for read in (lambda: list(read_lines(log)), lambda: lines_up_to(log, 1)):
        with pytest.raises(FileNotFoundError):
            read()
    assert (last_line(log), selection_curve(log, "mcc")) == (None, [])
    os.mkfifo(log)
    assert (last_line(log), selection_curve(log, "mcc")) == (None, [])
