"""The figures of perturbed splits, worked out by hand and by sklearn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.metrics

from lora_bench.errors import DivergedError
from lora_bench.evaluation.robustness import Trial, robustness

LABELS = np.array([1, 1, 1, 0, 0, 0, 1, 0])
SCORES = np.array([0.9, 0.8, 0.6, 0.1, 0.2, 0.7, 0.4, 0.3])  # right but for rows 5 and 6


def trial(name: str, rows: list[int], scores: list[float], labels: list[int] | None = None) -> Trial:
    positions = np.array(rows, dtype=np.int64)
    new = LABELS[positions] if labels is None else np.array(labels, dtype=np.int64)
    return Trial(name, labels is None, positions, new, np.array(scores, dtype=np.float64))


def f1(answers: list[int]) -> float:
    return float(sklearn.metrics.f1_score(LABELS, answers))


def test_a_transform_that_keeps_labels() -> None:
    # Seed 0 makes rows 0 and 3 wrong and mends row 5; seed 1 makes row 0 wrong; row 1 stays right in both.
    metrics = robustness(
        SCORES,
        LABELS,
        [trial("typo", [0, 1, 3, 5], [0.2, 0.7, 0.6, 0.4]), trial("typo", [0, 1], [0.1, 0.9])],
    )
    clean, first, second = [1, 1, 1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1, 0, 0]
    assert metrics["typo/changed"] == pytest.approx((4 + 2) / 2 / 8)
    assert metrics["typo/accuracy"] == pytest.approx((5 / 8 + 5 / 8) / 2)
    assert metrics["typo/accuracy_drop"] == pytest.approx((6 / 8 - 5 / 8) / (6 / 8))
    assert metrics["typo/f1"] == pytest.approx((f1(first) + f1(second)) / 2)
    assert metrics["typo/f1_worst"] == pytest.approx(min(f1(first), f1(second)))
    assert metrics["typo/f1_drop"] == pytest.approx(1 - (f1(first) + f1(second)) / 2 / f1(clean))
    mcc = [sklearn.metrics.matthews_corrcoef(LABELS, answers) for answers in (first, second)]
    assert metrics["typo/mcc"] == pytest.approx(np.mean(mcc))
    assert metrics["typo/mcc_worst"] == pytest.approx(min(mcc))
    assert metrics["typo/flip_rate"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    # Rows 0, 1, 3 were right and are changed; 0 and 3 are made wrong by some seed.
    assert metrics["typo/attack_success"] == pytest.approx(2 / 3)


def test_over_all_transforms_that_keep_labels() -> None:
    metrics = robustness(
        SCORES,
        LABELS,
        [
            trial("typo", [0, 1], [0.2, 0.7]),
            trial("order", list(range(8)), [0.9, 0.8, 0.4, 0.1, 0.2, 0.7, 0.6, 0.3]),
            trial("number", [0, 2, 6], [0.4, 0.9, 0.1], [0, 0, 0]),
        ],
    )
    assert metrics["perturbed/changed"] == pytest.approx((2 / 8 + 1) / 2)
    for name in ("accuracy", "f1", "mcc", "flip_rate"):
        values = [metrics["typo/" + name], metrics["order/" + name]]
        assert metrics["perturbed/" + name] == pytest.approx(sum(x for x in values if x is not None) / 2)
    assert metrics["perturbed/accuracy_worst"] == pytest.approx(5 / 8)
    assert metrics["perturbed/accuracy_drop"] == pytest.approx((6 / 8 - (5 / 8 + 6 / 8) / 2) / (6 / 8))
    assert metrics["order/flip_rate"] == pytest.approx(2 / 8)
    assert metrics["perturbed/order_consistency"] == pytest.approx(6 / 8)
    assert metrics["perturbed/attack_success"] == pytest.approx(2 / 6)  # rows 0 and 2 of the six that were right


def test_a_transform_that_changes_labels() -> None:
    metrics = robustness(SCORES, LABELS, [trial("number", [0, 2, 6], [0.4, 0.9, 0.1], [0, 0, 0])])
    assert metrics == {
        "number/changed": pytest.approx(3 / 8),
        "number/accuracy": pytest.approx(2 / 3),
        "number/accuracy_worst": pytest.approx(2 / 3),
        "number/accuracy_drop": pytest.approx(0.0),
        "number/attack_success": pytest.approx(1 / 2),  # row 2 stays a duplicate for it; row 6 was wrong before
    }


def test_what_changes_nothing_or_makes_nothing_worse() -> None:
    nothing: dict[str, Any] = robustness(SCORES, LABELS, [trial("entity", [], [], []), trial("synonym", [], [])])
    assert nothing["entity/changed"] == nothing["synonym/changed"] == 0
    assert nothing["entity/accuracy"] is nothing["entity/attack_success"] is nothing["synonym/flip_rate"] is None
    assert nothing["synonym/accuracy"] == pytest.approx(6 / 8)
    assert nothing["perturbed/accuracy_drop"] == 0
    assert "perturbed/order_consistency" not in nothing
    same = robustness(SCORES, LABELS, [trial("case", list(range(8)), SCORES.tolist())])
    assert (same["case/flip_rate"], same["case/attack_success"], same["case/f1_drop"]) == (0, 0, 0)


def test_a_drop_from_nothing_has_no_value() -> None:
    metrics = robustness(np.full(8, 0.1), LABELS, [trial("typo", [0], [0.9])])
    assert metrics["typo/f1_drop"] is metrics["typo/mcc_drop"] is None
    assert metrics["typo/accuracy_drop"] == pytest.approx(-1 / 4)


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(DivergedError):
        robustness(SCORES, LABELS, [trial("typo", [0], [np.nan])])


# -- more classes, and numbers --

CLASSES = np.array([0, 1, 2, 2, 1, 0])
PROBABILITIES = np.full((6, 3), 0.1) + 0.7 * np.eye(3)[[0, 1, 2, 0, 1, 0]]  # right but for row 3


def probabilities(classes: list[int]) -> Any:
    return np.full((len(classes), 3), 0.1) + 0.7 * np.eye(3)[classes]


def test_more_than_two_classes_flip_where_the_most_probable_one_changes() -> None:
    changed = Trial("typo", True, np.array([0, 2, 3]), CLASSES[[0, 2, 3]], probabilities([1, 2, 2]))
    unchanged = Trial("typo", True, np.array([], np.int64), CLASSES[:0], np.empty(0))
    metrics = robustness(PROBABILITIES, CLASSES, [changed, unchanged])
    predicted = [1, 1, 2, 2, 1, 0]
    macro_f1 = sklearn.metrics.f1_score(CLASSES, predicted, average="macro")
    clean = sklearn.metrics.f1_score(CLASSES, [0, 1, 2, 0, 1, 0], average="macro")
    assert metrics["typo/macro_f1"] == pytest.approx((macro_f1 + clean) / 2)
    assert metrics["typo/macro_f1_drop"] == pytest.approx((clean - (macro_f1 + clean) / 2) / clean)
    assert metrics["typo/accuracy_worst"] == pytest.approx(5 / 6)
    assert metrics["typo/flip_rate"] == pytest.approx(2 / 3)
    assert metrics["typo/attack_success"] == pytest.approx(1 / 2)  # rows 0 and 2 were right, 0 is wrong now
    assert metrics["perturbed/attack_success"] == metrics["typo/attack_success"]
    assert "typo/f1" not in metrics


def test_numbers_have_a_mean_change_and_no_attacks() -> None:
    labels = np.array([0.0, 1.0, 2.5, 5.0])
    scores = np.array([0.5, 1.0, 2.0, 4.0])
    rows = np.array([0, 3])
    metrics = robustness(scores, labels, [Trial("order", True, rows, labels[rows], np.array([1.5, 3.5]))])
    perturbed = np.array([1.5, 1.0, 2.0, 3.5])
    assert metrics["order/mean_change"] == pytest.approx((1.0 + 0.5) / 2)
    assert (
        metrics["order/pearson"]
        == metrics["order/pearson_worst"]
        == pytest.approx(np.corrcoef(perturbed, labels)[0, 1])
    )
    assert metrics["perturbed/mean_change"] == metrics["order/mean_change"]
    drop = 1 - np.corrcoef(perturbed, labels)[0, 1] / np.corrcoef(scores, labels)[0, 1]
    assert metrics["order/pearson_drop"] == pytest.approx(drop)
    names = {key.partition("/")[2] for key in metrics}
    assert names.isdisjoint({"flip_rate", "attack_success", "order_consistency", "mse"})
