"""Temperature scaling (Guo et al. 2017, section 4.2): one number, fitted on selection, that makes confidence honest.

The scores of all pairs are made less or more certain alike; which label is the likelier does not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_bench.evaluation.metrics import SMALLEST, need_finite, score

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLDEST, HOTTEST = 0.05, 20.0
_MEASURES = ("nll", "ece", "brier")


def fit_temperature(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """The temperature T in [COLDEST, HOTTEST] at which the scores' mean −log p(label) is least.

    It is convex in 1 / T, so the sign of its slope tells on which side the minimum lies: bisection finds it. Answers
    that are all right have theirs at COLDEST, answers no better than chance at HOTTEST.

    Args:
        scores: (N,) P(label 1).
        labels: (N,) 0 or 1.

    Raises:
        DivergedError: a score is not a finite number.
    """
    need_finite(scores)
    margins = np.where(labels == 1, 1.0, -1.0) * _logits(scores)  # (N,) above 0 where the answer is right
    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(60):
        middle = (low + high) / 2
        slope = -(margins * _sigmoid(-middle * margins)).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(2 / (low + high))


def calibrated(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """(N,) P(label 1) at the temperature: the scores' logits divided by it."""
    return _sigmoid(_logits(scores) / temperature)


def score_calibrated(
    scores: NDArray[np.float64], labels: NDArray[np.int64], temperature: float
) -> dict[str, float | None]:
    """`calibrated/nll`, `calibrated/ece` and `calibrated/brier`; what depends on the label alone stays as it was."""
    values = score(calibrated(scores, temperature), labels, {})
    return {f"calibrated/{name}": values[name] for name in _MEASURES}


def _logits(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(scores, SMALLEST, 1 - SMALLEST)
    return np.log(p) - np.log1p(-p)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -x))
