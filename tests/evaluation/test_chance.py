"""Runs that learned nothing are those whose MCC guessing would give."""

from __future__ import annotations

import numpy as np
import pytest

from lora_bench.evaluation.chance import HIGHEST, LOWEST, chance_mcc, describe_failure, failure_notes
from lora_bench.evaluation.confusion import compute_metric, confusion_counts


@pytest.mark.parametrize("examples", [400, 1000, 4000])
def test_one_guesser_in_twenty_is_above_the_bound(examples: int) -> None:
    random = np.random.default_rng(examples)
    labels, guesses = random.random(examples) < 0.37, random.random((4000, examples)) < 0.3
    share = (compute_metric(confusion_counts(labels, guesses)) > chance_mcc(examples)).mean()
    assert share == pytest.approx(0.05, abs=0.015)


def test_the_bound_stays_within_its_limits() -> None:
    assert chance_mcc(None) == chance_mcc(10**7) == LOWEST
    assert chance_mcc(3) == HIGHEST


@pytest.mark.parametrize(
    ("metrics", "failed"),
    [
        ({"validation/mcc": 0.0, "validation/recall": 1}, "label 1 for every example"),
        ({"validation/mcc": 0.0, "validation/recall": 0.0}, "label 0 for every example"),
        ({"validation/mcc": 0.03}, "not above chance"),
        ({"validation/mcc": -0.4}, "not above chance"),
        ({"validation/mcc": 0.06}, None),
        ({"validation/mcc": None}, None),
        ({}, None),
    ],
)
def test_a_run_within_chance_is_named_with_the_reason(metrics: dict[str, float], failed: str | None) -> None:
    reason = describe_failure(metrics, "validation", 1000)
    assert (reason is None) == (failed is None)
    assert failed is None or failed in str(reason)


def test_the_end_of_a_run_names_the_splits_and_tasks_on_which_it_learned_nothing() -> None:
    metrics = {"selection/mcc": 0.0, "validation/mcc": 0.5, "validation/one/mcc": 0.0, "validation/typo/mcc": 0.0}
    record = {"metrics": metrics, "data": {"rows": {"validation": 1000}}, "config": {"tasks": {"one": {}}}}
    (note,) = failure_notes(record)
    assert "of one" in note
    assert failure_notes({**record, "metrics": {"test/mcc": 0.01}, "data": {}})
    assert not failure_notes({**record, "metrics": {"selection/mcc": 0.0, "train/mcc": 0.0}})
