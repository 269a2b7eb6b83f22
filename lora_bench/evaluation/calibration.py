"""Calibration of a run's scores on the selection split: one temperature and one threshold.

Temperature scaling (Guo et al. 2017, section 4.2) divides the logits of all scores by one number, so that a score of p
is right with probability p. It does not change which label is the most likely. The threshold is the score from which on
label 1 of two is predicted; it differs from 0.5 where another one gives a higher MCC. With more classes there is no
threshold, and with numbers to predict there is no calibration.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.config.metric_names import DEFAULT_THRESHOLD, MAIN_METRICS
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.confusion import compute_metric, confusion_counts
from lora_bench.evaluation.metrics import SMALLEST, require_finite, score
from lora_bench.evaluation.scores import form_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from lora_bench.evaluation.scores import Labels

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Bounds of a fitted temperature."""
_TEMPERATURE_METRICS = ("nll", "ece", "brier")


@dataclass(frozen=True)
class Calibration:
    """A temperature and a threshold, fitted on the selection split and applied to other splits."""

    temperature: float
    """The divisor of the scores' logits."""
    threshold: float | None = DEFAULT_THRESHOLD
    """The lowest score that is predicted as label 1. It applies to raw scores, not to those at the temperature. None
    with more than two classes."""

    @classmethod
    def fit(cls, scores: NDArray[np.float64], labels: Labels) -> Calibration | None:
        """Fit the temperature and, for two classes, the threshold; None where numbers are predicted.

        Args:
            scores: (N,) P(label 1), or (N, C) probabilities of the classes.
            labels: (N,) class numbers, or numbers.

        Raises:
            DivergedError: a score is not a finite number.
        """
        form = form_of(scores, labels)
        if form == "regression":
            return None
        threshold = fit_threshold(scores, labels.astype(np.int64)) if form == "binary" else None
        return cls(fit_temperature(scores, labels), threshold)

    @classmethod
    def read(cls, selection: Mapping[str, Any], record_key: str = "selection") -> Calibration | None:
        """Return the calibration that a record holds; None for an older run that was not calibrated.

        A temperature without a threshold gets `DEFAULT_THRESHOLD`; a threshold of null stays None.

        Args:
            selection: the section of the record.
            record_key: the key of that section in the record, for messages.

        Raises:
            UserError: the temperature or the threshold is no number, or outside the range of values that `fit` returns.
        """
        temperature, threshold = selection.get("temperature"), selection.get("threshold", DEFAULT_THRESHOLD)
        if temperature is None:
            return None
        bounds = {"temperature": (temperature, MIN_TEMPERATURE, MAX_TEMPERATURE), "threshold": (threshold, 0, 1)}
        for name, (value, low, high) in bounds.items():
            if name == "threshold" and value is None:
                continue
            if type(value) not in (int, float) or not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                raise UserError(f"{record_key}.{name} is not a number from {low:g} to {high:g}", code=Code.DAMAGED)
        return cls(float(temperature), None if threshold is None else float(threshold))

    def to_json(self) -> dict[str, float | None]:
        """Return the two numbers by name, as a record holds them."""
        return asdict(self)


def fit_temperature(scores: NDArray[np.float64], labels: Labels) -> float:
    """Return the temperature T in [MIN_TEMPERATURE, MAX_TEMPERATURE] with the smallest mean −log p(label).

    The mean is convex in 1 / T, so bisection on the sign of its slope finds the minimum. If every prediction is right,
    the minimum is at MIN_TEMPERATURE; if predictions are no better than chance, it is at MAX_TEMPERATURE.

    Args:
        scores: (N,) P(label 1), or (N, C).
        labels: (N,) class numbers.

    Raises:
        DivergedError: a score is not a finite number.
    """
    require_finite(scores)
    if scores.ndim > 1:
        log_p = np.log(np.clip(scores, SMALLEST, 1.0))  # (N, C)
        of_label = log_p[np.arange(len(labels)), labels]  # (N,)

        def slope_at(inverse: float) -> float:
            """Return the slope of the mean by 1 / T: E[log p] at the temperature, less log p(label)."""
            p = _softmax(inverse * log_p)
            return float(((p * log_p).sum(1) - of_label).mean())

        return _bisect_temperature(slope_at)
    margins = np.where(labels == 1, 1.0, -1.0) * _logits(scores)  # (N,) above 0 where the prediction is right
    return _bisect_temperature(lambda inverse: -float((margins * _sigmoid(-inverse * margins)).mean()))


def _bisect_temperature(slope_at: Callable[[float], float]) -> float:
    """Return the temperature T where the rising slope of the loss by 1 / T crosses 0."""
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope_at(middle) < 0 else (low, middle)
    return float(2 / (low + high))


def fit_threshold(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the threshold with the highest MCC: halfway between two neighbouring scores; of equals the nearest to 0.5.

    It is 0.5 if no other threshold is better, for example where all labels or all scores are equal.

    Args:
        scores: (N,) P(label 1).
        labels: (N,) 0 or 1.

    Raises:
        DivergedError: a score is not a finite number.
    """
    require_finite(scores)
    order = np.argsort(-scores)
    sorted_scores, ones_above = scores[order], labels[order].cumsum()  # (N,) descending; label 1 among the first n
    ends = np.flatnonzero(sorted_scores[:-1] > sorted_scores[1:])  # (C,) a threshold lies after each
    thresholds = (sorted_scores[ends] + sorted_scores[ends + 1]) / 2
    # Adjacent floats have no midpoint.
    thresholds = np.where(thresholds > sorted_scores[ends + 1], thresholds, sorted_scores[ends])
    tp, n_predicted = ones_above[ends], ends + 1
    n_ones, n_rows = labels.sum(), len(labels)
    counts = np.stack([tp, n_predicted - tp, n_ones - tp, n_rows - n_predicted - n_ones + tp], -1)  # (C, 4)
    mcc = np.append(compute_metric(counts), compute_metric(confusion_counts(labels, scores >= DEFAULT_THRESHOLD)))
    thresholds = np.append(thresholds, DEFAULT_THRESHOLD)
    best_thresholds = thresholds[mcc >= mcc.max()]
    return float(best_thresholds[np.abs(best_thresholds - DEFAULT_THRESHOLD).argmin()])


def apply_temperature(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return scores at the temperature, (N,) or (N, C): the sigmoid or softmax of their logits, divided by it."""
    if scores.ndim > 1:
        return _softmax(np.log(np.clip(scores, SMALLEST, 1.0)) / temperature)
    return _sigmoid(_logits(scores) / temperature)


def score_calibrated(
    scores: NDArray[np.float64], labels: Labels, calibration: Calibration | None
) -> dict[str, float | None]:
    """Return the calibrated metrics of one split; empty without a calibration.

    Args:
        scores: (N,) P(label 1), or (N, C), not calibrated.
        labels: (N,) class numbers.
        calibration: fitted on the selection split.

    Returns:
        `calibrated/nll`, `calibrated/ece` and `calibrated/brier` at the temperature; `calibrated/accuracy`,
        `calibrated/f1` and `calibrated/mcc` of the uncalibrated scores at the threshold, if there is one.

    Raises:
        DivergedError: a score is not a finite number.
    """
    if calibration is None:
        return {}
    values = score(apply_temperature(scores, calibration.temperature), labels, {})
    values = {name: values[name] for name in _TEMPERATURE_METRICS}
    if calibration.threshold is not None:
        counts = confusion_counts(labels, scores >= calibration.threshold)
        values |= {name: float(compute_metric(counts, name)) for name in MAIN_METRICS}
    return {f"calibrated/{name}": value for name, value in values.items()}


def _logits(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log(p / (1 - p)); scores are clipped to [1e-15, 1 - 1e-15], so that 0 and 1 stay finite."""
    p = np.clip(scores, SMALLEST, 1 - SMALLEST)
    return np.log(p) - np.log1p(-p)


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the softmax (N, C) over the last axis."""
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 / (1 + e⁻ˣ) without overflow."""
    return np.exp(-np.logaddexp(0, -x))
