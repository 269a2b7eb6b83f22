"""The temperature is the one that an optimiser of scipy finds, the threshold the best of all that there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.metrics import f1_score, matthews_corrcoef

from lora_bench.errors import DivergedError
from lora_bench.evaluation.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    Calibration,
    apply_temperature,
    fit_temperature,
    fit_threshold,
    score_calibrated,
)
from lora_bench.evaluation.confusion import compute_metric, confusion_counts
from lora_bench.evaluation.metrics import score

RANDOM = np.random.default_rng(0)


def sample(rows: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose logits are `temperature` times too large, and labels."""
    logits = RANDOM.normal(0, 2, rows)
    labels = (RANDOM.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return 1 / (1 + np.exp(-temperature * logits)), labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_least_negative_log_likelihood(temperature: float) -> None:
    scores, labels = sample(400, temperature)

    def nll(log_t: float) -> float:
        value = score(apply_temperature(scores, float(np.exp(log_t))), labels, {})["nll"]
        assert value is not None
        return value

    best = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(scores, labels) == pytest.approx(np.exp(best.x), rel=1e-5)


def test_what_made_the_labels_is_found_again() -> None:
    scores, labels = sample(200_000, 2.5)
    assert fit_temperature(scores, labels) == pytest.approx(2.5, rel=0.02)
    before, after = score(scores, labels, {}), score_calibrated(scores, labels, Calibration.fit(scores, labels))
    measures = ("nll", "ece", "brier", "accuracy", "f1", "mcc")
    assert set(after) == {f"calibrated/{name}" for name in measures}
    for name in ("nll", "ece", "brier"):
        old, new = before[name], after[f"calibrated/{name}"]
        assert old is not None
        assert new is not None
        assert new < old
    assert after["calibrated/ece"] == pytest.approx(0, abs=0.005)


def test_one_changes_nothing_and_none_changes_a_label() -> None:
    scores = np.array([0.0, 1e-9, 0.3, 0.5, 0.7, 1.0])
    np.testing.assert_allclose(apply_temperature(scores, 1.0), scores, atol=1e-14)
    for temperature in (MIN_TEMPERATURE, 0.5, 3.0, MAX_TEMPERATURE):
        assert ((apply_temperature(scores, temperature) >= 0.5) == (scores >= 0.5)).all()


def test_extremes_end_at_the_bounds() -> None:
    labels = np.array([0, 1, 0, 1])
    assert fit_temperature(np.array([0.1, 0.9, 0.2, 1.0]), labels) == pytest.approx(MIN_TEMPERATURE)  # all right
    assert fit_temperature(np.array([0.9, 0.1, 0.8, 0.0]), labels) == pytest.approx(MAX_TEMPERATURE)  # all wrong


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_no_threshold_has_a_greater_mcc(rows: list[tuple[float, int]]) -> None:
    scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    threshold = fit_threshold(scores.astype(float), labels)

    def mcc(cut: float) -> float:
        return float(compute_metric(confusion_counts(labels, scores >= cut)))

    telling = [cut for cut in scores if (scores < cut).any()]
    assert mcc(threshold) == pytest.approx(max(map(mcc, [*telling, 0.5])), abs=1e-9)


def test_a_threshold_lies_halfway_and_as_near_to_one_half_as_may_be() -> None:
    labels = np.array([0, 0, 1, 1])
    assert fit_threshold(np.array([0.05, 0.1, 0.3, 0.9]), labels) == pytest.approx(0.2)
    assert fit_threshold(np.array([0.1, 0.4, 0.6, 0.9]), labels) == 0.5  # as good as any
    assert fit_threshold(np.array([0.1, 0.9, 0.6, 0.2]), np.ones(4, int)) == 0.5  # nothing to tell apart
    assert fit_threshold(np.array([0.3, 0.3, 0.3, 0.3]), labels) == 0.5
    above = np.nextafter(0.2, 1)  # nothing lies between the two
    assert fit_threshold(np.array([0.1, 0.2, above, 0.3]), labels) == above
    with pytest.raises(DivergedError):
        fit_threshold(np.array([0.1, np.nan]), np.array([0, 1]))


def test_labels_are_cut_at_the_threshold_of_the_scores_as_they_are() -> None:
    scores, labels = sample(500, 2.0)
    scores = scores**3  # too few ones at 0.5
    calibration = Calibration.fit(scores, labels)
    assert calibration.threshold < 0.4
    metrics = score_calibrated(scores, labels, calibration)
    assert metrics["calibrated/f1"] == pytest.approx(f1_score(labels, scores >= calibration.threshold))
    assert metrics["calibrated/mcc"] == pytest.approx(matthews_corrcoef(labels, scores >= calibration.threshold))
    assert metrics["calibrated/mcc"] > matthews_corrcoef(labels, scores >= 0.5)


def test_records_are_read_as_written_and_older_ones_cut_at_one_half() -> None:
    calibration = Calibration(1.5, 0.4)
    assert Calibration.read({"step": 3, **calibration.to_json()}) == calibration
    assert Calibration.read({"temperature": 1.5}) == Calibration(1.5, 0.5)
    assert Calibration.read({"step": 3}) is None
