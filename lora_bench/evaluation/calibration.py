"""What is fitted on selection to use a run's scores well: one temperature and one threshold.

Temperature scaling (Guo et al. 2017, section 4.2) makes the scores of all pairs less or more certain alike, so that
confidence is honest; which label is the likelier does not change. The threshold is the score from which on the label is
1, where the labels of both kinds are balanced otherwise than 0.5 would cut them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.config.metric_names import DEFAULT_THRESHOLD, MAIN_METRICS
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.confusion import compute_metric, confusion_counts
from lora_bench.evaluation.metrics import SMALLEST, require_finite, score

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
_TEMPERATURE_METRICS = ("nll", "ece", "brier")


@dataclass(frozen=True)
class Calibration:
    """Fitted on a selection split, for any other."""

    temperature: float
    """What the scores' logits are divided by."""
    threshold: float = DEFAULT_THRESHOLD
    """The least score that is labelled 1; of the scores as they are, not of those at the temperature."""

    @classmethod
    def fit(cls, scores: NDArray[np.float64], labels: NDArray[np.int64]) -> Calibration:
        """Of (N,) P(label 1) and (N,) labels, 0 or 1.

        Raises:
            DivergedError: a score is not a finite number.
        """
        return cls(fit_temperature(scores, labels), fit_threshold(scores, labels))

    @classmethod
    def read(cls, chosen: Mapping[str, Any], place: str = "selection") -> Calibration | None:
        """Read what a record says of its selection; None where an older run was not calibrated.

        Args:
            chosen: a part of the record.
            place: where in the record it stands.

        Raises:
            UserError: the temperature or the threshold is not such that `fit` could have found it.
        """
        temperature, threshold = chosen.get("temperature"), chosen.get("threshold", DEFAULT_THRESHOLD)
        if temperature is None:
            return None
        bounds = {"temperature": (temperature, MIN_TEMPERATURE, MAX_TEMPERATURE), "threshold": (threshold, 0, 1)}
        for name, (value, low, high) in bounds.items():
            if type(value) not in (int, float) or not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                raise UserError(f"{place}.{name} is not a number from {low:g} to {high:g}", code=Code.DAMAGED)
        return cls(float(temperature), float(threshold))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


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
    require_finite(scores)
    margins = np.where(labels == 1, 1.0, -1.0) * _logits(scores)  # (N,) above 0 where the answer is right
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    for _ in range(60):
        middle = (low + high) / 2
        slope = -(margins * _sigmoid(-middle * margins)).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(2 / (low + high))


def fit_threshold(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """The threshold with the greatest MCC: halfway between two neighbouring scores; of equals the nearest to 0.5.

    Where none is better than 0.5, as where all labels are alike, it is 0.5.

    Args:
        scores: (N,) P(label 1).
        labels: (N,) 0 or 1.

    Raises:
        DivergedError: a score is not a finite number.
    """
    require_finite(scores)
    order = np.argsort(-scores)
    ranked, right = scores[order], labels[order].cumsum()  # (N,) falling; ones among the first so many
    ends = np.flatnonzero(ranked[:-1] > ranked[1:])  # (C,) a cut lies behind each
    cuts = (ranked[ends] + ranked[ends + 1]) / 2
    cuts = np.where(cuts > ranked[ends + 1], cuts, ranked[ends])  # neighbours among floats have nothing between them
    tp, said = right[ends], ends + 1
    ones, rows = labels.sum(), len(labels)
    counts = np.stack([tp, said - tp, ones - tp, rows - said - ones + tp], -1)  # (C, 4)
    mcc = np.append(compute_metric(counts), compute_metric(confusion_counts(labels, scores >= DEFAULT_THRESHOLD)))
    cuts = np.append(cuts, DEFAULT_THRESHOLD)
    best = cuts[mcc >= mcc.max()]
    return float(best[np.abs(best - DEFAULT_THRESHOLD).argmin()])


def apply_temperature(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """(N,) P(label 1) at the temperature: the scores' logits divided by it."""
    return _sigmoid(_logits(scores) / temperature)


def score_calibrated(
    scores: NDArray[np.float64], labels: NDArray[np.int64], calibration: Calibration
) -> dict[str, float | None]:
    """`calibrated/…`: `nll`, `ece` and `brier` at the temperature; `accuracy`, `f1` and `mcc` at the threshold."""
    values = score(apply_temperature(scores, calibration.temperature), labels, {})
    counts = confusion_counts(labels, scores >= calibration.threshold)
    values = {name: values[name] for name in _OF_TEMPERATURE} | {
        m: float(compute_metric(counts, m)) for m in MAIN_METRICS
    }
    return {f"calibrated/{name}": value for name, value in values.items()}


def _logits(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(scores, SMALLEST, 1 - SMALLEST)
    return np.log(p) - np.log1p(-p)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -x))
