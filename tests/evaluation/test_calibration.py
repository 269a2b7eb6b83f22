"""The temperature is the one that an optimiser of scipy finds, and one that generated the labels is found again."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lora_bench.evaluation.calibration import COLDEST, HOTTEST, calibrated, fit_temperature, score_calibrated
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
        value = score(calibrated(scores, float(np.exp(log_t))), labels, {})["nll"]
        assert value is not None
        return value

    best = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(scores, labels) == pytest.approx(np.exp(best.x), rel=1e-5)


def test_what_made_the_labels_is_found_again() -> None:
    scores, labels = sample(200_000, 2.5)
    assert fit_temperature(scores, labels) == pytest.approx(2.5, rel=0.02)
    before, after = score(scores, labels, {}), score_calibrated(scores, labels, fit_temperature(scores, labels))
    assert set(after) == {"calibrated/nll", "calibrated/ece", "calibrated/brier"}
    for name in ("nll", "ece", "brier"):
        old, new = before[name], after[f"calibrated/{name}"]
        assert old is not None
        assert new is not None
        assert new < old
    assert after["calibrated/ece"] == pytest.approx(0, abs=0.005)


def test_one_changes_nothing_and_none_changes_a_label() -> None:
    scores = np.array([0.0, 1e-9, 0.3, 0.5, 0.7, 1.0])
    np.testing.assert_allclose(calibrated(scores, 1.0), scores, atol=1e-14)
    for temperature in (COLDEST, 0.5, 3.0, HOTTEST):
        assert ((calibrated(scores, temperature) >= 0.5) == (scores >= 0.5)).all()


def test_extremes_end_at_the_bounds() -> None:
    labels = np.array([0, 1, 0, 1])
    assert fit_temperature(np.array([0.1, 0.9, 0.2, 1.0]), labels) == pytest.approx(COLDEST)  # all right
    assert fit_temperature(np.array([0.9, 0.1, 0.8, 0.0]), labels) == pytest.approx(HOTTEST)  # all wrong
