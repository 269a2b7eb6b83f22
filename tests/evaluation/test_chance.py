"""Runs that learned nothing are those whose MCC guessing would give."""

from __future__ import annotations

import numpy as np
import pytest

from lora_bench.evaluation.chance import HIGHEST, LOWEST, chance_level, describe_failure, failure_notes
from lora_bench.evaluation.confusion import class_totals, compute_class_metric, compute_metric, confusion_counts
from lora_bench.evaluation.metrics import class_metrics
from lora_bench.evaluation.regression import compute_metric as compute_correlation


@pytest.mark.parametrize("examples", [400, 1000, 4000])
def test_one_guesser_in_twenty_is_above_the_bound(examples: int) -> None:
    random = np.random.default_rng(examples)
    labels, guesses = random.random(examples) < 0.37, random.random((4000, examples)) < 0.3
    share = (compute_metric(confusion_counts(labels, guesses)) > chance_level(examples)).mean()
    assert share == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(("k", "examples"), [(3, 400), (3, 2000), (6, 500), (20, 100)])
def test_one_guesser_in_twenty_of_more_classes_is_above_the_bound(k: int, examples: int) -> None:
    random = np.random.default_rng(k)
    labels, guesses = random.integers(0, k, examples), random.integers(0, k, (4000, examples))
    mcc = compute_class_metric(class_totals(labels, guesses))
    assert mcc.std() == pytest.approx(1 / np.sqrt(examples * (k - 1)), rel=0.05)
    assert (mcc > chance_level(examples, k)).mean() == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("measure", ["spearman", "pearson"])
def test_one_guesser_in_twenty_of_numbers_is_above_the_bound(measure: str) -> None:
    random = np.random.default_rng(0)
    labels, guesses = random.random(500), random.normal(size=(2000, 500))
    assert (compute_correlation(labels, guesses, measure) > chance_level(500)).mean() == pytest.approx(0.05, abs=0.015)


def test_the_bound_stays_within_its_limits() -> None:
    assert chance_level(None) == chance_level(10**7) == LOWEST
    assert chance_level(3) == HIGHEST


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
    reason = describe_failure({"metrics": metrics}, "validation", 1000)
    assert (reason is None) == (failed is None)
    assert failed is None or failed in str(reason)


def test_the_end_of_a_run_names_the_splits_and_tasks_on_which_it_learned_nothing() -> None:
    metrics = {"selection/mcc": 0.0, "validation/mcc": 0.5, "validation/one/mcc": 0.0, "validation/typo/mcc": 0.0}
    record = {"metrics": metrics, "data": {"rows": {"validation": 1000}}, "config": {"tasks": {"one": {}}}}
    (note,) = failure_notes(record)
    assert "of one" in note
    assert failure_notes({**record, "metrics": {"test/mcc": 0.01}, "data": {}})
    assert not failure_notes({**record, "metrics": {"selection/mcc": 0.0, "train/mcc": 0.0}})


def test_the_only_predicted_class_has_its_name() -> None:
    metrics = {"validation/mcc": 0.0, "validation/macro_f1": 0.2}
    always_no = class_metrics(np.array([[0.2, 0.5, 0.3]] * 4), np.array([0, 1, 2, 1]), ["yes", "no", "maybe"])
    record = {"metrics": metrics, "data": {}, "per_class": {"validation": always_no}}
    assert describe_failure(record, "validation", 500) == "it predicts label no for every example"
    for per_class in (
        {"validation": always_no | {"no": {**always_no["no"], "precision": 0.6}}},
        {"validation": 3},
        None,
    ):
        reason = describe_failure({**record, "per_class": per_class}, "validation", 500)
        assert reason == "its validation MCC of 0.000 is not above chance"
    of_two = {"metrics": {"validation/mcc": 0.0, "validation/recall": 1.0}, "data": {"label_names": ["no", "yes"]}}
    assert describe_failure(of_two, "validation", 500) == "it predicts label yes for every example"
    of_two["config"] = {"data": {"positive_label": "no"}}
    assert describe_failure(of_two, "validation", 500) == "it predicts label no for every example"


def test_numbers_within_chance() -> None:
    for value, reason in ((0.0, "the same number"), (0.05, "Spearman ρ of 0.050"), (0.4, None), (None, None)):
        record = {"metrics": {"validation/spearman": value, "validation/mse": 1.0}}
        text = describe_failure(record, "validation", 500)
        assert (text is None) == (reason is None)
        assert reason is None or reason in str(text)
    record = {"metrics": {"validation/spearman": 0.0, "selection/spearman": 0.0}, "data": {}, "config": {}}
    assert len(failure_notes(record)) == 1
